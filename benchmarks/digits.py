"""Print the digits of small runs. Equal lists of two commits show an unchanged training.

Each run uses the command line of a checkout. Its list holds losses, rewards and norms of all steps with 17 digits, a
hash of the sampled texts, and a hash of the final weights:

    python benchmarks/digits.py --output before.txt --repo ../old --keep runs
    python benchmarks/digits.py --output after.txt
    python benchmarks/digits.py --output resumed.txt --resume runs  (by the new commit)
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors import safe_open

ROOT = Path(__file__).resolve().parent.parent
SMALL = (
    "wandb.enabled=false", "n_examples=16", "n_eval_examples=8", "eval_batch_size=4", "eval_every=8",
    "save_every=8", "keep_checkpoints=null", "n_eval_model_samples=2", "max_length=128", "max_prompt_length=64",
    "warmup_steps=2", "lr=1e-3",
)  # fmt: skip
DPO, CDPO, IPO = (f"loss={name} loss.beta=0.1" for name in ("dpo", "cdpo", "ipo"))
FSDP, TENSOR = "trainer=FSDPTrainer num_processes=2", "trainer=TensorParallelTrainer num_processes=2"
LORA, QLORA = "peft=lora peft.rank=4", "peft=qlora peft.rank=4"
CONFIGURATIONS = {
    "sft": "loss=sft",
    "sft-dialogues": "loss=sft datasets=[{messages}] chat_template=hh gradient_accumulation_steps=2",
    "sft-averaged-padded": "loss=sft loss.average_log_prob=true batching=padded length_grouping=true",
    "dpo": DPO,
    "dpo-padded": f"{DPO} batching=padded",
    "dpo-live": f"{DPO} reference=live gradient_accumulation_steps=2 lr_schedule=cosine",
    "dpo-bfloat16": f"{DPO} mixed_precision=bfloat16 optimizer=AdamW",
    "dpo-float64": f"{DPO} model.policy_dtype=float64 activation_checkpointing=1 token_budget=200",
    "dpo-reference-free": f"{DPO} loss.reference_free=true loss.label_smoothing=0.1 loss.sft_weight=0.5",
    "dpo-ranked": f"{DPO} datasets=[{{ranked}}] max_grad_norm=0.5",
    "dpo-gpt2": f"{DPO} model.architecture.model_type=gpt2 freeze.first_n_layers=1",
    "dpo-neox": f"{DPO} model.architecture.model_type=gpt_neox",
    "cdpo": CDPO,
    "ipo-averaged": f"{IPO} loss.average_log_prob=true",
    "dpo-lora": f"{DPO} {LORA}",
    "dpo-lora-live": f"{DPO} {LORA} reference=live peft.dropout=0.1",
    "dpo-qlora": f"{DPO} {QLORA} mixed_precision=bfloat16",
    "sft-fsdp": f"loss=sft {FSDP}",
    "dpo-fsdp": f"{DPO} {FSDP} reference=live",
    "dpo-fsdp-deterministic": f"{DPO} {FSDP} deterministic=true",
    "dpo-fsdp-lora": f"{DPO} {FSDP} {LORA}",
    "dpo-tensor": f"{DPO} {TENSOR}",
    "dpo-package": f"{DPO} trainer=TensorParallelTrainer tensor_parallel.backend=package tensor_parallel_size=2",
}
RESUMED = ("sft", "dpo", "dpo-lora", "dpo-fsdp", "dpo-tensor", "dpo-package")
# Measured, not computed: they differ from run to run.
MEASURED = ("_per_second", "peak_memory_gb", "mfu")


def write_data(directory: Path) -> dict[str, Path]:
    """Files of two forms of row. The embedded data set does not cover them."""
    ranked = [
        {"prompt": f"\n\nHuman: Film {n}?\n\nAssistant:", "responses": [f" Good, {n}.", " Bad.", f" So so {n % 3}."],
         "scores": [2, 0, n % 3]}
        for n in range(40)
    ]  # fmt: skip
    turns = [("user", "Which film?"), ("assistant", "The best one."), ("user", "Why?"), ("assistant", "It is funny.")]
    messages = [
        {"messages": [{"role": role, "content": f"{text} {n}"} for role, text in turns[: 2 + 2 * (n % 2)]]}
        for n in range(40)
    ]
    paths = {}
    for name, rows in (("ranked", ranked), ("messages", messages)):
        paths[name] = directory / f"{name}.jsonl"
        paths[name].write_text("".join(json.dumps(row) + "\n" for row in rows))
    return paths


def run(repo: Path, overrides: list[str], run_dir: Path, cache: Path) -> None:
    """Run train.py of a checkout in a process with one thread."""
    command = [sys.executable, "train.py", *SMALL, *overrides, f"local_run_dir={run_dir}", f"cache_dir={cache}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled"}
    result = subprocess.run(command, cwd=repo, env=environment, capture_output=True, text=True)
    if result.returncode:
        raise SystemExit(f"{' '.join(command)} failed in {repo}:\n{result.stdout}{result.stderr}")


def digits_of(run_dir: Path) -> list[str]:
    """All computed numbers of a run, one line a log row, and hashes of its samples and final weights."""
    lines = []
    for text in (run_dir / "metrics.jsonl").read_text().splitlines():
        row = {name: value for name, value in json.loads(text).items() if not name.endswith(MEASURED)}
        lines.append(" ".join(f"{name}={value:.17g}" for name, value in sorted(row.items())))
    if (samples := run_dir / "samples.jsonl").exists():
        lines.append(f"samples {hashlib.sha256(samples.read_bytes()).hexdigest()}")
    digest = hashlib.sha256()
    checkpoint = (run_dir / "LATEST").resolve()
    for kind in ("adapter_model", "model", "optimizer"):
        tensors: dict[str, torch.Tensor] = {}
        for path in sorted(checkpoint.glob(f"{kind}*.safetensors")):
            with safe_open(path, framework="pt") as file:
                tensors |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        for name, tensor in sorted(tensors.items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return [*lines, f"weights and optimizer {digest.hexdigest()}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--repo", type=Path, default=ROOT, help="the checkout to run")
    parser.add_argument("--output", type=Path, help="a file for the list; else it is printed")
    parser.add_argument("--keep", type=Path, help="keep data and run directories there")
    parser.add_argument("--resume", type=Path, help="resume the first checkpoint of each run kept there")
    parser.add_argument("--only", help="names of configurations, with commas")
    parser.add_argument("--parallel", type=int, default=2, help="runs at a time")
    arguments = parser.parse_args()
    names = arguments.only.split(",") if arguments.only else [*CONFIGURATIONS]
    with tempfile.TemporaryDirectory() as temporary:
        directory = (arguments.resume or arguments.keep or Path(temporary)).resolve()
        directory.mkdir(parents=True, exist_ok=True)
        data = write_data(directory)

        def digits(name: str) -> list[str]:
            overrides = CONFIGURATIONS[name].format(**data).split()
            run_dir, cache = directory / name, Path(temporary) / f"cache-{name}"
            result = []
            if arguments.resume is None:
                run(arguments.repo, overrides, run_dir, cache)
                result += [f"== {name}: {' '.join(overrides)}".replace(f"{directory}/", ""), *digits_of(run_dir)]
            if name in RESUMED:
                again = Path(temporary) / f"{name}-resumed"
                run(arguments.repo, [*overrides, f"resume={run_dir / 'step-8'}"], again, cache)
                result += [f"== {name}, resumed", *digits_of(again)]
            return result

        with ThreadPoolExecutor(arguments.parallel) as pool:
            lists = list(pool.map(digits, [name for name in names if arguments.resume is None or name in RESUMED]))
    text = "".join(f"{line}\n" for lines in lists for line in lines)
    if arguments.output:
        arguments.output.write_text(text)
    else:
        print(text, end="")


if __name__ == "__main__":
    main()
