"""What the frames of one bundle came to, in bounded memory, and when two bundles may be compared. Pure."""

from collections import Counter
from dataclasses import dataclass, field

from bitneck.intervals import wilson
from bitneck.wire.messages import Classification, Output

__all__ = ["ENOUGH_FRAMES", "PointTally", "Tally", "note_of", "share_interval"]

ENOUGH_FRAMES = 100
"""Frames of each bundle, faults included, below which nothing is said: one fault more would be a whole per cent."""
_MOST_LABELS = 5


@dataclass(slots=True)
class PointTally:
    """Answered frames of one operating point.

    Attributes:
        frames: that were answered.
        payload_bytes: of all of them.
        link_bytes: of those whose link bytes are counted.
        link_frames: how many those are.
    """

    frames: int = 0
    payload_bytes: int = 0
    link_bytes: int = 0
    link_frames: int = 0

    def add(self, payload_bytes: int, link_bytes: int | None) -> None:
        """One more frame."""
        self.frames += 1
        self.payload_bytes += payload_bytes
        if link_bytes is not None:
            self.link_bytes += link_bytes
            self.link_frames += 1

    @property
    def mean_payload_bytes(self) -> float | None:
        """Of a frame; None if there was none."""
        return self.payload_bytes / self.frames if self.frames else None

    @property
    def mean_link_bytes(self) -> float | None:
        """Both directions, of a frame whose link bytes are counted; None if there was none."""
        return self.link_bytes / self.link_frames if self.link_frames else None


@dataclass(slots=True)
class Tally:
    """Frames of one bundle. Its memory is bounded by the bundle's operating points and classes.

    Attributes:
        all: answered frames of every point.
        points: of each, by id.
        faults: frames that failed, by gRPC status number.
    """

    all: PointTally = field(default_factory=PointTally)
    points: dict[str, PointTally] = field(default_factory=dict)
    faults: Counter[int] = field(default_factory=Counter)
    _scores: float = 0.0
    _scored: int = 0
    _classes: dict[str, float] = field(default_factory=dict)

    def answered(self, point: str, payload_bytes: int, link_bytes: int | None, output: Output) -> None:
        """A frame was answered.

        Args:
            point: its operating point.
            payload_bytes: its coded size.
            link_bytes: its share of the link's bytes, both directions; None if they are not counted.
            output: the whole answer.
        """
        self.all.add(payload_bytes, link_bytes)
        self.points.setdefault(point, PointTally()).add(payload_bytes, link_bytes)
        if isinstance(output, Classification):
            best = output.labels[0]
            self._scores += best.score
            self._scored += 1
            self._classes[best.name] = self._classes.get(best.name, 0.0) + 1.0
        else:
            for each in output.classes:
                self._classes[each.name] = self._classes.get(each.name, 0.0) + each.share

    def failed(self, code: int) -> None:
        """A frame failed, with this gRPC status number."""
        self.faults[code] += 1

    @property
    def frames(self) -> int:
        """Frames that were answered, or failed."""
        return self.all.frames + self.faults.total()

    @property
    def fault_share(self) -> float | None:
        """Share of the frames that failed; None if there was none."""
        return self.faults.total() / self.frames if self.frames else None

    @property
    def best_score(self) -> float | None:
        """Mean score of the best label, 0 to 1; None for segmentation, and if there was none."""
        return self._scores / self._scored if self._scored else None

    def labels(self) -> list[tuple[str, float]]:
        """The five most frequent classes, with their shares of the answers; for segmentation mean shares of pixels."""
        frequent = sorted(self._classes.items(), key=lambda item: (-item[1], item[0]))[:_MOST_LABELS]
        return [(name, amount / self.all.frames) for name, amount in frequent]


def share_interval(count: int, total: int) -> tuple[float, float] | None:
    """Where a share lies with 95 % confidence; see `bitneck.intervals.wilson`.

    Args:
        count: of those that have it.
        total: of all; None is returned for 0.
    """
    return wilson(count / total, total) if total else None


def note_of(current: Tally, candidate: Tally) -> str:
    """What may be said of the faults of two bundles."""
    few = [f"the {name} {tally.frames}" for name, tally in (("current bundle", current), ("candidate", candidate))
           if tally.frames < ENOUGH_FRAMES]  # fmt: skip
    if few:
        return f"too few frames to compare: {ENOUGH_FRAMES} of each bundle are needed, so far {' and '.join(few)}"
    ours = share_interval(current.faults.total(), current.frames)
    theirs = share_interval(candidate.faults.total(), candidate.frames)
    assert ours is not None
    assert theirs is not None
    if theirs[0] > ours[1]:
        return "the candidate has more faults: the 95 % intervals of both shares do not meet"
    if ours[0] > theirs[1]:
        return "the candidate has fewer faults: the 95 % intervals of both shares do not meet"
    return "no difference in faults can be seen: the 95 % intervals of both shares meet"
