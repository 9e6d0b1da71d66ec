from pathlib import Path

import pytest

from bitneck.bundle import Bundle
from bitneck_testing.tiny_bundles import make_tiny_bundle


@pytest.fixture(scope="session")
def tiny_bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A small real bundle, shared: do not change its files."""
    return make_tiny_bundle(tmp_path_factory.mktemp("tiny") / "bundle")


@pytest.fixture(scope="session")
def scene_bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A small real bundle for segmentation, shared: do not change its files."""
    return make_tiny_bundle(tmp_path_factory.mktemp("scene") / "bundle", name="scene", task="segmentation")


@pytest.fixture
def own_tiny_bundle(tmp_path: Path) -> Bundle:
    """A small real bundle of the test's own, to break."""
    return make_tiny_bundle(tmp_path / "bundle")
