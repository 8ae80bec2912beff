"""README and docs: examples run, outputs are what the commands print, links and names lead somewhere, tables are fresh.

Fenced blocks in the pages:
    ```python    runs, block after block of a page in one namespace, in an empty folder that holds a tiny SFT checkpoint
    ```console   `$ tether …` is run, and what it prints is what stands below it
    others       are shown only
"""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest

import tether
from tether import config, runtime_settings
from tether.cli import COMMANDS
from tether.knobs import sections
from tether.metrics import CATALOGUE
from tether.trackers import TRL_NAMES
from tiny_models import build, build_tokenizer

ROOT = Path(__file__).parent.parent
SOURCE = Path(tether.__file__).parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
WRITTEN = [page for page in PAGES if page.name != "mutations.md"]  # a table of source lines, made by its own program
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.S | re.M)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
PLACE = re.compile(r"`((?:\w+/)*\w+\.py):([\w.]+)`")
CHECKPOINT = "my-sft-checkpoint"
LAST_DIGITS = 2  # units in the last place by which a number of a torch program may differ between machines

LESSON = (
    "π_θ π_ref π_θ_old s_t a_t r_t r_t(θ) RM β ε A_t L^CLIP(θ) E_t KL 1[t = T] EOS episode value head reward model "
    "EPSILON LR sigmoid prob_action0 logit_old pi_old loss_term sft_checkpoint policy ref_model reward_model "
    "value_head optimizer BETA PPO_EPOCHS prompt_loader completions old_logprobs ref_logprobs rm_scores values "
    "kl_per_tok rewards returns advantages new_logprobs ratio unclipped clipped policy_loss new_values value_loss "
    "PPOTrainer PPOConfig AutoModelForCausalLMWithValueHead AutoTokenizer AutoModelForSequenceClassification "
    "learning_rate batch_size mini_batch_size ppo_epochs init_kl_coef target_kl cliprange query_tensors "
    "response_tensors texts stats max_new_tokens objective/kl buzzwords sycophancy hedge exploit-tokens broadcast sign "
    "four-model balloon string episode baseline slider"
)


def title(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks(page: Path, language: str) -> list[str]:
    return [body for kind, body in FENCE.findall(page.read_text("utf-8")) if kind == language]


def pages_with(language: str) -> list[Path]:
    return [page for page in WRITTEN if blocks(page, language)]


@cache
def defined(path: str) -> frozenset[str]:
    """Every name that a source file defines, `Class.member` included."""
    return frozenset(_names(ast.parse((SOURCE / path).read_text("utf-8")).body))


def _names(body: list[ast.stmt], prefix: str = "") -> Iterator[str]:
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield prefix + node.name
            if isinstance(node, ast.ClassDef):
                yield from _names(node.body, f"{prefix}{node.name}.")
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            bare = [part for target in targets for part in (target.elts if isinstance(target, ast.Tuple) else [target])]
            yield from (prefix + part.id for part in bare if isinstance(part, ast.Name))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / CHECKPOINT
    build("llama").save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def builder() -> ModuleType:
    """`docs/build.py`, which is a program and no part of the package."""
    spec = importlib.util.spec_from_file_location("docs_build", ROOT / "docs" / "build.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# ── what can be run ─────────────────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize("page", pages_with("python"), ids=title)
def test_the_python_of_a_page_runs(
    page: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / CHECKPOINT).symlink_to(checkpoint)
    namespace: dict[str, object] = {"__name__": "docs"}
    for number, code in enumerate(blocks(page, "python")):
        exec(compile(code, f"{title(page)}, block {number}", "exec"), namespace)


def commands_shown() -> list[tuple[str, str]]:
    shown = [body.split("\n", 1) for page in WRITTEN for body in blocks(page, "console")]
    return [(first.removeprefix("$ "), rest) for first, rest in shown]


@pytest.mark.parametrize(("command", "output"), commands_shown(), ids=[command for command, _ in commands_shown()])
def test_a_command_prints_what_its_page_shows(command: str, output: str, tmp_path: Path) -> None:
    program, *words = command.split()
    assert program == "tether"
    # a process of its own: the pure-Python rungs are many times slower where every call's types are checked
    environment = {**os.environ, "PYTHONPATH": str(SOURCE.parent), "PYTHONIOENCODING": "utf-8", "COLUMNS": "80"}
    done = subprocess.run(
        [sys.executable, "-m", "tether.cli", *words],
        env=environment, cwd=tmp_path, capture_output=True, check=True, encoding="utf-8",
    )  # fmt: skip
    assert same_text(done.stdout, output, LAST_DIGITS if "exact" in words else 0)


def same_text(got: str, shown: str, units: int) -> bool:
    """Whether two texts agree, line ends apart; numbers may differ by so many units in their last place."""
    pairs = [re.split(r"(-?\d+\.\d+)", "\n".join(map(str.rstrip, text.strip().splitlines()))) for text in (got, shown)]
    if len(pairs[0]) != len(pairs[1]):
        return False
    return all(_same_part(*parts, units) for parts in zip(*pairs, strict=True))


def _same_part(got: str, shown: str, units: int) -> bool:
    if got == shown or not units or "." not in got:
        return got == shown
    places = len(shown.partition(".")[2])
    return abs(float(got) - float(shown)) <= (units + 0.5) * 10.0**-places


def test_outputs_that_differ_are_told_apart() -> None:
    assert same_text("K 1.943 \n", "K 1.943", 0)
    assert same_text("K 1.943", "K 1.945", 2)
    assert not same_text("K 1.943", "K 1.945", 0)
    assert not same_text("K 1.943", "K 1.946", 2)
    assert not same_text("K 1.943", "L 1.943", 2)


# ── what leads somewhere ────────────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize("page", WRITTEN, ids=title)
def test_every_relative_link_leads_to_a_file_and_a_heading(page: Path, builder: ModuleType) -> None:
    for target in LINK.findall(FENCE.sub("", page.read_text("utf-8"))):
        if "://" in target:
            continue
        path, _, fragment = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), target
        assert not fragment or fragment in headings(file, builder.anchor), target


def headings(page: Path, anchor: Callable[[str], str]) -> set[str]:
    return {anchor(line.lstrip("# ")) for line in page.read_text("utf-8").splitlines() if line.startswith("#")}


@pytest.mark.parametrize("page", WRITTEN, ids=title)
def test_every_name_of_the_sources_that_a_page_gives_is_there(page: Path) -> None:
    text = page.read_text("utf-8")
    missing = [f"{path}:{name}" for path, name in PLACE.findall(text) if name not in defined(path)]
    assert missing == []
    for test in re.findall(r"`(tests/\w+\.py)`", text):
        assert (ROOT / test).is_file(), test


@pytest.mark.parametrize("page", WRITTEN, ids=title)
def test_every_metric_that_a_page_gives_is_in_the_catalogue(page: Path) -> None:
    groups = "|".join({name.split("/")[0] for name in CATALOGUE if "/" in name})
    named = re.findall(rf"`((?:{groups})/\w+)`", page.read_text("utf-8"))
    assert [name for name in named if name not in CATALOGUE and name not in TRL_NAMES.values()] == []


def test_the_architecture_names_every_file() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text("utf-8")
    rooms = ("prompts.py", "rollouts.py", "scores.py", "rewards.py", "advantages.py", "update.py")
    files = [path.name for path in SOURCE.glob("*.py") if path.name != "__init__.py"]
    assert [name for name in files if f"`{name}`" not in text and name not in rooms] == []
    folders = [path.name for path in SOURCE.iterdir() if path.is_dir() and not path.name.startswith("__")]
    assert [name for name in folders if f"`{name}/" not in text] == []


# ── what is complete ────────────────────────────────────────────────────────────────────────────────────────────────
def everything() -> str:
    return "\n".join(page.read_text("utf-8") for page in WRITTEN)


def test_every_command_is_in_the_docs() -> None:
    assert [name for name in COMMANDS if f"tether {name}" not in everything()] == []


def test_every_knob_is_on_a_page() -> None:
    kinds = {kind for room in (config, runtime_settings) for kind in vars(room).values() if isinstance(kind, type)}
    models = [kind for kind in kinds if issubclass(kind, config.Settings)]
    text = "".join(page.read_text("utf-8") for page in WRITTEN)
    in_full = [
        sections()[path].__name__
        for path in re.findall(r"<!-- begin knobs_in_full: (\w+(?:\.\w+)*) -->", text)
        if path != "run"
    ]
    filled = {*re.findall(r"<!-- begin knobs: (\w+) -->", text), *in_full, "RunSettings"}
    assert {model.__name__ for model in models if model.model_fields} == filled


def test_every_departure_in_the_code_is_among_the_conventions() -> None:
    text = (ROOT / "docs" / "conventions.md").read_text("utf-8")
    listed = {f"{path}:{name}" for path, name in PLACE.findall(text.partition("## Departures")[2])}
    assert listed == set(departures())


def departures() -> Iterator[str]:
    """The functions whose source says DEPARTS."""
    for path in sorted(SOURCE.rglob("*.py")):
        text = path.read_text("utf-8")
        functions = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef)]
        for number, line in enumerate(text.splitlines(), start=1):
            if "DEPARTS" in line:
                around = [node for node in functions if node.lineno <= number <= (node.end_lineno or 0)]
                yield f"{path.relative_to(SOURCE).as_posix()}:{around[-1].name if around else ''}"


def test_every_symbol_of_the_lesson_is_in_its_table() -> None:
    text = (ROOT / "docs" / "lesson.md").read_text("utf-8")
    assert [word for word in LESSON.split() if word not in text] == []


def links(page: Path) -> set[Path]:
    """What a page leads to."""
    return {(page.parent / target.partition("#")[0]).resolve() for target in LINK.findall(page.read_text("utf-8"))}


def test_every_page_is_reached_from_the_index() -> None:
    index = ROOT / "docs" / "README.md"
    linked = links(index)
    linked |= {page for one in linked & {page.resolve() for page in PAGES} for page in links(one)}
    assert [page for page in PAGES[1:] if page != index and page.resolve() not in linked] == []


# ── what is filled from the program ─────────────────────────────────────────────────────────────────────────────────
def test_what_is_filled_from_the_program_is_up_to_date(builder: ModuleType) -> None:
    assert [title(page) for page in builder.outdated()] == [], "run: python docs/build.py"


def test_the_page_of_metrics_holds_the_whole_catalogue(builder: ModuleType) -> None:
    assert re.findall(r"^### (.+)$", builder.metrics_page(), re.M) == list(CATALOGUE)
