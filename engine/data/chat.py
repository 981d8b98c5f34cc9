"""Message lists as text: by a chat template, or in the format of HH."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

from engine.data.chat_templates import JINJA, template_advice
from engine.data.rows import BadRow, Row
from engine.data.special_tokens import special_token_marker
from utils import UserError, clipped

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

HUMAN_TURN = "\n\nHuman:"
ASSISTANT_TURN = "\n\nAssistant:"


class Message(TypedDict):
    role: str
    content: str


class Chat:
    """Writes message lists as text.

    Args:
        tokenizer: the tokenizer to encode the text.
        chat_template: None for the tokenizer's template, "hh", "llama2", or the path of a Jinja file.
        sft_turns: the responses of a dialogue to learn: "all", or the "last".

    Attributes:
        is_template: whether special tokens of the text count; text of "hh" is plain.
        jinja: the chat template; None for the tokenizer's.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", chat_template: str | None = None, sft_turns: str = "all"):
        self.tokenizer = tokenizer
        self.sft_turns = sft_turns
        self.mark = special_token_marker(tokenizer)
        self.is_template = chat_template != "hh"
        self.jinja: str | None = None
        if chat_template in JINJA:
            self.jinja = JINJA[chat_template]
        elif chat_template is not None:
            try:
                self.jinja = Path(chat_template).read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                problem = f"chat_template: {chat_template} cannot be read ({error})"
                raise UserError("CONFIG", problem, "give null, hh, llama2 or the path of a Jinja file") from error

    def render(self, row: Row, messages: list[Message], responses: Sequence[str]) -> tuple[str, list[str]]:
        """Write a prompt and its responses as text.

        Args:
            row: where the messages come from, for errors.
            messages: the prompt.
            responses: contents of the assistant's next message. An empty one stays empty, so it is dropped later.
                Else the template's own tokens would be learned.

        Returns:
            The prompt, and the text of each response after it, without a final EOS.

        Raises:
            UserError: if there is no usable chat template.
            BadRow: if the template raises an error.
        """
        if not self.is_template:
            return _hh_prompt(row, messages), [" " + text if text.strip() else "" for text in responses]
        if self.jinja is None and not self.tokenizer.chat_template:
            problem = f"chat_template: {row.origin} has messages, but the tokenizer has no chat template"
            raise UserError("CONFIG", problem, f"set {template_advice(self.tokenizer)}")
        prompt = self._apply(row, messages, add_generation_prompt=True)
        return prompt, [self._render_response(row, messages, prompt, text) for text in responses]

    def _render_response(self, row: Row, messages: list[Message], prompt: str, response: str) -> str:
        dialogue = self._apply(row, [*messages, {"role": "assistant", "content": response}])
        if not dialogue.startswith(prompt):
            problem = (
                f"chat_template: {row.origin}: the text of the dialogue does not start with the text of its prompt"
            )
            fix = "use a template that appends a text for each message, or chat_template=hh"
            raise UserError("CONFIG", problem, fix)
        return self._without_eos(dialogue[len(prompt) :]) if response.strip() else ""

    def _apply(self, row: Row, messages: list[Message], add_generation_prompt: bool = False) -> str:
        marked = [{"role": self.mark(m["role"]), "content": self.mark(m["content"])} for m in messages]
        try:
            return self.tokenizer.apply_chat_template(
                marked, chat_template=self.jinja, tokenize=False, add_generation_prompt=add_generation_prompt
            )
        except Exception as error:  # templates raise anything
            fix = "correct this row or remove it, or set another chat_template"
            raise BadRow(f"{row.origin}: the chat template refuses it: {clipped(str(error))}", fix) from error

    def _without_eos(self, response: str) -> str:
        eos = self.tokenizer.eos_token
        return response.rstrip().removesuffix(eos) if eos and response.rstrip().endswith(eos) else response


def _hh_prompt(row: Row, messages: list[Message]) -> str:
    parts = [message["content"] for message in messages if message["role"] == "system"]
    turns = {"user": HUMAN_TURN, "assistant": ASSISTANT_TURN}
    for message in messages:
        if message["role"] in turns:
            parts.append(f"{turns[message['role']]} {message['content']}")
        elif message["role"] != "system":
            problem = f"{row.origin}: chat_template=hh has no role '{clipped(message['role'])}'"
            raise BadRow(problem, "use the roles system, user and assistant, or another chat_template")
    return "".join(parts) + ASSISTANT_TURN
