"""``network.toml`` of a zoo entry: how a network is trained in this repository."""

from pathlib import Path
from typing import Annotated

from pydantic import Field

from bitneck_models.typed_files import Positive, Seed, Strict, load_toml, validated

__all__ = ["NetworkTraining", "load_network_training"]


class NetworkTraining(Strict):
    """The schedule of a network's training.

    Attributes:
        backbone: name of the network.
        folder: path below the data folder; holds ``train``, ``val`` and ``test``, each with ``images`` and ``labels``.
        train_from: the first stage that is trained; the stages before it stay as they are.
        height: height of a training view, pixels; a multiple of 16.
        width: its width, pixels; a multiple of 16.
        scale_min, scale_max, light: see `bitneck_models.data.class_maps.ViewRange`.
        steps: updates.
        batch: views in an update.
        learning_rate: peak of AdamW's learning rate, for the head.
        backbone_learning_rate: the same for the blocks below the head.
        weight_decay: AdamW's weight decay.
        warmup_steps: updates over which the learning rates rise. They then fall as ``(1 - t) ** 0.9``.
        rare: a class with share p of the pixels has the weight ``1 / ln(rare + p)``: the nearer to 1, the more rare
            classes count.
        ema: decay of the running mean of the weights.
        validate_every: steps between two validations.
        seed: seed of everything random.
    """

    backbone: str
    folder: str
    train_from: str
    height: Annotated[int, Field(ge=32, multiple_of=16)] = 288
    width: Annotated[int, Field(ge=32, multiple_of=16)] = 384
    scale_min: Annotated[float, Field(gt=0.1, le=4)] = 0.6
    scale_max: Annotated[float, Field(gt=0.1, le=4)] = 1.5
    light: Annotated[float, Field(ge=0, lt=1)] = 0.4
    steps: Annotated[int, Field(ge=1)] = 1200
    batch: Annotated[int, Field(ge=2)] = 8
    learning_rate: Positive = 2e-3
    backbone_learning_rate: Positive = 3e-4
    weight_decay: Annotated[float, Field(ge=0)] = 1e-2
    warmup_steps: Annotated[int, Field(ge=0)] = 50
    rare: Annotated[float, Field(gt=1)] = 1.05
    ema: Annotated[float, Field(ge=0, lt=1)] = 0.99
    validate_every: Annotated[int, Field(ge=1)] = 150
    seed: Seed = 0


def load_network_training(path: Path) -> NetworkTraining:
    """Read a network's training recipe.

    Args:
        path: a TOML file, or a folder with ``network.toml``.

    Raises:
        InvalidConfig: there is no such file, it is not TOML, or it has an unknown key or a value out of range, which
            the message names.
    """
    path = path / "network.toml" if path.is_dir() else path
    return validated(NetworkTraining, load_toml(path, "recipe of a network"), path, "recipe")
