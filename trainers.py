"""The training loop: one loop for every loss; a trainer decides where the model is placed."""

import copy
import json
import math
import resource
import signal
import sys
import time
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import chain, islice
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from engine.adapters import (
    ADAPTER,
    AdapterReference,
    adapter_of,
    flops_per_token,
    hashing_of,
    load_policy,
    match_structure,
    num_weights,
    trained_parameters,
    write_adapter_config,
)
from engine.batching import (
    Microbatch,
    Part,
    cut_for,
    lay_out,
    lay_out_nothing,
    num_fed_tokens,
    num_planned,
    plan_batches,
)
from engine.checkpoint import (
    OPTIMIZER,
    STATE_FILE,
    WEIGHTS,
    CheckpointWriter,
    Contents,
    find_checkpoint,
    load_checkpoint,
    log_sizes,
    named_aliases,
    named_state,
    named_weights,
    point_to,
    read_state,
    reading,
    rewind,
    settings_of,
    state_by_parameter,
    tensors_of,
    write_policy_pt,
)
from engine.distributed import is_lost_peer, rank_0_first
from engine.logprobs import response_logps
from engine.memory import fitting, most_useful, saved_bytes, total_memory
from engine.metrics import Loggers, Moment, NoLoggers, Sums, fetched, peak_flops
from engine.models import find_blocks, hf_config_of, load_model, use_packed_attention
from engine.optimizers import build_optimizer
from engine.precision import model_in
from engine.reference import CachedReference, LiveReference, Reference, reference_key, weights_hash
from engine.sampling import sample_responses
from engine.sharding import (
    Orders,
    end_of_sums,
    full_tensor,
    gathered,
    global_norm,
    load_full,
    make_mesh,
    own,
    rank_and_size,
    shard_model,
    without_weights,
)
from engine.tensor_parallel import check_divides
from engine.validation import BEST_BY
from losses import LOSSES
from preference_datasets import DATASETS, Example, Split
from utils import StopRequest, UserError, ahead, content_hash, is_out_of_memory, write_atomically

T = TypeVar("T")
Prepared = tuple[Microbatch, Tensor | None]  # with reference log-probs of its responses, if they are cached


@dataclass
class Batch:
    """What all processes train on in one step, and what of it falls to this one."""

    examples: list[Example]
    token_budget: int
    microbatches: list[Prepared]


@dataclass
class Step:
    """An update of the policy that was started, and what is to be logged of it."""

    values: dict[str, Tensor]  # scalars on the device, known once it is done
    facts: dict[str, float]
    batch: Batch
    end: Moment


class BasicTrainer:
    """Trains in one process, on the CPU or a GPU; on several GPUs the layers of the model are split among them.

    What other trainers do otherwise is in the methods under "Processes" and "Models".

    Args:
        config: the composed and validated config.
        run_dir: where logs and checkpoints go.
        train_split, test_split: tokenised examples; without test examples there is no evaluation.
    """

    unfused: Collection[str] = ()  # optimizers that torch could fuse, but not for this trainer's weights

    def __init__(
        self,
        config: DictConfig,
        run_dir: Path,
        tokenizer: PreTrainedTokenizerBase,
        train_split: Split,
        test_split: Split,
    ):
        self.config = config
        self.run_dir = run_dir
        self.tokenizer = tokenizer
        self.train_examples = train_split.examples
        self.eval_examples = choose_eval_examples(test_split.examples, config.n_eval_examples, config.seed)
        self.num_train_examples = num_planned(len(self.train_examples), config.n_epochs, config.n_examples)
        self.num_updates = math.ceil(self.num_train_examples / config.batch_size)
        self.counters = {"examples": 0, "updates": 0, "skipped": 0}
        self.stop = StopRequest()
        self.must_stop = False
        self.loggers: Loggers | NoLoggers = NoLoggers()
        self.print_plan()

        self.loss = LOSSES[config.loss.name]
        own_keys = ("name", "average_log_prob", "sft_weight")
        self.loss_arguments = {key: value for key, value in config.loss.items() if key not in own_keys}

        torch.set_float32_matmul_precision(config.matmul_precision)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.mixed_precision = getattr(torch, config.mixed_precision) if config.mixed_precision else None
        self.cast_dtype = self.mixed_precision
        self.rank, self.num_ranks, self.data_rank, self.num_data_ranks = 0, 1, 0, 1
        self.orders: Orders = {}
        self.aliases: dict[str, str] = {}
        self.join_others()
        self.policy = self.place_model(getattr(torch, config.model.policy_dtype))
        self.aliases = self.aliases or named_aliases(self.policy)
        num_trained, num_all = num_weights(self.policy)
        print(f"parameters: {num_trained:,} of {num_all:,} are trained ({num_trained / num_all:.2%})", flush=True)
        self.reference: Reference | None = None
        self.reference_weights: str | None = None
        self.token_budget, self.num_checkpointed = self.fit_memory()
        self.reference_samples: list[np.ndarray] = []
        self.reference = self.build_reference()
        self.prepare_policy()
        self.optimizer = self.build_optimizer()

    def print_plan(self) -> None:
        """Say how long training will be, before anything heavy is loaded."""
        config, num_eval = self.config, len(self.eval_examples)
        per_epoch = math.ceil(len(self.train_examples) / config.batch_size)
        plan = f"training on {self.num_train_examples:,} examples in {self.num_updates:,} steps of {config.batch_size}"
        plan += f" ({per_epoch:,} an epoch), evaluating on {num_eval:,}"
        if num_eval < config.n_eval_examples:
            plan += f" (all there are; n_eval_examples={config.n_eval_examples})"
        if config.n_examples is not None and self.num_train_examples < config.n_examples:
            plan += f"; n_epochs={config.n_epochs} ends it before n_examples={config.n_examples}"
        print(plan, flush=True)

    # ---- Processes ----

    def join_others(self) -> None:
        """Find out which part of the work is this process's: set rank, num_ranks and data ranks."""

    def add_others(self, totals: Tensor) -> None:
        """Add to totals, in place, what the other processes have of them."""

    def of_data_ranks(self, value: T) -> list[T]:
        """The values that the processes which train on different examples give, in their order."""
        return [value]

    def clip_gradients(self) -> Tensor:
        """Scale gradients down to max_grad_norm; returns their norm before that."""
        parameters = [parameter for parameter in self.policy.parameters() if parameter.grad is not None]
        norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in parameters])
        if self.device.type != "cpu" or norm > self.config.max_grad_norm:  # a GPU is not waited for
            torch.nn.utils.clip_grads_with_norm_(parameters, self.config.max_grad_norm, norm)
        return norm

    def cut(self, examples: Sequence[Example], num_parts: int) -> list[list[Example]]:
        """Cut a batch into microbatches, which the processes that train on different examples take in turns."""
        return cut_for(self.num_data_ranks, examples, num_parts, self.token_budget, self.config.batching)

    def own(self, microbatches: Sequence[list[Example]]) -> Sequence[list[Example]]:
        """The microbatches of a batch that fall to this process."""
        return microbatches[self.data_rank :: self.num_data_ranks]

    # ---- Models ----

    def place_model(self, dtype: torch.dtype) -> PreTrainedModel:
        """A model with the starting weights, where this trainer runs it."""
        model = self.load_policy(dtype, self.device)
        self.device = model.get_output_embeddings().weight.device  # where layers are split, the head's
        return self.compiled(model).eval()

    def load_policy(self, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
        """A model with the starting weights, in which what is to be trained requires gradients."""
        model = load_policy(self.config, self.tokenizer, dtype, device, self.run_dir)
        if self.config.batching == "packed":
            products = self.config.peft.get("compute_dtype")
            use_packed_attention(model, self.mixed_precision, getattr(torch, products) if products else None)
        return model

    def copy_of_policy(self) -> PreTrainedModel:
        """Another model with the weights of the policy, before it is trained."""
        return self.compiled(copy.deepcopy(self.policy))

    def compiled(self, model: PreTrainedModel) -> PreTrainedModel:
        """The model, its blocks compiled if the config says so."""
        if self.config.compile:
            for block in find_blocks(model, self.config.model.block_name):
                # Rounded wherever the plain block rounds: the reference, which makes no gradients, would differ else.
                block.compile(dynamic=True, options={"emulate_precision_casts": True})
        return model

    def prepare_policy(self) -> None:
        """Make the policy trainable, after the reference was computed from it."""
        if self.num_checkpointed:
            self.policy.activation_checkpointing_enable({"use_reentrant": False})
            for block in find_blocks(self.policy, self.config.model.block_name)[self.num_checkpointed :]:
                setattr(block, "gradient_checkpointing", False)  # noqa: B010  mypy knows no such attribute
        self.policy.train()

    def build_optimizer(self) -> torch.optim.Optimizer:
        """The optimizer of the config."""
        name = self.config.optimizer
        return build_optimizer(name, self.parameter_groups(), self.config.lr, may_fuse=name not in self.unfused)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """The parameters that the optimizer updates at once."""
        return [{"params": [parameter for parameter in self.policy.parameters() if parameter.requires_grad]}]

    def build_reference(self) -> Reference | None:
        """Log-probs of the frozen reference: from a model that stays loaded, or computed now and kept on disk."""
        config = self.config
        if not self.loss.needs_reference or config.loss.get("reference_free"):
            return None
        # The policy starts as the reference: another copy is needed only if it must stay, or has another dtype.
        model, adapter = self.policy, adapter_of(self.policy)
        if config.model.reference_dtype not in (None, config.model.policy_dtype):
            model = self.place_model(getattr(torch, config.model.reference_dtype))
        elif config.reference == "live" and not (adapter and adapter.has_own_reference):
            model = self.copy_of_policy()
        if self.samples:
            self.reference_samples = self.sample(model)
        if model is not self.policy:
            model.requires_grad_(False)
        is_own = config.reference == "live" and model is self.policy
        live = (AdapterReference if is_own else LiveReference)(model, self.cast_dtype)
        self.reference_weights = weights_hash(model, self.orders, *hashing_of(model))
        if adapter is not None:
            print(f"reference: {adapter.description}", flush=True)
        if config.reference == "live":
            return live
        settings = (config.mixed_precision, config.matmul_precision, config.batching, config.compile)
        key = reference_key(self.reference_weights, settings, self.device)
        path = Path(config.cache_dir) / "reference" / f"{key}.sqlite"
        cached = CachedReference(path, self.of_data_ranks)
        self.fill(cached, live)
        return cached

    def fill(self, cached: CachedReference, live: LiveReference) -> None:
        """Compute what the cache lacks, in the microbatches of training, so that equal weights give equal numbers."""
        rounds, planned, num_before = [], set[bytes](), len(cached)
        # An epoch has every example: those after it may be many, and need nothing that is not planned by then.
        epoch = islice(self.train_batches(), math.ceil(len(self.train_examples) / self.config.batch_size))
        for batch in chain(epoch, self.eval_batches()):
            for start in range(0, len(batch), self.num_data_ranks):  # what the processes run at a time
                microbatches = batch[start : start + self.num_data_ranks]
                examples = [example for part in microbatches for example in part]
                missing = cached.missing(
                    (example.prompt, answer) for example in examples for answer in example.responses
                )
                if missing - planned:
                    rounds.append(microbatches)
                    planned |= missing
        if not rounds:
            print(f"reference: all log-probs are in {cached.path}")
            return
        begun = time.monotonic()
        disable = not sys.stderr.isatty() or self.rank > 0
        with live.in_mixed_precision():
            for microbatches in tqdm(rounds, desc="reference log-probs", unit="microbatch", disable=disable):
                microbatch = self.lay_out(microbatches[self.data_rank])
                cached.add(microbatch, live.logps(microbatch))
        seconds = time.monotonic() - begun
        print(f"reference: {len(cached) - num_before:,} log-probs computed in {seconds:.1f} s, kept in {cached.path}")

    def fit_memory(self) -> tuple[int, int]:
        """The tokens of a forward pass, and the number of blocks that recompute their activations: as the config says,
        or as memory allows."""
        config = self.config
        blocks = find_blocks(self.policy, config.model.block_name)
        longest = max((num_fed_tokens(example, config.batching) for example in self.train_examples), default=0)
        given = config.activation_checkpointing
        if isinstance(given, bool):
            given = len(blocks) if given else 0
        given = None if given == "auto" else min(given, len(blocks))
        if (config.token_budget is not None or config.deterministic) and given is not None:
            return config.token_budget or max(2048, longest), given
        weights = sum(own(parameter).nbytes for parameter in self.policy.parameters())
        trained = sum(own(parameter).nbytes for parameter in self.policy.parameters() if parameter.requires_grad)
        # Beside the weights: their gradients, the optimizer's state and what it or mixed precision needs on the way.
        adapter = adapter_of(self.policy)
        has_copy = config.reference == "live" and not (adapter and adapter.has_own_reference)
        state = 3 * trained + weights * (1 + has_copy)
        wanted = max(config.token_budget or 2048, longest)
        num_devices = len({parameter.device for parameter in self.policy.parameters()})  # that share the layers
        per_token = self.bytes_per_token() / num_devices
        on_gpu, memory = self.hardware()
        tokens, num_checkpointed = fitting(
            memory,
            state // num_devices,
            per_token,
            len(blocks),
            wanted=wanted,
            most=most_useful(on_gpu, trained // num_devices, per_token),
            checkpointed=given,
        )
        if given is None and num_checkpointed:
            print(f"activation_checkpointing: {num_checkpointed} of {len(blocks)} blocks, to fit {wanted:,} tokens")
        # The processes must agree, and those of several machines may not have the same memory.
        all_tokens, all_checkpointed = zip(*self.of_data_ranks((tokens, num_checkpointed)), strict=True)
        return config.token_budget or min(all_tokens), max(all_checkpointed)

    def hardware(self) -> tuple[bool, int]:
        """Whether the model runs on a GPU, and the bytes of memory there."""
        return self.device.type == "cuda", total_memory(self.device)

    def bytes_per_token(self) -> float:
        """Bytes of activations that a fed token keeps for the backward pass, measured on this model."""

        def measured(num_examples: int) -> tuple[int, int]:
            ids = np.zeros(64, dtype=np.int32)
            length = max(1, min(32, (self.config.max_length - 5) // 2))
            responses = (ids[:length], ids[: length + 1])[: len(self.train_examples[0].responses)]
            prompts = (ids[: length + 1 + index] for index in range(num_examples))
            batch = self.lay_out([Example(prompt, responses, index) for index, prompt in enumerate(prompts)])
            with self.in_mixed_precision():
                kept = saved_bytes(lambda: response_logps(self.policy, batch, lambda logps, part: logps.sum())[0])
            return kept, batch.input_ids.numel()

        (few, few_tokens), (many, many_tokens) = measured(1), measured(4)
        return (many - few) / (many_tokens - few_tokens)  # what does not grow with the tokens is not theirs

    # ---- Data ----

    def train_batches(self, start: int = 0) -> Iterator[list[list[Example]]]:
        """The batches of the run after its first start examples, in order, each cut into microbatches."""
        config = self.config
        plan = plan_batches(
            self.train_examples,
            config.batch_size,
            seed=config.seed,
            n_epochs=config.n_epochs,
            n_examples=config.n_examples,
            length_grouping=config.length_grouping,
        )
        indices = islice(chain.from_iterable(plan), start, None)
        while batch := [self.train_examples[index] for index in islice(indices, config.batch_size)]:
            yield self.cut(batch, config.gradient_accumulation_steps)

    def eval_batches(self) -> Iterator[list[list[Example]]]:
        """The evaluation examples, eval_batch_size at a time, each cut into microbatches."""
        for start in range(0, len(self.eval_examples), self.config.eval_batch_size):
            yield self.cut(self.eval_examples[start : start + self.config.eval_batch_size], 1)

    def lay_out(self, examples: Sequence[Example]) -> Microbatch:
        """Examples as one microbatch, on the device."""
        if not examples:
            return lay_out_nothing(2 if self.loss.batch == "pairs" else 1, self.config.batching).to(self.device)
        return lay_out(examples, self.config.batching, self.tokenizer.pad_token_id).to(self.device)

    # ---- The step ----

    def losses(
        self, batch: Microbatch, reference_logps: Tensor | None, sums: Sums, logps: Tensor, part: Part
    ) -> Tensor:
        """Losses of the examples in a part of a microbatch, from the log-probs of its responses.

        Args:
            reference_logps: of all responses of batch, [responses]; None without a reference.
            sums: takes the metrics, per example.
            logps: of the responses of part, [responses of part].

        Returns:
            losses, [examples of part].
        """
        lengths = batch.response_lengths[part.responses]
        scale = lengths if self.config.loss.average_log_prob else 1

        def of_examples(values: Tensor) -> list[Tensor]:  # [responses of part] -> chosen and rejected [examples]
            roles = (batch.chosen, batch.rejected)
            return [values[role[part.examples] - part.responses.start] for role in roles if role is not None]

        policy = of_examples(logps / scale)
        sums.add(**{f"logps/{role}": value for role, value in zip(("chosen", "rejected"), policy, strict=False)})
        reference: list[Tensor] = []
        if reference_logps is not None:
            reference = of_examples(reference_logps[part.responses].to(logps.dtype) / scale)
        elif self.loss.needs_reference:  # reference_free
            reference = [torch.zeros_like(value) for value in policy]
        output = self.loss.function(*policy, *reference, **self.loss_arguments)
        if self.loss.batch == "pairs":
            losses, chosen_rewards, rejected_rewards = output
            sums.add(
                **{
                    "rewards/chosen": chosen_rewards,
                    "rewards/rejected": rejected_rewards,
                    "rewards/accuracies": (chosen_rewards > rejected_rewards).float(),
                    "rewards/margins": chosen_rewards - rejected_rewards,
                }
            )
        else:
            losses = output
        if self.config.loss.get("sft_weight"):
            losses = losses - self.config.loss.sft_weight * of_examples(logps / lengths)[0]
        sums.add(loss=losses)
        return losses

    def prepared(self, batches: Iterable[list[list[Example]]]) -> Iterator[Batch]:
        """Batches laid out on the device, with the log-probs of a cached reference, one batch ahead of its use."""

        return ahead(map(self.prepare, batches))

    def prepare(self, microbatches: Sequence[list[Example]]) -> Batch:
        """A batch laid out, of which this process has its own microbatches."""

        def laid_out(examples: list[Example]) -> Prepared:
            batch = self.lay_out(examples)
            return batch, self.reference.logps(batch) if isinstance(self.reference, CachedReference) else None

        return Batch(
            examples=[example for examples in microbatches for example in examples],
            token_budget=self.token_budget,
            microbatches=[laid_out(examples) for examples in self.own(microbatches)],
        )

    def run_microbatch(self, prepared: Prepared, num_examples: int, sums: Sums) -> Tensor:
        """The share of some examples in the mean loss of num_examples: a scalar to call backward on."""
        batch, reference_logps = prepared
        if isinstance(self.reference, LiveReference):
            reference_logps = self.reference.logps(batch)
        losses = partial(self.losses, batch, reference_logps, sums)
        loss, _ = response_logps(self.policy, batch, lambda logps, part: losses(logps, part).sum() / num_examples)
        sums.counts["tokens"] += batch.num_tokens
        return loss

    @contextmanager
    def in_mixed_precision(self) -> Iterator[None]:
        """Inside this, policy and live reference compute in the dtype of mixed_precision."""
        reference = self.reference.in_mixed_precision() if isinstance(self.reference, LiveReference) else nullcontext()
        with model_in(self.policy, self.cast_dtype), reference:
            yield

    def learning_rate(self) -> float:
        """Of the coming update: linear warm-up, then constant or a decay that would reach 0 after the last update."""
        config, update = self.config, self.counters["updates"]
        if update < config.warmup_steps:
            return config.lr * (update + 1) / (config.warmup_steps + 1)
        done = (update - config.warmup_steps) / max(1, self.num_updates - config.warmup_steps)
        decay = {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}
        return config.lr * decay[config.lr_schedule]

    def add_gradients(self, batch: Batch, sums: Sums) -> None:
        """Make the gradients of the mean loss of a batch."""
        with self.in_mixed_precision():
            for prepared in batch.microbatches:
                self.run_microbatch(prepared, len(batch.examples), sums).backward()

    def fitted_gradients(self, batch: Batch) -> tuple[Batch, Sums]:
        """Make the gradients of a batch; where memory runs out, again in smaller microbatches, which all later batches
        are cut into too. The gradients are the same."""
        while True:
            sums = Sums()
            try:
                self.add_gradients(batch, sums)
                return batch, sums
            except Exception as error:
                # Processes that wait for this one cannot be told.
                if not is_out_of_memory(error) or self.num_ranks > 1:
                    raise
                largest = max(microbatch.num_examples for microbatch, _ in batch.microbatches)
                reason = str(error).partition("\n")[0]
            if largest == 1:
                raise UserError(
                    "MEMORY",
                    f"out of memory with one example at a time ({reason})",
                    "activation_checkpointing=true, mixed_precision=bfloat16, a smaller max_length, or more devices",
                )
            self.optimizer.zero_grad(set_to_none=True)
            fed = max(microbatch.num_tokens for microbatch, _ in batch.microbatches)
            self.token_budget = max(1, min(self.token_budget, fed) // 2)
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            self.loggers.print(f"out of memory ({reason}): token_budget is {self.token_budget:,} from now on")
            batch = self.prepare(self.cut(batch.examples, self.config.gradient_accumulation_steps))

    def step(self, batch: Batch) -> Step:
        """One update of the policy on a batch. A GPU may still be at work on it when this returns."""
        if batch.token_budget > self.token_budget:  # laid out before memory ran out
            batch = self.prepare(self.cut(batch.examples, self.config.gradient_accumulation_steps))
        if self.config.peft.get("dropout"):  # the same on a resumed run
            torch.manual_seed(hash((self.config.seed, self.counters["updates"], self.rank)) % 2**32)
        batch, sums = self.fitted_gradients(batch)
        if not self.counters["updates"]:
            self.check_gradients()
        grad_norm = self.clip_gradients()
        sums.counts["stop"] = self.stop.signal is not None
        means, counts = sums.means(self.add_others)
        learning_rate = self.learning_rate()
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.update(grad_norm.isfinite().to(self.device) & means["loss"].isfinite().to(self.device))
        self.optimizer.zero_grad(set_to_none=True)
        self.counters["examples"] += len(batch.examples)
        self.counters["updates"] += 1
        return Step(
            values=named(means, "train") | {"grad_norm": grad_norm} | counts,
            facts={"learning_rate": learning_rate, "peak_memory_gb": self.peak_memory_gb()} | self.counted(),
            batch=batch,
            end=Moment(self.device),
        )

    def update(self, is_finite: Tensor) -> None:
        """Let the optimizer take its step, if loss and gradients are finite."""
        if self.runs_ahead and getattr(self.optimizer, "_step_supports_amp_scaling", False) and self.num_ranks == 1:
            # Fused optimizers look for themselves, so that nobody has to wait for the GPU.
            self.optimizer.grad_scale, self.optimizer.found_inf = None, (~is_finite).float()  # type: ignore[attr-defined]
            self.optimizer.step()
        elif is_finite:
            self.optimizer.step()

    def check_gradients(self) -> None:
        """Raise a UserError that names the parameters that are to be trained and received no gradient."""
        without = [name for name, p in self.policy.named_parameters() if p.requires_grad and p.grad is None]
        if without:
            shown = ", ".join(without[:5]) + (f" and {len(without) - 5} more" if len(without) > 5 else "")
            raise UserError(
                "CONFIG", f"model: {len(without)} parameters received no gradient: {shown}", "use a model without them"
            )

    @property
    def runs_ahead(self) -> bool:
        """Whether a step may return before it is done, so that it is logged when the next one has been started."""
        return self.device.type != "cpu" and self.config.on_nonfinite != "rollback"  # which the next step must see

    def metrics_of(self, step: Step, start: Moment) -> dict[str, float] | None:
        """The metrics of a step that began at start, once it is done; None if it was skipped: they are not finite."""
        seconds = step.end.seconds_since(start)
        metrics = fetched(step.values)
        tokens_per_second = metrics.pop("tokens") / seconds
        self.must_stop |= metrics.pop("stop") > 0
        if not math.isfinite(metrics["loss/train"]) or not math.isfinite(metrics["grad_norm"]):
            self.handle_nonfinite(step, metrics)
            return None
        metrics |= step.facts | self.counted_skips()
        metrics["examples_per_second"] = len(step.batch.examples) / seconds
        metrics["tokens_per_second"] = tokens_per_second
        peak = peak_flops(self.device)
        if peak:
            metrics["mfu"] = flops_per_token(self.policy) * tokens_per_second / (peak * self.num_ranks)
        return metrics

    def handle_nonfinite(self, step: Step, metrics: dict[str, float]) -> None:
        """Abort, or go on without a batch whose loss or gradient is not finite; the optimizer has not seen it."""
        config = self.config
        update = int(step.facts["counters/updates"])
        dump = self.run_dir / f"nonfinite-{update}.json"
        prompts = sorted({example.prompt_index for example in step.batch.examples})
        found = {"update": update, **step.facts, "loss": str(metrics["loss/train"]), "norm": str(metrics["grad_norm"])}
        examples = [
            {
                "prompt_index": e.prompt_index,
                "prompt": e.prompt.tolist(),
                "responses": [r.tolist() for r in e.responses],
            }
            for e in step.batch.examples
        ]
        if self.rank == 0:
            write_atomically(dump, json.dumps(found | {"examples": examples}).encode())
        what = (
            f"update {update} had loss {metrics['loss/train']} and gradient norm {metrics['grad_norm']},"
            f" on the prompts number {prompts} of the training data, whose tokens are in {dump}"
        )
        self.counters["skipped"] += 1
        if config.on_nonfinite == "abort" or self.counters["skipped"] > config.max_nonfinite:
            if config.on_nonfinite != "abort":
                what = f"more than max_nonfinite={config.max_nonfinite} batches are not finite; {what}"
            self.fail_as_non_finite(what)
        if config.on_nonfinite == "rollback":
            self.say_saved(wait=True, together=True)
            found_here = find_checkpoint(self.run_dir, "on_nonfinite=rollback") if self.rank == 0 else None
            saved = self.of_data_ranks(found_here)[0]
            if saved is None:
                self.fail_as_non_finite(f"there is no checkpoint to roll back to; {what}")
            self.load(saved)
            self.loggers.print(f"{what}: back to the weights of {saved.name}, on with the next batch")
        else:
            self.loggers.print(f"{what}: skipped")

    def fail_as_non_finite(self, what: str) -> NoReturn:
        raise UserError(
            "NONFINITE",
            f"{what} (counters/updates is {self.counters['updates']})",
            "lower lr or raise warmup_steps, and look at the data; the last checkpoint is untouched",
        )

    def counted(self) -> dict[str, float]:
        return {f"counters/{name}": self.counters[name] for name in ("examples", "updates")}

    def counted_skips(self) -> dict[str, float]:
        """How many batches were skipped, if any were; known when a step is logged, not when it is started."""
        return {"counters/skipped": self.counters["skipped"]} if self.counters["skipped"] else {}

    def peak_memory_gb(self) -> float:
        """The most memory held so far, in 10^9 bytes: of the GPU, or of this process on a CPU."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated() / 1e9
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9

    # ---- The run ----

    def train(self, checkpoint: Path | None = None) -> int | None:
        """Train, evaluate and save as the config says; from checkpoint on, if one is given.

        Returns:
            the signal that it was told to stop by, after the state was saved; None if there was none.
        """
        batches = self.train_batches()
        self.best: dict[str, Any] = {}  # by keep_best, of those that were saved: metric, value, checkpoint
        if self.config.keep_best and not self.eval_examples:
            raise UserError("CONFIG", "keep_best: there are no examples to evaluate on", "leave it out")
        evaluates_first = self.config.do_first_eval
        if checkpoint is not None:
            state = read_state(checkpoint, self.data_hash, self.reference_weights, self.base_hash)
            self.load(checkpoint)
            if self.rank == 0:
                rewind(self.run_dir, state["log_sizes"])
            self.counters, evaluates_first = state["counters"], state["evaluation_due"]
            self.token_budget = min(self.token_budget, state["token_budget"])  # memory may have run out before
            batches = self.train_batches(start=self.counters["examples"])
            best = state["best"]
            if best.get("metric") == self.config.keep_best and (self.run_dir / best.get("checkpoint", "")).is_dir():
                self.best = best
                if best and self.rank == 0:  # which a run that was killed may not have come to
                    point_to(self.run_dir / best["checkpoint"], "BEST")
            print(f"resumed from {checkpoint}, after {self.counters['examples']} examples")
        if self.rank == 0:
            self.loggers = Loggers(self.config, self.run_dir, self.num_train_examples, self.counters["examples"])
        self.eval_metrics: dict[str, float] = {}
        self.evaluated_at = -1
        self.writer = CheckpointWriter(self.run_dir, self.config.keep_checkpoints)
        is_done = False
        try:
            with self.stop:
                is_last = self.counters["examples"] >= self.num_train_examples
                if evaluates_first and not self.evaluate():
                    self.save(is_last, evaluation_due=True)
                else:
                    if evaluates_first and checkpoint is not None:  # it was saved when there was no time for that
                        self.save(is_last, evaluation_due=False)
                    self.train_on(batches)
                self.say_saved(wait=True, together=True)
            is_done = not self.must_stop
        except Exception as error:
            if not is_lost_peer(error):  # who has parts of it
                with suppress(Exception):  # what was begun before is worth having
                    # Numbers that are not finite end all processes alike.
                    together = isinstance(error, UserError) and error.code == "NONFINITE"
                    self.say_saved(wait=True, together=together)
            raise
        finally:
            self.loggers.close(is_done)
        return self.stop.signal or (signal.SIGTERM if self.must_stop else None)

    def train_on(self, batches: Iterable[list[list[Example]]]) -> None:
        """Take a step for each batch; evaluate, save and log between them. Ends early if it is told to stop."""
        config = self.config
        running: Step | None = None
        start = Moment(self.device)  # of the running step

        def log_running() -> None:
            nonlocal running, start
            done, running = running, None
            if done is not None:
                metrics = self.metrics_of(done, start)
                if metrics is not None:
                    self.loggers.train(metrics)
                start = done.end

        for batch in self.prepared(batches):
            before = self.counters["examples"]
            step = self.step(batch)
            log_running()  # of the step before, while a GPU runs this one
            running = step
            now = self.counters["examples"]
            is_last = now >= self.num_train_examples
            save_every = config.save_every or config.eval_every
            evaluates = is_last or now // config.eval_every > before // config.eval_every
            saves = is_last or now // save_every > before // save_every
            if evaluates or saves or self.must_stop or not self.runs_ahead:
                log_running()
            is_evaluated = evaluates and not self.must_stop and self.evaluate()
            if saves or self.must_stop:
                self.save(is_last, evaluation_due=evaluates and not is_evaluated)
            if self.must_stop:
                return
            self.say_saved(wait=False)
            if evaluates or saves:
                start = Moment(self.device)

    def say_saved(self, wait: bool, together: bool = False) -> None:
        """Print that a checkpoint was saved, once it is; together: by all processes, which all call this."""
        path = self.writer.finished(wait, together)
        if path is not None:
            self.loggers.print(f"saved {path}")

    def told_to_stop(self) -> bool:
        """Whether any process is; all call this together."""
        told = torch.tensor([self.stop.signal is not None], dtype=torch.float64, device=self.device)
        self.add_others(told)
        self.must_stop |= told.item() > 0
        return self.must_stop

    def evaluate(self) -> bool:
        """Log the metrics of the evaluation examples, and answers sampled to their prompts; returns whether that was
        done: it is left when the run is told to stop."""
        if not self.eval_examples:
            return True
        self.policy.eval()
        sums = Sums()
        with torch.no_grad(), self.in_mixed_precision():
            for batch in self.prepared(self.eval_batches()):
                if self.told_to_stop():
                    return False
                for prepared in batch.microbatches:
                    self.run_microbatch(prepared, len(self.eval_examples), sums)
        self.eval_metrics = fetched(named(sums.means(self.add_others)[0], "eval"))
        if not math.isfinite(self.eval_metrics["loss/eval"]):
            self.fail_as_non_finite(f"the evaluation has loss {self.eval_metrics['loss/eval']}")
        if self.told_to_stop():
            return False
        if self.samples:
            self.eval_metrics |= self.log_samples()
        self.loggers.eval(self.eval_metrics | self.counted() | self.counted_skips())
        self.evaluated_at = self.counters["examples"]
        self.policy.train()
        return True

    @property
    def samples(self) -> bool:
        """Whether answers are sampled in evaluations."""
        return self.config.sample_during_eval and bool(self.sample_prompts())

    def sample(self, model: PreTrainedModel) -> list[np.ndarray]:
        """An answer of model to each prompt that is sampled for, as token ids; the processes share the prompts."""
        own = self.sample_prompts()[self.data_rank :: self.num_data_ranks]
        seed = int(content_hash(["sample", self.config.seed, self.counters["examples"]])[:8], 16) + self.data_rank
        # Frozen weights may be kept in the dtype that they run in.
        with model_in(model, self.cast_dtype if adapter_of(model) else None):
            answers = sample_responses(
                model,
                self.tokenizer,
                own,
                max_new_tokens=self.config.max_length - self.config.max_prompt_length,
                max_length=self.config.max_length,
                batch_size=self.config.eval_batch_size,
                seed=seed,
            )
        by_rank = self.of_data_ranks(answers)
        return [
            by_rank[index % self.num_data_ranks][index // self.num_data_ranks]
            for index in range(len(self.sample_prompts()))
        ]

    def sample_prompts(self) -> list[np.ndarray]:
        """The first n_eval_model_samples distinct prompts of the evaluation examples."""
        prompts = {example.prompt.tobytes(): example.prompt for example in self.eval_examples}
        return list(prompts.values())[: self.config.n_eval_model_samples]

    def log_samples(self) -> dict[str, float]:
        """Sample and log answers of the policy, beside the reference's; returns what can be measured of them: the
        ground-truth reward where the data set has one, the KL to a live reference in nats per answer."""
        prompts = self.sample_prompts()
        answers = {"policy": self.sample(self.policy)}
        if self.reference_samples:
            answers["reference"] = self.reference_samples
        texts = {who: self.tokenizer.batch_decode(ids, skip_special_tokens=True) for who, ids in answers.items()}
        rows: list[dict[str, Any]] = [
            {"examples": self.counters["examples"], "prompt": prompt}
            for prompt in self.tokenizer.batch_decode(prompts, skip_special_tokens=True)
        ]
        for who in texts:
            for row, text in zip(rows, texts[who], strict=True):
                row[who] = text
        metrics = {}
        rewards = [DATASETS[name].reward if name in DATASETS else None for name in self.config.datasets]
        if len(rewards) == 1 and (reward := rewards[0]) is not None:
            for who in texts:
                for row in rows:
                    row[f"{who}_reward"] = reward(row[who])
                metrics[f"ground_truth/{who}"] = float(np.mean([row[f"{who}_reward"] for row in rows]))
            if "reference" in texts:
                differences = np.array([row["policy_reward"] - row["reference_reward"] for row in rows])
                metrics["ground_truth/win_rate"] = float(np.mean((differences > 0) + 0.5 * (differences == 0)))
        if isinstance(self.reference, LiveReference):
            metrics["kl_eval"] = self.estimate_kl(prompts, answers["policy"])
        self.loggers.samples(rows)
        return metrics

    @torch.no_grad()
    def estimate_kl(self, prompts: Sequence[np.ndarray], answers: Sequence[np.ndarray]) -> float:
        """The mean of log(policy / reference) over answers sampled from the policy: an unbiased estimate of
        KL(policy || reference) in nats per answer."""
        assert self.reference is not None
        examples = [
            Example(*pair, index) for index, pair in enumerate(zip(prompts, ((a,) for a in answers), strict=True))
        ]
        ratios = []
        for microbatch in self.own(self.cut(examples, 1)):
            batch = self.lay_out(microbatch)
            policy = LiveReference(self.policy, self.cast_dtype).logps(batch)
            ratios.append(policy - self.reference.logps(batch))
        return torch.cat([torch.cat(of_rank).cpu() for of_rank in self.of_data_ranks(ratios)]).mean().item()

    # ---- Checkpoints ----

    @cached_property
    def data_hash(self) -> str:
        """A hash of the training examples."""
        return content_hash(
            array.tobytes() for example in self.train_examples for array in (example.prompt, *example.responses)
        )

    @property
    def base_hash(self) -> str | None:
        """A hash of the weights of the base model, if adapters are trained."""
        adapter = adapter_of(self.policy)
        return None if adapter is None else adapter.base_hash

    def named_tensors(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The weights of the policy and the state of the optimizer, as checkpoints have them."""
        is_adapter = adapter_of(self.policy) is not None
        weights = trained_parameters(self.policy) if is_adapter else named_weights(self.policy)
        return dict(weights), named_state(self.policy, self.optimizer)

    def load(self, checkpoint: Path) -> None:
        """Give policy and optimizer what a checkpoint has."""
        kind, (weights, _) = ADAPTER if adapter_of(self.policy) else WEIGHTS, self.named_tensors()
        load_checkpoint(checkpoint, self.policy, self.optimizer, self.orders, kind, weights)

    def is_best(self) -> bool:
        """Whether the policy was just evaluated better than all that were saved before, by keep_best."""
        name = self.config.keep_best
        if name is None or self.evaluated_at != self.counters["examples"]:
            return False
        if name not in self.eval_metrics:
            found = ", ".join(sorted(self.eval_metrics))
            raise UserError("CONFIG", f"keep_best: the evaluation has no {name}", f"choose one of {found}")
        value = self.eval_metrics[name]
        if self.best and not (value > self.best["value"] if BEST_BY[name] else value < self.best["value"]):
            return False
        self.best = {"metric": name, "value": value, "checkpoint": f"step-{self.counters['examples']}"}
        return True

    def save(self, is_last: bool, evaluation_due: bool) -> None:
        """Begin to write a checkpoint.

        Args:
            is_last: it gets a policy.pt too.
            evaluation_due: a run that goes on from it evaluates first, as there is no time left for that now.
        """
        if self.config.debug:
            return
        trained = [parameter for parameter in self.policy.parameters() if parameter.requires_grad]
        num_bad = torch.stack([(~own(p).isfinite()).sum().to(self.device) for p in trained]).sum().double()
        self.add_others(num_bad)
        if num_bad > 0:
            self.fail_as_non_finite("a weight is not a number")
        self.say_saved(wait=True, together=True)  # of the one before
        contents, (weights, state) = Contents(), self.named_tensors()
        adapter = adapter_of(self.policy)
        contents.add(ADAPTER if adapter else WEIGHTS, weights, self.orders, in_one=adapter is not None)
        contents.add(OPTIMIZER, state, self.orders)
        examples, metrics, is_best = self.counters["examples"], self.eval_metrics, self.is_best()
        facts = {
            "counters": dict(self.counters),
            "evaluation_due": evaluation_due,
            "log_sizes": log_sizes(self.run_dir),
            "settings": settings_of(self.config),
            "data": self.data_hash,
            "reference": self.reference_weights,
            "base": self.base_hash,
            "token_budget": self.token_budget,
            "best": self.best,
        }
        if adapter is not None and self.reference is not None:
            facts["reference_model"] = adapter.description

        # As they are now: sampling, which goes on beside the writing, has settings of its own.
        model_config, generation_config = copy.deepcopy((self.policy.config, self.policy.generation_config))

        def write_rest(directory: Path) -> None:
            if adapter is not None:
                write_adapter_config(adapter, directory)
            else:
                model_config.save_pretrained(directory)
                generation_config.save_pretrained(directory)
            self.tokenizer.save_pretrained(directory)
            (directory / STATE_FILE).write_text(json.dumps(facts, indent=1))
            if is_last and adapter is None:  # export.py makes one of merged weights
                write_policy_pt(directory, examples, self.aliases, metrics)

        policy_pt_bytes = sum(tensor.nbytes for tensor in weights.values()) if is_last and adapter is None else 0
        self.writer.start(examples, contents, write_rest, policy_pt_bytes, is_best)


def choose_eval_examples(examples: Sequence[Example], count: int, seed: int) -> list[Example]:
    """The first count examples of the test split in a shuffled order, all of them if it holds fewer."""
    plan = plan_batches(examples, max(1, len(examples)), seed=seed, n_epochs=1, n_examples=None)
    return [examples[index] for indices in plan for index in indices][:count]


def named(means: dict[str, Tensor], split: str) -> dict[str, Tensor]:
    """Metrics under the names that users see: loss/train, rewards_train/chosen, logps_eval/rejected, ..."""
    names = {name: f"{name.split('/')[0]}_{split}/{name.split('/')[-1]}" for name in means} | {"loss": f"loss/{split}"}
    return {names[name]: value for name, value in means.items()}


class ShardedTrainer(BasicTrainer):
    """Trains in several processes, each of which has a share of the weights; see engine/sharding.py."""

    unfused = ("SGD", "Adagrad")

    def grid(self) -> tuple[int, int, int]:
        """Replicas, shards and tensor-parallel processes: how the processes are arranged."""
        raise NotImplementedError

    def join_others(self) -> None:
        self.rank, self.num_ranks = rank_and_size()
        if self.device.type == "cuda":
            self.device = torch.device("cuda", torch.cuda.current_device())
        replicas, shards, tensor = self.grid()
        if shards < 1 or replicas * shards * tensor != self.num_ranks:
            raise UserError(
                "CONFIG",
                f"num_processes: {self.num_ranks} is no multiple of tensor_parallel_size x fsdp.replicas,"
                f" {tensor} x {replicas}",
                "choose numbers that divide it",
            )
        self.mesh = make_mesh(self.device, replicas, shards, tensor)
        self.data_rank, self.num_data_ranks = self.rank // tensor, replicas * shards
        self.cast_dtype = None  # FSDP casts

    def add_others(self, totals: Tensor) -> None:
        dist.all_reduce(totals)
        totals /= self.num_ranks // self.num_data_ranks  # those that train on the same examples have the same

    def of_data_ranks(self, value: T) -> list[T]:
        values: list[Any] = [None] * self.num_ranks
        dist.all_gather_object(values, value)
        return values[:: self.num_ranks // self.num_data_ranks]

    def cut(self, examples: Sequence[Example], num_parts: int) -> list[list[Example]]:
        if not self.config.deterministic:
            return super().cut(examples, num_parts)
        # A cut that the number of processes has no part in, and empty microbatches for those that have none in the end.
        microbatches = cut_for(1, examples, num_parts, self.token_budget, self.config.batching)
        return microbatches + [[] for _ in range(-len(microbatches) % self.num_data_ranks)]

    def place_model(self, dtype: torch.dtype) -> PreTrainedModel:
        config = self.config
        if self.mesh["tensor"].size() > 1:
            check_divides(hf_config_of(config.model, self.tokenizer), self.mesh["tensor"].size())
        if config.model.trust_remote_code:  # so that every process has the code that came with the model
            hf_config_of(config.model, self.tokenizer)
        with rank_0_first():
            full = self.load_policy(dtype, torch.device("cpu")) if self.rank == 0 else None
        empty = without_weights(full, config.model.trust_remote_code)
        model = self.compiled(match_structure(empty, full, config, config.model.block_name))
        self.orders = shard_model(
            model,
            find_blocks(model, config.model.block_name),
            self.mesh,
            mixed_precision=self.mixed_precision,
            offload=config.fsdp.cpu_offload,
            deterministic=config.deterministic,
        )
        load_full(model, full, self.orders, self.device, config.fsdp.cpu_offload)
        return model

    def copy_of_policy(self) -> PreTrainedModel:
        return self.place_model(getattr(torch, self.config.model.policy_dtype))

    def parameter_groups(self) -> list[dict[str, Any]]:
        groups: dict[DeviceMesh, list[nn.Parameter]] = {}  # no operation mixes tensors of several meshes
        for parameter in (parameter for parameter in self.policy.parameters() if parameter.requires_grad):
            groups.setdefault(parameter.device_mesh, []).append(parameter)
        return [{"params": parameters} for parameters in groups.values()]

    def add_gradients(self, batch: Batch, sums: Sums) -> None:
        if not self.config.deterministic or self.num_data_ranks == 1:
            return super().add_gradients(batch, sums)
        for prepared in batch.microbatches:
            self.optimizer.zero_grad(set_to_none=True)  # each sum of gradients goes on from the one before
            self.run_microbatch(prepared, len(batch.examples), sums).backward()
        end_of_sums(self.policy)

    def clip_gradients(self) -> Tensor:
        gradients = [parameter.grad for parameter in self.policy.parameters() if parameter.grad is not None]
        if self.config.deterministic:
            norm = torch.nn.utils.get_total_norm([full_tensor(gradient).to(self.device) for gradient in gradients])
        else:
            norm = global_norm(gradients, self.device)
        scale = (self.config.max_grad_norm / (norm + 1e-6)).clamp(max=1.0)
        for gradient in gradients:
            own(gradient).mul_(scale.to(gradient.device, gradient.dtype))
        return norm

    def sample(self, model: PreTrainedModel) -> list[np.ndarray]:
        with gathered(model):
            return super().sample(model)


class FSDPTrainer(ShardedTrainer):
    """Every process has a shard of all weights and trains on examples of its own."""

    def grid(self) -> tuple[int, int, int]:
        tensor, replicas = self.config.tensor_parallel_size or 1, self.config.fsdp.replicas
        return replicas, self.num_ranks // (replicas * tensor), tensor


class TensorParallelTrainer(ShardedTrainer):
    """The processes share each matrix product, and train on the same examples."""

    def grid(self) -> tuple[int, int, int]:
        tensor = self.config.tensor_parallel_size or self.num_ranks
        return 1, self.num_ranks // tensor, tensor


class PackageTrainer(BasicTrainer):
    """Trains in one process that splits each matrix product among several devices, by the tensor_parallel package."""

    def place_model(self, dtype: torch.dtype) -> PreTrainedModel:
        from engine.tensor_parallel_package import check_config, split_model

        config = self.config
        on_gpus = self.device.type == "cuda"
        self.num_devices = config.tensor_parallel_size or (torch.cuda.device_count() if on_gpus else 1)
        check_config(hf_config_of(config.model, self.tokenizer), self.num_devices)
        model = load_model(config, self.tokenizer, dtype, torch.device("cpu"))
        if config.batching == "packed":
            use_packed_attention(model, self.mixed_precision)
        self.aliases = named_aliases(model)
        devices = [torch.device("cuda", index) if on_gpus else self.device for index in range(self.num_devices)]
        return split_model(model, devices).eval()

    def bytes_per_token(self) -> float:
        return super().bytes_per_token() * self.num_devices  # only the first one's were seen

    def named_tensors(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        from engine.tensor_parallel_package import merged_optimizer_state, merged_state_dict

        weights = {name: value for name, value in merged_state_dict(self.policy).items() if name not in self.aliases}
        state = merged_optimizer_state(self.policy, self.optimizer)
        return weights, {f"{name}.{key}": value for name, values in state.items() for key, value in values.items()}

    def load(self, checkpoint: Path) -> None:
        from engine.tensor_parallel_package import load_merged, load_merged_optimizer_state

        with reading(checkpoint):
            load_merged(self.policy, dict(tensors_of(checkpoint, WEIGHTS)))
            state = state_by_parameter(checkpoint, self.optimizer)
            load_merged_optimizer_state(self.policy, self.optimizer, state)


TRAINERS = {trainer.__name__: trainer for trainer in (BasicTrainer, FSDPTrainer, TensorParallelTrainer)}


def trainer_class(config: DictConfig) -> type[BasicTrainer]:
    """The trainer that config names."""
    return PackageTrainer if config.tensor_parallel.backend == "package" else TRAINERS[config.trainer]
