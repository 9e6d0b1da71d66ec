"""Bundles that a server had: how long they are kept, also where other processes remove or copy them meanwhile."""

import os
import shutil
import time
from pathlib import Path

import pytest

from bitneck.bundle import MANIFEST_NAME, Bundle
from bitneck.errors import BundleMismatch
from bitneck_cloud.access.tokens import TokenSigner
from bitneck_cloud.earlier import EarlierBundles
from bitneck_cloud.engine.served_model import ServedModel
from bitneck_cloud.sessions.registry import Registry
from bitneck_testing.tiny_bundles import make_tiny_bundle

DAY_S = 86_400.0


def place_of(folder: Path, bundle: Bundle) -> Path:
    return folder / bundle.manifest.name / bundle.bundle_id.removeprefix("sha256:")


def age(path: Path, days: float) -> None:
    os.utime(path, (time.time() - days * DAY_S,) * 2)


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> list[Bundle]:
    folder = tmp_path_factory.mktemp("bundles")
    return [make_tiny_bundle(folder / str(seed), seed=seed) for seed in range(3)]


def test_what_was_served_a_moment_ago_is_not_too_old(bundles: list[Bundle], tmp_path: Path) -> None:
    earlier = EarlierBundles(tmp_path, most=3, most_age_s=30 * DAY_S)
    places = [place_of(tmp_path, bundle) for bundle in bundles]
    earlier.keep(bundles[0])
    age(places[0], 50)  # the server began so long ago
    earlier.keep(bundles[1], bundles[0])
    assert [place.is_dir() for place in places[:2]] == [True, True]
    age(places[0], 31)  # since it was replaced
    age(places[1], 31)
    EarlierBundles(tmp_path, most=3, most_age_s=30 * DAY_S).keep(bundles[2])  # a restart with a new bundle
    assert [place.is_dir() for place in places] == [False, True, True]
    age(places[1], 31)
    EarlierBundles(tmp_path, most=3, most_age_s=30 * DAY_S).keep(bundles[2])  # a restart with the same
    assert [place.is_dir() for place in places] == [False, False, True]
    assert sorted(path.name for path in places[2].parent.iterdir()) == [places[2].name]


def test_what_killed_processes_left_is_removed(bundles: list[Bundle], tmp_path: Path) -> None:
    place = place_of(tmp_path, bundles[0])
    place.mkdir(parents=True)
    (place / "half.npz").write_bytes(b"a removal was cut off here")
    for name, days in ((".part-a", 1), (".gone-b", 1), (".part-c", 0)):
        (place.parent / name / "bundle").mkdir(parents=True)
        age(place.parent / name, days)
    EarlierBundles(tmp_path, most=1, most_age_s=DAY_S).keep(bundles[0])
    assert sorted(path.name for path in place.parent.iterdir()) == sorted([".part-c", place.name])
    assert Bundle.open(place, side="cloud").bundle_id == bundles[0].bundle_id
    assert not (place / "half.npz").exists()


def test_two_servers_copy_the_same_bundle(
    bundles: list[Bundle], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, replace = place_of(tmp_path, bundles[0]), Path.replace

    def slower(path: Path, target: Path) -> Path:
        shutil.copytree(path, target)  # the other server was faster
        (target / "first").touch()
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", slower)
    EarlierBundles(tmp_path, most=1, most_age_s=DAY_S).keep(bundles[0])
    assert (place / MANIFEST_NAME).is_file()
    assert (place / "first").exists()


def test_only_spools_find_what_was_loaded_for_a_spool(bundles: list[Bundle]) -> None:
    newest, old = (ServedModel(bundle, threads=1) for bundle in bundles[:2])
    registry = Registry(
        [newest], window=4, max_sessions=10, resume_s=10.0, assumed_fps=10.0, max_bytes_per_s=1e6,
        signer=TokenSigner(b"k" * 32, max_age_s=100), adopt=False,
    )  # fmt: skip
    registry.add_earlier(old)
    assert registry.generation("tiny", old.bundle.bundle_id, earlier=True) is old
    with pytest.raises(BundleMismatch):
        registry.generation("tiny", old.bundle.bundle_id)
