"""The bundle's manifest, checked when it is read. Unknown keys are refused."""

import hashlib
from collections.abc import Iterator
from datetime import date
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)

from bitneck.errors import BitneckError, BundleCorrupt, UnknownPoint
from bitneck.ids import ID_PATTERN, check_relative_path
from bitneck.ladder import Ladder, OperatingPoint
from bitneck.text import clean_text

__all__ = [
    "FORMAT_VERSION",
    "FileEntry",
    "FileRole",
    "InputSpec",
    "Manifest",
    "PointEntry",
    "Segment",
    "SplitPoint",
    "Task",
    "bundle_id_of",
    "decoded_problem",
    "sha256_hex",
]

FORMAT_VERSION: Literal[3] = 3

FileRole = Literal["edge", "cloud", "both"]
"""Which machine needs a file."""

Task = Literal["classification", "segmentation"]
"""What a chain's output is: (N, K) logits, or (N, K, H, W) logits at the input's height and width."""

_MAX_PLACE = 100
"""Characters of the key that a message names."""

_MAX_GROWTH = 2
"""A decoded feature is at most this many times as high and as wide as the one that was sent."""

MAX_INPUT_PIXELS = 1 << 24
"""Larger inputs are refused, because both sides allocate by them, and a manifest comes from the other machine."""

Id = Annotated[str, Field(pattern=ID_PATTERN)]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Dimension = Annotated[int, Field(ge=1, le=65536)]
Shape3 = tuple[Dimension, Dimension, Dimension]
Triple = tuple[float, float, float]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class InputSpec(_Strict):
    """How a photograph becomes the backbone's input: resize, centre crop, normalize.

    Attributes:
        height: of the input, pixels.
        width: likewise.
        resize: with ``crop`` the short side after resizing, pixels; at least height and width. None with ``stretch``.
        fit: ``crop`` cuts height x width from the centre of the resized photograph; ``stretch`` resizes the whole
            photograph to height x width, whatever its shape, so that a class map covers all of it.
        interpolation: of the resize, always with antialiasing.
        mean: per channel R, G, B, of values scaled to 0..1.
        std: likewise.
    """

    height: Dimension
    width: Dimension
    resize: Dimension | None = None
    fit: Literal["crop", "stretch"] = "crop"
    interpolation: Literal["bilinear", "bicubic", "lanczos", "nearest"]
    mean: Triple
    std: Triple

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.height * self.width > MAX_INPUT_PIXELS:
            raise ValueError(f"{self.height}x{self.width} input pixels, the limit is {MAX_INPUT_PIXELS}")
        if self.fit == "stretch" and self.resize is not None:
            raise ValueError(f"resize is {self.resize}, but `stretch` resizes to height x width; leave it out")
        if self.fit == "crop" and self.resize is None:
            raise ValueError("`crop` needs resize, the short side after resizing")
        if self.resize is not None and self.resize < max(self.height, self.width):
            raise ValueError(f"resize {self.resize} is smaller than the crop, {self.height}x{self.width}")
        if min(self.std) <= 0:
            raise ValueError("std must be positive")
        return self

    @property
    def pixels(self) -> int:
        """Input pixels, what bpp is divided by."""
        return self.height * self.width


class Segment(_Strict):
    """The stages between two neighbouring split points, as one ONNX file."""

    name: Id
    file: str


class SplitPoint(_Strict):
    """A cut through the chain of segments.

    Attributes:
        name: such as ``s1``.
        after_segment: index of the last segment of the head.
        feature_shape: (C, Hf, Wf) of the tensor that crosses.
    """

    name: Id
    after_segment: Annotated[int, Field(ge=0)]
    feature_shape: Shape3


class PointEntry(_Strict):
    """An operating point in the manifest, with what was measured, on which data and when.

    Attributes:
        decoded_shape: (C, H', W') of what its decoder returns, if it differs from the split point's feature shape. The
            segments after it then take a feature of that height and width too. None if it does not differ.
    """

    id: Id
    split: Id
    stride: Annotated[int, Field(ge=1, le=64)]
    channels: Dimension
    step: Annotated[float, Field(gt=0)]
    latent_shape: Shape3
    decoded_shape: Shape3 | None = None
    payload_bytes: Annotated[float, Field(ge=0)]
    bpp_payload: Annotated[float, Field(ge=0)]
    accuracy: Annotated[float, Field(ge=0, le=1)]
    agreement: Annotated[float, Field(ge=0, le=1)]
    dataset: str
    images: Annotated[int, Field(ge=1)]
    measured: date

    @model_serializer(mode="wrap")
    def _serialized(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out an empty `decoded_shape`: the manifest is then the same as before the key existed."""
        values: dict[str, Any] = handler(self)
        if self.decoded_shape is None:
            del values["decoded_shape"]
        return values

    def operating_point(self) -> OperatingPoint:
        """This point for the ladder."""
        return OperatingPoint(
            id=self.id,
            split=self.split,
            step=self.step,
            stride=self.stride,
            latent_shape=self.latent_shape,
            payload_bytes=self.payload_bytes,
            bpp_payload=self.bpp_payload,
            accuracy=self.accuracy,
        )


def decoded_problem(decoded: Shape3, feature: Shape3) -> str | None:
    """Check a decoder that returns another size than was sent. The cloud allocates by that size.

    Args:
        decoded: (C, H', W') of what it returns.
        feature: (C, Hf, Wf) of what was sent.

    Returns:
        None if only height and width differ, and not by much; else what is wrong.
    """
    (channels, *size), (expected, *sent) = decoded, feature
    if channels != expected or decoded == feature:
        return f"a decoded shape {decoded} must differ from the feature's, {feature}, and in height and width only"
    if any(n > _MAX_GROWTH * m for n, m in zip(size, sent, strict=True)):
        return f"a decoded shape {decoded} is too large for {feature}"
    return None


class FileEntry(_Strict):
    """One file of the bundle."""

    role: FileRole
    size: Annotated[int, Field(ge=0, le=4 << 30)]
    sha256: Digest


class Manifest(_Strict):
    """All that edge and cloud must agree on. Its digest is the bundle's id."""

    format_version: Literal[3] = FORMAT_VERSION
    name: Id
    backbone: Id
    task: Task
    input: InputSpec
    segments: Annotated[tuple[Segment, ...], Field(min_length=2, max_length=64)]
    split_points: Annotated[tuple[SplitPoint, ...], Field(min_length=1, max_length=63)]
    points: Annotated[tuple[PointEntry, ...], Field(min_length=1, max_length=1024)]
    uncompressed_accuracy: Annotated[float, Field(ge=0, le=1)]
    labels: str
    files: dict[str, FileEntry]

    @model_validator(mode="after")
    def _check(self) -> Self:
        try:
            for path in self.files:
                check_relative_path(path)
            Ladder(entry.operating_point() for entry in self.points)
        except BitneckError as exc:
            raise ValueError(str(exc)) from exc
        if self.task == "segmentation" and self.input.fit != "stretch":
            raise ValueError("segmentation needs an input with fit `stretch`: a class map covers the whole photograph")
        after = [split.after_segment for split in self.split_points]
        if after != sorted(set(after)) or after[-1] > len(self.segments) - 2:
            raise ValueError("split points must stand in the chain's order, each before the last segment")
        features = {split.name: split.feature_shape for split in self.split_points}
        splits = set(features)
        if len(splits) != len(self.split_points):
            raise ValueError("two split points have the same name")
        for entry in self.points:
            if entry.split not in splits:
                raise ValueError(f"operating point {entry.id} is at split {entry.split!r}, which is not listed")
            if entry.channels != entry.latent_shape[0]:
                raise ValueError(f"operating point {entry.id}: channels differ from the latent shape")
            decoded = entry.decoded_shape
            if decoded is not None and (problem := decoded_problem(decoded, features[entry.split])) is not None:
                raise ValueError(f"operating point {entry.id}: {problem}")
        needed = {self.labels, *(segment.file for segment in self.segments)}
        needed |= {
            f"points/{p.id}/{name}" for p in self.points for name in ("encoder.onnx", "decoder.onnx", "tables.npz")
        }
        optional = {f"points/{p.id}/conditional.npz" for p in self.points}
        if needed != set(self.files) - optional:
            missing, extra = sorted(needed - set(self.files)), sorted(set(self.files) - needed - optional)
            raise ValueError(f"files listed do not match: missing {missing}, not expected {extra}")
        for path, side in self._users():
            if self.files[path].role not in (side, "both"):
                raise ValueError(f"{path} has the role {self.files[path].role!r}, but the {side} needs it")
        return self

    def _users(self) -> Iterator[tuple[str, Literal["edge", "cloud"]]]:
        """Each file that a machine has to load, and the machine. `FileEntry.role` must allow it."""
        first, last = self.split_points[0].after_segment, self.split_points[-1].after_segment
        for index, segment in enumerate(self.segments):
            if index <= last:
                yield segment.file, "edge"
            if index > first:
                yield segment.file, "cloud"
        for point in self.points:
            yield f"points/{point.id}/encoder.onnx", "edge"
            yield f"points/{point.id}/decoder.onnx", "cloud"
            yield f"points/{point.id}/tables.npz", "edge"
            yield f"points/{point.id}/tables.npz", "cloud"
            if (conditional := f"points/{point.id}/conditional.npz") in self.files:
                yield conditional, "edge"
                yield conditional, "cloud"
        yield self.labels, "cloud"
        if self.task == "segmentation":
            yield self.labels, "edge"  # which class indices an answer may have

    @property
    def ladder(self) -> Ladder:
        """The operating points in order of rate."""
        return Ladder(entry.operating_point() for entry in self.points)

    def point(self, point_id: str) -> PointEntry:
        """The operating point of this id.

        Raises:
            UnknownPoint: there is none.
        """
        for entry in self.points:
            if entry.id == point_id:
                return entry
        raise UnknownPoint(f"the manifest of {self.name} has no operating point {point_id[:80]!r}")

    def decoded_shape(self, point_id: str) -> Shape3:
        """(C, H', W') of what the decoder of a point of this manifest returns: `PointEntry.decoded_shape`."""
        entry = self.point(point_id)
        return entry.decoded_shape or self.split(entry.split).feature_shape

    def split(self, name: str) -> SplitPoint:
        """The split point of this name, which an operating point of this manifest names."""
        return next(split for split in self.split_points if split.name == name)

    def files_for(self, side: Literal["edge", "cloud"]) -> dict[str, FileEntry]:
        """The files that one side needs."""
        return {path: entry for path, entry in self.files.items() if entry.role in (side, "both")}

    def to_json(self) -> bytes:
        """The exact bytes of ``manifest.json``."""
        return (self.model_dump_json(indent=1) + "\n").encode()

    @classmethod
    def from_json(cls, data: bytes, where: str) -> Self:
        """Read a manifest.

        Args:
            data: the file's bytes.
            where: for the message.

        Raises:
            BundleCorrupt: not a manifest, or of another format version.
        """
        try:
            return cls.model_validate_json(data)
        except ValidationError as exc:
            first = exc.errors(include_url=False)[0]
            place = ".".join(str(part) for part in first["loc"]) or "top level"
            raise BundleCorrupt(
                f"{where} is not a valid manifest of format version {FORMAT_VERSION}: "
                f"{clean_text(place, _MAX_PLACE)}: {clean_text(first['msg'])} "
                f"({exc.error_count()} problems); export the bundle again"
            ) from exc


def sha256_hex(data: bytes) -> str:
    """SHA-256 as 64 hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()


def bundle_id_of(manifest_json: bytes) -> str:
    """A bundle's id: ``sha256:`` and the digest of its manifest's exact bytes."""
    return "sha256:" + sha256_hex(manifest_json)
