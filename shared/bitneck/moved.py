"""Old import paths. They work for one version, with a `DeprecationWarning` that names the new path.

`install` is called once, by ``bitneck/__init__.py``; the other packages import ``bitneck`` first. A module or package
that still has the name of an old module uses `names_of` as its ``__getattr__``.
"""

import importlib
import importlib.abc
import importlib.machinery
import sys
import warnings
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

__all__ = ["MOVED", "install", "names_of"]

MOVED: dict[str, tuple[str, ...]] = {
    "bitneck.classmap": ("bitneck.coding.class_map",),
    "bitneck.codec": (
        "bitneck.coding.range_coder",
        "bitneck.coding.factorized_codec",
    ),
    "bitneck.conditional": ("bitneck.coding.conditional_model",),
    "bitneck.config": ("bitneck.settings.model",),
    "bitneck.frames": (
        "bitneck.wire.frames",
        "bitneck_cloud.api.wire",
    ),
    "bitneck.ladder": ("bitneck_cloud.sessions.rates",),
    "bitneck.similar": ("bitneck.coding.conditional_codec",),
    "bitneck.symbols": ("bitneck.coding.symbols",),
    "bitneck.tables": ("bitneck.coding.factorized_model",),
    "bitneck_cloud.batching": ("bitneck_cloud.engine.chain_plan",),
    "bitneck_cloud.conversation": (
        "bitneck_cloud.sessions.conversation",
        "bitneck_cloud.sessions.jobs",
        "bitneck_cloud.api.grpc_peer",
    ),
    "bitneck_cloud.engine": (
        "bitneck_cloud.engine.job",
        "bitneck_cloud.engine.engine",
    ),
    "bitneck_cloud.grpc_service": ("bitneck_cloud.api.grpc_service",),
    "bitneck_cloud.http_api": (
        "bitneck_cloud.api.schemas",
        "bitneck_cloud.api.readiness",
        "bitneck_cloud.api.http_api",
        "bitneck_cloud.fleet.tables",
    ),
    "bitneck_cloud.logs": ("bitneck_cloud.observe.logs",),
    "bitneck_cloud.messages": ("bitneck_cloud.faults",),
    "bitneck_cloud.metrics": ("bitneck_cloud.observe.metrics",),
    "bitneck_cloud.models": ("bitneck_cloud.engine.served_model",),
    "bitneck_cloud.outbox": ("bitneck_cloud.sessions.outbox",),
    "bitneck_cloud.outputs": ("bitneck_cloud.engine.outputs",),
    "bitneck_cloud.parsing": ("bitneck_cloud.api.parsing",),
    "bitneck_cloud.registry": ("bitneck_cloud.sessions.registry",),
    "bitneck_cloud.security": ("bitneck_cloud.access.security",),
    "bitneck_cloud.session": ("bitneck_cloud.sessions.session",),
    "bitneck_cloud.tokens": ("bitneck_cloud.access.tokens",),
    "bitneck_cloud.tracing": ("bitneck_cloud.observe.tracing",),
    "bitneck_edge.bench": ("bitneck_edge.measure.bench",),
    "bitneck_edge.cache": ("bitneck_edge.bundles.store", "bitneck_edge.bundles.notes"),
    "bitneck_edge.capture": (
        "bitneck_edge.sources.capture",
        "bitneck_edge.pipeline",
    ),
    "bitneck_edge.fetch": ("bitneck_edge.bundles.fetch",),
    "bitneck_edge.frame_answers": ("bitneck_edge.answers.assemble",),
    "bitneck_edge.load": ("bitneck_edge.measure.load_generator",),
    "bitneck_edge.maps": ("bitneck_edge.answers.maps",),
    "bitneck_edge.memory": ("bitneck_edge.measure.memory",),
    "bitneck_edge.ratecontrol": ("bitneck_edge.link.cost",),
    "bitneck_edge.references": ("bitneck_edge.link.records",),
    "bitneck_edge.remote": ("bitneck_edge.link.remote",),
    "bitneck_edge.report": ("bitneck_edge.cli.report",),
    "bitneck_edge.results": ("bitneck_edge.answers.results",),
    "bitneck_edge.run": ("bitneck_edge.cli.run",),
    "bitneck_models.any_network": ("bitneck_models.networks.any_network",),
    "bitneck_models.backbones": (
        "bitneck_models.networks.registry",
        "bitneck_models.networks.backbone",
    ),
    "bitneck_models.baselines": (
        "bitneck_models.measure.baselines",
        "bitneck_models.measure.judge",
        "bitneck_models.measure.sweeps",
    ),
    "bitneck_models.class_maps": ("bitneck_models.data.class_maps",),
    "bitneck_models.cli_measure": ("bitneck_models.cli.measure",),
    "bitneck_models.cli_options": ("bitneck_models.cli.options",),
    "bitneck_models.cli_spic": ("bitneck_models.cli.spic",),
    "bitneck_models.coco": ("bitneck_models.data.coco",),
    "bitneck_models.complexity": ("bitneck_models.measure.complexity",),
    "bitneck_models.curves": ("bitneck_models.report.curves",),
    "bitneck_models.cutting": ("bitneck_models.networks.cutting",),
    "bitneck_models.deeplab": ("bitneck_models.networks.deeplab",),
    "bitneck_models.evaluation": (
        "bitneck_models.measure.evaluate",
        "bitneck_models.measure.intervals",
        "bitneck.intervals",
    ),
    "bitneck_models.evaluation_table": ("bitneck_models.measure.table",),
    "bitneck_models.export": (
        "bitneck_models.export.bundle",
        "bitneck_models.export.proof",
    ),
    "bitneck_models.features": ("bitneck_models.data.features",),
    "bitneck_models.map_evaluation": ("bitneck_models.measure.evaluate",),
    "bitneck_models.network_recipe": ("bitneck_models.networks.recipe",),
    "bitneck_models.network_training": (
        "bitneck_models.zoo.records",
        "bitneck_models.training.network",
        "bitneck_models.zoo.network_training",
    ),
    "bitneck_models.onnx_export": ("bitneck_models.networks.to_onnx",),
    "bitneck_models.passes": ("bitneck_models.measure.passes",),
    "bitneck_models.photos": (
        "bitneck_models.data.photos",
        "bitneck_models.export.proof",
    ),
    "bitneck_models.pipeline": (
        "bitneck_models.training.photo_sets",
        "bitneck_models.training.validation",
        "bitneck_models.training.run",
        "bitneck_models.training.tables",
        "bitneck_models.training.point",
    ),
    "bitneck_models.rate": ("bitneck_models.losses.rate_terms",),
    "bitneck_models.recipe": (
        "bitneck_models.zoo.recipe",
        "bitneck_models.losses.task_terms",
    ),
    "bitneck_models.report": (
        "bitneck_models.report.pictures",
        "bitneck_models.report.tables",
    ),
    "bitneck_models.scalars": ("bitneck_models.training.scalars",),
    "bitneck_models.scenes": ("bitneck_models.data.scenes",),
    "bitneck_models.search": (
        "bitneck_models.search.front",
        "bitneck_models.search.space",
        "bitneck_models.search.adopt",
        "bitneck_models.search.study",
        "bitneck_models.search.worker",
    ),
    "bitneck_models.similar": (
        "bitneck_models.zoo.records",
        "bitneck_models.fitting.pairs",
        "bitneck_models.fitting.conditional",
    ),
    "bitneck_models.spic": (
        "bitneck_models.spic.places",
        "bitneck_models.spic.checkpoint",
    ),
    "bitneck_models.spic_point": (
        "bitneck_models.spic.record",
        "bitneck_models.spic.point",
    ),
    "bitneck_models.starts": ("bitneck_models.units.starts",),
    "bitneck_models.tasks": ("bitneck_models.losses.task_terms",),
    "bitneck_models.toml_file": ("bitneck_models.typed_files",),
    "bitneck_models.torchvision_networks": ("bitneck_models.networks.torchvision_networks",),
    "bitneck_models.training": ("bitneck_models.training.unit",),
    "bitneck_models.units": (
        "bitneck_models.units.unit",
        "bitneck_models.units.topologies",
        "bitneck_models.units.geometry",
        "bitneck_models.units.layers",
        "bitneck_models.units.prune",
    ),
    "bitneck_models.vision": ("bitneck_models.networks.vision",),
    "bitneck_models.voc": ("bitneck_models.networks.voc",),
    "bitneck_models.weights": ("bitneck_models.networks.weights",),
    "bitneck_models.zoo": (
        "bitneck_models.zoo.records",
        "bitneck_models.zoo.entry",
        "bitneck_models.zoo.point",
    ),
}
"""Old module: the modules that define its public names now. If there are several, each name is in one of them."""


RENAMED = {
    "bitneck_models.map_evaluation": {
        "MapEvaluation": "Evaluation",
        "MapPointResult": "PointResult",
        "evaluate_maps": "evaluate",
    },
    "bitneck_models.recipe": {"PointRecipe": "UnitRecipe"},
}
"""Old module: its names that have another name in the new module."""


def names_of(old: str) -> Callable[[str], Any]:
    """A module's ``__getattr__`` that finds names of an old module in their new modules.

    Args:
        old: dotted name of the old module, a key of `MOVED`.
    """

    def find(name: str) -> Any:
        if not name.startswith("__"):
            now = RENAMED.get(old, {}).get(name, name)
            for place in MOVED[old]:
                module = importlib.import_module(place)
                if now in module.__all__:
                    new = place if now == name else f"{place}.{now}"
                    text = f"{old}.{name} has moved to {new}; the old path works until version 0.3"
                    warnings.warn(text, DeprecationWarning, stacklevel=2)
                    return getattr(module, now)
        raise AttributeError(f"module {old!r} has no attribute {name!r}")

    return find


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds the modules of `MOVED`, after all other finders have found nothing."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """The spec of an old module; None for every other name."""
        del path, target
        return importlib.machinery.ModuleSpec(fullname, self) if fullname in MOVED else None

    def exec_module(self, module: ModuleType) -> None:
        """Give the module a ``__getattr__`` for its old names."""
        vars(module)["__getattr__"] = names_of(module.__name__)


def install() -> None:
    """Make the old paths importable."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.append(_Finder())
