"""The blocks of README and docs/edge.md run: shell in order, Python, against a real server with the real bundle.

The flags that any page shows exist.
"""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from bitneck_testing.photographs import sample_photo
from bitneck_testing.processes import BIN, Server, running_server

ROOT = Path(__file__).resolve().parent.parent
BUNDLE = ROOT / "build" / "efficientnet_lite0"
README = (ROOT / "README.md").read_text()
EDGE = (ROOT / "docs" / "edge.md").read_text()
PAGES = [README, *(path.read_text() for path in sorted((ROOT / "docs").glob("*.md")))]
PHOTO = sample_photo()

needs_bundle = pytest.mark.skipif(not BUNDLE.is_dir(), reason="make bundle has not run")


def blocks(language: str, text: str = README) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with running_server(BUNDLE) as running:
        yield running


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "photo.jpg").write_bytes(PHOTO.read_bytes())
    (tmp_path / "build").symlink_to(ROOT / "build")
    return tmp_path


def adapted(block: str, server: Server) -> str:
    return block.replace("127.0.0.1:50051", server.grpc).replace("http://127.0.0.1:8080", server.http)


def environment(folder: Path) -> dict[str, str]:
    return os.environ | {"PATH": f"{BIN}:{os.environ['PATH']}", "XDG_CACHE_HOME": str(folder / "cache")}


@needs_bundle
def test_shell_blocks(server: Server, folder: Path) -> None:
    shell = [block for block in blocks("bash") + blocks("bash", EDGE) if not block.startswith("make")]
    assert len(shell) >= 3
    for block in shell:
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", adapted(block, server)],
            cwd=folder, env=environment(folder), capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        assert done.returncode == 0, (block, done.stderr)


@needs_bundle
def test_python_blocks(server: Server, folder: Path) -> None:
    assert blocks("python")
    assert len(blocks("python", EDGE)) == 2
    for block in blocks("python") + blocks("python", EDGE):
        done = subprocess.run(
            [sys.executable, "-c", adapted(block, server)],
            cwd=folder, env=environment(folder), capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert "espresso" in done.stdout
        assert " s1-r3 " in done.stdout


def test_make_targets_exist() -> None:
    targets = re.findall(r"\bmake (\w+)", README + (ROOT / "CONTRIBUTING.md").read_text())
    assert {"demo", "test", "check", "bundle"} <= set(targets)
    for target in set(targets):
        subprocess.run(["make", "-n", target], cwd=ROOT, check=True, capture_output=True)


def test_options_in_the_readme_exist() -> None:
    shown_blocks = [block for page in PAGES for kind in ("console", "bash") for block in blocks(kind, page)]
    text = re.sub(r"\\\n\s*", "", "\n".join(shown_blocks))
    commands = re.findall(r"^\s*(bitneck-\w+) ([a-z][\w-]*)(.*)$", text, re.MULTILINE)
    assert len(commands) > 30
    assert {name for name, _, _ in commands} == {"bitneck-edge", "bitneck-cloud", "bitneck-models"}
    for name, command, rest in commands:
        shown = subprocess.run(
            [str(BIN / name), command, "--help"],
            capture_output=True, text=True, check=True, env=os.environ | {"COLUMNS": "200", "NO_COLOR": "1"},
        ).stdout  # fmt: skip
        for option in re.findall(r"--[a-z-]+", rest):
            assert option in shown, (name, command, option)
