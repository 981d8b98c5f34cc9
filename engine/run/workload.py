"""How much work examples are, and how long hardware takes for it."""

import math
import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from engine.data.examples import Example
from engine.models.layers import find_layers
from engine.models.parameters import num_weights
from engine.models.score_head import head_of
from engine.placement.memory import total_memory
from engine.settings.hardware import PEAK_SHARES, Hardware, PeakShare, data_sheet, peak_flops
from engine.settings.schema import LoraSettings, Settings

if TYPE_CHECKING:  # trainers import the engine, not the other way round
    from trainers import BasicTrainer

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Work:
    """The work of a microbatch.

    Args:
        tokens: fed, padding included.
        targets: positions that reach the head.
        pairs: of a query and a visible key.
    """

    tokens: int
    targets: int
    pairs: float

    @classmethod
    def of(cls, examples: Sequence[Example], layout: str, scores: bool = False) -> "Work":
        """The work of examples in one microbatch.

        Args:
            scores: of a score head. It reads the last token of each response.
        """
        responses: dict[bytes, dict[bytes, int]] = {}  # prompt -> its distinct responses -> their lengths
        lengths: dict[bytes, int] = {}
        num_of_turns: dict[bytes, int] = {}  # targets of earlier turns, inside the prompt
        for example in examples:
            key = example.group_key
            lengths[key] = len(example.prompt)
            num_of_turns[key] = sum(len(turn.response) for turn in example.turns)
            responses.setdefault(key, {}).update({each.tobytes(): len(each) for each in example.responses})
        every = [(lengths[key], length) for key in responses for length in responses[key].values()]
        if layout == "padded":
            longest = max((prompt + length for prompt, length in every), default=0)
            tokens = len(every) * longest
            return cls(tokens, len(every) if scores else tokens, tokens * longest / 2)
        return cls(
            tokens=sum(lengths.values()) + sum(length - (not scores) for _, length in every),
            targets=len(every) if scores else sum(length for _, length in every) + sum(num_of_turns.values()),
            pairs=sum(length**2 / 2 for length in lengths.values())
            + sum(length * (prompt + length / 2) for prompt, length in every),
        )


BatchWork = list[list[Work]]  # for each batch, its microbatches


def work_of(batches: Iterable[list[list[Example]]], layout: str, scores: bool = False) -> BatchWork:
    """The work of each microbatch of batches."""
    return [[Work.of(examples, layout, scores) for examples in microbatches] for microbatches in batches]


def largest_microbatch(
    batches: Iterable[list[list[Example]]], layout: str, scores: bool = False
) -> tuple[BatchWork, int, list[Example]]:
    """The work of batches, the tokens of the largest microbatch, and its examples. No other examples are kept."""
    works: BatchWork = []
    max_tokens, largest = -1, list[Example]()
    for microbatches in batches:
        (found,) = work_of([microbatches], layout, scores)
        works.append(found)
        for work, examples in zip(found, microbatches, strict=True):
            if work.tokens > max_tokens:
                max_tokens, largest = work.tokens, examples
    return works, max_tokens, largest


# ---- Time ----


def flops_of(trainer: "BasicTrainer", counts_recomputation: bool = True) -> Callable[[Work, bool], float]:
    """A function: work, with a backward pass or without -> operations of all tensor-parallel ranks.

    It assumes that each weight of a layer is used once per token. Embeddings are looked up, and cost none.
    """
    config, policy = trainer.policy.config, trainer.policy
    layers = find_layers(policy, trainer.settings.model.block_name)
    trained, weights = zip(*(num_weights(layer) for layer in layers), strict=True)
    # Layers below the first trained weight have no backward pass.
    trains_embeddings = policy.get_input_embeddings().weight.requires_grad
    first = 0 if trains_embeddings else next((index for index, num in enumerate(trained) if num), len(layers))
    num_backward = len(layers) - first
    head = head_of(policy).weight
    width = (getattr(config, "head_dim", None) or 0) * getattr(config, "num_attention_heads", 0) or config.hidden_size
    recomputed = trainer.num_checkpointed / len(layers) if counts_recomputation else 0

    def flops(work: Work, with_backward: bool) -> float:
        of_head = 2 * head.numel() * work.targets
        forward = 2 * sum(weights) * work.tokens + 4 * width * len(layers) * work.pairs
        if not with_backward:
            return forward + of_head
        of_inputs = 2 * sum(weights[first:]) * work.tokens + 8 * width * num_backward * work.pairs
        of_weights = 2 * sum(trained) * work.tokens
        return forward * (1 + recomputed) + of_inputs + of_weights + of_head * (2 + head.requires_grad)

    return flops


def run_seconds(
    trainer: "BasicTrainer", hardware: Hardware, dtype: torch.dtype, training: BatchWork, evaluation: BatchWork
) -> dict[str, float] | None:
    """Seconds of each part of a run; None if the hardware's peak is unknown.

    Args:
        dtype: of matrix products.
        training, evaluation: the work of the whole run, and of one evaluation.
    """
    settings, num_data_ranks, flops = trainer.settings, trainer.placement.num_data_ranks, flops_of(trainer)
    peak = peak_rate(settings, hardware, dtype)
    if peak is None:
        return None
    num_tensor_ranks = trainer.placement.num_ranks // num_data_ranks
    rate = peak * (share_of_peak(settings, hardware).value * num_tensor_ranks)

    def seconds_of(batches: BatchWork, with_backward: bool) -> float:
        slowest = [  # the other ranks wait for it
            max(batch[start : start + num_data_ranks], key=lambda work: work.tokens)
            for batch in batches
            for start in range(0, len(batch), num_data_ranks)
        ]
        return sum(flops(work, with_backward) for work in slowest) / rate

    num_examples = trainer.source.num_examples
    num_evaluations = settings.do_first_eval + math.ceil(num_examples / settings.eval_every)
    objective = trainer.runner.objective
    # Passes without gradients. Mismatched responses are about as long as the others.
    needs_kl = "kl" in objective.needs
    num_passes = ("whole batch" in objective.needs) + needs_kl
    seconds = {
        "training": seconds_of(training, True) + num_passes * seconds_of(training, False),
        "evaluations": num_evaluations * seconds_of(evaluation, False) * (1 + needs_kl),
    }
    if settings.loss.is_online:
        seconds["log-probs"] = seconds_of(training, False) / settings.rollout.epochs
    if "reference" in objective.needs:
        is_live = settings.has_live_reference  # a cached one runs once per example
        share = 1.0 if is_live else min(1.0, len(trainer.train_examples) / num_examples)
        if settings.loss.is_online:  # it runs once for all passes
            share = 1 / settings.rollout.epochs
        forward = share * seconds_of(training, False)
        forward += (num_evaluations if is_live else 1) * seconds_of(evaluation, False)
        seconds["reference"] = forward * (1 + needs_kl)
    return seconds


# ---- Hardware ----


def share_of_peak(settings: Settings, hardware: Hardware) -> PeakShare:
    """The share for this hardware, else for its kind."""
    task = settings.peft.name if isinstance(settings.peft, LoraSettings) else "full"
    sheet = data_sheet(hardware.name) or hardware
    return PEAK_SHARES.get((sheet.name, task)) or PEAK_SHARES[hardware.kind, task]


def peak_rate(settings: Settings, hardware: Hardware, dtype: torch.dtype) -> float | None:
    """FLOP/s of matrix products in dtype; matmul_precision counts for fp32."""
    bfloat16 = hardware.peaks.get("bfloat16")
    if dtype == torch.float32 and settings.matmul_precision != "highest" and hardware.kind == "gpu" and bfloat16:
        return bfloat16 / 2 if settings.matmul_precision == "high" else bfloat16  # TF32 is half as fast
    return hardware.peaks.get(str(dtype).removeprefix("torch."))


def measure_this_machine(num_processes: int, dtype: torch.dtype) -> Hardware:
    """This machine's GPU, or the CPU cores of one process with their measured peak in dtype."""
    if torch.cuda.is_available():
        device, name = torch.device("cuda"), torch.cuda.get_device_name()
        known = peak_flops(name)
        return Hardware(name, "gpu", total_memory(device), {"bfloat16": known} if known else {})
    cores = os.cpu_count() or 1
    threads = int(os.environ.get("OMP_NUM_THREADS") or max(1, cores // num_processes))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    left, right = (torch.ones(1024, 1024, dtype=dtype) for _ in range(2))
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        left @ right
        seconds.append(time.perf_counter() - start)
    torch.set_num_threads(before)
    peak = 2 * 1024**3 / min(seconds) * min(1.0, cores / (threads * num_processes))
    name = f"{threads} of {cores} CPU cores each"
    return Hardware(name, "cpu", total_memory(CPU), {str(dtype).removeprefix("torch."): peak})
