"""The training loop, through the command line: counting, evaluation, schedules, checkpoints, errors."""

import json
import math
from collections.abc import Sequence

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import engine.placement.memory
from engine.data.examples import Example
from engine.models.layers import find_layers
from engine.placement import placement
from engine.run.start_report import warn_of_first_margin
from engine.step.layout import Microbatch
from engine.step.microbatches import MicrobatchRunner
from engine.step.reference_cache import CachedReference
from tests.configs import make_settings
from tests.quick import slow_except
from tests.runs import QUICK, Program
from trainers import BasicTrainer

DPO = ("loss=dpo", "loss.beta=0.1")


def test_a_run_follows_its_counts(program: Program) -> None:
    run = program.ok("batch_size=6", "n_examples=20", "eval_every=12", "save_every=6", "keep_checkpoints=2")
    assert [row["counters/examples"] for row in run.steps] == [6, 12, 18, 20]
    assert [row["counters/updates"] for row in run.steps] == [1, 2, 3, 4]
    assert [row["counters/examples"] for row in run.evals] == [0, 12, 20]
    assert sorted(path.name for path in run.dir.glob("step-*")) == ["step-18", "step-20"]
    assert (run.dir / "LATEST").resolve().name == "step-20"
    assert run.out.strip().splitlines()[-1] == f"run_dir: {run.dir}"


def test_evaluations_fall_on_the_first_batch_past_each_multiple(program: Program) -> None:
    """Batches of 6: 7, 14 and 21 examples are passed at 12, 18 and 24; 28 at 30."""
    common = ("batch_size=6", "n_examples=32", "eval_every=7", "save_every=13", "keep_checkpoints=null")
    run = program.ok(*common, "n_eval_examples=2", "do_first_eval=false")
    assert [row["counters/examples"] for row in run.evals] == [12, 18, 24, 30, 32]
    assert sorted(path.name for path in run.dir.glob("step-*")) == ["step-18", "step-30", "step-32"]


def test_the_loss_falls_and_the_metrics_have_their_names(program: Program) -> None:
    run = program.ok(*DPO, "n_examples=64", "batch_size=8", "loss.beta=0.5")
    # A policy equal to its reference prefers neither response.
    assert run.evals[0]["rewards_eval/accuracies"] == run.steps[0]["rewards_train/accuracies"] == 0
    assert 0 < run.evals[-1]["rewards_eval/accuracies"] <= 1
    assert run.evals[-1]["loss/eval"] < run.evals[0]["loss/eval"]
    for split, row in (("train", run.steps[0]), ("eval", run.evals[0])):
        names = {f"rewards_{split}/{name}" for name in ("chosen", "rejected", "accuracies", "margins")}
        names |= {f"logps_{split}/chosen", f"logps_{split}/rejected", f"loss/{split}"}
        assert names <= set(row)
    extra = {"examples_per_second", "tokens_per_second", "grad_norm", "learning_rate", "peak_memory_gb"}
    assert extra <= set(run.steps[0])


@pytest.mark.parametrize(
    "schedule, expected",
    [
        ("constant", [1 / 3, 2 / 3, 1, 1, 1]),
        ("linear", [1 / 3, 2 / 3, 1, 2 / 3, 1 / 3]),
        ("cosine", [1 / 3, 2 / 3, 1, 0.75, 0.25]),
    ],
)
def test_learning_rates(program: Program, schedule: str, expected: list[float]) -> None:
    run = program.ok(f"lr_schedule={schedule}", "lr=3e-4", "batch_size=4", "n_examples=20", "do_first_eval=false")
    assert [row["learning_rate"] for row in run.steps] == pytest.approx([3e-4 * factor for factor in expected])


@pytest.mark.parametrize(
    "optimizer",
    slow_except(
        ["RMSprop", "AdamW", "SGD", "Adagrad", "Adadelta", "Adamax", "NAdam", "RAdam", "Adafactor"],
        *["RMSprop", "AdamW", "Adafactor"],
    ),
)
def test_every_optimizer_learns_and_resumes(program: Program, optimizer: str) -> None:
    run = program.ok(
        f"optimizer={optimizer}", f"local_run_dir={program.directory / 'a'}", "save_every=8", "n_eval_examples=2"
    )
    again = program.ok(
        f"optimizer={optimizer}",
        f"resume={run.dir}/step-8",
        f"local_run_dir={program.directory / 'b'}",
        "n_eval_examples=2",
    )
    ours, theirs = (load_file(r.dir / "LATEST" / "model.safetensors") for r in (run, again))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_evaluation_is_over_exactly_n_eval_examples(program: Program) -> None:
    """Batches of 4 over 7 examples: the mean is over examples, not of batch means."""
    one_batch = program.ok("n_eval_examples=7", "eval_batch_size=7", "n_examples=4")
    several = program.ok("n_eval_examples=7", "eval_batch_size=4", "n_examples=4")
    assert several.evals[0]["loss/eval"] == pytest.approx(one_batch.evals[0]["loss/eval"], rel=1e-6)


def test_gradients_are_scaled_down_to_max_grad_norm(program: Program) -> None:
    """With SGD an update is lr times the gradient: its length tells whether clipping has bound."""
    common = ("optimizer=SGD", "lr=1.0", "warmup_steps=0", "n_examples=4", "do_first_eval=false", "n_eval_examples=2")
    start = program.ok(*common[:1], "lr=0", *common[2:])
    weights = load_file(start.dir / "LATEST" / "model.safetensors")
    lengths, norms = [], []
    for max_grad_norm in (0.01, 1000):
        run = program.ok(*common, f"max_grad_norm={max_grad_norm}")
        updated = load_file(run.dir / "LATEST" / "model.safetensors")
        differences = [(updated[name].double() - weights[name]).flatten() for name in weights]
        lengths.append(torch.cat(differences).norm().item())
        norms.append(run.steps[0]["grad_norm"])
    assert norms[0] == norms[1] > 0.1  # the norm before clipping is logged
    assert lengths == [pytest.approx(0.01, rel=1e-3), pytest.approx(norms[1], rel=1e-3)]


@pytest.mark.slow
def test_another_seed_evaluates_on_other_examples(program: Program) -> None:
    start = program.ok("n_examples=4", "n_eval_examples=2")
    common = (f"model.archive={start.dir}", "lr=0", "n_examples=4", "n_eval_examples=6")
    losses = [program.ok(*common, f"seed={seed}").evals[0]["loss/eval"] for seed in (0, 0, 1)]
    assert losses[0] == losses[1] != losses[2]


@pytest.mark.slow
def test_sampling_and_evaluating_do_not_change_training(program: Program) -> None:
    plain = program.ok(*DPO, "do_first_eval=false", "eval_every=1000")
    busy = program.ok(
        *DPO, "eval_every=4", "sample_during_eval=true", "n_eval_model_samples=3", "max_length=300", "reference=live"
    )
    assert [row["loss/train"] for row in plain.steps] == [row["loss/train"] for row in busy.steps]


def test_samples_are_logged_as_a_growing_table(program: Program) -> None:
    run = program.ok(
        *DPO, "sample_during_eval=true", "n_eval_model_samples=3", "eval_every=8", "max_length=280", "reference=live"
    )
    assert [row["examples"] for row in run.samples] == [0, 0, 0, 8, 8, 8, 16, 16, 16]
    assert set(run.samples[0]) == {"examples", "prompt", "policy", "reference", "policy_reward", "reference_reward"}
    # Before the first step both models are equal, and so are their responses.
    assert all(row["policy"] == row["reference"] for row in run.samples[:3])
    assert run.evals[0]["kl_eval"] == 0
    assert run.evals[0]["ground_truth/win_rate"] == 0.5
    assert math.isfinite(run.evals[-1]["kl_eval"]) and run.evals[-1]["kl_eval"] != 0


def test_the_checkpoint_is_a_model_for_other_tools(program: Program) -> None:
    run = program.ok("n_examples=4")
    model = AutoModelForCausalLM.from_pretrained(run.dir / "LATEST")
    tokenizer = AutoTokenizer.from_pretrained(run.dir / "LATEST")
    assert model.config._attn_implementation != "packed"
    text = "\n\nHuman: What did you think of it?\n\nAssistant:"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    policy = torch.load(run.dir / "LATEST" / "policy.pt", weights_only=True)
    assert set(policy) == {"step_idx", "state", "metrics"} and policy["step_idx"] == 4
    for name, tensor in model.state_dict().items():
        assert torch.equal(policy["state"][name], tensor)


@pytest.mark.parametrize("archive", ["LATEST", "LATEST/policy.pt", "step-4"])
def test_model_archive_starts_policy_and_reference(program: Program, archive: str) -> None:
    sft = program.ok("n_examples=4")
    dpo = program.ok(*DPO, f"model.archive={sft.dir / archive}", "n_examples=8")
    assert dpo.steps[0]["loss/train"] == pytest.approx(math.log(2), abs=1e-7)
    fresh = program.ok(*DPO, "n_examples=8")
    assert dpo.evals[0]["logps_eval/chosen"] != fresh.evals[0]["logps_eval/chosen"]


def test_a_mismatching_archive_is_refused(program: Program) -> None:
    sft = program.ok("n_examples=4")
    for archive in ("LATEST", "LATEST/policy.pt"):
        run = program(f"model.archive={sft.dir / archive}", "model.architecture.num_hidden_layers=3")
        assert run.status == 4
        assert run.err.startswith("error[CHECKPOINT] model.archive") and run.err.count("\n") == 1
    torch.save({"state": {"x": print}}, program.directory / "evil.pt")
    run = program(f"model.archive={program.directory / 'evil.pt'}")
    assert run.status == 4 and run.err.count("\n") == 1


def test_debug_saves_nothing(program: Program) -> None:
    run = program.ok("debug=true")
    assert not list(run.dir.glob("step-*")) and not (run.dir / "LATEST").exists()


def test_a_run_directory_is_never_overwritten(program: Program) -> None:
    run = program.ok("n_examples=4")
    before = (run.dir / "metrics.jsonl").read_text()
    again = program("n_examples=4", f"local_run_dir={run.dir}")
    assert again.status == 2 and "resume=auto" in again.err
    assert (run.dir / "metrics.jsonl").read_text() == before


def test_a_non_finite_loss_ends_the_run_and_spares_the_checkpoint(program: Program) -> None:
    run = program("lr=1e30", "optimizer=SGD", "warmup_steps=0", f"local_run_dir={program.directory / 'x'}")
    assert run.status == 5
    assert run.err.startswith("error[NONFINITE] update 2") and "fix:" in run.err
    assert "Traceback" in (program.directory / "x" / "crash.log").read_text()
    rows = (program.directory / "x" / "metrics.jsonl").read_text().splitlines()
    assert all(math.isfinite(value) for row in rows for value in json.loads(row).values())


@pytest.mark.parametrize("batching", slow_except(["packed", "padded"], "packed"))
def test_mixed_precision_stays_near_fp32(program: Program, batching: str) -> None:
    full = program.ok(*DPO, "seed=3", f"batching={batching}")
    mixed = program.ok(*DPO, "seed=3", f"batching={batching}", "mixed_precision=bfloat16")
    assert mixed.steps[0]["loss/train"] == pytest.approx(math.log(2), abs=1e-7)
    assert mixed.steps[-1]["loss/train"] == pytest.approx(full.steps[-1]["loss/train"], rel=0.05)
    assert mixed.steps[0]["logps_train/chosen"] != full.steps[0]["logps_train/chosen"]


@pytest.mark.parametrize(
    "memory, value, recomputed",
    [
        (2**40, "true", [0, 1, 2]),
        pytest.param(2**40, "1", [0], marks=pytest.mark.slow),
        pytest.param(2**40, "auto", [], marks=pytest.mark.slow),
        (2**20, "auto", [0, 1, 2]),
    ],
)
def test_activation_checkpointing_changes_nothing(
    program: Program, monkeypatch: pytest.MonkeyPatch, memory: int, value: str, recomputed: list[int]
) -> None:
    """Layers with recomputed activations run twice in a step, others once."""
    calls: list[int] = []
    prepare_policy = BasicTrainer.prepare_policy

    def counting(trainer: BasicTrainer) -> None:
        prepare_policy(trainer)
        for index, layer in enumerate(find_layers(trainer.policy, None)):
            inner = layer.get_submodule("self_attn.q_proj")  # hooks of the layer itself miss its recomputation
            inner.register_forward_pre_hook(
                lambda module, inputs, index=index: calls.append(index) if module.training else None
            )

    monkeypatch.setattr(BasicTrainer, "prepare_policy", counting)
    monkeypatch.setattr(placement, "total_memory", lambda device: memory)
    common = (*DPO, "model.architecture.num_hidden_layers=3", "n_examples=8", "token_budget=512")
    plain = program.ok(*common, "activation_checkpointing=false")
    once = [calls.count(index) for index in range(3)]
    assert once[0] >= 2
    calls.clear()
    checkpointed = program.ok(*common, f"activation_checkpointing={value}")
    assert [calls.count(index) for index in range(3)] == [n * (1 + (i in recomputed)) for i, n in enumerate(once)]
    for name in ("loss/train", "grad_norm", "logps_train/rejected"):
        assert [row[name] for row in checkpointed.steps] == [row[name] for row in plain.steps]
    assert (f"activation_checkpointing: {len(recomputed)} of 3 layers" in checkpointed.out) == (
        value == "auto" and bool(recomputed)
    )


def test_recomputed_activations_have_the_same_precision(program: Program) -> None:
    common = (*DPO, "mixed_precision=bfloat16", "loss.beta=0.5")
    plain, checkpointed = (program.ok(*common, f"activation_checkpointing={on}") for on in ("false", "true"))
    assert [row["loss/train"] for row in checkpointed.steps] == pytest.approx(
        [row["loss/train"] for row in plain.steps], rel=1e-3
    )
    assert checkpointed.steps[0]["grad_norm"] == pytest.approx(plain.steps[0]["grad_norm"], rel=1e-3)


def test_tied_weights_stay_tied_in_mixed_precision(program: Program) -> None:
    common = ("model.architecture.tie_word_embeddings=true", "mixed_precision=bfloat16")
    sft = program.ok(*common, "n_examples=4")
    dpo = program.ok(*DPO, *common, f"model.archive={sft.dir}", "loss.beta=0.5", "warmup_steps=0")
    assert dpo.steps[0]["loss/train"] == pytest.approx(math.log(2), abs=1e-7)
    before, after = (load_file(run.dir / "LATEST" / "model.safetensors") for run in (sft, dpo))
    assert "lm_head.weight" not in after and set(after) == set(before)
    assert {tensor.dtype for tensor in after.values()} == {torch.float32}
    assert not any(torch.equal(before[name], after[name]) for name in after)


@pytest.fixture
def laid_out(monkeypatch: pytest.MonkeyPatch) -> list[Microbatch]:
    """The microbatches of all runs in a test."""
    batches: list[Microbatch] = []
    lay_out = MicrobatchRunner.lay_out

    def recording(runner: MicrobatchRunner, examples: Sequence[Example]) -> Microbatch:
        batches.append(lay_out(runner, examples))
        return batches[-1]

    monkeypatch.setattr(MicrobatchRunner, "lay_out", recording)
    return batches


def test_the_budget_follows_the_memory(
    program: Program, monkeypatch: pytest.MonkeyPatch, laid_out: list[Microbatch]
) -> None:
    """Less memory gives more microbatches and the same update."""
    runs, longest = [], []
    for memory in (2**40, 2**20):
        monkeypatch.setattr(placement, "total_memory", lambda device, memory=memory: memory)
        runs.append(program.ok("batch_size=16", "do_first_eval=false"))
        longest.append(max(batch.num_tokens for batch in laid_out))
        laid_out.clear()
    assert longest[1] <= engine.placement.memory.FEWEST_TOKENS < longest[0]
    assert runs[1].steps[0]["loss/train"] == pytest.approx(runs[0].steps[0]["loss/train"], rel=1e-6)
    assert runs[1].steps[0]["grad_norm"] == pytest.approx(runs[0].steps[0]["grad_norm"], rel=1e-5)


def test_matmul_precision_is_set_for_torch(program: Program) -> None:
    try:
        program.ok("matmul_precision=high", "n_examples=4")
        assert torch.get_float32_matmul_precision() == "high"
        program.ok("n_examples=4")
        assert torch.get_float32_matmul_precision() == "highest"
    finally:
        torch.set_float32_matmul_precision("highest")


def test_length_grouping_saves_padding(program: Program, laid_out: list[Microbatch]) -> None:
    path = program.directory / "pairs.jsonl"
    rows = [{"prompt": "a " * (10 * n), "chosen": " b", "rejected": " c"} for n in range(1, 17)]
    path.write_text("\n".join(map(json.dumps, rows)))
    common = (f"datasets=[{path}]", "test_fraction=0", "batching=padded", "token_budget=100000")
    fed = []
    for on in ("false", "true"):
        program.ok(*common, f"length_grouping={on}")
        fed.append(sum(batch.input_ids.numel() for batch in laid_out))
        laid_out.clear()
    assert fed[1] < 0.8 * fed[0]


def test_sft_weight_adds_the_mean_nll_of_the_chosen(program: Program) -> None:
    path = program.directory / "pairs.jsonl"  # one pair per prompt, so SFT and DPO evaluate the same responses
    rows = [{"prompt": f"Is {n} even?", "chosen": f" It is {n}.", "rejected": " No."} for n in range(40)]
    path.write_text("\n".join(map(json.dumps, rows)))
    common = (f"datasets=[{path}]", "test_fraction=0.25", "n_examples=4")
    plain = program.ok(*DPO, *common)
    weighted = program.ok(*DPO, *common, "loss.sft_weight=0.5")
    average = program.ok("loss=sft", "loss.average_log_prob=true", *common)
    difference = weighted.evals[0]["loss/eval"] - plain.evals[0]["loss/eval"]
    assert difference == pytest.approx(0.5 * average.evals[0]["loss/eval"], rel=1e-5)


def test_average_log_prob_divides_by_the_number_of_tokens(program: Program) -> None:
    total = program.ok("loss=ipo", "loss.beta=0.1", "n_examples=4")
    average = program.ok("loss=ipo", "loss.beta=0.1", "n_examples=4", "loss.average_log_prob=true")
    assert total.evals[0]["loss/eval"] == average.evals[0]["loss/eval"] == pytest.approx(25)  # (0 - 1/(2 beta))^2
    vocabulary = 832  # random weights give every token about the same probability
    assert average.evals[0]["logps_eval/chosen"] == pytest.approx(-math.log(vocabulary), rel=0.02)
    assert total.evals[0]["logps_eval/chosen"] < -50


def test_tensorboard(program: Program) -> None:
    run = program.ok("tensorboard=true", "n_examples=4")
    assert list((run.dir / "tensorboard").glob("events.out.*"))


def test_a_diverged_model_is_not_saved(program: Program) -> None:
    """After the last update the evaluation has loss NaN, so no checkpoint is saved."""
    directory = program.directory / "x"
    run = program("lr=1e30", "optimizer=SGD", "warmup_steps=0", "n_examples=4", f"local_run_dir={directory}")
    assert run.status == 5 and "error[NONFINITE] the evaluation has loss nan" in run.err
    assert not list(directory.glob("step-*"))
    assert "NaN" not in (directory / "metrics.jsonl").read_text()


@pytest.mark.parametrize("prompt_words", [40, 400])
def test_prompts_of_any_length_are_sampled_within_the_context(program: Program, prompt_words: int) -> None:
    """A learned position table has no rows beyond it."""
    path = program.directory / "long.jsonl"
    rows = [{"prompt": f"{n} " * prompt_words, "chosen": " a", "rejected": " b"} for n in range(1, 9)]
    path.write_text("\n".join(map(json.dumps, rows)))
    model = ("model=blank_model", "model.name_or_path=tiny", "model.tokenizer_name_or_path=films")
    architecture = "model.architecture={model_type: gpt2, n_embd: 16, n_layer: 1, n_head: 1, n_positions: 420}"
    common = (*model, architecture, f"datasets=[{path}]", "test_fraction=0.25", "max_length=420")
    samples = ("sample_during_eval=true", "n_eval_model_samples=2", "n_examples=4")
    run = program.ok(*common, *samples, "max_prompt_length=20", defaults=QUICK)
    assert len(run.samples) == 4


def test_a_short_context_is_refused(program: Program) -> None:
    run = program("model.architecture.max_position_embeddings=256")
    assert run.status == 2 and "max_length: 512 is more than the 256 positions of the model" in run.err


def test_no_samples_without_a_request(program: Program) -> None:
    run = program.ok(
        *DPO, "sample_during_eval=true", "max_length=280", "n_eval_model_samples=0", "reference=live", "n_examples=4"
    )
    assert not (run.dir / "samples.jsonl").exists() and "kl_eval" not in run.evals[0]


def test_tokens_per_second_counts_fed_tokens(program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    """Packed, four pairs on one prompt feed it once."""
    path = program.directory / "ranked.jsonl"
    row = {"prompt": "one two three four five six seven eight", "responses": [" a", " b", " c", " d"]}
    path.write_text(json.dumps(row))
    clock = iter(range(10**6))
    monkeypatch.setattr("engine.step.metrics.time.monotonic", lambda: next(clock))
    counts = {}
    for batching in ("packed", "padded"):
        common = (f"datasets=[{path}]", "test_fraction=0", "batch_size=6", f"batching={batching}", "n_examples=6")
        counts[batching] = program.ok(*DPO, *common).steps[0]["tokens_per_second"]  # one second by this clock
    assert counts["packed"] < counts["padded"] / 2


def test_a_batch_may_hold_an_example_twice(program: Program) -> None:
    """Where an epoch ends inside a batch: both count, and the run ends at its number."""
    rows = [{"prompt": f"Q{number}?", "chosen": " yes", "rejected": " no"} for number in range(4)]
    path = program.directory / "four.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    sizes = ("test_fraction=0", "batch_size=3", "n_examples=24", "n_epochs=null")
    run = program.ok("loss=dpo", "loss.beta=0.1", f"datasets={path}", *sizes)
    assert [row["counters/examples"] for row in run.steps] == [*range(3, 25, 3)]
    assert (run.dir / "LATEST" / "policy.pt").exists()


def test_the_reference_is_computed_once_for_all_epochs(program: Program) -> None:
    path = program.directory / "few.jsonl"
    rows = [{"prompt": f"{n}?", "chosen": " a", "rejected": " b"} for n in range(10)]
    path.write_text("\n".join(map(json.dumps, rows)))
    common = (f"datasets=[{path}]", "test_fraction=0.2", "n_examples=null", f"cache_dir={program.directory / 'own'}")
    run = program.ok(*DPO, *common, "n_epochs=3")
    assert "reference: 20 log-probs computed in" in run.out


@pytest.mark.parametrize(
    "overrides, margin, is_warned",
    [
        ((), 0.5, True),
        ((), 0.0, False),
        (("model.reference_dtype=bfloat16",), 0.5, False),
        (("peft=lora", "peft.dropout=0.1"), 0.5, False),
        (("loss.reference_free=true",), 0.5, False),
    ],
)
def test_a_margin_before_the_first_update_is_told(overrides: tuple[str, ...], margin: float, is_warned: bool) -> None:
    settings = make_settings(*DPO, *overrides)
    first, second = (
        warn_of_first_margin(settings, {"rewards_train/margins": margin, "counters/updates": updates})
        for updates in (1, 2)
    )
    assert (first is not None) == is_warned and second is None
    if first is not None:
        assert "0.5, not 0" in first


def test_a_run_warns_of_its_first_margin(program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    logps = CachedReference.logps

    def shifted(reference: CachedReference, batch: Microbatch) -> torch.Tensor:
        return logps(reference, batch) - torch.arange(len(batch.responses))

    assert "the margin before" not in program.ok(*DPO, "n_examples=8").out
    monkeypatch.setattr(CachedReference, "logps", shifted)
    assert program.ok(*DPO, "n_examples=8").out.count("warning: the margin before the first update is ") == 1


@pytest.mark.slow
def test_compiled_layers_train_the_same(program: Program) -> None:
    common = (*DPO, "n_examples=12", "reference=live", "n_eval_examples=4")
    plain, compiled = (program.ok(*common, f"compile={on}") for on in ("false", "true"))
    for row, other in zip(compiled.steps, plain.steps, strict=True):
        assert row["loss/train"] == pytest.approx(other["loss/train"], rel=1e-4)
        assert row["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-3)
