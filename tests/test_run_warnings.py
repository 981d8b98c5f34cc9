"""Warnings about a run: planted series raise each, clean ones none; so do real runs."""

import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from engine.run.run_warnings import CHECKS, RunWarnings, describe
from engine.settings.keys import all_keys
from engine.settings.schema import WarningSettings
from losses import LOSSES
from tests.configs import make_settings
from tests.runs import Program, Run, stop_after

Row = dict[str, float]
DPO = ("loss=dpo", "loss.beta=0.1")
BATCH, NUM_EXAMPLES = 16, 6400
KL, LENGTH, UNFINISHED = "kl_eval/next_token", "samples_eval/length", "samples_eval/unfinished"


def step(update: int, **values: float) -> Row:
    """A row of a step of a healthy run."""
    row = {"loss/train": math.log(2) if update == 1 else 0.6, "rewards_train/accuracies": 0.7, "grad_norm": 2.0}
    return row | {"counters/examples": BATCH * update, "counters/updates": update} | values


def steps(number: int, **values: float) -> list[Row]:
    return [step(update, **values) for update in range(1, number + 1)]


def evaluation(number: int, values: Row) -> Row:
    counters = {"counters/examples": 100 * number, "counters/updates": 10 * number}
    return {"loss/eval": 0.6, "logratios_eval/chosen": 0.1} | counters | values


def evaluations(**series: Sequence[float]) -> list[Row]:
    """Rows of evaluations, each with one value of every series; __ stands for a slash."""
    names = [name.replace("__", "/") for name in series]
    return [
        evaluation(index, dict(zip(names, values, strict=True)))
        for index, values in enumerate(zip(*series.values(), strict=True))
    ]


def chosen(*values: float) -> list[Row]:
    return evaluations(logratios_eval__chosen=values)


def sampled(name: str, value: float, change: float, error: float) -> list[Row]:
    return [evaluation(1, {name: value, f"{name}_change": change, f"{name}_change/standard_error": error})]


def unfinished(*shares: tuple[float, float]) -> list[Row]:
    """Evaluations of a run without a reference: share and standard error."""
    return [
        evaluation(i, {UNFINISHED: value, f"{UNFINISHED}/standard_error": error})
        for i, (value, error) in enumerate(shares)
    ]


def flat(start: float = math.log(2), end: float = 0.69) -> list[Row]:
    return [step(1, **{"loss/train": start}), *(step(update, **{"loss/train": end}) for update in range(2, 200))]


def clipped(number: int, of: int) -> list[Row]:
    return [step(update, grad_norm=10.0 if update <= number else 9.9) for update in range(1, of + 1)]


def warned(
    rows: Sequence[Row], tmp_path: Path, *overrides: str, num_updates: int = NUM_EXAMPLES // BATCH
) -> list[dict[str, Any]]:
    settings = make_settings(*DPO, f"batch_size={BATCH}", "max_grad_norm=10", *overrides)
    warnings = RunWarnings(settings, NUM_EXAMPLES, num_updates, tmp_path)
    return [warning for row in rows for warning in warnings.see(row)]


PLANTED = {
    "chosen_falls": [chosen(0, -1, -2, -3), chosen(-1, -2, -3), chosen(0.5, 1, -1, -2, -3)],
    "early_accuracy": [
        steps(8, **{"rewards_train/accuracies": 1.0}),
        steps(40, **{"rewards_train/accuracies": 0.99}),
        [step(update, **{"rewards_train/accuracies": 1.0 if update > 8 else 0.5}) for update in range(1, 17)],
    ],
    "flat_loss": [flat(), flat(end=0.699), flat(start=0.6948)],
    "length_ratio": [sampled(LENGTH, 150, 50, 10)],
    "unfinished_rise": [sampled(UNFINISHED, 0.5, 0.1, 0.04), unfinished((0.0, 0.0), (0.3, 0.1))],
    "clipped_share": [clipped(201, of=201), clipped(201, of=400)],
    "kl": [
        evaluations(kl_eval__next_token=(51.0,), kl_eval__next_token__standard_error=(3.0,)),
        evaluations(forward_kl_eval=(60.0,), forward_kl_eval__standard_error=(20.0,)),
    ],
    "bad_rewards": [steps(2, **{"rollout/bad_rewards": 1.0})],
}
CLEAN = {
    "chosen_falls": [chosen(0, -1, -2), chosen(0, -1, -3, -2), chosen(3, 2, 1, -1), chosen(0, -1, -2, -2)],
    "early_accuracy": [
        steps(7, **{"rewards_train/accuracies": 1.0}),  # too few pairs to know
        steps(400, **{"rewards_train/accuracies": 0.98}),
        [step(update, **{"rewards_train/accuracies": float(update > 40)}) for update in range(1, 400)],  # later
    ],
    "flat_loss": [
        flat(end=0.68),
        flat(start=1.0),
        flat()[:157],  # seven steps after the warm-up
        [row | {"rewards_train/margins": 0.3} for row in flat()],  # the policy moves: wide margins keep the loss up
        [*flat(end=0.65)[:180], *flat()[180:]],  # a loss that comes near ln 2 later, by chance
    ],
    "length_ratio": [
        sampled(LENGTH, 149, 49, 1),
        sampled(LENGTH, 150, 50, 25),  # chance
        [evaluation(1, {LENGTH: 150.0, f"{LENGTH}_change": 50.0})],  # one sample
        sampled(LENGTH, 50, -50, 1),
    ],
    "unfinished_rise": [
        sampled(UNFINISHED, 0.5, 0.09, 0.01),
        sampled(UNFINISHED, 0.5, 0.2, 0.1),
        unfinished((0.0, 0.0), (0.3, 0.15)),
        unfinished((1.0, 0.0), (0.5, 0.1)),
    ],
    "clipped_share": [clipped(200, of=400)],
    "kl": [
        evaluations(kl_eval__next_token=(50.0,), kl_eval__next_token__standard_error=(3.0,)),
        evaluations(kl_eval=(60.0,), kl_eval__standard_error=(40.0,)),
        [evaluation(1, {"kl_eval": 60.0, "kl_eval/standard_error": 1.0, KL: 40.0, f"{KL}/standard_error": 1.0})],
    ],
    "bad_rewards": [steps(2, **{"rollout/bad_rewards": 0.0}), steps(2)],
}
AT_ITS_END = ("chosen_falls", "length_ratio", "unfinished_rise", "kl")  # series that raise it with their last row
CASES = [(name, index) for name, series in PLANTED.items() for index in range(len(series))]
CLEAN_CASES = [(name, index) for name, series in CLEAN.items() for index in range(len(series))]


def test_every_limit_has_a_check_and_tests() -> None:
    names = [check.name for check in CHECKS]
    assert {*names} == {*PLANTED} == {*CLEAN} == {*WarningSettings.model_fields} - {"standard_errors"}


@pytest.mark.parametrize("name, index", CASES)
def test_a_planted_series_raises_its_warning_once(tmp_path: Path, name: str, index: int) -> None:
    rows = PLANTED[name][index]
    (warning,) = warned([*rows, rows[-1], rows[-1]], tmp_path)
    assert warning["warning"] == name
    assert warning["found"] and warning["meaning"] and warning["help"]
    assert warning["counters/examples"] == rows[-1]["counters/examples"] or name not in AT_ITS_END
    assert warned(rows, tmp_path, f"warnings.{name}=null") == []


@pytest.mark.parametrize("name, index", CLEAN_CASES)
def test_a_clean_series_raises_none(tmp_path: Path, name: str, index: int) -> None:
    assert warned(CLEAN[name][index], tmp_path) == []


def test_limits_are_settings(tmp_path: Path) -> None:
    assert warned(chosen(0, -1), tmp_path, "warnings.chosen_falls=1")
    assert warned(CLEAN["kl"][0], tmp_path, "warnings.kl=49")
    assert warned(CLEAN["length_ratio"][1], tmp_path, "warnings.standard_errors=1")
    assert warned(CLEAN["clipped_share"][0], tmp_path, "warnings.clipped_share=0.4")
    assert warned(CLEAN["unfinished_rise"][0], tmp_path, "warnings.unfinished_rise=0.05")
    assert warned(CLEAN["early_accuracy"][1], tmp_path, "warnings.early_accuracy=0.9")
    assert warned(CLEAN["flat_loss"][0], tmp_path, "warnings.flat_loss=0.1")


def test_the_share_of_clipped_steps_is_of_the_steps_of_the_run(tmp_path: Path) -> None:
    """Short batches make more steps than examples say, as in the passes of online training."""
    assert warned(clipped(401, of=450), tmp_path, num_updates=800)
    assert warned(clipped(400, of=450), tmp_path, num_updates=801) == []


def test_a_mean_weighs_steps_by_their_examples(tmp_path: Path) -> None:
    """The last batch of an epoch is short: one wrong pair in it is one of 129."""
    rows = steps(8, **{"rewards_train/accuracies": 1.0})
    rows[-1] |= {"rewards_train/accuracies": 15 / 16}
    assert warned(rows, tmp_path, "warnings.early_accuracy=0.992")  # 127 of 128
    assert not warned(rows, tmp_path, "warnings.early_accuracy=0.993")


def test_a_warning_tells_which_keys_help(tmp_path: Path) -> None:
    line = describe(warned(PLANTED["clipped_share"][0], tmp_path)[0])
    assert line.startswith("warning: grad_norm was at least max_grad_norm=10 in 201 of 400 steps of the run. Usually ")
    assert "What helps: raise max_grad_norm" in line and "warnings.clipped_share=null" in line


def test_advice_names_keys_and_losses_that_exist() -> None:
    advice = " ".join(check.help for check in CHECKS)
    assert {*re.findall(r"\bloss=(\w+)", advice)} <= {*LOSSES}
    words = {*re.findall(r"\b(?:[a-z]+\.)?[a-z]+(?:_[a-z]+)+\b|\bloss\.[a-z]+", advice)} - {*LOSSES}
    assert "max_length" in words and "loss.beta" in words and words <= {*all_keys()} | {"samples.jsonl"}


# ---- Runs ----


def given(run: Run) -> list[str]:
    """The names of a run's warnings; each is in the log too."""
    path = run.dir / "warnings.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    assert all(run.out.count(describe(row)) == 1 for row in rows)
    assert run.out.count("warning: ") == len(rows)
    return [row["warning"] for row in rows]


LONG = ("n_examples=320", "batch_size=4", "do_first_eval=false", "eval_every=1000", "n_eval_examples=4")


@pytest.mark.parametrize(
    "name, overrides",
    [
        ("clipped_share", (*DPO, *LONG, "max_grad_norm=0.01")),
        ("flat_loss", (*DPO, *LONG, "lr=1e-9")),
        ("kl", (*DPO, "sample_during_eval=true", "n_eval_model_samples=4", "max_length=280", "warnings.kl=0.1")),
    ],
)
def test_a_run_raises_a_warning(program: Program, name: str, overrides: tuple[str, ...]) -> None:
    assert given(program.ok(*overrides)) == [name]


def test_falling_responses_raise_a_warning(program: Program, sft_run: Path) -> None:
    """In a run from an SFT model, with a learning rate that is far too high. A resumed run repeats nothing."""
    common = (*DPO, f"model.archive={sft_run}", "lr=1e-2", "n_examples=32", "eval_every=4", "keep_checkpoints=null")
    run = program.ok(*common)
    assert "chosen_falls" in given(run)
    before = (run.dir / "warnings.jsonl").read_text()
    for examples in (4, 28):
        stop_after(run.dir, examples)
        resumed = program.ok(*common, f"resume={run.dir}")
        assert (run.dir / "warnings.jsonl").read_text() == before
        assert ("logratios_eval/chosen is negative" in resumed.out) == (examples == 4)


def test_a_clean_run_raises_none(program: Program) -> None:
    run = program.ok(*DPO, "eval_every=4", "sample_during_eval=true", "n_eval_model_samples=4", "max_length=280")
    assert given(run) == [] and not (run.dir / "warnings.jsonl").exists()


def test_the_page_explains_every_warning() -> None:
    page = (Path(__file__).parent.parent / "docs" / "warnings.md").read_text(encoding="utf-8")
    assert all(f"| `{check.name}` |" in page for check in CHECKS)
