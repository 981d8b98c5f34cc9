"""How much memory does a DPO step take: all weights, LoRA and QLoRA, by model size, sequence length and microbatch?

Each cell is a process with a Llama of random weights. It builds a trainer on synthetic pairs and takes a few steps. The
reference is cached, as by default.

- GPU: the peak of allocated memory, once the model is loaded.
- CPU: the peak of resident memory, above the memory of the process before the model was built.
- --plan: the numbers of plan=true for some hardware. Nothing is built or run.

    .venv/bin/python benchmarks/memory.py                                       # small models on a CPU, large on a GPU
    .venv/bin/python benchmarks/memory.py --sizes 7b --lengths 512,4096 --peft qlora
    .venv/bin/python benchmarks/memory.py --plan rtx4090                        # large models, without a GPU
"""

import argparse
import itertools
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import (
    add_results_option,
    compose_settings,
    machine,
    make_trainer,
    model_overrides,
    reset_resident_peak,
    resident,
    shown_command,
    write_model,
    write_result,
)

if TYPE_CHECKING:
    from engine.data.examples import Example

SIZES: dict[str, dict[str, int]] = {
    "tiny": {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4},
    "30m": {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 4, "num_attention_heads": 8},
    "110m": {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 12},
    "1b": {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 16},
    "3b": {"hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 26, "num_attention_heads": 24},
    "7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
}
VOCABULARY = 32000
PEFT = {
    "full": ("optimizer=AdamW",),
    "lora": ("peft=lora", "optimizer=AdamW"),
    "qlora": ("peft=qlora", "optimizer=PagedAdamW8bit"),
}


def architecture_of(size: str) -> dict[str, Any]:
    return {"model_type": "llama", "vocab_size": VOCABULARY, "max_position_embeddings": 8192, **SIZES[size]}


# ---- A cell ----


def overrides_of(job: dict[str, Any], folder: Path) -> list[str]:
    """The overrides of a cell, without those of the model."""
    length, microbatch = job["length"], job["microbatch"]
    return [
        *("loss=dpo", "loss.beta=0.1", f"batch_size={2 * microbatch}", "gradient_accumulation_steps=2"),
        *(f"max_length={length}", f"max_prompt_length={length // 2}", "mixed_precision=bfloat16"),
        *(f"token_budget={3 * (length // 2) * microbatch}", "sample_during_eval=false", "debug=true"),
        *(f"cache_dir={folder}", f"local_run_dir={folder}/run", "wandb.enabled=false"),
        *(*PEFT[job["peft"]], *job["settings"]),
    ]


def random_examples(length: int, count: int) -> "list[Example]":
    """Pairs of a prompt and two responses of length / 2 tokens each."""
    import numpy as np

    from engine.data.examples import Example

    generator = np.random.default_rng(0)

    def tokens() -> Any:
        return generator.integers(2, VOCABULARY, length // 2, dtype=np.int32)

    return [Example(tokens(), (tokens(), tokens()), index) for index in range(count)]


def measure(job: dict[str, Any], folder: Path) -> dict[str, float]:
    """Peak memory, memory between steps, and time of a step."""
    import torch

    import trainers  # noqa: F401  the memory of libraries does not count

    settings = compose_settings(*model_overrides(Path(job["model"])), *overrides_of(job, folder))
    before = resident("VmRSS")
    trainer = make_trainer(settings, folder / "run", random_examples(job["length"], 4 * job["microbatch"]))
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        held = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
    else:
        reset_resident_peak()  # memory freed after loading does not count
        held = resident("VmRSS") - before
    start = time.monotonic()
    num_steps = 0
    for microbatches in trainer.train_batches():
        trainer.step(trainer.prepare(microbatches)).values.read()
        num_steps += 1
    seconds = (time.monotonic() - start) / num_steps
    peak = torch.cuda.max_memory_allocated() if on_gpu else resident("VmHWM") - before
    return in_gigabytes(peak, held, seconds)


def plan(job: dict[str, Any], folder: Path) -> dict[str, float]:
    """The expectation of plan=true for the hardware."""
    from engine.data.examples import Split
    from engine.models.tokenizers import load_tokenizer
    from engine.run.plan import make_plan
    from trainers import BasicTrainer

    described = ", ".join(f"{key}: {value}" for key, value in architecture_of(job["size"]).items())
    model = ["model=blank_model", "model.name_or_path=tiny", "model.tokenizer_name_or_path=films"]
    overrides = [*model, f"model.architecture={{{described}}}", f"plan_hardware={job['plan']}", "plan=true"]
    settings = compose_settings(*overrides, *overrides_of(job, folder))
    examples = random_examples(job["length"], 4 * job["microbatch"])
    tokenizer = load_tokenizer(settings.model)
    expected = make_plan(settings, BasicTrainer, tokenizer, Split(examples), Split(examples[:1]), 1)
    seconds = expected.seconds["training"] / expected.num_steps if expected.seconds else math.nan
    return in_gigabytes(expected.memory.peak, expected.memory.state, seconds)


def in_gigabytes(peak: float, held: float, seconds: float) -> dict[str, float]:
    return {"peak_gb": round(peak / 1e9, 2), "held_gb": round(held / 1e9, 2), "seconds": round(seconds, 2)}


def run_cell(job: dict[str, Any], threads: int) -> dict[str, Any]:
    """A cell in its own process; {"error": ...} if it fails."""
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    command = [sys.executable, __file__, "--cell", json.dumps(job)]
    process = subprocess.run(command, capture_output=True, text=True, env=environment)
    last = (process.stderr.strip().splitlines() or [""])[-1]
    return json.loads(last) if process.returncode == 0 else {"error": last}


# ---- The command ----


def parse(texts: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", help=f"comma-separated, of {', '.join(SIZES)}")
    parser.add_argument("--lengths", help="of prompt + response, in tokens")
    parser.add_argument("--microbatches", default="1", help="pairs run at a time")
    parser.add_argument("--peft", default=",".join(PEFT))
    parser.add_argument("--plan", help="a plan_hardware of config.yaml, such as rtx4090")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--cell", help=argparse.SUPPRESS)
    parser.add_argument("settings", nargs="*", help="overrides of train.py, such as activation_checkpointing=true")
    add_results_option(parser)
    return parser.parse_args(texts)


def main(texts: Sequence[str]) -> None:
    arguments = parse(texts)
    if arguments.cell:
        job = json.loads(arguments.cell)
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps((plan if job["plan"] else measure)(job, Path(folder))), file=sys.stderr)
        return
    import torch

    on_gpu = torch.cuda.is_available() or arguments.plan is not None
    sizes = (arguments.sizes or ("1b,3b,7b" if on_gpu else "30m,110m")).split(",")
    lengths = (arguments.lengths or ("512,4096" if on_gpu else "256,512")).split(",")
    measure_name = (
        "allocated on the GPU" if on_gpu else "resident on the CPU, above the process itself (there is no GPU)"
    )
    if arguments.plan:
        measure_name = f"expected by plan=true for a {arguments.plan}; nothing was run"
    print(f"peak GB {measure_name}\n\n{'size':8}{'peft':8}{'length':>8}{'pairs':>7}{'held':>8}{'peak':>8}{'s/step':>9}")
    cells = []
    for size in sizes:
        with tempfile.TemporaryDirectory() as folder:
            if not arguments.plan:
                write_model(architecture_of(size), Path(folder), "bfloat16")  # as published models are stored
            for peft, length, microbatch in itertools.product(
                arguments.peft.split(","), map(int, lengths), map(int, arguments.microbatches.split(","))
            ):
                cell = {"size": size, "peft": peft, "length": length, "microbatch": microbatch}
                more = {"model": folder, "plan": arguments.plan, "settings": arguments.settings}
                found = run_cell(cell | more, arguments.threads)
                cells.append(cell | found)
                numbers = "   " + found.get("error", "")[:100]
                if "error" not in found:
                    numbers = f"{found['held_gb']:>8.2f}{found['peak_gb']:>8.2f}{found['seconds']:>9.2f}"
                print(f"{size:8}{peft:8}{length:>8}{microbatch:>7}{numbers}", flush=True)
    record = {
        "command": shown_command("memory", texts),
        "peak_gb": measure_name,
        **machine(arguments.threads),
        "cells": cells,
    }
    kind = f"plan-{arguments.plan}" if arguments.plan else "gpu" if on_gpu else "cpu"
    write_result(arguments.results, f"memory-{kind}", record)


if __name__ == "__main__":
    main(sys.argv[1:])
