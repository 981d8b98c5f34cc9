"""The token budget of a microbatch, and how many layers recompute their activations."""

from collections.abc import Sequence

from engine.data.examples import Example
from engine.models.adapters import adapter_of
from engine.models.layers import find_layers
from engine.models.shards import local_shard
from engine.placement.memory import max_efficient_tokens, tokens_that_fit
from engine.placement.placement import Placement
from engine.settings.schema import LossSettings
from engine.step.layout import Microbatch, fed_tokens
from engine.step.microbatches import Batch, MicrobatchRunner
from utils import UserError


def fit_memory(
    placement: Placement, runner: MicrobatchRunner, examples: Sequence[Example], other_bytes: float = 0
) -> tuple[int, int]:
    """Token budget and number of recomputing layers: as set, or as memory allows.

    All ranks call this together, with the same result.

    Args:
        other_bytes: of a critic with its gradients and optimizer state, reward models, and another engine of sampling.
    """
    settings, policy = placement.settings, runner.policy
    num_layers = len(find_layers(policy, settings.model.block_name))
    layout = settings.batching, placement.feeds_last_token
    longest = int(fed_tokens(examples, *layout).max(initial=0))
    checkpointed = num_layers_to_recompute(settings.activation_checkpointing, num_layers)
    if (settings.token_budget is not None or settings.deterministic) and checkpointed is not None:
        return settings.token_budget or max(2048, longest), checkpointed
    weights = sum(local_shard(parameter).nbytes for parameter in policy.parameters())
    trained = sum(local_shard(parameter).nbytes for parameter in policy.parameters() if parameter.requires_grad)
    # Beside the weights: gradients, optimizer state, and temporaries of the optimizer or mixed precision.
    adapter = adapter_of(policy)
    has_copy = settings.has_live_reference and not (adapter and adapter.has_own_reference)
    state = 3 * trained + weights * (1 + has_copy) + int(other_bytes)
    wanted = max(settings.token_budget or 2048, longest)
    num_devices = len({parameter.device for parameter in policy.parameters()})  # they share the layers
    per_token = placement.bytes_per_token(runner, examples) / num_devices
    on_gpu, memory = placement.memory()
    tokens, num_checkpointed = tokens_that_fit(
        memory,
        state // num_devices,
        per_token,
        num_layers,
        wanted=wanted,
        most=max_efficient_tokens(on_gpu, trained // num_devices, per_token),
        checkpointed=checkpointed,
    )
    if checkpointed is None and num_checkpointed:
        print(f"activation_checkpointing: {num_checkpointed} of {num_layers} layers, to fit {wanted:,} tokens")
    # Machines may differ in memory, but ranks must agree.
    all_tokens, all_checkpointed = zip(*placement.gather_from_data_ranks((tokens, num_checkpointed)), strict=True)
    return settings.token_budget or min(all_tokens), max(all_checkpointed)


def num_layers_to_recompute(setting: str | bool | int, num_layers: int) -> int | None:
    """The number of layers set by activation_checkpointing; None for auto."""
    if setting == "auto":
        return None
    if isinstance(setting, bool):
        return num_layers if setting else 0
    return min(int(setting), num_layers)


def halve_budget(token_budget: int, batch: Batch, reason: str, loss: LossSettings) -> int:
    """A smaller token budget after memory ran out: it splits the largest microbatch.

    Args:
        reason: of the failed allocation.

    Raises:
        UserError: MEMORY if microbatches hold one example already, or one response where examples may be cut.
    """

    def size(microbatch: Microbatch) -> int:
        cut = microbatch.samples if loss.cuts_examples else None
        return microbatch.num_examples - microbatch.num_turns if cut is None else len(cut.lengths)

    if max(size(microbatch) for microbatch, _ in batch.microbatches) == 1:
        shorter = "rollout.max_new_tokens or max_length" if loss.is_online else "max_length"
        raise UserError(
            "MEMORY",
            f"out of memory with one {'response' if loss.cuts_examples else 'example'} at a time ({reason})",
            f"activation_checkpointing=true, mixed_precision=bfloat16, a smaller {shorter}, or more devices",
        )
    largest = max(microbatch.num_tokens for microbatch, _ in batch.microbatches)
    return max(1, min(token_budget, largest) // 2)
