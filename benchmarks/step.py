"""How long does a preference step take, and how much memory, beside TRL's DPOTrainer?

Each system runs in a process of its own; the parent lets one at a time take a step, in turn, so that all see the same
machine. Same initial weights, pairs, truncation, batch, optimizer (AdamW) and learning rate; the losses of the first
steps are printed beside each other. The first steps are warm-up and left out; medians, ranges and ratios are printed
and written to benchmarks/results/. Each system keeps its own best number of tokens at a time; memory is what the last
steps take above what the process holds between steps. tokens/s counts each prompt once for every system. Of the ratios
to the first system, `times` is that of all steps together, `median` that of the steps one by one.

    .venv/bin/python benchmarks/step.py --data DATA_DIR --model llama-8k

TRL needs an environment of its own, .venv-bench (`make bench` builds it); without it, ours alone are measured.
"""

import argparse
import contextlib
import ctypes
import gc
import gzip
import json
import os
import platform
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trainers import BasicTrainer, Batch

ROOT = Path(__file__).resolve().parent.parent
LLAMA = {"model_type": "llama", "max_position_embeddings": 4096, "tie_word_embeddings": False}
MODELS: dict[str, dict[str, Any]] = {
    "llama-8k": {
        **LLAMA,
        "vocab_size": 8192,
        "hidden_size": 256,
        "intermediate_size": 688,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
    },
    "pythia-70m": {
        "model_type": "gpt_neox",
        "vocab_size": 50304,
        "hidden_size": 512,
        "intermediate_size": 2048,
        "num_hidden_layers": 6,
        "num_attention_heads": 8,
        "max_position_embeddings": 2048,
    },
    "llama-110m": {
        **LLAMA,
        "vocab_size": 32000,
        "hidden_size": 768,
        "intermediate_size": 2048,
        "num_hidden_layers": 9,
        "num_attention_heads": 12,
    },
    # For a GPU, with the systems *-weights-bf16.
    "pythia-2.8b": {
        "model_type": "gpt_neox",
        "vocab_size": 50304,
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "max_position_embeddings": 2048,
    },
    "llama-8b": {
        **LLAMA,
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
}
# name -> (which worker, its settings)
TRL_BEST = {"gradient_checkpointing": False, "precompute_ref_log_probs": True}
SYSTEMS: dict[str, tuple[str, Any]] = {
    "ours-bf16": ("ours", ["mixed_precision=bfloat16"]),
    "ours": ("ours", []),
    "ours-padded": ("ours", ["batching=padded"]),
    "trl-default": ("trl", {}),
    # TRL 1.16 has switched padding_free off, and its fused head (Liger) needs a GPU.
    "trl-best": ("trl", {**TRL_BEST, "bf16": True}),
    "trl-best-fp32": ("trl", {**TRL_BEST, "bf16": False}),
    "ours-weights-bf16": ("ours", ["model.policy_dtype=bfloat16", "mixed_precision=null"]),
    "trl-weights-bf16": ("trl", {**TRL_BEST, "bf16": True, "dtype": "bfloat16"}),
}
CPU_SYSTEMS = "ours-bf16,ours,ours-padded,trl-default,trl-best,trl-best-fp32"
BETA, LEARNING_RATE = 0.1, 1e-5
Pair = dict[str, list[int]]  # prompt, chosen, rejected: token ids


# ---- Data ----


def hh_pairs(data_dir: Path, vocabulary: int, count: int) -> list[Pair]:
    """Real HH rows, tokenised by a BPE of the vocabulary's size trained on them, truncated to 512/256."""
    from omegaconf import OmegaConf
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    from preference_datasets import load_split

    with gzip.open(data_dir / "hh" / "train.jsonl.gz", "rt", encoding="utf-8") as file:
        texts = [json.loads(line)["chosen"] for line in file]
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(vocab_size=vocabulary, special_tokens=["<|endoftext|>"], show_progress=False)
    backend.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>")
    with tempfile.TemporaryDirectory() as cache:
        config = OmegaConf.create(
            {"datasets": ["hh"], "data_dir": str(data_dir), "format": None, "chat_template": None, "test_fraction": 0}
            | {"max_length": 512, "max_prompt_length": 256, "cache_dir": cache}
        )
        examples = load_split(config, tokenizer, "train", "pairs").examples
    names = ("prompt", "chosen", "rejected")
    pairs = [dict(zip(names, (e.prompt.tolist(), *(r.tolist() for r in e.responses)), strict=True)) for e in examples]
    random.Random(0).shuffle(pairs)
    return [pairs[i % len(pairs)] for i in range(count)]


def synthetic_pairs(vocabulary: int, count: int) -> list[Pair]:
    """Random tokens with the lengths of HH: means of about 117 (prompt), 42 (chosen) and 52 (rejected)."""
    rng = random.Random(0)

    def tokens(mean: float, longest: int) -> list[int]:
        length = min(longest, max(2, round(rng.lognormvariate(0, 0.8) * mean / 1.377)))
        return [rng.randrange(2, vocabulary) for _ in range(length)]

    return [{"prompt": tokens(120, 256), "chosen": tokens(43, 256), "rejected": tokens(53, 256)} for _ in range(count)]


def batches_of(pairs: list[Pair], batch_size: int, grouped: bool) -> list[list[Pair]]:
    """Batches in the order of pairs, or of similar lengths (as peers group them), in random order."""
    if grouped:
        pairs = sorted(pairs, key=lambda pair: len(pair["prompt"]) + max(len(pair["chosen"]), len(pair["rejected"])))
    batches = [pairs[i : i + batch_size] for i in range(0, len(pairs), batch_size)]
    if grouped:
        random.Random(0).shuffle(batches)
    return batches


# ---- Workers: one step whenever a line comes on stdin ----


def resident(field: str) -> int:
    """VmRSS or VmHWM of this process, in bytes."""
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{field}:")[1].split()[0]) * 1024


@contextlib.contextmanager
def measured(of_memory: bool) -> Iterator[dict[str, float]]:
    """Measure the time of what is done, or the memory it takes above what is held before.

    Not both at once: to give freed memory back first, so that the peak is that of the step, makes the step slower.
    """
    import torch

    on_gpu = torch.cuda.is_available()
    idle = 0
    if of_memory:
        gc.collect()
        if on_gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            idle = torch.cuda.memory_allocated()
        else:
            ctypes.CDLL("libc.so.6").malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
            idle = resident("VmRSS")
    answer: dict[str, float] = {}
    start = time.perf_counter()
    yield answer
    if on_gpu:
        torch.cuda.synchronize()
    answer["seconds"] = time.perf_counter() - start
    if of_memory:
        answer["memory"] = (torch.cuda.max_memory_allocated() if on_gpu else resident("VmHWM")) - idle


def told_of_memory() -> bool:
    """Waits for the word to take a step."""
    return sys.stdin.readline().strip() == "memory"


def tell(answer: dict[str, float]) -> None:
    print(json.dumps(answer), file=sys.__stderr__, flush=True)


def our_batches(
    folder: str, cache: str, batches: list[list[Pair]], *settings: str
) -> tuple["BasicTrainer", Iterator["Batch"]]:
    """Our trainer on the model in a folder, and the batches as it lays them out."""
    import numpy as np
    from hydra import compose, initialize_config_dir

    from engine.films import film_tokenizer
    from engine.tokenization import Example, Split
    from trainers import BasicTrainer

    overrides = [
        *("model=blank_model", f"model.name_or_path={folder}", "model.tokenizer_name_or_path=films"),
        *("loss=dpo", f"loss.beta={BETA}", f"batch_size={len(batches[0])}", "sample_during_eval=false"),
        *("optimizer=AdamW", f"lr={LEARNING_RATE}", "warmup_steps=0", "reference=auto", f"cache_dir={cache}"),
    ]
    with initialize_config_dir(str(ROOT / "config"), version_base=None):
        config = compose("config", [*overrides, *settings])
    tokenizer = film_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token

    def example(pair: Pair) -> Example:
        prompt, chosen, rejected = (np.array(pair[name], np.int32) for name in ("prompt", "chosen", "rejected"))
        return Example(prompt, (chosen, rejected), prompt_index=0)

    examples = [[example(pair) for pair in batch] for batch in batches]
    train_split = Split([example for batch in examples for example in batch])
    trainer = BasicTrainer(config, Path(cache), tokenizer, train_split, Split([]))
    return trainer, trainer.prepared(trainer.cut(batch, 1) for batch in examples)


def take_step(trainer: "BasicTrainer", batch: "Batch", of_memory: bool) -> dict[str, float]:
    with measured(of_memory) as answer:
        answer["loss"] = trainer.step(batch).values["loss/train"].item()
    return answer


def work_ours(job: dict[str, Any]) -> None:
    trainer, batches = our_batches(job["model"], job["cache"], job["batches"], *job["settings"])
    print("ready", file=sys.__stderr__, flush=True)
    for batch in batches:
        tell(take_step(trainer, batch, told_of_memory()))


def work_trl(job: dict[str, Any]) -> None:
    import torch
    from datasets import Dataset
    from torch.utils.data import SequentialSampler
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    rows = [
        {"prompt_ids": p["prompt"], "chosen_ids": p["chosen"], "rejected_ids": p["rejected"]}
        for batch in job["batches"]
        for p in batch
    ]
    settings = dict(job["settings"])
    dtype = getattr(torch, settings.pop("dtype", "float32"))
    arguments = DPOConfig(
        output_dir=job["cache"],
        per_device_train_batch_size=job["batch_size"],
        num_train_epochs=1,
        beta=BETA,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        weight_decay=0.01,  # AdamW's own default, as ours
        max_grad_norm=10.0,
        max_length=1024,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
        **settings,
    )

    class Ordered(DPOTrainer):
        """Trains on the given tokens in the given order."""

        def _prepare_dataset(self, dataset: Dataset, *args: Any, **kwargs: Any) -> Dataset:
            return dataset

        def _get_train_sampler(self, *args: Any, **kwargs: Any) -> SequentialSampler:
            return SequentialSampler(self.train_dataset)

    class Steps(TrainerCallback):
        """Starts and ends a measurement around each step; the loss is known once the trainer has logged it."""

        def __init__(self) -> None:
            self.stack = contextlib.ExitStack()
            self.answer: dict[str, float] | None = None

        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            self.answer = self.stack.enter_context(measured(told_of_memory()))

        def on_log(self, *args: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
            if self.answer is not None and logs and "loss" in logs:
                self.answer["loss"] = float(logs["loss"])
                self.stack.close()
                tell(self.answer)
                self.answer = None

    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=dtype)
    from tokenizers import Tokenizer, models

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"<eos>": 0})), eos_token="<eos>", pad_token="<eos>"
    )
    trainer = Ordered(model=model, args=arguments, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
    trainer.add_callback(Steps())
    print("ready", file=sys.__stderr__, flush=True)
    trainer.train()


def work(job_file: str) -> None:
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115  answers go to the real stderr
    sys.path.insert(0, str(ROOT))
    job = json.loads(Path(job_file).read_text())
    try:
        {"ours": work_ours, "trl": work_trl}[job["worker"]](job)
    except Exception:
        traceback.print_exc(file=sys.__stderr__)


# ---- The comparison ----


def run_systems(
    names: list[str], model: dict[str, Any], batches: list[list[Pair]], batch_size: int, threads: int, memory_steps: int
) -> dict[str, list[dict[str, float]]]:
    """One step of each system in turn, for every batch."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    results: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        torch.manual_seed(0)
        values = dict(model)
        config = AutoConfig.for_model(values.pop("model_type"), **values)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        workers = {}
        for name in names:
            worker, settings = SYSTEMS[name]
            cache = Path(folder, name)
            cache.mkdir()
            job = {"worker": worker, "settings": settings, "model": folder, "batches": batches}
            (cache / "job.json").write_text(json.dumps(job | {"batch_size": batch_size, "cache": str(cache)}))
            python = sys.executable if worker == "ours" else str(ROOT / ".venv-bench/bin/python")
            workers[name] = subprocess.Popen(
                [python, __file__, "--worker", str(cache / "job.json")],
                stdin=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env={
                    **os.environ,
                    "OMP_NUM_THREADS": str(threads),
                    "HF_HUB_OFFLINE": "1",
                },
            )
            stack.callback(workers[name].kill)
            start = time.perf_counter()
            until(workers[name], "ready")
            print(f"{name}: ready after {time.perf_counter() - start:.0f} s", flush=True)
            workers[name].send_signal(signal.SIGSTOP)  # its idle threads would spin, and take the cores from the others
        for index in range(len(batches)):
            for name, process in workers.items():
                process.send_signal(signal.SIGCONT)
                assert process.stdin is not None
                process.stdin.write("memory\n" if index >= len(batches) - memory_steps else "time\n")
                process.stdin.flush()
                results[name].append(json.loads(until(process, "{")))
                process.send_signal(signal.SIGSTOP)
    return results


def until(process: subprocess.Popen, prefix: str) -> str:
    """The next line of a worker that begins with prefix; its other lines are warnings of libraries."""
    assert process.stderr is not None
    seen = []
    for line in process.stderr:
        if line.startswith(prefix):
            return line
        seen.append(line)
    raise SystemExit("a worker died:\n" + "".join(seen[-30:]))


def gemm_peak(dtype: str, threads: int) -> float:
    """The machine's own best FLOP/s of a matrix product in dtype."""
    import torch

    torch.set_num_threads(threads)
    device, size = ("cuda", 8192) if torch.cuda.is_available() else ("cpu", 2048)
    a, b = (torch.randn(size, size, device=device, dtype=getattr(torch, dtype)) for _ in range(2))
    times = []
    for _ in range(8):
        start = time.perf_counter()
        a @ b
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return 2 * size**3 / min(times)


def step_flops(model: dict[str, Any], batches: list[list[Pair]]) -> float:
    """Mean FLOP of a step on the packed row: 6 per block parameter and fed token, the head on response positions, and
    attention (4 x hidden per query-key pair forward, 12 with backward)."""
    hidden, layers, inner = model["hidden_size"], model["num_hidden_layers"], model["intermediate_size"]
    shared = model.get("num_key_value_heads", model["num_attention_heads"]) / model["num_attention_heads"]
    block = ((2 + 2 * shared) * hidden**2 + (3 if model["model_type"] == "llama" else 2) * hidden * inner) * layers
    fed = sum(fed_tokens(pair) for batch in batches for pair in batch)
    targets = sum(len(pair["chosen"]) + len(pair["rejected"]) for batch in batches for pair in batch)
    scores = 0.0
    for pair in (pair for batch in batches for pair in batch):
        prompt, *responses = (len(pair[name]) for name in ("prompt", "chosen", "rejected"))
        scores += prompt**2 / 2 + sum(r * prompt + r**2 / 2 for r in responses)
    total = 6 * block * fed + 6 * hidden * model["vocab_size"] * targets + 12 * hidden * layers * scores
    return total / len(batches)


def fed_tokens(pair: Pair) -> int:
    return len(pair["prompt"]) + len(pair["chosen"]) + len(pair["rejected"]) - 2


def padded_tokens(batch: list[Pair]) -> int:
    longest = max(len(pair["prompt"]) + len(pair[name]) for pair in batch for name in ("chosen", "rejected"))
    return 2 * len(batch) * longest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--data", type=Path, help="folder with hh/train.jsonl.gz; synthetic lengths without it")
    parser.add_argument("--model", choices=MODELS, default="llama-8k")
    parser.add_argument("--systems", default=CPU_SYSTEMS, help="comma-separated, of " + ", ".join(SYSTEMS))
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--steps", type=int, default=8, help="measured steps, after --warmup")
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--memory-steps", type=int, default=2, help="steps whose memory is measured, after the others")
    parser.add_argument("--grouped", action="store_true", help="batches of similar lengths, for all systems")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    arguments = parser.parse_args()
    if arguments.worker:
        work(arguments.worker)
        return
    sys.path.insert(0, str(ROOT))
    names = arguments.systems.split(",")
    if not (ROOT / ".venv-bench/bin/python").exists():
        print("TRL is left out: there is no .venv-bench (make bench)")
        names = [name for name in names if not name.startswith("trl")]
    model = MODELS[arguments.model]
    count = arguments.batch_size * (arguments.warmup + arguments.steps + arguments.memory_steps)
    vocabulary = model["vocab_size"]
    pairs = hh_pairs(arguments.data, vocabulary, count) if arguments.data else synthetic_pairs(vocabulary, count)
    batches = batches_of(pairs, arguments.batch_size, arguments.grouped)
    results = run_systems(names, model, batches, arguments.batch_size, arguments.threads, arguments.memory_steps)

    last = arguments.warmup + arguments.steps
    kept = {name: rows[arguments.warmup : last] for name, rows in results.items()}
    timed = batches[arguments.warmup : last]
    fed, padded = (sum(map(count_of, timed)) for count_of in (lambda b: sum(map(fed_tokens, b)), padded_tokens))
    peaks = {dtype: gemm_peak(dtype, arguments.threads) for dtype in ("float32", "bfloat16")}
    flops = step_flops(model, timed)
    print("\nlosses of the first steps:")
    for name, rows in results.items():
        print(f"  {name:14}" + " ".join(f"{row['loss']:9.6f}" for row in rows[:4]))
    print(
        f"\nfed tokens a step: packed {fed / len(timed):.0f}, padded {padded / len(timed):.0f}"
        f" ({padded / fed:.1f} times)"
    )
    print(
        f"\n{'system':17}{'s/step':>8}{'min':>8}{'max':>8}{'pairs/s':>9}{'tokens/s':>10}{'MB':>7}{'times':>8}{'median':>8}"
        f"{'of peak':>9}"
    )
    table = {}
    first = [row["seconds"] for row in kept[names[0]]]
    for name, rows in kept.items():
        seconds = [row["seconds"] for row in rows]
        total = sum(seconds)
        ratios = [theirs / ours for theirs, ours in zip(seconds, first, strict=True)]
        memory = max(row["memory"] for row in results[name][last:]) / 1e6
        peak = peaks["bfloat16" if "bf16" in name else "float32"]
        is_packed = name.startswith("ours") and "padded" not in name
        table[name] = {
            "seconds": [round(value, 4) for value in seconds],
            "median": round(statistics.median(seconds), 4),
            "pairs_per_second": round(len(timed) * arguments.batch_size / total, 2),
            "tokens_per_second": round(fed / total),
            "memory_mb": round(memory),
            "ratio_of_totals": round(total / sum(first), 2),
            "median_ratio": round(statistics.median(ratios), 2),
            "share_of_gemm_peak": round(flops * len(timed) / total / peak, 3) if is_packed else None,
        }
        row = table[name]
        share = f"{row['share_of_gemm_peak']:9.0%}" if is_packed else ""
        print(
            f"{name:17}{row['median']:8.3f}{min(seconds):8.3f}{max(seconds):8.3f}{row['pairs_per_second']:9.1f}"
            f"{row['tokens_per_second']:10.0f}{memory:7.0f}{row['ratio_of_totals']:8.2f}{row['median_ratio']:8.2f}{share}"
        )
    record = {
        "command": " ".join(["benchmarks/step.py", *("DATA" if a == str(arguments.data) else a for a in sys.argv[1:])]),
        **machine(arguments.threads),
        "gemm_peak_gflops": {dtype: round(peak / 1e9) for dtype, peak in peaks.items()},
        "tokens_per_step": {"packed": fed / len(timed), "padded": padded / len(timed)},
        "first_losses": {name: [row["loss"] for row in rows[:4]] for name, rows in results.items()},
        "systems": table,
    }
    label = f"{arguments.model}{'-grouped' if arguments.grouped else ''}-b{arguments.batch_size}"
    path = ROOT / "benchmarks" / "results" / f"step-{label}-{date.today()}.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(f"\nwritten to {path.relative_to(ROOT)}")


def machine(threads: int) -> dict[str, Any]:
    """What a result was measured with."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    models = [
        line.partition(": ")[2] for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    name = models[0] if models else platform.machine()
    return {"commit": commit, "machine": f"{name}, {threads} threads", "versions": versions()}


def versions() -> dict[str, str]:
    from importlib.metadata import version

    found = {name: version(name) for name in ("torch", "transformers")}
    python = ROOT / ".venv-bench/bin/python"
    if python.exists():
        code = "from importlib.metadata import version; print(version('trl'))"
        found["trl"] = subprocess.run([python, "-c", code], capture_output=True, text=True).stdout.strip()
    return found | {"python": platform.python_version()}


if __name__ == "__main__":
    main()
