"""Training on fresh views of photographs, without a cache of features."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from bitneck.errors import ImageError, InvalidConfig
from bitneck_models.data.class_maps import VOID
from bitneck_models.data.features import random_input
from bitneck_models.losses.task_terms import TaskTerm
from bitneck_models.training.stream import ViewStream
from bitneck_models.training.unit import train_unit
from bitneck_models.units.unit import BottleneckUnit
from bitneck_models.zoo.recipe import TrainingRecipe, UnitRecipe
from bitneck_testing.networks import RECIPE, run, small_backbone
from bitneck_testing.photographs import add_photos

pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_recipe_that_streams(home: Path) -> None:
    streamed = RECIPE.replace("[training]", "[training]\nstream = true").replace("batch = 16", "batch = 8")
    (home / "zoo" / "recipe.toml").write_text(streamed)
    run("train", "zoo", "--data", ".", "--workers", "0", "--unit", "s1-r2")
    record = json.loads((home / "zoo" / "units" / "s1-r2" / "record.json").read_text())
    assert record["train_features"] == 15 * 8  # every update saw views of its own
    assert record["training"]["stream"] is True
    views = [json.loads(path.read_text())["views"] for path in (home / "runs").rglob("key.json")]
    assert sorted(views) == [5, 15]  # of the photographs put aside, and one of each photograph to start from
    unit = (home / "zoo" / "units" / "s1-r2" / "unit.safetensors").read_bytes()
    run("train", "zoo", "--data", ".", "--workers", "1", "--unit", "s1-r2", "--again")
    again = load_file(home / "zoo" / "units" / "s1-r2" / "unit.safetensors")
    assert (home / "zoo" / "units" / "s1-r2" / "unit.safetensors").read_bytes() == unit
    assert all(torch.isfinite(value).all() for value in again.values())


def stream(photos: list[Path], maps: dict[Path, Path] | None, folder: Path, task: str = "classification") -> ViewStream:
    network = small_backbone()
    object.__setattr__(network, "task", task)
    return ViewStream(
        network, "s1", photos, maps, seed=3, workers=0, device=torch.device("cpu"), precision="float32", folder=folder
    )


def test_views_depend_on_step_and_photograph_alone(tmp_path: Path) -> None:
    add_photos(tmp_path / "photos", range(6))
    photos = sorted((tmp_path / "photos").iterdir())
    views = stream(photos, None, tmp_path / "head")
    assert len(views) == 6
    rows = {0: [0, 1, 2], 1: [2, 1, 5], 2: [2, 0, 1]}

    def rows_of(step: int) -> np.ndarray:
        return np.array(rows[step % 3])

    first, _ = views.read(0, rows_of)
    second, maps = views.read(1, rows_of)
    assert maps is None
    assert not torch.equal(first[2], second[0])  # the same photograph at another step
    resumed, _ = stream(photos, None, tmp_path / "head").read(1, rows_of)
    assert torch.equal(resumed, second)
    once, _ = views.read_once(1, np.array([5, 2]))
    torch.testing.assert_close(once, second[[2, 0]])
    network = small_backbone()
    x, _ = random_input(photos[5], None, network.input, "classification", np.random.default_rng([3, 1, 5]))
    torch.testing.assert_close(network.head("s1")(torch.from_numpy(x))[0], second[2], atol=1e-5, rtol=1e-5)


def test_class_maps_follow_their_views(tmp_path: Path) -> None:
    """A photograph whose red channel is its class: in every view both agree."""
    photos, maps = [], {}
    for k in range(3):
        classes = (np.indices((48, 40)).sum(0) // 16 % 4).astype(np.uint8)
        pixels = np.repeat((classes * 60)[..., None], 3, axis=2)
        photos.append(tmp_path / f"{k}.png")
        Image.fromarray(pixels).save(photos[-1])
        if k < 2:
            maps[photos[-1]] = tmp_path / f"map{k}.png"
            Image.fromarray(classes).save(maps[photos[-1]])
    views = stream(photos, maps, tmp_path / "head", "segmentation")
    _, found = views.read_once(0, np.array([0, 1, 2]))
    assert found is not None
    assert found.shape == (3, 32, 32)
    assert (found[2] == VOID).all()  # it has no class map
    for row in (0, 1):
        rng = np.random.default_rng([3, 0, row])
        classes = np.array(Image.open(maps[photos[row]]).resize((32, 32), Image.Resampling.NEAREST))
        _, expected = random_input(photos[row], classes, small_backbone().input, "segmentation", rng)
        np.testing.assert_array_equal(found[row], expected)
        assert set(np.unique(found[row])) <= {0, 1, 2, 3, VOID}


def test_a_photograph_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"no photograph")
    with pytest.raises(ImageError, match=r"broken\.jpg"):
        stream([broken], None, tmp_path / "head").read_once(0, np.array([0]))


def test_a_stream_on_another_device_leaves_the_network_where_it_is(tmp_path: Path) -> None:
    network = small_backbone()
    add_photos(tmp_path / "photos", range(2))
    ViewStream(
        network, "s1", sorted((tmp_path / "photos").iterdir()), None, seed=0, workers=0, device=torch.device("meta"),
        precision="float32", folder=tmp_path,
    )  # fmt: skip
    assert {p.device.type for stage in network.stages.values() for p in stage.parameters()} == {"cpu"}


def test_streamed_class_maps_are_not_mirrored(tmp_path: Path) -> None:
    views = stream([tmp_path / "a.png", tmp_path / "b.png"], {}, tmp_path / "head", "segmentation")
    unit = BottleneckUnit((12, 4, 4), 4, 2)
    point = UnitRecipe(
        id="p", split="s1", stride=2, channels=4, step=1.0, lambda_=1.0, init="random", task=(TaskTerm(kind="ce"),)
    )
    with pytest.raises(InvalidConfig, match="class maps are not mirrored"):
        train_unit(unit, small_backbone().tail("s1"), views, point, TrainingRecipe(steps=2, batch=2))
