"""The console in a real browser, against a real server process."""

import contextlib
import json
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from bitneck.bundle import Bundle
from bitneck_cloud.api.http_guard import MAX_PHOTO_BYTES
from bitneck_cloud.console.routes import MOST_PHOTOS
from bitneck_testing.consumers.browser import BROWSER, Browser, browser
from bitneck_testing.photographs import photo, photo_bytes
from bitneck_testing.processes import Server, child_process, edge_run, running_server, wait_for_session

needs_browser = pytest.mark.skipif(
    None in BROWSER, reason="chromium and chromedriver are not installed (Debian: chromium-driver)"
)
PAGES = ("fleet", "rates", "answers", "try", "server")
TOKENS = {role: f"a-token-of-the-role-{role}" for role in ("metrics", "read", "operate")}
HOSTILE = "<img src=x onerror=document.title='broken'>"
MARKED = {"X-Bitneck-Request": "1"}


@pytest.fixture(scope="module")
def open_server(tiny_bundle: Bundle, scene_bundle: Bundle) -> Iterator[Server]:
    """A server on loopback without tokens; photographs may be tried."""
    with running_server(tiny_bundle.root, scene_bundle.root, options=("--try-photos",)) as server:
        yield server


@pytest.fixture(scope="module")
def guarded(tiny_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that asks for tokens."""
    file = tmp_path_factory.mktemp("tokens") / "tokens.txt"
    file.write_text("".join(f"{role} someone {token}\n" for role, token in TOKENS.items()))
    with running_server(tiny_bundle.root, options=("--http-tokens", str(file))) as server:
        yield server


@pytest.fixture(scope="module")
def window() -> Iterator[Browser]:
    with browser() as opened:
        yield opened


@pytest.fixture
def sender(open_server: Server, tmp_path: Path) -> Iterator[str]:
    """A device with a hostile name that sends ten frames a second; the id of its session."""
    picture = tmp_path / "photo.png"
    photo().save(picture)
    command = edge_run(
        open_server.grpc, tmp_path / "cache", "--client", HOSTILE, "--model", "tiny", "--point", "s1-r1", "--fps", "10",
        "--repeat", "100000", picture,
    )  # fmt: skip
    with child_process(command):
        yield wait_for_session(open_server, HOSTILE)


def sign_in(window: Browser, server: Server, role: str, page: str = "fleet") -> None:
    window.open(f"{server.http}/console/")
    window.run("sessionStorage.clear(); location.hash = arguments[0]; location.reload()", page)
    window.labelled("Token").send_keys(TOKENS[role])
    window.button("Sign in").click()


def session(server: Server, identity: str) -> dict[str, Any]:
    found: dict[str, Any] = httpx.get(f"{server.http}/v1/sessions/{identity}").json()
    return found


# Pages


def test_the_pages_are_small_and_of_this_server_alone(open_server: Server) -> None:
    with httpx.Client(base_url=open_server.http) as http:
        assert http.get("/console", follow_redirects=True).url.path == "/console/"
        page = http.get("/console/")
        assert "default-src 'none'" in page.headers["content-security-policy"]
        assert "unsafe-inline" not in page.headers["content-security-policy"]
        folder = Path(__file__).parent.parent / "cloud" / "bitneck_cloud" / "console" / "static"
        sizes = {
            file.name: len(http.get(f"/console/{file.name}").raise_for_status().content) for file in folder.iterdir()
        }
        assert sum(sizes.values()) < 300_000
        again = http.get(
            "/console/console.js", headers={"If-None-Match": http.get("/console/console.js").headers["etag"]}
        )
        assert again.status_code == 304
        for name in ("nothing.js", "../pages.py", "%2e%2e/pages.py", "..%2fpages.py"):
            assert http.get(f"/console/{name}").status_code == 404, name


def test_the_pages_need_no_token_and_everything_that_they_ask_for_does(guarded: Server) -> None:
    with httpx.Client(base_url=guarded.http) as http:
        assert http.get("/console/").status_code == 200
        assert http.get("/console/api.html").status_code == 200
        for path in ("/v1/whoami", "/v1/server", "/v1/audit", "/openapi.json", "/docs"):
            assert http.get(path).status_code == 401, path
            read = http.get(path, headers={"Authorization": f"Bearer {TOKENS['read']}"}, follow_redirects=True)
            assert read.status_code == 200, path
        whoami = http.get("/v1/whoami", headers={"Authorization": f"Bearer {TOKENS['read']}"}).json()
        assert whoami == {"role": "read", "name": "someone", "token_needed": True}


def test_the_audit_says_who_changed_what(open_server: Server) -> None:
    with httpx.Client(base_url=open_server.http) as http:
        http.put("/v1/rate", json={"point": "s1-r2", "model": "tiny"}).raise_for_status()
        http.put("/v1/rate", json={"auto": True, "model": "tiny"}).raise_for_status()
        newest = http.get("/v1/audit").json()[0]
        assert newest["action"] == "PUT rate"
        assert json.loads(newest["before"]) == {"point": "s1-r2"}
        assert json.loads(newest["after"]) == {"auto": True}
        assert "127.0.0.1" in newest["who"]
        assert abs(newest["unix_s"] - time.time()) < 60


# Photographs to try


@pytest.mark.parametrize("model", ["tiny", "scene"])
def test_a_photograph_is_tried_at_every_point(open_server: Server, model: str) -> None:
    with httpx.Client(base_url=open_server.http, headers=MARKED, timeout=60) as http:
        trial = http.post(f"/v1/models/{model}/try", content=photo_bytes(3)).raise_for_status().json()
        ladder = http.get(f"/v1/models/{model}").json()["points"]
    assert [point["id"] for point in trial["points"]] == [point["id"] for point in ladder]
    assert trial["uncompressed"]["agreement"] == 1
    smallest = min(jpeg["bytes"] for jpeg in trial["jpegs"])
    for point in trial["points"]:
        assert point["payload_bytes"] > 0
        assert 0 <= point["answer"]["agreement"] <= 1
        jpeg = trial["jpegs"][point["jpeg"]]
        assert jpeg["bytes"] <= max(point["payload_bytes"], smallest)
        assert (point["answer"]["map"] is None) == (model == "tiny")


def test_what_is_no_photograph_is_refused_and_the_next_one_is_tried(open_server: Server) -> None:
    with httpx.Client(base_url=open_server.http, headers=MARKED, timeout=60) as http:
        bad = http.post("/v1/models/tiny/try", content=b"no photograph")
        assert (bad.status_code, bad.json()["title"]) == (400, "ImageError")
        assert http.post("/v1/models/nothing/try", content=photo_bytes()).status_code == 404
        large = http.post("/v1/models/tiny/try", content=bytes(MAX_PHOTO_BYTES + 1))
        assert large.status_code == 413
        assert http.put("/v1/rate", content=bytes(20_000)).status_code == 413  # elsewhere bodies stay small
        assert http.post("/v1/models/tiny/try", content=photo_bytes()).status_code == 200


def test_a_photograph_that_does_not_arrive_keeps_no_other_one_waiting(open_server: Server) -> None:
    host, port = open_server.http.removeprefix("http://").split(":")
    head = f"POST /v1/models/tiny/try HTTP/1.1\r\nHost: {host}\r\nX-Bitneck-Request: 1\r\nContent-Length: 1000\r\n\r\n"
    with contextlib.ExitStack() as slow, httpx.Client(base_url=open_server.http, headers=MARKED, timeout=60) as http:
        for number in range(1, MOST_PHOTOS + 1):
            tried = http.post("/v1/models/tiny/try", content=photo_bytes(3))
            assert tried.status_code == 200, f"with {number - 1} that do not arrive: {tried.text}"
            connection = slow.enter_context(socket.create_connection((host, int(port))))
            connection.sendall(head.encode() + b"half of it")
            time.sleep(0.2)
        tried = http.post("/v1/models/tiny/try", content=photo_bytes(3))
        assert (tried.status_code, tried.json()["title"]) == (429, "Overloaded")


def test_one_photograph_is_tried_at_once(open_server: Server) -> None:
    def status(_: int) -> int:
        tried = httpx.post(f"{open_server.http}/v1/models/tiny/try", content=photo_bytes(3), headers=MARKED, timeout=60)
        return tried.status_code

    with ThreadPoolExecutor(3) as pool:
        found = set(pool.map(status, range(3)))
    assert 200 in found
    assert found <= {200, 429}


def test_photographs_are_tried_by_operators_only_and_where_it_is_allowed(guarded: Server) -> None:
    with httpx.Client(base_url=guarded.http) as http:
        for role, status in (("read", 403), ("operate", 403)):
            headers = {"Authorization": f"Bearer {TOKENS[role]}"}
            tried = http.post("/v1/models/tiny/try", content=photo_bytes(), headers=headers)
            assert tried.status_code == status
            assert ("--try-photos" in tried.json()["detail"]) == (role == "operate")


# In the browser


@needs_browser
def test_signing_in_takes_a_role_that_may_read(guarded: Server, window: Browser) -> None:
    window.open(f"{guarded.http}/console/")
    window.run("sessionStorage.clear(); location.reload()")
    window.labelled("Token").send_keys("a-token-that-nobody-has")
    window.button("Sign in").click()
    window.until_text("does not know this token")
    sign_in(window, guarded, "metrics")
    window.until_text("a token of the role metrics may not do this")
    sign_in(window, guarded, "read", "rates")
    window.until_text("read someone")
    assert not window.button("Set the rate").is_enabled()
    window.open(f"{guarded.http}/console/#server")
    window.until_text("Models", "caption")
    assert not window.driver.find_elements("xpath", "//button[text()='Reload']")
    window.button("Sign out").click()
    window.labelled("Token")
    assert window.run("return sessionStorage.length") == 0
    assert "token" not in window.driver.current_url


@needs_browser
def test_a_rate_is_changed_and_the_frames_sizes_change(open_server: Server, window: Browser, sender: str) -> None:
    httpx.put(f"{open_server.http}/v1/sessions/{sender}/rate", json={"point": "s1-r1"}).raise_for_status()
    window.open(f"{open_server.http}/console/#fleet")
    window.until_text(HOSTILE, "tbody")  # as text
    window.until_text("s1-r1", "tbody")
    before = session(open_server, sender)["payload_bytes_mean"]
    window.open(f"{open_server.http}/console/#rates")
    point = window.labelled("Point")
    window.find_by("//select/option[starts-with(., 's2-r1')]")
    point.find_element("xpath", "./option[starts-with(., 's2-r1')]").click()
    names = window.labelled("Names")
    names.clear()
    names.send_keys("<img*")
    window.button("Set the rate").click()
    window.until_text("1 told")
    window.open(f"{open_server.http}/console/#fleet")
    window.until_text("s2-r1", "tbody")
    time.sleep(1.0)
    after = session(open_server, sender)
    assert after["point_last_used"] == "s2-r1"
    assert after["payload_bytes_mean"] != before
    assert "broken" not in window.driver.title
    httpx.delete(
        f"{open_server.http}/v1/rate", params={"clients": "<img*", "model": "tiny"}, headers=MARKED
    ).raise_for_status()


@needs_browser
def test_answers_come_live(open_server: Server, window: Browser, sender: str) -> None:
    assert sender
    window.open(f"{open_server.http}/console/#answers")
    window.until_text(HOSTILE, "tbody")
    window.until_text("answers since this page was opened")
    window.button("Pause").click()
    window.button("Go on")
    assert window.origins() == {open_server.http}


@needs_browser
def test_a_photograph_is_tried_in_the_browser(open_server: Server, window: Browser, tmp_path: Path) -> None:
    file = tmp_path / "mine.png"
    photo(5, (300, 200)).save(file)
    window.errors()  # of the tests before, which were refused on purpose
    window.open(f"{open_server.http}/console/#try")
    window.find("input[type=file]").send_keys(str(file))
    window.until_text("Every point", "caption")
    window.find("input[type=range]")
    assert window.errors() == []


@needs_browser
@pytest.mark.parametrize("dark", [False, True])
def test_nothing_serious_stands_in_the_way_of_anyone(open_server: Server, sender: str, dark: bool) -> None:
    from axe_core_python.selenium import Axe

    assert sender
    with browser(390, 800, dark=dark) as phone:
        for page in PAGES:
            phone.open(f"{open_server.http}/console/#{page}")
            phone.find("main h1")
            if page in ("fleet", "rates", "answers"):
                phone.until_text("s1-r1", "main")
            found = Axe().run(phone.driver)["violations"]
            serious = [
                (each["id"], each["nodes"][0]["html"]) for each in found if each["impact"] in ("serious", "critical")
            ]
            assert serious == [], page
            wide = phone.run("return document.documentElement.scrollWidth - document.documentElement.clientWidth")
            assert wide <= 0, f"{page} is wider than a phone"
        assert phone.origins() == {open_server.http}


@needs_browser
def test_the_description_of_the_api_comes_from_this_server(open_server: Server, window: Browser) -> None:
    window.open(f"{open_server.http}/docs")
    window.until_text("/v1/sessions")
    assert window.origins() == {open_server.http}
    assert window.errors() == []


def test_a_misspelt_query_parameter_is_refused(open_server: Server) -> None:
    with httpx.Client(base_url=open_server.http, headers=MARKED) as http:
        for method, path in (
            ("DELETE", "/v1/rate?client=cam-9"),
            ("GET", "/v1/answers?clients=x"),
            ("GET", "/v1/models?x=1"),
        ):
            answer = http.request(method, path)
            assert answer.status_code == 400, path
            assert "has no query parameter" in answer.json()["detail"]
        assert "clients" in http.request("DELETE", "/v1/rate?client=cam-9").json()["detail"]
        assert http.get("/v1/clients?client=x&limit=1").status_code == 200
