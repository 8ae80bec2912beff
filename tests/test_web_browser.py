"""The page in a real Chromium, over the real server: what is seen, what keys do, who can use it, and how fast it is."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from page_runs import EVIL, make_run, numbers, sample
from tether.store import RunStore
from web_pages import MARKS, ROOT, Trainer, chromium, is_idle, opened, served, until, updates_of

AXE = ROOT / "web" / "node_modules" / "axe-core" / "axe.min.js"
SCREENS = ("play", "samples", "attached", "runs?compare=string,other", "learn")

pytestmark = MARKS


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("runs")
    make_run(root, "string")
    make_run(root, "other", beta=0.05)
    return root


@pytest.fixture(scope="module")
def address(runs: Path) -> Iterator[str]:
    with served(runs) as found:
        yield found


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as found:
        yield found


def test_the_token_leaves_the_address(browser: Any, address: str) -> None:
    with opened(browser, address, "play?run=string") as page:
        assert "token" not in page.url


def test_a_finished_run_opens_with_its_numbers_and_no_command(browser: Any, address: str) -> None:
    with opened(browser, address, "play?run=string") as page:
        assert "update 60 of 60 · finished" in page.inner_text(".standing")
        last = numbers(59, 0.2)["score/mean"]
        assert abs(float(page.inner_text(".figures .number >> nth=0")) - last) < 0.1
        assert page.get_by_role("button", name="cut the string").count() == 0


def test_what_a_model_says_is_text(browser: Any, address: str) -> None:
    with opened(browser, address, "samples?run=string") as page:
        page.wait_for_selector("article")
        assert EVIL in page.inner_text("main")
        assert page.locator("main img, main script").count() == 0
        assert "hacked" not in page.title()


def test_a_runs_name_a_prompt_and_an_alarm_are_text(browser: Any, tmp_path: Path) -> None:
    """What a folder copied from elsewhere may hold: it is shown as it stands, on every screen."""
    run, name = make_run(tmp_path, "plain"), "<img src=x onerror=document.title='hacked'>"
    with RunStore.open(run, readonly=False) as store, store.update(60) as update:
        update.metrics({"seconds/checks": 0.1, "kl/mean": 1.0})
        update.sample(replace(sample(60, 0, "probe"), prompt=EVIL))
        told = {"seen": EVIL, "remedy": EVIL, "evidence": {EVIL: [EVIL]}}
        update.event("too_many_epochs", told, "alarm")
    run.rename(tmp_path / name)
    with served(tmp_path) as address:
        for screen in ("play", "samples", "attached", "runs?compare=0"):
            with opened(browser, address, screen) as page:
                page.wait_for_timeout(500)
                assert page.locator("main img, main script, .bar img").count() == 0
                assert page.title() != "hacked"
                assert name in page.inner_text("body") + page.inner_text(".bar select")
                if screen in ("samples", "attached"):
                    assert EVIL in page.inner_text("main")


def test_the_reference_stands_beside_the_policy_with_figures(browser: Any, address: str) -> None:
    with opened(browser, address, "samples?run=string") as page:
        first = page.locator("article").first.inner_text()
        assert "the reference said" in first
        assert re.search(r"score \+1\.50 − β 0\.2 · K 3\.00 = \+\d", first.replace("\n", " "))


def test_the_address_holds_the_state(browser: Any, address: str) -> None:
    with opened(browser, address, "samples?run=string") as page:
        page.get_by_label("the update’s own").check()
        page.get_by_label("advantage", exact=True).check()
        until(page, lambda: "tint=advantage" in page.url)
        before = page.url
        page.reload()
        page.wait_for_selector("article")
        assert page.url == before
        assert page.get_by_label("advantage", exact=True).is_checked()
        assert page.get_by_label("the update’s own").is_checked()


def test_an_arrow_moves_beta_by_five_percent_anywhere_on_play(browser: Any, address: str) -> None:
    with opened(browser, address, "play?run=string") as page:

        def beta() -> float:
            return float(re.search(r"β = ([\d.]+)", page.inner_text(".pull"))[1])  # type: ignore[index]

        page.locator("body").press("ArrowRight")
        until(page, lambda: "beta=" in page.url)
        before = beta()
        page.locator("body").press("ArrowRight")
        page.wait_for_timeout(200)
        assert abs(beta() / before - 1.05) < 0.005
        page.locator("input[type=range]").first.press("ArrowLeft")
        page.wait_for_timeout(200)
        assert abs(beta() - before) < 1e-9
        page.locator("body").press("?")
        assert page.get_by_label("Help", exact=True).last.is_visible()


def test_the_ghost_follows_within_a_frame(browser: Any, address: str) -> None:
    """From the slider's event to the page's changed text, without waiting for a frame: below 16 ms."""
    with opened(browser, address, "play?run=string") as page:
        page.wait_for_selector(".layers")
        spent = page.evaluate(
            """async () => {
              const slider = document.querySelector('input[type=range]'), spent = []
              for (let i = 0; i < 60; i++) {
                slider.value = 60 + i
                const before = performance.now()
                slider.dispatchEvent(new Event('input', { bubbles: true }))
                await Promise.resolve(); await Promise.resolve(); await Promise.resolve()
                document.querySelector('.layers').getBoundingClientRect()
                spent.push(performance.now() - before)
                await new Promise(requestAnimationFrame)
              }
              return spent.sort((a, b) => a - b)
            }"""
        )
        print(f"ghost: median {spent[30]:.1f} ms, nine of ten below {spent[54]:.1f} ms")
        if is_idle():
            assert spent[30] < 16


@pytest.mark.parametrize("screen", SCREENS)
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_serious(browser: Any, address: str, screen: str, scheme: str) -> None:
    with opened(
        browser, address, f"{screen}{'&' if '?' in screen else '?'}run=string", color_scheme=scheme, bypass_csp=True
    ) as page:
        page.wait_for_timeout(500)
        page.add_script_tag(path=str(AXE))
        found = page.evaluate("axe.run(document, {resultTypes: ['violations']})")
        serious = [
            (violation["id"], [node["html"][:120] for node in violation["nodes"]][:4])
            for violation in found["violations"]
            if violation["impact"] in ("serious", "critical")
        ]
        assert serious == []


@pytest.mark.parametrize(("width", "height"), [(1280, 720), (1280, 800), (390, 844)])
def test_balloon_and_slider_are_in_sight_together(browser: Any, address: str, width: int, height: int) -> None:
    """Whoever opens the page sees what β does without scrolling."""
    with opened(browser, address, "play?run=string", viewport={"width": width, "height": height}) as page:
        assert page.locator(".scene figure svg").first.bounding_box()["y"] >= 0
        slider = page.locator("input[type=range]").first.bounding_box()
        bar = page.locator("nav").bounding_box()
        foot = bar["y"] if width < 640 else height  # on a phone the screens' names lie at the foot
        assert slider["y"] + slider["height"] <= foot


@pytest.mark.parametrize("screen", SCREENS)
def test_nothing_is_wider_than_a_small_phone(browser: Any, address: str, screen: str) -> None:
    phone = {"viewport": {"width": 360, "height": 740}}
    with opened(browser, address, f"{screen}{'&' if '?' in screen else '?'}run=string", **phone) as page:
        page.wait_for_timeout(800)
        assert page.evaluate("document.documentElement.scrollWidth") <= 360


def test_a_run_on_a_slow_disk_is_asked_again_until_it_answers(browser: Any, address: str) -> None:
    """The first question to the run and to its curves are answered as by a disk that hangs."""
    context = browser.new_context()
    page = context.new_page()
    refused: list[str] = []

    def once(route: Any) -> None:
        path = route.request.url.partition("?")[0]
        if path in refused:
            return route.continue_()
        refused.append(path)
        return route.fulfill(status=503, content_type="application/json", body='{"error": "its disk did not answer"}')

    page.route(re.compile(r"/api/runs/string(/history\?.*)?$"), once)
    page.goto(f"{address}#/play?run=string")
    until(page, lambda: page.locator("canvas").count() >= 9)
    assert len(refused) == 2
    assert "update 60 of 60" in page.inner_text(".standing")
    context.close()


def test_an_alarm_is_told_beside_a_string_that_holds(browser: Any, tmp_path: Path) -> None:
    with RunStore.open(make_run(tmp_path, "far"), readonly=False) as store, store.update(60) as update:
        told = {"seen": "57% of tokens clipped", "remedy": "fewer epochs", "evidence": {"ten": ["a reply", "another"]}}
        update.metrics({"seconds/checks": 0.1, "kl/mean": 1.0})
        update.event("too_many_epochs", told, "alarm")
    with served(tmp_path) as address, opened(browser, address, "attached?run=far") as page:
        until(page, lambda: "HOLDING" in page.inner_text(".verdict"))
        assert "one check has something to say" in page.inner_text(".verdict")
        assert page.inner_text(".bar .badge") == "an alarm"
        assert page.locator(".incident li").all_inner_texts() == ["a reply", "another"]


def test_with_reduced_motion_nothing_moves(browser: Any, address: str) -> None:
    with opened(browser, address, "play?run=string", reduced_motion="reduce") as page:
        page.wait_for_timeout(500)
        assert page.evaluate("document.getAnimations().filter(a => a.playState === 'running').length") == 0
        scene = "document.querySelector('.scene figure svg').outerHTML"
        before = page.evaluate(scene)
        page.wait_for_timeout(400)
        assert page.evaluate(scene) == before


def test_every_chart_is_a_figure_with_caption_and_table(browser: Any, address: str) -> None:
    with opened(browser, address, "play?run=string") as page:
        charts = page.locator("figure:has(canvas)")
        assert charts.count() >= 9
        for i in range(charts.count()):
            chart = charts.nth(i)
            assert chart.locator("figcaption").count() == 1
            assert re.search(
                r"from .* at update 0 to .* at update 59", chart.locator("[role=img]").get_attribute("aria-label")
            )
        charts.first.locator("summary").click()
        until(page, lambda: charts.first.locator("tbody tr").count() == 11)


def test_the_lesson_trains_hacks_and_sees_each_mistake(browser: Any, address: str) -> None:
    with opened(browser, address, "learn") as page:
        for title, reason in [
            ("The slingshot", "−β·K"), ("Tied to the wrong post", "before the first update"),
            ("The score on every token", "add up to"), ("Tied to the balloon", "moved by"),
            ("Wrung dry", "at the clip"),
        ]:  # fmt: skip
            page.get_by_role("button", name=title, exact=True).click()
            until(page, lambda reason=reason: reason in page.inner_text("#gotchas .alarm"))
            assert "Alarm at update" in page.inner_text("#gotchas .alarm")
        page.get_by_role("button", name="Hedge spam").click()
        until(page, lambda: len(re.findall("maybe|perhaps", page.inner_text("#hacks .said"))) >= 8)


def test_the_reader_sweeps_beta_with_one_press(browser: Any, address: str) -> None:
    with opened(browser, address, "learn") as page:
        page.get_by_role("button", name="Train one pocket run").click()
        until(page, lambda: "β = 3" in page.inner_text("#beta figure >> nth=0"))
        cut = page.locator("#beta .pick input")
        cut.fill("0")
        gain = re.search(r"At rest: score (\S+) at (\S+) nats, gold (\S+)\.", page.inner_text("#beta"))
        assert gain
        score, drift, gold = (float(number.replace("−", "-")) for number in gain.groups())
        assert score > 4
        assert drift > 8
        assert gold < -1


def test_a_report_shows_the_same_without_any_server(browser: Any, runs: Path, tmp_path: Path) -> None:
    file = tmp_path / "report.html"
    code = "import sys; from tether.cli import main; main(sys.argv[1:])"
    subprocess.run(
        [sys.executable, "-c", code, "report", str(runs / "string"), "--out", str(file)],
        check=True,
        capture_output=True,
    )
    asked: list[str] = []
    with opened(browser, file.as_uri(), "samples?run=string", offline=True) as page:
        assert EVIL in page.inner_text("main")
        page.on("request", lambda request: asked.append(request.url))
        for screen in SCREENS:
            page.goto(f"{file.as_uri()}#/{screen}")
            page.wait_for_selector("main h1", state="attached")
        assert page.get_by_role("button", name="cut the string").count() == 0
        assert [url for url in asked if not url.startswith(("file:", "data:"))] == []


@pytest.fixture
def live(tmp_path: Path) -> Iterator[tuple[str, Trainer]]:
    """A run of 5,000 updates that goes on, ten updates a second, and the page over it."""
    path = make_run(tmp_path, "live", updates=5000, ended=False)
    trainer = Trainer(path, 5000, 0.1)
    trainer.start()
    with served(tmp_path) as address:
        yield address, trainer
    trainer.done.set()
    trainer.join(10)


def test_a_live_run_moves_answers_beta_and_stays_fluent(browser: Any, live: tuple[str, Trainer]) -> None:
    """Nine charts of 5,000 points, ten updates a second: what the page spends on a second of it."""
    address, trainer = live
    with opened(browser, address, "play?run=live") as page:
        page.wait_for_selector(".pulse")
        first = trainer.step
        until(page, lambda: updates_of(page) > first + 5)
        frames, seconds, busy = page.evaluate(
            """async () => {
              let frames = 0, busy = 0, started = performance.now()
              const slow = new PerformanceObserver(list => list.getEntries().forEach(e => busy += e.duration))
              slow.observe({ type: 'longtask' })
              while (performance.now() - started < 5000) { await new Promise(requestAnimationFrame); frames++ }
              return [frames, (performance.now() - started) / 1000, busy]
            }"""
        )
        print(f"live: {frames / seconds:.0f} frames a second, {busy / seconds:.0f} ms a second in tasks above 50 ms")
        if is_idle():
            assert frames / seconds >= 50
        page.locator("input[type=range]").first.press("ArrowRight")
        until(page, lambda: "applied at update" in page.inner_text(".pull"))
        assert abs(trainer.beta / 0.2 - 1.05) < 0.03


def test_the_stream_goes_on_after_the_network_was_away(browser: Any, tmp_path: Path) -> None:
    path = make_run(tmp_path, "live", updates=30, ended=False)
    trainer = Trainer(path, 30, 0.2)
    trainer.start()
    try:
        with served(tmp_path) as address, opened(browser, address, "play?run=live") as page:
            page.context.set_offline(True)
            time.sleep(1.5)
            page.context.set_offline(False)
            now = trainer.step
            until(page, lambda: updates_of(page) >= now + 3)
            trainer.done.set()
            trainer.join(10)
            until(page, lambda: updates_of(page) == trainer.step)
            last = trainer.step - 1
            chart = page.locator("figure:has(canvas)").first
            chart.locator("summary").click()
            until(page, lambda: chart.locator("tbody tr").count() == 11)
            steps = [int(i * last / 10 + 0.5) for i in range(11)]  # a gap or a double would shift them

            def rows() -> list[list[str]]:
                return [row.split("\t") for row in chart.locator("tbody tr").all_inner_texts()]

            until(page, lambda: [int(row[0]) for row in rows()] == steps)  # the last one is drawn a frame later
            told = [float(row[1].replace("−", "-")) for row in rows()]
            assert told == pytest.approx([numbers(step, 0.2)["score/mean"] for step in steps], abs=0.01)
    finally:
        trainer.done.set()
        trainer.join(10)
