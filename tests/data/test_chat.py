"""Message lists as text: chat templates, the HH format, and templates with errors."""

import pytest

from engine.data.chat_templates import JINJA, template_advice
from engine.data.special_tokens import MARK
from tests.data.samples import CHAT, assistant, byte_tokenizer, load_rows, user
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
    rows = [{"prompt": "say <|user|>", "chosen": [assistant("<<eos>")], "rejected": [assistant("<eo")]}]
    ((prompt, preference),) = load_rows(tmp_path, rows, tokenizer).items()
    assert prompt == f"<s><|user|>user\nsay <{MARK}|user|><eos>\n<|user|>assistant\n"
    assert preference["responses"] == [f"<<{MARK}eos>", "<eo"]


def test_an_empty_response_stays_empty(tmp_path, tokenizer):
    rows = [{"prompt": "hi", "chosen": [assistant("a")], "rejected": [assistant(" ")]}]
    for template in (None, "hh"):
        ((_, preference),) = load_rows(tmp_path, rows, tokenizer, chat_template=template).items()
        assert preference["responses"][1] == ""


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


def test_a_chat_template_is_needed(tmp_path):
    with pytest.raises(UserError, match="the tokenizer has no chat template; fix: set chat_template=hh or llama2"):
        load_rows(tmp_path, [{"instruction": "i", "output": "o"}], byte_tokenizer())


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        (None, r"error\[CONFIG\] chat_template: .* the tokenizer has no chat template; fix: set chat_template=hh"),
        ("missing.jinja", r"error\[CONFIG\] chat_template: missing\.jinja cannot be read"),
        ("{{ raise_exception('roles must alternate') }}", r"line 1: the chat template refuses it: roles must"),
        ("{{ messages", r"line 1: the chat template refuses it"),
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
        ("/models/mine", "PreTrainedTokenizerFast", "chat_template=hh or llama2, or to the path of a Jinja file"),
        ("", "PreTrainedTokenizerFast", "chat_template=hh or llama2, or to the path of a Jinja file"),
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
