"""keep_best: the best checkpoint is kept, and compared with evaluations of the same kind."""

import json
from pathlib import Path
from typing import Any

import pytest

from engine.export.saved_models import load_saved
from engine.run.best import BestCheckpoint, settings_of_metric
from tests.configs import make_settings
from tests.models import pair_examples
from tests.runs import Program


@pytest.mark.parametrize("count, starts_anew", [(4, False), (3, True)])
def test_the_best_is_compared_over_the_same_examples(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], count: int, starts_anew: bool
) -> None:
    examples = pair_examples()
    first = BestCheckpoint("loss/eval", examples[:4], {})
    assert first.update({"loss/eval": 0.1}, "step-4")
    (tmp_path / "step-4").mkdir()
    resumed = BestCheckpoint("loss/eval", examples[:count], {})
    resumed.resume(first.record, {}, tmp_path, is_first_rank=True)
    assert ("starts anew" in capsys.readouterr().out) == starts_anew
    assert resumed.update({"loss/eval": 0.2}, "step-8") == starts_anew


def test_the_best_is_compared_under_the_same_loss(program: Program) -> None:
    """A smaller beta gives smaller margins: compared with them, the old checkpoint would stay the best."""
    common = ("loss=dpo", "lr=0.1", "optimizer=SGD", "eval_every=8", "keep_best=rewards_eval/margins")
    run = program.ok(*common, "loss.beta=0.1", "n_examples=8")
    changed = ("n_examples=16", "resume=auto", "resume_allow=[n_examples,loss.beta]", f"local_run_dir={run.dir}")
    resumed = program.ok(*common, "loss.beta=1e-3", *changed)
    assert "keep_best: the comparison starts anew, as loss.beta was 0.1 and is 0.001" in resumed.out
    assert run.evals[-1]["rewards_eval/margins"] < run.evals[-2]["rewards_eval/margins"]
    assert (run.dir / "BEST").resolve().name == "step-16"


LOSS, PROMPTS = {"loss.name": "dpo", "loss.beta": 0.1}, {"n_eval_model_samples": 4}


@pytest.mark.parametrize(
    "metric, now, notice",
    [
        ("loss/eval", LOSS, ""),
        ("loss/eval", {"loss.name": "ipo", "loss.beta": 0.2}, "loss.name was dpo and is ipo, loss.beta was 0.1 and is"),
        ("ground_truth/policy", PROMPTS, ""),
        ("ground_truth/policy", {"n_eval_model_samples": 2}, "n_eval_model_samples was 4 and is 2"),
    ],
)
@pytest.mark.parametrize("is_old", [False, True])
def test_the_best_is_compared_under_the_same_settings(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], metric: Any, now: dict[str, Any], notice: str, is_old: bool
) -> None:
    examples, run_settings = pair_examples(), LOSS | PROMPTS
    (tmp_path / "step-4").mkdir()
    first = BestCheckpoint(metric, examples, LOSS if metric == "loss/eval" else PROMPTS)
    assert first.update({metric: 0.5}, "step-4")
    if is_old:  # of a version without the settings
        del first.record["measured_with"]
    resumed = BestCheckpoint(metric, examples, now)
    resumed.resume(first.record, run_settings, tmp_path, is_first_rank=True)
    said = capsys.readouterr().out
    assert notice in said if notice else not said
    assert bool(resumed.record) == (not notice)


@pytest.mark.parametrize("loss, depends", [("loss=aot", True), ("loss=kto", True), ("loss=ipo loss.beta=0.1", False)])
def test_losses_of_the_whole_batch_are_compared_at_one_batch_size(loss: str, depends: bool) -> None:
    few, many = (
        settings_of_metric(make_settings(*loss.split(), "keep_best=loss/eval", f"eval_batch_size={size}"))
        for size in (2, 4)
    )
    assert (few != many) == depends


DPO = ("loss=dpo", "loss.beta=0.1")
ONLINE = ("loss=grpo", "keep_best=rewards_eval/sampled", "rewards=[length]")


@pytest.mark.parametrize(
    ("setting", "depends"),
    [
        ("reward_options={length:{most:9}}", True),
        ("reward_weights=[2]", True),
        ("reward_clip=1", True),
        ("on_bad_reward=drop", True),
        ("rewards=[length,exact_match]", True),
        ("rollout.temperature=0.5", True),
        ("rollout.missing_eos_penalty=1", True),
        ("rollout.max_new_tokens=7", True),
        ("max_prompt_length=7", True),
        ("loss.beta=0.5", False),
        ("rollout.num_responses=3", False),
        ("rollout.engine=continuous", False),
        ("rollout.offload=true", False),
        ("n_eval_model_samples=3", False),
    ],
)
def test_rewards_are_compared_under_the_same_settings(setting: str, depends: bool) -> None:
    before, now = (settings_of_metric(make_settings(*ONLINE, *more)) for more in ((), (setting,)))
    assert (before != now) == depends


@pytest.mark.parametrize(
    ("setting", "depends"), [("reward_weights=[2]", False), ("rollout.temperature=0.5", True), ("loss.beta=1", False)]
)
def test_the_distance_of_online_runs_is_compared_at_one_temperature(setting: str, depends: bool) -> None:
    common = (*ONLINE, "keep_best=kl_eval")
    before, now = (settings_of_metric(make_settings(*common, *more)) for more in ((), (setting,)))
    assert (before != now) == depends


def test_a_ground_truth_is_needed_before_models_load(program: Program, tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"{i}?", "chosen": "a", "rejected": "b"}) + "\n" for i in range(9)))
    run = program(
        *DPO,
        f"datasets={path}",
        "test_fraction=0.3",
        "keep_best=ground_truth/policy",
        "sample_during_eval=true",
        "n_eval_model_samples=2",
    )
    assert run.status == 2 and "keep_best: ground_truth/policy needs a data set with a ground truth" in run.err
    assert "parameters:" not in run.out


def test_the_best_checkpoint_is_kept(program: Program) -> None:
    command = ("loss=dpo", "loss.beta=0.1", "peft=lora", "peft.rank=4", "lr=1", "optimizer=SGD", "eval_every=4",
               "n_examples=16", "n_eval_examples=4", "keep_checkpoints=1")  # fmt: skip
    result = program.ok(*command, "keep_best=rewards_eval/margins", f"local_run_dir={program.directory / 'a'}")
    values = {row["counters/examples"]: row["rewards_eval/margins"] for row in result.evals[1:]}
    best = max(values, key=lambda examples: values[examples])
    assert (result.dir / "BEST").resolve().name == f"step-{best}"
    assert {path.name for path in result.dir.glob("step-*")} == {f"step-{best}", "step-16"}
    load_saved(str(result.dir / "BEST"))
    state = json.loads((result.dir / "BEST" / "training_state.json").read_text())
    expected = {"metric": "rewards_eval/margins", "value": values[best], "checkpoint": f"step-{best}"}
    assert len(state["best"].pop("evaluated")) > 8  # a hash of the examples
    assert state["best"].pop("measured_with")["loss.beta"] == 0.1
    assert state["best"] == expected
    lowest = program.ok(*command, "keep_best=loss/eval", f"local_run_dir={program.directory / 'b'}")
    losses = {row["counters/examples"]: row["loss/eval"] for row in lowest.evals[1:]}
    assert (lowest.dir / "BEST").resolve().name == f"step-{min(losses, key=lambda examples: losses[examples])}"
