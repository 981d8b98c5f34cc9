"""compare.py in a real browser: streaming, votes by keyboard, phone width, dark mode, hostile text."""

import shutil
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import uvicorn

from engine.compare.server import listen, make_app
from engine.compare.session import Session
from engine.compare.votes import VoteFile
from tests.compared import TOKEN, XSS, Fake, compared, finish, round_of

playwright = pytest.importorskip("playwright.sync_api", reason="no playwright: pip install -r requirements.txt")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine: apt-get install chromium")


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with playwright.sync_playwright() as library:
        browser = library.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def serving() -> Iterator[Callable[[Session], str]]:
    """Serve a session in a thread; returns the address."""
    servers: list[tuple[uvicorn.Server, threading.Thread, Session]] = []

    def serve(session: Session) -> str:
        listener = listen(0)
        listener.listen()
        settings: dict[str, Any] = {"lifespan": "off", "ws": "none", "log_config": None}
        server = uvicorn.Server(uvicorn.Config(make_app(session, TOKEN), **settings))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        servers.append((server, thread, session))
        return f"http://127.0.0.1:{listener.getsockname()[1]}/?token={TOKEN}"

    yield serve
    for server, thread, session in servers:
        session.close()
        server.should_exit = True
        thread.join(20)


@pytest.fixture
def open_page(chromium, serving) -> Iterator[Callable[..., Any]]:
    """Open a session's page. At the end: no other host was asked, and nothing was said on the console."""
    seen: list[str] = []
    contexts = []

    def note(text: str) -> None:
        if text:
            seen.append(text)

    def open_page(session: Session, **options: Any) -> Any:
        address = serving(session)
        context = chromium.new_context(**options)
        context.set_default_timeout(20_000)
        contexts.append(context)
        page = context.new_page()
        origin = address.split("?")[0]
        page.on("request", lambda request: note("" if request.url.startswith(origin) else request.url))
        page.on("console", lambda message: note(message.text))
        page.on("pageerror", lambda error: note(str(error)))
        page.on("dialog", lambda dialog: note(f"dialog {dialog.message}"))
        page.goto(address)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert seen == []


@pytest.fixture
def votes(tmp_path) -> Iterator[VoteFile]:
    file = VoteFile(tmp_path / "votes.jsonl")
    yield file
    file.close()


def fits(page: Any) -> bool:
    return page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")


@pytest.mark.parametrize(
    "width, scheme", [(1280, "light"), (1280, "dark"), (360, "light"), (360, "dark")], ids=lambda value: str(value)
)
def test_hostile_text_streams_and_is_voted_on_by_keyboard(open_page, votes, width, scheme):
    gate = threading.Semaphore(0)
    session = compared(votes, Fake("sft", [XSS, "x" * 300], gate), Fake("dpo", ["</p>", "two"], gate))
    page = open_page(session, viewport={"width": width, "height": 800}, color_scheme=scheme)
    page.get_by_label("Prompt").fill(XSS)
    page.keyboard.press("Control+Enter")
    expect = playwright.expect
    texts = [page.locator("#text-0"), page.locator("#text-1")]
    expect(page.get_by_role("status")).to_have_text("Writing …")
    for expected in ((XSS, ""), (XSS + "x" * 300, ""), (XSS + "x" * 300, "</p>"), (XSS + "x" * 300, "</p>two")):
        gate.release()
        for text, shown in zip(texts, expected, strict=True):
            expect(text).to_have_text(shown)  # before the responses are complete
    expect(page.get_by_role("group", name="Which response is better?")).to_be_visible()
    assert fits(page) and page.locator(".turn .text").inner_text() == XSS
    assert "sft" not in page.locator("main").inner_text() and votes.rows == []
    page.wait_for_load_state()  # keys are handled by the script
    page.keyboard.press("2")
    expect(page.get_by_role("status")).to_have_text("You chose dpo.")
    expect(page.locator("footer")).to_contain_text("Win rate of sft against dpo: 0.000")
    assert fits(page) and page.locator("main img, main script").count() == 0
    assert [row["vote"] for row in votes.rows] == ["against"]
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert ground == {"light": "rgb(255, 255, 255)", "dark": "rgb(20, 23, 27)"}[scheme]


def test_every_control_is_named_and_reached_by_tab(open_page, votes):
    prompts: list[Any] = [[{"role": "user", "content": "first?"}], [{"role": "user", "content": "second?"}]]
    page = open_page(compared(votes, prompts=prompts))
    page.keyboard.press("Enter")  # "Ask both" has the focus
    playwright.expect(page.get_by_role("button", name="Tie")).to_be_visible()
    names = []
    for _ in range(5):
        page.keyboard.press("Tab")
        names.append(page.evaluate("document.activeElement.textContent"))
    assert names == ["A is better1", "B is better2", "Tie3", "Both are bad4", "Skip"]
    page.keyboard.press("Enter")
    playwright.expect(page.get_by_role("heading", name="Prompt 2 of 2")).to_be_visible()
    assert votes.rows == []
    page.get_by_text("Or a prompt of your own").click()
    box = page.get_by_label("Prompt")
    box.fill("1 of my own")
    box.press("1")  # text, and no vote
    assert box.input_value().count("1") == 2
    assert all(button.inner_text() for button in page.get_by_role("button").all())


def test_keys_are_text_while_one_types(open_page, votes):
    session = compared(votes)
    page = open_page(session)
    session.ask("hi")
    finish(session)
    page.reload()
    page.evaluate("document.querySelector('main').insertAdjacentHTML('beforeend', '<textarea id=extra></textarea>')")
    page.locator("#extra").press("1")
    page.keyboard.press("Control+1")
    time.sleep(0.3)
    assert round_of(session).vote is None
    page.locator("h1").click()
    page.keyboard.press("1")
    playwright.expect(page.get_by_role("status")).to_have_text("You chose sft.")


def test_it_works_without_scripts(open_page, votes):
    session = compared(votes)
    page = open_page(session, java_script_enabled=False)
    page.get_by_label("Prompt").fill("hi")
    page.get_by_role("button", name="Ask both").click()
    finish(session)
    page.goto(page.url)
    page.get_by_role("button", name="Both are bad").click()
    playwright.expect(page.get_by_role("status")).to_have_text("You voted that both are bad.")
    assert votes.rows[0]["vote"] == "both bad"


def test_a_chat_and_its_stop(open_page):
    gate = threading.Semaphore(1)
    session = Session([Fake("sft", ["begun ", "never"], gate)])
    page = open_page(session, viewport={"width": 360, "height": 640})
    page.get_by_label("Message").fill("how?\nand why?")
    page.get_by_role("button", name="Send").click()
    playwright.expect(page.locator("#text-0")).to_have_text("begun")
    page.get_by_role("button", name="Stop").click()
    playwright.expect(page.get_by_text("(stopped)")).to_be_visible()
    gate.release(2)
    page.wait_for_load_state()
    page.get_by_label("Message").fill("go on")
    page.keyboard.press("Control+Enter")
    playwright.expect(page.locator("#text-0")).to_have_text("begun never")
    assert [message["content"] for message in session.responders[0].seen[1]] == ["how?\nand why?", "begun", "go on"]  # type: ignore[attr-defined]
    assert fits(page)
    page.get_by_role("button", name="New dialogue").click()
    playwright.expect(page.get_by_text("how?")).to_have_count(0)


def test_a_reload_shows_the_text_so_far(open_page, votes):
    gate = threading.Semaphore(1)
    session = compared(votes, Fake("sft", ["one ", "two"], gate), Fake("dpo", ["three"], gate))
    page = open_page(session)
    page.get_by_label("Prompt").fill("hi")
    page.get_by_role("button", name="Ask both").click()
    playwright.expect(page.locator("#text-0")).to_have_text("one")
    page.reload()
    playwright.expect(page.locator("#text-0")).to_have_text("one")
    gate.release(2)
    playwright.expect(page.locator("#text-1")).to_have_text("three")
    playwright.expect(page.get_by_role("group", name="Which response is better?")).to_be_visible()
