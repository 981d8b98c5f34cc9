"""Run trainers on several ranks inside a test, for comparison of losses, norms and weights."""

import contextlib
import io
import os
import socket
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import Tensor

from engine.data.films import film_tokenizer
from engine.data.rankings import compare_by_rank
from engine.models.shards import full_tensor
from engine.placement import process_group
from losses import LOSSES
from tests.configs import composed, make_settings
from tests.models import SIZES, random_examples

CONFIG = str(Path(__file__).parent.parent / "config")
SETTINGS = (
    "model=blank_model", "model.name_or_path=tiny", "model.tokenizer_name_or_path=films", "wandb.enabled=false",
    "report=null",
    "sample_during_eval=false", "batch_size=5", "gradient_accumulation_steps=2", "token_budget=70", "optimizer=AdamW",
    "lr=1e-3", "warmup_steps=2", "n_epochs=4", "max_grad_norm=1.0", "max_length=64", "max_prompt_length=32",
)  # fmt: skip
# Lengths differ, so ranks split their batches differently. 25 examples: 20 batches of 5 in 4 epochs.
PAIRS = [(1 + 7 * i % 23, 1 + 5 * i % 19, 1 + 11 * i % 17) for i in range(25)]

# Half of the sampled responses have this reward.
PROMPTS = [
    "rewards=[regular_expression]", "reward_options={regular_expression:{pattern:'.*[ei].*'}}",
    "rollout.num_responses=4", "rollout.max_new_tokens=6", "rollout.epochs=2", "sample_during_eval=true",
]  # fmt: skip

film_tokenizer(), composed(*SETTINGS)  # fills caches, once for the ranks of all tests
Job = tuple[str, str, tuple[str, ...]]  # architecture, loss, overrides


def make_trainer(job: Job, run_dir: Path) -> Any:
    """Build a trainer on pairs of random tokens; prints nothing."""
    from engine.data.examples import PromptRow, Split
    from trainers import TRAINERS

    architecture, loss, overrides = job
    values = {"max_position_embeddings": 128, **SIZES[architecture]}
    architecture_text = ", ".join(f"{key}: {str(value).lower()}" for key, value in values.items())
    settings = [*SETTINGS, f"cache_dir={run_dir / 'cache'}", f"local_run_dir={run_dir}", f"loss={loss}"]
    settings += ["loss.beta=0.5"] if loss not in ("sft", "reward", "best_of_n") else []
    settings += PROMPTS if LOSSES[loss].batch == "rollout" else []
    settings += [f"model.architecture={{model_type: {architecture}, {architecture_text}}}"]
    parsed = make_settings(*settings, *overrides)
    tokenizer = film_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    examples = random_examples([sizes[: 3 if loss != "sft" else 2] for sizes in PAIRS])
    if loss == "reward":  # rankings of two to four responses
        lengths = [(*sizes, 2 + index % 3, 4)[: 3 + index % 3] for index, sizes in enumerate(PAIRS)]
        ranks = {2: (0, 1), 3: (0, 1, 1), 4: (0, 1, 2, 3)}
        rankings = random_examples(lengths)
        examples = [replace(each, comparisons=compare_by_rank(ranks[len(each.responses)])) for each in rankings]
    if LOSSES[loss].batch == "rollout":
        examples = [replace(each, responses=(), row=PromptRow("", {})) for each in examples]
    with contextlib.redirect_stdout(io.StringIO()):
        return TRAINERS[parsed.trainer](parsed, run_dir, tokenizer, Split(examples), Split(examples[:7]))


Trajectory = tuple[Tensor, Tensor, dict[str, Tensor]]  # losses and gradient norms [steps], final weights


def trajectory(job: Job, run_dir: Path) -> Trajectory:
    """Train a job to its end."""
    trainer = make_trainer(job, run_dir)
    steps = [trainer.step(batch).values.read() for batch in map(trainer.prepare, trainer.train_batches())]
    weights = {
        name: full_tensor(tensor, trainer.placement.permutations.get(name)).detach().clone()
        for name, tensor in trainer.placement.named_tensors(trainer.policy, trainer.optimizer)[0].items()
    }
    losses, norms = (
        torch.tensor([values[name] for values in steps], dtype=torch.float64) for name in ("loss/train", "grad_norm")
    )
    return losses, norms, weights


def on_ranks(num_ranks: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Call function(*arguments) on num_ranks processes of one group; returns one result per rank."""
    with tempfile.TemporaryDirectory() as directory:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        # Forked from one process with all imports: they take five seconds of a core.
        torch.multiprocessing.set_forkserver_preload(["tests.ranks", "trainers"])
        torch.multiprocessing.start_processes(
            _on_rank,
            (num_ranks, port, directory, function, arguments),
            nprocs=num_ranks,
            start_method="forkserver",
        )
        return [torch.load(Path(directory, str(rank)), weights_only=False) for rank in range(num_ranks)]


def _on_rank(
    rank: int, num_ranks: int, port: int, directory: str, function: Callable[..., Any], arguments: Any
) -> None:
    import tests.conftest  # noqa: F401  the environment of all tests

    world = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": num_ranks, "LOCAL_WORLD_SIZE": num_ranks}
    os.environ |= {name: str(value) for name, value in world.items()}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    with process_group.joined(60):
        torch.save(function(*arguments), Path(directory, str(rank)))


def trajectories(jobs: list[Job], directory: Path) -> list[Trajectory]:
    """Train several jobs in turn; each rank writes to separate directories."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    return [trajectory(job, directory / f"{index}-{rank}") for index, job in enumerate(jobs)]
