"""Measured results, read from their documents: rate-accuracy curves, and comparisons of them.

docs/results/*.json (evaluate, baselines)  --read_results-->  Results
Results  --bitneck_models.report.pictures-->  docs/results/*.png
Results  --bitneck_models.report.tables-->    docs/results.md
"""

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from bitneck.errors import InvalidConfig
from bitneck_models.measure.each import EachPhoto
from bitneck_models.measure.meter import metric_titles
from bitneck_models.measure.sweeps import CODECS

__all__ = ["IMAGE_CODECS", "STUDIES", "Curve", "Results", "Sample", "bytes_at", "rate_saving", "read_results"]

IMAGE_CODECS = tuple(CODECS)
STUDIES = {
    "rate_terms": "Rate terms: hyperprior and l1",
    "supervision": "Supervised and unsupervised",
    "layers": "Layers to distil from (Fig. 4 of the paper)",
    "decoders": "Depth of the decoder",
    "steps": "One unit for many steps, or one for each",
    "contexts": "Tables that depend on coded neighbours",
    "topologies": "Topologies (Table 3 of the paper)",
}
"""Known studies, and their headings on the page."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One measured point of a curve.

    Attributes:
        name: operating point, or setting of a baseline.
        payload_bytes: mean of the photographs.
        bpp: bits per input pixel.
        accuracy: the task's measure.
        agreement: with the uncompressed network.
        extra: what else the document says of it.
        each: results of each photograph, if the document keeps them.
        photos_crc32c: which photographs these are, and in which order.
    """

    name: str
    payload_bytes: float
    bpp: float
    accuracy: float
    agreement: float
    extra: Mapping[str, Any] = field(default_factory=dict)
    each: EachPhoto | None = None
    photos_crc32c: str = ""


Curve = tuple[Sample, ...]
"""Samples in order of rate."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Results:
    """Everything that was measured on one set of photographs.

    Attributes:
        images: number of photographs.
        dataset: their name.
        uncompressed: accuracy of the network without a unit.
        key: name of the accuracy in the documents.
        metric: its name on the page.
        studies: study to curve name to curve. A recipe's units are in the study of its name, or in those that their
            own `curve` names. The one that is no known study is the shipped ladder; its curves are the split points.
        baselines: codec to curve.
    """

    images: int
    dataset: str
    uncompressed: float
    key: str
    metric: str
    studies: Mapping[str, Mapping[str, Curve]]
    baselines: Mapping[str, Curve]

    @property
    def ladder(self) -> Mapping[str, Curve] | None:
        """The curves of the ladder that is shipped, or None."""
        return next((curves for name, curves in self.studies.items() if name not in STUDIES), None)

    @property
    def ladder_curves(self) -> list[tuple[str, Curve]]:
        """Split points and their curves in the ladder that is shipped, by name; empty without a ladder."""
        return sorted((self.ladder or {}).items())


def read_results(folder: Path) -> Results:
    """Read every JSON document of a folder.

    Raises:
        InvalidConfig: there is none, one is neither an evaluation with ``--zoo`` nor a set of baselines, or the
            documents have different photographs.
    """
    found: dict[str, list[tuple[str, Sample]]] = {}
    studies: dict[str, dict[str, Curve]] = {}
    baselines: dict[str, Curve] = {}
    measured: set[tuple[str, int, str, float]] = set()
    paths = sorted(folder.glob("*.json"))
    if not paths:
        raise InvalidConfig(f"{folder}: no results (*.json); `evaluate --zoo` and `baselines` write them with --json")
    for path in paths:
        try:
            document = json.loads(path.read_bytes(), parse_float=_finite, parse_constant=_finite)
            ((key, uncompressed),) = document["uncompressed"].items()
            measured.add((document["dataset"], document["images"], key, uncompressed))
            if "baselines" in document:
                baselines |= _grouped(_baselines(document, key))
                continue
            for study, title, sample in _evaluation(document, key):
                found.setdefault(study, []).append((title, sample))
            studies = {study: _grouped(samples) for study, samples in found.items()}
        except (KeyError, TypeError, ValueError, AttributeError) as exc:
            raise InvalidConfig(
                f"{path}: no results of `evaluate --zoo` or `baselines` ({type(exc).__name__}: {exc})"
            ) from exc
    if len(measured) > 1:
        raise InvalidConfig(f"{folder} mixes results of different photographs: {sorted(measured)}")
    dataset, images, key, uncompressed = measured.pop()
    titles = metric_titles()
    if key not in titles:
        raise InvalidConfig(f"{folder}: no task has an accuracy named {key!r}; known: {', '.join(titles)}")
    return Results(
        images=images,
        dataset=dataset,
        uncompressed=uncompressed,
        key=key,
        metric=titles[key],
        studies=studies,
        baselines=baselines,
    )


def _finite(text: str) -> float:
    """A number of a document. What is none, as of a training that diverged, must not be drawn as if it were one."""
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is no number; measure it again")
    return value


def _evaluation(document: Mapping[str, Any], key: str) -> Iterator[tuple[str, str, Sample]]:
    """Study, name of the curve, and sample of each operating point; several studies may share one."""
    for p in document["points"]:
        curve = p["recipe"]["curve"]
        sample = Sample(
            name=p["id"],
            payload_bytes=p["payload_bytes_mean"],
            bpp=p["bpp_payload"],
            accuracy=p[key],
            agreement=p["agreement"],
            extra=p,
            each=EachPhoto.from_dict(p["each"], document["images"]) if "each" in p else None,
            photos_crc32c=document.get("photos_crc32c", ""),
        )
        titles = curve if isinstance(curve, dict) else {document["name"]: curve or p["split"]}
        for study, title in titles.items():
            yield study, title, sample


def _baselines(document: Mapping[str, Any], key: str) -> list[tuple[str, Sample]]:
    return [
        (
            f"{p['codec']} {p['split']}".strip(),
            Sample(
                name=p["setting"],
                payload_bytes=p["bytes_mean"],
                bpp=p["bpp"],
                accuracy=p[key],
                agreement=p["agreement"],
                extra={"split": p["split"]},
            ),
        )
        for p in document["baselines"]
    ]


def _grouped(samples: Iterable[tuple[str, Sample]]) -> dict[str, Curve]:
    curves: dict[str, list[Sample]] = {}
    for name, sample in samples:
        if not sample.payload_bytes > 0:
            raise ValueError(f"{sample.name} has {sample.payload_bytes} bytes; measure it again")
        if any(sample.name == other.name for other in curves.setdefault(name, [])):
            raise ValueError(f"{sample.name} is twice in the curve {name!r}; remove one of the documents")
        curves[name].append(sample)
    return {name: tuple(sorted(curve, key=lambda s: s.payload_bytes)) for name, curve in curves.items()}


def bytes_at(curve: Curve, accuracy: float) -> float | None:
    """Bytes that a curve needs to reach an accuracy, by log-linear interpolation of its rising envelope.

    Returns:
        None if it never does; the first point's bytes if that point is accurate enough.
    """
    best = -1.0
    before: Sample | None = None
    for sample in curve:
        if sample.accuracy >= accuracy:
            if before is None:
                return sample.payload_bytes
            t = (accuracy - before.accuracy) / (sample.accuracy - before.accuracy)
            low, high = math.log(before.payload_bytes), math.log(sample.payload_bytes)
            return math.exp(low + t * (high - low))
        if sample.accuracy > best:
            best, before = sample.accuracy, sample
    return None


def rate_saving(curve: Curve, reference: Curve) -> float | None:
    """Mean share of bytes that a curve saves against another one, at agreements that both reach.

    This is Bjontegaard's delta rate, with linear interpolation of log(bytes) over agreement instead of a cubic.

    Returns:
        0.1 for a tenth fewer bytes; None if the two have no agreement in common.
    """
    (a_x, a_y), (b_x, b_y) = (_by_agreement(c) for c in (curve, reference))
    low, high = max(a_x[0], b_x[0]), min(a_x[-1], b_x[-1])
    if not low < high:
        return None
    grid = np.linspace(low, high, 100)
    difference = np.interp(grid, a_x, a_y) - np.interp(grid, b_x, b_y)
    return float(1 - math.exp(difference.mean()))


def _by_agreement(curve: Curve) -> tuple[list[float], list[float]]:
    """Agreement and log(bytes) of a curve's rising envelope."""
    x: list[float] = []
    y: list[float] = []
    for sample in curve:
        if not x or sample.agreement > x[-1]:
            x.append(sample.agreement)
            y.append(math.log(sample.payload_bytes))
    return x, y
