"""The user's own files: rows read and checked, and what each form of row says about preferences."""

import gzip
import json
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import accumulate, combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Literal, NamedTuple, NotRequired, TypedDict

from engine.chat_templates import JINJA
from utils import UserError, clipped, content_hash

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SplitName = Literal["train", "test"]

SUFFIXES = (".json", ".json.gz", ".jsonl", ".jsonl.gz", ".parquet")
SPLIT_FILES = {"train": ("train",), "test": ("test", "validation", "eval")}
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
ASSISTANT_TURN = "\n\nAssistant:"
PROMPTS_DIFFER = "prompts of chosen and rejected differ"
# Data never holds a NUL byte (Row.as_text), so it can say: what is around this mark is no special token.
MARK = "\x00"
# What is longer is no text of a dialogue, and would take a tokenizer minutes.
MAX_LINE_BYTES = 16_000_000
MAX_CHARACTERS = 2_000_000
MAX_RESPONSES = 1000  # of one row: every two of them may be a pair
MALFORMED = "malformed"  # the reason for which a bad row is dropped


class Preference(TypedDict):
    """What is known about the answers to one prompt."""

    responses: list[str]
    pairs: list[tuple[int, int]]  # (preferred, other), as indices into responses
    sft_target: str
    demonstrations: NotRequired[list[str]]  # answers that SFT learns too
    template: NotRequired[bool]  # written by a chat template, whose special tokens are encoded as such


Preferences = dict[str, Preference]


class BadRow(UserError):
    """A row that cannot be read, or is not what its data set's rows are."""

    def __init__(self, what: str, remedy: str = "correct this row or remove it"):
        self.remedy = remedy
        super().__init__("DATA", what, f"{remedy}; on_bad_row=drop leaves out such rows")


@dataclass
class Tally:
    """What became of the rows of a data set: how many were read, and how many dropped, by reason.

    Args:
        on_bad_row: "error": a bad row ends the run; "drop": it is dropped, and the first of them is kept here.
    """

    rows: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    on_bad_row: str = "error"
    first_bad_row: str = ""

    def bad(self, error: BadRow) -> None:
        """Drop a bad row, or raise its error."""
        if self.on_bad_row == "error":
            raise error
        self.dropped[MALFORMED] += 1
        self.first_bad_row = self.first_bad_row or error.what

    @contextmanager
    def checked(self) -> Iterator[None]:
        """Around what is done with one row: if that is a bad one, it is dropped or ends the run."""
        try:
            yield
        except BadRow as error:
            self.bad(error)

    def add(self, other: "Tally") -> None:
        """Count what another tally has counted."""
        self.rows += other.rows
        self.dropped.update(other.dropped)
        self.first_bad_row = self.first_bad_row or other.first_bad_row


def add_preference(
    preferences: Preferences, prompt: str, responses: Sequence[str], pairs: Sequence[tuple[int, int]], sft_target: str
) -> Preference:
    """Add responses to a prompt, which may be known already; pairs index these responses. The last sft_target stays."""
    preference = preferences.setdefault(prompt, {"responses": [], "pairs": [], "sft_target": sft_target})
    start = len(preference["responses"])
    preference["responses"].extend(responses)
    preference["pairs"].extend((start + chosen, start + rejected) for chosen, rejected in pairs)
    preference["sft_target"] = sft_target
    return preference


def pairs_by_score(scores: Sequence[float]) -> list[tuple[int, int]]:
    """All pairs of indices, the higher score first; equal scores prefer neither, so they make no pair."""
    return [
        (i, j) if scores[i] > scores[j] else (j, i)
        for i, j in combinations(range(len(scores)), 2)
        if scores[i] != scores[j]
    ]


# ---- Rows ----


@dataclass(frozen=True)
class Row:
    """One row of a data set, and where it stands: "hh/train.jsonl line 17". Asking for a field checks it."""

    values: dict[str, Any]
    origin: str

    def text(self, name: str) -> str:
        return self.as_text(self.present(name), name)

    def number(self, name: str) -> float:
        return self.as_number(self.present(name), name)

    def items(self, name: str) -> list[Any]:
        return self.as_list(self.present(name), name)

    def present(self, name: str) -> Any:
        if name not in self.values:
            raise self.error(name, "is missing")
        return self.values[name]

    # `name` below says where the value stands in the row: "chosen[0].content".

    def as_text(self, value: Any, name: str) -> str:
        if not isinstance(value, str):
            raise self.wrong_type(value, name, "text")
        if MARK in value:
            raise self.error(name, "holds a NUL byte")
        if len(value) > MAX_CHARACTERS:
            raise self.error(name, f"has {len(value):,} characters, more than {MAX_CHARACTERS:,}")
        try:
            value.encode()
        except UnicodeEncodeError:
            raise self.error(name, "holds half a surrogate pair, which is no character") from None
        return value

    def as_number(self, value: Any, name: str) -> float:
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            raise self.wrong_type(value, name, "a number")
        if not abs(value) < 1e300:  # nor an integer that no float can hold
            raise self.error(name, "is too large" if abs(value) >= 1e300 else "is nan")
        return value

    def as_list(self, value: Any, name: str) -> list[Any]:
        if not isinstance(value, list):
            raise self.wrong_type(value, name, "a list")
        return value

    def member(self, value: Any, key: str, name: str) -> Any:
        """value[key], where value must be an object that has the key."""
        if not isinstance(value, dict):
            raise self.wrong_type(value, name, "an object")
        if key not in value:
            raise self.error(f"{name}.{key}", "is missing")
        return value[key]

    def wrong_type(self, value: Any, name: str, wanted: str) -> BadRow:
        names = {type(None): "null", bool: "a boolean", int: "a number", float: "a number", str: "text"}
        names |= {list: "a list", dict: "an object"}
        return self.error(name, f"is {names.get(type(value), type(value).__name__)}, not {wanted}")

    def error(self, name: str, problem: str) -> BadRow:
        return BadRow(f"{self.origin}: field '{name}' {problem}")


def _raised(error: BadRow) -> None:
    raise error


def read_rows(path: Path, bad: Callable[[BadRow], None] = _raised) -> Iterator[Row]:
    """The rows of a .json, .jsonl or .parquet file, or a gzipped one, in order.

    JSON is a list of objects or an object per line, whatever the suffix says. Lines are counted from 1, rows from 0.

    Args:
        path: the file.
        bad: is given what is wrong with a row that cannot be read; if it returns, the row is left out.

    Raises:
        UserError: for anything that cannot be read, with the file and the line.
    """
    if path.exists() and not path.is_file():
        raise UserError("DATA", f"{path} is not a file", "give a file, or a folder with a file train.*")
    if not path.name.endswith(SUFFIXES):
        raise UserError("DATA", f"{path}: unknown kind of file", f"use one of {', '.join(SUFFIXES)}")
    try:
        if path.name.endswith(".parquet"):
            yield from _parquet_rows(path, bad)
        else:
            with open(path, "rb") as file:
                yield from _json_rows(path, gzip.GzipFile(fileobj=file) if path.name.endswith(".gz") else file, bad)
    except (OSError, EOFError, zlib.error) as error:  # not a gzip file, cut short, damaged, not permitted
        raise UserError("DATA", f"{path} cannot be read: {error}", "check or replace the file") from error


def _json_rows(path: Path, file: BinaryIO | gzip.GzipFile, bad: Callable[[BadRow], None]) -> Iterator[Row]:
    is_first, number = True, 0
    while line := file.readline(MAX_LINE_BYTES):
        number += 1
        text = line.strip(b" \t\r\n\xef\xbb\xbf")
        if is_first and text.startswith(b"["):
            yield from _array_rows(path, line + file.read(), number, bad)
            return
        try:
            if len(line) == MAX_LINE_BYTES and not line.endswith(b"\n"):
                size = len(line)
                while not line.endswith(b"\n") and (line := file.readline(MAX_LINE_BYTES)):
                    size += len(line)
                raise BadRow(f"{path} line {number} has {size:,} bytes, more than {MAX_LINE_BYTES:,}")
            if text:
                yield _as_row(_parse_json(line, path, number), f"{path} line {number}")
        except BadRow as error:
            bad(error)
        is_first = is_first and not text


def _array_rows(path: Path, data: bytes, first_line: int, bad: Callable[[BadRow], None]) -> Iterator[Row]:
    try:
        values = _parse_json(data, path, first_line)
    except BadRow as error:  # the rows cannot be told apart
        raise UserError("DATA", error.what, "correct the file, or write it as .jsonl, one row per line") from error
    for index, value in enumerate(values):
        try:
            yield _as_row(value, f"{path} row {index}")
        except BadRow as error:
            bad(error)


def _parse_json(data: bytes, path: Path, first_line: int) -> Any:
    try:
        return json.loads(data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        line, problem = first_line + data.count(b"\n", 0, error.start), "is not UTF-8"
    except json.JSONDecodeError as error:
        line, problem = first_line + error.lineno - 1, f"is not JSON: {error.msg}, column {error.colno}"
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, nesting without end
        line, problem = first_line, f"is not usable JSON: {error}"
    raise BadRow(f"{path} line {line} {problem}", "correct this line or remove it")


def _parquet_rows(path: Path, bad: Callable[[BadRow], None]) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    index = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                for values in batch.to_pylist():
                    yield _as_row(values, f"{path} row {index}")
                    index += 1
    except UnicodeDecodeError as error:
        problem = f"{path}: text near row {index} is not UTF-8"
        raise UserError("DATA", problem, "write the file again from valid text") from error
    except (pyarrow.ArrowException, ValueError, OverflowError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError("DATA", f"{path} cannot be read: {error}", "check or replace the file") from error


def _as_row(value: Any, origin: str) -> Row:
    if not isinstance(value, dict):
        raise BadRow(f"{origin} is not an object", 'write each row as {"field": value, ...}')
    return Row(value, origin)


# ---- Message lists as text ----


def special_token_marker(tokenizer: "PreTrainedTokenizerBase") -> Callable[[str], str]:
    """A function that puts a MARK into every literal special token of a text, overlapping ones too.

    Text is encoded in the pieces between its marks, so what was marked never becomes a special token.
    """
    tokens = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    escaped = [re.escape(token) for token in sorted(tokens | set(tokenizer.all_special_tokens)) if len(token) > 1]
    if not escaped:
        return lambda text: text
    first_character = re.compile(f"(?={'|'.join(escaped)}).", re.DOTALL)
    return lambda text: first_character.sub(rf"\g<0>{MARK}", text)


class Message(TypedDict):
    role: str
    content: str


class Chat:
    """Writes message lists as text: by a chat template, or in the form of HH.

    Args:
        tokenizer: the tokenizer that the text is for.
        chat_template: null for the tokenizer's own, "hh", "llama2", or the path of a Jinja file.
        sft_turns: which answers of a dialogue without a preference are learned: "all", or the "last".
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", chat_template: str | None = None, sft_turns: str = "all"):
        self.tokenizer = tokenizer
        self.sft_turns = sft_turns
        self.mark = special_token_marker(tokenizer)
        self.is_template = chat_template != "hh"  # else all of the text is plain
        self.jinja: str | None = None
        if chat_template in JINJA:
            self.jinja = JINJA[chat_template]
        elif chat_template is not None:
            try:
                self.jinja = Path(chat_template).read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                problem = f"chat_template: {chat_template} cannot be read ({error})"
                raise UserError("CONFIG", problem, "give null, hh, llama2 or the path of a Jinja file") from error

    def render(self, row: Row, messages: list[Message], answers: Sequence[str]) -> tuple[str, list[str]]:
        """The text of a prompt, and what each answer adds to it, without the end-of-text token that may close it.

        An empty answer stays empty, so that it is dropped rather than trained on as nothing but the template's tokens.
        """
        if not self.is_template:
            return _hh_prompt(row, messages), [" " + answer if answer.strip() else "" for answer in answers]
        if self.jinja is None and not self.tokenizer.chat_template:
            fix = "set chat_template=hh or llama2, or to the path of a Jinja file"
            raise UserError("CONFIG", f"chat_template: {row.origin} has messages, the tokenizer has no template", fix)
        prompt = self._apply(row, messages, add_generation_prompt=True)
        responses = []
        for answer in answers:
            whole = self._apply(row, [*messages, {"role": "assistant", "content": answer}])
            if not whole.startswith(prompt):
                problem = f"chat_template: with {row.origin}, a dialogue does not begin as its own prompt does"
                raise UserError("CONFIG", problem, "use a template that only appends, or chat_template=hh")
            responses.append(self._without_eos(whole[len(prompt) :]) if answer.strip() else "")
        return prompt, responses

    def _apply(self, row: Row, messages: list[Message], add_generation_prompt: bool = False) -> str:
        marked = [{"role": self.mark(m["role"]), "content": self.mark(m["content"])} for m in messages]
        try:
            return self.tokenizer.apply_chat_template(
                marked, chat_template=self.jinja, tokenize=False, add_generation_prompt=add_generation_prompt
            )
        except Exception as error:  # whatever a template raises
            fix = "correct this row or remove it, or set another chat_template"
            raise BadRow(f"{row.origin}: the chat template refuses it: {clipped(str(error))}", fix) from error

    def _without_eos(self, response: str) -> str:
        eos = self.tokenizer.eos_token
        return response.rstrip().removesuffix(eos) if eos and response.rstrip().endswith(eos) else response


def _hh_prompt(row: Row, messages: list[Message]) -> str:
    parts = [message["content"] for message in messages if message["role"] == "system"]
    names = {"user": "Human", "assistant": "Assistant"}
    for message in messages:
        if message["role"] in names:
            parts.append(f"\n\n{names[message['role']]}: {message['content']}")
        elif message["role"] != "system":
            problem = f"{row.origin}: role '{clipped(message['role'])}' has no place in chat_template=hh"
            raise BadRow(problem, "use the roles system, user and assistant, or another chat_template")
    return "".join(parts) + ASSISTANT_TURN


# ---- Forms ----


class Parsed(NamedTuple):
    """What one row says. `key` names its prompt whatever the chat template makes of it (which may write the date).

    A demonstration is an instruction with one answer: there is nothing that the answer is preferred to. A dialogue of
    several answers is one for each; those before the last are in `earlier`.
    """

    key: Any
    prompt: str
    responses: list[str]
    pairs: list[tuple[int, int]]
    best: int = 0
    template: bool = False
    demonstration: bool = False
    earlier: tuple["Parsed", ...] = ()


def split_transcript(row: Row) -> tuple[str, str, str] | None:
    """Prompt, chosen and rejected of two HH transcripts, split at the last Assistant turn of each.

    Returns:
        None where what is before that turn is not the same in both.
    """
    texts = [row.text("chosen"), row.text("rejected")]
    cuts = [text.rfind(ASSISTANT_TURN) + len(ASSISTANT_TURN) for text in texts]
    if ASSISTANT_TURN not in texts[0]:
        raise row.error("chosen", "has no '\\n\\nAssistant:' turn")
    if ASSISTANT_TURN not in texts[1] or texts[0][: cuts[0]] != texts[1][: cuts[1]]:
        return None
    return texts[0][: cuts[0]], texts[0][cuts[0] :], texts[1][cuts[1] :]


def _strings(row: Row, chat: Chat) -> Parsed:
    prompt = row.text("prompt")
    return Parsed(prompt, prompt, [row.text("chosen"), row.text("rejected")], [(0, 1)])


def _transcripts(row: Row, chat: Chat) -> Parsed | str:
    parts = split_transcript(row)
    return Parsed(parts[0], parts[0], list(parts[1:]), [(0, 1)]) if parts else PROMPTS_DIFFER


def _messages(row: Row, chat: Chat) -> Parsed | str:
    if "messages" in row.values and not _has_pair(row):
        return _dialogue(row, chat, _message_list(row, row.items("messages"), "messages"))
    chosen, rejected = (_message_list(row, row.items(name), name) for name in ("chosen", "rejected"))
    prompt: list[Message] | None = None
    if isinstance(row.values.get("prompt"), str):
        prompt = [{"role": "user", "content": row.text("prompt")}]
    elif "prompt" in row.values:
        prompt = _message_list(row, row.items("prompt"), "prompt")
    for name, dialogue in (("chosen", chosen), ("rejected", rejected)):
        if dialogue[-1]["role"] != "assistant":
            raise row.error(name, "does not end in a message of the assistant")
        before = dialogue[:-1]
        # A system message may stand in front of the prompt that is given.
        if prompt is not None and before and before[-len(prompt) :] != prompt:
            raise row.error(name, "has messages before its last that are not those of 'prompt'")
        if prompt is None and not before:
            raise row.error(name, "has no message before its last, and there is no field 'prompt'")
    prompts = [dialogue[:-1] or prompt or [] for dialogue in (chosen, rejected)]
    if prompts[0] != prompts[1]:
        return PROMPTS_DIFFER
    return _rendered(row, chat, prompts[0], [chosen[-1]["content"], rejected[-1]["content"]])


def _sharegpt(row: Row, chat: Chat) -> Parsed | str:
    prompt = _with_system(row, _message_list(row, row.items("conversations"), "conversations"))
    if not _has_pair(row):
        return _dialogue(row, chat, prompt)
    answers = []
    for name in ("chosen", "rejected"):
        answer = row.present(name)
        if not isinstance(answer, str):
            message = _message(row, answer, name)
            if message["role"] != "assistant":
                raise row.error(name, "is not a message of the assistant")
            answer = message["content"]
        answers.append(row.as_text(answer, name))
    return _rendered(row, chat, prompt, answers)


def _alpaca(row: Row, chat: Chat) -> Parsed:
    return _instruction(row, chat, context="input", answer="output")


def _dolly(row: Row, chat: Chat) -> Parsed:
    return _instruction(row, chat, context="context", answer="response")


def _instruction(row: Row, chat: Chat, *, context: str, answer: str) -> Parsed:
    """An instruction as a message of the user, what it is about (if anything) below it."""
    parts = [row.text("instruction")] + ([row.text(context)] if row.values.get(context) else [])
    messages: list[Message] = [{"role": "user", "content": "\n\n".join(parts)}]
    return _demonstrated(row, chat, _with_system(row, messages), row.text(answer))


def _dialogue(row: Row, chat: Chat, messages: list[Message]) -> Parsed | str:
    """A dialogue whose answers, or the last of them, are to be learned, each with all that was said before it."""
    roles = [message["role"] for message in messages]
    if "user" not in roles:
        return "dialogue without a message of the user"
    answers = [index for index in range(roles.index("user"), len(roles)) if roles[index] == "assistant"]
    if not answers or (chat.sft_turns == "last" and answers[-1] != len(roles) - 1):
        return "dialogue that does not end in a message of the assistant"
    if chat.sft_turns == "last":
        del answers[:-1]
    ends = list(accumulate(len(message["content"]) for message in messages))
    if sum(ends[index] for index in answers) > MAX_LINE_BYTES:
        name = "messages" if "messages" in row.values else "conversations"
        problem = f"has {len(answers)} answers, whose prompts are over {MAX_LINE_BYTES:,} characters together"
        raise BadRow(f"{row.origin}: field '{name}' {problem}", "divide the dialogue, or set sft_turns=last")
    turns = [
        _demonstrated(row, chat, messages[:index], messages[index]["content"])
        for index in answers
        if index == answers[-1] or roles[index - 1] != "assistant"
    ]
    # One key for all, so that all are held out, or none.
    return turns[-1]._replace(key=turns[0].key, earlier=tuple(turns[:-1]))


def _demonstrated(row: Row, chat: Chat, messages: list[Message], answer: str) -> Parsed:
    return _rendered(row, chat, messages, [answer])._replace(pairs=[], demonstration=True)


def _with_system(row: Row, messages: list[Message]) -> list[Message]:
    """The messages behind that of a column `system`, if the row has one."""
    if not row.values.get("system"):
        return messages
    return [{"role": "system", "content": row.text("system")}, *messages]


def _has_pair(row: Row) -> bool:
    return "chosen" in row.values or "rejected" in row.values


def _rendered(row: Row, chat: Chat, messages: list[Message], answers: list[str]) -> Parsed:
    if messages[-1]["role"] == "assistant":
        name = next(name for name in ("conversations", "messages", "prompt", "chosen") if name in row.values)
        raise row.error(name, "ends in a message of the assistant, where the answer should follow")
    prompt, responses = chat.render(row, messages, answers)
    key = [[message["role"], message["content"].strip()] for message in messages]
    return Parsed(key, prompt, responses, [(0, 1)], template=chat.is_template)


def _message_list(row: Row, values: list[Any], name: str) -> list[Message]:
    if not values:
        raise row.error(name, "is an empty list")
    return [_message(row, value, f"{name}[{index}]") for index, value in enumerate(values)]


def _message(row: Row, value: Any, name: str) -> Message:
    """{"role", "content"}, or ShareGPT's {"from", "value"}, whose roles have other names."""
    is_sharegpt = isinstance(value, dict) and "role" not in value and "from" in value
    role_key, content_key = ("from", "value") if is_sharegpt else ("role", "content")
    role = row.as_text(row.member(value, role_key, name), f"{name}.{role_key}")
    content = row.as_text(row.member(value, content_key, name), f"{name}.{content_key}")
    if is_sharegpt and role not in ROLES:
        raise row.error(f"{name}.{role_key}", f"is '{clipped(role)}', not one of {', '.join(ROLES)}")
    return {"role": ROLES.get(role, role), "content": content}


def _ranked(row: Row, chat: Chat) -> Parsed:
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
    return Parsed(prompt, prompt, responses, pairs_by_score(scores), best=scores.index(max(scores)))


FORMS: dict[str, Callable[[Row, Chat], Parsed | str]] = {
    "strings": _strings,
    "transcripts": _transcripts,
    "messages": _messages,
    "sharegpt": _sharegpt,
    "ranked": _ranked,
    "alpaca": _alpaca,
    "dolly": _dolly,
}


def detect_form(row: Row) -> str:
    """The form that a file's first row has, told from its columns."""
    columns = row.values
    if "conversations" in columns:
        return "sharegpt"
    if "responses" in columns:
        return "ranked"
    if "chosen" in columns and "rejected" in columns:
        if isinstance(columns["chosen"], list):
            return "messages"
        return "strings" if "prompt" in columns else "transcripts"
    if "messages" in columns:
        return "messages"
    if "instruction" in columns and ("output" in columns or "response" in columns):
        return "alpaca" if "output" in columns else "dolly"
    problem = f"{row.origin}: the columns {clipped(', '.join(columns)) or '(none)'} are of no known form"
    raise BadRow(problem, f"rename them as one of the forms {', '.join(FORMS)}, or name it with format=")


# ---- Files ----


def load_file(
    path: Path,
    split: SplitName,
    tally: Tally,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    form: str | None = None,
    chat_template: str | None = None,
    sft_turns: str = "all",
    test_fraction: float = 0.05,
    needs_pairs: bool = False,
) -> Preferences:
    """A split of the user's own data: a file, or a folder with train.* and test.* (or validation.*, eval.*) files.

    Where there is no test file, test_fraction of the prompts are held out: always the same ones, by a hash of the
    prompt, whichever split is asked for.

    Args:
        path: the file or folder.
        split: the split to load.
        tally: gets the rows of this split and those dropped. Dropped rows of a file that is split count as train's.
        tokenizer: writes message lists as text.
        form: a key of FORMS; None tells it from the columns of the first row.
        chat_template, sft_turns: see Chat.
        test_fraction: of the prompts, at least one if there are two.
        needs_pairs: whether rows without a preference are of no use.

    Raises:
        UserError: for rows that cannot be read, are malformed, or are of no use.
    """
    if form is not None and form not in FORMS:
        raise UserError("CONFIG", f"format: '{form}' is not a form", f"use one of {', '.join(FORMS)}, or null")
    file, is_split = find_split(path, split)
    chat = Chat(tokenizer, chat_template, sft_turns)
    preferences: Preferences = {}
    hashes: dict[str, str] = {}
    num_rows: Counter[str] = Counter()
    unused = Tally(on_bad_row=tally.on_bad_row)
    for row in read_rows(file, unused.bad):
        parsed: Parsed | str | None = None
        with unused.checked():
            row_form = form or detect_form(row)
            try:
                parsed = FORMS[row_form](row, chat)
            except BadRow as error:
                if form is None:
                    what = f"{error.what} (its columns are those of format={row_form})"
                    raise BadRow(what, error.remedy) from error
                raise
            form = row_form  # of all rows, as the first good one has it
        if parsed is None:
            continue
        if isinstance(parsed, str):
            unused.dropped[parsed] += 1
            continue
        if parsed.demonstration and needs_pairs:
            problem = f"{row.origin}: rows of the form {form} have one answer, which is preferred to no other"
            raise UserError("DATA", problem, "train on them with loss=sft; other losses need chosen and rejected")
        turns = (*parsed.earlier, parsed)
        known = [hashes[turn.prompt] for turn in turns if turn.prompt in hashes]  # of rows that begin alike
        row_hash = known[0] if known else content_hash([parsed.key])
        for turn in turns:
            target = turn.responses[turn.best]
            preference = add_preference(preferences, turn.prompt, turn.responses, turn.pairs, target)
            if turn.template:
                preference["template"] = True
            if turn.demonstration:
                preference.setdefault("demonstrations", []).append(target)
            hashes.setdefault(turn.prompt, row_hash)
        num_rows[parsed.prompt] += 1

    if not is_split:
        order = sorted(set(hashes.values()))
        num_test = round(test_fraction * len(order))
        if test_fraction > 0 and len(order) > 1:
            num_test = min(max(num_test, 1), len(order) - 1)
        wanted = set(order[:num_test] if split == "test" else order[num_test:])
        preferences = {prompt: preference for prompt, preference in preferences.items() if hashes[prompt] in wanted}
    if is_split or split == "train":
        unused.rows = sum(unused.dropped.values())
        tally.add(unused)
    tally.rows += sum(num_rows[prompt] for prompt in preferences)
    return preferences


def find_split(path: Path, split: SplitName) -> tuple[Path, bool]:
    """The file that holds a split, and whether it holds nothing else (False: test prompts must be held out of it)."""
    if not path.is_dir():
        if not path.exists():
            raise UserError("DATA", f"datasets: there is no file {path}", "correct the path")
        return path, False
    files: dict[str, Path] = {}
    for name, stems in SPLIT_FILES.items():
        for stem in reversed(stems):  # so that the first that exists stays
            same = [file for file in sorted(path.iterdir()) if file.name in [stem + suffix for suffix in SUFFIXES]]
            if len(same) > 1:
                names = " and ".join(file.name for file in same)
                raise UserError("DATA", f"datasets: {path} holds both {names}", "leave one of them there")
            if same:
                files[name] = same[0]
    if "train" not in files:
        raise UserError("DATA", f"datasets: {path} holds no file train.*", f"name it train + {', '.join(SUFFIXES)}")
    return (files[split], True) if "test" in files else (files["train"], False)
