"""`tether report RUN`: the page of a run as one HTML file that works offline, the run's data inside it.

The built front end is taken as it is, its script and style put into the file; what it would ask the server lies beside
it as JSON. The file's own policy lets it load nothing and run this script alone. Read next: docs/page-api.md.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from tether.database import to_json
from tether.errors import RunError
from tether.page import facts
from tether.page.app import STATIC
from tether.page.history import as_lists, thin
from tether.page.library import Library, identify, understood
from tether.page.reading import Reader
from tether.page.samples import facts as sample_facts
from tether.page.samples import references
from tether.page.sweeps import gather, place
from tether.page.told import failures_facts, ghost_of, learn_text, lengths, metrics_facts, session_facts
from tether.records import Sample
from tether.runs import ROOT, find_run

REPORT_FILE = "report.html"
WIDTH = 1000
"""Columns that a curve is thinned to."""
MOST_STEPS = 60
"""Updates of which training samples are taken along, evenly spread."""
LAST_STEP = 2**62
SCRIPT = re.compile(r'<script\b[^>]*\bsrc="\./(?P<name>[\w.-]+)"[^>]*>\s*</script>')
STYLE = re.compile(r'<link\b(?=[^>]*\brel="stylesheet")[^>]*\bhref="\./(?P<name>[\w.-]+)"[^>]*>')
UNBUILT = "the page is not built, so there is nothing to write the run into; build it once: python -m tether.page.build"

Facts = dict[str, object]


def main(run: str, others: tuple[str, ...] = (), /, root: Path = ROOT, out: Path | None = None) -> None:
    """Write the page of a run, with its data, into one file that works offline.

    Args:
        run: The run's name below `root`, or the path of its folder.
        others: Further runs to compare it with.
        root: The folder that holds the run folders.
        out: The file; by default report.html in the run's folder.
    """
    folders = [find_run(name, root) for name in (run, *others)]
    target = write_report(folders, out or folders[0] / REPORT_FILE)
    print(f"wrote {target} ({target.stat().st_size / 1e6:.1f} MB); it opens in any browser, offline")


def write_report(folders: Sequence[Path], target: Path, static: Path = STATIC) -> Path:
    """The report of these runs. Raises RunError where the page is not built, or a run or the file cannot be used."""
    index = static / "index.html"
    if not index.is_file():
        raise RunError(UNBUILT)
    try:
        target.write_text(page(index.read_text("utf-8"), static, responses(folders)), "utf-8", errors="replace")
    except OSError as error:
        raise RunError(f"{target} cannot be written: {error.strerror or error}; choose another --out") from error
    return target


def page(index: str, static: Path, data: Facts) -> str:
    """The built page with its script, its style and the data inside."""
    scripts: list[str] = []

    def script(match: re.Match[str]) -> str:
        text = (static / match["name"]).read_text("utf-8").replace("</script", "<\\/script")
        scripts.append(text)
        return f'<script type="module">{text}</script>'

    def style(match: re.Match[str]) -> str:
        text = (static / match["name"]).read_text("utf-8").replace("</style", "<\\/style")
        return f"<style>{text}</style>"

    text = SCRIPT.sub(script, STYLE.sub(style, index))
    embedded = to_json({"version": 1, "responses": data}).replace("<", "\\u003c")
    block = f'<script type="application/json" id="tether-data">{embedded}</script>'
    return text.replace("<head>", f"<head>{_policy(scripts)}{block}", 1)


def _policy(scripts: Sequence[str]) -> str:
    """Nothing may be loaded, and no script run but the page's own."""
    digests = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in scripts]
    allowed = " ".join(f"'sha256-{digest}'" for digest in digests)
    return (
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
        f"style-src 'unsafe-inline'; script-src {allowed}; base-uri 'none'; form-action 'none'\">"
    )


def responses(folders: Sequence[Path]) -> Facts:
    """What the server would answer, by route."""
    library = Library(folders[0].parent)
    found: Facts = {}
    lines: list[Facts] = []
    places: list[Facts | None] = []
    for name, folder in _named(folders).items():
        reader = Reader(folder)
        try:
            with understood(name), reader.snapshot():
                id = identify(Path(name))
                own = _of_run(reader, id, name)
                line, where = own.pop("line"), place(reader, id)
                assert isinstance(line, dict)
                lines.append(line)
                places.append(where)
                found |= {f"api/runs/{id}{route}": answer for route, answer in own.items()}
        finally:
            reader.close()
    library.selected = lines[0]["id"] if len(lines) == 1 else None  # type: ignore[assignment]
    return {
        "api/session": session_facts(library, False, False, read_only=True) | {"root": ""},
        "api/runs": {"root": "", "runs": lines}, "api/sweeps": {"sweeps": gather(places)},
        "api/learn": json.loads(learn_text()), "api/metrics": metrics_facts(), "api/failures": failures_facts(),
        "api/jobs": {"jobs": []}, **found,
    }  # fmt: skip


def _named(folders: Sequence[Path]) -> dict[str, Path]:
    """Each folder once, by its name; with as much of the path before it as tells them all apart.

    >>> list(_named([Path("/a/runs/string"), Path("/b/runs/string"), Path("/a/runs/string")]))
    ['a/runs/string', 'b/runs/string']
    """
    known = list(dict.fromkeys(folder.resolve() for folder in folders))
    most = max(len(folder.parts) for folder in known)
    tails = ({"/".join(folder.parts[-depth:]): folder for folder in known} for depth in range(1, most + 1))
    return next(named for named in tails if len(named) == len(known))


def _of_run(reader: Reader, id: str, name: str) -> Facts:
    now = time.time()
    said = facts.verdict(reader)
    line = facts.summary(reader, id, name, now) | {"verdict": said["verdict"]}
    cursor, curves = reader.curves(reader.names(), 0, LAST_STEP)
    thinned = {metric: thin(curve, WIDTH) for metric, curve in curves.items()}
    return {
        "line": line, "": facts.whole(reader, line, now),
        "/history": as_lists(f"{id}@{cursor}", thinned, lengths(curves)), "/samples": _samples(reader),
        "/verdict": said, "/events": {"events": [asdict(event) for event in reader.events()]},
        "/commands": facts.ledger(reader), "/ghost": ghost_of(reader),
    }  # fmt: skip


def _samples(reader: Reader) -> Facts:
    """Every kept probe, and the training samples of some steps."""
    steps = {split: reader.sample_steps(split) for split in ("probe", "train")}
    steps["train"] = _spread(steps["train"])
    first = references(reader, steps)
    told: dict[str, dict[str, list[Facts]]] = {"probe": {}, "train": {}}
    for split in told:
        for step in steps[split]:
            own = reader.samples(split, step)
            told[split][str(step)] = _told(own, reader.beta_at(step), first if split == "probe" else {})
    return {"steps": steps, "all": told}


def _told(own: Sequence[Sample], beta: float, first: dict[int, Sample]) -> list[Facts]:
    found = [sample_facts(sample, beta, first, own) for sample in own]
    for one in found:
        before = one["reference"]
        if isinstance(before, dict):
            before["tokens"] = []  # they stand once, at update 0
    return sorted(found, key=lambda one: -float(str(one["suspicion"])))


def _spread(steps: list[int]) -> list[int]:
    """At most so many steps, evenly, the first and the last among them."""
    if len(steps) <= MOST_STEPS:
        return steps
    return sorted({steps[round(at * (len(steps) - 1) / (MOST_STEPS - 1))] for at in range(MOST_STEPS)})
