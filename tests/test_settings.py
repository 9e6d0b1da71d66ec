"""Every setting from flag, environment and file; help and documents made from the models; what is refused."""

import inspect
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import pytest
import tomli_w
import typer
from typer.testing import CliRunner

from bitneck.errors import InvalidConfig
from bitneck.settings.flags import default_text, with_settings
from bitneck.settings.model import Settings, has_flag
from bitneck_cloud.settings import CloudSettings
from bitneck_edge.settings import EdgeSettings
from bitneck_testing.processes import BIN

ROOT = Path(__file__).resolve().parent.parent
MODELS: tuple[type[Settings], ...] = (EdgeSettings, CloudSettings)
FIELDS = [(model, name) for model in MODELS for name in model.model_fields]
FLAGS: dict[str, list[str]] = json.loads((Path(__file__).parent / "golden" / "flags.json").read_text())
PARTNERS = {"tls_cert": "tls_key", "tls_key": "tls_cert", "tls_client_ca": "tls_cert", "http_tls_client_ca": "tls_cert"}
"""Settings that are refused without another one."""


def sample(model: type[Settings], name: str) -> Any:
    """A legal value that is not the default, as TOML has it."""
    field = model.model_fields[name]
    known = {
        "server": "localhost:443", "metrics": "127.0.0.1:3", "report_s": 30.0,
        "grpc": "127.0.0.1:1", "http": "127.0.0.1:2", "bundle_id": "sha256:" + "a" * 64,
        "traces": "http://collector:4317", "token_key": "0123456789abcdef", "http_token": "0123456789abcdef",
        "device_token": "0123456789abcdef", "providers": ["One", "Two"],
        "similar": "off", "answers": "map/4", "precision": "int8", "log_level": "debug", "log_format": "json",
        "trace_ratio": 0.5, "spool_first": "newest", "rates": [{"clients": "cam-*", "point": "s1-r1"}, {"auto": True}],
        "groups": {"doors": ["door-*", "gate"]},
        "sinks": [{"kind": "jsonl", "name": "file", "path": "a.jsonl"}], "sinks_sync": "always",
    }  # fmt: skip
    if name in known:
        return known[name]
    if name == "bundle":
        return ["a", "b"] if model is CloudSettings else "a"
    if isinstance(field.default, bool):
        return True
    if isinstance(field.default, int | float):
        return field.default + 1
    return "some-text"


def texts(value: Any) -> list[str]:
    """A value as a variable or a flag may give it."""
    if isinstance(value, list) and isinstance(value[0], str):
        return [",".join(value), json.dumps(value)]
    return [json.dumps(value) if isinstance(value, list | dict) else str(value)]


def partners(model: type[Settings], name: str) -> dict[str, Any]:
    if name == "sinks":
        return {"sinks_queue": "queue.db"}
    names, other = [], PARTNERS.get(name)
    while other and other in model.model_fields and other not in names:
        names.append(other)
        other = PARTNERS.get(other)
    return {each: "x.pem" for each in names if each != name}


@pytest.mark.parametrize(("model", "name"), FIELDS, ids=[f"{m.__name__}-{n}" for m, n in FIELDS])
def test_every_setting_works_from_flag_environment_and_file(
    model: type[Settings], name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    value, others = sample(model, name), partners(model, name)
    file = tmp_path / "settings.toml"
    file.write_text(tomli_w.dumps({name: value, **others}))
    from_file, origins = model.load_with_origins({}, file)
    assert origins[name] == f"{file}: {name}"
    assert getattr(from_file, name) != model.model_fields[name].default
    for text in texts(value):
        with monkeypatch.context() as environment:
            environment.setenv(model.variable(name), text)
            from_environment, origins = model.load_with_origins(others)
            assert (from_environment, origins[name]) == (from_file, model.variable(name))
    if not has_flag(model.model_fields[name]):
        assert name not in model.flagged()
        return
    app, loaded = typer.Typer(), []

    @app.command()
    @with_settings(model, *model.flagged())
    def command(*, settings: Settings, origins: dict[str, str]) -> None:
        loaded.append((settings, origins[name]))

    arguments = [] if value is True else [texts(each)[-1] for each in (value if isinstance(value, list) else [value])]
    flags = [model.flag(name)] if value is True else [x for a in arguments for x in (model.flag(name), a)]
    flags += [x for other, path in others.items() for x in (model.flag(other), path)]
    done = CliRunner().invoke(app, flags)
    assert done.exit_code == 0, done.output
    assert loaded == [(from_file, model.flag(name))]


@pytest.mark.parametrize("command", FLAGS)
def test_every_flag_of_version_0_1_is_there_and_every_default_is_shown(command: str) -> None:
    program, name = command.split()
    done = subprocess.run(
        [str(BIN / program), name, "--help"], capture_output=True, text=True, env=os.environ | {"COLUMNS": "300"}
    )
    shown = set(re.findall(r"(?<![\w-])(--[a-z][a-z0-9-]*)", done.stdout))
    assert set(FLAGS[command]) <= shown
    model = {"bitneck-edge": EdgeSettings, "bitneck-cloud": CloudSettings}.get(program)
    for setting in model.model_fields if model is not None else ():
        line = next((x for x in done.stdout.splitlines() if re.search(rf"{model.flag(setting)}\s", x)), "")
        default = default_text(model.model_fields[setting])
        if line and default and not (command == "bitneck-edge load" and setting in ("in_flight", "point")):
            assert f"[default: {default}]" in line, setting


@pytest.mark.parametrize("model", MODELS)
def test_every_setting_says_what_it_does(model: type[Settings]) -> None:
    for name, field in model.model_fields.items():
        assert field.description and field.description.endswith("."), name  # noqa: PT018
        assert isinstance(field.json_schema_extra, dict)
        assert field.json_schema_extra["group"], name


def test_no_command_names_a_setting_by_hand() -> None:
    """A parameter of a command that is a setting too would be declared twice; `load` has two of its own meaning."""
    from bitneck_cloud.cli import app as cloud
    from bitneck_edge.cli import app as edge

    for app, model in ((cloud, CloudSettings), (edge, EdgeSettings)):
        for info in app.registered_commands:
            assert info.callback is not None
            own = inspect.signature(inspect.unwrap(info.callback)).parameters.keys() & model.model_fields.keys()
            assert own <= ({"point", "in_flight"} if info.callback.__name__ == "load" else set())


@pytest.mark.parametrize(
    "name",
    ["LB_SERVICE_HOST", "LB_SERVICE_PORT", "LB_SERVICE_PORT_GRPC", "LB_PORT", "LB_PORT_50051_TCP", "SERVICE_HOST",
     "LB_PORT_50051_TCP_ADDR", "LB_PORT_50051_TCP_PROTO", "PORT", "PORT_8080_TCP_PORT", "SERVICE_PORT"],
)  # fmt: skip
def test_variables_of_kubernetes_services_are_passed_over(
    name: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(f"BITNECK_CLOUD_{name}", "tcp://10.0.0.1:50051")
    monkeypatch.setenv("BITNECK_CLOUD_WINDOW", "3")
    settings = CloudSettings.load({})
    assert settings.window == 3
    with caplog.at_level("INFO", logger="bitneck.settings.model"):
        settings.log_foreign_variables()
    assert [f"BITNECK_CLOUD_{name}" in record.message for record in caplog.records] == [True]


def test_an_unknown_key_names_the_nearest_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "settings.toml"
    file.write_text("max_sesions = 3\n")
    with pytest.raises(InvalidConfig, match=r"settings\.toml: key max_sesions; known: max_sessions, "):
        CloudSettings.load({}, file)
    monkeypatch.setenv("BITNECK_EDGE_RETRIE", "3")
    with pytest.raises(InvalidConfig, match="variable BITNECK_EDGE_RETRIE; known: BITNECK_EDGE_RETRIES, "):
        EdgeSettings.load({})


def test_a_refused_value_names_where_it_came_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "settings.toml"
    file.write_text("window = 0\n")
    with pytest.raises(InvalidConfig, match=r"setting window \(.*settings\.toml: window\): .*greater .*got 0"):
        CloudSettings.load({}, file)
    monkeypatch.setenv("BITNECK_CLOUD_WINDOW", "many")
    with pytest.raises(InvalidConfig, match=r"setting window \(BITNECK_CLOUD_WINDOW\): .*integer.*got 'many'"):
        CloudSettings.load({})
    monkeypatch.setenv("BITNECK_CLOUD_WINDOW", "3")
    with pytest.raises(InvalidConfig, match=r"setting window \(--window\): .*greater"):
        CloudSettings.load_with_origins({"window": 0}, flags=True)
    monkeypatch.setenv("BITNECK_CLOUD_PROVIDERS", '["One"')
    with pytest.raises(InvalidConfig, match=r"BITNECK_CLOUD_PROVIDERS.*neither a JSON list nor"):
        CloudSettings.load({})
    monkeypatch.delenv("BITNECK_CLOUD_PROVIDERS")
    with pytest.raises(InvalidConfig, match=r"setting rates \(--rate\): not JSON"):
        CloudSettings.load_with_origins({"rates": ["cam-*"]}, flags=True)


def test_secrets_are_in_no_message(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("token_key", "http_token", "device_token"):
        with pytest.raises(InvalidConfig) as caught:
            CloudSettings.load({name: ["hush-hush"]})
        assert name in str(caught.value)
        assert "hush" not in str(caught.value)
    monkeypatch.setenv("BITNECK_CLOUD_TOKEN_KEY", "hush")
    with pytest.raises(InvalidConfig, match="token_key is too short") as caught:
        CloudSettings.load({})
    assert "hush" not in str(caught.value)


def test_a_server_starts_from_its_environment_alone() -> None:
    environment = os.environ | {
        "BITNECK_CLOUD_BUNDLE": "nowhere", "BITNECK_CLOUD_LOG_FORMAT": "json",
        "BITNECK_CLOUD_SERVICE_HOST": "10.0.0.1", "BITNECK_CLOUD_PORT": "tcp://10.0.0.1:80",
    }  # fmt: skip
    done = subprocess.run([str(BIN / "bitneck-cloud"), "serve"], capture_output=True, text=True, env=environment)
    assert (done.returncode, "nowhere" in done.stderr) == (2, True)
    logged = json.loads(done.stderr.splitlines()[0])["message"]
    assert logged.endswith("passed over: BITNECK_CLOUD_PORT, BITNECK_CLOUD_SERVICE_HOST")
    done = subprocess.run([str(BIN / "bitneck-cloud"), "serve"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "--bundle FOLDER, BITNECK_CLOUD_BUNDLE, or bundle in the config file" in done.stderr


@pytest.mark.parametrize("program", ["bitneck-edge", "bitneck-cloud", "bitneck-models"])
def test_the_shell_completes_commands_and_flags(program: str) -> None:
    command, flag = {"bitneck-edge": ("run", "--latency-ms"), "bitneck-cloud": ("serve", "--max-queue")}.get(
        program, ("evaluate", "--ignore-index")
    )
    for words, expected in ((f"{program} {command[:3]}", command), (f"{program} {command} {flag[:6]}", flag)):
        environment = os.environ | {
            f"_{program.replace('-', '_').upper()}_COMPLETE": "complete_bash",
            "COMP_WORDS": words,
            "COMP_CWORD": str(len(words.split()) - 1),
        }
        done = subprocess.run([str(BIN / program)], capture_output=True, text=True, env=environment)
        assert expected in done.stdout.split(), done.stderr


def test_help_loads_no_runtime() -> None:
    code = (
        "import sys; sys.argv = ['bitneck-edge', 'run', '--help']\n"
        "from bitneck_edge.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "assert not {'onnxruntime', 'torch', 'fastapi'} & set(sys.modules), sorted(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_the_page_of_settings_is_up_to_date() -> None:
    subprocess.run([sys.executable, str(ROOT / "scripts" / "update_settings.py"), "--check"], check=True)


def test_literals_are_lower_case() -> None:
    """Flags with choices are read without regard to case."""
    for model in MODELS:
        for field in model.model_fields.values():
            for choice in get_args(field.annotation):
                assert not isinstance(choice, str) or choice == choice.lower()


@pytest.mark.parametrize("name", ["http_token", "device_token", "token_key"])
@pytest.mark.parametrize("value", ["", "short", "x" * 15])
def test_empty_and_short_secrets_are_refused(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty token would let everyone in who sends nothing."""
    monkeypatch.setenv(CloudSettings.variable(name), value)
    with pytest.raises(InvalidConfig, match=f"{name} is too short: give at least 16 random characters"):
        CloudSettings.load({})
