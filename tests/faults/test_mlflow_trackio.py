"""MLflow and Trackio get all metrics; failing or blocking, they change neither steps nor exit status."""

import json
import sys
import threading
import time
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

import engine.run.background_logger
from engine.run.logger_packages import PACKAGES
from engine.run.mlflow_logger import flatten
from tests.runs import Program, Run, copy_stopped

OVERRIDES = (
    "minimum_log_interval_secs=0",
    "sample_during_eval=true",
    "n_eval_model_samples=2",
    "eval_every=8",
    "save_every=8",
    "max_length=96",
    "max_prompt_length=80",
    "optimizer=AdamW",
)
TOKEN = f"hf_{'a' * 34}"


class Calls:
    """The calls to a fake module; one of them raises or blocks."""

    def __init__(self) -> None:
        self.refuses = self.blocks = ""
        self.made: list[tuple[str, Any]] = []
        self.end = threading.Event()

    def add(self, name: str, value: Any = None) -> None:
        self.made.append((name, value))
        if name == self.refuses:
            raise ConnectionError(f"{name} is refused,\nalas: {TOKEN}")
        if name == self.blocks:
            self.end.wait(60)

    def of(self, name: str) -> list[Any]:
        return [value for each, value in self.made if each == name]


class FakeClient:
    """mlflow.MlflowClient as far as a run uses it. The runs of all clients are one."""

    calls: Calls
    params: dict[str, str]

    def __init__(self, tracking_uri: str):
        self.calls.add("init", tracking_uri)

    def create_experiment(self, name: str, artifact_location: str | None = None) -> str:
        self.calls.add("create_experiment", (name, artifact_location))
        return "1"

    def create_run(self, experiment_id: str, run_name: str | None = None) -> Any:
        self.calls.add("create_run", run_name)
        return SimpleNamespace(info=SimpleNamespace(run_id="abc"))

    def update_run(self, run_id: str, status: str | None = None) -> None:
        self.calls.add("update_run", (run_id, status))

    def get_run(self, run_id: str) -> Any:
        return SimpleNamespace(data=SimpleNamespace(params=dict(self.params)))

    def log_batch(self, run_id: str, metrics: Any = (), params: Any = ()) -> None:
        assert len(metrics) <= 1000 and len(params) <= 100  # the limits of MLflow
        for param in params:
            assert self.params.setdefault(param.key, param.value) == param.value and len(param.value) <= 500
        if metrics:
            self.calls.add("log", (metrics[0].step, {metric.key: metric.value for metric in metrics}))

    def log_dict(self, run_id: str, dictionary: dict[str, Any], artifact_file: str) -> None:
        json.dumps(dictionary)
        self.calls.add("file", (artifact_file, dictionary))

    def set_terminated(self, run_id: str, status: str | None = None) -> None:
        self.calls.add("finish", status)


class FakeRun:
    """trackio.Run as far as a run uses it."""

    calls: Calls

    def __init__(self, url: None, project: str, client: None, name: str, run_id: str, config: dict[str, Any]):
        self.calls.add("init", (project, name, run_id, config))

    def log(self, metrics: dict[str, Any], step: int | None = None) -> None:
        is_table = isinstance(next(iter(metrics.values())), SimpleNamespace)
        self.calls.add("table" if is_table else "log", (step, metrics))

    def finish(self) -> None:
        self.calls.add("finish")


def fake_module(monkeypatch: pytest.MonkeyPatch, name: str, **names: Any) -> None:
    module = ModuleType(name)
    module.__spec__ = ModuleSpec(name, None)
    module.__dict__.update(names)
    monkeypatch.setitem(sys.modules, name, module)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch):
    """Fakes of both packages, with their calls by the name of the package."""
    found = {name: Calls() for name in PACKAGES}
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")  # so that a run's own setting ends with the test
    client = type("Client", (FakeClient,), {"calls": found["mlflow"], "params": {}})
    fake_module(monkeypatch, "mlflow", MlflowClient=client)

    def metric(key: str, value: float, timestamp: int, step: int) -> Any:
        return SimpleNamespace(key=key, value=value, step=step)

    def param(key: str, value: str) -> Any:
        return SimpleNamespace(key=key, value=value)

    fake_module(monkeypatch, "mlflow.entities", Metric=metric, Param=param)
    fake_module(monkeypatch, "mlflow.exceptions", MlflowException=type("MlflowException", (Exception,), {}))
    run = type("Run", (FakeRun,), {"calls": found["trackio"]})
    table = lambda columns, data: SimpleNamespace(columns=columns, data=list(data))  # noqa: E731
    fake_module(monkeypatch, "trackio", Run=run, Table=table)
    yield found
    for each in found.values():
        each.end.set()


def without_timings(run: Run) -> list[dict[str, float]]:
    return [
        {name: value for name, value in row.items() if not name.endswith(("_per_second", "peak_memory_gb"))}
        for row in run.metrics
    ]


@pytest.fixture(scope="module")
def metrics_without_loggers(tmp_path_factory: pytest.TempPathFactory, cache: Path):
    with pytest.MonkeyPatch.context() as monkeypatch:
        capture = SimpleNamespace(readouterr=lambda: SimpleNamespace(out="", err=""))
        directory = tmp_path_factory.mktemp("without")
        Program(directory, cache, capture, monkeypatch)(*OVERRIDES, f"local_run_dir={directory / 'run'}")  # type: ignore[arg-type]
        return without_timings(Run(0, f"run_dir: {directory / 'run'}", ""))


def test_all_is_logged_in_order(program: Program, calls: dict[str, Calls], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTHER_TOKEN", TOKEN)
    run = program.ok("mlflow.enabled=true", "trackio.enabled=true", "exp_name=mine", *OVERRIDES)
    for name, made in calls.items():
        assert [values for _, values in made.of("log")] == run.metrics, name
        assert [step for step, _ in made.of("log")] == [int(row["counters/examples"]) for row in run.metrics], name
        assert made.made[-1][0] == "finish", name
    assert calls["mlflow"].of("finish") == ["FINISHED"]
    folder = run.dir.resolve() / "mlflow"
    assert calls["mlflow"].of("init") == [f"sqlite:///{folder / 'mlflow.db'}"]
    assert calls["mlflow"].of("create_experiment") == [("direct-preference-optimization", (folder / "files").as_uri())]
    files = dict(calls["mlflow"].of("file"))
    steps = [int(row["counters/examples"]) for row in run.evals]
    assert list(files) == ["config.yaml", *(f"samples/{step:09}.json" for step in steps)]
    assert all(len(files[name]["data"]) == 2 for name in [*files][1:])
    ((project, name, _, config),) = calls["trackio"].of("init")
    assert (project, name) == ("direct-preference-optimization", "mine")
    assert config == files["config.yaml"] and config["batch_size"] == 4
    tables = [table["samples"] for _, table in calls["trackio"].of("table")]
    assert [len(table.data) for table in tables] == [2 * n for n in range(1, len(run.evals) + 1)]
    assert not [line for line in run.out.splitlines() if line.startswith(("mlflow", "trackio"))] and run.err == ""


def test_secrets_stay_in_the_environment(
    program: Program, calls: dict[str, Calls], monkeypatch: pytest.MonkeyPatch
) -> None:
    address = "https://me:sesame99@example.com"
    loggers = ("mlflow.enabled=true", "trackio.enabled=true", "n_examples=4")
    refused = program(*loggers, f"mlflow.tracking_uri={address}")
    assert refused.status == 2 and "sesame" not in refused.err and not calls["mlflow"].made
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "sesame100")
    monkeypatch.setenv("PLACE", "my sesame field")
    run = program.ok(*loggers, "mlflow.experiment=${oc.env:PLACE}")
    assert [calls["mlflow"].made.pop(0) for _ in range(2)] == [
        ("init", address), ("create_experiment", ("my sesame field", None))
    ]  # fmt: skip
    for name, made in calls.items():
        assert len(made.made) > 3 and "sesame" not in repr(made.made), name
    assert "sesame" not in run.out


@pytest.mark.parametrize("name", PACKAGES)
@pytest.mark.parametrize("where", ["init", "log", "finish"])
def test_a_failing_logger_is_dropped(
    name: str, where: str, program: Program, calls: dict[str, Calls], metrics_without_loggers
) -> None:
    calls[name].refuses = where
    run = program.ok(f"{name}.enabled=true", *OVERRIDES)
    assert without_timings(run) == metrics_without_loggers and run.err == ""
    notice = f"{name}: logging stopped, the run continues (ConnectionError: {where} is refused, alas: <redacted>)"
    assert run.out.splitlines().count(notice) == 1


@pytest.mark.parametrize("name", PACKAGES)
@pytest.mark.parametrize("where", ["init", "finish"])
def test_a_blocking_logger_is_abandoned(
    name: str, where: str, program: Program, calls: dict[str, Calls], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine.run.background_logger, "CLOSE_SECONDS", 0.3)
    calls[name].blocks = where
    start = time.monotonic()
    run = program.ok(f"{name}.enabled=true", "n_examples=4")
    assert time.monotonic() - start < 50 and run.err == ""
    assert f"{name}: not finished in 0.3 s, abandoned; metrics.jsonl is complete" in run.out
    assert run.out.splitlines()[-1].startswith("run_dir: ")


def test_mlflow_continues_without_a_place_for_files(program: Program, calls: dict[str, Calls]) -> None:
    calls["mlflow"].refuses = "file"
    run = program.ok("mlflow.enabled=true", *OVERRIDES)
    assert [values for _, values in calls["mlflow"].of("log")] == run.metrics
    assert len(calls["mlflow"].of("file")) == 1 and calls["mlflow"].of("finish") == ["FINISHED"]
    (notice,) = [line for line in run.out.splitlines() if line.startswith("mlflow")]
    assert notice.endswith("(ConnectionError: file is refused, alas: <redacted>)")


def test_a_resumed_run_continues_and_a_branch_does_not(
    program: Program, calls: dict[str, Calls], tmp_path: Path
) -> None:
    loggers = ("mlflow.enabled=true", "trackio.enabled=true")
    first = program.ok(*loggers, *OVERRIDES, "exp_name=mine")
    copy_stopped(first, tmp_path / "stopped", 8)
    overrides = (*loggers, *OVERRIDES, "exp_name=mine", "lr=2e-3", "resume_allow=[lr]")
    program.ok(*overrides, "resume=auto", f"local_run_dir={tmp_path / 'stopped'}")
    branch = program.ok(*overrides, f"resume={first.dir / 'step-8'}", f"local_run_dir={tmp_path / 'branch'}")
    assert [step for step, _ in calls["mlflow"].of("log")][-3:] == [
        int(row["counters/examples"]) for row in branch.metrics[-3:]
    ]
    assert calls["mlflow"].of("update_run") == [("abc", "RUNNING")]
    assert len(calls["mlflow"].of("create_run")) == 2
    ids = [run_id for _, _, run_id, _ in calls["trackio"].of("init")]
    assert ids[0] == ids[1] != ids[2]


@pytest.mark.parametrize("name", PACKAGES)
def test_a_missing_package_is_named_before_the_run(
    name: str, program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engine.run.logger_packages.find_spec", lambda name: None)
    run = program(f"{name}.enabled=true", f"local_run_dir={program.directory / 'run'}")
    assert run.status == 2 and not (program.directory / "run").exists()
    fix = f"pip install {PACKAGES[name]}, or set {name}.enabled=false"
    assert run.err == f"error[CONFIG] {name}.enabled=true needs the package {name}; fix: {fix}\n"


def test_settings_become_texts_by_dotted_key() -> None:
    assert flatten({"lr": 0.1, "loss": {"name": "dpo", "more": {"beta": None}}, "datasets": ["a"]}) == {
        "lr": "0.1",
        "loss.name": "dpo",
        "loss.more.beta": "None",
        "datasets": "['a']",
    }


# ---- The packages themselves, where they are installed ----


@pytest.mark.skipif(find_spec("mlflow") is None, reason="mlflow is not installed")
def test_mlflow_has_the_run(program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow import MlflowClient

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr(engine.run.background_logger, "CLOSE_SECONDS", 60)  # it makes its database first
    run = program.ok("mlflow.enabled=true", "exp_name=mine", *OVERRIDES)
    copy_stopped(run, tmp_path / "stopped", 8)
    resumed = program.ok(
        *("mlflow.enabled=true", "exp_name=mine", *OVERRIDES, "resume=auto", f"local_run_dir={tmp_path / 'stopped'}")
    )
    assert run.err == resumed.err == "" and "mlflow:" not in run.out + resumed.out
    for each, times in ((run, 1), (resumed, 2)):
        client = MlflowClient(f"sqlite:///{each.dir / 'mlflow' / 'mlflow.db'}")
        found = client.get_run((each.dir / "mlflow-id").read_text())
        assert (found.info.run_name, found.info.status) == ("mine", "FINISHED")
        assert found.data.params["loss.name"] == "sft" and found.data.params["batch_size"] == "4"
        history = client.get_metric_history(found.info.run_id, "loss/train")
        steps = {int(row["counters/examples"]): row["loss/train"] for row in each.steps}
        assert {point.step: point.value for point in history} == steps
        assert sum(point.step == 16 for point in history) == times
        table = run.dir / "mlflow" / "files" / found.info.run_id / "artifacts" / "samples" / "000000016.json"
        assert len(json.loads(table.read_text())["data"]) == 2


@pytest.mark.skipif(find_spec("trackio") is None, reason="trackio is not installed")
def test_trackio_has_the_run(program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from trackio.sqlite_storage import SQLiteStorage

    name = f"p{time.time_ns()}"
    loggers = ("trackio.enabled=true", f"trackio.project={name}", "exp_name=mine", *OVERRIDES)
    run = program.ok(*loggers)
    copy_stopped(run, tmp_path / "stopped", 8)
    resumed = program.ok(*loggers, "resume=auto", f"local_run_dir={tmp_path / 'stopped'}")
    other = program.ok(*loggers)  # of the same name
    assert run.err == resumed.err == "" and "trackio:" not in run.out + resumed.out
    ids = [(each.dir / "trackio-id").read_text() for each in (run, resumed, other)]
    assert ids[0] == ids[1] != ids[2]
    for run_id, num_steps in ((ids[0], 6), (ids[2], 4)):
        rows = SQLiteStorage.get_logs(name, "mine", run_id=run_id)
        logged = [(row["step"], row["loss/train"]) for row in rows if "loss/train" in row]
        assert len(logged) == num_steps
        assert {*logged} == {(int(row["counters/examples"]), row["loss/train"]) for row in run.steps}
        assert any("samples" in row for row in rows)
