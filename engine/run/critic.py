"""The critic of PPO: a model of its own that says what each token of a response is worth.

It is a language model with a score head, read at the positions that predict a token. It runs the microbatches of the
policy, and has an optimizer of its own.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from engine.data.examples import Example
from engine.models.adapter_files import read_adapter_config
from engine.models.adapters import adapter_of
from engine.models.archives import CRITIC, CRITIC_OPTIMIZER
from engine.models.layers import recompute_activations
from engine.models.parameters import num_weights
from engine.models.shards import local_shard
from engine.models.weight_files import tensors_of
from engine.placement.placement import Placement
from engine.run.checkpoint_writer import Contents
from engine.settings.schema import Settings
from engine.step.first_pass import FirstPass
from engine.step.metrics import MetricAccumulator
from engine.step.microbatches import Batch, MicrobatchRunner
from engine.step.schedule import learning_rate
from engine.step.value_objective import ValueObjective
from utils import UserError


def critic_settings(settings: Settings) -> Settings:
    """The settings of a run that would train the critic's model: a reward model."""
    archive = settings.critic.archive or settings.model.archive
    changes = {
        "model": settings.model.model_copy(update={"archive": archive}),
        "loss": settings.loss.model_copy(update={"name": "reward", "head_init": "small"}),
        "freeze": settings.freeze.model_copy(update={"patterns": []}),  # of the policy's names
        "reference": "cached",  # it has none
        "lr": settings.critic.lr,
        "max_grad_norm": settings.critic.max_grad_norm,
    }
    return settings.model_copy(update=changes)


def check_has_scores(archive: Path) -> None:
    """Raise a UserError if critic.archive is of a model of text. What cannot be read is left to loading."""
    directory = archive.parent if archive.is_file() else archive  # of a run: its checkpoint, as model_pins.py names it
    if (directory / "adapter_config.json").exists():
        has_scores = read_adapter_config(directory).get("task_type") == "SEQ_CLS"
    elif (directory / "config.json").exists():
        stored = json.loads((directory / "config.json").read_bytes())
        has_scores = any(str(name).endswith("ForSequenceClassification") for name in stored.get("architectures") or [])
    else:
        return
    if not has_scores:
        problem = f"critic.archive: {archive} is a model of text, not a reward model"
        raise UserError("CONFIG", problem, "give a run of loss=reward, or leave it out for a new head on the policy")


class Critic:
    """A value model with its optimizer.

    Args:
        placement: of the policy.
        run_dir: of the run; gets no weights of a critic from scratch.

    Attributes:
        runner: its sample_logps() gives values.
    """

    def __init__(self, settings: Settings, placement: Placement, tokenizer: PreTrainedTokenizerBase):
        if settings.critic.archive is not None:
            check_has_scores(Path(settings.critic.archive))
        self._settings = critic_settings(settings)
        self._placement = placement.for_settings(self._settings)
        self.model: PreTrainedModel = self._placement.place_model(getattr(torch, settings.model.policy_dtype))
        trained, total = num_weights(self.model)
        print(f"critic: training {trained:,} of {total:,} weights", flush=True)
        self.runner = MicrobatchRunner(
            self.model,
            ValueObjective(settings.loss),
            layout=settings.batching,
            pad_token_id=tokenizer.pad_token_id,
            device=placement.device,
            compute_dtype=placement.compute_dtype,
        )
        self.optimizer = self._placement.build_optimizer(self.model)
        self._metrics = MetricAccumulator()

    @property
    def num_bytes(self) -> int:
        """Of its weights, their gradients, and the optimizer state."""
        sizes = [(local_shard(each).nbytes, each.requires_grad) for each in self.model.parameters()]
        return sum(size * (4 if is_trained else 1) for size, is_trained in sizes)

    @property
    def base_hash(self) -> str | None:
        """A hash of the weights below its adapters; None without adapters."""
        adapter = adapter_of(self.model)
        return None if adapter is None else adapter.base_hash

    def prepare(self, num_checkpointed: int) -> None:
        """Switch it to training.

        Args:
            num_checkpointed: layers that recompute their activations.
        """
        recompute_activations(self.model, self._settings.model.block_name, num_checkpointed)
        self.model.train()

    # ---- The step ----

    def accumulate_gradients(self, batch: Batch) -> None:
        """Add up the gradients of a batch's mean loss."""
        self._metrics = MetricAccumulator()
        with self.runner.in_mixed_precision():
            for loss in self.runner.losses(batch, FirstPass([], {}), self._metrics):
                self._placement.start_backward(self.optimizer)
                loss.backward()
        self._placement.finish_backward(self.model)

    def clip_gradients(self, num_updates: int, num_planned: int) -> dict[str, Tensor]:
        """Clip the gradients, and set the learning rate. All ranks call this together.

        Args:
            num_updates: before this one.
            num_planned: of the run.

        Returns:
            metrics, under the names that users see.
        """
        grad_norm = self._placement.clip_gradients(self.model)
        means = self._metrics.reduce(self._placement.all_reduce_sum).means
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self._settings, num_updates, num_planned)
        return {"loss/value": means["loss"], "val/clipfrac": means["clipfrac"], "val/grad_norm": grad_norm}

    # ---- Checkpoints ----

    def add_to(self, contents: Contents) -> None:
        """Add weights and optimizer state to a checkpoint."""
        weights, optimizer_state = self._placement.named_tensors(self.model, self.optimizer)
        contents.add(CRITIC, weights, self._placement.permutations)
        contents.add(CRITIC_OPTIMIZER, optimizer_state, self._placement.permutations)

    def restore(self, checkpoint: Path, state: dict[str, dict[str, Tensor]]) -> None:
        """Load the weights of a checkpoint, and the optimizer state.

        Args:
            state: parameter name -> kind of state -> value; empty to reset the optimizer.
        """
        self._placement.restore(self.model, self.optimizer, tensors_of(checkpoint, CRITIC), state)

    def check_base(self, checkpoint: Path, state: Mapping[str, object]) -> None:
        """Raise a UserError if the weights below the adapters are not those of a checkpoint's run."""
        if state.get("critic_base") != self.base_hash:
            problem = f"resume: the critic of the run at {checkpoint} had other weights below its adapters"
            raise UserError("CHECKPOINT", problem, "give the run's original critic.archive, or start a new run")


def critic_metrics(examples: Sequence[Example]) -> dict[str, float]:
    """Metrics of the critic in an iteration; empty without one."""
    rollouts = [example.rollout for example in examples if example.rollout is not None]
    values, returns = (
        [each for rollout in rollouts for each in getattr(rollout, name) or ()] for name in ("values", "returns")
    )
    if not returns:
        return {}
    joined = (torch.from_numpy(np.concatenate(each)).double() for each in (values, returns))
    variance = explained_variance(*joined)
    return {} if variance is None else {"val/explained_variance": variance}


def explained_variance(values: Tensor, returns: Tensor) -> float | None:
    """1 - Var(returns - values) / Var(returns): 1 for a perfect critic, 0 for one that knows the mean alone.

    None for equal returns.
    """
    variance = returns.var(unbiased=False)
    return (1 - (returns - values).var(unbiased=False) / variance).item() if variance > 0 else None
