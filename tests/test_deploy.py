"""What is deployed with: containers, compose, Kubernetes, the dashboard, and two servers behind a real balancer."""

import asyncio
import contextlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from bitneck.bundle import Bundle
from bitneck_cloud.observe.metrics import Metrics
from bitneck_cloud.settings import CloudSettings
from bitneck_edge.answers.results import Answer
from bitneck_edge.client import EdgeClient
from bitneck_edge.settings import EdgeSettings
from bitneck_testing.photographs import photo
from bitneck_testing.processes import free_port, running_server

ROOT = Path(__file__).resolve().parent.parent
DEPLOY = ROOT / "deploy"
HADOLINT = Path(sys.executable).parent / "hadolint"


def compose() -> dict[str, Any]:
    document: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
    return document


@pytest.mark.skipif(not HADOLINT.exists(), reason="hadolint has no package for this machine")
@pytest.mark.parametrize("name", ["cloud", "edge"])
def test_dockerfiles_are_lint_free(name: str) -> None:
    done = subprocess.run([HADOLINT, ROOT / name / "Dockerfile"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.parametrize("name", ["cloud", "edge"])
def test_dockerfiles_copy_what_is_there_and_run_as_nobody(name: str) -> None:
    text = (ROOT / name / "Dockerfile").read_text()
    for line in re.findall(r"^COPY (?!--from)(.*) \S+$", text, re.MULTILINE):
        for source in line.split():
            assert (ROOT / source).exists(), source
    run = text[text.index("AS run") :]
    assert "USER 10001" in run
    assert "models" not in run


@pytest.mark.parametrize("path", sorted((DEPLOY / "kubernetes").glob("*.yaml")), ids=lambda p: p.name)
def test_kubernetes_manifests_match_their_schemas(path: Path) -> None:
    for document in yaml.safe_load_all(path.read_text()):
        if isinstance(document, dict):
            kubernetes_validate.validate(document, "1.37", strict=True)


def test_environment_variables_are_settings() -> None:
    containers = yaml.safe_load((DEPLOY / "kubernetes" / "deployment.yaml").read_text())["spec"]["template"]["spec"]
    names = {entry["name"] for entry in containers["containers"][0]["env"]}
    for service in compose()["services"].values():
        names |= set(service.get("environment", {}))
    for name in ("cloud", "edge"):
        names |= set(re.findall(r"BITNECK_[A-Z]+_[A-Z_]+", (ROOT / name / "Dockerfile").read_text()))
    known = {f"BITNECK_CLOUD_{field.upper()}" for field in CloudSettings.model_fields}
    known |= {f"BITNECK_EDGE_{field.upper()}" for field in EdgeSettings.model_fields}
    assert names <= known
    assert "BITNECK_CLOUD_HTTP_TOKEN" in names


def test_compose_mounts_what_is_there() -> None:
    services = compose()["services"]
    assert set(services) == {"cloud", "edge", "prometheus", "grafana"}
    for service in services.values():
        if "build" in service:
            assert (ROOT / service["build"]["dockerfile"]).is_file()
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            if source.startswith("./"):
                assert (ROOT / source).exists(), source


def test_the_dashboard_shows_metrics_that_exist() -> None:
    subprocess.run([sys.executable, ROOT / "scripts" / "update_dashboard.py", "--check"], check=True)
    metrics = Metrics()
    for name in ("streams", "open_sessions", "queue_frames", "ready"):
        metrics.gauge(name, name, lambda: 0.0)
    known = {sample for family in metrics.registry.collect() for sample in _sample_names(family)}
    used: set[str] = set()
    for path in (DEPLOY / "grafana" / "dashboards" / "bitneck.json", DEPLOY / "kubernetes" / "adapter-rule.yaml"):
        used |= set(re.findall(r"\bbitneck_[a-z_]+", path.read_text()))
    assert used - {"bitneck_queue_wait_seconds_mean"} <= known  # the adapter makes that one
    server = (ROOT / "cloud" / "bitneck_cloud" / "server.py").read_text()
    assert all(f'metrics.gauge("{name}"' in server for name in ("streams", "open_sessions", "queue_frames", "ready"))


def _sample_names(family: Any) -> set[str]:
    suffixes = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count"), "gauge": ("",)}[family.type]
    return {family.name + suffix for suffix in suffixes}


@pytest.mark.skipif(shutil.which("haproxy") is None, reason="needs haproxy, a Debian package")
async def test_nothing_is_lost_when_a_replica_behind_a_balancer_is_killed(tiny_bundle: Bundle, tmp_path: Path) -> None:
    config = tmp_path / "replica.toml"
    config.write_text('token_key = "a shared key of some length"\n')
    options = ("--config", str(config))
    with running_server(tiny_bundle.root, options=options) as a, running_server(tiny_bundle.root, options=options) as b:
        listen = f"127.0.0.1:{free_port()}"
        environment = os.environ | {"BITNECK_LISTEN": listen}
        for name, server in (("A", a), ("B", b)):
            environment[f"BITNECK_{name}_GRPC"] = server.grpc
            environment[f"BITNECK_{name}_HTTP_PORT"] = server.http.rsplit(":", 1)[1]
        command = [str(shutil.which("haproxy")), "-db", "-f", str(DEPLOY / "haproxy.cfg")]
        balancer = await asyncio.create_subprocess_exec(*command, env=environment)
        try:
            answers: list[Answer] = []
            clients = [EdgeClient(listen, cache_dir=tmp_path / "cache", retries=20) for _ in range(4)]
            halfway = asyncio.Event()

            async def camera(client: EdgeClient) -> None:
                async with client:
                    for k in range(60):
                        answers.append(await client.infer(photo(k % 5)))
                        if len(answers) > 80:
                            halfway.set()
                        await asyncio.sleep(0.01)

            cameras = [asyncio.create_task(camera(client)) for client in clients]
            reached = asyncio.create_task(halfway.wait())
            await asyncio.wait({reached, *cameras}, return_when=asyncio.FIRST_COMPLETED)
            assert halfway.is_set(), await asyncio.gather(*cameras, return_exceptions=True)
            served = [int('"how": "new"' in s.read_log()) for s in (a, b)]
            assert served == [1, 1], "the balancer gave no session to one of the servers"
            a.kill()
            await asyncio.gather(*cameras)
        finally:
            with contextlib.suppress(ProcessLookupError):
                balancer.kill()
            await balancer.wait()
        assert len(answers) == 240
        assert sum(client.reconnects for client in clients) >= 1
        assert '"how": "adopted"' in b.read_log()
