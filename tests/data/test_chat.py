"""Message lists as text: chat templates, the HH format, and templates with errors."""

import json
from typing import Any

import pytest

from engine.data.chat_templates import JINJA, end_with_eos, read_template, template_advice, without_end
from engine.data.special_tokens import MARK
from tests.data.samples import CHAT, CHATML, EOS, assistant, byte_tokenizer, load_rows, user
from utils import UserError


def test_hh_template_of_many_turns(tmp_path, tokenizer):
    prompt = [{"role": "system", "content": "Be kind."}, user("hi"), assistant("yes?"), user("so")]
    rows = [{"prompt": prompt, "chosen": [assistant("a")], "rejected": [assistant("b")]}]
    text = "Be kind.\n\nHuman: hi\n\nAssistant: yes?\n\nHuman: so\n\nAssistant:"
    assert list(load_rows(tmp_path, rows, tokenizer, chat_template="hh")) == [text]


def test_a_jinja_file_is_a_template(tmp_path, tokenizer):
    jinja = tmp_path / "chat.jinja"
    jinja.write_text("{% for m in messages %}[{{ m.content }}]{% endfor %}")
    rows = [{"prompt": "hi", "chosen": [assistant("a")], "rejected": [assistant("b")]}]
    preferences = load_rows(tmp_path, rows, byte_tokenizer(), chat_template=str(jinja))
    expected = {"responses": ["[a]", "[b]"], "pairs": [(0, 1)], "sft_target": "[a]", "from_template": True}
    assert preferences == {"[hi]": expected}


def test_literal_special_tokens_in_messages_are_marked(tmp_path, tokenizer):
    rows = [{"prompt": "say <|user|>", "chosen": [assistant("<<eos>!")], "rejected": [assistant("<eo")]}]
    ((prompt, preference),) = load_rows(tmp_path, rows, tokenizer).items()
    assert prompt == f"<s><|user|>user\nsay <{MARK}|user|><eos>\n<|user|>assistant\n"
    assert preference["responses"] == [f"<<{MARK}eos>!", "<eo"]


def test_an_empty_response_stays_empty(tmp_path, tokenizer):
    rows = [{"prompt": "hi", "chosen": [assistant("a")], "rejected": [assistant(" ")]}]
    for template in (None, "hh"):
        ((_, preference),) = load_rows(tmp_path, rows, tokenizer, chat_template=template).items()
        assert preference["responses"][1] == ""


@pytest.mark.parametrize("template", [None, "hh", "llama2", "chatml"])
def test_an_end_of_text_written_by_the_author_is_not_learned(tmp_path, tokenizer, template):
    def texts(eos: str) -> object:
        messages = [user("hi"), assistant(f"yes{eos}"), user("so"), assistant(f"a{eos}")]
        return load_rows(tmp_path, [{"messages": messages}], tokenizer, chat_template=template)

    assert texts("<eos>") == texts("")
    if template != "hh":  # examples() does it for plain text
        assert texts("<eos>\n") == texts("") and MARK not in str(texts("<eos>"))


def test_the_chatml_template_by_name(tmp_path):
    plain = byte_tokenizer()
    rows = [{**CHAT, "prompt": [{"role": "system", "content": "Be kind."}, user("hi")]}]
    ((prompt, preference),) = load_rows(tmp_path, rows, plain, chat_template="chatml").items()
    assert prompt == ("<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n")
    assert preference["responses"] == ["a<|im_end|>\n", "b<|im_end|>\n"]
    plain.add_special_tokens({"eos_token": "<|im_end|>"})
    ((_, preference),) = load_rows(tmp_path, rows, plain, chat_template="chatml").items()
    assert preference["responses"] == ["a", "b"]  # every response gets EOS


# ---- Tools ----

TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Rome <eos>"}}}
RESULT = {"role": "tool", "content": "sun"}
TOOL_TEMPLATE = (
    "{% for tool in tools or [] %}<tool>{{ tool | tojson }}{% endfor %}"
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}"
    "{% for call in m.tool_calls %}<call>{{ call.function | tojson }}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
TOOL_DIALOGUE: list[Any] = [
    user("sunny?"),
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    RESULT,
    assistant("yes"),
]
WRITTEN_CALL = f'<call>{{"name": "weather", "arguments": {{"city": "Rome <{MARK}eos>"}}}}'
WRITTEN_TOOL = '<tool>{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}'


def with_call(call: object) -> list[object]:
    return [TOOL_DIALOGUE[0], {"role": "assistant", "tool_calls": [call]}, *TOOL_DIALOGUE[2:]]


@pytest.mark.parametrize(
    "dialogue",
    [
        TOOL_DIALOGUE,
        with_call(CALL["function"]),
        with_call({"function": {"name": "weather", "arguments": '{"city": "Rome <eos>"}'}, "type": "function"}),
        with_call(json.dumps(CALL)),
    ],
)
@pytest.mark.parametrize("tools", [[TOOL], json.dumps([TOOL]), [json.dumps(TOOL)]])
def test_tools_and_tool_calls_are_written_by_the_template(tmp_path, dialogue, tools):
    row = {"messages": dialogue, "tools": tools}
    preferences = load_rows(tmp_path, [row], byte_tokenizer(chat_template=TOOL_TEMPLATE))
    start = f"{WRITTEN_TOOL}[user]sunny?[assistant]"
    assert {prompt: preference["sft_target"] for prompt, preference in preferences.items()} == {
        start: WRITTEN_CALL,
        f"{start}{WRITTEN_CALL}[tool]sun[assistant]": "yes",
    }


def test_arguments_are_text_for_a_template_that_wants_text(tmp_path):
    template = TOOL_TEMPLATE.replace("{{ call.function | tojson }}", "{{ '>' + call.function.arguments }}")
    template = template.replace("<call>", "<call {{ call.function.name }}")
    preferences = load_rows(tmp_path, [{"messages": TOOL_DIALOGUE}], byte_tokenizer(chat_template=template))
    (target, _) = [preference["sft_target"] for preference in preferences.values()]
    assert target == f'<call weather>{{"city": "Rome <{MARK}eos>"}}'


def test_tools_of_plain_text_are_refused(tmp_path, tokenizer):
    rows = [{"prompt": "p", "chosen": "a", "rejected": "b", "tools": [TOOL]}]
    with pytest.raises(UserError, match="line 1: field 'tools' is for messages, and the row is plain text"):
        load_rows(tmp_path, rows, tokenizer)
    for row in ({**rows[0], "tools": []}, {**rows[0], "tools": "[]"}):
        assert len(load_rows(tmp_path, [row], tokenizer)) == 1


def test_the_old_form_of_tool_calls_is_refused(tmp_path, tokenizer):
    message = {**assistant(""), "function_call": {"name": "weather", "arguments": "{}"}}
    with pytest.raises(UserError, match=r"'messages\[1\]\.function_call' is an old form: write it as tool_calls"):
        load_rows(tmp_path, [{"messages": [user("sunny?"), message]}], tokenizer)


def test_a_tool_call_is_a_response_to_prefer(tmp_path):
    rows = [{"prompt": "sunny?", "chosen": [TOOL_DIALOGUE[1]], "rejected": "no idea"}]
    ((_, preference),) = load_rows(tmp_path, rows, byte_tokenizer(chat_template=TOOL_TEMPLATE)).items()
    assert preference["responses"] == [WRITTEN_CALL, "no idea"]


@pytest.mark.parametrize(
    ("row", "written", "left_out"),
    [
        ({"messages": TOOL_DIALOGUE[::3], "tools": [TOOL]}, "tools or []", "the tool 'weather'"),
        ({"messages": TOOL_DIALOGUE[:2]}, "m.tool_calls", "the call of tool 'weather'"),
        ({"messages": TOOL_DIALOGUE}, "m.content", "the result of a tool"),
    ],
)
def test_a_template_that_leaves_out_tools_is_refused(tmp_path, row, written, left_out):
    template = TOOL_TEMPLATE.replace(written, "''")
    with pytest.raises(UserError) as error:
        load_rows(tmp_path, [row], byte_tokenizer(chat_template=template), sft_turns="last")
    assert f"rows.jsonl line 1: the chat template leaves out {left_out} (" in str(error.value)


def test_a_template_that_leaves_out_one_of_two_calls_is_refused(tmp_path):
    template = TOOL_TEMPLATE.replace("m.tool_calls", "(m.tool_calls or [])[1:]")
    rows = [{"messages": [TOOL_DIALOGUE[0], {**TOOL_DIALOGUE[1], "tool_calls": [CALL, CALL]}]}]
    with pytest.raises(UserError, match="line 1: the chat template leaves out the call of tool 'weather'"):
        load_rows(tmp_path, rows, byte_tokenizer(chat_template=template))


@pytest.mark.parametrize("template", ["hh", "llama2", "chatml"])
def test_the_templates_by_name_refuse_tools(tmp_path, tokenizer, template):
    for row in ({"messages": TOOL_DIALOGUE[:2]}, {"messages": TOOL_DIALOGUE[::3], "tools": [TOOL]}):
        with pytest.raises(UserError, match=r"line 1: .*(no tools and no tool calls|leaves out the (tool|call of))"):
            load_rows(tmp_path, [row], tokenizer, chat_template=template)


@pytest.mark.parametrize(
    ("call", "problem"),
    [
        ({"function": {"arguments": {}}}, r"messages\[1\]\.tool_calls\[0\]\.function\.name' is missing"),
        ({"name": "f", "arguments": "{"}, r"function\.arguments' is text, but not JSON"),
        ({"name": "f", "arguments": [1]}, r"function\.arguments' is a list, not an object"),
        ({"name": "f", "arguments": {"a\ud800": 1}}, r"tool_calls\[0\]' contains invalid characters"),
        (3, r"tool_calls\[0\]' is a number, not an object"),
    ],
)
def test_malformed_tool_calls_are_named(tmp_path, call, problem):
    with pytest.raises(UserError, match=problem):
        load_rows(tmp_path, [{"messages": with_call(call)}], byte_tokenizer(chat_template=TOOL_TEMPLATE))


def test_tools_that_nest_too_deeply_are_refused(tmp_path):
    deep: dict[str, object] = {}
    for _ in range(100):
        deep = {"a": deep}
    row = {"messages": TOOL_DIALOGUE, "tools": [{"name": "f", "parameters": deep}]}
    with pytest.raises(UserError, match=r"field 'tools\[0\]' nests more than 50 levels"):
        load_rows(tmp_path, [row], byte_tokenizer(chat_template=TOOL_TEMPLATE))


LLAMA2_PROMPT = "<s>[INST] <<SYS>>\nBe kind.\n<</SYS>>\n\nhi [/INST] yes? <eos><s>[INST] so [/INST]"


def test_the_llama2_template_by_name(tmp_path):
    turns = [{"role": "system", "content": "Be kind."}, user("hi "), assistant("yes?"), user("so"), assistant("a")]
    plain = byte_tokenizer()  # without a chat template
    *_, (prompt, preference) = load_rows(tmp_path, [{"messages": turns}], plain, chat_template="llama2").items()
    assert (prompt, preference["sft_target"], preference["from_template"]) == (LLAMA2_PROMPT, " a ", True)
    with pytest.raises(UserError, match="the chat template refuses it: after one system message at most, user and"):
        load_rows(tmp_path, [{"messages": turns[1:3] + turns}], plain, chat_template="llama2")


def test_hh_as_jinja_equals_the_text_of_training(tmp_path):
    turns = [{"role": "system", "content": "Be kind."}, user("hi"), assistant("yes?"), user("so"), assistant("a")]
    plain = byte_tokenizer()
    *_, (prompt, _) = load_rows(tmp_path, [{"messages": turns}], plain, chat_template="hh").items()
    assert prompt.startswith("Be kind.\n\nHuman: hi")
    rendered = plain.apply_chat_template(
        turns[:-1], chat_template=JINJA["hh"], tokenize=False, add_generation_prompt=True
    )
    assert rendered == prompt


ODD_TEMPLATES = {
    "lines": "\n\n  {% for m in messages %}\n    {{ m.role }}: {{ m.content }}\n  {% endfor %}\n\n",
    "trimmed": "  {%- for m in messages -%}\n  {{ m.role }}: {{ m.content }} \n {%- endfor -%}\n   \n",
    "space": "{% for m in messages %}{{ m.content }}{% endfor %}\n   ",
    "names": "{% set messages = messages[1:] %}{% set ns = namespace(n=0) %}{% macro f(m) %}{{ m.content + eos_token }}"
    "{% endmacro %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{{ f(m) }}{{ ns.n }}{% endfor %}\n",
    "break": "{% for m in messages %}{{ m.content }}{% if loop.last %}{% break %}{% endif %}{% endfor %}",
    "eos": CHATML,
}


@pytest.mark.parametrize("text", [*JINJA.values(), *ODD_TEMPLATES.values()], ids=[*JINJA, *ODD_TEMPLATES])
def test_a_template_that_ends_with_eos_differs_at_the_end_alone(text):
    turns = [user(" hi "), assistant("yes \n"), user("so"), assistant(" end ")]
    tokenizer, ended = byte_tokenizer(), end_with_eos(text)

    def render(template: str, num_turns: int, **options: bool) -> str:
        return tokenizer.apply_chat_template(turns[:num_turns], chat_template=template, tokenize=False, **options)

    for num_turns, prompts in ((1, True), (3, True), (3, False), (4, True)):
        options = {"add_generation_prompt": prompts}
        assert render(ended, num_turns, **options) == render(text, num_turns, **options)
    for num_turns in (2, 4):
        plain = render(text, num_turns)
        stripped = plain.rstrip()
        assert render(ended, num_turns) == (stripped if stripped.endswith(EOS) else plain + EOS)
    assert end_with_eos(ended) == ended
    assert render(without_end(ended), 4) == render(text, 4)
    assert without_end({"default": ended, "other": text}).keys() == {"default", "other"}
    assert end_with_eos({"default": text}) == {"default": ended} and end_with_eos(None) is None is without_end(None)


def test_a_chat_template_is_needed(tmp_path):
    problem = "the tokenizer has no chat template; fix: set chat_template=hh, llama2 or chatml"
    with pytest.raises(UserError, match=problem):
        load_rows(tmp_path, [{"instruction": "i", "output": "o"}], byte_tokenizer())


def test_a_template_is_parsed_and_not_evaluated(tmp_path):
    text = "{% generation %}{{ messages ~ 'a' * 10 ** 11 }}{% endgeneration %}"
    (tmp_path / "t.jinja").write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert read_template(str(tmp_path / "t.jinja"), "-") == text


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        (None, r"error\[CONFIG\] chat_template: .* the tokenizer has no chat template; fix: set chat_template=hh"),
        ("missing.jinja", r"error\[CONFIG\] chat_template: missing\.jinja cannot be read"),
        (
            "{{ raise_exception('roles must ' ~ messages | length) }}",
            r"line 1: the chat template refuses it: roles must",
        ),
        ("{{ messages", r"error\[CONFIG\] .*t\.jinja cannot be read \(not Jinja: line 1: .*; fix: give null, hh"),
        ("root:x:0:0:{root}", r"error\[CONFIG\] .*\(not a chat template: it does not read `messages`\)"),
        ("{{ messages }}" + " " * 1_000_000, r"error\[CONFIG\] .*\(more than 1,000,000 bytes\)"),
        ("{{ messages }}" + "{{ " + "(" * 5000, r"error\[CONFIG\] .*\(not usable Jinja: nested too deeply\)"),
        ("/dev/zero", r"error\[CONFIG\] chat_template: /dev/zero cannot be read \(not a regular file\)"),
        (
            "{{ messages | length }}",
            r"error\[CONFIG\] .* the text of the dialogue does not start with the text of its prompt",
        ),
    ],
)
def test_unusable_templates(tmp_path, template, problem):
    if template and "{" in template:
        (tmp_path / "t.jinja").write_text(template)
        template = str(tmp_path / "t.jinja")
    with pytest.raises(UserError, match=problem):
        load_rows(tmp_path, [CHAT], byte_tokenizer(), chat_template=template)


def test_hh_template_refuses_other_roles(tmp_path, tokenizer):
    rows = [{**CHAT, "prompt": [user("hi"), {"role": "tool", "content": "x"}]}]
    with pytest.raises(UserError, match="line 1: chat_template=hh has no role 'tool'"):
        load_rows(tmp_path, rows, tokenizer, chat_template="hh")


# ---- The usual template of a model ----

INSTRUCT = "model.tokenizer_name_or_path="


@pytest.mark.parametrize(
    ("name", "class_name", "expected"),
    [
        ("meta-llama/Llama-2-7b-hf", "LlamaTokenizer", "chat_template=llama2"),
        ("/models/llama2-13b", "PreTrainedTokenizerFast", "chat_template=llama2"),
        ("huggyllama/llama-7b", "LlamaTokenizer", "chat_template=llama2"),
        ("EleutherAI/pythia-2.8b", "GPTNeoXTokenizerFast", "chat_template=hh (a base model: hh works)"),
        ("openai-community/gpt2-xl", "GPT2TokenizerFast", "chat_template=hh (a base model: hh works)"),
        ("EleutherAI/gpt-j-6b", "GPT2TokenizerFast", "chat_template=hh (a base model: hh works)"),
        ("/models/mine", "GPTNeoXTokenizer", "chat_template=hh (a base model: hh works)"),
        ("meta-llama/Meta-Llama-3-8B", "PreTrainedTokenizerFast", INSTRUCT + "meta-llama/Meta-Llama-3-8B-Instruct "),
        ("meta-llama/Llama-3.1-8B", "PreTrainedTokenizerFast", INSTRUCT + "meta-llama/Llama-3.1-8B-Instruct "),
        ("mistralai/Mistral-7B-v0.1", "LlamaTokenizer", INSTRUCT + "mistralai/Mistral-7B-Instruct-v0.2 "),
        ("mistralai/Mistral-7B-v0.3", "LlamaTokenizer", INSTRUCT + "mistralai/Mistral-7B-Instruct-v0.3 "),
        ("Qwen/Qwen2.5-1.5B", "Qwen2TokenizerFast", INSTRUCT + "Qwen/Qwen2.5-0.5B-Instruct "),
        ("/models/mine", "Qwen2Tokenizer", INSTRUCT + "Qwen/Qwen2.5-0.5B-Instruct "),
        ("/models/mine", "PreTrainedTokenizerFast", "chat_template=hh, llama2 or chatml, or to the path of a Jinja"),
        ("", "PreTrainedTokenizerFast", "chat_template=hh, llama2 or chatml, or to the path of a Jinja file"),
    ],
)
def test_template_advice(name, class_name, expected):
    tokenizer = type(class_name, (), {"name_or_path": name})()
    assert template_advice(tokenizer).startswith(expected)


def test_the_error_names_the_template_of_the_model(tmp_path):
    tokenizer = byte_tokenizer()
    tokenizer.name_or_path = "meta-llama/Llama-2-7b-hf"
    with pytest.raises(UserError) as error:
        load_rows(tmp_path, [{"instruction": "i", "output": "o"}], tokenizer)
    assert str(error.value) == (
        f"error[CONFIG] chat_template: {tmp_path}/rows.jsonl line 1 has messages, but the tokenizer has "
        "no chat template; fix: set chat_template=llama2 (the template of Llama-2-Chat)"
    )
