"""Tables of the console in a real browser: what a narrow page shows of clients, and errors of sinks that are over."""

from pathlib import Path

import pytest

from bitneck.bundle import Bundle
from bitneck_testing.consumers.browser import BROWSER, browser
from bitneck_testing.photographs import photo
from bitneck_testing.processes import edge, edge_run, running_server

pytestmark = pytest.mark.skipif(
    None in BROWSER, reason="chromium and chromedriver are not installed (Debian: chromium-driver)"
)


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
