"""Train a language model on preference data: python train.py loss=dpo loss.beta=0.1 (see README.md)."""

import contextlib
import errno
import os
import sys
import traceback
from datetime import datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from urllib.request import getproxies

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from engine.secrets import public, redact
from engine.validation import check_command_line, explain_hydra_error, validate_config
from utils import UserError, is_out_of_memory, is_reachable, leave, local_dir, write_atomically


def run(config: DictConfig) -> None:
    """One training run: validate, resolve names, load data and models, train. Heavy imports wait for a valid config."""
    validate_config(config)
    derive_names(config)
    if not reaches_hub(config):
        os.environ["HF_HUB_OFFLINE"] = "1"  # before libraries are imported that read it, and would try for a minute
        print("the Hugging Face hub cannot be reached: models and data come from its local cache")
    run_dir, checkpoint = open_run_dir(config)
    try:
        train(config, run_dir, checkpoint)
    except Exception:
        with contextlib.suppress(OSError):
            (run_dir / "crash.log").write_text(redact(traceback.format_exc(), config), encoding="utf-8")
        raise
    print(f"run_dir: {run_dir}", flush=True)


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
            is_checkpoint = path.name == "LATEST" or path.name.startswith("step-")
            config.local_run_dir = str(path.parent if is_checkpoint else path)
        else:
            now = datetime.now().strftime("%Y-%m-%d_%H-%M-%S_%f")
            config.local_run_dir = str(root / f"{config.exp_name}_{now}")


def open_run_dir(config: DictConfig) -> tuple[Path, Path | None]:
    """Find the checkpoint to resume from, if any; then make the run directory and write config.yaml."""
    from engine.checkpoint import check_settings, checkpoints, find_checkpoint, rewind

    run_dir = Path(config.local_run_dir)
    checkpoint = None
    if config.resume is not None:
        source = run_dir if config.resume == "auto" else Path(config.resume)
        checkpoint = find_checkpoint(source)
        if checkpoint is None and config.resume != "auto":
            raise UserError("CHECKPOINT", f"resume: no checkpoint in {source}", "give a run directory or checkpoint")
    holds_a_run = (run_dir / "metrics.jsonl").exists()
    if checkpoint is not None:
        check_settings(checkpoint, config)
        if checkpoint.parent == run_dir.resolve() and checkpoint != checkpoints(run_dir.resolve())[-1]:
            raise UserError(
                "CONFIG",
                f"resume: {run_dir} holds checkpoints after {checkpoint.name}",
                f"resume={run_dir} to go on from the last one, or another local_run_dir to branch off",
            )
        holds_a_run &= checkpoint.parent != run_dir.resolve()
    elif config.resume == "auto":  # stopped before its first checkpoint, so it starts anew
        rewind(run_dir, {})
        holds_a_run = False
    if holds_a_run:
        raise UserError(
            "CONFIG", f"local_run_dir: {run_dir} holds a run", "resume=auto to continue it, or another local_run_dir"
        )
    try:
        write_atomically(run_dir / "config.yaml", OmegaConf.to_yaml(OmegaConf.create(public(config))).encode())
    except OSError as error:
        raise UserError(
            "STORAGE", f"local_run_dir: cannot write to {run_dir} ({error.strerror})", "set local_run_dir elsewhere"
        ) from error
    return run_dir, checkpoint


def train(config: DictConfig, run_dir: Path, checkpoint: Path | None) -> None:
    """Load the tokenizer and the data, say what was found, and hand over to the trainer."""
    import transformers

    from engine.models import load_tokenizer
    from losses import LOSSES
    from preference_datasets import format_counts, load_split, num_shared_prompts
    from trainers import TRAINERS

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    print(f"run directory: {run_dir}")
    tokenizer = load_tokenizer(config)
    splits = []
    for name in ("train", "test"):
        splits.append(load_split(config, tokenizer, name, LOSSES[config.loss.name].batch))
        print(f"{name}: {format_counts(splits[-1].counts)}", flush=True)
    shared, num_prompts = num_shared_prompts(*splits)
    if shared:
        print(f"warning: {shared:,} of the {num_prompts:,} test prompts are train prompts too: evaluation will flatter")
    trainer = TRAINERS[config.trainer](config, run_dir, tokenizer, *splits)
    trainer.train(checkpoint)


def reaches_hub(config: DictConfig) -> bool:
    """Whether the hub can be reached, or the run has no need of it, or the environment has settled it."""
    model = config.model
    names = [model.tokenizer_name_or_path or model.name_or_path]
    if model.architecture is None:
        names.append(model.name_or_path)
    is_local = all(name == "films" or Path(name).exists() for name in names)
    if is_local or os.environ.get("HF_HUB_OFFLINE") or getproxies().get("https"):
        return True
    return is_reachable(os.environ.get("HF_ENDPOINT", "https://huggingface.co"))


def as_user_error(error: Exception) -> UserError | None:
    """What to tell the user of an error; None if it is the program's own."""
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
    return None


def run_job(config: DictConfig) -> int:
    """Run one job of the command line, print the error that ended it, and return its exit status."""
    hydra_config = HydraConfig.get()
    if hydra_config.mode == RunMode.MULTIRUN:
        print(f"job {hydra_config.job.num}: {redact(' '.join(hydra_config.overrides.task), config)}", flush=True)
    try:
        run(config)
        return 0
    except Exception as error:
        user_error = as_user_error(error)
        if user_error is not None:
            print(redact(str(user_error), config), file=sys.stderr)
            return user_error.exit_status
        log = Path(config.local_run_dir or ".", "crash.log")
        where = f"traceback in {log}" if log.exists() else traceback.format_exc()
        message = f"error[INTERNAL] {type(error).__name__}: {' '.join(str(error).split())}; {where}"
        print(redact(message, config), file=sys.stderr)
        return 1


def main() -> int:
    """Run the command line, a job or the jobs of a sweep; returns the exit status, of a sweep the first that failed."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # so that errors in the command line reach this function
    OmegaConf.register_new_resolver("local_dir", lambda dirs: str(local_dir(dirs)), replace=True)
    # Hydra writes down a sweep with its overrides as they were given. They may hold secrets, so that does not stay.
    temporary = contextlib.ExitStack()
    OmegaConf.register_new_resolver(
        "sweep_dir", lambda: temporary.enter_context(TemporaryDirectory(prefix="sweep-")), replace=True, use_cache=True
    )
    statuses: list[int] = []

    @hydra.main(version_base=None, config_path=str(Path(__file__).parent / "config"), config_name="config")
    def command(config: DictConfig) -> None:
        statuses.append(run_job(config))

    try:
        check_command_line(sys.argv[1:])
        command()
    except KeyboardInterrupt:
        print("interrupted; resume= goes on from the last checkpoint", file=sys.stderr)
        return 130
    except SystemExit as exit:  # of --help, or an option that Hydra does not have
        return int(exit.code or 0)
    except BrokenPipeError:  # of a pager that was closed
        return 1
    except Exception as error:  # of the command line: errors of the job do not get here
        user_error = explain_hydra_error(error)
        print(redact(str(user_error)), file=sys.stderr)
        return user_error.exit_status
    finally:
        temporary.close()
    return next((status for status in statuses if status), 0)


if __name__ == "__main__":
    leave(main())
