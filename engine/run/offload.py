"""Keep models in CPU memory while they are not in use: rollout.offload."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from engine.run.critic import Critic
from engine.step.reference import AdapterReference, LiveReference, Reference
from utils import UserError

Move = Callable[[torch.device], object]
Part = Literal["policy", "reference", "critic", "optimizers"]


class Offload:
    """Moves parts of a run between a device and CPU memory.

    Args:
        device: where they run; on a CPU nothing moves.
        is_on: whether to move anything.
    """

    def __init__(self, device: torch.device, is_on: bool):
        self._device, self._is_on = device, is_on and moves_from(device)
        self._parts: dict[Part, Move] = {}
        self._on_device: set[Part] = set()

    def start(
        self,
        policy: PreTrainedModel,
        optimizers: list[torch.optim.Optimizer],
        reference: Reference | None,
        critic: Critic | None,
    ) -> None:
        """Take the models and optimizers of a run. Those that learn stay on the device.

        Raises:
            UserError: CONFIG, if the layers of a model are split among GPUs.
        """
        if self._is_on and len({parameter.device for parameter in policy.parameters()}) > 1:
            problem = "rollout.offload: the layers of the model are split among GPUs"
            raise UserError("CONFIG", problem, "leave it out, use trainer=FSDPTrainer, or show one GPU")
        self._parts = {"policy": policy.to, "optimizers": OptimizerStates(optimizers).to}
        if isinstance(reference, LiveReference) and not isinstance(reference, AdapterReference):
            self._parts["reference"] = reference.model.to
        if critic is not None:
            self._parts["critic"] = critic.model.to
        self._on_device = set(self._parts)
        self._use({"policy", "critic", "optimizers"})

    @contextmanager
    def using(self, *names: Part) -> Iterator[None]:
        """Keep these parts alone on the device in a with block; then those from before it."""
        before = set(self._on_device)
        self._use({*names})
        try:
            yield
        finally:
            self._use(before)

    def _use(self, names: set[Part]) -> None:
        if not self._is_on:
            return
        names &= self._parts.keys()
        for name in sorted(self._on_device - names):  # first, to make room
            self._parts[name](torch.device("cpu"))
        for name in sorted(names - self._on_device):
            self._parts[name](self._device)
        self._on_device = names
        if self._device.type == "cuda":
            torch.cuda.empty_cache()


def moves_from(device: torch.device) -> bool:
    """Whether a device has memory of its own."""
    return device.type != "cpu"


class OptimizerStates:
    """Moves the state of optimizers. Numbers that they keep in CPU memory stay there."""

    def __init__(self, optimizers: list[torch.optim.Optimizer]):
        self._optimizers = optimizers
        self._moved: set[tuple[Tensor, str]] = set()  # parameters and kinds of state

    def to(self, device: torch.device) -> None:
        """Move the state to a device."""
        for optimizer in self._optimizers:
            for parameter, state in optimizer.state.items():
                for key, value in state.items():
                    if isinstance(value, Tensor) and self._moves(parameter, key, value, device):
                        state[key] = value.to(device)

    def _moves(self, parameter: Tensor, key: str, value: Tensor, device: torch.device) -> bool:
        if device.type == "cpu" and value.device.type != "cpu":
            self._moved.add((parameter, key))
        return (parameter, key) in self._moved
