"""Split a model among the devices of one process, with the tensor_parallel package."""

import copy
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from threading import BrokenBarrierError
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from engine.models.score_head import head_of
from utils import UserError

try:
    with warnings.catch_warnings(action="ignore"):  # of pkg_resources
        from tensor_parallel.aux_actions import split_num_heads
        from tensor_parallel.communications import CollectiveOperation
        from tensor_parallel.config import Config
        from tensor_parallel.shard import make_shard
        from tensor_parallel.state_actions import Split, SplitInGroupedChunks, StateAction
except ImportError as error:
    raise UserError(
        "CONFIG",
        f"tensor_parallel.backend: the tensor_parallel package cannot be imported ({error})",
        "pip install tensor_parallel==2.0.0 setuptools==81.0.0, or tensor_parallel.backend=native",
    ) from error

# Modules with split outputs, and modules with split inputs. The outputs of the latter must be summed. Patterns of their
# names in the model below the head.
LAYERS = {
    "llama": (
        r"layers\.\d+\.(self_attn\.[qkv]_proj|mlp\.(gate|up)_proj)",
        r"layers\.\d+\.(self_attn\.o_proj|mlp\.down_proj)",
    ),
    "gpt_neox": (
        r"layers\.\d+\.(attention\.query_key_value|mlp\.dense_h_to_4h)",
        r"layers\.\d+\.(attention\.dense|mlp\.dense_4h_to_h)",
    ),
    "gpt2": (r"h\.\d+\.(attn\.c_attn|mlp\.c_fc)", r"h\.\d+\.(attn|mlp)\.c_proj"),
}


def split_model(model: PreTrainedModel, devices: Sequence[torch.device]) -> PreTrainedModel:
    """Split the transformer of model among devices, in place; returns model.

    It runs, generates and saves as before. state_dict(), load_state_dict() and save_pretrained() use full weights under
    their original names. Activation checkpointing is off: the backward pass has one thread, so recomputing layers of
    one device would wait forever for those of another.

    Args:
        model: on the CPU. A model on one of the devices would fill it for a while.
        devices: the same device may occur several times.

    Raises:
        UserError: CONFIG if the package cannot split the model correctly.
    """
    check_config(model.config, len(devices))
    _check_layers(model)
    body = SplitTransformer(model.base_model, [torch.device(device) for device in devices])
    setattr(model, model.base_model_prefix, body)
    head_of(model).to(body.devices[0])
    model.supports_gradient_checkpointing = False
    return model


def check_config(config: PretrainedConfig, num_devices: int) -> None:
    """Raise a UserError if a model with config cannot be split among num_devices. It needs no weights."""
    if num_devices < 2:
        _refuse(f"there is nothing to split among {num_devices} device", "raise tensor_parallel_size")
    if config.model_type not in LAYERS:
        _refuse(f"it can split {', '.join(LAYERS)}, not {config.model_type}", "tensor_parallel.backend=native")
    heads = {"attention": config.num_attention_heads}
    heads["key and value"] = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    for kind, number in heads.items():
        if number % num_devices:
            what = f"{number} {kind} heads cannot be divided among {num_devices} devices"
            _refuse(what, "set tensor_parallel_size to a divisor of the number of heads")


def _check_layers(model: PreTrainedModel) -> None:
    patterns = "|".join(LAYERS[model.config.model_type])
    for name, module in model.base_model.named_modules():
        if re.fullmatch(patterns, name) and type(module) not in (nn.Linear, Conv1D):  # quantised, or with LoRA
            _refuse(f"it cannot split the {type(module).__name__} at {name}", "tensor_parallel.backend=native")
        # Devices would drop different elements, but must hold the same values.
        if (isinstance(module, nn.Dropout) and module.p) or getattr(module, "attention_dropout", 0):
            _refuse(f"it cannot do the dropout at {name}", "set it to 0 in the config of the model")


def _refuse(what: str, fix: str) -> NoReturn:
    raise UserError("CONFIG", f"tensor_parallel.backend=package: {what}", fix)


class Sum(CollectiveOperation):
    """An all-reduce among the threads of all devices."""

    def __init__(self, world_size: int):
        super().__init__(world_size, func=_sums)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Sum":  # a barrier cannot be copied
        return Sum(self.world_size)


def _sums(*parts: Tensor) -> list[Tensor]:
    total = parts[0]
    for part in parts[1:]:
        total = total + part.to(total.device)
    return [total.to(part.device) for part in parts]


@dataclass
class Lent:
    """A parameter of the first device, and the modules of the other devices without it."""

    owner: nn.Module
    borrowers: list[nn.Module]
    name: str
    is_summed: bool  # a bias before a sum: the other devices add zeros


class SplitTransformer(nn.Module):
    """A causal model below its head, split, with the keywords and output of the original.

    Args:
        body: the original. Its embeddings are moved, its other weights copied.
        devices: the first one has the embeddings and the output.
    """

    def __init__(self, body: PreTrainedModel, devices: Sequence[torch.device]):
        super().__init__()
        self.config = body.config
        self.devices = list(devices)
        self.sum = Sum(len(devices))
        embeddings = body.get_input_embeddings().to(devices[0])
        self.embeddings_name = next(name for name, child in body.named_children() if child is embeddings)
        self.add_module(self.embeddings_name, embeddings)
        setattr(body, self.embeddings_name, None)
        rules = _rules(body, self.sum)
        self.shards = nn.ModuleList(
            make_shard(body, device, rules, rank=rank, world_size=len(devices))[0]
            for rank, device in enumerate(devices)
        )
        name = f"{self.embeddings_name}.weight"
        # Original name -> how the weight was split, and the names here: of the weight, or of its parts.
        self.weights: dict[str, tuple[StateAction | None, list[str]]] = {name: (None, [name])}
        self.lent: list[Lent] = []
        for name, _ in self.shards[0].named_parameters():
            original = name.replace("tp_wrapped_module.", "")
            action = next((action for rule, action in rules.state_rules.items() if rule.search(original)), None)
            holders = self.shards if action is not None else self.shards[:1]
            self.weights[original] = action, [f"shards.{rank}.{name}" for rank in range(len(holders))]
            if action is None:
                path, _, name = name.rpartition(".")
                owner, *borrowers = (shard.get_submodule(path) for shard in self.shards)
                is_summed = re.fullmatch(LAYERS[self.config.model_type][1] + r"\.bias", original) is not None
                self.lent.append(Lent(owner, borrowers, name, is_summed))
        self._take_back()

    def get_input_embeddings(self) -> nn.Module:
        return getattr(self, self.embeddings_name)

    def forward(
        self,
        input_ids: Tensor | None = None,
        *,
        inputs_embeds: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """The output of the original, on the first device.

        The caller's thread runs the first device. So its thread-local state applies there, such as hooks for saved
        tensors.
        """
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        shared = {**kwargs, "inputs_embeds": inputs_embeds, "use_cache": bool(use_cache)}
        caches = self._caches(past_key_values)
        with_gradient = torch.is_grad_enabled()

        def run(rank: int) -> Any:
            device = self.devices[rank]
            here = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in shared.items()}
            is_current = torch.cuda.device(device) if device.type == "cuda" else nullcontext()
            try:
                with torch.set_grad_enabled(with_gradient), is_current:
                    return self.shards[rank](past_key_values=caches[rank], **here)
            except BaseException as error:
                self.sum.barrier.abort()  # the other threads must not wait for this one
                return error

        self.sum.barrier.reset()
        with self._lend(), ThreadPoolExecutor(len(self.devices) - 1) as executor:
            others = [executor.submit(run, rank) for rank in range(1, len(self.devices))]
            outputs = [run(0), *(other.result() for other in others)]
        errors = [output for output in outputs if isinstance(output, BaseException)]
        if errors:
            raise next((error for error in errors if not isinstance(error, BrokenBarrierError)), errors[0])
        return outputs[0]

    @contextmanager
    def _lend(self) -> Iterator[None]:
        """Copy shared weights from the first device to the others inside a with block.

        Each pass needs new copies: weights change, and so do gradient mode and dtype.
        """
        try:
            for lent in self.lent:
                weight = lent.owner._parameters[lent.name]
                assert weight is not None
                for borrower, device in zip(lent.borrowers, self.devices[1:], strict=True):
                    copied = torch.zeros_like(weight, device=device) if lent.is_summed else weight.to(device)
                    borrower._parameters[lent.name] = copied  # type: ignore[assignment]
            yield
        finally:
            self._take_back()

    def _take_back(self) -> None:
        for lent in self.lent:
            for borrower in lent.borrowers:
                borrower._parameters[lent.name] = None

    def _caches(self, cache: Any) -> list[Any]:
        """A KV cache for each device. The first one keeps the others."""
        if cache is None:
            return [None] * len(self.devices)
        if not hasattr(cache, "of_other_devices"):
            assert cache.get_seq_length() == 0, "the cache is filled already"
            cache.of_other_devices = [copy.deepcopy(cache) for _ in self.devices[1:]]
            cache.reorder_cache = _refuse_to_reorder
        return [cache, *cache.of_other_devices]

    def merged(self, name: str, of: Callable[[nn.Parameter], Tensor]) -> Tensor:
        """A full tensor with a weight's shape, such as its gradient.

        Args:
            name: of the weight in the original.
            of: gives the tensor of a parameter.
        """
        action, parts = self.weights[name]
        tensors = [of(self.get_parameter(part)) for part in parts]
        return tensors[0] if action is None else action.undo(tensors)

    def state_dict(self, *args: Any, destination: Any = None, prefix: str = "", keep_vars: bool = False) -> Any:
        """The weights of the original."""
        destination = {} if destination is None else destination
        for name in self.weights:
            destination[prefix + name] = self.merged(name, lambda parameter: parameter.detach())
        return destination

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        # load_state_dict made this dict. The modules inside this one look for their parts in it next.
        for name, (action, parts) in self.weights.items():
            weight = state_dict.pop(prefix + name, None)
            if weight is not None:
                for rank, part in enumerate(parts):
                    state_dict[prefix + part] = weight if action is None else action(weight, rank=rank)
        super()._load_from_state_dict(state_dict, prefix, *args)


def _refuse_to_reorder(beams: Tensor) -> NoReturn:
    _refuse("no beam search: only the cache of the first device would follow", "sample")


def _rules(body: PreTrainedModel, add_up: Sum) -> Config:
    """The package's rules for splitting body without embeddings."""
    config, world_size = body.config, add_up.world_size
    split_outputs, split_inputs = LAYERS[config.model_type]
    # GPT-2 stores weights transposed, with query, key and value in one matrix.
    outputs, inputs = (1, 0) if config.model_type == "gpt2" else (0, 1)
    state_rules: dict[str, StateAction] = {}  # the first match wins
    attributes: dict[str, Any] = {}
    if config.model_type == "gpt2":
        attention = {"num_groups": 3, "chunk_size": config.hidden_size // config.num_attention_heads}
        state_rules[r"^h\.\d+\.attn\.c_attn\.weight$"] = SplitInGroupedChunks(world_size, outputs, **attention)
        state_rules[r"^h\.\d+\.attn\.c_attn\.bias$"] = SplitInGroupedChunks(world_size, 0, **attention)
        rank_size = partial(split_num_heads, world_size=world_size)  # of any number, divided as by tensor_split
        attributes[rf"^{split_outputs}$"] = {"nf": rank_size}
        attributes[r"^h\.\d+\.attn$"] = {"split_size": rank_size, "num_heads": rank_size}
    state_rules[rf"^{split_outputs}\.weight$"] = Split(world_size, outputs)
    state_rules[rf"^{split_outputs}\.bias$"] = Split(world_size, 0)
    state_rules[rf"^{split_inputs}\.weight$"] = Split(world_size, inputs)
    names = [name for name, _ in body.named_parameters()]
    used = {rule: action for rule, action in state_rules.items() if any(re.search(rule, name) for name in names)}
    return Config(used, {}, {rf"^{split_inputs}$": {0: add_up}}, attributes)


# ---- Checkpoints ----


def merged_state_dict(split: PreTrainedModel) -> dict[str, Tensor]:
    """Full weights by their original names. Split ones are merged on the CPU."""
    return split.state_dict()


def load_merged(split: PreTrainedModel, state_dict: Mapping[str, Tensor]) -> None:
    """The inverse of merged_state_dict. A weight with two names (tied embeddings) needs only the first."""
    first_names = {parameter: name for name, parameter in split.named_parameters()}
    second_names = {
        name: state_dict[first_names[parameter]]
        for name, parameter in split.named_parameters(remove_duplicate=False)
        if name not in state_dict and first_names[parameter] in state_dict
    }
    split.load_state_dict({**state_dict, **second_names})


def merged_optimizer_state(split: PreTrainedModel, optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Any]]:
    """Optimizer state of the full weights, by original name, in the order of the original's parameters().

    An optimizer of the original would hold it at the same places of its state_dict()["state"].

    Raises:
        UserError: CONFIG for an optimizer with state of full matrices (Adafactor).
    """
    merged: dict[str, dict[str, Any]] = {}
    for name, (action, parameters) in _parts(split).items():
        states = [optimizer.state.get(parameter, {}) for parameter in parameters]
        merged[name] = {}
        for key, value in states[0].items():
            is_number = not isinstance(value, Tensor) or value.ndim == 0  # such as the number of steps
            if not is_number and value.shape != parameters[0].shape:
                what = f"{type(optimizer).__name__} needs full matrices, but devices hold parts"
                _refuse(what, "optimizer=AdamW")
            if not is_number and action is not None:
                value = action.undo([state[key] for state in states])
            merged[name][key] = value
    return merged


def load_merged_optimizer_state(
    split: PreTrainedModel, optimizer: torch.optim.Optimizer, merged: Mapping[str, Mapping[str, Any]]
) -> None:
    """The inverse of merged_optimizer_state. The optimizer keeps its groups (learning rate, ...)."""
    parameters = (parameter for group in optimizer.param_groups for parameter in group["params"])
    indices = {parameter: index for index, parameter in enumerate(parameters)}
    state_dict = optimizer.state_dict()
    state_dict["state"] = {}
    for name, (action, parts) in _parts(split).items():
        for rank, parameter in enumerate(parts):
            state = dict(merged.get(name, {}))  # empty to reset the optimizer
            for key, value in state.items():
                if isinstance(value, Tensor):
                    part = value if action is None or value.ndim == 0 else action(value, rank=rank)
                    state[key] = part.clone()  # parts must not share a tensor of step counts
            state_dict["state"][indices[parameter]] = state
    optimizer.load_state_dict(state_dict)


def _parts(split: PreTrainedModel) -> dict[str, tuple[StateAction | None, list[nn.Parameter]]]:
    """Original name of each weight -> how it was split, and its parts; in the original order."""
    body, prefix = split.base_model, split.base_model_prefix + "."
    parts = {
        prefix + name: (action, [body.get_parameter(part) for part in names])
        for name, (action, names) in body.weights.items()
    }
    head = {name: (None, [weight]) for name, weight in split.named_parameters() if not name.startswith(prefix)}
    return parts | head
