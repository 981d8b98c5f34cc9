"""Losses of unpaired responses: by hand, from files and pairs, their metrics and messages."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.data.examples import Example
from engine.run.start_report import warn_of_first_margin, warn_of_imbalance
from engine.step import microbatches
from engine.step.layout import Microbatch
from engine.step.metrics import MetricAccumulator
from engine.step.microbatches import Batch
from engine.step.objectives import make_objective
from engine.step.reference import LiveReference
from losses import LOSSES, bco_loss, bco_state, kto_loss
from tests.configs import make_settings
from tests.invariants.batches import make_runner
from tests.models import random_examples, tiny_model
from tests.quick import slow_except
from tests.runs import Program, Run
from tests.test_losses import logps, sigmoid

# Log-ratios 2, -1 of two desirable responses, 3, -4 of two undesirable ones.
POLICY, REFERENCE = logps(-8, -5, -6, -9), logps(-10, -4, -9, -5)
LABELS = torch.tensor([True, True, False, False])


# ---- By hand ----


@pytest.mark.parametrize(("kl", "point"), [(1.5, 1.5), (-2.0, 0.0), (0.0, 0.0)])
def test_kto_by_hand(kl: float, point: float) -> None:
    policy = POLICY.clone().requires_grad_()
    weights = {"desirable_weight": 0.75, "undesirable_weight": 1.25}
    losses, rewards, metrics = kto_loss(policy, REFERENCE, LABELS, torch.tensor(kl).double(), beta=0.5, **weights)
    # lambda_D (1 - sigmoid(beta (h - z0))) and lambda_U (1 - sigmoid(beta (z0 - h)))
    desirable, undesirable = [0.5 * (h - point) for h in (2, -1)], [0.5 * (point - h) for h in (3, -4)]
    expected = [0.75 * (1 - sigmoid(x)) for x in desirable] + [1.25 * (1 - sigmoid(x)) for x in undesirable]
    assert losses.tolist() == pytest.approx(expected, abs=1e-15)
    losses.sum().backward()
    slopes = [-0.75 * 0.5 * sigmoid(x) * sigmoid(-x) for x in desirable]
    slopes += [1.25 * 0.5 * sigmoid(x) * sigmoid(-x) for x in undesirable]
    assert policy.grad is not None and policy.grad.tolist() == pytest.approx(slopes, abs=1e-15)
    assert rewards.tolist() == [1, -0.5, 1.5, -2] and not rewards.requires_grad
    assert metrics["kl"].tolist() == [point] * 4


def test_kto_has_no_gradient_through_the_reference_point() -> None:
    kl = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    losses, _, _ = kto_loss(POLICY.clone().requires_grad_(), REFERENCE, LABELS, kl, beta=0.5)
    assert torch.autograd.grad(losses.sum(), kl, allow_unused=True) == (None,)


def test_bco_by_hand() -> None:
    policy = POLICY.clone().requires_grad_()
    means = (torch.tensor(0.4, dtype=torch.float64), torch.tensor(-1.0, dtype=torch.float64))
    losses, rewards, metrics = bco_loss(policy, REFERENCE, LABELS, *means, beta=0.5)
    shift = 0.5 * (0.4 - 1) / 2
    # l(beta h - delta) and l(delta - beta h), l(x) = -log(sigmoid(x))
    logits = [0.5 * h - shift for h in (2, -1, 3, -4)]
    signed = [logits[0], logits[1], -logits[2], -logits[3]]
    assert losses.tolist() == pytest.approx([math.log(1 + math.exp(-x)) for x in signed], abs=1e-15)
    losses.sum().backward()
    slopes = [
        -0.5 * sigmoid(-logits[0]),
        -0.5 * sigmoid(-logits[1]),
        0.5 * sigmoid(logits[2]),
        0.5 * sigmoid(logits[3]),
    ]
    assert policy.grad is not None and policy.grad.tolist() == pytest.approx(slopes, abs=1e-15)
    assert rewards.tolist() == [1, -0.5, 1.5, -2] and not rewards.requires_grad
    assert metrics["reward_shift"].tolist() == pytest.approx([shift] * 4, abs=1e-15)


def test_the_state_of_bco_by_hand() -> None:
    means = (torch.tensor(0.4, dtype=torch.float64), torch.tensor(-1.0, dtype=torch.float64))
    moved = bco_state(POLICY, REFERENCE, LABELS, *means)  # the means of the batch are 0.5 and -0.5
    assert moved["desirable_mean"].item() == pytest.approx(0.9 * 0.4 + 0.1 * 0.5, abs=1e-15)
    assert moved["undesirable_mean"].item() == pytest.approx(0.9 * -1 + 0.1 * -0.5, abs=1e-15)
    alone = bco_state(POLICY[:2], REFERENCE[:2], LABELS[:2], *means)
    assert alone["desirable_mean"] == moved["desirable_mean"] and alone["undesirable_mean"] == -1


@pytest.mark.parametrize("name", ["kto", "bco"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extremes_have_finite_values_and_gradients(name: str, dtype: torch.dtype) -> None:
    """Log-probs of 0 and -1e4 under policy and reference, equal ones among them."""
    values = torch.tensor([0.0, -1e4, -7], dtype=dtype)
    policy, reference = (each.flatten() for each in torch.meshgrid(values, values, indexing="ij"))
    for kl in (0.0, 1e4, -1e4):
        scalars = [torch.tensor(kl, dtype=torch.float64)] * (1 if name == "kto" else 2)
        for label in (True, False):
            leaf = policy.clone().requires_grad_()
            labels = torch.full((len(leaf),), label)
            losses, rewards, metrics = LOSSES[name].function(leaf, reference, labels, *scalars, beta=0.1)
            losses.sum().backward()
            assert leaf.grad is not None and losses.dtype == rewards.dtype == dtype
            assert all(each.isfinite().all() for each in (losses, leaf.grad, rewards, *metrics.values()))
            assert ((leaf.grad <= 0) if label else (leaf.grad >= 0)).all()  # raises desirable responses alone


@pytest.mark.parametrize("name", ["kto", "bco"])
def test_equal_models_by_hand(name: str) -> None:
    scalars = [torch.zeros((), dtype=torch.float64)] * (1 if name == "kto" else 2)
    losses = LOSSES[name].function(POLICY, POLICY, LABELS, *scalars, beta=0.1)[0]
    assert losses.tolist() == pytest.approx([0.5 if name == "kto" else math.log(2)] * 4, abs=1e-15)


# ---- The mean log-ratio of mismatched responses ----


def test_kl_by_hand() -> None:
    """The mean of log(policy / reference), against a plain forward pass of each response."""
    examples = random_examples([(4, 3), (6, 5), (5, 2)])
    policy, reference = tiny_model("llama", torch.float64), tiny_model("llama", torch.float64)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    mismatched = [
        Example(example.prompt, examples[(index + 1) % 3].responses, index) for index, example in enumerate(examples)
    ]

    @torch.no_grad()
    def logp(model: Any, example: Example) -> float:
        (response,) = example.responses
        ids = torch.tensor([[*example.prompt, *response]])
        predicted = model(ids).logits[0, len(example.prompt) - 1 : -1].log_softmax(-1)
        return predicted.gather(1, torch.from_numpy(response).long()[:, None]).sum().item()

    expected = sum(logp(policy, each) - logp(reference, each) for each in mismatched) / 3
    runner = make_runner(policy, make_objective(make_settings("loss=kto").loss), "padded")
    runner.reference = LiveReference(reference, None)
    parts = [runner.prepare(mismatched[:1]), runner.prepare(mismatched[1:])]
    batch = Batch(examples, 1000, [], mismatched=parts)
    first = runner.first_pass(batch, lambda totals: None, MetricAccumulator(), trains=True)
    assert [each.item() for each in first.scalars] == pytest.approx([expected], rel=1e-6) and abs(expected) > 1e-3


def test_each_mismatched_response_is_encoded_once_a_batch(program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    """One pass without gradients in each step; none for losses without this need."""
    seen: list[tuple[bool, bool, int]] = []

    def note(model: Any, batch: Microbatch) -> torch.Tensor:
        seen.append((model.training, torch.is_grad_enabled(), batch.num_examples))
        return real(model, batch)

    real = microbatches.response_logps
    monkeypatch.setattr(microbatches, "response_logps", note)
    program.ok("loss=kto", "loss.beta=0.1", "batch_size=8", "n_examples=16", "n_eval_examples=4", "do_first_eval=false")
    assert seen == [(True, False, 8), (True, False, 8), (False, False, 4)]
    seen.clear()
    program.ok("loss=bco", "batch_size=8", "n_examples=16", "n_eval_examples=4")
    assert seen == []


# ---- Runs ----


def unpaired_file(path: Path, num_rows: int = 24, num_desirable: int = 12) -> str:
    rows = [
        {"prompt": f"Is {n % 12} even?", "completion": f" no {n}" if n % 2 else f" yes {n}", "label": n < num_desirable}
        for n in range(num_rows)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"datasets=[{path}]"


def check_step_0(run: Run, loss: float) -> None:
    for split, row in (("train", run.steps[0]), ("eval", run.evals[0])):
        assert row[f"loss/{split}"] == pytest.approx(loss, abs=1e-7)
        assert row[f"rewards_{split}/desirable"] == row[f"rewards_{split}/undesirable"] == 0
        assert row[f"logps_{split}/response"] < 0


@pytest.mark.parametrize(
    "name, reference",
    slow_except(
        [("kto", "cached"), ("kto", "live"), ("bco", "cached"), ("bco", "live")], ("kto", "cached"), ("bco", "live")
    ),
)
def test_step_0_of_pairs_is_exact(program: Program, name: str, reference: str) -> None:
    run = program.ok(f"loss={name}", "loss.beta=0.1", f"reference={reference}", "n_examples=8", "batch_size=8")
    assert "7,350 examples (3,675 desirable)" in run.out
    check_step_0(run, 0.5 if name == "kto" else math.log(2))
    if name == "kto":
        assert run.steps[0]["kl/train"] == run.evals[0]["kl/eval"] == 0
    assert run.steps[0]["grad_norm"] > 0


def test_step_0_of_kto_scales_with_its_weights(program: Program) -> None:
    weights = ("loss.desirable_weight=1.2", "loss.undesirable_weight=1.2")
    run = program.ok("loss=kto", "loss.beta=0.1", *weights, "n_examples=4")
    check_step_0(run, 0.6)


@pytest.mark.parametrize("name", ["kto", "bco"])
def test_an_unpaired_file_trains(program: Program, name: str) -> None:
    data = unpaired_file(program.directory / "mine.jsonl")
    run = program.ok(f"loss={name}", data, "test_fraction=0.4", "n_epochs=4", "n_examples=null", "lr=1e-2")
    assert "train: 14 rows, 7 prompts, 14 examples" in run.out
    assert run.steps[-1]["counters/examples"] == 56  # four epochs
    assert "desirable" in run.out and "warning" not in run.out
    assert run.evals[-1]["loss/eval"] != run.evals[0]["loss/eval"]
    assert run.steps[-1]["rewards_train/desirable"] > run.steps[-1]["rewards_train/undesirable"]


def test_means_of_an_absent_label_are_left_out(program: Program) -> None:
    run = program.ok("loss=kto", "batch_size=1", "n_examples=2")  # a pair, one response a batch
    found = [{key for key in row if key.startswith("rewards_train/")} for row in run.steps]
    assert found == [{"rewards_train/desirable"}, {"rewards_train/undesirable"}]


def test_sft_learns_desirable_completions(program: Program) -> None:
    run = program.ok("loss=sft", unpaired_file(program.directory / "mine.jsonl"), "test_fraction=0")
    assert "train: 24 rows, 12 prompts, 12 targets" in run.out


def test_losses_of_pairs_refuse_unpaired_rows(program: Program) -> None:
    run = program("loss=dpo", "loss.beta=0.1", unpaired_file(program.directory / "mine.jsonl"))
    assert run.status == 3
    assert "rows of format=unpaired have one response with a label, and no pair" in run.err
    assert "train on them with loss=kto or loss=bco" in run.err


def test_a_single_prompt_has_no_mismatched_responses(program: Program) -> None:
    path = program.directory / "mine.jsonl"
    path.write_text('{"prompt": "p", "completion": "a", "label": true}\n' * 4)
    run = program("loss=kto", f"datasets=[{path}]", "test_fraction=0")
    assert run.status == 3 and "the train split has a single prompt" in run.err
    run = program("loss=kto", unpaired_file(path), "test_fraction=0.05")
    assert run.status == 3 and "the test split has a single prompt" in run.err and "test_fraction" in run.err
    program.ok("loss=bco", unpaired_file(path), "test_fraction=0.05")


def test_the_best_checkpoint_of_an_unpaired_loss(program: Program) -> None:
    run = program.ok("loss=kto", "keep_best=loss/eval", "eval_every=8")
    assert (run.dir / "BEST").exists()


def test_the_plan_counts_passes_without_gradients(program: Program) -> None:
    assert "step" in program.ok("loss=kto", "plan=true").out


# ---- Messages at start ----


@pytest.mark.parametrize(
    ("numbers", "weights", "advice"),
    [
        ((300, 100), "", "weigh 3 to 1; 1 to 1.33 is advised: loss.undesirable_weight=3 balances"),
        ((100, 300), "", "weigh 0.333 to 1; 1 to 1.33 is advised: loss.desirable_weight=3 balances"),
        ((300, 100), "loss.desirable_weight=0.5", "loss.undesirable_weight=1.5 balances"),
        ((100, 700), "loss.undesirable_weight=0.3", "loss.desirable_weight=2.1 balances"),
        ((300, 100), "loss.undesirable_weight=3", None),
        ((133, 100), "", None),
        ((100, 100), "", None),
        ((0, 0), "", None),
        ((5, 0), "", "all training examples are desirable"),
        ((0, 5), "", "all training examples are undesirable"),
    ],
)
def test_imbalance_is_told_with_the_weight_that_balances_it(
    numbers: tuple[int, int], weights: str, advice: str | None
) -> None:
    settings = make_settings("loss=kto", *weights.split())
    warning = warn_of_imbalance(settings, [True] * numbers[0] + [False] * numbers[1])
    assert warning is None if advice is None else advice in (warning or "")


def test_imbalance_without_weights_is_not_told(program: Program) -> None:
    labels = [True] * 30 + [False]
    assert warn_of_imbalance(make_settings("loss=bco"), labels) is None
    assert warn_of_imbalance(make_settings("loss=bco"), [True]) is not None
    assert warn_of_imbalance(make_settings(), [None] * 3) is None
    data = unpaired_file(program.directory / "mine.jsonl", num_desirable=18)
    run = program.ok("loss=kto", data, "test_fraction=0", "n_examples=4")
    assert "18 desirable and 6 undesirable responses weigh 3 to 1" in run.out


def test_a_reward_before_the_first_update_is_told() -> None:
    metrics = {"counters/updates": 1.0, "rewards_train/desirable": 0.0, "rewards_train/undesirable": -0.2}
    warning = warn_of_first_margin(make_settings("loss=kto"), metrics)
    assert warning is not None and "the reward before the first update is -0.2" in warning
    assert warn_of_first_margin(make_settings("loss=kto"), metrics | {"rewards_train/undesirable": 0.0}) is None
