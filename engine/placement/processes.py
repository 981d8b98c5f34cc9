"""The number of processes of a run."""

from engine.placement import launcher
from engine.settings.schema import Settings
from utils import UserError


def uses_process_group(settings: Settings) -> bool:
    """Whether the trainer runs one process per device."""
    return settings.trainer != "BasicTrainer" and settings.tensor_parallel.backend == "native"


def choose_num_processes(settings: Settings, num_gpus: int | None = None) -> int:
    """The number of processes to start: as configured, one per GPU, or the minimum required.

    Args:
        num_gpus: of the run; None counts those of this machine.
    """
    if not uses_process_group(settings):
        return 1
    asked = settings.num_processes
    if asked is None and settings.trainer == "TensorParallelTrainer":
        asked = settings.tensor_parallel_size
    if num_gpus is None:
        num_gpus = launcher.count_gpus()
    if asked is not None and 0 < num_gpus < asked and not settings.plan:
        fix = "give fewer, or hide the GPUs with CUDA_VISIBLE_DEVICES= to train on the CPU"
        raise UserError("CONFIG", f"num_processes: {asked} processes need as many GPUs, and there are {num_gpus}", fix)
    return asked or num_gpus or (settings.tensor_parallel_size or 1) * settings.fsdp.replicas


def check_processes(settings: Settings, num: int, is_given: bool) -> None:
    """Raise a UserError if the trainer cannot run on num processes.

    Args:
        is_given: torchrun or Slurm has started them.
    """
    asked, size = settings.num_processes, settings.tensor_parallel_size
    if is_given and asked not in (None, num):
        problem = f"num_processes: {asked} is set, but torchrun or Slurm has started {num}"
        raise UserError("CONFIG", problem, "leave num_processes out")
    if num > 1 and not uses_process_group(settings):
        problem = f"trainer: {settings.trainer} runs in one process, but torchrun or Slurm has started {num}"
        raise UserError("CONFIG", problem, "start one, or set trainer=FSDPTrainer")
    if settings.trainer == "TensorParallelTrainer" and uses_process_group(settings) and size not in (None, num):
        problem = f"tensor_parallel_size: {size} is not the number of processes ({num})"
        raise UserError("CONFIG", problem, "leave it out, or combine both with trainer=FSDPTrainer")
    if settings.trainer == "FSDPTrainer" and num % ((size or 1) * settings.fsdp.replicas):
        problem = f"tensor_parallel_size={size or 1} x fsdp.replicas={settings.fsdp.replicas} does not divide"
        raise UserError("CONFIG", f"{problem} the number of processes ({num})", "change one of them")
