"""Check a value against an annotation, and describe the annotation in words."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from engine.settings.messages import bracketed, did_you_mean, nearest, shown

# For every model and every single value: no conversion of types (but int to float), no NaN or Inf.
STRICT = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)
BOUNDS = ((Ge, "ge", "of at least"), (Gt, "gt", "above"), (Lt, "lt", "below"), (Le, "le", "at most"))


@dataclass(frozen=True)
class Words:
    """Metadata of an annotation: its description, in place of one made from the type. It completes "must be ..."."""

    text: str


@dataclass(frozen=True)
class Hint:
    """Metadata of an annotation: advice about a wrong value; may be empty."""

    function: Callable[[Any], str]


class WrongValue(ValueError):
    """A value does not fit its annotation. The message reads on after the key: "must be text, not 3"."""


def checked(annotation: Any, value: Any) -> Any:
    """The value in the type of the annotation.

    Raises:
        WrongValue: it does not fit.
    """
    try:
        return TypeAdapter(annotation, config=STRICT).validate_python(value)
    except ValidationError:  # its own message uses pydantic's terms
        hint = bracketed(advice(annotation, value))
        raise WrongValue(f"must be {describe(annotation)}, not {shown(value)}{hint}") from None


def accepts(annotation: Any, value: Any) -> bool:
    try:
        checked(annotation, value)
        return True
    except WrongValue:
        return False


def field_type(field: FieldInfo) -> Any:
    """The annotation of a model's field. Pydantic keeps the type and the metadata apart."""
    return Annotated[(field.annotation, *field.metadata)] if field.metadata else field.annotation


def one_of(names: Iterable[str]) -> Any:
    """The annotation Literal["a", "b"] for names known only at run time."""
    return Literal[tuple(names)]


def describe(annotation: Any) -> str:
    """Words for an annotation, such as "null or an integer of at least 1"."""
    bare, metadata = split(annotation)
    words = next((item.text for item in metadata if isinstance(item, Words)), None)
    if words is not None:
        return words
    if NoneType in members(bare):
        return f"null or {describe(without_null(bare))}"
    if names := choices(bare):
        return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} or {names[-1]}"
    if members(bare):
        return " or ".join(map(describe, members(bare)))
    if get_origin(bare) is list:
        return f"a list, each {describe(get_args(bare)[0])}"
    if bare in (int, float):
        bounds = (
            (word, getattr(item, key)) for kind, key, word in BOUNDS for item in metadata if isinstance(item, kind)
        )
        ranges = " and ".join(f"{word} {bound}" for word, bound in bounds)
        return f"{'an integer' if bare is int else 'a number'} {ranges}".rstrip()
    return {bool: "true or false", str: "text", dict: "a mapping"}.get(get_origin(bare) or bare, "anything")


def advice(annotation: Any, value: Any) -> str:
    """A hint about a wrong value: that of the annotation, or the nearest choice."""
    bare, metadata = split(without_null(annotation))
    for item in metadata:
        if isinstance(item, Hint) and (hint := item.function(value)):
            return hint
    names = choices(bare)
    return did_you_mean(nearest(str(value), names)) if len(names) > 1 else ""


def is_text_type(annotation: Any) -> bool:
    """Whether all values but null are strings."""
    bare, _ = split(without_null(annotation))
    return bare is str or bool(choices(bare)) or (members(bare) != () and all(map(is_text_type, members(bare))))


def split(annotation: Any) -> tuple[Any, tuple[Any, ...]]:
    """The type and the metadata of Annotated[type, *metadata]."""
    if get_origin(annotation) is Annotated:
        return annotation.__origin__, annotation.__metadata__
    return annotation, ()


def members(bare: Any) -> tuple[Any, ...]:
    """The members of a union; empty for other types."""
    return get_args(bare) if get_origin(bare) in (Union, UnionType) else ()


def without_null(annotation: Any) -> Any:
    rest = tuple(member for member in members(annotation) if member is not NoneType)
    return Union[rest] if rest else annotation  # noqa: UP007  made at run time


def choices(bare: Any) -> tuple[str, ...]:
    """The names of a Literal, or of a union of Literals; empty for other types."""
    if get_origin(bare) is Literal:
        return get_args(bare)
    each = [choices(member) for member in members(bare)]
    return tuple(name for names in each for name in names) if all(each) else ()
