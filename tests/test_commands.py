"""The three commands where an extra is missing: one line that says what to install."""

import importlib.metadata
import subprocess
import sys

import pytest

LACKING = """
import sys
sys.modules[{module!r}] = None
sys.argv[1:] = {arguments!r}
from bitneck.commands import {part}
{part}()
"""


@pytest.mark.parametrize(
    ("part", "module", "arguments"),
    [
        ("edge", "platformdirs", ["points"]),
        ("cloud", "pythonjsonlogger", ["--help"]),
        ("cloud", "uvicorn", ["serve", "--bundle", "nowhere"]),
        ("models", "torch", ["export", "models/zoo/efficientnet_lite0", "--out", "nowhere"]),
    ],
)
def test_a_missing_extra_is_named(part: str, module: str, arguments: list[str]) -> None:
    code = LACKING.format(part=part, module=module, arguments=arguments)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: bitneck-{part} needs the Python module {module!r}")
    assert f"pip install 'bitneck[{part}]'" in done.stderr


def test_a_missing_module_of_our_own_is_no_missing_extra() -> None:
    code = LACKING.format(part="edge", module="bitneck_edge.settings", arguments=["points"])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "Traceback" in done.stderr
    assert "bitneck_edge.settings" in done.stderr


def test_the_commands_are_these() -> None:
    scripts = {each.name: each.value for each in importlib.metadata.entry_points(group="console_scripts")}
    for part in ("edge", "cloud", "models"):
        assert scripts[f"bitneck-{part}"] == f"bitneck.commands:{part}"
