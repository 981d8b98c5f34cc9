"""Set up the reference: place the frozen model, and fill the cache of its log-probs."""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path

import numpy as np
import torch

from engine.data.examples import Example
from engine.models.adapters import adapter_of
from engine.models.hashing import reference_hash_spec, weights_hash
from engine.placement import process_group
from engine.placement.placement import Placement
from engine.run.evaluation import Evaluator
from engine.run.reference_samples import Samples, read_or_draw, samples_path
from engine.run.win_rates import REFERENCE, WinRates
from engine.settings.schema import Settings
from engine.step.microbatches import MicrobatchRunner
from engine.step.reference import AdapterReference, LiveReference, Reference, fill_cache, reference_key
from engine.step.reference_cache import CachedReference
from utils import one_at_a_time


def build_reference(
    settings: Settings,
    placement: Placement,
    runner: MicrobatchRunner,
    evaluator: Evaluator,
    batches: Iterable[list[list[Example]]],
    token_budget: int,
) -> tuple[Reference | None, str | None]:
    """The frozen reference, and a hash of its weights; None for a loss without a reference.

    Args:
        runner: of the untrained policy.
        evaluator: gets responses sampled from the reference.
        batches: contain every example.
        token_budget: of a microbatch of samples.
    """
    live = place_reference(settings, placement, runner)
    if live is None:
        return None, None
    reference_hash = hash_reference(live, placement, runner)
    evaluator.kl.reference_hash = reference_hash
    path = cache_path(reference_hash, settings, placement)
    # Runs that start together compute it once.
    with nullcontext() if settings.has_live_reference else filling_alone(path):
        samples: list[list[Example]] = []
        if evaluator.should_sample:
            evaluator.kl.reference_samples = sample_reference(live, path, settings, placement, evaluator)
            adapter = adapter_of(runner.policy)
            if adapter and adapter.has_own_reference and live.model is runner.policy:
                evaluator.kl.adapters_off = AdapterReference(live.model, placement.compute_dtype)
            samples = evaluator.kl.microbatches(evaluator.kl.reference_samples, token_budget)
            if evaluator.win_rates is not None:
                drawn = evaluator.kl.reference_samples
                sample_for_win_rates(live, path, settings, placement, evaluator.win_rates, drawn)
        if settings.has_live_reference:
            return live, reference_hash
        return cache_reference(live, path, placement, runner, batches, samples), reference_hash


@contextmanager
def filling_alone(path: Path) -> Iterator[None]:
    """Fill the cache at path in a with block, after other runs that fill it. All ranks call this together."""
    with ExitStack() as lock:

        def wait() -> None:
            lock.enter_context(one_at_a_time(path, f"reference: waiting for another run, which fills {path}"))

        process_group.broadcast_from_rank_0(wait)
        yield


def with_mismatched(
    placement: Placement, batches: Iterable[list[list[Example]]], num_parts: int, token_budget: int
) -> Iterator[list[list[Example]]]:
    """The microbatches of each batch, and those of its mismatched responses."""
    for microbatches in batches:
        examples = [example for part in microbatches for example in part]
        yield [*microbatches, *placement.split_mismatched(examples, num_parts, token_budget)]


def place_reference(settings: Settings, placement: Placement, runner: MicrobatchRunner) -> LiveReference | None:
    """Place the frozen model; None if the loss needs none.

    The untrained policy serves where it can: it starts with the reference's weights.
    """
    policy, adapter = runner.policy, adapter_of(runner.policy)
    if "reference" not in runner.objective.needs:
        return None
    model = policy
    if settings.model.reference_dtype not in (None, settings.model.policy_dtype):
        model = placement.place_model(getattr(torch, settings.model.reference_dtype))
    elif settings.has_live_reference and not (adapter and adapter.has_own_reference):
        model = placement.copy_policy(policy)
    if model is not policy and not settings.compile:  # compiled layers run the graph of training
        model.requires_grad_(False)
    is_policy = settings.has_live_reference and model is policy
    return (AdapterReference if is_policy else LiveReference)(model, placement.compute_dtype)


def hash_reference(live: LiveReference, placement: Placement, runner: MicrobatchRunner) -> str:
    """A hash of the reference's weights. All ranks call this together."""
    reference_hash = weights_hash(live.model, placement.permutations, *reference_hash_spec(live.model))
    adapter = adapter_of(runner.policy)
    if adapter is not None:
        print(f"reference: {adapter.description}", flush=True)
    return reference_hash


def cache_path(reference_hash: str, settings: Settings, placement: Placement) -> Path:
    """The file of the reference's log-probs."""
    numerics = (settings.mixed_precision, settings.matmul_precision, settings.batching, settings.compile)
    key = reference_key(reference_hash, numerics, placement.device)
    return Path(settings.cache_dir or "") / "reference" / f"{key}.sqlite"


def sample_reference(
    live: LiveReference, path: Path, settings: Settings, placement: Placement, evaluator: Evaluator
) -> list[np.ndarray]:
    """The reference's samples, read from beside its log-probs at path or drawn now."""

    def draw() -> list[np.ndarray]:
        return evaluator.sample(live.model, 0)

    if settings.has_live_reference:
        return draw()
    return read_or_draw(samples_path(path, placement, evaluator.kl.prompts), placement, draw)


def sample_for_win_rates(
    live: LiveReference,
    path: Path,
    settings: Settings,
    placement: Placement,
    win_rates: WinRates,
    samples: Samples,
) -> None:
    """Complete the reference's samples for win rates, as in sample_reference().

    Args:
        samples: for the first prompts.
    """
    # In online training these have the random numbers of the policy's: equal models would give equal responses.
    known = [] if settings.loss.is_online else samples[: len(win_rates.prompts)]

    def draw() -> Samples:
        return win_rates.sample(live.model, len(known), REFERENCE)

    more_prompts = win_rates.prompts[len(known) :]
    if not more_prompts or settings.has_live_reference:
        more = draw() if more_prompts else []
    else:
        more = read_or_draw(samples_path(path, placement, more_prompts), placement, draw)
    win_rates.reference_samples = [*known, *more]


def cache_reference(
    live: LiveReference,
    path: Path,
    placement: Placement,
    runner: MicrobatchRunner,
    batches: Iterable[list[list[Example]]],
    samples: list[list[Example]],
) -> CachedReference:
    """Log-probs of all examples under the reference, read from path or computed now.

    Args:
        samples: microbatches of the reference's samples. Their log-probs stay in memory: a cache that has those of all
            examples need not be writable.
    """
    by_token = "shared length" in runner.objective.needs
    cached = CachedReference(path, placement.gather_from_data_ranks, by_token=by_token)

    def fill(batches: Iterable[list[list[Example]]], is_silent: bool = False) -> None:
        fill_cache(
            cached,
            live,
            batches,
            runner.lay_out,
            data_rank=placement.data_rank,
            num_data_ranks=placement.num_data_ranks,
            is_silent=is_silent,
        )

    fill(batches)
    if samples:
        with cached.in_memory():
            fill([samples], is_silent=True)
    return cached
