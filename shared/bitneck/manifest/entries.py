"""What a manifest lists: the input, segments, split points, units, operating points and files. Pure."""

import hashlib
from datetime import date
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from bitneck.ids import ID_PATTERN

__all__ = [
    "FileEntry",
    "FileRole",
    "Id",
    "InputSpec",
    "PointEntry",
    "Precision",
    "Segment",
    "Shape3",
    "SplitPoint",
    "Strict",
    "Task",
    "UnitEntry",
    "bundle_id_of",
    "decoded_problem",
    "int8_name",
    "sha256_hex",
]

FileRole = Literal["edge", "cloud", "both"]
"""Which machine needs a file."""

Precision = Literal["float32", "int8"]
"""Of what a device runs: float32, or int8 for the files that the bundle has as int8 too."""

Task = Literal["classification", "segmentation"]
"""What a chain's output is: (N, K) logits, or (N, K, H, W) logits at the input's height and width."""

_MAX_GROWTH = 2
"""A decoded feature is at most this many times as high and as wide as the one that was sent."""

MAX_INPUT_PIXELS = 1 << 24
"""Larger inputs are refused, because both sides allocate by them, and a manifest comes from the other machine."""

Id = Annotated[str, Field(pattern=ID_PATTERN)]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Dimension = Annotated[int, Field(ge=1, le=65536)]
Shape3 = tuple[Dimension, Dimension, Dimension]
Triple = tuple[float, float, float]


class Strict(BaseModel):
    """Base of what a manifest lists: immutable, refuses unknown keys, NaN and infinity."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class InputSpec(Strict):
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


class Segment(Strict):
    """The stages between two neighbouring split points, as one ONNX file."""

    name: Id
    file: str


class SplitPoint(Strict):
    """A cut through the chain of segments.

    Attributes:
        name: such as ``s1``.
        after_segment: index of the last segment of the head.
        feature_shape: (C, Hf, Wf) of the tensor that crosses.
    """

    name: Id
    after_segment: Annotated[int, Field(ge=0)]
    feature_shape: Shape3


class UnitEntry(Strict):
    """A bottleneck unit: an encoder and a decoder, shared by the operating points that only differ in step.

    Attributes:
        layer: id of a frozen layer that its encoder begins with, a file of its own, because other units begin with it
            too. The encoder takes the layer's output. None if the encoder takes the feature.
        decoded_shape: (C, H', W') of what its decoder returns, if it differs from the split point's feature shape. The
            segments after it then take a feature of that height and width too. None if it does not differ.
    """

    id: Id
    split: Id
    stride: Annotated[int, Field(ge=1, le=64)]
    channels: Dimension
    latent_shape: Shape3
    layer: Id | None = None
    decoded_shape: Shape3 | None = None

    @property
    def encoder(self) -> str:
        """The encoder's file."""
        return f"units/{self.id}/encoder.onnx"

    @property
    def encoder_files(self) -> tuple[str, ...]:
        """The files that make a latent of a feature, one after the other."""
        return (f"layers/{self.layer}.onnx", self.encoder) if self.layer is not None else (self.encoder,)

    @property
    def decoder(self) -> str:
        """The decoder's file."""
        return f"units/{self.id}/decoder.onnx"


class PointEntry(Strict):
    """An operating point in the manifest: a unit at one step, with what was measured, on which data and when."""

    id: Id
    unit: Id
    step: Annotated[float, Field(gt=0)]
    payload_bytes: Annotated[float, Field(ge=0)]
    bpp_payload: Annotated[float, Field(ge=0)]
    accuracy: Annotated[float, Field(ge=0, le=1)]
    agreement: Annotated[float, Field(ge=0, le=1)]
    dataset: str
    images: Annotated[int, Field(ge=1)]
    measured: date

    @property
    def tables(self) -> str:
        """The file of its factorized model."""
        return f"points/{self.id}/tables.npz"

    @property
    def contexts(self) -> str:
        """The file of its context model; not every point has one."""
        return f"points/{self.id}/contexts.npz"

    @property
    def conditional(self) -> str:
        """The file of its conditional model; not every point has one."""
        return f"points/{self.id}/conditional.npz"

    @property
    def coding_files(self) -> tuple[str, ...]:
        """The files that its symbols are coded with, on both machines. The first one is always there."""
        return self.tables, self.contexts, self.conditional


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


class FileEntry(Strict):
    """One file of the bundle."""

    role: FileRole
    size: Annotated[int, Field(ge=0, le=4 << 30)]
    sha256: Digest


def int8_name(path: str) -> str:
    """The name of a graph's int8 file, beside the one in float32."""
    return path.removesuffix(".onnx") + ".int8.onnx"


def sha256_hex(data: bytes) -> str:
    """SHA-256 as 64 hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()


def bundle_id_of(manifest_json: bytes) -> str:
    """A bundle's id: ``sha256:`` and the digest of its manifest's exact bytes."""
    return "sha256:" + sha256_hex(manifest_json)
