"""``bitneck-models new``: a starter recipe for a network and some folders of photographs."""

import json
import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from bitneck.errors import InvalidConfig
from bitneck.ids import check_id
from bitneck_models.cli.options import Data, Weights

if TYPE_CHECKING:
    from bitneck_models.networks.backbone import Backbone

__all__ = ["new", "placed", "starter_recipe"]

_BITS_A_PIXEL = (0.06, 0.02)
"""Of the input, at the two units of a split point."""
_WINDOWS = 7
"""The stride makes about this many windows along the longer side of a feature."""
_CHANNELS = 64


def new(
    zoo: Annotated[Path, typer.Argument(help="Folder of the new zoo entry; its name becomes the bundle's.")],
    backbone: Annotated[str, typer.Option(help="The network: a name or a network recipe, FILE.toml.")],
    photos: Annotated[list[str], typer.Option(help="A folder of photographs to learn from, below --data; repeatable.")],
    data: Data = None,
    split: Annotated[list[str] | None, typer.Option(help="Split point; repeatable.  \\[default: all]")] = None,
    weights: Weights = None,
) -> None:
    """Write a starter recipe: two units at each split point, one for a higher and one for a lower rate."""
    from bitneck_models.networks.registry import build_backbone
    from bitneck_models.zoo.recipe import load_recipe

    path = zoo / "recipe.toml"
    if path.exists():
        raise InvalidConfig(f"{path} exists already; edit it, or choose another folder")
    name = check_id(zoo.resolve().name, "bundle")
    root, folders = placed(photos, data)
    console = Console(stderr=True)
    console.print(f"building {backbone} ...", markup=False, highlight=False, soft_wrap=True)
    network = build_backbone(backbone, weights)
    unknown = set(split or ()) - set(network.splits)
    if unknown:
        raise InvalidConfig(
            f"{backbone} has no split point {sorted(unknown)[0]!r}; it has: {', '.join(network.splits)}"
        )
    place = str(Path(backbone).resolve()) if backbone.endswith(".toml") else backbone
    text = starter_recipe(name, place, network, folders, split or list(network.splits))
    try:
        zoo.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    except OSError as exc:
        raise InvalidConfig(f"{path}: cannot write it ({exc.strerror})") from exc
    try:
        load_recipe(path)
    except InvalidConfig:
        path.unlink()
        raise
    place = shlex.quote(str(root)) if root is not None else "FOLDER"
    console.print(
        f"wrote {path}; `bitneck-models train {zoo} --data {place} --dry-run` says what training takes",
        markup=False, highlight=False, soft_wrap=True,
    )  # fmt: skip


def placed(photos: list[str], data: Path | None) -> tuple[Path | None, list[str]]:
    """The folder for ``--data``, and the folders of photographs below it, as a recipe names them.

    Args:
        photos: folders below `data`, or their absolute paths.
        data: None if it was not named. It is then the folder above an absolute path.

    Returns:
        The folder, None if it cannot be known; and paths below it.

    Raises:
        InvalidConfig: a folder is not there, or not below `data`.
    """
    absolute = [Path(folder) for folder in photos if Path(folder).is_absolute()]
    root = data if data is not None or not absolute else absolute[0].parent
    if root is None:
        return None, photos
    above = os.path.normpath(root.absolute())  # not resolved: a folder below --data may be a link to another disk
    found = []
    for folder in photos:
        path = Path(os.path.normpath(root.absolute() / folder))
        if not path.is_dir():
            raise InvalidConfig(f"{path}: no such folder; --photos names folders below --data, which is {root}")
        if not path.is_relative_to(above):
            raise InvalidConfig(f"--photos {folder} is not below --data, which is {root}: name a folder in it")
        found.append(path.relative_to(above).as_posix())
    return root, found


def starter_recipe(name: str, network: str, backbone: "Backbone", photos: list[str], splits: list[str]) -> str:
    """The text of a recipe, with comments.

    Args:
        name: of the bundle.
        network: the backbone as the recipe names it.
        backbone: the same, built.
        photos: folders of photographs.
        splits: split points.
    """
    parts = [_HEAD.format(name=name, network=network)]
    parts += [_SOURCE.format(folder=json.dumps(folder, ensure_ascii=False)) for folder in photos]  # a TOML string too
    parts.append(_TRAINING)
    pixels = backbone.input.height * backbone.input.width
    for split in splits:
        channels, height, width = backbone.feature_shape(split)
        stride = max(1, min(round(max(height, width) / _WINDOWS), height, width))
        high, low = (max(8, round(bits * pixels / 8)) for bits in _BITS_A_PIXEL)
        parts.append(f"# {split}: a feature of {channels}x{height}x{width}.\n")
        common = {"split": split, "stride": stride, "channels": min(_CHANNELS, channels)}
        parts.append(_UNIT.format(id=f"{split}-r2", step=1.0, init="task", target=high, **common))
        parts.append(_UNIT.format(id=f"{split}-r1", step=2.0, init=f"{split}-r2", target=low, **common))
    return "\n".join(parts)


_HEAD = """\
# A starter recipe: what to train, for `bitneck-models train`. docs/training.md explains every key.
name = "{name}"
backbone = "{network}"
"""
_SOURCE = """\
[[data]]
folder = {folder}
views = 8            # random views of each photograph
validate_every = 10  # one photograph in ten is put aside; rate and agreement on these choose the ladder
"""
_TRAINING = """\
[training]
steps = 600          # updates with the rate estimator
finish_steps = 200   # updates with the tables' own model
batch = 128          # lower it if memory is short
"""
_UNIT = """\
[[units]]
id = "{id}"
split = "{split}"
stride = {stride}
channels = {channels}
step = {step}
lambda = 1000        # where training starts; it moves until the target is met
target_bytes = {target}
init = "{init}"
task = [{{ kind = "kl" }}, {{ kind = "mae", weight = 0.1 }}]
"""
