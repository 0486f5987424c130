"""The page of a run in a real browser: headless Chromium, driven by Playwright."""

from __future__ import annotations

import asyncio
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fedkit.errors import NoSuchRun, Reason
from fedkit.report.facts import Handed
from fedkit.report.page import write
from fedkit.rounds.call import Refusal
from fedkit.rounds.journal import RoundRecord
from fedkit.server.listener import Listener
from fedkit.server.pages import Pages, Told
from fedkit.status import RunStatus
from tests.deploy.passports import passport
from tests.report.runs import CLIENTS, facts, record

sync_api = pytest.importorskip("playwright.sync_api", reason="needs fedkit[browser]")

Open = Callable[..., "sync_api.Page"]

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
OUT = Path(os.environ.get("OUT", "out")) / "pages"
KEY = "k" * 32

# Every element with text of its own: the contrast between its colour and the first ground below it (WCAG 2.2).
CONTRASTS = """() => {
  const rgb = (text) => text.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => [r, g, b].map((c) => c / 255)
    .map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4))
    .reduce((sum, c, at) => sum + c * [0.2126, 0.7152, 0.0722][at], 0);
  const ground = (one) => {
    const found = rgb(getComputedStyle(one).backgroundColor);
    return found.length === 3 || found[3] === 1 || one.parentElement === null ? found : ground(one.parentElement);
  };
  const own = (one) => [...one.childNodes].some((node) => node.nodeType === 3 && node.data.trim());
  return [...document.body.querySelectorAll("*")]
    .filter((one) => own(one) && one.checkVisibility() && !["TITLE", "title", "SCRIPT"].includes(one.tagName))
    .map((one) => {
      const style = getComputedStyle(one);
      const both = [light(rgb(one.tagName === "text" ? style.fill : style.color)), light(ground(one))];
      return [(Math.max(...both) + 0.05) / (Math.min(...both) + 0.05), one.outerHTML.slice(0, 80)];
    });
}"""


@pytest.fixture(scope="module")
def browser() -> Iterator[sync_api.Browser]:
    with sync_api.sync_playwright() as playwright:
        if CHROMIUM is None and not Path(playwright.chromium.executable_path).exists():
            pytest.skip("there is no Chromium here: apt-get install chromium, or playwright install chromium")
        found = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    bad = Refusal("<script>alert(1)</script>", Reason.FAILED, "<img src=x onerror=alert(2)>")
    run = facts(refusals=(bad,))
    return write(tmp_path_factory.mktemp("page") / "run.html", run, Handed(passport(), "0" * 64))


@pytest.fixture
def opened(browser: sync_api.Browser, file: Path) -> Iterator[Open]:
    """A page in a window of its own; what it complains of, or asks anybody for, fails the test."""
    windows, said = [], []

    def show(**settings: object) -> sync_api.Page:
        window = browser.new_context(viewport={"width": 1100, "height": 900}, **settings)
        windows.append(window)
        page = window.new_page()
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("dialog", lambda dialog: said.append(dialog.message))
        page.on("request", lambda request: said.append(request.url) if request.url != file.as_uri() else None)
        page.goto(file.as_uri())
        return page

    yield show
    for window in windows:
        window.close()
    assert said == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_can_be_read_in_light_and_in_dark(opened: Open, scheme: str) -> None:
    page = opened(color_scheme=scheme)
    for summary in page.locator("summary").all():
        summary.click()
    found = page.evaluate(CONTRASTS)
    assert len(found) > 150
    assert [one for one in found if one[0] < 4.5] == []
    OUT.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=OUT / f"{scheme}.png", full_page=True)


def test_the_button_turns_light_into_dark_and_back(opened: Open) -> None:
    page = opened(color_scheme="light")
    ground = "getComputedStyle(document.body).backgroundColor"
    button = page.get_by_role("button", name="Dark")
    seen = [(page.evaluate(ground), button.get_attribute("aria-pressed"))]
    for _ in range(2):
        button.press("Enter")
        seen.append((page.evaluate(ground), button.get_attribute("aria-pressed")))
    assert seen == [("rgb(255, 255, 255)", "false"), ("rgb(18, 22, 28)", "true"), ("rgb(255, 255, 255)", "false")]


def test_everything_can_be_reached_and_opened_from_the_keyboard(opened: Open) -> None:
    page = opened()
    names, reached = [], "document.activeElement.textContent.trim().slice(0, 30)"
    for _ in range(60):
        page.keyboard.press("Tab")
        names.append(page.evaluate(reached))
        style = "getComputedStyle(document.activeElement)"
        assert page.evaluate(f"{style}.outlineStyle !== 'none' || document.activeElement === document.body"), names[-1]
    links = page.locator("nav a").all_inner_texts()
    assert names[:2] == ["Skip to the contents", "Dark"]
    assert names[2 : 2 + len(links)] == links
    assert names.count("Numbers of this chart") >= page.locator("summary").count()
    summary = page.locator("summary").first
    summary.press("Enter")
    assert page.locator("details").first.get_attribute("open") is not None
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.getAttribute('role')") == "region"


def test_a_screen_reader_is_told_of_parts_charts_and_tables(opened: Open) -> None:
    page = opened()
    assert page.get_by_role("heading", level=1).all_inner_texts() == ["Run heart-1"]
    heads = page.get_by_role("heading", level=2).all_inner_texts()
    for head in heads:
        assert page.get_by_role("region", name=head, exact=True).count() >= 1
    for part in ("main", "navigation", "banner", "status"):
        assert page.get_by_role(part).count() == 1, part
    charts = page.get_by_role("img")
    assert charts.count() == page.locator("svg.chart").count() >= 6
    assert all(len(one.get_attribute("aria-label")) > 20 for one in charts.all())
    for summary in page.locator("summary").all():
        summary.click()
    tables = page.get_by_role("table")
    assert tables.count() == page.locator("table").count() >= 10
    assert page.get_by_role("table", name="Wall time by what came of it").get_by_role("rowheader").count() == 3


def test_without_its_script_the_page_is_whole(opened: Open) -> None:
    bare, whole = opened(java_script_enabled=False), opened()
    assert bare.locator("main").inner_text() == whole.locator("main").inner_text()
    assert bare.locator("button").is_hidden()


def test_on_a_telephone_only_tables_scroll_sideways(opened: Open) -> None:
    page = opened()
    page.set_viewport_size({"width": 360, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth") <= 360


class Growing:
    """A shelf with one run, which grows."""

    def __init__(self) -> None:
        self.history: list[RoundRecord] = [record(1)]
        self.state = "running"

    def runs(self, name: str = "") -> list[RunStatus]:
        last = self.history[-1]
        return [RunStatus("heart-1", "heart", "FedAvg", self.state, last.round, 4, 1, "", 0.0, 0.0, last, ("final",))]

    def told(self, name: str) -> Told:
        if name != "heart-1":
            raise NoSuchRun(name)
        return Told(self.runs()[0], list(self.history), {"abandoned": ()})


@pytest.fixture
def shelf() -> Iterator[tuple[Growing, str]]:
    loop, found = asyncio.new_event_loop(), Growing()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    listener = Listener("127.0.0.1", 0, Pages(found, KEY, loop))
    yield found, f"http://{listener.address}"
    listener.close()
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


@pytest.mark.parametrize("link", ["", "fedkit:" + KEY + "@"], ids=["asked", "link"])
def test_a_live_page_grows_and_keeps_what_is_open_and_where_one_is(
    browser: sync_api.Browser, shelf: tuple[Growing, str], link: str
) -> None:
    told, address = shelf
    given = {} if link else {"http_credentials": {"username": "fedkit", "password": KEY}}
    window = browser.new_context(**given)
    page = window.new_page()
    asked, said = [], []
    page.on("request", lambda request: asked.append(request.url))
    page.on("console", lambda message: said.append(message.text))
    page.goto(f"{address.replace('//', '//' + link)}/runs/heart-1")
    numbers = page.locator("#seconds-numbers")
    numbers.locator("summary").press("Enter")
    assert numbers.locator("tbody tr").count() == 1
    told.history.append(record(2))
    sync_api.expect(numbers.locator("tbody tr")).to_have_count(2)
    assert numbers.get_attribute("open") is not None
    assert page.evaluate("document.activeElement.parentElement.id") == "seconds-numbers"
    sync_api.expect(page.get_by_role("status")).to_have_text("Running, round 2 of 4.")
    told.state = "finished"
    sync_api.expect(page.get_by_role("status")).to_have_text("Finished, round 2 of 4.")
    assert page.locator("main").get_attribute("data-live") is None
    assert all(name in page.locator("main").inner_text() for name in CLIENTS)
    assert {url.partition("/runs")[0].replace(link, "") for url in asked} == {address}
    assert said == []
    window.close()
