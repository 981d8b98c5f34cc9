"""One user's session: prompts, responses of one or two models, votes. It knows no web."""

import json
import secrets
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Literal, Protocol

from engine.compare.votes import AGAINST, BOTH_BAD, MODEL, TIE, Tally, VoteFile, count_votes
from engine.data.chat import Message
from engine.settings.options import as_user_error

CHOICES = ("a", "b", "tie", "bad")
State = Literal["running", "done", "stopped", "failed"]
RANDOM = secrets.SystemRandom()  # no seed gives the order away
STOP_SECONDS = 30  # a response stops at its next token


class Responder(Protocol):
    """A model that responds.

    Args:
        name: for users.
        identity: in the file of votes: the checkpoint.
        was_cut: whether the last response reached max_new_tokens.
    """

    name: str
    identity: str

    @property
    def was_cut(self) -> bool: ...

    def respond(self, messages: list[Message], stop: threading.Event) -> Iterator[str]: ...


class Refused(Exception):
    """A request out of turn, with a reason for the user."""


def readable(text: str) -> str:
    """The text without NUL bytes: rows of train.py may have none."""
    return text.replace("\0", "\N{REPLACEMENT CHARACTER}")


@dataclass
class Round:
    """A prompt and its responses.

    Args:
        order: the index of the model at each place; hidden until the vote.
        texts: by place, as far as they are written.
        cut: by place: whether the response reached max_new_tokens.
        number: index of the prompt in the file; None for one of the user's own.
        problem: of a failed round.
        vote: one of CHOICES.
    """

    messages: list[Message]
    order: tuple[int, ...]
    texts: list[str]
    cut: list[bool]
    number: int | None = None
    state: State = "running"
    problem: str = ""
    vote: str | None = None
    id: str = field(default_factory=lambda: secrets.token_hex(8))

    @property
    def are_equal(self) -> bool:
        """Whether both responses are the same text, so neither is better."""
        return len(self.texts) > 1 and len(set(map(str.strip, self.texts))) == 1


class Session:
    """The state of the page. One response is written at a time, in a thread.

    Args:
        responders: one model to chat with, or two to compare.
        system: a system prompt, for prompts without one.
        votes: a file, for two models.
        columns: writes a prompt and responses as columns of a row.
        prompts: offered in order, but for those with a vote.
        shuffle: reorders the models of a round.
    """

    def __init__(
        self,
        responders: Sequence[Responder],
        *,
        system: str | None = None,
        votes: VoteFile | None = None,
        columns: Callable[[list[Message], Sequence[str]], tuple[Any, list[Any]]] | None = None,
        prompts: Sequence[list[Message]] = (),
        shuffle: Callable[[list[int]], None] = RANDOM.shuffle,
    ):
        self.responders, self.prompts = responders, prompts
        self.round: Round | None = None
        self.dialogue: list[Message] = []  # of the chat with one model
        self._system, self._votes, self._columns, self._shuffle = system, votes, columns, shuffle
        self._lock = threading.RLock()
        self._stops: list[threading.Event] = []  # the user's, then one for each response
        self._thread: threading.Thread | None = None
        self._left: set[int] = set()  # indices of prompts that are done with
        self.is_closed = False
        if votes is not None and columns is not None:
            voted = {json.dumps(row.get("prompt")) for row in votes.rows if self._is_of_both(row)}
            written = [json.dumps(columns(self._complete(prompt), [])[0]) for prompt in prompts]
            self._left = {index for index, prompt in enumerate(written) if prompt in voted}

    @property
    def is_blind(self) -> bool:
        """Whether two models are compared."""
        return len(self.responders) > 1

    @property
    def is_busy(self) -> bool:
        return self.round is not None and self.round.state == "running"

    @property
    def tally(self) -> Tally:
        """The votes of the file on these two models, seen from the first."""
        if self._votes is None:
            return Tally()
        return count_votes(self._votes.rows, *(responder.identity for responder in self.responders))

    def next_prompt(self) -> int | None:
        """The index of the next prompt of the file; None after the last."""
        return next((index for index in range(len(self.prompts)) if index not in self._left), None)

    # ---- What the user does ----

    def ask(self, question: str) -> None:
        """Let the models respond to a question."""
        if not question.strip():
            raise Refused("The prompt is empty.")
        self._start([*self.dialogue, {"role": "user", "content": readable(question.strip())}])

    def ask_prompt(self, index: int) -> None:
        """Let the models respond to a prompt of the file."""
        if not 0 <= index < len(self.prompts):
            raise Refused("There is no such prompt.")
        self._start(list(self.prompts[index]), index)

    def stop(self) -> None:
        """Stop the response. A chat keeps its beginning; two models get no vote."""
        for event in self._stops:
            event.set()
        thread = self._thread
        if thread is not None:
            thread.join(STOP_SECONDS)

    def vote(self, round_id: str, choice: str) -> None:
        """Write a vote into the file; from then on the names are shown.

        Raises:
            Refused: without a round to vote on, or for a better one of two equal responses.
            UserError: STORAGE; the vote can be repeated.
        """
        with self._lock:
            current = self._open_round(round_id)
            if choice not in CHOICES:
                raise Refused("There is no such vote.")
            if current.are_equal and choice in ("a", "b"):
                raise Refused("The responses are the same: vote for a tie or both bad.")
            assert self._votes is not None
            self._votes.add(self._row(current, choice))
            current.vote = choice

    def skip(self, round_id: str) -> None:
        """Leave the responses without a vote."""
        with self._lock:
            self._open_round(round_id)
            self.round = None

    def reset(self) -> None:
        """Forget the dialogue."""
        with self._lock:
            self._check_free()
            self.round, self.dialogue = None, []

    def close(self) -> None:
        """Stop the response, and take no more prompts."""
        self.is_closed = True
        self.stop()

    # ---- Responses ----

    def _start(self, messages: list[Message], index: int | None = None) -> None:
        with self._lock:
            self._check_free()
            if self.is_blind and self.round is not None and self.round.state == "done" and self.round.vote is None:
                raise Refused("Vote on these responses first, or skip them.")
            order = list(range(len(self.responders)))
            self._shuffle(order)
            num = len(order)
            current = Round(self._complete(messages), tuple(order), [""] * num, [False] * num, index)
            self.round = current
            if index is not None:
                self._left.add(index)
            self._stops = [threading.Event() for _ in range(num + 1)]
            self._thread = threading.Thread(target=self._respond, args=(current, *self._stops), name="responses")
            self._thread.start()

    def _check_free(self) -> None:
        if self.is_closed:
            raise Refused("The program is ending.")
        if self.is_busy:
            raise Refused("Busy: a response is being written. Wait for it, or stop it.")

    def _complete(self, messages: list[Message]) -> list[Message]:
        """The messages with the system prompt."""
        if self._system is None or messages[0]["role"] == "system":
            return messages
        return [{"role": "system", "content": self._system}, *messages]

    def _respond(self, current: Round, stop: threading.Event, *stops: threading.Event) -> None:
        """Write the responses into a round, one model after the other.

        Args:
            stop: set by the user.
            stops: set by the user, and by a model at the end of its response.
        """
        state: State = "done"
        try:
            for place, index in enumerate(current.order):
                responder = self.responders[index]
                for piece in responder.respond(current.messages, stops[place]):
                    current.texts[place] += readable(piece)
                current.cut[place] = responder.was_cut
                if stop.is_set():
                    break
            if stop.is_set():
                state = "stopped"
        except Exception as error:
            state, current.problem = "failed", self._explain(error)
        with self._lock:
            if not self.is_blind and state != "failed":
                question = current.messages[-1]
                self.dialogue += [question, {"role": "assistant", "content": current.texts[0].strip()}]
            current.state = state

    def _explain(self, error: Exception) -> str:
        """A line for the page; internal errors go to the terminal too."""
        user_error = as_user_error(error)
        if user_error is not None:
            return str(user_error)
        traceback.print_exception(error)
        return f"internal error ({type(error).__name__}); the terminal of compare.py shows it"

    # ---- Votes ----

    def _open_round(self, round_id: str) -> Round:
        """The round without a vote.

        Raises:
            Refused: if there is none, or the page is of another one.
        """
        current = self.round
        if not self.is_blind or current is None or current.id != round_id or current.state != "done":
            raise Refused("These responses are gone, or not complete.")
        if current.vote is not None:
            raise Refused("There is a vote on these responses already.")
        return current

    def _row(self, current: Round, choice: str) -> dict[str, Any]:
        """A vote as a preference. A tie has the weight 0, so training drops it."""
        assert self._columns is not None
        prompt, responses = self._columns(current.messages, [text.strip() for text in current.texts])
        if choice in ("a", "b"):
            chosen = "ab".index(choice)
            vote = MODEL if current.order[chosen] == 0 else AGAINST
        else:
            chosen = current.order.index(0)  # in a tie the first model's
            vote = TIE if choice == "tie" else BOTH_BAD
        return {
            "prompt": prompt,
            "chosen": responses[chosen],
            "rejected": responses[1 - chosen],
            "weight": float(vote in (MODEL, AGAINST)),
            "vote": vote,
            "model": self.responders[0].identity,
            "against": self.responders[1].identity,
            "cut": [name for name, at in (("chosen", chosen), ("rejected", 1 - chosen)) if current.cut[at]],
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
        }

    def _is_of_both(self, row: dict[str, Any]) -> bool:
        names = [responder.identity for responder in self.responders]
        return "vote" in row and [row.get("model"), row.get("against")] in (names, names[::-1])
