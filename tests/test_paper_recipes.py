"""The paper's recipes: they load, every unit fits its split point, and COCO and ImageNet folders are what they name."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from bitneck.errors import InvalidConfig
from bitneck_models.losses.task_terms import TaskLoss
from bitneck_models.networks.voc import VOC_CLASSES
from bitneck_models.search.space import load_space
from bitneck_models.spic.places import PLACES
from bitneck_models.training.photo_sets import photo_sets
from bitneck_models.training.point import train_point
from bitneck_models.units.unit import BottleneckUnit
from bitneck_models.zoo.entry import ZooEntry
from bitneck_models.zoo.recipe import Recipe, load_recipe
from bitneck_testing.coco_folders import document, instance, square, write
from bitneck_testing.networks import SHAPES, small_backbone
from bitneck_testing.photographs import photo

ZOO = Path(__file__).resolve().parent.parent / "models" / "zoo"
NETWORKS = ("resnet50", "deeplabv3_resnet50")


@pytest.mark.parametrize("name", NETWORKS)
def test_every_point_and_space_fits(name: str) -> None:
    recipe = load_recipe(ZOO / name)
    assert recipe.backbone == name
    for point in recipe.units:
        BottleneckUnit(SHAPES[name][point.split], point.channels, point.stride)
        assert point.stride in PLACES[name][point.split].decoders  # a checkpoint of the authors has it
    kinds = {(p.split, p.task[0].kind) for p in recipe.units}
    assert kinds == {("s1", "ce"), ("s2", "ce"), ("s3", "ce"), ("s1", "mae"), ("s2", "mae")}
    for split, kind in kinds:
        rates = [p.target_bytes for p in recipe.units if (p.split, p.task[0].kind) == (split, kind)]
        assert all(rates)
        assert rates == sorted(rates, key=float, reverse=True)  # type: ignore[arg-type]
    spaces = [load_space(path) for path in sorted((ZOO / name).glob("search-*.toml"))]
    assert {(s.split, s.task[0].kind) for s in spaces} == kinds
    for space in spaces:
        for channels in space.channels:
            for stride in space.stride:
                BottleneckUnit(SHAPES[name][space.split], channels, stride)


def source(folder: str, **options: object) -> dict[str, object]:
    return {"folder": folder, "labels": True, "validate_every": 2} | options


def recipe_of(*data: dict[str, object], task: str = "ce") -> Recipe:
    point = {"id": "p", "split": "s1", "stride": 2, "channels": 4, "step": 0.1, "lambda": 10.0, "init": "random"}
    values = {"name": "x", "backbone": "small", "data": data, "units": [point | {"task": [{"kind": task}]}]}
    values["training"] = {"steps": 3, "finish_steps": 2, "batch": 2, "precision": "float32", "mirror": False}
    return Recipe.model_validate(values)


def test_a_limit_takes_photographs_from_the_whole_folder(tmp_path: Path) -> None:
    """As ImageNet is unpacked: one folder a class, named by its WordNet id."""
    backbone = replace(small_backbone(), wnids=tuple(f"n{k:08d}" for k in range(10)))
    for k in range(10):
        (tmp_path / "imagenet" / f"n{k:08d}").mkdir(parents=True)
        for i in range(6):
            photo(k, (20, 20)).save(tmp_path / "imagenet" / f"n{k:08d}" / f"{i}.JPEG")
    every = photo_sets(recipe_of(source("imagenet")), tmp_path, backbone)
    assert (len(every.train), len(every.validation)) == (30, 30)
    some = photo_sets(recipe_of(source("imagenet", limit=20)), tmp_path, backbone)
    assert (len(some.train), len(some.validation)) == (10, 10)
    assert sorted(some.labels.tolist()) == list(range(10))
    assert photo_sets(recipe_of(source("imagenet", limit=1000)), tmp_path, backbone).train == every.train
    with pytest.raises(ValueError, match="limit"):
        recipe_of(source("imagenet", limit=0))


@pytest.mark.parametrize("task", ["ce", "mae"])
def test_units_learn_from_coco(coco: Path, tmp_path: Path, task: str) -> None:
    """Supervised and unsupervised, with a network of 21 classes; what has no pixel of them is left out."""
    write(coco, document(annotations=[instance(k, 10 * k, square(0, 0, 40)) for k in range(1, 6)]))
    small = small_backbone()
    torch.manual_seed(1)
    stages = {"stem": small.stages["stem"], "body": small.stages["body"], "classes": nn.Conv2d(12, 21, 1)}
    stages["upsample"] = nn.Upsample((32, 32), mode="bilinear", align_corners=False)
    for stage in stages.values():
        stage.eval().requires_grad_(requires_grad=False)
    spec = small.input.model_copy(update={"fit": "stretch", "resize": None})
    backbone = replace(small, stages=stages, labels=VOC_CLASSES, task="segmentation", input=spec)
    recipe = recipe_of(source("coco/tiny2017", validate_every=3), task=task)
    sets = photo_sets(recipe, tmp_path, backbone)
    assert (len(sets.train), len(sets.validation), len(sets.maps)) == (4, 1, 5)
    entry = ZooEntry.__new__(ZooEntry)
    entry.folder, entry.recipe = tmp_path / "zoo", recipe
    trained, record = train_point(entry, recipe.units[0], backbone, sets, tmp_path / "runs")
    assert record.validation_mean_iou is not None
    assert 0 <= record.validation_mean_iou <= 1
    assert (tmp_path / "zoo" / "units" / "p" / "unit.safetensors").is_file()
    with pytest.raises(InvalidConfig, match="no layer"):
        TaskLoss([recipe.units[0].task[0].model_copy(update={"layer": "nowhere", "kind": "mae"})], backbone.tail("s1"))
    assert np.isfinite(trained.estimated_bytes)
