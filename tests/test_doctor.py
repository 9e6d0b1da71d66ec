"""`bitneck-edge doctor` against real servers: what works, and each thing that does not."""

import asyncio
import json
import socket
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from typer.core import TyperGroup
from typer.main import get_command

from bitneck.bundle import Bundle
from bitneck_edge.bundles.fetch import fetch_bundle
from bitneck_edge.cli.doctor import examine, report_lines
from bitneck_edge.cli.main import app
from bitneck_edge.doctor.finding import Finding
from bitneck_edge.doctor.network import check_clock
from bitneck_edge.doctor.sources import check_out, check_watches
from bitneck_edge.doctor.spool import check_spool
from bitneck_edge.settings import EdgeSettings
from bitneck_edge.spool.bounds import Limits
from bitneck_edge.spool.files import Spool
from bitneck_edge.spool.segment import Kept
from bitneck_testing.authority import Authority
from bitneck_testing.devices.hanging import Disk
from bitneck_testing.photographs import photo_bytes
from bitneck_testing.processes import Server, edge, free_port, running_server

TOKEN = "a-token-of-the-device"


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture(scope="module")
def secured(tiny_bundle: Bundle, authority: Authority) -> Iterator[Server]:
    cert, key = authority.issue("server", days=3)
    options = ("--tls-cert", str(cert), "--tls-key", str(key), "--device-token", TOKEN)
    with running_server(tiny_bundle.root, options=options) as running:
        yield running


def doctor(server: str, cache: Path, *sources: object, **values: Any) -> dict[str, dict[str, Any]]:
    """The findings by check; of sources the last one."""
    settings = EdgeSettings.load({"server": server, "cache_dir": cache, "precision": "float32", **values})
    return {finding.check: asdict(finding) for finding in asyncio.run(examine(settings, [str(s) for s in sources]))}


def failed(findings: dict[str, dict[str, Any]]) -> set[str]:
    return {name for name, finding in findings.items() if finding["state"] == "failed"}


def test_a_device_that_works(server: Server, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(photo_bytes(1))
    found = doctor(server.grpc, tmp_path / "cache", tmp_path / "a.png", model="tiny")
    assert failed(found) == set()
    assert list(found) == [
        "name", "proxy", "route", "tls", "server", "protocol", "token", "clock", "stream", "cache", "bundle",
        "precision", "temperature", "source",
    ]  # fmt: skip
    assert found["clock"]["state"] == "ok"
    assert "0 of " in found["bundle"]["found"]
    assert "48x40" in found["source"]["found"]
    settings = EdgeSettings.load({"server": server.grpc, "model": "tiny", "cache_dir": tmp_path / "cache"})
    asyncio.run(fetch_bundle(settings))
    assert "0 bytes are missing" in doctor(server.grpc, tmp_path / "cache", model="tiny")["bundle"]["found"]
    next((tmp_path / "cache" / "files").iterdir()).write_bytes(b"damaged")
    assert doctor(server.grpc, tmp_path / "cache", model="tiny")["bundle"]["state"] == "warning"


def test_the_command(server: Server, tmp_path: Path) -> None:
    options = ("doctor", "--server", server.grpc, "--cache-dir", tmp_path, "--model")
    done = edge(*options, "tiny", "--json")
    assert (done.returncode, json.loads(done.stdout)["ok"]) == (0, True), done.stderr
    done = edge(*options, "nothing")
    assert done.returncode == 1
    assert "--model" in done.stdout
    assert done.stdout.endswith("1 of 13 checks failed\n")
    assert max(map(len, done.stdout.splitlines())) <= 80


def options_of(name: str) -> set[str]:
    """All that a command takes, hidden flags included."""
    command = get_command(app)
    assert isinstance(command, TyperGroup)
    return {option for parameter in command.commands[name].params for option in (*parameter.opts, parameter.name)}


def test_doctor_in_place_of_run(server: Server, tmp_path: Path) -> None:
    """Whatever flags and sources `run` is given, `doctor` takes them, and checks what they name."""
    assert options_of("run") <= options_of("doctor")
    photos, watched = tmp_path / "photos", tmp_path / "watched"
    for folder in (photos, watched):
        folder.mkdir()
        (folder / "a.png").write_bytes(photo_bytes(1))
    arguments = [
        "--server", server.grpc, "--cache-dir", tmp_path / "cache", "--model", "tiny", "--client", "gate-1",
        "--point", "s1-r1", "--answers", "labels", "--pack", 3, "--similar", "off", "--retries", -1, "--report-s", 60,
        "--spool", tmp_path / "spool", "--spool-age", 10, photos, "--watch", watched, "--existing", "--fps", 3,
        "--newest", "--as-they-come", "--json-lines", "--verbose", "--out", tmp_path / "out",
    ]  # fmt: skip
    done = edge("doctor", *arguments, "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    found = {each["check"]: each for each in json.loads(done.stdout)["checks"]}
    assert "48x40" in found["source"]["found"]
    assert "1 photograph is there" in found["watch"]["found"]
    assert found["out"]["state"] == found["spool"]["state"] == "ok"
    assert not (tmp_path / "out").exists(), "it changes nothing"
    wrong = edge("doctor", *arguments, "--json", "--pack-ms", 20_000)
    assert (wrong.returncode, "--pack-ms" in wrong.stderr) == (2, True), "what `run` refuses"
    assert "fps" not in edge("doctor", "--help").stdout


def test_disks_that_do_not_answer(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is a finding, and keeps none of the others from being told."""
    from bitneck_edge.doctor import disks, sources, spool

    monkeypatch.setattr(disks, "_LOOK_S", 0.3)
    monkeypatch.setattr(sources, "_SOURCE_S", 0.3)
    disk = Disk(monkeypatch)
    disk.slows(spool, "_is_used")
    disk.slows(sources, "picture_of")
    disk.hang()
    (tmp_path / "spool").mkdir()
    (tmp_path / "a.png").write_bytes(photo_bytes(1))
    found = doctor(server.grpc, tmp_path / "cache", tmp_path / "a.png", model="tiny", spool=tmp_path / "spool")
    assert failed(found) == {"spool", "source"}
    assert found["spool"]["found"] == f"the disk of {tmp_path / 'spool'} has not answered for 0 s"
    assert "no picture within" in found["source"]["found"]
    disk.go_on()
    monkeypatch.setattr(disks, "_LOOK_S", 60.0)
    monkeypatch.setattr(sources, "_SOURCE_S", 60.0)
    again = doctor(server.grpc, tmp_path / "cache", tmp_path / "a.png", model="tiny", spool=tmp_path / "spool")
    assert failed(again) == set()


def test_settings_that_the_bundle_does_not_fit(server: Server, tmp_path: Path) -> None:
    found = doctor(server.grpc, tmp_path / "cache", model="tiny", point="s9-r9")
    assert failed(found) == {"bundle"}
    assert "s1-r1" in found["bundle"]["found"]
    assert "`bitneck-edge points`" in found["bundle"]["advice"]
    assert failed(doctor(server.grpc, tmp_path / "cache", model="tiny", answers="map")) == {"bundle"}
    assert failed(doctor(server.grpc, tmp_path / "cache", model="tiny", point="auto")) == set()


def test_a_watched_folder_and_one_for_class_maps(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert [each.state for each in check_watches([tmp_path])] == ["ok"]
    (two,) = check_watches([tmp_path, tmp_path])
    (none,) = check_watches([tmp_path / "none"])
    (no_folder,) = check_out(tmp_path / "file" / "out")
    assert {each.state for each in (two, none, no_folder)} == {"failed"}
    assert "--watch" in none.advice
    assert check_watches([]) == check_out(None) == []


def test_tls_and_token(secured: Server, authority: Authority, tmp_path: Path) -> None:
    found = doctor(secured.grpc, tmp_path, tls_ca=authority.ca, token=TOKEN)
    assert failed(found) == set()
    assert found["tls"]["state"] == "warning"  # it ends in three days
    assert "3 days left" in found["tls"]["found"]
    found = doctor(secured.grpc, tmp_path, tls_ca=authority.ca)
    assert failed(found) == {"token"}
    assert "BITNECK_EDGE_TOKEN" in found["token"]["advice"]
    assert found["stream"]["state"] == "skipped"
    found = doctor(secured.grpc, tmp_path, tls=True, token=TOKEN)
    assert failed(found) == {"tls"}
    assert "--tls-ca" in found["tls"]["advice"]
    found = doctor(secured.grpc, tmp_path, token=TOKEN)
    assert failed(found) == {"server"}
    assert "--tls" in found["server"]["advice"]
    found = doctor(secured.grpc, tmp_path, tls_ca=tmp_path / "nowhere.pem")
    assert failed(found) == {"tls"}


def test_an_expired_certificate(tiny_bundle: Bundle, authority: Authority, tmp_path: Path) -> None:
    cert, key = authority.issue("expired", days=-1)
    with running_server(tiny_bundle.root, options=("--tls-cert", str(cert), "--tls-key", str(key))) as old:
        found = doctor(old.grpc, tmp_path, tls_ca=authority.ca)
    assert failed(found) == {"tls"}
    assert "expired" in found["tls"]["found"]


def test_a_device_without_the_certificate_that_is_asked_for(
    tiny_bundle: Bundle, authority: Authority, tmp_path: Path
) -> None:
    cert, key = authority.issue("strict")
    options = ("--tls-cert", str(cert), "--tls-key", str(key), "--tls-client-ca", str(authority.ca))
    with running_server(tiny_bundle.root, options=options) as strict:
        found = doctor(strict.grpc, tmp_path, tls_ca=authority.ca)
        assert failed(found) == {"server"}
        assert "--tls-cert" in found["server"]["advice"]
        own, own_key = authority.issue("device")
        assert failed(doctor(strict.grpc, tmp_path, tls_ca=authority.ca, tls_cert=own, tls_key=own_key)) == set()


def test_nobody_there(tmp_path: Path) -> None:
    found = doctor(f"127.0.0.1:{free_port()}", tmp_path / "a")
    assert failed(found) == {"route"}
    assert "bitneck-cloud serve" in found["route"]["advice"]
    assert found["bundle"]["state"] == found["stream"]["state"] == "skipped"
    assert failed(doctor("nobody.invalid:50051", tmp_path / "a", insecure=True)) == {"name"}


def test_a_bundle_is_looked_at_without_its_server(tiny_bundle: Bundle, tmp_path: Path) -> None:
    with running_server(tiny_bundle.root) as server:
        asyncio.run(fetch_bundle(EdgeSettings.load({"server": server.grpc, "cache_dir": tmp_path})))
    found = doctor(server.grpc, tmp_path)
    assert failed(found) == {"route"}
    assert "0 bytes are missing" in found["bundle"]["found"]


def test_what_answers_is_no_bitneck_server(server: Server, tmp_path: Path) -> None:
    found = doctor(server.http.removeprefix("http://"), tmp_path)
    assert failed(found) == {"server"}
    assert "control API" in str(found["server"])
    with socket.create_server(("127.0.0.1", 0)) as silent:  # it takes connections and says nothing
        assert failed(doctor(f"127.0.0.1:{silent.getsockname()[1]}", tmp_path)) == {"server"}
        found = doctor(f"127.0.0.1:{silent.getsockname()[1]}", tmp_path, tls=True)
        assert failed(found) == {"tls"}


def test_wrong_model_pin_and_cache(server: Server, tmp_path: Path) -> None:
    found = doctor(server.grpc, tmp_path, model="nothing")
    assert failed(found) == {"protocol"}
    assert "--model" in found["protocol"]["advice"]
    found = doctor(server.grpc, tmp_path, model="tiny", bundle_id="sha256:" + "a" * 64)
    assert failed(found) == {"bundle"}
    (tmp_path / "file").write_text("no folder")
    found = doctor(server.grpc, tmp_path / "file", model="tiny")
    assert "cache" in failed(found)
    assert "--cache-dir" in found["cache"]["advice"]


def test_a_proxy_of_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nobody = f"127.0.0.1:{free_port()}"
    for name, value in (("https_proxy", f"http://{nobody}"), ("no_proxy", ""), ("no_grpc_proxy", "")):
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("grpc_proxy", raising=False)
    found = doctor("192.0.2.1:50051", tmp_path, insecure=True)
    assert failed(found) == {"route"}
    assert nobody in found["route"]["found"]
    assert "no_proxy" in found["proxy"]["advice"]


@pytest.mark.parametrize("name", ["camera:77", "nowhere.png", "nowhere.mp4"])
def test_sources_that_give_nothing(server: Server, tmp_path: Path, name: str) -> None:
    found = doctor(server.grpc, tmp_path, name, model="tiny")
    assert failed(found) == {"source"}
    assert name.startswith("camera") is ("cameras here" in found["source"]["advice"])


def test_clocks() -> None:
    assert check_clock(0.0, 1.0, 1.1).state == "skipped"
    assert check_clock(100.0, 100.9, 101.1).state == "ok"
    behind = check_clock(100.0, 89.9, 90.1)
    assert (behind.state, "10.00 s behind" in behind.found) == ("warning", True)
    assert check_clock(100.0, 90.0, 106.0).state == "ok"  # the answer took too long to say


def test_the_report_fits_80_columns() -> None:
    findings = [
        Finding("name", "ok", "word " * 40),
        Finding("temperature", "failed", "x" * 100, "do " * 40),
    ]
    lines = report_lines(findings)
    assert lines[-1] == "1 of 2 checks failed"
    assert [len(line) <= 80 or "xxx" in line for line in lines] == [True] * len(lines)
    assert report_lines(findings[:1])[-1] == "nothing keeps this device from working"


def test_the_spool(tmp_path: Path) -> None:
    """What is in it, who uses it, whether it can be written; and nothing of it is changed."""
    folder = tmp_path / "spool"

    def check(place: Path = folder) -> tuple[str, str]:
        (found,) = check_spool(EdgeSettings.load({"server": "127.0.0.1:9", "spool": place}))
        return found.state, found.found

    assert check_spool(EdgeSettings.load({"server": "127.0.0.1:9"})) == []
    assert check() == ("ok", f"{folder} is not there yet; it can be made")
    assert not folder.exists()
    (tmp_path / "file").touch()
    assert check(tmp_path / "file" / "spool")[0] == check(tmp_path / "file")[0] == "failed"
    spool = Spool.open(folder, Limits(most_bytes=1_000_000, most_age_s=1e9))
    bundle_id = "sha256:" + "ab" * 32
    for _ in range(5):
        spool.put(Kept(seq=0, bundle_id=bundle_id, point="p", payload=b"x", captured_unix_us=1, name="c"))
    spool.done([2])
    assert check()[0] == "warning"
    assert "4 frames" in check()[1]
    assert "another process uses it" in check()[1]
    spool.close()
    assert check()[0] == "ok"
    with next(folder.glob("*.frames")).open("ab") as torn:
        torn.write(b"torn")
    before = {path: path.read_bytes() for path in folder.glob("*.*")}
    assert check()[0] == "warning"
    assert "4 frames" in check()[1]
    assert "1 place is damaged" in check()[1]
    assert before == {path: path.read_bytes() for path in folder.glob("*.*")}
