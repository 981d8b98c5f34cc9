"""Choose the linear layers for adapters, and the modules to train in full."""

from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from engine.models.parameters import named_aliases
from engine.settings.schema import LoraSettings
from utils import UserError, quiet_bitsandbytes

ATTENTION = ("attn", "attention", "self_attn", "self_attention")  # prefixes of attention modules' names
VALUES = ("q_proj", "v_proj", "query_key_value", "c_attn", "qkv_proj", "Wqkv")  # some fused with keys


def _linear_names(module: nn.Module) -> list[str]:
    return [name for name, child in module.named_modules() if isinstance(child, nn.Linear | Conv1D)]


def find_targets(model: PreTrainedModel, layers: list[nn.Module], wanted: Any) -> tuple[list[str], bool]:
    """Find the linear layers for adapters inside the transformer layers.

    Args:
        wanted: a preset, or a list of names.

    Returns:
        their names inside a transformer layer, and whether some are GPT-2's Conv1D.

    Raises:
        UserError: CONFIG, if a name or preset matches nothing.
    """
    inside = sorted({name for layer in layers for name in _linear_names(layer)})
    of_attention = [name for name in inside if any(part.startswith(ATTENTION) for part in name.split(".")[:-1])]
    if wanted == "all_linear":
        found = inside
    elif wanted == "attention":
        found = of_attention
    elif wanted == "attention_qv":
        found = [name for name in of_attention if name.split(".")[-1] in VALUES]
    else:
        found, names = [], list(wanted)
        for name in names:
            matches = [other for other in inside if f".{other}".endswith(f".{name}")]
            if not matches:
                where = f"the transformer layers of {type(model).__name__}"
                problem = f"peft.target_modules: {name} is not a linear layer inside {where}"
                fix = "; peft.full_modules trains other modules in full" if hasattr(model, name) else ""
                raise UserError("CONFIG", problem, f"choose from {', '.join(inside)}{fix}")
            found += matches
    if not found:
        problem = f"peft.target_modules: {wanted} matches no layers of {type(model).__name__}"
        raise UserError("CONFIG", problem, f"name some of {', '.join(inside)}")
    modules = [module for layer in layers for name, module in layer.named_modules() if name in found]
    return sorted(set(found)), any(isinstance(module, Conv1D) for module in modules)


def lora_config(peft: LoraSettings, targets: list[str], has_conv1d: bool, base: str | None, task_type: str) -> Any:
    quiet_bitsandbytes()
    from peft import LoraConfig

    if peft.scaling is not None:
        alpha = peft.scaling * peft.rank
    else:
        alpha = 2 * peft.rank if peft.alpha is None else peft.alpha
    return LoraConfig(
        r=peft.rank,
        lora_alpha=int(alpha) if alpha == int(alpha) else alpha,
        lora_dropout=peft.dropout,
        bias=peft.bias,
        target_modules=targets,
        use_rslora=peft.rslora,
        use_dora=peft.dora,
        fan_in_fan_out=has_conv1d,
        task_type=task_type,
        base_model_name_or_path=base,
    )


def find_full_modules(
    model: PreTrainedModel, names: list[str], layers: list[nn.Module], is_quantized: bool, targets: set[str]
) -> list[str]:
    """Find the modules to train in full, by full name.

    Modules with shared weights are included.

    Args:
        names: full names or their ends.
        targets: names of linear layers with adapters.

    Raises:
        UserError: CONFIG, if a name matches nothing, or a module is quantised or has an adapter.
    """
    modules, found = dict(model.named_modules()), set[str]()
    inside = {module for layer in layers for module in layer.modules()}
    for name in names:
        matches = [other for other, module in modules.items() if f".{other}".endswith(f".{name}")]
        if not matches or not any([*modules[other].parameters()] for other in matches):
            problem = f"peft.full_modules: {type(model).__name__} has no module {name} with parameters"
            raise UserError("CONFIG", problem, "correct the name")
        for match in matches:
            linear = [f"{match}.{other}".rstrip(".") for other in _linear_names(modules[match])]
            adapted = [other for other in linear if any(other.endswith(f".{target}") for target in targets)]
            if adapted or (is_quantized and any(modules[other] in inside for other in linear)):
                problem = f"peft.full_modules: {match} is quantised or has an adapter"
                raise UserError("CONFIG", problem, "remove it from full_modules or target_modules")
        found |= set(matches)
    for alias, first in named_aliases(model).items():
        pair = {alias.rpartition(".")[0], first.rpartition(".")[0]}
        if pair & found:
            found |= pair
    # Drop modules inside others: peft cannot load a saved module within a saved module.
    return sorted(name for name in found if not any(name.startswith(f"{other}.") for other in found))
