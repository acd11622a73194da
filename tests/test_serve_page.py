"""The web chat in headless Chromium, by keyboard: streams, stop, two models side by side, phone width, contrast."""

import json
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from baton.serve import chat
from data.accounting import Accounting
from data.config import FileSource
from data.load import read
from data.records import Preference
from tests.report_browser import Page, luminance, opened, until
from tests.serving import serving, write_model

ANSWERED = "document.querySelectorAll('.again').length == 1 && document.getElementById('send').textContent == 'Send'"
TEXTS = "[...document.querySelectorAll('.turn:last-child .answer .text')].map(e => e.textContent)"
STATUS = "document.getElementById('status').textContent"
TROUBLE = ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Page.javascriptDialogOpening")
KEY = "open sesame"


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with opened(tmp_path_factory.mktemp("profile")) as page:
        yield page


@pytest.fixture(scope="module")
def parents(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return [write_model(folder / "sft"), write_model(folder / "ppo", "llama3_1")]


@pytest.fixture(scope="module")
def server(browser, parents, tmp_path_factory):
    file = tmp_path_factory.mktemp("run") / "preferences.jsonl"
    with serving(parents, preferences=file) as running:
        yield running, file


def visit(browser: Page, server, *, beside: str = "", tokens: int = 24, **look) -> None:
    """Opens the page, with greedy answers, so that they are known."""
    running, _ = server
    browser.open(f"{running.url}/", **{"width": 1280, **look})
    browser.wait("document.getElementById('first').value != ''")
    assert browser.run("document.getElementById('second').value") == "ppo"
    for field, value in (("second", beside), ("temperature", 0), ("tokens", tokens)):
        browser.run(f"document.getElementById('{field}').value = '{value}'")
        browser.run(f"document.getElementById('{field}').dispatchEvent(new Event('change'))")


def asked(browser: Page, *lines: str) -> None:
    """Types a question where the focus is, and sends it."""
    for i, line in enumerate(lines):
        if i:
            browser.press("Enter", shift=True)
        browser.type(line)
    browser.press("Enter")


def plain(running, text: str, before=(), model: str = "sft", tokens: int = 24) -> str:
    """The greedy answer that the server gives to any client."""
    messages = [*before, {"role": "user", "content": text}]
    reply = running.post(
        "/v1/chat/completions", {"model": model, "messages": messages, "temperature": 0, "max_tokens": tokens}
    )
    answer: str = reply.json()["choices"][0]["message"]["content"]
    return answer


def escaped(text: str) -> str:
    """As the page shows these characters: control characters by their escapes."""
    return "".join(c if c in "\n\t" or c.isprintable() or c == "�" else f"\\x{ord(c):02x}" for c in text).replace(
        "\\x0d", "\\r"
    )


@contextmanager
def held_back(running, steps: int) -> Iterator[list[bool]]:
    """The first model decodes this many tokens and then waits, until the list that is given has an element."""
    live, going = running.served[0].live, []
    step, count = live.step, 0

    def limited() -> bool:
        nonlocal count
        if not going and count >= steps:
            return False
        worked = step()
        count += worked
        return worked

    live.step = limited
    try:
        yield going
    finally:
        going.append(True)
        live.step = step
        running.worker.wake()


def test_an_answer_arrives_as_a_stream_and_is_asked_for_by_keyboard(browser, server):
    running, _ = server
    visit(browser, server)
    want = plain(running, "What is 2 + 3?\nIn words.")
    assert browser.run("document.activeElement.id") == "question"
    with held_back(running, 8) as going:
        asked(browser, "What is 2 + 3?", "In words.")
        browser.wait(f"{TEXTS}[0] !== undefined && {TEXTS}[0] !== ''")
        early = browser.run(TEXTS)[0]
        assert browser.run("document.getElementById('log').getAttribute('aria-busy')") == "true"
        assert browser.run("document.getElementById('send').textContent") == "Stop"
        going.append(True)
        running.worker.wake()
        browser.wait(ANSWERED)
    assert browser.run(TEXTS) == [escaped(want)] and escaped(want).startswith(early) and early != escaped(want)
    assert browser.run("document.querySelector('.mine').textContent") == "You: What is 2 + 3?\nIn words."
    assert browser.run("document.getElementById('log').getAttribute('aria-busy')") == "false"

    # Regenerate lies before the field of the question: with the system prompt that is set by then.
    browser.run("document.getElementById('system').value = 'Be brief.'")
    browser.press("Tab", shift=True)
    assert browser.run("document.activeElement.textContent") == "Regenerate"
    browser.press("Enter")
    brief = plain(running, "What is 2 + 3?\nIn words.", [{"role": "system", "content": "Be brief."}])
    browser.wait(f"{ANSWERED} && {TEXTS}[0] === {json.dumps(escaped(brief))}")
    assert brief != want

    # The next question follows the last answer.
    browser.run("document.getElementById('question').focus()")
    asked(browser, "Why?")
    browser.wait(f"{ANSWERED} && document.querySelectorAll('.turn').length == 2")
    before = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "What is 2 + 3?\nIn words."},
        {"role": "assistant", "content": brief},
    ]
    assert browser.run(TEXTS) == [escaped(plain(running, "Why?", before))]
    assert_quiet(browser, running)


def assert_quiet(browser: Page, running) -> None:
    """Nothing but this server was asked, and the browser complains of nothing."""
    sent = {e["params"]["request"]["url"] for e in browser.events if e.get("method") == "Network.requestWillBeSent"}
    assert {address for address in sent if not address.startswith((f"{running.url}/", "data:,"))} == set()
    assert [event for event in browser.events if event.get("method") in (*TROUBLE, "Log.entryAdded")] == []


def test_escape_stops_an_answer_and_frees_its_place(browser, server):
    running, _ = server
    visit(browser, server, tokens=900)
    before = running.state.metrics.disconnects
    with held_back(running, 6) as going:
        asked(browser, "What is 2 + 3?")
        browser.wait(f"{TEXTS}[0] !== undefined && {TEXTS}[0] !== ''")
        assert running.worker.running == 1
        browser.press("Escape")
        browser.wait(ANSWERED)
        assert browser.run(STATUS) == "Stopped"
        until(lambda: running.state.metrics.disconnects == before + 1, "the server sees that the page leaves")
        going.append(True)
        running.worker.wake()
        until(lambda: running.worker.running == 0, "the place is free")
    (said,) = browser.run(TEXTS)
    assert 0 < len(said) < len(escaped(plain(running, "What is 2 + 3?", tokens=60)))
    assert browser.run("document.querySelector('.note').textContent") == "stopped"
    assert browser.run("document.activeElement.id") == "question"
    assert_quiet(browser, running)


@pytest.mark.parametrize("blind", [False, True])
def test_two_answers_side_by_side_and_a_preference_that_stages_can_read(browser, server, blind):
    running, file = server
    file.unlink(missing_ok=True)
    visit(browser, server, beside="ppo")
    browser.run(f"document.getElementById('blind').checked = {json.dumps(blind)}")
    asked(browser, "What is 2 + 3?")
    browser.wait(ANSWERED)
    answers = {model: plain(running, "What is 2 + 3?", model=model) for model in ("sft", "ppo")}
    heads = "[...document.querySelectorAll('.answer h3')].map(e => e.textContent)"
    shown = browser.run(TEXTS)
    if blind:
        assert browser.run(heads) == ["Answer 1", "Answer 2"]
        assert set(shown) == {escaped(text) for text in answers.values()}
    else:
        assert browser.run(heads) == ["sft", "ppo"]
        assert shown == [escaped(answers["sft"]), escaped(answers["ppo"])]
    tops = browser.run("[...document.querySelectorAll('.answer')].map(e => e.getBoundingClientRect().top)")
    assert tops[0] == tops[1], "they are side by side"

    # From the question back over Regenerate to the button below the second answer.
    for _ in range(2):
        browser.press("Tab", shift=True)
    title = "Answer 2" if blind else "ppo"
    assert browser.run("document.activeElement.getAttribute('aria-label')") == f"Prefer this answer: {title}"
    browser.press("Space")
    browser.wait("document.querySelectorAll('.answer.preferred').length == 1")
    better = next(model for model, text in answers.items() if escaped(text) == shown[1])
    worse = next(model for model in answers if model != better)
    assert browser.run(heads) == [worse, f"{better}, preferred"] and (blind or better == "ppo")
    assert browser.run(STATUS) == "Preference kept (1 in this chat)"
    assert browser.run("document.querySelectorAll('.prefer').length") == 0

    (line,) = file.read_text(encoding="utf-8").splitlines()
    row = json.loads(line)
    assert (row["chosen_model"], row["rejected_model"]) == (better, worse)
    accounting = Accounting()
    (pair,) = read([FileSource(source="file", path=file.name)], Preference, file.parent, 0, accounting)
    assert (pair.chosen, pair.rejected) == (answers[better], answers[worse])
    assert [(m.role, m.content) for m in pair.prompt] == [("user", "What is 2 + 3?")]
    assert not accounting.dropped

    # The conversation goes on with the answer that was preferred, for both.
    assert browser.run("document.activeElement.id") == "question"
    asked(browser, "Why?")
    browser.wait(f"{ANSWERED} && document.querySelectorAll('.turn').length == 2")
    before = [{"role": "user", "content": "What is 2 + 3?"}, {"role": "assistant", "content": answers[better]}]
    assert set(browser.run(TEXTS)) == {escaped(plain(running, "Why?", before, model)) for model in answers}
    assert_quiet(browser, running)


def test_the_text_of_a_model_is_text(browser, server, monkeypatch):
    running, _ = server
    evil = "<img src=x onerror=alert(1)><script>alert(2)</script>&lt; \x1b[31m\x07\u202eabc\u2066\x85\r\u2028 end"
    chunks = chat.chunks

    async def other(*given):
        async for event in chunks(*given):
            delta = event["choices"][0]["delta"]
            if delta.get("content"):
                delta["content"] = evil[:9]
                yield event
                delta["content"] = evil[9:]
                yield event
                return

    monkeypatch.setattr(chat, "chunks", other)
    visit(browser, server)
    asked(browser, "\u202eHi <b>")
    browser.wait(ANSWERED)
    want = "<img src=x onerror=alert(1)><script>alert(2)</script>&lt; "
    want += r"\x1b[31m\x07\u202eabc\u2066\x85\r\u2028 end"
    assert browser.run(TEXTS) == [want]
    assert browser.run("document.querySelectorAll('img, .turn script, .turn b').length") == 0
    assert browser.run("document.querySelector('.mine').textContent") == "You: \\u202eHi <b>"
    assert_quiet(browser, running)


def test_an_error_of_the_server_is_shown_and_the_chat_goes_on(browser, server):
    visit(browser, server, tokens=1000)
    asked(browser, "What is " + "2 + " * 300 + "3?")
    browser.wait(ANSWERED)
    note = browser.run("document.querySelector('.note.bad').textContent")
    assert "more than the 1024 that fit" in note
    assert browser.run(STATUS) == "There is no whole answer"
    browser.run("document.getElementById('tokens').value = ''")
    asked(browser, "Hi")
    assert browser.run("document.activeElement.id") == "tokens", "the browser says what is wrong with it"
    browser.run("document.getElementById('tokens').value = 5; document.getElementById('question').focus()")
    browser.press("Enter")
    browser.wait(f"{ANSWERED} && document.querySelectorAll('.turn').length == 2 && {TEXTS}[0] != ''")
    browser.run("document.getElementById('fresh').click()")
    assert browser.run("document.querySelectorAll('.turn').length") == 0


@pytest.mark.parametrize("dark", [False, True])
def test_a_phone_shows_everything_with_contrast_and_names(browser, server, dark):
    visit(browser, server, beside="ppo", width=360, height=720, dark=dark)
    asked(browser, "x" * 300)
    browser.wait(f"{ANSWERED} && document.querySelectorAll('.prefer').length == 2")
    for opened_settings in (False, True):
        browser.run(f"document.getElementById('settings').open = {json.dumps(opened_settings)}")
        assert browser.run("document.documentElement.scrollWidth") == 360
        sideways = "[...document.querySelectorAll('body *')].filter(e => e.getBoundingClientRect().right > 360.5"
        sideways += " || (e.scrollWidth > e.clientWidth + 1 && !e.matches('.hidden, select') && e.clientWidth > 0))"
        assert browser.run(f"{sideways}.map(e => e.tagName + '#' + e.id + '.' + e.className)") == []
        send = browser.run("(r => [r.top, r.bottom])(document.getElementById('send').getBoundingClientRect())")
        assert 0 < send[0] < send[1] <= 720, "the button stays in the window"
        low = [found for found in browser.run(COLORS) if contrast(found[1], found[2]) < 4.5]
        assert low == []
    nodes = browser.call("Accessibility.getFullAXTree")["nodes"]
    controls = [
        (node["role"]["value"], node.get("name", {}).get("value", ""))
        for node in nodes
        if node.get("role", {}).get("value") in ("button", "textbox", "combobox", "spinbutton", "checkbox", "log")
    ]
    assert len(controls) > 10 and all(name for _, name in controls), controls


COLORS = """[...document.querySelectorAll('body *')].filter(e => e.checkVisibility() && !e.matches('.hidden, option') &&
    ([...e.childNodes].some(n => n.nodeType == 3 && n.data.trim()) || e.matches('input, textarea'))).map(e => {
  let ground = e;
  while (getComputedStyle(ground).backgroundColor == 'rgba(0, 0, 0, 0)') ground = ground.parentElement;
  return [e.outerHTML.slice(0, 80), getComputedStyle(e).color, getComputedStyle(ground).backgroundColor];
})"""


def contrast(one: str, other: str) -> float:
    """Of two colours (WCAG 2)."""
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_the_key_is_asked_for_and_kept_in_memory_only(browser, parents, tmp_path):
    with serving(parents[:1], key=KEY, preferences=tmp_path / "preferences.jsonl") as running:
        browser.open(f"{running.url}/", 1280)
        browser.wait("document.getElementById('ask').open")
        assert browser.run("document.activeElement.id") == "key"
        asked(browser, "other")
        browser.wait("document.getElementById('why').textContent == 'The server does not know this key.'")
        asked(browser, KEY)
        browser.wait("!document.getElementById('ask').open && document.getElementById('first').value == 'sft'")
        assert browser.run("document.activeElement.id") == "question"
        browser.run("document.getElementById('temperature').value = 0; document.getElementById('tokens').value = 9")
        asked(browser, "Hi")
        browser.wait(f"{ANSWERED} && {TEXTS}[0] != ''")
        everywhere = "document.documentElement.outerHTML + document.getElementById('key').value + document.cookie"
        everywhere += " + location.href + JSON.stringify([localStorage, sessionStorage])"
        assert KEY not in browser.run(everywhere)
        browser.open(f"{running.url}/", 1280)
        browser.wait("document.getElementById('ask').open")
