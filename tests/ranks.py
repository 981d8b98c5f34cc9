"""Trainers in several processes of one test: the same steps under every arrangement, compared tensor by tensor."""

import contextlib
import io
import os
import socket
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing
from hydra import compose, initialize_config_dir
from torch import Tensor

from engine import distributed
from engine.sharding import full_tensor
from tests.models import SIZES, random_examples

CONFIG = str(Path(__file__).parent.parent / "config")
SETTINGS = (
    "model=blank_model", "model.name_or_path=tiny", "model.tokenizer_name_or_path=films", "wandb.enabled=false",
    "sample_during_eval=false", "batch_size=5", "gradient_accumulation_steps=2", "token_budget=70", "optimizer=AdamW",
    "lr=1e-3", "warmup_steps=2", "n_epochs=4", "max_grad_norm=1.0", "max_length=64", "max_prompt_length=32",
)  # fmt: skip
# Long and short, so that no two shares of a batch cut alike; 25 examples, 20 batches of 5 in 4 epochs.
PAIRS = [(1 + 7 * i % 23, 1 + 5 * i % 19, 1 + 11 * i % 17) for i in range(25)]

Job = tuple[str, str, tuple[str, ...]]  # architecture, loss, overrides


def make_trainer(job: Job, run_dir: Path) -> Any:
    """A trainer for an architecture and a loss, on pairs of random tokens; prints nothing."""
    from engine.films import film_tokenizer
    from engine.tokenization import Split
    from engine.validation import validate_config
    from trainers import trainer_class

    architecture, loss, overrides = job
    values = {"max_position_embeddings": 128, **SIZES[architecture]}
    described = ", ".join(f"{key}: {str(value).lower()}" for key, value in values.items())
    settings = [*SETTINGS, f"cache_dir={run_dir / 'cache'}", f"local_run_dir={run_dir}", f"loss={loss}"]
    settings += ["loss.beta=0.5"] if loss != "sft" else []
    settings += [f"model.architecture={{model_type: {architecture}, {described}}}"]
    with initialize_config_dir(CONFIG, version_base=None):
        config = compose("config", [*settings, *overrides])
    validate_config(config)
    tokenizer = film_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    examples = random_examples([sizes[: 3 if loss != "sft" else 2] for sizes in PAIRS])
    with contextlib.redirect_stdout(io.StringIO()):
        return trainer_class(config)(config, run_dir, tokenizer, Split(examples), Split(examples[:7]))


Trajectory = tuple[Tensor, Tensor, dict[str, Tensor]]  # losses and gradient norms [steps], final weights


def trajectory(job: Job, run_dir: Path) -> Trajectory:
    """Train as job says."""
    trainer = make_trainer(job, run_dir)
    steps = [trainer.step(batch).values for batch in trainer.prepared(trainer.train_batches())]
    weights = {
        name: full_tensor(tensor, trainer.orders.get(name)).detach().clone()
        for name, tensor in trainer.named_tensors()[0].items()
    }
    losses, norms = (torch.stack([values[name].double() for values in steps]) for name in ("loss/train", "grad_norm"))
    return losses, norms, weights


def on_ranks(num_ranks: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What function(*arguments) returns on each of num_ranks processes of a group."""
    with tempfile.TemporaryDirectory() as directory:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        torch.multiprocessing.spawn(_on_rank, (num_ranks, port, directory, function, arguments), nprocs=num_ranks)
        return [torch.load(Path(directory, str(rank)), weights_only=False) for rank in range(num_ranks)]


def _on_rank(
    rank: int, num_ranks: int, port: int, directory: str, function: Callable[..., Any], arguments: Any
) -> None:
    import tests.conftest  # noqa: F401  the environment of all tests

    world = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": num_ranks, "LOCAL_WORLD_SIZE": num_ranks}
    os.environ |= {name: str(value) for name, value in world.items()}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    with distributed.joined(60):
        torch.save(function(*arguments), Path(directory, str(rank)))


def trajectories(jobs: list[Job], directory: Path) -> list[Trajectory]:
    """Of several jobs, one after another; each rank has directories of its own."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    return [trajectory(job, directory / f"{index}-{rank}") for index, job in enumerate(jobs)]
