"""Plants each error of `mutants.py` in a copy of the sources and looks which test goes red.

    python tests/mutation/run.py              every mutant; rewrites docs/mutations.md
    python tests/mutation/run.py --check 0/2  the first of two halves, as JSON; writes nothing

torch, pytest and the modules that no mutant touches are loaded once; each mutant is tried in a fork of that process,
which imports the mutated copy. The test that the table names for it is tried first, so that a known mutant costs one
import and one test; where that test stays green, all tests of the module are run.
"""

from __future__ import annotations

import argparse
import ast
import gc
import importlib
import json
import os
import re
import select
import shutil
import signal
import sys
import tempfile
import traceback
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import jaxtyping

sys.path.insert(0, str(Path(__file__).parent))
from mutants import MUTANTS, TESTS, Mutant

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src" / "tether"
TABLE = ROOT / "docs" / "mutations.md"
PATIENCE_SECONDS = 240.0
"""A mutant that takes longer than this to be judged hangs."""

HEAVY = (
    *("torch", "torch.func", "torch.testing", "numpy", "beartype.claw", "doctest", "typecheck"),
    *("pytest", "pytest_timeout", "hypothesis.strategies", "hypothesis.internal.conjecture.engine"),
    *("tether.errors", "tether.streams", "tether.config", "tether.batch"),
)
"""What the tests import besides the mutated modules and what stands on these; loaded once, before any fork."""
PYTEST_OPTIONS = [
    *("-x", "--assert=plain"),
    *("-p", "timeout"),
    *(f"-pno:{plugin}" for plugin in ("cacheprovider", "doctest", "unraisableexception", "threadexception")),
]
"""Only the plugins that a test needs are loaded, since they are loaded anew for each mutant."""


@dataclass(frozen=True)
class Verdict:
    """What became of one run of the tests."""

    failed: str | None
    """Name of the first test that failed."""
    broken: str | None = None
    """Why there is no verdict: the tests could not be run at all."""


# ── planting ────────────────────────────────────────────────────────────────────────────────────────────────────────
@contextmanager
def planted(mutant: Mutant, copy: Path) -> Iterator[None]:
    """The copy of the package with one error in it, for as long as the context lasts."""
    path = copy / "tether" / mutant.module
    sound = path.read_text(encoding="utf-8")
    path.write_text(mutant.plant(sound), encoding="utf-8")
    try:
        yield
    finally:
        path.write_text(sound, encoding="utf-8")


def place(mutant: Mutant) -> str:
    """The function or constant of the module that the error is planted in."""
    source = (SOURCE / mutant.module).read_text(encoding="utf-8")
    line = mutant.line(source)
    statement = next(node for node in ast.parse(source).body if node.lineno <= line <= (node.end_lineno or line))
    return getattr(statement, "name", None) or ast.unparse(statement).split(" ")[0]


# ── judging ─────────────────────────────────────────────────────────────────────────────────────────────────────────
class FirstFailure:
    """A pytest plugin that remembers the first test that failed, and whether the tests could be collected."""

    def __init__(self) -> None:
        self.failed: str | None = None
        self.broken: str | None = None

    def pytest_runtest_logreport(self, report) -> None:
        if report.failed and self.failed is None:
            self.failed = report.nodeid

    def pytest_collectreport(self, report) -> None:
        if report.failed and self.broken is None:
            self.broken = str(report.longrepr)


def run_tests(tests: Sequence[str]) -> Verdict:
    """Run these tests, up to the first failure, in a fork of this process."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        try:
            answer = _judge(tests)
        except BaseException:
            answer = {"failed": None, "broken": traceback.format_exc(limit=-1)}
        with os.fdopen(writer, "w") as pipe:
            json.dump(answer, pipe)
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        if not select.select([pipe], [], [], PATIENCE_SECONDS)[0]:
            os.kill(child, signal.SIGKILL)
        said = pipe.read()
    os.waitpid(child, 0)
    return Verdict(**json.loads(said)) if said else Verdict(None, f"no answer in {PATIENCE_SECONDS:.0f} seconds")


def _judge(tests: Sequence[str]) -> dict[str, str | None]:
    import pytest

    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.dup2(silence, 2)
    os.chdir(ROOT)
    os.environ |= {"TETHER_HYPOTHESIS_PROFILE": "mutation", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    plugin = FirstFailure()
    code = pytest.main([*PYTEST_OPTIONS, *tests], plugins=[plugin])
    sound = code in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED)
    return {"failed": plugin.failed, "broken": plugin.broken or (None if sound else f"pytest ended with {code!r}")}


def judge(mutant: Mutant, copy: Path, known: Mapping[str, str]) -> Verdict:
    """The test that catches the mutant: the known one if it still does, else the first of its module's tests."""
    with planted(mutant, copy):
        if mutant.error in known:
            verdict = run_tests([known[mutant.error]])
            if verdict.failed and not verdict.broken:
                return verdict
        return run_tests(TESTS[mutant.module])


@contextmanager
def workshop() -> Iterator[Path]:
    """A folder with a copy of the package, and everything that no mutant touches loaded into this process."""
    os.environ["OMP_NUM_THREADS"] = "1"
    sys.dont_write_bytecode = True
    warnings.filterwarnings("ignore", message=".*use of fork.*", category=DeprecationWarning)
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        shutil.copytree(SOURCE, copy / "tether", ignore=shutil.ignore_patterns("__pycache__", "static"))
        sys.path[:0] = [str(copy), str(ROOT / "tests")]
        jaxtyping.install_import_hook("tether", "typecheck.checked")
        for name in HEAVY:
            importlib.import_module(name)
        early = [module for module in TESTS if f"tether.{module.removesuffix('.py')}" in sys.modules]
        assert not early, f"{early} would be tried without their errors: they are loaded before the fork"
        gc.freeze()  # what is loaded now is no business of the forks' collectors
        yield copy


# ── the table ───────────────────────────────────────────────────────────────────────────────────────────────────────
HEAD = """# Planted errors, and the test that sees each

`make mutants` plants these errors, one at a time, in a copy of the sources, runs the tests and writes this table;
`make test` plants every third again and fails where one stays unseen. The list is `tests/mutation/mutants.diff`.

| error | kind | in | line as it is → as planted | seen by |
|---|---|---|---|---|
"""


def row(mutant: Mutant, test: str) -> str:
    as_it_is, as_planted = (
        " ⏎ ".join(line[1:].strip() for line in mutant.lines if line[0] == sign) or "(nothing)" for sign in "-+"
    )
    where = f"{mutant.module.removesuffix('.py')}.{place(mutant)}"
    return f"| {mutant.error} | {mutant.kind} | `{where}` | {_code(as_it_is)} → {_code(as_planted)} | {_code(test)} |\n"


def _code(text: str) -> str:
    return "`" + text.replace("|", "\\|") + "`"


def known_tests() -> dict[str, str]:
    """Error → name of the test that saw it, as the table says."""
    if not TABLE.exists():
        return {}
    cells = [
        re.split(r" (?<!\\)\| ", line.strip().strip("|").strip())
        for line in TABLE.read_text(encoding="utf-8").splitlines()
    ]
    return {c[0]: c[-1].strip("`").replace("\\|", "|") for c in cells if len(c) == 5 and "::" in c[-1]}


# ── the two ways to call it ─────────────────────────────────────────────────────────────────────────────────────────
def check(what: str) -> dict[str, Verdict]:
    """Verdicts on every n-th mutant from the k-th on (`k/n`), or on the sources as they are (`nothing`)."""
    known = known_tests()
    with workshop() as copy:
        if what == "nothing":
            return {"nothing planted": run_tests(sorted({test for tests in TESTS.values() for test in tests}))}
        first, step = map(int, what.split("/"))
        return {mutant.error: judge(mutant, copy, known) for mutant in MUTANTS[first::step]}


def rewrite_table(known: Mapping[str, str]) -> int:
    """Judge every mutant and write the table; returns how many stayed unseen."""
    rows, unseen = [], 0
    with workshop() as copy:
        for mutant in MUTANTS:
            verdict = judge(mutant, copy, known)
            unseen += verdict.failed is None
            rows.append(row(mutant, verdict.failed or "NOT SEEN"))
            print(f"{mutant.module}: {mutant.error}: {verdict.failed or 'NOT SEEN'} {verdict.broken or ''}", flush=True)
    TABLE.write_text(HEAD + "".join(rows), encoding="utf-8")
    return unseen


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", metavar="K/N", help="judge every N-th mutant from the K-th on, or `nothing`; JSON")
    parser.add_argument("--afresh", action="store_true", help="forget which test the table names for each mutant")
    arguments = parser.parse_args()
    if not arguments.check:
        return 1 if rewrite_table({} if arguments.afresh else known_tests()) else 0
    print(json.dumps({error: vars(verdict) for error, verdict in check(arguments.check).items()}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
