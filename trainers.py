"""The training loop. One loop serves every loss and every trainer; a trainer names a placement.

Read from the top: train, train_on, step, evaluate, save. The constructor comes last.
"""

import math
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import cached_property
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from engine.data.chat_templates import template_to_record
from engine.data.examples import Example, Split
from engine.models.adapters import adapter_of, seed_dropout
from engine.models.archives import find_checkpoint
from engine.models.layers import recompute_activations
from engine.models.parameters import move_weights, num_weights
from engine.models.score_head import has_score_head, name_padding_token
from engine.placement.determinism import set_deterministic
from engine.placement.memory import peak_memory_gb
from engine.placement.placement import Placement
from engine.placement.process_group import is_lost_peer
from engine.placement.sharded import FSDP, TensorParallel
from engine.placement.token_budget import fit_memory, halve_budget
from engine.run.best import BestCheckpoint, check_best, settings_of_metric
from engine.run.checkpoint_contents import start_save
from engine.run.checkpoint_reader import restore_checkpoint, restore_source
from engine.run.checkpoint_writer import CheckpointWriter
from engine.run.critic import Critic
from engine.run.evaluation import Evaluator
from engine.run.loggers import Loggers, NoLoggers
from engine.run.nonfinite import NonFinitePolicy
from engine.run.offload import Offload
from engine.run.online import build_evaluator, build_source, examples_to_evaluate, examples_to_fit
from engine.run.pretraining_mix import PretrainingMix
from engine.run.reference_setup import build_reference, with_mismatched
from engine.run.resume_check import read_state, read_state_file
from engine.run.reward_check import check_rewards
from engine.run.run_files import rewind
from engine.run.start_report import (
    describe_complete,
    describe_parameters,
    describe_training,
    warn_of_first_margin,
    warnings_at_start,
)
from engine.run.throughput import TrainingTime, throughput
from engine.run.training_state import training_state
from engine.run.workload import Work, flops_of
from engine.settings.schema import Settings
from engine.step.gradient_check import check_gradients
from engine.step.metrics import (
    DeviceTimestamp,
    MetricAccumulator,
    PendingScalars,
    prefix_metrics,
    without_nan,
)
from engine.step.microbatches import Batch, MicrobatchRunner
from engine.step.objectives import make_objective
from engine.step.reference import LiveReference, Reference
from engine.step.schedule import learning_rate
from engine.step.sources import Source
from engine.step.started import Step
from preference_datasets import chat_form, ground_truth_reward
from utils import StopRequest, UserError, content_hash, is_out_of_memory, prefetch

CRITIC_CHECKED = ("loss/value", "val/grad_norm")  # NaN or Inf ends the run as those of the policy do


class BasicTrainer:
    """Trains in one process, on the CPU or a GPU. Several GPUs split the layers.

    Args:
        run_dir: gets logs and checkpoints.
        train_split, test_split: tokenised examples; no test examples, no evaluation.
        ptx_split: stored responses to learn beside sampled ones.
    """

    source: Source  # of batches
    placement: Placement  # where the model lives, and how ranks communicate
    policy: PreTrainedModel
    runner: MicrobatchRunner  # policy, reference and objective
    optimizer: torch.optim.Optimizer
    critic: Critic | None  # of PPO
    evaluator: Evaluator
    nonfinite: NonFinitePolicy
    writer: CheckpointWriter
    loggers: Loggers | NoLoggers
    token_budget: int  # of a microbatch
    counters: dict[str, int]  # examples, updates, skipped
    eval_metrics: dict[str, float]  # of the last evaluation
    reference_hash: str | None
    chat_template_text: str | None  # of a Jinja file

    @classmethod
    def placement_class(cls, settings: Settings) -> type[Placement]:
        return Placement

    # ---- The run ----

    def train(self, checkpoint: Path | None = None) -> int | None:
        """Train, evaluate and save, from scratch or from a checkpoint.

        Returns:
            the signal that stopped the run, with its state saved; None for a complete run.
        """
        evaluates_first = self.settings.do_first_eval
        if checkpoint is not None:
            evaluates_first = self.resume(checkpoint)
        is_last = self.counters["examples"] >= self.source.num_examples
        if checkpoint is not None and is_last and not evaluates_first:
            print(describe_complete(self.counters["examples"]))
        elif self.placement.rank == 0:
            lengths = self.source.num_examples, self.num_updates
            self.loggers = Loggers(self.settings, self.run_dir, *lengths, self.counters["examples"])
        is_done = False
        try:
            with self.stop:
                if evaluates_first and not self.evaluate():
                    self.save(is_last, evaluation_due=True)
                else:
                    if evaluates_first and checkpoint is not None:  # saved without its evaluation
                        self.save(is_last, evaluation_due=False)
                    self.train_on(self.train_batches(start=self.counters["examples"]))
                self.log_finished_save(wait=True, together=True)
            is_done = not self.must_stop
        except Exception as error:
            if not is_lost_peer(error):  # a lost rank has shards of the checkpoint
                with suppress(Exception):  # keep a running save, but raise the first error
                    # All ranks see the same NaN or Inf, and raise the same error.
                    together = isinstance(error, UserError) and error.code == "NONFINITE"
                    self.log_finished_save(wait=True, together=together)
            raise
        finally:
            self.loggers.close(is_done)
        return self.stop.signal or (signal.SIGTERM if self.must_stop else None)

    def train_on(self, batches: Iterator[list[list[Example]]]) -> None:
        """Take a step for each batch; evaluate, save and log between steps. Return early on a stop request."""
        settings = self.settings
        running: Step | None = None
        start = DeviceTimestamp(self.device)  # of the running step

        def log_running() -> None:
            nonlocal running, start
            done, running = running, None
            if done is not None:
                metrics = self.metrics_of(done, start)
                if metrics is not None:
                    self.loggers.train(metrics)
                start = done.end

        prepared = map(self.prepare, batches)
        for batch in prefetch(prepared) if self.source.may_prefetch else prepared:
            before = self.counters["examples"]
            step = self.step(batch)
            log_running()  # the previous step, while a GPU runs this one
            running = step
            now = self.counters["examples"]
            is_last = now >= self.source.num_examples
            save_every = settings.save_every or settings.eval_every
            evaluates = is_last or now // settings.eval_every > before // settings.eval_every
            saves = is_last or now // save_every > before // save_every
            if evaluates or saves or self.must_stop or not self.runs_ahead:
                log_running()
            is_evaluated = evaluates and not self.must_stop and self.evaluate()
            if saves or self.must_stop:
                self.save(is_last, evaluation_due=evaluates and not is_evaluated)
            if self.must_stop:
                return
            self.log_finished_save(wait=False)
            if evaluates or saves:
                start = DeviceTimestamp(self.device)

    # ---- The step ----

    def step(self, batch: Batch) -> Step:
        """Update the policy once. A GPU may still be running when this returns."""
        start = DeviceTimestamp(self.device)
        if batch.token_budget > self.token_budget:  # prefetched before memory ran out
            batch = self.prepare(self.split_batch(batch.examples))
        seed_dropout(self.settings, self.counters["updates"], self.placement.rank)
        batch, metrics = self.accumulate_with_oom_retry(batch)
        if not self.counters["updates"]:
            check_gradients(self.policy)
        grad_norm = self.placement.clip_gradients(self.policy)
        means, num_tokens, stop = metrics.reduce(
            self.placement.all_reduce_sum, self.stop.signal is not None, self.placement.all_reduce_max
        )
        lr = learning_rate(self.settings, self.counters["updates"], self.num_updates)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        is_finite = grad_norm.isfinite().to(self.device) & means["loss"].isfinite().to(self.device)
        critic_metrics: dict[str, Tensor] = {}
        if self.critic is not None:
            critic_metrics = self.critic.clip_gradients(self.counters["updates"], self.num_updates)
            for name in CRITIC_CHECKED:
                is_finite &= critic_metrics[name].isfinite().to(self.device)
        has_responses = any(example.responses for example in batch.examples)
        learns = is_finite if has_responses else torch.zeros_like(is_finite)  # all left out: even weight decay waits
        for optimizer in self.optimizers:
            learns_stored = self.ptx is not None and optimizer is self.optimizer
            self.update(optimizer, is_finite if learns_stored else learns)
            optimizer.zero_grad(set_to_none=True)
        self.runner.move_state(learns)
        self.counters["examples"] += len(batch.examples)
        self.counters["updates"] += 1
        self.refresh_reference()
        facts = {"learning_rate": lr, "peak_memory_gb": peak_memory_gb(self.device)}
        values = prefix_metrics(means, "train") | critic_metrics
        values |= {} if self.ptx is None else self.ptx.metrics(self.placement.all_reduce_sum)
        values |= {"grad_norm": grad_norm, "tokens": num_tokens, "stop": stop}
        return Step(
            values=PendingScalars(values),
            facts=facts | self.progress_counters() | self.source_metrics(),
            batch=batch,
            start=start,
            end=DeviceTimestamp(self.device),
            ends_iteration=self.source.ends_iteration(self.counters["examples"]),
        )

    def source_metrics(self) -> dict[str, float]:
        """Metrics of the batches so far."""
        return self.source.take_metrics(self.loggers.samples) | self.source.epochs(self.counters["examples"])

    def accumulate_gradients(self, batch: Batch, metrics: MetricAccumulator) -> None:
        """Add up the gradients of a batch's mean loss."""
        runner, placement = self.runner, self.placement
        with runner.in_mixed_precision():
            first = runner.first_pass(batch, placement.all_reduce_sum, metrics, trains=True)
            losses = runner.losses(batch, first, metrics)
            if self.ptx is not None:
                losses = chain(losses, self.ptx.losses(self.counters["updates"], self.token_budget))
            for loss in losses:
                placement.start_backward(self.optimizer)
                loss.backward()
        placement.finish_backward(self.policy)
        runner.next_state = first.state
        if self.critic is not None:
            self.critic.accumulate_gradients(batch)

    def accumulate_with_oom_retry(self, batch: Batch) -> tuple[Batch, MetricAccumulator]:
        """Accumulate gradients. When memory runs out, halve the token budget and retry; the gradients are the same."""
        while True:
            metrics = MetricAccumulator()
            try:
                self.accumulate_gradients(batch, metrics)
                return batch, metrics
            except Exception as error:
                # Other ranks wait in a collective and cannot retry.
                if not is_out_of_memory(error) or self.placement.num_ranks > 1:
                    raise
                reason = str(error).partition("\n")[0]
            self.token_budget = halve_budget(self.token_budget, batch, reason, self.settings.loss)
            for optimizer in self.optimizers:
                optimizer.zero_grad(set_to_none=True)
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            self.loggers.print(f"out of memory ({reason}): token_budget is {self.token_budget:,} from now on")
            batch = self.prepare(self.split_batch(batch.examples))

    @property
    def optimizers(self) -> list[torch.optim.Optimizer]:
        """Those of the policy and of a critic."""
        return [self.optimizer] if self.critic is None else [self.optimizer, self.critic.optimizer]

    def update(self, optimizer: torch.optim.Optimizer, is_finite: Tensor) -> None:
        """Take an optimizer step if losses and gradients are finite."""
        checks_itself = getattr(optimizer, "_step_supports_amp_scaling", False)
        if self.runs_ahead and checks_itself and not self.settings.fsdp.cpu_offload:
            # Fused optimizers check on the GPU, so the host does not wait. All ranks have the same loss and norm.
            optimizer.grad_scale, optimizer.found_inf = None, (~is_finite).float()  # type: ignore[attr-defined]
            optimizer.step()
        elif is_finite:  # bitsandbytes' optimizers and unfused ones cannot check: here the host waits for a GPU
            optimizer.step()

    def refresh_reference(self) -> None:
        """Move the reference to the policy, if it is time."""
        reference, refresh = self.moving_reference, self.settings.reference_refresh
        if reference is not None and refresh.every and self.counters["updates"] % refresh.every == 0:
            move_weights(reference, self.policy, refresh.mix)

    @property
    def moving_reference(self) -> PreTrainedModel | None:
        """The reference model, if reference_refresh moves it."""
        reference = self.runner.reference
        if self.settings.reference_refresh.every is None or not isinstance(reference, LiveReference):
            return None
        return reference.model

    # ---- Batches ----

    def train_batches(self, start: int = 0) -> Iterator[list[list[Example]]]:
        """All batches after the first start examples, each split into microbatches."""
        return map(self.split_batch, self.source.batches(start))

    def split_batch(self, examples: Sequence[Example]) -> list[list[Example]]:
        """Split a batch into microbatches for all ranks."""
        num_parts = self.settings.gradient_accumulation_steps
        return self.placement.split_batch(examples, num_parts, self.token_budget)

    def prepare(self, microbatches: Sequence[list[Example]]) -> Batch:
        """Lay out the microbatches of this rank, on the device."""
        num_parts = self.settings.gradient_accumulation_steps
        return self.placement.prepare_batch(self.runner, microbatches, num_parts, self.token_budget)

    # ---- Metrics ----

    def metrics_of(self, step: Step, start: DeviceTimestamp) -> dict[str, float] | None:
        """Wait for a step and return its metrics; None if loss or gradients are NaN or Inf.

        Args:
            start: when the step began.
        """
        seconds = step.end.seconds_since(start)
        training_time = self.training_time.add(step.end.seconds_since(step.start), step.ends_iteration)
        metrics = step.values.read()
        num_tokens = metrics.pop("tokens")
        self.must_stop |= metrics.pop("stop") > 0
        loss, grad_norm = metrics["loss/train"], metrics["grad_norm"]
        if math.isfinite(loss) and math.isfinite(grad_norm) and self.critic is not None:
            loss, grad_norm = (metrics[name] for name in CRITIC_CHECKED)
        if not math.isfinite(loss) or not math.isfinite(grad_norm):
            self.nonfinite.handle(step.batch.examples, step.facts, loss, grad_norm)
            return None
        metrics = without_nan(metrics) | step.facts | self.skip_counter()
        if warning := warn_of_first_margin(self.settings, metrics):
            self.loggers.print(warning)
        return metrics | training_time | throughput(self, step.batch.examples, num_tokens, seconds)

    @cached_property
    def flops(self) -> Callable[[Work, bool], float]:
        """Operations of some work, without recomputation. It counts all weights, so it is made once."""
        return flops_of(self, counts_recomputation=False)

    @property
    def runs_ahead(self) -> bool:
        """Whether a step is logged after the next one has started, so a GPU never idles."""
        # After a rollback, the next step must start from the restored weights.
        return self.device.type != "cpu" and self.settings.on_nonfinite != "rollback"

    def progress_counters(self) -> dict[str, float]:
        return {f"counters/{name}": self.counters[name] for name in ("examples", "updates")}

    def skip_counter(self) -> dict[str, float]:
        """The number of skipped batches, if any. It is known when a step is logged, not when it starts."""
        return {"counters/skipped": self.counters["skipped"]} if self.counters["skipped"] else {}

    # ---- Evaluation ----

    def evaluate(self) -> bool:
        """Log an evaluation and sampled responses; returns False if a stop request aborts it."""
        if not self.evaluator.examples:
            return True
        self.policy.eval()
        metrics = self.evaluator.measure(self.token_budget, self.sync_stop_request)
        if metrics is None:
            return False
        self.eval_metrics = without_nan(metrics)
        if not math.isfinite(metrics.get("loss/eval", 0.0)):  # online training has none
            self.nonfinite.fail(f"the evaluation has loss {metrics['loss/eval']}")
        if self.sync_stop_request():
            return False
        if self.evaluator.should_sample:
            is_last = self.counters["examples"] >= self.source.num_examples and not self.sync_stop_request()
            rows, sampled = self.evaluator.sample_policy(self.counters["examples"], self.token_budget, is_last)
            self.eval_metrics |= sampled
            self.loggers.samples(rows)
        if self.evaluator.histograms:
            self.loggers.histograms(self.progress_counters() | self.evaluator.histograms)
        self.loggers.eval(self.eval_metrics | self.progress_counters() | self.skip_counter())
        self.evaluated_at = self.counters["examples"]
        self.policy.train()
        return True

    def sync_stop_request(self) -> bool:
        """Whether any rank has a stop request. All ranks call this together."""
        if self.placement.num_ranks == 1:  # a GPU need not finish its queue for it
            self.must_stop |= self.stop.signal is not None
            return self.must_stop
        requests = torch.tensor([self.stop.signal is not None], dtype=torch.float64, device=self.device)
        self.placement.all_reduce_sum(requests)
        self.must_stop |= requests.item() > 0
        return self.must_stop

    # ---- Checkpoints ----

    def save(self, is_last: bool, evaluation_due: bool) -> None:
        """Start writing a checkpoint.

        Args:
            is_last: write a policy.pt too.
            evaluation_due: the evaluation here was skipped; a resumed run starts with it.
        """
        if self.settings.debug:
            return
        num_examples = self.counters["examples"]
        self.nonfinite.check_weights(self.policy)
        if self.critic is not None:
            self.nonfinite.check_weights(self.critic.model)
        self.log_finished_save(wait=True, together=True)  # of the previous checkpoint
        is_evaluated = self.evaluated_at == num_examples
        is_best = is_evaluated and self.best.update(self.eval_metrics, f"step-{num_examples}")
        state = training_state(self, evaluation_due, is_evaluated)
        start_save(
            self.writer,
            self.placement,
            self.policy,
            self.optimizer,
            self.tokenizer,
            state,
            policy_pt_metrics=self.eval_metrics if is_last else None,
            is_best=is_best,
            reference=self.moving_reference,
            critic=self.critic,
            write_source=self.source.state(num_examples),
        )

    def log_finished_save(self, wait: bool, together: bool = False) -> None:
        """Print the path of a finished checkpoint, if any.

        Args:
            wait: wait for a running save.
            together: wait until all ranks have saved. All of them call this.
        """
        path = self.writer.finished(wait, together)
        if path is not None:
            self.loggers.print(f"saved {path}")
            while self.writer.notices:
                self.loggers.print(self.writer.notices.pop(0))

    def resume(self, checkpoint: Path) -> bool:
        """Restore the state of a checkpoint; returns whether the run must start with an evaluation."""
        state = read_state(checkpoint, self.data_hash, self.reference_hash, self.base_hash)
        if self.critic is not None:
            self.critic.check_base(checkpoint, state)
        self.restore_models(checkpoint)
        if self.placement.rank == 0:
            rewind(self.run_dir, state["log_sizes"], state["counters"]["examples"])
        self.counters.update(state["counters"])
        self.runner.restore_state(state.get("loss_state", {}))
        restore_source(self.source, checkpoint)
        self.token_budget = min(self.token_budget, state["token_budget"])  # smaller if memory has run out
        self.best.resume(state["best"], state["settings"], self.run_dir, self.placement.rank == 0)
        print(f"resumed from {checkpoint}, after {self.counters['examples']} examples")
        return state["evaluation_due"]

    def roll_back(self) -> str | None:
        """Restore this run's last checkpoint; returns its name, None without one. All ranks call this together."""
        self.log_finished_save(wait=True, together=True)
        is_first = self.placement.rank == 0
        found = find_checkpoint(self.run_dir, "on_nonfinite=rollback") if is_first else None
        checkpoint = self.placement.gather_from_data_ranks(found)[0]
        if checkpoint is None:
            return None
        self.restore_models(checkpoint)
        self.runner.restore_state(read_state_file(checkpoint).get("loss_state", {}))
        self.source.resample(self.counters["examples"])
        return checkpoint.name

    def restore_models(self, checkpoint: Path) -> None:
        """Restore the weights and optimizer state of a checkpoint."""
        models = (self.policy, self.optimizer, self.moving_reference, self.critic)
        restore_checkpoint(checkpoint, self.placement, *models)

    @property
    def data_hash(self) -> str:
        """A hash of all examples."""
        mixed = [] if self.ptx is None else [self.ptx.source.fingerprint]
        return content_hash([self.source.fingerprint, *mixed]) if mixed else self.source.fingerprint

    @property
    def base_hash(self) -> str | None:
        """A hash of the weights below the adapters; None without adapters."""
        adapter = adapter_of(self.policy)
        return None if adapter is None else adapter.base_hash

    # ---- Construction ----

    def __init__(
        self,
        settings: Settings,
        run_dir: Path,
        tokenizer: PreTrainedTokenizerBase,
        train_split: Split,
        test_split: Split,
        ptx_split: Split | None = None,
    ):
        self.settings, self.run_dir, self.tokenizer = settings, run_dir, tokenizer
        self.chat_template_text = template_to_record(settings.chat_template)
        self.source = build_source(settings, train_split)
        self.train_examples = train_split.examples
        eval_examples = examples_to_evaluate(settings, test_split)
        reward = ground_truth_reward(settings.datasets)
        check_best(settings, len(eval_examples), reward is not None)
        check_rewards(settings, chain(train_split.examples, test_split.examples), reward is not None)
        self.num_updates = self.source.num_updates
        self.counters = {"examples": 0, "updates": 0, "skipped": 0}
        self.stop, self.must_stop, self.training_time = StopRequest(), False, TrainingTime()
        self.loggers = NoLoggers()
        num_train, num_eval = len(train_split.examples), len(eval_examples)
        lengths = {"num_examples": self.source.num_examples, "num_updates": self.num_updates}
        print(describe_training(settings, **lengths, num_train=num_train, num_eval=num_eval), flush=True)
        for warning in warnings_at_start(settings, self.num_updates, train_split.examples):
            print(warning, flush=True)

        torch.set_float32_matmul_precision(settings.matmul_precision)
        self.placement = self.placement_class(settings)(settings, tokenizer, run_dir)
        set_deterministic(settings.deterministic, self.device)
        self.policy = self.placement.place_model(getattr(torch, settings.model.policy_dtype))
        print(describe_parameters(*num_weights(self.policy)), flush=True)
        self.runner = MicrobatchRunner(
            self.policy,
            make_objective(settings.loss),
            layout=settings.batching,
            pad_token_id=tokenizer.pad_token_id,
            device=self.device,
            compute_dtype=self.placement.compute_dtype,
            temperature=settings.rollout.temperature if settings.loss.is_online else 1.0,
        )
        self.critic = Critic(settings, self.placement, tokenizer) if settings.loss.has_critic else None
        self.ptx = PretrainingMix(settings, self.placement, self.runner, ptx_split) if ptx_split else None
        offload = Offload(self.device, settings.rollout.offload)
        parts = (settings, tokenizer, self.placement, self.runner, eval_examples)
        self.evaluator = build_evaluator(
            *parts, reward, self.source, self.split_batch, self.say, chat_form, self.critic, offload
        )
        to_fit = examples_to_fit(settings, self.train_examples)
        other_bytes = self.evaluator.num_bytes + (0 if self.critic is None else self.critic.num_bytes)
        self.token_budget, self.num_checkpointed = fit_memory(self.placement, self.runner, to_fit, other_bytes)
        self.runner.reference, self.reference_hash = self.build_reference()
        self.prepare_policy()
        self.optimizer = self.placement.build_optimizer(self.policy)
        offload.start(self.policy, self.optimizers, self.runner.reference, self.critic)

        self.best = BestCheckpoint(settings.keep_best, eval_examples, settings_of_metric(settings))
        self.eval_metrics, self.evaluated_at = {}, -1  # examples
        self.writer = CheckpointWriter(run_dir, settings.keep_checkpoints)
        self.nonfinite = NonFinitePolicy(settings, run_dir, self.placement, self.counters, self.roll_back, self.say)

    def say(self, line: str) -> None:
        """Print a line around the progress bar."""
        self.loggers.print(line)

    @property
    def device(self) -> torch.device:
        return self.placement.device

    def prepare_policy(self) -> None:
        """Switch policy and critic to training, after the reference has used the policy."""
        if has_score_head(self.policy):
            name_padding_token(self.policy, self.tokenizer)
        recompute_activations(self.policy, self.settings.model.block_name, self.num_checkpointed)
        self.policy.train()
        if self.critic is not None:
            self.critic.prepare(self.num_checkpointed)

    def build_reference(self) -> tuple[Reference | None, str | None]:
        """The frozen reference, and a hash of its weights; None for a loss without a reference."""
        placement, budget = self.placement, self.token_budget
        train_batches = map(self.split_batch, self.source.new_batches())
        batches = chain(
            with_mismatched(placement, train_batches, self.settings.gradient_accumulation_steps, budget),
            with_mismatched(placement, self.evaluator.batches(budget), 1, budget),
        )
        return build_reference(self.settings, placement, self.runner, self.evaluator, batches, budget)


class FSDPTrainer(BasicTrainer):
    """Trains in several processes. Each holds a shard of all weights, and trains on other examples."""

    @classmethod
    def placement_class(cls, settings: Settings) -> type[Placement]:
        return FSDP


class TensorParallelTrainer(BasicTrainer):
    """Splits each matrix product among processes, or with the tensor_parallel package among the devices of one."""

    @classmethod
    def placement_class(cls, settings: Settings) -> type[Placement]:
        if settings.tensor_parallel.backend == "package":
            from engine.placement.package import PackageDevices  # slow to import

            return PackageDevices
        return TensorParallel


TRAINERS: dict[str, type[BasicTrainer]] = {
    "BasicTrainer": BasicTrainer,
    "FSDPTrainer": FSDPTrainer,
    "TensorParallelTrainer": TensorParallelTrainer,
}
