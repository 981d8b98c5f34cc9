"""The benchmarks of pretraining run end to end on their smallest sizes."""

import json
import random
from datetime import date

import pytest

from benchmarks import corpus, pretrain, shards
from tests.test_benchmarks import result

# ---- pretrain.py ----


@pytest.mark.slow
def test_pretrain(tmp_path):
    """Ours, and litgpt where it is installed: the same losses."""
    sizes = ("--model", "tiny", "--batch-size", "2", "--length", "32", "--steps", "2", "--warmup", "1")
    systems = ("ours", "ours-documents", "litgpt") if pretrain.LITGPT_PYTHON.exists() else ("ours", "ours-documents")
    pretrain.main([*sizes, "--systems", "ours,ours-documents,litgpt", "--results", str(tmp_path)])
    record = result(tmp_path, "pretrain-tiny")
    assert tuple(record["systems"]) == systems and record["flops_per_step"] > 1e6
    first, *others = (row["first_losses"] for row in record["systems"].values())
    assert 6.8 < first[0] < 7.1 and len(first) == 4 and first[0] > first[1]
    assert all(each == pytest.approx(first, abs=1e-4) for each in others)
    for row in record["systems"].values():
        assert len(row["seconds"]) == 2 and 0 < row["mfu"] < 1


def test_windows_of_pretrain():
    windows = pretrain.make_windows(100, 2000, 2)
    assert windows == pretrain.make_windows(100, 2000, 2) and windows[0] != windows[1]
    for window in windows:
        assert len(window["tokens"]) == 2001 and 0 < len(window["documents"]) < 20


# ---- corpus.py ----


@pytest.fixture
def installed(tmp_path):
    """A standard library and a folder of packages."""
    library, packages = tmp_path / "library", tmp_path / "packages"
    texts = [f"Return the product of {n} and its argument, which is at least {n * n}." for n in range(60)]
    library.mkdir()
    (library / "a.py").write_text(f'"""{texts[0]}"""\ndef f():\n    """{texts[1]}"""\n\ndef g():\n    """Short."""\n')
    (library / "of_python_2.py").write_text(f'"""{texts[2]}"""\nprint 1\n')
    (packages / "it-1.0.dist-info").mkdir(parents=True)
    (packages / "it-1.0.dist-info" / "METADATA").write_text(
        "Name: it\n\n# It\n\nA package of films and reviews. Café.\n"
    )
    for n, text in enumerate(texts[3:]):
        (packages / f"m{n}.py").write_text(
            f'class A:\n    """{texts[0]}"""\n\n    def f(self):\n        """{text}"""\n'
        )
    return library, packages


def test_corpus_of_documentation(tmp_path, installed):
    library, packages = installed
    counts = corpus.make_corpus(tmp_path / "out", 10**6, library, packages)
    lines = {split: (tmp_path / "out" / f"{split}.jsonl").read_text().splitlines() for split in ("train", "test")}
    rows = {split: list(map(json.loads, of_split)) for split, of_split in lines.items()}
    assert {split: each["documents"] for split, each in counts.items()} == {k: len(v) for k, v in rows.items()}
    texts = {row["name"]: row["text"] for split in rows.values() for row in split}
    assert len(texts) == 59 and 0 < len(rows["test"]) < 12
    assert texts["library/a.py"].count("Return the product") == 2 and "Short." not in texts["library/a.py"]
    assert texts["it-1.0.dist-info/METADATA"] == "# It\n\nA package of films and reviews. Café."
    every = "\n".join(texts.values())
    assert every.count("product of 0 ") == 1 and "product of 2 " not in every  # no duplicate, no bad file
    assert len(corpus.read_texts(tmp_path / "out", "test")) == counts["test"]["bytes"]
    smaller = corpus.make_corpus(tmp_path / "smaller", 1000, library, packages)
    assert 1000 <= sum(each["bytes"] for each in smaller.values()) < 1300


def test_compressors_of_corpus():
    generator = random.Random(0)
    train, test = (bytes(generator.choices(b"abcdefgh", k=20_000)) for _ in range(2))
    bits = corpus.compressed(train, test)
    assert all(2.9 < value < 3.8 for value in bits.values())  # three bits each
    bits = corpus.compressed(train + test, test)
    assert bits["xz -9e after the training text"] < 0.1 and bits["xz -9e"] > 2.9


@pytest.mark.slow
def test_corpus(tmp_path, installed):
    library, packages = installed
    small = ("hidden_size=32", "intermediate_size=48", "num_hidden_layers=1", "num_attention_heads=2")
    corpus.main(
        [
            *("--windows", "8", "--sample-tokens", "4", "--work", str(tmp_path / "work"), "--results", str(tmp_path)),
            *("--library", str(library), "--packages", str(packages), "tokenizer.train=300", "max_length=32"),
            *("max_prompt_length=8", "batch_size=4", *(f"model.architecture.{each}" for each in small)),
            "model.architecture.num_key_value_heads=2",
        ]
    )
    record = result(tmp_path, "corpus")
    assert record["run"]["windows"] == 8 and record["run"]["vocabulary"] == 300 and len(record["losses"]) == 2
    assert record["run"]["processor_seconds"] > 0 and len(record["samples"]) == len(corpus.PROMPTS)
    page = (tmp_path / f"corpus-{date.today()}.md").read_text()
    assert f"| {record['evaluations'][-1]['bits_per_byte/eval']:.3f} |" in page and page.count("| xz -9e") == 2
    assert (tmp_path / f"corpus-{date.today()}.png").read_bytes()[:4] == b"\x89PNG"


# ---- shards.py ----


@pytest.mark.slow
def test_shards(tmp_path, installed):
    """Each system gives as many tokens."""
    corpus.make_corpus(tmp_path / "corpus", 10**6, *installed)
    sizes = ("--corpus", str(tmp_path / "corpus"), "--tokens", "300", "--repeats", "1", "--processes", "2")
    shards.main([*sizes, "--results", str(tmp_path)])
    record = result(tmp_path, "shards")
    assert record["command"].startswith("benchmarks/shards.py --corpus DATA ") and 0 < record["megabytes"] < 0.1
    runs = [each["runs"] for each in record["systems"].values()]
    assert len(runs) == 3 and {run["tokens"] for each in runs for run in each} == {runs[0][0]["tokens"]}
    assert all(row["mb_per_processor_second"] > 0 for row in record["systems"].values())
