"""Messages of rows: their roles, contents and tool calls, checked field by field."""

import json
from typing import Any

from engine.data.chat import Message
from engine.data.rows import Row
from utils import UserError, clipped

# The usual names of roles, in any case.
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "bot": "assistant", "assistant": "assistant",
         "model": "assistant", "system": "system", "tool": "tool"}  # fmt: skip
MAX_DEPTH = 50  # of tools and arguments


def read_messages(row: Row, value: Any, name: str) -> list[Message]:
    """The messages of a list, or of a single message."""
    if isinstance(value, dict):
        return [read_message(row, value, name)]
    values = row.as_list(value, name)
    if not values:
        raise row.error(name, "is an empty list")
    return [read_message(row, item, f"{name}[{index}]") for index, item in enumerate(values)]


def read_message(row: Row, value: Any, name: str) -> Message:
    """A message of {"role", "content"}, or of ShareGPT's {"from", "value"}."""
    is_sharegpt = isinstance(value, dict) and "role" not in value and "from" in value
    role_key, content_key = ("from", "value") if is_sharegpt else ("role", "content")
    role = row.as_text(row.member(value, role_key, name), f"{name}.{role_key}")
    if role.lower() not in ROLES:
        raise row.error(f"{name}.{role_key}", f"is '{clipped(role)}', not one of {', '.join(ROLES)}")
    message: Message = {"role": ROLES[role.lower()], "content": ""}
    if value.get("function_call"):  # it would be lost
        raise row.error(f"{name}.function_call", "is an old form: write it as tool_calls")
    if value.get("tool_calls"):
        message["tool_calls"] = _tool_calls(row, value["tool_calls"], f"{name}.tool_calls")
        if message["role"] != "assistant":
            raise row.error(f"{name}.tool_calls", f"is in a message of the role '{clipped(role)}'")
    if value.get(content_key) is not None or "tool_calls" not in message:
        message["content"] = _content(row, row.member(value, content_key, name), f"{name}.{content_key}")
    if message["role"] == "tool":  # a template names the call of a result
        for key in ("name", "tool_call_id"):
            if value.get(key) is not None:
                message[key] = row.as_text(value[key], f"{name}.{key}")
    return message


def read_tools(row: Row) -> list[dict[str, Any]]:
    """The tools of the column `tools`, a list or its JSON text; empty without the column."""
    tools = []
    for index, item in enumerate(row.as_list(_decoded(row, row.values.get("tools") or [], "tools"), "tools")):
        tool = _plain_json(row, _decoded(row, item, f"tools[{index}]"), f"tools[{index}]")
        function = tool["function"] if isinstance(tool, dict) and "function" in tool else tool
        row.as_text(row.member(function, "name", f"tools[{index}]"), f"tools[{index}].name")
        tools.append(tool)
    return tools


def num_characters(message: Message) -> int:
    """The length of a message as text."""
    return len(message["content"]) + len(str(message.get("tool_calls", "")))


def _content(row: Row, value: Any, name: str) -> str:
    """Text, or a list of parts of text."""
    if not isinstance(value, list):
        return row.as_text(value, name)
    if not value:
        raise row.error(name, "is an empty list")
    texts = []
    for index, part in enumerate(value):
        place = f"{name}[{index}]"
        if isinstance(part, dict) and part.get("type", "text") != "text":
            raise row.error(place, f"is of the type '{clipped(str(part['type']))}', and only text can be trained on")
        texts.append(row.as_text(row.member(part, "text", place), f"{place}.text"))
    return row.as_text("".join(texts), name)


def _tool_calls(row: Row, value: Any, name: str) -> list[dict[str, Any]]:
    """Tool calls in the form of chat templates: arguments are objects, not their JSON text."""
    calls = []
    for index, item in enumerate(row.as_list(_decoded(row, value, name), name)):
        place = f"{name}[{index}]"
        call = _plain_json(row, _decoded(row, item, place), place)
        if isinstance(call, dict) and "function" not in call:
            call = {"type": "function", "function": call}
        function = row.member(call, "function", place)
        row.as_text(row.member(function, "name", f"{place}.function"), f"{place}.function.name")
        arguments = _decoded(row, function.get("arguments") or {}, f"{place}.function.arguments")
        if not isinstance(arguments, dict):
            raise row.wrong_type(arguments, f"{place}.function.arguments", "an object")
        calls.append(call | {"function": function | {"arguments": arguments}})
    return calls


def _decoded(row: Row, value: Any, name: str) -> Any:
    """The value of a JSON text; any other value as it is."""
    if not isinstance(value, str):
        return value
    try:
        return _plain_json(row, json.loads(row.as_text(value, name)), name)
    except (ValueError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        raise row.error(name, f"is text, but not JSON: {error}") from None


def _plain_json(row: Row, value: Any, name: str, depth: int = 0) -> Any:
    """The value, if its texts are valid and its depth is limited."""
    if depth > MAX_DEPTH:
        raise row.error(name, f"nests more than {MAX_DEPTH} levels")
    if isinstance(value, dict):
        for key in value:
            row.as_text(key, name)
    for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        _plain_json(row, item, name, depth + 1)
    if isinstance(value, str):
        row.as_text(value, name)
    return value
