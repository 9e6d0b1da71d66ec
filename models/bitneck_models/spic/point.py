"""Point folders from checkpoints of the paper's authors; see `bitneck_models.spic.checkpoint`.

encoder.onnx, decoder.onnx    both halves, for features of any size
spic.json                     the record: where it came from, its geometry, what it costs
tables.npz                    the factorized model, only where features were given to fit it to
"""

import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from bitneck.coding.factorized_model import FactorizedModel
from bitneck.errors import BundleCorrupt, InvalidConfig
from bitneck.manifest import decoded_problem, sha256_hex
from bitneck_models.networks.to_onnx import to_onnx
from bitneck_models.spic.checkpoint import SpicUnit

__all__ = ["RECORD", "SpicEstimate", "SpicRecord", "load_features", "write_spic_point"]

RECORD = "spic.json"

_CHUNK = 16
Shape3 = tuple[int, int, int]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class SpicEstimate(_Strict):
    """What the latents of some features cost, mean of each.

    Attributes:
        features: how many.
        file: their file's name.
        estimated_bits: by the checkpoint's own rate estimator, after rounding; worth something only where
            `SpicRecord.prior_trained`.
        tables_bits: ideal code length under the tables that were fitted to these features.
    """

    features: Annotated[int, Field(ge=1)]
    file: str
    estimated_bits: float
    tables_bits: float


class SpicRecord(_Strict):
    """What stands beside an imported point.

    Attributes:
        format: of this record.
        checkpoint: the file's name.
        checkpoint_sha256: its digest.
        backbone, split, stride, channels, step: the point; the step and the stride were given, the rest follows.
        module: the module of the network, as torchvision names it, whose output the unit was trained on.
        true_cut: whether that is a split point, where nothing else crosses.
        feature_shape, latent_shape, output_shape: (C, Hf, Wf), (Cr, h, w) and (C, H', W') at the network's input size.
        encoder_kernel, encoder_padding, decoder_kernel, decoder_padding: of the two depthwise convolutions.
        prior_trained: whether the checkpoint's rate estimator was trained.
        estimate: what it costs; None where no features were given.
        files: digest by name.
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
        """What an evaluation's document says of this point, in place of a recipe and a training record."""
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
            InvalidConfig: another network's or split point's, no tables, trained where other tensors cross too, or a
                decoder that returns no feature of this split point, whatever its size.
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
        """The record of a point folder, its files checked against it.

        Raises:
            BundleCorrupt: no record, not one of this format, or files that are missing or were changed.
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


def load_features(path: Path) -> NDArray[np.floating]:
    """Features of a split point from a file.

    Args:
        path: ``.npy``, such as ``features.npy`` of a training cache, or ``.npz`` with the array ``features`` or
            ``feature``: (N, C, Hf, Wf), or (C, Hf, Wf) for one.

    Returns:
        (N, C, Hf, Wf), as it is on disk; not read into memory as a whole where it is ``.npy``.

    Raises:
        InvalidConfig: no such file, no such array, or another shape.
    """
    try:
        loaded = np.load(path, mmap_mode="r", allow_pickle=False)
        if isinstance(loaded, np.lib.npyio.NpzFile):
            with loaded:
                names = [name for name in ("features", "feature") if name in loaded.files]
                if not names:
                    raise InvalidConfig(f"{path}: no array `features` or `feature`; it has: {', '.join(loaded.files)}")
                loaded = loaded[names[0]]
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile) as exc:
        reason = (str(exc).splitlines() or [repr(exc)])[0]
        raise InvalidConfig(f"{path}: not readable as .npy or .npz ({reason})") from exc
    features: NDArray[np.floating] = loaded[None] if loaded.ndim == 3 else loaded
    if features.ndim != 4 or not len(features) or not np.issubdtype(features.dtype, np.floating):
        raise InvalidConfig(
            f"{path}: {features.dtype} of shape {features.shape}, expected floating point of shape (N, C, Hf, Wf)"
        )
    return features


def write_spic_point(
    unit: SpicUnit, out: Path, *, checkpoint: str, features: NDArray[np.floating] | None = None, features_file: str = ""
) -> SpicRecord:
    """Write a point folder, the record last: it marks the folder as complete.

    Args:
        unit: from `bitneck_models.spic.checkpoint.load_spic`.
        out: the folder; made where it does not exist. One that holds something else is refused.
        checkpoint: the checkpoint's name, for the record.
        features: (N, C, Hf, Wf), to estimate the rate on and to fit tables to; None for neither.
        features_file: their file's name, for the record.

    Raises:
        InvalidConfig: a folder that holds something else, or features of another split point.
        ModelFailure: the export failed.
    """
    if out.exists() and (not out.is_dir() or (any(out.iterdir()) and not (out / RECORD).is_file())):
        raise InvalidConfig(f"{out} holds something that is no imported point; give another folder")
    g = unit.geometry
    estimate, files = None, {}
    if features is not None:
        tables, estimate = _measured(unit, features, features_file)
        files["tables.npz"] = tables.to_npz()
    files["encoder.onnx"] = to_onnx(unit.encoder, g.feature_shape, any_size=True)
    files["decoder.onnx"] = to_onnx(unit.decoder, g.latent_shape, any_size=True)
    record = SpicRecord(
        checkpoint=checkpoint,
        checkpoint_sha256=unit.sha256,
        backbone=g.backbone,
        split=g.split,
        stride=g.stride,
        channels=g.channels,
        step=unit.step,
        module=g.place.module,
        true_cut=g.place.true_cut,
        feature_shape=g.feature_shape,
        latent_shape=g.latent_shape,
        output_shape=g.output_shape,
        encoder_kernel=3,
        encoder_padding=g.place.encoder_padding,
        decoder_kernel=g.kernel,
        decoder_padding=g.padding,
        prior_trained=unit.prior_trained,
        estimate=estimate,
        files={name: sha256_hex(data) for name, data in files.items()},
    )
    out.mkdir(parents=True, exist_ok=True)
    for name in (RECORD, "tables.npz"):
        (out / name).unlink(missing_ok=True)
    for name, data in files.items():
        (out / name).write_bytes(data)
    (out / RECORD).write_text(json.dumps(record.model_dump(mode="json"), indent=1) + "\n")
    return record


def _measured(unit: SpicUnit, features: NDArray[np.floating], file: str) -> tuple[FactorizedModel, SpicEstimate]:
    """Tables fitted to the features' symbols, and what these cost."""
    g = unit.geometry
    if features.shape[1] != g.place.channels or min(features.shape[2:]) < 3:
        raise InvalidConfig(
            f"features of shape {features.shape[1:]}, expected {g.feature_shape} at {g.split} of {g.backbone}"
        )
    symbols: list[NDArray[np.int32]] = []
    bits = 0.0
    for start in range(0, len(features), _CHUNK):
        f = torch.from_numpy(np.array(features[start : start + _CHUNK], dtype=np.float32))
        if not torch.isfinite(f).all():
            raise InvalidConfig(f"{file}: a feature of {start} to {start + len(f) - 1} is not finite")
        with torch.no_grad():
            y = unit.encoder(f)  # (n, Cr, h, w)
        bits += unit.estimated_bits(y) * len(f)
        symbols.append(np.rint(y.numpy() / np.float32(unit.step)).astype(np.int32))
    together = np.concatenate(symbols)
    tables = FactorizedModel.fit(together)
    return tables, SpicEstimate(
        features=len(features),
        file=file,
        estimated_bits=bits / len(features),
        tables_bits=float(np.mean([tables.ideal_bits(s) for s in together])),
    )
