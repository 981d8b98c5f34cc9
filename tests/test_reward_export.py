"""Reward models in other programs: transformers gives our scores, whatever the padding."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaConfig,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

import chat
import evaluate
from engine.data.chat import Message
from engine.data.examples import Example
from engine.data.held_out import hold_out_prompts
from engine.data.rankings import compare_by_rank
from engine.export.saved_models import load_saved
from engine.models.quantization import QuantizedLinear
from engine.models.score_head import name_padding_token
from engine.step.heads import run_head
from engine.step.layout import lay_out
from engine.step.packing_check import use_packed_attention
from tests.invariants.test_runs import ARCHITECTURES
from tests.models import random_examples
from tests.quick import slow_except
from tests.runs import QUICK, SMALL, Program, Run, copy_stopped
from utils import UserError

REWARD = ("loss=reward", "optimizer=AdamW", "lr=1e-3")
RunExport = Callable[..., tuple[int, str, str]]
PROMPTS = ["\n\nHuman: Is it any good?\n\nAssistant:", "\n\nHuman: Tell me about The Northern Forest.\n\nAssistant:"]
RESPONSES = [" Yes.", " I loathed it. The cast was not forced.", " What a charming film!"]


def our_scores(name: Path | str) -> Tensor:
    """Scores of all prompts with all responses, packed, [prompts * responses]."""
    saved = load_saved(str(name), show_progress=False)
    model, tokenizer = saved.model.eval(), saved.tokenizer
    use_packed_attention(model)
    eos = [tokenizer.eos_token_id]

    def ids(text: str) -> np.ndarray:
        return np.array(tokenizer(text, add_special_tokens=False)["input_ids"], dtype=np.int32)

    responses = tuple(np.concatenate([ids(text), eos]).astype(np.int32) for text in RESPONSES)
    comparisons = compare_by_rank((0, 1, 2))
    examples = [Example(ids(prompt), responses, index, comparisons=comparisons) for index, prompt in enumerate(PROMPTS)]
    with torch.no_grad():
        return run_head(model, lay_out(examples, feeds_last_token=True))[1]


def their_scores(name: Path | str, side: str) -> Tensor:
    """The same from transformers alone, in one padded batch."""
    model = AutoModelForSequenceClassification.from_pretrained(name).eval()
    tokenizer = AutoTokenizer.from_pretrained(name, padding_side=side)
    texts = [f"{prompt}{response}{tokenizer.eos_token}" for prompt in PROMPTS for response in RESPONSES]
    batch = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
    assert not batch["attention_mask"].all()  # lengths differ
    positions = {}
    if model.config.model_type == "gpt2":  # it counts positions from the start of the row
        positions = {"position_ids": (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)}
    with torch.no_grad():
        inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
        return model(**inputs, **positions).logits[:, 0]


def small_run(program: Program, architecture: str, *overrides: str) -> Run:
    model = ("model=blank_model", "model.name_or_path=mine", "model.tokenizer_name_or_path=films")
    quick = (
        "wandb.enabled=false",
        "report=null",
        "n_examples=16",
        "n_eval_examples=8",
        "warmup_steps=2",
        "batch_size=4",
    )
    return program.ok(*REWARD, *model, f"model.architecture={ARCHITECTURES[architecture]}", *overrides, defaults=quick)


@pytest.mark.parametrize("architecture", slow_except(ARCHITECTURES, *[*ARCHITECTURES][:2]))
def test_an_export_gives_our_scores(program: Program, run_export: RunExport, architecture: str) -> None:
    run = small_run(program, architecture)
    target = program.directory / "exported"
    status, _, err = run_export(f"from={run.dir}", f"to={target}")
    assert status == 0, err
    ours = our_scores(run.dir)
    assert ours.std() > 0.01
    for side in ("right", "left"):
        torch.testing.assert_close(their_scores(target, side), ours, rtol=0, atol=1e-5)
    torch.testing.assert_close(our_scores(target), ours, rtol=0, atol=1e-6)
    config = json.loads((target / "config.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(target)
    assert config["pad_token_id"] == tokenizer.pad_token_id != tokenizer.eos_token_id
    for side in ("right", "left"):  # of a checkpoint too
        torch.testing.assert_close(their_scores(run.dir / "LATEST", side), ours, rtol=0, atol=1e-5)


def test_a_padding_token_takes_a_free_row_of_the_embeddings(program: Program) -> None:
    architecture = ARCHITECTURES["llama"].replace("}", ", vocab_size: 840}")
    model = ("model=blank_model", "model.name_or_path=mine", "model.tokenizer_name_or_path=films")
    quick = ("wandb.enabled=false", "report=null", "n_examples=8")
    run = program.ok(*REWARD, *model, f"model.architecture={architecture}", defaults=quick)
    assert len(load_file(run.dir / "LATEST" / "model.safetensors")["model.embed_tokens.weight"]) == 840
    for side in ("right", "left"):
        torch.testing.assert_close(their_scores(run.dir / "LATEST", side), our_scores(run.dir), rtol=0, atol=1e-5)


def test_adapters_merge_with_the_head(program: Program, run_export: RunExport) -> None:
    run = program.ok(*REWARD, "peft=lora", "lr=1e-2", "n_examples=32")
    target = program.directory / "exported"
    status, _, err = run_export(f"from={run.dir}", f"to={target}")
    assert status == 0, err
    for side in ("right", "left"):
        torch.testing.assert_close(their_scores(target, side), our_scores(run.dir), rtol=0, atol=1e-5)
    # Without export.py, on the base model that the run has made.
    torch.testing.assert_close(their_scores(run.dir / "LATEST", "right"), our_scores(run.dir), rtol=0, atol=1e-5)
    adapter = load_file(run.dir / "LATEST" / "adapter_model.safetensors")
    exported = load_file(target / "model.safetensors")
    assert torch.equal(exported["score.weight"], adapter["base_model.model.score.weight"])
    config = json.loads((target / "config.json").read_text())
    assert config["reward_mean"] == pytest.approx(run.evals[-1]["rewards_eval/mean"])
    assert config["reward_std"] == pytest.approx(run.evals[-1]["rewards_eval/std"])


@pytest.mark.parametrize("peft", slow_except(["lora", "qlora"], "qlora"))
def test_adapters_on_an_sft_run_score_as_in_training(program: Program, run_export: RunExport, peft: str) -> None:
    """The base on disk has an end-of-text token of zeros: it is the padding token too, and SFT does not feed it."""
    sft = program.ok("loss=sft")
    embeddings = load_file(sft.dir / "LATEST" / "model.safetensors")["model.embed_tokens.weight"]
    assert not embeddings[0].any() and embeddings[1].any()
    start: tuple[str, ...] = (*SMALL, f"model.archive={sft.dir}")
    if peft == "qlora":  # export.py merges into the weights from before quantisation: they shall be equal here
        start = ("peft.double_quant=false", "model=blank_model", f"model.name_or_path={on_grid(sft)}")
    quick = [default for default in QUICK if not default.startswith("lr")]
    common = (*REWARD, f"peft={peft}", *start, "batch_size=4", "save_every=8", "keep_checkpoints=null")
    run = program.ok(*common, "lr=1e-2", defaults=(*quick,))
    trained = evaluation(run, -1)
    assert trained != evaluation(run, 0)

    stopped = program.directory / "stopped"
    copy_stopped(run, stopped, 8)
    resumed = program.ok(*common, "lr=1e-2", f"resume={stopped}", defaults=(*quick,))
    assert evaluation(resumed, -1) == trained  # bitwise
    again = program.ok(*common, f"model.archive={run.dir}", "lr=0", defaults=(*quick,))
    assert evaluation(again, 0) == pytest.approx(trained, rel=0, abs=1e-6)

    target = program.directory / "exported"
    status, _, err = run_export(f"from={run.dir}", f"to={target}")
    assert status == 0, err
    for side in ("right", "left"):
        torch.testing.assert_close(their_scores(target, side), our_scores(run.dir), rtol=0, atol=1e-5)
    exported = program.ok(*REWARD, "model=blank_model", f"model.name_or_path={target}", "lr=0", defaults=(*quick,))
    assert evaluation(exported, 0) == pytest.approx(trained, rel=0, abs=1e-5)
    assert torch.equal(load_file(target / "model.safetensors")["model.embed_tokens.weight"][0], embeddings[0])


QUESTION = {"role": "user", "content": "Is it any good?"}
OWN_EOS = (  # and a newline behind it, as in Qwen's
    "{% for m in messages %}\n{{ m.role + '\\n' + m.content + eos_token + '\\n' }}{% endfor %}\n"
    "{% if add_generation_prompt %}{{ 'assistant\\n' }}{% endif %}\n"
)


@pytest.mark.parametrize("template", slow_except(["hh", "chatml", "own-eos"], "own-eos", "chatml"))
def test_the_chat_template_of_an_export_writes_our_tokens(
    program: Program, run_export: RunExport, monkeypatch: pytest.MonkeyPatch, template: str
) -> None:
    if template == "own-eos":
        template = str(program.directory / "own.jinja")
        Path(template).write_text(OWN_EOS)
    answers = [[{"role": "assistant", "content": text}] for text in ("Yes, a charming film.", "No.")]
    rows = [{"prompt": [QUESTION], "chosen": answers[0], "rejected": answers[1]}]
    data, target = program.directory / "rows.jsonl", program.directory / "exported"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows * 4))
    run = program.ok(*REWARD, f"datasets={data}", "test_fraction=0", f"chat_template={template}", "lr=1e-2")
    status, _, err = run_export(f"from={run.dir}", f"to={target}")
    assert status == 0, err

    def ours(name: Path) -> list[float]:
        scores = name.with_suffix(".scores")
        monkeypatch.setattr("sys.argv", ["evaluate.py", f"model={name}", f"data={data}", f"to={scores}"])
        assert evaluate.main() == 0
        return json.loads(scores.read_text().splitlines()[0])["scores"]

    model = AutoModelForSequenceClassification.from_pretrained(target).eval()
    tokenizer = AutoTokenizer.from_pretrained(target)
    texts = tokenizer.apply_chat_template([[QUESTION, *answer] for answer in answers], tokenize=False)
    assert all(text.count(tokenizer.eos_token) == (2 if template.endswith(".jinja") else 1) for text in texts)
    batch = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
    with torch.no_grad():
        theirs = model(**batch).logits[:, 0].tolist()
    assert abs(theirs[0] - theirs[1]) > 0.01
    assert ours(run.dir) == pytest.approx(theirs, abs=1e-5)
    assert ours(target) == pytest.approx(theirs, abs=1e-5)  # the EOS is not doubled
    start = ("model=blank_model", f"model.name_or_path={target}", f"datasets={data}", "test_fraction=0")
    again = program.ok(*REWARD, *start, "lr=0", defaults=QUICK)  # by the template of the export
    assert ours(again.dir) == pytest.approx(theirs, abs=1e-5)
    prompt = tokenizer.apply_chat_template([QUESTION], tokenize=False, add_generation_prompt=True)
    assert not prompt.rstrip().endswith(tokenizer.eos_token)


def on_grid(run: Run) -> Path:
    """A copy of a model with the weights that it has in 4 bits."""
    directory = run.dir / "on-grid"
    shutil.copytree(run.dir / "LATEST", directory, ignore=shutil.ignore_patterns("manifest.json", "*state*"))
    state = load_file(directory / "model.safetensors")
    for name in [name for name in state if "_proj" in name]:
        layer = torch.nn.Linear(state[name].shape[1], state[name].shape[0], bias=False)
        layer.weight.data = state[name]
        options: dict[str, Any] = {"quant_type": "nf4", "double_quant": False, "compute_dtype": None}
        device = torch.device("cpu")
        state[name] = QuantizedLinear(layer, **options, storage_dtype=torch.uint8, device=device).dequantize()
    save_file(state, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def evaluation(run: Run, index: int) -> dict[str, float]:
    return {name: value for name, value in run.evals[index].items() if name.startswith(("rewards_eval", "loss"))}


@pytest.mark.parametrize("peft", slow_except(["full", "lora"], "lora"))
def test_the_head_stays_in_fp32(program: Program, run_export: RunExport, peft: str) -> None:
    common: tuple[str, ...] = ("model.policy_dtype=bfloat16", "n_examples=4")
    name, prefix = "model.safetensors", ""
    if peft == "lora":
        sft = program.ok("loss=sft", *common)
        common = (*common, "peft=lora", f"model.archive={sft.dir}")
        name, prefix = "adapter_model.safetensors", "base_model.model."
    run = program.ok(*REWARD, *common)
    head = load_file(run.dir / "LATEST" / name)[f"{prefix}score.weight"]
    assert head.dtype == torch.float32 and not torch.equal(head.bfloat16().float(), head)
    for dtype in ("bfloat16", "float16"):  # as stored, and cast
        target = program.directory / f"exported-{dtype}"
        option = [] if dtype == "bfloat16" else [f"dtype={dtype}"]
        status, _, err = run_export(f"from={run.dir}", f"to={target}", *option)
        assert status == 0, err
        exported = load_file(target / "model.safetensors")
        assert exported["model.norm.weight"].dtype == getattr(torch, dtype)
        assert torch.equal(exported["score.weight"], head)


def test_the_rewards_of_held_out_responses_are_in_the_config(program: Program) -> None:
    run = program.ok(*REWARD, "n_examples=16", "eval_every=8", "save_every=4", "keep_checkpoints=null")
    configs = {step: json.loads((run.dir / f"step-{step}" / "config.json").read_text()) for step in (4, 8, 12, 16)}
    for index, step in ((1, 8), (2, 16)):
        assert configs[step]["reward_mean"] == pytest.approx(run.evals[index]["rewards_eval/mean"])
        assert (
            configs[step]["reward_std"] == pytest.approx(run.evals[index]["rewards_eval/std"])
            and run.evals[index]["rewards_eval/std"] > 0
        )
    for step in (4, 12):  # not evaluated
        assert configs[step]["reward_mean"] is None is configs[step]["reward_std"]


def test_without_a_test_split_prompts_are_held_out(program: Program, tmp_path: Path) -> None:
    rows = [{"prompt": f"Is {n} good?", "chosen": f" yes, {n}.", "rejected": " no."} for n in range(40)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = program.ok(*REWARD, f"datasets={path}", "test_fraction=0", "n_examples=60", "n_epochs=2")
    assert "held out of train: 2 rankings" in run.out and "(all there are" in run.out
    assert len(run.evals) == 2
    config = json.loads((run.dir / "LATEST" / "config.json").read_text())
    assert config["reward_mean"] == pytest.approx(run.evals[-1]["rewards_eval/mean"])


def test_held_out_prompts_are_not_trained_on() -> None:
    from engine.data.examples import Split

    examples = [
        Example(each.prompt, each.responses, index // 3)
        for index, each in enumerate(random_examples([(3, 2, 2)] * 300))
    ]
    train, test = hold_out_prompts(Split(examples, sizes=[90, 210]), seed=0)
    assert len(test.examples) == 15 and len({example.prompt_index for example in test.examples}) == 5
    assert not {example.prompt_index for example in train.examples} & {
        example.prompt_index for example in test.examples
    }
    assert sum(train.sizes) == len(train.examples) == 285
    assert train.sizes[0] == sum(example.prompt_index < 30 for example in train.examples)
    again = hold_out_prompts(Split(examples, sizes=[90, 210]), seed=0)[1]
    assert [id(example) for example in again.examples] == [id(example) for example in test.examples]
    one = hold_out_prompts(Split(examples[:3], sizes=[3]), seed=0)
    assert (len(one[0].examples), one[1].examples) == (3, [])


def test_other_forms_refuse_a_reward_model(
    program: Program, run_export: RunExport, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    run = program.ok(*REWARD, "n_examples=4")
    status, _, err = run_export(f"from={run.dir}", "to=x.gguf", "format=gguf")
    assert status == 2 and "format: gguf holds models of text" in err
    monkeypatch.setattr("sys.argv", ["chat.py", f"model={run.dir}", "prompt=hello"])
    assert chat.main() == 2
    assert "is a reward model: it scores responses, and writes none" in capsys.readouterr().err
    card_dir = program.directory / "card"
    assert run_export(f"from={run.dir}", f"to={card_dir}")[0] == 0
    card = (card_dir / "README.md").read_text()
    mean, deviation = (run.evals[-1][f"rewards_eval/{name}"] for name in ("mean", "std"))
    assert f"the mean {mean:.6g} and the standard deviation\n{deviation:.6g} (" in card
    assert "pipeline_tag: text-classification" in card and "- reward-model" in card
    assert "apply_chat_template(messages, tokenize=False)" in card


def test_chat_prints_the_normalised_reward(
    program: Program, run_export: RunExport, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    sft, run = program.ok("loss=sft", "n_examples=4"), program.ok(*REWARD, "n_examples=4")
    target = program.directory / "exported"
    assert run_export(f"from={run.dir}", f"to={target}")[0] == 0

    def answer(*arguments: str) -> tuple[int, str, str]:
        common = (f"model={sft.dir}", "max_new_tokens=8", "temperature=0", "prompt=Is it good?")
        monkeypatch.setattr("sys.argv", ["chat.py", *common, *arguments])
        capsys.readouterr()
        return chat.main(), *capsys.readouterr()

    line = json.loads(answer(f"reward_model={run.dir}", f"compare={sft.dir}", "output=jsonl")[1])
    saved = load_saved(str(run.dir), show_progress=False)
    text = f"\n\nHuman: {line['prompt']}\n\nAssistant:" + (f" {line['response']}" if line["response"] else "")
    ids = [*saved.tokenizer(text, add_special_tokens=False)["input_ids"], saved.tokenizer.eos_token_id]
    with torch.no_grad():
        score = saved.model.eval()(torch.tensor([ids])).logits.item()
    mean, deviation = (run.evals[-1][f"rewards_eval/{name}"] for name in ("mean", "std"))
    assert line["reward"] == line["compare_reward"] == pytest.approx((score - mean) / deviation, abs=1e-4)
    assert f"[reward {line['reward']:.3f}]" in answer(f"reward_model={target}")[1]
    status, _, err = answer(f"reward_model={sft.dir}")
    assert status == 2 and "is a model of text" in err


def test_the_padding_token_of_a_tokenizer_with_gaps_in_its_ids() -> None:
    vocabulary = {f"w{index}": index for index in range(50)} | {"<eos>": 60, "last": 53}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(vocabulary, unk_token="w0")), eos_token="<eos>", pad_token="<eos>"
    )
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    model = LlamaForSequenceClassification(LlamaConfig(vocab_size=64, num_labels=1, **sizes))
    name_padding_token(model, tokenizer, may_grow=True)
    assert model.config.pad_token_id == tokenizer.pad_token_id == 61


def test_chat_scores_a_long_dialogue_as_evaluate_does(
    program: Program, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = program.ok(*REWARD, "n_examples=8", "max_length=48", "max_prompt_length=24")
    answer: Message = {"role": "assistant", "content": "A charming film."}
    for content, lost in (("Is it good? " * 20, "the prompt"), ("Is it good?", "")):
        question: Message = {"role": "user", "content": content}
        data, scores = program.directory / "rows.jsonl", program.directory / f"{len(content)}.jsonl"
        data.write_text(json.dumps({"messages": [question, answer]}) + "\n")
        arguments = [f"model={run.dir}", f"data={data}", f"to={scores}", "normalize=true"]
        monkeypatch.setattr("sys.argv", ["evaluate.py", *arguments])
        assert evaluate.main() == 0
        line = json.loads(scores.read_text())
        assert line.get("prompt_is_truncated", False) == bool(lost)
        capsys.readouterr()
        assert chat.RewardModel(str(run.dir)).score([question, answer]) == pytest.approx(line["scores"][0], abs=1e-5)
        assert (f"{lost} is truncated" in capsys.readouterr().err) == bool(lost)


@pytest.mark.parametrize(
    ("mean", "deviation"), slow_except([("text", 1.0), (0.5, float("nan")), (0.5, 0.0), (None, None)], "text", None)
)
def test_chat_gives_raw_scores_without_usable_statistics(
    program: Program, run_export: RunExport, capsys: pytest.CaptureFixture[str], mean: Any, deviation: Any
) -> None:
    run, target = program.ok(*REWARD, "n_examples=4"), program.directory / "exported"
    assert run_export(f"from={run.dir}", f"to={target}")[0] == 0
    dialogue: list[Message] = [{"role": "user", "content": "Is it good?"}, {"role": "assistant", "content": "Yes."}]
    normalised = chat.RewardModel(str(target)).score(dialogue)
    config = json.loads((target / "config.json").read_text())
    raw = normalised * config["reward_std"] + config["reward_mean"]
    (target / "config.json").write_text(json.dumps(config | {"reward_mean": mean, "reward_std": deviation}))
    capsys.readouterr()
    assert chat.RewardModel(str(target)).score(dialogue) == pytest.approx(raw, abs=1e-5)
    assert "its scores are raw" in capsys.readouterr().err


def test_a_reward_model_on_a_moved_base_is_exported_for_chat(program: Program, run_export: RunExport) -> None:
    run, target = program.ok(*REWARD, "peft=lora", "n_examples=4"), program.directory / "exported"
    dialogue: list[Message] = [{"role": "user", "content": "Is it good?"}, {"role": "assistant", "content": "Yes."}]
    expected = chat.RewardModel(str(run.dir)).score(dialogue)
    moved = (run.dir / "base").rename(program.directory / "moved")
    with pytest.raises(UserError, match=r"reward_model: .*fix: python export.py from=\S+ base=PATH to=DIR"):
        chat.RewardModel(str(run.dir))
    status, _, err = run_export(f"from={run.dir}", f"base={moved}", f"to={target}")
    assert status == 0, err
    assert chat.RewardModel(str(target)).score(dialogue) == pytest.approx(expected, abs=1e-5)
