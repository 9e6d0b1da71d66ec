"""The disk of a device's cache does not answer: live frames go on, and a client can be closed."""

import asyncio
from collections.abc import AsyncGenerator
from pathlib import Path

import pytest

from bitneck.bundle import Bundle
from bitneck.errors import Unavailable
from bitneck_edge.answers.results import Answer
from bitneck_edge.bundles import part
from bitneck_edge.bundles.store import FileStore
from bitneck_edge.client import EdgeClient
from bitneck_testing.consumers.operator import CANARY, begin, call, serving
from bitneck_testing.devices.hanging import HANG_S, Disk
from bitneck_testing.devices.streaming import Device, until
from bitneck_testing.photographs import photo
from bitneck_testing.processes import Server
from bitneck_testing.tiny_bundles import make_tiny_bundle


async def test_live_frames_go_on_while_the_rest_of_the_bundle_cannot_be_written(
    server: Server, tmp_path: Path, disk: Disk
) -> None:
    """When the disk answers, the rest comes. A client that is closed before that does not wait for it."""
    disk.slows(part, "write_all")

    def files() -> int:
        return len(list((tmp_path / "files").iterdir()))

    async with asyncio.timeout(HANG_S / 2):
        async with EdgeClient(server.grpc, model="tiny", threads=1, cache_dir=tmp_path, fetch_kbps=100.0) as one:
            disk.hang()
            await until(lambda: disk.waiting)
            before = files()
            for k in range(5):
                assert isinstance(await one.infer(photo(k)), Answer)
            disk.go_on()
            await until(lambda: files() > before)
            disk.hang()
            await until(lambda: disk.waiting)
        assert disk.waiting


async def test_a_device_goes_over_to_another_bundle_when_its_cache_answers(
    tiny_bundle: Bundle, tmp_path: Path, disk: Disk
) -> None:
    """It goes on with the one that it has until then."""
    new = make_tiny_bundle(tmp_path / "candidates" / "new", seed=1)
    disk.slows(FileStore, "bundle")
    with serving(tiny_bundle.root, tmp_path / "candidates") as server:
        async with asyncio.timeout(HANG_S), Device.sending(server.grpc, tmp_path, "cam-1") as device:
            await device.has(tiny_bundle.bundle_id)
            disk.hang()
            await begin(server)
            await until(lambda: disk.waiting)
            count = len(device.results)
            await until(lambda: len(device.results) > count + 20)
            assert device.bundle_id == tiny_bundle.bundle_id
            disk.go_on()
            await device.has(new.bundle_id)
            await call(server, "DELETE", CANARY)
        assert all(isinstance(each, Answer) for each in device.results)


async def test_a_download_that_is_ended_while_its_disk_does_not_answer(
    tiny_bundle: Bundle, tmp_path: Path, disk: Disk
) -> None:
    """It is ended soon, and the next one goes on where it stopped, or begins anew; nothing stays locked."""
    name = "segments/01-seg1.onnx"
    entry, data = tiny_bundle.manifest.files[name], (tiny_bundle.root / name).read_bytes()
    store = FileStore(tmp_path)

    async def slowly(_path: str, offset: int) -> AsyncGenerator[bytes]:
        yield data[offset : offset + 100]
        yield data[offset + 100 : offset + 200]
        raise Unavailable("the link is gone")

    async def whole(_path: str, offset: int) -> AsyncGenerator[bytes]:
        yield data[offset:]

    disk.slows(part, "write_all")
    disk.hang()
    async with asyncio.timeout(HANG_S / 2):
        receiving = asyncio.create_task(store.receive(name, entry, slowly, lambda _size: None))
        await until(lambda: disk.waiting)
        receiving.cancel()
        with pytest.raises(asyncio.CancelledError):
            await receiving
        disk.go_on()
        await store.run(lambda: None)
        assert store.received(entry) == 100
        with pytest.raises(Unavailable):
            await FileStore(tmp_path).receive(name, entry, slowly, lambda _size: None)
        assert store.received(entry) == 300
        await FileStore(tmp_path).receive(name, entry, whole, lambda _size: None)
    assert store.path(entry).read_bytes() == data
    assert list((tmp_path / "parts").iterdir()) == []
