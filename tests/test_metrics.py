"""The catalogue explains every number that a run logs."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tether.errors import InputError
from tether.metrics import CATALOGUE, Metric, check_known, describe
from tether.trackers import TRL_NAMES

SOURCE = Path(__file__).parents[1] / "src" / "tether"
UNITS = {
    "score",
    "score²",
    "score/nat",
    "nats/response",
    "nats/token",
    "tokens",
    "tokens/s",
    "share",
    "s",
    "bytes",
    "1",
}
LIGHT = ("errors", "metrics", "database", "records", "control", "store", "terminal", "runs", "labels", "plots")


@pytest.mark.parametrize("metric", CATALOGUE.values(), ids=CATALOGUE.keys())
def test_every_metric_is_explained_in_full(metric: Metric) -> None:
    told = (metric.title, metric.formula, metric.source, metric.healthy, metric.remedy)
    assert all(text.strip() == text != "" for text in told)
    assert metric.unit in UNITS
    assert re.fullmatch(r"[a-z0-9_]+(/[a-z0-9_]+)?(/\*)?", metric.name)
    assert metric.low is None or metric.high is None or metric.low <= metric.high


def test_kl_is_summed_over_the_response_unless_the_name_says_per_token() -> None:
    units = {name: metric.unit for name, metric in CATALOGUE.items() if name.startswith("kl/") or name == "eval/kl"}
    assert units.pop("kl/per_token") == "nats/token"
    assert set(units.values()) == {"nats/response"}


def test_every_metric_that_the_source_names_is_in_the_catalogue() -> None:
    groups = {name.split("/")[0] for name in CATALOGUE if "/" in name}
    named = {
        node.value
        for path in SOURCE.rglob("*.py")
        if SOURCE / "trl" not in path.parents  # TRL's statistics go by TRL's names: docs/trl.md
        and path != SOURCE / "ladder" / "library.py"
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }
    logged = {text for text in named if re.fullmatch(rf"({'|'.join(groups)})/[a-z0-9_]+", text)}
    assert "kl/mean" in logged, "the search itself must find something"
    assert TRL_NAMES.keys() <= CATALOGUE.keys()
    media_types = {"text/yaml"}
    assert logged - CATALOGUE.keys() - UNITS - media_types - set(TRL_NAMES.values()) == set()


def test_unknown_names_are_refused_together_each_with_its_nearest() -> None:
    with pytest.raises(InputError, match=r"'kl/men' .*did you mean 'kl/mean'(.|\n)*'zzz' is not in the catalogue\n"):
        check_known(["kl/men", "beta", "zzz"])
    check_known(["kl/mean", "beta"])


def test_a_value_is_outside_only_beyond_the_bounds_that_hold_for_every_run() -> None:
    bounded = Metric("x", "x", "1", "x", "x", "x", "x", low=-0.5, high=0.2)
    unbounded = Metric("x", "x", "1", "x", "x", "x", "x")
    assert [bounded.is_outside(value) for value in (-0.6, -0.5, 0.0, 0.2, 0.3)] == [True, False, False, False, True]
    assert bounded.is_outside(float("nan"))
    assert not unbounded.is_outside(1e9)


def test_the_description_holds_the_whole_entry() -> None:
    metric = CATALOGUE["ppo/clip_fraction"]
    told = describe("ppo/clip_fraction")
    for part in (metric.name, metric.title, metric.unit, metric.formula, metric.source, metric.healthy, metric.remedy):
        assert part in told
    with pytest.raises(InputError, match="did you mean 'ppo/clip_fraction'"):
        describe("ppo/clip_fractoin")


def test_a_family_explains_its_members_and_no_other_name() -> None:
    member = CATALOGUE["score/part/style"]
    assert (member.name, member.title) == ("score/part/style", CATALOGUE["score/part/*"].title)
    assert CATALOGUE["score/part/style/tone"].unit == "score"
    check_known(["score/part/style", "score/spread", "score/spread/style"])
    for stranger in ("score/part", "score/parts/style", "score/mean/style", "part/style"):
        assert stranger not in CATALOGUE
        with pytest.raises(InputError, match="is not in the catalogue"):
            check_known([stranger])
    assert CATALOGUE["score/spread"].title != CATALOGUE["score/spread/style"].title


def test_names_stand_in_the_catalogues_order_members_at_their_familys_place() -> None:
    names = ["zzz", "objective/tethered", "score/part/b", "beta", "score/part/a", "score/mean"]
    wanted = ["score/mean", "score/part/a", "score/part/b", "objective/tethered", "beta", "zzz"]
    assert CATALOGUE.in_order(names) == wanted
    assert [name for name in CATALOGUE if "*" not in name] == CATALOGUE.in_order(
        sorted(name for name in CATALOGUE if "*" not in name)
    )


def test_the_catalogue_cannot_be_changed() -> None:
    with pytest.raises(TypeError):
        CATALOGUE["new"] = CATALOGUE["beta"]  # type: ignore[index]


def test_run_folder_and_catalogue_import_neither_torch_nor_matplotlib() -> None:
    modules = ", ".join(f"tether.{name}" for name in LIGHT)
    code = f"import sys, {modules}; print([name for name in ('torch', 'matplotlib') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
