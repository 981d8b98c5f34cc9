"""Run the jobs of a sweep in child processes, on the GPUs of this machine or on its CPU."""

import os
import selectors
import sys
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from engine.placement import launcher
from engine.placement.launcher import PROGRAM, WorkerGroup
from engine.placement.processes import check_processes, choose_num_processes
from engine.placement.worker import STOPPED, num_cores
from engine.run.stop_notice import stop_notice
from engine.settings.reading import settings_to_text
from engine.settings.schema import Names, Settings
from engine.settings.secrets import redact
from engine.sweep.jobs import Job
from utils import StopRequest, UserError


@dataclass
class Running:
    """A job with its workers and GPUs."""

    job: Job
    settings: Settings
    workers: WorkerGroup
    gpus: Sequence[str]


class Pool:
    """Starts jobs in their order, as processes and GPUs get free. A failed job leaves the others.

    Args:
        jobs: those without settings are left as they are.
        gpus: their names in CUDA_VISIBLE_DEVICES.
        is_prefixed: other jobs write to the terminal at the same time, beside those of the pool.
        command: starts a worker.
    """

    def __init__(
        self,
        jobs: Sequence[Job],
        gpus: Sequence[str],
        is_prefixed: bool = False,
        command: Sequence[str | Path] = (sys.executable, PROGRAM),
    ):
        self._waiting = deque((job, job.settings) for job in jobs if job.settings is not None)
        self._command = command
        self._num_gpus, self._free = len(gpus), [*gpus]
        self._running: list[Running] = []
        limit = self._waiting[0][1].sweep.jobs if self._waiting else None
        self._limit = min(limit or len(gpus) or 1, max(len(self._waiting), 1))
        self._is_prefixed = is_prefixed or self._limit > 1

    def run(self) -> int | None:
        """Run all jobs, and set their statuses; returns the signal that stopped them, if any."""
        asked = self._waiting[0][1].sweep.gpus_per_job if self._waiting else None
        if asked is not None and not self._num_gpus:
            print(f"warning: sweep.gpus_per_job={asked} changes nothing: there is no GPU", flush=True)
        sys.stdout.flush()
        with StopRequest(self._forward, self._kill) as stop, selectors.DefaultSelector() as selector:
            try:
                while (self._waiting and stop.signal is None) or self._running:
                    while self._waiting and stop.signal is None and self._start_next(selector, stop):
                        pass
                    launcher.read_output(selector, 0.1)
                    for running in [each for each in self._running if not each.workers.are_running()]:
                        launcher.read_rest(selector)
                        self._finish(running, selector, stop.signal)
            finally:
                for running in self._running:
                    running.workers.close(selector)
        return stop.signal

    def _forward(self, number: int) -> None:
        for running in self._running:
            running.workers.forward(number)

    def _kill(self, number: int) -> None:
        for running in self._running:
            running.workers.kill()

    def _start_next(self, selector: selectors.BaseSelector, stop: StopRequest) -> bool:
        """Start the next job, or note that it cannot run; returns False while it must wait."""
        job, settings = self._waiting[0]
        try:
            num_gpus, num_processes = self._needs(settings)
        except UserError as error:
            self._waiting.popleft()
            _print_start(job, settings)
            print(redact(launcher.add_label(job.label, str(error)), settings.source), file=sys.stderr)
            job.status = error.exit_status
            return True
        if len(self._running) >= self._limit or num_gpus > len(self._free):
            return False
        self._waiting.popleft()
        gpus, self._free = self._free[:num_gpus], self._free[num_gpus:]
        workers = WorkerGroup(job.label, self._environment(gpus, num_processes), self._is_prefixed)
        running = Running(job, settings, workers, gpus)
        self._running.append(running)
        _print_start(job, settings)
        text = settings_to_text(settings, names_of(settings))
        try:
            workers.start(text, num_processes, self._command, selector, stop)
        except OSError as error:  # the machine has no memory or no process left for it
            self._release(running, selector)
            failure = UserError("DISTRIBUTED", f"{job.label}: cannot be started ({error})", "lower sweep.jobs")
            print(failure, file=sys.stderr)
            job.status = failure.exit_status
        return True

    def _needs(self, settings: Settings) -> tuple[int, int]:
        """The GPUs and processes of a job.

        Raises:
            UserError: CONFIG, if it can never run here.
        """
        asked = settings.sweep.gpus_per_job
        if not self._num_gpus:
            num_processes = choose_num_processes(settings, 0)
        else:
            if asked is not None and asked > self._num_gpus:
                problem = f"sweep.gpus_per_job: {asked} GPUs for a job, and there are {self._num_gpus}"
                raise UserError("CONFIG", problem, "give fewer")
            num_processes = choose_num_processes(settings, asked or self._num_gpus)
        check_processes(settings, num_processes, is_given=False)
        return (asked or num_processes if self._num_gpus else 0), num_processes

    def _environment(self, gpus: Sequence[str], num_processes: int) -> dict[str, str]:
        """Variables of the workers of a job: its GPUs, and its share of the cores."""
        environment = {"CUDA_VISIBLE_DEVICES": ",".join(gpus)} if gpus else {}
        if "OMP_NUM_THREADS" not in os.environ:
            environment["OMP_NUM_THREADS"] = str(max(1, num_cores() // (self._limit * num_processes)))
        return environment

    def _finish(self, running: Running, selector: selectors.BaseSelector, stopped_by: int | None) -> None:
        """Free the GPUs of a job, and note how it ended."""
        job, settings = running.job, running.settings
        self._release(running, selector)
        job.status = running.workers.status(stopped_by)
        run_dir = Path(names_of(settings)["local_run_dir"])
        job.run_dir = run_dir if (run_dir / "config.yaml").is_file() else None
        if job.status in STOPPED:
            notice = stop_notice(job.status - 128, settings, job.overrides)
            print(f"{job.label}: {notice}", file=sys.stderr)

    def _release(self, running: Running, selector: selectors.BaseSelector) -> None:
        """End the workers of a job, and free its GPUs."""
        running.workers.close(selector)
        self._running.remove(running)
        self._free += running.gpus


def run_jobs(jobs: Sequence[Job], is_prefixed: bool = False) -> int | None:
    """Run the jobs of a sweep here, and set their statuses; returns the signal that stopped them, if any."""
    return Pool(jobs, visible_gpus(launcher.count_gpus()), is_prefixed).run()


def visible_gpus(num: int) -> list[str]:
    """Names of the GPUs for CUDA_VISIBLE_DEVICES: those given to this process, or their numbers.

    Args:
        num: how many torch sees.
    """
    given = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    return given[:num] if given else [str(number) for number in range(num)]


def names_of(settings: Settings) -> Names:
    """The names of settings.named()."""
    assert settings.exp_name and settings.cache_dir and settings.local_run_dir
    return {
        "exp_name": settings.exp_name,
        "cache_dir": settings.cache_dir,
        "local_run_dir": settings.local_run_dir,
    }


def _print_start(job: Job, settings: Settings) -> None:
    print(f"{job.label}: {redact(' '.join(job.overrides), settings.source)}", flush=True)
