"""What a baseline's answers are compared with, and what is kept of them.

Dimensions: N photographs, C x Hf x Wf feature, H x W input.
"""

import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from bitneck.errors import InvalidConfig
from bitneck.image import crop, load_photo, normalize
from bitneck.runtime import OnnxModule
from bitneck_models.measure.meter import Metric, metric_for
from bitneck_models.networks.backbone import Backbone
from bitneck_models.networks.to_onnx import to_onnx

__all__ = ["BaselinePoint", "Judge"]


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


class Judge:
    """Compares answers with the truth and with the answers of the uncompressed network.

    Args:
        backbone: the network.
        photos: of the task's `Metric`, at least one.
        folder: place for exported modules.

    Raises:
        InvalidConfig: no photographs.
        ImageError: a photograph cannot be read.
    """

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
        """A baseline's point from its mean bytes and its answers; see `BaselinePoint`."""
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
