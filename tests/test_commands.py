"""The three commands: where an extra is missing, one line says what to install; shells complete them."""

import importlib.metadata
import os
import shutil
import subprocess
import sys
from pathlib import Path

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


def in_shell(command: list[str]) -> list[str]:
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=90, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.skipif(shutil.which("fish") is None, reason="fish is not installed")
def test_completion_in_fish() -> None:
    script = "_BITNECK_EDGE_COMPLETE=source_fish bitneck-edge | source; complete -C 'bitneck-edge run --precision '"
    assert in_shell(["fish", "--no-config", "-c", script]) == ["auto", "float32", "int8"]


@pytest.mark.skipif(shutil.which("zsh") is None, reason="zsh is not installed")
def test_completion_in_zsh() -> None:
    """What the shell is told to offer, without a terminal to offer it on."""
    script = """
        compdef() { }
        _arguments() { print -r -- "$1" }
        eval "$(_BITNECK_EDGE_COMPLETE=source_zsh bitneck-edge)"
        words=(bitneck-edge run --precision '') CURRENT=4
        _bitneck_edge_completion
    """
    assert in_shell(["zsh", "-f", "-c", script]) == ['*: :(("auto" "int8" "float32"))']


def test_the_commands_are_these() -> None:
    scripts = {each.name: each.value for each in importlib.metadata.entry_points(group="console_scripts")}
    for part in ("edge", "cloud", "models"):
        assert scripts[f"bitneck-{part}"] == f"bitneck.commands:{part}"
