"""How long does a preference step take, and how much memory, beside TRL's DPOTrainer or RewardTrainer?

Each system runs in its own process, on the same weights, pairs, truncation, batches, optimizer (AdamW) and learning
rate. Each uses its own best number of tokens at a time.

- CPU: the systems take turns step by step, so all see the same machine.
- GPU, or --one-at-a-time: a system takes all its steps and ends before the next one starts, so each has all memory.

The table, of the steps after the warm-up:

- tokens/s counts each prompt once for every system.
- MB: the peak of the last steps, above the memory held between steps.
- times, median: ratio to the first system, of all steps together and of the median step.

    .venv/bin/python benchmarks/step.py --data DATA_DIR --model llama-8k

--task reward trains reward models on rankings of --responses. TRL takes a ranking as all its pairs.

TRL needs its own environment, .venv-bench; `make bench` builds it. Without it, only our systems are measured.
"""

import argparse
import contextlib
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import MODELS, TRL_PYTHON, add_results_option, machine, shown_command, write_model, write_result
from benchmarks.cpu_profile import print_profile
from benchmarks.pairs import (
    Pair,
    fed_tokens,
    hh_pairs,
    make_batches,
    padded_tokens,
    step_flops,
    synthetic_pairs,
    with_more_responses,
)
from benchmarks.workers import Worker

# name -> (worker, its settings)
TRL_BEST = {"gradient_checkpointing": False, "precompute_ref_log_probs": True}
SYSTEMS: dict[str, tuple[str, Any]] = {
    "ours-bf16": ("ours", ["mixed_precision=bfloat16"]),
    "ours-bf16-compiled": ("ours", ["mixed_precision=bfloat16", "compile=true"]),
    "ours": ("ours", []),
    "ours-padded": ("ours", ["batching=padded"]),
    "trl-default": ("trl", {}),
    # TRL 1.16 has switched padding_free off. Its head is fused by default.
    "trl-best": ("trl", {**TRL_BEST, "bf16": True}),
    "trl-best-compiled": ("trl", {**TRL_BEST, "bf16": True, "torch_compile": True}),
    "trl-liger": ("trl", {**TRL_BEST, "bf16": True, "use_liger_kernel": True}),  # Liger's layers; on GPUs only
    "trl-best-fp32": ("trl", {**TRL_BEST, "bf16": False}),
    "ours-weights-bf16": ("ours", ["model.policy_dtype=bfloat16", "mixed_precision=null"]),
    "trl-weights-bf16": ("trl", {**TRL_BEST, "bf16": True, "dtype": "bfloat16"}),
}
CPU_SYSTEMS = "ours-bf16,ours,ours-padded,trl-default,trl-best,trl-best-fp32"
Steps = dict[str, list[dict[str, Any]]]  # system -> its steps


# ---- Measuring ----


def run_systems(
    names: list[str],
    model: dict[str, Any],
    batches: list[list[Pair]],
    arguments: argparse.Namespace,
) -> Steps:
    """The steps of each system, one for every batch."""
    first_memory = arguments.warmup + arguments.steps
    steps: Steps = {name: [] for name in names}
    with tempfile.TemporaryDirectory() as folder:
        write_model(model, Path(folder), gives_scores=arguments.task == "reward")

        def start(name: str) -> Worker:
            worker, settings = SYSTEMS[name]
            job = {"worker": worker, "settings": settings, "model": folder, "batches": batches}
            sizes = {"batch_size": arguments.batch_size, "task": arguments.task, "profile": arguments.profile}
            started = Worker(Path(folder, name), job | sizes, arguments.threads, arguments.trl_python)
            print(f"{name}: ready after {started.seconds_to_start:.0f} s", flush=True)
            return started

        if arguments.one_at_a_time:
            for name in names:
                with start(name) as worker:
                    steps[name] = [worker.step(index >= first_memory) for index in range(len(batches))]
            return steps
        with contextlib.ExitStack() as stack:
            workers: dict[str, Worker] = {}
            for name in names:
                workers[name] = stack.enter_context(start(name))
                workers[name].pause()
            for index in range(len(batches)):
                for name, worker in workers.items():
                    worker.go_on()
                    steps[name].append(worker.step(index >= first_memory))
                    worker.pause()
    return steps


def gemm_peak(dtype: str, threads: int) -> float:
    """Best measured FLOP/s of a matrix product on this machine."""
    import torch

    torch.set_num_threads(threads)
    device, size = ("cuda", 8192) if torch.cuda.is_available() else ("cpu", 2048)
    left, right = (torch.randn(size, size, device=device, dtype=getattr(torch, dtype)) for _ in range(2))
    times = []
    for _ in range(8):
        start = time.perf_counter()
        left @ right
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return 2 * size**3 / min(times)


# ---- The table ----


def row_of(
    name: str, steps: Steps, first: str, num_prompts: int, fed: int, timed: slice, flops: float, peaks: dict[str, float]
) -> dict[str, Any]:
    """A system's row of the table.

    Args:
        first: the system of ratio 1.
        num_prompts, fed: prompts and fed tokens of all measured steps.
        timed: the measured steps.
        flops: of all measured steps, packed.
        peaks: FLOP/s by dtype.
    """
    seconds, base = ([step["seconds"] for step in steps[each][timed]] for each in (name, first))
    total = sum(seconds)
    memory = [step["memory"] for step in steps[name] if "memory" in step]
    is_packed = name.startswith("ours") and "padded" not in name
    peak = peaks["bfloat16" if "bf16" in name else "float32"]
    return {
        "seconds": [round(value, 4) for value in seconds],
        "median": round(statistics.median(seconds), 4),
        "prompts_per_second": round(num_prompts / total, 2),
        "tokens_per_second": round(fed / total),
        "memory_mb": round(max(memory) / 1e6) if memory else None,
        "ratio_of_totals": round(total / sum(base), 2),
        "median_ratio": round(statistics.median(a / b for a, b in zip(seconds, base, strict=True)), 2),
        "share_of_gemm_peak": round(flops / total / peak, 3) if is_packed else None,
    }


def print_table(table: dict[str, dict[str, Any]]) -> None:
    print(
        f"\n{'system':17}{'s/step':>8}{'min':>8}{'max':>8}{'prompts/s':>11}{'tokens/s':>10}{'MB':>7}{'times':>8}{'median':>8}"
        f"{'of peak':>9}"
    )
    for name, row in table.items():
        share = "" if row["share_of_gemm_peak"] is None else f"{row['share_of_gemm_peak']:9.0%}"
        memory = "" if row["memory_mb"] is None else row["memory_mb"]
        print(
            f"{name:17}{row['median']:8.3f}{min(row['seconds']):8.3f}{max(row['seconds']):8.3f}"
            f"{row['prompts_per_second']:11.1f}{row['tokens_per_second']:10.0f}{memory:>7}{row['ratio_of_totals']:8.2f}"
            f"{row['median_ratio']:8.2f}{share}"
        )


def summary(steps: Steps, batches: list[list[Pair]], arguments: argparse.Namespace) -> dict[str, Any]:
    """Print losses and the table; returns both for the record."""
    measured = slice(arguments.warmup, arguments.warmup + arguments.steps)
    timed, is_reward = batches[measured], arguments.task == "reward"
    pairs = [pair for batch in timed for pair in batch]
    fed = sum(fed_tokens(pair, feeds_last_token=is_reward) for pair in pairs)
    padded = sum(map(padded_tokens, timed))
    peaks = {dtype: gemm_peak(dtype, arguments.threads) for dtype in ("float32", "bfloat16")}
    flops = step_flops(MODELS[arguments.model], timed, has_lm_head=not is_reward) * len(timed)
    first = next(iter(steps))
    table = {name: row_of(name, steps, first, len(pairs), fed, measured, flops, peaks) for name in steps}
    losses = {name: [step["loss"] for step in steps[name][:4] if "loss" in step] for name in steps}
    print("\nlosses of the first steps:")
    for name, values in losses.items():
        print(f"  {name:17}" + " ".join(f"{loss:9.6f}" for loss in values))
    print(
        f"\nfed tokens a step: packed {fed / len(timed):.0f}, padded {padded / len(timed):.0f}"
        f" ({padded / fed:.1f} times)"
    )
    print_table(table)
    profiles = {name: step["profile"] for name in steps for step in steps[name] if "profile" in step}
    for name, profile in profiles.items():
        print_profile(name, profile)
    return {
        "gemm_peak_gflops": {dtype: round(peak / 1e9) for dtype, peak in peaks.items()},
        "tokens_per_step": {"packed": fed / len(timed), "padded": padded / len(timed)},
        "first_losses": losses,
        "systems": table,
        **({"profiles": profiles} if profiles else {}),
    }


# ---- The command ----


def parse(texts: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with hh/train.jsonl.gz; without it, pairs are synthetic")
    parser.add_argument("--model", choices=MODELS, default="llama-8k")
    parser.add_argument("--systems", default=CPU_SYSTEMS, help="comma-separated, of " + ", ".join(SYSTEMS))
    parser.add_argument("--task", choices=("dpo", "reward"), default="dpo")
    parser.add_argument("--responses", type=int, default=2, help="of a prompt, for --task reward")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--steps", type=int, default=8, help="measured steps, after --warmup")
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--memory-steps", type=int, default=2, help="steps whose memory is measured, after the others")
    parser.add_argument("--profile", action="store_true", help="profile one more step of ours, on a CPU")
    parser.add_argument("--grouped", action="store_true", help="batches of similar lengths, for all systems")
    parser.add_argument("--one-at-a-time", action="store_true", help="run one system after another; always on a GPU")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument(
        "--trl-python", type=Path, default=TRL_PYTHON, help="of TRL's environment (default: %(default)s)"
    )
    add_results_option(parser)
    arguments = parser.parse_args(texts)
    if arguments.steps < 1:
        parser.error("--steps: must be 1 or more")
    if arguments.responses < 2 or (arguments.responses > 2 and arguments.task == "dpo"):
        parser.error("--responses: 2 for --task dpo, 2 or more for --task reward")
    if unknown := [name for name in arguments.systems.split(",") if name not in SYSTEMS]:
        parser.error(f"--systems: {', '.join(unknown)}: choose from {', '.join(SYSTEMS)}")
    return arguments


def main(texts: Sequence[str]) -> None:
    arguments = parse(texts)
    import torch

    arguments.one_at_a_time |= torch.cuda.is_available()
    names = arguments.systems.split(",")
    if not arguments.trl_python.exists():
        print(f"TRL is not measured: {arguments.trl_python} does not exist (make bench builds it)")
        names = [name for name in names if SYSTEMS[name][0] != "trl"]
    model = MODELS[arguments.model]
    vocabulary = model["vocab_size"]
    count = arguments.batch_size * (arguments.warmup + arguments.steps + arguments.memory_steps + arguments.profile)
    pairs = hh_pairs(arguments.data, vocabulary, count) if arguments.data else synthetic_pairs(vocabulary, count)
    pairs = with_more_responses(pairs, arguments.responses)
    batches = make_batches(pairs, arguments.batch_size, arguments.grouped)
    steps = run_systems(names, model, batches, arguments)
    record = {
        "command": shown_command("step", texts, arguments.data),
        **machine(arguments.threads, arguments.trl_python),
        "one_at_a_time": arguments.one_at_a_time,
        **summary(steps, batches, arguments),
    }
    label = f"{arguments.model}{'-grouped' if arguments.grouped else ''}-b{arguments.batch_size}"
    if arguments.task == "reward":
        label = f"reward-{arguments.responses}-{label}"
    write_result(arguments.results, f"step-{label}", record)


if __name__ == "__main__":
    main(sys.argv[1:])
