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
from bitneck_cloud.access.bearers import Role, read_token_file
from bitneck_cloud.answers.sinks.outgoing import Outgoing
from bitneck_cloud.answers.sinks.showing import SinkMetrics
from bitneck_cloud.bundles.watching import FolderMetrics, ServedFolders
from bitneck_cloud.observe.metrics import Metrics
from bitneck_cloud.settings import CloudSettings
from bitneck_edge.answers.results import Answer
from bitneck_edge.client import EdgeClient
from bitneck_edge.settings import EdgeSettings
from bitneck_testing.authority import Authority
from bitneck_testing.consumers.canaries import registry_of
from bitneck_testing.photographs import photo
from bitneck_testing.processes import BIN, free_port, running_server

ROOT = Path(__file__).resolve().parent.parent
DEPLOY = ROOT / "deploy"
OVERLAY = DEPLOY / "kubernetes" / "overlays" / "production"
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
    arguments = dict(re.findall(r"^ARG (\w+)=(\S+)$", text, re.MULTILINE))
    for line in re.findall(r"^COPY (?!--from)(.*) \S+$", text, re.MULTILINE):
        for source in line.split():
            path = re.sub(r"\$\{(\w+)\}", lambda match: arguments[match[1]], source)
            assert (ROOT / path).exists(), path
            assert path not in (ROOT / ".dockerignore").read_text().split()
    run = text[text.index("AS run") :] if name == "edge" else text[text.index("AS server") :]
    assert "torch" not in re.sub("(?m)^#.*", "", text)
    assert "USER 10001" in run
    assert "models" not in run


MANIFESTS = sorted((DEPLOY / "kubernetes").rglob("*.yaml"))
NO_SCHEMA = ("Kustomization", "PodMonitor", "PrometheusRule")
"""Kinds that Kubernetes itself does not have."""


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda p: p.name)
def test_kubernetes_manifests_match_their_schemas(path: Path) -> None:
    for document in yaml.safe_load_all(path.read_text()):
        if isinstance(document, dict) and document["kind"] not in NO_SCHEMA:
            kubernetes_validate.validate(document, "1.37", strict=True)


def test_environment_variables_are_settings() -> None:
    names = {entry["name"] for entry in pod()["containers"][0]["env"]}
    for service in compose()["services"].values():
        names |= {name for name in service.get("environment", {}) if name.startswith("BITNECK_")}
    for name in ("cloud", "edge"):
        names |= set(re.findall(r"BITNECK_[A-Z]+_[A-Z_]+", (ROOT / name / "Dockerfile").read_text()))
    known = {f"BITNECK_CLOUD_{field.upper()}" for field in CloudSettings.model_fields}
    known |= {f"BITNECK_EDGE_{field.upper()}" for field in EdgeSettings.model_fields}
    assert names <= known
    assert {"BITNECK_CLOUD_HTTP_TOKEN", "BITNECK_CLOUD_HTTP_TOKENS", "BITNECK_CLOUD_TLS_CERT"} <= names


def pod() -> dict[str, Any]:
    document = yaml.safe_load((DEPLOY / "kubernetes" / "base" / "deployment.yaml").read_text())
    spec: dict[str, Any] = document["spec"]["template"]["spec"]
    return spec


def test_kustomizations_name_files_and_secrets_that_are_there() -> None:
    """What `kubectl apply -k` would look for. Secrets are made from files of the same names as the examples."""
    kubernetes = DEPLOY / "kubernetes"
    named: set[Path] = set()
    for path in kubernetes.rglob("kustomization.yaml"):
        for resource in yaml.safe_load(path.read_text())["resources"]:
            target = (path.parent / resource).resolve()
            assert (target / "kustomization.yaml").is_file() if target.is_dir() else target.is_file(), resource
            named.add(target)
    loose = {path for path in MANIFESTS if path not in named} - set(kubernetes.rglob("kustomization.yaml"))
    assert {path.name for path in loose} == {"adapter-rule.yaml"}  # a part of another program's configuration
    overlay = OVERLAY
    secrets = {
        secret["name"]: dict(file.split("=") for file in secret["files"])
        for secret in yaml.safe_load((overlay / "kustomization.yaml").read_text())["secretGenerator"]
    }
    assert set(secrets["bitneck-cloud-tls"]) == {"tls.crt", "tls.key"}
    for key, file in secrets["bitneck-cloud"].items():
        assert (overlay / file.replace("secrets/", "secrets.example/")).is_file(), key
    used = {
        (volume["secret"]["secretName"], item["key"])
        for volume in pod()["volumes"]
        for item in volume.get("secret", {}).get("items", [])
    }
    used |= {
        (entry["valueFrom"]["secretKeyRef"]["name"], entry["valueFrom"]["secretKeyRef"]["key"])
        for entry in pod()["containers"][0]["env"]
        if "secretKeyRef" in entry.get("valueFrom", {})
    }
    assert used <= {(name, key) for name, files in secrets.items() for key in files}
    assert "/secrets/" in (overlay / ".gitignore").read_text()


def test_example_tokens_are_files_that_a_server_takes() -> None:
    examples = OVERLAY / "secrets.example"
    assert len(list(read_token_file(examples / "http-tokens", Role.OPERATE))) == 3
    assert len(list(read_token_file(examples / "device-tokens", Role.DEVICE))) == 1
    metrics = [token for role, _, token in read_token_file(examples / "http-tokens", Role.OPERATE) if role == "metrics"]
    assert metrics == [(examples / "metrics-token").read_text()]
    assert len((examples / "token-key").read_text()) >= 16


def test_containers_have_no_more_rights_than_they_need() -> None:
    for name, service in compose()["services"].items():
        assert service["cap_drop"] == ["ALL"], name
        assert service["read_only"] is True, name
        assert service["mem_limit"], name
        assert "no-new-privileges:true" in service["security_opt"], name
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", [])), name
    assert "PASSWORD" in str(compose()["services"]["grafana"]["environment"])
    spec = pod()
    (container,) = spec["containers"]
    assert spec["enableServiceLinks"] is spec["automountServiceAccountToken"] is False
    assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    assert container["securityContext"]["readOnlyRootFilesystem"] is True
    assert set(container["resources"]["limits"]) == {"cpu", "memory"}
    (threads,) = [entry for entry in container["env"] if entry["name"] == "BITNECK_CLOUD_THREADS"]
    assert threads["valueFrom"]["resourceFieldRef"]["resource"] == "limits.cpu"
    assert {spread["topologyKey"] for spread in spec["topologySpreadConstraints"]} == {
        "kubernetes.io/hostname", "topology.kubernetes.io/zone",
    }  # fmt: skip
    mounts = {mount["name"] for mount in container["volumeMounts"]}
    assert mounts == {volume["name"] for volume in spec["volumes"]}


def health(*options: object, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [str(part) for part in (BIN / "bitneck-cloud", "health", *options)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, env=os.environ | environment)


def test_the_health_check_of_the_image(tiny_bundle: Bundle, tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    cert, key = map(str, authority.issue("cloud.example"))
    tls = {"BITNECK_CLOUD_TLS_CERT": cert, "BITNECK_CLOUD_TLS_KEY": key}
    nobody = f"127.0.0.1:{free_port()}"
    for options, environment in (
        ((), {}),
        (("--tls-cert", cert, "--tls-key", key), tls),
        (("--tls-cert", cert, "--tls-key", key, "--http-tls-client-ca", str(authority.ca)), tls),
    ):
        with running_server(tiny_bundle.root, options=options) as server:
            http = server.http.removeprefix("http://")
            ready = health(BITNECK_CLOUD_HTTP=http, **environment)
            assert (ready.returncode, ready.stdout) == (0, "ready\n"), ready.stderr
            assert health("--live", "--http", http, **environment).stdout == "alive\n"
            port = http.rsplit(":", 1)[1]
            everywhere = {"BITNECK_CLOUD_INSECURE": "true", "BITNECK_CLOUD_HTTP_TOKEN": "a-token-of-the-image"}
            assert health(BITNECK_CLOUD_HTTP=f"0.0.0.0:{port}", **environment, **everywhere).returncode == 0
        dead = health(BITNECK_CLOUD_HTTP=nobody, **environment)
        assert dead.returncode == 1
        assert dead.stderr.count("\n") == 1
        assert nobody in dead.stderr


def test_compose_mounts_what_is_there() -> None:
    services = compose()["services"]
    assert set(services) == {"cloud", "edge", "camera", "prometheus", "grafana"}
    assert services["camera"]["profiles"] == ["camera"], "not every machine has one"
    volumes = set(compose()["volumes"])
    for service in services.values():
        if "build" in service:
            assert (ROOT / service["build"]["dockerfile"]).is_file()
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            if source.startswith("./"):
                assert (ROOT / source).exists(), source
            elif re.fullmatch(r"[\w-]+", source):
                assert source in volumes


def test_the_edges_image_reads_heic_and_has_folders_for_its_volumes() -> None:
    """A new volume gets the owner of the folder that it is mounted on; without one it would be root's."""
    text = (ROOT / "edge" / "Dockerfile").read_text()
    extras = re.search(r"\[(edge[\w,]*)\]", text)
    assert extras is not None
    assert set(extras[1].split(",")) == {"edge", "video", "heif"}
    made = re.search(r"mkdir (.*?) \\\n *&& chown 10001 (.*)\n", text)
    assert made is not None
    assert made[1] == made[2] == "/cache /spool"
    mounted = [volume.split(":")[1] for volume in compose()["services"]["camera"]["volumes"]]
    assert mounted == made[1].split()


def test_the_dashboard_shows_metrics_that_exist() -> None:
    subprocess.run([sys.executable, ROOT / "scripts" / "update_dashboard.py", "--check"], check=True)
    metrics = Metrics()
    for name in ("streams", "open_sessions", "queue_frames", "ready"):
        metrics.gauge(name, name, lambda: 0.0)
    metrics.registry.register(SinkMetrics(Outgoing((), None, server="here")))
    registry = registry_of(())
    metrics.registry.register(FolderMetrics(ServedFolders(registry), registry))
    known = {sample for family in metrics.registry.collect() for sample in _sample_names(family)}
    used: set[str] = set()
    for path in (
        DEPLOY / "grafana" / "dashboards" / "bitneck.json",
        DEPLOY / "prometheus-alerts.yml",
        OVERLAY / "adapter-rule.yaml",
    ):
        used |= set(re.findall(r"\bbitneck_[a-z_]+", path.read_text()))
    assert used - {"bitneck_queue_wait_seconds_mean"} <= known  # the adapter makes that one
    server = (ROOT / "cloud" / "bitneck_cloud" / "server.py").read_text()
    assert all(f'metrics.gauge("{name}"' in server for name in ("streams", "open_sessions", "queue_frames", "ready"))


@pytest.mark.skipif(shutil.which("promtool") is None, reason="needs promtool, of the Debian package prometheus")
def test_alerts_come_when_they_should() -> None:
    done = subprocess.run(
        ["promtool", "test", "rules", DEPLOY / "prometheus-alerts-test.yml"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_alerts_are_wired_in() -> None:
    """Compose mounts the file where Prometheus looks for it, and Kubernetes has the same groups."""
    groups = yaml.safe_load((DEPLOY / "prometheus-alerts.yml").read_text())["groups"]
    assert yaml.safe_load((OVERLAY / "alerts.yaml").read_text())["spec"]["groups"] == groups
    mounts = dict(volume.split(":")[:2] for volume in compose()["services"]["prometheus"]["volumes"])
    (read,) = yaml.safe_load((DEPLOY / "prometheus.yml").read_text())["rule_files"]
    assert mounts["./deploy/prometheus-alerts.yml"] == read
    tested = yaml.safe_load((DEPLOY / "prometheus-alerts-test.yml").read_text())["tests"]
    fired = {case["alertname"] for test in tested for case in test["alert_rule_test"] if case["exp_alerts"]}
    assert fired == {rule["alert"] for group in groups for rule in group["rules"]}


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


SERVICE = DEPLOY / "systemd" / "bitneck-edge.service"


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd-analyze")
def test_the_service_of_a_device_is_right_and_has_few_rights(tmp_path: Path) -> None:
    unit = tmp_path / SERVICE.name
    unit.write_text(SERVICE.read_text().replace("/opt/bitneck/bin/bitneck-edge", str(BIN / "bitneck-edge")))
    done = subprocess.run(["systemd-analyze", "verify", unit], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")
    help_text = subprocess.run(["systemd-analyze", "--help"], capture_output=True, text=True, check=True).stdout
    if "--threshold" in help_text:
        command = ["systemd-analyze", "security", "--offline=true", "--threshold=20", unit]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout


def test_the_settings_of_the_service_are_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [line.removeprefix("# ") for line in (DEPLOY / "systemd" / "bitneck-edge.env").read_text().splitlines()]
    given = [tuple(line.split("=", 1)) for line in lines if re.match(r"[A-Z_]+=", line)]
    assert {"BITNECK_EDGE_SERVER", "BITNECK_EDGE_TOKEN", "RUN_ARGUMENTS"} <= {name for name, _ in given}
    for name, value in given:
        if name.startswith("BITNECK_"):
            monkeypatch.setenv(name, value or "a-token-of-a-device")
    settings = EdgeSettings.load({})
    assert (settings.tls, settings.retries, settings.metrics) == (True, -1, "127.0.0.1:9101")
    shown = subprocess.run(
        [BIN / "bitneck-edge", "run", "--help"], capture_output=True, text=True, check=True,
        env=os.environ | {"COLUMNS": "200"},
    ).stdout  # fmt: skip
    for _, value in given:
        for flag in re.findall(r"--[a-z-]+", value):
            assert flag in shown
    assert "$RUN_ARGUMENTS" in SERVICE.read_text()
