"""Settings: flags before environment before file before default; what is unknown or wrong is named."""

from pathlib import Path

import pytest
from pydantic_settings import SettingsConfigDict

from bitneck.errors import InvalidConfig
from bitneck.settings.model import Address, Settings


class Example(Settings):
    model_config = SettingsConfigDict(env_prefix="BITNECK_EXAMPLE_")

    window: int = 8
    name: str = "default"


@pytest.mark.parametrize(
    ("text", "host", "port", "loopback"),
    [
        ("127.0.0.1:50051", "127.0.0.1", 50051, True),
        ("127.8.9.1:1", "127.8.9.1", 1, True),
        ("localhost:0", "localhost", 0, True),
        ("[::1]:65535", "::1", 65535, True),
        ("0.0.0.0:80", "0.0.0.0", 80, False),
        ("[::]:80", "::", 80, False),
        ("edge-7.example.org:443", "edge-7.example.org", 443, False),
        ("localhost.example.org:443", "localhost.example.org", 443, False),
        ("127.evil.example:443", "127.evil.example", 443, False),
    ],
)
def test_addresses_read_and_print_alike(text: str, host: str, port: int, loopback: bool) -> None:
    address = Address.parse(text)
    assert (address.host, address.port, address.loopback, str(address)) == (host, port, loopback, text)


@pytest.mark.parametrize(
    "text", ["", "host", "host:", ":80", "host:-1", "host:80x", "::1:80", "[::1]", "h h:80", "host:80\n"]
)
def test_addresses_that_are_none(text: str) -> None:
    with pytest.raises(InvalidConfig, match="is not HOST:PORT"):
        Address.parse(text)


def test_a_port_that_is_too_large() -> None:
    with pytest.raises(InvalidConfig, match="a port is at most 65535"):
        Address.parse("host:65536")


def test_each_source_overrides_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "settings.toml"
    file.write_text('window = 3\nname = "file"\n')
    assert Example.load({}) == Example(window=8, name="default")
    assert Example.load({"window": None}, file) == Example(window=3, name="file")
    monkeypatch.setenv("BITNECK_EXAMPLE_WINDOW", "5")
    assert Example.load({}, file).window == 5
    assert Example.load({}, file).name == "file"
    assert Example.load({"window": 6}, file).window == 6


def test_what_is_unknown_or_wrong_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "settings.toml"
    for content, text in (
        (b"windwo = 1", r"unknown .*settings\.toml: key windwo; known: window, name"),
        (b'window = "many"', r"setting window \(.*settings\.toml: window\): .*integer"),
        (b"window = ", r"settings\.toml: not TOML"),
        (b"\xff\xfe", r"settings\.toml: not TOML"),
    ):
        file.write_bytes(content)
        with pytest.raises(InvalidConfig, match=text):
            Example.load({}, file)
    for missing in (tmp_path / "nowhere.toml", tmp_path):
        with pytest.raises(InvalidConfig, match="cannot read the configuration"):
            Example.load({}, missing)
    with pytest.raises(InvalidConfig, match="setting window"):
        Example.load({"window": "many"})
    monkeypatch.setenv("BITNECK_EXAMPLE_WINDWO", "5")
    with pytest.raises(InvalidConfig, match=r"BITNECK_EXAMPLE_WINDWO; known: .*BITNECK_EXAMPLE_WINDOW"):
        Example.load({})
