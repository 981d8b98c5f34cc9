"""Options of export.py and chat.py, as key=value."""

import errno
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, get_origin

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

import process_start
from engine.settings.annotations import STRICT, WrongValue, checked, field_type, is_text_type, split, without_null
from engine.settings.messages import bracketed, did_you_mean, nearest
from utils import UserError, is_out_of_memory


class Options(BaseModel):
    """Options of a command. Each field has a type, a description for --help, and a default unless it is required."""

    model_config = STRICT


O = TypeVar("O", bound=Options)  # noqa: E741


def keys_of(options: type[Options]) -> dict[str, FieldInfo]:
    """The fields by their key on the command line. It differs from the name for words of Python, such as from."""
    return {field.alias or name: field for name, field in options.model_fields.items()}


def parse_arguments(options: type[O], arguments: Sequence[str]) -> O:
    """The options of a command line; `--key=value` and `--key value` are read as `key=value`.

    Mappings are given by `key.name=value`.

    Raises:
        UserError: CONFIG, with every problem.
    """
    fields = keys_of(options)
    values: dict[str, Any] = {}
    problems: list[str] = []
    rest = iter(arguments)
    for argument in rest:
        key, is_given, value = argument.removeprefix("--").partition("=")
        if not is_given and argument.startswith("--") and key in fields:
            value = next(rest, "")
            is_given = value
        group, _, name = key.partition(".")
        if not is_given:
            problems.append(f"{argument}: not of the form key=value")
        elif name and group in fields and is_mapping(field_type(fields[group])):
            values.setdefault(group, {})[name] = parse_value(Any, value)
        elif key not in fields:
            problems.append(f"{key}: unknown key{bracketed(did_you_mean(nearest(key, fields)))}")
        else:
            values[key] = parse_value(field_type(fields[key]), value)
    for key, field in fields.items():
        if key in values:
            try:
                checked(field_type(field), values[key])
            except WrongValue as error:
                problems.append(f"{key}: {error}")
        elif field.is_required():
            problems.append(f"{key} is required: {field.description}")
    if problems:
        raise UserError("CONFIG", "; ".join(problems), "correct the keys named here; --help explains every key")
    return options.model_validate(values)


def is_mapping(annotation: Any) -> bool:
    bare, _ = split(without_null(annotation))
    return get_origin(bare) is dict


def parse_value(annotation: Any, text: str) -> Any:
    """An argument as text or, for numbers, as YAML; null is None."""
    if text == "null":
        return None
    if is_text_type(annotation):
        return text
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text


def help_text(usage: str, options: type[Options]) -> str:
    lines = [usage, ""]
    names = {key: f"{key}.NAME" if is_mapping(field_type(field)) else key for key, field in keys_of(options).items()}
    width = max(map(len, names.values())) + 2
    for key, field in keys_of(options).items():
        default = "required" if field.is_required() else yaml.safe_dump(field.default).split("\n")[0]
        lines.append(f"  {names[key] + '=':<{width}} {field.description} [{default}]")
    return "\n".join(lines)


def asks_for_help(arguments: Sequence[str]) -> bool:
    return bool({"-h", "--help"} & set(arguments))


def print_help(text: str) -> int:
    """Print a text, also into a pipe that ends before it; returns the exit status."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        _drop_output()
    return 0


def _drop_output() -> None:
    """Write the rest of the output nowhere: the reader of a pipe has gone."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def run_command(function: Callable[[O], None], usage: str, options: type[O], arguments: Sequence[str]) -> int:
    """Run a function on parsed arguments and print its error, if any, on one line; returns the exit status."""
    process_start.open_missing_streams()
    process_start.forget_old_shapes()
    if asks_for_help(arguments):
        return print_help(help_text(usage, options))
    try:
        function(parse_arguments(options, arguments))
        return 0
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        _drop_output()
        return 1
    except Exception as error:
        user_error = as_user_error(error)
        if user_error is None:
            raise
        print(user_error, file=sys.stderr)
        return user_error.exit_status


def as_user_error(error: Exception) -> UserError | None:
    """An error as one for users; None for internal errors."""
    if isinstance(error, UserError):
        return error
    if is_out_of_memory(error):
        reason = str(error).splitlines()[0] if str(error) else "no details"
        return UserError("MEMORY", f"out of memory ({reason})", "use a machine with more, or dtype=bfloat16")
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
        return UserError("STORAGE", f"cannot write: {error}", "make room, or write elsewhere")
    return None
