"""How do speed and memory of a trainer change with the number of processes?

The same SFT steps with each trainer and world size, each time in new processes: on GPUs if there are enough, else in
CPU processes over gloo.

- tokens/s: over all processes; each prompt counts once.
- state MB: parameters and optimizer state between steps, in the fullest process.
- step MB: the extra memory of a step.

    .venv/bin/python benchmarks/scaling.py
"""

import argparse
import contextlib
import ctypes
import io
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import (
    MODELS,
    add_results_option,
    compose_settings,
    machine,
    make_trainer,
    model_overrides,
    shown_command,
    take_step,
    write_model,
    write_result,
)
from benchmarks.pairs import Pair, make_example, synthetic_pairs

M_MMAP_THRESHOLD = -3
# name -> world sizes, overrides
TRAINERS: dict[str, tuple[tuple[int, ...], tuple[str, ...]]] = {
    "Basic": ((1,), ("trainer=BasicTrainer",)),
    "FSDP": ((1, 2, 4), ("trainer=FSDPTrainer",)),
    "TensorParallel": ((2, 4), ("trainer=TensorParallelTrainer",)),
    "FSDP x TensorParallel": ((4,), ("trainer=FSDPTrainer", "tensor_parallel_size=2")),
}


# ---- One process ----


def work(rank: int, num_ranks: int, job: dict[str, Any]) -> None:
    """Take the steps of one row on a rank; rank 0 writes the findings of all ranks."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(job["threads"])
    if torch.cuda.is_available():
        torch.cuda.set_device(rank)
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    store = dist.FileStore(f"{job['folder']}/store", num_ranks)
    dist.init_process_group(backend, store=store, rank=rank, world_size=num_ranks)
    with contextlib.redirect_stdout(io.StringIO()):
        found = take_steps(job)
    by_rank: list[Any] = [None] * num_ranks
    dist.all_gather_object(by_rank, found)
    if rank == 0:
        Path(job["folder"], "found.json").write_text(json.dumps(by_rank))
    dist.barrier()
    dist.destroy_process_group()


def take_steps(job: dict[str, Any]) -> dict[str, Any]:
    """Seconds and tokens of the measured steps, and memory in bytes: of the state and of a step."""
    import torch
    import torch.distributed as dist

    from engine.models.shards import local_shard

    settings = compose_settings(
        *model_overrides(job["model"]),
        *("loss=sft", f"batch_size={job['batch_size']}", "optimizer=AdamW", "token_budget=4096"),
        *(f"cache_dir={job['folder']}", "sample_during_eval=false", *job["overrides"]),
    )
    pairs: list[Pair] = job["pairs"]
    examples = [make_example(pair, ("chosen",), index) for index, pair in enumerate(pairs)]
    trainer = make_trainer(settings, Path(job["folder"]), examples)
    steps = []
    for index, microbatches in enumerate(trainer.train_batches()):
        batch = trainer.prepare(microbatches)
        dist.barrier()
        of_memory = index == job["warmup"] + job["steps"]
        if of_memory and not torch.cuda.is_available():  # give freed memory back: count tensors alone
            ctypes.CDLL("libc.so.6").mallopt(M_MMAP_THRESHOLD, 2**16)
        step = take_step(trainer, batch, of_memory)
        num_tokens = sum(microbatch.num_tokens for microbatch, _ in batch.microbatches)
        steps.append(step | {"tokens": sum(trainer.placement.gather_from_data_ranks(num_tokens))})
    state = [*trainer.policy.parameters()]
    state += [value for values in trainer.optimizer.state.values() for value in values.values()]
    timed = steps[job["warmup"] :][: job["steps"]]
    return {
        "seconds": [step["seconds"] for step in timed],
        "tokens": [step["tokens"] for step in timed],
        "state": sum(local_shard(value).nbytes for value in state if isinstance(value, torch.Tensor)),
        "step": steps[-1]["memory"],
    }


# ---- The table ----


def measure(num_ranks: int, job: dict[str, Any]) -> dict[str, Any]:
    """One row of the table."""
    import torch.multiprocessing

    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(work, (num_ranks, job | {"folder": folder}), nprocs=num_ranks)
        by_rank = json.loads(Path(folder, "found.json").read_text())
    tokens = by_rank[0]["tokens"]
    seconds = [max(times) for times in zip(*(found["seconds"] for found in by_rank), strict=True)]
    rates = [num / time for num, time in zip(tokens, seconds, strict=True)]
    return {
        "seconds": [round(value, 4) for value in seconds],
        "tokens_per_second": round(sum(tokens) / sum(seconds)),
        "median_tokens_per_second": round(statistics.median(rates)),
        "state_mb": round(max(found["state"] for found in by_rank) / 1e6, 1),
        "step_mb": round(max(found["step"] for found in by_rank) / 1e6, 1),
    }


def parse(texts: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="llama-8k")
    parser.add_argument("--trainers", default=",".join(TRAINERS), help="comma-separated (default: %(default)s)")
    parser.add_argument("--most-processes", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--steps", type=int, default=5, help="measured steps, after --warmup")
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--settings", nargs="*", default=[], help="overrides for all trainers")
    add_results_option(parser)
    return parser.parse_args(texts)


def main(texts: Sequence[str]) -> None:
    arguments = parse(texts)
    import torch

    num_gpus, cores = torch.cuda.device_count(), os.cpu_count() or 1
    most = min(arguments.most_processes, num_gpus or arguments.most_processes)
    model = MODELS[arguments.model]
    pairs = synthetic_pairs(model["vocab_size"], arguments.batch_size * (arguments.warmup + arguments.steps + 1))
    job = {"pairs": pairs, **{key: getattr(arguments, key) for key in ("batch_size", "steps", "warmup")}}
    where = f"{num_gpus} GPUs" if num_gpus else f"CPU processes over gloo, on {cores} shared cores"
    print(f"{arguments.model} on {where}\n\n{'':24}{'processes':>9}{'tokens/s':>10}{'state MB':>10}{'step MB':>9}")
    load = round(os.getloadavg()[0], 2)  # of other programs
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        write_model(model, Path(folder))
        for name in arguments.trainers.split(","):
            sizes, overrides = TRAINERS[name]
            for size in (size for size in sizes if size <= most):
                more = {"model": Path(folder), "threads": max(1, cores // size)}
                found = measure(size, job | more | {"overrides": [*overrides, *arguments.settings]})
                rows.append({"trainer": name, "processes": size, **found})
                print(
                    f"{name:24}{size:>9}{found['tokens_per_second']:>10,}{found['state_mb']:>10,.1f}"
                    f"{found['step_mb']:>9,.1f}",
                    flush=True,
                )
    record = {
        "command": shown_command("scaling", texts),
        **machine(cores),
        "on": where if num_gpus else f"{where}; speed on more processes than cores does not show scaling",
        "load_average_before": load,
        "rows": rows,
    }
    write_result(arguments.results, f"scaling-{'cuda' if num_gpus else 'cpu'}", record)


if __name__ == "__main__":
    main(sys.argv[1:])
