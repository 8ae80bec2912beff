"""Who may do what: each attack on the page, and what it gets."""

from __future__ import annotations

import asyncio
import json
import sqlite3
import stat
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from page_site import HOME, ORIGIN, STEER, VIEW, browser, make_run, post, record, sample, site
from tether.control import Control
from tether.errors import ConfigError
from tether.page.library import Library
from tether.page.reading import Cursor
from tether.page.security import LARGEST_BODY, Bucket
from tether.page.server import check_host, tokens_of
from tether.page.stream import Stream
from tether.store import RunStore

BEARER = {"Authorization": f"Bearer {STEER}"}
SET = {"kind": "set", "payload": {"beta": 0.1}}
WISH = "/api/runs/run/commands"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    make_run(tmp_path)
    return tmp_path


def asked(root: Path) -> int:
    with Control.open(root / "run") as control:
        return len(control.commands())


READABLE = (
    "/", "/api/session", "/api/runs", "/api/runs/run", "/api/runs/run/history", "/api/runs/run/samples",
    "/api/runs/run/commands", "/api/learn", "/api/metrics", "/api/jobs", "/api/stream", "/page.js",
)  # fmt: skip


@pytest.mark.parametrize("path", READABLE)
def test_nothing_is_said_without_a_token(root: Path, path: str) -> None:
    answer = browser(site(root), token=None).get(path)
    assert answer.status_code == 401
    assert "run" not in answer.json().get("runs", "")


@pytest.mark.parametrize("token", ["", "x", STEER[:-1], STEER + "x", "Bearer", "é"])
def test_a_wrong_token_is_no_token(root: Path, token: str) -> None:
    client = browser(site(root), token=None)
    assert client.get("/", params={"token": token}).status_code == 401
    assert client.get("/api/runs", headers={"Authorization": f"Bearer {token}".encode()}).status_code == 401
    assert client.get("/api/runs", headers={"Cookie": f"tether-8765={token}".encode()}).status_code == 401
    assert "set-cookie" not in client.get("/", params={"token": token}).headers


def test_the_printed_address_becomes_a_cookie_that_no_script_and_no_other_site_has(root: Path) -> None:
    answer = browser(site(root), token=None).get("/", params={"token": VIEW})
    cookie = answer.headers["set-cookie"]
    assert cookie.startswith(f"tether-8765={VIEW};")
    assert {"HttpOnly", "SameSite=Strict", "Path=/"} <= {part.strip() for part in cookie.split(";")}


def test_a_token_in_the_address_of_any_other_route_opens_nothing(root: Path) -> None:
    assert browser(site(root), token=None).get("/api/runs", params={"token": STEER}).status_code == 401


@pytest.mark.parametrize(
    "other", ['settings={"a": 1}', "no pair at all", "two words=1", 'x="a b"c', "tether-8765=junk"]
)
def test_what_other_programs_of_this_machine_keep_in_its_cookie_jar_locks_nobody_out(root: Path, other: str) -> None:
    """A jar is shared by all ports of a host, whatever stands on them."""
    client = browser(site(root), None)
    for jar in (f"{other}; tether-8765={VIEW}", f"tether-8765={VIEW}; {other}"):
        assert client.get("/api/runs", headers={"Cookie": jar}).status_code == 200
    assert client.get("/api/runs", headers={"Cookie": other}).status_code == 401


def test_the_view_token_looks_and_does_not_steer(root: Path) -> None:
    client = browser(site(root), VIEW)
    assert client.get("/api/runs").status_code == 200
    assert client.get("/api/session").json()["may_steer"] is False
    for path in (WISH, "/api/play", "/api/runs/run/fork", "/api/runs/run/resume"):
        assert post(client, path, SET).status_code == 403
    assert asked(root) == 0
    assert post(browser(site(root)), WISH, SET).status_code == 202
    assert asked(root) == 1


@pytest.mark.parametrize(
    "host", ["evil.example", "127.0.0.1.evil.example", "evil.example:8765", "", "localhost.evil.example", "[::2]"]
)
def test_a_name_that_was_rebound_to_this_machine_is_refused(root: Path, host: str) -> None:
    answer = browser(site(root)).get("/api/runs", headers={"Host": host})
    assert answer.status_code == 403


@pytest.mark.parametrize("host", ["127.0.0.1:8765", "localhost", "localhost:9000", "[::1]:8765"])
def test_this_machine_may_be_called_by_its_own_names(root: Path, host: str) -> None:
    assert browser(site(root), None).get("/api/runs", headers={"Host": host, **BEARER}).status_code == 200


@pytest.mark.parametrize(
    "origin",
    [
        "http://evil.example",
        "null",
        "http://127.0.0.1:9999",
        "https://127.0.0.1.evil.example:8765",
        "http://",
        "http://[",
    ],
)
def test_a_foreign_origin_does_not_steer(root: Path, origin: str) -> None:
    client = browser(site(root))
    assert post(client, WISH, SET, {"Origin": origin}).status_code == 403
    assert post(client, WISH, SET, {"Origin": origin, **BEARER}).status_code == 403
    assert asked(root) == 0


def test_a_form_of_another_site_which_sends_no_origin_does_not_steer(root: Path) -> None:
    client = browser(site(root))
    headers = {"Content-Type": "application/json"}
    assert client.post(WISH, content=json.dumps(SET), headers=headers).status_code == 403
    assert client.post(WISH, content=json.dumps(SET), headers={**headers, **BEARER}).status_code == 202  # a program


def test_a_page_of_another_site_reads_nothing_but_may_link_here(root: Path) -> None:
    client = browser(site(root))
    foreign = {"Sec-Fetch-Site": "cross-site"}
    assert client.get("/api/runs", headers=foreign).status_code == 403
    assert client.get("/page.js", headers={**foreign, "Sec-Fetch-Mode": "no-cors"}).status_code == 403
    visit = {**foreign, "Sec-Fetch-Mode": "navigate"}
    assert client.get("/", params={"token": VIEW}, headers=visit).status_code == 200


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""])
def test_only_json_steers(root: Path, kind: str) -> None:
    assert post(browser(site(root)), WISH, SET, {"Content-Type": kind}).status_code == 415
    assert asked(root) == 0


def test_a_large_body_is_refused_whatever_it_says_of_its_length(root: Path) -> None:
    client = browser(site(root))
    headers = {**ORIGIN, "Content-Type": "application/json"}
    assert client.post(WISH, content=b"x" * (LARGEST_BODY + 1), headers=headers).status_code == 413
    pieces = (b"x" * 1000 for _ in range(100))  # no Content-Length at all
    assert client.post(WISH, content=pieces, headers=headers).status_code == 413
    assert asked(root) == 0


@pytest.mark.parametrize("body", [b"", b"[", b"[]", b'"x"', b"[" * 10_000, b"\xff\xfe", b"NaN"])
def test_what_is_no_json_object_is_refused(root: Path, body: bytes) -> None:
    headers = {**ORIGIN, "Content-Type": "application/json"}
    assert browser(site(root)).post(WISH, content=body, headers=headers).status_code == 400


def test_a_flood_of_wishes_is_told_to_wait(root: Path) -> None:
    client = browser(site(root, rate=10.0, burst=30.0, clock=lambda: 7.0))  # all of it in one moment
    answers = [post(client, WISH, SET) for _ in range(50)]
    codes = [answer.status_code for answer in answers]
    assert codes == [202] * 30 + [429] * 20
    assert answers[-1].json()["retry_seconds"] == 0.1
    assert asked(root) == codes.count(202)
    assert client.get("/api/runs").status_code == 200  # looking goes on


def test_no_more_wishes_wait_than_a_trainer_can_answer(root: Path) -> None:
    client = browser(site(root))
    codes = [post(client, WISH, SET).status_code for _ in range(203)]
    assert codes == [202] * 200 + [429] * 3


@pytest.mark.parametrize(
    "wish",
    [
        {"kind": "set", "payload": {"model.source": "/etc/passwd"}},
        {"kind": "set", "payload": {"reward": "evil.py:score"}},
        {"kind": "set", "payload": {"data.prompts": "../../secret"}},
        {"kind": "set", "payload": {"beta": "__import__('os').system('true')"}},
        {"kind": "set", "payload": {"seed": 1}},
        {"kind": "exec", "payload": {"code": "1"}},
        {"kind": "set", "payload": {"beta": 0.1}, "path": "/tmp"},
        {"kind": "set", "payload": {"beta": 0.1}, "actor": "<img src=x onerror=alert(1)>"},
        {"kind": "set", "payload": "beta=0.1"},
        {"kind": ["set"], "payload": {"beta": 0.1}},
        {"kind": "set", "payload": {"beta": 0.1}, "base": "x"},
    ],
)
def test_a_wish_with_a_path_or_a_code_is_refused_before_it_is_written(root: Path, wish: object) -> None:
    answer = post(browser(site(root)), WISH, wish)
    assert answer.status_code == 400
    assert answer.json()["error"]
    assert asked(root) == 0


@pytest.mark.parametrize(
    ("path", "wish"),
    [
        ("/api/play", {"fault": "../../bin/sh"}),
        ("/api/play", {"name": "../escape"}),
        ("/api/play", {"name": "--root=/tmp"}),
        ("/api/play", {"steps": "1; rm -rf /"}),
        ("/api/play", {"steps": 10**9}),
        ("/api/play", {"beta": -1}),
        ("/api/play", {"recipe": "evil.yaml"}),
        ("/api/runs/run/fork", {"name": "/tmp/x", "step": 0}),
        ("/api/runs/run/fork", {"name": "x", "step": "../0"}),
        ("/api/runs/run/fork", {"step": 0}),
    ],
)
def test_no_process_is_started_from_what_is_no_number_or_name(root: Path, path: str, wish: object) -> None:
    page = site(root, program=("false",))
    answer = post(browser(page), path, wish)
    assert answer.status_code == 400
    assert page.jobs.facts() == []


@pytest.mark.parametrize("id", ["..", "..%2f..%2fetc", "%2e%2e", "~", "..~..", "run~..", "%00", "run%2f.."])
def test_an_id_is_no_path(root: Path, id: str) -> None:
    assert browser(site(root / "inner")).get(f"/api/runs/{id}").status_code == 404


@pytest.mark.parametrize("name", ["..%2f..%2fpyproject.toml", "%2fetc%2fpasswd", "run.db", "sub%2fpage.js"])
def test_a_file_of_the_page_is_one_of_the_build(root: Path, name: str) -> None:
    build = root / "build"
    build.mkdir()
    (build / "page.js").write_text("1")
    client = browser(site(root, static=build))
    assert client.get(f"/{name}").status_code == 404
    assert client.get("/page.js").text == "1"


def test_what_a_model_wrote_is_data_and_the_page_may_run_no_inline_script(root: Path) -> None:
    script = "<script>alert(document.cookie)</script><img src=x onerror=alert(1)>"
    with RunStore.open(root / "run", readonly=False) as store, store.update(7) as entry:
        entry.sample(sample(7, 0, "train", script))
    answer = browser(site(root)).get("/api/runs/run/samples", params={"split": "train", "step": 7})
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.json()["samples"][0]["response"] == script


@pytest.mark.parametrize("path", ["/", "/api/runs", "/nowhere", "/api/runs/none"])
def test_every_answer_carries_the_policy_and_no_answer_lets_other_sites_read(root: Path, path: str) -> None:
    client = browser(site(root))
    for headers in ({}, {"Origin": "http://evil.example"}):
        answer = client.get(path, headers=headers)
        policy = answer.headers["content-security-policy"]
        assert "default-src 'self'" in policy
        assert "frame-ancestors 'none'" in policy
        assert "unsafe" not in policy
        assert answer.headers["referrer-policy"] == "no-referrer"
        assert not [name for name in answer.headers if name.startswith("access-control")]


def test_a_preflight_of_another_site_is_refused(root: Path) -> None:
    answer = browser(site(root)).options(WISH, headers={"Origin": "http://evil.example"})
    assert answer.status_code == 405
    assert not [name for name in answer.headers if name.startswith("access-control")]


def test_beyond_this_machine_a_token_of_ones_own_is_wanted() -> None:
    for host in ("0.0.0.0", "::", "192.168.1.2", "box.example"):
        with pytest.raises(ConfigError, match="choose a token"):
            check_host(host, None)
        check_host(host, "a-token-of-my-own-42")
    with pytest.raises(ConfigError, match="at least 16"):
        check_host("0.0.0.0", "short")
    for host in ("127.0.0.1", "localhost", "::1"):
        check_host(host, None)


def test_tokens_are_kept_where_only_their_owner_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TETHER_CACHE", str(tmp_path))
    first = tokens_of(9, None, None)
    file = tmp_path / "page" / "9.json"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert first == tokens_of(9, None, None)
    assert first != tokens_of(10, None, None)
    assert first[0] != first[1]
    assert min(map(len, first)) >= 32
    file.chmod(0o644)  # somebody may have read it
    assert not set(tokens_of(9, None, None)) & set(first)
    assert tokens_of(9, "mine-mine-mine-mine", "look-look-look-look") == ("mine-mine-mine-mine", "look-look-look-look")


def test_a_bucket_refills_with_time() -> None:
    now = [0.0]
    bucket = Bucket(rate=2.0, burst=3.0, clock=lambda: now[0])
    assert [bucket.take() for _ in range(4)] == [0.0, 0.0, 0.0, 0.5]
    now[0] = 0.5
    assert bucket.take() == 0.0
    now[0] = 100.0
    assert [bucket.take() == 0.0 for _ in range(4)] == [True, True, True, False]


def test_a_page_below_a_prefix_keeps_its_cookie_there(root: Path) -> None:
    client = TestClient(site(root).app(), base_url=HOME, root_path="/lab")
    answer = client.get("/lab/", params={"token": VIEW})
    assert answer.status_code == 200
    assert "Path=/lab/" in answer.headers["set-cookie"]
    assert client.get("/lab/api/runs").json()["runs"][0]["id"] == "run"


def test_a_run_that_is_over_takes_no_wish(root: Path) -> None:
    make_run(root, "done", status="finished")
    answer = post(browser(site(root)), "/api/runs/done/commands", SET)
    assert answer.status_code == 409
    assert "finished" in answer.json()["error"]


def test_recording_helpers_make_a_run_that_can_be_read(root: Path) -> None:
    with RunStore.open(root / "run", readonly=False) as store:
        record(store, 6)
        assert store.last_step() == 6


# ── a run that somebody else made ───────────────────────────────────────────────────────────────────────────────────
STRANGE_ROWS = {
    "a created that is no moment": "UPDATE meta SET json = '\"<b>\"' WHERE key = 'created'",
    "a meta that is no JSON": "UPDATE meta SET json = '{' WHERE key = 'config'",
    "a heartbeat of another kind": "UPDATE meta SET json = '{\"a\": 1}' WHERE key = 'heartbeat'",
    "an event that is no JSON": "UPDATE event SET payload = '{'",
    "JSON without a bottom": f"UPDATE meta SET json = '{'[' * 100_000}' WHERE key = 'config'",
    "text where a number is due": "UPDATE metric SET value = 'x'",
}
ROUTES = ("", "/history", "/samples", "/verdict", "/events", "/commands", "/ghost", "/schedule.yaml")


@pytest.mark.parametrize("sql", STRANGE_ROWS.values(), ids=STRANGE_ROWS.keys())
def test_a_made_up_run_is_told_of_and_spoils_no_other(root: Path, sql: str) -> None:
    make_run(root, "evil")
    with sqlite3.connect(root / "evil" / "run.db") as file:
        file.execute(sql)
    client = browser(site(root))
    told = {run["id"]: run["state"] for run in client.get("/api/runs").json()["runs"]}
    assert told["run"] == "running"
    assert "evil" in told
    assert client.get("/api/sweeps").status_code == 200
    for route in ROUTES:
        answer = client.get(f"/api/runs/evil{route}")
        assert answer.status_code in (200, 409), (route, answer.text)


STRANGE_BANKS = ('{"scores": {"a": 1}}', '{"scores": [[1, 2], [3]]}', '{"scores": [[1.0]], "gold": [[1.0, 2.0]]}',
                 "[" * 100_000, '{"scores": [["x"]]}', "null")  # fmt: skip


@pytest.mark.parametrize("text", STRANGE_BANKS, ids=range(len(STRANGE_BANKS)))
def test_a_made_up_bank_is_none(root: Path, text: str) -> None:
    (root / "run" / "bank.json").write_text(text)
    assert browser(site(root)).get("/api/runs/run/ghost").json()["source"] != "bank"


def test_a_bank_that_never_ends_is_not_read(root: Path) -> None:
    (root / "run" / "bank.json").symlink_to("/dev/zero")
    assert browser(site(root)).get("/api/runs/run/ghost").json()["source"] != "bank"


def test_half_a_surrogate_pair_ends_no_stream(root: Path) -> None:
    with sqlite3.connect(root / "run" / "run.db") as file:
        file.execute(
            "INSERT INTO event (wall, kind, severity, payload) VALUES (0, 'noted', 'info', '{\"text\": \"\\ud800\"}')"
        )

    async def listen() -> str:
        library = Library(root)
        async for sent in Stream(library, await library.scan(), {"run": Cursor()}, lambda: (0, [])).messages():
            if sent.event == "events" and "noted" in str(sent.data):
                return sent.encode().decode()
        return ""

    assert '"text":"?"' in asyncio.run(listen())


def test_no_more_tabs_listen_than_a_server_can_serve(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tether.page.app.MOST_STREAMS", 1)
    page = site(root)
    client = browser(page)

    async def listen() -> list[int]:
        heard = page.heard(Stream(page.library, [], {}, lambda: (0, [])))
        await anext(heard)
        told = [page.streams, client.get("/api/stream").status_code]
        await heard.aclose()
        return [*told, page.streams]

    assert asyncio.run(listen()) == [1, 503, 0]
