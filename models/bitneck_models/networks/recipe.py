"""Network recipes: any network of torchvision or timm in a few lines, with its split points by the names of modules.

    source = "timm"
    name = "mobilenetv3_small_100"
    splits = { s1 = "blocks.4", s2 = "blocks.3" }

The path of such a file can be given wherever the name of a backbone can. In a zoo recipe the same keys may also be a
table ``[backbone]``. `bitneck_models.networks.any_network` builds the network.
"""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from bitneck.manifest import InputSpec, Task
from bitneck_models.typed_files import Id, Strict, load_toml, validated

__all__ = ["NetworkRecipe", "load_network"]

Module = Annotated[str, Field(pattern=r"^[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*$")]


class NetworkRecipe(Strict):
    """A network, and where it may be cut.

    Attributes:
        source: the library.
        name: name of the model in the library.
        splits: for each split point, the module before it, as torch names it.
        stages: further modules that end a stage, so that task terms can compare features there.
        task: kind of the output.
        output: key of the network's output, such as ``out``, if it gives several.
        weights: torchvision only: a member of the model's enum of weights, such as ``IMAGENET1K_V1``; None for its
            default. timm has the weights in the name, after a dot.
        input: how photographs are prepared; None for what the library says, which it does for classification only.
        labels: names of the classes; None for the library's, or for ImageNet's if there are 1,000 classes.
        options: further arguments of the model, such as ``output_stride``.
    """

    source: Literal["torchvision", "timm"]
    name: Id
    splits: Annotated[dict[Id, Module], Field(min_length=1, max_length=32)]
    stages: tuple[Module, ...] = ()
    task: Task = "classification"
    output: str | None = None
    weights: str | None = None
    input: InputSpec | None = None
    labels: tuple[str, ...] | None = None
    options: dict[str, bool | int | float | str] = Field(default_factory=dict)


def load_network(path: Path) -> NetworkRecipe:
    """Read a network recipe.

    Args:
        path: a TOML file.

    Raises:
        InvalidConfig: there is no such file, it is not TOML, or it has an unknown key or a value out of range, which
            the message names.
    """
    return validated(NetworkRecipe, load_toml(path, "network recipe"), path, "network")
