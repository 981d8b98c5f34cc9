"""Placement by the tensor_parallel package: the devices of one process split each matrix product."""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from engine.data.examples import Example
from engine.models.loading import hf_config_of, load_model
from engine.models.parameters import named_aliases
from engine.placement.placement import Placement
from engine.placement.tensor_parallel_package import (
    check_config,
    load_merged,
    load_merged_optimizer_state,
    merged_optimizer_state,
    merged_state_dict,
    split_model,
)
from engine.step.microbatches import MicrobatchRunner
from engine.step.packing_check import use_packed_attention


class PackageDevices(Placement):
    """The placement of tensor_parallel.backend=package."""

    def place_model(self, dtype: torch.dtype) -> PreTrainedModel:
        settings, on_gpus = self.settings, self.device.type == "cuda"
        self.num_devices = settings.tensor_parallel_size or (torch.cuda.device_count() if on_gpus else 1)
        check_config(hf_config_of(settings.model, self.tokenizer), self.num_devices)
        model = load_model(settings, self.tokenizer, dtype, torch.device("cpu"))
        if settings.batching == "packed":
            use_packed_attention(model, self.mixed_precision)
        self.aliases = named_aliases(model)
        devices = [torch.device("cuda", index) if on_gpus else self.device for index in range(self.num_devices)]
        return split_model(model, devices).eval()

    def bytes_per_token(self, runner: MicrobatchRunner, examples: Sequence[Example]) -> float:
        return super().bytes_per_token(runner, examples) * self.num_devices  # measured on the first device only

    def named_tensors(
        self, policy: PreTrainedModel, optimizer: torch.optim.Optimizer
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        state = merged_optimizer_state(policy, optimizer)
        named_state = {f"{name}.{key}": value for name, values in state.items() for key, value in values.items()}
        return self.named_weights(policy), named_state

    def named_weights(self, model: PreTrainedModel) -> dict[str, Tensor]:
        return {name: value for name, value in merged_state_dict(model).items() if name not in self.aliases}

    def restore(
        self,
        policy: PreTrainedModel,
        optimizer: torch.optim.Optimizer,
        tensors: Iterable[tuple[str, Tensor]],
        state: Mapping[str, dict[str, Tensor]],
    ) -> None:
        self.restore_weights(policy, tensors)
        load_merged_optimizer_state(policy, optimizer, state)

    def restore_weights(self, model: PreTrainedModel, tensors: Iterable[tuple[str, Tensor]]) -> None:
        load_merged(model, dict(tensors))
