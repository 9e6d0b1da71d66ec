"""COCO's instances as class maps: what is drawn, what is void, what is left out, and training on it."""

import builtins
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from bitneck.errors import InvalidConfig
from bitneck_models.data.class_maps import VOID, load_class_map, mapped_photos
from bitneck_models.data.coco import LEAST_PIXELS, coco_maps, find_instances, instance_map
from bitneck_models.networks.voc import VOC_CLASSES
from bitneck_testing.coco_folders import CLASSES, DOG, PERSON, TRUCK, document, instance, square, write


def test_what_is_drawn() -> None:
    drawn = instance_map([instance(1, PERSON, square(2, 3, 10)), instance(1, DOG, square(8, 5, 10))], (20, 30), CLASSES)
    assert drawn.shape == (20, 30)
    person, dog = VOC_CLASSES.index("person"), VOC_CLASSES.index("dog")
    assert (drawn[3:13, 2:8] == person).all()
    assert (drawn[5:15, 12:18] == dog).all()
    assert (drawn[5:13, 8:12] == VOID).all()  # both
    assert set(np.unique(drawn)) == {0, person, dog, VOID}
    assert (drawn[15:] == 0).all()
    for counts in ([0, 20 * 3, 20 * 27], "P1P`05"):
        runs = {"size": [20, 30], "counts": counts}
        assert instance_map([instance(1, DOG, runs)], (20, 30), CLASSES).any()
    first = instance_map([instance(1, DOG, {"size": [20, 30], "counts": [0, 60, 540]})], (20, 30), CLASSES)
    assert (first[:, :3] == dog).all()
    assert not first[:, 3:].any()
    assert not instance_map([instance(1, DOG, [])], (20, 30), CLASSES).any()
    assert not instance_map([instance(1, TRUCK, square(0, 0, 9))], (20, 30), CLASSES).any()


def test_the_folder_as_the_recipes_name_it(coco: Path) -> None:
    pairs = mapped_photos(coco)
    assert [p.name for p, _ in pairs] == ["001.jpg", "005.jpg"]  # more than 1,000 pixels of ours
    assert all(p.is_file() and m.is_file() for p, m in pairs)
    first = load_class_map(pairs[0][1], len(VOC_CLASSES))
    assert first.shape == (48, 64)
    assert set(np.unique(first)) == {0, VOC_CLASSES.index("person"), VOC_CLASSES.index("dog"), VOID}
    with Image.open(coco.parent / "class_maps" / coco.name / "004.png") as image:
        crowded = np.asarray(image)
    assert (crowded[:, 20:50] == VOID).all()
    assert int((crowded == VOC_CLASSES.index("dog")).sum()) == 225 <= LEAST_PIXELS


def test_maps_are_drawn_once_and_again_for_other_instances(coco: Path) -> None:
    calls: list[tuple[int, int]] = []
    coco_maps(coco, lambda *at: calls.append(at))
    assert calls[-1] == (5, 5)
    assert coco_maps(coco, lambda *at: calls.append(at)) == mapped_photos(coco)
    assert len(calls) == 5
    # cut off: what is drawn stays, the rest is added
    maps = coco.parent / "class_maps" / coco.name
    (maps / "index.json").unlink()
    (maps / "001.png").unlink()
    before = (maps / "005.png").stat().st_mtime_ns
    assert len(coco_maps(coco)) == 2
    assert (maps / "005.png").stat().st_mtime_ns == before
    write(coco, document(annotations=[instance(2, DOG, square(0, 0, 40))]))
    assert [p.name for p, _ in coco_maps(coco)] == ["002.jpg"]
    images = coco.parent / "images" / "tiny2017"  # the other usual layout
    images.parent.mkdir()
    assert find_instances(images) is not None


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([1, 2], "not a file of COCO's instances"),
        ({}, "not a file of COCO's instances"),
        (document(categories=[{"id": 1, "name": "person"}]), "no category airplane, bicycle"),
        (document(images=[{"id": 1, "file_name": "../1.jpg", "width": 4, "height": 4}]), "no plain name"),
        (document(images=[{"id": 1, "file_name": "001.jpg", "width": 10**6, "height": 10**6}]), "the limit is"),
        (document(images=[{"id": 1, "file_name": "009.jpg", "width": 64, "height": 48}]), "unpack tiny2017.zip"),
        (document(annotations=[instance(1, PERSON, [[1, 2]])]), "cannot be drawn"),
        (document(annotations=[instance(1, PERSON, "text")]), "cannot be drawn"),
        (document(annotations=[instance(1, PERSON, {"size": [9, 9], "counts": [81]})]), "run lengths for"),
        (document(annotations=[instance(1, PERSON, square(0, 0, 5))]), "no photograph has more than 1000"),
    ],
)
def test_instances_that_are_refused(coco: Path, values: Any, message: str) -> None:
    write(coco, values)
    with pytest.raises(InvalidConfig, match=message):
        mapped_photos(coco)


def test_what_is_missing(coco: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InvalidConfig, match="no annotations/instances_nothing"):
        coco_maps(coco.parent / "nothing")
    (coco.parent / "annotations" / f"instances_{coco.name}.json").write_text("{")
    with pytest.raises(InvalidConfig, match="not a file of COCO's instances"):
        mapped_photos(coco)
    write(coco, document())
    real = builtins.__import__

    def without(name: str, *arguments: Any) -> Any:
        if name.startswith("pycocotools"):
            raise ImportError(name)
        return real(name, *arguments)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(InvalidConfig, match=r"pip install 'bitneck\[models\]'"):
        mapped_photos(coco)
