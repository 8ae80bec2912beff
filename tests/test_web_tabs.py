"""Many tabs over one server, in a real Chromium: a browser opens six connections to it and no more."""

from __future__ import annotations

from pathlib import Path

from page_runs import make_run
from web_pages import MARKS, WAIT_MS, Trainer, chromium, served, until, updates_of

pytestmark = MARKS
UNSEEN = "Object.defineProperty(document, 'hidden', { get: () => !!window.away })"
HIDE = "away => { window.away = away; document.dispatchEvent(new Event('visibilitychange')) }"


def test_an_eighth_tab_opens_and_the_first_has_lost_nothing_when_it_is_looked_at_again(tmp_path: Path) -> None:
    trainer = Trainer(make_run(tmp_path, "live", updates=30, ended=False), 30, 0.2)
    trainer.start()
    try:
        with chromium() as browser, served(tmp_path) as address:
            context = browser.new_context()
            context.add_init_script(UNSEEN)
            context.set_default_timeout(WAIT_MS)
            tabs = []
            for number in range(8):
                page = context.new_page()
                page.goto(address if number == 0 else f"{address.partition('?')[0]}#/play?run=live")
                page.wait_for_selector(".pulse")
                tabs.append(page)
                page.evaluate(HIDE, number < 7)
                if number == 5:
                    page.wait_for_timeout(4000)  # every connection there is was taken
            first = tabs[0]
            assert updates_of(first) < trainer.step - 5
            first.evaluate(HIDE, False)
            until(first, lambda: updates_of(first) >= trainer.step - 2)
            trainer.done.set()
            trainer.join(10)
            until(first, lambda: updates_of(first) == trainer.step)
            steps = int(first.locator("figure:has(canvas) [role=img]").first.get_attribute("aria-label").split()[-1])
            assert steps == trainer.step - 1
            context.close()
    finally:
        trainer.done.set()
        trainer.join(10)


def test_a_tab_that_opens_where_nobody_looks_gives_its_connection_back(tmp_path: Path) -> None:
    trainer = Trainer(make_run(tmp_path, "live", updates=30, ended=False), 30, 0.2)
    trainer.start()
    try:
        with chromium() as browser, served(tmp_path) as address:
            context = browser.new_context()
            context.add_init_script(f"window.away = true; {UNSEEN}")
            context.set_default_timeout(WAIT_MS)
            page = context.new_page()
            page.goto(address)
            page.wait_for_selector(".pulse", state="attached")
            page.wait_for_timeout(6000)
            told, made = updates_of(page), trainer.step
            page.wait_for_timeout(3000)
            assert updates_of(page) == told
            assert trainer.step > made
            page.evaluate(HIDE, False)
            until(page, lambda: updates_of(page) >= trainer.step - 2)
            context.close()
    finally:
        trainer.done.set()
        trainer.join(10)
