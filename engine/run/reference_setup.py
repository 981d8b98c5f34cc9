"""Set up the reference: place the frozen model, and fill the cache of its log-probs."""

from collections.abc import Iterable
from pathlib import Path

import torch

from engine.data.examples import Example
from engine.models.adapters import adapter_of
from engine.models.hashing import reference_hash_spec, weights_hash
from engine.placement.single import SingleProcess
from engine.settings.schema import Settings
from engine.step.microbatches import MicrobatchRunner
from engine.step.reference import AdapterReference, LiveReference, fill_cache, reference_key
from engine.step.reference_cache import CachedReference


def place_reference(settings: Settings, placement: SingleProcess, runner: MicrobatchRunner) -> LiveReference | None:
    """Place the frozen model; None if the loss needs none.

    The untrained policy serves where it can: it starts with the reference's weights.
    """
    policy, adapter = runner.policy, adapter_of(runner.policy)
    if not runner.objective.needs_reference:
        return None
    model = policy
    if settings.model.reference_dtype not in (None, settings.model.policy_dtype):
        model = placement.place_model(getattr(torch, settings.model.reference_dtype))
    elif settings.reference == "live" and not (adapter and adapter.has_own_reference):
        model = placement.copy_policy(policy)
    is_policy = settings.reference == "live" and model is policy
    return (AdapterReference if is_policy else LiveReference)(model, placement.compute_dtype)


def freeze_reference(live: LiveReference, placement: SingleProcess, runner: MicrobatchRunner) -> str:
    """Freeze the reference model; returns a hash of its weights. All ranks call this together."""
    if live.model is not runner.policy:
        live.model.requires_grad_(False)
    reference_hash = weights_hash(live.model, placement.permutations, *reference_hash_spec(live.model))
    adapter = adapter_of(runner.policy)
    if adapter is not None:
        print(f"reference: {adapter.description}", flush=True)
    return reference_hash


def cache_reference(
    live: LiveReference,
    reference_hash: str,
    settings: Settings,
    placement: SingleProcess,
    runner: MicrobatchRunner,
    batches: Iterable[list[list[Example]]],
) -> CachedReference:
    """Log-probs of all examples under the reference, read from cache_dir or computed now."""
    numerics = (settings.mixed_precision, settings.matmul_precision, settings.batching, settings.compile)
    key = reference_key(reference_hash, numerics, placement.device)
    path = Path(settings.cache_dir or "") / "reference" / f"{key}.sqlite"
    cached = CachedReference(path, placement.gather_from_data_ranks)
    fill_cache(
        cached,
        live,
        batches,
        runner.lay_out,
        data_rank=placement.data_rank,
        num_data_ranks=placement.num_data_ranks,
    )
    return cached
