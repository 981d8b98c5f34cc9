"""Bad configs and bad data end in one line within seconds: the problem, the place, the fix."""

import json
import os
import random
import re
import shutil
import time
from collections import Counter
from pathlib import Path

import pytest
import torch

from engine.data.films import film_tokenizer
from engine.models.loading import load_model
from engine.models.tokenizers import load_tokenizer
from preference_datasets import format_counts, load_split, num_shared_prompts
from tests.configs import make_settings, with_model
from tests.faults.bad_input import BadConfig, BadData, bad_configs, bad_data
from tests.runs import QUICK, SMALL, Program
from utils import UserError

SECONDS = 30  # time limit of each case


SETTINGS = make_settings("chat_template=hh", "test_fraction=0.25", "max_length=64", "max_prompt_length=32")


def check_line(message: str, status: int, code: int) -> None:
    assert status == code
    name = {2: "CONFIG", 3: "DATA"}[code]
    assert re.fullmatch(rf"error\[{name}\] \S[^\n]*; fix: \S[^\n]*", message.rstrip("\n")), message
    assert message.count("\n") <= 1 and "Traceback" not in message and message.rstrip("\n").isprintable()
    assert len(message) < 4000


def check_config(case: BadConfig, program: Program) -> None:
    start = time.monotonic()
    run = program(*case.overrides, defaults=("wandb.enabled=false", "report=null"))
    seconds = time.monotonic() - start
    lines = run.err.splitlines()
    for line in lines:
        check_line(line, run.status, 2)
    assert len(lines) == max(1, len(re.findall(r"^job \d+: ", run.out, re.MULTILINE)))  # one line per job of a sweep
    assert "Traceback" not in run.out + run.err
    for text in case.says:
        assert text in run.err
    assert seconds < SECONDS


def write_files(case: BadData, directory: Path) -> Path:
    """Write the files of a case; returns the path of the data set (or the data_dir of a named one)."""
    shutil.rmtree(directory, ignore_errors=True)
    for name, data in case.files.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return directory if len(case.files) > 1 or case.data_set else path


def load(case: BadData, directory: Path, tokenizer, on_bad_row: str):
    data = write_files(case, directory / "data")
    settings = SETTINGS.model_copy(
        update={
            "datasets": [case.data_set or str(data)],
            "data_dir": str(data) if case.data_set else None,
            "on_bad_row": on_bad_row,
            "cache_dir": str(directory / "cache"),
        }
    )
    start = time.monotonic()
    try:
        return [load_split(settings, tokenizer, split, "pairs") for split in ("train", "test")]
    finally:
        assert time.monotonic() - start < SECONDS


def check_data(case: BadData, directory: Path, tokenizer) -> None:
    if case.counted:
        train, test = load(case, directory, tokenizer, "error")
        found = {
            name: train.counts.get(name, 0) + test.counts.get(name, 0) for name in ("duplicates", "contradictions")
        }
        found["shared"] = num_shared_prompts(train, test)[0]
        for name, value in case.counted.items():
            if name == "dropped":
                dropped = Counter(train.counts["dropped"]) + Counter(test.counts["dropped"])
                assert dropped == value
            else:
                assert found[name] == value
                assert name == "shared" or "kept, though" in format_counts(train.counts) + format_counts(test.counts)
        return
    with pytest.raises(UserError) as raised:
        load(case, directory, tokenizer, "error")
    line = str(raised.value)
    check_line(line, raised.value.exit_status, 3)
    assert case.data_set or str(directory / "data") in line
    assert case.where in line
    if case.name and "are of no known form" not in line and "its columns are those of format=" not in line:
        assert re.search(rf"field '{case.name}\b", line), line
    if case.where and case.can_drop:
        train, test = load(case, directory, tokenizer, "drop")
        assert train.counts["dropped"] == {"malformed": 1} and train.counts["rows"] + test.counts["rows"] in (6, 7, 12)
        assert case.where in train.counts["first_bad_row"]
        assert f"1 malformed\n  the first malformed row: {train.counts['first_bad_row']}" in format_counts(train.counts)


@pytest.fixture(scope="module")
def tokenizer():
    return film_tokenizer()


@pytest.mark.parametrize("case", bad_configs(random.Random(1), 40), ids=lambda case: " ".join(case.overrides)[:60])
def test_bad_configs(case: BadConfig, program: Program) -> None:
    check_config(case, program)


def test_bad_data(tokenizer, tmp_path) -> None:
    for case in bad_data(random.Random(1), 60, large=False):
        check_data(case, tmp_path, tokenizer)


def rows_file(path: Path, *extra: str, count: int = 12) -> Path:
    rows = [json.dumps({"prompt": f"q{n}", "chosen": f"yes {n}", "rejected": f"no {n}"}) for n in range(count)]
    path.write_text("\n".join([*rows, *extra]) + "\n")
    return path


def test_bad_rows_end_the_run_or_are_dropped(program: Program) -> None:
    path = rows_file(program.directory / "rows.jsonl", '{"prompt": "q", "chosen": 3, "rejected": "b"}', "{broken")
    run = program(f"datasets=[{path}]", defaults=SMALL + QUICK)
    assert run.status == 3 and run.err == (
        f"error[DATA] {path} line 13: field 'chosen' is a number, not text; "
        "fix: correct this row or remove it; on_bad_row=drop leaves out such rows\n"
    )
    run = program.ok(f"datasets=[{path}]", "on_bad_row=drop")
    assert "dropped: 2 malformed\n" in run.out
    assert f"the first malformed row: {path} line 13: field 'chosen' is a number, not text\n" in run.out
    (program.directory / "none.jsonl").write_text('{"prompt": 3}\n')
    run = program(f"datasets=[{program.directory / 'none.jsonl'}]", "on_bad_row=drop")
    assert run.status == 3 and "dropped: 1 malformed; the first malformed row: " in run.err and "line 1" in run.err


def test_test_prompts_in_train_are_reported(program: Program) -> None:
    folder = program.directory / "data"
    folder.mkdir()
    rows_file(folder / "train.jsonl"), rows_file(folder / "test.jsonl", count=4)
    run = program.ok(f"datasets=[{folder}]", "n_examples=4")
    assert "warning: 4 of the 4 test prompts are train prompts too" in run.out
    assert "train prompts too" not in program.ok("n_examples=4").out


def test_a_pipe_is_refused_at_once(program: Program) -> None:
    os.mkfifo(program.directory / "pipe.jsonl")
    run = program(f"datasets=[{program.directory / 'pipe.jsonl'}]")
    check_line(run.err, run.status, 3)
    assert "is not a file" in run.err


def test_messages_escape_control_characters(program: Program) -> None:
    talk = {"conversations": [{"from": "\x1b[2J\u202e", "value": "q"}], "chosen": "a", "rejected": "b"}
    (program.directory / "rows.jsonl").write_text(json.dumps(talk) + "\n")
    run = program(f"datasets=[{program.directory / 'rows.jsonl'}]", "chat_template=hh")
    check_line(run.err, run.status, 3)
    assert "is '\\x1b[2J\\u202e', not one of" in run.err


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("damage", ["empty", "cut", "noise", "list", "removed"])
def test_a_damaged_model_directory(name: str, damage: str, tmp_path, saved_model: Path) -> None:
    directory = tmp_path / "model"
    shutil.copytree(saved_model, directory)
    path = directory / name
    data = path.read_bytes()
    path.write_bytes({"cut": data[: len(data) // 2], "noise": bytes(range(256)), "list": b"[1]"}.get(damage, b""))
    if damage == "removed":
        path.unlink()
    values = {"name_or_path": str(directory), "tokenizer_name_or_path": None, "architecture": None}
    settings = with_model(SETTINGS, **values)
    if name == "tokenizer_config.json" and damage == "removed":  # tokenizer.json suffices
        load_tokenizer(settings.model)
        return
    with pytest.raises(UserError) as raised:
        load_model(settings, load_tokenizer(settings.model), torch.float32, torch.device("cpu"))
    check_line(str(raised.value), raised.value.exit_status, 2)
    assert "model.name_or_path" in str(raised.value) or "model.tokenizer_name_or_path" in str(raised.value)


@pytest.fixture(scope="module")
def saved_model(tmp_path_factory, tokenizer) -> Path:
    from tests.models import tiny_model

    directory = tmp_path_factory.mktemp("model")
    tiny_model("llama", vocab_size=len(tokenizer), max_position_embeddings=1024).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.mark.slow
def test_two_thousand(program: Program, tokenizer, tmp_path) -> None:
    """Check 2,000 cases; one message lists all failures."""
    failed: list[str] = []
    kinds: Counter[str] = Counter()
    cases: list[BadConfig | BadData] = [*bad_configs(random.Random(5), 1000), *bad_data(random.Random(5), 1000)]
    for number, case in enumerate(cases):
        kinds[case.kind] += 1
        try:
            if isinstance(case, BadConfig):
                check_config(case, program)
            else:
                check_data(case, tmp_path, tokenizer)
        except Exception as error:
            detail = " ".join(f"{type(error).__name__}: {error}".split())[:600]  # an AssertionError, mostly
            failed.append(f"{number} {case.kind} {getattr(case, 'overrides', '')}: {detail}")
    for kind, count in sorted(kinds.items()):
        print(f"{count:5} {kind}")
    assert not failed, f"{len(failed)} of {len(cases)}:\n" + "\n".join(failed)
