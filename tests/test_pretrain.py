"""Pretraining: text files to windows, tokenizers, runs that resume bitwise, and what they measure."""

import gzip
import json
import math
import re
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from engine.data import corpus, encoding, text_files, tokenizer_processes
from engine.data.corpus import TextWindows, load_windows, stream_names
from engine.data.films import film_tokenizer
from engine.data.rows import RowCounts
from engine.data.text_files import Document, TextData
from engine.data.tokenizer_processes import encode_in_processes
from engine.data.tokenizer_training import BOS, EOS, train_tokenizer
from engine.run.window_evaluation import token_bytes
from inspect_data import InspectOptions, read_overrides, run_inspection
from tests.runs import Program, Run, copy_stopped
from utils import UserError

PRETRAIN = ("loss=pretrain", "max_length=64", "max_prompt_length=16", "batch_size=4", "n_eval_examples=8")


def sentences(name: str, count: int) -> str:
    return "".join(f"Line {n} of {name} says that {n} times {n} is {n * n}.\n" for n in range(count))


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """A folder of 24 text files."""
    folder = tmp_path / "texts"
    folder.mkdir()
    for n in range(24):
        (folder / f"{n}.txt").write_text(sentences(f"text {n}", 12))
    return folder


@dataclass
class Wanted:
    """The settings that load_windows and train_tokenizer read."""

    datasets: list[str]
    cache_dir: str
    text_field: str = "text"
    test_fraction: float = 0.05
    on_bad_row: str = "error"
    max_length: int = 32
    document_mask: bool = True
    tokenizer: Any = None


def only_paths(name: str, split: str) -> None:
    return None


def load(tmp_path: Path, *datasets: object, **options: Any) -> list[TextWindows]:
    wanted = Wanted([str(each) for each in datasets], str(tmp_path / "cache"), **options)
    return load_windows(wanted, film_tokenizer(), only_paths)  # type: ignore[arg-type]


def read(path: Path, test_fraction: float = 0.05, counts: RowCounts | None = None) -> list[Document]:
    return list(TextData(str(path), only_paths).documents("text", test_fraction, counts or RowCounts()))


# ---- Documents ----


def test_every_twentieth_text_file_is_held_out(texts: Path) -> None:
    found = read(texts)
    assert [each.split for each in found].count("test") == 1 and len(found) == 24
    assert read(texts) == found
    assert {each.split for each in read(texts, test_fraction=0)} == {"train"}


def test_the_ends_of_few_text_files_are_held_out(tmp_path: Path) -> None:
    whole = sentences("it", 100)
    (tmp_path / "it.txt").write_text(whole)
    train, test = read(tmp_path / "it.txt")
    assert (train.split, test.split) == ("train", "test") and train.text + test.text == whole
    assert train.text.endswith("\n") and 0.05 <= len(test.text) / len(whole) < 0.07


def test_a_long_line_is_not_held_out(tmp_path: Path) -> None:
    (tmp_path / "it.txt").write_text("A title\n" + "word " * 999 + "\n" + "The end.\n" * 9)
    train, test = read(tmp_path / "it.txt")
    assert train.text.startswith("A title\nword") and test.text == "The end.\n" * 9
    (tmp_path / "it.txt").write_text("A title\n" + "word " * 999)
    assert [each.split for each in read(tmp_path / "it.txt")] == ["train"]


def test_large_text_files_are_read_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_files, "PART_BYTES", 500)
    whole = sentences("café", 60)
    (tmp_path / "it.txt").write_text(whole)
    found = read(tmp_path / "it.txt", test_fraction=0.1)
    assert "".join(each.text for each in found) == whole and all(each.text.endswith("\n") for each in found)
    splits = [each.split for each in found]
    assert splits == sorted(splits, reverse=True) and 1 <= splits.count("test") < splits.count("train")
    assert max(len(each.text.encode()) for each in found) < 600


def test_rows_of_all_kinds_are_documents(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    rows = [{"text": f"Row {n}.", "other": n} for n in range(200)]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "a.jsonl").write_text(lines)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "c.parquet")
    found = read(tmp_path)
    assert [each.text for each in found] == [row["text"] for row in rows] * 3
    held_out = {each.text for each in found if each.split == "test"}
    assert 0 < len(held_out) < 30 and not held_out & {each.text for each in found if each.split == "train"}


def test_files_named_by_split_are_the_splits(tmp_path: Path) -> None:
    for name in ("train-0.txt", "train-1.txt", "eval.txt", "other.txt"):
        (tmp_path / name).write_text(name)
    assert read(tmp_path) == [
        Document("train-0.txt", "train"),
        Document("train-1.txt", "train"),
        Document("eval.txt", "test"),
    ]


def test_a_folder_of_the_hub_is_downloaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "snapshot" / "small"
    folder.mkdir(parents=True)
    for name, text in (("train-00.jsonl", "a"), ("test.jsonl", "b"), ("README.md", "about")):
        (folder / name).write_text(json.dumps({"text": text}))
    asked: list[Any] = []

    def snapshot_download(hub_id: str, **options: Any) -> str:
        asked.append((hub_id, options["repo_type"], options["local_files_only"]))
        assert "small/*.jsonl" in options["allow_patterns"] and "small/*.parquet" in options["allow_patterns"]
        return str(tmp_path / "snapshot")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda *arguments, **named: None)
    data = TextData("me/texts/small", only_paths)
    assert [*data.documents("text", 0.5, RowCounts())] == [Document("a", "train"), Document("b", "test")]
    (folder / "test.jsonl").unlink()
    (folder / "train-00.jsonl").rename(folder / "rows.jsonl")
    assert [*TextData("me/texts/small", only_paths).documents("text", 0, RowCounts())] == [Document("a", "train")]
    assert asked == [("me/texts", "dataset", False)] * 2

    def no_network(*arguments: Any, **named: Any) -> None:
        raise OSError("no route")

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", no_network)
    TextData("me/texts/small", only_paths)
    assert asked[-1][-1] and "which may hold a part alone: the hub fails: no route" in capsys.readouterr().out


def test_without_network_and_cache_a_data_set_of_the_hub_is_missed(
    program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    run = program("loss=pretrain", "datasets=me/texts")
    problem = "datasets: me/texts is no path here and not in the hub's local cache, and the hub fails: "
    assert run.status == 3 and problem in run.err
    assert "me/texts does not exist and is not one of" in program("loss=sft", "datasets=me/texts").err


def test_hidden_files_are_left_out_below_the_folder_alone(tmp_path: Path) -> None:
    folder = tmp_path / ".hidden" / "texts"
    for name in ("a.txt", "inner/b.txt", ".c.txt", ".git/d.txt"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    assert [each.text for each in read(folder, 0)] == ["a.txt", "inner/b.txt"]


@pytest.mark.slow
def test_memory_does_not_grow_with_the_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "BATCH_CHARACTERS", 20_000)
    peaks = []
    for count in (100, 600):
        path = tmp_path / f"{count}.jsonl"
        path.write_text("".join(json.dumps({"text": sentences(f"text {n}", 40)}) + "\n" for n in range(count)))
        load(tmp_path / "before", path, test_fraction=0.1)  # what is loaded once
        tracemalloc.start()
        load(tmp_path / "measured", path, test_fraction=0.1)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.3 * peaks[0]


def test_empty_and_bad_rows_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "one"}\n{"text": "  "}\n{"body": "two"}\n{"text": 3}\n')
    counts = RowCounts(on_bad_row="drop")
    assert [each.text for each in read(path, 0, counts)] == ["one"]
    assert counts.dropped["empty text"] == 1 and counts.dropped.total() == 3
    with pytest.raises(UserError, match=r"rows.jsonl line 3"):
        read(path)


@pytest.mark.parametrize(("content", "problem"), [(b"caf\xe9\n", "is not UTF-8"), (b"a\0b", "contains a NUL byte")])
def test_files_without_text_are_refused(tmp_path: Path, content: bytes, problem: str) -> None:
    (tmp_path / "it.txt").write_bytes(content)
    with pytest.raises(UserError, match=problem) as error:
        read(tmp_path / "it.txt")
    assert error.value.code == "DATA" and "it.txt" in str(error.value)


def test_a_folder_without_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "picture.png").touch()
    with pytest.raises(UserError, match="holds no file of text or rows"):
        read(tmp_path)


# ---- Token stores ----


def test_documents_are_stored_with_both_ends(tmp_path: Path, texts: Path) -> None:
    train, test = load(tmp_path, texts)
    tokenizer = film_tokenizer()
    start = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    (stream,) = train.windows.streams
    assert len(stream.offsets) == 24 and train.counts["documents"] == 23 and test.counts["documents"] == 1
    documents = [stream.tokens[first:end] for first, end in zip(stream.offsets, stream.offsets[1:], strict=False)]
    assert {int(each[0]) for each in documents} == {start}
    assert {int(each[-1]) for each in documents} == {tokenizer.eos_token_id}
    written = {tokenizer.decode(each[1:-1].tolist()) for each in documents}
    assert written == {each.text for each in read(texts) if each.split == "train"}
    assert train.counts["bytes"] == sum(len(text) for text in written)
    assert not stream.tokens.flags.owndata and stream.tokens.dtype == np.uint16


def test_long_documents_are_encoded_in_pieces(tmp_path: Path, texts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (whole, _), content = load(tmp_path, texts), []
    monkeypatch.setattr(corpus, "PIECE_CHARACTERS", 100)
    monkeypatch.setattr(corpus, "BATCH_CHARACTERS", 1000)
    (in_pieces, _) = load(tmp_path / "other", texts)
    content = [each.windows.streams[0] for each in (whole, in_pieces)]
    assert np.array_equal(content[0].offsets, content[1].offsets) and whole.content == in_pieces.content


def test_other_processes_write_the_same_stores(
    tmp_path: Path, texts: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (texts / "24.txt").write_text("A document with <eos> and <pad>, which are text here.\n" * 3)
    here = load(tmp_path, texts)
    asked: list[int] = []

    def encode(requests: Any, tokenizer: Any) -> Any:
        for each in encode_in_processes(requests, tokenizer):
            asked.append(len(each[1]))
            yield each

    monkeypatch.setattr(encoding, "encode_in_processes", encode)
    monkeypatch.setattr(encoding, "num_processes", lambda: 2)
    monkeypatch.setattr(corpus, "PIECE_CHARACTERS", 100)
    monkeypatch.setattr(corpus, "BATCH_CHARACTERS", 1000)
    there = load(tmp_path / "other", texts)
    assert len(asked) > 8 and sum(asked) > 60  # pieces
    for one, other in zip(here, there, strict=True):
        assert one.content == other.content and one.counts == other.counts
        assert np.array_equal(one.windows.streams[0].tokens, other.windows.streams[0].tokens)
        assert np.array_equal(one.windows.streams[0].offsets, other.windows.streams[0].offsets)
    assert re.search(r"tokenized .*texts: 0\.0 MB in [\d.]+ s, [\d.]+ MB/s", capsys.readouterr().out)


def test_a_bad_row_ends_the_other_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoding, "num_processes", lambda: 2)
    monkeypatch.setattr(corpus, "BATCH_CHARACTERS", 100)
    started: list[Any] = []
    start = tokenizer_processes._start

    def start_and_note() -> Any:
        started.append(start())
        return started[-1]

    monkeypatch.setattr(tokenizer_processes, "_start", start_and_note)
    rows = "".join(json.dumps({"text": f"Row {n} of many."}) + "\n" for n in range(200))
    (tmp_path / "rows.jsonl").write_text(rows + "no JSON\n")
    with pytest.raises(UserError, match="line 201"):
        load(tmp_path, tmp_path / "rows.jsonl")
    assert started and all(each.poll() is not None for each in started)
    assert not list(tmp_path.glob("cache/streams/*/*"))


def test_stores_are_read_again_and_stale_or_damaged_ones_rebuilt(
    tmp_path: Path, texts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = load(tmp_path, texts)[0]
    assert "tokenized" in capsys.readouterr().out
    assert load(tmp_path, texts)[0].content == first.content
    assert "tokenized" not in capsys.readouterr().out
    (file,) = (tmp_path / "cache").rglob("train/texts.arrow")
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 255
    file.write_bytes(data)
    assert load(tmp_path, texts)[0].content == first.content
    assert "tokenized" in capsys.readouterr().out
    (texts / "0.txt").write_text("Another text.")
    assert load(tmp_path, texts)[0].content != first.content
    assert len([*(tmp_path / "cache" / "streams").glob("[!.]*")]) == 1  # in the same place
    (tmp_path / "copy").mkdir()
    for text in texts.iterdir():
        (tmp_path / "copy" / text.name).write_bytes(text.read_bytes())
    assert load(tmp_path, tmp_path / "copy")[0].content == load(tmp_path, texts)[0].content


def test_runs_that_start_together_tokenize_once(
    tmp_path: Path, texts: Path, wanted: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    def start(_: int) -> str:
        train_tokenizer(wanted, only_paths)
        return load(tmp_path, texts)[0].content

    with ThreadPoolExecutor(3) as threads:
        assert len(set(threads.map(start, range(3)))) == 1
    out = capfd.readouterr().out
    assert out.count("training a tokenizer") == 1 and out.count("tokenized") == 1


def test_vocabularies_with_gaps_have_all_their_tokens(tmp_path: Path, texts: Path) -> None:
    tokenizer = with_gap(film_tokenizer())
    (texts / "24.txt").write_text("far" * 3)
    wanted = Wanted([str(texts)], str(tmp_path / "cache"), test_fraction=0)
    (stream,) = load_windows(wanted, tokenizer, only_paths)[0].windows.streams  # type: ignore[arg-type]
    far = tokenizer.convert_tokens_to_ids("far")
    assert far > len(tokenizer) and (stream.tokens == far).sum() == 3 and token_bytes(tokenizer)[far] == 3


def with_gap(tokenizer: Any) -> Any:
    """A tokenizer with the word "far" far behind its other tokens."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    word = {"content": "far", "single_word": False, "lstrip": False, "rstrip": False}
    state["added_tokens"].append({**word, "id": len(tokenizer) + 100, "normalized": False, "special": False})
    state["model"]["vocab"]["far"] = len(tokenizer) + 100
    backend = Tokenizer.from_str(json.dumps(state))
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=tokenizer.eos_token)


def test_splits_without_documents_are_refused(tmp_path: Path) -> None:
    (tmp_path / "it.jsonl").write_text('{"text": "one"}\n')
    with pytest.raises(UserError, match="has no test documents"):
        load(tmp_path, tmp_path / "it.jsonl")
    assert len(load(tmp_path, tmp_path / "it.jsonl", test_fraction=0)[0].windows) == 1


def test_streams_have_short_distinct_names() -> None:
    assert stream_names(["a/texts", "b/texts", "more.jsonl"]) == ["a/texts", "b/texts", "more.jsonl"]
    assert stream_names(["/data/texts/", "hh"]) == ["texts", "hh"]


# ---- Tokenizers ----


@pytest.fixture
def wanted(tmp_path: Path, texts: Path) -> Any:
    @dataclass
    class TokenizerWanted:
        train: int = 300

    return Wanted([str(texts)], str(tmp_path / "cache"), tokenizer=TokenizerWanted())


def test_a_trained_tokenizer_has_every_text(wanted: Any, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = train_tokenizer(wanted, only_paths)
    assert len(tokenizer) == 300 and (tokenizer.bos_token, tokenizer.eos_token) == (BOS, EOS)
    text = "Line 3 — naïve, 数字 12345\n\n\tand\u00a0tabs 🙂"
    ids = tokenizer(text)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id and tokenizer.decode(ids[1:]) == text
    sizes = token_bytes(tokenizer)
    assert sizes[ids].sum() == len(text.encode()) and sizes[tokenizer.eos_token_id] == 0
    line = "Line 3 of text 3 says that 3 times 3 is 9."
    assert len(tokenizer(line)["input_ids"]) < len(line) / 1.5
    assert "training a tokenizer" in capsys.readouterr().out
    assert train_tokenizer(wanted, only_paths).get_vocab() == tokenizer.get_vocab()
    assert "training" not in capsys.readouterr().out


def test_more_tokens_than_the_text_has_are_refused(wanted: Any) -> None:
    wanted.tokenizer.train = 9000
    with pytest.raises(UserError, match=r"tokenizer\.train: the text gives .* tokens, not 9,000"):
        train_tokenizer(wanted, only_paths)


def test_bytes_of_other_tokenizers() -> None:
    tokenizer = film_tokenizer()
    text = "What a charming film!"
    assert token_bytes(tokenizer)[tokenizer(text, add_special_tokens=False)["input_ids"]].sum() == len(text)


# ---- Runs ----


def test_text_is_not_inspected() -> None:
    with pytest.raises(UserError, match="pretrain learns text, and this command inspects prompts and responses"):
        run_inspection(
            read_overrides(["loss=pretrain"]),
            InspectOptions(page=None, examples=3, contamination=None, near_duplicates=None),
        )


def numbers(run: Run) -> list[dict[str, Any]]:
    ignored = ("second", "memory", "mfu")
    return [{name: row[name] for name in row if not any(part in name for part in ignored)} for row in run.metrics]


def weights(run: Run) -> dict[str, torch.Tensor]:
    return load_file(run.dir / "LATEST" / "model.safetensors")


def test_a_run_learns_and_measures(program: Program, texts: Path) -> None:
    run = program.ok(
        *PRETRAIN,
        f"datasets={texts}",
        "tokenizer.train=300",
        "n_examples=120",
        "n_epochs=2",
        "lr=1e-2",
        "sample_during_eval=true",
    )
    assert "train: 23 documents" in run.out and "windows of 64 tokens" in run.out
    before, after = run.evals[0], run.evals[-1]
    assert before["loss/eval"] == pytest.approx(math.log(300), rel=0.05) and after["loss/eval"] < 0.6 * math.log(300)
    for row in (before, after):
        assert row["perplexity/eval"] == pytest.approx(math.exp(row["loss/eval"]))
    # About two bytes a token, and an end without bytes for each document.
    assert 0.3 < after["bits_per_byte/eval"] * math.log(2) / after["loss/eval"] < 0.8
    assert run.steps[-1]["epochs/texts"] == pytest.approx(
        120 / run.steps[0]["counters/examples"] * 4 / num_windows(run)
    )
    assert any(row["prompt"].startswith("Line 0 of text") and row["policy"] for row in run.samples)


def num_windows(run: Run) -> int:
    (line,) = (line for line in run.out.splitlines() if line.startswith("train: "))
    return int(line.split(", ")[-1].removesuffix(" windows").replace(",", ""))


@pytest.mark.parametrize(
    "options", [pytest.param((), marks=pytest.mark.slow), ("weights=[3,1]", "document_mask=false")]
)
def test_a_killed_run_resumes_bitwise(program: Program, texts: Path, tmp_path: Path, options: tuple[str, ...]) -> None:
    (tmp_path / "more.txt").write_text(sentences("more", 40))
    common = (*PRETRAIN, f"datasets=[{texts},{tmp_path / 'more.txt'}]", "n_examples=32", "eval_every=16", *options)
    whole = program.ok(*common, "keep_checkpoints=9")
    copy_stopped(whole, tmp_path / "resumed", 16)
    resumed = program.ok(*common, f"local_run_dir={tmp_path / 'resumed'}", "resume=auto", "keep_checkpoints=9")
    assert "after 16 examples" in resumed.out and numbers(resumed) == numbers(whole)
    assert all(torch.equal(tensor, weights(resumed)[name]) for name, tensor in weights(whole).items())
    (texts / "0.txt").write_text("Another text, as long as it takes to be trained on.")
    other = program(*common, f"local_run_dir={tmp_path / 'resumed'}", "resume=auto")
    assert other.status == 3 and "was trained on other examples" in other.err


@pytest.mark.slow
def test_any_number_of_processes_trains_on_the_same_windows(program: Program, texts: Path, tmp_path: Path) -> None:
    """Bitwise, also when a run of two goes on as one."""
    common = (*PRETRAIN, f"datasets={texts}", "n_examples=32", "eval_every=16", "deterministic=true")
    one = program.ok(*common)
    for number in (2, 4):
        kept = f"local_run_dir={tmp_path / str(number)}", "keep_checkpoints=9"
        program.ok(*common, "trainer=FSDPTrainer", f"num_processes={number}", *kept)
    resumed = program.ok(*common, f"resume={tmp_path / '2' / 'step-16'}", f"local_run_dir={tmp_path / 'resumed'}")
    for directory in (tmp_path / "4", resumed.dir):
        again = Run(0, f"run_dir: {directory}", "")
        losses = [[row["loss/train"] for row in run.steps[-4:]] for run in (one, again)]
        assert losses[0] == losses[1] and one.evals[-1]["loss/eval"] == again.evals[-1]["loss/eval"]
    assert all(torch.equal(tensor, weights(resumed)[name]) for name, tensor in weights(one).items())


def test_microbatches_change_nothing(program: Program, texts: Path) -> None:
    common = (*PRETRAIN, f"datasets={texts}", "n_examples=8", "model.policy_dtype=float64", "do_first_eval=false")
    runs = [program.ok(*common, *option) for option in ((), ("gradient_accumulation_steps=4",), ("token_budget=70",))]
    losses = [[row["loss/train"] for row in run.steps] for run in runs]
    assert losses[1] == pytest.approx(losses[0], abs=1e-10) and losses[2] == pytest.approx(losses[0], abs=1e-10)


def test_weight_decay_is_of_matrices_alone(program: Program) -> None:
    """The embedded dialogues are text, too. Nothing but weight decay moves weights with a tiny gradient."""
    common = ("loss=pretrain", "max_length=64", "max_prompt_length=16", "n_examples=4", "optimizer=SGD", "lr=1e-2")
    frozen = ("lr_schedule=constant", "max_grad_norm=1e-30", "warmup_steps=0", "do_first_eval=false")
    decayed, plain = (weights(program.ok(*common, *frozen, f"weight_decay={value}")) for value in (0.5, "null"))
    for name, tensor in plain.items():
        is_matrix = tensor.ndim == 2 and "embed" not in name
        assert torch.allclose(decayed[name], tensor * (1 - 0.5e-2 if is_matrix else 1), rtol=1e-6, atol=0), name


def test_a_decay_ends_at_min_lr(program: Program) -> None:
    run = program.ok("lr_schedule=cosine", "lr=3e-4", "min_lr=1e-4", "n_examples=20", "do_first_eval=false")
    expected = [1 / 3, 2 / 3, 1, 1 / 3 + 2 / 3 * 0.75, 1 / 3 + 2 / 3 * 0.25]
    assert [row["learning_rate"] for row in run.steps] == pytest.approx([3e-4 * factor for factor in expected])


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        ("loss=pretrain lr=1e-5", "min_lr: must be at most lr (1e-05), not 0.0001"),
        ("loss=pretrain max_length=1 max_prompt_length=1", "max_length: must be at least 2 with document_mask"),
        ("loss=pretrain batching=padded", "document_mask: true needs batching=packed"),
        ("tokenizer.train=300", "tokenizer.train: 300 is for loss=pretrain"),
        ("loss=pretrain tokenizer.train=100", "tokenizer.train: must be at least 259"),
        ("loss=pretrain tokenizer.train=300 model.architecture=null", "needs a new model"),
        ("loss=pretrain model=15m", "model.tokenizer_name_or_path: a new model needs a tokenizer"),
        ("loss=pretrain keep_best=logps_eval/chosen", "keep_best: logps_eval/chosen is not measured"),
        (
            "loss=pretrain model=15m tokenizer.train=300 model.tokenizer_name_or_path=gpt2",
            "would change nothing: tokenizer.train=300 trains one",
        ),
        ("text_field=body", 'text_field: "body" would change nothing'),
        ("document_mask=false", "document_mask: false would change nothing"),
        ("loss=pretrain format=messages", 'format: "messages" would change nothing: loss=pretrain learns text'),
    ],
)
def test_mistakes_are_refused(program: Program, overrides: str, problem: str) -> None:
    run = program(*overrides.split(), defaults=("wandb.enabled=false",))
    assert run.status == 2 and problem in run.err
