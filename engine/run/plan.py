"""plan=true: the memory, steps and time of a run."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from transformers import PreTrainedTokenizerBase

from engine.data.examples import Split
from engine.models.layers import find_layers
from engine.models.parameters import num_weights
from engine.run.planned_rollouts import PlannedSampling, measure_sampling, plan_rollouts
from engine.run.simulation import Memory, measure_step, simulated_group, simulated_trainer
from engine.run.workload import largest_microbatch, measure_this_machine, run_seconds, work_of
from engine.settings.hardware import HARDWARE, Hardware
from engine.settings.schema import Settings
from engine.step.rollout_source import SampledResponses

if TYPE_CHECKING:  # trainers import the engine, not the other way round
    from trainers import BasicTrainer

# The fraction of a GPU's memory left to tensors: CUDA and fragmentation take the rest.
GPU_MEMORY_FRACTION = 0.9
PROCESS_BYTES = 4 * 10**8  # of a process on a CPU, beside its tensors


@dataclass(frozen=True)
class Plan:
    """The memory, steps and time of a run.

    Args:
        memory: of the fullest process in a step.
        sampling: its memory while it samples responses; None for stored ones.
        num_data_ranks: processes with different examples.
        num_gpus: of this machine; None if the plan is for others.
        num_tokens: fed in the whole run.
        max_microbatches: of a process in a step.
        max_tokens: fed in the largest microbatch.
        num_recomputing: layers of num_layers that recompute their activations.
        seconds: of each part of the run; None if the hardware's peak is unknown.
    """

    settings: Settings
    trainer_name: str
    hardware: Hardware
    num_processes: int
    num_data_ranks: int
    num_gpus: int | None
    num_trained: int
    num_parameters: int
    memory: Memory
    sampling: PlannedSampling | None
    num_steps: int
    num_tokens: int
    max_microbatches: int
    token_budget: int
    max_tokens: int
    num_recomputing: int
    num_layers: int
    seconds: dict[str, float] | None

    @property
    def needed(self) -> float:
        """Required bytes: of a GPU, or of the machine's memory, shared by its processes."""
        sampling = 0 if self.sampling is None else self.sampling.peak
        if self.hardware.kind == "cpu":
            return self.num_processes * (max(self.memory.peak, sampling) + PROCESS_BYTES)
        offloaded = self.memory.peak - self.memory.on_device(self.settings.fsdp.cpu_offload)
        return (max(self.memory.peak, sampling) - offloaded) / GPU_MEMORY_FRACTION

    @property
    def fits(self) -> bool:
        return self.needed <= self.hardware.memory


def make_plan(
    settings: Settings,
    base: type["BasicTrainer"],
    tokenizer: PreTrainedTokenizerBase,
    train_split: Split,
    test_split: Split,
    num_processes: int,
    num_gpus: int | None = None,
) -> Plan:
    """Plan a run by simulating its largest step.

    Args:
        base: the trainer of the run.
        num_gpus: of this machine.
    """
    dtype = getattr(torch, settings.mixed_precision or settings.model.policy_dtype)
    if settings.plan_hardware:
        hardware = HARDWARE[settings.plan_hardware]
    else:
        hardware = measure_this_machine(num_processes, dtype)
    with simulated_group(num_processes):
        trainer = simulated_trainer(base, hardware)(settings, Path(), tokenizer, train_split, test_split)
        if isinstance(trainer.source, SampledResponses):
            plan_rollouts(trainer, trainer.source)
        layout = settings.batching, trainer.placement.feeds_last_token
        training, max_tokens, largest = largest_microbatch(trainer.train_batches(), *layout)
        evaluation = work_of(trainer.evaluator.batches(trainer.token_budget), *layout)
        seconds = run_seconds(trainer, hardware, dtype, training, evaluation)
        num_trained, num_parameters = num_weights(trainer.policy)
        max_microbatches = max(len(batch) // trainer.placement.num_data_ranks for batch in training)
        memory = measure_step(trainer, largest, max_microbatches)
        return Plan(
            settings=settings,
            trainer_name=base.__name__,
            hardware=hardware,
            num_processes=num_processes,
            num_data_ranks=trainer.placement.num_data_ranks,
            num_gpus=num_gpus if settings.plan_hardware is None else None,
            num_trained=num_trained,
            num_parameters=num_parameters,
            memory=memory,
            sampling=measure_sampling(trainer, memory.state) if settings.loss.is_online else None,
            num_steps=trainer.num_updates,
            num_tokens=sum(work.tokens for batch in training for work in batch),
            max_microbatches=max_microbatches,
            token_budget=trainer.token_budget,
            max_tokens=max_tokens,
            num_recomputing=trainer.num_checkpointed,
            num_layers=len(find_layers(trainer.policy, settings.model.block_name)),
            seconds=seconds,
        )
