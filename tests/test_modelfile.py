"""Modelfiles for Ollama: the templates in Go's form write the texts of the templates in Jinja."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from engine.data.chat_templates import BOS, JINJA
from engine.export.modelfile import Untranslatable, find_turn_texts, go_template, modelfile_text, renderer

TURNS = "{{ '<|' + message['role'] + '|>\n' + message['content']%s + '<|end|>\n' }}{%% endfor %%}"
GENERATION = "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
# Forms of published templates. BOS once, content stripped: Llama 3.
STRIPPED = "{{ bos_token }}{% for message in messages %}" + TURNS % ".strip()" + GENERATION
# A system message where none is given: Qwen2.5.
DEFAULT_SYSTEM = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|system|>\nBe kind.<|end|>\n' }}{% endif %}"
    "{% for message in messages %}" + TURNS % "" + GENERATION
)
# No system message, and no text before a response: Gemma and Mistral.
NO_SYSTEM = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% else %}{{ message['content'] + eos_token }}{% endif %}{% endfor %}"
)
TEMPLATES = {
    **JINJA,
    "hh with BOS": BOS + JINJA["hh"],
    "stripped": STRIPPED,
    "default system": DEFAULT_SYSTEM,
    "no system": NO_SYSTEM,
}
DIALOGUES = [
    [("user", 'Hi <b> & "you"')],
    [("user", "a"), ("assistant", "b\n\nc"), ("user", "d")],
    [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "{{ .Content }}"), ("user", "d")],
]
# As Ollama's template.Execute.
GO_PROGRAM = """
package main

import (
	"bytes"
	"encoding/json"
	"os"
	"text/template"
)

type Message struct{ Role, Content string }

func main() {
	var cases []struct {
		Template, System string
		Messages         []*Message
	}
	if err := json.NewDecoder(os.Stdin).Decode(&cases); err != nil {
		panic(err)
	}
	texts := []string{}
	for _, each := range cases {
		var text bytes.Buffer
		parsed := template.Must(template.New("").Option("missingkey=zero").Parse(each.Template))
		values := map[string]any{"System": each.System, "Messages": each.Messages, "Response": ""}
		if err := parsed.Execute(&text, values); err != nil {
			panic(err)
		}
		texts = append(texts, text.String())
	}
	json.NewEncoder(os.Stdout).Encode(texts)
}
"""


class Tokenizer:
    """A tokenizer as far as a Modelfile depends on it."""

    bos_token, eos_token = "<s>", "</s>"

    def __init__(self, adds_bos: bool):
        self.special_tokens_map = {"bos_token": self.bos_token, "eos_token": self.eos_token}
        self._prefix = [1] if adds_bos else []

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [*(self._prefix if add_special_tokens else []), 5]}


def text_of(chat_template: object, adds_bos: bool = True) -> tuple[str, list[str]]:
    return modelfile_text("x.gguf", Tokenizer(adds_bos), chat_template)


def test_the_file_of_chatml() -> None:
    text, notes = text_of(JINJA["chatml"])
    assert notes == []
    assert text == (
        'FROM ./x.gguf\nTEMPLATE """{{ if .System }}<|im_start|>system\n{{ .System }}<|im_end|>\n{{ end }}'
        "{{ range $i, $_ := .Messages }}{{ $last := eq (len (slice $.Messages $i)) 1 }}"
        '{{ if eq .Role "user" }}<|im_start|>user\n{{ .Content }}<|im_end|>\n'
        "{{ if $last }}<|im_start|>assistant\n{{ end }}"
        '{{ else if eq .Role "assistant" }}<|im_start|>assistant\n{{ .Content }}'
        '{{ if not $last }}<|im_end|>\n{{ end }}{{ end }}{{ end }}"""\nPARAMETER stop "<|im_end|>"\n'
    )


@pytest.mark.parametrize(
    ("name", "stops"),
    [("hh", ["\n\nHuman:"]), ("llama2", []), ("stripped", ["<|end|>"]), ("no system", [])],
)
def test_responses_stop_at_the_end_of_a_turn(name: str, stops: list[str]) -> None:
    """EOS ends them anyway."""
    assert re.findall('PARAMETER stop "(.*?)"', text_of(TEMPLATES[name])[0], re.S) == stops


@pytest.mark.parametrize("adds_bos", [True, False])
@pytest.mark.parametrize("name", TEMPLATES)
def test_turn_texts_write_the_text_of_the_template(name: str, adds_bos: bool) -> None:
    render = renderer(Tokenizer(adds_bos), TEMPLATES[name])
    texts = find_turn_texts(render)
    assert (texts.system is None) == (name == "no system")
    for dialogue in DIALOGUES + [[("system", "Be brief."), *each] for each in DIALOGUES if texts.system]:
        assert texts.write(dialogue) == render(dialogue)
        has_bos = render(dialogue).startswith("<s>")
        assert has_bos == (not adds_bos and "bos_token" in TEMPLATES[name])  # else Ollama adds it


@pytest.mark.skipif(shutil.which("go") is None, reason="Go is not installed")
def test_go_writes_the_text_of_the_template(tmp_path: Path) -> None:
    cases, expected = [], []
    for adds_bos in (True, False):
        for template in TEMPLATES.values():
            render = renderer(Tokenizer(adds_bos), template)
            texts = find_turn_texts(render)
            starts = [[("user", "a"), ("assistant", "It")]]  # Ollama lets the model end this response
            for dialogue in DIALOGUES + starts:
                for system in ("", "Be brief.") if texts.system else ("",):
                    messages = [("system", system), *dialogue] if system else dialogue
                    roles = [{"Role": role, "Content": content} for role, content in messages]
                    cases.append({"Template": go_template(texts), "System": system, "Messages": roles})
                    text = render(messages)
                    expected.append(text.removesuffix(texts.end) if dialogue in starts else text)
    program = tmp_path / "main.go"
    program.write_text(GO_PROGRAM)
    result = subprocess.run(
        ["go", "run", program], input=json.dumps(cases), capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout) == expected


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (None, "there is no chat template"),
        ({"tool_use": JINJA["chatml"]}, "there is no chat template"),
        ("{{ messages[-1]['content'] }}", "the chat template changes messages"),
        ("{% for message in messages %}{{ message['content'].upper() }}{% endfor %}", "changes messages"),
        ("{{ raise_exception('no') }}{{ messages }}", "the chat template refuses a dialogue (no)"),
        ("{% for message in messages %}[{{ loop.index }}]{{ message['content'] }}{% endfor %}", "more than to put"),
        (JINJA["chatml"].replace("<|im_start|>", '""""'), "cannot hold the texts"),
        (JINJA["chatml"].replace("<|im_start|>", "\x07"), "cannot hold the texts"),
    ],
)
def test_other_templates_are_left_out_with_a_note(template: object, reason: str) -> None:
    text, notes = text_of(template)
    assert text == "FROM ./x.gguf\n"
    (note,) = notes
    assert reason in note and note.startswith("the Modelfile has no TEMPLATE, as ")


def test_a_template_without_end_is_left_out() -> None:
    with pytest.raises(Untranslatable, match="the chat template"):
        find_turn_texts(renderer(Tokenizer(True), "{% for i in range(10**9) %}{{ messages }}{% endfor %}"))
