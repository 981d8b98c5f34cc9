"""Benchmarks of lm-eval: names, results in a table and in the run, and errors on one line."""

import json
import math
import sys
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

import evaluate
from engine.data.chat_templates import JINJA

RESULTS = {
    "results": {
        "arc_easy": {"alias": "arc_easy", "acc,none": 0.25, "acc_stderr,none": 0.125, "sample_len": 8},
        "sums": {"alias": "sums", "exact_match,strict": 1.0, "exact_match_stderr,strict": "N/A", "ppl,none": math.nan},
    },
    "n-samples": {"arc_easy": {"original": 2000, "effective": 1000}},
    "versions": {"arc_easy": 1.0, "sums": "Yaml"},
    "n-shot": {"arc_easy": 0, "sums": 5},
}
ROWS = [
    {"task": "arc_easy", "metric": "acc", "value": 0.25, "standard_error": 0.125, "questions": 1000},
    {"task": "sums", "metric": "exact_match (strict)", "value": 1.0, "standard_error": None, "questions": None},
    {"task": "sums", "metric": "ppl", "value": None, "standard_error": None, "questions": None},
]
TABLE = """\
task      metric                 value   error  questions
arc_easy  acc                   0.2500  0.1250      1,000
sums      exact_match (strict)  1.0000       -          -
sums      ppl                        -       -          -
"""


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Run evaluate.py; returns (exit status, stdout, stderr)."""

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["evaluate.py", *arguments])
        capsys.readouterr()
        status = evaluate.main()
        return status, *capsys.readouterr()

    return run


@pytest.fixture
def lm_eval(monkeypatch: pytest.MonkeyPatch):
    """A fake lm-eval, as far as the command uses it; keeps the arguments of its calls."""
    calls = SimpleNamespace(evaluated=[], models=[], managers=[], error=None, during=lambda: None)

    def simple_evaluate(**arguments: Any) -> dict[str, Any]:
        calls.evaluated.append(arguments)
        if calls.error:
            raise calls.error
        calls.during()
        return RESULTS

    class TaskManager:
        def __init__(self, include_defaults: bool):
            calls.managers.append(include_defaults)
            self.all_tasks = ["arc_easy", "sums"] if include_defaults else []
            self.task_index = dict.fromkeys(self.all_tasks)

    def model(**arguments: Any) -> dict[str, Any]:
        calls.models.append(arguments)
        return arguments

    modules: dict[str, dict[str, Any]] = {
        "lm_eval": {"simple_evaluate": simple_evaluate},
        "lm_eval.tasks": {"TaskManager": TaskManager},
        "lm_eval.models": {},
        "lm_eval.models.huggingface": {"HFLM": model},
    }
    for name, contents in modules.items():
        module = ModuleType(name)
        module.__spec__ = ModuleSpec(name, None)
        module.__dict__.update(contents)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr("engine.export.benchmark_command.version", lambda name: "0.4.13")
    monkeypatch.setattr("engine.models.hub._is_unreachable", lambda: False)
    return calls


def test_results_are_a_table_and_a_file_of_the_run(lm_eval, command, sft_run: Path) -> None:
    target = sft_run / "benchmarks.json"
    target.unlink(missing_ok=True)
    arguments = (f"model={sft_run}", "tasks=[arc_easy,sums]", "num_fewshot=5", "limit=1000", "batch_size=3")
    for times in (1, 2):  # the results of both are kept
        assert command(*arguments) == (0, f"{TABLE}results: {target}\n", "")
        entries = json.loads(target.read_text())
        assert len(entries) == times and all(entry["results"] == ROWS for entry in entries)
    assert (entries[0]["model"], entries[0]["examples"]) == (str(sft_run / "step-16"), 16)
    assert entries[0]["options"]["limit"] == 1000 and entries[0]["task_versions"] == RESULTS["versions"]
    given = lm_eval.evaluated[0]
    assert (given["tasks"], given["num_fewshot"], given["limit"]) == (["arc_easy", "sums"], 5, 1000)
    assert lm_eval.models[0]["batch_size"] == 3 and not given["apply_chat_template"]
    assert not lm_eval.models[0]["pretrained"].training


def test_results_of_another_command_in_the_meantime_are_kept(lm_eval, command, sft_run: Path, tmp_path: Path) -> None:
    target = tmp_path / "results.json"
    lm_eval.during = lambda: target.write_text('["of another command"]')
    assert command(f"model={sft_run}", "tasks=arc_easy", f"to={target}")[0] == 0
    entries = json.loads(target.read_text())
    assert entries[0] == "of another command" and len(entries) == 2


def test_questions_are_written_by_the_template_of_the_run(lm_eval, command, sft_run: Path, tmp_path: Path) -> None:
    for template, expected in (((), "hh"), (("chat_template=chatml",), "chatml")):
        arguments = (f"model={sft_run}", "tasks=sums", "chat=true", f"to={tmp_path / 'x.json'}", *template)
        assert command(*arguments)[0] == 0
        assert lm_eval.models[-1]["tokenizer"].chat_template == JINJA[expected]
        assert lm_eval.evaluated[-1]["apply_chat_template"]
    assert len(json.loads((tmp_path / "x.json").read_text())) == 2


def test_lm_evals_own_tasks_are_read_only_where_one_is_named(lm_eval, command, sft_run: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text("task: mine\n")
    for tasks in (str(mine), f"[sums,{mine}]"):
        assert command(f"model={sft_run}", f"tasks={tasks}", f"to={tmp_path / 'x.json'}")[0] == 0
    assert lm_eval.managers == [False, True]


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (("tasks=arc_easi",), 2, "tasks: lm-eval has no arc_easi (did you mean arc_easy?)"),
        (("tasks=[x,sums,y]",), 2, "tasks: lm-eval has no x, y; fix: give names of"),
        (("tasks=absent.yaml",), 2, "tasks: absent.yaml does not exist"),
        (("tasks=sums", "to={}/notes.txt"), 2, "notes.txt is not JSON"),
        (("tasks=sums", "limit=0"), 2, "limit: must be"),
        (("model=./absent", "tasks=sums"), 4, "absent does not exist"),
    ],
)
def test_mistakes_are_told_before_the_benchmark(
    lm_eval, command, sft_run: Path, tmp_path: Path, arguments: tuple[str, ...], status: int, message: str
) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    given = [argument.format(tmp_path) for argument in arguments]
    found, out, err = command(*([] if given[0].startswith("model") else [f"model={sft_run}"]), *given)
    assert (found, out, err.count("\n")) == (status, "", 1) and message in err, err
    assert not lm_eval.evaluated and (tmp_path / "notes.txt").read_text() == "mine"


def test_an_error_of_a_task_is_one_line(lm_eval, command, sft_run: Path) -> None:
    lm_eval.error = ConnectionError("no data\nfor sums")
    status, out, err = command(f"model={sft_run}", "tasks=sums")
    assert (status, out) == (3, "")
    assert err.startswith(
        "error[DATA] tasks: lm-eval failed (ConnectionError: no data for sums); fix: correct the task"
    )


def test_a_missing_package_is_named(command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.export.benchmark_command.find_spec", lambda name: None)
    status, _, err = command("model=x", "tasks=sums")
    problem = "error[CONFIG] tasks: benchmarks need the package lm-eval"
    assert (status, err) == (2, f"{problem}; fix: pip install 'lm-eval[hf]==0.4.13'\n")


@pytest.mark.skipif(find_spec("lm_eval") is None, reason="lm-eval is not installed")
def test_lm_eval_runs_a_local_task(command, sft_run: Path, tmp_path: Path) -> None:
    questions = [{"question": f"{n}?", "choices": ["yes", "no"], "answer": 0} for n in range(4)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in questions))
    task = {
        "task": "mine",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": str(tmp_path / "rows.jsonl")},
        "test_split": "train",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc"}],
    }
    (tmp_path / "mine.yaml").write_text(json.dumps(task))  # JSON is YAML
    for chat in ("false", "true"):
        arguments = (f"tasks={tmp_path / 'mine.yaml'}", f"chat={chat}", f"to={tmp_path / 'x.json'}")
        status, out, err = command(f"model={sft_run}", *arguments)
        assert status == 0, err
        (row,) = json.loads((tmp_path / "x.json").read_text())[-1]["results"]
        assert (row["task"], row["metric"], row["questions"]) == ("mine", "acc", 4) and 0 <= row["value"] <= 1
        assert f"mine  acc     {row['value']:.4f}" in out
