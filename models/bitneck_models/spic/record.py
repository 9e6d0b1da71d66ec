"""``spic.json``: the record of a point that was imported from a checkpoint of the paper's authors."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, ValidationError

from bitneck.errors import BundleCorrupt, InvalidConfig
from bitneck.manifest import decoded_problem, sha256_hex
from bitneck_models.typed_files import Strict

__all__ = ["RECORD", "SpicEstimate", "SpicRecord"]

RECORD = "spic.json"

Shape3 = tuple[int, int, int]


class SpicEstimate(Strict):
    """The rate of the latents of some features, means.

    Attributes:
        features: number of features.
        file: name of their file.
        estimated_bits: estimate of the checkpoint's own rate estimator, after rounding; only meaningful if
            `SpicRecord.prior_trained`.
        tables_bits: ideal code length under the tables that were fitted to these features.
    """

    features: Annotated[int, Field(ge=1)]
    file: str
    estimated_bits: float
    tables_bits: float


class SpicRecord(Strict):
    """How a point was imported.

    Attributes:
        format: format of this record.
        checkpoint: name of the checkpoint's file.
        checkpoint_sha256: its digest.
        backbone, split, stride, step: the point, as given.
        channels: Cr.
        module: the module whose output the unit was trained on, as torchvision names it.
        true_cut: whether that output is the only tensor that crosses, so that it is a split point.
        feature_shape, latent_shape, output_shape: (C, Hf, Wf), (Cr, h, w) and (C, H', W') at the network's input size.
        encoder_kernel, encoder_padding, decoder_kernel, decoder_padding: sizes of the two depthwise convolutions.
        prior_trained: whether the checkpoint's rate estimator was trained.
        estimate: the rate of some features; None if none were given.
        files: digests by name.
    """

    format: Literal[1] = 1
    checkpoint: str
    checkpoint_sha256: str
    backbone: str
    split: str
    stride: int
    channels: int
    step: float
    module: str
    true_cut: bool
    feature_shape: Shape3
    latent_shape: Shape3
    output_shape: Shape3
    encoder_kernel: int
    encoder_padding: int
    decoder_kernel: int
    decoder_padding: int
    prior_trained: bool
    estimate: SpicEstimate | None
    files: dict[str, str]

    def annotation(self) -> dict[str, Any]:
        """Entry in the document of an evaluation, in place of a recipe and a training record."""
        shown = {"split": self.split, "stride": self.stride, "channels": self.channels, "step": self.step}
        bits = self.estimate.tables_bits if self.estimate is not None else 0.0
        return {
            "recipe": shown | {"curve": f"{self.split} of the authors", "checkpoint": self.checkpoint},
            "record": {"estimated_bytes": bits / 8},
        }

    def check_fits(self, point_id: str, backbone: str, feature_shapes: Mapping[str, Shape3]) -> None:
        """Refuse a point that cannot run in a bundle.

        Args:
            point_id: its id.
            backbone: name of the bundle's network.
            feature_shapes: (C, Hf, Wf) by split point.

        Raises:
            InvalidConfig: the point belongs to another network or split point, has no tables, or was trained where
                other tensors cross too; or its decoder returns no feature of this split point, of any size.
        """
        expected = feature_shapes.get(self.split)
        problem = None
        if self.backbone != backbone or expected is None:
            problem = f"is for {self.split} of {self.backbone}, the network is {backbone}"
        elif not self.true_cut:
            problem = f"was trained on the output of {self.module}, where other tensors cross too: it cannot be sent"
        elif self.feature_shape != expected:
            problem = f"is for features of {self.feature_shape}, the network's are {expected}"
        elif self.output_shape != expected:
            problem = decoded_problem(self.output_shape, expected)
            problem = f"cannot be decoded for this network: {problem}" if problem is not None else None
        if problem is None and "tables.npz" not in self.files:
            problem = "has no tables: import it with --features"
        if problem is not None:
            raise InvalidConfig(f"the imported point {point_id} {problem}; remove its folder to export the others")

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Read the record of a point folder, and check the folder's files.

        Raises:
            BundleCorrupt: the record is missing or has another format, or files are missing or were changed.
        """
        path = folder / RECORD
        try:
            record = cls.model_validate_json(path.read_bytes())
            for name, digest in record.files.items():
                if sha256_hex((folder / name).read_bytes()) != digest:
                    raise BundleCorrupt(f"{folder / name} is not the file of {path}; import the checkpoint again")
        except (OSError, ValidationError) as exc:
            reason = str(exc).splitlines()[0]
            raise BundleCorrupt(f"{path}: not an imported point ({reason}); import the checkpoint again") from exc
        return record
