"""Both bundles on the same photographs: how often their labels agree, and how large their payloads are.

    photograph -> x -> whole network                      -> the answer without compression
                    -> encoder -> payload -> decoder, tail -> the answer of a point

for the current bundle and for the candidate, at points that match. One photograph at a time, in a thread of its own,
with a pause after each as long as it took: at most half of a core for the device's half. The thread has the priority of
all others: one of a lower priority may hold the interpreter's lock and get no core, and the whole server waits for it.
"""

import asyncio
import logging
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bitneck.disk_thread import DiskThread
from bitneck.errors import BitneckError, ImageError, ModelFailure
from bitneck.image import find_photos, opened_reduced, to_input, view
from bitneck.runtime import return_freed_memory
from bitneck.wire.messages import Classification, CodedMap, Output
from bitneck_cloud.abandoned import abandon
from bitneck_cloud.engine.edge_half import EdgeHalf, classes_of
from bitneck_cloud.engine.served_model import ServedModel

__all__ = ["MOST_PHOTOGRAPHS", "Agreement", "Mean", "Photographs", "equal_pixels", "matching_points"]

_LOG = logging.getLogger(__name__)

MOST_PHOTOGRAPHS = 200
_MOST_S = 120.0
"""For a photograph, or for loading the devices' half: a disk that takes longer does not answer."""
_CLOSE_S = 10.0
"""Seconds to wait for the photograph that the thread is at."""


@dataclass(slots=True)
class Mean:
    """A mean of values that come one by one."""

    total: float = 0.0
    count: int = 0

    def add(self, value: float | None) -> None:
        """Another value; None is left out."""
        if value is not None:
            self.total += value
            self.count += 1

    @property
    def value(self) -> float | None:
        """None if there was none."""
        return self.total / self.count if self.count else None


@dataclass(slots=True)
class Agreement:
    """Two operating points that are compared.

    Attributes:
        current: id of the current bundle's point.
        candidate: id of the candidate's.
        photographs: that both have answered.
        same: agreement of both answers: 1 or 0 for labels, the share of equal pixels for class maps. Classes are
            compared by name. Class maps of different sizes are not compared.
        current_own: agreement of the current bundle's answer with its own network without compression.
        candidate_own: the same of the candidate.
        current_bytes: payload.
        candidate_bytes: likewise.
    """

    current: str
    candidate: str
    photographs: int = 0
    same: Mean = field(default_factory=Mean)
    current_own: Mean = field(default_factory=Mean)
    candidate_own: Mean = field(default_factory=Mean)
    current_bytes: Mean = field(default_factory=Mean)
    candidate_bytes: Mean = field(default_factory=Mean)


def matching_points(current: ServedModel, candidate: ServedModel) -> list[tuple[str, str]]:
    """The points of both that are compared: those of one id; if there is none, the most accurate one of each."""
    theirs = {point.id for point in candidate.ladder}
    shared = [(point.id, point.id) for point in current.ladder if point.id in theirs]
    return shared or [(current.ladder.best.id, candidate.ladder.best.id)]


class Photographs:
    """The comparison of two bundles on the photographs of a folder.

    Attributes:
        state: ``waiting``, ``running``, ``done``, ``impossible`` (see `problem`), or ``ended`` before it was done.
        problem: why it is impossible; empty if it is not.
        total: photographs that are compared in all.
        done: photographs that were compared.
        unreadable: photographs that could not be.
        points: the comparison so far.

    Args:
        folder: of the photographs.
        current: the bundle that is served.
        candidate: the other one.
    """

    def __init__(self, folder: Path, current: ServedModel, candidate: ServedModel) -> None:
        self.state = "waiting"
        self.problem = ""
        self.total = self.done = self.unreadable = 0
        self.points = [Agreement(*pair) for pair in matching_points(current, candidate)]
        self._folder = folder
        self._current, self._candidate = current, candidate
        self._took = Mean()  # seconds of a photograph, with the pause after it

    async def run(self) -> None:
        """Compare all photographs; cancel it to end that earlier."""
        thread = DiskThread("bitneck-canary")
        sides: tuple[_Side, ...] = ()
        try:
            self.state = "running"
            photos = (await thread.within(_MOST_S, find_photos, self._folder))[:MOST_PHOTOGRAPHS]
            self.total = len(photos)
            sides = await thread.within(_MOST_S, self._load)
            for photo in photos:
                begin = time.monotonic()
                try:
                    await thread.within(_MOST_S, self._compare, photo, sides)
                    self.done += 1
                except ImageError as exc:
                    self.unreadable += 1
                    _LOG.warning("a photograph to compare bundles with is left out: %s", exc)
                await asyncio.sleep(time.monotonic() - begin)
                self._took.add(time.monotonic() - begin)
            self.state = "done"
        except TimeoutError:
            self.state, self.problem = "impossible", f"a disk has not answered for {_MOST_S:.0f} s"
            _LOG.warning(
                "the bundles of %s are not compared on the photographs of %s: %s",
                self._candidate.name, self._folder, self.problem,
            )  # fmt: skip
        except BitneckError as exc:
            self.state, self.problem = "impossible", str(exc)
            _LOG.warning("the bundles of %s cannot be compared on photographs: %s", self._candidate.name, exc)
        except Exception:  # noqa: BLE001  a bug here must not end the server
            self.state, self.problem = "impossible", "an internal error; the server's log says why"
            _LOG.exception("comparing bundles of %s on photographs failed", self._candidate.name)
        finally:
            sides = ()  # behind the photograph that the thread may be at, nothing holds them any more
            thread.post(return_freed_memory)
            ended = False
            try:
                ended = await thread.close(_CLOSE_S)
            finally:
                if not ended:
                    abandon("comparing bundles on photographs")

    @property
    def left_s(self) -> float | None:
        """Seconds until it is done, if all photographs take as long as those so far; None unless it runs."""
        took_s = self._took.value
        if self.state != "running" or took_s is None:
            return None
        return took_s * (self.total - self.done - self.unreadable)

    def end(self) -> None:
        """Say that no more photographs are compared; whoever calls it cancels `run`."""
        if self.state in ("waiting", "running"):
            self.state = "ended"

    def _load(self) -> tuple["_Side", "_Side"]:
        return _Side(self._current), _Side(self._candidate)

    def _compare(self, photo: Path, sides: tuple["_Side", ...]) -> None:
        """One photograph. Nothing of it counts unless both bundles have answered it at every point."""
        current, candidate = sides
        ours = current.answers(photo, [pair.current for pair in self.points])
        theirs = candidate.answers(photo, [pair.candidate for pair in self.points])
        for pair in self.points:
            mine, other = ours[pair.current], theirs[pair.candidate]
            pair.photographs += 1
            pair.same.add(_agreement(mine.output, current, other.output, candidate))
            pair.current_own.add(_agreement(mine.output, current, mine.whole, current))
            pair.candidate_own.add(_agreement(other.output, candidate, other.whole, candidate))
            pair.current_bytes.add(mine.payload_bytes)
            pair.candidate_bytes.add(other.payload_bytes)


@dataclass(frozen=True, slots=True)
class _Answer:
    """A photograph at one point.

    Attributes:
        output: the answer.
        whole: that of the network without compression.
        payload_bytes: coded size.
    """

    output: Output
    whole: Output
    payload_bytes: int


class _Side:
    """One of the two bundles, with the edge's half."""

    def __init__(self, served: ServedModel) -> None:
        self.labels = served.labels
        self._served = served
        self._half = EdgeHalf(served, threads=1)

    def answers(self, photo: Path, points: list[str]) -> dict[str, _Answer]:
        """What the bundle makes of a photograph, by operating point."""
        served, half = self._served, self._half
        spec = served.manifest.input
        with opened_reduced(photo, spec) as (image, orientation):
            x = to_input(view(image, spec, orientation).convert("RGB"), spec)
        whole, features = half.whole(x), half.features(x)
        found = {}
        for point in dict.fromkeys(points):
            payload = half.encoders[point].encode(features[served.ladder[point].split]).payload
            (output,) = served.compute([point], [served.decode(point, payload)])
            if isinstance(output, BitneckError):
                raise output
            found[point] = _Answer(output, whole, len(payload))
        return found


def _agreement(one: Output, its: _Side, other: Output, others: _Side) -> float | None:
    """1 or 0 for labels, the share of equal pixels for class maps; None where they cannot be compared."""
    if isinstance(one, Classification) and isinstance(other, Classification):
        return float(one.labels[0].name == other.labels[0].name)
    if not isinstance(one, CodedMap) or not isinstance(other, CodedMap):
        raise ModelFailure("one bundle names a picture's class, the other one those of its pixels")
    return equal_pixels(classes_of(one), its.labels, classes_of(other), others.labels)


def equal_pixels(
    first: NDArray[np.uint8], labels: tuple[str, ...], second: NDArray[np.uint8], others: tuple[str, ...]
) -> float | None:
    """The share of pixels to which two class maps give a class of the same name; None if their sizes differ.

    Args:
        first: a class map, (H, W).
        labels: names of its classes.
        second: another one.
        others: names of that one's classes.
    """
    if first.shape != second.shape:
        return None
    places = {name: place for place, name in enumerate(labels)}
    table = np.array([places.get(name, -1) for name in others], dtype=np.int64)  # of the second in the first's numbers
    return float((first == table[second]).mean())
