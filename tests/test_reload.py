"""A reload that the server's own disk refuses: it is an error of the server, it is counted and logged."""

import shutil
from pathlib import Path

import httpx
import pytest

from bitneck.bundle import Bundle
from bitneck.errors import StateUnusable
from bitneck.runtime import ModulePool
from bitneck_cloud.access.tokens import TokenSigner
from bitneck_cloud.bundles.changes import Changes
from bitneck_cloud.canary.candidates import Candidates
from bitneck_cloud.canary.control import Canaries
from bitneck_cloud.earlier import EarlierBundles
from bitneck_cloud.engine.served_model import ServedModel
from bitneck_cloud.fleet.control import Fleet
from bitneck_cloud.fleet.patterns import Groups
from bitneck_cloud.fleet.records import BundleChoice
from bitneck_cloud.observe.metrics import Metrics
from bitneck_cloud.reload import Reloader
from bitneck_cloud.sessions.registry import Registry
from bitneck_testing.consumers.canaries import Nobody
from bitneck_testing.processes import running_server
from bitneck_testing.tiny_bundles import make_tiny_bundle


async def test_a_promotion_that_cannot_be_forgotten_is_a_failed_reload(
    own_tiny_bundle: Bundle, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    served = ServedModel(own_tiny_bundle, threads=1)
    registry = Registry(
        [served], window=1, max_sessions=1, resume_s=1, assumed_fps=1, max_bytes_per_s=0, adopt=False,
        signer=TokenSigner(b"a key of the test", max_age_s=1),
    )  # fmt: skip
    fleet, metrics, changes = Fleet(Groups(), None, tmp_path / "state.db", 10), Metrics(), Changes()
    await fleet.open()
    assert fleet._state is not None
    earlier = EarlierBundles(None, most=1, most_age_s=1)
    canaries = Canaries(registry, Candidates(tmp_path), fleet, Nobody(), ModulePool(), 1, earlier, None, changes)
    reloader = Reloader(
        registry, {"tiny": own_tiny_bundle.root}, ModulePool(), 1, metrics, earlier, canaries, changes
    )  # fmt: skip
    choice = BundleChoice(
        model="tiny", kind="promoted", base=own_tiny_bundle.bundle_id, bundle="new", bundle_id="sha256:" + "0" * 64,
        clients="", since="", by="",
    )  # fmt: skip
    await fleet.choose("tiny", [choice])
    await fleet._on_disk(fleet._state._connection.execute, "PRAGMA query_only = ON")
    new = make_tiny_bundle(own_tiny_bundle.root, seed=1)
    with pytest.raises(StateUnusable, match="readonly"):
        await reloader.reload("tiny")
    assert registry.model("tiny") is served
    assert metrics.registry.get_sample_value("bitneck_reloads_total", {"model": "tiny", "outcome": "failed"}) == 1
    assert "reload of tiny failed" in caplog.text
    await fleet._on_disk(fleet._state._connection.execute, "PRAGMA query_only = OFF")
    assert (await reloader.reload("tiny")).bundle_id == new.bundle_id
    await fleet.close()


def test_a_folder_of_earlier_bundles_that_cannot_be_written_is_an_error_of_the_server(
    own_tiny_bundle: Bundle, tmp_path: Path
) -> None:
    folder = tmp_path / "earlier"
    with running_server(own_tiny_bundle.root, options=["--earlier", str(folder)]) as server:
        make_tiny_bundle(own_tiny_bundle.root, seed=1)
        shutil.rmtree(folder / "tiny")
        (folder / "tiny").write_text("in the way")
        refused = httpx.post(f"{server.http}/v1/models/tiny/reload", headers={"X-Bitneck-Request": "1"}, timeout=60)
        assert (refused.status_code, refused.json()["title"]) == (500, "StateUnusable")
        assert "make room, or choose another one (--earlier)" in server.read_log()
        models = httpx.get(f"{server.http}/v1/models").json()
        assert models[0]["bundle_id"] == own_tiny_bundle.bundle_id
