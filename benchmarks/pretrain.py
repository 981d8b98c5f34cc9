"""How long does a step of pretraining take, beside litgpt's?

Each system runs in its own process, on the same weights, windows, optimizer (AdamW), learning rate and largest gradient
norm. They take turns step by step. litgpt feeds microbatches of 4 windows (its default); ours has its own default.

- A window is one sequence for litgpt. So it is for `ours` (document_mask=false). `ours-documents` has a document mask.
- compiled: litgpt compiles the model, which is its default. Ours compiles each layer (compile=true).
- bf16: fp32 weights, and bfloat16 in matrix products (litgpt's bf16-mixed). Others are fp32.
- MFU: operations of a step, over its processor time and the speed of a large matrix product between the steps.

litgpt needs an environment of its own. Without it, only our systems are measured.

    python3 -m venv .venv-litgpt
    .venv-litgpt/bin/pip install -r benchmarks/requirements-litgpt.txt
    .venv/bin/python benchmarks/pretrain.py --model 5m
"""

import argparse
import contextlib
import json
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import (
    LLAMA,
    MODELS,
    ROOT,
    add_results_option,
    compose_settings,
    machine,
    make_trainer,
    measured,
    model_overrides,
    output_of,
    shown_command,
    write_model,
    write_result,
)
from benchmarks.pairs import step_flops
from benchmarks.workers import READY, Worker, answer, serve, wait_for_turn

LITGPT_PYTHON = ROOT / ".venv-litgpt" / "bin" / "python"
LEARNING_RATE, MAX_GRAD_NORM, WEIGHT_DECAY = 1e-4, 1.0, 0.01
DOCUMENT = 300  # mean tokens of a document
SIZES = {
    # hidden, intermediate, layers, heads, vocabulary. The last two are the presets of config/model.
    "5m": (256, 688, 5, 4, 4096),
    "15m": (288, 768, 6, 6, 32_000),
    "50m": (512, 1408, 10, 8, 32_000),
}
LLAMAS = {"tiny": MODELS["tiny"] | {"tie_word_embeddings": True}} | {
    name: LLAMA
    | {
        "tie_word_embeddings": True,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": num_layers,
        "num_attention_heads": num_heads,
        "vocab_size": vocabulary,
    }
    for name, (hidden, intermediate, num_layers, num_heads, vocabulary) in SIZES.items()
}
BF16 = "mixed_precision=bfloat16"
SYSTEMS: dict[str, tuple[str, Any]] = {
    "ours-bf16": ("ours", [BF16, "document_mask=false"]),
    "litgpt-bf16": ("litgpt", {"precision": "bf16-mixed", "compile": False}),
    "litgpt-bf16-compiled": ("litgpt", {"precision": "bf16-mixed", "compile": True}),
    "ours-bf16-compiled": ("ours", [BF16, "document_mask=false", "compile=true"]),
    "ours": ("ours", ["document_mask=false"]),
    "litgpt": ("litgpt", {"precision": "32-true", "compile": False}),
    "litgpt-compiled": ("litgpt", {"precision": "32-true", "compile": True}),
    "ours-bf16-documents": ("ours", [BF16]),
    "ours-documents": ("ours", []),
}
Window = dict[str, list[int]]  # tokens, and where its documents begin


# ---- In the worker ----


def work_ours(job: dict[str, Any]) -> None:
    """Steps of this repository's trainer."""
    import numpy as np

    from engine.data.examples import Example
    from engine.data.windows import NO_DOCUMENTS, with_token_weights

    settings = compose_settings(
        *model_overrides(job["model"]),
        *("loss=pretrain", f"batch_size={job['batch_size']}", "sample_during_eval=false"),
        *(
            f"lr={LEARNING_RATE}",
            "lr_schedule=constant",
            "min_lr=0",
            "warmup_steps=0",
            f"max_grad_norm={MAX_GRAD_NORM}",
        ),
        *("weight_decay=null", f"cache_dir={job['cache']}", *job["settings"]),
    )

    def example(window: Window, number: int) -> Example:
        tokens = np.array(window["tokens"], np.int32)
        documents = np.array(window["documents"], np.int64) if settings.document_mask else NO_DOCUMENTS
        return Example(tokens[:1], (tokens[1:],), number, documents=documents)

    batches = [with_token_weights([example(*each[::-1]) for each in enumerate(batch)]) for batch in job["batches"]]
    trainer = make_trainer(settings, Path(job["cache"]), [each for batch in batches for each in batch])
    answer(READY)
    for examples in batches:
        with timed(wait_for_turn()) as found:
            batch = trainer.prepare(trainer.split_batch(examples))
            found["loss"] = trainer.step(batch).values.read()["loss/train"]
        answer(json.dumps(found))


def work_litgpt(job: dict[str, Any]) -> None:
    """Steps of fit() in litgpt/pretrain.py."""
    import torch
    from lightning import Fabric
    from litgpt.model import GPT, Config
    from litgpt.scripts.convert_hf_checkpoint import copy_weights_hf_llama
    from litgpt.utils import chunked_cross_entropy
    from safetensors.torch import load_file

    shape = json.loads(Path(job["model"], "config.json").read_text())
    config = Config(
        **{"block_size": job["length"], "n_layer": shape["num_hidden_layers"], "n_embd": shape["hidden_size"]},
        **{"n_head": shape["num_attention_heads"], "intermediate_size": shape["intermediate_size"]},
        **{"vocab_size": shape["vocab_size"], "padded_vocab_size": shape["vocab_size"]},
        **{"norm_class_name": "RMSNorm", "norm_eps": shape["rms_norm_eps"], "mlp_class_name": "LLaMAMLP"},
        **{"rotary_percentage": 1.0, "parallel_residual": False, "bias": False},
    )
    weights: dict[str, torch.Tensor] = {}
    copy_weights_hf_llama(config, {}, weights, load_file(Path(job["model"], "model.safetensors")))
    fabric = Fabric(accelerator="cpu", devices=1, precision=job["settings"]["precision"])
    model: Any = GPT(config)
    model.load_state_dict(weights)
    model.transformer.wte.weight = model.lm_head.weight
    model.max_seq_length = job["length"]
    if job["settings"]["compile"]:
        model = torch.compile(model)
    model = fabric.setup(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    optimizer = fabric.setup_optimizers(optimizer)
    size = min(job["micro_batch"], job["batch_size"])
    answer(READY)
    for batch in job["batches"]:
        windows = torch.tensor([window["tokens"] for window in batch], dtype=torch.int32)
        with timed(wait_for_turn()) as found:
            losses = []
            parts = windows.split(size)
            for number, part in enumerate(parts):
                input_ids, targets = part[:, :-1].contiguous().long(), part[:, 1:].contiguous().long()
                with fabric.no_backward_sync(model, enabled=number + 1 < len(parts)):
                    loss = chunked_cross_entropy(model(input_ids), targets)
                    fabric.backward(loss / len(parts))
                losses.append(loss.detach())
            fabric.clip_gradients(model, optimizer, max_norm=MAX_GRAD_NORM)
            optimizer.step()
            optimizer.zero_grad()
            found["loss"] = torch.stack(losses).mean().item()
        answer(json.dumps(found))


@contextlib.contextmanager
def timed(of_memory: bool) -> Any:
    """measured(), and processor time of the body."""
    with measured(of_memory) as found:
        start = time.process_time()
        yield found
        found["processor"] = time.process_time() - start


# ---- In the parent ----


def make_windows(vocabulary: int, length: int, count: int) -> list[Window]:
    """Windows of random tokens in random documents, the same in each run."""
    generator = random.Random(0)
    windows = []
    for _ in range(count):
        tokens = [generator.randrange(vocabulary) for _ in range(length + 1)]
        documents = [place for place in range(1, length) if generator.random() < 1 / DOCUMENT]
        windows.append({"tokens": tokens, "documents": documents})
    return windows


def product_speed(dtype: str) -> float:
    """Operations of a large matrix product per second of processor time."""
    import torch

    size = 1024
    left, right = (torch.randn(size, size, dtype=getattr(torch, dtype)) for _ in range(2))
    best = float("inf")
    for _ in range(4):
        start = time.process_time()
        left @ right
        best = min(best, time.process_time() - start)
    return 2 * size**3 / best


def run_systems(
    names: Sequence[str], batches: list[list[Window]], arguments: argparse.Namespace
) -> tuple[dict[str, list[dict[str, float]]], dict[str, float]]:
    """The steps of each system, and the best speed of matrix products between them, by dtype."""
    import torch

    torch.set_num_threads(arguments.threads)
    steps: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    peaks = dict.fromkeys(("float32", "bfloat16"), 0.0)
    first_memory = len(batches) - arguments.memory_steps
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        write_model(LLAMAS[arguments.model], Path(folder))
        workers: dict[str, Worker] = {}
        for name in names:
            worker, settings = SYSTEMS[name]
            job = {"worker": worker, "settings": settings, "model": folder, "batches": batches}
            job |= {name: getattr(arguments, name) for name in ("batch_size", "length", "micro_batch")}
            started = Worker(Path(folder, name), job, arguments.threads, arguments.litgpt_python, __file__)
            workers[name] = stack.enter_context(started)
            workers[name].pause()
        for index in range(len(batches)):
            for name, each in workers.items():
                each.go_on()
                steps[name].append(each.step(index >= first_memory))
                each.pause()
            peaks = {dtype: max(peak, product_speed(dtype)) for dtype, peak in peaks.items()}
    return steps, peaks


def row_of(steps: Sequence[dict[str, float]], num_tokens: int, flops: float, peak: float) -> dict[str, Any]:
    """A system's row of the table.

    Args:
        steps: timed ones.
        num_tokens, flops: of a step.
        peak: operations per second of processor time.
    """
    seconds, processor = (median(step[key] for step in steps) for key in ("seconds", "processor"))
    return {
        "seconds": [round(step["seconds"], 4) for step in steps],
        "processor_seconds": [round(step["processor"], 4) for step in steps],
        "median": round(seconds, 4),
        "processor_median": round(processor, 4),
        "tokens_per_second": round(num_tokens / seconds),
        "tokens_per_processor_second": round(num_tokens / processor),
        "mfu": round(flops / processor / peak, 3),
    }


def parse(texts: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=LLAMAS, default="5m")
    parser.add_argument("--systems", default=",".join(SYSTEMS), help="comma-separated (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=8, help="windows of a step (default: %(default)s)")
    parser.add_argument("--length", type=int, default=512, help="tokens of a window (default: %(default)s)")
    parser.add_argument("--micro-batch", type=int, default=4, help="windows that litgpt feeds at a time")
    parser.add_argument("--steps", type=int, default=12, help="timed ones, after --warmup (default: %(default)s)")
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--memory-steps", type=int, default=1, help="after the timed ones")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--litgpt-python", type=Path, default=LITGPT_PYTHON, help="of litgpt's environment")
    add_results_option(parser)
    arguments = parser.parse_args(texts)
    if unknown := [name for name in arguments.systems.split(",") if name not in SYSTEMS]:
        parser.error(f"--systems: {', '.join(unknown)}: choose from {', '.join(SYSTEMS)}")
    return arguments


def main(texts: Sequence[str]) -> None:
    arguments = parse(texts)
    names, python = arguments.systems.split(","), arguments.litgpt_python
    if not python.exists():
        print(f"litgpt is not measured: {python} does not exist")
        names = [name for name in names if SYSTEMS[name][0] == "ours"]
    model = LLAMAS[arguments.model]
    num_batches = arguments.warmup + arguments.steps + arguments.memory_steps
    windows = make_windows(model["vocab_size"], arguments.length, arguments.batch_size * num_batches)
    batches = [windows[start : start + arguments.batch_size] for start in range(0, len(windows), arguments.batch_size)]
    steps, peaks = run_systems(names, batches, arguments)
    as_pairs = [{"prompt": window["tokens"][:1], "response": window["tokens"][1:]} for window in batches[0]]
    flops, num_tokens = step_flops(model, [as_pairs]), arguments.batch_size * arguments.length
    table = {}
    print(f"\n{'system':22}{'s/step':>8}{'processor':>11}{'tokens/s':>10}{'MFU':>7}{'MB':>7}  first losses")
    for name in names:
        timed_steps = steps[name][arguments.warmup : arguments.warmup + arguments.steps]
        row = row_of(timed_steps, num_tokens, flops, peaks["bfloat16" if "bf16" in name else "float32"])
        row["memory_mb"] = round(max((step.get("memory", 0) for step in steps[name]), default=0) / 1e6)
        row["first_losses"] = [step["loss"] for step in steps[name][:4]]
        table[name] = row
        losses = " ".join(f"{loss:.5f}" for loss in row["first_losses"])
        print(
            f"{name:22}{row['median']:8.3f}{row['processor_median']:11.3f}{row['tokens_per_second']:10,}"
            f"{row['mfu']:7.0%}{row['memory_mb']:7}  {losses}"
        )
    litgpt = output_of([str(python), "-c", "from importlib.metadata import *; print(version('litgpt'))"])
    record = {"command": shown_command("pretrain", texts, python), **machine(arguments.threads), "litgpt": litgpt}
    record |= {"flops_per_step": flops, "peak_gflops": {dtype: round(peak / 1e9, 1) for dtype, peak in peaks.items()}}
    write_result(arguments.results, f"pretrain-{arguments.model}", record | {"systems": table})


if __name__ == "__main__":
    if sys.argv[1:2] and sys.argv[1].endswith("job.json"):
        serve(sys.argv[1], {"ours": work_ours, "litgpt": work_litgpt})
    else:
        main(sys.argv[1:])
