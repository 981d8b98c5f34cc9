"""Train a language model on preference data: python train.py loss=dpo loss.beta=0.1 (see README.md)."""

import os
import sys
import traceback
from datetime import datetime
from pathlib import Path

import hydra
from omegaconf import DictConfig, OmegaConf

from engine.validation import explain_hydra_error, validate_config
from utils import UserError, local_dir, write_atomically


def run(config: DictConfig) -> None:
    """One training run: validate, resolve names, load data and models, train. Heavy imports wait for a valid config."""
    validate_config(config)
    derive_names(config)
    run_dir, checkpoint = open_run_dir(config)
    try:
        train(config, run_dir, checkpoint)
    except Exception as error:
        (run_dir / "crash.log").write_text(traceback.format_exc())
        raise as_user_error(error, run_dir) from error
    print(f"run_dir: {run_dir}", flush=True)


def derive_names(config: DictConfig) -> None:
    """Fill in the names that were left to be derived."""
    if config.exp_name is None:
        datasets = "_".join(Path(name).stem for name in config.datasets)
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
    """Make the run directory, write config.yaml, and find the checkpoint to resume from, if any."""
    from engine.checkpoint import find_checkpoint

    run_dir = Path(config.local_run_dir)
    checkpoint = None
    if config.resume is not None:
        source = run_dir if config.resume == "auto" else Path(config.resume)
        checkpoint = find_checkpoint(source)
        if checkpoint is None and config.resume != "auto":
            raise UserError("CHECKPOINT", f"resume: no checkpoint in {source}", "give a run directory or checkpoint")
    resumes_here = checkpoint is not None and checkpoint.parent == run_dir.resolve()
    if (run_dir / "metrics.jsonl").exists() and not resumes_here and config.resume != "auto":
        raise UserError(
            "CONFIG", f"local_run_dir: {run_dir} holds a run", "resume=auto to continue it, or another local_run_dir"
        )
    try:
        write_atomically(run_dir / "config.yaml", OmegaConf.to_yaml(config, resolve=True).encode())
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
    from preference_datasets import format_counts, load_split
    from trainers import TRAINERS

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    print(f"run directory: {run_dir}")
    tokenizer = load_tokenizer(config)
    splits = []
    for name in ("train", "test"):
        splits.append(load_split(config, tokenizer, name, LOSSES[config.loss.name].batch))
        print(f"{name}: {format_counts(splits[-1].counts)}", flush=True)
    trainer = TRAINERS[config.trainer](config, run_dir, tokenizer, *splits)
    trainer.train(checkpoint)


def as_user_error(error: Exception, run_dir: Path) -> Exception:
    """The one line that tells of an error; of one that is not the user's, where its traceback is."""
    if isinstance(error, UserError):
        return error
    if "OutOfMemoryError" in type(error).__name__ or isinstance(error, MemoryError):
        reason = str(error).splitlines()[0] if str(error) else "no details"
        return UserError(
            "MEMORY",
            f"out of memory ({reason})",
            "a smaller token_budget, activation_checkpointing=true, mixed_precision=bfloat16 or a smaller max_length",
        )
    if isinstance(error, OSError) and error.errno in (28, 122):  # no space left, quota exceeded
        return UserError("STORAGE", f"no room left to write ({error})", "make room, then continue with resume=")
    return InternalError(f"error[INTERNAL] {type(error).__name__}: {error}; traceback in {run_dir / 'crash.log'}")


class InternalError(RuntimeError):
    """An error of this program, not of its user."""


@hydra.main(version_base=None, config_path=str(Path(__file__).parent / "config"), config_name="config")
def command(config: DictConfig) -> None:
    """What the command line runs, once for each job of a sweep."""
    # SystemExit passes through Hydra without a report of Hydra's own.
    try:
        run(config)
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_status)
    except InternalError as error:
        print(" ".join(str(error).split()), file=sys.stderr)
        sys.exit(1)


def main() -> int:
    """Run the command line; returns the exit status."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # so that errors in the command line reach this function
    try:
        command()
    except KeyboardInterrupt:
        return 130
    except SystemExit as exit:
        return int(exit.code or 0)
    except Exception as error:
        if type(error).__module__.split(".")[0] not in ("hydra", "omegaconf", "builtins"):
            raise
        user_error = explain_hydra_error(error)
        print(user_error, file=sys.stderr)
        return user_error.exit_status
    return 0


if __name__ == "__main__":
    sys.exit(main())
