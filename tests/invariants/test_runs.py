"""Equivalences of whole runs: equal numbers across batching, references and resumes."""

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from engine.run.resume_check import check_settings, settings_of
from tests.configs import make_settings
from tests.quick import slow_except
from tests.runs import QUICK, Program, Run, copy_stopped
from utils import UserError

PAIR_LOSSES = {
    "dpo": ("loss=dpo", "loss.beta=0.1"),
    "cdpo": ("loss=cdpo", "loss.beta=0.1"),
    "ipo": ("loss=ipo", "loss.beta=0.1"),
}
DPO = PAIR_LOSSES["dpo"]
SIZES = "hidden_size: 32, intermediate_size: 48, num_hidden_layers: 2, num_attention_heads: 2"
ARCHITECTURES = {
    "llama": f"{{model_type: llama, {SIZES}}}",
    "qwen2": f"{{model_type: qwen2, {SIZES}, num_key_value_heads: 1}}",
    "mistral": f"{{model_type: mistral, {SIZES}, num_key_value_heads: 1, sliding_window: 16}}",
    "gpt_neox": f"{{model_type: gpt_neox, {SIZES}}}",
    "gpt2": "{model_type: gpt2, n_embd: 32, n_layer: 2, n_head: 2, n_positions: 512}",
}
# Timings and memory differ between equal runs.
MEASUREMENTS = ("examples_per_second", "tokens_per_second", "peak_memory_gb")


def numbers(run: Run) -> list[dict]:
    return [{key: value for key, value in row.items() if key not in MEASUREMENTS} for row in run.metrics]


def weights(run: Run) -> dict[str, torch.Tensor]:
    return load_file(run.dir / "LATEST" / "model.safetensors")


def assert_close(ours: Run, theirs: Run, rel: float) -> None:
    for row, other in zip(ours.steps, theirs.steps, strict=True):
        of_responses = ("logps_train/chosen", "logps_train/response", "rewards_train/std")
        for key in ("loss/train", "grad_norm", next((key for key in of_responses if key in other), "loss/train")):
            assert row[key] == pytest.approx(other[key], rel=rel), key
    difference = torch.cat([(weights(ours)[name] - value).flatten() for name, value in weights(theirs).items()])
    scale = torch.cat([value.flatten() for value in weights(theirs).values()])
    assert (difference.norm() / scale.norm()).item() < rel


@pytest.mark.parametrize(
    ("architecture", "batching", "reference"),  # each pair of values
    [
        (architecture, batching, ("cached", "live")[(row + column) % 2])
        for row, architecture in enumerate(ARCHITECTURES)
        for column, batching in enumerate(("packed", "padded"))
    ],
)
def test_step_0_is_exact(program: Program, architecture: str, batching: str, reference: str) -> None:
    """Margin exactly 0 and loss exactly ln 2 before the first update, in training and evaluation."""
    model = ("model=blank_model", "model.name_or_path=tiny", "model.tokenizer_name_or_path=films")
    run = program.ok(
        *DPO,
        *model,
        f"model.architecture={ARCHITECTURES[architecture]}",
        f"batching={batching}",
        f"reference={reference}",
        "n_examples=4",
        defaults=QUICK,
    )
    for split, row in (("eval", run.evals[0]), ("train", run.steps[0])):
        assert row[f"rewards_{split}/margins"] == 0
        assert row[f"rewards_{split}/chosen"] == row[f"rewards_{split}/rejected"] == 0
        assert row[f"loss/{split}"] == pytest.approx(math.log(2), abs=1e-7)  # ln 2 in fp32


@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_step_0_is_exact_in_other_dtypes(program: Program, dtype: str) -> None:
    run = program.ok(*DPO, f"model.policy_dtype={dtype}", "n_examples=4")
    assert run.steps[0]["rewards_train/margins"] == 0
    assert run.steps[0]["loss/train"] == pytest.approx(math.log(2), abs=1e-7 if dtype == "bfloat16" else 1e-15)


@pytest.mark.slow
def test_step_0_of_the_other_losses(program: Program) -> None:
    cdpo = program.ok(*PAIR_LOSSES["cdpo"], "n_examples=4")
    assert cdpo.steps[0]["loss/train"] == pytest.approx(math.log(2), abs=1e-7)
    ipo = program.ok(*PAIR_LOSSES["ipo"], "n_examples=4")
    assert ipo.steps[0]["loss/train"] == pytest.approx(25)  # (0 - 1 / (2 * 0.1)) ** 2


@pytest.mark.parametrize("loss", ["dpo", *(pytest.param(loss, marks=pytest.mark.slow) for loss in ("cdpo", "ipo"))])
def test_cached_reference_equals_the_live_one(program: Program, loss: str) -> None:
    """Bitwise at every step, in training and evaluation; a second run reads the cache of the first."""
    common = (*PAIR_LOSSES[loss], "eval_every=8", "gradient_accumulation_steps=2", "seed=5")
    live = program.ok(*common, "reference=live")
    cached = program.ok(*common, "reference=cached", f"cache_dir={program.directory / 'own'}")
    assert "log-probs computed in" in cached.out
    assert numbers(live) == numbers(cached)
    again = program.ok(*common, "reference=auto", f"cache_dir={program.directory / 'own'}")
    assert "all log-probs are in" in again.out
    assert numbers(again) == numbers(live)


@pytest.mark.slow
def test_the_cache_serves_any_beta_loss_and_batch(program: Program) -> None:
    cache = f"cache_dir={program.directory / 'own'}"
    program.ok(*DPO, cache)
    for other in [("loss=ipo", "loss.beta=0.3"), (*DPO, "batch_size=8", "lr=1e-4", "loss.average_log_prob=true")]:
        assert "all log-probs are in" in program.ok(*other, cache).out
    # Another model, dtype or truncation is another reference.
    for changed in [("seed=1",), ("model.reference_dtype=bfloat16",), ("max_length=60", "max_prompt_length=30")]:
        assert "all log-probs are in" not in program.ok(*DPO, *changed, cache).out


@pytest.mark.parametrize("loss", ["sft", pytest.param("dpo", marks=pytest.mark.slow)])
def test_accumulation_does_not_change_the_result(program: Program, loss: str) -> None:
    """8 x 1 == 4 x 2 == 1 x 8, and any token budget. Other losses: test_loss_matrix.py."""
    common = (*PAIR_LOSSES.get(loss, ("loss=sft",)), "batch_size=8", "n_examples=28", "model.policy_dtype=float64")
    plain = program.ok(*common)
    for split in (
        "gradient_accumulation_steps=4",
        "gradient_accumulation_steps=8",
        "token_budget=200",
        "token_budget=1",
    ):
        assert_close(program.ok(*common, split), plain, rel=1e-5)  # Llama's norms round to fp32


def test_packed_training_equals_padded_training(program: Program) -> None:
    common = (*DPO, "model.policy_dtype=float64", "batch_size=6")
    assert_close(program.ok(*common), program.ok(*common, "batching=padded"), rel=1e-5)


@pytest.mark.parametrize("loss", slow_except(["sft", "dpo"], "dpo"))
def test_a_resumed_run_equals_the_uninterrupted_run(program: Program, loss: str) -> None:
    """N steps == k steps, stop, resume, N - k steps: every number and weight, bitwise; no row twice."""
    common = (*PAIR_LOSSES.get(loss, ("loss=sft",)), "batch_size=4", "eval_every=8", "save_every=4", "optimizer=AdamW")
    uninterrupted = program.ok(*common, "keep_checkpoints=5")
    for k in (4, 8, 12):
        directory = program.directory / f"stopped-{k}"
        copy_stopped(uninterrupted, directory, k)
        resumed = program.ok(*common, f"local_run_dir={directory}", "resume=auto", "keep_checkpoints=5")
        assert f"resumed from {directory}/step-{k}" in resumed.out
        assert numbers(resumed) == numbers(uninterrupted)
        ours, theirs = weights(resumed), weights(uninterrupted)
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_resume_auto_starts_a_new_run(program: Program) -> None:
    run = program.ok("resume=auto", f"local_run_dir={program.directory / 'new'}")
    assert run.dir == program.directory / "new" and len(run.steps) == 4


def test_a_resumed_run_must_have_the_same_config(program: Program) -> None:
    run = program.ok("save_every=8")
    before = (run.dir / "config.yaml").read_text()
    other = program("save_every=8", f"resume={run.dir}", "lr=1e-4", "batch_size=8", "model.architecture.hidden_size=64")
    assert other.status == 2
    for change in ("batch_size was 4 and is 8", "lr was 0.001 and is 0.0001", "hidden_size was 32 and is 64"):
        assert change in other.err
    assert (run.dir / "config.yaml").read_text() == before


def test_a_key_newer_than_the_checkpoint_may_have_its_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = make_settings("loss=kto")
    before = {key: value for key, value in settings_of(settings).items() if key != "loss.desirable_weight"}
    monkeypatch.setattr("engine.run.resume_check.read_state_file", lambda checkpoint: {"settings": before})
    check_settings(tmp_path, settings)
    with pytest.raises(UserError, match="desirable_weight was None and is 3"):
        check_settings(tmp_path, make_settings("loss=kto", "loss.desirable_weight=3"))


def test_a_resumed_run_must_have_the_same_data(program: Program) -> None:
    path = program.directory / "mine.jsonl"
    common = (f"datasets=[{path}]", "test_fraction=0", "n_examples=8")

    def write(word: str) -> None:
        path.write_text("".join(f'{{"prompt": "{n}?", "chosen": " {word}", "rejected": " b"}}\n' for n in range(8)))

    write("a")
    run = program.ok(*common)
    write("c")
    other = program(*common, f"resume={run.dir}")
    assert other.status == 3 and "trained on other examples" in other.err


def test_a_branch_from_an_older_checkpoint_leaves_the_run_unchanged(program: Program) -> None:
    run = program.ok("save_every=4", "keep_checkpoints=null")
    refused = program("save_every=4", f"resume={run.dir}/step-8", "keep_checkpoints=null")
    assert refused.status == 2 and "holds checkpoints after step-8" in refused.err
    branch = program.ok(
        "save_every=4", f"resume={run.dir}/step-8", "keep_checkpoints=null", f"local_run_dir={program.directory / 'b'}"
    )
    assert [row["counters/examples"] for row in branch.steps] == [12, 16]
    assert (run.dir / "LATEST").resolve().name == "step-16"


def test_a_run_without_a_checkpoint_starts_from_scratch(program: Program) -> None:
    directory = f"local_run_dir={program.directory / 'x'}"
    program.ok(directory, "debug=true")
    again = program.ok(directory, "resume=auto", "debug=true")
    assert [row["counters/examples"] for row in again.steps] == [4, 8, 12, 16]


def test_the_seed_reaches_the_order_of_the_data(program: Program) -> None:
    # The seed also draws the weights of a new model, so both runs start from the same archive.
    start = program.ok("n_examples=4")
    archive = f"model.archive={start.dir}/LATEST"
    first, same, other = (program.ok(archive, f"seed={seed}", "do_first_eval=false") for seed in (0, 0, 1))
    assert numbers(first) == numbers(same)
    assert [row["loss/train"] for row in first.steps] != [row["loss/train"] for row in other.steps]
