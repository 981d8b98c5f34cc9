"""The training loop: one loop for every loss; a trainer decides where the model is placed."""

import copy
import inspect
import math
import resource
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import chain
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from omegaconf import DictConfig
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from engine.batching import Microbatch, Part, cut, lay_out, num_fed_tokens, num_planned, plan_batches
from engine.checkpoint import load_checkpoint, rewind, save_checkpoint
from engine.logprobs import response_logps
from engine.memory import fitting, most_useful, saved_bytes
from engine.metrics import Loggers, Moment, Sums, fetched, peak_flops
from engine.models import find_blocks, load_model, use_packed_attention
from engine.precision import model_in
from engine.reference import CachedReference, LiveReference, Reference, reference_key
from engine.sampling import sample_responses
from losses import LOSSES
from preference_datasets import DATASETS, Example, Split
from utils import UserError, ahead, content_hash

Prepared = tuple[Microbatch, Tensor | None]  # with reference log-probs of its responses, if they are cached


@dataclass
class Step:
    """An update of the policy that was started, and what is to be logged of it."""

    values: dict[str, Tensor]  # scalars on the device, known once it is done
    facts: dict[str, float]
    num_examples: int
    num_tokens: int
    prompts: list[int]
    end: Moment


class BasicTrainer:
    """Trains in one process, on the CPU or a GPU; on several GPUs the layers of the model are split among them.

    Args:
        config: the composed and validated config.
        run_dir: where logs and checkpoints go.
        train_split, test_split: tokenised examples; without test examples there is no evaluation.
    """

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
        self.counters = {"examples": 0, "updates": 0}
        self.print_plan()

        self.loss = LOSSES[config.loss.name]
        own_keys = ("name", "average_log_prob", "sft_weight")
        self.loss_arguments = {key: value for key, value in config.loss.items() if key not in own_keys}

        torch.set_float32_matmul_precision(config.matmul_precision)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.mixed_precision = getattr(torch, config.mixed_precision) if config.mixed_precision else None
        self.policy = self.place_model(getattr(torch, config.model.policy_dtype))
        self.device = self.policy.get_output_embeddings().weight.device  # where layers are split, the head's
        self.reference: Reference | None = None
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

    # ---- Models ----

    def place_model(self, dtype: torch.dtype) -> PreTrainedModel:
        """A model with the starting weights, where this trainer runs it."""
        model = load_model(self.config, self.tokenizer, dtype, self.device)
        if self.config.batching == "packed":
            use_packed_attention(model)
        return self.compiled(model).eval()

    def compiled(self, model: PreTrainedModel) -> PreTrainedModel:
        """The model, its blocks compiled if the config says so."""
        if self.config.compile:
            for block in find_blocks(model, self.config.model.block_name):
                block.compile(dynamic=True)
        return model

    def prepare_policy(self) -> None:
        """Make the policy trainable, after the reference was computed from it."""
        if self.num_checkpointed:
            self.policy.activation_checkpointing_enable({"use_reentrant": False})
            for block in find_blocks(self.policy, self.config.model.block_name)[self.num_checkpointed :]:
                setattr(block, "gradient_checkpointing", False)  # noqa: B010  mypy knows no such attribute
        self.policy.train()

    def build_optimizer(self) -> torch.optim.Optimizer:
        """The optimizer of the config; as one fused pass over the weights where torch has that."""
        optimizer = getattr(torch.optim, self.config.optimizer)
        fused = {"fused": True} if "fused" in inspect.signature(optimizer).parameters else {}
        return optimizer(self.policy.parameters(), lr=self.config.lr, **fused)

    def build_reference(self) -> Reference | None:
        """Log-probs of the frozen reference: from a model that stays loaded, or computed now and kept on disk."""
        config = self.config
        if not self.loss.needs_reference or config.loss.get("reference_free"):
            return None
        # The policy starts as the reference: another copy is needed only if it must stay, or has another dtype.
        model = self.policy
        if config.model.reference_dtype not in (None, config.model.policy_dtype):
            model = self.place_model(getattr(torch, config.model.reference_dtype))
        elif config.reference == "live":
            model = self.compiled(copy.deepcopy(self.policy))
        if self.samples:
            self.reference_samples = self.sample(model)
        if model is not self.policy:
            model.requires_grad_(False)
        live = LiveReference(model, self.mixed_precision)
        if config.reference == "live":
            return live
        cached = CachedReference(
            Path(config.cache_dir) / "reference", reference_key(model, self.mixed_precision, config.batching)
        )
        self.fill(cached, live)
        return cached

    def fill(self, cached: CachedReference, live: LiveReference) -> None:
        """Compute what the cache lacks, in the microbatches of training, so that equal weights give equal numbers."""
        microbatches, planned, num_before = [], set[bytes](), len(cached)
        for examples in (part for batch in chain(self.train_batches(), self.eval_batches()) for part in batch):
            missing = cached.missing((example.prompt, answer) for example in examples for answer in example.responses)
            if missing - planned:  # each later epoch asks for the same
                microbatches.append(examples)
                planned |= missing
        if not microbatches:
            print(f"reference: all log-probs are in {cached.path}")
            return
        start = time.monotonic()
        disable = not sys.stderr.isatty()
        with live.in_mixed_precision():
            for examples in tqdm(microbatches, desc="reference log-probs", unit="microbatch", disable=disable):
                batch = self.lay_out(examples)
                cached.add(batch, live.logps(batch))
        seconds = time.monotonic() - start
        print(f"reference: {len(cached) - num_before:,} log-probs computed in {seconds:.1f} s, kept in {cached.path}")

    def fit_memory(self) -> tuple[int, int]:
        """The tokens of a forward pass, and the number of blocks that recompute their activations: as the config says,
        or as memory allows."""
        config = self.config
        blocks = find_blocks(self.policy, config.model.block_name)
        given = config.activation_checkpointing
        if isinstance(given, bool):
            given = len(blocks) if given else 0
        given = None if given == "auto" else min(given, len(blocks))
        if config.token_budget is not None and given is not None:
            return config.token_budget, given
        weights = sum(parameter.nbytes for parameter in self.policy.parameters())
        # Beside the weights: their gradients, the optimizer's state and what it or mixed precision needs on the way.
        copies = 4 + (config.reference == "live")
        longest = max((num_fed_tokens(example) for example in self.train_examples), default=0)
        wanted = config.token_budget or max(2048, longest)
        num_devices = len({parameter.device for parameter in self.policy.parameters()})  # that share the layers
        per_token = self.bytes_per_token() / num_devices
        tokens, num_checkpointed = fitting(
            self.device,
            copies * weights // num_devices,
            per_token,
            len(blocks),
            wanted=wanted,
            most=most_useful(self.device, weights // num_devices, per_token),
            checkpointed=given,
        )
        if given is None and num_checkpointed:
            print(f"activation_checkpointing: {num_checkpointed} of {len(blocks)} blocks, to fit {wanted:,} tokens")
        return config.token_budget or tokens, num_checkpointed

    def bytes_per_token(self) -> float:
        """Bytes of activations that a fed token keeps for the backward pass, measured on this model."""

        def measured(num_examples: int) -> tuple[int, int]:
            ids = np.zeros(64, dtype=np.int32)
            responses = (ids[:32], ids[:31])[: len(self.train_examples[0].responses)]
            batch = self.lay_out([Example(ids[: 33 + index], responses, index) for index in range(num_examples)])
            with self.in_mixed_precision():
                kept = saved_bytes(lambda: response_logps(self.policy, batch, lambda logps, part: logps.sum())[0])
            return kept, batch.input_ids.numel()

        (few, few_tokens), (many, many_tokens) = measured(1), measured(4)
        return (many - few) / (many_tokens - few_tokens)  # what does not grow with the tokens is not theirs

    # ---- Data ----

    def train_batches(self) -> Iterator[list[list[Example]]]:
        """The batches of the run, in order, each cut into microbatches."""
        config = self.config
        plan = plan_batches(
            self.train_examples,
            config.batch_size,
            seed=config.seed,
            n_epochs=config.n_epochs,
            n_examples=config.n_examples,
            length_grouping=config.length_grouping,
        )
        for indices in plan:
            examples = [self.train_examples[index] for index in indices]
            yield cut(examples, config.gradient_accumulation_steps, self.token_budget, config.batching)

    def eval_batches(self) -> Iterator[list[list[Example]]]:
        """The evaluation examples, eval_batch_size at a time, each cut into microbatches."""
        for start in range(0, len(self.eval_examples), self.config.eval_batch_size):
            examples = self.eval_examples[start : start + self.config.eval_batch_size]
            yield cut(examples, 1, self.token_budget, self.config.batching)

    def lay_out(self, examples: Sequence[Example]) -> Microbatch:
        """Examples as one microbatch, on the device."""
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

    def prepared(self, batches: Iterable[list[list[Example]]]) -> Iterator[list[Prepared]]:
        """Batches laid out on the device, with the log-probs of a cached reference, one batch ahead of its use."""

        def prepare(examples: list[Example]) -> Prepared:
            batch = self.lay_out(examples)
            return batch, self.reference.logps(batch) if isinstance(self.reference, CachedReference) else None

        return ahead([prepare(examples) for examples in microbatches] for microbatches in batches)

    def run_microbatch(self, prepared: Prepared, num_examples: int, sums: Sums) -> Tensor:
        """The share of some examples in the mean loss of num_examples: a scalar to call backward on."""
        batch, reference_logps = prepared
        if isinstance(self.reference, LiveReference):
            reference_logps = self.reference.logps(batch)
        losses = partial(self.losses, batch, reference_logps, sums)
        loss, _ = response_logps(self.policy, batch, lambda logps, part: losses(logps, part).sum() / num_examples)
        return loss

    @contextmanager
    def in_mixed_precision(self) -> Iterator[None]:
        """Inside this, policy and live reference compute in the dtype of mixed_precision."""
        reference = self.reference.in_mixed_precision() if isinstance(self.reference, LiveReference) else nullcontext()
        with model_in(self.policy, self.mixed_precision), reference:
            yield

    def learning_rate(self) -> float:
        """Of the coming update: linear warm-up, then constant or a decay that would reach 0 after the last update."""
        config, update = self.config, self.counters["updates"]
        if update < config.warmup_steps:
            return config.lr * (update + 1) / (config.warmup_steps + 1)
        done = (update - config.warmup_steps) / max(1, self.num_updates - config.warmup_steps)
        decay = {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}
        return config.lr * decay[config.lr_schedule]

    def step(self, microbatches: Sequence[Prepared]) -> Step:
        """One update of the policy on a batch. A GPU may still be at work on it when this returns."""
        num_examples = sum(batch.num_examples for batch, _ in microbatches)
        sums = Sums()
        with self.in_mixed_precision():
            for prepared in microbatches:
                self.run_microbatch(prepared, num_examples, sums).backward()
        parameters = [parameter for parameter in self.policy.parameters() if parameter.grad is not None]
        grad_norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in parameters])
        if self.device.type != "cpu" or grad_norm > self.config.max_grad_norm:  # a GPU is not waited for
            torch.nn.utils.clip_grads_with_norm_(parameters, self.config.max_grad_norm, grad_norm)
        learning_rate = self.learning_rate()
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.counters["examples"] += num_examples
        self.counters["updates"] += 1
        return Step(
            values=named(sums.means(), "train") | {"grad_norm": grad_norm},
            facts={"learning_rate": learning_rate, "peak_memory_gb": self.peak_memory_gb()} | self.counted(),
            num_examples=num_examples,
            num_tokens=sum(batch.num_tokens for batch, _ in microbatches),
            prompts=sorted({index for batch, _ in microbatches for index in batch.prompt_indices}),
            end=Moment(self.device),
        )

    def metrics_of(self, step: Step, start: Moment) -> dict[str, float]:
        """The metrics of a step that began at start, once it is done; fails if a number in them is not finite."""
        seconds = step.end.seconds_since(start)
        metrics = fetched(step.values)
        if not math.isfinite(metrics["loss/train"]) or not math.isfinite(metrics["grad_norm"]):
            self.fail_as_non_finite(
                f"update {step.facts['counters/updates']} had loss {metrics['loss/train']} and gradient norm"
                f" {metrics['grad_norm']}, on the prompts number {step.prompts} of the training data"
            )
        metrics |= step.facts
        metrics["examples_per_second"] = step.num_examples / seconds
        metrics["tokens_per_second"] = step.num_tokens / seconds
        peak = peak_flops(self.device)
        if peak:
            metrics["mfu"] = 6 * self.policy.num_parameters() * step.num_tokens / seconds / peak
        return metrics

    def fail_as_non_finite(self, what: str) -> NoReturn:
        raise UserError(
            "NONFINITE",
            f"{what} (counters/updates is {self.counters['updates']})",
            "lower lr or raise warmup_steps, and look at the data; the last checkpoint is untouched",
        )

    def counted(self) -> dict[str, float]:
        return {f"counters/{name}": value for name, value in self.counters.items()}

    def peak_memory_gb(self) -> float:
        """The most memory held so far, in 10^9 bytes: of the GPU, or of this process on a CPU."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated() / 1e9
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9

    # ---- The run ----

    def train(self, checkpoint: Path | None = None) -> None:
        """Train, evaluate and save as the config says; from checkpoint on, if one is given."""
        config = self.config
        batches = self.train_batches()
        if checkpoint is not None:
            state = load_checkpoint(checkpoint, self.policy, self.optimizer, self.data_hash)
            rewind(self.run_dir, state["log_sizes"])
            self.counters = state["counters"]
            for _ in range(self.counters["updates"]):
                next(batches)
            print(f"resumed from {checkpoint}, after {self.counters['examples']} examples")
        self.loggers = Loggers(config, self.run_dir, self.num_train_examples, self.counters["examples"])
        self.eval_metrics: dict[str, float] = {}
        is_done = False
        try:
            if checkpoint is None and config.do_first_eval:
                self.evaluate()
            running: Step | None = None
            start = Moment(self.device)  # of the running step

            def log_running() -> None:
                nonlocal running, start
                done, running = running, None
                if done is not None:
                    self.loggers.train(self.metrics_of(done, start))
                    start = done.end

            for microbatches in self.prepared(batches):
                before = self.counters["examples"]
                step = self.step(microbatches)
                log_running()  # of the step before, while a GPU runs this one
                running = step
                now = self.counters["examples"]
                is_last = now == self.num_train_examples
                save_every = config.save_every or config.eval_every
                evaluates = is_last or now // config.eval_every > before // config.eval_every
                saves = is_last or now // save_every > before // save_every
                if evaluates or saves or self.device.type == "cpu":
                    log_running()
                if evaluates:
                    self.evaluate()
                if saves:
                    self.save(is_last)
                if evaluates or saves:
                    start = Moment(self.device)
            is_done = True
        finally:
            self.loggers.close(is_done)

    def evaluate(self) -> None:
        """Log the metrics of the evaluation examples, and answers sampled to their prompts."""
        if not self.eval_examples:
            return
        self.policy.eval()
        sums = Sums()
        with torch.no_grad(), self.in_mixed_precision():
            for microbatches in self.prepared(self.eval_batches()):
                for prepared in microbatches:
                    self.run_microbatch(prepared, len(self.eval_examples), sums)
        self.eval_metrics = fetched(named(sums.means(), "eval"))
        if not math.isfinite(self.eval_metrics["loss/eval"]):
            self.fail_as_non_finite(f"the evaluation has loss {self.eval_metrics['loss/eval']}")
        if self.samples:
            self.eval_metrics |= self.log_samples()
        self.loggers.eval(self.eval_metrics | self.counted())
        self.policy.train()

    @property
    def samples(self) -> bool:
        """Whether answers are sampled in evaluations."""
        return self.config.sample_during_eval and bool(self.sample_prompts())

    def sample(self, model: PreTrainedModel) -> list[np.ndarray]:
        """An answer of model to each prompt that is sampled for, as token ids."""
        return sample_responses(
            model,
            self.tokenizer,
            self.sample_prompts(),
            max_new_tokens=self.config.max_length - self.config.max_prompt_length,
            max_length=self.config.max_length,
            batch_size=self.config.eval_batch_size,
            seed=int(content_hash(["sample", self.config.seed, self.counters["examples"]])[:8], 16),
        )

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
        for microbatch in cut(examples, 1, self.token_budget, self.config.batching):
            batch = self.lay_out(microbatch)
            policy = LiveReference(self.policy, self.mixed_precision).logps(batch)
            ratios.append(policy - self.reference.logps(batch))
        return torch.cat(ratios).mean().item()

    # ---- Checkpoints ----

    @cached_property
    def data_hash(self) -> str:
        """A hash of the training examples."""
        return content_hash(
            array.tobytes() for example in self.train_examples for array in (example.prompt, *example.responses)
        )

    def save(self, is_last: bool) -> None:
        """Write a checkpoint, and policy.pt with the last one."""
        if self.config.debug:
            return
        if not all(parameter.isfinite().all() for parameter in self.policy.parameters()):
            self.fail_as_non_finite("a weight is not a number")
        path = save_checkpoint(
            self.run_dir,
            self.policy,
            self.tokenizer,
            self.optimizer,
            self.counters,
            config=self.config,
            data=self.data_hash,
            metrics=self.eval_metrics,
            keep=self.config.keep_checkpoints,
            write_policy_pt=is_last,
        )
        self.loggers.print(f"saved {path}")


def choose_eval_examples(examples: Sequence[Example], count: int, seed: int) -> list[Example]:
    """The first count examples of the test split in a shuffled order, all of them if it holds fewer."""
    plan = plan_batches(examples, max(1, len(examples)), seed=seed, n_epochs=1, n_examples=None)
    return [examples[index] for indices in plan for index in indices][:count]


def named(means: dict[str, Tensor], split: str) -> dict[str, Tensor]:
    """Metrics under the names that users see: loss/train, rewards_train/chosen, logps_eval/rejected, ..."""
    names = {name: f"{name.split('/')[0]}_{split}/{name.split('/')[-1]}" for name in means} | {"loss": f"loss/{split}"}
    return {names[name]: value for name, value in means.items()}


TRAINERS = {"BasicTrainer": BasicTrainer}
