"""How do speed and memory of a trainer change with the number of processes?

The same SFT steps under each trainer and world size, each run in processes of its own: on GPUs where there are
enough, else in CPU processes that talk over gloo. tokens/s counts each prompt once, over all processes; memory is that
of the fullest process: what it keeps between steps (parameters and optimizer state), and what a step takes above that.

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
from datetime import date
from pathlib import Path
from typing import Any

from step import MODELS, ROOT, Pair, machine, measured, synthetic_pairs

M_MMAP_THRESHOLD = -3
# name -> the processes it can run in, and what makes the trainer
TRAINERS: dict[str, tuple[tuple[int, ...], tuple[str, ...]]] = {
    "Basic": ((1,), ("trainer=BasicTrainer",)),
    "FSDP": ((1, 2, 4), ("trainer=FSDPTrainer",)),
    "TensorParallel": ((2, 4), ("trainer=TensorParallelTrainer",)),
    "FSDP x TensorParallel": ((4,), ("trainer=FSDPTrainer", "tensor_parallel_size=2")),
}


def work(rank: int, num_ranks: int, job: dict[str, Any]) -> None:
    """One process of one row of the table; the first writes down what was found."""
    sys.path.insert(0, str(ROOT))
    import torch
    import torch.distributed as dist

    from engine.sharding import own

    torch.set_num_threads(job["threads"])
    if torch.cuda.is_available():
        torch.cuda.set_device(rank)
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    store = dist.FileStore(f"{job['folder']}/store", num_ranks)
    dist.init_process_group(backend, store=store, rank=rank, world_size=num_ranks)
    with contextlib.redirect_stdout(io.StringIO()):
        trainer = make_trainer(job)
        answers = []
        for index, batch in enumerate(trainer.prepared(trainer.train_batches())):
            dist.barrier()
            of_memory = index == job["warmup"] + job["steps"]
            if of_memory and backend == "gloo":  # what is freed is given back, so that the peak is that of tensors
                ctypes.CDLL("libc.so.6").mallopt(M_MMAP_THRESHOLD, 2**16)
            with measured(of_memory) as answer:
                trainer.step(batch).values["loss/train"].item()
            answer["tokens"] = sum(trainer.of_data_ranks(sum(part.num_tokens for part, _ in batch.microbatches)))
            answers.append(answer)
    state = [*trainer.policy.parameters()]
    state += [value for values in trainer.optimizer.state.values() for value in values.values()]
    timed = answers[job["warmup"] :][: job["steps"]]
    found = {
        "seconds": [answer["seconds"] for answer in timed],
        "tokens": [answer["tokens"] for answer in timed],
        "state": sum(own(value).nbytes for value in state if isinstance(value, torch.Tensor)),
        "step": answers[-1]["memory"],
    }
    by_rank: list[Any] = [None] * num_ranks
    dist.all_gather_object(by_rank, found)
    if rank == 0:
        Path(job["folder"], "found.json").write_text(json.dumps(by_rank))
    dist.barrier()
    dist.destroy_process_group()


def make_trainer(job: dict[str, Any]) -> Any:
    import numpy as np
    from hydra import compose, initialize_config_dir

    from engine.films import film_tokenizer
    from engine.tokenization import Example, Split
    from trainers import trainer_class

    described = ", ".join(f"{key}: {str(value).lower()}" for key, value in job["model"].items())
    settings = [
        *("model=blank_model", "model.name_or_path=new", "model.tokenizer_name_or_path=films", "loss=sft"),
        *(f"model.architecture={{{described}}}", f"batch_size={job['batch_size']}", "optimizer=AdamW"),
        *(f"cache_dir={job['folder']}", "token_budget=4096", "sample_during_eval=false", *job["overrides"]),
    ]
    with initialize_config_dir(str(ROOT / "config"), version_base=None):
        config = compose("config", settings)
    tokenizer = film_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token

    def example(pair: Pair, index: int) -> Example:
        prompt, chosen = (np.array(pair[name], np.int32) for name in ("prompt", "chosen"))
        return Example(prompt, (chosen,), prompt_index=index)

    examples = [example(pair, index) for index, pair in enumerate(job["pairs"])]
    return trainer_class(config)(config, Path(job["folder"]), tokenizer, Split(examples), Split([]))


def measure(num_ranks: int, job: dict[str, Any]) -> dict[str, Any]:
    """One row of the table."""
    import torch.multiprocessing

    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(work, (num_ranks, job | {"folder": folder}), nprocs=num_ranks)
        by_rank = json.loads(Path(folder, "found.json").read_text())
    seconds = [max(times) for times in zip(*(found["seconds"] for found in by_rank), strict=True)]
    return {
        "seconds": [round(value, 4) for value in seconds],
        "tokens_per_second": round(sum(by_rank[0]["tokens"]) / sum(seconds)),
        "median_tokens_per_second": round(
            statistics.median(tokens / time for tokens, time in zip(by_rank[0]["tokens"], seconds, strict=True))
        ),
        "state_mb": round(max(found["state"] for found in by_rank) / 1e6, 1),
        "step_mb": round(max(found["step"] for found in by_rank) / 1e6, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="llama-8k")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--steps", type=int, default=5, help="measured steps, after --warmup")
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--settings", nargs="*", default=[], help="of the config, for all trainers")
    arguments = parser.parse_args()
    import torch

    num_gpus, cores = torch.cuda.device_count(), os.cpu_count() or 1
    device = "cuda" if num_gpus else "cpu"
    model = MODELS[arguments.model]
    pairs = synthetic_pairs(model["vocab_size"], arguments.batch_size * (arguments.warmup + arguments.steps + 1))
    job = {
        "model": model,
        "pairs": pairs,
        **{key: getattr(arguments, key) for key in ("batch_size", "steps", "warmup")},
    }
    where = f"{num_gpus} GPUs" if num_gpus else f"CPU processes over gloo, that share {cores} cores"
    print(
        f"{arguments.model} on {where}\n\n{'':24}{'processes':>9}{'tokens/s':>10}{'state MB':>10}{'step MB':>9}",
        flush=True,
    )
    load = round(os.getloadavg()[0], 2)  # of what else runs on the machine
    rows: list[dict[str, Any]] = []
    for name, (sizes, overrides) in TRAINERS.items():
        for size in sizes:
            if num_gpus and size > num_gpus:
                continue
            settings = {"threads": max(1, cores // size), "overrides": [*overrides, *arguments.settings]}
            row = {"trainer": name, "processes": size, **measure(size, job | settings)}
            rows.append(row)
            print(
                f"{name:24}{size:>9}{row['tokens_per_second']:>10,}{row['state_mb']:>10,.1f}{row['step_mb']:>9,.1f}",
                flush=True,
            )
    record = {
        "command": " ".join(["benchmarks/scaling.py", *sys.argv[1:]]),
        **machine(cores),
        "on": f"{where}; with more processes than cores, speed says nothing of scaling" if not num_gpus else where,
        "load_average_before": load,
        "rows": rows,
    }
    path = ROOT / "benchmarks" / "results" / f"scaling-{device}-{date.today()}.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(f"\nwritten to {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
