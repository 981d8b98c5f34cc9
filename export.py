"""Take a trained model home: python export.py from=RUN to=DIR (format=hf, gguf or policy_pt); see README.md."""

import math
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.chat_templates import BOS, JINJA
from engine.commands import REQUIRED, Option, run_command, settle_network
from engine.validation import Check, count, is_text, one_of, optional, path
from utils import UserError, as_os_errors

if TYPE_CHECKING:  # it takes seconds to import
    from engine.saved_models import RunRecord, SavedModel

FLOATS = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}
DTYPES = {"hf": tuple(FLOATS.values()), "policy_pt": tuple(FLOATS.values())}
DTYPES["gguf"] = (*FLOATS.values(), "q8_0", "q4_0")

OPTIONS = {
    "from": Option(
        REQUIRED, path, "a run directory, a checkpoint or adapter in it, a model's directory, or meta", True
    ),
    "to": Option(REQUIRED, path, "the directory to write, which must not exist (or FILE.gguf, FILE.pt)", True),
    "format": Option("hf", one_of("hf", "gguf", "policy_pt"), "hf, gguf (llama.cpp) or policy_pt"),
    "dtype": Option(
        None,
        optional(one_of(*FLOATS, *DTYPES["gguf"])),
        "float32, float16, bfloat16, for gguf also q8_0, q4_0; null: as stored",
    ),
    "base": Option(None, optional(path), "the base model of an adapter, in place of the one that it names", True),
    "path": Option(None, optional(path), "for from=meta: the directory of Meta's consolidated.*.pth", True),
    "tokenizer": Option(None, optional(path), "for from=meta: a tokenizer in place of tokenizer.model", True),
    "context": Option(None, optional(count), "for from=meta: positions; null: by its params.json"),
    "chat_template": Option(
        None,
        optional(Check("hh, llama2 or a file", lambda value: value in JINJA or os.path.isfile(str(value)))),
        "hh, llama2 or a Jinja file; null: what the run trained on, else the tokenizer's own",
        True,
    ),
    "push_to_hub": Option(
        None,
        optional(Check("a name on the hub such as me/model", lambda value: is_text(value) and value.count("/") == 1)),
        "also upload to this repository, which is made private if it is new",
        True,
    ),
}


def export(options: dict[str, Any]) -> None:
    """Check what can be checked, load the model, and write it whole or not at all."""
    target, kind = Path(options["to"]).expanduser(), options["format"]
    dtype = FLOATS.get(options["dtype"], options["dtype"])
    if dtype is not None and dtype not in DTYPES[kind]:
        choices = ", ".join(DTYPES[kind])
        raise UserError("CONFIG", f"dtype: {dtype} is for format=gguf, not {kind}", f"choose one of {choices}")
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise UserError("CONFIG", f"to: {target} exists", "give another directory, or remove it")
    is_meta = options["from"] == "meta"
    if is_meta != (options["path"] is not None):
        problem = "from=meta needs path" if is_meta else "path is for from=meta"
        raise UserError("CONFIG", problem, "python export.py from=meta path=META_DIR to=DIR")
    if not is_meta and (options["tokenizer"] or options["context"]):
        raise UserError("CONFIG", "tokenizer and context are for from=meta", "leave them out")
    settle_network([None if is_meta else options["from"], options["base"], options["tokenizer"]])
    if options["push_to_hub"]:
        check_login()

    saved, record = load(options, dtype)
    name = target.name.removesuffix(".gguf").removesuffix(".pt")
    template = chosen_template(options["chat_template"], saved, record)
    with written_whole(target, {"gguf": f"{name}-{{}}.gguf", "policy_pt": "policy.pt"}.get(kind)) as path:
        if kind == "hf":
            write_hf(path, saved, record, name, template)
        elif kind == "gguf":
            write_gguf(path, saved, dtype, name, template)
        else:
            write_policy_pt(path, saved, record)
    print(f"exported: {target}", flush=True)
    if options["push_to_hub"]:
        push(target, options["push_to_hub"])


def load(options: dict[str, Any], dtype: str | None) -> "tuple[SavedModel, RunRecord]":
    """The model in the dtype that is asked for (for the quantised types: as stored), and how it was trained."""
    import torch
    import transformers

    from engine.meta_llama import load_meta
    from engine.saved_models import RunRecord, find_saved, largest, load_saved, read_run

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if options["from"] == "meta":
        path = Path(options["path"]).expanduser()
        saved, record = load_meta(path, tokenizer=options["tokenizer"], context=options["context"]), RunRecord()
    else:
        directory = find_saved(options["from"])
        record = read_run(directory) if directory is not None else RunRecord()
        saved = load_saved(options["from"], base=options["base"])
    if options["format"] != "gguf" and dtype is not None:  # gguf converts each tensor from what is stored
        saved.model = saved.model.to({"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}[dtype])
    for key, tensor in saved.model.state_dict().items():
        if tensor.numel() and not math.isfinite(largest(tensor)):
            fix = "dtype=bfloat16 holds larger numbers" if dtype == "f16" else "export another checkpoint"
            raise UserError("NONFINITE", f"{key} holds a number that is not finite", fix)
    return saved, record


def chosen_template(name: str | None, saved: "SavedModel", record: "RunRecord") -> Any:
    """The chat template to write, as Jinja: the one named, that of the training data, or the tokenizer's own."""
    from engine.tokenization import token_prefix

    name = name or record.chat_template
    if name is None:
        return saved.tokenizer.chat_template
    if name == "hh":
        return BOS + JINJA[name] if token_prefix(saved.tokenizer) else JINJA[name]
    try:
        return JINJA[name] if name in JINJA else Path(name).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        problem = f"chat_template: {name}, of which the training data are, cannot be read ({error})"
        raise UserError("CONFIG", problem, "give chat_template=FILE") from error


@contextmanager
def written_whole(target: Path, file: str | None) -> Iterator[Path]:
    """Yield where to write: a directory, or the one file in it; once all is written, it gets its name.

    Args:
        target: the directory, or the file itself where the suffix says so.
        file: the name of the one file, or None for a directory.
    """
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    is_file = file is not None and target.suffix == Path(file).suffix
    try:
        temporary.mkdir(parents=True)
        with as_os_errors():
            yield temporary if file is None else temporary / (target.name if is_file else file)
        for path in temporary.rglob("*"):
            if path.is_file():
                with open(path, "rb") as opened:
                    os.fsync(opened.fileno())
        if is_file:
            os.replace(temporary / target.name, target)
        else:
            if target.is_dir():
                target.rmdir()  # it is empty
            os.replace(temporary, target)
    except OSError as error:
        raise UserError("STORAGE", f"to: cannot write {target} ({error})", "make room, or write elsewhere") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_hf(path: Path, saved: "SavedModel", record: "RunRecord", name: str, template: Any) -> None:
    """A directory that from_pretrained loads, with a model card."""
    from engine.model_card import model_card

    saved.model.save_pretrained(path)
    saved.tokenizer.chat_template = template
    saved.tokenizer.save_pretrained(path)
    (path / "README.md").write_text(model_card(name, saved, record), encoding="utf-8")


def write_gguf(path: Path, saved: "SavedModel", dtype: str | None, name: str, template: Any) -> None:
    """A file for llama.cpp; in the stored dtype if none is given."""
    from engine.gguf_export import plan_gguf

    stored = FLOATS.get(str(saved.model.dtype).removeprefix("torch."), "f32")
    dtype = dtype or stored
    plan = plan_gguf(saved.model, saved.tokenizer, dtype, name=name, chat_template=template)
    for note in plan.notes:
        print(f"note: {note}")
    plan.write(path.with_name(path.name.format(dtype)))


def write_policy_pt(path: Path, saved: "SavedModel", record: "RunRecord") -> None:
    """{step_idx, state, metrics} as plain tensors, as the reference implementation reads it."""
    import torch

    policy = {"step_idx": record.examples or 0, "state": dict(saved.model.state_dict()), "metrics": record.metrics}
    torch.save(policy, path)


def check_login() -> None:
    """Fail before the work is done if nobody is logged in to the hub."""
    from huggingface_hub import HfApi

    try:
        HfApi().whoami()
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            "CONFIG", f"push_to_hub: the hub does not know you ({reason})", "run `hf auth login`"
        ) from error


def push(target: Path, repository: str) -> None:
    """Upload what was written."""
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
        problem = f"push_to_hub: {repository} was not uploaded ({reason}); {target} is whole"
        raise UserError("STORAGE", problem, f"hf upload {repository} {target}") from error
    print(f"uploaded: https://huggingface.co/{repository}")


def main() -> int:
    usage = "python export.py from=RUN to=DIR [key=value ...]: write a trained model in another form"
    return run_command(export, usage, OPTIONS, sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
