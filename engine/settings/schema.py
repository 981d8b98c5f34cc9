"""Settings: every key of config/, with its type and range."""

import copy
from collections.abc import Set
from typing import TYPE_CHECKING, Any, Literal, Self, TypedDict

from omegaconf import DictConfig, OmegaConf
from pydantic import BaseModel, Field, PrivateAttr

from engine.settings.annotations import STRICT
from engine.settings.choices import (
    BestMetric,
    BitsandbytesOptimizer,
    RowForm,
    SamplingEngineName,
    TorchOptimizer,
    Trainer,
)
from engine.settings.hardware import HardwareName
from engine.settings.value_types import (
    Architecture,
    AutoOrPath,
    ChatTemplate,
    CheckpointedLayers,
    Count,
    CountOrZero,
    Datasets,
    Directory,
    Fraction,
    Keys,
    LowDtype,
    ModelOrPath,
    ModuleNames,
    NonNegative,
    Paths,
    Patterns,
    Positive,
    PossiblePath,
    Probability,
    ProductDtype,
    RewardNames,
    RunName,
    Seed,
    TargetModules,
    Text,
    TokenizerOrPath,
    WeightDtype,
    Weights,
)

if TYPE_CHECKING:
    from losses import Need


class Group(BaseModel):
    """Keys with a common prefix. Defaults and explanations are in config/."""

    model_config = STRICT


class ModelSettings(Group):
    name_or_path: ModelOrPath
    tokenizer_name_or_path: TokenizerOrPath | None
    archive: PossiblePath | None
    block_name: Text | None
    policy_dtype: WeightDtype
    fsdp_policy_mp: LowDtype | None
    reference_dtype: Literal["float32", "bfloat16", "float16", "float64"] | None
    architecture: Architecture | None
    trust_remote_code: bool


class LossSettings(Group):
    """A loss and its keyword arguments.

    Args:
        name: a key of LOSSES.
        average_log_prob, sft_weight: false and 0 for losses without these keys.
        head_init: the standard deviation of a new score head; for losses of scores.
        keywords: the function's keyword arguments, checked by its signature.
    """

    name: str
    average_log_prob: bool = False
    sft_weight: NonNegative = 0.0
    head_init: Literal["width", "depth", "small"] = "width"
    keywords: dict[str, Any]

    @property
    def needs(self) -> "Set[Need]":
        """Those of the loss; no reference with reference_free, or for rollouts with beta=0; no entropy of weight 0."""
        from losses import LOSSES  # imports torch, which takes seconds

        dropped = set()
        if self.keywords.get("entropy_bonus") == 0:
            dropped.add("entropy")
        has_no_kl = self.is_online and self.keywords.get("beta") == 0
        options = self.keywords.get("pair_options") or {}
        is_free = self.keywords.get("reference_free") or options.get("reference_free") or has_no_kl
        if pair_loss := self.keywords.get("pair_loss"):
            is_free = is_free or "reference" not in LOSSES[pair_loss].needs
        is_free = is_free and not LOSSES[self.name].samples_reference
        if is_free:
            dropped.add("reference")
        return LOSSES[self.name].needs - dropped

    @property
    def is_online(self) -> bool:
        """Whether it learns from responses sampled in training."""
        from losses import LOSSES  # imports torch, which takes seconds

        return LOSSES[self.name].batch == "rollout"

    @property
    def learns_windows(self) -> bool:
        """Whether it learns windows of text, not responses."""
        from losses import LOSSES  # imports torch, which takes seconds

        return LOSSES[self.name].batch == "tokens"

    @property
    def cuts_examples(self) -> bool:
        """Whether a microbatch may have some of the responses of an example: the loss does not compare them."""
        from losses import LOSSES  # imports torch, which takes seconds

        return self.is_online and not LOSSES[self.name].learns_pairs

    @property
    def has_critic(self) -> bool:
        """Whether it learns a critic beside the policy."""
        from losses import LOSSES  # imports torch, which takes seconds

        return LOSSES[self.name].value_loss is not None

    @property
    def needs_order(self) -> bool:
        """Whether the pairs of a prompt must be those of one order."""
        return self.keywords.get("ranking") == "plackett_luce"


class TokenizerSettings(Group):
    train: Count | None


class NoPeftSettings(Group):
    name: Literal["none"]


class LoraSettings(Group):
    """The keys of both kinds of adapters."""

    name: Literal["lora", "qlora"]
    rank: Count
    alpha: Positive | None
    scaling: Positive | None
    dropout: Fraction
    bias: Literal["none", "all", "lora_only"]
    target_modules: TargetModules
    full_modules: ModuleNames
    rslora: bool
    dora: bool


class PlainLoraSettings(LoraSettings):
    name: Literal["lora"]


class QLoraSettings(LoraSettings):
    name: Literal["qlora"]
    quant_type: Literal["nf4", "fp4", "int8"]
    double_quant: bool
    compute_dtype: ProductDtype | None
    storage_dtype: Literal["uint8", "bfloat16", "float16", "float32"]


class TensorParallelSettings(Group):
    backend: Literal["native", "package"]


class FSDPSettings(Group):
    replicas: Count
    cpu_offload: bool


class FreezeSettings(Group):
    first_n_layers: CountOrZero
    patterns: Patterns


class ReferenceRefreshSettings(Group):
    every: Count | None
    mix: Probability


class RolloutSettings(Group):
    num_responses: Count
    prompts: Count | None
    epochs: Count
    max_new_tokens: Count | None
    temperature: Positive
    top_p: Probability
    max_rows: Count
    engine: SamplingEngineName
    vllm_memory: Probability
    truncated: Literal["keep", "mask"]
    missing_eos_penalty: NonNegative | None
    overlong_buffer: Count | None
    overlong_penalty: Positive
    max_resamples: CountOrZero | None
    offload: bool


class CriticSettings(Group):
    archive: PossiblePath | None
    lr: NonNegative
    max_grad_norm: Positive


class PtxSettings(Group):
    datasets: Datasets | None
    weight: Positive


class WinRateSettings(Group):
    judge: Text | None
    prompts: Count | None
    endpoint: dict[str, Any] | None


class SweepSettings(Group):
    jobs: Count | None
    gpus_per_job: Count | None
    dir: PossiblePath | None


class WandbSettings(Group):
    enabled: bool
    entity: Text | None
    project: Text


class MLflowSettings(Group):
    enabled: bool
    tracking_uri: Text | None
    experiment: Text


class TrackioSettings(Group):
    enabled: bool
    project: Text


class WarningSettings(Group):
    """Limits of run_warnings.CHECKS, by name."""

    chosen_falls: Count | None
    early_accuracy: Probability | None
    flat_loss: Positive | None
    length_ratio: Positive | None
    unfinished_rise: Probability | None
    clipped_share: Fraction | None
    kl: Positive | None
    bad_rewards: NonNegative | None
    standard_errors: NonNegative


class Names(TypedDict):
    """Settings derived if unset."""

    exp_name: str
    cache_dir: str
    local_run_dir: str


class Settings(Group):
    """All settings of a run, immutable."""

    seed: Seed
    exp_name: RunName | None
    local_dirs: Paths
    local_run_dir: PossiblePath | None
    cache_dir: PossiblePath | None
    resume: AutoOrPath | None
    resume_allow: Keys
    debug: bool

    datasets: Datasets
    weights: Weights | None
    data_dir: Directory | None
    format: RowForm | None
    text_field: Text
    document_mask: bool
    on_bad_row: Literal["error", "drop"]
    chat_template: ChatTemplate | None
    sft_turns: Literal["all", "last"]
    test_fraction: Fraction
    max_length: Count
    max_prompt_length: Count
    n_epochs: Count | None
    n_examples: Count | None

    batch_size: Count
    gradient_accumulation_steps: Count
    token_budget: Count | None
    length_grouping: bool
    batching: Literal["packed", "padded"]
    trainer: Trainer
    num_processes: Count | None
    plan: bool
    plan_hardware: HardwareName | None
    tensor_parallel_size: Count | None
    tensor_parallel: TensorParallelSettings
    fsdp: FSDPSettings
    deterministic: bool
    collective_timeout: Count
    freeze: FreezeSettings
    optimizer: TorchOptimizer | BitsandbytesOptimizer
    lr: NonNegative
    warmup_steps: CountOrZero
    lr_schedule: Literal["constant", "linear", "cosine"]
    min_lr: NonNegative
    weight_decay: NonNegative | None
    max_grad_norm: Positive
    on_nonfinite: Literal["abort", "skip", "rollback"]
    max_nonfinite: CountOrZero
    activation_checkpointing: CheckpointedLayers
    matmul_precision: Literal["highest", "high", "medium"]
    compile: bool
    rollout: RolloutSettings
    critic: CriticSettings
    ptx: PtxSettings
    rewards: RewardNames | None
    reward_weights: list[float] | None
    reward_clip: Positive | None
    reward_options: dict[str, Any] | None
    reward_timeout: Positive | None
    on_bad_reward: Literal["raise", "drop"]
    reference: Literal["auto", "cached", "live"]
    reference_refresh: ReferenceRefreshSettings

    do_first_eval: bool
    eval_every: Count
    n_eval_examples: Count
    eval_batch_size: Count
    sample_during_eval: bool
    n_eval_model_samples: CountOrZero
    win_rate: WinRateSettings
    save_every: Count | None
    keep_checkpoints: Count | None
    keep_best: BestMetric | None
    warnings: WarningSettings
    minimum_log_interval_secs: NonNegative
    wandb: WandbSettings
    mlflow: MLflowSettings
    trackio: TrackioSettings
    tensorboard: bool
    report: Literal["html", "png"] | None
    sweep: SweepSettings

    model: ModelSettings
    tokenizer: TokenizerSettings
    mixed_precision: LowDtype | None
    loss: LossSettings
    peft: NoPeftSettings | PlainLoraSettings | QLoraSettings = Field(discriminator="name")

    _source: DictConfig = PrivateAttr()
    _command: str = PrivateAttr(default="")

    @property
    def max_new_tokens(self) -> int:
        """The longest sampled response, in tokens."""
        return self.rollout.max_new_tokens or self.max_length - self.max_prompt_length

    @property
    def source(self) -> DictConfig:
        """The composed config, read-only: interpolations unresolved, so that secrets stay names."""
        return self._source

    @property
    def command(self) -> str:
        """The command line of the run; it may hold secrets. Empty if unknown."""
        return self._command

    @property
    def has_live_reference(self) -> bool:
        """Whether the frozen model stays loaded. What auto means depends on the rest."""
        if "reference" not in self.loss.needs:
            return False
        is_needed = "token kl" in self.loss.needs or self.reference_refresh.every is not None or self.loss.is_online
        return self.reference == "live" or (self.reference == "auto" and is_needed)

    @property
    def measures_kl(self) -> bool:
        """Whether evaluations compare sampled responses with the reference."""
        return "reference" in self.loss.needs and self.sample_during_eval and self.n_eval_model_samples > 0

    def measures_win_rates(self, has_ground_truth: bool) -> bool:
        """Whether evaluations judge samples of the policy against samples of the reference."""
        judge = self.win_rate.judge
        return self.measures_kl and judge is not None and (judge != "auto" or has_ground_truth)

    def with_source(self, source: DictConfig) -> Self:
        """A copy with another source."""
        OmegaConf.set_readonly(source, True)
        settings = self.model_copy()
        settings._source = source
        return settings

    def with_command(self, command: str) -> Self:
        """A copy with the command line of the run."""
        settings = self.model_copy()
        settings._command = command
        return settings

    def named(self, *, exp_name: str, cache_dir: str, local_run_dir: str) -> Self:
        """A copy with these names, in its source too."""
        names = {"exp_name": exp_name, "cache_dir": cache_dir, "local_run_dir": local_run_dir}
        source = copy.deepcopy(self._source)
        OmegaConf.set_readonly(source, False)
        for key, name in names.items():
            source[key] = name
        return self.model_copy(update=names).with_source(source)
