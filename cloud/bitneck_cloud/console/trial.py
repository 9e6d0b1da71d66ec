"""One photograph at every operating point: the edge's half runs here too, for the console's page *Try*.

    photograph -> input x -> whole network                               -> the answer without compression
                          -> each point's encoder -> payload -> decoder, tail -> its answer
                          -> JPEG of at most as many bytes -> whole network   -> what the same bytes give as JPEG

It takes seconds of every core, so one runs at a time.
"""

import base64
import io
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from bitneck.coding.colours import colours
from bitneck.errors import BitneckError, ModelFailure, Overloaded
from bitneck.image import opened_reduced, to_input, view
from bitneck.wire.messages import Classification, CodedMap, Output
from bitneck_cloud.answers.map_picture import png_of
from bitneck_cloud.console.schemas import Trial, TriedAnswer, TriedJpeg, TriedLabel, TriedPoint
from bitneck_cloud.engine.edge_half import EdgeHalf, classes_of
from bitneck_cloud.engine.served_model import ServedModel

__all__ = ["Trials"]

_SIDES = (8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)
_QUALITIES = (5, 10, 20, 35, 50, 75, 90)


@dataclass(frozen=True, slots=True)
class _Jpeg:
    """A JPEG of the picture.

    Attributes:
        data: the file.
        error: mean squared error of the picture that it gives, enlarged again.
        shown: that picture.
    """

    data: bytes
    error: float
    shown: Image.Image


class Trials:
    """Runs photographs through both halves. `run` blocks; call it in a thread."""

    def __init__(self) -> None:
        self._halves: dict[str, EdgeHalf] = {}
        self._busy = threading.Lock()

    def run(self, served: ServedModel, data: bytes) -> Trial:
        """What each operating point makes of a photograph.

        Args:
            served: the model; its folder must have the edge's half.
            data: the photograph's file.

        Raises:
            Overloaded: another one is being tried.
            ImageError: it is no photograph, or too large.
            InvalidConfig: the folder has no edge's half, or another bundle by now.
            ModelFailure: ONNX Runtime failed.
        """
        if not self._busy.acquire(blocking=False):
            raise Overloaded("another photograph is being tried; wait a few seconds, then send yours again")
        try:
            return self._run(served, data)
        finally:
            self._busy.release()

    def _run(self, served: ServedModel, data: bytes) -> Trial:
        half = self._halves.get(served.name)
        if half is None or half.bundle_id != served.bundle.bundle_id:
            half = self._halves[served.name] = EdgeHalf(served)
        spec = served.manifest.input
        with opened_reduced(data, spec) as (image, orientation):
            picture = view(image, spec, orientation).convert("RGB")
        x = to_input(picture, spec)
        whole = half.whole(x)
        features = half.features(x)
        payloads, latents, times = [], [], []
        for point in served.ladder:
            begin = time.perf_counter()
            payload = half.encoders[point.id].encode(features[point.split]).payload
            times.append((time.perf_counter() - begin) * 1e3)
            payloads.append(payload)
            latents.append(served.decode(point.id, payload))
        outputs: list[Output] = []
        ids = [point.id for point in served.ladder]
        for start in range(0, len(ids), served.max_frames):
            part = slice(start, start + served.max_frames)
            for output in served.compute(ids[part], latents[part]):
                if isinstance(output, BitneckError):
                    raise output
                outputs.append(output)
        jpegs = _jpegs(picture)
        chosen = [_of_size(jpegs, len(payload)) for payload in payloads]
        distinct = list(dict.fromkeys(chosen))
        answers = [half.whole(to_input(jpegs[k].shown, spec)) for k in distinct]
        return Trial(
            model=served.name,
            bundle_id=served.bundle.bundle_id,
            picture=_as_text(_jpeg_file(picture, 90)),
            uncompressed=_tried(whole, whole),
            points=[
                TriedPoint(
                    id=point.id, split=point.split, payload_bytes=len(payload), encode_ms=ms,
                    answer=_tried(output, whole), jpeg=distinct.index(k),
                )
                for point, payload, ms, output, k in zip(served.ladder, payloads, times, outputs, chosen, strict=True)
            ],
            jpegs=[
                TriedJpeg(bytes=len(jpegs[k].data), picture=_as_text(jpegs[k].data), answer=_tried(answer, whole))
                for k, answer in zip(distinct, answers, strict=True)
            ],
            classes=colours()[: len(served.labels)].tolist() if isinstance(whole, CodedMap) else [],
        )  # fmt: skip


def _jpegs(picture: Image.Image) -> list[_Jpeg]:
    """JPEGs of the picture at many sizes and qualities."""
    found = []
    largest = max(picture.size)
    original = np.asarray(picture, dtype=np.float32)
    for side in (*(side for side in _SIDES if side < largest), largest):
        size = (max(1, picture.width * side // largest), max(1, picture.height * side // largest))
        small = picture.resize(size, Image.Resampling.BOX, reducing_gap=None)
        for quality in _QUALITIES:
            data = _jpeg_file(small, quality)
            shown = Image.open(io.BytesIO(data), formats=("JPEG",)).resize(picture.size, Image.Resampling.BICUBIC)
            error = float(np.square(np.asarray(shown, dtype=np.float32) - original).mean())
            found.append(_Jpeg(data, error, shown))
    return found


def _of_size(jpegs: Sequence[_Jpeg], size: int) -> int:
    """The one that is nearest to the picture among those of at most `size` bytes; the smallest if none is so small."""
    fitting = [k for k, jpeg in enumerate(jpegs) if len(jpeg.data) <= size]
    if fitting:
        return min(fitting, key=lambda k: jpegs[k].error)
    return min(range(len(jpegs)), key=lambda k: len(jpegs[k].data))


def _jpeg_file(picture: Image.Image, quality: int) -> bytes:
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=quality, optimize=True)
    return file.getvalue()


def _as_text(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _tried(output: Output, whole: Output) -> TriedAnswer:
    """An answer beside the uncompressed network's."""
    if isinstance(output, Classification) and isinstance(whole, Classification):
        labels = [TriedLabel(index=label.index, name=label.name, score=label.score) for label in output.labels]
        return TriedAnswer(labels=labels, map=None, agreement=float(labels[0].index == whole.labels[0].index))
    if not isinstance(output, CodedMap) or not isinstance(whole, CodedMap):
        raise ModelFailure("the answers of one model are of different kinds; please report this")
    classes = classes_of(output)
    same = float((classes == classes_of(whole)).mean())
    labels = [TriedLabel(index=c.index, name=c.name, score=c.share) for c in output.classes]
    return TriedAnswer(labels=labels, map=_as_text(png_of(classes)), agreement=same)
