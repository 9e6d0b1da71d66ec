"""A trained point: its unit, with weights rounded to float16, and its folder in a zoo entry."""

from pathlib import Path

import torch
from safetensors.torch import save

from bitneck.coding.factorized_model import FactorizedModel
from bitneck.manifest import sha256_hex
from bitneck_models.networks.backbone import Backbone
from bitneck_models.units.topologies import TOPOLOGIES
from bitneck_models.units.unit import BottleneckUnit
from bitneck_models.zoo.recipe import PointRecipe
from bitneck_models.zoo.records import PointRecord

__all__ = ["new_unit", "round_weights", "save_point"]


def new_unit(
    backbone: Backbone, point: PointRecipe, channels: int | None = None, hidden: int | None = None
) -> BottleneckUnit:
    """Make a fresh unit with a point's geometry; its weights are drawn from seed 0.

    Args:
        backbone: gives the shape of the feature.
        point: gives split point, topology and sizes.
        channels: Cr; None for the recipe's.
        hidden: H; None for the recipe's.

    Raises:
        InvalidConfig: a split point, stride or number of channels does not fit the backbone.
    """
    feature_shape = backbone.feature_shape(point.split)
    traits = TOPOLOGIES[point.topology]
    default = point.channels if traits.takes_hidden and traits.hidden_by_channels is None else None
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return BottleneckUnit(
            feature_shape,
            channels or point.channels,
            point.stride,
            point.kernel,
            point.filters,
            point.topology,
            hidden or point.hidden or default,
            group=point.group,
        ).eval()


@torch.no_grad()
def round_weights(unit: BottleneckUnit) -> None:
    """Round a unit's weights to float16, in place: `save_point` keeps float16, and what is kept must be measured."""
    for value in unit.state_dict().values():
        if value.is_floating_point():
            value.copy_(value.half().float())


def save_point(folder: Path, unit: BottleneckUnit, tables: FactorizedModel, record: PointRecord) -> None:
    """Write a trained point. The weights are written last, because they mark the point as trained.

    A conditional model that was fitted to earlier tables is removed.

    Args:
        folder: folder of the point; created if it does not exist.
        unit: the trained unit; see `round_weights`.
        tables: its tables.
        record: its record; this function fills in the digests.
    """
    folder.mkdir(parents=True, exist_ok=True)
    state = {k: v.half() if v.is_floating_point() else v for k, v in unit.state_dict().items()}
    weights, arrays = save({k: v.contiguous() for k, v in state.items()}), tables.to_npz()
    digests = {"unit_sha256": sha256_hex(weights), "tables_sha256": sha256_hex(arrays)}
    for name in ("conditional.npz", "conditional.json"):
        (folder / name).unlink(missing_ok=True)
    (folder / "tables.npz").write_bytes(arrays)
    (folder / "record.json").write_text(record.model_copy(update=digests).model_dump_json(indent=1) + "\n")
    temporary = folder / "unit.part"
    temporary.write_bytes(weights)
    temporary.rename(folder / "unit.safetensors")
