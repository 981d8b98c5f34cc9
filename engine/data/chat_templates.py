"""Chat templates shipped with the program, and the usual template of each model family."""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# The format of Llama-2-Chat. BOS opens each user turn, EOS closes each response.
LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}"
    "{% set system = '<<SYS>>\\n' + messages[0]['content'] + '\\n<</SYS>>\\n\\n' %}{% set turns = messages[1:] %}"
    "{% else %}{% set system = '' %}{% set turns = messages %}{% endif %}"
    "{% for message in turns %}"
    "{% if message['role'] != ['user', 'assistant'][loop.index0 % 2] %}"
    "{{ raise_exception('after one system message at most, user and assistant must take turns') }}"
    "{% endif %}"
    "{% if message['role'] == 'user' %}"
    "{{ bos_token }}{{ '[INST] ' + (system if loop.first else '') + message['content'].strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + message['content'].strip() + ' ' }}{{ eos_token }}{% endif %}"
    "{% endfor %}"
)

# The format of Anthropic's HH data, for other tools. Training and chat.py write it themselves, as plain text without
# special tokens (engine/data/chat.py). If the tokenizer starts every text with BOS, BOS goes before this template.
BOS = "{{ bos_token }}"
HH = (
    "{% for message in messages if message['role'] == 'system' %}{{ message['content'] }}{% endfor %}"
    "{% for message in messages if message['role'] != 'system' %}"
    "{{ '\\n\\nHuman: ' if message['role'] == 'user' else '\\n\\nAssistant: ' }}{{ message['content'] }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '\\n\\nAssistant:' }}{% endif %}"
)

# The format of Qwen and many others. EOS is written once: by the template where it is <|im_end|>, else behind it.
CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

# Around the template of an exported reward model: a score is read at EOS. Templates for generation write none behind
# the last response, or write more behind it. The plus signs keep the whitespace of the template inside.
_END_START = "{% set dialogue_text +%}"
_END_STOP = (
    "{%+ endset %}"
    "{% if add_generation_prompt or messages[-1]['role'] != 'assistant' %}{{ dialogue_text }}"
    "{% elif dialogue_text.rstrip().endswith(eos_token) %}{{ dialogue_text.rstrip() }}"
    "{% else %}{{ dialogue_text }}{{ eos_token }}"
    "{% endif %}"
)

JINJA = {"hh": HH, "llama2": LLAMA2, "chatml": CHATML}
MAX_TEMPLATE_BYTES = 1_000_000  # the longest published templates have some 20,000


def read_template(name: str, fix: str) -> str:
    """Read a chat template as Jinja text.

    Args:
        name: a key of JINJA, or the path of a Jinja file.
        fix: the remedy in the error.

    Raises:
        UserError: unless it is a regular file of valid Jinja that reads `messages`.
    """
    if name in JINJA:
        return JINJA[name]
    try:
        if Path(name).exists() and not Path(name).is_file():
            raise ValueError("not a regular file")
        with open(name, "rb") as file:
            data = file.read(MAX_TEMPLATE_BYTES + 1)
        if len(data) > MAX_TEMPLATE_BYTES:
            raise ValueError(f"more than {MAX_TEMPLATE_BYTES:,} bytes")
        text = data.decode("utf-8-sig")
        _check_jinja(text)
    except (OSError, ValueError) as error:
        raise UserError("CONFIG", f"chat_template: {name} cannot be read ({error})", fix) from error
    return text


def template_to_record(name: str | None) -> str | None:
    """The text of a Jinja file, for checkpoints; None for a name of JINJA or the tokenizer's template."""
    return None if name is None or name in JINJA else read_template(name, "give the path of a Jinja file")


def end_with_eos(template: Any) -> Any:
    """The chat template, with exactly one EOS at the end of a last response.

    Args:
        template: Jinja text, a dict of name to Jinja text, or None.
    """
    if isinstance(template, dict):
        return {name: end_with_eos(text) for name, text in template.items()}
    if template is None or template.endswith(_END_STOP):
        return template
    return _END_START + template.removesuffix("\n") + _END_STOP  # Jinja drops that newline at the end of a text


def without_end(template: Any) -> Any:
    """The chat template before end_with_eos()."""
    if isinstance(template, dict):
        return {name: without_end(text) for name, text in template.items()}
    if template is None or not template.endswith(_END_STOP):
        return template
    return template.removeprefix(_END_START).removesuffix(_END_STOP)


def _check_jinja(text: str) -> None:
    """Parse a template; nothing of it is evaluated, constants included.

    Raises:
        ValueError: if it is not Jinja, or reads no messages.
    """
    from jinja2 import TemplateSyntaxError, nodes
    from transformers.utils.chat_template_utils import _compile_jinja_template

    try:
        tree = _compile_jinja_template("").environment.parse(text)
        reads_messages = any(node.name == "messages" for node in tree.find_all(nodes.Name))
    except TemplateSyntaxError as error:
        raise ValueError(f"not Jinja: line {error.lineno}: {error.message}") from error
    except RecursionError as error:
        raise ValueError("not usable Jinja: nested too deeply") from error
    if not reads_messages:
        raise ValueError("not a chat template: it does not read `messages`")


# The usual template of a model, where its tokenizer has none.
_LLAMA2 = "chat_template=llama2 (the template of Llama-2-Chat)"
_BASE_MODEL = "chat_template=hh (a base model: hh works)"
_INSTRUCT = "model.tokenizer_name_or_path={} (the instruct model's tokenizer has a chat template)"
_QWEN = _INSTRUCT.format("Qwen/Qwen2.5-0.5B-Instruct")
_UNKNOWN = "chat_template=hh, llama2 or chatml, or to the path of a Jinja file"
# By the name of the model, in this order.
_ADVICE_BY_NAME = {
    r"llama-?2": _LLAMA2,
    r"llama-?3\.1": _INSTRUCT.format("meta-llama/Llama-3.1-8B-Instruct"),
    r"llama-?3\.2": _INSTRUCT.format("meta-llama/Llama-3.2-1B-Instruct"),
    r"llama-?3": _INSTRUCT.format("meta-llama/Meta-Llama-3-8B-Instruct"),
    r"mixtral": _INSTRUCT.format("mistralai/Mixtral-8x7B-Instruct-v0.1"),
    r"mistral.*v0\.3": _INSTRUCT.format("mistralai/Mistral-7B-Instruct-v0.3"),
    r"mistral": _INSTRUCT.format("mistralai/Mistral-7B-Instruct-v0.2"),
    r"qwen3": _INSTRUCT.format("Qwen/Qwen3-0.6B"),
    r"qwen": _QWEN,
    r"pythia|gpt|\bopt-|bloom|falcon|olmo|smollm": _BASE_MODEL,
}
# Else by the class of the tokenizer.
_ADVICE_BY_CLASS = {"Llama": _LLAMA2, "Qwen": _QWEN, "GPT": _BASE_MODEL, "Bloom": _BASE_MODEL}


def template_advice(tokenizer: "PreTrainedTokenizerBase") -> str:
    """The setting for the usual chat template of this tokenizer's model family."""
    for pattern, advice in _ADVICE_BY_NAME.items():
        if re.search(pattern, tokenizer.name_or_path or "", re.IGNORECASE):
            return advice
    for prefix, advice in _ADVICE_BY_CLASS.items():
        if type(tokenizer).__name__.startswith(prefix):
            return advice
    return _UNKNOWN
