"""How fast is text made into stores of tokens, beside datasets.map with the same tokenizer?

    python benchmarks/corpus.py --windows 16 --work WORK
    python benchmarks/shards.py --corpus WORK/corpus

Each system runs in processes of its own, in turns. Rates are of the text of both splits, in MB/s, from the file of rows
to tokens on disk. `processor`: MB per second of processor time, of all processes together.

- ours: one process for each core reads, encodes and writes.
- ours-threads: the tokenizer's own threads, as without processes.
- map: datasets.map, batched, with one process for each core; it keeps tokens in an Arrow file.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import add_results_option, machine, shown_command, write_result

SPLITS = ("train", "test")


def settings_of(corpus: Path, cache_dir: Path, num_tokens: int | None) -> Any:
    """The settings that load_windows and train_tokenizer read."""
    values = {"text_field": "text", "test_fraction": 0.05, "on_bad_row": "error", "max_length": 512}
    tokenizer = SimpleNamespace(train=num_tokens)
    paths = {"datasets": [str(corpus)], "cache_dir": str(cache_dir)}
    return SimpleNamespace(**values, **paths, document_mask=True, tokenizer=tokenizer)


def train_tokenizer_on(corpus: Path, folder: Path, num_tokens: int) -> None:
    from engine.data.tokenizer_training import train_tokenizer

    tokenizer = train_tokenizer(settings_of(corpus, folder / "cache", num_tokens), lambda name, split: None)
    tokenizer.save_pretrained(folder / "tokenizer")


# ---- The systems ----


def prepare_ours(corpus: Path, tokenizer: Any, folder: Path, num_processes: int) -> int:
    from engine.data import encoding
    from engine.data.corpus import load_windows

    encoding.num_processes = lambda: num_processes
    splits = load_windows(settings_of(corpus, folder, None), tokenizer, lambda name, split: None)
    return sum(split.counts["tokens"] for split in splits)


def prepare_with_threads(corpus: Path, tokenizer: Any, folder: Path, num_processes: int) -> int:
    return prepare_ours(corpus, tokenizer, folder, 1)


def prepare_with_map(corpus: Path, tokenizer: Any, folder: Path, num_processes: int) -> int:
    """Tokens with both ends, as ours."""
    from datasets import load_dataset

    start, end = [tokenizer.bos_token_id], [tokenizer.eos_token_id]

    def encode(rows: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        found = tokenizer(rows["text"], add_special_tokens=False, return_attention_mask=False)["input_ids"]
        return {"ids": [start + ids + end for ids in found], "length": [len(ids) + 2 for ids in found]}

    files = {split: str(corpus / f"{split}.jsonl") for split in SPLITS}
    rows = load_dataset("json", data_files=files, cache_dir=str(folder))
    made = rows.map(encode, batched=True, num_proc=num_processes, remove_columns=["name", "text"])
    return sum(sum(made[split]["length"]) for split in SPLITS)


SYSTEMS: dict[str, Callable[[Path, Any, Path, int], int]] = {
    "ours": prepare_ours,
    "ours-threads": prepare_with_threads,
    "map": prepare_with_map,
}


def prepare(name: str, corpus: Path, tokenizer_folder: Path, num_processes: int) -> dict[str, float]:
    """Prepare the corpus in this process and its children: seconds, those of processors, and tokens."""
    import datasets  # imported before the clock runs
    import pyarrow
    from transformers import PreTrainedTokenizerFast

    import engine.data.corpus

    assert datasets and pyarrow and engine.data.corpus
    datasets.disable_progress_bars()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tokenizer_folder)
    tokenizer.model_max_length = 10**9  # no warning of long texts
    with tempfile.TemporaryDirectory() as folder:
        start, before = time.perf_counter(), processor_seconds()
        num_tokens = SYSTEMS[name](corpus, tokenizer, Path(folder), num_processes)
        seconds, processor = time.perf_counter() - start, processor_seconds() - before
    return {"seconds": seconds, "processor": processor, "tokens": num_tokens}


def processor_seconds() -> float:
    """Processor time of this process and its ended children."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


# ---- The command ----


def main(texts: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, required=True, help="of benchmarks/corpus.py: train.jsonl, test.jsonl")
    parser.add_argument("--tokens", type=int, default=4096, help="of the tokenizer (default: %(default)s)")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="(default: all cores)")
    parser.add_argument("--repeats", type=int, default=5, help="(default: %(default)s)")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)  # system, tokenizer
    add_results_option(parser)
    arguments = parser.parse_args(texts)
    corpus = arguments.corpus.resolve()
    if arguments.child:
        name, tokenizer = arguments.child
        found = prepare(name, corpus, Path(tokenizer), arguments.processes)
        print(json.dumps(found))
        return
    rows = [json.loads(line) for split in SPLITS for line in (corpus / f"{split}.jsonl").open(encoding="utf-8")]
    megabytes = sum(len(row["text"].encode()) for row in rows) / 1e6
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in SYSTEMS}
    with tempfile.TemporaryDirectory() as folder:
        train_tokenizer_on(corpus, Path(folder), arguments.tokens)
        for _ in range(arguments.repeats):
            for name in SYSTEMS:
                child = ["--child", name, str(Path(folder, "tokenizer")), "--processes", str(arguments.processes)]
                command = [sys.executable, __file__, "--corpus", str(corpus), *child]
                done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
                runs[name].append(json.loads(done.stdout.splitlines()[-1]))
    table: dict[str, Any] = {}
    print(f"{'system':14}{'MB/s':>8}{'processor':>11}{'tokens':>12}")
    for name, steps in runs.items():
        clock, processor = (megabytes / median(run[key] for run in steps) for key in ("seconds", "processor"))
        table[name] = {"mb_per_second": round(clock, 3), "mb_per_processor_second": round(processor, 3), "runs": steps}
        print(f"{name:14}{clock:8.2f}{processor:11.2f}{steps[0]['tokens']:12,}")
    record = {"command": shown_command("shards", texts, arguments.corpus), **machine(arguments.processes)}
    write_result(arguments.results, "shards", record | {"megabytes": megabytes, "systems": table})


if __name__ == "__main__":
    main(sys.argv[1:])
