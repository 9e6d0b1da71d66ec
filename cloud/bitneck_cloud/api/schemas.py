"""The JSON documents of the control API, and how they are made from sessions and models."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from bitneck.errors import InvalidConfig
from bitneck_cloud.engine.outputs import output_tensors
from bitneck_cloud.engine.served_model import ServedModel
from bitneck_cloud.sessions.rates import ClientChooses, FixedPoint, MaxBytesPerFrame, MaxKbps, MinAccuracy, RatePolicy
from bitneck_cloud.sessions.session import Session

__all__ = [
    "ModelInfo",
    "ModelMetadata",
    "NewSessionsRate",
    "PointInfo",
    "RateAnswer",
    "RateRequest",
    "ReloadAnswer",
    "SessionInfo",
    "TensorInfo",
    "model_info",
    "model_metadata",
    "policy_dict",
    "session_info",
]


class RateRequest(BaseModel):
    """A rate: exactly one of these fields."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    point: str | None = Field(None, description="id of an operating point")
    max_bytes_per_frame: float | None = Field(None, gt=0, description="mean payload bytes of a frame, at most")
    max_kbps: float | None = Field(
        None, gt=0, description="mean rate on the link at the session's frame rate, of the busier direction, kbit/s"
    )
    min_accuracy: float | None = Field(None, ge=0, le=1, description="measured accuracy, at least, a fraction")
    auto: Literal[True] | None = Field(None, description="the client chooses")

    def policy(self) -> RatePolicy:
        """The policy that the request gives.

        Raises:
            InvalidConfig: none, or more than one.
        """
        given = self.model_dump(exclude_none=True)
        if len(given) != 1:
            raise InvalidConfig(
                f"give exactly one of point, max_bytes_per_frame, max_kbps, min_accuracy and auto; got {len(given)}"
            )
        match given:
            case {"point": str(point)}:
                return FixedPoint(point)
            case {"max_bytes_per_frame": float(limit)}:
                return MaxBytesPerFrame(limit)
            case {"max_kbps": float(limit)}:
                return MaxKbps(limit)
            case {"auto": True}:
                return ClientChooses()
            case _:
                return MinAccuracy(given["min_accuracy"])


class RateAnswer(BaseModel):
    """The rate that was set."""

    policy: dict[str, str | float | bool]
    point: str | None = Field(description="the chosen operating point; null if the client chooses")
    pushed: bool = Field(description="whether a connected client was told at once")


class NewSessionsRate(BaseModel):
    """The rate for new sessions."""

    policy: dict[str, str | float | bool]
    points: dict[str, str | None] = Field(description="the operating point chosen, by model")


class PointInfo(BaseModel):
    """An operating point, as measured."""

    id: str
    unit: str = Field(description="points of one unit differ in step only")
    split: str
    stride: int
    channels: int
    step: float
    latent_shape: tuple[int, int, int]
    payload_bytes: float
    bpp_payload: float
    accuracy: float
    agreement: float
    dataset: str
    images: int


class TensorInfo(BaseModel):
    """A tensor, as the Open Inference Protocol describes one."""

    name: str
    datatype: str
    shape: list[int]


class ModelInfo(BaseModel):
    """A served model; its ladder is in order of rate."""

    name: str
    bundle_id: str
    task: str
    backbone: str
    input_height: int = Field(description="pixels")
    input_width: int
    classes: int
    outputs: list[TensorInfo] = Field(description="of an answer")
    uncompressed_accuracy: float = Field(description="top-1, or mean IoU for segmentation")
    points: list[PointInfo]


class ReloadAnswer(BaseModel):
    """What a reload changed."""

    bundle_id: str
    changed: bool = Field(description="false if the folder has the bundle that is served already")
    added: list[str] = Field(description="operating points")
    removed: list[str]
    altered: list[str]
    files_loaded: int = Field(description="ONNX files that were read; files that both bundles share were not")


class ModelMetadata(BaseModel):
    """A model, as the Open Inference Protocol describes one. Its versions are bundle ids."""

    name: str
    versions: list[str]
    platform: str
    inputs: list[TensorInfo]
    outputs: list[TensorInfo]


class SessionInfo(BaseModel):
    """A session, connected or waiting to be resumed."""

    id: str
    client: str
    model: str
    bundle_id: str
    spool: str | None = Field(description="id of the device's spool that its frames come from; null for live frames")
    connected: bool
    age_s: float
    policy: dict[str, str | float | bool] | None
    point_asked: str | None = Field(description="the point that the policy chose")
    point_last_used: str | None = Field(description="the point of the newest frame")
    frames_answered: int
    frames_resent: int
    frames_dropped: int
    frames_in_flight: int
    faults: dict[str, int] = Field(description="by gRPC status number")
    payload_bytes_mean: float | None
    message_bytes_up: int = Field(description="of the client's messages")
    message_bytes_down: int
    link_bytes_up: int = Field(description="the same with the headers of packets, as they cross the client's interface")
    link_bytes_down: int
    frames_per_s: float | None = Field(description="over the last messages; null until there are four")


def policy_dict(policy: RatePolicy) -> dict[str, str | float | bool]:
    """A policy as the request that asks for it."""
    match policy:
        case FixedPoint(point):
            return {"point": point}
        case MaxBytesPerFrame(limit):
            return {"max_bytes_per_frame": limit}
        case MaxKbps(limit):
            return {"max_kbps": limit}
        case MinAccuracy(accuracy):
            return {"min_accuracy": accuracy}
        case ClientChooses():
            return {"auto": True}


def _outputs(served: ServedModel) -> list[TensorInfo]:
    tensors = output_tensors(served.manifest, len(served.labels))
    return [TensorInfo(name=tensor.name, datatype=tensor.datatype, shape=list(tensor.shape)) for tensor in tensors]


def model_info(served: ServedModel) -> ModelInfo:
    """A served model with its ladder."""
    manifest = served.manifest
    entries = {entry.id: entry for entry in manifest.points}
    points = [
        PointInfo(
            split=p.split,
            stride=p.stride,
            channels=p.latent_shape[0],
            latent_shape=p.latent_shape,
            **entries[p.id].model_dump(exclude={"measured"}),
        )
        for p in manifest.ladder
    ]
    return ModelInfo(
        name=manifest.name,
        bundle_id=served.bundle.bundle_id,
        task=manifest.task,
        backbone=manifest.backbone,
        input_height=manifest.input.height,
        input_width=manifest.input.width,
        classes=len(served.labels),
        outputs=_outputs(served),
        uncompressed_accuracy=manifest.uncompressed_accuracy,
        points=points,
    )


def session_info(session: Session, *, connected: bool, now: float) -> SessionInfo:
    """A session; `now` is on the monotonic clock of its times."""
    link, messages = session.link_bytes(now), session.message_bytes
    return SessionInfo(
        id=session.session_id,
        client=session.client,
        model=session.model,
        bundle_id=session.bundle_id,
        spool=session.spool or None,
        connected=connected,
        age_s=now - session.created,
        policy=None if session.policy is None else policy_dict(session.policy),
        point_asked=session.asked_point,
        point_last_used=session.last_point,
        frames_answered=session.answered,
        frames_resent=session.resent,
        frames_dropped=session.dropped,
        frames_in_flight=session.in_flight,
        faults={str(code): count for code, count in session.faults.items()},
        payload_bytes_mean=session.payload_bytes / session.accepted if session.accepted else None,
        message_bytes_up=round(messages.up),
        message_bytes_down=round(messages.down),
        link_bytes_up=round(link.up),
        link_bytes_down=round(link.down),
        frames_per_s=session.measured_frames_per_s,
    )


def model_metadata(served: ServedModel) -> ModelMetadata:
    """A model, as the Open Inference Protocol describes one."""
    return ModelMetadata(
        name=served.name,
        versions=[served.bundle.bundle_id],
        platform="onnxruntime_onnx",
        inputs=[
            TensorInfo(name="point", datatype="BYTES", shape=[1]),
            TensorInfo(name="payload", datatype="BYTES", shape=[1]),
        ],
        outputs=_outputs(served),
    )
