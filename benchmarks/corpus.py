"""Pretrain a Llama of 5M parameters on documentation strings, and compare it with gzip and xz in bits per byte.

The corpus: docstrings of the standard library and of installed packages, and the packages' READMEs. A document is a
file. Every twentieth is held out. A docstring appears once, so no held-out one is in the training text.

A stopped run resumes: repeat the command with the same --work.
"""

import argparse
import ast
import gzip
import json
import lzma
import os
import resource
import shutil
import subprocess
import sys
import sysconfig
import time
import warnings
from collections.abc import Iterator, Sequence
from email import message_from_string
from inspect import cleandoc
from pathlib import Path
from statistics import median
from tempfile import mkdtemp
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import ROOT, add_results_option, machine, shown_command, write_result
from utils import content_hash

SHORTEST = 40  # characters of a docstring
HELD_OUT = 20  # one of so many files
DICTIONARY = 2**30  # bytes that xz looks back: more than any corpus here
MEGABYTE = 10**6
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
PROMPTS = (
    "Return a list of",
    "Raise an exception if the",
    "Parameters\n----------\nx : array_like\n",
    "This class represents",
    "Open the file",
    ">>> import numpy as np\n>>> ",
)
SETTINGS = (
    "loss=pretrain",
    "model=15m",
    "model.name_or_path=llama-5m",
    "model.architecture.hidden_size=256",
    "model.architecture.intermediate_size=688",
    "model.architecture.num_hidden_layers=5",
    "model.architecture.num_attention_heads=4",
    "model.architecture.num_key_value_heads=4",
    "tokenizer.train=4096",
    "max_length=512",
    "batch_size=8",
    "lr=2e-3",
    "min_lr=1e-4",
    "n_epochs=null",
    "n_eval_examples=100000",  # all held-out windows
    "eval_every=4000",
    "save_every=2000",
    "do_first_eval=false",
    "sample_during_eval=false",
    "wandb.enabled=false",
    "report=png",
    "resume=auto",
)


# ---- The corpus ----


def docstrings(path: Path) -> list[str]:
    """The documentation strings of a Python file, in order. None of a file for another Python."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError, RecursionError):
        return []
    nodes = (node for node in ast.walk(tree) if isinstance(node, DOCUMENTED))
    nodes_in_order = sorted(nodes, key=lambda node: getattr(node, "lineno", 0))
    return [text for node in nodes_in_order if (text := ast.get_docstring(node))]


def readme(path: Path) -> list[str]:
    """The README in a METADATA file."""
    message = message_from_string(path.read_text(encoding="utf-8", errors="replace"))
    return [cleandoc(str(message.get_payload()))]


def source_files(library: Path, packages: Path) -> Iterator[tuple[str, Path]]:
    """Names and paths: the standard library, READMEs, then modules of packages in a shuffled order."""
    for path in sorted(library.rglob("*.py")):
        if packages not in path.parents and "site-packages" not in path.parts:
            yield f"library/{path.relative_to(library)}", path
    yield from ((str(path.relative_to(packages)), path) for path in sorted(packages.glob("*.dist-info/METADATA")))
    named = {str(path.relative_to(packages)): path for path in packages.rglob("*.py")}
    for name in sorted(named, key=lambda name: content_hash([name])):
        yield name, named[name]


def make_corpus(folder: Path, num_bytes: int, library: Path, packages: Path) -> dict[str, Any]:
    """Write train.jsonl and test.jsonl with about num_bytes of text; returns counts of both.

    The same installed packages give the same files.
    """
    seen = set[str]()
    found: dict[str, list[dict[str, str]]] = {"train": [], "test": []}
    sizes = {"train": 0, "test": 0}
    for name, path in source_files(library, packages):
        texts = readme(path) if path.name == "METADATA" else docstrings(path)
        new = [text for text in dict.fromkeys(texts) if len(text) >= SHORTEST and text not in seen]
        seen.update(new)
        text = "\n\n".join(new).encode(errors="ignore").decode().replace("\0", "").strip()
        if not text:
            continue
        split = "test" if int(content_hash(["split", name])[:8], 16) % HELD_OUT == 0 else "train"
        found[split].append({"name": name, "text": text})
        sizes[split] += len(text.encode())
        if sum(sizes.values()) >= num_bytes:
            break
    folder.mkdir(parents=True, exist_ok=True)
    for split, rows in found.items():
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{split}.jsonl").write_text(lines, encoding="utf-8")
    return {split: {"documents": len(rows), "bytes": sizes[split]} for split, rows in found.items()}


def read_texts(folder: Path, split: str) -> bytes:
    """The text of a split, documents one after another."""
    lines = (folder / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
    return "".join(json.loads(line)["text"] for line in lines).encode()


# ---- Compressors ----


def xz(data: bytes) -> int:
    """The size after xz -9e, with a dictionary for the whole of the data."""
    size = min(DICTIONARY, max(2**16, len(data)))
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": size}]
    return len(lzma.compress(data, format=lzma.FORMAT_XZ, filters=filters))


def compressed(train: bytes, test: bytes) -> dict[str, float]:
    """Bits per byte of the held-out text by each compressor. gzip looks back 32 kB, so training text is no help."""
    sizes = {
        "gzip -9": len(gzip.compress(test, 9)),
        "xz -9e": xz(test),
        "xz -9e after the training text": xz(train + test) - xz(train),
    }
    return {name: 8 * size / len(test) for name, size in sizes.items()}


# ---- The model ----


def train(corpus: Path, work: Path, num_windows: int, overrides: Sequence[str]) -> dict[str, float]:
    """Run train.py; returns its time on the clock and of all its processors, in seconds, with that of earlier parts."""
    paths = [f"datasets={corpus}", f"local_run_dir={work / 'run'}", f"cache_dir={work / 'cache'}"]
    command = [sys.executable, "-u", "train.py", *SETTINGS, *paths, f"n_examples={num_windows}", *overrides]
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    status = subprocess.run(command, cwd=ROOT, stdin=subprocess.DEVNULL, check=False).returncode
    after, seconds = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic() - start
    spent = {
        "seconds": seconds,
        "processor_seconds": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
    }
    record = work / "spent.json"
    if record.exists():
        spent = {key: value + spent[key] for key, value in json.loads(record.read_text()).items()}
    record.write_text(json.dumps(spent), encoding="utf-8")
    if status:
        raise SystemExit(f"{' '.join(command)} ended with status {status}")
    return spent


def sample(run_dir: Path, length: int) -> tuple[list[dict[str, str]], dict[str, int]]:
    """A text for each of PROMPTS, at temperature 0.8; and the size of the model."""
    import torch

    from engine.export.saved_models import load_saved

    saved = load_saved(str(run_dir / "LATEST"), dtype=torch.float32)
    torch.manual_seed(0)
    texts = []
    for prompt in PROMPTS:
        ids = torch.tensor([saved.tokenizer.encode(prompt)])  # with BOS
        made = saved.model.generate(ids, max_new_tokens=length, do_sample=True, temperature=0.8, top_k=0)
        text = saved.tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True)
        texts.append({"prompt": prompt, "text": text})
    return texts, {"parameters": saved.model.num_parameters(), "vocabulary": len(saved.tokenizer)}


def read_metrics(run_dir: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The rows of steps and those of evaluations."""
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if "loss/train" in row], [row for row in rows if "loss/eval" in row]


# ---- The result ----


def summary(record: dict[str, Any], picture: str) -> str:
    """The result as Markdown."""
    run, last, sizes = record["run"], record["evaluations"][-1], record["corpus"]
    train, test = sizes["train"], sizes["test"]
    model = f"this model, {run['parameters'] / MEGABYTE:.1f}M parameters"
    bits = {model: last["bits_per_byte/eval"], **record["compressors"]}
    shown = [(each["prompt"], each["text"].rstrip().replace("```", "")) for each in record["samples"]]
    return "\n".join(
        [
            "# Pretraining on documentation",
            "",
            f"Docstrings and READMEs: {train['bytes'] / MEGABYTE:.1f} MB in {train['documents']:,} files to learn, and",
            f"{test['bytes'] / MEGABYTE:.2f} MB in {test['documents']:,} files held out. No docstring is in both.",
            f"A Llama from scratch saw {run['windows']:,} windows, {run['epochs']:.2f} epochs, in "
            f"{run['seconds'] / 60:.0f} minutes",
            f"({run['processor_seconds'] / 60:.0f} minutes of processor time; {record['machine']}).",
            f"Command: `{record['command']}`.",
            "",
            "| | bits per byte of the held-out text |",
            "| --- | --- |",
            *(f"| {name} | {value:.3f} |" for name, value in sorted(bits.items(), key=lambda item: item[1])),
            "",
            "The model has read the training text. So has xz in the row that says so: its output for both texts, less",
            "its output for the training text. The model's bits are its negative log-likelihood, without its weights.",
            f"Perplexity of a token: {last['perplexity/eval']:.1f}.",
            "",
            f"![The loss in training and held out]({picture})",
            "",
            "## Samples",
            "",
            "Temperature 0.8, seed 0, all shown. The prompt ends at the arrow.",
            "",
            *(f"```\n{prompt} -> {text}\n```\n" for prompt, text in shown),
        ]
    )


def main(texts: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, default=20, help="of text (default: %(default)s)")
    parser.add_argument("--windows", type=int, default=26_000, help="to learn from (default: %(default)s)")
    parser.add_argument("--sample-tokens", type=int, default=120, help="of each sample (default: %(default)s)")
    parser.add_argument("--work", type=Path, help="where corpus and run go; a run there is resumed")
    parser.add_argument("--packages", type=Path, default=Path(sysconfig.get_path("purelib")), help="to read")
    parser.add_argument("--library", type=Path, default=Path(sysconfig.get_path("stdlib")), help="to read")
    parser.add_argument("settings", nargs="*", help="overrides of train.py, such as mixed_precision=bfloat16")
    add_results_option(parser)
    arguments = parser.parse_args(texts)
    work = (arguments.work or Path(mkdtemp(prefix="corpus-"))).resolve()
    corpus, counts = work / "corpus", work / "corpus.json"
    if not counts.exists():
        sizes = make_corpus(corpus, int(arguments.megabytes * MEGABYTE), arguments.library, arguments.packages)
        counts.write_text(json.dumps(sizes), encoding="utf-8")
    spent = train(corpus, work, arguments.windows, arguments.settings)
    steps, evaluations = read_metrics(work / "run")
    sizes = json.loads(counts.read_text())
    samples, shape = sample(work / "run", arguments.sample_tokens)
    record: dict[str, Any] = {
        "command": shown_command("corpus", texts),
        **machine(int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1))),
        "corpus": sizes,
        "run": {**spent, **shape, "windows": steps[-1]["counters/examples"], "epochs": steps[-1]["epochs/corpus"]},
        "compressors": compressed(read_texts(corpus, "train"), read_texts(corpus, "test")),
        "evaluations": evaluations,
        "losses": [[row["counters/examples"], row["loss/train"]] for row in steps[:: max(1, len(steps) // 200)]],
        "tokens_per_second": median(row["tokens_per_second"] for row in steps),
        "samples": samples,
    }
    path = write_result(arguments.results, "corpus", record)
    shutil.copy(work / "run" / "charts" / "loss.png", path.with_suffix(".png"))
    page = summary(record, path.with_suffix(".png").name)
    path.with_suffix(".md").write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
