"""Comparisons and demonstrations that a model of words can learn, as data and as files, and a folder with the model."""

from __future__ import annotations

import json
import random
from pathlib import Path

from tiny_models import build, build_tokenizer


def saved_model(folder: Path) -> Path:
    build("llama").save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return folder


def comparisons(count: int, *, longer_wins: bool = False, seed: int = 0) -> list[dict[str, str]]:
    """The chosen answer holds w40 where the other holds w41, at random lengths; or is the longer one."""
    draw = random.Random(seed)
    rows = []
    for number in range(count):
        short = [f"w{draw.randrange(50, 90)}" for _ in range(3)]
        good, bad = ([*short, "w40"], [*short, "w41"]) if not longer_wins else ([*short, *short, *short], short)
        draw.shuffle(good)
        draw.shuffle(bad)
        rows.append({"prompt": f"w{number % 20 + 5}", "chosen": " " + " ".join(good), "rejected": " " + " ".join(bad)})
    return rows


def written(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return str(path)


def demonstrated(count: int) -> list[dict[str, str]]:
    return [{"prompt": f"w{n % 10 + 5}", "completion": f" w{n % 10 + 20}"} for n in range(count)]
