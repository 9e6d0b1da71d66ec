"""Every public name of version 0.1 can still be imported from where it was, with a warning if it has moved."""

import importlib
import json
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from bitneck.moved import MOVED

GOLDEN = Path(__file__).parent / "golden" / "public_names.json"
NAMES: dict[str, list[str]] = json.loads(GOLDEN.read_text())
GONE = {
    "bitneck_cloud.security": {"same_secret"},  # tokens are found by their digest
    "bitneck_edge.cache": {"cached_bundle", "forget_old", "recall"},  # `FileStore` and `open_supply`
    "bitneck_edge.flow": {"Flow"},
    "bitneck_edge.references": {"References"},
    "bitneck_cloud.conversation": {"computed_of"},
    "bitneck_cloud.messages": {"fault", "go_away", "set_point"},
    "bitneck_models.baselines": {"ACCURACY"},
}
"""Names that exist no more. CHANGELOG.md says what to use instead."""


@pytest.mark.parametrize("module", [module for module in NAMES if set(NAMES[module]) - GONE.get(module, set())])
def test_an_old_path_gives_every_public_name(module: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        old = importlib.import_module(module)
        for name in set(NAMES[module]) - GONE.get(module, set()):
            assert getattr(old, name) is not None, f"{module}.{name}"


def test_an_old_path_warns_and_names_the_new_one() -> None:
    with pytest.warns(DeprecationWarning, match=r"bitneck\.codec\.FactorizedCodec has moved to bitneck\.coding\."):
        from bitneck.codec import FactorizedCodec
    from bitneck.coding.factorized_codec import FactorizedCodec as New

    assert FactorizedCodec is New


def test_a_name_that_never_was_is_no_attribute() -> None:
    with pytest.raises(ImportError, match="no_such_name"):
        from bitneck.codec import no_such_name  # noqa: F401
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("bitneck.no_such_module")


def test_the_table_has_old_modules_only() -> None:
    assert set(MOVED) <= set(NAMES)


@pytest.mark.parametrize("package", ["bitneck", "bitneck_edge", "bitneck_cloud", "bitneck_models"])
def test_old_paths_cost_nothing_until_they_are_used(package: str) -> None:
    code = f"import sys, {package}; assert not set(sys.modules) & {{'numpy', 'onnxruntime', 'torch', 'grpc'}}"
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)
