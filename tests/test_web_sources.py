"""The front end's sources and its build: one script, one sheet, small, nothing from elsewhere, no text as markup."""

from __future__ import annotations

import gzip
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = sorted(path for path in (ROOT / "web" / "src").rglob("*") if path.suffix in (".svelte", ".ts", ".css"))
BUILT = ROOT / "src" / "tether" / "page" / "static"
MOST_SCRIPT_BYTES = 90_000  # gzip; the page's budget at start

needs_build = pytest.mark.skipif(not (BUILT / "index.html").is_file(), reason="the page is not built: make page")


def test_the_sources_are_there() -> None:
    assert len(SOURCES) > 30


@pytest.mark.parametrize(
    ("forbidden", "why"),
    [
        (r"\{@html", "what a model wrote would become markup"),
        (r"innerHTML|outerHTML|insertAdjacentHTML|document\.write", "what a model wrote would become markup"),
        (r"\beval\(|new Function", "the page's policy forbids code made from text"),
        (r"(?<![\w:-])style=\"", "the page's policy forbids style attributes; use style:name={…}"),
        (r"https?://(?!127\.0\.0\.1|www\.w3\.org)", "no request ever leaves the machine"),
        (r"\bimport\(", "a report is one file: nothing can be loaded later"),
    ],
)
def test_no_source_holds_what_the_page_forbids(forbidden: str, why: str) -> None:
    found = [f"{path.name}: {line.strip()}" for path in SOURCES for line in path.read_text("utf-8").splitlines()
             if re.search(forbidden, line)]  # fmt: skip
    assert not found, why


@needs_build
def test_the_build_is_one_script_and_one_sheet_by_relative_addresses() -> None:
    html = (BUILT / "index.html").read_text("utf-8")
    assert re.findall(r'<script[^>]* src="([^"]*)"', html) == ["./page.js"]
    assert re.findall(r'<link rel="stylesheet"[^>]* href="([^"]*)"', html) == ["./page.css"]
    assert not re.search(r"<script(?![^>]* src=)[^>]*>", html)
    assert {path.name for path in BUILT.iterdir()} == {"index.html", "page.js", "page.css"}


@needs_build
def test_the_script_keeps_within_its_budget() -> None:
    script = (BUILT / "page.js").read_bytes()
    assert len(gzip.compress(script, 9)) <= MOST_SCRIPT_BYTES
    assert b"import(" not in script
