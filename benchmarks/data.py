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

--stored writes the store of that many pairs in place of reading rows, which would take hours for millions. Then only
the phases cached and batches are run.
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

SYLLABLES = "er ing s th ba be bi bo co da de di do fa fe ga go ha ho in ka la le li lo ma me mi mo na ne no on ra ro"
CHUNK = 2048  # texts of an encode_batch


# ---- Rows ----


def make_words(rng: random.Random, count: int = 20_000) -> list[str]:
    """Words of one to four syllables."""
    syllables = SYLLABLES.split()
    return ["".join(rng.choices(syllables, k=rng.choice((1, 2, 2, 3, 4)))) for _ in range(count)]


def write_rows(path: Path, num_rows: int) -> None:
    """Write transcripts of HH's form and sizes; every tenth row repeats the prompt before it."""
    rng = random.Random(0)
    words = make_words(rng)
    shares = list(itertools.accumulate(1 / (rank + 5) for rank in range(len(words))))  # Zipf's law

    def say(mean: float) -> str:
        count = max(1, min(400, round(rng.lognormvariate(0, 0.8) * mean / 1.377)))
        return " ".join(rng.choices(words, cum_weights=shares, k=count)) + "."

    words_of_turn, words_of_response = 28.0, 38.0
    path.parent.mkdir(parents=True, exist_ok=True)
    prompt = ""
    with open(path, "w", encoding="utf-8") as file:
        for number in range(num_rows):
            if number % 10 != 9:
                turns = [f"\n\nHuman: {say(words_of_turn)}" for _ in range(rng.choice((1, 1, 2, 3)))]
                prompt = f"\n\nAssistant: {say(words_of_turn)}".join(turns) + "\n\nAssistant:"
            row = {"chosen": f"{prompt} {say(words_of_response)}", "rejected": f"{prompt} {say(words_of_response)}"}
            file.write(json.dumps(row) + "\n")


def write_store(folder: Path, tokenizer_file: Path | None, num_pairs: int) -> None:
    """Write the store of pairs of random tokens, 20 to 99 each, and a file in place of their rows."""
    import numpy as np

    from engine.data.encoding import token_prefix
    from engine.data.example_table import ExampleTable
    from engine.data.examples import Example, Split
    from engine.data.read_sources import note_source
    from engine.data.rows import RowCounts
    from engine.data.split_store import SplitStore
    from engine.data.token_store import TokenStoreWriter
    from preference_datasets import get_hh

    rows = folder / "hh" / "train.jsonl"
    rows.parent.mkdir(parents=True, exist_ok=True)
    with open(rows, "wb") as file:
        for _ in range(0, num_pairs, 1000):
            file.write(b"x" * 100_000)
    tokenizer, rng = load_tokenizer(tokenizer_file), np.random.default_rng(0)
    num_front = len(token_prefix(tokenizer))
    all_lengths = []
    with TokenStoreWriter(folder / "cache" / "tokens" / "made", 65_536, "made") as writer:
        for _ in range(0, num_pairs, 10_000):
            lengths = rng.integers(20, 100, 3 * 10_000)
            all_lengths.append(lengths)
            writer.add_stream(rng.integers(0, len(tokenizer), lengths.sum()), lengths)
    lengths = np.concatenate(all_lengths)[: 3 * num_pairs]
    starts = np.cumsum(lengths) - lengths
    zeros = np.zeros(num_pairs, np.int32)
    prompt_length = (lengths[::3] - 1).astype(np.int32)
    columns: dict[str, Any] = {"prompt_start": starts[::3], "prompt_length": prompt_length, "num_front": prompt_length}
    columns |= {"num_back": zeros, "label": zeros.astype(np.int8) - 1, "weight": np.ones(num_pairs)}
    columns |= {"prompt_index": np.arange(num_pairs, dtype=np.int32), "prompt_hash": rng.integers(0, 2**62, num_pairs)}
    for number in (0, 1):
        columns[f"start_{number}"] = starts[1 + number :: 3] + num_front
        columns[f"length_{number}"] = (lengths[1 + number :: 3] - num_front).astype(np.int32)
    table = ExampleTable(columns, np.empty(0), Example, "made", "made")
    counts = RowCounts(rows=num_pairs)
    note_source(counts, "file", str(rows))
    found = {"rows": num_pairs, "prompts": num_pairs, "pairs": num_pairs, "dropped": {}, "truncated": 0}
    store = SplitStore(settings_of(folder), tokenizer, "train", "pairs", [get_hh])
    store.write(Split(table, found | {"max_length": 512}, [num_pairs]), counts)


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
    parser.add_argument("--stored", action="store_true", help="write the store of the rows, not the rows")
    parser.add_argument("--tokenizer", type=Path, help="a tokenizer.json (default: the embedded one)")
    parser.add_argument("--phases", default=",".join(PHASES), help="comma-separated (default: %(default)s)")
    parser.add_argument("--folder", type=Path, help="keeps the rows and the cache, for other phases later")
    add_results_option(parser)
    arguments = parser.parse_args(texts)
    phases: dict[str, dict[str, float]] = {}
    with contextlib.ExitStack() as stack:
        folder = arguments.folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        rows = folder.resolve() / "hh" / "train.jsonl"
        if arguments.stored:
            write_store(folder.resolve(), arguments.tokenizer, arguments.rows)
            arguments.phases = "cached,batches"
        elif not rows.exists():
            write_rows(rows, arguments.rows)
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
        "stored": arguments.stored,
        "bytes": size,
        "phases": phases,
    }
    write_result(arguments.results, "data", record)


if __name__ == "__main__":
    main(sys.argv[1:])
