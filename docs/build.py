"""Fill what the docs take from the program: the metrics, the knobs, the layers of the house, pieces of source.

    python docs/build.py            rewrite `docs/metrics.md`, `docs/failures/` and every filled block
    python docs/build.py --check    say which pages are out of date, and fail if one is

A block stands in a page between `<!-- begin KIND: ARGUMENT -->` and `<!-- end -->`; what is between is replaced. The
kinds are the functions of `FILLERS`. Everything else in a page is written by hand.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Callable, Iterator
from configparser import ConfigParser
from pathlib import Path

from tether import config
from tether.alarms import FAILURES, Failure
from tether.aliases import LIBRARIES, REFUSED, TRANSLATED, Library
from tether.knobs import allowed, knobs, told
from tether.metrics import CATALOGUE, Metric

DOCS = Path(__file__).parent
SOURCE = DOCS.parent / "src" / "tether"
CONTRACTS = DOCS.parent / ".importlinter"
BLOCK = re.compile(r"(?P<begin><!-- begin (?P<kind>\w+): (?P<argument>[^>]+?) -->\n).*?(?P<end><!-- end -->)", re.S)
SECTION = re.compile(r"^# ── (.+?) ─+$|^\[\"(.+)\"\]$", re.M)


# ── the blocks ──────────────────────────────────────────────────────────────────────────────────────────────────────
def metrics_table(names: str) -> str:
    """A table of these metrics, each with a link to its entry."""
    rows = [_cells(f"[`{name}`](../metrics.md#{anchor(name)})", CATALOGUE[name]) for name in names.split()]
    return _table(("metric", "unit", "what it is", "healthy"), rows)


def knobs_table(model: str) -> str:
    """A table of a settings model's own knobs: default, bounds and the line of help."""
    rows = [
        (f"`{name}`", f"`{_plain(field.default)}`", allowed(field), field.description or "")
        for name, field in getattr(config, model).model_fields.items()
        if not isinstance(field.default, config.Settings)
    ]
    return _table(("knob", "default", "allowed", "what it does"), rows)


def knobs_in_full(section: str) -> str:
    """A table of a section's own knobs (`ppo.reward`; `run` is the outermost) with its usual range and who uses it."""
    prefix = "" if section == "run" else f"{section}."
    own = {path: info for path, info in knobs().items() if path.rpartition(".")[0] == prefix.rstrip(".")}
    rows = [
        (
            f"`{path.removeprefix(prefix)}`", f"`{_plain(info.default)}`", allowed(info), told(info, "usual"),
            told(info, "used"), info.description or "",
        )
        for path, info in own.items()
    ]  # fmt: skip
    return _table(("knob", "default", "allowed", "usual", "who uses what", "what it does"), rows)


def translated(what: str) -> str:
    """The knobs with their names elsewhere (`names`), or the names that are not taken over (`refused`)."""
    if what == "refused":
        rows = [(f"`{alias.name}`", ", ".join(alias.libraries), _sentence(alias.instead)) for alias in REFUSED]
        return _table(("name", "of", "why not, and what to write"), rows)
    paths = [path for path in knobs() if any(alias.path == path for alias in TRANSLATED)]
    rows = [(f"`{path}`", *(_names(path, library) for library in LIBRARIES), _notes(path)) for path in paths]
    return _table(("here", *LIBRARIES, ""), rows)


def _names(path: str, library: Library) -> str:
    names = [alias.name for alias in TRANSLATED if alias.path == path and library in alias.libraries]
    return ", ".join(f"`{name}`" for name in names)


def _notes(path: str) -> str:
    notes = [f"`{alias.name}`: {alias.note}" for alias in TRANSLATED if alias.path == path and alias.note]
    return "; ".join(notes)


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:]


def source(where: str) -> str:
    """A function or class as it stands in the sources: `trainer.py:advance`."""
    path, name = where.split(":")
    text = (SOURCE / path).read_text("utf-8")
    for node in ast.parse(text).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == name:
            return f"```py\n{ast.get_source_segment(text, node)}\n```"
    raise LookupError(f"{path} has no {name}")


def layers(contract: str) -> str:
    """The layers of an import contract, top to bottom."""
    parser = ConfigParser()
    parser.read_string(CONTRACTS.read_text("utf-8"))
    return "```text\n" + parser[f"importlinter:contract:{contract}"]["layers"].strip() + "\n```"


def failures_table(kind: str) -> str:
    """A table of the failures of this kind, each with a link to its page."""
    chosen = [failure for failure in FAILURES.values() if failure.kind == kind]
    rows = [(f"[`{one.name}`](failures/{one.name}.md)", one.title, one.verdict, one.seen) for one in chosen]
    return _table(("failure", "what it is", "verdict", "what shows"), rows)


FILLERS: dict[str, Callable[[str], str]] = {
    "metrics": metrics_table,
    "knobs": knobs_table,
    "knobs_in_full": knobs_in_full,
    "translated": translated,
    "source": source,
    "layers": layers,
    "failures": failures_table,
}


# ── the catalogue ───────────────────────────────────────────────────────────────────────────────────────────────────
def metrics_page() -> str:
    """Every metric with its unit, formula, source, healthy range and remedy, in the catalogue's own sections."""
    lines = [
        "# Every number that a run logs",
        "",
        "Made from `src/tether/metrics.toml` by `python docs/build.py`; the terminal and the pictures read the same "
        "entries, and a number that is not among them cannot be logged.",
        "",
        "Letters: b counts the B responses of an update, t the tokens of a response, v the vocabulary, y the sampled "
        "token; ℓ = log π_old(y|s) − log π_ref(y|s); R reward per token; V value; A advantage; G return; m the "
        "response mask. The unit `score` is the score's own, σ on reference samples where the reward model is "
        "normalised so; `nats/response` is summed over the tokens of a response, then averaged over responses; `1` is "
        "a pure number.",
        "",
    ]
    for title, metrics in _sections():
        lines += [f"## {title[0].upper()}{title[1:]}", ""]
        for metric in metrics:
            lines += _entry(metric)
    return "\n".join(lines).rstrip() + "\n"


def _sections() -> Iterator[tuple[str, list[Metric]]]:
    """The catalogue under the headings that its file has as comments."""
    title, metrics = "", []
    for heading, name in SECTION.findall((SOURCE / "metrics.toml").read_text("utf-8")):
        if heading:
            if metrics:
                yield title, metrics
            title, metrics = heading, []
        else:
            metrics.append(CATALOGUE[name])
    yield title, metrics


def _entry(metric: Metric) -> list[str]:
    return [
        f"### {metric.name}",
        "",
        f"{metric.title[0].upper()}{metric.title[1:]}.",
        "",
        f"- unit: {metric.unit}",
        f"- formula: {metric.formula}",
        f"- healthy: {metric.healthy}",
        f"- else: {metric.remedy}",
        f"- source: {metric.source}",
        "",
    ]


# ── the failures ────────────────────────────────────────────────────────────────────────────────────────────────────
KINDS = {
    "invariant": "An identity of every right run fails: it trips at once, and never by chance.",
    "statistic": "A fair game against chance: an honest run is alarmed with probability 0.001 at most, however long.",
    "guard": "A relation that right runs keep: it trips when it fails in 3 of 5 updates.",
    "hack": "What a score is bought with: an alarm wants two independent families of evidence, or its own control.",
}


def failure_page(failure: Failure) -> str:
    """What you see, why, what to do, and the command that shows it to you."""
    called = f" A run in which it lasts is called **{failure.verdict}**." if failure.verdict else ""
    told = {"What you see": failure.seen, "Why it matters": failure.why, "What to do": failure.remedy,
            "What looks alike": failure.alike}  # fmt: skip
    lines = [f"# {failure.name}: {failure.title}", "", KINDS[failure.kind] + called, ""]
    for heading, text in told.items():
        lines += [f"## {heading}", "", text, ""] if text else []
    if failure.planted:
        command = f"tether train nano --fault {failure.name} --name {failure.name}"
        lines += ["## See it", "", f"Planted on purpose, {failure.planted}:", "", "```text", f"$ {command}",
                  f"$ tether check {failure.name}", "```", ""]  # fmt: skip
    return "\n".join([*lines, "All failures: [checks](../checks.md)."]) + "\n"


def anchor(heading: str) -> str:
    """The fragment under which a Markdown heading is found: lower case, letters, digits, `_` and `-` only.

    >>> anchor("kl/mean")
    'klmean'
    """
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


# ── filling ─────────────────────────────────────────────────────────────────────────────────────────────────────────
def filled(text: str) -> str:
    """The page with every block as the program has it now."""

    def fill(block: re.Match[str]) -> str:
        return f"{block['begin']}\n{FILLERS[block['kind']](block['argument'])}\n\n{block['end']}"

    return BLOCK.sub(fill, text)


def pages() -> dict[Path, str]:
    """Every page that holds something filled, as it should be."""
    found = {path: path.read_text("utf-8") for path in sorted(DOCS.rglob("*.md"))}
    return {path: filled(text) for path, text in found.items() if BLOCK.search(text)} | {
        DOCS / "metrics.md": metrics_page(),
        **{DOCS / "failures" / f"{name}.md": failure_page(failure) for name, failure in FAILURES.items()},
    }


def outdated() -> dict[Path, str]:
    """Those of them that are not so, with what they should hold."""
    return {path: text for path, text in pages().items() if not path.exists() or path.read_text("utf-8") != text}


def main() -> int:
    """Rewrite what is out of date, or with `--check` only name it; returns the exit code."""
    late = outdated()
    for path, text in late.items():
        print(f"{'out of date' if '--check' in sys.argv else 'wrote'}: {path.relative_to(DOCS.parent)}")
        if "--check" not in sys.argv:
            path.write_text(text, "utf-8")
    return 1 if late and "--check" in sys.argv else 0


def _cells(link: str, metric: Metric) -> tuple[str, ...]:
    return link, metric.unit, metric.title, metric.healthy


def _table(heads: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [heads, tuple("---" for _ in heads), *rows]
    escaped = ([cell.replace("|", "\\|") for cell in line] for line in lines)
    return "\n".join(f"| {' | '.join(line)} |" for line in escaped)


def _plain(default: object) -> str:
    if default is None:
        return "null"
    return str(default).lower() if isinstance(default, bool) else str(default)


if __name__ == "__main__":
    sys.exit(main())
