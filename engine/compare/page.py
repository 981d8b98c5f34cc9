"""What the page shows at each moment. Names of blind responses appear only after the vote."""

from dataclasses import dataclass, field

from engine.compare.session import Round, Session
from engine.compare.votes import Tally
from engine.data.chat import Message

LETTERS = "AB"
# The form value, the label and the key of each vote.
VOTES = (("a", "A is better", "1"), ("b", "B is better", "2"), ("tie", "Tie", "3"), ("bad", "Both are bad", "4"))
SPEAKERS = {"user": "You", "assistant": "Model", "system": "System prompt", "tool": "Tool"}


@dataclass(frozen=True)
class Response:
    """A response on the page.

    Args:
        title: A or B, and the name once there is a vote.
        note: of a response without its end, or without text.
        is_chosen: by the vote.
    """

    title: str
    text: str
    note: str = ""
    is_chosen: bool = False


@dataclass
class Page:
    """Contents of the page.

    Args:
        title: names the models.
        is_blind: whether two models are compared.
        round: the current one, if any.
        turns: (speaker, text) before the responses.
        responses: of the round.
        votes: (value, label, key) of the buttons; empty if there is nothing to vote on.
        result: of the vote.
        tally: a line.
        next_turns: of the next prompt of the file.
        next_number: its index; None without one.
        num_prompts: of the file.
        draft: a prompt that failed or was stopped, to be changed.
    """

    title: str
    is_blind: bool
    round: Round | None
    turns: list[tuple[str, str]] = field(default_factory=list)
    responses: list[Response] = field(default_factory=list)
    votes: list[tuple[str, str, str]] = field(default_factory=list)
    result: str = ""
    tally: str = ""
    next_turns: list[tuple[str, str]] = field(default_factory=list)
    next_number: int | None = None
    num_prompts: int = 0
    draft: str = ""

    @property
    def is_running(self) -> bool:
        return self.round is not None and self.round.state == "running"

    @property
    def can_ask(self) -> bool:
        return not self.is_running and not self.votes


def page_of(session: Session) -> Page:
    """The page of a session."""
    names = [responder.name for responder in session.responders]
    current = session.round
    page = Page(" against ".join(names) if session.is_blind else names[0], session.is_blind, current)
    if (
        current is not None
        and current.number is None
        and (current.state == "failed" or (session.is_blind and current.state == "stopped"))
    ):
        page.draft = current.messages[-1]["content"]
    if session.is_blind:
        _add_comparison(page, session, names)
    else:
        _add_dialogue(page, session)
    return page


def _add_comparison(page: Page, session: Session, names: list[str]) -> None:
    current = page.round
    if current is not None and current.state in ("running", "done"):
        page.turns = _turns(current.messages)
        page.responses = [_response(current, place, names) for place in range(len(names))]
    if current is not None and current.state == "done" and current.vote is None:
        page.votes = [vote for vote in VOTES if not (current.are_equal and vote[0] in ("a", "b"))]
    if current is not None and current.vote is not None:
        page.result = _result(current, names)
    page.tally = describe(session.tally, *names)
    page.num_prompts = len(session.prompts)
    number = session.next_prompt()
    if number is not None:
        page.next_number, page.next_turns = number, _turns(session.prompts[number])


def _add_dialogue(page: Page, session: Session) -> None:
    current = page.round
    page.turns = _turns(session.dialogue)
    if current is not None and current.state == "running":
        page.turns.append(("You", current.messages[-1]["content"]))
        page.responses = [Response("Model", current.texts[0].strip())]
    elif page.turns and current is not None and current.state != "failed":
        _, text = page.turns.pop()
        page.responses = [Response("Model", text, _note(current, 0))]


def _turns(messages: list[Message]) -> list[tuple[str, str]]:
    return [(SPEAKERS[message["role"]], message["content"]) for message in messages]


def _response(current: Round, place: int, names: list[str]) -> Response:
    title = f"Response {LETTERS[place]}"
    if current.vote is not None:
        title += f": {names[current.order[place]]}"
    is_chosen = current.vote == LETTERS[place].lower()
    return Response(title, current.texts[place].strip(), _note(current, place), is_chosen)


def _note(current: Round, place: int) -> str:
    if current.state == "running":
        return ""
    if current.state == "stopped":
        return "stopped"
    if not current.texts[place].strip():
        return "no text"
    return "cut at max_new_tokens: it has no end" if current.cut[place] else ""


def _result(current: Round, names: list[str]) -> str:
    places: dict[str | None, int] = {"a": 0, "b": 1}
    if current.vote in places:
        return f"You chose {names[current.order[places[current.vote]]]}."
    return "You voted for a tie." if current.vote == "tie" else "You voted that both are bad."


def describe(tally: Tally, model: str, against: str) -> str:
    """The votes so far, in a line."""
    if tally.num_votes == 0:
        return "No votes yet."
    rate = tally.win_rate
    counts = f"{tally.wins} won, {tally.losses} lost, {tally.ties} ties, {tally.both_bad} both bad"
    return (
        f"Win rate of {model} against {against}: {rate.value:.3f} "
        f"(95 % interval {rate.low:.3f} to {rate.high:.3f}; {counts}; ties and both bad count as half)"
    )
