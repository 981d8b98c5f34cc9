"""Everything to learn from a GPU, in the order of its worth: is it right, how fast is it, and how fast beside TRL?

- tests: those marked gpu, in several processes.
- cases: benchmarks/gpu.py.
- trl: benchmarks/step.py, if TRL's environment exists.

A stage has a share of the time left, and is stopped at its end. All it has measured is in the folder by then.

    .venv/bin/python benchmarks/gpu_plan.py --results DIR --limit 1500
"""

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import ROOT, TRL_PYTHON

# Stage -> share of the time left when it starts.
SHARES = {"tests": 0.35, "cases": 0.75, "trl": 1.0}


def commands(arguments: argparse.Namespace) -> dict[str, list[str]]:
    """Stage -> its command, without the time limit."""
    pytest = ["-m", "pytest", "-m", "gpu", "-n", str(arguments.processes), "-q", "-rfE", "tests"]
    cases = ["benchmarks/gpu.py", "--results", str(arguments.results)]
    trl = ["benchmarks/step.py", "--model", "pythia-410m", "--batch-size", "32", "--results", str(arguments.results)]
    trl += ["--systems", "ours-bf16,trl-best,trl-liger,trl-default", "--trl-python", str(arguments.trl_python)]
    if arguments.tiny:
        pytest += ["--collect-only"]
        cases += ["--device", "cpu", "--tiny", "--cases", "pythia-2.8b"]
        trl += ["--model", "tiny", "--batch-size", "1", "--steps", "1", "--warmup", "0", "--memory-steps", "0"]
    return {"tests": pytest, "cases": cases, "trl": trl}


def run_stage(name: str, command: list[str], limit: float, folder: Path) -> str:
    """Run a stage; its output goes to the screen and to a file. Returns how it ended."""
    log = folder / f"{name}.log"
    with log.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, "-u", *command], cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            status = process.wait(limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # its workers too: they would hold the GPU
            process.wait()
            return f"stopped after {limit:.0f} s: {log}"
    return f"exit status {status}: {log}"


def main(texts: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit", type=float, default=1500, help="seconds for all stages (default: %(default)s)")
    parser.add_argument("--stages", default=",".join(SHARES), help="comma-separated (default: %(default)s)")
    parser.add_argument("--processes", type=int, default=4, help="of the tests (default: %(default)s)")
    parser.add_argument("--trl-python", type=Path, default=TRL_PYTHON, help="of TRL's environment")
    parser.add_argument("--tiny", action="store_true", help="one tiny case on the CPU, for a test")
    parser.add_argument("--results", type=Path, required=True, help="folder for results and logs")
    arguments = parser.parse_args(texts)
    if unknown := [name for name in arguments.stages.split(",") if name not in SHARES]:
        parser.error(f"--stages: {', '.join(unknown)}: choose from {', '.join(SHARES)}")
    arguments.results.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + arguments.limit
    for name, command in commands(arguments).items():
        limit = (end - time.monotonic()) * SHARES[name]
        if name in arguments.stages.split(",") and limit > 0:
            if name == "cases":
                command = [*command, "--limit", str(round(limit - 30))]  # the last case may take longer
            print(f"{name}: for {limit:.0f} s at most", flush=True)
            print(f"{name}: {run_stage(name, command, limit, arguments.results)}", flush=True)
            print("".join((arguments.results / f"{name}.log").read_text().splitlines(keepends=True)[-40:]), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
