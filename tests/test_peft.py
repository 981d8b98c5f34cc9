"""LoRA and QLoRA through the command line: exact references, small checkpoints, exact resumption, merging."""

import math

import pytest

from tests.runs import QUICK, Program, Run

DPO = ("loss=dpo", "loss.beta=0.1")
SIZES = "hidden_size: 64, intermediate_size: 128, num_hidden_layers: 2, num_attention_heads: 4"
ARCHITECTURES = {
    "llama": f"{{model_type: llama, {SIZES}}}",
    "qwen2": f"{{model_type: qwen2, {SIZES}, num_key_value_heads: 2, tie_word_embeddings: true}}",
    "gpt_neox": f"{{model_type: gpt_neox, {SIZES}}}",
    "gpt2": "{model_type: gpt2, n_embd: 64, n_layer: 2, n_head: 4, n_positions: 512}",
}
MODEL = {
    name: (
        "model=blank_model",
        "model.name_or_path=tiny",
        "model.tokenizer_name_or_path=films",
        f"model.architecture={value}",
    )
    for name, value in ARCHITECTURES.items()
}
LORA = ("peft=lora", "peft.rank=4")
QLORA = ("peft=qlora", "peft.rank=4")


def run(program: Program, *overrides: str) -> Run:
    return program.ok(*overrides, defaults=QUICK)


def assert_starts_at_zero(run: Run) -> None:
    for split, row in (("eval", run.evals[0]), ("train", run.steps[0])):
        assert row[f"rewards_{split}/margins"] == row[f"rewards_{split}/chosen"] == 0
        assert row[f"loss/{split}"] == pytest.approx(math.log(2), abs=1e-7)


@pytest.mark.parametrize("reference", ["cached", "live"])
@pytest.mark.parametrize("peft", ["lora", "qlora"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_step_0_is_exact(program: Program, architecture: str, peft: str, reference: str) -> None:
    result = run(program, *DPO, *MODEL[architecture], f"peft={peft}", f"reference={reference}", "n_examples=8")
    assert_starts_at_zero(result)
    assert result.steps[1]["rewards_train/margins"] != 0
    assert "adapters off" in result.out
