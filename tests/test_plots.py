"""Pictures of runs: what goes into them, that they are drawn, and that no label covers another."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from matplotlib.figure import Figure
from matplotlib.text import Text

from tether.errors import InputError, RunError
from tether.labels import Box, place, spread
from tether.plots import (
    BestOfN,
    Chord,
    SweepPoint,
    Trail,
    chords_of,
    moving_mean,
    plot_curves,
    plot_frontier,
    read_curves,
)
from tether.store import RunStore

PNG = b"\x89PNG\r\n\x1a\n"
TOLERANCE = 1e-9


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that were saved, for a look at what stands in them."""
    figures: list[Figure] = []
    save = Figure.savefig

    def keep(figure: Figure, *arguments: object, **options: object) -> None:
        save(figure, *arguments, **options)
        figures.append(figure)

    monkeypatch.setattr(Figure, "savefig", keep)
    return figures


def make_run(root: Path, name: str, kl: float, score: float = 2.0, steps: int = 60, evaluate: bool = False) -> RunStore:
    store = RunStore.create(root, name, {})
    for step in range(steps):
        rise = 1.0 - math.exp(-step / 15)
        with store.update(step) as update:
            update.metrics({"score/mean": score * rise, "score/se": 0.1, "kl/mean": kl * rise, "kl/se": 0.05 * kl})
            if evaluate and step % 20 == 0:
                update.metrics({"eval/gold": -rise, "eval/gold_se": 0.1, "eval/holdout": rise})
    return store


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[tuple[str, RunStore]]]:
    """Seven runs, most of which end close together; KL from 1 to 100."""
    tmp_path = tmp_path_factory.mktemp("runs")
    kls = (100.0, 11.0, 10.0, 9.5, 9.0, 2.0, 1.0)
    stores = [make_run(tmp_path, f"run{index}", kl, 2.0 + 0.02 * index) for index, kl in enumerate(kls)]
    yield [(f"β = 0.0{index}", store) for index, store in enumerate(stores)]
    for store in stores:
        store.close()


def texts_of(figure: Figure) -> list[Text]:
    """All texts that are seen and belong to no axis."""
    ticks = {id(tick) for axes in figure.axes for axis in (axes.xaxis, axes.yaxis) for tick in axis.get_ticklabels()}
    return [text for text in figure.findobj(Text) if text.get_text() and text.get_visible() and id(text) not in ticks]


def overlaps(figure: Figure, wanted: str) -> list[tuple[str, str]]:
    """Pairs of texts that hold `wanted` and cover each other by more than a pixel of their rounded corners."""
    boxes = [(text.get_text(), text.get_window_extent()) for text in texts_of(figure) if wanted in text.get_text()]
    assert len(boxes) > 1
    return [
        (first, second)
        for (first, one), (second, two) in combinations(boxes, 2)
        if Box(one.x0, one.y0 + 2, one.width, one.height - 4).overlap(
            Box(two.x0, two.y0 + 2, two.width, two.height - 4)
        )
        > 1.0
    ]


# ── curves ──────────────────────────────────────────────────────────────────────────────────────────────────────────
def test_curves_are_a_png_1200_pixels_wide(runs: list[tuple[str, RunStore]], tmp_path: Path) -> None:
    out = plot_curves(runs[:2], tmp_path / "deep" / "curves.png")
    data = out.read_bytes()
    assert data.startswith(PNG)
    assert (int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")) == (1200, 900)


def test_what_is_drawn_is_what_the_run_holds(tmp_path: Path, drawn: list[Figure]) -> None:
    with make_run(tmp_path, "run", kl=10.0, evaluate=True) as store:
        run = read_curves("label", store)
        assert run.kl.values.tolist() == store.curve("kl/mean").values.tolist()
        assert run.kl.errors.tolist() == [0.5] * 60
        assert (run.gold.steps.tolist(), run.gold.errors.tolist()) == ([0, 20, 40], [0.1] * 3)
        assert run.holdout.errors.tolist() == [0.0] * 3
        plot_curves([("label", store)], tmp_path / "curves.png", budget=6.0)
    above, below = drawn[0].axes
    assert above.get_shared_x_axes().joined(above, below), "one step axis"
    assert run.kl.values.tolist() in [list(line.get_ydata()) for line in below.lines]
    assert run.gold.values.tolist() in [list(line.get_ydata()) for line in above.lines]
    assert [6.0, 6.0] in [list(line.get_ydata()) for line in below.lines]
    told = {text.get_text() for text in texts_of(drawn[0])}
    last = 10.0 * (1.0 - (math.exp(-59 / 15) + math.exp(-58 / 15)) / 2)  # the moving mean's last window
    assert f"label  {last:.3g}" in told
    assert {"budget 6", "gold score", "hold-out score", "update"} <= told


def test_labels_of_many_runs_do_not_cover_each_other(
    runs: list[tuple[str, RunStore]], tmp_path: Path, drawn: list[Figure]
) -> None:
    long = ("the run with the very longest label of them all", runs[0][1])
    plot_curves([*runs, long], tmp_path / "curves.png")
    assert overlaps(drawn[0], "β = 0.0") == []
    for text in texts_of(drawn[0]):
        extent = text.get_window_extent()
        assert extent.x0 >= 0
        assert extent.x1 <= 1200, f"{text.get_text()!r} leaves the picture"


def test_every_run_has_a_colour_and_a_dash_of_its_own(
    runs: list[tuple[str, RunStore]], tmp_path: Path, drawn: list[Figure]
) -> None:
    plot_curves(runs, tmp_path / "curves.png")
    bold = [line for line in drawn[0].axes[0].lines if line.get_linewidth() == 2.0]
    assert len({line.get_color() for line in bold}) == len(runs)
    assert len({(line.get_color(), str(line._dash_pattern)) for line in bold}) == len(runs)
    assert len({str(line._dash_pattern) for line in bold[:5]}) == 5


def test_gaps_single_updates_and_empty_runs_are_drawn(tmp_path: Path) -> None:
    with (
        RunStore.create(tmp_path, "empty", {}) as empty,
        make_run(tmp_path, "one", 1.0, steps=1) as one,
        make_run(tmp_path, "gap", 1.0, steps=3) as gap,
    ):
        with gap.update(3) as update:
            update.metrics({"kl/mean": float("nan"), "score/mean": 1.0})
        assert read_curves("gap", gap).kl.steps.tolist() == [0, 1, 2]
        plot_curves([("empty", empty), ("one", one), ("gap", gap)], tmp_path / "curves.png")
        with pytest.raises(InputError, match="nothing to draw: none of 1 runs has a mean score or a KL"):
            plot_curves([("empty", empty)], tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


def test_a_picture_that_cannot_be_written_is_one_clear_error(runs: list[tuple[str, RunStore]], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match=r"curves\.png: cannot be written or read"):
        plot_curves(runs[:1], tmp_path / "file" / "curves.png")


@example([float(value) for value in range(100)])
@given(st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=200))
def test_the_moving_mean_is_the_mean_of_its_window(values: list[float]) -> None:
    got, reach = moving_mean(np.array(values)), len(values) // 40
    for index in range(len(values)):
        before = min(index, reach)
        after = min(before, len(values) - 1 - index)
        window = values[index - before : index + after + 1]
        assert got[index] == pytest.approx(sum(window) / len(window), abs=TOLERANCE * 1e3)
    assert got[0] == pytest.approx(values[0], abs=TOLERANCE), "a KL that begins at 0 is drawn from 0"


# ── frontier ────────────────────────────────────────────────────────────────────────────────────────────────────────
SWEEP = (
    SweepPoint(0.0, 80.0, 2.7),
    SweepPoint(0.02, 35.0, 2.4),
    SweepPoint(0.1, 9.0, 1.75),
    SweepPoint(0.2, 4.4, 1.2),
    SweepPoint(0.5, 1.0, 0.45),
)
BEST = (BestOfN(4, 1.0), BestOfN(16, 1.6), BestOfN(64, 2.0))


def test_best_of_n_costs_what_the_closed_form_says() -> None:
    quantile = (np.arange(200_000) + 0.5) / 200_000  # of one answer's score under the reference
    for n in (1, 4, 16, 64):
        density = n * quantile ** (n - 1)  # of the best of n, relative to the reference
        logs = np.log(n) + (n - 1) * np.log(quantile)
        assert BestOfN(n, 0.0).kl == pytest.approx(np.mean(density * logs), abs=1e-4)


def test_the_chord_law_holds_at_optima_and_is_seen_broken_elsewhere() -> None:
    # One prompt, four answers: the optimum at β is the reference tilted by e^{r/β}, enumerated here.
    scores, reference = np.array([0.0, 0.5, 1.0, 2.0]), np.full(4, 0.25)

    def optimum(beta: float) -> SweepPoint:
        tilted = reference * np.exp(scores / beta)
        policy = tilted / tilted.sum()
        return SweepPoint(beta, float((policy * np.log(policy / reference)).sum()), float((policy * scores).sum()))

    points = [optimum(beta) for beta in (2.0, 0.2, 0.5, 1.0)]
    chords = chords_of(points)
    assert [(chord.loose.beta, chord.tight.beta) for chord in chords] == [(0.2, 0.5), (0.5, 1.0), (1.0, 2.0)]
    assert all(chord.is_kept for chord in chords)
    short = SweepPoint(0.5, points[2].kl, points[2].gain - 0.2)  # a run that did not reach its optimum
    around = chords_of([points[0], points[1], short, points[3]])
    assert [chord.is_kept for chord in around] == [False, False, True]
    assert around[0].slope > 0.5, "the run to the left gained too much on it"
    assert around[1].slope < 0.5, "it gained too little on the run to the right"
    assert not Chord(SweepPoint(0.1, 1.0, 2.0), SweepPoint(0.2, 1.0, 1.0)).is_kept, "two β at the same KL"
    noisy = [SweepPoint(0.1, 10.0, 2.0, gain_se=0.03), SweepPoint(0.2, 5.0, 0.9, gain_se=0.03)]
    assert not chords_of(noisy)[0].is_kept, "0.1 too much, of which noise explains 0.085"
    assert chords_of([replace(point, gain_se=0.04) for point in noisy])[0].is_kept
    backwards = chords_of([SweepPoint(0.2, 2.0, 1.15), SweepPoint(0.1, 1.0, 1.0)])[0]
    assert (backwards.loose.beta, backwards.is_kept) == (0.1, False), "the longer string at less KL"


def test_the_frontier_shows_ceiling_best_of_n_trails_and_sweep(tmp_path: Path, drawn: list[Figure]) -> None:
    trails = [
        Trail("string", list(np.linspace(0, 15, 60)), list(np.linspace(0, 2, 60))),
        Trail("cut", [0.0, 40.0, 100.0], [0.0, 2.2, 2.6]),
        Trail("cut", [0.0, 40.0, 100.0], [0.0, 0.5, -0.6], kind="gold"),
    ]
    out = plot_frontier(trails, BEST, 1.5, tmp_path / "frontier.png", chord=SWEEP)
    assert out.read_bytes().startswith(PNG)
    axes = drawn[0].axes[0]
    ends = [line.get_xydata() for line in axes.lines]
    slopes = [(line[-1, 1] - line[0, 1]) / (line[-1, 0] - line[0, 0]) for line in ends if line.shape == (2, 2)]
    assert any(slope == pytest.approx(1.5 * math.sqrt(2)) for slope in slopes), "σ√(2K) over √K"
    told = {text.get_text() for text in texts_of(drawn[0])}
    names = {"best of 4", "best of 16", "best of 64", "string", "cut", "cut, gold", "β = 0.1"}
    assert names | {"ceiling σ√(2K), σ = 1.5"} <= told
    marks = {(round(float(x), 6), round(float(y), 6)) for line in ends for x, y in line}
    assert {(round(math.sqrt(one.kl), 6), one.gain) for one in (*BEST, *SWEEP)} <= marks
    assert (10.0, -0.6) in marks


def test_broken_chords_are_told_and_kept_ones_are_not(tmp_path: Path, drawn: list[Figure]) -> None:
    kept = [SweepPoint(0.1, 10.0, 2.0), SweepPoint(0.2, 5.0, 1.3)]
    broken = [SweepPoint(0.1, 10.0, 2.0), SweepPoint(0.2, 5.0, 1.9)]
    plot_frontier([], [], 1.0, tmp_path / "kept.png", chord=kept)
    plot_frontier([], [], 1.0, tmp_path / "broken.png", chord=broken)
    told = [any("chord law broken" in text.get_text() for text in texts_of(figure)) for figure in drawn]
    assert told == [False, True]
    colours = [{line.get_color() for line in figure.axes[0].lines if len(line.get_xdata()) > 2} for figure in drawn]
    assert len(colours[0]) == len(colours[1]) == 1
    assert colours[0] != colours[1]


@pytest.mark.parametrize("scale", [0.1, 1.0, 10.0])
def test_labels_in_the_plane_do_not_cover_each_other(tmp_path: Path, drawn: list[Figure], scale: float) -> None:
    trails = [Trail(f"β = {index}", [0.0, scale * (8 + index)], [0.0, 2.0 + 0.01 * index]) for index in range(4)]
    plot_frontier(trails, BEST, 1.0, tmp_path / "frontier.png")
    assert overlaps(drawn[0], "β = ") == []
    assert overlaps(drawn[0], "best of") == []


def test_a_kl_estimate_below_zero_is_drawn_at_zero(tmp_path: Path, drawn: list[Figure]) -> None:
    plot_frontier(
        [Trail("start", [-0.01], [-0.2])], [], 1.0, tmp_path / "frontier.png", chord=[SweepPoint(1.0, -0.02, 0.3)]
    )
    for point in ([0.0, -0.2], [0.0, 0.3]):
        assert any(point in line.get_xydata().tolist() for line in drawn[0].axes[0].lines)


def test_what_cannot_be_drawn_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "frontier.png"
    for sigma in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(InputError, match="wanted the spread of the score"):
            plot_frontier([], BEST, sigma, out)
    with pytest.raises(InputError, match="nothing to draw"):
        plot_frontier([Trail("empty", [], [])], [], 1.0, out)
    with pytest.raises(InputError, match="'x' has 2 KLs and 1 gains"):
        plot_frontier([Trail("x", [0.0, 1.0], [0.0])], [], 1.0, out)
    assert not out.exists()


# ── labels ──────────────────────────────────────────────────────────────────────────────────────────────────────────
@example([0.0] * 8, 20.0)
@given(st.lists(st.floats(-50, 150), min_size=1, max_size=8), st.floats(0.5, 20))
def test_spread_labels_keep_their_order_their_distance_and_the_panel(wanted: list[float], gap: float) -> None:
    got = spread(wanted, gap, 0.0, 100.0)
    fits = min(gap, 100.0 / max(len(wanted) - 1, 1))
    order = np.argsort(wanted, kind="stable")
    assert np.all(np.diff(np.array(got)[order]) >= fits - TOLERANCE)
    assert min(got) >= -TOLERANCE
    assert max(got) <= 100.0 + TOLERANCE


def test_labels_with_room_stay_where_they_are() -> None:
    assert spread([10.0, 50.0, 30.0], 5.0, 0.0, 100.0) == [10.0, 50.0, 30.0]


@given(st.lists(st.floats(30, 70), min_size=2, max_size=5))
def test_spread_moves_labels_no_further_than_any_other_way(wanted: list[float]) -> None:
    got = np.array(spread(wanted, 4.0, 0.0, 100.0))
    cost = float(((got - wanted) ** 2).sum())
    order = np.argsort(wanted, kind="stable")
    rng = np.random.default_rng(0)
    for _ in range(200):
        other = got + rng.normal(scale=0.5, size=len(got))
        if np.all(np.diff(other[order]) >= 4.0):
            assert float(((other - wanted) ** 2).sum()) >= cost - TOLERANCE


def test_a_label_stands_where_it_covers_nothing() -> None:
    inside = Box(0, 0, 100, 100)
    nothing, line = np.empty((0, 2)), np.array([(x, 50.0) for x in range(100)])
    assert place((50, 50), (10, 4), inside, [], nothing, 5.0) == Box(55, 48, 10, 4), "to the right where that is free"
    blocked = place((50, 50), (10, 4), inside, [Box(50, 0, 50, 100)], nothing, 5.0)
    assert blocked.right <= 50
    corner = place((99, 99), (10, 4), inside, [], nothing, 5.0)
    assert corner.overlap(inside) == 40
    crossed = place((50, 50), (10, 4), inside, [], line, 5.0)
    assert crossed.count(line) == 0
