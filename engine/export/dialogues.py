"""Choose the chat template of a saved model."""

from typing import Any

from transformers import PreTrainedTokenizerBase

from engine.data.chat import Chat
from engine.data.chat_templates import BOS, JINJA
from engine.data.encoding import token_prefix
from engine.export.run_record import RunRecord


def chat_of(
    tokenizer: PreTrainedTokenizerBase,
    record: RunRecord,
    chat_template: str | None = None,
    *,
    sft_turns: str = "all",
    default: str | None = None,
) -> Chat:
    """The writer of dialogues of a saved model.

    Args:
        record: the training; its chat template comes before the tokenizer's.
        chat_template: hh, llama2, chatml, or the path of a Jinja file, before both; None for theirs.
        sft_turns: as of Chat.
        default: for a tokenizer without a template.
    """
    name = chat_template or record.chat_template
    if name is None:
        stored = tokenizer.chat_template
        if not stored:
            name = default
        elif isinstance(stored, str) and stored.removeprefix(BOS) == JINJA["hh"]:  # as export.py writes it
            name = "hh"
    if chat_template is not None or name in JINJA:
        return Chat(tokenizer, name, sft_turns)
    chat = Chat(tokenizer, None, sft_turns)
    chat.jinja = record.template_text()
    return chat


def template_to_export(name: str | None, tokenizer: PreTrainedTokenizerBase, record: RunRecord) -> Any:
    """The chat template to write, as Jinja text: of that name, else the training data's, else the tokenizer's."""
    chat = chat_of(tokenizer, record, name)
    if not chat.is_template:
        return BOS + JINJA["hh"] if token_prefix(tokenizer) else JINJA["hh"]
    return chat.jinja or tokenizer.chat_template
