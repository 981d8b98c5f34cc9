"""A judge by URL, against a local server with faults."""

import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from engine.data.examples import PromptRow
from engine.judges.client import JudgeClient, Server
from engine.rewards.judge import JudgeReward
from engine.rewards.samples import samples_of
from rewards import Judge
from utils import UserError

KEY = "sk-secret-0123"
ROW = PromptRow("What is {response}?", {"answer": "four"})


def completion(text: Any) -> bytes:
    return json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]}).encode()


class StandIn(ThreadingHTTPServer):
    """An OpenAI-compatible server.

    Attributes:
        faults: one for each request to come; then it replies.
        reply: to the text of a request.
        requests, keys: bodies and Authorization headers so far.
        most_at_once: requests.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.faults: list[Callable[[Handler], None]] = []
        self.reply: Callable[[str], Any] = lambda text: "Good. Score: 7"
        self.requests: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.lock, self.at_once, self.most_at_once = threading.Lock(), 0, 0
        self.url = f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    server: StandIn

    def do_POST(self) -> None:
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            server.requests.append(body)
            server.keys.append(self.headers["Authorization"])
            server.at_once += 1
            server.most_at_once = max(server.most_at_once, server.at_once)
            fault = server.faults.pop(0) if server.faults else None
        assert self.path == "/v1/chat/completions"
        if fault is None:
            self.send(200, completion(server.reply(body["messages"][0]["content"])))
        else:
            fault(self)
        with server.lock:
            server.at_once -= 1

    def send(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments: Any) -> None:
        """Print nothing."""


def status(number: int, body: bytes = b"{}", **headers: str) -> Callable[[Handler], None]:
    return lambda handler: handler.send(number, body, **headers)


def disconnect(handler: Handler) -> None:
    handler.close_connection = True


def cut_short(handler: Handler) -> None:
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(b"{")
    handler.close_connection = True


def silence(handler: Handler) -> None:
    time.sleep(1)
    handler.close_connection = True


def drip(handler: Handler) -> None:
    """Each packet comes in time, but the reply does not."""
    handler.send_response(200)
    handler.send_header("Content-Length", "100000")
    handler.end_headers()
    with suppress(OSError):  # nobody waits for the rest
        for _ in range(100):
            handler.wfile.write(b" ")
            time.sleep(0.05)


@pytest.fixture
def server(monkeypatch) -> Iterator[StandIn]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    found = StandIn()
    thread = threading.Thread(target=found.serve_forever, args=(0.01,))
    thread.start()
    yield found
    found.shutdown()
    found.server_close()
    thread.join()


def client(server: StandIn, tmp_path: Path, **settings: Any) -> JudgeClient:
    defaults = Server("judge.url", server.url, "m", timeout=10, first_wait=0.01)
    return JudgeClient(replace(defaults, **settings), tmp_path / "cache")


def ask(asked: JudgeClient, *texts: str) -> list[Any]:
    return [*asked.replies([[{"role": "user", "content": text}] for text in texts])]


@pytest.mark.parametrize(
    "fault",
    [
        *[status(number) for number in (429, 500, 503)],
        status(200, b"<html>"),
        status(200, b'{"choices": []}'),
        status(200, completion([1])),
        *[disconnect, cut_short, silence, drip],
    ],
)
def test_a_fault_is_tried_again(server, tmp_path, fault):
    server.faults = [fault, fault]
    timeout = 0.5 if fault in (silence, drip) else 10  # the last reply must come in time, too
    (reply,) = ask(client(server, tmp_path, timeout=timeout), "a")
    assert (reply.text, reply.error, reply.num_attempts) == ("Good. Score: 7", None, 3)
    assert server.requests == [{"model": "m", "messages": [{"role": "user", "content": "a"}]}] * 3


def test_a_fault_that_stays(server, tmp_path):
    server.faults = [status(500, b"out of order\n")] * 6
    failed, fine = ask(client(server, tmp_path, concurrency=1), "a", "b")
    assert str(failed.error) == f"{server.url}: HTTP 500 out of order, after 6 requests" and failed.text == ""
    assert fine.error is None and len(server.requests) == 7
    server.faults = [status(400, b"too long")]  # of this request: no use to repeat it
    (refused,) = ask(client(server, tmp_path), "c")
    assert str(refused.error) == f"{server.url}: HTTP 400 too long" and len(server.requests) == 8


def test_a_server_that_is_down_delays_nothing_more(server, tmp_path):
    """Four requests in a row fail, and those not yet sent stay so. The next call asks again."""
    server.faults = [status(500)] * 100
    replies = ask(client(server, tmp_path, concurrency=4, retries=1), *map(str, range(20)))
    assert all(reply.error is not None for reply in replies)
    attempts = [reply.num_attempts for reply in replies]
    assert set(attempts) == {0, 2} and 4 <= attempts.count(2) <= 7  # up to three were under way
    assert len(server.requests) == 2 * attempts.count(2)
    assert re.fullmatch(rf"{server.url}: not asked, as [4-7] requests failed", str(replies[-1].error))
    server.faults = []
    assert ask(client(server, tmp_path), "a")[0].error is None


def test_a_server_may_say_how_long_to_wait(server, tmp_path):
    server.faults = [status(429, Retry_After="1")]
    start = time.monotonic()
    ask(client(server, tmp_path), "a")
    assert 1 <= time.monotonic() - start < 20


def test_replies_are_kept_by_content(server, tmp_path):
    first = ask(client(server, tmp_path), "a", "b", "a")
    assert [reply.is_cached for reply in first] == [False, False, True]
    assert len(server.requests) == 2
    again = ask(client(server, tmp_path), "b", "c")
    assert [reply.is_cached for reply in again] == [True, False]
    assert [reply.text for reply in again] == ["Good. Score: 7"] * 2
    ask(client(server, tmp_path, model="other"), "b")
    ask(client(server, tmp_path, parameters={"temperature": 0.5}), "b")
    assert len(server.requests) == 5
    for path in (tmp_path / "cache").iterdir():
        path.write_text("damaged")
    assert [reply.is_cached for reply in ask(client(server, tmp_path), "b")] == [False]


def test_an_empty_reply_is_not_kept(server, tmp_path):
    server.reply = lambda text: None
    assert [reply.text for reply in ask(client(server, tmp_path), "a")] == [""]
    server.reply = lambda text: "8"
    assert [(reply.text, reply.is_cached) for reply in ask(client(server, tmp_path), "a")] == [("8", False)]


def test_requests_run_at_the_same_time(server, tmp_path):
    def slowly(text: str) -> str:
        time.sleep(0.1)
        return text

    server.reply = slowly
    texts = [str(number) for number in range(12)]
    assert [reply.text for reply in ask(client(server, tmp_path, concurrency=4), *texts)] == texts
    assert 2 <= server.most_at_once <= 4


@pytest.mark.parametrize("number", [401, 403, 404, 302])
def test_a_server_that_refuses_all_requests(server, tmp_path, monkeypatch, number):
    """A wrong key ends the run at once. It is neither shown nor handed to another host."""
    monkeypatch.setenv("OPENAI_API_KEY", f"{KEY}\n")
    server.faults = [status(number, f"wrong key {KEY}".encode(), Location=f"{server.url}/other")]
    with pytest.raises(
        UserError, match=rf"error\[CONFIG\] judge.url: .* refuses requests \(HTTP {number} wrong"
    ) as caught:
        ask(client(server, tmp_path), "a")
    assert KEY not in str(caught.value) and "OPENAI_API_KEY" in str(caught.value)
    assert server.keys == [f"Bearer {KEY}"]


@pytest.mark.parametrize(
    ("url", "problem"),
    [
        ("localhost:8000", "is not an address of a server"),
        ("file:///etc/passwd", "is not an address of a server"),
        (f"http://me:{KEY}@localhost", "has a user or password in it"),
    ],
)
def test_wrong_addresses(tmp_path, url, problem):
    with pytest.raises(UserError, match=problem) as caught:
        JudgeClient(Server("judge.url", url, "m"), tmp_path)
    assert KEY not in str(caught.value)


def test_a_key_that_no_header_can_hold(server, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", f"{KEY}\n{KEY}é")
    with pytest.raises(UserError, match="OPENAI_API_KEY holds no API key") as caught:
        client(server, tmp_path)
    assert KEY not in str(caught.value)


# ---- Scores ----


def reward(server: StandIn, tmp_path: Path, **options: Any) -> JudgeReward:
    defaults = Judge(url=server.url, model="m", timeout=10)
    return JudgeReward(replace(defaults, **options), tmp_path / "cache", tmp_path / "judge.jsonl")


def transcript(tmp_path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (tmp_path / "judge.jsonl").read_text(encoding="utf-8").splitlines()]


def test_scores_and_the_transcript(server, tmp_path):
    replies = {"one": "Score: 1", "ten": "Score: 3? No.\n**Score:** **10**", "none": "I refuse", "far": "Score: 11"}
    server.reply = lambda text: replies[text.split("|")[1]]
    samples = samples_of(ROW, [(name, False) for name in replies])
    judge = reward(server, tmp_path, prompt="{prompt} {other} {answer} |{response}|")
    assert [*judge(samples)] == [1, 10, None, None]
    assert server.requests[0]["temperature"] == 0 and server.requests[0]["max_tokens"] == 512
    lines = transcript(tmp_path)
    # Braces in the texts of prompt and response are no placeholders.
    assert lines[0]["request"] == "What is {response}? {other} four |one|"
    assert [line["score"] for line in lines] == [1, 10, None, None]
    assert [line["reply"] for line in lines] == [*replies.values()]
    assert [*judge(samples[:2])] == [1, 10] and len(server.requests) == 4
    assert [line["cached"] for line in transcript(tmp_path)] == [False] * 4 + [True] * 2


def test_a_failed_request_is_an_error_of_its_response(server, tmp_path):
    server.faults = [status(400, b"no")]
    failed, fine = reward(server, tmp_path, concurrency=1)(samples_of(ROW, [("a", False), ("b", False)]))
    assert isinstance(failed, Exception) and fine == 7
    assert [line.get("error") for line in transcript(tmp_path)] == [f"{server.url}: HTTP 400 no", None]


@pytest.mark.parametrize("pattern", ["Score: (", "Score: 1"])
def test_wrong_patterns(server, tmp_path, pattern):
    with pytest.raises(UserError, match=r"reward_options.judge.pattern: "):
        reward(server, tmp_path, pattern=pattern)
