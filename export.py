"""Export a trained model: python export.py from=RUN to=DIR (format=hf, gguf or policy_pt); see README.md."""

import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from pydantic import Field

from engine.data.chat_templates import end_with_eos
from engine.models.hub import settle_network
from engine.settings.options import Options, run_command
from engine.settings.value_types import ChatTemplate, Count, PossiblePath, Repository
from utils import UserError, apply_umask, as_os_errors

if TYPE_CHECKING:  # it takes seconds to import
    from engine.export.run_record import RunRecord
    from engine.export.saved_models import SavedModel

SUFFIXES = {"gguf": ".gguf", "policy_pt": ".pt"}  # of a file, in place of a directory
FloatName = Literal["float32", "float16", "bfloat16"]
GGUFType = Literal["f32", "f16", "bf16", "q8_0", "q4_0"]
FLOATS: dict[str, GGUFType] = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}
DTYPES: dict[str, tuple[GGUFType, ...]] = {
    "hf": tuple(FLOATS.values()),
    "policy_pt": tuple(FLOATS.values()),
    "gguf": get_args(GGUFType),
}


class ExportOptions(Options):
    source: PossiblePath = Field(
        alias="from", description="a run directory, a checkpoint or adapter in it, a model's directory, or meta"
    )
    to: PossiblePath = Field(description="the directory to write (or FILE.gguf, FILE.pt); must not exist")
    format: Literal["hf", "gguf", "policy_pt"] = Field("hf", description="hf, gguf (llama.cpp, Ollama) or policy_pt")
    dtype: FloatName | GGUFType | None = Field(
        None, description="float32, float16, bfloat16, for gguf also q8_0, q4_0; null: as stored"
    )
    base: PossiblePath | None = Field(None, description="a base model, in place of the one in the adapter's config")
    path: PossiblePath | None = Field(None, description="for from=meta: the directory of Meta's consolidated.*.pth")
    tokenizer: PossiblePath | None = Field(None, description="for from=meta: a tokenizer in place of tokenizer.model")
    context: Count | None = Field(None, description="for from=meta: positions; null: by its params.json")
    chat_template: ChatTemplate | None = Field(
        None, description="hh, llama2, chatml or a Jinja file; null: the run's, else the tokenizer's own"
    )
    push_to_hub: Repository | None = Field(
        None, description="also upload to this repository; a new one is made private"
    )


def export(options: ExportOptions) -> None:
    """Check the options, load the model, and write the export atomically."""
    target, kind = Path(options.to).expanduser(), options.format
    if not target.name:  # "." may be an empty directory
        raise UserError("CONFIG", f"to: {target} has no name", "give a new directory")
    dtype = FLOATS.get(options.dtype or "", options.dtype)
    if dtype is not None and dtype not in DTYPES[kind]:
        choices = ", ".join(DTYPES[kind])
        raise UserError("CONFIG", f"dtype: {dtype} is for format=gguf, not {kind}", f"choose one of {choices}")
    right = next((form for form, suffix in SUFFIXES.items() if suffix == target.suffix.lower()), kind)
    if right != kind:
        raise UserError(
            "CONFIG", f"to: {target.name} is no name for format={kind}", f"add format={right}, or rename it"
        )
    for path in (target, modelfile_of(target)) if kind == "gguf" else (target,):
        if path.exists() and not (path.is_dir() and not any(path.iterdir())):
            raise UserError("CONFIG", f"to: {path} exists", "give another directory, or remove it")
    is_meta = options.source == "meta"
    if is_meta != (options.path is not None):
        problem = "from=meta needs path" if is_meta else "path is for from=meta"
        raise UserError("CONFIG", problem, "python export.py from=meta path=META_DIR to=DIR")
    if not is_meta and (options.tokenizer or options.context):
        raise UserError("CONFIG", "tokenizer and context are for from=meta", "leave them out")
    settle_network([None if is_meta else options.source, options.base, options.tokenizer])
    if options.push_to_hub:
        check_login()

    from engine.export.dialogues import template_to_export

    saved, record = load(options, dtype)
    prepare_reward_model(saved, record, kind)
    name = target.name.removesuffix(".gguf").removesuffix(".pt")
    gguf_dtype = dtype or FLOATS.get(str(saved.model.dtype).removeprefix("torch."), "f32")  # as stored
    template = template_to_export(options.chat_template, saved.tokenizer, record)
    with atomic_target(target, {"gguf": f"{name}-{gguf_dtype}.gguf", "policy_pt": "policy.pt"}.get(kind)) as path:
        if kind == "hf":
            write_hf(path, saved, record, name, template)
        elif kind == "gguf":
            write_gguf(path, path.with_name(modelfile_of(target).name), saved, gguf_dtype, name, template)
        else:
            write_policy_pt(path, saved, record)
    files = [*target.glob("*.gguf")] if kind == "gguf" and target.is_dir() else [target]
    if kind == "gguf":
        print(f"for Ollama: {modelfile_of(target)}")
    print(f"exported: {files[0]}", flush=True)
    if options.push_to_hub:
        push(target, options.push_to_hub)


def modelfile_of(target: Path) -> Path:
    """The Modelfile of a GGUF export: in its directory, or beside its file."""
    return target.with_suffix(".Modelfile") if target.suffix.lower() == ".gguf" else target / "Modelfile"


def load(options: ExportOptions, dtype: str | None) -> "tuple[SavedModel, RunRecord]":
    """Load the model and the record of its training.

    Args:
        dtype: of the weights; None: as stored. format=gguf ignores it, and converts each tensor when it writes it.
    """
    import torch
    import transformers

    from engine.export.meta_llama import load_meta
    from engine.export.run_record import RunRecord, read_run
    from engine.export.saved_models import check_finite, find_saved, load_saved
    from engine.models.score_head import cast_model
    from preference_datasets import chat_form

    transformers.logging.set_verbosity_error()
    if not sys.stderr.isatty():
        transformers.logging.disable_progress_bar()
    if options.path is not None:  # from=meta
        path = Path(options.path).expanduser()
        saved, record = load_meta(path, tokenizer=options.tokenizer, context=options.context), RunRecord()
    else:
        directory = find_saved(options.source)
        record = read_run(directory, chat_form) if directory is not None else RunRecord()
        saved = load_saved(options.source, base=options.base)
    if options.format != "gguf" and dtype is not None:
        cast_model(saved.model, {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}[dtype])
    check_finite(saved.model, "dtype=bfloat16 has a wider range" if dtype == "f16" else "export another checkpoint")
    return saved, record


def prepare_reward_model(saved: "SavedModel", record: "RunRecord", kind: str) -> None:
    """Give a reward model the config that other programs need; other models stay as they are."""
    from engine.models.score_head import has_score_head, name_padding_token, record_rewards

    if not has_score_head(saved.model):
        return
    if kind == "gguf":
        raise UserError("CONFIG", "format: gguf holds models of text, and this is a reward model", "format=hf")
    name_padding_token(saved.model, saved.tokenizer, may_grow=kind == "hf")
    if record.reward_mean is not None:  # an adapter has no config of a model
        record_rewards(saved.model, record.reward_mean, record.reward_std)


@contextmanager
def atomic_target(target: Path, file: str | None) -> Iterator[Path]:
    """Yield a temporary path to write to, and rename it to the target on success.

    Args:
        target: a directory, or a file if it has the suffix of `file`.
        file: name of the main file; None for a directory without one.

    Raises:
        UserError: STORAGE; the temporary files are removed.
    """
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    is_file = file is not None and target.suffix.lower() == Path(file).suffix
    try:
        temporary.mkdir(parents=True)
        with as_os_errors():
            yield temporary if file is None else temporary / (target.name if is_file else file)
        apply_umask(temporary)
        for path in temporary.rglob("*"):
            if path.is_file():
                with open(path, "rb") as opened:
                    os.fsync(opened.fileno())
        if is_file:
            for path in sorted(temporary.iterdir(), key=lambda path: path.name == target.name):  # the target last
                os.replace(path, target.with_name(path.name))
        else:
            if target.is_dir():
                target.rmdir()  # empty
            os.replace(temporary, target)
    except OSError as error:
        raise UserError("STORAGE", f"to: cannot write {target} ({error})", "make room, or write elsewhere") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_hf(path: Path, saved: "SavedModel", record: "RunRecord", name: str, template: Any) -> None:
    """Write a directory for from_pretrained, with a model card."""
    from engine.export.model_card import model_card
    from engine.models.score_head import has_score_head

    saved.model.save_pretrained(path)
    saved.tokenizer.chat_template = end_with_eos(template) if has_score_head(saved.model) else template
    saved.tokenizer.save_pretrained(path)
    (path / "README.md").write_text(model_card(name, saved, record), encoding="utf-8")


def write_gguf(path: Path, modelfile: Path, saved: "SavedModel", dtype: str, name: str, template: Any) -> None:
    """Write a file for llama.cpp, and a Modelfile for Ollama."""
    from engine.export.gguf import plan_gguf
    from engine.export.modelfile import modelfile_text

    plan = plan_gguf(saved.model, saved.tokenizer, dtype, name=name, chat_template=template)
    text, notes = modelfile_text(path.name, saved.tokenizer, template)
    for note in [*plan.notes, *notes]:
        print(f"note: {note}")
    plan.write(path)
    modelfile.write_text(text, encoding="utf-8")


def write_policy_pt(path: Path, saved: "SavedModel", record: "RunRecord") -> None:
    """Write {step_idx, state, metrics} as plain tensors, the format of the reference implementation."""
    import torch

    policy = {"step_idx": record.num_examples or 0, "state": dict(saved.model.state_dict()), "metrics": record.metrics}
    torch.save(policy, path)


def check_login() -> None:
    """Raise a UserError without a login to the hub, before any work is done."""
    from huggingface_hub import HfApi

    try:
        HfApi().whoami()
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            "CONFIG", f"push_to_hub: you are not logged in to the hub ({reason})", "run `hf auth login`"
        ) from error


def push(target: Path, repository: str) -> None:
    """Upload an export."""
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        api.create_repo(repository, private=True, exist_ok=True)
        if target.is_dir():
            api.upload_folder(folder_path=target, repo_id=repository)
        else:
            api.upload_file(path_or_fileobj=target, path_in_repo=target.name, repo_id=repository)
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        problem = f"push_to_hub: {repository} was not uploaded ({reason}); {target} is complete"
        raise UserError("STORAGE", problem, f"hf upload {repository} {target}") from error
    print(f"uploaded: https://huggingface.co/{repository}")


def main() -> int:
    usage = "python export.py from=RUN to=DIR [key=value ...]: write a trained model in another form"
    return run_command(export, usage, ExportOptions, sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
