"""A report in headless Chromium: text, sizes, contrast, pixels; and it requests no other file."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from baton.report import build
from tests.report_browser import Page, luminance, opened
from tests.report_run import make_run


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of a whole run."""
    return build(make_run(tmp_path_factory.mktemp("whole")))


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    """Headless Chromium with an empty profile."""
    with opened(tmp_path_factory.mktemp("profile")) as page:
        yield page


@pytest.mark.parametrize(("width", "dark"), [(1280, False), (1280, True), (420, False), (420, True)])
def test_chromium_shows_the_page(browser: Page, whole: Path, width: int, dark: bool) -> None:
    browser.open(whole, width, dark)
    shown = browser.run("document.body.innerText")
    assert "ppo raised the gold score of sft" in shown and "</div><script>alert(1)</script>" in shown

    # The page does not scroll sideways, and every chart has a size.
    assert browser.run("document.documentElement.scrollWidth") == width
    sticking_out = """[...document.querySelectorAll('main *, header *')]
        .filter(e => !e.closest('.scroll, svg, .hidden') && e.getBoundingClientRect().right > innerWidth + 1)
        .map(e => e.tagName + '.' + e.className)"""
    assert browser.run(sticking_out) == []
    sizes = browser.run("[...document.querySelectorAll('svg.plot')].map(e => e.getBoundingClientRect().width)")
    assert len(sizes) > 15 and min(sizes) > 250
    lineages = "[...document.querySelectorAll('.lineage')].map(e => e.getBoundingClientRect().height > 50)"
    assert browser.run(lineages) == ([True, False] if width > 720 else [False, True])

    # Text has a readable contrast on the page's own background.
    ground, ink = (browser.run(f"getComputedStyle(document.body).{name}") for name in ("backgroundColor", "color"))
    luminances = sorted(luminance(color) for color in (ground, ink))
    assert (luminances[1] + 0.05) / (luminances[0] + 0.05) > 7
    assert (luminance(ground) < 0.1) == dark

    picture = browser.picture()
    assert picture.width == width and picture.height > 3000
    assert len(set(picture.resize((width // 2, 2000)).getdata())) > 500, "the picture is nearly blank"

    addresses = {
        e["params"]["request"]["url"] for e in browser.events if e.get("method") == "Network.requestWillBeSent"
    }
    assert {address for address in addresses if not address.startswith("data:")} == {whole.as_uri()}
    trouble = ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded", "Page.javascriptDialogOpening")
    assert [event for event in browser.events if event.get("method") in trouble] == []


def test_chromium_opens_the_numbers(browser: Page, whole: Path) -> None:
    browser.open(whole, 420)
    tables = "[...document.querySelectorAll('details table')].filter(e => e.checkVisibility()).length"
    assert browser.run(tables) == 0
    assert "first try of it" not in browser.run("document.body.innerText")
    browser.run("document.querySelectorAll('details').forEach(e => { e.open = true })")
    assert browser.run(tables) > 15
    assert "first try of it" in browser.run("document.body.innerText")
    assert browser.run("document.documentElement.scrollWidth") == 420
