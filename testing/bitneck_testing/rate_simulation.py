"""Automatic rate on link traces, simulated: against fixed rates, and against an oracle that knows the trace.

The link carries a number of bits a second that changes over time, first in first out, behind a delay that varies. The
camera takes a picture at each interval. A picture is a miss, and counts as accuracy zero, if its answer comes after the
target, or if a newer picture replaced it while it waited. The oracle takes for each picture the most accurate operating
point that the trace carries in time without making the next picture late at its lowest point.

The clock is the trace's own: the figures are the same on every machine.
"""

import itertools
import json
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from bitneck.ladder import Ladder, OperatingPoint
from bitneck_edge.link.cost import OVERHEAD_BYTES
from bitneck_edge.ratecontrol import Decision, RateController, rungs

__all__ = [
    "SCENES",
    "Camera",
    "Link",
    "Luck",
    "Outcome",
    "Policy",
    "Rate",
    "Scene",
    "always",
    "cells",
    "frames_to_react",
    "ladder_of",
    "oracle",
    "run",
    "simulate",
    "walk",
]

EDGE_S, SERVER_S = 0.02, 0.004
"""Time of a frame on the device before it is sent, and on the server."""
SECONDS, WINDOW = 180.0, 4
"""Length of a scene, and frames that the server lets a client have in flight."""
STEP_S = 0.02
"""The rate of a link is constant for this long."""

Rate = Callable[[float], float]
"""Bits per second of the link, at a time in seconds."""


@dataclass(frozen=True)
class Scene:
    """A link and a camera.

    Attributes:
        rate: of the link.
        splits: split points that the device can afford.
        delay_s: of the link, both ways together, without the transfer.
        jitter_s: mean of the random delay that is added to it (exponential).
        interval_s: between pictures.
        target_s: from capture to answer.
    """

    rate: Rate
    splits: tuple[str, ...] = ("s1",)
    delay_s: float = 0.05
    jitter_s: float = 0.004
    interval_s: float = 0.2
    target_s: float = 0.4


def walk(seed: int, low: float, high: float) -> Rate:
    """A mobile link: the logarithm of the rate takes one random step each second."""
    dice = random.Random(seed)  # noqa: S311
    level, levels = math.sqrt(low * high), []
    for _ in range(int(SECONDS) + 10):
        level = min(high, max(low, level * math.exp(dice.gauss(0.0, 0.25))))
        levels.append(level)
    return lambda t: levels[min(len(levels) - 1, int(t))]


def cells(seed: int, levels: Sequence[float]) -> Rate:
    """A device that moves from cell to cell: the rate stays the same for 5 to 20 seconds, then jumps."""
    dice = random.Random(seed)  # noqa: S311
    changes, t = [], 0.0
    while t < SECONDS + 10:
        changes.append((t, dice.choice(levels)))
        t += dice.uniform(5.0, 20.0)
    return lambda now: next(level for begin, level in reversed(changes) if begin <= now)


SCENES: dict[str, Scene] = {
    "steady 40 kbit/s": Scene(lambda _t: 40e3),
    "steady 11 kbit/s": Scene(lambda _t: 11e3),
    "wide 1 Mbit/s": Scene(lambda _t: 1e6),
    "fourfold drop and back": Scene(lambda t: 11e3 if 60 <= t < 120 else 44e3),
    "square wave, 15 s": Scene(lambda t: 40e3 if int(t / 15) % 2 == 0 else 11e3),
    "ramp down and up": Scene(lambda t: 11e3 + 40e3 * abs(1 - t / (SECONDS / 2))),
    "wandering 1": Scene(walk(1, 11e3, 80e3)),
    "wandering 2": Scene(walk(2, 11e3, 80e3)),
    "wandering 3": Scene(walk(3, 11e3, 80e3)),
    "cells": Scene(cells(4, (11e3, 16e3, 25e3, 60e3, 200e3)), jitter_s=0.01),
    "satellite, 600 ms": Scene(lambda _t: 40e3, delay_s=0.6, target_s=0.9),
    "s3 on cells": Scene(cells(5, (45e3, 60e3, 120e3, 400e3)), splits=("s3",), jitter_s=0.01),
    "s3, fourfold drop": Scene(lambda t: 48e3 if 60 <= t < 120 else 192e3, splits=("s3",)),
}


class Link:
    """Carries frames first in, first out, at the trace's rate."""

    def __init__(self, rate: Rate) -> None:
        self._rate = rate
        self.free = 0.0

    def carry(self, size: float, at: float) -> float:
        """Send a frame of `size` bytes at the time `at`. Returns when it has arrived; the link is busy until then."""
        t, bits = max(at, self.free), size * 8
        while bits > 1e-6:
            rate = self._rate(t)
            step = min(STEP_S, bits / rate)
            bits -= rate * step
            t += step
        self.free = t
        return t

    def copy(self) -> "Link":
        """Another link in the same state."""
        twin = Link(self._rate)
        twin.free = self.free
        return twin


@dataclass
class Outcome:
    """One policy in one scene.

    Attributes:
        accuracy: mean over all pictures; a miss counts as zero.
        misses: share of the pictures, 0 to 1.
        switches_per_min: changes of the operating point.
        points: the operating point of each picture, or `left out`.
    """

    accuracy: float
    misses: float
    switches_per_min: float
    points: list[str]


@dataclass(frozen=True)
class Luck:
    """What only the oracle knows about a picture before it is sent.

    Attributes:
        size: its payload over the mean payload of its operating point.
        jitter_s: the random delay that it will meet.
    """

    size: float
    jitter_s: float


Policy = Callable[[float, Link, Luck], Decision]
"""Decides for one picture, given the time, the link and the picture's luck."""


class Camera:
    """The edge client with `--newest`: a picture that finds no room waits until there is room or a newer one comes.

    Attributes:
        used: the operating point of each picture that was sent, by its number.
        hits: pictures that were answered in time.
        accuracy: sum over them.
    """

    def __init__(
        self,
        scene: Scene,
        points: Sequence[OperatingPoint],
        policy: Policy,
        controller: RateController | None,
        seed: int,
        *,
        fixed: bool,
    ) -> None:
        self._scene, self._policy, self._controller, self._fixed = scene, policy, controller, fixed
        self._by_id = {p.id: p for p in points}
        self._dice, self._link = random.Random(seed), Link(scene.rate)  # noqa: S311
        self._pending: list[tuple[float, int]] = []
        self._waiting: tuple[int, float] | None = None
        self.used: dict[int, str] = {}
        self.hits, self.accuracy = 0, 0.0

    def until(self, now: float) -> None:
        """Take the answers that have come by now. Each may make room for the picture that waits."""
        while self._pending and self._pending[0][0] <= now:
            answered_at, number = self._pending.pop(0)
            if self._controller is not None:
                self._controller.answered(number, answered_at, server_s=SERVER_S)
            self._send_if_room(answered_at)

    def picture(self, number: int, now: float) -> None:
        """Take a picture, and send it if there is room."""
        self.until(now)
        self._waiting = number, now
        self._send_if_room(now)

    def _send_if_room(self, now: float) -> None:
        scene, controller = self._scene, self._controller
        room = WINDOW
        if controller is not None:
            room = min(room, controller.room(now, scene.interval_s, fixed=self._fixed))
        if self._waiting is None or len(self._pending) >= room:
            return
        (number, taken), self._waiting = self._waiting, None
        luck = Luck(math.exp(self._dice.gauss(-0.01, 0.12)), self._dice.expovariate(1 / scene.jitter_s))
        decision = self._policy(now, self._link, luck)
        payload = self._by_id[decision.point].payload_bytes * luck.size
        sent = now + EDGE_S
        if controller is not None:
            controller.encoded(decision, edge_s=EDGE_S)
            controller.sent(number, decision, payload, sent)
        answered_at = self._link.carry(payload + OVERHEAD_BYTES, sent) + scene.delay_s + luck.jitter_s + SERVER_S
        if self._pending:
            answered_at = max(answered_at, self._pending[-1][0])  # one stream: answers do not overtake
        self._pending.append((answered_at, number))
        self.used[number] = decision.point
        if answered_at - taken <= scene.target_s:
            self.hits += 1
            self.accuracy += self._by_id[decision.point].accuracy


def simulate(
    scene: Scene,
    points: Sequence[OperatingPoint],
    policy: Policy,
    controller: RateController | None,
    seed: int = 0,
    *,
    fixed: bool = False,
) -> Outcome:
    """Run one policy through a scene, picture after picture. `fixed` says that it never changes the point."""
    camera = Camera(scene, points, policy, controller, seed, fixed=fixed)
    count = int(SECONDS / scene.interval_s)
    for number in range(1, count + 1):
        camera.picture(number, number * scene.interval_s)
    camera.until(math.inf)
    used = [camera.used.get(number, "left out") for number in range(1, count + 1)]
    switches = sum(a != b for a, b in itertools.pairwise(point for point in used if point != "left out"))
    return Outcome(camera.accuracy / count, 1 - camera.hits / count, switches / (SECONDS / 60), used)


def oracle(scene: Scene, points: Sequence[OperatingPoint]) -> Policy:
    """The best policy there is, because it knows the trace."""

    def decide(now: float, link: Link, luck: Luck) -> Decision:
        rest = scene.delay_s + SERVER_S
        after = now + scene.interval_s
        for point in reversed(points):
            twin = link.copy()
            done = twin.carry(point.payload_bytes * luck.size + OVERHEAD_BYTES, now + EDGE_S) + rest + luck.jitter_s
            following = twin.carry(points[0].payload_bytes * 1.3 + OVERHEAD_BYTES, after + EDGE_S) + rest
            if done - now <= scene.target_s and following + 3 * scene.jitter_s - after <= scene.target_s:
                return Decision(point.id, "oracle")
        return Decision(points[0].id, "oracle")

    return decide


def always(point: OperatingPoint) -> Policy:
    """The policy that always takes the same operating point."""
    return lambda _now, _link, _luck: Decision(point.id, "always")


def run(scene: Scene, ladder: Ladder) -> dict[str, Outcome]:
    """Every policy in one scene. All but the oracle follow the edge client's own rule for how many frames may wait."""
    points = rungs(ladder, scene.splits)

    def client(policy: Callable[[RateController], Policy], *, fixed: bool) -> Outcome:
        edge_s = dict.fromkeys(scene.splits, EDGE_S)
        controller = RateController(Ladder(points), target_s=scene.target_s, edge_s=edge_s)
        return simulate(scene, points, policy(controller), controller, fixed=fixed)

    return {
        "auto": client(
            lambda controller: lambda now, _link, _luck: controller.choose(now, scene.interval_s), fixed=False
        ),
        "oracle": simulate(scene, points, oracle(scene, points), None),
        "lowest": client(lambda _: always(points[0]), fixed=True),
        "highest": client(lambda _: always(points[-1]), fixed=True),
    }


def frames_to_react(scene: Scene, ladder: Ladder, at: float, outcome: Outcome) -> int:
    """How many frames after a drop of the rate are still too large for the link.

    A frame fits if its transfer takes at most one interval and its answer can come in time.
    """
    points = rungs(ladder, scene.splits)

    def carried(point: OperatingPoint) -> bool:
        transfer = (point.payload_bytes + OVERHEAD_BYTES) * 8 / scene.rate(at)
        return transfer <= min(
            scene.interval_s, scene.target_s - EDGE_S - SERVER_S - scene.delay_s - 2 * scene.jitter_s
        )

    allowed = {point.id for point in points if carried(point)} | {points[0].id}
    first = round(at / scene.interval_s) - 1  # pictures are counted from one
    after = outcome.points[first:]
    return next((k for k, point in enumerate(after) if point in allowed), len(after))


def ladder_of(zoo: Path) -> Ladder:
    """The measured ladder of a folder of the zoo."""
    points = json.loads((zoo / "ladder.json").read_text())["points"]
    return Ladder(
        OperatingPoint(
            id=name, unit="u", split=name.split("-")[0], step=1.0, stride=1, latent_shape=(1, 1, 1),
            payload_bytes=p["payload_bytes"], bpp_payload=p["bpp_payload"], accuracy=p["accuracy"],
        )
        for name, p in points.items()
    )  # fmt: skip
