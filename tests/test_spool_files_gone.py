"""A spool whose files go away, or cannot be written, while a device uses it."""

import errno
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest

from bitneck.bundle import Bundle
from bitneck_edge.spool import segment as segments
from bitneck_edge.spool.known import KnownBundles
from bitneck_edge.spool.segment import Kept, Segment


def test_answers_are_understood_though_the_manifests_are_gone(tiny_bundle: Bundle, tmp_path: Path) -> None:
    known = KnownBundles(tmp_path / "bundles")
    assert known.get(tiny_bundle.bundle_id) is None
    known.keep(tiny_bundle)
    shutil.rmtree(tmp_path / "bundles")
    found = known.get(tiny_bundle.bundle_id)
    assert found is not None
    assert (found.manifest, found.labels) == (tiny_bundle.manifest, tiny_bundle.labels())
    known.keep(tiny_bundle)  # the next frame's
    again = KnownBundles(tmp_path / "bundles").get(tiny_bundle.bundle_id)
    assert again == found


def test_a_full_disk_is_told_once_a_minute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    it = Segment.create(tmp_path, 1, "spool-1", 1)
    for seq in range(1, 41):
        kept = Kept(seq=seq, bundle_id="sha256:" + "ab" * 32, point="s1", payload=b"x", captured_unix_us=1, name="a")
        it.append(it.record_of(seq, kept), held=False)

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(segments, "write", full)
    with caplog.at_level(logging.WARNING):
        for seq in range(1, 41):
            it.done([seq])
    assert len(caplog.records) == 1
    assert "answers may come twice" in caplog.text
    it.close()
