"""Message lists as text: by a chat template, or in the format of HH."""

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NotRequired, TypedDict

from engine.data.chat_templates import read_template, template_advice
from engine.data.rows import BadRow, Row
from engine.data.special_tokens import MARK, special_token_marker, without_eos
from engine.data.template_process import TemplateLimit, render_texts
from utils import UserError, clipped

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

HUMAN_TURN = "\n\nHuman:"
ASSISTANT_TURN = "\n\nAssistant:"
# Stands for MARK inside templates: their `tojson` would escape it. Data never contain half a surrogate pair.
TEMPLATE_MARK = "\udfff"


class Message(TypedDict):
    """A message; a tool's result may name its tool, or the id of the call."""

    role: str
    content: str
    tool_calls: NotRequired[list[dict[str, Any]]]
    name: NotRequired[str]
    tool_call_id: NotRequired[str]


class Chat:
    """Writes message lists as text.

    Args:
        tokenizer: the tokenizer to encode the text.
        chat_template: None for the tokenizer's template, "hh", "llama2", "chatml", or the path of a Jinja file.
        sft_turns: the responses of a dialogue to learn: "all", or the "last". "next": only the last, or the prompt if
            it ends with the user.

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
        if chat_template is not None:
            self.jinja = read_template(chat_template, "give null, hh, llama2, chatml or the path of a Jinja file")

    def render(
        self, row: Row, messages: list[Message], responses: Sequence[Message], tools: Sequence[Any] = ()
    ) -> tuple[str, list[str]]:
        """Write a prompt and its responses as text.

        Args:
            row: where the messages come from, for errors.
            messages: the prompt.
            responses: the assistant's next message. An empty one stays empty, so it is dropped later. Else the
                template's own tokens would be learned.
            tools: schemas of the tools that may be called.

        Returns:
            The prompt, and the text of each response after it, without a final EOS.

        Raises:
            UserError: if there is no usable chat template, or it loops or grows without end.
            BadRow: if the template raises an error, or leaves out tools, tool calls or their results.
        """
        messages, responses = (list(map(self._without_literal_eos, each)) for each in (messages, responses))
        if not self.is_template:
            return _hh_texts(row, messages, responses, tools)
        if self.jinja is None and not self.tokenizer.chat_template:
            problem = f"chat_template: {row.origin} has messages, but the tokenizer has no chat template"
            raise UserError("CONFIG", problem, f"set {template_advice(self.tokenizer)}")
        dialogues = [[*messages, response] for response in responses]
        prompt, *texts = self._apply(row, [messages, *dialogues], tools)
        if not all(text.startswith(prompt) for text in texts):
            problem = (
                f"chat_template: {row.origin}: the text of the dialogue does not start with the text of its prompt"
            )
            fix = "use a template that appends a text for each message, or chat_template=hh"
            raise UserError("CONFIG", problem, fix)
        for dialogue in dialogues or [messages]:
            self._check_tools_are_written(row, dialogue, tools)
        endings = [without_eos(text[len(prompt) :], self.tokenizer) for text in texts]
        return prompt, [end if _says_something(each) else "" for end, each in zip(endings, responses, strict=True)]

    def _check_tools_are_written(self, row: Row, messages: list[Message], tools: Sequence[Any]) -> None:
        """Raise BadRow if the template leaves out a tool, a tool call or a tool's result.

        Templates do so silently. So render once more, with other names and results, and look for these.
        """
        probe = ToolProbe()
        messages, tools = [probe.message(message) for message in messages], [probe.tool(tool) for tool in tools]
        if not probe.expected:
            return
        (text,) = self._apply(row, [messages], tools)
        for name, what in probe.expected.items():
            if name not in text:
                fix = "set a chat_template that supports tools, or remove this row"
                raise BadRow(f"{row.origin}: the chat template leaves out {what}", fix)

    def _apply(self, row: Row, dialogues: list[list[Message]], tools: Sequence[Any] = ()) -> list[str]:
        """Write dialogues by the template; those before a response with a generation prompt."""
        variables = {
            "chat_template": self.tokenizer.get_chat_template(self.jinja),
            "tools": self._marked(list(tools)) or None,
            **self.tokenizer.special_tokens_map,
        }
        texts = [
            {
                "conversations": [self._marked(dialogue)],
                "add_generation_prompt": dialogue[-1]["role"] != "assistant",
            }
            for dialogue in dialogues
        ]
        try:
            return [text.replace(TEMPLATE_MARK, MARK) for text in render_texts(variables, texts)]
        except TemplateLimit as error:  # not BadRow: each row may take as long
            fix = "set another chat_template, or remove this row if it is an odd one"
            raise UserError("DATA", f"{row.origin}: the chat template {error}", fix) from error
        except ValueError as error:
            if any(isinstance(arguments, dict) for arguments in _call_arguments(dialogues)):  # some templates want text
                with_text = [[_with_json_arguments(message) for message in dialogue] for dialogue in dialogues]
                return self._apply(row, with_text, tools)
            fix = "correct this row or remove it, or set another chat_template"
            raise BadRow(f"{row.origin}: the chat template refuses it: {clipped(str(error))}", fix) from error

    def _marked(self, value: Any) -> Any:
        """The value with every literal special token of its texts marked."""
        if isinstance(value, str):
            return self.mark(value).replace(MARK, TEMPLATE_MARK)
        if isinstance(value, dict):
            return {self._marked(key): self._marked(item) for key, item in value.items()}
        return [self._marked(item) for item in value] if isinstance(value, list) else value

    def _without_literal_eos(self, message: Message) -> Message:
        """The message without an EOS that its author wrote: the template writes one."""
        if message["role"] != "assistant":
            return message
        return {**message, "content": without_eos(message["content"], self.tokenizer)}


class ToolProbe:
    """Renames tools and calls, and replaces results, to find them in the text of a template.

    Attributes:
        expected: each new name, with a description of what it stands for.
    """

    def __init__(self) -> None:
        self.expected: dict[str, str] = {}

    def message(self, message: Message) -> Message:
        if message["role"] == "tool":
            return {**message, "content": self._name("the result of a tool")}
        if "tool_calls" not in message:
            return message
        return {**message, "tool_calls": [self.tool(call, "the call of tool") for call in message["tool_calls"]]}

    def tool(self, tool: Any, what: str = "the tool") -> Any:
        """A tool or a tool call with another name."""
        if isinstance(tool, dict) and isinstance(tool.get("function"), dict):
            return {**tool, "function": self.tool(tool["function"], what)}
        if not isinstance(tool, dict):
            return tool
        return {**tool, "name": self._name(f"{what} '{clipped(str(tool.get('name')))}'")}

    def _name(self, what: str) -> str:
        name = f"probe{len(self.expected)}x"
        self.expected[name] = what
        return name


def _call_arguments(dialogues: Sequence[Sequence[Message]]) -> list[Any]:
    messages = [message for dialogue in dialogues for message in dialogue]
    return [call["function"]["arguments"] for message in messages for call in message.get("tool_calls", [])]


def _with_json_arguments(message: Message) -> Message:
    """The message with the arguments of its tool calls as JSON text."""
    if "tool_calls" not in message:
        return message
    calls = []
    for call in message["tool_calls"]:
        arguments = json.dumps(call["function"]["arguments"], ensure_ascii=False)
        calls.append({**call, "function": {**call["function"], "arguments": arguments}})
    return {**message, "tool_calls": calls}


def _says_something(response: Message) -> bool:
    return bool(response["content"].strip() or "tool_calls" in response)


def _hh_texts(
    row: Row, messages: list[Message], responses: Sequence[Message], tools: Sequence[Any]
) -> tuple[str, list[str]]:
    if tools or any("tool_calls" in message for message in (*messages, *responses)):
        problem = f"{row.origin}: chat_template=hh has no tools and no tool calls"
        raise BadRow(problem, "remove this row, or set another chat_template")
    return _hh_prompt(row, messages), [
        " " + response["content"] if _says_something(response) else "" for response in responses
    ]


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
