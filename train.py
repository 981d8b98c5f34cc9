"""Train a language model on preference data: python train.py loss=dpo loss.beta=0.1 (see README.md)."""

import errno
import os
import shutil
import signal
import sys
import traceback
from contextlib import ExitStack, nullcontext, redirect_stderr, redirect_stdout, suppress
from datetime import datetime
from io import TextIOWrapper
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING
from urllib.request import getproxies

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from engine import distributed, launch
from engine.command_line import check_command_line
from engine.commands import with_bases
from engine.secrets import public, redact
from engine.validation import explain_hydra_error, validate_config
from utils import Unfailing, UserError, is_out_of_memory, is_reachable, local_dir, write_atomically

if TYPE_CHECKING:  # they take seconds to import
    from transformers import PreTrainedTokenizerBase

    from engine.tokenization import Split

# The first line of a config.yaml says that a run has written it, and from which checkpoint of another run that went on.
RUN_MARK, BRANCH_MARK = "# The settings of a run of train.py", ", which went on from "


def run(config: DictConfig) -> int:
    """One training run, here or in workers; returns the exit status. Heavy imports wait for a valid config."""
    validate_config(config)
    given = distributed.given_world()
    num_processes = given.size if given else choose_num_processes(config)
    check_processes(config, num_processes, is_given=given is not None)
    prepare_hub(config)
    if config.plan:
        print_plan(config, num_processes)
        return 0
    if given or num_processes == 1:
        status = run_here(config)
    else:
        derive_names(config)
        status = launch.launch(config, num_processes)
    if status == 128 + signal.SIGINT:
        raise KeyboardInterrupt
    if status in launch.STOPPED:
        sys.exit(status)  # not on to the next job of a sweep
    return status


def uses_process_group(config: DictConfig) -> bool:
    """Whether the trainer runs in a process for each device."""
    return config.trainer != "BasicTrainer" and config.tensor_parallel.backend == "native"


def choose_num_processes(config: DictConfig) -> int:
    """How many processes a run has that nobody else has started: as configured, all GPUs, or as few as it takes."""
    if not uses_process_group(config):
        return 1
    asked = config.num_processes
    if asked is None and config.trainer == "TensorParallelTrainer":
        asked = config.tensor_parallel_size
    num_gpus = launch.count_gpus()
    if asked is not None and 0 < num_gpus < asked and not config.plan:
        fix = "give fewer, or hide the GPUs with CUDA_VISIBLE_DEVICES= to train on the CPU"
        raise UserError("CONFIG", f"num_processes: {asked} processes need as many GPUs, and there are {num_gpus}", fix)
    return asked or num_gpus or (config.tensor_parallel_size or 1) * config.fsdp.replicas


def check_processes(config: DictConfig, num: int, is_given: bool) -> None:
    """Raise a UserError if the trainer cannot run on num processes, or others were asked for than there are."""
    asked, size = config.num_processes, config.tensor_parallel_size
    if is_given and asked not in (None, num):
        problem = f"num_processes: {asked} were asked for, and torchrun or Slurm has started {num}"
        raise UserError("CONFIG", problem, "leave num_processes out")
    if num > 1 and not uses_process_group(config):
        problem = f"trainer: {config.trainer} is one process here, and torchrun or Slurm has started {num}"
        raise UserError("CONFIG", problem, "start one, or set trainer=FSDPTrainer")
    if config.trainer == "TensorParallelTrainer" and uses_process_group(config) and size not in (None, num):
        problem = f"tensor_parallel_size: {size} is not the number of processes ({num})"
        raise UserError("CONFIG", problem, "leave it out, or combine both with trainer=FSDPTrainer")
    if config.trainer == "FSDPTrainer" and num % ((size or 1) * config.fsdp.replicas):
        problem = f"tensor_parallel_size={size or 1} x fsdp.replicas={config.fsdp.replicas} does not divide"
        raise UserError("CONFIG", f"{problem} the number of processes ({num})", "change one of them")


def run_here(config: DictConfig) -> int:
    """A valid run in this process, which is all of it or one of its ranks; returns the exit status."""
    group = distributed.joined(config.collective_timeout) if uses_process_group(config) else nullcontext()
    with group, ExitStack() as locks:
        names, run_dir, checkpoint = distributed.share(lambda: open_run(config, locks))
        config.merge_with(names)
        try:
            stopped_by = train(config, run_dir, checkpoint)
        except Exception:
            with suppress(OSError):
                crash_log(config, distributed.world().rank).write_text(
                    redact(traceback.format_exc(), config), encoding="utf-8"
                )
            raise
    print(f"run_dir: {run_dir}", flush=True)
    return 0 if stopped_by is None else 128 + stopped_by


def open_run(config: DictConfig, locks: ExitStack) -> tuple[dict[str, str], Path, Path | None]:
    """Derive the names that are left to be, and open the run directory; returns the names, it, and the checkpoint.

    Args:
        locks: until it is closed, no other process can open the directory.
    """
    from engine.checkpoint import locked, names_checkpoint

    derive_names(config)
    if config.resume not in (None, "auto") and not names_checkpoint(Path(config.resume)):  # before anything is made
        raise no_checkpoint(Path(config.resume))
    names = {key: config[key] for key in ("exp_name", "cache_dir", "local_run_dir")}
    locks.enter_context(locked(Path(config.local_run_dir)))
    return names, *open_run_dir(config)


def no_checkpoint(source: Path) -> UserError:
    return UserError("CHECKPOINT", f"resume: no checkpoint in {source}", "give a run directory or checkpoint")


def crash_log(config: DictConfig, rank: int) -> Path:
    return Path(config.local_run_dir or ".", f"crash-rank{rank}.log" if rank else "crash.log")


def derive_names(config: DictConfig) -> None:
    """Fill in the names that were left to be derived."""
    if config.exp_name is None:
        datasets = "_".join(Path(name).name.split(".")[0] for name in config.datasets)
        config.exp_name = f"{datasets}_{Path(config.model.name_or_path).name}_{config.loss.name}"
    root = local_dir(config.local_dirs)
    if config.cache_dir is None:
        config.cache_dir = str(root / "cache")
    if config.local_run_dir is None:
        if config.resume is not None:
            path = Path(config.resume)
            is_checkpoint = path.name in ("LATEST", "BEST") or path.name.startswith("step-")
            config.local_run_dir = str(path.parent if is_checkpoint else path)
        else:
            now = datetime.now().strftime("%Y-%m-%d_%H-%M-%S_%f")
            config.local_run_dir = str(root / f"{config.exp_name}_{now}")


def open_run_dir(config: DictConfig) -> tuple[Path, Path | None]:
    """Find the checkpoint to resume from, if any; then make the run directory and write config.yaml."""
    from engine.checkpoint import (
        check_settings,
        checkpoints,
        find_checkpoint,
        point_to,
        remove_temporaries,
        restore_links,
        rewind,
    )

    run_dir = Path(config.local_run_dir)
    checkpoint = None
    if config.resume is not None:
        source = run_dir if config.resume == "auto" else Path(config.resume)
        checkpoint = find_checkpoint(source)
        if checkpoint is None and config.resume != "auto":
            raise no_checkpoint(source)
    is_run, origin = look_into(run_dir)
    others = [path.name for path in run_dir.iterdir() if not path.name.startswith(".")]
    if others and not is_run:
        raise UserError(
            "STORAGE",
            f"local_run_dir: {run_dir} holds other files ({', '.join(sorted(others)[:3])}) and is no run",
            "set a new or empty directory",
        )
    has_saved = bool(checkpoints(run_dir)) or os.path.lexists(run_dir / "LATEST")
    if checkpoint is None and config.resume == "auto":
        checkpoint = start_of(run_dir, origin)
    is_own = checkpoint is not None and checkpoint.parent == run_dir.resolve()
    if checkpoint is not None:
        check_settings(checkpoint, config)
        if is_own and config.resume != "auto" and find_checkpoint(run_dir) != checkpoint:
            raise UserError(
                "CONFIG",
                f"resume: {run_dir} holds checkpoints after {checkpoint.name}",
                f"resume={run_dir} to go on from the last one, or another local_run_dir to branch off",
            )
    is_same_start = checkpoint == origin and not has_saved  # it was stopped before its first checkpoint
    goes_on = is_own or config.resume == "auto" or (checkpoint is not None and is_same_start)
    if (has_saved or (run_dir / "metrics.jsonl").exists()) and not goes_on:
        raise UserError(
            "CONFIG", f"local_run_dir: {run_dir} holds a run", "resume=auto to continue it, or another local_run_dir"
        )
    try:
        remove_temporaries(run_dir)
        if checkpoint is not None and is_own:  # a run that is killed before LATEST is set has saved it all the same
            restore_links(run_dir)
            point_to(checkpoint)
        else:
            origin = checkpoint
            rewind(run_dir, {})
            shutil.rmtree(run_dir / "base", ignore_errors=True)  # of a start that may have had another model
        mark = f"{RUN_MARK}\n" if origin is None else f"{RUN_MARK}{BRANCH_MARK}{origin}\n"
        settings = OmegaConf.to_yaml(OmegaConf.create(public(config)))
        write_atomically(run_dir / "config.yaml", (mark + settings).encode())
    except OSError as error:
        raise UserError(
            "STORAGE", f"local_run_dir: cannot write to {run_dir} ({error.strerror})", "set local_run_dir elsewhere"
        ) from error
    return run_dir, checkpoint


def look_into(run_dir: Path) -> tuple[bool, Path | None]:
    """Whether a directory was written by a run, and does not only have files of the same names; and the checkpoint of
    another run that it went on from, if it did."""
    from engine.checkpoint import checkpoints, is_checkpoint

    mark, path = "", run_dir / "config.yaml"
    if path.is_file():
        with open(path, encoding="utf-8", errors="replace") as file:
            mark = file.readline().rstrip("\n")
    origin = mark.removeprefix(RUN_MARK + BRANCH_MARK)
    is_run = mark.startswith(RUN_MARK) or any(is_checkpoint(path) for path in checkpoints(run_dir))
    return is_run, None if origin == mark else Path(origin)


def start_of(run_dir: Path, origin: Path | None) -> Path | None:
    """What a run that has no checkpoint to go on from starts from: the checkpoint origin of another run, or anew."""
    from engine.checkpoint import find_checkpoint

    latest = run_dir / "LATEST"
    if os.path.lexists(latest):
        is_what = f"a link to {os.readlink(latest)}" if latest.is_symlink() else "a directory"
        problem = f"resume: {latest} is {is_what}, but there is no checkpoint (step-N) in {run_dir}"
        raise UserError("CHECKPOINT", problem, "put it back, or remove LATEST to start anew")
    if origin is None:
        print(f"resume: there is no checkpoint in {run_dir}, so the run starts anew")
        return None
    checkpoint = find_checkpoint(origin)
    if checkpoint is None:
        problem = f"resume: {run_dir} has no checkpoint yet, and {origin}, which it went on from, is not there"
        raise UserError("CHECKPOINT", problem, "put that back, or set another local_run_dir")
    return checkpoint


def train(config: DictConfig, run_dir: Path, checkpoint: Path | None) -> int | None:
    """Load the tokenizer and the data, say what was found, and hand over to the trainer.

    Returns:
        the signal that stopped it, after the state was saved; None if it came to its end.
    """
    from trainers import trainer_class

    print(f"run directory: {run_dir}")
    tokenizer, splits = load_data(config)
    trainer = trainer_class(config)(config, run_dir, tokenizer, *splits)
    return trainer.train(checkpoint)


def print_plan(config: DictConfig, num_processes: int) -> None:
    """Print what a run on num_processes will take; no run directory is made."""
    from engine.plan import make_plan
    from trainers import trainer_class

    derive_names(config)
    tokenizer, (train_split, test_split) = load_data(config)
    print(f"\n{make_plan(config, trainer_class(config), tokenizer, train_split, test_split, num_processes)}")


def load_data(config: DictConfig) -> "tuple[PreTrainedTokenizerBase, list[Split]]":
    """The tokenizer, and the training and test data; what was found is printed."""
    import transformers

    from engine.models import load_tokenizer
    from losses import LOSSES
    from preference_datasets import format_counts, load_split, num_shared_prompts

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    tokenizer = load_tokenizer(config)
    splits = []
    with distributed.local_first():  # the others find the tokens in cache_dir
        for name in ("train", "test"):
            splits.append(load_split(config, tokenizer, name, LOSSES[config.loss.name].batch))
            print(f"{name}: {format_counts(splits[-1].counts)}", flush=True)
    shared, num_prompts = num_shared_prompts(*splits)
    if shared:
        print(f"warning: {shared:,} of the {num_prompts:,} test prompts are train prompts too: evaluation will flatter")
    return tokenizer, splits


def prepare_hub(config: DictConfig) -> None:
    """Where the hub cannot be reached, keep libraries from trying for a minute. They read this when imported."""
    if not reaches_hub(config):
        os.environ["HF_HUB_OFFLINE"] = "1"
        print("the Hugging Face hub cannot be reached: models and data come from its local cache")


def reaches_hub(config: DictConfig) -> bool:
    """Whether the hub can be reached, or the run has no need of it, or the environment has settled it."""
    model = config.model
    names = [model.tokenizer_name_or_path or model.name_or_path]
    if model.architecture is None:
        names.append(model.name_or_path)
    if model.archive is not None:
        names += [*with_bases([model.archive])][1:]  # of adapters
    is_local = all(name == "films" or Path(name).exists() for name in names)
    if is_local or os.environ.get("HF_HUB_OFFLINE") or getproxies().get("https"):
        return True
    return is_reachable(os.environ.get("HF_ENDPOINT", "https://huggingface.co"))


def as_user_error(error: Exception) -> UserError | None:
    """What to tell the user of an error; None if it is the program's own."""
    if distributed.is_lost_peer(error):  # whatever was made of it on the way
        reason = " ".join(str(error).split())
        fix = "see the errors of the other ranks; raise collective_timeout if one is only slow; continue with resume="
        return UserError("DISTRIBUTED", f"other ranks are lost or do not answer ({reason})", fix)
    if isinstance(error, UserError):
        return error
    if is_out_of_memory(error):
        reason = str(error).splitlines()[0] if str(error) else "no details"
        return UserError(
            "MEMORY",
            f"out of memory ({reason})",
            "a smaller token_budget, activation_checkpointing=true, mixed_precision=bfloat16 or a smaller max_length",
        )
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return UserError("STORAGE", f"no room left to write ({error})", "make room, then continue with resume=")
    if isinstance(error, OSError) and error.errno in (errno.EROFS, errno.EIO, errno.EACCES, errno.EPERM, errno.ESTALE):
        problem = f"a file cannot be read or written ({error})"
        return UserError("STORAGE", problem, "see to the disk and its permissions, then continue with resume=")
    return None


def as_failure(error: Exception, config: DictConfig, rank: int) -> launch.Failure:
    """The error that ended a run or one of its ranks, in a line, with its exit status."""
    is_consequence = distributed.is_lost_peer(error)
    user_error = as_user_error(error)
    if user_error is not None:
        return launch.Failure(redact(str(user_error), config), user_error.exit_status, is_consequence)
    log = crash_log(config, rank)
    where = f"traceback in {log}" if log.exists() else traceback.format_exc()
    line = f"error[INTERNAL] {type(error).__name__}: {' '.join(str(error).split())}; {where}"
    return launch.Failure(redact(line, config), 1, is_consequence)


def run_job(config: DictConfig) -> int:
    """Run one job of the command line, print the error that ended it, and return its exit status."""
    hydra_config = HydraConfig.get()
    if hydra_config.mode == RunMode.MULTIRUN:
        print(f"job {hydra_config.job.num}: {redact(' '.join(hydra_config.overrides.task), config)}", flush=True)
    try:
        return run(config)
    except Exception as error:
        world = distributed.given_world() or distributed.World()
        failure = as_failure(error, config, world.rank)
        print(launch.of_rank(world.rank, failure.line) if world.size > 1 else failure.line, file=sys.stderr)
        if world.size > 1 and distributed.world().size > 1:
            sys.exit(failure.status)  # the others may be anywhere: there is no going on to the next job of a sweep
        return failure.status


def run_worker() -> int:
    """Run as a worker that launch() has started; returns the exit status."""
    config = launch.attach()
    rank = int(os.environ["RANK"])
    try:
        return run_here(config)
    except KeyboardInterrupt:  # the launcher says it
        return 128 + signal.SIGINT
    except Exception as error:
        failure = as_failure(error, config, rank)
        launch.report(failure)
        return failure.status


def hush_other_ranks() -> None:
    """Only rank 0 prints; and of the others, what ended them."""
    world = distributed.given_world()
    if world is not None and world.rank > 0:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  for as long as the process lives


def main() -> int:
    """Run the command line, a job or the jobs of a sweep; returns the exit status, of a sweep the first that failed."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal may know few characters
    with redirect_stdout(Unfailing(sys.stdout)), redirect_stderr(Unfailing(sys.stderr)):
        return run_command_line()


def run_command_line() -> int:
    """main(), whose output cannot fail."""
    hush_other_ranks()
    if launch.is_worker():
        return run_worker()
    os.environ["HYDRA_FULL_ERROR"] = "1"  # so that errors in the command line reach this function
    OmegaConf.register_new_resolver("local_dir", lambda dirs: str(local_dir(dirs)), replace=True)
    temporary = ExitStack()

    def sweep_dir() -> str:
        directory = temporary.enter_context(TemporaryDirectory(prefix="sweep-"))
        # Hydra writes down a sweep with its overrides as they were given. They may hold secrets.
        Path(directory, "multirun.yaml").symlink_to(os.devnull)
        return directory

    OmegaConf.register_new_resolver("sweep_dir", sweep_dir, replace=True, use_cache=True)
    statuses: list[int] = []

    @hydra.main(version_base=None, config_path=str(Path(__file__).parent / "config"), config_name="config")
    def command(config: DictConfig) -> None:
        statuses.append(run_job(config))

    try:
        check_command_line(sys.argv[1:], command)
        command()
    except KeyboardInterrupt:
        print("interrupted; resume= goes on from the last checkpoint", file=sys.stderr)
        return 130
    except SystemExit as exit:  # of --help, or an option that Hydra does not have
        return int(exit.code or 0)
    except Exception as error:  # of the command line: errors of the job do not get here
        user_error = explain_hydra_error(error)
        print(redact(str(user_error)), file=sys.stderr)
        return user_error.exit_status
    finally:
        temporary.close()
    return next((status for status in statuses if status), 0)


if __name__ == "__main__":
    distributed.exit_process(main())
