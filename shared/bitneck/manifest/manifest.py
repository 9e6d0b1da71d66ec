"""The manifest of a bundle as a whole: what must fit together, and who needs which file."""

import math
from collections.abc import Iterator
from typing import Annotated, Literal, Self

from pydantic import Field, ValidationError, model_validator

from bitneck.errors import BitneckError, BundleCorrupt, UnknownPoint
from bitneck.ids import check_relative_path
from bitneck.ladder import Ladder, OperatingPoint
from bitneck.manifest.entries import (
    FileEntry,
    Id,
    InputSpec,
    PointEntry,
    Precision,
    Segment,
    Shape3,
    SplitPoint,
    Strict,
    Task,
    UnitEntry,
    decoded_problem,
    int8_name,
)
from bitneck.text import clean_text

__all__ = ["FORMAT_VERSION", "Manifest"]

FORMAT_VERSION: Literal[5] = 5
_MAX_LATENT = 1 << 22
"""Values of a latent. Both machines make arrays of that size before they have seen one."""
_MAX_PLACE = 100
"""Characters of the key that a message names."""


class Manifest(Strict):
    """All that edge and cloud must agree on. Its digest is the bundle's id.

    Attributes:
        retired: operating points that earlier bundles of this name had, each with the one that took its place.
    """

    format_version: Literal[5] = FORMAT_VERSION
    name: Id
    backbone: Id
    task: Task
    input: InputSpec
    segments: Annotated[tuple[Segment, ...], Field(min_length=2, max_length=64)]
    split_points: Annotated[tuple[SplitPoint, ...], Field(min_length=1, max_length=63)]
    units: Annotated[tuple[UnitEntry, ...], Field(min_length=1, max_length=256)]
    points: Annotated[tuple[PointEntry, ...], Field(min_length=1, max_length=1024)]
    retired: dict[Id, Id] = Field(default_factory=dict, max_length=1024)
    uncompressed_accuracy: Annotated[float, Field(ge=0, le=1)]
    labels: str
    files: dict[str, FileEntry]

    @model_validator(mode="after")
    def _check(self) -> Self:
        self._check_units()
        try:
            for path in self.files:
                check_relative_path(path)
            known = self.ladder
        except BitneckError as exc:
            raise ValueError(str(exc)) from exc
        if used := {unit.id for unit in self.units} - {point.unit for point in self.points}:
            raise ValueError(f"no operating point uses the units {sorted(used)}")
        for old, new in self.retired.items():
            if old in known or new not in known:
                raise ValueError(f"retired: {old} must not be an operating point, and its successor {new} must be one")
        if self.task == "segmentation" and self.input.fit != "stretch":
            raise ValueError("segmentation needs an input with fit `stretch`: a class map covers the whole photograph")
        self._check_files()
        return self

    def _check_units(self) -> None:
        after = [split.after_segment for split in self.split_points]
        if after != sorted(set(after)) or after[-1] > len(self.segments) - 2:
            raise ValueError("split points must stand in the chain's order, each before the last segment")
        features = {split.name: split.feature_shape for split in self.split_points}
        if len(features) != len(self.split_points):
            raise ValueError("two split points have the same name")
        if len({unit.id for unit in self.units}) != len(self.units):
            raise ValueError("two units have the same id")
        layers: dict[str, str] = {}
        for unit in self.units:
            if unit.split not in features:
                raise ValueError(f"unit {unit.id} is at split {unit.split!r}, which is not listed")
            if unit.channels != unit.latent_shape[0]:
                raise ValueError(f"unit {unit.id}: channels differ from the latent shape")
            (_, *sent), (_, *size) = features[unit.split], unit.latent_shape
            if any(n > m for n, m in zip(size, sent, strict=True)) or math.prod(unit.latent_shape) > _MAX_LATENT:
                raise ValueError(
                    f"unit {unit.id}: a latent of {unit.latent_shape} is too large for a feature of "
                    f"{features[unit.split]}, or has more than {_MAX_LATENT} values"
                )
            decoded = unit.decoded_shape
            if decoded is not None and (problem := decoded_problem(decoded, features[unit.split])) is not None:
                raise ValueError(f"unit {unit.id}: {problem}")
            if unit.layer is not None and layers.setdefault(unit.layer, unit.split) != unit.split:
                raise ValueError(f"unit {unit.id}: the layer {unit.layer} belongs to another split point")
        for point in self.points:
            if all(unit.id != point.unit for unit in self.units):
                raise ValueError(f"operating point {point.id} has the unit {point.unit!r}, which is not listed")

    def _check_files(self) -> None:
        needed = {path for path, _side in self._users()}
        optional = {path for point in self.points for path in point.coding_files[1:]}
        optional |= {int8_name(path) for path in self.edge_graphs()}
        if not needed <= set(self.files) <= needed | optional:
            missing, extra = sorted(needed - set(self.files)), sorted(set(self.files) - needed - optional)
            raise ValueError(f"files listed do not match: missing {missing}, not expected {extra}")
        for path, side in self._users():
            if self.files[path].role not in (side, "both"):
                raise ValueError(f"{path} has the role {self.files[path].role!r}, but the {side} needs it")

    def _users(self) -> Iterator[tuple[str, Literal["edge", "cloud"]]]:
        """Each file that a machine has to load, and the machine. `FileEntry.role` must allow it."""
        for path in self.edge_graphs():
            yield path, "edge"
            if (quantized := int8_name(path)) in self.files:
                yield quantized, "edge"
        for segment in self.segments[self.split_points[0].after_segment + 1 :]:
            yield segment.file, "cloud"
        for unit in self.units:
            yield unit.decoder, "cloud"
        for point in self.points:
            for path in point.coding_files:
                if path == point.tables or path in self.files:
                    yield path, "edge"
                    yield path, "cloud"
        yield self.labels, "edge"  # which class indices an answer may have, and their names
        yield self.labels, "cloud"

    def edge_graphs(self) -> tuple[str, ...]:
        """The ONNX files that a device runs, as float32."""
        segments = (segment.file for segment in self.segments[: self.split_points[-1].after_segment + 1])
        return tuple(dict.fromkeys([*segments, *(path for unit in self.units for path in unit.encoder_files)]))

    def runs(self, path: str, precision: Precision) -> str:
        """The file that a device runs for one of `edge_graphs`: as int8, if that is asked for and the bundle has it."""
        quantized = int8_name(path)
        return quantized if precision == "int8" and quantized in self.files else path

    def files_of(self, point_id: str, precision: Precision) -> tuple[str, ...]:
        """The files that a device needs for one operating point, in the order of their use.

        Raises:
            UnknownPoint: there is no such point.
        """
        point = self.point(point_id)
        unit = self.unit(point.unit)
        head = self.segments[: self.split(unit.split).after_segment + 1]
        graphs = (*(segment.file for segment in head), *unit.encoder_files)
        coding = (path for path in point.coding_files if path in self.files)
        return (self.labels, *(self.runs(path, precision) for path in graphs), *coding)

    @property
    def has_int8(self) -> bool:
        """Whether a device may run anything as int8."""
        return any(int8_name(path) in self.files for path in self.edge_graphs())

    @property
    def ladder(self) -> Ladder:
        """The operating points in order of rate."""
        return Ladder((self._operating_point(entry) for entry in self.points), self.retired)

    def _operating_point(self, entry: PointEntry) -> OperatingPoint:
        unit = self.unit(entry.unit)
        return OperatingPoint(
            id=entry.id,
            unit=unit.id,
            split=unit.split,
            step=entry.step,
            stride=unit.stride,
            latent_shape=unit.latent_shape,
            payload_bytes=entry.payload_bytes,
            bpp_payload=entry.bpp_payload,
            accuracy=entry.accuracy,
        )

    def point(self, point_id: str) -> PointEntry:
        """The operating point of this id.

        Raises:
            UnknownPoint: there is none.
        """
        for entry in self.points:
            if entry.id == point_id:
                return entry
        raise UnknownPoint(f"the manifest of {self.name} has no operating point {point_id[:80]!r}")

    def unit(self, unit_id: str) -> UnitEntry:
        """The unit of this id, which an operating point of this manifest names."""
        return next(unit for unit in self.units if unit.id == unit_id)

    def decoded_shape(self, unit_id: str) -> Shape3:
        """(C, H', W') of what the decoder of a unit of this manifest returns: `UnitEntry.decoded_shape`."""
        unit = self.unit(unit_id)
        return unit.decoded_shape or self.split(unit.split).feature_shape

    def split(self, name: str) -> SplitPoint:
        """The split point of this name, which a unit of this manifest names."""
        return next(split for split in self.split_points if split.name == name)

    def files_for(self, side: Literal["edge", "cloud"], precision: Precision | None = None) -> dict[str, FileEntry]:
        """The files that one side needs.

        Args:
            side: the machine.
            precision: of what a device runs; None for the files of every precision.
        """
        left_out: set[str] = set()
        if side == "edge" and precision is not None:
            graphs = self.edge_graphs()
            left_out = {*graphs, *map(int8_name, graphs)} - {self.runs(path, precision) for path in graphs}
        files = {path: entry for path, entry in self.files.items() if entry.role in (side, "both")}
        return {path: entry for path, entry in files.items() if path not in left_out}

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
