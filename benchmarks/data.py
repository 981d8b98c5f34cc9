"""How long do rows take from a file to examples, cold and cached, and how much memory stays?

Rows have the form and the sizes of Anthropic's HH (about 1,450 bytes each), of made-up words. Each phase runs in its
own process:

- encode_batch: the tokenizer's own rate on the distinct texts, in this process' threads.
- cold: load and tokenise, with an empty cache.
- cached: the same again.
- batches: the first batch of a run, and the first one after a resume in its tenth epoch.

cpu_s is the processor time of all cores: other work on the machine hardly changes it.
Memory is above that of the imports and the tokenizer: what stays, and the peak.

    .venv/bin/python benchmarks/data.py --rows 160000 --tokenizer gpt2/tokenizer.json

--short makes rows of a few words, to try millions of them.
"""

import argparse
import contextlib
import io
import itertools
import json
import multiprocessing
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import (
    add_results_option,
    compose_settings,
    machine,
    reset_resident_peak,
    resident,
    shown_command,
    write_result,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SYLLABLES = "er ing s th ba be bi bo co da de di do fa fe ga go ha ho in ka la le li lo ma me mi mo na ne no on pa pe ra ro"
CHUNK = 2048  # texts of an encode_batch


# ---- Rows ----


def make_words(rng: random.Random, count: int = 20_000) -> list[str]:
    """Words of one to four syllables."""
    syllables = SYLLABLES.split()
    return ["".join(rng.choices(syllables, k=rng.choice((1, 2, 2, 3, 4)))) for _ in range(count)]


def write_rows(path: Path, num_rows: int, is_short: bool) -> None:
    """Write transcripts of HH's form and sizes; every tenth row repeats the prompt before it."""
    rng = random.Random(0)
    words = make_words(rng)
    shares = list(itertools.accumulate(1 / (rank + 5) for rank in range(len(words))))  # Zipf's law

    def say(mean: float) -> str:
        count = max(1, min(400, round(rng.lognormvariate(0, 0.8) * mean / 1.377)))
        return " ".join(rng.choices(words, cum_weights=shares, k=count)) + "."

    sizes = (3.0, 3.0) if is_short else (28.0, 38.0)  # words of a turn, and of a response
    path.parent.mkdir(parents=True, exist_ok=True)
    prompt = ""
    with open(path, "w", encoding="utf-8") as file:
        for number in range(num_rows):
            if number % 10 != 9:
                turns = [f"\n\nHuman: {say(sizes[0])}" for _ in range(1 if is_short else rng.choice((1, 1, 2, 3)))]
                prompt = f"\n\nAssistant: {say(sizes[0])}".join(turns) + "\n\nAssistant:"
            row = {"chosen": f"{prompt} {say(sizes[1])}", "rejected": f"{prompt} {say(sizes[1])}"}
            file.write(json.dumps(row) + "\n")


def distinct_texts(path: Path) -> list[str]:
    """The prompts and responses of the rows, each once."""
    texts: dict[str, None] = {}
    with open(path, encoding="utf-8") as file:
        for line in file:
            for text in json.loads(line).values():
                cut = text.rfind("\n\nAssistant:") + len("\n\nAssistant:")
                texts[text[:cut]] = texts[text[cut:]] = None
    return list(texts)


# ---- Phases ----


def load_tokenizer(file: Path | None) -> "PreTrainedTokenizerFast":
    """The tokenizer of a file, or the embedded one."""
    from transformers import PreTrainedTokenizerFast

    from engine.data.films import film_tokenizer

    if file is None:
        return film_tokenizer()
    return PreTrainedTokenizerFast(tokenizer_file=str(file), eos_token="<|endoftext|>")


def encode_batch(folder: Path, tokenizer: "PreTrainedTokenizerFast") -> dict[str, float]:
    texts = distinct_texts(folder / "hh" / "train.jsonl")
    backend, num_tokens = tokenizer.backend_tokenizer, 0
    start = time.perf_counter()
    for first in range(0, len(texts), CHUNK):
        encoded = backend.encode_batch(texts[first : first + CHUNK], add_special_tokens=False)
        num_tokens += sum(map(len, encoded))
    return {"seconds": time.perf_counter() - start, "texts": len(texts), "tokens": num_tokens}


def load(folder: Path, tokenizer: "PreTrainedTokenizerFast") -> dict[str, float]:
    from preference_datasets import load_split

    start = time.perf_counter()
    split = load_split(settings_of(folder), tokenizer, "train", "pairs")
    found = {"seconds": time.perf_counter() - start, "examples": len(split.examples)}
    found |= {"peak_mb": resident("VmHWM") / 1e6}
    assert all(len(split.examples[index].responses) == 2 for index in range(0, len(split.examples), 1000))
    reset_resident_peak()
    return found | {"kept_mb": resident("VmRSS") / 1e6, "private_mb": resident("RssAnon") / 1e6}


def batches(folder: Path, tokenizer: "PreTrainedTokenizerFast") -> dict[str, float]:
    from engine.step.sources import StoredExamples
    from preference_datasets import load_split

    examples = load_split(settings_of(folder), tokenizer, "train", "pairs").examples
    source = StoredExamples(examples, batch_size=64, seed=0, n_epochs=10, n_examples=None)
    start = time.perf_counter()
    next(source.batches())
    first = time.perf_counter()
    next(source.batches(int(9.5 * len(examples))))
    resumed = time.perf_counter()
    assert source.fingerprint
    hashed = time.perf_counter()
    memory = {"kept_mb": resident("VmRSS") / 1e6, "peak_mb": resident("VmHWM") / 1e6}
    return {"seconds": first - start, "resumed_s": resumed - first, "fingerprint_s": hashed - resumed, **memory}


PHASES: dict[str, Callable[[Path, "PreTrainedTokenizerFast"], dict[str, float]]] = {
    "encode_batch": encode_batch,
    "cold": load,
    "cached": load,
    "batches": batches,
}


def settings_of(folder: Path) -> Any:
    return compose_settings(
        *("loss=dpo", "loss.beta=0.1", "datasets=[hh]", f"data_dir={folder}", f"cache_dir={folder / 'cache'}"),
        *("max_length=512", "max_prompt_length=256"),
    )


def cpu_seconds() -> float:
    """Processor time of this process and of those it has waited for."""
    return sum(os.times()[:4])


def run_phase(name: str, folder: Path, tokenizer_file: Path | None) -> dict[str, float]:
    """Run a phase in this process: times, and memory above what the imports take."""
    import pyarrow.ipc  # noqa: F401
    import torch  # noqa: F401

    import preference_datasets  # noqa: F401
    import trainers  # noqa: F401

    tokenizer = load_tokenizer(tokenizer_file)
    tokenizer.encode("a word")
    settings_of(folder)
    reset_resident_peak()
    before, cpu_before = (resident("VmRSS") / 1e6, resident("RssAnon") / 1e6), cpu_seconds()
    with contextlib.redirect_stdout(io.StringIO()):
        found = PHASES[name](folder, tokenizer)
    found["cpu_s"] = cpu_seconds() - cpu_before
    for field, base in (("kept_mb", before[0]), ("peak_mb", before[0]), ("private_mb", before[1])):
        if field in found:
            found[field] -= base
    return {field: round(value, 3) for field, value in found.items()}


def main(texts: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=160_000)
    parser.add_argument("--short", action="store_true", help="rows of a few words")
    parser.add_argument("--tokenizer", type=Path, help="a tokenizer.json (default: the embedded one)")
    parser.add_argument("--phases", default=",".join(PHASES), help="comma-separated (default: %(default)s)")
    parser.add_argument("--folder", type=Path, help="keeps the rows and the cache, for other phases later")
    add_results_option(parser)
    arguments = parser.parse_args(texts)
    phases: dict[str, dict[str, float]] = {}
    with contextlib.ExitStack() as stack:
        folder = arguments.folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        rows = folder.resolve() / "hh" / "train.jsonl"
        if not rows.exists():
            write_rows(rows, arguments.rows, arguments.short)
        print(f"{arguments.rows:,} rows, {rows.stat().st_size / 1e6:,.0f} MB", flush=True)
        for name in arguments.phases.split(","):
            with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
                phases[name] = pool.submit(run_phase, name, folder.resolve(), arguments.tokenizer).result()
            print(
                f"{name:14}" + "".join(f"  {field} {value:,.6g}" for field, value in phases[name].items()), flush=True
            )
        size = rows.stat().st_size
    record = {
        "command": shown_command("data", texts),
        **machine(os.cpu_count() or 1),
        "rows": arguments.rows,
        "bytes": size,
        "phases": phases,
    }
    write_result(arguments.results, "data", record)


if __name__ == "__main__":
    main(sys.argv[1:])
