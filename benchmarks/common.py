"""What the benchmarks share: models, settings, measuring, and the record of a result.

Heavy imports stand inside functions. TRL's environment imports this file too, and lacks hydra.
"""

import argparse
import contextlib
import ctypes
import gc
import json
import multiprocessing
import platform
import subprocess
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from engine.settings.schema import Settings
    from trainers import BasicTrainer

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
TRL_PYTHON = ROOT / ".venv-bench" / "bin" / "python"
UNKNOWN = "unknown"

LLAMA = {"model_type": "llama", "max_position_embeddings": 4096, "tie_word_embeddings": False}
PYTHIA = {"model_type": "gpt_neox", "vocab_size": 50304, "max_position_embeddings": 2048}
MODELS: dict[str, dict[str, Any]] = {
    # For the tests.
    "tiny": {
        **LLAMA,
        "vocab_size": 1024,  # the embedded tokenizer has 832 tokens
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    },
    "llama-8k": {
        **LLAMA,
        "vocab_size": 8192,
        "hidden_size": 256,
        "intermediate_size": 688,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
    },
    "pythia-70m": {
        **PYTHIA,
        "hidden_size": 512,
        "intermediate_size": 2048,
        "num_hidden_layers": 6,
        "num_attention_heads": 8,
    },
    "smollm2-135m": {
        **LLAMA,
        "tie_word_embeddings": True,
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
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
    "pythia-410m": {
        **PYTHIA,
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
    },
    # GPT-2's vocabulary is odd, and matrix products of odd sizes are slow on GPUs.
    "gpt2-124m": {
        "model_type": "gpt2",
        "vocab_size": 50257,
        "n_positions": 1024,
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
    },
    "pythia-2.8b": {
        **PYTHIA,
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
    },
    "llama-7b": {
        **LLAMA,
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
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


# ---- Models and settings ----


def write_model(architecture: dict[str, Any], folder: Path, dtype: str = "float32", gives_scores: bool = False) -> None:
    """Write a model with random weights, of text or of scores.

    On a GPU another process makes them, so its GPU memory is free afterwards.
    """
    import torch

    if not torch.cuda.is_available():
        make_and_save(architecture, folder, dtype, "cpu", gives_scores)
        return
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        pool.submit(make_and_save, architecture, folder, dtype, "cuda", gives_scores).result()


def make_and_save(
    architecture: dict[str, Any], folder: Path, dtype: str, device: str, gives_scores: bool = False
) -> None:
    """Make a model with random weights on the device, and save it. A GPU is much faster at this."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification
    from transformers.utils import logging

    logging.disable_progress_bar()
    values = dict(architecture)
    torch.manual_seed(0)
    config = AutoConfig.for_model(values.pop("model_type"), **values)
    auto_class = AutoModelForSequenceClassification if gives_scores else AutoModelForCausalLM
    if gives_scores:
        config.num_labels, config.pad_token_id = 1, 0
    with torch.device(device):
        model = auto_class.from_config(config, dtype=getattr(torch, dtype))
    model.save_pretrained(folder)


def compose_settings(*overrides: str) -> "Settings":
    """The settings of `python train.py *overrides`."""
    from hydra import compose, initialize_config_dir

    from engine.settings.reading import read_settings
    from preference_datasets import DATASETS

    with initialize_config_dir(str(ROOT / "config"), version_base=None):
        return read_settings(compose("config", list(overrides)), DATASETS)


def model_overrides(folder: Path) -> list[str]:
    """Overrides for the model in a folder, with the embedded tokenizer."""
    return ["model=blank_model", f"model.name_or_path={folder}", "model.tokenizer_name_or_path=films"]


def make_trainer(settings: "Settings", run_dir: Path, examples: Sequence[Any]) -> "BasicTrainer":
    """The trainer of the settings on tokenised examples, without evaluation."""
    from transformers.utils import logging

    from engine.data.examples import Split
    from engine.models.tokenizers import load_tokenizer
    from process_start import forget_old_shapes
    from trainers import TRAINERS

    forget_old_shapes()  # as train.py does
    logging.disable_progress_bar()
    tokenizer = load_tokenizer(settings.model)
    return TRAINERS[settings.trainer](settings, run_dir, tokenizer, Split(list(examples)), Split([]))


# ---- Measuring ----


def resident(field: str) -> int:
    """VmRSS or VmHWM of this process, in bytes."""
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{field}:")[1].split()[0]) * 1024


def reset_resident_peak() -> None:
    """Give freed memory back, and count VmHWM from here."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


@contextlib.contextmanager
def measured(of_memory: bool) -> Iterator[dict[str, float]]:
    """Measure seconds of the body; with of_memory also the bytes it takes above those held before.

    Freed memory is given back before memory is measured. The step is then slower, so its time does not count.
    """
    import torch

    on_gpu = torch.cuda.is_available()
    idle = 0
    if of_memory and on_gpu:
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        idle = torch.cuda.memory_allocated()
    elif of_memory:
        reset_resident_peak()
        idle = resident("VmRSS")
    found: dict[str, float] = {}
    start = time.perf_counter()
    yield found
    if on_gpu:
        torch.cuda.synchronize()
    found["seconds"] = time.perf_counter() - start
    if of_memory:
        found["memory"] = (torch.cuda.max_memory_allocated() if on_gpu else resident("VmHWM")) - idle


def take_step(trainer: "BasicTrainer", batch: Any, of_memory: bool) -> dict[str, float]:
    """Take a measured step; returns loss, seconds and, if asked, memory."""
    with measured(of_memory) as found:
        found["loss"] = trainer.step(batch).values.read()["loss/train"]
    return found


# ---- Results ----


def machine(threads: int, trl_python: Path = TRL_PYTHON) -> dict[str, Any]:
    """Commit, changed files, hardware and versions of a result."""
    return {
        "commit": _git("rev-parse", "HEAD"),
        "changed_since": _git("status", "--porcelain", "--untracked-files=no").splitlines(),
        "machine": f"{_cpu_name()}, {threads} threads",
        "gpus": gpus(),
        "versions": versions(trl_python),
    }


def gpus() -> list[dict[str, Any]]:
    """Name, memory in bytes and compute capability of each GPU, with CUDA and driver."""
    import torch

    if not torch.cuda.is_available():
        return []
    driver = _first_line(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"])
    cards = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return [
        {
            "name": card.name,
            "memory": card.total_memory,
            "capability": f"{card.major}.{card.minor}",
            "cuda": torch.version.cuda,
            "driver": driver,
        }
        for card in cards
    ]


def versions(trl_python: Path = TRL_PYTHON) -> dict[str, str]:
    """Versions of Python, torch, transformers and, if it is installed, TRL."""
    from importlib.metadata import version

    found = {name: version(name) for name in ("torch", "transformers")}
    if trl_python.exists():
        found["trl"] = _first_line([str(trl_python), "-c", "from importlib.metadata import *; print(version('trl'))"])
    return found | {"python": platform.python_version()}


def add_results_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for the result (default: %(default)s)")


def shown_command(script: str, arguments: Sequence[str], data: Path | None = None) -> str:
    """The command of a result; the data's own path reads DATA."""
    return " ".join([f"benchmarks/{script}.py", *("DATA" if text == str(data) else text for text in arguments)])


def write_result(folder: Path, name: str, record: dict[str, Any], silently: bool = False) -> Path:
    """Write a result as <name>-<date>.json, and print where it is unless silently."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}-{date.today()}.json"
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    if not silently:
        print(f"\nwritten to {path.relative_to(ROOT) if path.is_relative_to(ROOT) else path}")
    return path


def _git(*arguments: str) -> str:
    return output_of(["git", *arguments], cwd=ROOT)


def _first_line(command: Sequence[str]) -> str:
    return output_of(command).partition("\n")[0]


def output_of(command: Sequence[str], cwd: Path | None = None) -> str:
    """What a command prints; "unknown" if it is not installed or fails. Results are worth more than their origin."""
    try:
        result = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    except OSError:
        return UNKNOWN
    return result.stdout.rstrip() if result.returncode == 0 else UNKNOWN


def _cpu_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(": ")[2]
    return platform.machine()
