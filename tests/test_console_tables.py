"""Tables of the console in a real browser: what a narrow page shows of clients, and errors of sinks that are over."""

import itertools
import time
from pathlib import Path

import pytest

from bitneck.bundle import Bundle
from bitneck_testing.consumers.browser import BROWSER, browser
from bitneck_testing.photographs import photo
from bitneck_testing.processes import child_process, edge, edge_run, running_server
from bitneck_testing.tiny_bundles import make_tiny_bundle

pytestmark = pytest.mark.skipif(
    None in BROWSER, reason="chromium and chromedriver are not installed (Debian: chromium-driver)"
)

NONE = "\N{EN DASH}"
LINK_UP = "return [...document.querySelectorAll('main tbody tr')].map(row => row.children[7].textContent)"


def test_a_narrow_page_shows_when_a_client_was_seen_and_an_error_that_is_over_is_grey(
    tiny_bundle: Bundle, tmp_path: Path
) -> None:
    config, place = tmp_path / "cloud.toml", tmp_path / "nowhere"
    config.write_text(
        f'sinks_queue = "{tmp_path}/queue.db"\n[[sinks]]\nkind = "jsonl"\nname = "file"\n'
        f'path = "{place}/answers.jsonl"\npause_s = 0.1\nmax_pause_s = 0.1\n'
    )
    picture = tmp_path / "photo.png"
    photo().save(picture)
    with running_server(tiny_bundle.root, options=["--config", str(config)]) as server, browser(width=390) as window:
        done = edge(*edge_run(server.grpc, tmp_path / "cache", "--client", "yard-1", picture)[1:])
        assert done.returncode == 0, done.stderr
        window.open(f"{server.http}/console/#fleet")
        window.until_text("gone", "td")
        window.until_text(" ago", "td")
        right = window.run(
            "return [...document.querySelectorAll('td')].find(cell => cell.textContent.endsWith(' ago'))"
            ".getBoundingClientRect().right"
        )
        assert right <= 390
        window.open(f"{server.http}/console/#server")
        window.until_text("No such file", "span.bad")
        place.mkdir()
        window.until_text("delivers again", "span.quiet")
        assert "No such file" in window.run("return document.querySelector('td span.quiet').textContent")
        assert window.run("return document.querySelectorAll('td span.bad').length") == 0


def test_a_usual_page_shows_whole_tables_and_round_steps(tmp_path: Path) -> None:
    """At 1,280 pixels, with a long name and id. What a slow device sends is shown once it is measured, and is not 0."""
    bundle = make_tiny_bundle(tmp_path / "bundle", name="deeplabv3_efficientnet_lite0")
    client, picture = "north-gate-camera-of-the-yard-17", tmp_path / "photo.png"
    photo().save(picture)
    with running_server(bundle.root) as server, browser(width=1280) as window:
        flags = ("--client", client, "--fps", "0.12", "--repeat", "100000")
        with child_process(edge_run(server.grpc, tmp_path / "cache", *flags, picture)):
            for page in ("answers", "fleet"):
                window.open(f"{server.http}/console/#{page}")
                window.until_text(client, "main tbody")
                over = "const it = document.querySelector('main .scroll'); return it.scrollWidth - it.clientWidth"
                assert window.run(over) <= 0, page
            window.run("location.reload()")
            shown: list[str] = []
            end = time.monotonic() + 60
            while not shown or shown[-1] == NONE:
                shown += window.run(LINK_UP)
                assert time.monotonic() < end
            assert shown[0] == NONE
            assert "0" not in shown
            window.open(f"{server.http}/console/#rates")
            window.until_text("Rules are forgotten when this server ends")
            texts = window.run("return [...document.querySelectorAll('svg.ladder text')].map(it => it.textContent)")
    shares = [int(text.removesuffix(" %")) for text in texts if text.endswith(" %")]
    (step,) = {after - before for before, after in itertools.pairwise(shares)}
    assert step in (1, 2, 5, 10, 20)
    assert shares[0] % step == 0
