"""Sweeps: jobs in child processes, GPUs from a pool, the table and the page, and launchers of Hydra's plugins."""

import csv
import errno
import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Sequence
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import yaml
from omegaconf import OmegaConf

from engine.report.run_log import RunLog
from engine.settings.hydra_errors import missing_preset
from engine.settings.hydra_guard import check_command_line
from engine.settings.reading import read_settings
from engine.settings.sweeps import resolve_hydra, varied_values
from engine.sweep import jobs as sweep_jobs
from engine.sweep import plugins, pool, summary
from engine.sweep.jobs import Job
from preference_datasets import DATASETS
from tests.configs import composed, make_settings, write_configs
from tests.prose import ROOT
from tests.runs import QUICK, SMALL, Program
from utils import UserError, one_at_a_time

# A worker of a job without torch: it leaves what it was given, then does what the job's directory says.
WORKER = f"""
import json, os, sys, time
sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
from engine.placement.worker_link import attach
sent = json.loads(attach())
directory = Path(sent["names"]["local_run_dir"])
names = "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "RANK", "WORLD_SIZE"
given = {{name: os.environ.get(name) for name in names}}
directory.mkdir(parents=True, exist_ok=True)
(directory / f"given-{{given['RANK']}}").write_text(json.dumps(given | {{"began": time.monotonic()}}))
print("hello")
exec((directory.parent / f"{{directory.name}}.py").read_text())
(directory / "ended").write_text(str(time.monotonic()))
"""


def pooled(
    scripts: Sequence[str], directory: Path, gpus: Sequence[str], *overrides: str
) -> tuple[list[Job], pool.Pool]:
    """Jobs that run these scripts, and a pool for them."""
    jobs = []
    for number, script in enumerate(scripts):
        name = str(directory / str(number))
        Path(f"{name}.py").write_text(script)
        settings = make_settings(*SMALL, *overrides).named(exp_name="x", cache_dir="c", local_run_dir=name)
        jobs.append(Job(number, [f"seed={number}"], settings))
    return jobs, pool.Pool(jobs, gpus, command=[sys.executable, "-c", WORKER])


def given_to(directory: Path, number: int, rank: int = 0) -> dict[str, Any]:
    return json.loads((directory / str(number) / f"given-{rank}").read_text())


# ---- The pool ----


def test_jobs_take_gpus_from_a_pool(tmp_path: Path, capfd, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three jobs on two GPUs: two at a time, each alone on its GPU, and a failed one leaves the others."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    scripts = ["time.sleep(0.5)", "sys.exit(1)", ""]
    jobs, runner = pooled(scripts, tmp_path, ["4", "GPU-7"])
    assert runner.run() is None
    assert [job.status for job in jobs] == [0, 1, 0] and sweep_jobs.first_failure(jobs) == 1
    gpus = [given_to(tmp_path, number)["CUDA_VISIBLE_DEVICES"] for number in range(3)]
    assert gpus == ["4", "GPU-7", "GPU-7"]
    assert given_to(tmp_path, 0)["OMP_NUM_THREADS"] == str(max(1, len(os.sched_getaffinity(0)) // 2))
    out, err = capfd.readouterr()
    assert [line for line in out.splitlines() if "hello" in line] == [f"job {n}: hello" for n in out_order(out)]
    assert err.startswith("error[INTERNAL] job 1: rank 0 ended with status 1") and err.count("\n") == 1


def out_order(out: str) -> list[int]:
    """The jobs in the order of their output."""
    order = [int(number) for number in re.findall(r"^job (\d): hello$", out, re.MULTILINE)]
    assert sorted(order) == [0, 1, 2]
    return order


def test_a_job_of_several_gpus_waits_for_them(tmp_path: Path) -> None:
    jobs, runner = pooled(["time.sleep(0.3)"] * 2, tmp_path, ["0", "1", "2"], "sweep.gpus_per_job=2")
    runner.run()
    assert [job.status for job in jobs] == [0, 0]
    first_ended = float((tmp_path / "0" / "ended").read_text())
    assert given_to(tmp_path, 1)["began"] > first_ended
    assert {given_to(tmp_path, n)["CUDA_VISIBLE_DEVICES"] for n in (0, 1)} <= {"0,1", "2,0", "1,2"}


def test_a_job_has_a_process_for_each_gpu(tmp_path: Path) -> None:
    sharded = ("trainer=FSDPTrainer", "sweep.gpus_per_job=2")
    jobs, runner = pooled([""], tmp_path, ["5", "6", "7"], *sharded)
    runner.run()
    assert jobs[0].status == 0
    for rank in (0, 1):
        found = given_to(tmp_path, 0, rank)
        assert (found["WORLD_SIZE"], found["CUDA_VISIBLE_DEVICES"]) == ("2", "5,6")


def test_more_gpus_than_there_are_fail_a_job(tmp_path: Path, capfd) -> None:
    jobs, runner = pooled(["", ""], tmp_path, ["0"], "sweep.gpus_per_job=2")
    runner.run()
    assert [job.status for job in jobs] == [2, 2]
    assert "error[CONFIG] job 0: sweep.gpus_per_job: 2 GPUs for a job, and there are 1; fix: " in capfd.readouterr().err


def test_a_job_that_cannot_be_started_leaves_the_others(tmp_path: Path, capfd, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs, runner = pooled(["time.sleep(0.5)", "", ""], tmp_path, ["0", "1"])
    start, started = pool.WorkerGroup.start, []

    def start_or_fail(workers: pool.WorkerGroup, *arguments: Any) -> None:
        started.append(workers)
        if len(started) == 2:
            raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        start(workers, *arguments)

    monkeypatch.setattr(pool.WorkerGroup, "start", start_or_fail)
    assert runner.run() is None and [job.status for job in jobs] == [0, 7, 0]
    assert "error[DISTRIBUTED] job 1: cannot be started ([Errno 11]" in capfd.readouterr().err
    assert given_to(tmp_path, 2)["CUDA_VISIBLE_DEVICES"] == "1"


def test_gpus_asked_for_where_there_are_none_are_told_once(tmp_path: Path, capfd) -> None:
    jobs, runner = pooled(["time.sleep(0.3)"] * 2, tmp_path, [], "sweep.gpus_per_job=2")
    runner.run()
    assert [job.status for job in jobs] == [0, 0]
    assert capfd.readouterr().out.count("sweep.gpus_per_job=2 changes nothing") == 1


@pytest.mark.parametrize("at_a_time", [1, 2])
def test_jobs_at_a_time_on_a_cpu(at_a_time: int, tmp_path: Path, capfd) -> None:
    jobs, runner = pooled(["time.sleep(0.5)"] * 2, tmp_path, [], f"sweep.jobs={at_a_time}")
    runner.run()
    assert [job.status for job in jobs] == [0, 0]
    together = given_to(tmp_path, 1)["began"] < float((tmp_path / "0" / "ended").read_text())
    assert together == (at_a_time == 2)
    assert given_to(tmp_path, 0)["CUDA_VISIBLE_DEVICES"] == os.environ.get("CUDA_VISIBLE_DEVICES")
    assert ("job 0: hello" in capfd.readouterr().out) == (at_a_time == 2)  # alone, it has the terminal


def test_a_signal_ends_the_sweep(tmp_path: Path, capfd) -> None:
    """Running jobs get it, and no other begins."""
    scripts = [
        "import signal; signal.signal(15, lambda *_: sys.exit(143)); Path(directory, 'on').touch(); time.sleep(60)"
    ]
    jobs, runner = pooled([*scripts * 2, ""], tmp_path, [], "sweep.jobs=2")

    def send() -> None:
        while not all((tmp_path / str(number) / "on").exists() for number in (0, 1)):
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    Thread(target=send).start()
    assert runner.run() == signal.SIGTERM
    assert [job.status for job in jobs] == [143, 143, None]
    assert [job.outcome for job in jobs] == ["stopped", "stopped", "not run"]
    err = capfd.readouterr().err
    assert "job 0: stopped by SIGTERM before the first checkpoint; repeat the command\n" in err and "job 1: stop" in err


def test_names_of_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert pool.visible_gpus(2) == ["0", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3, MIG-a")
    assert pool.visible_gpus(2) == ["3", "MIG-a"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert pool.visible_gpus(0) == []


# ---- Settings of jobs ----


def test_a_child_gets_values_of_hydra() -> None:
    """Hydra's interpolations become values. Those of the environment may be secrets, and stay."""
    OmegaConf.register_new_resolver("hydra", lambda key: {"job.num": 3}[key], replace=True)
    try:
        config = OmegaConf.create(
            {
                "seed": "${hydra:job.num}",
                "name": "a-${hydra:job.num}-${oc.env:X}",
                "list": [{"x": "${seed}"}],
                "none": None,
            }
        )
        written = OmegaConf.to_container(resolve_hydra(config))
    finally:
        OmegaConf.clear_resolver("hydra")
    assert written == {"seed": 3, "name": "a-3-${oc.env:X}", "list": [{"x": "${seed}"}], "none": None}


def test_varied_values() -> None:
    overrides = ["loss=dpo", "+loss.beta=0.1", "datasets=[a,b]", "seed=1"]
    assert varied_values(overrides, ["loss.beta", "datasets"]) == {"loss.beta": "0.1", "datasets": "[a,b]"}


def test_a_logger_that_is_not_installed_fails_each_job_before_it_begins(program: Program, monkeypatch) -> None:
    monkeypatch.setattr("engine.run.logger_packages.find_spec", lambda name: None)
    run = program("-m", "seed=1,2", "mlflow.enabled=true")
    assert run.status == 2 and run.err.count("mlflow.enabled=true needs the package mlflow") == 2
    assert "error[CONFIG] job 1: " in run.err


def test_settings_of_the_sweep_are_one(program: Program) -> None:
    run = program("-m", "sweep.jobs=1,2")
    assert run.status == 2 and "error[CONFIG] sweep.jobs: is the same for all jobs of a sweep" in run.err
    run = program.ok("sweep.jobs=2", "n_examples=4", "debug=true")
    assert "warning: sweep.jobs=2 changes nothing: there is one job; -m starts a sweep\n" in run.out


def test_one_process_at_a_time(tmp_path: Path, capsys) -> None:
    path, seen = tmp_path / "new" / "file", []

    def work(name: str) -> None:
        with one_at_a_time(path, "waiting"):
            seen.append(name)
            time.sleep(0.2)
            seen.append(name)

    threads = [Thread(target=work, args=[name]) for name in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen in (["a", "a", "b", "b"], ["b", "b", "a", "a"]) and capsys.readouterr().out == "waiting\n"
    with one_at_a_time(Path("/proc/nowhere/file"), "waiting"):  # nothing can be written there
        pass


# ---- The table ----


def log_of(directory: Path, **metrics: float) -> RunLog:
    rows = [{"counters/examples": 0, "loss/eval": 0.6931}, {"counters/examples": 4, **metrics}]
    return RunLog(directory, {}, {}, rows, [], [], [])


def test_the_table_and_the_results(tmp_path: Path) -> None:
    jobs = [
        Job(0, ["loss.beta=0.1"], status=0, run_dir=tmp_path / "0"),
        Job(1, ["loss.beta=-1"], status=2),
        Job(2, ["loss.beta=1"], status=143, run_dir=tmp_path / "2"),
    ]
    values = {job.number: varied_values(job.overrides, ["loss.beta"]) for job in jobs}
    logs = {
        0: log_of(tmp_path / "0", **{"loss/eval": 0.5, "kl_eval": 2.43, "kl_eval/standard_error": 0.22}),
        2: log_of(tmp_path / "2"),
    }
    lines = summary.format_table(jobs, values, logs).splitlines()
    assert [re.split(r"\s{2,}", line) for line in lines] == [
        ["job", "loss.beta", "loss/eval", "kl_eval"],
        ["0", "0.1", "done", "0.5", "2.43 ± 0.22"],
        ["1", "-1", "failed (2)"],
        ["2", "1", "stopped", "0.6931"],
    ]
    found = [*csv.DictReader(summary.format_results(jobs, values, logs).splitlines())]
    assert [row["loss/eval"] for row in found] == ["0.5", "", "0.6931"]
    assert found[0]["kl_eval/standard_error"] == "0.22" and found[1]["status"] == "2"
    assert found[2]["run_dir"] == str(tmp_path / "2") and "counters/examples" not in found[0]


@pytest.mark.slow
def test_a_sweep_from_the_command_line(program: Program) -> None:
    """The reference is computed once, a wrong job leaves the others, and the page compares their runs."""
    directory = program.directory / "sweep"
    run = program(
        "-m", "loss=dpo", "loss.beta=0.3,-1,0.5", "n_examples=4", "sweep.jobs=2", f"sweep.dir={directory}",
        f"cache_dir={program.directory / 'cache'}", "report=html", "exp_name=e${hydra:job.num}",
    )  # fmt: skip
    assert run.status == 2 and run.err.startswith("error[CONFIG] job 1: loss.beta: must be ")
    assert run.err.count("\n") == 1
    assert run.out.count("log-probs computed in") == 1 and run.out.count("all log-probs are in") == 1
    found = [*csv.DictReader((directory / "results.csv").read_text().splitlines())]
    assert [(row["loss.beta"], row["status"]) for row in found] == [("0.3", "0"), ("-1", "2"), ("0.5", "0")]
    assert [Path(row["run_dir"]).name.partition("_beta")[0] for row in found if row["run_dir"]] == ["e0", "e2"]
    assert "beta=0.3" in (directory / "report.html").read_text()
    assert run.out.splitlines()[-1] == f"report: {directory / 'report.html'}"


# ---- Examples ----

# What sbatch and SkyPilot read, as far as the examples use it.
SBATCH_OPTIONS = {
    "job-name", "nodes", "ntasks", "gpus-per-node", "cpus-per-task", "mem", "time", "signal", "output",
}  # fmt: skip
SKY_FIELDS = {"name", "workdir", "resources", "envs", "secrets", "file_mounts", "setup", "run"}


def scripts_of_examples() -> dict[str, str]:
    sky = yaml.safe_load((ROOT / "examples" / "sweep.sky.yaml").read_text())
    return {"sweep.sbatch": (ROOT / "examples" / "sweep.sbatch").read_text(), "sweep.sky.yaml": sky["run"]}


@pytest.mark.parametrize("name", ["sweep.sbatch", "sweep.sky.yaml"])
def test_commands_of_examples_compose(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bash splits them into words. Each is composed, and its settings are read."""
    script = scripts_of_examples()[name]
    stubs = "source() { :; }; pip() { :; }; exec() { \"$@\"; }; python() { printf '%s\\0' \"$@\"; printf '\\n'; }\n"
    environment = {"SFT_RUN": "runs/sft", "PATH": os.environ["PATH"]}
    result = subprocess.run(["bash"], input=stubs + script, env=environment, capture_output=True, text=True, check=True)
    commands = [line.rstrip("\0").split("\0") for line in result.stdout.splitlines()]
    assert len(commands) == (1 if name == "sweep.sbatch" else 2)
    OmegaConf.register_new_resolver("sweep_dir", lambda: "/nowhere", replace=True)
    for program, *arguments in commands:
        assert program == "train.py"
        sweep = checked(*arguments)
        if sweep is None:
            read_settings(composed(*arguments), DATASETS)
            continue
        settings = [read_settings(config, DATASETS) for config in sweep.configs]
        assert [each.loss.keywords["beta"] for each in settings] == [0.05, 0.1, 0.3, 1]
        assert len({each.local_run_dir for each in settings}) == 4
        assert {(each.resume, each.sweep.gpus_per_job) for each in settings} == {("auto", 2)}


def test_forms_of_examples() -> None:
    options = re.findall(r"^#SBATCH --([\w-]+)=\S+$", scripts_of_examples()["sweep.sbatch"], re.MULTILINE)
    assert {*options} == SBATCH_OPTIONS and len(options) == len(SBATCH_OPTIONS)
    sky = yaml.safe_load((ROOT / "examples" / "sweep.sky.yaml").read_text())
    assert sky.keys() == SKY_FIELDS and sky["resources"].keys() == {"accelerators", "use_spot", "disk_size"}
    assert subprocess.run(["bash", "-n"], input=sky["setup"] + sky["run"], text=True).returncode == 0


# ---- Launchers of plugins ----


def test_a_launcher_without_its_package() -> None:
    error = missing_preset("hydra/launcher/submitit_slurm", ["basic"])
    assert str(error).startswith("error[CONFIG] hydra/launcher=submitit_slurm: the package hydra-submitit-launcher is")
    assert "pip install hydra-submitit-launcher==" in str(error)


LAUNCHERS = {
    "hydra/launcher/cluster.yaml": "defaults: [submitit_slurm]\npartition: gpu\ntimeout_min: 600\n",
    "hydra/launcher/setup.yaml": "defaults: [submitit_slurm]\nsetup: [touch MADE]\n",
    "hydra/launcher/flags.yaml": "defaults: [submitit_slurm]\nadditional_parameters: {wrap: touch MADE}\n",
    "hydra/launcher/lines.yaml": 'defaults: [submitit_slurm]\npartition: "x\\ntouch MADE"\n',
    "hydra/launcher/new.yaml": "defaults: [submitit_slurm]\nsrun_args: [MADE]\n",
    "hydra/launcher/folder.yaml": "defaults: [submitit_local]\nsubmitit_folder: /tmp/%j\n",
    "hydra/launcher/dispatch.yaml": "defaults: [joblib]\npre_dispatch: MADE()\n",
    "hydra/launcher/class.yaml": "defaults: [joblib]\n_target_: os.makedirs\n",
    "experiment/job.yaml": '# @package _global_\nhydra: {job: {name: "x\\ntouch MADE"}}\n',
}


@pytest.fixture
def configs(tmp_path: Path) -> Path:
    return write_configs(LAUNCHERS, tmp_path)


@pytest.mark.parametrize(
    "overrides, message",
    [
        ("hydra/launcher=setup", "hydra.launcher.setup: "),
        ("hydra/launcher=flags", "hydra.launcher.additional_parameters: "),
        ("hydra/launcher=flags +hydra.launcher.additional_parameters.x=1", "hydra.launcher.additional_parameters: "),
        ("hydra/launcher=lines", "hydra.launcher.partition: "),
        ("hydra/launcher=new", "srun_args"),
        ("hydra/launcher=folder", "hydra.launcher.submitit_folder: "),
        ("hydra/launcher=submitit_local hydra.launcher.submitit_folder=/tmp/x", "hydra.launcher.submitit_folder: "),
        ("hydra/launcher=dispatch", "hydra.launcher.pre_dispatch: "),
        ("hydra/launcher=class", "hydra.launcher._target_: os.makedirs would run code"),
        ("hydra/launcher=joblib hydra.launcher._target_=os.makedirs", "hydra.launcher._target_"),
        ("hydra/launcher=submitit_slurm +experiment=job", "hydra.launcher.name: "),
        ("hydra/launcher=joblib exp_name=hf_SECRET", "exp_name: holds a secret"),
        ("hydra/launcher=submitit_local wandb.project=${oc.env:MY_TOKEN}", "wandb.project: holds a secret"),
        ("hydra/launcher=submitit_local hydra.sweep.dir=/tmp/x", "hydra.sweep.dir: Hydra would write"),
    ],
)
def test_a_launcher_cannot_run_code_of_a_config(
    overrides: str, message: str, configs: Path, program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = "hf_" + "Ab1" * 10
    monkeypatch.setenv("MY_TOKEN", "swordfish-0815")
    words = overrides.replace("hf_SECRET", secret).split()
    run = program("-m", f"--config-dir={configs}", *words, "seed=1,2")
    assert run.status == 2 and run.err.count("\n") == 1 and run.err.startswith("error[CONFIG] "), run.err
    assert message in run.err and secret not in run.err and "swordfish" not in run.err
    assert not (configs.parent / "made").exists()
    assert [path.name for path in program.directory.iterdir()] == ["configs"]


def checked(*arguments: str) -> Any:
    """What the check of a command line finds."""
    return check_command_line(arguments, checked)


def test_a_launcher_may_be_configured(configs: Path) -> None:
    """Plain values in a file, everything on the command line."""
    train_py = [f"--config-dir={configs}", "-m", "seed=1,2"]
    register = OmegaConf.register_new_resolver
    register("sweep_dir", lambda: "/nowhere", replace=True)
    sweep = checked(*train_py, "hydra/launcher=cluster", "hydra.launcher.setup=[module load cuda]")
    assert sweep.plugin == "submitit_slurm" and sweep.varied == ["seed"] and len(sweep.jobs) == 2
    assert checked(*train_py, "hydra/launcher=joblib", "hydra.launcher.pre_dispatch=all").plugin == "joblib"
    assert checked(*train_py).plugin is None and checked("seed=1") is None


def test_the_directory_of_a_plugin_is_private(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "/x")
    directory = tmp_path / "new" / "sweep"
    plugins.prepare_directory(directory)
    assert directory.stat().st_mode & 0o777 == 0o700
    assert os.environ["PYTHONPATH"] == f"{ROOT}{os.pathsep}/x"
    plugins.write_result(Job(0, status=0, run_dir=tmp_path), directory)
    (directory / plugins.RECORD).touch()
    assert plugins.read_result(0, ["seed=1"], directory) == Job(0, ["seed=1"], status=0, run_dir=tmp_path)
    plugins.prepare_directory(directory)  # results of an earlier sweep are not those of this one
    assert plugins.read_result(0, ["seed=1"], directory) == Job(0, ["seed=1"], status=7)
    (tmp_path / "mine").touch()
    with pytest.raises(UserError, match="holds other files"):
        plugins.prepare_directory(tmp_path)
    assert tmp_path.stat().st_mode & 0o777 == 0o700 or not os.access("/", os.W_OK)


def swept(directory: Path, *overrides: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """`python train.py -m ...` from another directory."""
    command = [sys.executable, str(ROOT / "train.py"), "-m", *SMALL, *QUICK, "n_examples=4", "do_first_eval=false"]
    places = [f"local_dirs=[{directory}]", f"cache_dir={directory}/cache", f"sweep.dir={directory}/sweep"]
    return subprocess.run(
        [*command, *places, *overrides],
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        cwd=directory,
        capture_output=True,
        text=True,
        timeout=280,
    )


def check_sweep(result: subprocess.CompletedProcess[str], directory: Path) -> None:
    """Two runs, one wrong config, and a private directory."""
    assert result.returncode == 2, result.stderr
    assert (directory / "sweep").stat().st_mode & 0o777 == 0o700
    found = [*csv.DictReader((directory / "sweep" / "results.csv").read_text().splitlines())]
    assert [(row["lr"], row["status"]) for row in found] == [("0.001", "0"), ("-1", "2"), ("0.0001", "0")]
    assert all(float(row["loss/eval"]) > 0 for row in (found[0], found[2]))
    assert all((Path(row["run_dir"]) / "step-4").is_dir() for row in (found[0], found[2]))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["joblib", "submitit_local"])
def test_a_sweep_by_a_plugin(name: str, tmp_path: Path) -> None:
    package = {"joblib": "joblib", "submitit_local": "submitit"}[name]
    pytest.importorskip(f"hydra_plugins.hydra_{package}_launcher")
    result = swept(tmp_path, f"hydra/launcher={name}", "lr=1e-3,-1,1e-4")
    check_sweep(result, tmp_path)
    assert f"3 jobs by hydra/launcher={name}; output: " in result.stdout


# What submitit asks of Slurm: sbatch starts the jobs of an array here, and sacct tells that they run.
SLURM = {
    "sbatch": """
        import os, re, subprocess, sys
        text = open(sys.argv[1]).read()
        with open(os.environ["SEEN"], "w") as file:
            file.write(text)
        for number in range(int(re.search(r"array=0-(\\d+)", text)[1]) + 1):
            job = {"SLURM_JOB_ID": f"{500 + number}", "SLURM_ARRAY_JOB_ID": "77", "SLURM_ARRAY_TASK_ID": str(number),
                   "SLURM_NTASKS": "1", "SLURM_JOB_NUM_NODES": "1", "SLURM_NODEID": "0", "SLURM_PROCID": "0",
                   "SLURM_LOCALID": "0", "SLURM_JOB_NODELIST": "node1", "SLURM_STEP_ID": "0"}
            subprocess.Popen(["bash", sys.argv[1]], env=os.environ | job, stdout=subprocess.DEVNULL,
                             stderr=subprocess.DEVNULL, start_new_session=True)
        print("Submitted batch job 77")
    """,
    "srun": """
        import os, sys
        words = sys.argv[1:]
        while words[0].startswith("-"):
            words = words[1 if "=" in words[0] or words[0] == "--unbuffered" else 2:]
        os.execvp(words[0], words)
    """,
    "sacct": """
        print("JobID|State|NodeList")
        for number in range(3):
            print(f"77_{number}|RUNNING|node1")
    """,
}


@pytest.mark.slow
def test_a_sweep_by_slurm(tmp_path: Path) -> None:
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    commands = tmp_path / "bin"
    commands.mkdir()
    for name, script in SLURM.items():
        (commands / name).write_text(f"#!{sys.executable}\n{textwrap.dedent(script)}")
        (commands / name).chmod(0o755)
    result = swept(
        tmp_path, "hydra/launcher=submitit_slurm", "hydra.launcher.partition=gpu", "lr=1e-3,-1,1e-4",
        "hydra.launcher.setup=['export SET_UP=1']", "hydra.launcher.gpus_per_node=1",
        PATH=f"{commands}:{os.environ['PATH']}", SEEN=f"{tmp_path}/seen",
    )  # fmt: skip
    check_sweep(result, tmp_path)
    script = (tmp_path / "seen").read_text()
    assert "#SBATCH --partition=gpu\n" in script and "#SBATCH --gpus-per-node=1\n" in script
    assert "\nexport SET_UP=1\n" in script and str(tmp_path / "sweep" / ".submitit") in script
