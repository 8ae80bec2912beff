"""Runs in the terminal: every number with its unit, in 80 columns, for people and for programs."""

from __future__ import annotations

import io
import json
import math
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tether.errors import RunError
from tether.metrics import CATALOGUE
from tether.records import Curve, Heartbeat
from tether.runs import crew_of, describe_run, find_run, knob, list_runs, status, summarise_metric
from tether.runs_command import MAIN, main_runs, main_show
from tether.store import RunStore
from tether.terminal import SPARKS, short, short_time, sparkline

CONFIG = {"world": "nano", "ppo": {"steps": 40, "reward": {"beta": 0.05}}}


def make_run(root: Path, name: str, *, created: float = 1000.0, updates: int = 20) -> None:
    """A run whose score is step, whose KL is step², with one loss that was not a number."""
    with RunStore.create(root, name, CONFIG, clock=lambda: created) as store:
        for step in range(updates):
            with store.update(step) as update:
                update.metrics({"score/mean": step, "kl/mean": step**2, "beta": 0.05, "ppo/clip_fraction": 0.5})
                update.metrics({"loss/policy": math.nan if step == 7 else 0.25})
        store.heartbeat(updates - 1, "done", "finished")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("runs")
    make_run(root, "string", created=1000.0)
    make_run(root, "cut", created=3000.0, updates=0)
    make_run(root / "sweep", "beta=0.2", created=2000.0, updates=3)
    return root


@pytest.fixture
def root(made: Path, tmp_path: Path) -> Path:
    """A copy of three runs, one of them below `sweep`, that a test may change."""
    return Path(shutil.copytree(made, tmp_path / "runs"))


# ── finding ─────────────────────────────────────────────────────────────────────────────────────────────────────────
def test_runs_are_listed_with_those_of_a_sweep_the_newest_first(root: Path) -> None:
    summaries = list_runs(root)
    assert [one.name for one in summaries] == ["cut", "sweep/beta=0.2", "string"]
    told = summaries[-1]
    assert (told.status, told.model, told.beta, told.updates, told.steps) == ("finished", "nano", 0.05, 20, 40)
    assert told.score == pytest.approx(np.mean(range(10, 20)))
    assert told.kl == pytest.approx(np.mean([step**2 for step in range(10, 20)]))
    assert (summaries[0].updates, summaries[0].score, summaries[0].beta) == (0, None, 0.05)


def test_a_torn_run_does_not_hide_the_others(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (root / "torn").mkdir()
    (root / "torn" / "run.db").write_text("no database")
    assert [one.name for one in list_runs(root)] == ["cut", "sweep/beta=0.2", "string", "torn"]
    main_runs(root)
    out = capsys.readouterr().out
    assert re.search(r"torn +– +0 +– +– unreadable", out)
    assert "no database of a run, or is damaged" in " ".join(out.split())


def test_no_runs_is_said_with_what_to_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main_runs(tmp_path / "nowhere")
    assert "start one: tether train" in " ".join(capsys.readouterr().out.split())
    main_runs(tmp_path / "nowhere", json=True)
    assert json.loads(capsys.readouterr().out)["runs"] == []


def test_a_run_is_found_by_name_and_by_path(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_run("string", root) == root / "string"
    assert find_run("sweep/beta=0.2", root) == root / "sweep" / "beta=0.2"
    assert find_run(str(root / "cut"), "elsewhere") == root / "cut"
    monkeypatch.chdir(root.parent)
    assert find_run("runs/cut", "elsewhere") == Path("runs/cut")


def test_a_run_that_is_not_there_is_refused_with_those_that_are(root: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"no run 'strng' in .*cut, string, sweep/beta=0\.2; did you mean 'string'\?"):
        find_run("strng", root)
    with pytest.raises(RunError, match="it holds no run"):
        find_run("x", tmp_path / "nowhere")


# ── describing ──────────────────────────────────────────────────────────────────────────────────────────────────────
def test_a_metric_is_summed_up_by_first_last_extremes_and_the_mean_of_ten() -> None:
    values = np.array([3.0, np.nan, -1.0, *range(12)])
    told = summarise_metric("kl/mean", Curve(np.arange(15), values))
    assert (told.unit, told.first, told.last, told.min, told.max, told.count) == ("nats/response", 3, 11, -1, 11, 15)
    assert told.mean_of_last == sum(range(2, 12)) / 10
    nothing = summarise_metric("kl/mean", Curve(np.arange(2), np.array([np.nan, np.nan])))
    assert (nothing.first, nothing.last, nothing.min, nothing.mean_of_last) == (None, None, None, None)
    ended = summarise_metric("kl/mean", Curve(np.arange(2), np.array([1.0, np.nan])))
    assert (ended.first, ended.last, ended.max) == (1.0, None, 1.0), "a run that ends in NaN says so"


def test_a_running_run_that_fell_silent_says_for_how_long() -> None:
    beat = Heartbeat(wall=1000.0, step=3, phase="update", status="running", process=1, host="h")
    over = Heartbeat(wall=1000.0, step=3, phase="done", status="finished", process=1, host="h")
    assert status(beat, 1030.0) == "running"
    assert status(beat, 1180.0) == "silent for 3 min"
    assert status(over, 1e9) == "finished"
    assert status(None, 0.0) == "not started"


def test_settings_are_found_wherever_they_stand() -> None:
    config = {"name": "x", "ppo": {"beta": None, "reward": {"beta": 0.0}}, "policy": "p", "deep": {"policy": "q"}}
    assert knob(config, "beta") == 0.0
    assert knob(config, "world", "policy") == "p"
    assert knob(config, "nothing") is None
    assert knob(None, "beta") is None


# ── printing ────────────────────────────────────────────────────────────────────────────────────────────────────────
def test_show_tells_each_main_metric_with_unit_and_curve(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main_show("string", root)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "string · nano · β 0.05 · 20/40 updates · finished"
    table = {line.split()[0]: line.split() for line in lines if line and line.split()[0] in CATALOGUE}
    assert table["score/mean"][:7] == ["score/mean", "score", "0", "19", "0", "19", "14.5"]
    assert table["kl/mean"][1:7] == ["nats", "0", "361", "0", "361", "218"]
    assert set(table["score/mean"][7]) <= set(SPARKS)
    assert table["score/mean"][7] == "▁▂▃▃▄▅▆▆▇█"
    assert list(table) == [name for name in MAIN if name in table]


def test_show_says_what_is_out_of_range_and_what_to_do(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main_show("string", root)
    out = " ".join(capsys.readouterr().out.split())
    assert "! ppo/clip_fraction is 0.5; healthy: 0.01 to 0.2. Above: fewer epochs" in out
    assert "update 7 warning non_finite: loss/policy nan" in out
    assert "created" not in out, "only warnings and alarms are shown"


def test_show_of_a_run_without_updates_is_a_header(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main_show("cut", root)
    assert capsys.readouterr().out.startswith("cut · nano · β 0.05 · 0/40 updates · finished")


@pytest.mark.parametrize("columns", ["40", "80", "200"])
def test_tables_fit_eighty_columns(
    root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, columns: str
) -> None:
    with RunStore.open(root / "string", readonly=False) as store, store.update(20) as update:
        update.metrics({name: -1.2345678e-7 * 10 ** (index % 20) for index, name in enumerate(CATALOGUE)})
    monkeypatch.setenv("COLUMNS", columns)
    main_runs(root)
    main_show("string", root)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= max(80, int(columns))
    told = {line.split()[0] for line in lines if line}
    assert set(MAIN) <= told, "no name is cut"
    assert not any("…" in line for line in lines), "no number is cut"


def test_nothing_but_text_goes_into_a_pipe(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main_show("string", root)
    main_runs(root)
    assert "\x1b" not in capsys.readouterr().out


def test_an_output_without_unicode_is_no_error(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    main_show("string", root)
    main_runs(root)
    sys.stdout.flush()
    assert b"kl/mean" in raw.getvalue()


def test_show_as_json_is_one_object_with_every_metric(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main_show("string", root, json=True)
    told = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)  # NaN is no JSON
    assert (told["name"], told["status"], told["beta"], told["updates"]) == ("string", "finished", 0.05, 20)
    assert told["config"] == CONFIG
    assert set(told["metrics"]) == {"score/mean", "kl/mean", "beta", "ppo/clip_fraction", "loss/policy"}
    assert told["metrics"]["kl/mean"] == {
        "unit": "nats/response",
        "first": 0,
        "last": 361,
        "min": 0,
        "max": 361,
        "mean_of_last": 218.5,
        "count": 20,
    }
    assert [event["kind"] for event in told["events"]] == ["created", "non_finite"]


def test_numbers_that_are_not_finite_are_null_in_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with RunStore.create(tmp_path, "run", {}) as store, store.update(0) as update:
        update.metrics({"beta": math.inf, "score/mean": math.nan})
    for show in (lambda: main_runs(tmp_path, json=True), lambda: main_show("run", tmp_path, json=True)):
        show()
        told = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
        summary = told["runs"][0] if "runs" in told else told
        assert (summary["beta"], summary["score"]) == (None, None)


def test_runs_as_json_is_one_object(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main_runs(root, json=True)
    told = json.loads(capsys.readouterr().out)
    assert [(one["name"], one["updates"], one["kl"]) for one in told["runs"]] == [
        ("cut", 0, None),
        ("sweep/beta=0.2", 3, pytest.approx(5 / 3)),
        ("string", 20, 218.5),
    ]


def test_markup_in_names_and_events_is_shown_as_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with RunStore.create(tmp_path, "run", {"policy": "[bold]org[/bold]"}) as store:
        store.event("alarm", {"why": "[red]x[/red]"}, severity="alarm")
    main_show("run", tmp_path)
    main_runs(tmp_path)
    out = capsys.readouterr().out
    assert out.count("[bold]org[/bold]") == 2
    assert "alarm alarm: why [red]x[/red]" in out


# ── numbers ─────────────────────────────────────────────────────────────────────────────────────────────────────────
@given(st.floats(allow_nan=True, allow_infinity=True))
def test_every_number_fits_six_characters(number: float) -> None:
    assert 1 <= len(short(number)) <= 6 or abs(number) >= 1e100


@given(st.floats(min_value=1e-8, max_value=9e14), st.sampled_from([1, -1]))
def test_a_short_number_is_near_the_number(size: float, sign: int) -> None:
    scale = {"k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15}
    text = short(sign * size)
    read = float(text.rstrip("kMGTP")) * scale.get(text[-1], 1.0)
    assert read == pytest.approx(sign * size, rel=0.05 if sign > 0 else 0.5)  # the minus sign takes a digit


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0.0, "0"), (-0.0, "0"), (1.0, "1"), (999.4, "999"), (999.6, "1000"), (99_999.0, "99999"),
        (-99_999.0, "-99999"), (100_000.0, "100k"), (999_600.0, "1M"), (-1.236e6, "-1.24M"), (1e-5, "1.0e-5"),
        (-1e-5, "-1e-5"), (0.00123, "0.0012"), (2.5e9, "2.5G"), (None, "–"), (math.inf, "–"),
    ],
)  # fmt: skip
def test_short_numbers(number: float | None, text: str) -> None:
    assert short(number) == text


def test_short_times() -> None:
    assert [short_time(seconds) for seconds in (0, 59, 60, 3599, 3600, 86_400)] == [
        "0 s", "59 s", "1 min", "60 min", "1 h", "1 d",
    ]  # fmt: skip


def test_sparklines_show_shape_gaps_and_flatness() -> None:
    assert sparkline(np.arange(8.0)) == SPARKS
    assert sparkline(np.arange(8.0)[::-1]) == SPARKS[::-1]
    assert sparkline(np.array([0.0, np.nan, 1.0])) == "▁ █"
    assert sparkline(np.array([2.0, 2.0])) == "▄▄"
    assert sparkline(np.full(3, np.nan)) == sparkline(np.empty(0)) == ""
    assert len(sparkline(np.arange(1000.0))) == 10


def test_show_describes_what_the_catalogue_knows(root: Path) -> None:
    with RunStore.open(root / "string") as store:
        metrics = describe_run(store)["metrics"]
    assert isinstance(metrics, dict)
    assert all(CATALOGUE[name].unit == told["unit"] for name, told in metrics.items())
    assert set(MAIN) <= CATALOGUE.keys()


def test_who_shares_a_run_is_told_and_one_process_is_not_worth_a_word() -> None:
    place = {"host": "b", "process": 7}
    meta = {
        "processes": {"count": 1, "sharding": "replicate", "hosts": ["a"]},
        "workers": {
            "version": "2.60.0",
            "rollout": {"workers": [place, place], "restarts": 1},
            "scoring": {"workers": [place], "restarts": 0},
        },
    }
    assert crew_of(meta, {"rollout/version": 12.0, "rollout/staleness": 1.0}) == [
        "2 rollout workers of Ray 2.60.0 on b, started anew 1 times",
        "1 scoring workers of Ray 2.60.0 on b",
        "responses by weights of version 12, 1 updates old",
    ]
    assert crew_of({"processes": {"count": 1, "sharding": "replicate", "hosts": ["a"]}}, {"kl/mean": 1.0}) == []
    engine = {"runtime": "vllm", "writer": "vLLM 0.32.0 of the run's own"}
    assert crew_of({"workers": engine}, {}) == ["responses by vLLM 0.32.0 of the run's own"]
    assert crew_of({"workers": {"runtime": "own"}}, {}) == []
