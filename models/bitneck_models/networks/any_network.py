"""Any network of torchvision or timm as a backbone, from a `bitneck_models.networks.recipe.NetworkRecipe`."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bitneck.errors import InvalidConfig
from bitneck.manifest import InputSpec, sha256_hex
from bitneck_models.networks.backbone import Backbone
from bitneck_models.networks.cutting import cut_network
from bitneck_models.networks.recipe import NetworkRecipe
from bitneck_models.networks.vision import imagenet_wnids, import_timm, import_torchvision
from bitneck_models.networks.weights import download, fill

__all__ = ["any_network"]


def any_network(recipe: NetworkRecipe, weights: Path | None) -> Backbone:
    """Build a network and cut it; see `bitneck_models.networks.cutting`.

    Args:
        recipe: names the model and its split points.
        weights: a file, ``random``, or None for the library's, which are downloaded once.

    Raises:
        InvalidConfig: there is no such model, the weights cannot be obtained or do not fit, more than one tensor
            crosses a cut, a feature is not C x Hf x Wf, or the output has not the shape that the task needs.
    """
    model = (_torchvision if recipe.source == "torchvision" else _timm)(recipe)
    shape = (3, model.input.height, model.input.width)
    digest = fill(model.net, weights, model.published, shape, drop=("aux_classifier.",))
    model.net.requires_grad_(requires_grad=False)
    cuts = {module: module for module in (*recipe.splits.values(), *recipe.stages)}
    stages = cut_network(model.net, shape, cuts, recipe.output)
    with torch.no_grad():
        x = torch.zeros(1, *shape)
        for name, stage in stages.items():
            x = stage(x)
            if name in recipe.splits.values() and x.ndim != 4:
                raise InvalidConfig(
                    f"{recipe.name}: module {name!r} gives {tuple(x.shape[1:])}, a split point needs C x Hf x Wf"
                )
    expected = (shape[1], shape[2]) if recipe.task == "segmentation" else ()
    if x.ndim < 2 or tuple(x.shape[2:]) != expected:
        wanted = ("K", *expected)
        raise InvalidConfig(f"{recipe.name} gives {tuple(x.shape[1:])}, {recipe.task} needs {wanted}: (classes, ...)")
    return Backbone(
        name=recipe.name,
        stages=stages,
        splits={s: recipe.splits[s] for s in sorted(recipe.splits, key=lambda s: list(stages).index(recipe.splits[s]))},
        input=model.input,
        labels=(named := _labels(recipe, model.labels, int(x.shape[1]))),
        wnids=imagenet_wnids(named),
        task=recipe.task,
        weights_sha256=sha256_hex(f"{recipe.model_dump_json()} {digest}".encode()),
    )


@dataclass(frozen=True, slots=True, eq=False)
class _Model:
    """A model of a library.

    Attributes:
        net: the module, with fresh weights.
        published: gets the library's weights.
        input: how photographs are prepared.
        labels: names of the classes, or empty.
    """

    net: nn.Module
    published: Callable[[], Mapping[str, Tensor]]
    input: InputSpec
    labels: tuple[str, ...]


def _torchvision(recipe: NetworkRecipe) -> _Model:
    models = import_torchvision().models
    if recipe.name not in models.list_models():
        raise InvalidConfig(f"torchvision has no model {recipe.name!r}; `torchvision.models.list_models()` lists them")
    enum = models.get_model_weights(recipe.name)
    if recipe.weights is not None and recipe.weights not in enum.__members__:
        raise InvalidConfig(f"{recipe.name} has no weights {recipe.weights!r}; it has: {', '.join(enum.__members__)}")
    chosen: Any = enum[recipe.weights] if recipe.weights is not None else enum.DEFAULT
    own = {"weights_backbone": None} if recipe.task == "segmentation" else {}
    net = _made(recipe, lambda: models.get_model(recipe.name, weights=None, **own, **recipe.options))
    preset = chosen.transforms()
    crop = getattr(preset, "crop_size", None)
    spec = recipe.input or _spec(
        recipe, crop and crop[0], preset.resize_size[0], preset.interpolation.value, preset.mean, preset.std
    )
    return _Model(net, lambda: download(chosen.url), spec, tuple(chosen.meta.get("categories", ())))


def _timm(recipe: NetworkRecipe) -> _Model:
    timm = import_timm()
    if recipe.weights is not None:
        raise InvalidConfig(f"timm has weights in the name: {recipe.name}.{recipe.weights}; leave `weights` out")
    if not timm.is_model(recipe.name.split(".")[0]):
        raise InvalidConfig(f"timm has no model {recipe.name!r}; `timm.list_models()` lists them")
    net = _made(recipe, lambda: timm.create_model(recipe.name, pretrained=False, **recipe.options))
    config: dict[str, Any] = net.pretrained_cfg  # type: ignore[assignment]
    size = config["input_size"][1]
    spec = recipe.input or _spec(
        recipe, size, math.floor(size / config["crop_pct"]), config["interpolation"], config["mean"], config["std"]
    )

    def published() -> Mapping[str, Tensor]:
        try:
            state: Mapping[str, Tensor] = timm.create_model(recipe.name, pretrained=True, **recipe.options).state_dict()
        except Exception as exc:  # urllib, huggingface_hub, the file system, timm
            raise InvalidConfig(
                f"timm cannot get the weights of {recipe.name} ({type(exc).__name__}: {exc}). Save its state dict on a "
                "machine that can, and give the file with --weights FILE"
            ) from exc
        return state

    return _Model(net, published, spec, ())


def _made(recipe: NetworkRecipe, make: Callable[[], nn.Module]) -> nn.Module:
    try:
        return make()
    except Exception as exc:  # whatever the model's constructor raises
        raise InvalidConfig(f"{recipe.source} cannot make {recipe.name} with {recipe.options} ({exc})") from exc


def _spec(
    recipe: NetworkRecipe,
    size: int | None,
    resize: int,
    interpolation: str,
    mean: tuple[float, ...],
    std: tuple[float, ...],
) -> InputSpec:
    if size is None or recipe.task == "segmentation":
        raise InvalidConfig(
            f"{recipe.name}: the library does not say how large its input is; give `input` in the recipe"
        )
    values = {"height": size, "width": size, "resize": max(size, resize), "interpolation": interpolation}
    return InputSpec.model_validate(values | {"mean": tuple(mean), "std": tuple(std)})


def _labels(recipe: NetworkRecipe, published: tuple[str, ...], classes: int) -> tuple[str, ...]:
    if recipe.labels is not None:
        if len(recipe.labels) != classes:
            raise InvalidConfig(f"{recipe.name} has {classes} classes, the recipe names {len(recipe.labels)}")
        return recipe.labels
    if classes == 1000:
        return tuple(import_timm().data.ImageNetInfo("imagenet-1k").label_descriptions())
    return published if len(published) == classes else tuple(f"class {k}" for k in range(classes))
