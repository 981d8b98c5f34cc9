"""Every benchmark runs end to end on its smallest size, and writes its result where it is told to."""

import gzip
import json
import re
import subprocess
import sys
from datetime import date
from importlib.util import find_spec
from pathlib import Path

import pytest

from benchmarks import (
    bf16,
    common,
    cpu_profile,
    data,
    demo,
    dialogues,
    gpu,
    gpu_plan,
    gpu_profile,
    growth,
    losses,
    memory,
    online,
    sampling,
    scaling,
    sentiment,
    soak,
    step,
)
from benchmarks.pairs import fed_tokens, hh_pairs, make_batches, padded_tokens, synthetic_pairs, with_more_responses
from rewards import REWARDS

ROOT = Path(__file__).resolve().parent.parent
NUMBERS = re.compile(r"\d+\.\d+")


def run(script, *arguments, cwd=ROOT):
    """A benchmark in its own process."""
    command = [sys.executable, str(ROOT / "benchmarks" / f"{script}.py"), *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True)


def result(folder, name):
    record = json.loads((folder / f"{name}-{date.today()}.json").read_text())
    assert len(record["commit"]) == 40
    assert record["versions"]["torch"] and record["machine"] and record["gpus"] == []
    assert record["command"].startswith("benchmarks/")
    return record


SCRIPTS = (
    *("step", "growth", "memory", "data", "scaling", "demo", "losses", "sentiment", "frontier", "online"),
    *("online_demo", "digits", "bf16", "gpu", "gpu_plan", "dialogues", "corpus", "pretrain", "shards"),
)
# Forks a process for each script: torch and transformers are imported once.
ASK_FOR_HELP = """
import os, runpy, sys, torch, transformers.modeling_utils
for script in sys.argv[1:]:
    child = os.fork()
    if not child:
        sys.path[0], sys.argv = os.path.dirname(script), [script, "--help"]
        runpy.run_path(script, run_name="__main__")
        os._exit(9)  # argparse ends the process
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    print(f"{script}: {status}", flush=True)
"""


@pytest.mark.slow
def test_help_from_another_folder(tmp_path):
    scripts = [str(ROOT / "benchmarks" / f"{script}.py") for script in SCRIPTS]
    command = [sys.executable, "-u", "-c", ASK_FOR_HELP, *scripts]
    outcome = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    helps = re.split(r"^(/.*\.py: .*)\n", outcome.stdout, flags=re.MULTILINE)
    assert helps[1::2] == [f"{script}: 0" for script in scripts], outcome.stderr
    assert all(text.startswith("usage:") for text in helps[:-1:2])


@pytest.mark.slow
def test_data(tmp_path):
    """All phases on a few rows, then the store of a few pairs."""
    data.main(["--rows", "60", "--results", str(tmp_path)])
    phases = result(tmp_path, "data")["phases"]
    assert list(phases) == ["encode_batch", "cold", "cached", "batches"]
    assert phases["cold"]["examples"] == phases["cached"]["examples"] == 60
    assert 100 < phases["encode_batch"]["texts"] <= 180 and phases["encode_batch"]["tokens"] > 10_000
    assert 60 * 1000 < result(tmp_path, "data")["bytes"] < 60 * 2000
    data.main(["--rows", "500", "--stored", "--results", str(tmp_path)])
    phases = result(tmp_path, "data")["phases"]
    assert list(phases) == ["cached", "batches"] and phases["cached"]["examples"] == 500


@pytest.mark.slow
def test_bf16(tmp_path):
    """All variants, one step each. A tiny step tips many copies rounded to the nearest, and few of the product's."""
    sizes = ("--steps", "1", "--max-tokens", "128", "--lr", "1e-5", "--leap-lr", "1e-9", "--threads", "1")
    bf16.main([*sizes, "--leap-batches", "2", "--results", str(tmp_path)])
    record = result(tmp_path, "bf16-tiny")
    assert [*record["leaps"]] == [*record["runs"]["1e-5"]] == [*bf16.VARIANTS]
    moved = {}
    for variant, rows in record["leaps"].items():
        assert [before["seen"]["loss"] for before, _ in rows] == pytest.approx([0.6931472] * 2, abs=1e-6)
        moved[variant] = max(abs(after["seen"]["margins"]) for _, after in rows)
        first, last = record["runs"]["1e-5"][variant]
        assert first["learned"]["margins"] == 0 != last["learned"]["margins"]
    assert min(moved["nearest"], moved["rounded"]) > 10 * max(moved["bf16"], moved["fp32"])  # rounded: tied embeddings


# ---- step.py ----


@pytest.mark.slow
@pytest.mark.parametrize("one_at_a_time", [False, True])
def test_step(one_at_a_time, tmp_path, monkeypatch):
    monkeypatch.setattr(step, "TRL_PYTHON", tmp_path / "none")
    systems = "ours,ours-padded,trl-default" if not one_at_a_time else "ours-bf16"
    step.main(
        [
            *("--model", "tiny", "--systems", systems, "--batch-size", "2", "--steps", "2", "--warmup", "1"),
            *("--memory-steps", "1", "--threads", "1", "--results", str(tmp_path)),
            *(["--one-at-a-time"] if one_at_a_time else ["--profile"]),
        ]
    )
    record = result(tmp_path, "step-tiny-b2")
    assert record["one_at_a_time"] is one_at_a_time
    assert [*record["systems"]] == systems.removesuffix(",trl-default").split(",")
    for name, row in record["systems"].items():
        assert len(row["seconds"]) == 2 and row["memory_mb"] >= 0
        losses = record["first_losses"][name]
        assert losses[0] == pytest.approx(0.6931, abs=1e-3) and len(losses) == 4
    if not one_at_a_time:
        first, padded = record["first_losses"].values()
        assert first == pytest.approx(padded, abs=1e-5)
        shares = record["profiles"]["ours"]["shares"]
        assert {"GEMM", "attention", "head", "elementwise", "optimizer", "Python"} <= shares.keys()
        assert sum(shares.values()) == pytest.approx(1, abs=0.01) and min(shares.values()) >= 0


@pytest.mark.slow
def test_step_of_a_reward_model(tmp_path, monkeypatch):
    monkeypatch.setattr(step, "TRL_PYTHON", tmp_path / "none")
    step.main(
        [
            *("--model", "tiny", "--systems", "ours,ours-padded", "--batch-size", "2", "--steps", "2", "--warmup", "1"),
            *("--memory-steps", "1", "--threads", "1", "--results", str(tmp_path), "--task", "reward"),
            *("--responses", "4", "--trl-python", str(tmp_path / "none")),
        ]
    )
    record = result(tmp_path, "step-reward-4-tiny-b2")
    first, padded = record["first_losses"].values()
    assert first == pytest.approx(padded, abs=1e-5) and 0.1 < first[0] < 3


def test_more_responses_are_those_of_other_pairs():
    pairs = [{"prompt": [n], "chosen": [n, 1], "rejected": [n, 2]} for n in range(3)]
    rankings = with_more_responses(pairs, 4)
    assert [*rankings[0].values()] == [[0], [0, 1], [0, 2], [1, 1], [1, 2]]
    assert [*rankings[2].values()][3:] == [[0, 1], [0, 2]] and with_more_responses(pairs, 2) == pairs


def test_tokens_of_rankings():
    """TRL pads all pairs of a ranking, as many at a time as the batch has prompts."""
    batch = [{"prompt": [1, 2], "chosen": [3], "rejected": [4, 5], "more_0": [6, 7, 8]}]
    assert fed_tokens(batch[0]) == 5 and fed_tokens(batch[0], feeds_last_token=True) == 8
    assert padded_tokens(batch) == 2 * 4 + 2 * 5 + 2 * 5
    pair = {"prompt": [1], "chosen": [2, 3], "rejected": [4]}
    assert padded_tokens([pair, pair]) == 4 * 3


def test_step_of_real_rows(tmp_path):
    """HH rows are truncated as for training."""
    folder = tmp_path / "hh"
    folder.mkdir()
    rows = [
        {"chosen": f"{turn} {'yes ' * (1 + 300 * (n % 3))}", "rejected": f"{turn} no {n}"}
        for n in range(6)
        for turn in [f"\n\nHuman: {n}?\n\nAssistant:"]
    ]
    with gzip.open(folder / "train.jsonl.gz", "wt") as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows))
    pairs = hh_pairs(tmp_path, 300, 8)
    assert len(pairs) == 8 and pairs[0] == pairs[6]
    assert max(len(pair["prompt"]) + len(pair["chosen"]) for pair in pairs) == 512
    batches = make_batches(pairs, 4, grouped=True)
    assert sorted(map(len, batches)) == [4, 4]


def test_step_needs_a_known_system(capsys):
    with pytest.raises(SystemExit):
        step.main(["--systems", "ours,theirs"])
    assert "theirs: choose from ours-bf16, " in capsys.readouterr().err


def test_dead_worker_shows_its_error(tmp_path):
    batches = [[{"prompt": [2], "chosen": [3, 4], "rejected": [5, 6]}]]
    job = {"worker": "ours", "settings": ["lr=high"], "model": str(tmp_path), "batches": batches, "batch_size": 1}
    with pytest.raises(SystemExit, match=r"(?s)a worker died:.*lr: "):
        step.Worker(tmp_path / "worker", job, threads=1)


# ---- online.py ----


@pytest.mark.slow
@pytest.mark.parametrize("systems", ["ours,trl", "ours,ours-bf16"])
def test_online(systems, tmp_path):
    """Without TRL's environment, ours alone."""
    online.main(
        [
            *("--model", "tiny", "--systems", systems, "--prompts", "2", "--responses", "3", "--max-new-tokens", "6"),
            *("--steps", "1", "--warmup", "1", "--threads", "1", "--clock", "cpu", "--results", str(tmp_path)),
            *("--trl-python", str(tmp_path / "none")),
        ]
    )
    rows = result(tmp_path, "online-tiny-2x3")["systems"]
    assert [*rows] == systems.removesuffix(",trl").split(",")
    for row in rows.values():
        (iteration,) = row["iterations"]
        assert iteration["seconds"] == pytest.approx(sum(iteration[part] for part in online.PARTS), abs=1e-5)
        lengths = online.make_job(synthetic_pairs(1024, 4), 3, 6)["lengths"]
        assert iteration["tokens"] == sum(map(sum, lengths[2:]))
    assert rows["ours"]["times"] == 1
    assert f"| ours | {rows['ours']['generate']:.4g} |" in (tmp_path / f"online-tiny-2x3-{date.today()}.md").read_text()


# ---- sampling.py ----


def test_sampling(tmp_path):
    sampling.main(
        [
            *("--model", "tiny", "--prompts", "2", "--responses", "2", "--max-new-tokens", "3", "--repeats", "1"),
            *("--dtype", "float32", "--results", str(tmp_path)),
        ]
    )
    found = result(tmp_path, "sampling-tiny")["tokens_per_second"]
    assert [*found] == ["loop", "continuous"] and all(speed > 0 for speed in found.values())


# ---- The others ----


@pytest.mark.slow
def test_growth(tmp_path):
    growth.main(
        [
            *("--model", "tiny", "--curves", "vocabulary,responses", "--points", "1", "--steps", "1"),
            *("--threads", "1", "--results", str(tmp_path)),
        ]
    )
    curves = result(tmp_path, "growth")["curves"]
    assert [*curves["vocabulary"]] == ["8192"] and [*curves["responses"]] == ["2"]
    assert curves["responses"]["2"]["fed_tokens"] == 8 * (3 * 128 - 2)


def test_dialogues(tmp_path):
    dialogues.main(
        [
            *("--model", "tiny", "--turns", "3", "--batch", "2", "--steps", "1", "--mixed-precision", "null"),
            *("--threads", "1", "--results", str(tmp_path)),
        ]
    )
    found = result(tmp_path, "dialogues")
    assert found["steps"]["joined"]["loss"] == pytest.approx(found["steps"]["apart"]["loss"], rel=1e-5)
    assert 1.7 < found["ratios"]["tokens"] < 2.3  # two for turns of equal length


@pytest.mark.slow
def test_memory(tmp_path):
    size = ("--sizes", "tiny", "--lengths", "16", "--threads", "1", "--results", str(tmp_path))
    memory.main([*size, "--peft", "lora", "activation_checkpointing=true"])
    (cell,) = result(tmp_path, "memory-cpu")["cells"]
    assert 0 < cell["held_gb"] <= cell["peak_gb"] < 2 and cell["peft"] == "lora"


@pytest.mark.slow
def test_memory_of_a_plan(tmp_path):
    size = ("--sizes", "tiny", "--lengths", "16", "--peft", "full", "--threads", "1", "--results", str(tmp_path))
    memory.main([*size, "--plan", "rtx4090"])
    (cell,) = result(tmp_path, "memory-plan-rtx4090")["cells"]
    assert 0 < cell["held_gb"] <= cell["peak_gb"] < 1


@pytest.mark.slow
def test_scaling(tmp_path):
    scaling.main(
        [
            *("--model", "tiny", "--trainers", "FSDP,TensorParallel", "--most-processes", "1", "--batch-size", "4"),
            *("--steps", "1", "--warmup", "0", "--results", str(tmp_path)),
        ]
    )
    (row,) = result(tmp_path, "scaling-cpu")["rows"]
    assert row["trainer"] == "FSDP" and row["processes"] == 1
    assert row["tokens_per_second"] > 0 and row["state_mb"] > 0


@pytest.mark.slow
def test_scaling_to_four_processes(tmp_path):
    scaling.main(
        [
            *("--model", "tiny", "--trainers", "Basic,FSDP x TensorParallel", "--batch-size", "4", "--steps", "1"),
            *("--warmup", "0", "--results", str(tmp_path)),
        ]
    )
    one, four = result(tmp_path, "scaling-cpu")["rows"]
    assert (one["processes"], four["processes"]) == (1, 4)
    assert four["state_mb"] < one["state_mb"] / 2


@pytest.mark.slow
def test_soak(tmp_path, capsys):
    none = [f"--{name.replace('_', '-')}=0" for name in soak.LIMITS if name != "seconds"]
    assert soak.main([*none, "--flips", "4", "--truncations", "4", "--kills", "1", "--seconds", "60"]) == 0
    out = capsys.readouterr().out
    assert json.loads(out[out.index("\n{") :])["done"] == {"flips": 4, "truncations": 4, "kills": 1}


@pytest.mark.slow
def test_demo(tmp_path, capsys):
    demo.main(
        [
            *(f"local_dirs=[{tmp_path}]", "n_examples=16", "n_epochs=null", "n_eval_examples=8", "warmup_steps=0"),
            *("n_eval_model_samples=4", "eval_batch_size=8"),
        ]
    )
    out = capsys.readouterr().out
    assert "What DPO gained, on 4 held-out prompts:" in out
    assert len(NUMBERS.findall(out.partition("What DPO gained")[2].partition("Human:")[0])) >= 7


@pytest.mark.slow
def test_losses(tmp_path):
    few = ("n_examples=16", "n_epochs=null", "n_eval_examples=8", "n_eval_model_samples=4", "eval_batch_size=8")
    common = ("--losses", "dpo,aot", "--jobs", "1", "--work", str(tmp_path / "runs"), "--results", str(tmp_path))
    losses.main([*common, *few, "warmup_steps=0"])
    rows = result(tmp_path, "losses")["runs"]
    assert [(row["loss"], row["lr"]) for row in rows] == [
        (n, lr) for n in ("dpo", "aot") for lr in losses.LEARNING_RATES
    ]
    assert all(0 <= row["accuracy"] <= 1 and row["kl"] != 0 and -1 <= row["reward"] <= 1 for row in rows)
    stem = tmp_path / f"losses-{date.today()}"
    assert "| `aot` |" in stem.with_suffix(".md").read_text()
    assert stem.with_suffix(".png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.slow
def test_digits(tmp_path):
    output = tmp_path / "digits.txt"
    outcome = run("digits", "--only", "sft", "--output", output)
    assert outcome.returncode == 0, outcome.stderr
    lines = output.read_text().splitlines()
    assert [line for line in lines if line.startswith("==")] == ["== sft: loss=sft", "== sft, resumed"]
    assert sum(line.startswith("weights and optimizer ") for line in lines) == 2


@pytest.mark.slow
def test_sentiment(tmp_path, monkeypatch):
    """Two steps of a tiny model, by a scorer of its own: the share of e. The package of the real one is optional."""
    monkeypatch.setitem(REWARDS, "vader", None)  # removed at the end
    common.write_model(common.MODELS["tiny"], tmp_path / "model")
    small = ("n_eval_examples=4", "n_eval_model_samples=4", "rollout.max_new_tokens=6", "mixed_precision=null")
    arguments = [
        *("--model", str(tmp_path / "model"), "--steps", "2", "--eval-steps", "1", "--threads", "1"),
        *("--work", str(tmp_path / "work"), "--results", str(tmp_path)),
        *("model.tokenizer_name_or_path=films", f"cache_dir={tmp_path / 'cache'}", *small),
    ]
    sentiment.main(arguments, score=lambda text: text.count("e") / max(1, len(text)))
    record = result(tmp_path, "sentiment")
    assert [row["prompts"] for row in record["evaluations"]] == [0, 4, 8]
    assert record["evaluations"][0]["kl"] == 0 != record["evaluations"][-1]["kl"]
    assert all(0 <= row["sampled"] <= 1 and 0 < row["distinct_words"] <= 1 for row in record["evaluations"])
    (iteration,) = record["steps"]  # of both steps
    assert iteration["prompts"] == 4 and 0 < iteration["reward"] < 1
    table = (tmp_path / f"sentiment-{date.today()}.md").read_text()
    assert sum(line.startswith("| ") for line in table.splitlines()) == 2 + 3 + 2 + 4
    assert (tmp_path / f"sentiment-{date.today()}.png").read_bytes()[:4] == b"\x89PNG"


def test_prompts_of_sentiment():
    """Test films are in no training prompt."""
    train, test = (sentiment.rows_of(titles) for titles in (sentiment.TITLES, sentiment.TEST_TITLES))
    assert (len(train), len(test)) == (160, 60) == (len({row["prompt"] for row in train}), len(test))
    assert not {*sentiment.TITLES} & {*sentiment.TEST_TITLES}


def test_words_of_sentiment():
    assert sentiment.distinct_words(["Good good film", "a film"]) == 3 / 5
    assert sentiment.distinct_words([""]) == 0
    assert sentiment.share_about_films(["Great acting!", "A fact", "I watched it", "lucky us", "two FILMS"]) == 3 / 5
    assert sentiment.common_words(["amazing amazing film", "Amazing story"], 2)[0] == ("amazing", 1.0)


def test_scorer_of_sentiment():
    pytest.importorskip("vaderSentiment")
    score = sentiment.vader_scorer()
    assert score("A wonderful, great film.") > 0.5 > 0 > score("A terrible film.")


def test_llama_cpp_parity_names_what_is_missing():
    if find_spec("llama_cpp"):
        pytest.skip("llama_cpp is installed; the whole benchmark takes minutes")
    outcome = run("llama_cpp_parity")
    assert outcome.returncode == 1
    assert outcome.stderr.endswith("ModuleNotFoundError: No module named 'llama_cpp'\n")


# ---- The record ----


def test_record_without_git_and_gpu_tools(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    found = common.machine(2)
    assert found["commit"] == common.UNKNOWN
    assert found["machine"].endswith(", 2 threads")
    path = common.write_result(tmp_path / "new" / "folder", "name", found)
    assert json.loads(path.read_text()) == found
    assert f"written to {path}" in capsys.readouterr().out


def test_command_of_a_record_hides_the_path_of_the_data():
    assert common.shown_command("step", ["--data", "/home/x"], Path("/home/x")) == "benchmarks/step.py --data DATA"


# ---- gpu.py ----


@pytest.mark.parametrize(
    "cases",
    [
        ["pythia-2.8b", "llama-8b-qlora-plain", "gpt2-hh", "llama-7b-qlora-512-in-12gb"],
        pytest.param([case.name for case in gpu.CASES], marks=pytest.mark.slow),
    ],
    ids=["some", "all"],
)
def test_cases_of_a_gpu(cases, tmp_path, capsys):
    gpu.main(["--device", "cpu", "--tiny", "--cases", ",".join(cases), "--results", str(tmp_path)])
    record = result(tmp_path, "gpu-cpu")
    assert record["not_started"] == [] and set(record["cases"]) == set(cases)
    for name, case in record["cases"].items():
        assert "error" not in case, (name, case)
        assert case["seconds_per_step"] > 0 and case["tokens_per_second"] > 0
        assert case["first_loss"] == pytest.approx(0.6931472, abs=1e-6)


def test_a_failed_case_does_not_end_the_others(tmp_path, monkeypatch, capsys):
    """Nor does the time limit lose what is measured."""
    run_case = gpu.run_case

    def failing(case, arguments):
        if case.name == "pythia-2.8b":
            raise RuntimeError("CUDA error: an illegal memory access")
        return run_case(case, arguments)

    monkeypatch.setattr(gpu, "run_case", failing)
    gpu.main(["--device", "cpu", "--tiny", "--cases", "pythia-2.8b,gpt2-hh", "--results", str(tmp_path)])
    record = result(tmp_path, "gpu-cpu")
    assert "illegal memory access" in record["cases"]["pythia-2.8b"]["error"]
    assert record["cases"]["gpt2-hh"]["seconds_per_step"] > 0
    gpu.main(["--device", "cpu", "--tiny", "--cases", "gpt2-hh", "--limit", "0", "--results", str(tmp_path)])
    assert result(tmp_path, "gpu-cpu")["not_started"] == ["gpt2-hh"]


def test_a_gpu_is_asked_for(capsys):
    with pytest.raises(SystemExit, match="there is no GPU here"):
        gpu.main(["--results", "nowhere"])
    with pytest.raises(SystemExit):
        gpu.main(["--cases", "pythia", "--device", "cpu"])
    assert "pythia: choose from" in capsys.readouterr().err


def test_kernels_of_a_profile_are_grouped():
    """Times by hand, in microseconds. Two kernels overlap, and one runs inside the head."""
    kernels = [
        ("nvjet_sm90_tst", 0, 100),
        ("flash_bwd_kernel", 150, 50),
        ("vectorized_elementwise_kernel", 180, 40),
        ("nvjet_sm90_tss", 300, 10),
        ("_normalize_kernel", 310, 10),
    ]
    events = [{"cat": "kernel", "name": name, "ts": start, "dur": length} for name, start, length in kernels]
    events += [{"cat": "gpu_user_annotation", "name": "head", "ts": 299, "dur": 22}]
    events += [{"cat": "cuda_runtime", "name": "cudaLaunchKernel", "ts": 0, "dur": 7}] * 2
    found = gpu_profile.group_events(events)
    assert found["seconds"] == {"gemm": 1e-4, "attention": 5e-5, "elementwise": 4e-5, "head": 2e-5}
    assert found["span"] == 32e-5 and found["idle"] == pytest.approx(13e-5)  # 100 to 150, 220 to 300
    assert found["num_kernels"] == 5 and found["calls_of_the_host"] == {"cudaLaunchKernel": [1e-5, 2]}


def test_operations_of_a_profile_are_grouped():
    """Times by hand, in microseconds. What an operation calls is not counted twice."""
    operations = [
        ("aten::linear", 10, 30),
        ("aten::mm", 15, 20),
        ("attention", 50, 20),
        ("aten::bmm", 55, 10),
        ("Optimizer.step#AdamW.step", 70, 10),
        ("aten::add_", 72, 5),
        ("aten::mul", 80, 10),
        ("aten::mul", 150, 10),  # after the step
    ]
    events = [{"cat": "cpu_op", "name": name, "ts": start, "dur": length} for name, start, length in operations]
    events += [{"cat": "user_annotation", "name": "step", "ts": 0, "dur": 100}]
    found = cpu_profile.group_events([event | {"tid": 1} for event in events] + [events[0] | {"tid": 2}])
    assert found["seconds"] == {
        **{"GEMM": 3e-5, "Python": 3e-5, "attention": 2e-5, "optimizer": 1e-5, "elementwise": 1e-5}
    }
    assert found["total"] == 1e-4 and found["longest"]["GEMM: aten::mm"] == [2e-5, 1]


@pytest.mark.slow
def test_the_plan_of_a_gpu(tmp_path):
    outcome = run("gpu_plan", "--tiny", "--results", tmp_path, "--stages", "cases", "--limit", "300")
    assert outcome.returncode == 0, outcome.stderr
    assert "cases: exit status 0" in outcome.stdout
    assert result(tmp_path, "gpu-cpu")["cases"]["pythia-2.8b"]["seconds_per_step"] > 0


def test_a_stage_is_stopped_at_its_limit(tmp_path):
    """What it has printed stays."""
    outcome = gpu_plan.run_stage("x", ["-c", "import time; print('begun', flush=True); time.sleep(60)"], 3, tmp_path)
    assert outcome.startswith("stopped after 3 s") and (tmp_path / "x.log").read_text() == "begun\n"
