"""Prompts from a file, as messages."""

import re
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from engine.data.chat import ASSISTANT_TURN, HUMAN_TURN, Chat, Message
from engine.data.forms import FORMS, detect_form
from engine.data.row_files import read_rows
from engine.data.rows import Row
from utils import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SPEAKERS = {"Human": "user", "Assistant": "assistant"}


def read_prompts(path: Path, tokenizer: "PreTrainedTokenizerBase") -> list[list[Message]]:
    """Read the prompts of a file, each once.

    Args:
        path: .txt, a question in each line, or rows of any form. Their responses are left out.

    Raises:
        UserError: DATA, for a malformed row or a file without prompts.
    """
    is_text = path.name.endswith(".txt")
    prompts = _read_lines(path) if is_text else _read_forms(path, Chat(tokenizer, "hh", "next"))
    distinct = {str(messages): messages for messages in prompts}
    if not distinct:
        raise UserError("DATA", f"prompts: {path} has no prompts", "give a file with prompts")
    return list(distinct.values())


def _read_lines(path: Path) -> list[list[Message]]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise UserError(
            "DATA", f"prompts: {path} is not UTF-8 ({error})", "convert it, with iconv for example"
        ) from error
    return [[{"role": "user", "content": line.strip()}] for line in lines if line.strip()]


def _read_forms(path: Path, chat: Chat) -> list[list[Message]]:
    form: str | None = None
    prompts, dropped = [], Counter[str]()
    for row in read_rows(path):
        form = form or detect_form(row, may_be_prompts=True)
        prompt = _prompt_of(row, form, chat)
        if isinstance(prompt, str):
            dropped[prompt] += 1
        else:
            prompts.append(prompt)
    for reason, count in dropped.items():
        print(f"prompts: {count:,} rows of {path} are left out: {reason}", flush=True)
    return prompts


def _prompt_of(row: Row, form: str, chat: Chat) -> list[Message] | str:
    """The prompt of a row, or the reason for leaving it out."""
    parsed = FORMS[form](row, chat)
    if isinstance(parsed, str):
        return parsed
    if isinstance(parsed.key, str):
        messages = split_dialogue(parsed.prompt)
    else:
        messages = [{"role": role, "content": content} for role, content, *_ in parsed.key]
    return messages if messages[-1]["content"] else "empty prompt"


def split_dialogue(text: str) -> list[Message]:
    """The messages of a prompt in the format of HH; another text is a question."""
    if not (text.startswith(HUMAN_TURN) and text.endswith(ASSISTANT_TURN)):
        return [{"role": "user", "content": text.strip()}]
    pieces = re.split(r"\n\n(Human|Assistant):", text.removesuffix(ASSISTANT_TURN))[1:]
    turns = zip(pieces[::2], pieces[1::2], strict=True)
    return [{"role": SPEAKERS[speaker], "content": content.strip()} for speaker, content in turns]
