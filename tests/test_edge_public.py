"""What a Python user imports from the edge's packages, and what importing costs."""

import importlib
import subprocess
import sys

import pytest

import bitneck.wire.messages
import bitneck_edge

PUBLIC = {
    "bitneck_edge": [
        "Answer", "Capture", "ClassShare", "EdgeClient", "EdgeEncoder", "EdgeSettings", "EncodedPhoto", "Failure",
        "Label", "Photo", "Pixels", "Segmentation", "StageTimes", "Switch", "SyncEdgeClient", "Written", "fetch_bundle",
    ],
    "bitneck_edge.answers": ["check_classes", "labels_of", "segmentation_of"],
    "bitneck_edge.link": ["Link", "LinkSettings", "Received", "Sent"],
    "bitneck_edge.sources": ["VIDEO_SUFFIXES", "Source", "in_thread", "parse_sources", "read_sources"],
}  # fmt: skip


@pytest.mark.parametrize("package", PUBLIC)
def test_the_public_names(package: str) -> None:
    module = importlib.import_module(package)
    assert module.__all__ == PUBLIC[package]
    for name in module.__all__:
        thing = getattr(module, name)
        if isinstance(thing, type) or callable(thing):
            assert thing.__doc__, name
    with pytest.raises(AttributeError, match="has no attribute 'Nothing'"):
        module.Nothing  # noqa: B018
    namespace: dict[str, object] = {}
    exec(f"from {package} import *", namespace)
    assert set(PUBLIC[package]) <= set(namespace)


def test_a_listing_has_the_names_before_they_are_used() -> None:
    assert set(PUBLIC["bitneck_edge"]) <= set(dir(bitneck_edge))


def test_a_label_is_one_class_everywhere() -> None:
    assert bitneck_edge.Label is bitneck.wire.messages.Label
    assert bitneck_edge.ClassShare is bitneck.wire.messages.ClassShare


VERSION = "import sys; sys.argv = ['bitneck-edge', '--version']; from bitneck_edge.cli import main; main()"


@pytest.mark.parametrize("code", ["import bitneck_edge", VERSION])
def test_the_command_line_starts_without_the_heavy_modules(code: str) -> None:
    check = f"""
try:
    {code}
except SystemExit:
    pass
import sys
heavy = {{'onnxruntime', 'constriction', 'av'}} & set(sys.modules)
assert not heavy, heavy
"""
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
