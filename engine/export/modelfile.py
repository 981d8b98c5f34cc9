"""Write an Ollama Modelfile: the model, its chat template in Go's form, and where responses stop."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from transformers import PreTrainedTokenizerBase

from engine.data.encoding import token_prefix
from engine.data.template_process import TemplateLimit, render_texts

Dialogue = Sequence[tuple[str, str]]  # role and content of each message
Render = Callable[[Dialogue], str]

USERS = ("Is it any good?", "And the cast?\n\nThe music?", "Why?")
ASSISTANTS = ("It was fresh.", "Both were\nvivid.")
SYSTEM = "You watch films."


class Untranslatable(Exception):
    """The reason why a chat template has no form in Go."""


@dataclass(frozen=True)
class TurnTexts:
    """The texts that a chat template puts around messages.

    Args:
        start: before the first turn, without a system message.
        system: before and after the system message, which replaces the start; None: the template has none.
        is_system_inside: the system message opens the first user turn, behind start and user[0].
        user: before and after a user's message.
        assistant: before a response, and between it and the next turn.
        generation: after user[1], where a response is generated.
        end: after the last response of a dialogue.
    """

    start: str
    system: tuple[str, str] | None
    is_system_inside: bool
    user: tuple[str, str]
    assistant: tuple[str, str]
    generation: str
    end: str

    def write(self, dialogue: Dialogue) -> str:
        """A dialogue up to the next response; it ends with a user's message."""
        text, system = self.start, ""
        for number, (role, content) in enumerate(dialogue):
            if role == "system" and self.system is not None:
                system = self.system[0] + content + self.system[1]
                if not self.is_system_inside:
                    text, system = system, ""
            elif role == "user":
                text += self.user[0] + system + content + self.user[1]
                system = ""
                text += self.generation if number == len(dialogue) - 1 else ""
            elif role == "assistant":
                text += self.assistant[0] + content + self.assistant[1]
        return text


def modelfile_text(file: str, tokenizer: PreTrainedTokenizerBase, chat_template: Any) -> tuple[str, list[str]]:
    """The text of a Modelfile.

    Args:
        file: the name of the GGUF file beside it.
        chat_template: Jinja text, a dict of name to Jinja text, or None.

    Returns:
        the text, and notes for the user.
    """
    lines, notes = [f"FROM ./{file}"], []
    try:
        texts = find_turn_texts(renderer(tokenizer, chat_template))
        lines.append(f'TEMPLATE """{go_template(texts)}"""')
        lines += [f'PARAMETER stop "{stop}"' for stop in stop_texts(texts, tokenizer)]
    except Untranslatable as reason:
        notes.append(f"the Modelfile has no TEMPLATE, as {reason}: Ollama guesses one, so write it yourself")
    return "\n".join([*lines, ""]), notes


# ---- The texts of a template ----


def renderer(tokenizer: PreTrainedTokenizerBase, chat_template: Any) -> Render:
    """A function that writes dialogues by a Jinja template, without the BOS that Ollama adds itself.

    Raises:
        Untranslatable: without a template.
    """
    jinja = chat_template.get("default") if isinstance(chat_template, dict) else chat_template
    if not jinja:
        raise Untranslatable("there is no chat template")
    bos = tokenizer.bos_token if token_prefix(tokenizer) else None
    variables = {"chat_template": jinja, "tools": None, **tokenizer.special_tokens_map}

    def render(dialogue: Dialogue) -> str:
        messages = [{"role": role, "content": content} for role, content in dialogue]
        is_prompt = messages[-1]["role"] != "assistant"
        try:
            (text,) = render_texts(variables, [{"conversations": [messages], "add_generation_prompt": is_prompt}])
        except TemplateLimit as error:
            raise Untranslatable(f"the chat template {error}") from error
        return text.removeprefix(bos) if bos else text

    return render


def find_turn_texts(render: Render) -> TurnTexts:
    """The texts around messages, found by rendering dialogues, and checked on others.

    Raises:
        Untranslatable: if the template does more than to put fixed texts around messages.
    """
    texts = _find(render)
    first, second, third = (("user", content) for content in USERS)
    replies = [("assistant", content) for content in ASSISTANTS]
    dialogues = [[first], [second, replies[0], third], [first, replies[1], second, replies[0], third]]
    if texts.system is not None:
        dialogues += [[("system", SYSTEM), *dialogue] for dialogue in dialogues]
    for dialogue in dialogues:
        if texts.write(dialogue) != _rendered(render, dialogue):
            raise Untranslatable("the chat template does more than to put texts around messages")
    return texts


def _find(render: Render) -> TurnTexts:
    first, reply, second = ("user", USERS[0]), ("assistant", ASSISTANTS[0]), ("user", USERS[2])
    before, to_generation = _around(_rendered(render, [first]), first)
    *_, end = _around(_rendered(render, [first, reply]), first, reply)
    _, to_reply, between, _ = _around(_rendered(render, [first, reply, second]), first, reply, second)
    if not between.startswith(end):
        raise Untranslatable("the chat template ends the last response in another way")
    user_before = _common_suffix(before, between.removeprefix(end))
    is_ended = to_reply.startswith(end) and to_generation.startswith(end)  # as a response is
    user_after = end if is_ended else _common_prefix(to_reply, to_generation)
    start = before.removesuffix(user_before)
    system, is_inside = _find_system(render, start, user_before)
    return TurnTexts(
        start=start,
        system=system,
        is_system_inside=is_inside,
        user=(user_before, user_after),
        assistant=(to_reply.removeprefix(user_after), between.removesuffix(user_before)),
        generation=to_generation.removeprefix(user_after),
        end=end,
    )


def _find_system(render: Render, start: str, user_before: str) -> tuple[tuple[str, str] | None, bool]:
    """The texts around a system message, and whether it is inside the first user turn."""
    system, first = ("system", SYSTEM), ("user", USERS[0])
    try:
        text = render([system, first])
    except ValueError:  # the template refuses it
        return None, False
    if SYSTEM not in text:
        return None, False
    before, after, _ = _around(text, system, first)
    if after.endswith(user_before):
        return (before, after.removesuffix(user_before)), False
    if before.startswith(start + user_before):
        return (before.removeprefix(start + user_before), after), True
    raise Untranslatable("the chat template moves the system message")


def _rendered(render: Render, dialogue: Dialogue) -> str:
    try:
        return render(dialogue)
    except ValueError as error:
        raise Untranslatable(f"the chat template refuses a dialogue ({error})") from error


def _around(text: str, *messages: tuple[str, str]) -> list[str]:
    """The texts before, between and after messages."""
    found = []
    for _, content in messages:
        before, match, text = text.partition(content)
        if not match:
            raise Untranslatable("the chat template changes messages")
        found.append(before)
    return [*found, text]


def _common_prefix(first: str, second: str) -> str:
    return first[: sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False)))]


def _common_suffix(first: str, second: str) -> str:
    return _common_prefix(first[::-1], second[::-1])[::-1]


# ---- The form of Ollama ----


def go_template(texts: TurnTexts) -> str:
    """The template in Go's form, on one line but for newlines of its texts.

    Raises:
        Untranslatable: if a text has characters with a meaning in a Modelfile.
    """
    parts = [texts.start, *(texts.system or ()), *texts.user, *texts.assistant, texts.generation]
    if any("{{" in part or '"""' in part or not _is_kept(part) for part in parts):
        raise Untranslatable("a Modelfile cannot hold the texts of the chat template")
    head, system = texts.start, ""
    if texts.system is not None and texts.is_system_inside:
        head += "{{ $system := .System }}"
        inside = ("{{ if $system }}", texts.system[0], "{{ $system }}", texts.system[1], '{{ $system = "" }}{{ end }}')
        system = "".join(inside)
    elif texts.system is not None:
        head = "".join(("{{ if .System }}", texts.system[0], "{{ .System }}", texts.system[1]))
        head += ("{{ else }}" + texts.start if texts.start else "") + "{{ end }}"
    generation = "{{ if $last }}" + texts.generation + "{{ end }}" if texts.generation else ""
    between = "{{ if not $last }}" + texts.assistant[1] + "{{ end }}" if texts.assistant[1] else ""
    return "".join(
        (
            *(head, "{{ range $i, $_ := .Messages }}{{ $last := eq (len (slice $.Messages $i)) 1 }}"),
            *('{{ if eq .Role "user" }}', texts.user[0], system, "{{ .Content }}", texts.user[1], generation),
            *('{{ else if eq .Role "assistant" }}', texts.assistant[0], "{{ .Content }}", between),
            "{{ end }}{{ end }}",
        )
    )


def _is_kept(text: str) -> bool:
    """Whether Ollama reads every character: it skips what cannot be printed."""
    return all(character.isprintable() or character in "\n\t" for character in text)


def stop_texts(texts: TurnTexts, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The texts that end a response, beside the end of text: the end of a turn, or else the next user's turn."""
    stop = texts.end.strip() or texts.user[0].rstrip()
    return [stop] if stop and stop != tokenizer.eos_token and '"' not in stop else []
