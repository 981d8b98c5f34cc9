"""The policy for NaN and Inf in losses, gradients and weights."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NoReturn

import torch
from transformers import PreTrainedModel

from engine.data.examples import Example
from engine.models.shards import local_shard
from engine.placement.placement import Placement
from engine.settings.schema import Settings
from utils import UserError, write_atomically

# The square of a larger weight is Inf in fp32, so a norm of it is too. It fits into no working model.
LARGEST_WEIGHT = torch.finfo(torch.float32).max ** 0.5


class NonFinitePolicy:
    """Applies on_nonfinite: abort, skip the batch, or roll back to the last checkpoint.

    The optimizer never sees NaN or Inf.

    Args:
        counters: of the trainer. "skipped" is counted here; "updates" is shown in errors.
        rollback: restores the last checkpoint and returns its name; None if there is none.
        log: prints a line.
    """

    def __init__(
        self,
        settings: Settings,
        run_dir: Path,
        placement: Placement,
        counters: dict[str, int],
        rollback: Callable[[], str | None],
        log: Callable[[str], None],
    ):
        self._settings, self._run_dir, self._placement = settings, run_dir, placement
        self._counters, self._rollback, self._log = counters, rollback, log

    def handle(self, examples: Sequence[Example], facts: Mapping[str, float], loss: float, norm: float) -> None:
        """Handle a batch with a loss or gradient norm of NaN or Inf. All ranks call this together.

        Args:
            facts: of the step, with counters; written to a file with the tokens of the batch.

        Raises:
            UserError: NONFINITE, to abort the run.
        """
        settings, update = self._settings, int(facts["counters/updates"])
        dump = self._run_dir / f"nonfinite-{update}.json"
        if self._placement.rank == 0:
            found = {"update": update, **facts, "loss": str(loss), "norm": str(norm)}
            write_atomically(dump, json.dumps(found | {"examples": [_as_json(each) for each in examples]}).encode())
        prompts = sorted({example.prompt_index for example in examples})
        what = (
            f"update {update} has loss {loss} and gradient norm {norm}; its batch has the prompt indices {prompts},"
            f" and its tokens are in {dump}"
        )
        self._counters["skipped"] += 1
        if settings.on_nonfinite == "abort":
            self.fail(what)
        if self._counters["skipped"] > settings.max_nonfinite:
            self.fail(f"more than max_nonfinite={settings.max_nonfinite} batches are not finite; {what}")
        if settings.on_nonfinite == "skip":
            self._log(f"{what}: skipped")
            return
        checkpoint = self._rollback()
        if checkpoint is None:
            self.fail(f"there is no checkpoint to roll back to; {what}")
        self._log(f"{what}: rolled back to {checkpoint}, training continues with the next batch")

    def check_weights(self, policy: PreTrainedModel) -> None:
        """Abort if a trained weight is NaN, Inf or beyond LARGEST_WEIGHT. All ranks call this together."""
        device = self._placement.device
        trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
        shards = [local_shard(parameter) for parameter in trained]
        bad = [(~(shard.isfinite() & (shard.abs() <= LARGEST_WEIGHT))).sum().to(device) for shard in shards]
        num_bad = torch.stack(bad).sum().double()
        self._placement.all_reduce_sum(num_bad)
        if num_bad > 0:
            self.fail(f"a weight is NaN, Inf or larger than {LARGEST_WEIGHT:.1g}")

    def fail(self, what: str) -> NoReturn:
        """Abort the run."""
        updates = self._counters["updates"]
        fix = "lower lr or raise warmup_steps, and check the data; the last checkpoint is untouched"
        if updates == 0:
            fix = "give weights without NaN and Inf, or a wider dtype"
        raise UserError("NONFINITE", f"{what} (counters/updates is {updates})", fix)


def _as_json(example: Example) -> dict[str, object]:
    turns = [{"num_prompt": turn.num_prompt, "response": turn.response.tolist()} for turn in example.turns]
    return {
        "prompt_index": example.prompt_index,
        "prompt": example.prompt.tolist(),
        "responses": [response.tolist() for response in example.responses],
        **({"turns": turns} if turns else {}),
    }
