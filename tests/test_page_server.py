"""The page's routes over made-up runs, and the server as a process of its own."""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import tether
from page_site import (
    SETTINGS,
    STEER,
    browser,
    make_run,
    post,
    process_of_another_machine,
    record,
    sample,
    site,
)
from tether.config import RunSettings
from tether.control import Control
from tether.errors import RunError
from tether.page import told
from tether.page.ghost import Bank, ghost, reweight
from tether.page.report import responses, write_report
from tether.store import RunStore

ROUTES = ("", "/samples", "/verdict", "/events", "/commands", "/ghost")


def test_the_list_tells_every_run_and_why_one_cannot_be_read(tmp_path: Path) -> None:
    make_run(tmp_path, "one")
    make_run(tmp_path / "sweep", "two", status="finished")
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "run.db").write_bytes(b"no database" * 100)
    told = {run["id"]: run for run in browser(site(tmp_path)).get("/api/runs").json()["runs"]}
    assert {id: run["state"] for id, run in told.items()} == {
        "one": "running", "sweep~two": "finished", "torn": "unreadable",
    }  # fmt: skip
    assert "no database of a run" in told["torn"]["fault"]
    one = told["one"]
    assert (one["updates"], one["steps"], one["beta"], one["model"]) == (6, 100, 0.2, "nano")
    assert one["score"] == pytest.approx(0.25)


@pytest.mark.parametrize("route", ROUTES)
def test_a_run_without_an_update_can_be_looked_at(tmp_path: Path, route: str) -> None:
    make_run(tmp_path, updates=0)
    assert browser(site(tmp_path)).get(f"/api/runs/run{route}").status_code == 200


@pytest.mark.parametrize("route", ROUTES)
def test_a_run_copied_from_another_machine_opens_read_only(tmp_path: Path, route: str) -> None:
    run = make_run(tmp_path)
    with RunStore.open(run, readonly=False) as store:
        process_of_another_machine(store)
    (run / "control.db").unlink()
    client = browser(site(tmp_path))
    assert client.get(f"/api/runs/run{route}").status_code == 200
    assert client.get("/api/runs").json()["runs"][0]["state"] == "stale"


def test_a_run_whose_process_is_gone_is_stale_at_once_and_takes_no_wish(tmp_path: Path) -> None:
    gone = subprocess.Popen(["true"])
    gone.wait()
    run = make_run(tmp_path)
    with RunStore.open(run, readonly=False) as store:
        beat = store.last_heartbeat()
        assert beat is not None
        store.put("heartbeat", {**vars(beat), "process": gone.pid, "wall": time.time()})
    client = browser(site(tmp_path))
    assert client.get("/api/runs").json()["runs"][0]["state"] == "stale"
    answer = post(client, "/api/runs/run/commands", {"kind": "pause"})
    assert (answer.status_code, "process is gone" in answer.json()["error"]) == (409, True)


def test_history_is_thinned_and_says_how_long_it_was(tmp_path: Path) -> None:
    make_run(tmp_path, updates=50)
    client = browser(site(tmp_path))
    told = client.get("/api/runs/run/history", params={"names": "kl/*", "format": "json", "width": 5}).json()
    assert list(told["series"]) == ["kl/mean"]
    curve = told["series"]["kl/mean"]
    assert (curve["of"], curve["steps"][0], curve["steps"][-1]) == (50, 0, 49)
    assert len(curve["steps"]) <= 12
    part = client.get("/api/runs/run/history", params={"names": "beta", "format": "json", "from": 10, "to": 12}).json()
    assert part["series"]["beta"]["steps"] == [10, 11, 12]
    assert client.get("/api/runs/run/history", params={"width": "9" * 30}).status_code == 400
    assert client.get("/api/runs/run/history").content[:4] == b"TTH1"


def test_samples_come_with_the_reference_beside_and_the_price_taken_off(tmp_path: Path) -> None:
    make_run(tmp_path)
    client = browser(site(tmp_path))
    told = client.get("/api/runs/run/samples").json()
    assert (told["step"], told["steps"]) == (3, {"probe": [0, 3], "train": [0, 1, 2, 3, 4, 5]})
    one = next(sample for sample in told["samples"] if sample["row"] == 1)
    assert one["total"] == pytest.approx(2.5 - 0.2 * 3.0)
    assert [token["text"] for token in one["tokens"]] == ["two", " words"]
    assert [token["kl"] for token in one["tokens"]] == pytest.approx([0.5, -0.25])
    assert one["reference"]["score"] == 1.0
    through_time = client.get("/api/runs/run/samples", params={"row": 0}).json()["samples"]
    assert sorted(sample["step"] for sample in through_time) == [0, 3]
    train = client.get("/api/runs/run/samples", params={"split": "train"}).json()["samples"][0]
    assert (train["reference"], [token["advantage"] for token in train["tokens"]]) == (None, [1.0, -1.0])


def test_a_wish_is_pending_until_the_trainer_has_ruled(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    client = browser(site(tmp_path))
    wish = {"kind": "set", "payload": {"beta": 0.1}, "actor": "tab-1", "base": 0}
    number = post(client, "/api/runs/run/commands", wish).json()["id"]
    (told,) = client.get("/api/runs/run/commands").json()["commands"]
    assert (told["id"], told["state"], told["payload"]) == (number, "pending", {"beta": 0.1})
    with RunStore.open(run, readonly=False) as store, store.update(6) as entry:
        entry.applied(number, {"asked": {"ppo.reward.beta": 0.1}, "changes": {"ppo.reward.beta": [0.2, 0.1, 0.1]}})
        entry.event("steered", {"changes": {"ppo.reward.beta": [0.2, 0.1, 0.1]}})
    ledger = client.get("/api/runs/run/commands").json()
    assert (ledger["commands"][0]["state"], ledger["commands"][0]["step"], ledger["steered"]) == ("applied", 6, 1)
    assert "knob: ppo.reward.beta" in client.get("/api/runs/run/schedule.yaml").text
    beta = client.get("/api/runs/run").json()["knobs"][0]
    assert (beta["path"], beta["value"], beta["start"]) == ("ppo.reward.beta", 0.1, 0.2)
    with Control.open(run) as control:
        assert control.commands()[0].expires is not None


def test_runs_that_differ_in_beta_alone_are_a_sweep(tmp_path: Path) -> None:
    for beta in (0.5, 0.1):
        make_run(tmp_path, f"beta-{beta}", status="finished", beta=beta)
    make_run(tmp_path, "live")
    (sweep,) = browser(site(tmp_path)).get("/api/sweeps").json()["sweeps"]
    assert [(point["beta"], point["run"]) for point in sweep["points"]] == [(0.1, "beta-0.1"), (0.5, "beta-0.5")]


def test_a_point_of_a_sweep_counts_from_the_evaluation_before_its_first_update(tmp_path: Path) -> None:
    for beta, asked in ((0.1, {"eval/score": -0.5}), (0.5, {})):
        settings = RunSettings.model_validate(SETTINGS).with_beta(beta).dump()
        with RunStore.create(tmp_path, f"beta-{beta}", settings) as store:
            for step in (0, 1):
                with store.update(step) as entry:
                    entry.metrics((asked if step == 0 else {}) | {"score/mean": 0.25 + step, "kl/mean": float(step)})
            store.heartbeat(1, "recorded", "finished")
    (sweep,) = browser(site(tmp_path)).get("/api/sweeps").json()["sweeps"]
    assert [point["start"] for point in sweep["points"]] == [-0.5, 0.25]


def test_the_lesson_and_the_catalogues_are_served(tmp_path: Path) -> None:
    client = browser(site(tmp_path))
    assert {"exact", "nano", "bandit"} <= client.get("/api/learn").json().keys()
    assert client.get("/api/metrics").json()["kl/mean"]["unit"] == "nats/response"
    assert "why" in client.get("/api/failures").json()["kl_sign"]


def test_the_list_gives_the_verdict_before_anybody_has_asked_for_it(tmp_path: Path) -> None:
    make_run(tmp_path, "one", status="finished")
    client = browser(site(tmp_path))
    listed = client.get("/api/runs").json()["runs"][0]
    assert listed["verdict"] is not None
    assert listed["verdict"] == client.get("/api/runs/one/verdict").json()["verdict"]


def test_the_list_does_not_wait_for_the_verdicts_of_long_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are worked out one after the other, each again only when something happened to its run."""
    monkeypatch.setattr(told, "LONG", 4)
    runs = [make_run(tmp_path, name, status="finished") for name in ("one", "two")]
    page = site(tmp_path)
    client = browser(page)

    def words() -> list[object]:
        return [line["verdict"] for line in client.get("/api/runs").json()["runs"]]

    def catch_up() -> None:
        asyncio.run(told.catch_up(page.library.shelves()))

    assert words() == [None, None]
    catch_up()
    assert sorted(words(), key=str) == ["HOLDING", None]
    catch_up()
    assert words() == ["HOLDING", "HOLDING"]
    for run in runs:
        with RunStore.open(run, readonly=False) as store, store.update(6) as entry:
            entry.metrics({"kl/mean": 1.0, "seconds/checks": 0.1})
            entry.event("kl_sign", {"seen": "", "remedy": ""}, "alarm")
    catch_up()
    catch_up()
    assert words() == ["NOT ATTACHED", "NOT ATTACHED"]


def test_a_folder_that_is_not_there_yet_is_an_empty_list(tmp_path: Path) -> None:
    client = browser(site(tmp_path / "later"))
    assert client.get("/api/runs").json()["runs"] == []
    assert "not built" in client.get("/").text


def test_play_starts_a_run_of_checked_words_alone(tmp_path: Path) -> None:
    page = site(tmp_path, program=(sys.executable, "-c", "import sys; print(sys.argv[1:])"))
    job = post(browser(page), "/api/play", {"beta": 0.5, "steps": 50, "fault": "kl_sign"}).json()
    assert (job["run"], job["kind"]) == ("kl_sign-1", "play")
    assert job["state"] in ("starting", "done")  # the stand-in is done at once
    for _ in range(200):
        (job,) = page.jobs.facts()  # type: ignore[assignment]
        if job["state"] == "done":
            break
        time.sleep(0.05)
    words = (tmp_path / ".page" / "kl_sign-1.log").read_text()
    assert "'--beta', '0.5'" in words
    assert "'--fault', 'kl_sign'" in words


# ── the ghost ───────────────────────────────────────────────────────────────────────────────────────────────────────
def test_the_ghost_of_enumerated_responses_is_the_exact_optimum() -> None:
    """Each response of a uniform reference once: the weights are π* itself, written out here by hand."""
    scores = np.array([[0.0, 1.0, 2.0, -1.0], [0.5, 0.5, -2.0, 1.0]])
    for beta in (0.3, 1.0, 4.0):
        best = np.exp(scores / beta)
        best /= best.sum(axis=1, keepdims=True)
        score, kl, ess = reweight(scores, [beta])
        assert score[0] == pytest.approx((best * scores).sum(1).mean())
        assert kl[0] == pytest.approx((best * np.log(best / 0.25)).sum(1).mean())
        assert ess[0] == pytest.approx((1 / (best**2).sum(1)).mean())


def test_the_ghost_is_faded_where_few_samples_bear_it_and_where_there_are_none() -> None:
    scores = np.random.default_rng(0).normal(size=(16, 64))
    told = ghost(Bank(scores, None, "bank"))
    assert told["solid"][0] is False
    assert told["solid"][-1] is True
    assert all(a >= b - 1e-12 for a, b in zip(told["gain"], told["gain"][1:], strict=False))
    assert not any(ghost(None)["solid"])
    assert ghost(None)["source"] == "gaussian"


def test_a_run_without_a_bank_has_the_ghost_of_its_first_replies_and_never_solid(tmp_path: Path) -> None:
    """Sixteen replies from before the first update, as if of one prompt: their weights are written out by hand."""
    settings = {key: value for key, value in SETTINGS.items() if key != "world"}
    with RunStore.create(tmp_path, "run", settings) as store, store.update(0) as entry:
        for row in range(16):
            entry.sample(sample(0, row, "probe"))
    told = browser(site(tmp_path)).get("/api/runs/run/ghost").json()
    best = np.exp(np.arange(16.0) / told["betas"][100])
    best /= best.sum()
    assert told["source"] == "start"
    assert told["score"][100] == pytest.approx(float(best @ np.arange(16.0)))
    assert told["start"] == pytest.approx(7.5)
    assert told["ess"][-1] > 10
    assert not any(told["solid"])
    assert "one reply to each fixed prompt" in told["caption"]


def test_few_replies_to_a_prompt_give_the_ghost_of_many(tmp_path: Path) -> None:
    """Normal scores, σ 0.5 within prompts that lie 2 apart: at β = 1 a policy can gain σ²/β = 0.25 at 0.125 nats, which
    the choice of a prompt, with σ above 2, would put several times as high.
    """
    rng = np.random.default_rng(0)
    gains, kls = [], []
    for _ in range(200):
        scores = rng.normal(0, 2, (16, 1)) + rng.normal(0, 0.5, (16, 4))
        told = ghost(Bank(scores, None, "bank"), betas=[1.0])
        gains.append(told["gain"][0])
        kls.append(told["kl"][0])
    assert np.mean(gains) == pytest.approx(0.25, rel=0.05)
    assert np.mean(kls) == pytest.approx(0.125, rel=0.1)
    assert (told["source"], told["prompts"], told["samples"], told["solid"]) == ("pooled", 16, 4, [False])
    assert told["best_of"] == []


def test_one_reply_to_a_prompt_is_no_bank() -> None:
    assert ghost(Bank(np.zeros((16, 1)), None, "bank"))["source"] == "start"


def test_the_bank_beside_is_asked_once_what_it_was_drawn_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("drawn", "lone"):
        with RunStore.create(tmp_path, name, SETTINGS) as store:
            store.put("digests", {"reward": "a"})
    (tmp_path / "drawn" / "bank.json").write_text('{"scores": [[0.0, 1.0], [2.0, 5.0]], "gold": null}')
    client, opened = browser(site(tmp_path)), []
    real = RunStore.open
    monkeypatch.setattr(told.RunStore, "open", lambda path, **how: opened.append(path.name) or real(path, **how))
    found = [client.get("/api/runs/lone/ghost").json()["source"] for _ in range(5)]
    assert found == ["bank"] * 5
    assert opened == ["drawn"]


def test_a_run_takes_the_bank_of_one_beside_it_with_the_same_reference_and_of_no_other(tmp_path: Path) -> None:
    """Three runs know their digests; the one with the bank differs from the last in the reward alone."""
    settings = {key: value for key, value in SETTINGS.items() if key != "world"}
    for name, beta, reward in [("drawn", 0.2, "a"), ("same", 0.0, "a"), ("other", 0.2, "b")]:
        told = RunSettings.model_validate(settings).with_beta(beta).dump()
        with RunStore.create(tmp_path, name, told) as store:
            store.put("digests", {"reference": "r", "reward": reward})
    (tmp_path / "drawn" / "bank.json").write_text('{"scores": [[0.0, 1.0], [2.0, 5.0]], "gold": null}')
    client = browser(site(tmp_path))
    found = {name: client.get(f"/api/runs/{name}/ghost").json() for name in ("drawn", "same", "other")}
    assert found["same"] == found["drawn"]
    assert found["same"]["start"] == pytest.approx(2.0)
    assert found["other"]["source"] == "gaussian"


# ── the report ──────────────────────────────────────────────────────────────────────────────────────────────────────
def test_the_report_holds_the_data_and_lets_no_text_out_of_it(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    build = tmp_path / "build"
    build.mkdir()
    (build / "index.html").write_text(
        '<!doctype html><html><head><script type="module" crossorigin src="./page.js"></script>'
        '<link rel="stylesheet" crossorigin href="./page.css"></head><body></body></html>'
    )
    (build / "page.js").write_text('const end = "</script>"; window.x = 1')
    (build / "page.css").write_text("body{margin:0}")
    with RunStore.open(run, readonly=False) as store:
        record(store, 6)
        store.event("noted", {"text": "</script><script>alert(1)</script><!--"})
    text = write_report([run], tmp_path / "report.html", build).read_text("utf-8")
    assert text.count("</script>") == 2
    assert "src=" not in text
    assert "href=" not in text
    block = re.search(r'<script type="application/json" id="tether-data">(.*?)</script>', text)
    assert block is not None
    told = json.loads(block[1])["responses"]
    assert told["api/session"]["read_only"] is True
    assert told["api/runs/run/history"]["series"]["kl/mean"]["values"] == [float(step) for step in range(7)]
    assert told["api/runs/run/events"]["events"][-1]["payload"]["text"].startswith("</script>")
    assert set(told["api/runs/run/samples"]["all"]["probe"]) == {"0", "3", "6"}
    assert "default-src 'none'" in text
    assert "script-src 'sha256-" in text


def test_a_report_of_runs_of_one_name_tells_them_apart_and_says_which_cannot_be_read(tmp_path: Path) -> None:
    folders = [make_run(tmp_path / place, "string", updates=updates) for place, updates in [("a", 3), ("b", 6)]]
    told = responses([*folders, folders[0]])
    runs = told["api/runs"]["runs"]  # type: ignore[index]
    assert [(run["id"], run["updates"]) for run in runs] == [("a~string", 3), ("b~string", 6)]
    assert [len(told[f"api/runs/{run['id']}/history"]["series"]["beta"]["steps"]) for run in runs] == [3, 6]  # type: ignore[index]
    with RunStore.open(folders[1], readonly=False) as store:
        store.put("heartbeat", {"a": 1})
    with pytest.raises(RunError, match="b/string holds what is no run's"):
        responses(folders)


def test_a_report_without_the_built_page_says_how_to_build_it(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="build it once: python"):
        write_report([make_run(tmp_path)], tmp_path / "report.html", tmp_path / "none")


# ── as a process ────────────────────────────────────────────────────────────────────────────────────────────────────
def start(root: Path, cache: Path) -> tuple[subprocess.Popen[str], int]:
    environment = {**os.environ, "PYTHONPATH": str(Path(tether.__file__).parent.parent), "TETHER_CACHE": str(cache)}
    words = [sys.executable, "-m", "tether.cli", "ui", str(root), "--port", "0", "--no-browser", "--token", STEER]
    server = subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert server.stdout is not None
    return server, int(re.findall(r":(\d+)/", server.stdout.readline())[0])


def stop(server: subprocess.Popen[str]) -> str:
    server.send_signal(signal.SIGINT)
    _, told = server.communicate(timeout=30)
    return told


def listen(
    port: int, path: str, last: str | None = None
) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    headers = {"Authorization": f"Bearer {STEER}"} | ({"Last-Event-ID": last} if last else {})
    connection.request("GET", path, headers=headers)
    return connection, connection.getresponse()


def next_of(answer: http.client.HTTPResponse, wanted: str) -> tuple[str, dict]:
    """The next message of this kind: its id and data."""
    message: dict[str, str] = {}
    while True:
        line = answer.readline().decode().rstrip("\r\n")
        if line:
            key, _, value = line.partition(":")
            message[key] = value.strip()
        elif message.get("event") == wanted:
            return message.get("id", ""), json.loads(message["data"])
        else:
            message = {}


def test_a_server_ends_with_open_streams_and_a_new_one_goes_on_where_it_stopped(tmp_path: Path) -> None:
    run = make_run(tmp_path / "runs", updates=2)
    server, port = start(tmp_path / "runs", tmp_path)
    connection, answer = listen(port, "/api/stream?runs=run")
    next_of(answer, "heartbeat")
    with RunStore.open(run, readonly=False) as store:
        record(store, 2)
        cursor, told = next_of(answer, "updates")
        assert told["steps"] == [2]
        begun = time.monotonic()
        assert "the page is closed" in stop(server)
        assert time.monotonic() - begun < 15
        answer.close()
        connection.close()
        record(store, 3)
        record(store, 4)
    server, port = start(tmp_path / "runs", tmp_path)
    connection, answer = listen(port, "/api/stream?runs=run", cursor)
    assert next_of(answer, "updates")[1]["steps"] == [3, 4]
    answer.close()
    connection.close()
    stop(server)
