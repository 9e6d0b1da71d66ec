"""Baselines for the bottleneck units, on the same photographs and the same network.

    image codecs    photo -> crop -> encode at a quality -> bytes -> decode -> the whole network
    raw features    photo -> head -> f as float16, or as 8 bits -> LZMA -> bytes -> f_hat -> tail
    training-free   photo -> head -> pool to k x k, principal components, one step -> ideal code length -> tail

The last one needs no gradient, only a rotation that is fitted on training features.

Dimensions: N photographs, C x Hf x Wf feature.
"""

import io
import lzma
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image

from bitneck.coding.factorized_model import FactorizedModel
from bitneck.errors import InvalidConfig
from bitneck.image import crop, load_photo, normalize
from bitneck.runtime import OnnxModule
from bitneck_models.measure.meter import Metric, metric_for
from bitneck_models.measure.sweeps import CODECS, SWEEP
from bitneck_models.networks.backbone import Backbone
from bitneck_models.networks.to_onnx import to_onnx

__all__ = ["BaselinePoint", "image_baselines", "raw_baselines", "training_free"]

_OPTIONS: Mapping[str, dict[str, object]] = {"jpeg": {"optimize": True}, "avif": {"speed": 6}, "webp": {}, "heic": {}}
_FORMATS = {"jpeg": "JPEG", "webp": "WEBP", "avif": "AVIF", "heic": "HEIF"}

Progress = Callable[[int, int], None]


def _silent(_done: int, _all: int) -> None:
    pass


@dataclass(frozen=True, slots=True, kw_only=True)
class BaselinePoint:
    """One baseline at one setting: means over the photographs.

    Attributes:
        codec: name of the codec.
        setting: quality, or another setting.
        split: split point; empty for image codecs.
        bytes_mean: coded bytes of a photograph.
        bpp: bits per input pixel.
        accuracy: the task's measure: top-1 or mean IoU.
        agreement: share of the answers (labels, or pixels) that are the uncompressed network's.
    """

    codec: str
    setting: str
    split: str
    bytes_mean: float
    bpp: float
    accuracy: float
    agreement: float

    def to_dict(self, key: str) -> dict[str, object]:
        """For the JSON document of ``bitneck-models baselines``.

        Args:
            key: name of the accuracy; see `bitneck_models.measure.meter.Metric`.
        """
        return {key if name == "accuracy" else name: value for name, value in asdict(self).items()}


class _Judge:
    """Compares answers with the truth and with the answers of the uncompressed network."""

    def __init__(self, backbone: Backbone, photos: Sequence[Any], folder: Path) -> None:
        if not photos:
            raise InvalidConfig("no photographs to measure baselines on")
        self.backbone, self.folder = backbone, folder
        self.metric: Metric[Any] = metric_for(backbone.task, backbone.labels)
        self.batch = self.metric.sweep.batch
        self.crops = [crop(load_photo(self.metric.path(photo)), backbone.input) for photo in photos]
        self.truths = [self._truth(photo) for photo in photos]  # each () or (H, W)
        self.network = self.module(backbone.segment(0), backbone.input_shape)
        self.teacher = self.answers(self.network, self.inputs(self.crops))

    def _truth(self, photo: Any) -> NDArray[np.integer]:
        """A class map at the size of the network's input (nearest pixel); a label unchanged."""
        truth = self.metric.truth(photo)
        assert truth is not None
        if not truth.ndim:
            return truth
        return np.array(Image.fromarray(truth).resize(self.crops[0].size, Image.Resampling.NEAREST))

    @property
    def uncompressed(self) -> float:
        """Accuracy of the uncompressed network."""
        return self.accuracy(self.teacher)

    def accuracy(self, answers: NDArray[np.integer]) -> float:
        """The task's measure of accuracy."""
        meter = self.metric.meter()
        for answer, truth in zip(answers, self.truths, strict=True):
            meter.add(answer, truth)
        return meter.accuracy()

    def module(self, module: torch.nn.Module, shape: tuple[int, int, int]) -> OnnxModule:
        """The module as an ONNX Runtime session."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=self.folder) as folder:  # baselines may run beside each other
            path = Path(folder) / "baseline.onnx"
            path.write_bytes(to_onnx(module, shape))
            return OnnxModule(path)

    def inputs(self, images: Sequence[Image.Image]) -> NDArray[np.float32]:
        """(N, 3, H, W) float32."""
        return np.concatenate([normalize(image, self.backbone.input) for image in images])

    def answers(self, module: OnnxModule, x: NDArray[np.float32]) -> NDArray[np.integer]:
        """The task's answers, (N,) or (N, H, W)."""
        batches = (module.run(x[i : i + self.batch]) for i in range(0, len(x), self.batch))
        return np.stack([self.metric.answer(output) for outputs in batches for output in outputs])

    def point(self, codec: str, setting: str, split: str, sizes: float, answers: NDArray[np.integer]) -> BaselinePoint:
        return BaselinePoint(
            codec=codec,
            setting=setting,
            split=split,
            bytes_mean=sizes,
            bpp=sizes * 8 / self.backbone.input.pixels,
            accuracy=self.accuracy(answers),
            agreement=float((answers == self.teacher).mean()),
        )

    def cut(self, split: str) -> tuple[OnnxModule, NDArray[np.float32]]:
        """The tail of a split point, and the photographs' features, (N, C, Hf, Wf) float32."""
        head = self.module(self.backbone.head(split), self.backbone.input_shape)
        x = self.inputs(self.crops)
        features = np.concatenate([head.run(x[i : i + self.batch]) for i in range(0, len(x), self.batch)])
        return self.module(self.backbone.tail(split), self.backbone.feature_shape(split)), features


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
    judge = _Judge(backbone, photos, folder)
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
    judge = _Judge(backbone, photos, folder)
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
    judge = _Judge(backbone, photos, folder)
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
