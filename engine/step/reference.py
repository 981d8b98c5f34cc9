"""Log-probs under the frozen reference model, live or cached."""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from engine.data.dialogues import split_turns
from engine.data.examples import Example
from engine.models.adapters import as_reference
from engine.models.precision import run_in_dtype
from engine.models.wide_products import cpu_rounds_products
from engine.step.heads import head_at_hand, run_head, run_reference
from engine.step.layout import Microbatch
from engine.step.logprobs import sum_by_response
from engine.step.metrics import HostCopy
from engine.step.reference_cache import CachedReference
from engine.step.token_needs import NO_NEEDS, ReferenceHead, TokenNeeds
from utils import content_hash, prefetch, progress

KERNELS = 5  # the version of our own kernels: count up when they change log-probs
COMMIT_SECONDS = 5.0  # a commit waits for the disk; a killed run loses the log-probs of so many seconds


class LiveReference:
    """A frozen model, run over each microbatch."""

    def __init__(self, model: PreTrainedModel, compute_dtype: torch.dtype | None = None):
        self.model = model
        self.compute_dtype = compute_dtype

    def logps(self, batch: Microbatch) -> Tensor:
        """Sums of the log-probs of each response, [responses]."""
        return sum_by_response(self.token_logps(batch), batch.response_lengths)

    @torch.no_grad()
    def token_logps(self, batch: Microbatch, needs: TokenNeeds = NO_NEEDS) -> Tensor:
        """Log-probs of the targets, [targets]."""
        with self.in_mixed_precision(), self.as_reference():
            return run_head(self.model, batch, needs=needs)[1]

    @contextmanager
    def distributions(self, batch: Microbatch) -> Iterator[ReferenceHead | Tensor]:
        """The distributions at the targets, for TokenNeeds, at hand inside a with block."""
        with head_at_hand(self.model):
            with torch.no_grad(), self.in_mixed_precision(), self.as_reference():
                found = run_reference(self.model, batch)
            yield found

    def as_reference(self) -> AbstractContextManager[None]:
        """Turn the model into the reference in a with block."""
        return nullcontext()

    def in_mixed_precision(self) -> AbstractContextManager[None]:
        """Run the model in compute_dtype in a with block.

        Each weight is cast once for all calls inside.
        """
        return run_in_dtype(self.model, self.compute_dtype)


class AdapterReference(LiveReference):
    """The policy before training: its adapters off, or the frozen copy."""

    def as_reference(self) -> AbstractContextManager[None]:
        return as_reference(self.model)


Reference = LiveReference | CachedReference


def reference_key(weights: str, settings: Iterable[Any], device: torch.device) -> str:
    """A hash of everything that affects the log-probs of given tokens.

    Args:
        weights: the hash of the reference's weights.
        settings: of precision and layout, as JSON values.
        device: its kind, the version of torch and our kernels affect the last bits.
    """
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    if device.type == "cpu" and cpu_rounds_products():
        name += " with matrix units"
    return content_hash([weights, *settings, name, torch.__version__, KERNELS])


def fill_cache(
    cached: CachedReference,
    live: LiveReference,
    batches: Iterable[Sequence[list[Example]]],
    lay_out: Callable[[Sequence[Example]], Microbatch],
    *,
    data_rank: int,
    num_data_ranks: int,
    is_silent: bool = False,
) -> None:
    """Compute the missing log-probs of the cache.

    All ranks call this together.

    Args:
        batches: batches of microbatches, as in training. Equal microbatches give equal bits.
        lay_out: examples -> a microbatch on the device.
        data_rank, num_data_ranks: each data-parallel rank runs every num_data_ranks-th microbatch.
        is_silent: print no summary.
    """
    rounds, planned, num_before = [], set[bytes](), len(cached)
    for parts in batches:
        for start in range(0, len(parts), num_data_ranks):  # one microbatch per rank
            microbatches = parts[start : start + num_data_ranks]
            examples = [example for microbatch in microbatches for example in microbatch]
            turns = (turn for example in examples for turn in split_turns(example))
            missing = cached.missing((turn.prompt, response) for turn in turns for response in turn.responses)
            if missing - planned:
                rounds.append(microbatches)
                planned |= missing
    if not rounds:
        if not is_silent:
            print(f"reference: all log-probs are in {cached.path}")
        return

    def run(batch: Microbatch) -> list[Tensor]:
        if not cached.by_token:
            return [live.logps(batch)]
        token_logps = live.token_logps(batch)
        return [sum_by_response(token_logps, batch.response_lengths), token_logps]

    started = time.monotonic()
    with live.in_mixed_precision(), cached.committing_every(COMMIT_SECONDS):
        running: tuple[Microbatch, list[HostCopy]] | None = None
        laid_out = prefetch(lay_out(microbatches[data_rank]) for microbatches in rounds)
        for batch in progress(laid_out, description="reference log-probs", total=len(rounds), unit="microbatches"):
            previous, running = running, (batch, [HostCopy(values) for values in run(batch)])
            if previous is not None:  # added while a GPU runs this one
                cached.add(previous[0], *(copy.read() for copy in previous[1]))
        assert running is not None
        cached.add(running[0], *(copy.read() for copy in running[1]))
    seconds = time.monotonic() - started
    if is_silent:
        return
    print(f"reference: {len(cached) - num_before:,} log-probs computed in {seconds:.1f} s, kept in {cached.path}")
