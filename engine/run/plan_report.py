"""A plan as text."""

from engine.run.plan import GPU_MEMORY_FRACTION, PROCESS_BYTES, Plan
from engine.run.workload import share_of_peak
from engine.settings.schema import LoraSettings, QLoraSettings


def format_plan(plan: Plan) -> str:
    """The text of plan=true."""
    return "\n".join(
        [
            _title(plan),
            *_idle(plan),
            "",
            f"memory of a {_unit(plan)}, the fullest one, in GB",
            *(f"  {name:18}{size / 1e9:9.3f}  {remark}".rstrip() for name, size, remark in _memory_rows(plan)),
            _verdict(plan),
            "",
            *_iteration(plan),
            _steps(plan),
            f"time     {_time(plan)}",
            "",
            *_assumptions(plan),
        ]
    )


def _unit(plan: Plan) -> str:
    return "GPU" if plan.hardware.kind == "gpu" else "process"


def _is_offloaded(plan: Plan) -> bool:
    return plan.settings.fsdp.cpu_offload and plan.hardware.kind == "gpu"


def _is_sharded(plan: Plan) -> bool:
    return plan.trainer_name != "BasicTrainer"


def _title(plan: Plan) -> str:
    units = f"{plan.num_processes} {_unit(plan)}{'s' * (plan.num_processes > 1)}"
    return (
        f"plan of {plan.trainer_name} on {units} ({plan.hardware.name}):"
        f" {plan.num_parameters:,} parameters, {plan.num_trained / plan.num_parameters:.2%} are trained"
    )


def _idle(plan: Plan) -> list[str]:
    """Warnings about GPUs, or processes, without work."""
    lines = []
    batch_size, num_idle = plan.settings.batch_size, (plan.num_gpus or 0) - plan.num_processes
    if num_idle > 0 and plan.trainer_name == "BasicTrainer":
        lines.append(f"warning: BasicTrainer computes on 1 of {plan.num_gpus} GPUs at a time: FSDPTrainer uses all")
    elif num_idle > 0:
        lines.append(f"warning: {num_idle} of {plan.num_gpus} GPUs are idle: leave num_processes out to use all")
    if plan.num_data_ranks > batch_size:
        share = plan.num_processes // plan.num_data_ranks
        idle = f"{(plan.num_data_ranks - batch_size) * share} of {plan.num_processes} {_unit(plan)}s"
        fix = f"a batch_size of at least {plan.num_data_ranks} or fewer processes"
        lines.append(f"warning: {idle} get no example of a step (batch_size={batch_size}) and are idle: {fix}")
    return lines


def _memory_rows(plan: Plan) -> list[tuple[str, int, str]]:
    """Name, bytes and remark of each part."""
    settings, memory = plan.settings, plan.memory
    host = ", in CPU memory" if _is_offloaded(plan) else ""
    recomputing = f", {plan.num_recomputing} of {plan.num_layers} layers recompute theirs"
    if _is_sharded(plan):
        copies = ("gathered weights", memory.gathered, "at most at once")
    else:
        copies = ("copies of weights", memory.gathered, f"in {settings.mixed_precision}" if memory.gathered else "")
    return [
        ("parameters", memory.parameters, f"{_stored_dtype(plan)}{host}"),
        ("gradients", memory.gradients, host.removeprefix(", ")),
        ("optimizer state", memory.optimizer, f"{settings.optimizer}{host}"),
        ("reference", memory.reference, "stays loaded" if memory.reference else "not in memory while training"),
        ("activations", memory.activations, f"{plan.max_tokens:,} tokens{recomputing if plan.num_recomputing else ''}"),
        ("logits", memory.logits, "of some targets at a time" if settings.batching == "packed" else "of all tokens"),
        copies,
        (
            "peak of a step",
            memory.on_device(_is_offloaded(plan)),
            "with temporaries of operations; the parts above are not all held at once",
        ),
        *_sampling_rows(plan),
    ]


def _sampling_rows(plan: Plan) -> list[tuple[str, int, str]]:
    sampling, memory = plan.sampling, plan.memory
    if sampling is None:
        return []
    offloaded = memory.peak - memory.on_device(_is_offloaded(plan))
    rows = f"{sampling.num_rows} responses at a time, of at most {sampling.num_tokens:,} tokens with their prompt"
    return [
        ("keys and values", sampling.cache, rows),
        ("peak of sampling", sampling.peak - offloaded, "with a copy of the keys and values"),
    ]


def _stored_dtype(plan: Plan) -> str:
    settings, peft = plan.settings, plan.settings.peft
    if not isinstance(peft, LoraSettings):
        return settings.model.policy_dtype
    run_dtype = settings.mixed_precision or settings.model.policy_dtype
    return f"{peft.quant_type if isinstance(peft, QLoraSettings) else run_dtype}, adapters in float32"


def _verdict(plan: Plan) -> str:
    if plan.hardware.kind == "gpu":
        reserve = f"{1 - GPU_MEMORY_FRACTION:.0%} left for CUDA and fragmentation"
    else:
        reserve = f"{PROCESS_BYTES / 1e9} GB for each process's program"
    fix = "; activation_checkpointing=true, a smaller token_budget, mixed_precision=bfloat16 or more processes"
    return (
        f"{'fits' if plan.fits else 'does not fit'}: {plan.needed / 1e9:,.1f} GB of"
        f" {plan.hardware.memory / 1e9:,.0f} GB, with {reserve}{'' if plan.fits else fix}"
    )


def _iteration(plan: Plan) -> list[str]:
    """A line about an iteration of online training."""
    settings, rollout = plan.settings, plan.settings.rollout
    if plan.sampling is None:
        return []
    num_prompts = rollout.prompts or settings.batch_size
    num_responses, passes = num_prompts * rollout.num_responses, rollout.epochs
    return [
        f"sampled  {num_responses:,} responses to {num_prompts:,} prompts at a time, of at most"
        f" {settings.max_new_tokens:,} tokens each, learned {'once' if passes == 1 else f'{passes} times'}"
    ]


def _steps(plan: Plan) -> str:
    unit, most = ("examples", "") if plan.sampling is None else ("prompts", "at most ")
    return (
        f"steps    {plan.num_steps:,} of {plan.settings.batch_size} {unit}, {most}{plan.num_tokens:,} tokens in all;"
        f" microbatches of a {_unit(plan)} and step: at most {plan.max_microbatches}, of at most"
        f" {plan.max_tokens:,} tokens (token_budget {plan.token_budget:,})"
    )


def _time(plan: Plan) -> str:
    if plan.seconds is None:
        return "unknown: the peak of this hardware in this dtype is unknown"
    parts = [f"{name} {_format_seconds(value)}" for name, value in plan.seconds.items() if value]
    return f"{_format_seconds(sum(plan.seconds.values()))}: {', '.join(parts)}"


def _format_seconds(seconds: float) -> str:
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:,.1f} {unit}"
    return f"{seconds:,.1f} s"


def _assumptions(plan: Plan) -> list[str]:
    on_gpus = plan.hardware.kind == "gpu"
    peak = "the data sheet" if on_gpus else "the peak measured just now"
    more_gpus = ", GPUs beyond the first for a model split by layers" if on_gpus and not _is_sharded(plan) else ""
    share = share_of_peak(plan.settings, plan.hardware)
    source = f"measured: {share.source}" if share.source else "an assumed share"
    return [
        f"assumed: matrix products at {share.value:.0%} of {peak} ({source}); communication takes no time"
        f" ({plan.memory.communicated / 1e9:,.2f} GB through a {_unit(plan)} for its largest microbatch);",
        "  nothing is compiled; cache_dir lacks the reference; attention and head without a GPU kernel take the memory"
        " they take on a CPU",
        *(["  every response is as long as it can be, and no group is sampled again"] if plan.sampling else []),
        f"left out of time: loading, samples{' and their rewards, often most of it' if plan.sampling else ''}, KL,"
        " checkpoints; of memory: fragmentation of the allocator" + more_gpus,
    ]
