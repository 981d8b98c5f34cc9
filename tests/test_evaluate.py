"""evaluate.py: scores in order, those of training, continued after a stop; its errors."""

import errno
import fcntl
import functools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from transformers import AutoTokenizer

import evaluate
from engine.data.chat import Chat
from engine.data.examples import tokenize
from engine.data.files import load_file
from engine.data.rows import RowCounts
from engine.export import score_command, scoring
from engine.export.reward_bench import SECTION_WEIGHTS, ties_score
from engine.export.rows_to_score import RowReader
from engine.export.saved_models import load_saved
from engine.export.scoring import RowScores, Scorer
from engine.step.heads import run_head
from engine.step.layout import lay_out
from losses import BatchKind
from tests.runs import REWARD, Program
from utils import Progress

Evaluate = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run_evaluate(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Evaluate:
    """Run evaluate.py; returns (exit status, stdout, stderr)."""

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["evaluate.py", *arguments])
        capsys.readouterr()
        status = evaluate.main()
        return status, *capsys.readouterr()

    return run


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


PAIRS = [
    {"prompt": f"\n\nHuman: Is {n} good?\n\nAssistant:", "chosen": f" Yes, {n}.", "rejected": " No."} for n in range(9)
]


def test_scores_are_those_of_the_run(
    run_evaluate: Evaluate, reward_run: Path, tmp_path: Path, program: Program
) -> None:
    """Of the evaluation at its end: accuracy, mean and deviation of the same rows."""
    data = write(tmp_path / "rows.jsonl", PAIRS)
    trained = program.ok(
        *REWARD, f"datasets={data}", "test_fraction=0.4", "n_examples=4", f"model.archive={reward_run}"
    )
    for layout in ("packed", "padded"):
        target = tmp_path / f"{layout}.jsonl"
        status, out, err = run_evaluate(f"model={trained.dir}", f"data={data}", f"to={target}", f"batching={layout}")
        assert status == 0, err
        rows = read(target)
        assert [row["row"] for row in rows] == list(range(9)) and all(len(row["scores"]) == 2 for row in rows)
        assert [row["accuracy"] for row in rows] == [float(a > b) for a, b in (row["scores"] for row in rows)]
        accuracy = sum(row["accuracy"] for row in rows) / 9
        assert f"  all rows {9:>34}  {accuracy:.4f}" in out
    packed, padded = (read(tmp_path / f"{layout}.jsonl") for layout in ("packed", "padded"))
    for one, other in zip(packed, padded, strict=True):
        assert one["scores"] == pytest.approx(other["scores"], abs=1e-5)
    mean = trained.evals[-1]["rewards_eval/mean"]  # of four of the rows
    scores = torch.tensor([row["scores"] for row in packed])
    means = [scores[list(rows)].mean().item() for rows in combinations(range(9), 4)]
    assert any(math.isclose(mean, each, abs_tol=1e-5) for each in means)


def test_every_form_is_scored_in_order(run_evaluate: Evaluate, reward_run: Path, tmp_path: Path) -> None:
    prompt = "\n\nHuman: Is it good?\n\nAssistant:"
    user = {"role": "user", "content": "Is it good?"}
    texts = [" Yes.", " No."]
    answers = [{"role": "assistant", "content": text.strip()} for text in texts]
    forms: dict[str, dict[str, Any]] = {
        "strings": {"prompt": prompt, "chosen": texts[0], "rejected": texts[1]},
        "transcripts": {"chosen": prompt + texts[0], "rejected": prompt + texts[1]},
        "messages": {"chosen": [user, answers[0]], "rejected": [user, answers[1]]},
        "ranked": {"prompt": prompt, "responses": texts, "scores": [2, 1]},
        "sharegpt": {"conversations": [user], "chosen": answers[0], "rejected": answers[1]},
        "completion": {"prompt": prompt, "completion": texts[0]},
        "alpaca": {"instruction": "Is it good?", "output": "Yes."},
        "lists": {"prompt": prompt, "chosen": texts[:1], "rejected": texts[1:]},
    }
    found, outputs = {}, {}
    for form, row in forms.items():
        data, target = write(tmp_path / f"{form}.jsonl", [row]), tmp_path / f"{form}.out"
        status, outputs[form], err = run_evaluate(f"model={reward_run}", f"data={data}", f"to={target}")
        assert status == 0, (form, err)
        (found[form],) = read(target)
    first = found["strings"]["scores"]
    assert first[0] != first[1]
    for form, line in found.items():
        assert line["scores"] == pytest.approx(first[: len(line["scores"])], abs=1e-5), form
        assert ("accuracy" in line) == (form not in ("completion", "alpaca"))
        assert ("no row has a preference" in outputs[form]) == (form in ("completion", "alpaca"))


class Stopped:
    """A Scorer.score_rows that ends the command after a number of batches."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, batch_size: int = 2):
        self.num_rows, self.num_left, self.end = 0, -1, lambda: None
        self._plain = Scorer.score_rows
        monkeypatch.setattr(score_command, "ROWS_PER_BATCH", batch_size)
        monkeypatch.setattr(Scorer, "score_rows", lambda scorer, rows: self._score(scorer, rows))

    def after(self, num_batches: int, end: Callable[[], None]) -> None:
        self.num_rows, self.num_left, self.end = 0, num_batches, end

    def _score(self, scorer: Scorer, rows: Any) -> list[RowScores]:
        if self.num_left == 0:
            self.num_left = -1
            self.end()
        self.num_left -= 1
        self.num_rows += len(rows)
        return self._plain(scorer, rows)


def interrupt() -> None:
    raise KeyboardInterrupt


def test_a_stopped_command_continues(
    run_evaluate: Evaluate, reward_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the same bytes, after SIGINT, SIGTERM, a full disk and a truncated line."""
    data = write(tmp_path / "rows.jsonl", PAIRS)
    stopped = Stopped(monkeypatch)
    arguments = (f"model={reward_run}", f"data={data}")
    assert run_evaluate(*arguments, f"to={tmp_path}/whole.jsonl")[0] == 0
    target, partial = tmp_path / "part.jsonl", tmp_path / ".part.jsonl.partial"
    for number in (signal.SIGINT, signal.SIGTERM):
        stopped.after(1, functools.partial(os.kill, os.getpid(), number))
        with pytest.raises(SystemExit) as ended:
            run_evaluate(*arguments, f"to={target}")
        assert ended.value.code == 128 + number and not target.exists()
    assert len(partial.read_text().splitlines()) == 1 + 4
    stopped.after(1, full_disk)
    status, _, err = run_evaluate(*arguments, f"to={target}")
    assert status == 6 and "error[STORAGE]" in err and "6 rows are scored; repeat the command to continue" in err
    with open(partial, "a") as file:  # killed between two batches, and in a line
        file.write('{"row": 6, "scores": [0.0, 0.0]}\n{"row": 7, "sco')
    stopped.after(-1, interrupt)
    status, out, err = run_evaluate(*arguments, f"to={target}")
    assert status == 0, err
    assert "continuing after 6 rows" in out and stopped.num_rows == 3
    assert target.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {"rows.jsonl", "whole.jsonl", "part.jsonl"}


def full_disk() -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_partial_file_of_something_else_is_refused(
    run_evaluate: Evaluate, reward_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write(tmp_path / "rows.jsonl", PAIRS)
    model = tmp_path / "model"
    shutil.copytree((reward_run / "LATEST").resolve(), model)
    stopped = Stopped(monkeypatch)
    arguments = (f"model={model}", f"data={data}", f"to={tmp_path}/out.jsonl")
    stopped.after(1, interrupt)
    assert run_evaluate(*arguments)[0] == 130
    partial = tmp_path / ".out.jsonl.partial"
    whole = partial.read_bytes()

    status, _, err = run_evaluate(*arguments, "normalize=true")
    assert status == 2 and "is damaged, or of another model, other data or other options" in err
    header, *lines = whole.splitlines(keepends=True)
    for damaged in (b"\x00\xff\n" + whole, header + b"\xff\n", header + b"3\n", header + lines[1], b"[]\n"):
        partial.write_bytes(damaged)
        status, _, err = run_evaluate(*arguments)
        assert (status, err.count("error[CONFIG] to: "), err.count("\n")) == (2, 1, 1), damaged
        assert partial.read_bytes() == damaged
    partial.write_bytes(whole)
    os.utime(model / "config.json", (1, 1))
    assert run_evaluate(*arguments)[0] == 2  # another model
    for empty in (b"", header[:9]):
        partial.write_bytes(empty)
        assert run_evaluate(*arguments)[0] == 0
        (tmp_path / "out.jsonl").unlink()
    write(data, PAIRS[:8])
    partial.write_bytes(whole)
    assert run_evaluate(*arguments)[0] == 2  # other data
    partial.unlink()

    with open(partial, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        status, _, err = run_evaluate(*arguments)
    assert status == 2 and "another command writes" in err


def test_a_changed_template_continues_nothing(
    run_evaluate: Evaluate, reward_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, template = write(tmp_path / "rows.jsonl", PAIRS), tmp_path / "template.jinja"
    template.write_text("{% for message in messages %}{{ message['content'] }}{% endfor %}")
    arguments = (f"model={reward_run}", f"data={data}", f"to={tmp_path}/out.jsonl", f"chat_template={template}")
    stopped = Stopped(monkeypatch)
    stopped.after(1, interrupt)
    assert run_evaluate(*arguments)[0] == 130
    text = template.read_text()
    template.write_text(text + "!")
    assert run_evaluate(*arguments)[0] == 2
    template.write_text(text)
    assert run_evaluate(*arguments)[0] == 0


def test_a_changed_base_continues_nothing(
    run_evaluate: Evaluate, program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of an adapter, which keeps it in a folder of its own."""
    run = program.ok(*REWARD, "peft=lora", "peft.rank=2")
    stopped = Stopped(monkeypatch)
    data = write(tmp_path / "rows.jsonl", PAIRS)
    arguments = (f"model={run.dir}", f"data={data}", f"to={tmp_path}/out.jsonl")
    stopped.after(1, interrupt)
    assert run_evaluate(*arguments)[0] == 130
    os.utime(run.dir / "base" / "model.safetensors", (1, 1))
    status, _, err = run_evaluate(*arguments)
    assert status == 2 and "of another model" in err
    (tmp_path / ".out.jsonl.partial").unlink()
    assert run_evaluate(*arguments)[0] == 0


def test_progress_is_printed(
    run_evaluate: Evaluate, reward_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write(tmp_path / "rows.jsonl", PAIRS)
    monkeypatch.setattr(score_command, "ROWS_PER_BATCH", 4)
    monkeypatch.setattr(Progress, "INTERVAL", 0.0)
    out = run_evaluate(f"model={reward_run}", f"data={data}", f"to={tmp_path}/lines")[1]
    assert "scoring: 4 of 9 rows, " in out and "scoring: 9 of 9 rows, 0 s left" in out
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    err = run_evaluate(f"model={reward_run}", f"data={data}", f"to={tmp_path}/bar")[2]
    assert "scoring: 100%" in err and "9/9" in err


def test_scores_are_independent_of_the_batch(
    run_evaluate: Evaluate, reward_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write(
        tmp_path / "rows.jsonl", [row | {"prompt": row["prompt"] * (1 + n % 3)} for n, row in enumerate(PAIRS)]
    )
    found = []
    for batch_size, budget in ((64, 4096), (1, 4096), (4, 200), (9, 1)):
        monkeypatch.setattr(score_command, "ROWS_PER_BATCH", batch_size)
        monkeypatch.setitem(scoring.TOKEN_BUDGET, "cpu", budget)
        target = tmp_path / f"{batch_size}.jsonl"
        assert run_evaluate(f"model={reward_run}", f"data={data}", f"to={target}")[0] == 0
        found.append(torch.tensor([row["scores"] for row in read(target)]))
    for scores in found[1:]:
        torch.testing.assert_close(scores, found[0], rtol=1e-5, atol=1e-6)


def test_normalised_scores(run_evaluate: Evaluate, reward_run: Path, tmp_path: Path) -> None:
    data = write(tmp_path / "rows.jsonl", PAIRS)
    config = json.loads((reward_run / "LATEST" / "config.json").read_text())
    plain, normal = tmp_path / "plain.jsonl", tmp_path / "normal.jsonl"
    assert run_evaluate(f"model={reward_run}", f"data={data}", f"to={plain}")[0] == 0
    assert run_evaluate(f"model={reward_run}", f"data={data}", f"to={normal}", "normalize=true")[0] == 0
    for row, other in zip(read(plain), read(normal), strict=True):
        expected = [(score - config["reward_mean"]) / config["reward_std"] for score in row["scores"]]
        assert other["scores"] == pytest.approx(expected, abs=1e-5)


def test_normalisation_comes_from_the_config(run_evaluate: Evaluate, reward_run: Path, tmp_path: Path) -> None:
    """Of a model without a run; an error names a config without usable numbers."""
    model = tmp_path / "model"
    shutil.copytree((reward_run / "LATEST").resolve(), model)
    (model / "training_state.json").unlink()
    config = json.loads((model / "config.json").read_text())
    data = write(tmp_path / "rows.jsonl", PAIRS)

    def normal(**changed: Any) -> tuple[int, str]:
        (model / "config.json").write_text(json.dumps(config | changed))
        keys = ("normalize=true", f"to={tmp_path}/{len(list(tmp_path.iterdir()))}.jsonl")
        status, _, err = run_evaluate(f"model={model}", f"data={data}", *keys)
        return status, err

    assert normal()[0] == 0
    scores = [score for row in read(tmp_path / "2.jsonl") for score in row["scores"]]
    assert normal(reward_mean=config["reward_mean"] + config["reward_std"])[0] == 0
    shifted = [score for row in read(tmp_path / "3.jsonl") for score in row["scores"]]
    assert shifted == pytest.approx([score - 1 for score in scores], abs=1e-6)
    for changed in ({"reward_mean": None}, {"reward_std": None}, {"reward_mean": "0.5"}):
        status, err = normal(**changed)
        assert status == 2 and "has no reward_mean and reward_std; fix: give a checkpoint saved after" in err
    status, err = normal(reward_std=0.0)
    assert status == 2 and "cannot be divided by it" in err


def test_wrong_models_and_files(run_evaluate: Evaluate, sft_run: Path, reward_run: Path, tmp_path: Path) -> None:
    data = write(tmp_path / "rows.jsonl", PAIRS)
    status, _, err = run_evaluate(f"model={sft_run}", f"data={data}", f"to={tmp_path}/out")
    assert status == 2 and "is a model of text, not a reward model" in err
    assert run_evaluate(f"model={reward_run}", f"data={tmp_path}/none.jsonl", f"to={tmp_path}/out")[0] == 3
    assert run_evaluate(f"model={reward_run}", f"data={data}", f"to={data}")[0] == 2
    assert run_evaluate("help")[0] == 2
    bad = write(tmp_path / "bad.jsonl", [*PAIRS[:2], {"prompt": "x", "chosen": 3, "rejected": "y"}])
    status, _, err = run_evaluate(f"model={reward_run}", f"data={bad}", f"to={tmp_path}/out")
    assert status == 3 and "bad.jsonl line 3: field 'chosen' is a number, not text" in err


@pytest.mark.parametrize(
    ("keys", "status", "problem"),
    [
        (["to=/proc/none/out"], 6, "error[STORAGE] to: /proc/none/out cannot be written (No such file or directory)"),
        (["to=/proc/out"], 6, "error[STORAGE] to: /proc/out cannot be written"),
        (["to=FILE/out"], 6, "/file is not a folder)"),
        (["max_length=100000"], 2, "error[CONFIG] max_length: 100000 is more than the 1024 positions of the model"),
        (["max_length=64"], 2, "max_prompt_length: 256 is not below max_length (64)"),
        (["max_length=0"], 2, "max_length: "),
        (["data=missing.jsonl"], 3, "error[DATA] data: missing.jsonl is not a file"),
        (["data=FOLDER"], 3, "is not a file"),
        (["data=EMPTY"], 3, "has no rows"),
        (["data=BLANK"], 3, "has no rows"),
        (["data=BINARY"], 3, "line 1 is not UTF-8"),
        (["data=BINARY", "on_bad_row=drop"], 3, "no row of "),
        (["data=UNKNOWN"], 3, "unknown kind of file"),
        (["data=TABLE"], 3, "cannot be read"),
        (["model=missing/"], 4, "error[CHECKPOINT]"),
        (["model=FOLDER"], 4, "contains no model"),
        (["on_bad_row=keep"], 2, "on_bad_row"),
    ],
)
def test_every_error_is_one_line(
    keys: list[str], status: int, problem: str, run_evaluate: Evaluate, reward_run: Path, tmp_path: Path
) -> None:
    (tmp_path / "folder").mkdir()
    files = {"EMPTY": ("empty.jsonl", b""), "BLANK": ("blank.jsonl", b"\n\n"), "BINARY": ("bin.jsonl", b"\x89\xff\n"),
             "UNKNOWN": ("rows.bin", b"\x00"), "TABLE": ("rows.parquet", b"PAR1"), "FILE": ("file", b"")}  # fmt: skip
    for name, content in files.values():
        (tmp_path / name).write_bytes(content)
    places = {**{key: tmp_path / name for key, (name, _) in files.items()}, "FOLDER": tmp_path / "folder"}
    data = write(tmp_path / "rows.jsonl", PAIRS)
    arguments = {"model": str(reward_run), "data": str(data), "to": str(tmp_path / "out.jsonl")}
    for key in keys:
        name, _, value = key.partition("=")
        for place, path in places.items():
            value = value.replace(place, str(path))
        arguments[name] = value
    found, _, err = run_evaluate(*(f"{name}={value}" for name, value in arguments.items()))
    assert found == status and problem in err, err
    assert err.startswith("error[") and "; fix: " in err and err.count("\n") == 1
    assert not [path for path in tmp_path.iterdir() if path.name.startswith((".", "out"))]


def test_malformed_rows_are_dropped_and_counted(run_evaluate: Evaluate, reward_run: Path, tmp_path: Path) -> None:
    data = tmp_path / "rows.jsonl"
    bad = ['{"prompt": "x", "chosen": 3, "rejected": "y"}', "{broken", json.dumps(PAIRS[1]), "[1]"]
    data.write_text("\n".join([json.dumps(PAIRS[0]), *bad]) + "\n")
    arguments = (f"model={reward_run}", f"data={data}", f"to={tmp_path}/out.jsonl")
    status, out, err = run_evaluate(*arguments)
    assert status == 3 and "rows.jsonl line 2: field 'chosen' is a number, not text" in err
    assert "on_bad_row=drop leaves out such rows" in err
    status, out, err = run_evaluate(*arguments, "on_bad_row=drop")
    assert status == 0, err
    rows = read(tmp_path / "out.jsonl")
    assert [row["row"] for row in rows] == [0, 1, 2, 3, 4]
    assert ["scores" in row for row in rows] == [True, False, False, True, False]
    assert rows[2]["dropped"].startswith(f"{data} line 3 is not JSON")
    assert "2 rows scored, 3 dropped" in out and "dropped: 3 malformed; the first malformed row: " in out


def test_a_score_that_is_not_a_number(
    run_evaluate: Evaluate, reward_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write(tmp_path / "rows.jsonl", PAIRS)
    plain = Scorer.score_rows

    def score(self: Scorer, rows: Any) -> list[RowScores]:
        first, second, *others = plain(self, rows)
        return [first, second._replace(scores=[0.0, math.inf]), *others]

    monkeypatch.setattr(Scorer, "score_rows", score)
    status, _, err = run_evaluate(f"model={reward_run}", f"data={data}", f"to={tmp_path}/out.jsonl")
    assert status == 5 and "a score of row 1 is NaN or Inf" in err


# ---- The same tokens and scores as in training ----


MAX_LENGTH, MAX_PROMPT_LENGTH = 160, 100
LONG = "and so on " * 60
QUESTIONS = [f"{LONG * (n % 2)}Is {n} good?" for n in range(6)]  # three too long
ANSWERS = [f" Yes, {n}.{LONG * (n == 3)}" for n in range(6)]


def hh(question: str) -> str:
    return f"\n\nHuman: {question}\n\nAssistant:"


# By batch kind of training and form: a row of a question and its best response, with the end-of-text token.
ROWS: dict[tuple[BatchKind, str], Callable[[str, str, str], dict[str, Any]]] = {
    ("ranked", "strings"): lambda question, answer, end: {
        "prompt": hh(question), "chosen": answer, "rejected": f" No.{end}",
    },
    ("ranked", "ranked"): lambda question, answer, end: {
        "prompt": hh(question), "responses": [answer, " No.", f" {end}?"],
    },
    ("ranked", "messages"): lambda question, answer, end: {
        "prompt": [{"role": "user", "content": question + end}],
        "chosen": [{"role": "assistant", "content": answer + end}],
        "rejected": [{"role": "assistant", "content": "No."}],
    },
    ("unpaired", "unpaired"): lambda question, answer, end: {
        "prompt": hh(question), "completion": answer, "label": True,
    },
    ("sft", "alpaca"): lambda question, answer, end: {"instruction": question, "output": answer},
}  # fmt: skip


@pytest.mark.parametrize("template", ["hh", "chatml"])
@pytest.mark.parametrize(("batch", "form"), list(ROWS))
def test_tokens_and_scores_are_those_of_training(
    batch: BatchKind, form: str, template: str, run_evaluate: Evaluate, reward_run: Path, tmp_path: Path
) -> None:
    saved = load_saved(str(reward_run))
    tokenizer = saved.tokenizer
    row = ROWS[batch, form]
    data = write(
        tmp_path / "rows.jsonl", [row(*texts, tokenizer.eos_token) for texts in zip(QUESTIONS, ANSWERS, strict=True)]
    )
    preferences = load_file(data, "train", RowCounts(), tokenizer, chat_template=template, test_fraction=0, batch=batch)
    split = tokenize(
        [(preferences, "keep_end")],
        tokenizer,
        batch,
        RowCounts(),
        max_length=MAX_LENGTH,
        max_prompt_length=MAX_PROMPT_LENGTH,
        cache_dir=tmp_path,
    )
    model = saved.model.eval()
    scorer = Scorer(model, tokenizer, layout="padded", max_length=MAX_LENGTH, max_prompt_length=MAX_PROMPT_LENGTH)
    reader = RowReader(data, None, Chat(tokenizer, template, "last"))
    found = scorer.examples([each.parsed for each in reader if not isinstance(each.parsed, str)])
    for example, (of_row, _, _) in zip(split.examples, found, strict=True):
        assert np.array_equal(example.prompt, of_row.prompt)
        assert len(example.responses) == len(of_row.responses)
        assert all(map(np.array_equal, example.responses, of_row.responses))

    keys = [f"chat_template={template}", f"max_length={MAX_LENGTH}", f"max_prompt_length={MAX_PROMPT_LENGTH}"]
    status, out, err = run_evaluate(f"model={reward_run}", f"data={data}", f"to={tmp_path}/out", *keys)
    assert status == 0, err
    lines = read(tmp_path / "out")
    model.double()
    exact = scorer.score_rows([each.parsed for each in reader if not isinstance(each.parsed, str)])
    for example, line, scores in zip(split.examples, lines, exact, strict=True):
        with torch.no_grad():
            expected = run_head(model, lay_out([example], "padded", feeds_last_token=True))[1].tolist()
        assert scores.scores == pytest.approx(expected, abs=1e-10)
        assert line["scores"] == pytest.approx(expected, rel=1e-5, abs=1e-6)
    assert [n for n, line in enumerate(lines) if "prompt_is_truncated" in line] == [1, 3, 5]
    assert [line.get("truncated_responses") for line in lines] == [None, None, None, [0], None, None]
    assert "truncated to max_length=160: 3 prompts, 1 responses" in out


# ---- Chat templates ----


def test_rows_of_reward_bench_are_messages(run_evaluate: Evaluate, reward_run: Path, tmp_path: Path) -> None:
    """By the chat template; format=strings leaves them as they are, and a line says which."""
    prompt, texts = "Is it good?", ["Yes.", "No."]
    pair = {"prompt": prompt, "chosen": texts[0], "rejected": texts[1], "subset": "hep-go"}
    lists = {"prompt": prompt, "chosen": texts[:1], "rejected": texts[1:], "subset": "Math"}
    user = {"role": "user", "content": prompt}
    answers = [{"role": "assistant", "content": text} for text in texts]
    messages = {"prompt": [user], "chosen": answers[:1], "rejected": answers[1:]}
    own = {**pair, "subset": "mine"}

    def scores(row: dict[str, Any], *keys: str) -> tuple[list[float], str]:
        target = tmp_path / "out.jsonl"
        target.unlink(missing_ok=True)
        data = write(tmp_path / "rows.jsonl", [row])
        status, out, err = run_evaluate(f"model={reward_run}", f"data={data}", f"to={target}", *keys)
        assert status == 0, err
        (line,) = read(target)
        return line["scores"], out

    for template in ([], ["chat_template=chatml"]):  # the run's is hh
        expected, out = scores(messages, *template)
        assert "note" not in out
        for row in (pair, lists):
            found, out = scores(row, *template)
            assert found == pytest.approx(expected, abs=1e-6)
            assert "note: rows of RewardBench (1) are written by the chat template (format=strings" in out
            plain, out = scores(row, *template, "format=strings")
            assert plain != pytest.approx(expected, abs=1e-6)
            assert "note: 1 of 1 rows of " in out and "plain text, scored as they are, without the chat template" in out
        found, out = scores(own, *template)
        assert found == plain and "are plain text, scored as they are, without the chat template" in out
        assert scores(own, *template, "format=messages")[0] == pytest.approx(expected, abs=1e-6)
        written = {**own, "prompt": hh(prompt), "chosen": " Yes.", "rejected": " No."}
        assert ("scored as they are" in scores(written, *template)[1]) == (template != [])  # the run's is hh


def test_rows_of_reward_bench_without_a_template(run_evaluate: Evaluate, reward_run: Path, tmp_path: Path) -> None:
    """A model without a run or a template of its own scores plain text, and a line says so."""
    model = tmp_path / "model"
    shutil.copytree((reward_run / "LATEST").resolve(), model)
    (model / "training_state.json").unlink()
    assert not AutoTokenizer.from_pretrained(model).chat_template
    data = write(tmp_path / "rows.jsonl", [{"prompt": "Q", "chosen": "A", "rejected": "B", "subset": "hep-go"}])
    status, out, err = run_evaluate(f"model={model}", f"data={data}", f"to={tmp_path}/out.jsonl")
    assert status == 0, err
    assert "note: rows of RewardBench (1) are scored as plain text, as the tokenizer has no chat template" in out


def test_files_of_both_benchmarks(run_evaluate: Evaluate, reward_run: Path, tmp_path: Path) -> None:
    """Parquet in their published form; the printed scores are those of the lines, by hand."""
    columns = {"chosen_model": "human", "rejected_model": "model", "id": 0}
    pairs = [
        {"prompt": f"Q{n}", "chosen": "AB"[n % 2], "rejected": "BA"[n % 2], "subset": subset, **columns}
        for n, subset in enumerate(name for weights in SECTION_WEIGHTS.values() for name in weights)
    ]
    subsets = ["Factuality", "Precise IF", "Math", "Safety", "Focus"]
    lists = [
        {"id": str(n), "prompt": f"Q{n}", "chosen": [f"A{n}"], "rejected": [f"{c}{n}" for c in "BCD"], "subset": subset}
        for n, subset in enumerate(subsets)
    ]
    ties = {"prompt": "Name a film", "rejected": ["3", "7"], "subset": "Ties"}
    lists += [{"id": "ref:1", "chosen": ["Alien"], **ties}, {"id": "tied:1", "chosen": ["Alien", "Heat"], **ties}]

    def printed(rows: list[dict[str, Any]], name: str) -> tuple[dict[str, str], list[dict[str, Any]]]:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / f"{name}.parquet")
        target = tmp_path / f"{name}.jsonl"
        status, out, err = run_evaluate(f"model={reward_run}", f"data={tmp_path}/{name}.parquet", f"to={target}")
        assert status == 0, err
        assert f"note: rows of RewardBench ({len(rows)}) are written by the chat template" in out
        words = (line.rsplit(maxsplit=2) for line in out.splitlines() if line.startswith("  "))
        return {line[0].strip(): line[-1] for line in words}, read(target)

    found, lines = printed(pairs, "first")
    right = {line["subset"]: float(line["scores"][0] > line["scores"][1]) for line in lines}
    sections = []
    for section, weights in SECTION_WEIGHTS.items():
        sections.append(sum(right[name] * weight for name, weight in weights.items()) / sum(weights.values()))
        assert found[section] == f"{sections[-1]:.4f}"
    assert found["RewardBench"] == f"{sum(sections) / 4:.4f}" and 0 < sum(sections) < 4

    found, lines = printed(lists, "second")
    assert [line["num_chosen"] for line in lines] == [1, 1, 1, 1, 1, 1, 2]
    best = [float(line["scores"][0] > max(line["scores"][1:])) for line in lines[:5]]
    assert [found[subset] for subset in subsets] == [f"{score:.4f}" for score in best]
    score = ties_score(lines[5:])
    assert score is not None and found["RewardBench 2"] == f"{(sum(best) + score) / 6:.4f}"


@pytest.mark.parametrize("command", ["evaluate.py", "compare.py"])
def test_help_in_a_pipe_that_ends_early(command: str) -> None:
    """As in `evaluate.py --help | head -1`."""
    read_end, write_end = os.pipe()
    os.close(read_end)
    with open(write_end, "w") as closed:
        run = subprocess.run(
            [sys.executable, Path(evaluate.__file__).with_name(command), "--help"],
            stdout=closed,
            stderr=subprocess.PIPE,
            text=True,
        )
    assert (run.returncode, run.stderr) == (0, "")
