"""The JSON documents of the console's own routes."""

from pydantic import BaseModel, Field

__all__ = [
    "Change",
    "ServerInfo",
    "Trial",
    "TriedAnswer",
    "TriedJpeg",
    "TriedLabel",
    "TriedPoint",
    "WhoAmI",
]


class WhoAmI(BaseModel):
    """Who holds the token of a request."""

    role: str = Field(description="metrics, read or operate; operate where this server needs no token")
    name: str = Field(description="of the token; empty for the one of http_token, and where none is needed")
    token_needed: bool


class ServerInfo(BaseModel):
    """How the server is doing."""

    version: str
    ready: bool
    uptime_s: float
    streams: int = Field(description="open streams")
    sessions: int = Field(description="disconnected ones included")
    queue_frames: int = Field(description="frames that wait for the engine")
    queue_limit: int
    frames: int = Field(description="computed since the start")
    batches: int = Field(description="passes of the engine since the start")
    dropped: int = Field(description="frames that were abandoned or late")
    try_photos: bool = Field(description="whether photographs may be tried here")


class Change(BaseModel):
    """One line of the audit log."""

    unix_s: float
    action: str
    target: str
    who: str
    before: str | None = Field(description="as JSON")
    after: str | None


class TriedLabel(BaseModel):
    """A class, and its score; for segmentation its share of the picture."""

    index: int
    name: str
    score: float = Field(description="0 to 1")


class TriedAnswer(BaseModel):
    """An answer, compared with the one of the uncompressed network."""

    labels: list[TriedLabel] = Field(description="the best first")
    map: str | None = Field(description="for segmentation: a PNG in the classes' colours, base64")
    agreement: float = Field(description="1 if the best class is the same, else 0; the share of equal pixels for maps")


class TriedPoint(BaseModel):
    """What one operating point made of the photograph."""

    id: str
    split: str
    payload_bytes: int
    encode_ms: float = Field(description="encoder, quantizer and range coder, here")
    answer: TriedAnswer
    jpeg: int = Field(description="which of `jpegs` is the best one of at most as many bytes, or the smallest of all")


class TriedJpeg(BaseModel):
    """A JPEG, and what the uncompressed network makes of it."""

    bytes: int
    picture: str = Field(description="the file, base64")
    answer: TriedAnswer


class Trial(BaseModel):
    """One photograph at every operating point."""

    model: str
    bundle_id: str
    picture: str = Field(description="what the network sees, a JPEG, base64")
    uncompressed: TriedAnswer
    points: list[TriedPoint] = Field(description="in order of the ladder")
    jpegs: list[TriedJpeg]
    classes: list[list[int]] = Field(description="for segmentation: the colour of each class, red, green, blue")
