"""A trainer on tensors without memory: it runs one step, and counts the memory the step would hold.

The trainer itself is built, as rank 0 of the planned run. Its tensors have a shape and no data. It runs the largest
microbatch of the real data. So the plan needs no formulas for models, shards or optimizers.
"""

import math
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AttentionInterface, PreTrainedModel, PreTrainedTokenizerBase

from engine.data.examples import Example
from engine.models.layers import find_layers
from engine.models.loading import hf_config_of
from engine.models.policy import load_policy
from engine.models.score_head import AUTO_CLASSES, finish_score_head, head_of, head_of_loss, prepare_config
from engine.models.shards import local_shard
from engine.models.wide_products import takes_low_weight
from engine.placement.placement import Placement
from engine.placement.sharding import shard_model
from engine.run.reference_setup import place_reference
from engine.settings.hardware import Hardware
from engine.settings.schema import Settings
from engine.step.attention import packed_varlen, register_packed_attention
from engine.step.first_pass import FirstPass
from engine.step.layout import Microbatch, num_fed_tokens
from engine.step.logprobs import CHUNK_LOGITS, CHUNK_TOKENS, chunk_logits
from engine.step.metrics import MetricAccumulator
from engine.step.microbatches import MicrobatchRunner, Prepared
from engine.step.reference import LiveReference, Reference

if TYPE_CHECKING:  # trainers import the engine, not the other way round
    from trainers import BasicTrainer

CPU = torch.device("cpu")


# ---- Tensors without memory ----


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all living tensors made by operations inside a with block.

    Attributes:
        now, peak: bytes held now, and at most.
        gathered: the most bytes in storages that grow and shrink: the gathered weights of FSDP.
        communicated: bytes passed to collectives.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.gathered = 0
        self.communicated = 0
        self._sizes: dict[int, tuple[weakref.ref, int]] = {}
        self._resized: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # its operations come back here on the local shard
        if func is torch.ops.aten._local_scalar_dense.default:
            return 0  # .item() of a tensor without data
        output = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(output):
            if isinstance(tensor, Tensor):
                self._add(tensor.untyped_storage())
        if func.namespace == "c10d":
            sizes = [tensor.nbytes for tensor in tree_leaves(args) if isinstance(tensor, Tensor)]
            self.communicated += max(sizes, default=0)
        if func.namespace in ("c10d", "fsdp"):  # around these, FSDP resizes storages outside of any operation
            self.recount()
        self.peak = max(self.peak, self.now)
        return output

    def _add(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self._sizes:
            self._sizes[key] = weakref.ref(storage, lambda _: self._drop(key)), storage.nbytes()
            self.now += storage.nbytes()

    def _drop(self, key: int) -> None:
        self.now -= self._sizes.pop(key)[1]
        self._resized.discard(key)

    def recount(self) -> int:
        """Bytes held now, with resized storages at their new sizes."""
        for key in list(self._sizes):  # a list of items() would make tuples; these may trigger _drop()
            entry = self._sizes.get(key)
            storage = entry and entry[0]()
            if entry and storage is not None and storage.nbytes() != entry[1]:
                self._sizes[key] = entry[0], storage.nbytes()
                self.now += storage.nbytes() - entry[1]
                self._resized.add(key)
        self.gathered = max(self.gathered, sum(self._sizes[key][1] for key in list(self._resized)))
        return self.now


@contextmanager
def simulated_group(num_processes: int) -> Iterator[None]:
    """Act as rank 0 of num_processes inside a with block. Collectives do nothing."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=num_processes)
    try:
        yield
    finally:
        dist.destroy_process_group()


def _attention_of_gpu(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    segments: Any,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Packed attention with its GPU backend, on fake tensors of a CPU."""
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    return packed_varlen(query[0], key[0], value[0], segments, scaling, sliding_window)[None], None


# ---- The trainer ----


@dataclass(frozen=True)
class Memory:
    """Bytes of a process in a step.

    Args:
        activations: after the forward pass of the largest microbatch.
        gathered: full weights under FSDP; else the copies of weights in mixed_precision.
        state: held between steps: parameters, buffers, optimizer state and reference.
        peak: held at most at once, state included.
        communicated: by the largest microbatch.
    """

    parameters: int
    gradients: int
    optimizer: int
    reference: int
    activations: int
    logits: int
    gathered: int
    state: int
    peak: int
    communicated: int

    def on_device(self, offload: bool) -> int:
        """The part of the peak on the device."""
        return self.peak - (self.parameters + self.gradients + self.optimizer if offload else 0)


class Simulated(Placement):
    """A mixin for placements: models have shapes and no memory, and their memory is counted.

    Attributes:
        hardware: of the planned run; set by simulated_trainer.
    """

    hardware: Hardware

    def __init__(self, settings: Settings, tokenizer: PreTrainedTokenizerBase, run_dir: Path):
        self.is_on_gpu = self.hardware.kind == "gpu"
        self.fake, self.live = FakeTensorMode(allow_non_fake_inputs=True), LiveBytes()
        super().__init__(settings, tokenizer, run_dir)

    def choose_device(self) -> torch.device:
        return CPU  # GPU tensors need a GPU, even without memory

    @property
    def chunk_logits(self) -> int:
        return chunk_logits("cuda" if self.is_on_gpu else "cpu", self.hardware.memory)

    @property
    def mesh_or_none(self) -> DeviceMesh | None:
        return getattr(self, "mesh", None)

    @contextmanager
    def simulated(self) -> Iterator[None]:
        """Make tensors without memory inside a with block, and count it."""
        # Fake tensors are on the CPU, also for a planned GPU.
        takes_low = self.is_on_gpu or takes_low_weight(torch.device("cpu"), torch.bfloat16)
        modules = ("engine.step.logprobs", "engine.models.precision")
        products, copies = (patch(f"{module}.takes_low_weight", lambda *weight: takes_low) for module in modules)
        with self.fake, self.live, patch.dict(CHUNK_LOGITS, cpu=self.chunk_logits), products, copies:
            yield

    def gather_from_data_ranks(self, value: Any) -> list[Any]:
        return [value] * self.num_data_ranks

    def place_model(self, dtype: torch.dtype) -> PreTrainedModel:
        settings, mesh = self.settings, self.mesh_or_none
        model = load_policy(settings, self.tokenizer, dtype, torch.device("meta"), None, _model_shape)
        if settings.batching == "packed":
            is_low = (self.mixed_precision or dtype) in (torch.bfloat16, torch.float16)
            register_packed_attention()
            model.original_attention = model.config._attn_implementation  # for sampling
            AttentionInterface.register("packed_of_gpu", _attention_of_gpu)
            model.set_attn_implementation("packed_of_gpu" if self.is_on_gpu and is_low else "packed")
        if mesh is not None:
            self.permutations = shard_model(
                model,
                find_layers(model, settings.model.block_name),
                mesh,
                mixed_precision=self.mixed_precision,
                offload=False,  # fake tensors are on the CPU already
                deterministic=settings.deterministic,
            )
        with self.simulated():
            model.to_empty(device=CPU)
            if mesh is None:
                model.tie_weights()
        return model

    def copy_policy(self, policy: PreTrainedModel) -> PreTrainedModel:
        return self.place_model(getattr(torch, self.settings.model.policy_dtype))

    def build_optimizer(self, policy: PreTrainedModel) -> torch.optim.Optimizer:
        optimizer = super().build_optimizer(policy)
        is_fused = self.settings.optimizer == "RMSprop"  # by a kernel; see engine/models/rmsprop_kernel.py
        if self.is_on_gpu and self.mesh_or_none is None:  # torch's default on GPUs, with temporary copies
            for group in optimizer.param_groups:
                if "foreach" in group:
                    group["foreach"] = not (is_fused or group.get("fused"))
        return optimizer

    def memory(self) -> tuple[bool, int]:
        return self.is_on_gpu, self.hardware.memory

    def bytes_per_token(self, runner: MicrobatchRunner, examples: Sequence[Example]) -> float:
        layout = self.settings.batching, self.feeds_last_token
        longest = max(examples, key=lambda example: num_fed_tokens(example, *layout))
        kept = self._held_by_forward(runner, [longest]) - self._held_by_forward(runner, [])
        return kept / max(1, num_fed_tokens(longest, *layout) - 1)

    def _held_by_forward(self, runner: MicrobatchRunner, examples: Sequence[Example]) -> int:
        """Bytes a forward pass keeps for its backward pass."""
        with self.simulated(), runner.in_mixed_precision():
            before = self.live.recount()
            loss = _loss(runner, runner.lay_out(examples))
            held = self.live.recount() - before
            del loss
        return held


def _loss(runner: MicrobatchRunner, batch: Microbatch) -> Tensor:
    first = FirstPass.with_zeros(runner.objective, batch.input_ids.device)
    return runner.loss(Prepared(batch, None), 1, first, MetricAccumulator())


def _model_shape(
    settings: Settings, tokenizer: PreTrainedTokenizerBase, dtype: torch.dtype, device: torch.device
) -> PreTrainedModel:
    """The base model on the meta device."""
    hf_config, trusted = hf_config_of(settings.model, tokenizer), settings.model.trust_remote_code
    head = head_of_loss(settings)
    prepare_config(hf_config, head, trusted)
    with torch.device("meta"):
        model = AUTO_CLASSES[head].from_config(hf_config, dtype=dtype, trust_remote_code=trusted)
    if head == "score":
        finish_score_head(model, settings, tokenizer, is_new=False)
    return model.eval()


def simulated_trainer(base: type["BasicTrainer"], hardware: Hardware) -> type["BasicTrainer"]:
    """A subclass of base on simulated tensors."""

    class SimulatedTrainer(base):  # type: ignore[valid-type, misc]
        @classmethod
        def placement_class(cls, settings: Settings) -> type[Placement]:
            return type("SimulatedPlacement", (Simulated, super().placement_class(settings)), {"hardware": hardware})

        def build_reference(self) -> tuple[Reference | None, str | None]:  # a cached one is not in memory in training
            is_live = self.settings.has_live_reference
            return place_reference(self.settings, self.placement, self.runner) if is_live else None, None

    return SimulatedTrainer


def measure_step(trainer: "BasicTrainer", largest: Sequence[Example], num_microbatches: int) -> Memory:
    """The memory of a simulated step.

    Args:
        largest: the examples of its largest microbatch.
        num_microbatches: of the step.
    """
    placement, runner, policy = trainer.placement, trainer.runner, trainer.policy
    assert isinstance(placement, Simulated)
    live, head, optimizer = placement.live, head_of(policy).weight, trainer.optimizer
    parameters, reference = [*policy.parameters()], []
    if isinstance(runner.reference, LiveReference) and runner.reference.model is not policy:
        reference = [*runner.reference.model.parameters()]
    head_gradient = math.prod(gathered_shape(head)) * head.itemsize
    with placement.simulated():
        for examples in ([], largest):  # the first step creates the optimizer state
            live.peak = state = live.recount()
            with runner.in_mixed_precision():
                copies = live.now - state
                if num_microbatches > 1:  # gradients exist before the largest microbatch
                    _loss(runner, runner.lay_out([])).backward()
                live.communicated, before = 0, live.recount()
                batch = runner.lay_out(examples)
                loss = _loss(runner, batch)
                held = live.recount() - before - head_gradient
                loss.backward()
            communicated = live.communicated
            gradients = _bytes(parameter.grad for parameter in parameters)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    num_logits = len(batch.targets) if batch.attention_mask is None else batch.input_ids.numel()
    vocabulary = gathered_shape(head)[0]
    if batch.attention_mask is None:
        num_logits = min(num_logits, max(CHUNK_TOKENS, placement.chunk_logits // vocabulary))
    return Memory(
        parameters=_bytes(parameters),
        gradients=gradients,
        optimizer=_bytes(tree_leaves([*optimizer.state.values()])),
        reference=_bytes(reference),
        activations=held,
        logits=num_logits * vocabulary * max(4, head.itemsize),
        gathered=copies if placement.mesh_or_none is None else live.gathered,
        state=state,
        peak=live.peak,
        communicated=communicated,
    )


def _bytes(values: Any) -> int:
    return sum(local_shard(value).nbytes for value in values if isinstance(value, Tensor))


def gathered_shape(parameter: Tensor) -> list[int]:
    """The local shape of a parameter after FSDP has gathered its shards."""
    shape = [*parameter.shape]
    if isinstance(parameter, DTensor):
        names = parameter.device_mesh.mesh_dim_names or ()
        for name, placement in zip(names, parameter.placements, strict=True):
            if name == "tensor" and hasattr(placement, "dim"):
                shape[placement.dim] = -(-shape[placement.dim] // parameter.device_mesh[name].size())
    return shape
