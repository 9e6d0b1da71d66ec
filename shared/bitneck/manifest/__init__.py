"""The bundle's manifest, checked when it is read. Unknown keys are refused."""

from bitneck.manifest.entries import (
    FileEntry,
    FileRole,
    InputSpec,
    PointEntry,
    Precision,
    Segment,
    SplitPoint,
    Task,
    UnitEntry,
    bundle_id_of,
    decoded_problem,
    int8_name,
    sha256_hex,
)
from bitneck.manifest.manifest import FORMAT_VERSION, Manifest

__all__ = [
    "FORMAT_VERSION",
    "FileEntry",
    "FileRole",
    "InputSpec",
    "Manifest",
    "PointEntry",
    "Precision",
    "Segment",
    "SplitPoint",
    "Task",
    "UnitEntry",
    "bundle_id_of",
    "decoded_problem",
    "int8_name",
    "sha256_hex",
]
