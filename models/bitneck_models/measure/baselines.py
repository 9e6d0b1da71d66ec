"""Baselines for the bottleneck units, on the same photographs and the same network.

    image codecs    photo -> crop -> encode at a quality -> bytes -> decode -> the whole network
    raw features    photo -> head -> f as float16, or as 8 bits -> LZMA -> bytes -> f_hat -> tail
    training-free   photo -> head -> pool to k x k, principal components, one step -> ideal code length -> tail

The last one needs no gradient, only a rotation that is fitted on training features.

Dimensions: N photographs, C x Hf x Wf feature.
"""

import io
import lzma
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image

from bitneck.coding.factorized_model import FactorizedModel
from bitneck.errors import InvalidConfig
from bitneck_models.measure.judge import BaselinePoint, Judge
from bitneck_models.measure.sweeps import CODECS, SWEEP
from bitneck_models.networks.backbone import Backbone

__all__ = ["image_baselines", "raw_baselines", "training_free"]

_OPTIONS: Mapping[str, dict[str, object]] = {"jpeg": {"optimize": True}, "avif": {"speed": 6}, "webp": {}, "heic": {}}
_FORMATS = {"jpeg": "JPEG", "webp": "WEBP", "avif": "AVIF", "heic": "HEIF"}

Progress = Callable[[int, int], None]


def _silent(_done: int, _all: int) -> None:
    pass


def image_baselines(
    backbone: Backbone,
    photos: Sequence[Any],
    folder: Path,
    *,
    codecs: Mapping[str, Sequence[int]] | Sequence[str] = tuple(CODECS),
    progress: Progress = _silent,
) -> tuple[float, list[BaselinePoint]]:
    """Measure image codecs at several qualities. They code and decode the crop that the network sees.

    JPEG uses optimized Huffman tables, WebP and HEIC the defaults of Pillow and pillow-heif, AVIF speed 6.

    Args:
        backbone: the network.
        photos: at least one.
        folder: place for exported modules.
        codecs: names, or names with qualities.
        progress: called with (settings done, all).

    Returns:
        The uncompressed network's accuracy, and the points.

    Raises:
        InvalidConfig: no photographs, an unknown codec, or a codec that the installed libraries cannot write.
        ImageError: a photograph cannot be read.
    """
    unknown = [name for name in codecs if name not in CODECS]
    if unknown:
        raise InvalidConfig(f"no image codec {', '.join(unknown)}; known: {', '.join(CODECS)}")
    sweep = codecs if isinstance(codecs, Mapping) else {name: CODECS[name] for name in codecs}
    judge = Judge(backbone, photos, folder)
    points: list[BaselinePoint] = []
    total = sum(len(qualities) for qualities in sweep.values())
    for name, qualities in sweep.items():
        for quality in qualities:
            coded = [_encode(image, name, quality) for image in judge.crops]
            x = judge.inputs([_decode(data, name) for data in coded])
            size = float(np.mean([len(data) for data in coded]))
            points.append(judge.point(name, f"quality {quality}", "", size, judge.answers(judge.network, x)))
            progress(len(points), total)
    return judge.uncompressed, points


def _encode(image: Image.Image, codec: str, quality: int) -> bytes:
    if codec == "heic":
        from pillow_heif import register_heif_opener

        register_heif_opener()
    buffer = io.BytesIO()
    try:
        image.save(buffer, _FORMATS[codec], quality=quality, **_OPTIONS[codec])
    except (KeyError, OSError, ValueError, RuntimeError) as exc:
        raise InvalidConfig(f"the installed libraries cannot write {codec} ({exc}); leave it out") from exc
    return buffer.getvalue()


def _decode(data: bytes, codec: str) -> Image.Image:
    with Image.open(io.BytesIO(data), formats=(_FORMATS[codec],)) as image:
        return image.convert("RGB")


def raw_baselines(
    backbone: Backbone,
    split: str,
    photos: Sequence[Any],
    folder: Path,
    *,
    progress: Progress = _silent,
) -> list[BaselinePoint]:
    """Measure the raw feature through LZMA: as float16, and as 8 bits between its smallest and largest value.

    Args:
        backbone: the network.
        split: split point.
        photos: at least one.
        folder: place for exported modules.
        progress: called with (settings done, all).
    """
    judge = Judge(backbone, photos, folder)
    tail, features = judge.cut(split)
    halves = features.astype(np.float16)
    low = features.min(axis=(1, 2, 3), keepdims=True)
    scale = np.maximum((features.max(axis=(1, 2, 3), keepdims=True) - low) / 255, 1e-12)
    octets = np.rint((features - low) / scale).astype(np.uint8)
    points = []
    for name, coded, f_hat, extra in (
        ("raw float16", halves, halves.astype(np.float32), 0),
        ("raw 8 bit", octets, (octets * scale + low).astype(np.float32), 8),  # and two float32 for the range
    ):
        size = float(np.mean([len(_lzma(one.tobytes())) + extra for one in coded]))
        points.append(judge.point(name, "LZMA", split, size, judge.answers(tail, f_hat)))
        progress(len(points), 2)
    return points


def _lzma(data: bytes) -> bytes:
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME}]
    return lzma.compress(data, lzma.FORMAT_RAW, filters=filters)


def training_free(
    backbone: Backbone,
    split: str,
    train_features: NDArray[np.float16],
    photos: Sequence[Any],
    folder: Path,
    *,
    sweep: Sequence[tuple[float, float]] = SWEEP,
    progress: Progress = _silent,
) -> list[BaselinePoint]:
    """Measure pooling and principal components at one step. Bytes are the ideal length under a table per component.

    Args:
        backbone: the network.
        split: split point.
        train_features: components and tables are fitted on these, (M, C, Hf, Wf).
        photos: at least one.
        folder: place for exported modules.
        sweep: settings: k as a share of the feature's size, and the step.
        progress: called with (settings done, all).
    """
    judge = Judge(backbone, photos, folder)
    tail, features = judge.cut(split)
    height, width = features.shape[2:]
    points = []
    for share, step in sweep:
        k = max(1, round(share * height)), max(1, round(share * width))
        pooled = [
            F.adaptive_avg_pool2d(torch.from_numpy(f.astype(np.float32)), k) for f in (train_features, features)
        ]  # (M, C, k0, k1) and (N, C, k0, k1)
        flat = pooled[0].transpose(0, 1).flatten(1)  # (C, M * k0 * k1)
        mean = flat.mean(dim=1)[:, None, None]
        components = torch.linalg.eigh(torch.cov(flat)).eigenvectors.flip(1)  # (C, C), the most important first
        symbols = [torch.einsum("nchw,cd->ndhw", p - mean, components).div(step).round().int().numpy() for p in pooled]
        model = FactorizedModel.fit(symbols[0])
        s = np.clip(symbols[1], model.lo[:, None, None], model.hi[:, None, None]).astype(np.int32)  # (N, C, k0, k1)
        back = (
            torch.einsum("ndhw,cd->nchw", torch.from_numpy(s.astype(np.float32) * np.float32(step)), components) + mean
        )
        f_hat = F.interpolate(back, size=(height, width), mode="bilinear", align_corners=False).numpy()
        coded = float(np.mean([model.ideal_bits(one) for one in s])) / 8
        setting = f"{k[0]}x{k[1]}, step {step:g}"
        points.append(judge.point("training-free", setting, split, coded, judge.answers(tail, f_hat)))
        progress(len(points), len(sweep))
    return points
