"""Reward models: starts, training, checkpoints, and agreement of runs on several processes."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.data.films import film_reward, film_rows
from engine.data.forms import ParsedRow
from engine.export.saved_models import load_saved
from engine.export.scoring import Scorer
from engine.models.score_head import FAMILIES, prepare_config
from engine.models.shards import full_tensor
from engine.step.packing_check import use_packed_attention
from tests.configs import make_settings
from tests.quick import slow_except
from tests.ranks import Job, make_trainer, on_ranks, trajectories
from tests.runs import SMALL, Program, Run

REWARD = ("loss=reward", "optimizer=AdamW", "lr=1e-3")
SCORE = "score.weight"
MEASUREMENTS = ("counters", "per_second", "peak_memory")


def evaluation(run: Run, index: int) -> dict[str, float]:
    return {name: value for name, value in run.evals[index].items() if not name.startswith("counters")}


def weights(run: Run) -> dict[str, torch.Tensor]:
    return load_file(run.dir / "LATEST" / "model.safetensors")


# ---- Starts ----


def test_a_reward_model_starts_from_a_language_model_or_a_reward_model(program: Program) -> None:
    sft = program.ok("loss=sft")
    reward = program.ok(*REWARD, f"model.archive={sft.dir}", "lr=0")
    trained, started = weights(sft), weights(reward)
    assert started.keys() - trained.keys() == {SCORE} and trained.keys() - started.keys() == {"lm_head.weight"}
    embeddings = "model.embed_tokens.weight"
    before, after = trained.pop(embeddings), started.pop(embeddings)
    assert all(torch.equal(started[name], trained[name]) for name in started.keys() & trained.keys())
    # The embedding of the end-of-text token is 0 before, as of a padding token. The last row is for a padding token.
    assert len(after) == len(before) + 1 and not before[0].any() and after[0].any() and not after[-1].any()
    assert torch.equal(after[1:-1], before[1:])
    for archive in (sft.dir / "LATEST", sft.dir / "LATEST" / "policy.pt"):
        again = program.ok(*REWARD, f"model.archive={archive}", "lr=0")
        assert evaluation(again, 0) == evaluation(reward, 0)

    first = program.ok(*REWARD, f"model.archive={sft.dir}")
    policy = Path(shutil.copy(first.dir / "LATEST" / "policy.pt", program.directory))  # without a config
    for archive in (first.dir, first.dir / "LATEST" / "policy.pt", policy):
        second = program.ok(*REWARD, f"model.archive={archive}")  # no new head
        assert evaluation(second, 0) == evaluation(first, -1)
        assert evaluation(second, -1) != evaluation(first, -1)


@pytest.mark.parametrize("head", slow_except(["untied", "tied", "adapter"], "adapter"))
def test_a_language_model_does_not_start_from_a_reward_model(program: Program, head: str) -> None:
    """Its LM head would be random, or tied to embeddings that were trained for scores."""
    overrides = {"untied": (), "tied": ("model.architecture.tie_word_embeddings=true",), "adapter": ("peft=lora",)}
    sft = program.ok("loss=sft", "n_examples=4", *overrides["tied" if head == "tied" else "untied"])
    common = overrides[head]
    reward = program.ok(*REWARD, "n_examples=4", f"model.archive={sft.dir}", *common)
    starts: list[tuple[str, ...]] = [(f"model.archive={reward.dir}",)]
    if head != "adapter":
        starts += [
            ("model=blank_model", f"model.name_or_path={reward.dir}/LATEST"),
            (f"{starts[0][0]}/LATEST/policy.pt",),
        ]
    for start in starts:
        quick = ("wandb.enabled=false", "report=null", "sample_during_eval=false", "n_examples=4")
        own = () if start[0] == "model=blank_model" else (*SMALL, *common)
        run = program("loss=dpo", "loss.beta=0.1", *start, *own, defaults=quick)
        assert run.status == 4
        assert start[-1].split("=")[0] in run.err
        assert "is a reward model" in run.err and "or set loss=reward" in run.err
    if head != "adapter":  # the other way round
        common = (*REWARD, "lr=0", "model=blank_model")
        _, again = (
            program.ok(
                *common,
                f"model.name_or_path={run.dir}/LATEST",
                defaults=("wandb.enabled=false", "report=null", "n_examples=4"),
            )
            for run in (sft, reward)
        )
        assert torch.equal(weights(again)[SCORE], weights(reward)[SCORE])


def test_a_model_without_some_of_its_weights_is_refused(program: Program) -> None:
    sft = program.ok("loss=sft", "n_examples=4")
    file = sft.dir / "LATEST" / "model.safetensors"
    directory = program.directory / "incomplete"
    shutil.copytree(sft.dir / "LATEST", directory)
    for name, loss in (("lm_head.weight", ("loss=sft",)), ("model.norm.weight", REWARD)):
        kept = {key: value for key, value in load_file(file).items() if key != name}
        save_file(kept, directory / "model.safetensors", metadata={"format": "pt"})
        start = ("model=blank_model", f"model.name_or_path={directory}")
        run = program(
            *loss, *start, defaults=("wandb.enabled=false", "report=null", "sample_during_eval=false", "n_examples=4")
        )
        assert run.status == 4 and f"1 weights of the model are not in {directory}, such as {name}" in run.err


@pytest.mark.slow
def test_a_reward_model_in_16_bits_starts_with_its_head_in_fp32(program: Program) -> None:
    first = program.ok(*REWARD, "n_examples=4", "model.policy_dtype=bfloat16")
    head = weights(first)[SCORE]
    assert not torch.equal(head.bfloat16().float(), head)
    common = (*REWARD, "n_examples=4", "lr=0", "model.policy_dtype=bfloat16")
    for start in (
        (*SMALL, f"model.archive={first.dir}"),
        (*SMALL, f"model.archive={first.dir}/LATEST/policy.pt"),
        ("model=blank_model", f"model.name_or_path={first.dir}/LATEST"),
    ):
        second = weights(program.ok(*common, *start, defaults=("wandb.enabled=false", "report=null")))
        assert second["model.norm.weight"].dtype == torch.bfloat16
        assert torch.equal(second[SCORE], head)
    saved = load_saved(str(first.dir), dtype=torch.float16).model
    assert saved.dtype == torch.float16 and torch.equal(saved.score.weight, head)


@pytest.mark.slow
def test_the_new_head_is_seeded_and_has_a_known_size(program: Program) -> None:
    common = (*REWARD, "lr=0", "n_examples=4", "do_first_eval=false", "model.architecture.hidden_size=256")
    heads = {init: weights(program.ok(*common, f"loss.head_init={init}"))[SCORE] for init in ("width", "depth")}
    assert heads["width"].std().item() == pytest.approx(257**-0.5, rel=0.15)
    assert heads["depth"].std().item() == pytest.approx(0.02 / 4**0.5, rel=0.15)
    assert torch.equal(weights(program.ok(*common))[SCORE], heads["width"])
    assert not torch.equal(weights(program.ok(*common, "seed=1"))[SCORE], heads["width"])
    low = weights(program.ok(*common, "model.policy_dtype=bfloat16"))
    assert low["model.norm.weight"].dtype == torch.bfloat16
    assert torch.equal(low[SCORE], heads["width"])  # fp32


def test_a_family_without_a_score_head_is_refused(program: Program) -> None:
    architecture = "{model_type: codegen, n_embd: 32, n_layer: 2, n_head: 4, rotary_dim: 8}"
    model = ("model=blank_model", "model.name_or_path=mine", "model.tokenizer_name_or_path=films")
    run = program(
        *REWARD, *model, f"model.architecture={architecture}", defaults=("wandb.enabled=false", "report=null")
    )
    assert run.status == 2
    assert "transformers has no score head for codegen" in run.err
    assert all(f" {family}," in run.err for family in FAMILIES)
    assert " bert," not in run.err  # its head is another


def test_an_encoder_has_no_score_head() -> None:
    from transformers import AutoConfig

    with pytest.raises(Exception, match="no score head for bert"):
        prepare_config(AutoConfig.for_model("bert"), "score")
    state = torch.random.get_rng_state()
    for family in FAMILIES:
        assert prepare_config(AutoConfig.for_model(family), "score").num_labels == 1
    assert torch.equal(torch.random.get_rng_state(), state)  # the check draws no weights
    assert prepare_config(AutoConfig.for_model("bert"), "lm").num_labels == 2


# ---- Training ----


def test_a_run_learns_and_logs(program: Program) -> None:
    run = program.ok(
        *REWARD, "n_examples=1200", "batch_size=8", "n_eval_examples=64", "keep_best=rewards_eval/accuracies"
    )
    first, last = run.evals[0], run.evals[-1]
    assert last["rewards_eval/accuracies"] > first["rewards_eval/accuracies"] + 0.1
    assert last["loss/eval"] < first["loss/eval"] - 0.1
    assert last["rewards_eval/margins"] == pytest.approx(last["rewards_eval/chosen"] - last["rewards_eval/rejected"])
    assert 0 < last["calibration_error/eval"] < 0.5 and 0.01 < last["temperature/eval"] <= 100
    assert 0 < last["length_eval/accuracy"] < 1 and abs(last["length_eval/correlation"]) < 1
    assert last["length_eval/accuracy"] == first["length_eval/accuracy"]  # of the data alone
    assert {"rewards_train/std", "rewards_train/chosen", "rewards_train/rejected"} <= run.steps[0].keys()
    assert "warning" not in run.out and not (run.dir / "samples.jsonl").exists()
    state = json.loads((run.dir / "LATEST" / "training_state.json").read_text())
    assert state["reference"] is None
    assert (run.dir / "BEST").exists()


def test_the_stage_has_defaults_of_its_own(program: Program) -> None:
    """The command line overrides them; other losses keep those of the reference implementation."""
    for overrides, expected in (
        (("loss=reward",), ("AdamW", 1e-5, 10)),
        (("loss=reward", "optimizer=SGD", "lr=1e-3"), ("SGD", 1e-3, 10)),
        (("loss=sft",), ("RMSprop", 5e-7, 150)),
    ):
        settings = make_settings(*overrides)
        assert (settings.optimizer, settings.lr, settings.warmup_steps) == expected, overrides
    assert "optimizer: AdamW" in program("loss=reward", "--help").out.splitlines()


def test_nothing_is_sampled(program: Program) -> None:
    run = program(*REWARD, "sample_during_eval=true")
    assert run.status == 2 and "sample_during_eval: true needs a model of text" in run.err
    run = program(*REWARD, "keep_best=logps_eval/chosen")
    assert run.status == 2 and "keep_best: logps_eval/chosen is of losses of log-probs, not of reward" in run.err


def test_rankings_train(program: Program, tmp_path: Path) -> None:
    """Plackett-Luce and pairs of the same rankings, with ties."""
    rows = [
        {
            "prompt": f"Is film {i} good?",
            "responses": [" Yes.", " It is.", " No.", " It was not."],
            "scores": [3, 2, 2, i % 3],
        }
        for i in range(24)
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    common = (*REWARD, f"datasets={path}", "test_fraction=0.25", "batch_size=4", "n_examples=16", "loss.centering=0.01")
    runs = {ranking: program.ok(*common, f"loss.ranking={ranking}") for ranking in ("pairs", "plackett_luce")}
    for run in runs.values():
        assert run.evals[-1]["loss/eval"] < run.evals[0]["loss/eval"]
    assert "18 rankings" in runs["pairs"].out and "tied with another response to their prompt" in runs["pairs"].out
    # Of three tied responses one is left, so the prompt is dropped.
    out = runs["plackett_luce"].out
    assert "tied response" in out and "prompt without two untied responses" in out and "18 rankings" not in out
    padded = program.ok(*common, "loss.ranking=pairs", "batching=padded")
    assert evaluation(padded, -1) == pytest.approx(evaluation(runs["pairs"], -1), rel=1e-3, abs=1e-5)


def test_all_pairs_of_a_prompt_are_one_step(program: Program, tmp_path: Path) -> None:
    """Three prompts of three pairs without an order, and three of one pair, a prompt a step."""
    rows = [
        {"prompt": f"Is film {i} good?", "chosen": chosen, "rejected": rejected, "margin": i}
        for i in range(3)
        for chosen, rejected in ((" Yes.", " No."), (" Good.", " Bad."), (" No.", " Yes."))
    ]
    rows += [{"prompt": f"Is film {i} bad?", "chosen": " Yes.", "rejected": " No."} for i in range(3)]
    for name in ("train", "test"):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    common = (*REWARD, f"datasets={tmp_path}", "batch_size=1", "n_epochs=1", "n_examples=null", "n_eval_examples=6")
    run = program.ok(*common)
    assert "train: 12 rows, 6 prompts, 6 rankings of 12 pairs" in run.out
    assert "kept, though each has its opposite (A over B and B over A): 3 pairs" in run.out
    assert len(run.steps) == 6 and all(math.isfinite(step["loss/train"]) for step in run.steps)
    order = program.ok(*common, "loss.ranking=plackett_luce")
    assert "dropped: 3 prompt without one order of its responses (loss.ranking=pairs learns its pairs)" in order.out
    assert "kept, though" not in order.out
    assert len(order.steps) == 3


@pytest.mark.parametrize("peft", slow_except(["lora", "qlora"], "lora"))
def test_adapters_train_with_the_head_in_full(program: Program, peft: str) -> None:
    common = (*REWARD, f"peft={peft}", "lr=1e-2", "n_examples=32")
    first = program.ok(*common)
    adapter = load_file(first.dir / "LATEST" / "adapter_model.safetensors")
    config = json.loads((first.dir / "LATEST" / "adapter_config.json").read_text())
    assert config["task_type"] == "SEQ_CLS" and config["modules_to_save"] == ["score"]
    assert adapter["base_model.model.score.weight"].dtype == torch.float32
    assert evaluation(first, -1) != evaluation(first, 0)
    second = program.ok(*common, f"model.archive={first.dir}")
    assert evaluation(second, 0) == pytest.approx(evaluation(first, -1), rel=1e-5, abs=1e-6)


def test_a_reward_adapter_starts_from_an_sft_adapter(program: Program) -> None:
    sft = program.ok("loss=sft", "peft=lora", "lr=1e-2")
    reward = program.ok(*REWARD, "peft=lora", f"model.archive={sft.dir}", "lr=0")
    ours, theirs = (load_file(run.dir / "LATEST" / "adapter_model.safetensors") for run in (reward, sft))
    assert ours.keys() - theirs.keys() == {"base_model.model.score.weight"}
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_adapters_start_from_a_reward_model(program: Program) -> None:
    """Its head is not new. It trains, and the adapter's checkpoint has it in full."""
    first = program.ok(*REWARD)
    second = program.ok(*REWARD, "peft=lora", "lr=1e-2", f"model.archive={first.dir}")
    assert evaluation(second, 0) == evaluation(first, -1) != evaluation(second, -1)
    adapter = load_file(second.dir / "LATEST" / "adapter_model.safetensors")
    head = adapter["base_model.model.score.weight"]
    assert head.shape == weights(first)[SCORE].shape and not torch.equal(head, weights(first)[SCORE])
    third = program.ok(*REWARD, "peft=lora", "lr=0", f"model.archive={second.dir}")
    assert evaluation(third, 0) == pytest.approx(evaluation(second, -1), rel=1e-5, abs=1e-6)
    saved = load_saved(str(second.dir)).model
    assert torch.equal(saved.score.weight, head)


def test_layers_freeze(program: Program) -> None:
    run = program.ok(*REWARD, "freeze.first_n_layers=1", "freeze.patterns=[embed_tokens]")
    start = program.ok(*REWARD, "lr=0", "n_examples=4")
    changed = {name for name, value in weights(run).items() if not torch.equal(value, weights(start)[name])}
    assert SCORE in changed and "model.norm.weight" in changed
    assert changed and not any(name.startswith(("model.layers.0.", "model.embed")) for name in changed)


# ---- Several processes ----

PLACEMENTS = {
    "basic": ("trainer=BasicTrainer",),
    "fsdp": ("trainer=FSDPTrainer",),
    "tensor": ("trainer=TensorParallelTrainer",),
    "both": ("trainer=FSDPTrainer", "tensor_parallel_size=2"),
    "deterministic": ("trainer=FSDPTrainer", "deterministic=true"),
}


def measured(overrides: tuple[str, ...], run_dir: Path) -> dict[str, float]:
    """The metrics of an evaluation before training."""
    trainer = make_trainer(("llama", "reward", overrides), run_dir)
    trainer.policy.eval()
    metrics: dict[str, float] = trainer.evaluator.measure(trainer.token_budget, lambda: False)
    return metrics


def runs_and_evaluations(names: list[str], directory: Path) -> tuple[list[Any], list[dict[str, float]]]:
    jobs: list[Job] = [("llama", "reward", (*PLACEMENTS[name], "n_epochs=2")) for name in names]
    evaluations = [measured(PLACEMENTS[name], directory / f"{name}-{index}") for index, name in enumerate(names)]
    return trajectories(jobs, directory), evaluations


@pytest.mark.parametrize("num_ranks, names", slow_except([(2, ["fsdp", "tensor"]), (4, ["both"])], 2))
def test_every_trainer_gives_the_same_training_and_evaluation(num_ranks: int, names: list[str], tmp_path: Path) -> None:
    (truth,), (evaluation,) = runs_and_evaluations(["basic"], tmp_path / "one")
    for results, evaluations in on_ranks(num_ranks, runs_and_evaluations, names, tmp_path / "several"):
        for name, (losses, norms, weights), measures in zip(names, results, evaluations, strict=True):
            torch.testing.assert_close(losses, truth[0], rtol=1e-4, atol=1e-6, msg=name)
            torch.testing.assert_close(norms, truth[1], rtol=1e-3, atol=1e-6, msg=name)
            assert measures == pytest.approx(evaluation, rel=1e-4, abs=1e-6), name
            assert weights.keys() == truth[2].keys() and SCORE in weights
            for key, value in truth[2].items():
                difference = (weights[key] - value).norm() / value.norm()
                assert difference.item() < 1e-2, (name, key)


def loaded_heads(archive: Path, directory: Path) -> list[torch.Tensor]:
    """The score heads of sharded trainers that start from an archive in bf16."""
    heads = []
    for name in ("fsdp", "tensor"):
        overrides = (*PLACEMENTS[name], f"model.archive={archive}", "model.policy_dtype=bfloat16")
        trainer = make_trainer(("llama", "reward", overrides), directory / name)
        heads.append(full_tensor(trainer.policy.score.weight).detach().clone())
    return heads


@pytest.mark.slow
def test_sharded_trainers_start_with_the_head_in_fp32(tmp_path: Path) -> None:
    (tmp_path / "start").mkdir()
    make_trainer(("llama", "reward", ("model.policy_dtype=bfloat16", "n_epochs=1")), tmp_path / "start").train()
    head = load_file(tmp_path / "start" / "LATEST" / "model.safetensors")[SCORE]
    assert not torch.equal(head.bfloat16().float(), head)
    for heads in on_ranks(2, loaded_heads, tmp_path / "start", tmp_path):
        assert all(torch.equal(each, head) for each in heads)


@pytest.mark.slow
def test_the_world_size_changes_no_bit_of_a_deterministic_run(tmp_path: Path) -> None:
    (one,) = on_ranks(1, runs_and_evaluations, ["deterministic"], tmp_path / "one")
    two = on_ranks(2, runs_and_evaluations, ["deterministic"], tmp_path / "two")[0]
    (losses, _, weights), (losses_of_two, _, weights_of_two) = one[0][0], two[0][0]
    assert torch.equal(losses, losses_of_two)
    assert all(torch.equal(weights[name], weights_of_two[name]) for name in weights)


# ---- The embedded example ----


@pytest.mark.slow
def test_the_embedded_example_finds_the_true_reward(program: Program) -> None:
    """On 512 held-out pairs: at least 95 % in order, and a rank correlation of 0.9."""
    run = program.ok("+experiment=demo_reward", defaults=("wandb.enabled=false", "report=null"))
    saved = load_saved(str(run.dir))
    use_packed_attention(saved.model.eval())
    scorer = Scorer(saved.model, saved.tokenizer, layout="packed", max_length=512, max_prompt_length=256)
    rows = film_rows("test")
    scores = scorer.scores([ParsedRow(r["prompt"], r["prompt"], [r["chosen"], r["rejected"]], []) for r in rows])
    assert sum(chosen > rejected for chosen, rejected in scores) >= 0.95 * len(rows) == 0.95 * 512
    truth = [film_reward(row[role]) for row in rows for role in ("chosen", "rejected")]

    def ranks(values: list[float]) -> torch.Tensor:
        each = torch.tensor(values, dtype=torch.float64)
        below, equal = (each[:, None] > each).sum(1), (each[:, None] == each).sum(1)
        return below + (equal - 1) / 2

    found = [score for pair in scores for score in pair]
    assert torch.corrcoef(torch.stack([ranks(found), ranks(truth)]))[0, 1].item() >= 0.9
