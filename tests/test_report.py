"""The report of a run, made from its logs."""

import base64
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import report
from engine.report.page import format_report, labels_of, make_report
from engine.report.panels import MAX_POINTS, PANELS, smooth, thin
from engine.report.run_log import read_run_log
from engine.report.writing import write_report
from engine.run import report_writer
from engine.run.histograms import NUM_BINS, reward_histograms
from engine.run.report_writer import ReportWriter
from tests.configs import make_settings
from tests.quick import slow_except
from tests.runs import Program

XSS = "</p><script>alert(1)</script><img src=x onerror=alert(2)>"


def write_run(directory: Path, num_steps: int = 20, kl: float = 1.0, **settings: Any) -> Path:
    """A run directory with logs, as train.py leaves them."""
    directory.mkdir(parents=True)
    config = {"seed": 0, "loss": {"name": "dpo", "beta": 0.1}, "local_run_dir": str(directory)} | settings
    directory.joinpath("config.yaml").write_text("# The settings of a run of train.py\n" + json.dumps(config))
    rows: list[dict[str, float]] = []
    for step in range(1, num_steps + 1):
        counters = {"counters/examples": 8 * step, "counters/updates": step}
        rows.append(
            {"loss/train": 1 / step, "grad_norm": 1.0, "learning_rate": 1e-6, "tokens_per_second": 1e4} | counters
        )
        if step % max(num_steps // 4, 1) == 0:
            means = {"loss/eval": 1.1 / step, "kl_eval": kl, "kl_eval/standard_error": 0.1, "ground_truth/policy": 0.5}
            rows.append(means | counters)
    write_log(directory / "metrics.jsonl", rows)
    samples = [
        {
            "examples": examples,
            "prompt": prompt,
            "policy": f"{text} {examples}",
            "reference": "so so",
            "policy_reward": 0.5,
        }
        for examples in (0, 80)
        for prompt, text in (("Is it good?", "Yes"), (XSS, XSS))
    ]
    write_log(directory / "samples.jsonl", samples)
    warning = {"warning": "kl", "found": XSS, "meaning": "it left", "help": "raise loss.beta", "counters/examples": 80}
    write_log(directory / "warnings.jsonl", [warning])
    histograms = reward_histograms([{"rewards/chosen": torch.tensor([0.5, 1.0]), "rewards/rejected": torch.zeros(2)}])
    write_log(directory / "histograms.jsonl", [{"counters/examples": 80} | histograms])
    record = {"command": "python train.py loss=dpo", "data": {"train": {"rows": 9, "dropped": {"empty response": 2}}}}
    directory.joinpath("run.json").write_text(json.dumps(record))
    return directory


def write_log(path: Path, rows: list[Any]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_a_page_has_curves_responses_warnings_data_settings_and_command(tmp_path: Path) -> None:
    html = format_report(make_report([read_run_log(write_run(tmp_path / "run"))]))
    assert html.count("<svg") == 7  # loss, true reward, KL, gradient norm, learning rate, speed, histogram
    for text in ("160 examples, 20 steps, 4 evaluations", "2 dropped: empty response", "python train.py loss=dpo"):
        assert text in html
    assert "1 ± 0.1" in html and "loss.beta" in html and "What helps: raise loss.beta." in html
    assert html.index("policy, after 80 examples") < html.index("policy, after 0 examples") < html.index(">reference")


def test_texts_of_a_run_are_inert(tmp_path: Path) -> None:
    html = format_report(make_report([read_run_log(write_run(tmp_path / "run"))]))
    assert "alert(1)" in html and "<script>alert" not in html and "<img" not in html
    (script,) = re.findall(r"<script>(.*?)</script>", html, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'" in html
    assert not re.findall(r"(?:src|href)=[\"']?https?:", html)


def test_a_page_of_10000_steps_is_small(tmp_path: Path) -> None:
    html = format_report(make_report([read_run_log(write_run(tmp_path / "run", num_steps=10_000))]))
    assert len(html.encode()) < 1_000_000


def test_runs_are_compared_by_what_differs(tmp_path: Path) -> None:
    betas = (0.05, 0.1, 0.3)
    runs = [
        read_run_log(write_run(tmp_path / f"run{beta}", kl=1 / beta, loss={"name": "dpo", "beta": beta}))
        for beta in betas
    ]
    page = make_report(runs)
    assert labels_of(runs) == ["beta=0.05", "beta=0.1", "beta=0.3"]
    assert page.settings.rows == [["loss.beta", "0.05", "0.1", "0.3"]]
    assert page.metrics.rows[1] == ["kl_eval", "20", "10", "3.333"]
    frontier = page.charts[0]
    assert frontier.key == "frontier" and frontier.title == "True reward of samples against kl_eval, last evaluation"
    points = frontier.spec["data"]["values"]
    assert [(point["kl"], point["reward"], point["label"]) for point in points] == [
        (20.0, 0.5, "beta=0.05"),
        (10.0, 0.5, "beta=0.1"),
        (1 / 0.3, 0.5, "beta=0.3"),
    ]
    loss = next(chart for chart in page.charts if chart.key == "loss")
    dashes = {
        (layer["encoding"]["color"]["datum"], layer["encoding"]["strokeDash"]["datum"]) for layer in loss.spec["layer"]
    }
    assert dashes == {(f"beta={beta}", split) for beta in betas for split in ("train", "eval")}
    assert "beta=0.05: 160 examples" in format_report(page)


def test_a_run_has_one_colour_in_all_panels(tmp_path: Path) -> None:
    """Also where only some runs have the metric; and it is named there."""
    first, second = (read_run_log(write_run(tmp_path / name, loss={"name": name})) for name in ("sft", "dpo"))
    for row in first.rows:
        row.pop("kl_eval", None)
    page = make_report([first, second])
    for chart in page.charts:
        colours = [layer["encoding"]["color"] for layer in chart.spec["layer"]]
        assert {tuple(colour["scale"]["domain"]) for colour in colours} == {("name=sft", "name=dpo")}
        assert all(colour["legend"] is not None for colour in colours)
    (kl,) = (chart for chart in page.charts if chart.key == "kl")
    assert {layer["encoding"]["color"]["datum"] for layer in kl.spec["layer"]} == {"name=dpo"}


def test_a_run_that_has_not_trained_is_not_on_the_frontier(tmp_path: Path) -> None:
    runs = [
        read_run_log(write_run(tmp_path / name, loss={"beta": beta})) for name, beta in (("a", 1), ("b", 2), ("c", 3))
    ]
    runs[2].rows[:] = [row | {"counters/examples": 0} for row in runs[2].rows[-1:]]
    assert [point["label"] for point in make_report(runs).charts[0].spec["data"]["values"]] == ["beta=1", "beta=2"]


DAMAGED = [
    ("metrics.jsonl", '{"counters/examples": "x", "loss/train": 1}'),
    ("metrics.jsonl", '{"counters/examples": NaN, "loss/train": 1}'),
    ("metrics.jsonl", '{"counters/examples": 1' + "0" * 400 + "}"),
    ("metrics.jsonl", "[" * 100_000),
    ("samples.jsonl", '{"examples": null, "prompt": "a"}'),
    ("histograms.jsonl", '{"rewards_eval/chosen": {}}'),
    ("histograms.jsonl", '{"counters/examples": 8, "rewards_eval/chosen": {"low": 0, "high": 1, "counts": []}}'),
    ("warnings.jsonl", "{}"),
]


@pytest.mark.parametrize(("name", "line"), slow_except(DAMAGED, DAMAGED[0], *DAMAGED[4::2], DAMAGED[7]))
def test_damaged_rows_are_left_out(tmp_path: Path, name: str, line: str) -> None:
    run = write_run(tmp_path / "run")
    expected = format_report(make_report([read_run_log(run)]))
    with open(run / name, "a") as file:
        file.write(line + "\n")
    assert format_report(make_report([read_run_log(run)])) == expected


@pytest.mark.parametrize("text", ["[]", '{"data": null, "command": 3}', '{"command"', ""])
def test_a_damaged_record_is_left_out(tmp_path: Path, text: str) -> None:
    run = write_run(tmp_path / "run")
    (run / "run.json").write_text(text)
    html = format_report(make_report([read_run_log(run)]))
    assert "Run it again" not in html and "<h2>Data" not in html


def test_runs_without_kl_have_no_frontier_and_equal_ones_are_numbered(tmp_path: Path) -> None:
    runs = [read_run_log(write_run(tmp_path / name / "run")) for name in "ab"]
    assert labels_of(runs) == ["1: run", "2: run"]
    for run in runs:
        for row in run.rows:
            row.pop("kl_eval", None)
    assert make_report(runs).charts[0].key == "loss"


def test_torn_rows_and_missing_logs_are_left_out(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"loss/train": 0.1, "counters/ex')
    for name in ("samples.jsonl", "warnings.jsonl", "histograms.jsonl", "run.json"):
        (run / name).unlink()
    log = read_run_log(run)
    assert len(log.rows) == 24
    html = format_report(make_report([log]))
    assert "<h2>Responses" not in html and "<h2>Warnings" not in html and "<script" not in html


def test_many_responses_are_capped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = write_run(tmp_path / "run")
    write_log(run / "samples.jsonl", [{"examples": 0, "prompt": f"Q{n}", "policy": "A" * 50} for n in range(30)])
    monkeypatch.setattr("engine.report.page.MAX_SAMPLE_BYTES", 530)
    page = make_report([read_run_log(run)])
    assert [sample.prompt for sample in page.samples] == [f"Q{n}" for n in range(10)]
    assert page.samples_note == "10 prompts of 30; samples.jsonl has all"


def test_evaluations_come_before_responses_of_training(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    rows = [{"examples": 0, "prompt": "held out", "policy": "a", "reference": "b"}]
    rows += [{"examples": n, "prompt": f"Q{n}", "response": "A", "reward": 1.0} for n in range(2)]
    write_log(run / "samples.jsonl", rows)
    page = make_report([read_run_log(run)])
    assert [sample.prompt for sample in page.samples] == ["held out", "Q1", "Q0"]
    assert page.samples[1].responses == [("response, after 1 examples", "A", "reward 1")]


def test_thin_keeps_ends_and_extremes() -> None:
    points = [(float(x), float(x % 97)) for x in range(30_000)]
    points[12_345] = (12_345.0, 1e6)
    thinned = thin(points)
    assert len(thinned) <= MAX_POINTS and thinned == sorted(thinned)
    assert thinned[0] == points[0] and thinned[-1] == points[-1] and (12_345.0, 1e6) in thinned
    assert thin(points[:1000]) == points[:1000]


def test_smooth_is_the_mean_of_windows() -> None:
    assert smooth([(1.0, 2.0)] * 119) is None
    means = smooth([(float(x), float(x % 2)) for x in range(120)])
    assert means is not None and means[:2] == [(0.5, 0.5), (2.5, 0.5)] and len(means) == 60


def test_panels_have_distinct_keys_and_metrics() -> None:
    keys = [panel.key for panel in PANELS]
    names = [metric.name for panel in PANELS for metric in panel.metrics]
    assert len(set(keys)) == len(keys) and len(set(names)) == len(names)


# ---- The command ----


def test_the_command_writes_pages_and_pictures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_run(tmp_path / "run")
    monkeypatch.setattr(sys, "argv", ["report.py", str(run), "png=true"])
    assert report.main() == 0
    assert capsys.readouterr().out == f"report: {run / 'report.html'}\n"
    assert (run / "charts" / "loss.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert (run / "charts" / "loss.svg").read_text().startswith("<svg")


def test_directories_of_sweeps_have_odd_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("lr=0.1", "-x", "to=there"):
        write_run(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["report.py", "lr=0.1", "-x", "./to=there", "--to", "page.html"])
    assert report.main() == 0
    assert "lr=0.1" in Path("page.html").read_text() and "to=there" in Path("page.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "error[CONFIG] no run is named"),
        (["nowhere"], "error[CONFIG] nowhere is not a run: it has no config.yaml"),
        (["{run}", "to=folder"], "error[STORAGE] to: folder cannot be written"),
        (["{run}", "pngs=true"], "error[CONFIG] pngs: unknown key (did you mean png?)"),
    ],
)
def test_errors_are_one_line(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    run = write_run(tmp_path / "run")
    tmp_path.joinpath("folder").mkdir()
    monkeypatch.setattr(sys, "argv", ["report.py", *(argument.format(run=run) for argument in arguments)])
    assert report.main() in (2, 6)
    error = capsys.readouterr().err
    assert error.startswith(message) and error.count("\n") == 1 and "; fix: " in error


# ---- In a run ----


def test_a_run_leaves_a_report(program: Program) -> None:
    run = program.ok(
        "loss=dpo",
        "loss.beta=0.1",
        "report=png",
        "eval_every=8",
        "sample_during_eval=true",
        "max_length=280",
        "n_eval_model_samples=2",
    )
    html = (run.dir / "report.html").read_text(encoding="utf-8")
    assert "python train.py" in html and "loss=dpo loss.beta=0.1" in html and "train: " in html
    assert (run.dir / "charts" / "margin.png").exists()
    rows = [json.loads(line) for line in (run.dir / "histograms.jsonl").read_text().splitlines()]
    assert [row["counters/examples"] for row in rows] == [row["counters/examples"] for row in run.evals]
    for row in rows:
        assert sum(row["rewards_eval/chosen"]["counts"]) == sum(row["rewards_eval/rejected"]["counts"]) == 8


def test_histograms_have_the_same_bins_and_count_all_finite_values() -> None:
    ranks = [
        {"rewards/chosen": torch.tensor([1.0, 2.0]), "rewards/margins": torch.tensor([9.0])},
        {"rewards/chosen": torch.tensor([4.0, float("nan")]), "rewards/rejected": torch.tensor([0.0])},
    ]
    found = reward_histograms(ranks)
    assert set(found) == {"rewards_eval/chosen", "rewards_eval/rejected"}
    assert {(each["low"], each["high"], len(each["counts"])) for each in found.values()} == {(0.0, 4.0, NUM_BINS)}
    counts = found["rewards_eval/chosen"]["counts"]
    assert sum(counts) == 3 and counts[10] == counts[20] == counts[-1] == 1
    assert reward_histograms([{"rewards/chosen": torch.tensor([])}]) == {}


class Children:
    """Stands in for subprocess.Popen: children that end when told, with a status and a line of errors."""

    def __init__(self, status: int = 0, errors: str = ""):
        self.status, self.errors, self.number, self.is_running = status, errors, 0, True

    def __call__(self, command: list[str], **_: Any) -> "Children":
        self.number += 1
        self.is_running = True
        return self

    def poll(self) -> int | None:
        return None if self.is_running else self.status

    def communicate(self, timeout: float | None = None) -> tuple[None, str]:
        self.is_running = False
        return None, self.errors

    @property
    def returncode(self) -> int:
        return self.status


def test_reports_take_a_small_share_of_a_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    children, now = Children(), [0.0]
    monkeypatch.setattr(report_writer.subprocess, "Popen", children)
    writer = ReportWriter(make_settings(), tmp_path, pytest.fail, clock=lambda: now[0])
    writer.evaluated()
    assert children.number == 1
    now[0] = 3.0
    writer.evaluated()  # still running
    assert children.number == 1
    children.is_running = False
    writer.evaluated()  # it took 3 s: the next one waits for 150
    now[0] = 150.0
    writer.evaluated()
    assert children.number == 1
    now[0] = 154.0
    writer.evaluated()
    assert children.number == 2
    tmp_path.joinpath("metrics.jsonl").touch()
    writer.close(is_done=True)
    assert children.number == 3 and not children.is_running


def test_a_run_without_a_step_leaves_no_report(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    children = Children()
    monkeypatch.setattr(report_writer.subprocess, "Popen", children)
    ReportWriter(make_settings(), tmp_path, pytest.fail).close(is_done=False)
    assert children.number == 0


def test_a_signal_ends_the_last_report_and_nothing_else(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The run has saved, and must say how to resume."""
    tmp_path.joinpath("metrics.jsonl").touch()
    tmp_path.joinpath("slow.py").write_text("import time; time.sleep(600)")
    monkeypatch.setattr(report_writer, "COMMAND", tmp_path / "slow.py")
    threading.Timer(1.0, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
    start = time.monotonic()
    ReportWriter(make_settings(), tmp_path, pytest.fail).close(is_done=True)
    assert time.monotonic() - start < 300


def test_a_failing_report_ends_reports_with_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    children, lines = Children(6, "traceback\nerror[STORAGE] no space\n"), list[str]()
    monkeypatch.setattr(report_writer.subprocess, "Popen", children)
    writer = ReportWriter(make_settings(), tmp_path, lines.append)
    tmp_path.joinpath("metrics.jsonl").touch()
    writer.evaluated()
    writer.close(is_done=True)
    assert children.number == 1
    assert lines == ["report: not written, the run continues (error[STORAGE] no space)"]


def test_a_page_that_cannot_be_drawn_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = write_run(tmp_path / "run")

    def fail(*_: Any, **__: Any) -> None:
        raise subprocess.CalledProcessError(1, "worker", stderr="No module named 'vl_convert'\n")

    monkeypatch.setattr("engine.pages.drawing.subprocess.run", fail)
    with pytest.raises(Exception, match=r"charts cannot be drawn .*vl_convert"):
        write_report([run], run / "report.html")
    assert not (run / "report.html").exists()
