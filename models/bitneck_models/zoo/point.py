"""A trained unit, with weights rounded to float16, and an operating point of it, as files of a zoo entry."""

from pathlib import Path

import torch
from safetensors.torch import save

from bitneck.coding.factorized_model import FactorizedModel
from bitneck.manifest import sha256_hex
from bitneck_models.networks.backbone import Backbone
from bitneck_models.units.topologies import TOPOLOGIES
from bitneck_models.units.unit import BottleneckUnit
from bitneck_models.zoo.recipe import UnitRecipe
from bitneck_models.zoo.records import PointRecord, UnitRecord

__all__ = ["new_unit", "round_weights", "save_point", "save_unit"]


def new_unit(
    backbone: Backbone, point: UnitRecipe, channels: int | None = None, hidden: int | None = None
) -> BottleneckUnit:
    """Make a fresh unit of a recipe's geometry; its weights are drawn from seed 0.

    Args:
        backbone: gives the shape of the feature.
        point: the unit's recipe: split point, topology and sizes.
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
            pool=point.pool,
            decoder_blocks=point.decoder_blocks,
            decoder_width=point.channels,
        ).eval()


@torch.no_grad()
def round_weights(unit: BottleneckUnit) -> None:
    """Round a unit's weights to float16, in place: `save_unit` keeps float16, and what is kept must be measured."""
    for value in unit.state_dict().values():
        if value.is_floating_point():
            value.copy_(value.half().float())


def save_unit(folder: Path, unit: BottleneckUnit, record: UnitRecord) -> None:
    """Write a trained unit. The weights are written last, because they mark the unit as trained.

    Args:
        folder: folder of the unit; created if it does not exist.
        unit: the trained unit; see `round_weights`.
        record: its record; this function fills in the digest.
    """
    folder.mkdir(parents=True, exist_ok=True)
    state = {k: v.half() if v.is_floating_point() else v for k, v in unit.state_dict().items()}
    weights = save({k: v.contiguous() for k, v in state.items()})
    digests = {"unit_sha256": sha256_hex(weights)}
    (folder / "record.json").write_text(record.model_copy(update=digests).model_dump_json(indent=1) + "\n")
    temporary = folder / "unit.part"
    temporary.write_bytes(weights)
    temporary.rename(folder / "unit.safetensors")


def save_point(folder: Path, tables: FactorizedModel, record: PointRecord) -> None:
    """Write an operating point: its tables, then its record, which marks it as fitted.

    Contexts and a conditional model that were fitted to earlier tables are removed.

    Args:
        folder: folder of the point; created if it does not exist.
        tables: its tables.
        record: its record; this function fills in the digest.
    """
    folder.mkdir(parents=True, exist_ok=True)
    arrays = tables.to_npz()
    for what in ("contexts", "conditional"):
        for ending in ("npz", "json"):
            (folder / f"{what}.{ending}").unlink(missing_ok=True)
    (folder / "tables.npz").write_bytes(arrays)
    temporary = folder / "point.part"
    filled = record.model_copy(update={"tables_sha256": sha256_hex(arrays)})
    temporary.write_text(filled.model_dump_json(indent=1) + "\n")
    temporary.rename(folder / "point.json")
