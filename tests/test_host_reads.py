"""The host never waits for a GPU within a step, counted on a CPU."""

import inspect
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from engine.models import optimizers
from engine.models.rmsprop_kernel import FusedRMSprop
from engine.placement.placement import Placement
from engine.step.metrics import MetricAccumulator, PendingScalars, prefix_metrics
from tests.quick import slow_except
from tests.runs import Program
from trainers import BasicTrainer, Step

# Lines for a CPU alone: `if device.type != "cpu" or norm > max_norm`, `if grad_loss.is_cuda or grad_loss != 1`.
CPU_READERS = {"clip_gradients", "backward"}


class HostReads(TorchDispatchMode):
    """Collects the functions outside of torch that wait for a GPU: they read a tensor, or copy a list to a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.readers: list[str] = []
        self._thread = threading.get_ident()  # another one prefetches
        self._patches = pytest.MonkeyPatch()

    def __enter__(self) -> "HostReads":
        for owner, name in ((torch, "tensor"), (torch, "as_tensor"), (Tensor, "new_tensor")):
            self._patches.setattr(owner, name, self._counted(getattr(owner, name)))
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._patches.undo()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in ("_local_scalar_dense", "nonzero", "masked_select", "equal"):
            self._add_reader()
        return func(*args, **(kwargs or {}))

    def _counted(self, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def counted(*arguments: Any, **keywords: Any) -> Tensor:
            self._add_reader()
            return function(*arguments, **keywords)

        return counted

    def _add_reader(self) -> None:
        if threading.get_ident() != self._thread:
            return
        frames = [frame for frame in inspect.stack() if frame.filename != __file__ or "test_" in frame.function]
        self.readers.append(next(frame.function for frame in frames if "/torch/" not in frame.filename))


def test_reads_and_copies_are_counted() -> None:
    with HostReads() as reads:
        values = torch.ones(3)
        assert values.sum() > 2 and values.new_tensor([1.0]).tolist() == [1.0]
    assert reads.readers == ["test_reads_and_copies_are_counted"] * 2  # tolist() reads a tensor of one value here


def test_metrics_are_reduced_without_a_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.step.metrics.to_host", lambda tensor: tensor)
    metrics = MetricAccumulator()
    metrics.add(loss=torch.ones(4, device="meta"), margin=torch.ones(4, device="meta"))
    metrics.num_tokens = 7
    with HostReads() as reads:
        means, num_tokens, stop = metrics.reduce(lambda totals: None, stop=True)
        PendingScalars(prefix_metrics(means, "train") | {"tokens": num_tokens, "stop": stop})
    assert reads.readers == []


def test_gradients_are_clipped_without_a_wait() -> None:
    policy = nn.Linear(4, 4, device="meta")
    for parameter in policy.parameters():
        parameter.grad = torch.ones_like(parameter)
    placement = SimpleNamespace(settings=SimpleNamespace(max_grad_norm=1.0), device=torch.device("meta"))
    with HostReads() as reads:
        Placement.clip_gradients(placement, policy)  # type: ignore[arg-type]
    assert reads.readers == []


def stand_in_kernel(weights: Tensor, gradient: Tensor, square_avg: Tensor, *state: Tensor, **settings: float) -> None:
    """A step of the kernel, found_inf included, without Triton."""
    num_steps, found_inf = state
    is_finite = found_inf == 0
    average = settings["alpha"] * square_avg + (1 - settings["alpha"]) * gradient.square()
    change = settings["lr"] * gradient / (average.sqrt() + settings["eps"])
    square_avg.copy_(average.where(is_finite, square_avg))
    weights.copy_((weights - change).where(is_finite, weights))
    num_steps.add_(is_finite)


@pytest.mark.parametrize(
    "optimizer, loss",
    slow_except(
        [("RMSprop", "dpo"), *(("AdamW", loss) for loss in ("dpo", "reward", "beta_dpo", "tdpo2", "wpo", "ld_dpo"))],
        *[("RMSprop", "dpo"), ("AdamW", "reward")],
    ),
)
def test_a_step_reads_nothing(program: Program, monkeypatch: pytest.MonkeyPatch, optimizer: str, loss: str) -> None:
    """And gives the same losses and weights as a step with reads."""
    arguments = (f"optimizer={optimizer}", f"loss={loss}", *([] if loss == "reward" else ["loss.beta=0.1"]))
    losses = [row["loss/train"] for row in program.ok(*arguments).steps]
    readers: list[str] = []
    step = BasicTrainer.step

    def counted(self: BasicTrainer, *arguments: Any) -> Step:
        with HostReads() as reads:
            result = step(self, *arguments)
        readers.extend(reads.readers)
        return result

    monkeypatch.setattr(BasicTrainer, "runs_ahead", True)
    monkeypatch.setattr(BasicTrainer, "step", counted)
    monkeypatch.setattr(optimizers, "runs_on", lambda parameters: True)
    monkeypatch.setattr("engine.models.rmsprop_kernel.rmsprop_", stand_in_kernel)
    run = program.ok(*arguments)
    assert set(readers) <= CPU_READERS
    assert [row["loss/train"] for row in run.steps] == pytest.approx(losses, rel=1e-5)
    assert FusedRMSprop.found_inf is None


def test_bad_steps_are_skipped_without_a_read(program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    """The weights stay finite, although the optimizer is called."""
    accumulate = BasicTrainer.accumulate_gradients

    def with_nan(self: BasicTrainer, *arguments: Any) -> None:
        accumulate(self, *arguments)
        if self.counters["updates"] == 1:
            next(parameter.grad for parameter in self.policy.parameters() if parameter.grad is not None).fill_(
                torch.nan
            )

    monkeypatch.setattr(BasicTrainer, "accumulate_gradients", with_nan)
    arguments = ("optimizer=RMSprop", "on_nonfinite=skip")
    expected = program.ok(*arguments)
    monkeypatch.setattr(BasicTrainer, "runs_ahead", True)
    monkeypatch.setattr(optimizers, "runs_on", lambda parameters: True)
    monkeypatch.setattr("engine.models.rmsprop_kernel.rmsprop_", stand_in_kernel)
    run = program.ok(*arguments)
    assert [row["counters/updates"] for row in run.steps] == [1, 3, 4]
    assert [row["loss/train"] for row in run.steps] == pytest.approx([row["loss/train"] for row in expected.steps])
