"""The paper's own bottleneck units, read from checkpoints that its authors published.

    conv2_2  depthwise 3x3 at S   bn2_1  ReLU        f (N,C,Hf,Wf)    -> (N,C,h,w)
    conv2_3  1x1                  bn3_1  ReLU                         -> y (N,Cr,h,w)      encoder.onnx
    conv2_4  1x1 transposed       bn4_1  ReLU        y_hat (N,Cr,h,w) -> (N,C,h,w)
    conv2_5  depthwise transposed bn5_1  ReLU                         -> f_hat (N,C,H',W') decoder.onnx

No checkpoint has the padding, which follows from network, split point and stride (`bitneck_models.spic.places`). H' and
W' are those of the feature, except for ResNet-50 at s3, whose decoder returns a little more. The unit has convolutions
only, so its files take a feature of any size.

``priorEncoder``, ``priorDecoder`` and ``bitEstimator_z`` are the paper's rate estimator, eq. (3). It becomes a
`bitneck_models.losses.rate_terms.HyperpriorRate` with cumulative layers of width 1. In published checkpoints it is not
trained: the scales of each batch norm are equal and all shifts are zero, as initialized and then shrunk by weight
decay. So its estimates say nothing about the rate; see `SpicUnit.prior_trained`.
"""

import pickle
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bitneck.errors import InvalidConfig
from bitneck.manifest import sha256_hex
from bitneck_models.losses.rate_terms import HyperpriorRate
from bitneck_models.spic.places import SpicGeometry, spic_geometry

__all__ = ["SpicUnit", "load_spic"]

_HYPER = 8
"""Hyper-latent channels of every published checkpoint."""


@dataclass(frozen=True, slots=True, eq=False)
class SpicUnit:
    """A unit from a checkpoint, in evaluation mode.

    Attributes:
        geometry: of both halves.
        step: Q.
        encoder: (N, C, Hf, Wf) to the latent (N, Cr, h, w), which is never negative.
        decoder: (N, Cr, h, w) to (N, C, H', W').
        rate: its rate estimator.
        prior_trained: whether the rate estimator was trained; no published one was.
        sha256: digest of the checkpoint's file.
    """

    geometry: SpicGeometry
    step: float
    encoder: nn.Sequential
    decoder: nn.Sequential
    rate: HyperpriorRate
    prior_trained: bool
    sha256: str

    @torch.no_grad()
    def estimated_bits(self, y: Tensor) -> float:
        """Mean bits of latents (N, Cr, h, w), estimated by the checkpoint's own rate estimator."""
        return float(self.rate(y, self.step, hard=True).mean())


def load_spic(path: Path, *, backbone: str, split: str, step: float, stride: int) -> SpicUnit:
    """Read a checkpoint of the authors.

    Args:
        path: the file. It is read with ``weights_only=True``, so no code in it can run.
        backbone: ``resnet50`` or ``deeplabv3_resnet50``.
        split: s1, s2 or s3; US1 and US2 of the authors are s1 and s2.
        step: Q, which no checkpoint has.
        stride: S, which no checkpoint has.

    Raises:
        InvalidConfig: the file is no checkpoint of a unit: it has other keys, shapes or types, or values that are not
            finite; or its geometry does not fit `backbone`, `split` and `stride`.
    """
    if not 0 < step < float("inf"):
        raise InvalidConfig(f"the step is {step}, expected a positive number")
    state, digest = _read(path)
    _check_keys(path, state)
    geometry = _geometry(path, state, backbone, split, stride)
    _check_values(path, state, geometry)
    return SpicUnit(
        geometry=geometry,
        step=step,
        encoder=_encoder(geometry, state),
        decoder=_decoder(geometry, state),
        rate=_rate(geometry, state, step),
        prior_trained=_trained(state),
        sha256=digest,
    )


def _read(path: Path) -> tuple[dict[str, Tensor], str]:
    """The state dict, and the digest of the file."""
    try:
        digest = sha256_hex(path.read_bytes())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about unusual pickles; the content is checked below
            loaded: Any = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as exc:
        raise InvalidConfig(f"{path}: no such checkpoint") from exc
    except pickle.UnpicklingError as exc:
        raise InvalidConfig(
            f"{path}: holds more than tensors, or is no checkpoint ({_reason(exc)}); no code in it was run"
        ) from exc
    except Exception as exc:  # torch.load raises many kinds for a broken file
        raise InvalidConfig(f"{path}: not readable as a checkpoint, or cut short ({_reason(exc)})") from exc
    state = loaded.get("state_dict", loaded) if isinstance(loaded, dict) else loaded
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise InvalidConfig(f"{path}: no state dict of tensors in it; expected the key state_dict")
    return state, digest


def _reason(exc: Exception) -> str:
    """The cause of an exception in one line; torch puts it after its advice."""
    lines = str(exc).replace("WeightsUnpickler error: ", "\n").strip().splitlines()
    return next(
        (line.strip() for line in lines if "GLOBAL" in line or "global" in line), lines[0] if lines else repr(exc)
    )


_UNIT_NORMS = ("bn2_1", "bn3_1", "bn4_1", "bn5_1")
_PRIOR_NORMS = ("priorEncoder.bn1", "priorEncoder.bn2", "priorDecoder.bn1", "priorDecoder.bn2")


def _shapes(c: int, cr: int, kernel: int) -> dict[str, tuple[int, ...]]:
    """Every key of a checkpoint, with its shape."""
    z = _HYPER
    shapes: dict[str, tuple[int, ...]] = {
        "conv2_2.weight": (c, 1, 3, 3),
        "conv2_3.weight": (cr, c, 1, 1),
        "conv2_4.weight": (cr, c, 1, 1),
        "conv2_5.weight": (c, 1, kernel, kernel),
        "priorEncoder.conv1.weight": (cr, 1, 3, 3),
        "priorEncoder.conv1.bias": (cr,),
        "priorEncoder.conv2.weight": (z, cr, 1, 1),
        "priorEncoder.conv2.bias": (z,),
        "priorDecoder.deconv1.weight": (z, cr, 1, 1),
        "priorDecoder.deconv1.bias": (cr,),
        "priorDecoder.deconv2.weight": (cr, 1, 3, 3),
        "priorDecoder.deconv2.bias": (cr,),
    }
    for norm, n in zip((*_UNIT_NORMS, *_PRIOR_NORMS), (c, cr, c, c, cr, z, cr, cr), strict=True):
        shapes |= {f"{norm}.{name}": (n,) for name in ("weight", "bias", "running_mean", "running_var")}
        shapes[f"{norm}.num_batches_tracked"] = ()
    for layer in range(1, 5):
        shapes |= {f"bitEstimator_z.f{layer}.{name}": (1, z, 1, 1) for name in ("hba" if layer < 4 else "hb")}
    return shapes


def _check_keys(path: Path, state: Mapping[str, Tensor]) -> None:
    known = set(_shapes(1, 1, 1))
    missing, extra = sorted(known - set(state)), sorted(str(key) for key in set(state) - known)
    if missing or extra:
        raise InvalidConfig(
            f"{path}: not a checkpoint of the authors' unit: "
            + "; ".join(
                f"{len(keys)} keys {what}, such as {', '.join(keys[:3])}"
                for keys, what in ((missing, "missing"), (extra, "not expected"))
                if keys
            )
        )


def _geometry(path: Path, state: Mapping[str, Tensor], backbone: str, split: str, stride: int) -> SpicGeometry:
    for key in ("conv2_2.weight", "conv2_3.weight", "conv2_5.weight"):
        if state[key].ndim != 4:
            raise InvalidConfig(f"{path}: {key} has shape {tuple(state[key].shape)}, expected four dimensions")
    kernel = state["conv2_5.weight"].shape[-1]
    try:
        geometry = spic_geometry(backbone, split, stride, state["conv2_3.weight"].shape[0], kernel)
    except InvalidConfig as exc:
        raise InvalidConfig(f"{path}: {exc}") from exc
    c = geometry.place.channels
    if state["conv2_2.weight"].shape[0] != c:
        raise InvalidConfig(
            f"{path}: a unit for {state['conv2_2.weight'].shape[0]} channels, the feature at {split} of {backbone} has "
            f"{c}; is it another split point's checkpoint?"
        )
    for key, shape in _shapes(c, geometry.channels, kernel).items():
        if tuple(state[key].shape) != shape:
            raise InvalidConfig(f"{path}: {key} has shape {tuple(state[key].shape)}, expected {shape}")
    return geometry


def _check_values(path: Path, state: Mapping[str, Tensor], geometry: SpicGeometry) -> None:
    for key in _shapes(1, geometry.channels, 1):
        value = state[key]
        if key.endswith("num_batches_tracked"):
            continue
        if value.dtype != torch.float32:
            raise InvalidConfig(f"{path}: {key} is {value.dtype}, expected torch.float32")
        if not torch.isfinite(value).all():
            raise InvalidConfig(f"{path}: {key} has values that are not finite; the file is damaged")
        if key.endswith("running_var") and bool((value < 0).any()):
            raise InvalidConfig(f"{path}: {key} has a negative variance; the file is damaged")


def _norm(channels: int, state: Mapping[str, Tensor], key: str) -> nn.BatchNorm2d:
    norm = nn.BatchNorm2d(channels)
    norm.load_state_dict({name: state[f"{key}.{name}"] for name in norm.state_dict()})
    return norm


@torch.no_grad()
def _filled(layer: nn.Conv2d | nn.ConvTranspose2d, state: Mapping[str, Tensor], key: str) -> nn.Module:
    layer.weight.copy_(state[f"{key}.weight"])
    if layer.bias is not None:
        layer.bias.copy_(state[f"{key}.bias"])
    return layer


def _frozen(module: nn.Sequential) -> nn.Sequential:
    return module.eval().requires_grad_(requires_grad=False)


def _encoder(g: SpicGeometry, state: Mapping[str, Tensor]) -> nn.Sequential:
    c, cr = g.place.channels, g.channels
    spatial = nn.Conv2d(c, c, 3, g.stride, g.place.encoder_padding, groups=c, bias=False)
    return _frozen(
        nn.Sequential(
            _filled(spatial, state, "conv2_2"), _norm(c, state, "bn2_1"), nn.ReLU(),
            _filled(nn.Conv2d(c, cr, 1, bias=False), state, "conv2_3"), _norm(cr, state, "bn3_1"), nn.ReLU(),
        )
    )  # fmt: skip


def _decoder(g: SpicGeometry, state: Mapping[str, Tensor]) -> nn.Sequential:
    c, cr = g.place.channels, g.channels
    spatial = nn.ConvTranspose2d(c, c, g.kernel, g.stride, g.padding, groups=c, bias=False)
    return _frozen(
        nn.Sequential(
            _filled(nn.ConvTranspose2d(cr, c, 1, bias=False), state, "conv2_4"), _norm(c, state, "bn4_1"), nn.ReLU(),
            _filled(spatial, state, "conv2_5"), _norm(c, state, "bn5_1"), nn.ReLU(),
        )
    )  # fmt: skip


def _rate(g: SpicGeometry, state: Mapping[str, Tensor], step: float) -> HyperpriorRate:
    """The authors' rate estimator, as ours.

    Theirs takes the latent y and ours y / Q, so the kernels of the first layer are multiplied by Q. Their density has
    one unit in each layer, and no scale.
    """
    rate = HyperpriorRate(g.channels, _HYPER, density_width=1)
    own = {f"h_a.{i}": f"priorEncoder.{name}" for i, name in ((0, "conv1"), (1, "bn1"), (3, "conv2"), (4, "bn2"))}
    own |= {f"h_s.{i}": f"priorDecoder.{name}" for i, name in ((0, "deconv1"), (1, "bn1"), (3, "deconv2"), (4, "bn2"))}
    values = rate.state_dict()  # density.scale stays 1
    for key in values:
        place, _, name = key.rpartition(".")
        if place in own:
            values[key] = state[f"{own[place]}.{name}"]
    values["h_a.0.weight"] = values["h_a.0.weight"] * step
    for layer in range(4):
        for name in "hba" if layer < 3 else "hb":
            values[f"density.{name}.{layer}"] = state[f"bitEstimator_z.f{layer + 1}.{name}"].reshape(_HYPER, 1, 1)
    rate.load_state_dict(values)
    return rate.eval().requires_grad_(requires_grad=False)


def _trained(state: Mapping[str, Tensor]) -> bool:
    """Whether the estimator ever got a gradient: batch norms start with equal scales, and with shifts of zero."""
    return any(
        bool((state[f"{norm}.bias"] != 0).any()) or bool((state[f"{norm}.weight"] != state[f"{norm}.weight"][0]).any())
        for norm in _PRIOR_NORMS
    )
