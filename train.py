"""Train a language model on preference data: python train.py loss=dpo loss.beta=0.1 (see README.md)."""

import process_start

if __name__ == "__main__":  # before the slow imports
    process_start.begin()

import os
import shlex
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext, redirect_stderr, redirect_stdout, suppress
from io import TextIOWrapper
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Literal

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from engine.models.hub import prepare_hub
from engine.placement import launcher, process_group, worker_link
from engine.placement.processes import check_processes, choose_num_processes, uses_process_group
from engine.placement.worker import STOPPED
from engine.placement.world import World, world_from_environment
from engine.run.failures import CRASH_NOTE, as_failure, as_user_error
from engine.run.logger_packages import check_loggers
from engine.run.model_pins import with_models
from engine.run.run_dir import crash_log, derive_names, open_run, sweep_directory, time_stamp
from engine.run.run_files import is_untrained
from engine.run.run_record import write_record
from engine.run.stop_notice import stop_notice
from engine.settings.hydra_errors import explain_hydra_error
from engine.settings.hydra_guard import check_command_line, split_arguments
from engine.settings.reading import read_settings, settings_from_text, settings_to_text
from engine.settings.schema import Settings
from engine.settings.secrets import redact
from engine.settings.sweeps import quoted_for_hydra, resolve_hydra, sweep_name
from engine.settings.unused import check_unused
from engine.sweep.jobs import Job
from engine.sweep.plugins import have_begun, output_place, prepare_directory, read_result, write_result
from engine.sweep.pool import run_jobs
from utils import BestEffortStream, local_dir

SPLITS: tuple[Literal["train", "test"], ...] = ("train", "test")

if TYPE_CHECKING:  # they take seconds to import
    from transformers import PreTrainedTokenizerBase

    from engine.data.examples import Split


def run(settings: Settings) -> int:
    """Run training, here or in workers; returns the exit status."""
    given = world_from_environment()
    num_processes = given.size if given else choose_num_processes(settings)
    check_processes(settings, num_processes, is_given=given is not None)
    if settings.plan:
        print_plan(settings, num_processes)
        return 0
    check_loggers(settings)
    if given or num_processes == 1:
        status = run_here(settings)
    else:
        process_start.collect_garbage()
        names = derive_names(settings)
        status = launcher.launch(settings_to_text(settings, names), num_processes)
        if status in STOPPED:
            print(stop_notice(status - 128, settings.named(**names)), file=sys.stderr)
    if status in STOPPED:
        sys.exit(status)  # skips the next jobs of a sweep
    return status


def prepare(config: DictConfig, varied: Sequence[str] = ()) -> Settings:
    """The settings of a run; prints warnings about them. Slow imports come after the check of settings.

    Args:
        varied: keys that differ between the jobs of a sweep.
    """
    from preference_datasets import DATASETS

    settings = read_settings(config, DATASETS)
    if varied:
        name = sweep_name(derive_names(settings)["exp_name"], HydraConfig.get().overrides.task, varied)
        settings = settings.model_copy(update={"exp_name": name})
    has_experiment = is_sweep = False
    if HydraConfig.initialized():
        settings = settings.with_command(command_of(HydraConfig.get().overrides.task))
        has_experiment = "experiment" in HydraConfig.get().runtime.choices
        is_sweep = HydraConfig.get().mode == RunMode.MULTIRUN
    for warning in check_unused(settings, DATASETS, has_experiment, is_sweep):
        print(redact(warning, config), flush=True)
    prepare_hub(settings)
    return settings


def command_of(overrides: Sequence[str]) -> str:
    """The command that runs the same again, in a new directory. A branch starts from its checkpoint again."""
    is_left_out = ("resume=auto", "resume_allow=", "local_run_dir=")
    kept = [override for override in overrides if not override.lstrip("+").startswith(is_left_out)]
    return shlex.join(["python", "train.py", *kept])


def run_here(settings: Settings) -> int:
    """Run in this process, alone or as one rank; returns the exit status."""
    group = process_group.joined(settings.collective_timeout) if uses_process_group(settings) else nullcontext()
    with group, ExitStack() as locks:
        names, run_dir, checkpoint, models = process_group.broadcast_from_rank_0(lambda: open_run(settings, locks))
        settings = with_models(settings.named(**names), models)
        try:
            stopped_by = train(settings, run_dir, checkpoint)
        except Exception as error:
            write_crash_log(error, settings, run_dir)
            raise
    print(f"run_dir: {run_dir}", flush=True)
    if stopped_by is None:
        return 0
    if process_group.world().rank == 0 and not worker_link.is_worker():  # the launcher prints it for workers
        print(stop_notice(stopped_by, settings), file=sys.stderr)
    return 128 + stopped_by


def write_crash_log(error: Exception, settings: Settings, run_dir: Path) -> None:
    """Write the traceback of an error into the run directory. Before training, errors for users need none."""
    with suppress(OSError):
        if as_user_error(error) is None or not is_untrained(run_dir):
            log = crash_log(settings, process_group.world().rank)
            log.write_text(redact(traceback.format_exc(), settings.source), encoding="utf-8")
            error.add_note(f"{CRASH_NOTE}{log}")


def train(settings: Settings, run_dir: Path, checkpoint: Path | None) -> int | None:
    """Load tokenizer and data, and train.

    Returns:
        the signal that stopped the run, with its state saved; None for a complete run.
    """
    from trainers import TRAINERS

    print(f"run directory: {run_dir}\ncache directory: {settings.cache_dir}")
    tokenizer, splits = load_data(settings)
    if process_group.world().rank == 0 and not settings.debug:
        write_record(run_dir, settings, {name: split.counts for name, split in zip(SPLITS, splits, strict=True)})
    data = (splits[0], splits[1], load_mix(settings, tokenizer))
    trainer = TRAINERS[settings.trainer](settings, run_dir, tokenizer, *data)
    return trainer.train(checkpoint)


def print_plan(settings: Settings, num_processes: int) -> None:
    """Print the plan of a run on num_processes. No run directory is created."""
    from engine.run.plan import make_plan
    from engine.run.plan_report import format_plan
    from trainers import TRAINERS

    settings = settings.named(**derive_names(settings))
    tokenizer, (train_split, test_split) = load_data(settings)
    trainer, num_gpus = TRAINERS[settings.trainer], launcher.count_gpus()
    plan = make_plan(settings, trainer, tokenizer, train_split, test_split, num_processes, num_gpus)
    print(f"\n{format_plan(plan)}")


def load_data(settings: Settings) -> "tuple[PreTrainedTokenizerBase, list[Split]]":
    """Load the tokenizer and the training and test data, and print their counts."""
    import transformers

    from engine.data.held_out import hold_out_prompts
    from engine.data.tokenizer_training import train_tokenizer
    from engine.models.tokenizers import load_tokenizer
    from losses import LOSSES
    from preference_datasets import format_counts, load_split, num_shared_prompts, read_texts

    process_start.collect_garbage()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    with process_group.rank_0_first():  # the other ranks read a new tokenizer from cache_dir
        trained = None if settings.tokenizer.train is None else train_tokenizer(settings, read_texts(settings))
    tokenizer = trained or load_tokenizer(settings.model)
    loss = LOSSES[settings.loss.name]
    if loss.batch == "tokens":
        return tokenizer, load_text(settings, tokenizer)
    splits: list[Split] = []
    with process_group.local_first():  # the other ranks read the tokens from cache_dir
        for name in SPLITS:
            split = load_split(settings, tokenizer, name, loss.batch, needs_mismatched="kl" in loss.needs)
            splits.append(split)
            print(f"{name}: {format_counts(splits[-1].counts)}", flush=True)
    if loss.head == "score" and not splits[1].examples:
        splits = list(hold_out_prompts(splits[0], settings.seed))
        print(f"held out of train: {len(splits[1].examples):,} rankings, for evaluations and the mean of the rewards")
        if not splits[1].examples:
            print("warning: no ranking can be held out: no evaluation, and no reward_mean and reward_std (add prompts)")
    shared, num_prompts = num_shared_prompts(*splits)
    if shared:
        print(f"warning: {shared:,} of the {num_prompts:,} test prompts are train prompts too: evaluation is too good")
    return tokenizer, splits


def load_text(settings: Settings, tokenizer: "PreTrainedTokenizerBase") -> "list[Split]":
    """Load the windows of text of training and test data, and print their counts."""
    from engine.data.corpus import format_text_counts, load_windows
    from preference_datasets import read_texts

    with process_group.rank_0_first():  # the other ranks read the tokens from cache_dir
        splits = load_windows(settings, tokenizer, read_texts(settings))
        for name, split in zip(SPLITS, splits, strict=True):
            print(f"{name}: {format_text_counts(split.counts)}", flush=True)
    return [*splits]


def load_mix(settings: Settings, tokenizer: "PreTrainedTokenizerBase") -> "Split | None":
    """Load the stored responses of ptx.datasets, and print their counts; None without any."""
    from engine.run.pretraining_mix import mix_settings
    from preference_datasets import format_counts, load_split

    if not settings.ptx.datasets:
        return None
    with process_group.local_first():
        split = load_split(mix_settings(settings), tokenizer, "train", "sft")
    print(f"ptx: {format_counts(split.counts)}", flush=True)
    return split


def run_job(config: DictConfig, varied: Sequence[str]) -> int:
    """Run one job of the command line, print its error, if any, and return its exit status."""
    if HydraConfig.get().mode == RunMode.MULTIRUN:
        print_job(config)
    return attempt(lambda: run(prepare(config, varied)), config)


def attempt(function: Callable[[], int], config: DictConfig) -> int:
    """The exit status that function returns, or that of its error, which is printed."""
    try:
        return function()
    except Exception as error:
        world = world_from_environment() or World()
        failure = as_failure(error, config)
        print(launcher.add_rank(world.rank, failure.line) if world.size > 1 else failure.line, file=sys.stderr)
        if world.size > 1 and process_group.world().size > 1:
            sys.exit(failure.status)  # ranks are out of step: a sweep cannot continue
        return failure.status


def print_job(config: DictConfig) -> None:
    """Print the number of a job of a sweep, and its overrides."""
    hydra_config = HydraConfig.get()
    print(f"job {hydra_config.job.num}: {redact(' '.join(hydra_config.overrides.task), config)}", flush=True)


def prepare_job(config: DictConfig, varied: Sequence[str], started: str) -> Job:
    """A job of a sweep, for a child process. A wrong config is reported here; a plan is printed here.

    Args:
        started: when the sweep has.
    """
    hydra_config = HydraConfig.get()
    job = Job(hydra_config.job.num, [*hydra_config.overrides.task])
    if config.get("plan") is True:
        job.status = run_job(config, varied)
        return job
    try:
        settings = prepare(config, varied)
        check_loggers(settings)
        settings = settings.with_source(resolve_hydra(settings.source))  # the child has no Hydra
        job.settings = settings.named(**derive_names(settings, f"{started}_{job.number}"))
    except Exception as error:
        print_job(config)
        failure = as_failure(error, config)
        print(launcher.add_label(job.label, failure.line), file=sys.stderr)
        job.status = failure.status
    return job


def run_elsewhere(config: DictConfig, varied: Sequence[str], started: str, directory: Path, plugin: str) -> None:
    """Run a job that a plugin of Hydra has brought to this process, and leave its result.

    Args:
        directory: of the sweep.
    """
    register_resolvers()
    sys.argv = [str(launcher.PROGRAM)]  # of the command that resumes it
    job, world = prepare_job(config, varied, started), world_from_environment()
    settings = job.settings
    try:
        if world is None:
            run_jobs([job], is_prefixed=plugin == "joblib")  # one terminal for all
        elif settings is not None:  # tasks of Slurm are the processes of the run
            job.run_dir = Path(settings.local_run_dir or "")
            job.status = attempt(lambda: run(settings), config)
    except SystemExit as exit:  # stopped by a signal
        job.status = int(exit.code or 0)
    if world is None or world.rank == 0:
        write_result(job, directory)


def run_worker() -> int:
    """Run as a worker of launch(); returns the exit status."""
    from preference_datasets import DATASETS

    text, config = worker_link.attach(), OmegaConf.create()
    try:
        settings = settings_from_text(text, DATASETS)
        config = settings.source
        return run_here(settings)
    except KeyboardInterrupt:  # the launcher prints it
        return 128 + signal.SIGINT
    except Exception as error:
        failure = as_failure(error, config)
        worker_link.report(failure)
        return failure.status


def silence_other_ranks() -> None:
    """Silence stdout on all ranks but 0. Their errors go to stderr."""
    world = world_from_environment()
    if world is not None and world.rank > 0:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  open until the process ends


def main() -> int:
    """Run the command line: a job, or the jobs of a sweep.

    Returns:
        the exit status; of a sweep, that of the first failed job.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal may support few characters
    with redirect_stdout(BestEffortStream(sys.stdout)), redirect_stderr(BestEffortStream(sys.stderr)):
        return run_command_line()


def register_resolvers() -> None:
    OmegaConf.register_new_resolver("local_dir", lambda dirs: str(local_dir(dirs)), replace=True)


def run_command_line() -> int:
    """main() with output streams that never raise."""
    silence_other_ranks()
    if worker_link.is_worker():
        return run_worker()
    os.environ["HYDRA_FULL_ERROR"] = "1"  # errors in the command line then reach this function
    register_resolvers()
    temporary = ExitStack()

    def sweep_dir() -> str:
        directory = temporary.enter_context(TemporaryDirectory(prefix="sweep-"))
        # Hydra saves a sweep's overrides there. They may hold secrets.
        Path(directory, "multirun.yaml").symlink_to(os.devnull)
        return directory

    OmegaConf.register_new_resolver("sweep_dir", sweep_dir, replace=True, use_cache=True)
    try:
        return compose_and_run()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except SystemExit as exit:  # of --help, or an unknown option
        return int(exit.code or 0)
    except Exception as error:  # of the command line; run_job has handled errors of jobs
        user_error = explain_hydra_error(error)
        print(redact(str(user_error)), file=sys.stderr)
        return user_error.exit_status
    finally:
        temporary.close()


def compose_and_run() -> int:
    """Let Hydra compose the command line, and run its job or jobs; returns the exit status."""
    statuses: list[int] = []
    jobs: list[Job] = []
    varied: list[str] = []
    started, directory, plugin = time_stamp(), Path(), ""

    @hydra.main(version_base=None, config_path=str(Path(__file__).parent / "config"), config_name="config")
    def command(config: DictConfig) -> None:
        if plugin:
            run_elsewhere(config, varied, started, directory, plugin)
        elif HydraConfig.get().mode == RunMode.MULTIRUN and world_from_environment() is None:
            jobs.append(prepare_job(config, varied, started))
        else:
            statuses.append(run_job(config, varied))

    options, overrides = split_arguments(sys.argv[1:])
    sys.argv[1:] = [*options, *overrides]
    sweep = check_command_line(sys.argv[1:], command)
    if sweep is not None:
        varied += sweep.varied
        directory, plugin = sweep_directory(sweep.configs[0], started), sweep.plugin or ""
        if plugin:
            prepare_directory(directory)
            sys.argv.append(f"hydra.sweep.dir={quoted_for_hydra(str(directory))}")
            print(
                f"{len(sweep.jobs)} jobs by hydra/launcher={plugin}; output: {output_place(plugin, directory)}",
                flush=True,
            )
    try:
        command()
    except Exception as error:
        if not plugin or not have_begun(directory):
            raise
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        line = f"error[DISTRIBUTED] hydra/launcher={plugin}: {reason}; fix: see {output_place(plugin, directory)}"
        print(redact(line), file=sys.stderr)
    if sweep is None or statuses:
        return next((status for status in statuses if status), 0)
    if plugin:
        jobs = [read_result(number, job, directory) for number, job in enumerate(sweep.jobs)]
    else:
        process_start.collect_garbage()
        if (stopped_by := run_jobs(jobs)) is not None:
            return 128 + stopped_by
    from engine.sweep.summary import finish

    return finish(sweep, jobs, directory)


if __name__ == "__main__":
    process_group.exit_process(main())
