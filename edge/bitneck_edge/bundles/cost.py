"""What the edge's half of a bundle would take to run, before ONNX Runtime sees any of it."""

from pathlib import Path

from bitneck.errors import BundleCorrupt
from bitneck.manifest import Manifest
from bitneck.onnx_file.cost import MAX_MULTIPLY_ADDS, Cost, check_onnx
from bitneck.onnx_file.parse import Shape

__all__ = ["check_costs"]


def check_costs(root: Path, manifest: Manifest) -> None:
    """Check the segments and encoders that a device runs, with the shapes that it would run them with.

    Args:
        root: folder of the bundle's files.
        manifest: of the bundle.

    Raises:
        BundleCorrupt: a file's cost is too high or cannot be bounded, or a feature has not the shape that the manifest
            says; see `check_onnx`.
    """
    spec = manifest.input
    x: Shape = (1, 3, spec.height, spec.width)
    work, features = 0, []
    for segment in manifest.segments[: manifest.split_points[-1].after_segment + 1]:
        cost = _check(root, segment.file, x)
        x, work = cost.y, work + cost.multiply_adds
        features.append(x)
    if work > MAX_MULTIPLY_ADDS:
        raise BundleCorrupt(
            f"the head would take {work / 1e9:.0f} billion multiply-adds for one picture; it is not run"
        )
    for split in manifest.split_points:
        if features[split.after_segment] != (1, *split.feature_shape):
            raise BundleCorrupt(
                f"the feature at {split.name} has the shape {features[split.after_segment][1:]}, the manifest says "
                f"{split.feature_shape}; export the bundle again"
            )
    for point in manifest.points:
        _check(root, f"points/{point.id}/encoder.onnx", (1, *manifest.split(point.split).feature_shape))


def _check(root: Path, path: str, x: Shape) -> Cost:
    try:
        return check_onnx((root / path).read_bytes(), x)
    except BundleCorrupt as exc:
        raise BundleCorrupt(f"{path}: {exc}") from exc
