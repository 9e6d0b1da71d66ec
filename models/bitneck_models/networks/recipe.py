"""Networks by a short recipe: any of torchvision or timm, with its split points by module name.

    source = "timm"
    name = "mobilenetv3_small_100"
    splits = { s1 = "blocks.4", s2 = "blocks.3" }

A file like this, or the same keys as a zoo recipe's table ``[backbone]``, stands wherever the name of a backbone does.
`bitneck_models.networks.any_network` builds it.
"""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from bitneck.manifest import InputSpec, Task
from bitneck_models.typed_files import Id, Strict, load_toml, validated

__all__ = ["NetworkRecipe", "load_network"]

Module = Annotated[str, Field(pattern=r"^[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*$")]


class NetworkRecipe(Strict):
    """A network and where it may be cut. Refuses unknown keys.

    Attributes:
        source: the library.
        name: of the model there.
        splits: split point to the module that it stands after, as torch names it.
        stages: further modules to end a stage at, for task terms that compare features there.
        task: what the output is.
        output: key of the network's output, where it gives several, such as ``out``.
        weights: torchvision only: the member of the model's enum of weights, such as ``IMAGENET1K_V1``; None for its
            default. timm has it in the name, after a dot.
        input: None for what the library says of these weights, which it does for classification.
        labels: names of the classes; None for the library's, or ImageNet's where there are 1,000.
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
    """Read a network's recipe.

    Args:
        path: a TOML file.

    Raises:
        InvalidConfig: no such file, not TOML, an unknown key or a value out of range; the message names it.
    """
    return validated(NetworkRecipe, load_toml(path, "network recipe"), path, "network")
