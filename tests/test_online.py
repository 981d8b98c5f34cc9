"""Online training by the command line: rollouts, rewards, evaluation, and resume to the bit."""

import json
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from engine.data.films import is_well_formed
from engine.run import sampler
from engine.run.rollouts import Rollouts
from engine.run.tensorboard_logger import as_markdown
from engine.run.wandb_logger import Wandb
from rewards import REWARDS
from tests.quick import slow_except
from tests.runs import ONLINE, QUICK, SMALL, copy_stopped, vowels

ONLINE_DEFAULTS = (*SMALL, *QUICK, *ONLINE)


def prompts_file(path: Path, number: int = 24, **columns: Any) -> Path:
    rows = [{"prompt": f"How much is {i}?", "answer": str(i), **columns} for i in range(number)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def without_times(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    noisy = ("time/", "per_second", "peak_memory")
    return [{key: value for key, value in row.items() if not any(part in key for part in noisy)} for row in rows]


def weights_of(directory: Path, step: int) -> dict[str, torch.Tensor]:
    return load_file(directory / f"step-{step}" / "model.safetensors")


def test_metrics_and_samples(online):
    run = online()
    assert run.status == 0, run.err
    assert "training on 16 prompts in 4 steps of 4; 3 responses to each of 4 prompts at a time, learned once" in run.out
    first = run.steps[0]
    assert first["policy/ratio_max"] == 1 and first["policy/approxkl"] == 0 == first["policy/clipfrac"]
    assert first["objective/kl"] == 0
    assert first["objective/scores"] == first["rewards_train/vowels"]
    assert first["objective/rlhf_reward"] == first["objective/scores"]
    assert first["objective/kl_coef"] == 0.04
    assert first["rollout/length_max"] <= 8
    assert all(row["policy/ratio_max"] == 1 for row in run.steps)  # each iteration is one batch
    assert run.steps[-1]["objective/kl"] != 0
    before, after = (row for row in run.metrics if "rewards_eval/sampled" in row)
    assert before["kl_eval"] == 0 != after["kl_eval"]
    assert before["kl_eval/standard_error"] == 0 < after["kl_eval/standard_error"]
    assert 1 <= before["samples_eval/length"] <= 8
    assert before["samples_eval/length_change"] == 0 == before["samples_eval/unfinished_change"]
    assert {"rewards_eval/greedy", "rewards_eval/vowels", "rollout_eval/truncated"} <= set(after)
    evaluated = [row for row in run.samples if "policy" in row]
    assert len(evaluated) == 2 * 2
    for row in evaluated:
        assert row["policy_reward"] == vowels("", row["policy"], {})
        assert row["reference_reward"] == vowels("", row["reference"], {})
    assert [row["policy"] for row in evaluated[:2]] == [row["reference"] for row in evaluated[:2]]
    trained = [row for row in run.samples if "response" in row]
    assert len(trained) == 4 * 3  # the group of the first prompt of each iteration
    assert all(row["reward"] == vowels("", row["response"], {}) for row in trained)
    page = (Path(__file__).parent.parent / "docs" / "metrics.md").read_text(encoding="utf-8")
    logged = {name.replace("/vowels", "/NAME") for row in run.metrics for name in row}
    assert {name for name in logged if f"`{name}`" not in page} == set()


OTHERS = ["dr_grpo", "dapo", "rloo", "reinforce_pp", "remax", "online_dpo", "xpo", "best_of_n"]


@pytest.mark.parametrize(("loss", "batching"), [*((loss, "packed") for loss in OTHERS), ("grpo", "padded")])
def test_every_loss_trains(online, loss, batching):
    pairs = ["rollout.num_responses=2"] if loss == "xpo" else []
    run = online(f"loss={loss}", f"batching={batching}", "rollout.temperature=0.8", "rollout.epochs=2", *pairs)
    assert run.status == 0, run.err
    assert [row["policy/ratio_max"] == 1 for row in run.steps] == [True, False, True, False]
    weights = [weights_of(run.dir, 16)["model.embed_tokens.weight"]]
    assert weights[0].isfinite().all()


@pytest.mark.parametrize("peft", [(), pytest.param(("peft=lora", "peft.rank=4"), marks=pytest.mark.slow)])
def test_xpo_compares_a_response_of_the_policy_with_one_of_the_reference(online, peft):
    settings = ("loss=xpo", "rollout.num_responses=2", "do_first_eval=false", "warmup_steps=0", *peft)
    still, moving = (online(*settings, f"lr={lr}") for lr in (0, 0.05))
    for run in (still, moving):
        assert run.status == 0, run.err

    def responses(run, is_of_reference):
        rows = [row for row in run.samples if "response" in row]
        assert [row["is_of_reference"] for row in rows] == [False, True] * 4
        return [row["response"] for row in rows if row["is_of_reference"] == is_of_reference]

    assert responses(still, True) == responses(moving, True)
    assert responses(still, False) != responses(still, True)  # other random numbers
    assert responses(still, False)[0] == responses(moving, False)[0]
    assert responses(still, False)[2:] != responses(moving, False)[2:]
    assert moving.steps[-1]["rollout/left_out"] < 8
    assert moving.steps[0]["objective/kl"] == 0 != moving.steps[-1]["objective/kl"]


@pytest.mark.slow
def test_online_dpo_of_another_pair_loss(online):
    settings = ("loss=online_dpo", "rollout.num_responses=2")
    runs = [
        online(*settings, f"loss.pair_loss={name}", f"loss.pair_options={options}")
        for name, options in (("dpo", "null"), ("dpo", "{label_smoothing:0.3}"), ("simpo", "{gamma:1.0}"))
    ]
    for run in runs:
        assert run.status == 0, run.err
    plain, smoothed, free = (run.steps[-1] for run in runs)
    assert plain["loss/train"] != smoothed["loss/train"]
    assert "objective/kl" in plain and "objective/kl" not in free


def test_passes_and_minibatches(online):
    """An iteration of 8 prompts in batches of 4, twice: its first batch alone is on-policy."""
    run = online("rollout.prompts=8", "rollout.epochs=2", "n_examples=32", "max_grad_norm=1000")
    assert run.status == 0, run.err
    assert (
        "training on 16 prompts in 8 steps of 4; 3 responses to each of 8 prompts at a time, learned 2 times" in run.out
    )
    assert [row["policy/ratio_max"] == 1 for row in run.steps] == ([True] + [False] * 3) * 2
    assert ["objective/scores" in row for row in run.steps] == ([True] + [False] * 3) * 2
    assert [row["counters/examples"] for row in run.steps] == [*range(4, 33, 4)]


@pytest.mark.parametrize(
    ("step", "settings"),
    [
        pytest.param(8, ("rollout.prompts=8", "rollout.epochs=2"), marks=pytest.mark.slow),  # between the passes
        (12, ("rollout.prompts=8", "rollout.epochs=2", "loss=rloo", "loss.beta=0.2")),  # inside a pass
        pytest.param(  # between iterations
            16, ("rollout.prompts=8", "rollout.epochs=2", "loss=dapo", "loss.beta=0"), marks=pytest.mark.slow
        ),
    ],
)
def test_a_resumed_run_is_bitwise_the_same(online, tmp_path, step, settings):
    settings = (*settings, "n_examples=24", "save_every=4", "keep_checkpoints=null", "do_first_eval=false")
    whole = online(*settings)
    assert whole.status == 0, whole.err
    has_rollouts = (whole.dir / f"step-{step}" / "rollouts.npz").exists()
    assert has_rollouts == (step != 16)
    copy_stopped(whole, tmp_path / "resumed", step)
    resumed = online(*settings, f"local_run_dir={tmp_path / 'resumed'}", "resume=auto")
    assert resumed.status == 0, resumed.err
    expected, found = (weights_of(run.dir, 24) for run in (whole, resumed))
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert without_times(resumed.metrics) == without_times(whole.metrics)
    assert resumed.samples == whole.samples


@pytest.mark.slow
def test_a_longer_run_continues_a_short_last_iteration(online, tmp_path):
    settings = ("rollout.prompts=8", "do_first_eval=false", f"local_run_dir={tmp_path / 'run'}")
    assert online(*settings, "n_examples=12").status == 0
    run = online(*settings, "n_examples=20", "resume=auto", "resume_allow=[n_examples]")
    assert run.status == 0, run.err
    assert [row["counters/examples"] for row in run.steps] == [4, 8, 12, 16, 20]
    # A new iteration, of 8 prompts.
    assert ["objective/scores" in row for row in run.steps] == [True, False, True, True, False]


@pytest.mark.slow
@pytest.mark.parametrize("num_first", [20, 13])  # inside an iteration, and inside a pass
def test_an_extended_run_is_bitwise_the_same_after_a_kill(online, tmp_path, num_first):
    settings = ("rollout.prompts=8", "rollout.epochs=2", "save_every=4", "keep_checkpoints=null", "do_first_eval=false")
    first = online(*settings, f"n_examples={num_first}")
    assert first.status == 0, first.err
    extended = (*settings, "n_examples=44", "resume=auto", "resume_allow=[n_examples]")
    shutil.copytree(first.dir, tmp_path / "whole", symlinks=True)
    whole = online(*extended, f"local_run_dir={tmp_path / 'whole'}")
    assert whole.status == 0, whole.err
    assert whole.steps[-1]["counters/examples"] == 44
    steps = [int(path.parent.name.removeprefix("step-")) for path in whole.dir.glob("step-*/rollouts.npz")]
    step = min(step for step in steps if step > num_first)
    copy_stopped(whole, tmp_path / "resumed", step)
    resumed = online(*extended, f"local_run_dir={tmp_path / 'resumed'}")
    assert resumed.status == 0, resumed.err
    expected, found = (weights_of(run.dir, 44) for run in (whole, resumed))
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert without_times(resumed.metrics) == without_times(whole.metrics)


def test_damaged_rollouts(online, tmp_path):
    settings = ("rollout.prompts=8", "n_examples=8", "save_every=4", "keep_checkpoints=null", "do_first_eval=false")
    whole = online(*settings)
    copy_stopped(whole, tmp_path / "copy", 4)
    (tmp_path / "copy" / "step-4" / "rollouts.npz").write_bytes(b"no archive")
    run = online(*settings, f"local_run_dir={tmp_path / 'copy'}", f"resume={tmp_path / 'copy' / 'step-4'}")
    assert run.status == 4 and run.err.startswith("error[CHECKPOINT]"), run.err


def test_prompts_of_a_file_and_the_number_of_their_row(online, tmp_path):
    path = prompts_file(tmp_path / "questions.jsonl")
    run = online(f"datasets={path}", "rewards=[number_match,length]", "reward_weights=[1,0.5]", "test_fraction=0.3")
    assert run.status == 0, run.err
    first = run.steps[0]
    total = first["rewards_train/number_match"] + 0.5 * first["rewards_train/length"]
    assert first["objective/scores"] == pytest.approx(total)
    assert {"rewards_eval/number_match", "rewards_eval/length"} <= set(run.metrics[-1])


def test_without_samples_nothing_is_evaluated(online):
    run = online("sample_during_eval=false", "eval_every=4")
    assert run.status == 0, run.err
    assert run.metrics == run.steps and len(run.steps) == 4
    best = online("sample_during_eval=false", "keep_best=rewards_eval/sampled")
    assert best.status == 2 and "rewards_eval/sampled is measured on samples: sample_during_eval=true" in best.err


def test_the_time_of_training_is_of_an_iteration(online, monkeypatch):
    """Two steps an iteration. Their seconds are logged with the second, and hold neither sampling nor evaluation."""

    def slow(prompt: str, response: str, row: Any) -> float:
        time.sleep(0.05)
        return vowels(prompt, response, row)

    monkeypatch.setitem(REWARDS, "vowels", slow)
    run = online("rollout.epochs=2", "eval_every=4", "n_eval_examples=4")
    assert run.status == 0, run.err
    assert ["time/train" in row for row in run.steps] == [False, True, False, True]
    for first, last in zip(run.steps[0::2], run.steps[1::2], strict=True):
        assert first["time/reward"] > 0.6  # of 12 responses
        assert 0 < last["time/train"] < 0.6


@pytest.mark.slow
def test_tensorboard_and_wandb_get_every_iteration_and_its_samples(online, monkeypatch):
    """However short iterations are. Tables of samples keep to the interval."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tables: list[tuple[str, int, list[str]]] = []
    monkeypatch.setattr(
        Wandb, "__init__", lambda self, *arguments: self.__dict__.update(_run=self, _wandb=self, _rows=[])
    )
    monkeypatch.setattr(Wandb, "Table", lambda self, columns, data: columns, raising=False)
    monkeypatch.setattr(Wandb, "close", lambda self, is_done: None)

    def log(self: Wandb, values: dict[str, Any], step: int) -> None:
        tables.extend(
            (name, step, value) for name, value in values.items() if "samples" in name and "_eval" not in name
        )

    monkeypatch.setattr(Wandb, "log", log)
    settings = ("tensorboard=true", "wandb.enabled=true", "rollout.prompts=8", "n_examples=32")
    for interval, num_tables in ((0, 4), (1000, 1)):
        run = online(*settings, f"minimum_log_interval_secs={interval}")
        assert run.status == 0, run.err
        events = EventAccumulator(str(run.dir / "tensorboard"))
        events.Reload()
        scores = [(row["counters/examples"], row["objective/scores"]) for row in run.steps if "objective/scores" in row]
        logged = [(event.step, event.value) for event in events.Scalars("objective/scores")]
        assert logged == [(step, pytest.approx(value)) for step, value in scores] and len(logged) == 4
        texts = events.Tensors("training_samples/text_summary")
        assert [event.step for event in texts] == [0, 8, 16, 24][:num_tables]
        response = next(row["response"] for row in run.samples if "response" in row)
        assert as_markdown(response) in texts[0].tensor_proto.string_val[0].decode()
        columns = ["examples", "prompt", "response", "reward", "reward/vowels"]
        assert [each for each in tables if each[0] == "training_samples"] == [
            ("training_samples", step, columns) for step in (0, 8, 16, 24)[:num_tables]
        ]
        tables.clear()


def test_prompts_that_are_equal_once_truncated_are_logged_once(online, tmp_path):
    path = prompts_file(tmp_path / "questions.jsonl")  # all end in "?"
    run = online(f"datasets={path}", "max_prompt_length=1", "sample_during_eval=true", "n_examples=4")
    assert run.status == 0, run.err
    logged = [row for row in run.samples if "policy" in row]
    assert len(logged) == 2 and all("reference" in row for row in logged)  # one in each evaluation


def no_model(monkeypatch):
    """Loading a model fails the test."""
    monkeypatch.setattr("engine.placement.placement.Placement.place_model", lambda *args: pytest.fail("a model"))


def test_a_missing_column_is_found_before_models_load(online, tmp_path, monkeypatch):
    no_model(monkeypatch)
    path = prompts_file(tmp_path / "questions.jsonl")
    path.write_text(path.read_text() + json.dumps({"prompt": "How much is it?"}) + "\n")
    run = online(f"datasets={path}", "rewards=[exact_match]")
    assert run.status == 3
    assert "rewards: exact_match needs the column answer, and 1 of 25 rows lack it" in run.err
    assert "the prompt ...'How much is it?'" in run.err and run.err.count("\n") == 1
    for more in ((), ("on_bad_reward=drop",)):  # no row has it
        run = online(f"datasets={path}", "rewards=[regular_expression]", *more)
        assert run.status == 3 and "needs the column pattern, and 25 of 25 rows lack it" in run.err


def test_an_option_or_on_bad_reward_replaces_a_column(online, tmp_path):
    path = prompts_file(tmp_path / "questions.jsonl")
    options = ("rewards=[regular_expression]", "reward_options={regular_expression:{pattern:'.*e.*'}}", "n_examples=4")
    assert online(f"datasets={path}", *options).status == 0
    path.write_text(path.read_text() + json.dumps({"prompt": "How much is it?"}) + "\n")
    run = online(f"datasets={path}", "rewards=[exact_match]", "on_bad_reward=drop", "n_examples=4")
    assert run.status == 0, run.err


def test_a_missing_package_is_found_before_models_load(online, tmp_path, monkeypatch):
    no_model(monkeypatch)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: pytest.fail(name) if name != "jsonschema" else None)
    path = prompts_file(tmp_path / "questions.jsonl", schema={"type": "object"})
    run = online(f"datasets={path}", "rewards=[valid_json]")
    assert run.status == 2
    assert "valid_json needs the package jsonschema for rows with the column schema" in run.err


def test_failed_rewards_are_counted_and_warned_of(online, monkeypatch):
    def fails_for_some(prompt: str, response: str, row: Any) -> float:
        if len(response) % 2:
            raise ValueError("an odd length")
        return vowels(prompt, response, row)

    monkeypatch.setitem(REWARDS, "vowels", fails_for_some)
    run = online("on_bad_reward=drop", "batch_size=1", "n_examples=8", "rollout.num_responses=4")
    assert run.status == 0, run.err
    for row in run.steps:  # samples.jsonl has the whole group of the only prompt
        rows = [each for each in run.samples if "response" in each]
        group = [each for each in rows if each["examples"] == row["counters/examples"] - 1]
        assert row["rollout/bad_rewards"] == sum(each["reward"] is None for each in group)
    assert sum(row["rollout/bad_rewards"] for row in run.steps) > 0
    assert run.out.count("rewards of an iteration failed, and their responses are left out") == 1


def test_a_batch_without_responses_leaves_the_policy_as_it_is(online, monkeypatch):
    """Not even momentum and weight decay move it."""
    run = online("optimizer=AdamW", "save_every=4", "keep_checkpoints=null", "loss=online_dpo", "n_examples=8")
    assert run.status == 0, run.err
    monkeypatch.setitem(REWARDS, "vowels", lambda prompt, response, row: 1.0)
    overrides = ("n_examples=16", "resume_allow=[n_examples]", f"resume={run.dir}", f"local_run_dir={run.dir}")
    idle = online("optimizer=AdamW", "save_every=4", "keep_checkpoints=null", "loss=online_dpo", *overrides)
    assert idle.status == 0, idle.err
    assert [row["rollout/left_out"] for row in idle.steps[-2:]] == [12, 12]
    before, learned, after = (weights_of(run.dir, step) for step in (4, 8, 16))
    assert any(not torch.equal(before[name], learned[name]) for name in before)
    assert all(torch.equal(after[name], learned[name]) for name in learned)


def test_none_leaves_a_response_out(online, monkeypatch):
    monkeypatch.setitem(REWARDS, "vowels", lambda prompt, response, row: 1.0 if len(response) % 2 else None)
    run = online()
    assert run.status == 0, run.err
    assert sum(row["rollout/left_out"] for row in run.steps) > 0


def test_remax_needs_the_reward_of_the_most_likely_response(online, monkeypatch):
    """Without it a prompt is left out: it has no baseline."""
    monkeypatch.setitem(REWARDS, "vowels", lambda prompt, response, row: 1.0 if len(response) % 2 else None)
    run = online("loss=remax", "rollout.num_responses=3", "n_examples=32")
    assert run.status == 0, run.err
    assert {row["rollout/left_out"] % 3 for row in run.steps} != {0}  # single responses
    assert max(row["rollout/left_out"] for row in run.steps) >= 3  # and whole groups


def test_single_responses_are_no_groups(online):
    run = online("loss=remax", "rollout.num_responses=1", "n_examples=4")
    assert run.status == 0, run.err
    assert not {"rollout/zero_std_groups", "rollout/distinct"} & run.steps[0].keys()
    assert run.steps[0]["rollout/left_out"] == 0


def test_groups_of_equal_rewards_are_sampled_again(online, monkeypatch):
    monkeypatch.setitem(REWARDS, "vowels", lambda prompt, response, row: float(vowels("", response, {}) > 0.4))
    kept, left_out = online(), online("rollout.max_resamples=0")
    again = online("rollout.max_resamples=4", "sample_during_eval=true")
    for run in (kept, left_out, again):
        assert run.status == 0, run.err
    first, without, resampled = (run.steps[0] for run in (kept, left_out, again))
    assert first["rollout/left_out"] == 0 <= resampled["rollout/left_out"] < without["rollout/left_out"]
    assert resampled["rollout/resampled_groups"] > 0
    # Metrics of the policy are of its first responses: those sampled again are a selection.
    for name in ("objective/scores", "rewards_train/vowels", "rollout/zero_std_groups", "rollout/length_mean"):
        assert first[name] == without[name] == resampled[name]
    sampled = [row["rollout/tokens_per_second"] * row["time/generate"] for row in (first, resampled)]
    assert sampled[0] == pytest.approx(12 * first["rollout/length_mean"])
    assert sampled[1] > 1.1 * sampled[0]


@pytest.mark.parametrize("loss", slow_except(["dapo", "online_dpo"], "online_dpo"))
def test_scores_of_all_responses_where_groups_are_left_out(online, monkeypatch, loss):
    """Rewards of 0 and 1: the groups of two that are learned have a mean of 0.5, whatever the policy does."""
    monkeypatch.setitem(REWARDS, "vowels", lambda prompt, response, row: float(vowels("", response, {}) > 0.3))
    every_group, learned_groups = (
        online(f"loss={each}", "rollout.num_responses=2", "n_examples=4") for each in ("grpo", loss)
    )
    assert learned_groups.status == 0, learned_groups.err
    assert learned_groups.steps[0]["objective/scores"] == every_group.steps[0]["objective/scores"] != 0.5


@pytest.mark.parametrize("loss", slow_except(["grpo", "ppo"], "grpo"))
def test_a_group_larger_than_the_budget_is_cut(online, loss):
    """No microbatch exceeds the budget, and the counts are of whole prompts. Log-probs are those of the parts."""
    settings = ("rollout.num_responses=12", "rollout.epochs=2", "n_examples=8", "model.policy_dtype=float64")
    whole, cut = (online(f"loss={loss}", *settings, f"token_budget={budget}") for budget in (4096, 64))
    assert cut.status == 0, cut.err
    assert [row["policy/ratio_max"] == 1 for row in cut.steps] == [True, False]
    for row, expected in zip(without_times(cut.steps), without_times(whole.steps), strict=True):
        assert row == pytest.approx(expected, rel=1e-5, abs=1e-8)
    first, second = (weights_of(run.dir, 8) for run in (whole, cut))
    for name in first:
        torch.testing.assert_close(first[name], second[name], rtol=0, atol=1e-6)


def test_a_rollback_samples_the_rest_of_an_iteration_again(online, monkeypatch):
    """The policy goes back to the one of step 12. That of step 16 has sampled the iteration."""
    num_scored = 0

    def overflows_once(prompt: str, response: str, row: Any) -> float:
        nonlocal num_scored
        num_scored += 1
        return 1e200 if num_scored == 50 else vowels(prompt, response, row)  # in the first batch of iteration 3

    monkeypatch.setitem(REWARDS, "vowels", overflows_once)
    run = online(
        *("loss=dr_grpo", "rollout.prompts=8", "n_examples=24", "save_every=12", "do_first_eval=false"),
        *("on_nonfinite=rollback", "max_nonfinite=2", "max_grad_norm=1000"),
    )
    assert run.status == 0, run.err
    assert "rolled back to step-12" in run.out
    assert [row["counters/examples"] for row in run.steps] == [4, 8, 12, 16, 24]
    assert run.steps[-1]["policy/ratio_max"] == 1


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["online_dpo", "best_of_n"])
def test_the_first_ratio_is_1_where_responses_are_left_out(online, loss):
    """Log-probs come from the microbatches of training, which have fewer responses than were sampled."""
    run = online(f"loss={loss}", "rollout.num_responses=8", "batch_size=8", "n_examples=96", "n_eval_examples=2")
    assert run.status == 0, run.err
    assert {row["policy/ratio_max"] for row in run.steps} == {1}
    assert {row["policy/approxkl"] for row in run.steps} == {0}


def test_truncated_responses(online):
    kept, masked = online("rollout.max_new_tokens=2"), online("rollout.max_new_tokens=2", "rollout.truncated=mask")
    penalised = online("rollout.max_new_tokens=2", "rollout.missing_eos_penalty=1")
    assert kept.steps[0]["rollout/truncated"] > 0.9
    assert masked.steps[0]["tokens_per_second"] < kept.steps[0]["tokens_per_second"]
    assert abs(masked.steps[0]["loss/train"]) <= abs(kept.steps[0]["loss/train"])
    difference = kept.steps[0]["objective/scores"] - penalised.steps[0]["objective/scores"]
    assert difference == pytest.approx(kept.steps[0]["rollout/truncated"])
    assert penalised.steps[0]["rewards_train/vowels"] == kept.steps[0]["rewards_train/vowels"]


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        (["reference=cached"], "reference: cached keeps log-probs of stored responses"),
        (["rollout.num_responses=1"], "rollout.num_responses: must be at least 2 with loss=grpo"),
        (
            ["loss=reinforce_pp", "loss.baseline=group", "rollout.num_responses=1"],
            "rollout.num_responses: must be at least 2",
        ),
        (["loss=remax", "rollout.max_resamples=1"], "rollout.max_resamples: must be null with loss=remax, not 1"),
        (["loss=reinforce_pp", "rollout.max_resamples=0"], "with loss=reinforce_pp loss.baseline=batch, not 0"),
        (["rewards=[]"], "rewards: must be null or a list of names such as"),
        (["reward_weights=[0]"], "reward_weights: are all 0, so no reward counts"),
        (
            ["rewards=[length]", "reward_options={length:{most:few}}"],
            'reward_options: length.most must be an integer, not "few"',
        ),
        (["rewards=[length]", "reward_options={length:9}"], "reward_options: give length 9, and it takes least, most"),
        (
            ["rewards=[truth]", "reward_options={truth:{a:1}}"],
            "rewards: names truth, and the rewards are ground_truth, ",
        ),
        (
            ["keep_best=kl_eval", "loss.beta=0"],
            "keep_best: kl_eval is a distance to the reference, and loss=grpo has none",
        ),
        (
            ["loss=best_of_n", "keep_best=kl_eval"],
            "kl_eval is a distance to the reference, and loss=best_of_n has none",
        ),
        (["rollout.top_p=0.9"], "rollout.top_p: must be 1 with loss=grpo, not 0.9"),
        (["rollout.prompts=6"], "rollout.prompts: must be a multiple of batch_size (4), not 6"),
        (["rewards=[truth]"], "rewards: names truth, and the rewards are ground_truth, "),
        (["rewards=[length]", "reward_options={length:{longest:3}}"], "give length longest, and it takes least, most"),
        (["reward_weights=[1,2]"], "reward_weights: must have one number for each of rewards (1), not 2"),
        (["keep_best=loss/eval"], "keep_best: loss/eval is not measured with loss=grpo"),
        (["loss=online_dpo", "rollout.truncated=mask"], "mask would leave pairs of loss=online_dpo with one response"),
        (["loss=xpo", "rollout.truncated=mask"], "mask would leave pairs of loss=xpo with one response"),
        (["loss=xpo", "rollout.num_responses=4"], "must be 2 with loss=xpo, not 4: one of the policy and one of the"),
        (["peft=lora", "peft.dropout=0.1"], "peft.dropout: must be 0 with loss=grpo, not 0.1"),
        (["rollout.max_new_tokens=64"], "rollout.max_new_tokens: must be below max_length (64)"),
    ],
)
def test_wrong_settings(online, settings, problem):
    run = online(*settings)
    assert run.status == 2
    assert problem in run.err


def test_the_most_likely_tokens_alone_are_learned(online):
    """A tiny top_p samples the most likely response again and again; evaluations sample from the full softmax."""
    run = online("loss=best_of_n", "rollout.top_p=0.000001", "n_examples=4", "warmup_steps=0")
    assert run.status == 0, run.err
    assert run.steps[0]["rollout/distinct"] == pytest.approx(1 / 3)
    evaluated = next(row for row in run.metrics if "rewards_eval/sampled" in row)
    assert evaluated["rewards_eval/sampled"] != evaluated["rewards_eval/greedy"]


def test_the_best_checkpoint(online):
    run = online("keep_best=rewards_eval/sampled", "eval_every=4", "keep_checkpoints=1", "do_first_eval=false")
    assert run.status == 0, run.err
    rewards = {row["counters/examples"]: row["rewards_eval/sampled"] for row in run.metrics if "kl_eval" in row}
    assert (run.dir / "BEST").resolve().name == f"step-{max(rewards, key=lambda step: rewards[step])}"


@pytest.mark.slow
def test_an_evaluation_without_rewards_is_not_the_best(online, monkeypatch):
    make, is_training = Rollouts.make, False

    def make_in_training(self, first_prompt, prompts):
        nonlocal is_training
        is_training = True
        examples = make(self, first_prompt, prompts)
        is_training = False
        return examples

    monkeypatch.setattr(Rollouts, "make", make_in_training)
    monkeypatch.setitem(REWARDS, "vowels", lambda *args: len(args[1]) if is_training else None)
    run = online("keep_best=rewards_eval/greedy", "n_examples=8", "eval_every=4")
    assert run.status == 0, run.err
    assert "keep_best: this evaluation has no rewards_eval/greedy, as no response has a reward" in run.out
    assert not (run.dir / "BEST").exists()


@pytest.mark.slow
def test_the_demo_raises_the_reward(program):
    """The goal of the demo: praise in nearly all responses, at a small distance from the SFT model."""
    sft = program.ok("+experiment=demo_sft", "sample_during_eval=false", "do_first_eval=false", defaults=())
    run = program.ok("+experiment=demo_grpo", f"model.archive={sft.dir}", defaults=())
    last = run.metrics[-1]
    assert last["rewards_eval/sampled"] >= 0.9
    assert last["kl_eval"] <= 2.5
    responses = [row["policy"] for row in run.samples if "policy" in row and row["examples"] == 1600]
    assert len(responses) == 512
    assert sum(map(is_well_formed, responses)) >= 0.97 * 512


def test_rewards_are_needed(online, tmp_path, monkeypatch):
    path = prompts_file(tmp_path / "questions.jsonl")
    with monkeypatch.context() as patches:
        no_model(patches)
        run = online(f"datasets={path}", "rewards=null")
    assert run.status == 2
    assert "rewards: null is the ground truth of the data set" in run.err
    assert online("rewards=null", "n_examples=4").status == 0  # films has one


def test_responses_to_learn_are_of_the_model_in_training(online, monkeypatch):
    """In mixed precision its layers run in bf16; evaluations run the weights as they are."""
    dtypes: dict[int, set[torch.dtype]] = {}
    original = sampler.Sampler._sample_tokens

    def recorded(self, model, prompts, seeds, num_samples):
        layer = next(module for module in model.modules() if isinstance(module, torch.nn.Linear))
        hook = layer.register_forward_pre_hook(lambda module, _: dtypes[seeds[0][0]].add(module.weight.dtype))
        dtypes.setdefault(seeds[0][0], set())
        found = original(self, model, prompts, seeds, num_samples)
        hook.remove()
        return found

    monkeypatch.setattr(sampler.Sampler, "_sample_tokens", recorded)
    run = online("mixed_precision=bfloat16", "n_examples=4")
    assert run.status == 0, run.err
    assert dtypes[sampler.TRAINING] == {torch.bfloat16}
    assert dtypes[sampler.EVALUATION] == {torch.float32}


def test_adapters_train(online):
    run = online("peft=lora", "peft.rank=4", "lr=1e-2")
    assert run.status == 0, run.err
    assert run.steps[0]["policy/ratio_max"] == 1
    assert run.steps[0]["objective/kl"] == 0 < np.abs(run.steps[-1]["objective/kl"])
