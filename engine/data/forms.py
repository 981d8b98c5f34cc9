"""Forms of rows: one function per form turns a row into a prompt with responses and pairs."""

import difflib
from collections.abc import Callable, Mapping
from itertools import accumulate
from typing import Any, NamedTuple

from engine.data.chat import ASSISTANT_TURN, Chat, Message
from engine.data.messages import num_characters, read_messages, read_tools
from engine.data.preferences import pairs_by_score
from engine.data.rows import MAX_LINE_BYTES, BadRow, Row
from utils import clipped

PROMPTS_DIFFER = "prompts of chosen and rejected differ"  # reason for dropping a row
MAX_RESPONSES = 1000  # per row; the number of pairs grows with its square


class ParsedRow(NamedTuple):
    """One prompt of a row, with its responses.

    Args:
        key: identifies the prompt independently of the chat template, as some templates write the date.
        prompt: the prompt as text.
        responses: the responses as text.
        pairs: (preferred, other), as indices into responses.
        best: index of the best response, the SFT target.
        label: of one response without a pair: whether it is desirable.
        from_template: whether a chat template wrote the texts.
        is_demonstration: one response without a preference.
        margin: of all pairs, the column `margin`.
        earlier_turns: of a dialogue with several demonstrations, those before the last.
        weight: of the loss; None in a row without this column.
        columns: of the row, for rewards; None if none are needed.
    """

    key: Any
    prompt: str
    responses: list[str]
    pairs: list[tuple[int, int]]
    best: int = 0
    label: bool | None = None
    from_template: bool = False
    is_demonstration: bool = False
    margin: float | None = None
    earlier_turns: tuple["ParsedRow", ...] = ()
    weight: float | None = None
    columns: Mapping[str, Any] | None = None

    @property
    def is_plain_text(self) -> bool:
        """Whether the row was text; the key of messages is a list."""
        return isinstance(self.key, str)


# ---- Plain text ----


def _strings(row: Row, chat: Chat) -> ParsedRow:
    prompt = row.text("prompt")
    return ParsedRow(prompt, prompt, [row.text("chosen"), row.text("rejected")], [(0, 1)])


def _transcripts(row: Row, chat: Chat) -> ParsedRow | str:
    parts = split_transcript(row)
    return ParsedRow(parts[0], parts[0], list(parts[1:]), [(0, 1)]) if parts else PROMPTS_DIFFER


def split_transcript(row: Row) -> tuple[str, str, str] | None:
    """Split two HH transcripts into prompt, chosen and rejected.

    Each is split at its last Assistant turn.

    Returns:
        None if the two prompts differ.
    """
    texts = [row.text("chosen"), row.text("rejected")]
    cuts = [text.rfind(ASSISTANT_TURN) + len(ASSISTANT_TURN) for text in texts]
    if ASSISTANT_TURN not in texts[0]:
        raise row.error("chosen", "has no '\\n\\nAssistant:' turn")
    if ASSISTANT_TURN not in texts[1] or texts[0][: cuts[0]] != texts[1][: cuts[1]]:
        return None
    return texts[0][: cuts[0]], texts[0][cuts[0] :], texts[1][cuts[1] :]


def _ranked(row: Row, chat: Chat) -> ParsedRow:
    prompt = row.text("prompt")
    responses = [row.as_text(text, f"responses[{i}]") for i, text in enumerate(row.items("responses"))]
    if not responses:
        raise row.error("responses", "is an empty list")
    if len(responses) > MAX_RESPONSES:
        raise row.error("responses", f"is a list of {len(responses):,}, more than {MAX_RESPONSES:,}")
    scores: list[float] = [-float(rank) for rank in range(len(responses))]
    if "scores" in row.values:
        scores = [row.as_number(score, f"scores[{i}]") for i, score in enumerate(row.items("scores"))]
        if len(scores) != len(responses):
            raise row.error("scores", f"has {len(scores)} values for {len(responses)} responses")
    return ParsedRow(prompt, prompt, responses, pairs_by_score(scores), best=scores.index(max(scores)))


# ---- Messages ----


def _messages(row: Row, chat: Chat) -> ParsedRow | str:
    if "messages" in row.values and not _has_pair(row):
        return _dialogue(row, chat, _with_system(row, read_messages(row, row.value("messages"), "messages")))
    if "completion" in row.values and not _has_pair(row):
        return (_unpaired_messages if "label" in row.values else _completion_messages)(row, chat)
    chosen, rejected = (_response_turns(row, name) for name in ("chosen", "rejected"))
    prompt = _prompt_column(row)
    for name, dialogue in (("chosen", chosen), ("rejected", rejected)):
        _check_dialogue(row, name, dialogue, prompt)
    prompts = [dialogue[:-1] or prompt or [] for dialogue in (chosen, rejected)]
    if prompts[0] != prompts[1]:
        return PROMPTS_DIFFER
    return _render(row, chat, _with_system(row, prompts[0]), [chosen[-1], rejected[-1]])


def _response_turns(row: Row, name: str) -> list[Message]:
    """A response with all messages before it, from a list, a message or the response's text."""
    value = row.value(name)
    if isinstance(value, str):
        return [{"role": "assistant", "content": row.text(name)}]
    if not isinstance(value, (list, dict)):
        raise row.wrong_type(value, name, "text or messages")
    return read_messages(row, value, name)


def _prompt_column(row: Row) -> list[Message] | None:
    if isinstance(row.values.get("prompt"), str):
        return [{"role": "user", "content": row.text("prompt")}]
    return read_messages(row, row.value("prompt"), "prompt") if "prompt" in row.values else None


def _check_dialogue(row: Row, name: str, dialogue: list[Message], prompt: list[Message] | None) -> None:
    """Raise BadRow unless a chosen or rejected dialogue is a response to the prompt."""
    if dialogue[-1]["role"] != "assistant":
        raise row.error(name, "does not end with an assistant message")
    before = dialogue[:-1]
    # The dialogue may have a system message before the prompt.
    if prompt is not None and before and before[-len(prompt) :] != prompt:
        raise row.error(name, "has messages before its last that do not match 'prompt'")
    if prompt is None and not before:
        raise row.error(name, "has no message before its last, and there is no field 'prompt'")


def _sharegpt(row: Row, chat: Chat) -> ParsedRow | str:
    prompt = _with_system(row, read_messages(row, row.value("conversations"), "conversations"))
    if not _has_pair(row):
        return _dialogue(row, chat, prompt)
    responses = []
    for name in ("chosen", "rejected"):
        (*before, response) = _response_turns(row, name)
        if before or response["role"] != "assistant":
            raise row.error(name, "is not an assistant message")
        responses.append(response)
    return _render(row, chat, prompt, responses)


# ---- Unpaired: one response with a label ----


def _unpaired(row: Row, chat: Chat) -> ParsedRow:
    """A prompt, its completion and a label: both text as it is, or messages."""
    if isinstance(row.value("prompt"), str) and isinstance(row.value("completion"), str):
        prompt = row.text("prompt")
        return ParsedRow(prompt, prompt, [row.text("completion")], [], label=_label(row))
    return _unpaired_messages(row, chat)


def _unpaired_messages(row: Row, chat: Chat) -> ParsedRow:
    """The label is that of the last message of the completion."""
    *before, response = _response_turns(row, "completion")
    messages = _with_system(row, [*(_prompt_column(row) or []), *before])
    if response["role"] != "assistant":
        raise row.error("completion", "does not end with an assistant message")
    if not messages:
        raise row.error("completion", "has no message before its last, and there is no field 'prompt'")
    return _render(row, chat, messages, [response])._replace(pairs=[], label=_label(row))


def _label(row: Row) -> bool:
    try:
        return row.boolean("label")
    except BadRow as error:
        raise BadRow(error.what, "give true or false; format=completion leaves the label out") from error


# ---- Demonstrations: responses without a preference ----


def _completion(row: Row, chat: Chat) -> ParsedRow | str:
    """A prompt and its completion: both text as it is, or messages."""
    if isinstance(row.value("prompt"), str) and isinstance(row.value("completion"), str):
        prompt = row.text("prompt")
        return ParsedRow(prompt, prompt, [row.text("completion")], [], is_demonstration=True)
    return _completion_messages(row, chat)


def _completion_messages(row: Row, chat: Chat) -> ParsedRow | str:
    messages = _with_system(row, _prompt_column(row) or [])
    return _dialogue(row, chat, [*messages, *_response_turns(row, "completion")], start=len(messages))


def _alpaca(row: Row, chat: Chat) -> ParsedRow:
    return _instruction(row, chat, context="input", response="output")


def _dolly(row: Row, chat: Chat) -> ParsedRow:
    return _instruction(row, chat, context="context", response="response")


def _instruction(row: Row, chat: Chat, *, context: str, response: str) -> ParsedRow:
    """An instruction as a user message, with the context (if any) below it."""
    parts = [row.text("instruction")] + ([row.text(context)] if row.values.get(context) else [])
    messages: list[Message] = [{"role": "user", "content": "\n\n".join(parts)}]
    target: Message = {"role": "assistant", "content": row.text(response)}
    return _demonstration(row, chat, _with_system(row, messages), target)


def _dialogue(row: Row, chat: Chat, messages: list[Message], start: int = 0) -> ParsedRow | str:
    """A dialogue as demonstrations: each response from start with all messages before it; see Chat.sft_turns."""
    roles = [message["role"] for message in messages]
    if "user" not in roles:
        return "dialogue without a user message"
    if chat.sft_turns == "next" and roles[-1] != "assistant":
        return _render(row, chat, messages, [])._replace(pairs=[])
    start = max(start, roles.index("user"))
    responses = [index for index in range(start, len(roles)) if roles[index] == "assistant"]
    if not responses or (chat.sft_turns != "all" and responses[-1] != len(roles) - 1):
        return "dialogue that does not end with an assistant message"
    if chat.sft_turns != "all":
        del responses[:-1]
    _check_length(row, messages, responses)
    turns = [
        _demonstration(row, chat, messages[:index], messages[index])
        for index in responses
        if index == responses[-1] or roles[index - 1] != "assistant"
    ]
    # One key for all turns, so that they share a split.
    return turns[-1]._replace(key=turns[0].key, earlier_turns=tuple(turns[:-1]))


def _check_length(row: Row, messages: list[Message], responses: list[int]) -> None:
    """Raise BadRow if all prompts together would fill memory.

    They grow with the square of the dialogue.
    """
    ends = list(accumulate(map(num_characters, messages)))
    num_tools = len(str(row.values.get("tools") or ""))  # in every prompt
    if sum(ends[index] + num_tools for index in responses) > MAX_LINE_BYTES:
        name = next(name for name in ("messages", "conversations", "completion") if name in row.values)
        problem = f"has {len(responses)} responses, and their prompts have over {MAX_LINE_BYTES:,} characters in all"
        raise BadRow(f"{row.origin}: field '{name}' {problem}", "divide the dialogue, or set sft_turns=last")


def _demonstration(row: Row, chat: Chat, messages: list[Message], response: Message) -> ParsedRow:
    return _render(row, chat, messages, [response])._replace(pairs=[], is_demonstration=True)


# ---- Prompts without responses ----


def _prompts(row: Row, chat: Chat) -> ParsedRow:
    """A prompt as text as it is, or as messages. Responses are sampled."""
    if isinstance(row.values.get("prompt"), str):
        prompt = row.text("prompt")
        return ParsedRow(prompt, prompt, [], [])
    name = "messages" if "messages" in row.values else "prompt"
    messages = _with_system(row, read_messages(row, row.value(name), name))
    return _render(row, chat, messages, [])._replace(pairs=[])


# ---- Parts of message forms ----


def _with_system(row: Row, messages: list[Message]) -> list[Message]:
    """The messages, after the message of the column `system` if the row has one."""
    if not row.values.get("system"):
        return messages
    system: Message = {"role": "system", "content": row.text("system")}
    return messages if messages[:1] == [system] else [system, *messages]


def _has_pair(row: Row) -> bool:
    return "chosen" in row.values or "rejected" in row.values


def _render(row: Row, chat: Chat, messages: list[Message], responses: list[Message]) -> ParsedRow:
    if messages[-1]["role"] == "assistant":
        name = next(
            name for name in ("conversations", "messages", "prompt", "chosen", "completion") if name in row.values
        )
        raise row.error(name, "ends with an assistant message; the response should follow a user message")
    prompt, texts = chat.render(row, messages, responses, read_tools(row))
    key = [[message["role"], message["content"].strip(), *message.get("tool_calls", [])] for message in messages]
    return ParsedRow(key, prompt, texts, [(0, 1)], from_template=chat.is_template)


# ---- All forms ----

# A form returns the parsed row, or the reason for dropping it.
FORMS: dict[str, Callable[[Row, Chat], ParsedRow | str]] = {
    "strings": _strings,
    "transcripts": _transcripts,
    "messages": _messages,
    "sharegpt": _sharegpt,
    "ranked": _ranked,
    "unpaired": _unpaired,
    "completion": _completion,
    "alpaca": _alpaca,
    "dolly": _dolly,
    "prompts": _prompts,
}
# The columns of each form, in the order of detection. Those of `strings` with messages in them are `messages` too.
COLUMNS = {
    "sharegpt": ("conversations",),
    "ranked": ("prompt", "responses"),
    "strings": ("prompt", "chosen", "rejected"),
    "transcripts": ("chosen", "rejected"),
    "messages": ("messages",),
    "unpaired": ("prompt", "completion", "label"),
    "completion": ("prompt", "completion"),
    "alpaca": ("instruction", "output"),
    "dolly": ("instruction", "response"),
}


# Columns with a meaning of their own. Rows with equal prompts count once, unless other columns differ.
FORM_COLUMNS = {
    *(name for needed in COLUMNS.values() for name in needed),
    *("scores", "margin", "system", "tools", "input", "context"),
}


def detect_form(row: Row, *, may_be_prompts: bool = False) -> str:
    """Infer the form of a file from the columns of a row.

    Args:
        may_be_prompts: a prompt without responses is a form too.
    """
    columns = row.values
    known_forms = COLUMNS | ({"prompts": ("prompt",)} if may_be_prompts else {})
    for form, needed in known_forms.items():
        if all(name in columns for name in needed):
            texts = [columns[name] for name in needed]
            is_pair = form in ("strings", "transcripts")
            return "messages" if is_pair and any(isinstance(text, (list, dict)) for text in texts) else form
    forms = ", ".join(f"{form} ({', '.join(needed)})" for form, needed in known_forms.items())
    problem = f"{row.origin}: the columns {clipped(', '.join(columns)) or '(none)'} are of no known form"
    fix = f"rename them, or name a form with format=: {forms}; chosen and rejected may hold messages"
    raise BadRow(f"{problem}{_nearest_form(list(columns), known_forms)}", fix)


def _nearest_form(columns: list[str], known_forms: Mapping[str, tuple[str, ...]]) -> str:
    """The form with the most similar columns, and those it lacks."""
    known = [column.lower() for column in columns]
    missing = {form: [name for name in needed if name not in columns] for form, needed in known_forms.items()}

    def likeness(form: str) -> float:
        best = [
            max((difflib.SequenceMatcher(None, name, column).ratio() for column in known), default=0.0)
            for name in known_forms[form]
        ]
        return sum(best) - 0.6 * len(best)  # each similar column counts for a form, each other one against it

    form = max(known_forms, key=likeness)
    return f"; the nearest is {form}, without {' and '.join(missing[form])}" if likeness(form) > 0 else ""
