"""The page by its keys alone, in a real Chromium: what is reached, seen, worked and told without a pointer."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from page_runs import make_run
from web_pages import MARKS, Trainer, chromium, opened, served, until

SCREENS = ("play", "samples", "attached", "runs?compare=string,other", "learn")
SIZES = {"desk": (1280, 800), "phone": (390, 844)}
CONTROLS = """() => {
  const seen = e => e.checkVisibility({ visibilityProperty: true }) && e.getBoundingClientRect().width > 0
  const one = e => e.type === 'radio' ? 'radio ' + e.name : e   // a group of them is one stop
  const all = [...document.querySelectorAll('a[href], button, input, select, textarea, summary, [tabindex="0"]')]
  window.wanted = new Set(all.filter(e => seen(e) && !e.disabled && e.tabIndex >= 0).map(one))
  window.one = one
  return window.wanted.size
}"""
STOP = """() => {
  const e = document.activeElement
  if (!e || e === document.body) return null
  window.wanted.delete(window.one(e))
  const style = getComputedStyle(e)
  const box = e.getClientRects()[0] ?? e.getBoundingClientRect()  // a link may be of two lines
  const x = Math.min(innerWidth - 1, Math.max(0, box.x + Math.min(box.width, 40) / 2))
  const y = box.y + Math.min(box.height, 30) / 2
  const top = document.elementFromPoint(x, y)
  const met = top && (e.contains(top) || top.contains(e) || top.closest('label')?.contains(e))
  const ring = style.outlineStyle !== 'none' && parseFloat(style.outlineWidth) >= 2
  const name = e.outerHTML.slice(0, 120)
  const tall = box.height > innerHeight / 2 && box.top < innerHeight && box.bottom > 0
  return { name, ring, clear: tall || (y >= 0 && y < innerHeight && !!met) }
}"""
LEFT = "() => [...window.wanted].map(e => e.outerHTML?.slice(0, 120) ?? e)"
HEARD = ".visually-hidden[aria-live=polite]"

pytestmark = MARKS


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as found:
        yield found


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    root = tmp_path_factory.mktemp("runs")
    make_run(root, "string")
    make_run(root, "other", beta=0.05)
    with served(root) as found:
        yield found


@pytest.fixture
def live(tmp_path: Path) -> Iterator[str]:
    """A run that goes on, five updates a second, and the page over it."""
    trainer = Trainer(make_run(tmp_path, "live", updates=30, ended=False), 30, 0.2)
    trainer.start()
    with served(tmp_path) as found:
        yield found
    trainer.done.set()
    trainer.join(10)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("screen", SCREENS)
def test_tab_reaches_every_control_in_sight_with_a_ring_and_comes_out_again(
    browser: Any, address: str, screen: str, size: str
) -> None:
    width, height = SIZES[size]
    with opened(browser, address, f"{screen}{'&' if '?' in screen else '?'}run=string",
                viewport={"width": width, "height": height}) as page:  # fmt: skip
        count = page.evaluate(CONTROLS)
        assert count > 10
        stops: list[dict[str, Any]] = []
        page.keyboard.press("Tab")
        while (stop := page.evaluate(STOP)) is not None:
            stops.append(stop)
            assert len(stops) <= count + 5, f"no way out after {stop['name']}"
            page.keyboard.press("Tab")
        assert page.evaluate(LEFT) == []
        assert [stop["name"] for stop in stops if not stop["ring"]] == []
        assert [stop["name"] for stop in stops if not stop["clear"]] == []


def test_the_slider_knows_all_keys_of_a_slider(browser: Any, address: str) -> None:
    with opened(browser, address, "play?run=string") as page:
        slider = page.locator("input[type=range]").first
        slider.focus()

        def beta(key: str) -> float:
            page.keyboard.press(key)
            page.wait_for_timeout(150)
            told = slider.get_attribute("aria-valuetext")
            shown = re.search(r"β = ([\d.]+)", page.inner_text(".pull"))
            assert told.startswith(f"β {shown[1]},")
            return float(shown[1])

        assert beta("Home") == 0.0
        least, most = beta("ArrowUp"), beta("End")
        assert 0 < least < 0.01
        assert most > 2
        assert beta("ArrowDown") == pytest.approx(most / 1.05, rel=0.01)
        assert beta("PageDown") < most / 1.5
        assert beta("PageUp") > most / 1.2


def test_help_takes_the_focus_and_gives_it_back(browser: Any, address: str) -> None:
    with opened(browser, address, "play?run=string") as page:
        last = page.locator("summary").last
        last.focus()  # far below: what opens above is brought into sight
        page.keyboard.press("?")
        help_ = page.get_by_role("region", name="Help")
        assert help_.evaluate("e => e === document.activeElement")
        assert 0 <= help_.bounding_box()["y"] < 700
        page.keyboard.press("Escape")
        assert help_.count() == 0
        assert last.evaluate("e => e === document.activeElement")


def test_what_a_number_means_opens_with_enter_and_closes_with_escape(browser: Any, address: str) -> None:
    with opened(browser, address, "play?run=string") as page:
        name = page.locator(".term .name").first
        name.focus()
        page.keyboard.press("Enter")
        meaning = page.locator(".term [popover]").first
        assert meaning.is_visible()
        page.keyboard.press("Escape")
        assert not meaning.is_visible()
        assert name.evaluate("e => e === document.activeElement")


def test_the_numbers_of_each_token_are_in_reach_of_keys(browser: Any, address: str) -> None:
    with opened(browser, address, "samples?run=string&split=train") as page:
        page.locator("article summary", has_text="Token by token").first.focus()
        page.keyboard.press("Enter")
        table = page.locator("article table").first
        table.wait_for()
        heads = table.locator("th").all_inner_texts()
        assert heads == ["token", "p", "p of the reference", "KL, nats", "value", "advantage"]
        reply = page.locator("article").first.locator(".pair > div").last.locator(".token")
        assert table.locator("tbody tr").count() == reply.count()
        assert table.locator("tbody td").nth(3).inner_text() in reply.first.get_attribute("title")


def test_arrows_scroll_a_table_that_has_the_focus_and_leave_beta_alone(browser: Any, address: str) -> None:
    with opened(browser, address, "play?run=string") as page:
        page.locator("figure:has(canvas) summary").first.press("Enter")
        page.locator("figure:has(canvas) .scroll").first.focus()
        page.keyboard.press("ArrowRight")
        page.wait_for_timeout(200)
        assert "beta=" not in page.url


LISTEN = f"""() => {{
  window.heard = []
  const region = document.querySelector('{HEARD}')
  new MutationObserver(() => window.heard.push(region.textContent)).observe(
    region, {{ characterData: true, childList: true, subtree: true }})
}}"""


def test_what_became_of_a_wish_and_which_screen_it_is_are_told_to_whoever_listens(browser: Any, live: str) -> None:
    with opened(browser, live, "play?run=live") as page:
        page.wait_for_selector(".pulse")
        page.evaluate(LISTEN)
        page.locator("input[type=range]").first.press("ArrowRight")
        until(page, lambda: any(re.search(r"β = .*applied at update \d+", said) for said in page.evaluate("heard")))
        page.get_by_role("link", name="Samples", exact=True).press("Enter")
        until(page, lambda: "Samples" in page.evaluate("heard"))


def test_a_server_that_ends_and_comes_back_is_told_of(browser: Any, tmp_path: Path) -> None:
    make_run(tmp_path, "string")
    context = browser.new_context()  # a lost connection is an error in the console
    page = context.new_page()
    with served(tmp_path) as address:
        page.goto(address)
        page.wait_for_selector("main h1", state="attached")
        page.wait_for_timeout(600)
        page.evaluate(LISTEN)
    until(page, lambda: any("server is away" in said for said in page.evaluate("heard")))
    with served(tmp_path, "", "--port", address.split(":")[2].partition("/")[0]):
        until(page, lambda: "The server answers again." in page.evaluate("heard"))
    context.close()
