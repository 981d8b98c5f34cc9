"""Sessions of compare.py with models that say what a test wants, and a browser for them."""

import threading
from collections.abc import Iterator, Sequence
from typing import Any

from starlette.testclient import TestClient

from engine.compare.server import make_app
from engine.compare.session import Round, Session
from engine.compare.votes import VoteFile

XSS = "<script>alert(1)</script><img src=x onerror=alert(1)>\"'&"
HOST = "http://127.0.0.1:8765"
TOKEN = "token-of-the-test"


class Fake:
    """Responds with fixed pieces. With a gate it waits before each piece."""

    def __init__(self, name: str, pieces: list[str], gate: threading.Semaphore | None = None, error: Any = None):
        self.name, self.identity, self.was_cut = name, f"/runs/{name}", False
        self.pieces, self.gate, self.error = pieces, gate, error
        self.seen: list[Any] = []

    def respond(self, messages: list[Any], stop: threading.Event) -> Iterator[str]:
        self.seen.append(messages)
        for piece in self.pieces:
            while self.gate is not None and not self.gate.acquire(timeout=0.01):
                if stop.is_set():
                    return
            yield piece
        stop.set()  # as ChatModel does
        if self.error is not None:
            raise self.error


def as_messages(messages: list[Any], texts: Sequence[str]) -> tuple[Any, list[Any]]:
    return messages, [[{"role": "assistant", "content": text}] for text in texts]


def compared(votes: VoteFile, *models: Fake, is_swapped: bool = False, **options: Any) -> Session:
    """A session of two models; the second is A if swapped."""

    def shuffle(order: list[int]) -> None:
        order.sort(reverse=is_swapped)

    models = models or (Fake("sft", ["good ", "day"]), Fake("dpo", ["hello"]))
    return Session(models, votes=votes, shuffle=shuffle, **{"columns": as_messages, **options})


def browser(session: Session) -> TestClient:
    """A browser that has opened the address."""
    client = TestClient(make_app(session, TOKEN), base_url=HOST, headers={"origin": HOST})
    assert client.get(f"/?token={TOKEN}").status_code == 200
    return client


def finish(session: Session) -> None:
    assert session._thread is not None
    session._thread.join(10)
    assert not session.is_busy


def round_of(session: Session) -> Round:
    assert session.round is not None
    return session.round


def ask(client: TestClient, session: Session, prompt: str = "hi") -> None:
    assert client.post("/ask", data={"prompt": prompt}).status_code == 200
    finish(session)


def vote(client: TestClient, session: Session, choice: str) -> Any:
    return client.post("/vote", data={"round": round_of(session).id, "choice": choice})


def give_votes(client: Any, session: Session, choices: Sequence[str]) -> None:
    """Vote on responses of real models, each to another prompt. Untrained ones may write no text: these are skipped."""
    for number, choice in enumerate(choices):
        ask(client, session, f"Is number {number} any good?")
        while round_of(session).are_equal or not all(map(str.strip, round_of(session).texts)):
            client.post("/skip", data={"round": round_of(session).id})
            ask(client, session, f"Is number {number} any good?")
        assert vote(client, session, choice).status_code == 200
