"""The JSON documents of canaries, and how they are made."""

from collections.abc import Callable

from pydantic import BaseModel, ConfigDict, Field, field_validator

from bitneck.errors import InvalidConfig
from bitneck.ids import ID_PATTERN, check_id
from bitneck_cloud.canary.photographs import Agreement, Photographs
from bitneck_cloud.canary.records import Running
from bitneck_cloud.engine.tally import PointTally, Tally, note_of, share_interval
from bitneck_cloud.fleet.patterns import MAX_PATTERN_CHARACTERS
from bitneck_cloud.fleet.records import BundleChoice

__all__ = [
    "CanaryBegun",
    "CanaryEnded",
    "CanaryInfo",
    "CanaryPromoted",
    "CanaryRequest",
    "CandidateInfo",
    "choice_info",
    "comparison_of",
    "photographs_of",
]


class CanaryRequest(BaseModel):
    """A canary to begin."""

    model_config = ConfigDict(extra="forbid")

    bundle: str = Field(json_schema_extra={"pattern": ID_PATTERN}, description="name of a folder among the candidates")
    clients: str = Field(
        min_length=1,
        max_length=MAX_PATTERN_CHARACTERS,
        description="pattern of the names of the clients that get it (*, ?, [abc]), or @ and the name of a group",
    )

    @field_validator("bundle")
    @classmethod
    def _check_bundle(cls, bundle: str) -> str:
        try:
            return check_id(bundle, "bundle")
        except InvalidConfig as exc:
            raise ValueError("a bundle is the name of a folder: a-z, digits, dot, underscore, hyphen") from exc


class CandidateInfo(BaseModel):
    """A folder among the candidates that holds a bundle of this model, or none that can be read."""

    bundle: str = Field(description="name of the folder")
    bundle_id: str = Field(description="empty if its manifest cannot be read")
    points: int
    served: bool = Field(description="whether it is the bundle that is served")
    problem: str = Field(description="why it cannot be read; empty if it can")


class ChoiceInfo(BaseModel):
    """A bundle that was chosen over the control API."""

    bundle: str = Field(description="name of its folder among the candidates")
    bundle_id: str
    clients: str = Field(description="pattern of the clients that have it; empty for all")
    since: str = Field(description="RFC 3339")
    by: str


class PointInfo(BaseModel):
    """Answered frames of one operating point."""

    id: str
    frames: int
    payload_bytes_mean: float | None
    link_bytes_mean: float | None = Field(description="both directions; null where the link's bytes are not counted")


class LabelShare(BaseModel):
    """A class, and how much of the answers it is."""

    name: str
    share: float = Field(description="of the answers; for segmentation the mean share of pixels")


class GroupInfo(BaseModel):
    """The sessions and frames of one bundle."""

    bundle_id: str
    sessions: int = Field(description="with a stream at this moment")
    frames: int = Field(description="that were answered")
    faults: int = Field(description="frames that failed, or were refused")
    faults_by_code: dict[str, int] = Field(description="by gRPC status number")
    fault_share: float | None = Field(description="of all frames; null if there was none")
    fault_interval: tuple[float, float] | None = Field(description="95 % confidence, Wilson's score interval")
    payload_bytes_mean: float | None
    link_bytes_mean: float | None
    best_score_mean: float | None = Field(description="of the best label; null for segmentation")
    labels: list[LabelShare] = Field(description="the five most frequent ones")
    points: list[PointInfo]


class Comparison(BaseModel):
    """Frames since the canary began, or since the server's start. A frame counts for the bundle that decoded it."""

    since: str = Field(description="RFC 3339")
    current: GroupInfo
    candidate: GroupInfo
    note: str = Field(description="what may be said of the faults of both")


class PointAgreement(BaseModel):
    """Two operating points on the same photographs."""

    current: str = Field(description="the point of the current bundle")
    candidate: str = Field(description="the point of the candidate")
    photographs: int
    agreement: float | None = Field(
        description="of the best labels of both, compared by name; for class maps the share of equal pixels"
    )
    current_agreement: float | None = Field(
        description="of the current bundle's answer with its own network without compression"
    )
    candidate_agreement: float | None = Field(description="the same of the candidate")
    current_payload_bytes: float | None
    candidate_payload_bytes: float | None


class PhotographsInfo(BaseModel):
    """The comparison on photographs."""

    state: str = Field(description="waiting, running, done, impossible, or ended before it was done")
    problem: str = Field(description="why it is impossible; empty if it is not")
    photographs: int = Field(description="that are compared in all")
    done: int
    unreadable: int
    left_s: float | None = Field(description="seconds until it is done, by those so far; null unless it runs")
    points: list[PointAgreement]


class CanaryInfo(BaseModel):
    """The canary of a model, if one runs."""

    model: str
    bundle_id: str = Field(description="the current bundle")
    base_bundle_id: str = Field(description="what the folder of --bundle held when it was loaded last")
    kept: bool = Field(description="whether canaries and promotions survive a restart (state_db)")
    promoted: ChoiceInfo | None = Field(description="if the current bundle is one that was promoted")
    canary: ChoiceInfo | None = Field(description="null if there is none")
    problem: str = Field(
        description="why devices that do not have the canary's bundle get the current one; empty if they do not"
    )
    changing: str = Field(
        description="what is being done with the model's bundle now, and for how many seconds; empty if nothing is"
    )
    comparison: Comparison | None = Field(description="null while no canary runs")
    photographs: PhotographsInfo | None = Field(description="null without canary_photos")


class CanaryBegun(CanaryInfo):
    """The canary that was begun."""

    told: int = Field(description="streams whose clients were told that they have another bundle now")


class CanaryEnded(BaseModel):
    """A canary that was ended, with the last comparison."""

    model: str
    bundle_id: str = Field(description="of the bundle that all clients get now")
    told: int = Field(description="streams whose clients were told that they have another bundle now")
    comparison: Comparison | None = Field(description="null if the bundle could not be loaded")
    photographs: PhotographsInfo | None


class CanaryPromoted(CanaryEnded):
    """A canary that was promoted."""

    kept: bool = Field(description="whether that survives a restart")
    folder: str = Field(description="of the bundle, on the server's disk")
    note: str = Field(description="what has to be done so that a restart serves it too")


def choice_info(choice: BundleChoice | None) -> ChoiceInfo | None:
    """A choice; None for none."""
    if choice is None:
        return None
    return ChoiceInfo(
        bundle=choice.bundle, bundle_id=choice.bundle_id, clients=choice.clients, since=choice.since, by=choice.by
    )


def comparison_of(running: Running, tallies: tuple[Tally, Tally], sessions: Callable[[str], int]) -> Comparison:
    """The live comparison.

    Args:
        running: the canary.
        tallies: of the current bundle, and of the candidate.
        sessions: number of connected sessions of a bundle, by its id.
    """
    ids = running.current.bundle.bundle_id, running.candidate.bundle.bundle_id
    current, candidate = (
        _group(bundle_id, tally, sessions(bundle_id)) for bundle_id, tally in zip(ids, tallies, strict=True)
    )
    return Comparison(since=running.counted_since, current=current, candidate=candidate, note=note_of(*tallies))


def photographs_of(photographs: Photographs | None) -> PhotographsInfo | None:
    """The comparison on photographs; None if there is none."""
    if photographs is None:
        return None
    return PhotographsInfo(
        state=photographs.state,
        problem=photographs.problem,
        photographs=photographs.total,
        done=photographs.done,
        unreadable=photographs.unreadable,
        left_s=photographs.left_s,
        points=[_agreement(pair) for pair in photographs.points],
    )


def _agreement(pair: Agreement) -> PointAgreement:
    return PointAgreement(
        current=pair.current,
        candidate=pair.candidate,
        photographs=pair.photographs,
        agreement=pair.same.value,
        current_agreement=pair.current_own.value,
        candidate_agreement=pair.candidate_own.value,
        current_payload_bytes=pair.current_bytes.value,
        candidate_payload_bytes=pair.candidate_bytes.value,
    )


def _group(bundle_id: str, tally: Tally, sessions: int) -> GroupInfo:
    return GroupInfo(
        bundle_id=bundle_id,
        sessions=sessions,
        frames=tally.all.frames,
        faults=tally.faults.total(),
        faults_by_code={str(code): count for code, count in sorted(tally.faults.items())},
        fault_share=tally.fault_share,
        fault_interval=share_interval(tally.faults.total(), tally.frames),
        payload_bytes_mean=tally.all.mean_payload_bytes,
        link_bytes_mean=tally.all.mean_link_bytes,
        best_score_mean=tally.best_score,
        labels=[LabelShare(name=name, share=share) for name, share in tally.labels()],
        points=[_point(point, counts) for point, counts in sorted(tally.points.items())],
    )


def _point(point: str, counts: PointTally) -> PointInfo:
    return PointInfo(
        id=point,
        frames=counts.frames,
        payload_bytes_mean=counts.mean_payload_bytes,
        link_bytes_mean=counts.mean_link_bytes,
    )
