"""Weights of a network: its publisher's, those of a file, or random ones for tests.

Only tensors are ever read: with ``torch.load(weights_only=True)``, or from safetensors.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from bitneck.errors import InvalidConfig
from bitneck.manifest import sha256_hex

__all__ = ["RANDOM", "download", "fill", "load_state", "randomize"]

RANDOM = Path("random")
"""Given instead of a file: random weights, the same each time."""

_CALIBRATION = 6
"""Number of pictures that the batch norms of random weights are adjusted to."""


def fill(
    net: nn.Module,
    weights: Path | None,
    default: Callable[[], Mapping[str, Tensor]],
    example_shape: Sequence[int],
    *,
    drop: tuple[str, ...] = (),
) -> str:
    """Load weights into a network, in place, and put it into evaluation mode.

    Args:
        net: the network.
        weights: a file, `RANDOM`, or None for its publisher's.
        default: gets the publisher's state dict.
        example_shape: shape of an input without the batch axis, for random weights; may be smaller than the real one.
        drop: beginnings of keys to ignore, which the network does not have.

    Returns:
        A digest of the weights, or an empty text for the publisher's; caches are keyed by it.

    Raises:
        InvalidConfig: the file does not fit, or the download failed.
    """
    if weights is None:
        _load(net, default(), "the published weights", drop)
        net.eval()
        return ""
    if weights == RANDOM and not weights.exists():
        randomize(net, example_shape)
        return sha256_hex(b"random weights, seed 0")
    _load(net, load_state(weights), str(weights), drop)
    net.eval()
    return sha256_hex(weights.read_bytes())


def load_state(path: Path) -> dict[str, Tensor]:
    """Read a state dict from a file.

    Args:
        path: a ``.safetensors`` file. torch reads any other file, whose tensors may be below the key ``state_dict``.

    Raises:
        InvalidConfig: the file does not exist, is unreadable, or has more than tensors in it.
    """
    if not path.is_file():
        raise InvalidConfig(
            f"{path}: no such file of weights; give a .pth or a .safetensors (torchvision and timm also take `random`)"
        )
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loaded: Any = torch.load(path, map_location="cpu", weights_only=True)
    except SafetensorError as exc:
        raise InvalidConfig(f"{path}: not readable as safetensors ({exc})") from exc
    except Exception as exc:  # torch.load raises many kinds for a broken file
        reason = (str(exc).splitlines() or [repr(exc)])[0]
        raise InvalidConfig(f"{path}: not readable as weights ({reason})") from exc
    state = loaded.get("state_dict", loaded) if isinstance(loaded, dict) else loaded
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise InvalidConfig(f"{path}: no state dict of tensors in it")
    return state


def download(url: str) -> dict[str, Tensor]:
    """Download a state dict from its publisher, or take it from torch's cache; the digest in its name is checked.

    Raises:
        InvalidConfig: it cannot be downloaded, or its digest is wrong.
    """
    try:
        return torch.hub.load_state_dict_from_url(
            url, map_location="cpu", progress=True, check_hash=True, weights_only=True
        )
    except Exception as exc:  # urllib, ssl, the file system, torch
        raise InvalidConfig(
            f"the weights cannot be downloaded ({type(exc).__name__}: {exc}). Download {url} on another machine, "
            f"and give the file with --weights FILE, or put it into {Path(torch.hub.get_dir()) / 'checkpoints'}"
        ) from exc


def _load(net: nn.Module, state: Mapping[str, Tensor], where: str, drop: tuple[str, ...]) -> None:
    own = net.state_dict()
    given = {key: value for key, value in state.items() if not key.startswith(drop)} if drop else dict(state)
    missing = [k for k in own if k not in given and not k.endswith("num_batches_tracked")]
    extra = [k for k in given if k not in own]
    if missing or extra:
        told = [f"{len(missing)} missing, such as {missing[0]}"] if missing else []
        told += [f"{len(extra)} not expected, such as {extra[0]}"] if extra else []
        raise InvalidConfig(f"{where}: another network's weights: of {len(own)} tensors {'; '.join(told)}")
    for key, value in given.items():
        if value.shape != own[key].shape:
            raise InvalidConfig(f"{where}: {key} has shape {tuple(value.shape)}, expected {tuple(own[key].shape)}")
    net.load_state_dict(given, strict=False)


@torch.no_grad()
def randomize(net: nn.Module, example_shape: Sequence[int], seed: int = 0) -> None:
    """Set random weights, in place, and put the network into evaluation mode. No batch norm is the identity.

    Running statistics are those of random pictures, shifted and scaled at random, so that activations keep a sensible
    size and every batch norm is different.

    Args:
        net: any network.
        example_shape: shape of an input, without the batch axis.
        seed: seed of the weights.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=generator)

    def uniform(like: Tensor, low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(like.shape, generator=generator)

    norms = [m for m in net.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    for module in net.modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
            module.weight.copy_(normal(module.weight) * (2.0 / module.weight[0].numel()) ** 0.5)
            if module.bias is not None:
                module.bias.copy_(normal(module.bias) * 0.1)
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the mean over all batches seen
        if norm.affine:
            norm.weight.copy_(uniform(norm.weight, 0.6, 1.2))
            norm.bias.copy_(normal(norm.bias) * 0.2)
    if norms:
        net.eval()
        for norm in norms:
            norm.train()
        net(torch.randn(_CALIBRATION, *example_shape, generator=generator))
    for norm in norms:
        assert norm.running_mean is not None
        assert norm.running_var is not None
        norm.momentum = 0.1
        norm.running_mean += 0.2 * norm.running_var.sqrt() * normal(norm.running_mean)
        norm.running_var *= uniform(norm.running_var, 0.7, 1.4)
    net.eval()
