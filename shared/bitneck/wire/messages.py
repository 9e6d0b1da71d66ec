"""What edge and cloud tell each other, as plain values.

Engine, sessions and flow work on these. One module on each side turns them into protobuf and back:
`bitneck_edge.link.wire` and `bitneck_cloud.api.wire`. ``proto/bitneck/v2/inference.proto`` explains every field.
"""

from dataclasses import dataclass
from enum import StrEnum

from bitneck.errors import InvalidConfig

__all__ = [
    "Ack",
    "Acknowledge",
    "Answers",
    "ClassShare",
    "Classification",
    "ClientMessage",
    "CodedMap",
    "Device",
    "Fault",
    "Frame",
    "GoAway",
    "Label",
    "Leave",
    "NewBundle",
    "Open",
    "Opened",
    "Output",
    "Pack",
    "Result",
    "Results",
    "ServerMessage",
    "SetPoint",
    "Shares",
    "Timings",
]


class Answers(StrEnum):
    """What comes back for a frame."""

    ALL = "all"
    """Labels, or the class map; and timings."""
    NONE = "none"
    """Nothing: frames are acknowledged, several at once."""
    LABELS = "labels"
    SHARES = "shares"
    """Of the classes in the class map, without the map."""
    MAP = "map"
    MAP_4 = "map/4"
    """Every fourth pixel of the class map, down and across; see `bitneck.coding.coarse_map`."""

    @classmethod
    def of_task(cls, task: str) -> "tuple[Answers, ...]":
        """Those that a task has: ``classification`` or ``segmentation``."""
        own = (cls.SHARES, cls.MAP, cls.MAP_4) if task == "segmentation" else (cls.LABELS,)
        return cls.ALL, cls.NONE, *own

    def check(self, task: str) -> None:
        """Refuse what a task does not have.

        Raises:
            InvalidConfig: the task has no such answers.
        """
        if self not in (known := Answers.of_task(task)):
            raise InvalidConfig(f"a model for {task} has no answers {self}; ask for {', '.join(known)}")

    @property
    def has_map(self) -> bool:
        """Whether a class map comes back, if the task is segmentation."""
        return self in (Answers.ALL, Answers.MAP, Answers.MAP_4)

    @property
    def map_step(self) -> int:
        """Pixels of the input from one pixel of the class map to the next."""
        return 4 if self is Answers.MAP_4 else 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Open:
    """The first message of a stream: which model and bundle, and which session to resume.

    Attributes:
        model: id of a served model; empty for the only one.
        bundle_id: of the client's bundle.
        client: the client's name, for logs.
        resume_token: of the session to resume; empty for a new one.
        references: whether frames may be coded against earlier ones.
        brief: the client has the labels; answers come without names.
        answers: what comes back for each frame.
        spool: id of the device's spool that the frames come from, whose numbers they have; empty for none.
        follows: of a new session: resume token of the client's session that it takes the place of; empty for none.
    """

    model: str
    bundle_id: str
    client: str = ""
    resume_token: str = ""
    references: bool = False
    brief: bool = False
    answers: Answers = Answers.ALL
    spool: str = ""
    follows: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Frame:
    """One coded photograph. `bitneck.wire.frames.seal_frame` makes it.

    Attributes:
        seq: counts from 1; each frame has its own, and a resent frame keeps it.
        point: id of the operating point that coded the payload.
        payload: the coded bytes.
        crc32c: of the point, the payload and the reference's symbols; see `bitneck.wire.frames.frame_crc32c`.
        deadline_ms: from receipt in the cloud; 0 for none.
        captured_unix_us: when the photograph was taken, microseconds since 1970; 0 if unknown.
        reference: how far back in seq the frame is that the payload is coded against; 0 for none.
        position: of the point in the manifest's list, counting from 1, which stands for its id on the wire; 0 if the id
            itself does.
        acknowledge: asks the cloud to acknowledge this frame as soon as it is computed, where frames have no answers.
    """

    seq: int
    point: str
    payload: bytes
    crc32c: int
    deadline_ms: int = 0
    captured_unix_us: int = 0
    reference: int = 0
    position: int = 0
    acknowledge: bool = False


@dataclass(frozen=True, slots=True)
class Pack:
    """Several frames in one message: their numbers count up by one, and they have one deadline."""

    frames: tuple[Frame, ...]


@dataclass(frozen=True, slots=True)
class Leave:
    """The client never comes back to this session, and sends nothing more."""


@dataclass(frozen=True, slots=True)
class Acknowledge:
    """Without answers: acknowledge what is computed, and the frames sent so far as soon as they are."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """How a device is, as it says itself. Counts are of its program since that began.

    Attributes:
        pictures: that came from its sources.
        answered: of these.
        failed: of these.
        dropped: pictures that newer ones overtook.
        reconnects: how often the link was opened again.
        unanswered: frames at this moment.
        head_us: mean of the frames that were answered since the message before; 0 if there were none.
        encode_us: likewise.
        answer_us: likewise, from picture to answer.
        temperature_c: of its hottest part, degrees Celsius; None if it cannot say.
    """

    pictures: int
    answered: int
    failed: int
    dropped: int
    reconnects: int
    unanswered: int
    head_us: int
    encode_us: int
    answer_us: int
    temperature_c: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Opened:
    """The session is open.

    Attributes:
        session_id: public name of the session.
        resume_token: secret; resumes the session after a lost connection.
        window: number of frames that may be unanswered.
        point: operating point that the cloud asks for; empty if the client chooses.
        references: how far back in seq a reference may lie; 0 for no references.
        max_kbps: what the device's link may carry, as the cloud asks; 0 for no limit.
    """

    session_id: str
    resume_token: str
    window: int
    point: str = ""
    references: int = 0
    max_kbps: float = 0.0


@dataclass(frozen=True, slots=True)
class Label:
    """A class and its softmax probability."""

    index: int
    name: str
    score: float


@dataclass(frozen=True, slots=True)
class ClassShare:
    """A class and its share of the pixels, 0 to 1."""

    index: int
    name: str
    share: float


@dataclass(frozen=True, slots=True)
class Classification:
    """The best labels, the best first."""

    labels: tuple[Label, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class CodedMap:
    """The best class of every pixel of the network's input, or of some of them.

    Attributes:
        height: of the input, pixels; 0 on the wire to a client that knows it.
        width: likewise.
        map: coded; see `bitneck.coding.class_map`.
        classes: those that occur, the largest share first; empty for a client that counts by itself.
        step: pixels of the input from one pixel of the map to the next; see `bitneck.coding.coarse_map`.
    """

    height: int
    width: int
    map: bytes
    classes: tuple[ClassShare, ...]
    step: int = 1


@dataclass(frozen=True, slots=True)
class Shares:
    """The classes that occur in a class map, the largest share first."""

    classes: tuple[ClassShare, ...]


Output = Classification | CodedMap | Shares
"""What the network found in one photograph."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Timings:
    """Microseconds that one frame took in the cloud.

    Attributes:
        received_unix_us: wall clock at receipt, microseconds since 1970.
        queued_us: waiting for the engine.
        decode_us: range decoding and dequantization.
        compute_us: bottleneck decoder and tail, for the whole batch.
        batch: number of frames in that batch.
    """

    received_unix_us: int
    queued_us: int
    decode_us: int
    compute_us: int
    batch: int


@dataclass(frozen=True, slots=True)
class Result:
    """The answer to one frame.

    Attributes:
        seq: of the frame.
        output: None if the message had none.
        timings: None where only `cloud_us` is told.
        cloud_us: microseconds from receipt to answer; 0 where there are timings.
    """

    seq: int
    output: Output | None
    timings: Timings | None
    cloud_us: int = 0

    @property
    def stages_ms(self) -> tuple[float, float, float]:
        """Milliseconds in the queue, of decoding and of computing; without timings the last is all that is known."""
        if self.timings is None:
            return 0.0, 0.0, self.cloud_us / 1e3
        return self.timings.queued_us / 1e3, self.timings.decode_us / 1e3, self.timings.compute_us / 1e3


@dataclass(frozen=True, slots=True)
class Results:
    """The answers to the frames of one `Pack`, or a part of them."""

    results: tuple[Result, ...]


@dataclass(frozen=True, slots=True)
class Ack:
    """Without answers: frames `seq - before` to `seq` are computed.

    `cloud_us` is the time from the receipt of frame `seq` to this message, microseconds.
    """

    seq: int
    before: int = 0
    cloud_us: int = 0


@dataclass(frozen=True, slots=True)
class SetPoint:
    """The cloud asks for another operating point; an empty one lets the client choose again. See `Opened.max_kbps`."""

    point: str
    reason: str
    max_kbps: float = 0.0


@dataclass(frozen=True, slots=True)
class Fault:
    """A frame could not be answered. `seq` is 0 if the message was no frame; `code` is a gRPC status code."""

    seq: int
    code: int
    message: str


@dataclass(frozen=True, slots=True)
class GoAway:
    """The cloud will end this stream soon: finish, reconnect and resume."""

    reason: str


@dataclass(frozen=True, slots=True)
class NewBundle:
    """The client has another bundle now: fetch it, open a session with it, then end this one."""

    bundle_id: str
    reason: str


ClientMessage = Open | Frame | Pack | Acknowledge | Device | Leave
"""What a client sends on a stream."""

ServerMessage = Opened | Result | Results | Ack | SetPoint | Fault | GoAway | NewBundle
"""What the cloud sends on a stream."""
