"""Point folders from checkpoints of the paper's authors; see `bitneck_models.spic.checkpoint`.

encoder.onnx, decoder.onnx    both halves, for features of any size
spic.json                     the record: source, geometry, rate
tables.npz                    the factorized model, if features were given to fit it to
"""

import json
import zipfile
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from bitneck.coding.factorized_model import FactorizedModel
from bitneck.errors import InvalidConfig
from bitneck.manifest import sha256_hex
from bitneck_models.networks.to_onnx import to_onnx
from bitneck_models.spic.checkpoint import SpicUnit
from bitneck_models.spic.record import RECORD, SpicEstimate, SpicRecord

__all__ = ["load_features", "write_spic_point"]

_CHUNK = 16


def load_features(path: Path) -> NDArray[np.floating]:
    """Read features of a split point from a file.

    Args:
        path: a ``.npy`` file, such as ``features.npy`` of a training cache, or a ``.npz`` file with the array
            ``features`` or ``feature``. The array is (N, C, Hf, Wf), or (C, Hf, Wf) for one feature.

    Returns:
        (N, C, Hf, Wf); memory-mapped if the file is ``.npy``.

    Raises:
        InvalidConfig: there is no such file or array, or it has another shape.
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
    """Write a point folder. The record is written last, because it marks the folder as complete.

    Args:
        unit: see `bitneck_models.spic.checkpoint.load_spic`.
        out: the folder; created if it does not exist. A folder with other content is refused.
        checkpoint: name of the checkpoint, for the record.
        features: (N, C, Hf, Wf), to estimate the rate on and to fit tables to; None for neither.
        features_file: name of their file, for the record.

    Raises:
        InvalidConfig: the folder has other content, or the features are those of another split point.
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
    """Tables fitted to the features' symbols, and the rate of these."""
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
