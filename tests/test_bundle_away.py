"""The folder of a bundle in use vanishes, or its disk does not answer: devices can fetch the bundle all the same."""

import asyncio
import gc
import os
import shutil
import threading
from pathlib import Path
from typing import Any, cast

import httpx
import pytest

from bitneck import runtime
from bitneck.bundle import Bundle
from bitneck.errors import BundleCorrupt, Unavailable
from bitneck.runtime import ModulePool
from bitneck.v2 import inference_pb2 as pb
from bitneck_cloud import server as server_module
from bitneck_cloud.access.bearers import BearerTokens, Role
from bitneck_cloud.api.grpc_service import InferenceService
from bitneck_cloud.bundles import edge_files, folder
from bitneck_cloud.bundles.edge_files import EdgeFiles
from bitneck_cloud.bundles.watching import FolderMetrics, ServedFolders
from bitneck_cloud.engine.served_model import ServedModel
from bitneck_edge.answers.results import Answer
from bitneck_testing.consumers.canaries import registry_of
from bitneck_testing.consumers.operator import CANARY, begin, call, serving
from bitneck_testing.devices.hanging import HANG_S, Disk
from bitneck_testing.devices.streaming import until
from bitneck_testing.photographs import photo
from bitneck_testing.processes import Server, running_server
from bitneck_testing.streams import edge_client, stub
from bitneck_testing.tiny_bundles import make_tiny_bundle

FILE = "units/s1-r2/encoder.onnx"
MODEL = "/v1/models/tiny"


async def fetched_by_a_new_device(server: Server, cache: Path) -> str:
    """Id of the bundle with which a device without any file has had an answer."""
    async with asyncio.timeout(HANG_S), edge_client(server.grpc, cache, retries=1, point="s2-r1") as client:
        assert isinstance(await client.infer(photo(1)), Answer)
        return client.bundle.bundle_id


async def metric(server: Server, name: str) -> float:
    async with httpx.AsyncClient(base_url=server.http) as http:
        lines = (await http.get("/metrics")).text.splitlines()
    return float(next(line for line in lines if line.startswith(name)).split()[-1])


async def problem(server: Server) -> str:
    return str((await call(server, "GET", MODEL))["problem"])


async def changed(server: Server, before: str) -> str:
    """The problem, once it is another one."""
    async with asyncio.timeout(HANG_S):
        while (now := await problem(server)) == before:  # noqa: ASYNC110
            await asyncio.sleep(0.1)
        return now


async def test_a_new_device_starts_though_the_folder_of_the_bundle_is_gone(
    own_tiny_bundle: Bundle, tmp_path: Path
) -> None:
    """The server says what is the matter, and goes on: it is ready. When the folder is back, that is seen too."""
    with running_server(own_tiny_bundle.root) as server:
        assert await problem(server) == ""
        own_tiny_bundle.root.rename(tmp_path / "away")
        assert await fetched_by_a_new_device(server, tmp_path / "first") == own_tiny_bundle.bundle_id
        assert "cannot be read (No such file or directory)" in await changed(server, "")
        assert await metric(server, 'bitneck_bundle_away{model="tiny"}') == 1
        assert (await call(server, "GET", "/readyz"))["status"] == "ready"
        assert "the bundle of tiny is not in its folder" in server.read_log()
        (tmp_path / "away").rename(own_tiny_bundle.root)
        assert await changed(server, await problem(server)) == ""
        assert await metric(server, 'bitneck_bundle_away{model="tiny"}') == 0
        assert "the bundle of tiny is in its folder again" in server.read_log()
        shutil.rmtree(own_tiny_bundle.root)
        assert await fetched_by_a_new_device(server, tmp_path / "second") == own_tiny_bundle.bundle_id


async def test_until_a_reload_devices_fetch_the_bundle_that_is_served(own_tiny_bundle: Bundle, tmp_path: Path) -> None:
    """Its folder holds another one already."""
    data = (own_tiny_bundle.root / FILE).read_bytes()
    with running_server(own_tiny_bundle.root) as server:
        new = make_tiny_bundle(own_tiny_bundle.root, seed=1)
        assert await fetched_by_a_new_device(server, tmp_path / "first") == own_tiny_bundle.bundle_id
        async with stub(server.grpc) as cloud:
            request = pb.FetchFileRequest(bundle_id=own_tiny_bundle.bundle_id, path=FILE)
            assert b"".join([chunk.data async for chunk in cloud.FetchFile(request)]) == data
        assert "holds another bundle now" in await changed(server, "")
        await call(server, "POST", f"{MODEL}/reload")
        assert await fetched_by_a_new_device(server, tmp_path / "second") == new.bundle_id
        assert await changed(server, await problem(server)) == ""


async def test_a_bundle_that_was_promoted_can_be_fetched_though_its_folder_is_gone(
    tiny_bundle: Bundle, tmp_path: Path
) -> None:
    """Also after a restart of the server, and a disk that is gone later."""
    new, state = make_tiny_bundle(tmp_path / "candidates" / "new", seed=1), ("--state-db", tmp_path / "state.db")
    with serving(tiny_bundle.root, tmp_path / "candidates", *state) as server:
        await begin(server)
        await call(server, "POST", f"{CANARY}/promote")
        new.root.rename(tmp_path / "away")
        assert await fetched_by_a_new_device(server, tmp_path / "first") == new.bundle_id
        (tmp_path / "away").rename(new.root)
    with serving(tiny_bundle.root, tmp_path / "candidates", *state) as server:
        shutil.rmtree(new.root)
        assert await fetched_by_a_new_device(server, tmp_path / "second") == new.bundle_id


@pytest.fixture(params=["small", "large", "both"])
def memory(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Whether the files of the tests' bundle are in memory, open, or some of each."""
    monkeypatch.setattr(edge_files, "_MOST_MEMORY", {"small": 1 << 20, "large": 0, "both": 5000}[request.param])
    return str(request.param)


def open_files(folder: Path) -> int:
    gc.collect()
    found = 0
    for descriptor in Path("/proc/self/fd").iterdir():
        try:
            found += str(descriptor.readlink()).startswith(str(folder))
        except OSError:
            continue
    return found


async def all_of(files: EdgeFiles, bundle: Bundle) -> dict[str, bytes]:
    """Every file, as a device gets it, in two parts."""
    found = {}
    for name, entry in bundle.manifest.files_for("edge").items():
        first = await files.read(name, 0, (entry.size + 1) // 2)
        found[name] = first + await files.read(name, len(first), entry.size)
    return found


async def test_files_that_are_held(memory: str, own_tiny_bundle: Bundle, tmp_path: Path) -> None:
    """They are what they were, whatever is done to the folder; and nothing stays open that nobody uses."""
    root, names = own_tiny_bundle.root, own_tiny_bundle.manifest.files_for("edge")
    data = {name: (root / name).read_bytes() for name in names}
    files = EdgeFiles(own_tiny_bundle)
    assert await all_of(files, own_tiny_bundle) == data
    files.hold()
    few = open_files(root)
    assert {"small": few == 0, "large": few == len(names), "both": 0 < few < len(names)}[memory]
    shutil.copytree(root, tmp_path / "copy")
    make_tiny_bundle(root, seed=1)
    assert await all_of(files, own_tiny_bundle) == data
    with pytest.raises(BundleCorrupt, match="export it again"):  # whoever holds it anew has verified it before
        (root / FILE).unlink()
        files.hold()
    shutil.rmtree(root)
    assert await all_of(files, own_tiny_bundle) == data
    with pytest.raises(BundleCorrupt, match=r"cannot be read \(No such file"):
        files.hold()
    assert await all_of(files, own_tiny_bundle) == data
    (tmp_path / "copy").rename(root)
    files.hold()
    assert open_files(root) == few
    assert await all_of(files, own_tiny_bundle) == data
    del files
    assert open_files(root) == 0
    await until(lambda: not [each for each in threading.enumerate() if each.name == "bitneck-files"])


async def test_a_disk_that_is_gone_and_comes_back(
    own_tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch, disk: Disk
) -> None:
    """Open files on it are of no use any more; the same files are there under their names."""
    monkeypatch.setattr(edge_files, "_MOST_MEMORY", 0)
    files = EdgeFiles(own_tiny_bundle)
    files.hold()
    disk.slows(os, "pread")
    disk.error = OSError(116, "Stale file handle")
    assert await files.read(FILE, 0, 9) == (own_tiny_bundle.root / FILE).read_bytes()[:9]
    (own_tiny_bundle.root / FILE).write_bytes(b"another file")
    with pytest.raises(Unavailable, match="it has 12 bytes, the manifest says"):
        await files.read(FILE, 0, 9)
    (own_tiny_bundle.root / FILE).unlink()
    with pytest.raises(Unavailable, match="No such file"):
        await files.read(FILE, 0, 9)
    disk.error = None


async def test_a_disk_that_does_not_answer_is_waited_for_by_one_thread(
    own_tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch, disk: Disk
) -> None:
    """Whoever asks is told so after a moment, and later at once. What is in memory can be had all the time."""
    monkeypatch.setattr(edge_files, "_MOST_S", 0.3)
    monkeypatch.setattr(edge_files, "_MOST_MEMORY", 5000)
    files = EdgeFiles(own_tiny_bundle)
    files.hold()
    assert files._held is not None
    small, large = next(iter(files._held.small)), next(iter(files._held.large))
    disk.slows(os, "pread")
    disk.hang()
    for _ in range(2):
        asked = await asyncio.gather(*[files.read(large, 0, 9) for _ in range(20)], return_exceptions=True)
        assert {type(each) for each in asked} == {Unavailable}
        assert await files.read(small, 0, 9)
        assert disk.waiting == 1
    disk.go_on()
    await until(lambda: not disk.waiting)
    await until(lambda: not files._disk.stuck_s)
    assert await files.read(large, 0, 9)


async def test_what_a_device_is_told(
    own_tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """To try again: nothing of the server's disks is in the sentence, but in the log."""
    monkeypatch.setattr(edge_files, "_MOST_MEMORY", 0)
    served, nothing = ServedModel(own_tiny_bundle, threads=1), cast("Any", None)
    service = InferenceService(
        registry_of([served]), nothing, nothing, nothing, nothing, nothing, nothing,
        idle_s=1.0, stall_s=1.0, similar_bytes=0,
    )  # fmt: skip
    assert await service._part(served, FILE, 0, 9)
    (own_tiny_bundle.root / FILE).unlink()
    with pytest.raises(Unavailable) as caught:
        await service._part(served, FILE, 0, 9)
    assert str(caught.value) == (
        f"this server cannot read {FILE} of its bundle now, and its log says why; try again later"
    )
    assert f"a device cannot fetch a file of tiny, {own_tiny_bundle.bundle_id}: {FILE} cannot be read" in caplog.text


async def test_folders_that_do_not_answer_are_a_problem(
    own_tiny_bundle: Bundle, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a model whose bundle was replaced meanwhile, nothing is said any more."""
    monkeypatch.setattr(folder, "_problem_of", folder._problem_of)
    disk.slows(folder, "_problem_of")
    registry = registry_of([ServedModel(own_tiny_bundle, threads=1)])
    folders = ServedFolders(registry)
    disk.hang()
    await folders.look()
    assert folders.problem("tiny") == f"its folder {own_tiny_bundle.root} does not answer"
    (away,) = FolderMetrics(folders, registry).collect()
    assert [sample.value for sample in away.samples] == [1.0]
    looking = asyncio.create_task(folders.look())
    await asyncio.sleep(0)
    registry.swap(ServedModel(make_tiny_bundle(own_tiny_bundle.root.parent / "new", seed=1), threads=1))
    await looking
    disk.go_on()
    await folders.look()
    assert folders.problem("tiny") == ""


async def test_a_file_that_does_not_come_holds_up_no_other_one(own_tiny_bundle: Bundle, disk: Disk) -> None:
    """Bundles of all models are loaded from one pool."""
    right, pool = runtime.OnnxModule, ModulePool()
    names = [name for name in own_tiny_bundle.manifest.files if name.endswith(".onnx")][:2]

    def load(name: str) -> runtime.OnnxModule:
        return pool.load(own_tiny_bundle.path(name), own_tiny_bundle.manifest.files[name].sha256, threads=1)

    disk.slows(runtime, "OnnxModule")
    disk.hang()
    found: list[runtime.OnnxModule] = []
    both = [threading.Thread(target=lambda: found.append(load(names[0]))) for _ in range(2)]
    for each in both:
        each.start()
    await until(lambda: disk.waiting)
    runtime.OnnxModule = right  # type: ignore[misc]  the other file is on a disk that answers
    other = await asyncio.wait_for(asyncio.to_thread(load, names[1]), HANG_S / 2)
    disk.go_on()
    for each in both:
        each.join()
    assert found[0] is found[1] is not other
    assert load(names[1]) is other
    assert pool.loads == 0, "they are those of a thread"


async def test_a_token_file_that_does_not_answer_is_read_at_last(
    tmp_path: Path, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What has changed in it counts then, and the server's other housework goes on without it."""
    monkeypatch.setattr(server_module, "_HOUSEKEEPING_S", 0.01)
    disk.slows(BearerTokens, "refresh")
    disk.hang()
    (tmp_path / "tokens").write_text("cam-1 a-token-of-sixteen-characters\n")
    tokens, revoked = BearerTokens(Role.DEVICE, None, tmp_path / "tokens"), asyncio.Event()
    task = asyncio.create_task(server_module._keep_tokens(tokens, revoked.set))
    await until(lambda: disk.waiting)
    await asyncio.sleep(0.1)
    assert disk.waiting == 1
    (tmp_path / "tokens").write_text("cam-2 another-token-of-sixteen-characters\n")
    disk.go_on()
    await asyncio.wait_for(revoked.wait(), HANG_S)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
