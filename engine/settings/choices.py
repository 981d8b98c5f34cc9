"""Names a setting can choose from: trainers, optimizers, metrics, row forms, chat templates."""

from typing import Literal, get_args

Trainer = Literal["BasicTrainer", "FSDPTrainer", "TensorParallelTrainer"]

TorchOptimizer = Literal[
    "RMSprop", "Adam", "AdamW", "SGD", "Adagrad", "Adadelta", "Adamax", "NAdam", "RAdam", "Adafactor"
]  # fmt: skip
BitsandbytesOptimizer = Literal[
    "Adam8bit", "AdamW8bit", "Lion8bit", "RMSprop8bit", "Adagrad8bit", "AdEMAMix8bit", "LAMB8bit", "PagedAdam8bit",
    "PagedAdamW8bit", "PagedLion8bit", "PagedAdEMAMix8bit", "PagedAdam32bit", "PagedAdamW32bit", "PagedLion32bit",
]  # fmt: skip
BITSANDBYTES_OPTIMIZERS: tuple[str, ...] = get_args(BitsandbytesOptimizer)
TORCH_OPTIMIZERS: tuple[str, ...] = get_args(TorchOptimizer)

# What samples the responses of online training; see engine/models/sampling_engines.py.
SamplingEngineName = Literal["auto", "loop", "continuous", "vllm"]

# Metrics for keep_best, by direction.
LowerIsBetter = Literal["loss/eval", "kl_eval"]
HigherIsBetter = Literal[
    "rewards_eval/accuracies", "rewards_eval/margins", "rewards_eval/chosen", "logps_eval/chosen",
    "ground_truth/policy", "ground_truth/win_rate", "win_rate_eval", "rewards_eval/sampled", "rewards_eval/greedy",
]  # fmt: skip
BestMetric = LowerIsBetter | HigherIsBetter


def is_better(metric: BestMetric, value: float, best: float) -> bool:
    """Whether a value of a metric beats the best so far."""
    return value > best if metric in get_args(HigherIsBetter) else value < best


# Forms of rows in files; their readers are in engine/data/forms.py.
RowForm = Literal[
    "strings", "transcripts", "messages", "sharegpt", "ranked", "unpaired", "completion", "alpaca", "dolly", "prompts"
]

# Chat templates of this program; their text is in engine/data/chat_templates.py.
TemplateName = Literal["hh", "llama2", "chatml"]
