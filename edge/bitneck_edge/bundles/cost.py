"""What the edge's half of a bundle would take to run, before ONNX Runtime sees any of it."""

from collections.abc import Callable

from bitneck.errors import BundleCorrupt
from bitneck.manifest import Manifest, Precision
from bitneck.onnx_file.cost import MAX_MULTIPLY_ADDS, Cost, check_onnx
from bitneck.onnx_file.parse import Shape

__all__ = ["CostCheck"]


class CostCheck:
    """Checks the files of operating points as they come; each file once.

    Args:
        manifest: of the bundle.
        precision: of what the device runs.
        read: the bytes of a file, by its path in the manifest.
    """

    def __init__(self, manifest: Manifest, precision: Precision, read: Callable[[str], bytes]) -> None:
        self._manifest = manifest
        self._precision: Precision = precision
        self._read = read
        self._known: dict[tuple[str, Shape], Cost] = {}

    def check(self, point_id: str) -> None:
        """Check what a device runs for one operating point, with the shapes that it would run it with.

        Raises:
            BundleCorrupt: a file's cost is too high or cannot be bounded, or a feature or the latent has not the shape
                that the manifest says; see `check_onnx`.
        """
        manifest = self._manifest
        spec, unit = manifest.input, manifest.unit(manifest.point(point_id).unit)
        split = manifest.split(unit.split)
        x: Shape = (1, 3, spec.height, spec.width)
        work = 0
        for segment in manifest.segments[: split.after_segment + 1]:
            cost = self._cost(segment.file, x)
            x, work = cost.y, work + cost.multiply_adds
        if work > MAX_MULTIPLY_ADDS:
            raise BundleCorrupt(
                f"the head would take {work / 1e9:.0f} billion multiply-adds for one picture; it is not run"
            )
        self._expect(f"the feature at {split.name}", x, split.feature_shape)
        for path in unit.encoder_files:
            x = self._cost(path, x).y
        self._expect(f"the latent of {unit.id}", x, unit.latent_shape)

    def _cost(self, path: str, x: Shape) -> Cost:
        file = self._manifest.runs(path, self._precision)
        if (file, x) not in self._known:
            try:
                self._known[file, x] = check_onnx(self._read(file), x)
            except BundleCorrupt as exc:
                raise BundleCorrupt(f"{file}: {exc}") from exc
        return self._known[file, x]

    @staticmethod
    def _expect(what: str, shape: Shape, expected: tuple[int, int, int]) -> None:
        if shape != (1, *expected):
            raise BundleCorrupt(
                f"{what} has the shape {shape[1:]}, the manifest says {expected}; export the bundle again"
            )
