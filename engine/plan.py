"""A run on paper: the memory of a GPU, the steps and the time, before a weight is loaded or a process started.

The trainer itself is built, as the first of as many processes as the run will have, on tensors that have a shape and no
memory, and runs the largest microbatch of the real data. What it would hold is counted as it goes. So the plan knows
nothing of its own about models, shards or optimizers. Time is arithmetic: the operations of all microbatches by an
assumed share of what the hardware can do at most.
"""

import math
import os
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from omegaconf import DictConfig
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AttentionInterface, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from engine.adapters import AdapterReference, adapter_of, load_policy, num_weights
from engine.attention import packed_varlen
from engine.batching import num_fed_tokens
from engine.logprobs import CHUNK_LOGITS, CHUNK_TOKENS
from engine.memory import total_memory
from engine.metrics import Sums, gpu_peak_flops, peak_flops
from engine.models import find_blocks, hf_config_of
from engine.reference import LiveReference
from engine.sharding import own, shard_model
from engine.tokenization import Example, Split

if TYPE_CHECKING:  # trainers import the engine, not the other way round
    from trainers import BasicTrainer

CPU = torch.device("cpu")
# What a step is taken to do of the most that the hardware can do. On a CPU, where that is measured, 50 to 60 % of it
# was reached (README); no GPU has been measured.
SHARE_OF_PEAK = {"gpu": 0.4, "cpu": 0.5}
# Of a GPU's memory that is left for CUDA and the gaps of its allocator; and what a process holds beside its tensors.
SHARE_OF_MEMORY, PROCESS_BYTES = 0.9, 4 * 10**8


# ---- Hardware ----


@dataclass(frozen=True)
class Hardware:
    """What a process runs on: a GPU, or its part of the CPU cores of a machine.

    Args:
        memory: bytes; on a CPU those of the machine, which its processes share.
        peak: FLOP/s of matrix products, in bfloat16 or in fp32.
    """

    name: str
    kind: str  # gpu or cpu
    memory: int
    peak: dict[torch.dtype, float]


def _gpu(name: str, gigabytes: int, float32: float) -> Hardware:
    bfloat16 = gpu_peak_flops(name)
    assert bfloat16 is not None
    return Hardware(name, "gpu", gigabytes * 10**9, {torch.bfloat16: bfloat16, torch.float32: float32 * 1e12})


# From data sheets: memory, and 10^12 FLOP/s of products in fp32 without TF32.
HARDWARE = {
    "h200": _gpu("H200", 141, 67),
    "h100": _gpu("H100 SXM", 80, 67),
    "a100": _gpu("A100 SXM 80 GB", 80, 19.5),
    "rtx4090": _gpu("RTX 4090", 24, 82.6),
    "rtx3090": _gpu("RTX 3090", 24, 35.6),
}


def this_machine(num_processes: int, dtype: torch.dtype) -> Hardware:
    """The GPU that is here, or a process's part of the CPU cores, whose peak in dtype is measured."""
    if torch.cuda.is_available():
        device, name = torch.device("cuda"), torch.cuda.get_device_name()
        known = peak_flops(device)
        return Hardware(name, "gpu", total_memory(device), {torch.bfloat16: known} if known else {})
    cores = os.cpu_count() or 1
    threads = int(os.environ.get("OMP_NUM_THREADS") or max(1, cores // num_processes))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    left, right = (torch.ones(1024, 1024, dtype=dtype) for _ in range(2))
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        left @ right
        seconds.append(time.perf_counter() - start)
    torch.set_num_threads(before)
    peak = 2 * 1024**3 / min(seconds) * min(1.0, cores / (threads * num_processes))
    return Hardware(f"{threads} of {cores} CPU cores each", "cpu", total_memory(CPU), {dtype: peak})


# ---- Tensors without memory ----


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors that operations inside it make, for as long as they live.

    Numbers that the program asks for, to decide on, are 0: they are not known.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.gathered = 0  # the most that was held in storages that grow and shrink: FSDP's gathered weights
        self.communicated = 0  # bytes that collectives were called with
        self._sizes: dict[int, tuple[weakref.ref, int]] = {}
        self._resized: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # it is no tensor of its own, and comes back as what it does with its shard
        if func is torch.ops.aten._local_scalar_dense.default:
            return 0
        output = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(output):
            if isinstance(tensor, Tensor):
                self._add(tensor.untyped_storage())
        if func.namespace == "c10d":
            sizes = [tensor.nbytes for tensor in tree_leaves(args) if isinstance(tensor, Tensor)]
            self.communicated += max(sizes, default=0)
        if func.namespace in ("c10d", "fsdp"):  # FSDP resizes storages, which is no operation, around these
            self.look_again()
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

    def look_again(self) -> int:
        """The bytes that are held now, of storages that were resized too."""
        for key in list(self._sizes):  # of keys alone: what makes tuples may collect garbage, which changes it
            entry = self._sizes.get(key)
            storage = entry and entry[0]()
            if entry and storage is not None and storage.nbytes() != entry[1]:
                self._sizes[key] = entry[0], storage.nbytes()
                self.now += storage.nbytes() - entry[1]
                self._resized.add(key)
        self.gathered = max(self.gathered, sum(self._sizes[key][1] for key in list(self._resized)))
        return self.now


@contextmanager
def group_on_paper(num_processes: int) -> Iterator[None]:
    """Inside this, the process is the first of num_processes, whose collectives do nothing."""
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
    """Packed attention as a GPU runs it, on tensors that only look like a CPU's."""
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    return packed_varlen(query[0], key[0], value[0], segments, scaling, sliding_window)[None], None


AttentionInterface.register("packed_of_gpu", _attention_of_gpu)


# ---- The trainer on paper ----


@dataclass(frozen=True)
class Memory:
    """Bytes of a process. What the step takes is not all held at once: peak is the most that is, state included.

    Args:
        state: parameters, buffers, optimizer state and reference: what is held between steps.
        activations: after the forward pass of the largest microbatch.
        gathered: weights that FSDP has brought together; else their copies in mixed_precision.
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
    communicated: int  # by the largest microbatch

    def of_device(self, offload: bool) -> int:
        """What of the peak is on the device."""
        return self.peak - (self.parameters + self.gradients + self.optimizer if offload else 0)


def on_paper(base: type["BasicTrainer"], hardware: Hardware) -> Any:
    """base as a class of trainers whose models have shapes and no memory."""

    class TrainerOnPaper(base):  # type: ignore[valid-type, misc]
        def join_others(self) -> None:
            self.device = CPU  # tensors of a GPU need one, even if they have no memory
            self.is_on_gpu = hardware.kind == "gpu"
            self.fake, self.live = FakeTensorMode(allow_non_fake_inputs=True), LiveBytes()
            super().join_others()
            self.is_sharded = hasattr(self, "mesh")

        @contextmanager
        def simulated(self) -> Iterator[None]:
            """Inside this, tensors have no memory, and what they would have is counted."""
            logits = {"cpu": CHUNK_LOGITS["cuda" if self.is_on_gpu else "cpu"]}
            with self.fake, self.live, patch.dict(CHUNK_LOGITS, logits):  # as the tensors say that they are a CPU's
                yield

        def of_data_ranks(self, value: Any) -> list[Any]:
            return [value] * self.num_data_ranks

        def place_model(self, dtype: torch.dtype) -> PreTrainedModel:
            config = self.config
            model = load_policy(config, self.tokenizer, dtype, torch.device("meta"), None, self.described)
            if config.batching == "packed":
                is_low = (self.mixed_precision or dtype) in (torch.bfloat16, torch.float16)
                model.set_attn_implementation("packed_of_gpu" if self.is_on_gpu and is_low else "packed")
            if self.is_sharded:
                self.orders = shard_model(
                    model,
                    find_blocks(model, config.model.block_name),
                    self.mesh,
                    mixed_precision=self.mixed_precision,
                    offload=False,  # all is on the CPU here
                    deterministic=config.deterministic,
                )
            with self.simulated():
                model.to_empty(device=CPU)
                if not self.is_sharded:
                    model.tie_weights()
            return model

        def described(
            self, config: DictConfig, tokenizer: PreTrainedTokenizerBase, dtype: torch.dtype, device: torch.device
        ) -> PreTrainedModel:
            """The base model of config, as a shape."""
            hf_config, trusted = hf_config_of(config.model, tokenizer), config.model.trust_remote_code
            with torch.device("meta"):
                return AutoModelForCausalLM.from_config(hf_config, dtype=dtype, trust_remote_code=trusted).eval()

        def compiled(self, model: PreTrainedModel) -> PreTrainedModel:
            return model

        def build_reference(self) -> LiveReference | None:
            config = self.config
            if config.reference != "live" or not self.loss.needs_reference or config.loss.get("reference_free"):
                return None
            adapter = adapter_of(self.policy)
            if adapter is not None and adapter.has_own_reference:
                return AdapterReference(self.policy, self.cast_dtype)
            dtype = config.model.reference_dtype or config.model.policy_dtype
            return LiveReference(self.place_model(getattr(torch, dtype)).requires_grad_(False), self.cast_dtype)

        def build_optimizer(self) -> torch.optim.Optimizer:
            optimizer = super().build_optimizer()
            if self.is_on_gpu and not self.is_sharded:  # torch's default there: faster, with copies in passing
                for group in optimizer.param_groups:
                    if "foreach" in group:
                        group["foreach"] = not group.get("fused")
            return optimizer

        def hardware(self) -> tuple[bool, int]:
            return self.is_on_gpu, hardware.memory

        def bytes_per_token(self) -> float:
            layout = self.config.batching
            longest = max(self.train_examples, key=lambda example: num_fed_tokens(example, layout))
            kept = self.forward([longest])[1] - self.forward([])[1]
            return kept / max(1, num_fed_tokens(longest, layout) - 1)

        def forward(self, examples: Sequence[Example]) -> tuple[Tensor, int]:
            """A forward pass; returns the loss, and the bytes that are held for the backward pass."""
            with self.simulated(), self.in_mixed_precision():
                before = self.live.look_again()
                loss = self.run_microbatch((self.lay_out(examples), None), 1, Sums())
                return loss, self.live.look_again() - before

        def measured(self, largest: Sequence[Example], num_parts: int) -> Memory:
            """The memory of a step with num_parts microbatches."""
            live, head = self.live, self.policy.get_output_embeddings().weight
            parameters, reference = [*self.policy.parameters()], []
            if isinstance(self.reference, LiveReference) and self.reference.model is not self.policy:
                reference = [*self.reference.model.parameters()]
            head_gradient = math.prod(_gathered_shape(head)) * head.itemsize
            with self.simulated():
                for part in ([], largest):  # the first step makes the optimizer's state
                    live.peak = state = live.look_again()
                    with self.in_mixed_precision():
                        copies = live.now - state
                        if num_parts > 1:  # there are gradients already when the largest is run
                            self.run_microbatch((self.lay_out([]), None), 1, Sums()).backward()
                        live.communicated, before = 0, live.look_again()
                        batch = self.lay_out(part)
                        loss = self.run_microbatch((batch, None), 1, Sums())
                        held = live.look_again() - before - head_gradient
                        loss.backward()
                    communicated = live.communicated
                    gradients = _bytes(parameter.grad for parameter in parameters)
                    self.optimizer.step()
                    self.optimizer.zero_grad(set_to_none=True)
            num_logits = len(batch.targets) if batch.attention_mask is None else batch.input_ids.numel()
            vocabulary = _gathered_shape(head)[0]
            if batch.attention_mask is None:
                logits = CHUNK_LOGITS["cuda" if self.is_on_gpu else "cpu"]
                num_logits = min(num_logits, max(CHUNK_TOKENS, logits // vocabulary))
            return Memory(
                parameters=_bytes(parameters),
                gradients=gradients,
                optimizer=_bytes(tree_leaves([*self.optimizer.state.values()])),
                reference=_bytes(reference),
                activations=held,
                logits=num_logits * vocabulary * max(4, head.itemsize),
                gathered=live.gathered if self.is_sharded else copies,
                state=state,
                peak=live.peak,
                communicated=communicated,
            )

    return TrainerOnPaper


def _bytes(values: Any) -> int:
    return sum(own(value).nbytes for value in values if isinstance(value, Tensor))


def _gathered_shape(parameter: Tensor) -> list[int]:
    """The shape that a process has of a parameter when FSDP has brought its shards together."""
    shape = [*parameter.shape]
    if isinstance(parameter, DTensor):
        names = parameter.device_mesh.mesh_dim_names or ()
        for name, placement in zip(names, parameter.placements, strict=True):
            if name == "tensor" and hasattr(placement, "dim"):
                shape[placement.dim] = -(-shape[placement.dim] // parameter.device_mesh[name].size())
    return shape


# ---- Work and time ----


@dataclass(frozen=True)
class Work:
    """What some examples give the model to do.

    Args:
        tokens: fed, padding included.
        targets: positions that reach the LM head.
        pairs: of a query and a key that it sees.
    """

    tokens: int
    targets: int
    pairs: float

    @classmethod
    def of(cls, examples: Sequence[Example], layout: str) -> "Work":
        """Of one microbatch."""
        responses: dict[bytes, dict[bytes, int]] = {}  # prompt -> distinct responses: their lengths
        lengths: dict[bytes, int] = {}
        for example in examples:
            key = example.prompt.tobytes()
            lengths[key] = len(example.prompt)
            responses.setdefault(key, {}).update({each.tobytes(): len(each) for each in example.responses})
        every = [(lengths[key], length) for key in responses for length in responses[key].values()]
        if layout == "padded":
            longest = max((prompt + length for prompt, length in every), default=0)
            tokens = len(every) * longest
            return cls(tokens, tokens, tokens * longest / 2)
        return cls(
            tokens=sum(lengths.values()) + sum(length - 1 for _, length in every),
            targets=sum(length for _, length in every),
            pairs=sum(length**2 / 2 for length in lengths.values())
            + sum(length * (prompt + length / 2) for prompt, length in every),
        )


@dataclass(frozen=True)
class Plan:
    """What a run will take.

    Args:
        base: the trainer's name.
        seconds: of the parts of the run; None where the hardware's peak is not known.
        num_parts: the most microbatches that a process runs in a step.
        budget: the token budget; tokens are those of the largest microbatch.
        checkpointed: of how many blocks how many recompute their activations.
    """

    config: DictConfig
    base: str
    hardware: Hardware
    num_processes: int
    num_trained: int
    num_parameters: int
    memory: Memory
    num_steps: int
    num_tokens: int
    num_parts: int
    budget: int
    tokens: int
    checkpointed: tuple[int, int]
    seconds: dict[str, float] | None

    @property
    def needed(self) -> float:
        """Bytes of the device that have to be there: of a GPU, or of the machine whose processes share its memory."""
        if self.hardware.kind == "cpu":
            return self.num_processes * (self.memory.peak + PROCESS_BYTES)
        return self.memory.of_device(self.config.fsdp.cpu_offload) / SHARE_OF_MEMORY

    @property
    def fits(self) -> bool:
        return self.needed <= self.hardware.memory

    def __str__(self) -> str:
        config, memory, hardware = self.config, self.memory, self.hardware
        on_gpus = hardware.kind == "gpu"
        host = ", in CPU memory" if config.fsdp.cpu_offload and on_gpus else ""
        checkpointed, num_blocks = self.checkpointed
        recomputed = f", {checkpointed} of {num_blocks} blocks recompute theirs" if checkpointed else ""
        is_sharded = self.base != "BasicTrainer"
        stored = config.model.policy_dtype
        if config.peft.name != "none":
            stored = f"{config.peft.get('quant_type', config.mixed_precision or stored)}, adapters in float32"
        rows = [
            ("parameters", memory.parameters, f"{stored}{host}"),
            ("gradients", memory.gradients, host.removeprefix(", ")),
            ("optimizer state", memory.optimizer, f"{config.optimizer}{host}"),
            ("reference", memory.reference, "stays loaded" if memory.reference else "not in memory while training"),
            ("activations", memory.activations, f"{self.tokens:,} tokens{recomputed}"),
            ("logits", memory.logits, "of some targets at a time" if config.batching == "packed" else "of all tokens"),
            (
                "gathered weights" if is_sharded else "copies of weights",
                memory.gathered,
                "at most at once" if is_sharded else f"in {config.mixed_precision}" if memory.gathered else "",
            ),
            (
                "peak of a step",
                memory.of_device(bool(host)),
                "with what operations need in passing; not all of the above is held at once",
            ),
        ]
        unit = "GPU" if on_gpus else "process"
        total = f"{hardware.memory / 1e9:,.0f} GB"
        fix = "activation_checkpointing=true, a smaller token_budget, mixed_precision=bfloat16 or more processes"
        lines = [
            f"plan of {self.base} on {self.num_processes} {unit}{'s' * (self.num_processes > 1)} ({hardware.name}):"
            f" {self.num_parameters:,} parameters, {self.num_trained / self.num_parameters:.2%} are trained",
            "",
            f"memory of a {unit}, the fullest one, in GB",
            *(f"  {name:18}{size / 1e9:9.3f}  {remark}".rstrip() for name, size, remark in rows),
            f"{'fits' if self.fits else 'does not fit'}: {self.needed / 1e9:,.1f} GB of {total}"
            + (
                f", with {1 - SHARE_OF_MEMORY:.0%} left for CUDA and the gaps of its allocator"
                if on_gpus
                else f", with {PROCESS_BYTES / 1e9} GB for each process's program"
            )
            + ("" if self.fits else f"; {fix}"),
            "",
            f"steps    {self.num_steps:,} of {config.batch_size} examples, {self.num_tokens:,} tokens in all;"
            f" microbatches of a {unit} and step: at most {self.num_parts}, of at most {self.tokens:,} tokens"
            f" (token_budget {self.budget:,})",
            f"time     {self.shown_time()}",
            "",
            f"assumed: matrix products at {SHARE_OF_PEAK[hardware.kind]:.0%} of"
            f" {'the data sheet' if on_gpus else 'the peak that was measured just now'}; communication takes no time"
            f" ({memory.communicated / 1e9:,.2f} GB through a {unit} for its largest microbatch);",
            "  nothing is compiled; the reference is not in cache_dir yet; an attention and a head without kernels of"
            " their own take what they take on a CPU",
            "left out of time: loading, samples, checkpoints; of memory: what the allocator cannot give back"
            + (", GPUs beyond the first for a model split by layers" if on_gpus and not is_sharded else ""),
        ]
        return "\n".join(lines)

    def shown_time(self) -> str:
        if self.seconds is None:
            return "not known: no peak is known for this hardware and dtype"
        parts = [f"{name} {_shown_seconds(value)}" for name, value in self.seconds.items() if value]
        return f"{_shown_seconds(sum(self.seconds.values()))}: {', '.join(parts)}"


def _shown_seconds(seconds: float) -> str:
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:,.1f} {unit}"
    return f"{seconds:,.1f} s"


def flops_of(trainer: Any) -> Callable[[Work, bool], float]:
    """How many operations of all processes that share matrix products some work takes, with its backward pass or
    without. Each weight of a block is taken to be used once for each token."""
    config, policy = trainer.policy.config, trainer.policy
    blocks = find_blocks(policy, trainer.config.model.block_name)
    trained, weights = zip(*(num_weights(block) for block in blocks), strict=True)
    # What lies before the first weight that is trained has no backward pass.
    is_first_trained = policy.get_input_embeddings().weight.requires_grad
    first = 0 if is_first_trained else next((index for index, num in enumerate(trained) if num), len(blocks))
    reached = len(blocks) - first
    head = policy.get_output_embeddings().weight
    width = (getattr(config, "head_dim", None) or 0) * config.num_attention_heads or config.hidden_size
    recomputed = trainer.num_checkpointed / len(blocks)

    def flops(work: Work, with_backward: bool) -> float:
        of_head = 2 * head.numel() * work.targets
        forward = 2 * sum(weights) * work.tokens + 4 * width * len(blocks) * work.pairs
        if not with_backward:
            return forward + of_head
        of_inputs = 2 * sum(weights[first:]) * work.tokens + 8 * width * reached * work.pairs
        of_weights = 2 * sum(trained) * work.tokens
        return forward * (1 + recomputed) + of_inputs + of_weights + of_head * (2 + head.requires_grad)

    return flops


def peak_rate(config: DictConfig, hardware: Hardware, dtype: torch.dtype) -> float | None:
    """FLOP/s of matrix products in dtype, as matmul_precision has those of fp32."""
    bfloat16 = hardware.peak.get(torch.bfloat16)
    if dtype == torch.float32 and config.matmul_precision != "highest" and hardware.kind == "gpu" and bfloat16:
        return bfloat16 / 2 if config.matmul_precision == "high" else bfloat16  # TF32 is half as fast
    return hardware.peak.get(dtype)


def make_plan(
    config: DictConfig,
    base: type["BasicTrainer"],
    tokenizer: PreTrainedTokenizerBase,
    train_split: Split,
    test_split: Split,
    num_processes: int,
) -> Plan:
    """What a run of a trainer on some processes will take."""
    dtype = getattr(torch, config.mixed_precision or config.model.policy_dtype)
    hardware = HARDWARE[config.plan_hardware] if config.plan_hardware else this_machine(num_processes, dtype)
    with group_on_paper(num_processes):
        trainer = on_paper(base, hardware)(config, Path(), tokenizer, train_split, test_split)
        num_ranks, flops = trainer.num_data_ranks, flops_of(trainer)

        def works_of(batches: Iterable[list[list[Example]]]) -> list[list[tuple[Work, list[Example]]]]:
            return [[(Work.of(part, config.batching), part) for part in microbatches] for microbatches in batches]

        def seconds_of(batches: list[list[tuple[Work, list[Example]]]], with_backward: bool) -> float:
            slowest = [  # which the other processes wait for
                max((work for work, _ in batch[start : start + num_ranks]), key=lambda work: work.tokens)
                for batch in batches
                for start in range(0, len(batch), num_ranks)
            ]
            return sum(flops(work, with_backward) for work in slowest) / (rate or math.inf)

        rate = peak_rate(config, hardware, dtype)
        if rate is not None:  # of the processes that share matrix products
            rate *= SHARE_OF_PEAK[hardware.kind] * (trainer.num_ranks // num_ranks)
        training, evaluation = works_of(trainer.train_batches()), works_of(trainer.eval_batches())
        num_examples = trainer.num_train_examples
        num_evaluations = config.do_first_eval + math.ceil(num_examples / config.eval_every)
        seconds = {
            "training": seconds_of(training, True),
            "evaluations": num_evaluations * seconds_of(evaluation, False),
        }
        if trainer.loss.needs_reference and not config.loss.get("reference_free"):
            is_live = config.reference == "live"  # else each example is run once
            share = 1.0 if is_live else min(1.0, len(trainer.train_examples) / num_examples)
            seconds["reference"] = share * seconds_of(training, False)
            seconds["reference"] += (num_evaluations if is_live else 1) * seconds_of(evaluation, False)
        works = [each for batch in training for each in batch]
        num_trained, num_parameters = num_weights(trainer.policy)
        work, largest = max(works, key=lambda each: each[0].tokens)
        num_parts = max(len(batch) // num_ranks for batch in training)
        return Plan(
            config=config,
            base=base.__name__,
            hardware=hardware,
            num_processes=num_processes,
            num_trained=num_trained,
            num_parameters=num_parameters,
            memory=trainer.measured(largest, num_parts),
            num_steps=trainer.num_updates,
            num_tokens=sum(each.tokens for each, _ in works),
            num_parts=num_parts,
            budget=trainer.token_budget,
            tokens=work.tokens,
            checkpointed=(trainer.num_checkpointed, len(find_blocks(trainer.policy, config.model.block_name))),
            seconds=None if rate is None else seconds,
        )
