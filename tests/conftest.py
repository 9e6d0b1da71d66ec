import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from bitneck.bundle import Bundle
from bitneck_testing.coco_folders import make_coco_folder
from bitneck_testing.tiny_bundles import make_tiny_bundle

if TYPE_CHECKING:
    from bitneck_testing.devices.hanging import Disk
    from bitneck_testing.processes import Server
    from bitneck_testing.streams import Frames

os.environ.pop("PYTHONUNBUFFERED", None)  # programs buffer what they print, as they do for their users


@pytest.fixture(scope="session")
def tiny_bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A small real bundle for classification. All tests share it: do not change its files."""
    return make_tiny_bundle(tmp_path_factory.mktemp("tiny") / "bundle")


@pytest.fixture(scope="session")
def scene_bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A small real bundle for segmentation. All tests share it: do not change its files."""
    return make_tiny_bundle(tmp_path_factory.mktemp("scene") / "bundle", name="scene", task="segmentation")


@pytest.fixture(scope="module")
def frames(tiny_bundle: Bundle) -> "Frames":
    """Right frames of the small bundle for classification, and the right answers to them."""
    from bitneck_testing.streams import Frames

    return Frames(tiny_bundle)


@pytest.fixture(scope="module")
def server(tiny_bundle: Bundle, scene_bundle: Bundle) -> Iterator["Server"]:
    """A server of both small bundles. Modules that need another one have their own."""
    from bitneck_testing.processes import running_server

    with running_server(tiny_bundle.root, scene_bundle.root) as running:
        yield running


@pytest.fixture
def own_tiny_bundle(tmp_path: Path) -> Bundle:
    """A small real bundle that the test may break."""
    return make_tiny_bundle(tmp_path / "bundle")


@pytest.fixture
def coco(tmp_path: Path) -> Path:
    """A folder of five photographs with annotations as COCO has them, which the test may change."""
    return make_coco_folder(tmp_path)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """One thread for torch: the networks are tiny, so more threads would only wait for one another."""
    from bitneck_testing.networks import torch_threads

    with torch_threads(1):
        yield


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder for `bitneck-models`, made the current one: see `bitneck_testing.networks.run`."""
    from bitneck_models.networks import registry
    from bitneck_testing.networks import SMALL, make_home, torch_threads

    monkeypatch.setitem(registry.BACKBONES, "small", SMALL)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    with torch_threads(1):
        yield make_home(tmp_path)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Iterator["Disk"]:
    """A disk that answers until a test says otherwise, and again behind it."""
    from bitneck_testing.devices.hanging import Disk

    one = Disk(monkeypatch)
    yield one
    one.go_on()
