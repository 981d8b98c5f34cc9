"""What export.py reads of a run: damaged files are named, and no file named by its config is opened."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from engine.export.run_record import read_run
from tests.runs import QUICK


def copy_run(sft_run: Path, target: Path) -> Path:
    return Path(shutil.copytree(sft_run, target, symlinks=True))


def test_a_metrics_row_cut_short_by_a_kill_is_skipped(sft_run, tmp_path, run_export):
    run = copy_run(sft_run, tmp_path / "run")
    before = read_run(run / "LATEST", lambda names: None)
    with open(run / "metrics.jsonl", "ab") as file:
        file.write(b'{"loss/eval": 1.0, "counters/exam\xc3')
    assert run_export(f"from={run}", f"to={tmp_path}/x")[0] == 0
    after = read_run(run / "LATEST", lambda names: None)
    assert before.metrics and after.metrics == before.metrics


DEEP = "[" * 100_000
DAMAGED = [
    ("config.yaml", "a: [", "config.yaml cannot be read"),
    ("config.yaml", "\x00", "config.yaml cannot be read"),
    ("config.yaml", "[a]", "valid dictionary"),
    ("config.yaml", "datasets: 3", "(datasets.list[str]: "),
    ("config.yaml", "model: x", "(model: "),
    ("config.yaml", "model: {archive: [1]}", "(model.archive: "),
    ("config.yaml", "loss: {name: {}}", "(loss.name: "),
    ("config.yaml", DEEP, "nested too deeply"),
    ("metrics.jsonl", "x\n", "metrics.jsonl: line 1 cannot be read"),
    ("metrics.jsonl", "[]\n", "line 1 cannot be read"),
    ("metrics.jsonl", '{"counters/examples": 8, "loss/eval": "high"}\n', "(loss/eval: "),
    ("metrics.jsonl", '{"loss/eval": 1.0}\n', "(counters/examples: "),
    ("metrics.jsonl", DEEP + "\n", "nested too deeply"),
]


@pytest.mark.parametrize(("name", "text", "problem"), DAMAGED)
def test_a_damaged_file_of_a_run_is_named(sft_run, tmp_path, run_export, name, text, problem):
    run = copy_run(sft_run, tmp_path / "run")
    (run / name).write_text(text)
    status, _, err = run_export(f"from={run}", f"to={tmp_path}/x")
    assert (status, err.count("\n")) == (4, 1), err
    assert err.startswith("error[CHECKPOINT] ") and problem in err and "; fix: " in err


@pytest.mark.parametrize("text", ["{", "[]", "null", '{"base_model_name_or_path": 3}', "\xff", DEEP])
def test_a_damaged_adapter_config_is_named(tmp_path, run_export, text):
    (tmp_path / "adapter_config.json").write_text(text, encoding="latin-1")
    status, _, err = run_export(f"from={tmp_path}", f"to={tmp_path}/x")
    assert (status, err.count("\n")) == (4, 1), err
    assert "adapter_config.json cannot be read" in err


@pytest.mark.parametrize("named", ["/etc/passwd", "/dev/zero", "gone.jinja"])
def test_no_file_named_by_a_runs_config_is_opened(sft_run, tmp_path, run_export, named):
    run = copy_run(sft_run, tmp_path / "run")
    config = yaml.safe_load((run / "config.yaml").read_text())
    (run / "config.yaml").write_text(yaml.safe_dump(config | {"chat_template": named}))
    status, _, err = run_export(f"from={run}", f"to={tmp_path}/x")
    assert (status, err.count("\n")) == (2, 1)
    assert f"chat_template: the run did not record the text of {named}; fix: give chat_template=FILE" in err
    assert not (tmp_path / "x").exists()
    assert run_export(f"from={run}", f"to={tmp_path}/x", "chat_template=hh")[0] == 0


def test_a_run_records_the_text_of_its_chat_template(tmp_path, run_export, program):
    rows = [{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": c}]} for c in "abcdefgh"]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = "{% for message in messages %}[{{ message['content'] }}]{% endfor %}"
    (tmp_path / "mine.jinja").write_text(text)
    run = program.ok(
        "loss=sft", f"datasets=[{tmp_path}/x.jsonl]", f"chat_template={tmp_path}/mine.jinja", "test_fraction=0"
    ).dir
    (tmp_path / "mine.jinja").write_text("changed {{ messages }}")
    assert run_export(f"from={run}", f"to={tmp_path}/to")[0] == 0
    assert AutoTokenizer.from_pretrained(tmp_path / "to").chat_template == text


def test_data_sets_of_the_environment_stay_unread(sft_run, tmp_path, run_export):
    run = copy_run(sft_run, tmp_path / "run")
    config = yaml.safe_load((run / "config.yaml").read_text())
    (run / "config.yaml").write_text(yaml.safe_dump(config | {"datasets": "${oc.decode:${oc.env:DATA}}"}))
    assert run_export(f"from={run}", f"to={tmp_path}/x")[0] == 0
    assert "- Data: \n" in (tmp_path / "x" / "README.md").read_text()


class Harmful:
    """Unpickling it would call a function."""

    def __reduce__(self):
        return os.getcwd, ()


def test_malicious_weights_are_refused_without_the_advice_to_load_them(sft_run, tmp_path, run_export, program):
    model = Path(shutil.copytree((sft_run / "LATEST").resolve(), tmp_path / "model"))
    for name in ("manifest.json", "training_state.json", "model.safetensors"):
        (model / name).unlink()
    torch.save({"weight": Harmful()}, model / "pytorch_model.bin")
    trained = program("loss=sft", "model=blank_model", f"model.name_or_path={model}", defaults=QUICK)
    status, _, err = run_export(f"from={model}", f"to={tmp_path}/x")
    assert (trained.status, status) == (2, 4)
    for line in (trained.err, err):
        assert "holds more than plain tensors; loading it could run code" in line and "weights_only" not in line


@pytest.mark.parametrize(("to", "kind"), [("x.gguf", "hf"), ("x.GGUF", "policy_pt"), ("x.pt", "gguf")])
def test_a_file_of_another_format_is_refused(sft_run, tmp_path, run_export, to, kind):
    status, _, err = run_export(f"from={sft_run}", f"to={tmp_path}/{to}", f"format={kind}")
    assert status == 2 and f"to: {to} is no name for format={kind}; fix: add format=" in err


def test_an_index_of_shards_names_files_beside_it_only(sft_run, tmp_path, run_export, program):
    model = Path(shutil.copytree((sft_run / "LATEST").resolve(), tmp_path / "model"))
    os.rename(model / "model.safetensors", tmp_path / "secret.safetensors")
    (model / "manifest.json").unlink()
    (model / "training_state.json").unlink()
    names = dict.fromkeys(load_file(tmp_path / "secret.safetensors"), "../secret.safetensors")
    (model / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    status, _, err = run_export(f"from={model}", f"to={tmp_path}/x")
    assert (status, err.count("\n")) == (4, 1) and "model.safetensors.index.json cannot be read (weight_map." in err
    for run in (
        program("loss=sft", f"model.archive={model}"),
        program("loss=sft", "model=blank_model", f"model.name_or_path={model}", defaults=QUICK),
    ):
        assert run.status == 4 and "model.safetensors.index.json cannot be read (weight_map." in run.err, run.err


def test_infinite_weights_in_an_archive_are_named(sft_run, tmp_path, program):
    model = Path(shutil.copytree((sft_run / "LATEST").resolve(), tmp_path / "model"))
    (model / "manifest.json").unlink()
    (model / "training_state.json").unlink()
    weights = load_file(model / "model.safetensors")
    weights["model.norm.weight"][0] = torch.inf
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    padded = program("loss=sft", f"model.archive={model}", "batching=padded")
    assert padded.status == 5 and "; fix: give weights without NaN and Inf" in padded.err, padded.err
    run = program("loss=sft", f"model.archive={model}")
    assert run.status == 5 and run.err.count("\n") == 1, run.err
    assert run.err.startswith(
        "error[NONFINITE] the log-probs of LlamaForCausalLM are NaN or Inf before training; fix: "
    )
