"""The tables of the model as Markdown, its plot, and docs/runtimes/scale.md written anew between its marks.

Read first: `scale_model.py`, `scale_layouts.py`.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from scale_layouts import ROOMS, Estimate, compare
from scale_model import H100, MODELS, Model, Work

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "runtimes" / "scale.md"
PLOT = ROOT / "docs" / "images" / "scale.png"
GPUS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
ROOMS_AT = {"1B": 8, "8B": 64, "70B": 256}
OURS = ("replicate", "fsdp", "ray", "vllm", "overlap")
Found = Mapping[str, Mapping[int, Mapping[str, Estimate]]]


def estimates(work: Work | None = None, models: Sequence[Model] = tuple(MODELS.values())) -> dict:
    return {model.name: {n: compare(model, work or Work(), H100, n) for n in GPUS} for model in models}


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "| --- |" + " ---: |" * (len(header) - 1)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def tables(found: Found) -> str:
    """A table of totals for each model."""
    return "\n\n".join(f"{name}\n\n{totals(rows)}" for name, rows in found.items())


def totals(rows: Mapping[int, Mapping[str, Estimate]]) -> str:
    """Seconds an update by GPUs and layout, or why not; the fastest of ours in bold."""
    lines = []
    for gpus, by in rows.items():
        best = min(OURS, key=lambda name: by[name].total)
        lines.append([f"{gpus:,}", *(_cell(by[name], name == best) for name in by)])
    return table(["GPUs", *next(iter(rows.values()))], lines)


def _cell(estimate: Estimate, best: bool) -> str:
    if estimate.refused:
        return estimate.refused
    aside = f" ({estimate.writers} write)" if estimate.writers else ""
    return f"**{estimate.total:.1f}**{aside}" if best else f"{estimate.total:.1f}{aside}"


def rooms(by: Mapping[str, Estimate]) -> str:
    """Seconds by room of the layouts that run."""
    able = {name: one for name, one in by.items() if not one.refused}
    lines = [[room, *(_room(name, one, room) for name, one in able.items())]
             for room in ROOMS if any(room in one.rooms for one in able.values())]  # fmt: skip
    lines.append(["**the whole**", *(f"**{one.total:.1f}**" for one in able.values())])
    work = Work()
    lines.append(
        ["response tokens a second", *(f"{work.rows * work.response / one.total:,.0f}" for one in able.values())]
    )
    lines.append(["tokens a second in the epochs", *(f"{_trained_tokens(work, one):,.0f}" for one in able.values())])
    lines.append(["GB on the fullest GPU", *(f"{one.memory / 1e9:.0f}" for one in able.values())])
    return table(["room", *able], lines)


def _trained_tokens(work: Work, estimate: Estimate) -> float:
    """Tokens of all epochs over the seconds that they take with their steps; those of the whole where they hide."""
    seconds = sum(estimate.rooms.get(room, 0.0) for room in ("update", "optimiser", "sums"))
    return work.epochs * work.rows * work.length / (seconds or estimate.total)


def _room(layout: str, estimate: Estimate, room: str) -> str:
    if room in estimate.rooms:
        return f"{estimate.rooms[room]:.2f}"
    return "beside" if layout == "overlap" else "—"


def saturation(found: Found) -> str:
    """For each layout the most GPUs at which twice as many still take a quarter less."""
    lines = []
    for name, rows in found.items():
        ends = []
        for layout in next(iter(rows.values())):
            able = [n for n in rows if not rows[n][layout].refused]
            good = [n for n in able if 2 * n in able and rows[2 * n][layout].total < 0.75 * rows[n][layout].total]
            ends.append(f"{able[0]:,} … {2 * max(good):,}" if good else ("never" if not able else f"{able[0]:,}"))
        lines.append([name, *ends])
    return table(["model", *next(iter(next(iter(found.values())).values()))], lines)


def traffic() -> str:
    """Bytes of one update, by what moves."""
    from scale_model import FLOAT, HALF, STATE_BYTES, cache_bytes, rollout_bytes, trained

    work = Work()
    lines = []
    for model in MODELS.values():
        moved = trained(model, work)
        sizes = (HALF * model.parameters, work.steps * FLOAT * moved, rollout_bytes(work), STATE_BYTES * moved,
                 work.rows * cache_bytes(model, work.length))  # fmt: skip
        lines.append([model.name, *(f"{size / 1e9:,.2f}" for size in sizes)])
    header = ["GB", "weights to the writers", "gradients summed", "rollouts (Ray's objects)", "checkpoint", "caches"]
    return table(header, lines)


def modes() -> str:
    """The three modes of the 8 B model on 32 GPUs."""
    lines = []
    for mode in ("full", "lora", "top"):
        by = compare(MODELS["8B"], Work(mode=mode), H100, 32)
        lines.append([mode, *(_cell(one, False) for one in by.values())])
    return table(["mode", *by], lines)


def long() -> str:
    """The 1 B model in `full` and the 8 B in `lora`, with responses of 8,192 tokens."""
    lines = []
    for name, mode in (("1B", "full"), ("8B", "lora")):
        for gpus in (8, 32, 128):
            by = compare(MODELS[name], Work(response=8192, mode=mode), H100, gpus)
            best = min(OURS, key=lambda layout: by[layout].total)
            lines.append([f"{name}, {mode}, {gpus}", *(_cell(one, layout == best) for layout, one in by.items())])
    return table(["model, mode, GPUs", *by], lines)


def checked() -> str:
    """Predicted and measured on this machine."""
    from scale_rates import CHECKED

    rows = json.loads(CHECKED.read_text("utf-8"))["rows"]
    lines = [
        [f"{row['mode']}, {row['processes']}", row["room"], f"{row['predicted']:.2f}", f"{row['measured']:.2f}",
         f"{row['measured'] / row['predicted']:.2f}"]
        for row in rows
    ]  # fmt: skip
    return table(["mode, processes", "room", "predicted s", "measured s", "measured / predicted"], lines)


def rates() -> str:
    """The constants of the H100, and of this machine."""
    from scale_rates import this_machine

    here, there = this_machine(), H100
    named = {"train_flops": ("products in training, TFLOP/s", 1e12), "forward_flops": ("forward, TFLOP/s", 1e12),
             "memory_rate": ("memory in decoding, GB/s", 1e9), "near": ("to a neighbour, GB/s", 1e9),
             "far": ("to another machine, GB/s", 1e9), "dispatch": ("own sampler a layer and token, µs", 1e-6),
             "disk": ("disk, GB/s", 1e9), "objects": ("Ray's objects, GB/s", 1e9),
             "files": ("weights as files, GB/s", 1e9)}  # fmt: skip
    lines = [
        [
            label,
            f"{getattr(there, key) / unit:,.4g}",
            f"{getattr(here, key) / unit:,.3g}" if getattr(here, key) else "—",
        ]
        for key, (label, unit) in named.items()
    ]
    return table(["", there.name, here.name], lines)


def write() -> None:
    """Put every table between its marks, and draw the plot."""
    found = estimates()
    blocks = {"totals " + name: totals(rows) for name, rows in found.items()}
    blocks |= {f"rooms {name}": rooms(found[name][gpus]) for name, gpus in ROOMS_AT.items()}
    blocks |= {"saturation": saturation(found), "traffic": traffic(), "modes": modes(), "long": long()}
    blocks |= {"check": checked(), "rates": rates()}
    PAGE.write_text(filled(PAGE.read_text("utf-8"), blocks), "utf-8")
    draw(found, PLOT)


def filled(text: str, blocks: Mapping[str, str]) -> str:
    """The page with each block between `<!-- scale: NAME -->` and `<!-- scale, end -->`; every block has its place."""
    for name, block in blocks.items():
        marks = re.compile(rf"(<!-- scale: {re.escape(name)} -->\n).*?(<!-- scale, end -->)", re.DOTALL)
        text, count = marks.subn(lambda match, block=block: f"{match[1]}\n{block}\n\n{match[2]}", text)
        if count != 1:
            raise SystemExit(f"{PAGE.name} has {count} places for {name!r}; wanted one")
    return text


def draw(found: Found, path: Path) -> None:
    """Seconds an update over GPUs, both logarithmic, a panel for each model."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    styles = {"replicate": "C0o-", "fsdp": "C1s-", "ray": "C4d-", "vllm": "C2^-", "overlap": "C3v-", "peers": "k--"}
    figure, panels = plt.subplots(1, len(found), figsize=(12, 4), sharey=True, layout="constrained")
    for panel, (name, rows) in zip(panels, found.items(), strict=True):
        for layout, style in styles.items():
            points = [(n, by[layout].total) for n, by in rows.items() if math.isfinite(by[layout].total)]
            if points:
                panel.plot(*zip(*points, strict=True), style, label=layout, markersize=4)
        panel.set(title=f"{name} parameters", xlabel="H100 GPUs", xscale="log", yscale="log", xlim=(0.8, 1300))
        panel.set_xticks([1, 8, 64, 512], ["1", "8", "64", "512"])
        panel.grid(True, which="major", alpha=0.3)
    panels[-1].text(0.05, 0.1, "beyond 80 GB a GPU\nin the other layouts", transform=panels[-1].transAxes)
    panels[0].set_ylabel("seconds an update of 1,024 responses")
    panels[0].legend(fontsize="small")
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)
