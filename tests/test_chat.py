"""chat.py by script and at the terminal: prompts, ends of responses, stopping."""

import io
import json
import signal
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

import chat
from chat import ChatModel, ChatOptions, until_next_turn
from engine.data.chat_templates import JINJA
from engine.data.examples import tokenize
from engine.data.files import load_file
from engine.data.rows import RowCounts
from tests.models import tiny_model
from tests.tokenizer_files import byte_level

HH_PROMPT = "\n\nHuman: hi\n\nAssistant:"


def save(path: Path, chat_template: str | None = None, **config: Any) -> Path:
    """Save a model with equal logits for all tokens, so greedy decoding repeats one token."""
    model = tiny_model("llama", vocab_size=400, **config)
    tokenizer = byte_level()
    with torch.no_grad():
        model.lm_head.weight.zero_()
    tokenizer.chat_template = chat_template
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return save(tmp_path_factory.mktemp("model") / "plain")


@pytest.fixture
def command(monkeypatch, capsys):
    """Run chat.py with a pipe, or with lines typed at a terminal; returns (exit status, stdout, stderr)."""

    def run(*arguments: str, pipe: str = "", typed: list[Any] | None = None) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["chat.py", *arguments])
        stdin = io.StringIO(pipe)
        lines = iter(typed or [])

        def type_line(prompt: str) -> str:
            line = next(lines, EOFError())
            if isinstance(line, BaseException):
                raise line
            return line

        if typed is not None:
            monkeypatch.setattr(stdin, "isatty", lambda: True)
            monkeypatch.setattr("builtins.input", type_line)
        monkeypatch.setattr(sys, "stdin", stdin)
        capsys.readouterr()
        status = chat.main()
        return status, *capsys.readouterr()

    return run


@pytest.fixture
def echo(monkeypatch):
    """Let models repeat the question; the models of all responses, in order."""
    models: list[ChatModel] = []

    def respond(self, question, stop):
        models.append(self)
        self.messages.append({"role": "user", "content": question})
        said = ""
        for piece in [f"you said {question}", "!", "!"]:
            if stop.is_set():
                break
            said += piece
            yield piece
        self.messages.append({"role": "assistant", "content": said})

    monkeypatch.setattr(ChatModel, "respond", respond)
    return models


def load(path: Path, **options: Any) -> ChatModel:
    return ChatModel(str(path), ChatOptions(model=str(path), **options))


# ---- Prompts ----


@pytest.mark.parametrize(
    ("tokenizer_template", "option", "expected"),
    [
        (None, None, "Be kind." + HH_PROMPT),
        (JINJA["llama2"], None, "[INST] <<SYS>>\nBe kind.\n<</SYS>>\n\nhi [/INST]"),
        ("{{ messages[1].content }}", "hh", "Be kind." + HH_PROMPT),
        (None, "llama2", "[INST] <<SYS>>\nBe kind.\n<</SYS>>\n\nhi [/INST]"),
    ],
)
def test_the_prompt_is_encoded_as_in_training(tmp_path, tokenizer_template, option, expected):
    model = load(save(tmp_path / "model", tokenizer_template), system="Be kind.", chat_template=option)
    model.messages.append({"role": "user", "content": "hi"})
    ids = model.prompt_ids()
    assert model.tokenizer.decode(ids) == expected

    row = '{"messages": [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "hi"}, '
    (tmp_path / "x.jsonl").write_text(row + '{"role": "assistant", "content": "yes"}]}')
    template = option or ("hh" if tokenizer_template is None else None)
    data = load_file(
        tmp_path / "x.jsonl", "train", RowCounts(), model.tokenizer, chat_template=template, test_fraction=0
    )
    limits = {"max_length": 512, "max_prompt_length": 256, "cache_dir": tmp_path}
    (example,) = tokenize([(data, "keep_end")], model.tokenizer, "sft", RowCounts(), **limits).examples
    assert ids == example.prompt.tolist()


def test_special_tokens_in_questions_are_text(directory):
    model = load(directory)
    model.messages.append({"role": "user", "content": "<|endoftext|>"})
    assert model.tokenizer.eos_token_id not in model.prompt_ids()


def test_the_training_datas_template_takes_precedence_over_the_tokenizers(tmp_path):
    run = save(tmp_path / "run" / "step-4", chat_template="{{ messages }}").parent
    (run / "step-4" / "training_state.json").write_text('{"counters": {"examples": 4}}')
    (run / "config.yaml").write_text("datasets: [hh]\nchat_template: null\n")
    assert not load(run).chat.is_template
    (run / "config.yaml").write_text("datasets: [x.jsonl]\nchat_template: llama2\n")
    assert load(run).chat.jinja == JINJA["llama2"]
    (run / "config.yaml").write_text("datasets: [x.jsonl]\nchat_template: null\n")
    assert (load(run).chat.is_template, load(run).chat.jinja) == (True, None)


def test_a_long_dialogue_drops_its_oldest_turns(directory):
    model = load(directory, system="Be kind.", max_new_tokens=28)
    for turn in range(8):
        model.messages += [{"role": "user", "content": f"question {turn}"}, {"role": "assistant", "content": "no"}]
    model.messages.append({"role": "user", "content": "last"})
    text = model.tokenizer.decode(model.prompt_ids())
    assert text.startswith("Be kind.\n\nHuman: question ") and "question 0" not in text
    assert text.endswith("question 7\n\nAssistant: no\n\nHuman: last\n\nAssistant:")
    assert len(model.messages) == 18  # dropped from the prompt only
    model.reset()
    model.messages.append({"role": "user", "content": "x " * 100})
    with pytest.raises(chat.UserError, match="and the model 128 positions; fix: shorten it"):
        model.prompt_ids()


def test_an_adapter_runs_on_its_base(directory, tmp_path):
    base = load(directory).model
    adapted = get_peft_model(base, LoraConfig(target_modules=["lm_head"], init_lora_weights=False))
    adapted.peft_config["default"].base_model_name_or_path = "/gone"
    adapted.save_pretrained(tmp_path / "adapter")
    model = load(tmp_path / "adapter", base=str(directory))
    assert model.is_adapter
    tokens = torch.arange(3, 20).unsqueeze(0)
    with torch.no_grad():
        torch.testing.assert_close(model.model(tokens).logits, adapted(tokens).logits)


# ---- Responses ----


@pytest.mark.parametrize(
    ("pieces", "expected"),
    [
        (["a", " b\n\nHuman: c", "d"], "a b"),
        (["a\n", "\nHu", "man", ": so"], "a"),
        (["a\n", "\nHum", "ble"], "a\n\nHumble"),
        (["a\n\n", "b", "\n\nHum"], "a\n\nb\n\nHum"),
        (["a", "\n\n"], "a"),
        ([], ""),
    ],
)
def test_a_response_ends_before_the_next_human_turn(pieces, expected):
    assert "".join(until_next_turn(iter(pieces))) == expected


def test_a_response_is_streamed_and_kept_in_the_dialogue(directory):
    model = load(directory, max_new_tokens=12, temperature=1.0, top_p=1.0, seed=3)
    before = model.model.generation_config
    pieces = list(model.respond("hi", threading.Event()))
    assert model.messages == [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "".join(pieces).strip()},
    ]
    assert model.model.generation_config is before
    model.reset()
    assert "".join(model.respond("hi", threading.Event())) == "".join(pieces)  # the same seed


def test_stopping_a_response_ends_generation(directory):
    model = load(directory, max_new_tokens=20, temperature=0)
    with torch.no_grad():  # otherwise the end token comes at once
        ends = model.model.generation_config.eos_token_id
        model.model.lm_head.weight.normal_(generator=torch.Generator().manual_seed(0))[ends] = 0
    steps = 0

    def count(*args):
        nonlocal steps
        steps += 1

    model.model.register_forward_hook(count)
    assert "".join(model.respond("hi", threading.Event())) and steps == 20
    stop = threading.Event()
    stop.set()
    said = "".join(model.respond("hi", stop))
    assert steps == 21
    assert model.messages[-1] == {"role": "assistant", "content": said.strip()}


def test_a_response_without_its_end_is_known(directory):
    model = load(directory, max_new_tokens=3, temperature=0)
    list(model.respond("hi", threading.Event()))
    assert not model.was_cut  # the end token comes at once
    with torch.no_grad():
        ends = model.model.generation_config.eos_token_id
        model.model.lm_head.weight.normal_(generator=torch.Generator().manual_seed(0))[ends] = 0
    list(model.respond("hi", threading.Event()))
    assert model.was_cut


def test_an_error_while_generating_reaches_the_caller(directory, monkeypatch):
    model = load(directory)
    monkeypatch.setattr(type(model.model), "generate", lambda self, *args, **kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        list(model.respond("hi", threading.Event()))


# ---- Scripts ----


def test_one_prompt(directory, command, echo):
    assert command(f"model={directory}", "prompt=What is this: x=1?") == (0, "you said What is this: x=1?!!\n", "")


def test_a_pipe(directory, command, echo):
    status, out, _ = command(f"model={directory}", "system=Be kind.", pipe="one\n\ntwo\n")
    assert (status, out) == (0, "you said one!!\n\nyou said two!!\n")  # a response to each line, blank ones too
    assert [message["content"] for message in echo[0].messages] == ["Be kind.", "two", "you said two!!"]  # no history
    assert command(f"model={directory}", "stdin=whole", pipe="one\ntwo\n")[1] == "you said one\ntwo!!\n"


def test_a_pipe_as_json_lines(directory, command, echo):
    status, out, _ = command(f"model={directory}", "output=jsonl", pipe="one\n \nü\n")
    assert status == 0
    assert [json.loads(line) for line in out.splitlines()] == [
        {"prompt": "one", "response": "you said one!!"},
        {"prompt": "", "response": ""},
        {"prompt": "ü", "response": "you said ü!!"},
    ]
    arguments = f"model={directory}", f"compare={directory}", "output=jsonl"
    status, out, _ = command(*arguments, "prompt=a\nb")
    assert status == 0 and out.count("\n") == 1
    assert json.loads(out) == {"prompt": "a\nb", "response": "you said a\nb!!", "compare": "you said a\nb!!"}
    status, _, err = command(f"model={directory}", "output=jsonl", typed=["one"])
    assert status == 2 and "output: jsonl is for prompt=TEXT or a pipe" in err


def test_bytes_other_than_utf8_are_refused(directory, command):
    status, _, err = command(f"model={directory}", "prompt=caf\udce9")
    assert status == 2 and err.startswith("error[CONFIG] prompt: must be ") and err.count("\n") == 1


def test_two_models_respond_one_after_the_other(directory, command, echo):
    for compare in ([f"--compare={directory}"], ["--compare", str(directory)]):
        _, out, _ = command(f"model={directory}", *compare, "prompt=hi")
        assert out == f"== {directory}\nyou said hi!!\n" * 2
        assert echo[-2] is not echo[-1]


@pytest.mark.parametrize(
    ("arguments", "status", "problem"),
    [
        (["prompt=x"], 2, "model is required"),
        (
            ["model=x", "temperature=-1", "top_p=0", "max_new_tokens=0"],
            2,
            "temperature: must be a number of at least 0",
        ),
        (["model={0}", "base=x"], 2, "is no adapter, so it has no base"),
        (["model={0}/none"], 4, "{0}/none does not exist"),
        (["model=" + 300 * "x"], 2, "(a name in it is too long)"),
        (
            ["model={0}", "chat_template=" + 300 * "x"],
            2,
            "chat_template: must be null or hh, llama2, chatml or an existing file",
        ),
        (
            ["model={0}", "chat_template=none"],
            2,
            "chat_template: must be null or hh, llama2, chatml or an existing file",
        ),
        (["model={0}", "hello"], 2, "hello: not of the form key=value"),
        (["model={0}", "prompt=hi", "--compare"], 2, "--compare: not of the form key=value"),
        (["model={0}", "--hello", "you"], 2, "--hello: not of the form key=value; you: not of the form"),
    ],
)
def test_errors_are_one_line(directory, command, arguments, status, problem):
    found, out, err = command(*(argument.format(directory) for argument in arguments))
    assert (found, out, err.count("\n")) == (status, "", 1)
    assert problem.format(directory) in err


# ---- The terminal ----


def test_a_dialogue(directory, command, echo):
    typed = ["one", "", "two", "/help", KeyboardInterrupt(), "/reset", "three", "/quit", "four"]
    status, out, err = command(f"model={directory}", typed=typed)
    assert (status, err) == (0, "")
    responses = [line for line in out.splitlines() if line.startswith("you said")]
    assert responses == ["you said one!!", "you said two!!", "you said three!!"]
    assert out.count(chat.COMMANDS) == 2
    assert [message["content"] for message in echo[0].messages] == ["three", "you said three!!"]


def test_end_of_file_leaves(directory, command, echo):
    assert command(f"model={directory}", typed=["one"])[0] == 0


def test_ctrl_c_stops_the_response_and_not_the_dialogue(directory, command, echo, monkeypatch):
    complete, before = ChatModel.respond, signal.getsignal(signal.SIGINT)

    def interrupted(self, question, stop):
        for number, piece in enumerate(complete(self, question, stop)):
            yield piece
            if question == "one" and number == 0:
                signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(ChatModel, "respond", interrupted)
    status, out, _ = command(f"model={directory}", typed=["one", "two"])
    assert status == 0
    assert [line for line in out.splitlines() if line.startswith("you")] == ["you said one", "you said two!!"]
    assert [message["content"] for message in echo[0].messages][:2] == ["one", "you said one"]
    assert command(f"model={directory}", pipe="one\ntwo\n")[:2] == (130, "you said one\n")
    assert signal.getsignal(signal.SIGINT) is before


def test_a_model_with_infinite_weights_is_refused(tmp_path, command):
    model = tiny_model("llama", vocab_size=400)
    with torch.no_grad():
        model.model.norm.weight[0] = torch.inf
    model.save_pretrained(tmp_path)
    byte_level().save_pretrained(tmp_path)
    status, out, err = command(f"model={tmp_path}", "prompt=hi")
    problem = "model.norm.weight contains NaN or Inf; fix: chat with another checkpoint"
    assert (status, out, err) == (5, "", f"error[NONFINITE] {problem}\n")


def test_an_error_about_a_question_does_not_end_the_dialogue(directory, command):
    status, _, err = command(f"model={directory}", "max_new_tokens=1", typed=["x " * 200, "hi"])
    assert status == 0
    assert "and the model 128 positions" in err
