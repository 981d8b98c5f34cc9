"""The dotted keys of a config, and their types."""

import inspect
from collections.abc import Callable, Collection
from typing import Any, get_type_hints

from pydantic import BaseModel

from engine.settings.annotations import field_type, one_of
from engine.settings.messages import bracketed, did_you_mean, nearest
from engine.settings.presets import presets_with
from engine.settings.schema import (
    LossSettings,
    NoPeftSettings,
    PlainLoraSettings,
    QLoraSettings,
    Settings,
)
from engine.settings.value_types import Text

PEFT_GROUPS: dict[str, type[BaseModel]] = {
    "none": NoPeftSettings,
    "lora": PlainLoraSettings,
    "qlora": QLoraSettings,
}


def key_types(loss: str | None = None, peft: str | None = None) -> dict[str, Any]:
    """The annotation of every dotted key.

    Args:
        loss: adds the keys of this loss, if it is known.
        peft: adds the keys of this group, if it is known.
    """
    from losses import LOSSES  # imports torch, which takes seconds

    types = group_types(Settings)
    types["loss.name"], types["peft.name"] = one_of(LOSSES), one_of(PEFT_GROUPS)
    if loss in LOSSES:
        types |= loss_types(loss)
    if peft in PEFT_GROUPS:
        types |= {key: hint for key, hint in group_types(PEFT_GROUPS[peft], "peft.").items() if key != "peft.name"}
    return types


def group_types(group: type[BaseModel], prefix: str = "") -> dict[str, Any]:
    """The annotations of a model's keys, groups within it included, but for loss and peft."""
    types: dict[str, Any] = {}
    for name, field in group.model_fields.items():
        if group is Settings and name in ("loss", "peft"):
            types[f"{name}.name"] = str  # fixes the order; key_types() has the names
        elif isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            types |= group_types(field.annotation, f"{prefix}{name}.")
        else:
            types[prefix + name] = field_type(field)
    return types


def loss_types(name: str) -> dict[str, Any]:
    """The annotations of a loss's keys: common ones where it takes them, and the function's keyword arguments."""
    from losses import LOSSES

    loss = LOSSES[name]
    common = {"average_log_prob": loss.log_probs == "either", "sft_weight": loss.takes_sft_weight}
    common["head_init"] = loss.head == "score"
    types = {key: field_type(LossSettings.model_fields[key]) for key, is_taken in common.items() if is_taken}
    for function in filter(None, (loss.function, loss.advantages, loss.value_loss, loss.next_beta)):
        hints = get_type_hints(function, include_extras=True)
        for keyword in keyword_names(function):
            hint = hints.get(keyword, Any)
            types[keyword] = Text if hint is str else hint
    if loss.learns_pairs:
        names = [name for name, other in LOSSES.items() if other.is_of_pairs]
        types |= {"pair_loss": one_of(names), "pair_options": dict[str, Any] | None}
    return {f"loss.{key}": hint for key, hint in types.items()}


def pair_option_types(pair_loss: str) -> dict[str, Any]:
    """The annotations of pair_options: the keys of a loss of pairs, but for beta."""
    return {key.removeprefix("loss."): hint for key, hint in loss_types(pair_loss).items() if key != "loss.beta"}


def keyword_names(function: Callable[..., Any]) -> list[str]:
    """The keyword-only parameters of a function."""
    parameters = inspect.signature(function).parameters.values()
    return [parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY]


def all_keys() -> list[str]:
    """Every dotted key, of all losses and all kinds of peft."""
    from losses import LOSSES

    return list(dict.fromkeys(key for loss in LOSSES for peft in PEFT_GROUPS for key in key_types(loss, peft)))


def unknown_key(key: str, known: Collection[str]) -> str:
    """The problem of a key outside the composed config."""
    group, _, name = key.partition(".")
    if presets := presets_with(group, name):
        return f"not a key of the chosen {group}, only of {', '.join(presets)}"
    by_last_part = {other.rpartition(".")[2]: other for other in known}
    return "unknown key" + bracketed(did_you_mean(nearest(key, known) or by_last_part.get(key.rpartition(".")[2])))
