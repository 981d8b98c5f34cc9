"""compare.py: who may open the page, blindness, streaming, a chat; text of users and models is escaped."""

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from starlette.testclient import TestClient

import compare
from engine.compare.server import HEADERS, listen, make_app, stream_events
from engine.compare.session import Refused, Session
from engine.compare.votes import VoteFile
from tests.compared import HOST, TOKEN, XSS, Fake, ask, browser, compared, finish, round_of, vote
from utils import UserError


@pytest.fixture
def votes(tmp_path: Path) -> Iterator[VoteFile]:
    file = VoteFile(tmp_path / "votes.jsonl")
    yield file
    file.close()


# ---- Who may open the page ----


def test_only_the_holder_of_the_address_gets_in(votes):
    client = TestClient(make_app(compared(votes), TOKEN), base_url=HOST)
    for path in ("/", "/?token=", "/?token=wrong", "/?token=%C3%A4", "/events?round=x", "/compare.js", "/none"):
        answer = client.get(path)
        assert answer.status_code == 403 and "sft" not in answer.text
    first = client.get(f"/?token={TOKEN}", follow_redirects=False)
    assert first.status_code == 303 and first.headers["location"] == "/"  # the token leaves the address
    assert "httponly" in first.headers["set-cookie"].lower() and "samesite=lax" in first.headers["set-cookie"].lower()
    assert client.get("/").status_code == 200


@pytest.mark.parametrize("host", ["evil.example", "evil.example:8765", "127.0.0.1.evil.example", "", "[", "10.0.0.1"])
def test_another_host_name_is_refused(votes, host):
    client = browser(compared(votes))
    assert client.get("/", headers={"host": host}).status_code == 400


@pytest.mark.parametrize("host", ["localhost:9000", "127.0.0.1:1", "[::1]:9000"])
def test_a_forwarded_port_is_accepted(votes, host):
    client = browser(compared(votes))
    cookies = {"cookie": f"compare={TOKEN}"}
    assert client.get("/", headers={"host": host, **cookies}).status_code == 200


@pytest.mark.parametrize(
    "origin", ["http://evil.example", "http://127.0.0.1:3000", "http://localhost:8765", "null", ""]
)
def test_a_form_of_another_page_is_refused(votes, origin):
    session = compared(votes)
    client = browser(session)
    for path in ("/ask", "/stop", "/vote", "/skip", "/reset"):
        assert client.post(path, data={"prompt": "hi"}, headers={"origin": origin}).status_code == 403
    assert session.round is None


def test_a_form_without_origin_is_refused(votes):
    client = browser(compared(votes))
    del client.headers["origin"]
    assert client.post("/ask", data={"prompt": "hi"}).status_code == 403


def test_every_answer_has_the_headers(votes):
    client = browser(compared(votes))
    for answer in (client.get("/"), client.get("/none"), client.get("/", headers={"host": "evil.example"})):
        assert {name: answer.headers[name] for name in HEADERS} == HEADERS
    assert "script-src 'self';" in HEADERS["Content-Security-Policy"]
    assert client.get("/ask").status_code == 405


def test_a_long_form_is_refused(votes):
    session = compared(votes)
    assert browser(session).post("/ask", data={"prompt": "x" * 1_000_001}).status_code == 413
    assert session.round is None


# ---- Blindness ----


def page_without_ids(text: str) -> str:
    return re.sub(r"[0-9a-f]{16}", "ID", text)


@pytest.mark.parametrize("choice", ["a", "b", "tie", "bad"])
def test_pages_before_the_vote_do_not_depend_on_the_order(votes, choice):
    """The same texts at the same places, by the models in both orders: the same bytes."""
    sft, dpo = Fake("sft", ["good day"]), Fake("dpo", ["hello"])
    sessions = [compared(votes, sft, dpo)]
    sessions.append(compared(votes, Fake("sft", dpo.pieces), Fake("dpo", sft.pieces), is_swapped=True))
    clients = [browser(session) for session in sessions]
    pages, streams = [], []
    for client, session in zip(clients, sessions, strict=True):
        ask(client, session)
        answer = client.get("/")
        pages.append(page_without_ids(answer.text))
        streams.append(client.get(f"/events?round={round_of(session).id}").text)
    results = [vote(client, session, choice).text for client, session in zip(clients, sessions, strict=True)]
    assert pages[0] == pages[1] and streams[0] == streams[1]
    assert "Response A</h3>" in pages[0] and "Which response is better?" in pages[0]
    assert "Response A: sft" in results[0] and "Response A: dpo" in results[1]


def test_both_orders_appear(votes):
    session = Session(
        [Fake("sft", ["x"]), Fake("dpo", ["y"])], votes=votes, columns=lambda messages, texts: (messages, list(texts))
    )
    orders = set()
    for _ in range(40):  # all equal with a chance of 2 ** -39
        session.ask("hi")
        finish(session)
        orders.add(round_of(session).order)
        session.skip(round_of(session).id)
    assert orders == {(0, 1), (1, 0)}


def test_texts_are_escaped_everywhere(votes):
    session = compared(votes, Fake(XSS, [XSS, " one"]), Fake("dpo", [XSS, " two"]))
    client = browser(session)
    pages = [client.post("/ask", data={"prompt": XSS}).text]
    finish(session)
    pages.append(client.get("/").text)
    pages.append(client.get(f"/events?round={round_of(session).id}").text)
    pages.append(vote(client, session, XSS).text)  # 409
    pages.append(vote(client, session, "a").text)
    pages.append(client.post("/ask", data={"number": XSS}).text)
    assert client.post("/ask", data={"number": XSS}).status_code == 409
    assert client.post("/ask", data={"number": "9" * 5000}).status_code == 409
    html = [page for page in pages if page.startswith("<!DOCTYPE")]
    assert len(html) == 5 and all("<script>alert" not in page and "<img" not in page for page in html)
    assert all(page.count("<script") == 1 for page in html)
    assert "&lt;script&gt;alert(1)" in html[1]
    # The stream is JSON; the script writes it as text.
    assert json.loads(pages[2].split("data: ")[1].split("\n\n")[0])["texts"][0].startswith(XSS)
    assert "innerHTML" not in (Path(compare.__file__).parent / "engine/compare/compare.js").read_text()


# ---- Rounds ----


def test_text_streams_while_it_is_written(votes):
    gate = threading.Semaphore(0)
    session = compared(votes, Fake("sft", ["one ", "two"], gate), Fake("dpo", ["three"], gate))
    client = browser(session)
    client.post("/ask", data={"prompt": "hi"})
    round_id = round_of(session).id
    page = client.get("/").text
    assert f'data-round="{round_id}"' in page and "Stop</button>" in page and "/vote" not in page

    async def read() -> list[str]:
        seen = []
        async for event in stream_events(session, round_id):
            seen.append(event)
            gate.release()
        return seen

    texts = [["", ""], ["one ", ""], ["one two", ""], ["one two", "three"]]
    expected = [f"data: {json.dumps({'texts': each})}\n\n" for each in texts]
    assert asyncio.run(read()) == [*expected, "event: done\ndata: {}\n\n"]
    assert client.get(f"/events?round={round_id}").text == expected[-1] + "event: done\ndata: {}\n\n"
    assert client.get("/events?round=another").text == "event: done\ndata: {}\n\n"


def test_a_busy_model_says_so(votes):
    gate = threading.Semaphore(0)
    session = compared(votes, Fake("sft", ["one"], gate), Fake("dpo", ["two"]))
    client = browser(session)
    client.post("/ask", data={"prompt": "first"})
    answer = client.post("/ask", data={"prompt": "second"})
    assert answer.status_code == 409 and "Busy: a response is being written" in answer.text
    assert client.post("/reset").status_code == 409 and vote(client, session, "a").status_code == 409
    gate.release()
    finish(session)
    assert "first" in client.get("/").text and "Which response is better?" in client.get("/").text


def test_a_stopped_round_gets_no_vote(votes):
    session = compared(votes, Fake("sft", ["one", "never"], threading.Semaphore(1)), Fake("dpo", ["two"]))
    client = browser(session)
    client.post("/ask", data={"prompt": "hi"})
    page = client.post("/stop").text
    assert "these responses get no vote" in page and ">hi</textarea>" in page
    assert vote(client, session, "a").status_code == 409 and votes.rows == []


@pytest.mark.parametrize(
    "error, shown",
    [
        (UserError("DATA", "the prompt has 9 tokens", "shorten it"), "error[DATA] the prompt has 9 tokens"),
        (RuntimeError("secret of the inside"), "internal error (RuntimeError)"),
    ],
)
def test_a_failed_response_leaves_the_page_usable(votes, error, shown, capsys):
    session = compared(votes, Fake("sft", ["one"], error=error), Fake("dpo", ["two"]))
    client = browser(session)
    ask(client, session)
    page = client.get("/").text
    assert shown in page and "secret" not in page and ">hi</textarea>" in page  # to be changed and sent again
    assert ("RuntimeError: secret" in capsys.readouterr().err) == isinstance(error, RuntimeError)
    session.responders[0].error = None  # type: ignore[attr-defined]
    ask(client, session)
    assert "Which response is better?" in client.get("/").text


def test_a_round_waits_for_its_vote(votes):
    session = compared(votes)
    client = browser(session)
    ask(client, session)
    assert client.post("/ask", data={"prompt": "next"}).status_code == 409
    assert client.post("/skip", data={"round": round_of(session).id}).status_code == 200
    ask(client, session, "next")
    assert votes.rows == []


def test_a_response_without_its_end_says_so(votes):
    session = compared(votes, Fake("sft", ["one"]), Fake("dpo", [" "]))
    session.responders[0].was_cut = True  # type: ignore[misc]
    client = browser(session)
    ask(client, session)
    page = client.get("/").text
    assert page.count("(cut at max_new_tokens: it has no end)") == 1 and page.count("(no text)") == 1
    vote(client, session, "b")
    assert votes.rows[0]["cut"] == ["rejected"]


# ---- A chat with one model ----


def test_a_chat_keeps_its_dialogue():
    session = Session([Fake("sft", ["fine", " day"])])
    client = browser(session)
    ask(client, session, "how?")
    ask(client, session, "why?")
    page = client.get("/").text
    assert [page.count(text) for text in ("how?", "why?", "fine day")] == [1, 1, 2] and "Response A" not in page
    roles = [message["role"] for message in session.responders[0].seen[1]]  # type: ignore[attr-defined]
    assert roles == ["user", "assistant", "user"]
    assert vote(client, session, "a").status_code == 409
    assert "how?" not in client.post("/reset").text and session.dialogue == []


def test_a_stopped_chat_keeps_the_beginning():
    session = Session([Fake("sft", ["begun", "never"], threading.Semaphore(1))])
    client = browser(session)
    client.post("/ask", data={"prompt": "how?"})
    for _ in range(500):
        if round_of(session).texts[0]:
            break
        threading.Event().wait(0.01)
    page = client.post("/stop").text
    assert "begun" in page and "(stopped)" in page and session.dialogue[-1]["content"] == "begun"


def test_a_closed_session_takes_no_prompt():
    session = Session([Fake("sft", ["never"], threading.Semaphore(0))])
    session.ask("hi")
    session.close()
    finish(session)
    with pytest.raises(Refused, match="ending"):
        session.ask("hi")


# ---- The command ----


def run(monkeypatch, capsys, *arguments: str) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["compare.py", *arguments])
    capsys.readouterr()
    status = compare.main()
    return status, *capsys.readouterr()


def test_problems_of_the_command(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    status, _, err = run(monkeypatch, capsys, f"model={tmp_path}/none", "port=0")
    assert status == 4 and "does not exist" in err
    status, _, err = run(monkeypatch, capsys, "model=RUN", "votes=v.jsonl")
    assert status == 2 and "add against=OTHER" in err
    status, _, err = run(monkeypatch, capsys, "model=RUN", "port=65536")
    assert status == 2 and "port" in err
    with listen(0) as taken:
        taken.listen()
        status, _, err = run(monkeypatch, capsys, "model=RUN", f"port={taken.getsockname()[1]}")
    assert status == 2 and "port=0 takes a free one" in err
    assert not list(tmp_path.iterdir())  # no file of votes without votes


ENDLESS = """
import sys, threading, compare
from tests.compared import Fake, compared
gate = threading.Semaphore(3)  # for the first two responses, and a piece of the third
models = (Fake("sft", ["one"], gate), Fake("dpo", ["two"], gate))
compare.make_session = lambda options, votes: compared(votes, *models)
sys.argv = ["compare.py", "model=sft", "against=dpo", "port=0"]
sys.exit(compare.main())
"""


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, -signal.SIGTERM)])
def test_a_signal_ends_it_and_keeps_the_votes(tmp_path, number, status):
    """While a response is written, and a browser reads it."""
    environment = {**os.environ, "PYTHONPATH": str(Path(compare.__file__).parent)}
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", ENDLESS], cwd=tmp_path, env=environment, **pipes) as process:
        try:
            assert process.stdout is not None
            address = process.stdout.readline().split()[1]
            origin = address.split("/?")[0]
            with httpx2.Client(base_url=origin, headers={"origin": origin}, follow_redirects=True) as client:
                client.get(address)
                page = client.post("/ask", data={"prompt": "hi"}).text
                while "Which response is better?" not in page:
                    page = client.get("/").text
                client.post("/vote", data={"round": id_of(page), "choice": "a"})
                page = client.post("/ask", data={"prompt": "again"}).text
                with client.stream("GET", f"/events?round={id_of(page)}") as stream:
                    assert next(stream.iter_lines()).startswith("data: ")
                    process.send_signal(number)
                    assert process.wait(30) == status
        finally:
            process.kill()
        is_asked = status == 130  # SIGTERM leaves no time for words
        assert process.stdout.read() == ("votes: 1 rows in votes.jsonl\n" if is_asked else "")
        assert process.stderr is not None and process.stderr.read() in ("interrupted\n", "")
    assert json.loads((tmp_path / "votes.jsonl").read_text())["weight"] == 1


def id_of(page: str) -> str:
    found = re.search(r'data-round="(\w+)"|name="round" value="(\w+)"', page)
    assert found is not None
    return found[1] or found[2]
