from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Answers(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ANSWERS_ALL: _ClassVar[Answers]
    ANSWERS_NONE: _ClassVar[Answers]
    ANSWERS_LABELS: _ClassVar[Answers]
    ANSWERS_SHARES: _ClassVar[Answers]
    ANSWERS_MAP: _ClassVar[Answers]
    ANSWERS_MAP_4: _ClassVar[Answers]

class MapForm(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    MAP_FORM_NONE: _ClassVar[MapForm]
    MAP_FORM_RUNS: _ClassVar[MapForm]
    MAP_FORM_PNG: _ClassVar[MapForm]
ANSWERS_ALL: Answers
ANSWERS_NONE: Answers
ANSWERS_LABELS: Answers
ANSWERS_SHARES: Answers
ANSWERS_MAP: Answers
ANSWERS_MAP_4: Answers
MAP_FORM_NONE: MapForm
MAP_FORM_RUNS: MapForm
MAP_FORM_PNG: MapForm

class GetManifestRequest(_message.Message):
    __slots__ = ("model", "deflate", "client")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    DEFLATE_FIELD_NUMBER: _ClassVar[int]
    CLIENT_FIELD_NUMBER: _ClassVar[int]
    model: str
    deflate: bool
    client: str
    def __init__(self, model: _Optional[str] = ..., deflate: _Optional[bool] = ..., client: _Optional[str] = ...) -> None: ...

class GetManifestResponse(_message.Message):
    __slots__ = ("model", "bundle_id", "manifest_json", "size", "unix_us")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    BUNDLE_ID_FIELD_NUMBER: _ClassVar[int]
    MANIFEST_JSON_FIELD_NUMBER: _ClassVar[int]
    SIZE_FIELD_NUMBER: _ClassVar[int]
    UNIX_US_FIELD_NUMBER: _ClassVar[int]
    model: str
    bundle_id: str
    manifest_json: bytes
    size: int
    unix_us: int
    def __init__(self, model: _Optional[str] = ..., bundle_id: _Optional[str] = ..., manifest_json: _Optional[bytes] = ..., size: _Optional[int] = ..., unix_us: _Optional[int] = ...) -> None: ...

class FetchFileRequest(_message.Message):
    __slots__ = ("model", "bundle_id", "path", "offset", "length", "deflate")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    BUNDLE_ID_FIELD_NUMBER: _ClassVar[int]
    PATH_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    LENGTH_FIELD_NUMBER: _ClassVar[int]
    DEFLATE_FIELD_NUMBER: _ClassVar[int]
    model: str
    bundle_id: str
    path: str
    offset: int
    length: int
    deflate: bool
    def __init__(self, model: _Optional[str] = ..., bundle_id: _Optional[str] = ..., path: _Optional[str] = ..., offset: _Optional[int] = ..., length: _Optional[int] = ..., deflate: _Optional[bool] = ...) -> None: ...

class FileChunk(_message.Message):
    __slots__ = ("data", "size")
    DATA_FIELD_NUMBER: _ClassVar[int]
    SIZE_FIELD_NUMBER: _ClassVar[int]
    data: bytes
    size: int
    def __init__(self, data: _Optional[bytes] = ..., size: _Optional[int] = ...) -> None: ...

class ClientMessage(_message.Message):
    __slots__ = ("open", "frame", "pack", "acknowledge", "device", "leave")
    OPEN_FIELD_NUMBER: _ClassVar[int]
    FRAME_FIELD_NUMBER: _ClassVar[int]
    PACK_FIELD_NUMBER: _ClassVar[int]
    ACKNOWLEDGE_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    LEAVE_FIELD_NUMBER: _ClassVar[int]
    open: Open
    frame: Frame
    pack: Pack
    acknowledge: Acknowledge
    device: Device
    leave: Leave
    def __init__(self, open: _Optional[_Union[Open, _Mapping]] = ..., frame: _Optional[_Union[Frame, _Mapping]] = ..., pack: _Optional[_Union[Pack, _Mapping]] = ..., acknowledge: _Optional[_Union[Acknowledge, _Mapping]] = ..., device: _Optional[_Union[Device, _Mapping]] = ..., leave: _Optional[_Union[Leave, _Mapping]] = ...) -> None: ...

class ServerMessage(_message.Message):
    __slots__ = ("opened", "result", "set_point", "fault", "go_away", "ack", "results", "new_bundle")
    OPENED_FIELD_NUMBER: _ClassVar[int]
    RESULT_FIELD_NUMBER: _ClassVar[int]
    SET_POINT_FIELD_NUMBER: _ClassVar[int]
    FAULT_FIELD_NUMBER: _ClassVar[int]
    GO_AWAY_FIELD_NUMBER: _ClassVar[int]
    ACK_FIELD_NUMBER: _ClassVar[int]
    RESULTS_FIELD_NUMBER: _ClassVar[int]
    NEW_BUNDLE_FIELD_NUMBER: _ClassVar[int]
    opened: Opened
    result: Result
    set_point: SetPoint
    fault: Fault
    go_away: GoAway
    ack: Ack
    results: Results
    new_bundle: NewBundle
    def __init__(self, opened: _Optional[_Union[Opened, _Mapping]] = ..., result: _Optional[_Union[Result, _Mapping]] = ..., set_point: _Optional[_Union[SetPoint, _Mapping]] = ..., fault: _Optional[_Union[Fault, _Mapping]] = ..., go_away: _Optional[_Union[GoAway, _Mapping]] = ..., ack: _Optional[_Union[Ack, _Mapping]] = ..., results: _Optional[_Union[Results, _Mapping]] = ..., new_bundle: _Optional[_Union[NewBundle, _Mapping]] = ...) -> None: ...

class Open(_message.Message):
    __slots__ = ("model", "bundle_id", "client", "resume_token", "references", "brief", "answers", "spool", "follows")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    BUNDLE_ID_FIELD_NUMBER: _ClassVar[int]
    CLIENT_FIELD_NUMBER: _ClassVar[int]
    RESUME_TOKEN_FIELD_NUMBER: _ClassVar[int]
    REFERENCES_FIELD_NUMBER: _ClassVar[int]
    BRIEF_FIELD_NUMBER: _ClassVar[int]
    ANSWERS_FIELD_NUMBER: _ClassVar[int]
    SPOOL_FIELD_NUMBER: _ClassVar[int]
    FOLLOWS_FIELD_NUMBER: _ClassVar[int]
    model: str
    bundle_id: str
    client: str
    resume_token: str
    references: bool
    brief: bool
    answers: Answers
    spool: str
    follows: str
    def __init__(self, model: _Optional[str] = ..., bundle_id: _Optional[str] = ..., client: _Optional[str] = ..., resume_token: _Optional[str] = ..., references: _Optional[bool] = ..., brief: _Optional[bool] = ..., answers: _Optional[_Union[Answers, str]] = ..., spool: _Optional[str] = ..., follows: _Optional[str] = ...) -> None: ...

class Leave(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Opened(_message.Message):
    __slots__ = ("session_id", "resume_token", "window", "point", "references", "max_kbps")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    RESUME_TOKEN_FIELD_NUMBER: _ClassVar[int]
    WINDOW_FIELD_NUMBER: _ClassVar[int]
    POINT_FIELD_NUMBER: _ClassVar[int]
    REFERENCES_FIELD_NUMBER: _ClassVar[int]
    MAX_KBPS_FIELD_NUMBER: _ClassVar[int]
    session_id: str
    resume_token: str
    window: int
    point: str
    references: int
    max_kbps: float
    def __init__(self, session_id: _Optional[str] = ..., resume_token: _Optional[str] = ..., window: _Optional[int] = ..., point: _Optional[str] = ..., references: _Optional[int] = ..., max_kbps: _Optional[float] = ...) -> None: ...

class Frame(_message.Message):
    __slots__ = ("seq", "point", "payload", "crc32c", "deadline_ms", "captured_unix_us", "reference", "position", "acknowledge")
    SEQ_FIELD_NUMBER: _ClassVar[int]
    POINT_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_FIELD_NUMBER: _ClassVar[int]
    CRC32C_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_MS_FIELD_NUMBER: _ClassVar[int]
    CAPTURED_UNIX_US_FIELD_NUMBER: _ClassVar[int]
    REFERENCE_FIELD_NUMBER: _ClassVar[int]
    POSITION_FIELD_NUMBER: _ClassVar[int]
    ACKNOWLEDGE_FIELD_NUMBER: _ClassVar[int]
    seq: int
    point: str
    payload: bytes
    crc32c: int
    deadline_ms: int
    captured_unix_us: int
    reference: int
    position: int
    acknowledge: bool
    def __init__(self, seq: _Optional[int] = ..., point: _Optional[str] = ..., payload: _Optional[bytes] = ..., crc32c: _Optional[int] = ..., deadline_ms: _Optional[int] = ..., captured_unix_us: _Optional[int] = ..., reference: _Optional[int] = ..., position: _Optional[int] = ..., acknowledge: _Optional[bool] = ...) -> None: ...

class Pack(_message.Message):
    __slots__ = ("seq", "payload", "crc32c", "position", "reference", "captured_unix_us", "deadline_ms", "acknowledge")
    SEQ_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_FIELD_NUMBER: _ClassVar[int]
    CRC32C_FIELD_NUMBER: _ClassVar[int]
    POSITION_FIELD_NUMBER: _ClassVar[int]
    REFERENCE_FIELD_NUMBER: _ClassVar[int]
    CAPTURED_UNIX_US_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_MS_FIELD_NUMBER: _ClassVar[int]
    ACKNOWLEDGE_FIELD_NUMBER: _ClassVar[int]
    seq: int
    payload: _containers.RepeatedScalarFieldContainer[bytes]
    crc32c: _containers.RepeatedScalarFieldContainer[int]
    position: _containers.RepeatedScalarFieldContainer[int]
    reference: _containers.RepeatedScalarFieldContainer[int]
    captured_unix_us: _containers.RepeatedScalarFieldContainer[int]
    deadline_ms: int
    acknowledge: bool
    def __init__(self, seq: _Optional[int] = ..., payload: _Optional[_Iterable[bytes]] = ..., crc32c: _Optional[_Iterable[int]] = ..., position: _Optional[_Iterable[int]] = ..., reference: _Optional[_Iterable[int]] = ..., captured_unix_us: _Optional[_Iterable[int]] = ..., deadline_ms: _Optional[int] = ..., acknowledge: _Optional[bool] = ...) -> None: ...

class Device(_message.Message):
    __slots__ = ("pictures", "answered", "failed", "dropped", "reconnects", "unanswered", "head_us", "encode_us", "answer_us", "temperature")
    PICTURES_FIELD_NUMBER: _ClassVar[int]
    ANSWERED_FIELD_NUMBER: _ClassVar[int]
    FAILED_FIELD_NUMBER: _ClassVar[int]
    DROPPED_FIELD_NUMBER: _ClassVar[int]
    RECONNECTS_FIELD_NUMBER: _ClassVar[int]
    UNANSWERED_FIELD_NUMBER: _ClassVar[int]
    HEAD_US_FIELD_NUMBER: _ClassVar[int]
    ENCODE_US_FIELD_NUMBER: _ClassVar[int]
    ANSWER_US_FIELD_NUMBER: _ClassVar[int]
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    pictures: int
    answered: int
    failed: int
    dropped: int
    reconnects: int
    unanswered: int
    head_us: int
    encode_us: int
    answer_us: int
    temperature: int
    def __init__(self, pictures: _Optional[int] = ..., answered: _Optional[int] = ..., failed: _Optional[int] = ..., dropped: _Optional[int] = ..., reconnects: _Optional[int] = ..., unanswered: _Optional[int] = ..., head_us: _Optional[int] = ..., encode_us: _Optional[int] = ..., answer_us: _Optional[int] = ..., temperature: _Optional[int] = ...) -> None: ...

class Acknowledge(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Ack(_message.Message):
    __slots__ = ("seq", "before", "cloud_us")
    SEQ_FIELD_NUMBER: _ClassVar[int]
    BEFORE_FIELD_NUMBER: _ClassVar[int]
    CLOUD_US_FIELD_NUMBER: _ClassVar[int]
    seq: int
    before: int
    cloud_us: int
    def __init__(self, seq: _Optional[int] = ..., before: _Optional[int] = ..., cloud_us: _Optional[int] = ...) -> None: ...

class Results(_message.Message):
    __slots__ = ("result",)
    RESULT_FIELD_NUMBER: _ClassVar[int]
    result: _containers.RepeatedCompositeFieldContainer[Result]
    def __init__(self, result: _Optional[_Iterable[_Union[Result, _Mapping]]] = ...) -> None: ...

class Result(_message.Message):
    __slots__ = ("seq", "output", "timings", "cloud_us")
    SEQ_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_FIELD_NUMBER: _ClassVar[int]
    TIMINGS_FIELD_NUMBER: _ClassVar[int]
    CLOUD_US_FIELD_NUMBER: _ClassVar[int]
    seq: int
    output: Output
    timings: Timings
    cloud_us: int
    def __init__(self, seq: _Optional[int] = ..., output: _Optional[_Union[Output, _Mapping]] = ..., timings: _Optional[_Union[Timings, _Mapping]] = ..., cloud_us: _Optional[int] = ...) -> None: ...

class Output(_message.Message):
    __slots__ = ("classification", "segmentation")
    CLASSIFICATION_FIELD_NUMBER: _ClassVar[int]
    SEGMENTATION_FIELD_NUMBER: _ClassVar[int]
    classification: Classification
    segmentation: Segmentation
    def __init__(self, classification: _Optional[_Union[Classification, _Mapping]] = ..., segmentation: _Optional[_Union[Segmentation, _Mapping]] = ...) -> None: ...

class Classification(_message.Message):
    __slots__ = ("labels", "index", "scores")
    LABELS_FIELD_NUMBER: _ClassVar[int]
    INDEX_FIELD_NUMBER: _ClassVar[int]
    SCORES_FIELD_NUMBER: _ClassVar[int]
    labels: _containers.RepeatedCompositeFieldContainer[Label]
    index: _containers.RepeatedScalarFieldContainer[int]
    scores: bytes
    def __init__(self, labels: _Optional[_Iterable[_Union[Label, _Mapping]]] = ..., index: _Optional[_Iterable[int]] = ..., scores: _Optional[bytes] = ...) -> None: ...

class Label(_message.Message):
    __slots__ = ("index", "name", "score")
    INDEX_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    SCORE_FIELD_NUMBER: _ClassVar[int]
    index: int
    name: str
    score: float
    def __init__(self, index: _Optional[int] = ..., name: _Optional[str] = ..., score: _Optional[float] = ...) -> None: ...

class Segmentation(_message.Message):
    __slots__ = ("height", "width", "map", "classes", "step", "index", "shares")
    HEIGHT_FIELD_NUMBER: _ClassVar[int]
    WIDTH_FIELD_NUMBER: _ClassVar[int]
    MAP_FIELD_NUMBER: _ClassVar[int]
    CLASSES_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    INDEX_FIELD_NUMBER: _ClassVar[int]
    SHARES_FIELD_NUMBER: _ClassVar[int]
    height: int
    width: int
    map: bytes
    classes: _containers.RepeatedCompositeFieldContainer[ClassShare]
    step: int
    index: _containers.RepeatedScalarFieldContainer[int]
    shares: bytes
    def __init__(self, height: _Optional[int] = ..., width: _Optional[int] = ..., map: _Optional[bytes] = ..., classes: _Optional[_Iterable[_Union[ClassShare, _Mapping]]] = ..., step: _Optional[int] = ..., index: _Optional[_Iterable[int]] = ..., shares: _Optional[bytes] = ...) -> None: ...

class ClassShare(_message.Message):
    __slots__ = ("index", "name", "share")
    INDEX_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    SHARE_FIELD_NUMBER: _ClassVar[int]
    index: int
    name: str
    share: float
    def __init__(self, index: _Optional[int] = ..., name: _Optional[str] = ..., share: _Optional[float] = ...) -> None: ...

class Timings(_message.Message):
    __slots__ = ("received_unix_us", "queued_us", "decode_us", "compute_us", "batch")
    RECEIVED_UNIX_US_FIELD_NUMBER: _ClassVar[int]
    QUEUED_US_FIELD_NUMBER: _ClassVar[int]
    DECODE_US_FIELD_NUMBER: _ClassVar[int]
    COMPUTE_US_FIELD_NUMBER: _ClassVar[int]
    BATCH_FIELD_NUMBER: _ClassVar[int]
    received_unix_us: int
    queued_us: int
    decode_us: int
    compute_us: int
    batch: int
    def __init__(self, received_unix_us: _Optional[int] = ..., queued_us: _Optional[int] = ..., decode_us: _Optional[int] = ..., compute_us: _Optional[int] = ..., batch: _Optional[int] = ...) -> None: ...

class SetPoint(_message.Message):
    __slots__ = ("point", "reason", "max_kbps")
    POINT_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    MAX_KBPS_FIELD_NUMBER: _ClassVar[int]
    point: str
    reason: str
    max_kbps: float
    def __init__(self, point: _Optional[str] = ..., reason: _Optional[str] = ..., max_kbps: _Optional[float] = ...) -> None: ...

class Fault(_message.Message):
    __slots__ = ("seq", "code", "message")
    SEQ_FIELD_NUMBER: _ClassVar[int]
    CODE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    seq: int
    code: int
    message: str
    def __init__(self, seq: _Optional[int] = ..., code: _Optional[int] = ..., message: _Optional[str] = ...) -> None: ...

class GoAway(_message.Message):
    __slots__ = ("reason",)
    REASON_FIELD_NUMBER: _ClassVar[int]
    reason: str
    def __init__(self, reason: _Optional[str] = ...) -> None: ...

class NewBundle(_message.Message):
    __slots__ = ("bundle_id", "reason")
    BUNDLE_ID_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    bundle_id: str
    reason: str
    def __init__(self, bundle_id: _Optional[str] = ..., reason: _Optional[str] = ...) -> None: ...

class InferRequest(_message.Message):
    __slots__ = ("model", "bundle_id", "frame")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    BUNDLE_ID_FIELD_NUMBER: _ClassVar[int]
    FRAME_FIELD_NUMBER: _ClassVar[int]
    model: str
    bundle_id: str
    frame: Frame
    def __init__(self, model: _Optional[str] = ..., bundle_id: _Optional[str] = ..., frame: _Optional[_Union[Frame, _Mapping]] = ...) -> None: ...

class InferResponse(_message.Message):
    __slots__ = ("bundle_id", "result")
    BUNDLE_ID_FIELD_NUMBER: _ClassVar[int]
    RESULT_FIELD_NUMBER: _ClassVar[int]
    bundle_id: str
    result: Result
    def __init__(self, bundle_id: _Optional[str] = ..., result: _Optional[_Union[Result, _Mapping]] = ...) -> None: ...

class SubscribeRequest(_message.Message):
    __slots__ = ("after", "client", "model", "session", "classes", "min_score", "map")
    AFTER_FIELD_NUMBER: _ClassVar[int]
    CLIENT_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    SESSION_FIELD_NUMBER: _ClassVar[int]
    CLASSES_FIELD_NUMBER: _ClassVar[int]
    MIN_SCORE_FIELD_NUMBER: _ClassVar[int]
    MAP_FIELD_NUMBER: _ClassVar[int]
    after: str
    client: _containers.RepeatedScalarFieldContainer[str]
    model: _containers.RepeatedScalarFieldContainer[str]
    session: _containers.RepeatedScalarFieldContainer[str]
    classes: _containers.RepeatedScalarFieldContainer[str]
    min_score: float
    map: MapForm
    def __init__(self, after: _Optional[str] = ..., client: _Optional[_Iterable[str]] = ..., model: _Optional[_Iterable[str]] = ..., session: _Optional[_Iterable[str]] = ..., classes: _Optional[_Iterable[str]] = ..., min_score: _Optional[float] = ..., map: _Optional[_Union[MapForm, str]] = ...) -> None: ...

class AnswerEvent(_message.Message):
    __slots__ = ("id", "document", "missed")
    ID_FIELD_NUMBER: _ClassVar[int]
    DOCUMENT_FIELD_NUMBER: _ClassVar[int]
    MISSED_FIELD_NUMBER: _ClassVar[int]
    id: str
    document: str
    missed: Missed
    def __init__(self, id: _Optional[str] = ..., document: _Optional[str] = ..., missed: _Optional[_Union[Missed, _Mapping]] = ...) -> None: ...

class Missed(_message.Message):
    __slots__ = ("count", "reason")
    COUNT_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    count: int
    reason: str
    def __init__(self, count: _Optional[int] = ..., reason: _Optional[str] = ...) -> None: ...
