"""Commands with key=value arguments: read and checked before anything is loaded, all problems at once."""

import contextlib
import errno
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.request import getproxies

import yaml

from engine.validation import Check, bracketed, did_you_mean, nearest
from utils import UserError, is_out_of_memory, is_reachable

REQUIRED = object()
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@dataclass(frozen=True)
class Option:
    """A key of a command.

    Args:
        default: REQUIRED if there is none.
        check: what the value may be.
        explanation: one line for --help.
        is_text: taken as it stands, where other values are read as YAML.
    """

    default: Any
    check: Check
    explanation: str
    is_text: bool = False


def parse_arguments(options: Mapping[str, Option], arguments: Sequence[str]) -> dict[str, Any]:
    """The value of every option; `--key=value` and `--key value` are read as `key=value`.

    Raises:
        UserError: CONFIG, naming every problem.
    """
    values = {key: option.default for key, option in options.items()}
    problems: list[str] = []
    rest = iter(arguments)
    for argument in rest:
        key, is_given, value = argument.removeprefix("--").partition("=")
        if not is_given and argument.startswith("--") and key in options:
            value = next(rest, "")
            is_given = value
        if key not in options or not is_given:
            guess = bracketed(did_you_mean(nearest(key, options)))
            problems.append(f"{argument}: not of the form key=value" if not is_given else f"{key}: unknown key{guess}")
            continue
        try:
            values[key] = None if value == "null" else value if options[key].is_text else yaml.safe_load(value)
        except yaml.YAMLError:
            values[key] = value
    for key, option in options.items():
        if values[key] is REQUIRED:
            problems.append(f"{key} is required: {option.explanation}")
        elif problem := option.check.problem(values[key]):
            problems.append(f"{key}: {problem}")
    if problems:
        raise UserError("CONFIG", "; ".join(problems), "correct the keys named here; --help explains every key")
    return values


def help_text(usage: str, options: Mapping[str, Option]) -> str:
    lines = [usage, ""]
    for key, option in options.items():
        default = "required" if option.default is REQUIRED else yaml.safe_dump(option.default).split("\n")[0]
        lines.append(f"  {key + '=':<16} {option.explanation} [{default}]")
    return "\n".join(lines)


def run_command(
    function: Callable[[dict[str, Any]], None], usage: str, options: Mapping[str, Option], arguments: Sequence[str]
) -> int:
    """Run function on the parsed arguments, print the error that ended it on one line, and return its exit status."""
    if {"-h", "--help"} & set(arguments):
        print(help_text(usage, options))
        return 0
    try:
        function(parse_arguments(options, arguments))
        return 0
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of a pipe has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        user_error = as_user_error(error)
        if user_error is None:
            raise
        print(user_error, file=sys.stderr)
        return user_error.exit_status


def as_user_error(error: Exception) -> UserError | None:
    if isinstance(error, UserError):
        return error
    if is_out_of_memory(error):
        reason = str(error).splitlines()[0] if str(error) else "no details"
        return UserError("MEMORY", f"out of memory ({reason})", "use a machine with more, or dtype=bfloat16")
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
        return UserError("STORAGE", f"cannot write: {error}", "make room, or write elsewhere")
    return None


def settle_network(names: Iterable[str | None]) -> None:
    """Go offline if one of names, or the base model of an adapter among them, is to come from the hub and the hub
    cannot be reached: libraries would try for a minute. To be called before they are imported."""
    if os.environ.get("HF_HUB_OFFLINE") or getproxies().get("https"):
        return
    if all(Path(name).expanduser().exists() for name in with_bases(names)):
        return
    if not is_reachable(os.environ.get("HF_ENDPOINT", "https://huggingface.co")):
        os.environ["HF_HUB_OFFLINE"] = "1"
        print("the Hugging Face hub cannot be reached: models come from its local cache", file=sys.stderr)


def with_bases(names: Iterable[str | None]) -> Iterator[str]:
    """The names that are given, and those of the models below those that are adapters."""
    for name in names:
        if name is not None:
            yield name
            path = Path(name).expanduser()
            for adapter in (path, path / "LATEST"):
                with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # told when it is loaded
                    base = json.loads((adapter / ADAPTER_CONFIG).read_text())["base_model_name_or_path"]
                    yield str(find_base(adapter, base) or base)


def find_base(adapter: Path, named: str) -> Path | None:
    """The directory of the base model that an adapter names: as it stands, relative to the adapter, or, of a run that
    was moved, beside the adapter. None if there is no such directory: it is on the hub, or gone."""
    moved = [adapter.parent / "base"] if Path(named).name == "base" else []
    return next((path for path in (Path(named), adapter / named, *moved) if path.is_dir()), None)
