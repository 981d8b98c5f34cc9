"""Placements: where weights, gradients and optimizer state live, and how ranks communicate.

The trainer asks its placement for both. The methods of Placement serve one process; other placements override them.
"""

import copy
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Self, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from engine.data.dialogues import count_turns
from engine.data.examples import Example
from engine.data.parts import join_parts
from engine.models.compiled_layers import check_compiler, compile_layers
from engine.models.layers import find_layers
from engine.models.optimizers import build_optimizer, load_optimizer_state, with_weight_decay
from engine.models.parameters import named_aliases, named_state
from engine.models.policy import load_policy
from engine.models.score_head import head_of, head_of_loss
from engine.models.shards import ShardPermutations, copy_to_shard
from engine.models.weight_files import checkpoint_weights
from engine.placement.memory import keep_freed_memory, measure_bytes_per_token, total_memory
from engine.settings.schema import QLoraSettings, Settings
from engine.step.attention import flash_serves
from engine.step.microbatches import Batch, MicrobatchRunner
from engine.step.packing_check import use_packed_attention
from engine.step.splitting import split_for_ranks
from utils import UserError

T = TypeVar("T")


class Placement:
    """One process: on the CPU, on a GPU, or with the layers of the model split among GPUs.

    Attributes:
        rank, num_ranks: (rank, world size).
        data_rank, num_data_ranks: the same among ranks with different examples.
        device: of batches.
        feeds_last_token: of responses, as the loss reads a score there.
        compute_dtype: run the models in this dtype; None if they are in it already.
        permutations: of parameters with shards in another order than their rows or columns.
        aliases: second name of a parameter -> its first.
    """

    unfused: Collection[str] = ()  # optimizers with no fused version for this placement's weights

    def __init__(self, settings: Settings, tokenizer: PreTrainedTokenizerBase, run_dir: Path):
        self.settings, self.tokenizer, self.run_dir = settings, tokenizer, run_dir
        self.rank, self.num_ranks, self.data_rank, self.num_data_ranks = 0, 1, 0, 1
        self.device = self.choose_device()
        keep_freed_memory(self.device)
        self.mixed_precision = getattr(torch, settings.mixed_precision) if settings.mixed_precision else None
        self.compute_dtype = self.mixed_precision
        self.feeds_last_token = head_of_loss(settings) == "score"
        self.permutations: ShardPermutations = {}
        self.aliases: dict[str, str] = {}

    def for_settings(self, settings: Settings) -> Self:
        """The same ranks and devices, for another model."""
        other = copy.copy(self)
        other.settings, other.feeds_last_token = settings, head_of_loss(settings) == "score"
        other.permutations, other.aliases = {}, {}
        return other

    def choose_device(self) -> torch.device:
        """This process's GPU, else the CPU."""
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")

    # ---- Processes ----

    def all_reduce_sum(self, totals: Tensor) -> None:
        """Add the tensors of all data-parallel ranks, in place."""

    def all_reduce_max(self, values: Tensor) -> None:
        """Leave the largest values of all data-parallel ranks, in place."""

    def gather_from_data_ranks(self, value: T) -> list[T]:
        """The values of all data-parallel ranks, in their order."""
        return [value]

    def split_batch(self, examples: Sequence[Example], num_parts: int, token_budget: int) -> list[list[Example]]:
        """Split a batch into microbatches, dealt round-robin to data-parallel ranks."""
        return self.split_among(self.num_data_ranks, examples, num_parts, token_budget)

    def split_among(
        self, num_ranks: int, examples: Sequence[Example], num_parts: int, token_budget: int
    ) -> list[list[Example]]:
        """Split a batch into microbatches for num_ranks ranks."""
        layout = self.settings.batching
        how = (layout, self.feeds_last_token, self.settings.loss.cuts_examples)
        return split_for_ranks(num_ranks, examples, num_parts, token_budget, *how)

    def rank_slice(self, microbatches: Sequence[list[Example]]) -> Sequence[list[Example]]:
        """The microbatches of this rank."""
        return microbatches[self.data_rank :: self.num_data_ranks]

    def split_mismatched(self, examples: Sequence[Example], num_parts: int, token_budget: int) -> list[list[Example]]:
        """Split the mismatched responses of a batch into microbatches, if it has any."""
        mismatched = [
            Example(example.prompt, (example.mismatched,), example.prompt_index, example.label)
            for example in examples
            if example.mismatched is not None
        ]
        return self.split_batch(mismatched, num_parts, token_budget) if mismatched else []

    def prepare_batch(
        self, runner: MicrobatchRunner, microbatches: Sequence[list[Example]], num_parts: int, token_budget: int
    ) -> Batch:
        """Lay out this rank's microbatches of a batch, on the device."""
        examples = [example for examples in microbatches for example in examples]
        mismatched = self.split_mismatched(examples, num_parts, token_budget)
        of_ranks = [microbatches[rank :: self.num_data_ranks] for rank in range(self.data_rank)]
        return Batch(
            join_parts(examples),
            token_budget,
            [runner.prepare(part) for part in self.rank_slice(microbatches)],
            first_example=sum(count_turns(part) for parts in of_ranks for part in parts),
            mismatched=[runner.prepare(part) for part in self.rank_slice(mismatched)],
        )

    # ---- Models ----

    def place_model(self, dtype: torch.dtype) -> PreTrainedModel:
        """A model with the starting weights, on its devices, in evaluation mode."""
        model = self.load_model(dtype, self.device)
        self.device = head_of(model).weight.device  # with layers split among GPUs, the head's
        self.aliases = named_aliases(model)
        return self.compile_layers(model).eval()

    def place_again(self, dtype: torch.dtype) -> PreTrainedModel:
        """place_model() during a run, when files may be gone.

        Raises:
            OSError: on all ranks alike.
        """
        try:
            return self.place_model(dtype)
        except UserError as error:
            raise OSError(str(error)) from error

    def load_model(self, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
        """A model with the starting weights. Trained parameters require gradients."""
        model = load_policy(self.settings, self.tokenizer, dtype, device, self.run_dir)
        if self.settings.batching == "packed":
            peft = self.settings.peft
            products = peft.compute_dtype if isinstance(peft, QLoraSettings) else None
            use_packed_attention(model, self.mixed_precision, getattr(torch, products) if products else None)
        return model

    def copy_policy(self, policy: PreTrainedModel) -> PreTrainedModel:
        """Another model with the weights of the untrained policy."""
        return self.compile_layers(copy.deepcopy(policy))

    def compile_layers(self, model: PreTrainedModel) -> PreTrainedModel:
        """Compile the layers of a model, if the settings say so."""
        if self.settings.compile:
            check_compiler(self.device)
            is_packed = model.config._attn_implementation == "packed"
            if is_packed and flash_serves(model, self.mixed_precision or model.dtype, self.device):
                model.set_attn_implementation("packed_compiled")
            compile_layers(find_layers(model, self.settings.model.block_name), model.get_input_embeddings())
        return model

    def gathered(self, model: PreTrainedModel) -> AbstractContextManager[None]:
        """Keep weights gathered inside a with block, for many forward passes in a row."""
        return nullcontext()

    def memory(self) -> tuple[bool, int]:
        """Whether the model runs on a GPU, and the bytes of memory there."""
        return self.device.type == "cuda", total_memory(self.device)

    def bytes_per_token(self, runner: MicrobatchRunner, examples: Sequence[Example]) -> float:
        """Bytes of saved activations per fed token, measured on this model.

        Args:
            examples: of the run; only their number of responses matters.
        """
        num_responses = len(examples[0].responses)
        return measure_bytes_per_token(runner, self.settings.max_length, num_responses)

    # ---- Optimizer ----

    def build_optimizer(self, policy: PreTrainedModel) -> torch.optim.Optimizer:
        """Build the optimizer of the trained parameters."""
        name = self.settings.optimizer
        groups = self.parameter_groups(policy)
        if self.settings.weight_decay is not None:
            groups = with_weight_decay(policy, groups, self.settings.weight_decay)
        return build_optimizer(name, groups, self.settings.lr, may_fuse=name not in self.unfused)

    def parameter_groups(self, policy: PreTrainedModel) -> list[dict[str, Any]]:
        """Trained parameters in groups. One optimizer operation mixes parameters of one group only."""
        return [{"params": [parameter for parameter in policy.parameters() if parameter.requires_grad]}]

    def start_backward(self, optimizer: torch.optim.Optimizer) -> None:
        """Called before the backward pass of each microbatch."""

    def finish_backward(self, policy: PreTrainedModel) -> None:
        """Called after the backward pass of the last microbatch of a batch."""

    def clip_gradients(self, policy: PreTrainedModel) -> Tensor:
        """Scale gradients down to max_grad_norm; returns the norm before scaling."""
        max_norm = self.settings.max_grad_norm
        parameters = [parameter for parameter in policy.parameters() if parameter.grad is not None]
        norm = nn.utils.get_total_norm([parameter.grad for parameter in parameters])
        if self.device.type != "cpu" or norm > max_norm:  # a comparison would wait for a GPU
            nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
        return norm

    # ---- Checkpoints ----

    def named_tensors(
        self, policy: PreTrainedModel, optimizer: torch.optim.Optimizer
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Weights and optimizer state by their names in checkpoints."""
        return self.named_weights(policy), named_state(policy, optimizer)

    def named_weights(self, model: PreTrainedModel) -> dict[str, Tensor]:
        """Weights by their names in checkpoints."""
        return checkpoint_weights(model)

    def restore(
        self,
        policy: PreTrainedModel,
        optimizer: torch.optim.Optimizer,
        tensors: Iterable[tuple[str, Tensor]],
        state: Mapping[str, dict[str, Tensor]],
    ) -> None:
        """Copy full weights and optimizer state into policy and optimizer.

        Args:
            tensors: the weights, by their names in checkpoints.
            state: parameter name -> kind of state -> value; empty to reset the optimizer.

        Raises:
            KeyError, ValueError: if names or shapes do not fit.
        """
        self.restore_weights(policy, tensors)
        load_optimizer_state(policy, optimizer, state, self.permutations)

    @torch.no_grad()
    def restore_weights(self, model: PreTrainedModel, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Copy full weights into a model. Takes and raises the same as restore()."""
        targets = checkpoint_weights(model)
        missing = set(targets)
        for name, tensor in tensors:
            if tensor.shape != targets[name].shape:  # copying would broadcast a smaller one
                raise ValueError(f"{name} has the shape {[*tensor.shape]}, not {[*targets[name].shape]}")
            copy_to_shard(targets[name], tensor, self.permutations.get(name))
            missing.remove(name)
        if missing:
            raise ValueError(f"it lacks {', '.join(sorted(missing))}")
