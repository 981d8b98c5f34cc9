"""Types of single values: numbers, text, paths and lists, with the words for them."""

import errno
import os
import re
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Le, Lt, MinLen, Predicate
from pydantic import BeforeValidator

from engine.settings.annotations import Hint, Words
from engine.settings.choices import TemplateName

# ---- Numbers ----

Positive = Annotated[float, Gt(0)]
NonNegative = Annotated[float, Ge(0)]
Fraction = Annotated[float, Ge(0), Lt(1)]
Count = Annotated[int, Ge(1)]
CountOrZero = Annotated[int, Ge(0)]
Probability = Annotated[float, Gt(0), Le(1)]
Seed = Annotated[int, Ge(0), Lt(2**32)]


# ---- Text and paths ----


def is_text(value: str) -> bool:
    """Whether a string has characters, and only valid ones."""
    return value != "" and not re.search("[\0\ud800-\udfff]", value)


def text_hint(value: Any) -> str:
    if isinstance(value, int | float):
        return f"as text: \"'{value}'\", in both quotes"
    return "it contains invalid characters" if isinstance(value, str) and value and not is_text(value) else ""


def is_possible_path(value: str) -> bool:
    """Whether the file system accepts a path; it may not exist."""
    if not is_text(value):
        return False
    try:
        os.lstat(value)
    except OSError as error:
        return error.errno != errno.ENAMETOOLONG
    return True


def path_hint(value: Any) -> str:
    is_too_long = isinstance(value, str) and is_text(value) and not is_possible_path(value)
    return "a name in it is too long" if is_too_long else text_hint(value)


def is_model_or_path(value: str) -> bool:
    """Whether a value can be a name on the hub, or else is an existing path."""
    return is_possible_path(value) and (not value.startswith(("/", "./", "../", "~")) or os.path.exists(value))


def is_run_name(value: str) -> bool:
    """Whether a name stays in its directory, and leaves room for a time behind it."""
    is_name = is_text(value) and value.isprintable() and not any(part in value for part in ("/", "\\", ".."))
    return is_name and len(value.encode()) <= 200


def is_repository(value: str) -> bool:
    return is_text(value) and value.count("/") == 1


def is_file(value: str) -> bool:
    return is_text(value) and os.path.isfile(value)


def is_directory(value: str) -> bool:
    return is_text(value) and os.path.isdir(value)


Text = Annotated[str, Predicate(is_text), Words("text"), Hint(text_hint)]
PossiblePath = Annotated[str, Predicate(is_possible_path), Words("text"), Hint(path_hint)]
AutoOrPath = Annotated[str, Predicate(is_possible_path), Words("auto or a path"), Hint(path_hint)]
ExistingFile = Annotated[str, Predicate(is_file), Words("an existing file"), Hint(text_hint)]
Directory = Annotated[str, Predicate(is_directory), Words("an existing directory")]
Repository = Annotated[str, Predicate(is_repository), Words("a name on the hub such as me/model"), Hint(text_hint)]
RunName = Annotated[
    str, Predicate(is_run_name), Words("a name without /, \\ and .., of at most 200 bytes"), Hint(text_hint)
]
ModelOrPath = Annotated[
    str, Predicate(is_model_or_path), Words("a model's name on the hub or an existing path"), Hint(path_hint)
]
TokenizerOrPath = Annotated[
    str, Predicate(is_model_or_path), Words("a tokenizer's name on the hub or an existing path"), Hint(path_hint)
]
ChatTemplate = Annotated[
    TemplateName | Annotated[str, Predicate(is_file)], Words("hh, llama2, chatml or an existing file"), Hint(text_hint)
]


# ---- Lists and mappings ----


def are_texts(value: list[str]) -> bool:
    return all(map(is_text, value))


def are_paths(value: list[str]) -> bool:
    return value != [] and all(map(is_possible_path, value))


def are_distinct_texts(value: list[str]) -> bool:
    return value != [] and are_texts(value) and len(set(value)) == len(value)


def are_patterns(value: list[str]) -> bool:
    try:
        return are_texts(value) and all(re.compile(pattern) for pattern in value)
    except (re.error, OverflowError, RecursionError):  # too large a count, or too deep
        return False


def has_model_type(value: dict[str, Any]) -> bool:
    return isinstance(value.get("model_type"), str) and is_text(value["model_type"])


def as_list(value: Any) -> Any:
    """A single name as a list; anything else as it is."""
    return [value] if isinstance(value, str) else value


Paths = Annotated[list[str], Predicate(are_paths), Words("a list of paths such as [/scr,.cache]")]
Keys = Annotated[list[str], Predicate(are_texts), Words("a list of keys such as [lr]")]
Datasets = Annotated[
    list[str],
    BeforeValidator(as_list),
    Predicate(are_distinct_texts),
    Words("a list of names and paths such as [hh,shp], each once"),
]
RewardNames = Annotated[
    list[str],
    BeforeValidator(as_list),
    MinLen(1),
    Predicate(are_distinct_texts),
    Words("a list of names such as [number_match,length], each once"),
]
Weights = Annotated[list[Positive], MinLen(1), Words("a list of numbers above 0 such as [0.7,0.3]")]
Patterns = Annotated[list[str], Predicate(are_patterns), Words("a list of regular expressions such as ['embed']")]
ModuleNames = Annotated[list[str], Predicate(are_texts), Words("a list of names such as [lm_head]")]
TargetModules = Annotated[
    Literal["attention_qv", "attention", "all_linear"] | Annotated[list[str], MinLen(1), Predicate(are_texts)],
    Words("attention_qv, attention, all_linear or a list of names such as [q_proj,v_proj]"),
]
Architecture = Annotated[
    dict[str, Any], Predicate(has_model_type), Words("values for the transformers config, with model_type")
]

# ---- Dtypes and others ----


def dtype_hint(value: Any) -> str:
    return "float16 would need loss scaling, unsupported here: use bfloat16" if value == "float16" else ""


WeightDtype = Annotated[Literal["float32", "bfloat16", "float64"], Hint(dtype_hint)]
ProductDtype = Annotated[Literal["float32", "bfloat16"], Hint(dtype_hint)]
LowDtype = Annotated[Literal["bfloat16"], Hint(dtype_hint)]
CheckpointedLayers = Annotated[Literal["auto"] | bool | CountOrZero, Words("auto, true, false or a number of layers")]
