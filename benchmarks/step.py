"""How long does a preference step take, and how much memory, beside TRL's DPOTrainer?

Each system runs in a process of its own; the parent lets one at a time take a step, in turn, so that all see the same
machine. Same initial weights, pairs, truncation, batch, optimizer (AdamW) and learning rate; the losses of the first
steps are printed beside each other. The first steps are warm-up and left out; medians, ranges and ratios are printed
and written to benchmarks/results/.

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
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path
from typing import Any

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
}
# name -> (which worker, its settings)
SYSTEMS: dict[str, tuple[str, dict[str, Any]]] = {
    "ours": ("ours", {"batching": "packed", "mixed_precision": None}),
    "ours-bf16": ("ours", {"batching": "packed", "mixed_precision": "bfloat16"}),
    "ours-padded": ("ours", {"batching": "padded", "mixed_precision": None}),
    "trl-default": ("trl", {}),
    "trl-best": ("trl", {"gradient_checkpointing": False, "precompute_ref_log_probs": True, "bf16": True}),
    "trl-best-fp32": ("trl", {"gradient_checkpointing": False, "precompute_ref_log_probs": True, "bf16": False}),
}
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
def measured() -> Iterator[Callable[[float], None]]:
    """Wait for the word to start; time what is done, and the memory it takes above what is held before."""
    sys.stdin.readline()
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    idle = resident("VmRSS")
    start = time.perf_counter()
    loss = float("nan")

    def report(value: float) -> None:
        nonlocal loss
        loss = value

    yield report
    seconds = time.perf_counter() - start
    answer = {"seconds": seconds, "loss": loss, "memory": resident("VmHWM") - idle}
    print(json.dumps(answer), file=sys.__stderr__, flush=True)


def work_ours(job: dict[str, Any]) -> None:
    from hydra import compose, initialize_config_dir

    from engine.batching import cut
    from engine.films import film_tokenizer
    from engine.tokenization import Example, Split
    from trainers import BasicTrainer

    settings = job["settings"]
    overrides = [
        *("model=blank_model", f"model.name_or_path={job['model']}", "model.tokenizer_name_or_path=films"),
        *("loss=dpo", f"loss.beta={BETA}", f"batch_size={job['batch_size']}", "sample_during_eval=false"),
        *("optimizer=AdamW", f"lr={LEARNING_RATE}", "warmup_steps=0", "reference=auto", f"cache_dir={job['cache']}"),
        *(f"batching={settings['batching']}", f"mixed_precision={settings['mixed_precision'] or 'null'}"),
    ]
    with initialize_config_dir(str(ROOT / "config"), version_base=None):
        config = compose("config", overrides)
    tokenizer = film_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    import numpy as np

    array = lambda ids: np.array(ids, dtype=np.int32)  # noqa: E731
    batches = [
        [Example(array(p["prompt"]), (array(p["chosen"]), array(p["rejected"])), i) for i, p in enumerate(batch)]
        for batch in job["batches"]
    ]
    train_split = Split([example for batch in batches for example in batch])
    trainer = BasicTrainer(config, Path(job["cache"]), tokenizer, train_split, Split([]))
    print("ready", file=sys.__stderr__, flush=True)
    for batch in batches:
        with measured() as report:
            report(trainer.step(cut(batch, 1, trainer.token_budget))["loss/train"])


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
        **job["settings"],
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
            self.report: Callable[[float], None] | None = None

        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            self.report = self.stack.enter_context(measured())

        def on_log(self, *args: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
            if self.report is not None and logs and "loss" in logs:
                self.report(float(logs["loss"]))
                self.report = None
                self.stack.close()

    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32)
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
    names: list[str], model: dict[str, Any], batches: list[list[Pair]], batch_size: int, threads: int
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
                    "OMP_WAIT_POLICY": "PASSIVE",
                    "HF_HUB_OFFLINE": "1",
                },
            )
            stack.callback(workers[name].kill)
            start = time.perf_counter()
            until(workers[name], "ready")
            print(f"{name}: ready after {time.perf_counter() - start:.0f} s", flush=True)
        for _ in batches:
            for name, process in workers.items():
                assert process.stdin is not None
                process.stdin.write("step\n")
                process.stdin.flush()
                results[name].append(json.loads(until(process, "{")))
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
    a, b = (torch.randn(2048, 2048).to(getattr(torch, dtype)) for _ in range(2))
    times = []
    for _ in range(8):
        start = time.perf_counter()
        a @ b
        times.append(time.perf_counter() - start)
    return 2 * 2048**3 / min(times)


def step_flops(model: dict[str, Any], batches: list[list[Pair]]) -> float:
    """Mean FLOP of a step on the packed row: 6 per block parameter and fed token, the head on response positions, and
    attention (4 x hidden per query-key pair forward, 12 with backward)."""
    hidden, layers, inner = model["hidden_size"], model["num_hidden_layers"], model["intermediate_size"]
    block = (4 * hidden**2 + (3 if model["model_type"] == "llama" else 2) * hidden * inner) * layers
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
    parser.add_argument("--systems", default=",".join(SYSTEMS), help="comma-separated, of " + ", ".join(SYSTEMS))
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--steps", type=int, default=8, help="measured steps, after --warmup")
    parser.add_argument("--warmup", type=int, default=2)
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
    count = arguments.batch_size * (arguments.steps + arguments.warmup)
    vocabulary = model["vocab_size"]
    pairs = hh_pairs(arguments.data, vocabulary, count) if arguments.data else synthetic_pairs(vocabulary, count)
    batches = batches_of(pairs, arguments.batch_size, arguments.grouped)
    results = run_systems(names, model, batches, arguments.batch_size, arguments.threads)

    kept = {name: rows[arguments.warmup :] for name, rows in results.items()}
    timed = batches[arguments.warmup :]
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
        f"\n{'system':14}{'s/step':>9}{'min':>8}{'max':>8}{'pairs/s':>9}{'tokens/s':>10}{'MB':>7}{'/ ours':>8}"
        f"{'of peak':>9}"
    )
    table = {}
    for name, rows in kept.items():
        seconds = [row["seconds"] for row in rows]
        median = statistics.median(seconds)
        ratio = statistics.median(
            row["seconds"] / own["seconds"] for row, own in zip(rows, kept[names[0]], strict=True)
        )
        memory = max(row["memory"] for row in rows) / 1e6
        useful = fed / len(timed) / median
        peak = peaks["bfloat16" if "bf16" in name else "float32"]
        share = f"{flops / median / peak:9.0%}" if name.startswith("ours") and "padded" not in name else f"{'':9}"
        print(
            f"{name:14}{median:9.3f}{min(seconds):8.3f}{max(seconds):8.3f}{arguments.batch_size / median:9.1f}"
            f"{useful:10.0f}{memory:7.0f}{ratio:8.2f}{share}"
        )
        table[name] = {"seconds": seconds, "median": median, "memory_mb": memory, "ratio_to_first": ratio}
    record = {
        "command": " ".join(["benchmarks/step.py", *("DATA" if a == str(arguments.data) else a for a in sys.argv[1:])]),
        "commit": subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip(),
        "machine": f"{platform.processor() or platform.machine()}, {arguments.threads} threads",
        "versions": versions(),
        "gemm_peak_gflops": {dtype: round(peak / 1e9) for dtype, peak in peaks.items()},
        "tokens_per_step": {"packed": fed / len(timed), "padded": padded / len(timed)},
        "first_losses": {name: [row["loss"] for row in rows[:4]] for name, rows in results.items()},
        "systems": table,
    }
    label = f"{arguments.model}{'-grouped' if arguments.grouped else ''}-b{arguments.batch_size}"
    path = ROOT / "benchmarks" / "results" / f"step-{label}-{date.today()}.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(f"\nwritten to {path.relative_to(ROOT)}")


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
