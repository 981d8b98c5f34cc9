"""The seams of the loop: what a loss, an objective and a batch source may do."""

import threading
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import losses
import trainers
from engine.data.examples import Example
from engine.run import online
from engine.step.layout import lay_out
from engine.step.metrics import MetricAccumulator, to_floats
from engine.step.objectives import SequenceObjective, make_objective
from engine.step.sources import StoredExamples
from losses import LOSSES, Loss, PairLosses
from tests.configs import make_settings
from tests.models import pair_examples
from tests.runs import Program

DPO = ("loss=dpo", "loss.beta=0.1")


def means_of(metrics: MetricAccumulator) -> dict[str, float]:
    return to_floats(metrics.reduce(lambda totals: None).means)


def test_an_objective_gets_token_log_probs_and_sums_them_by_response() -> None:
    objective = make_objective(make_settings("loss=sft").loss)
    batch, metrics = (
        lay_out([Example(each.prompt, each.responses[:1], each.prompt_index) for each in pair_examples()[:3]]),
        MetricAccumulator(),
    )
    token_logps = -torch.arange(1.0, len(batch.targets) + 1)
    inputs = objective.read(token_logps, batch, batch.span, None)
    found = objective.losses(inputs, [], metrics)
    expected = torch.tensor([part.sum() for part in token_logps.split(batch.response_lengths.tolist())])
    assert torch.equal(found, -expected)
    assert means_of(metrics) == pytest.approx({"logps/chosen": expected.mean().item(), "loss": -expected.mean().item()})


def with_metrics(*logps: Tensor, beta: float) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
    found, chosen, rejected = losses.dpo_loss(*logps, beta=beta)
    return found, chosen, rejected, {"gap": logps[0] - logps[1]}


def test_a_loss_may_return_metrics_of_its_own(program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = program.ok(*DPO, "n_examples=4")
    monkeypatch.setitem(LOSSES, "ipo", Loss(with_metrics, batch="pairs", needs={"reference"}))
    run = program.ok("loss=ipo", "loss.beta=0.1", "n_examples=4")
    for row, split in ((run.steps[0], "train"), (run.evals[0], "eval")):
        gap = row[f"logps_{split}/chosen"] - row[f"logps_{split}/rejected"]
        assert row[f"gap/{split}"] == pytest.approx(gap, rel=1e-5)
    assert run.steps[0]["loss/train"] == plain.steps[0]["loss/train"]


def test_a_loss_without_a_reference_builds_none(program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    def margin_loss(chosen: Tensor, rejected: Tensor, *, beta: float) -> PairLosses:
        return beta * (rejected - chosen), chosen.detach(), rejected.detach()

    monkeypatch.setitem(LOSSES, "ipo", Loss(margin_loss, batch="pairs"))
    run = program.ok("loss=ipo", "loss.beta=0.1", "n_examples=4", f"cache_dir={program.directory / 'cache'}")
    assert not (program.directory / "cache" / "reference").exists()
    assert run.steps[0]["rewards_train/chosen"] == run.steps[0]["logps_train/chosen"]


def test_needs_decide_on_the_reference() -> None:
    settings = make_settings(*DPO).loss
    free = settings.model_copy(update={"keywords": settings.keywords | {"reference_free": True}})
    assert SequenceObjective(LOSSES["dpo"], settings).needs == {"reference"}
    assert SequenceObjective(LOSSES["dpo"], free).needs == set()


@pytest.mark.parametrize("may_prefetch", [False, True])
def test_a_source_says_whether_its_batches_may_be_prefetched(
    program: Program, monkeypatch: pytest.MonkeyPatch, may_prefetch: bool
) -> None:
    """Batches that depend on the policy must be made after the step before them."""
    threads: list[bool] = []  # whether a batch was made in the thread that trains

    class Noting(StoredExamples):
        def batches(self, start: int = 0) -> Iterator[list[Example]]:
            for batch in super().batches(start):
                threads.append(threading.current_thread() is threading.main_thread())
                yield batch

    monkeypatch.setattr(Noting, "may_prefetch", may_prefetch)
    monkeypatch.setattr(online, "StoredExamples", Noting)
    program.ok("n_examples=12", "do_first_eval=false")
    assert threads == [not may_prefetch] * 3


def test_the_fingerprint_of_a_source_is_of_its_examples() -> None:
    def source(examples: list[Example]) -> StoredExamples:
        return StoredExamples(examples, batch_size=2, seed=0, n_epochs=1, n_examples=None)

    examples = pair_examples()
    assert source(examples).fingerprint == source(pair_examples()).fingerprint != source(examples[1:]).fingerprint
    batches = list(source(examples).batches(start=2))
    assert [len(batch) for batch in batches] == [2, 1] and source(examples).num_examples == 5


def test_the_trainers_are_those_of_the_settings() -> None:
    from typing import get_args

    from engine.settings.choices import Trainer

    assert tuple(trainers.TRAINERS) == get_args(Trainer)
