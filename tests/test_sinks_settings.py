"""Settings of sinks, and what is pure of them."""

import base64
import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from bitneck.errors import InvalidConfig, MalformedFrame
from bitneck_cloud.answers.sinks.maps import with_map
from bitneck_cloud.answers.sinks.queue.seen import MOST_RUNS, Seen
from bitneck_cloud.answers.sinks.topics import check_topic, topic_of
from bitneck_cloud.settings import CloudSettings
from bitneck_testing.consumers.documents import answer, coded_map

NOW = 1_800_000_000.0


MQTT: dict[str, Any] = {"kind": "mqtt", "name": "m", "host": "localhost"}
HOOK: dict[str, Any] = {"kind": "webhook", "name": "w", "url": "http://localhost/x", "secret": "0123456789abcdef"}
LINES: dict[str, Any] = {"kind": "jsonl", "name": "l", "path": "a.jsonl"}


def jsonl(folder: Path, **other: Any) -> dict[str, Any]:
    return {"kind": "jsonl", "name": "file", "path": str(folder / "answers.jsonl"), "pause_s": 0.05} | other


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        ([{"kind": "smtp", "name": "x"}], "^sink x: .*mqtt.*webhook.*jsonl"),
        ([{"name": "x"}], "sink x: .*kind"),
        ([LINES, {"kind": "jsonl", "name": "archive"}], r"^sink archive: path: Field required$"),
        ([LINES, {"kind": "jsonl"}], r"^setting sinks, number 2: name: Field required$"),
        ([LINES | {"client": ["a", 3]}], r"^sink l: client\.1: "),
        ([MQTT | {"hots": "x"}], "^sink m: unknown key hots; known: host, "),
        ([MQTT | {"name": "A b"}], "^sink A b: name: "),
        ([MQTT | {"topic": "bitneck/#"}], r"topic has \+ or #"),
        ([MQTT | {"topic": "{kamera}"}], r"topic has \{kamera\}; known: \{client\}"),
        ([MQTT | {"topic": ""}], "topic is empty"),
        ([MQTT | {"state_topic": "all"}], r"state_topic needs \{client\}"),
        ([MQTT | {"host": "broker.example"}], "plaintext: give tls = true"),
        ([MQTT | {"tls_ca": "ca.pem"}], "need tls = true"),
        ([MQTT | {"tls": True, "tls_cert": "x"}], "tls_cert and tls_key go together"),
        ([MQTT | {"password": "hush-hush"}], "a password needs a username"),
        ([MQTT | {"username": "u", "password": "hush-hush", "password_file": "x"}], "not both"),
        ([MQTT | {"pause_s": 90}], "pause_s 90 is longer"),
        ([MQTT | {"queue_bytes": 4096}], "has no room for one answer"),
        ([MQTT | {"min_score": 2}], "less than or equal to 1"),
        ([MQTT | {"client": ""}], "sink 'm': a pattern has 1 to 128 characters, got 0"),
        ([MQTT | {"client": "@night"}], "sink 'm': there is no group 'night' in the settings"),
        ([MQTT | {"class": ["x"] * 65}], "sink 'm': 65 values of class, at most 64"),
        ([HOOK | {"secret": "hush-hush"}], "secret is too short"),
        ([HOOK | {"secret": "whsec_!hush"}], "no base64"),
        ([HOOK | {"secret_file": "x"}], "give secret or secret_file, not both"),
        ([HOOK | {"url": "http://hook.example/x"}], "in plaintext: use https"),
        ([HOOK | {"url": "https://u:hush@hook.example/x"}], "user or a fragment"),
        ([HOOK | {"url": "ftp://localhost/x"}], "url is not http"),
        ([HOOK | {"url": "https://["}], "url is none"),
        ([HOOK | {"headers": {"Host": "hush"}}], "the header Host is set by the sink"),
        ([HOOK | {"headers": {"X Y": "hush"}}], "is no header"),
        ([HOOK | {"headers": {"X": "hush\r\n"}}], "is no header"),
        ([HOOK | {"headers": {"X": "hush "}}], "outer spaces"),
        ([HOOK | {"url": " https://hook.example/x"}], "has spaces"),
        ([HOOK | {"url": "https://ho ok.example/x"}], "has spaces"),
        ([HOOK | {"proxy": "socks5://localhost:1080"}], "proxy is not http"),
        ([HOOK | {"proxy": "http://u:hush@localhost:1"}], "proxy is not http"),
        ([MQTT | {"host": "localhost:1883"}], "the port as port"),
        ([MQTT | {"host": "mqtt://localhost"}], "a name or an address alone"),
        ([MQTT | {"host": "[::1]"}], "a name or an address alone"),
        ([MQTT | {"host": "a..b", "tls": True}], "is no host"),
        ([HOOK | {"url": "https://hook..example/x"}], "url or proxy cannot be used"),
        ([HOOK | {"proxy": f"http://{'x' * 64}.example/"}], "url or proxy cannot be used"),
        ([LINES, LINES], "two sinks have the name 'l'"),
        ([LINES, LINES | {"name": "k"}], "a.jsonl is written by something else"),
        ([LINES | {"path": "queue.db"}], "queue.db is written by something else"),
    ],
)
def test_bad_settings_are_refused_without_their_secrets(tables: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(InvalidConfig, match=message) as caught:
        CloudSettings.load({"sinks": tables, "sinks_queue": "queue.db"})
    assert "hush" not in str(caught.value)


def test_sinks_need_a_queue() -> None:
    with pytest.raises(InvalidConfig, match="give sinks_queue"):
        CloudSettings.load({"sinks": [LINES]})


def test_one_text_is_a_list_of_one() -> None:
    settings = CloudSettings.load({"sinks": [LINES | {"class": "dog", "client": ["a", "b"]}], "sinks_queue": "q"})
    assert (settings.sinks[0].classes, settings.sinks[0].client) == (("dog",), ("a", "b"))


@pytest.mark.parametrize("page", ["sinks.md"])
def test_examples_of_the_page_load(page: str, tmp_path: Path) -> None:
    text = (Path(__file__).resolve().parent.parent / "docs" / page).read_text()
    examples = re.findall(r"^```toml\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert examples
    kinds = set()
    for example in examples:
        (tmp_path / "config.toml").write_text(example)
        kinds |= {sink.kind for sink in CloudSettings.load({}, tmp_path / "config.toml").sinks}
    assert kinds == {"mqtt", "webhook", "jsonl"}


@given(st.text(), st.text())
def test_a_client_stays_within_its_level(first: str, second: str) -> None:
    """No wildcard, no further level, no control character; and two clients never share a topic."""
    topic = topic_of("bitneck/{client}/{model}", {"client": first, "model": "m"})
    assert topic.count("/") == 2
    assert topic.split("/")[1]
    assert not set(topic) & {"+", "#", "\0", "\n", "$"}
    topic.encode()
    other = topic_of("bitneck/{client}/{model}", {"client": second, "model": "m"})
    assert (topic == other) == (first == second or {first, second} == {"", "-"})


@pytest.mark.parametrize("template", ["a/\0", "a/\n", "+", "$SYS/{client}", "{client", "a}", "", "x" * 1025])
def test_templates_that_give_no_topic(template: str) -> None:
    with pytest.raises(ValueError, match="topic"):
        check_topic(template, ("client",), "topic")


@given(st.lists(st.integers(0, 60)))
def test_seen_is_a_set(seqs: list[int]) -> None:
    seen = Seen()
    for seq in seqs:
        seen = seen.with_(seq)
    assert {seq for seq in range(62) if seq in seen} == set(seqs)
    assert all(first <= last for first, last in seen.runs)
    assert all(left[1] + 1 < right[0] for left, right in zip(seen.runs, seen.runs[1:], strict=False))
    assert Seen.load(seen.dump()) == seen


def test_seen_forgets_the_lowest_and_claims_nothing() -> None:
    seen = Seen()
    for seq in range(0, 4 * MOST_RUNS, 2):
        seen = seen.with_(seq)
    assert len(seen.runs) == MOST_RUNS
    assert 0 not in seen
    assert 4 * MOST_RUNS - 2 in seen
    assert 4 * MOST_RUNS - 3 not in seen
    with pytest.raises(MalformedFrame):
        Seen.load("[[1]]")


def test_maps_change_their_form() -> None:
    classes = np.array([[0, 1, 1], [7, 1, 255]], dtype=np.uint8)
    body = json.dumps(answer(1, map=coded_map(classes)), separators=(",", ":")).encode()
    assert with_map(body, "runs") is body
    assert json.loads(with_map(body, "none"))["map"] is None
    changed = json.loads(with_map(body, "png"))
    picture = Image.open(io.BytesIO(base64.b64decode(changed["map"]["data"])), formats=["PNG"])
    assert (changed["map"]["encoding"], picture.mode) == ("png", "P")
    np.testing.assert_array_equal(np.array(picture), classes)
    plain = json.dumps(answer(1, client='"map":{'), separators=(",", ":")).encode()
    assert with_map(plain, "png") is plain
    broken = json.dumps(answer(1, map=coded_map(classes) | {"height": 9}), separators=(",", ":")).encode()
    assert json.loads(with_map(broken, "png"))["map"] is None
