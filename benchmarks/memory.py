"""How much memory does a DPO step take: all weights, LoRA and QLoRA, by model size, sequence length and microbatch?

Llamas with random weights; each cell is a process of its own, which builds a trainer over synthetic pairs and takes a
few steps. On a GPU it is the peak of what is allocated, from the loaded model on; on a CPU, which is said, the peak of
resident memory above what the process held before the model was built. With --plan nothing is built or run: it is what
plan=true expects of that hardware. The reference is cached, as by default.

    .venv/bin/python benchmarks/memory.py                                       # small models on a CPU, large on a GPU
    .venv/bin/python benchmarks/memory.py --sizes 7b --lengths 512,4096 --peft qlora
    .venv/bin/python benchmarks/memory.py --plan rtx4090                        # large models, without a GPU
"""

import argparse
import ctypes
import gc
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

from step import ROOT, machine, resident

SIZES: dict[str, dict[str, int]] = {
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


def cell(size: str, peft: str, length: int, microbatch: int, more: list[str], plan: str | None) -> dict[str, float]:
    """Peak memory and time of a step on pairs of a prompt and two responses of length / 2 tokens each."""
    sys.path.insert(0, str(ROOT))
    import numpy as np
    import torch
    from hydra import compose, initialize_config_dir

    from engine.films import film_tokenizer
    from engine.plan import make_plan
    from engine.tokenization import Example, Split
    from trainers import BasicTrainer

    architecture = {"model_type": "llama", "vocab_size": VOCABULARY, "max_position_embeddings": 8192, **SIZES[size]}
    described = ", ".join(f"{key}: {value}" for key, value in architecture.items())
    generator = np.random.default_rng(0)

    def tokens() -> Any:
        return generator.integers(2, VOCABULARY, length // 2, dtype=np.int32)

    examples = [Example(tokens(), (tokens(), tokens()), index) for index in range(4 * microbatch)]
    with tempfile.TemporaryDirectory() as folder:
        overrides = [
            *("model=blank_model", "model.name_or_path=tiny", "model.tokenizer_name_or_path=films", "debug=true"),
            *(f"model.architecture={{{described}}}", "loss=dpo", "loss.beta=0.1", f"batch_size={2 * microbatch}"),
            *("gradient_accumulation_steps=2", f"max_length={length}", f"max_prompt_length={length // 2}"),
            *(f"token_budget={3 * (length // 2) * microbatch}", "mixed_precision=bfloat16", "sample_during_eval=false"),
            *(f"cache_dir={folder}", f"local_run_dir={folder}/run", "wandb.enabled=false", *PEFT[peft], *more),
        ]
        with initialize_config_dir(str(ROOT / "config"), version_base=None):
            config = compose("config", overrides)
        tokenizer = film_tokenizer()
        tokenizer.pad_token = tokenizer.eos_token
        if plan:
            config.plan_hardware = plan
            on_paper = make_plan(config, BasicTrainer, tokenizer, Split(examples), Split(examples[:1]), 1)
            seconds = on_paper.seconds["training"] / on_paper.num_steps if on_paper.seconds else math.nan
            return in_gigabytes(on_paper.memory.peak, on_paper.memory.state, seconds)
        before = resident("VmRSS")
        trainer = BasicTrainer(config, Path(folder, "run"), tokenizer, Split(examples), Split(examples[:1]))
        on_gpu = torch.cuda.is_available()
        if on_gpu:
            held = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
        else:
            gc.collect()
            ctypes.CDLL(None).malloc_trim(0)  # or what loading took would count
            held = resident("VmRSS") - before
            Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
        begun = time.monotonic()
        num_steps = 0
        for batch in trainer.prepared(trainer.train_batches()):
            trainer.step(batch).values["loss/train"].item()
            num_steps += 1
        seconds = (time.monotonic() - begun) / num_steps
        peak = torch.cuda.max_memory_allocated() if on_gpu else resident("VmHWM") - before
    return in_gigabytes(peak, held, seconds)


def in_gigabytes(peak: float, held: float, seconds: float) -> dict[str, float]:
    return {"peak_gb": round(peak / 1e9, 2), "held_gb": round(held / 1e9, 2), "seconds": round(seconds, 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", help=f"of {', '.join(SIZES)}")
    parser.add_argument("--lengths", help="of prompt + response, in tokens")
    parser.add_argument("--microbatches", default="1", help="pairs that are run at a time")
    parser.add_argument("--peft", default=",".join(PEFT))
    parser.add_argument("--plan", help="a plan_hardware of config.yaml, such as rtx4090")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--cell", help=argparse.SUPPRESS)
    parser.add_argument("settings", nargs="*", help="more of train.py's, such as activation_checkpointing=true")
    arguments = parser.parse_args()
    if arguments.cell:
        job = json.loads(arguments.cell)
        print(json.dumps(cell(**job, more=arguments.settings, plan=arguments.plan)), file=sys.stderr)
        return
    import torch

    on_gpu = torch.cuda.is_available() or arguments.plan is not None
    sizes = (arguments.sizes or ("1b,3b,7b" if on_gpu else "30m,110m")).split(",")
    lengths = (arguments.lengths or ("512,4096" if on_gpu else "256,512")).split(",")
    what = "allocated on the GPU" if on_gpu else "resident on the CPU, above the process itself: there is no GPU here"
    if arguments.plan:
        what = f"expected by plan=true for a {arguments.plan}: nothing was run"
    print(f"peak GB {what}\n\n{'size':8}{'peft':8}{'length':>8}{'pairs':>7}{'held':>8}{'peak':>8}{'s/step':>9}")
    rows = []
    for size in sizes:
        for peft in arguments.peft.split(","):
            for length in map(int, lengths):
                for microbatch in map(int, arguments.microbatches.split(",")):
                    job = {"size": size, "peft": peft, "length": length, "microbatch": microbatch}
                    command = [sys.executable, __file__, "--cell", json.dumps(job), *arguments.settings]
                    command += ["--plan", arguments.plan] if arguments.plan else []
                    environment = os.environ | {"OMP_NUM_THREADS": str(arguments.threads)}
                    process = subprocess.run(command, capture_output=True, text=True, env=environment)
                    last = process.stderr.strip().splitlines()[-1:] or [""]
                    if process.returncode == 0:
                        found = json.loads(last[0])
                        numbers = f"{found['held_gb']:>8.2f}{found['peak_gb']:>8.2f}{found['seconds']:>9.2f}"
                    else:
                        found = {"error": last[0]}
                        numbers = f"   {last[0][:100]}"
                    rows.append(job | found)
                    print(f"{size:8}{peft:8}{length:>8}{microbatch:>7}{numbers}", flush=True)
    record = {
        "command": " ".join(["benchmarks/memory.py", *sys.argv[1:]]),
        "peak_gb": what,
        **machine(arguments.threads),
        "cells": rows,
    }
    kind = f"plan-{arguments.plan}" if arguments.plan else "gpu" if on_gpu else "cpu"
    path = ROOT / "benchmarks" / "results" / f"memory-{kind}-{date.today()}.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(f"\nwritten to {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
