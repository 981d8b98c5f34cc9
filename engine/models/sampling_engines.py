"""Engines of sampling: the loop of group_sampling.py, transformers' continuous batching, and vLLM."""

import math
from collections.abc import Sequence
from importlib.util import find_spec
from inspect import signature
from typing import NamedTuple, Protocol

import numpy as np
import torch
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation.configuration_utils import ContinuousBatchingConfig

from engine.models.generation import ready_to_sample
from engine.models.group_sampling import Sampling, sample_groups, seeded_uniforms
from engine.settings.schema import Settings
from utils import UserError

# Forks of a prompt share full pages alone: small pages, little to copy.
PAGE_SIZE = 16
PAGE_KEY = "page_size" if "page_size" in signature(ContinuousBatchingConfig).parameters else "block_size"  # 5.17
MAX_BATCH_TOKENS = 512  # of a pass of continuous batching; longer prompts are split
USE_LOOP = "use rollout.engine=loop"


class Sampled(NamedTuple):
    """Responses to each prompt.

    Args:
        tokens: int32 [response tokens] each, up to the end-of-text token if there is one.
        logps: log-probs of these as the engine sampled them, fp64 [response tokens] each; None if the engine runs the
            policy itself.
    """

    tokens: list[list[np.ndarray]]
    logps: list[list[np.ndarray]] | None = None


class SamplingEngine(Protocol):
    """Samples responses of a model."""

    def sample(
        self,
        model: PreTrainedModel,
        prompts: Sequence[np.ndarray],
        seeds: Sequence[Sequence[int]],
        sampling: Sampling,
    ) -> Sampled:
        """Sample responses to each prompt.

        Args:
            prompts: token ids, each [prompt tokens].
            seeds: of each prompt.
        """
        ...


def check_engine(settings: Settings) -> None:
    """Check that the package of rollout.engine is installed.

    Raises:
        UserError: CONFIG if not.
    """
    if settings.rollout.engine == "vllm" and find_spec("vllm") is None:
        raise UserError("CONFIG", "rollout.engine=vllm needs the package vllm", f"pip install vllm, or {USE_LOOP}")


def build_engine(settings: Settings) -> SamplingEngine:
    """The engine of rollout.engine."""
    rollout = settings.rollout
    if rollout.engine == "continuous":
        return ContinuousBatching()
    if rollout.engine == "vllm":
        from engine.models.vllm_engine import Vllm

        dtype = settings.mixed_precision or settings.model.policy_dtype
        return Vllm(dtype=dtype, max_length=settings.max_length, memory_share=rollout.vllm_memory)
    return Loop()  # auto too: continuous batching is not measured on GPUs yet


class Loop:
    """Our own loop: each response depends on its prompt and seed alone, up to rounding."""

    def sample(
        self,
        model: PreTrainedModel,
        prompts: Sequence[np.ndarray],
        seeds: Sequence[Sequence[int]],
        sampling: Sampling,
    ) -> Sampled:
        def uniforms(prompt: int, sample: int) -> np.ndarray:
            return seeded_uniforms([*seeds[prompt], sample], sampling.max_new_tokens)

        return Sampled(sample_groups(model, prompts, uniforms, sampling))


Row = tuple[np.ndarray, np.ndarray]  # tokens of a response, and their log-probs


class ContinuousBatching:
    """Continuous batching of transformers, with a paged cache.

    A prompt is run once, and its samples fork. The order of its threads decides which random number a response gets.
    """

    def sample(
        self,
        model: PreTrainedModel,
        prompts: Sequence[np.ndarray],
        seeds: Sequence[Sequence[int]],
        sampling: Sampling,
    ) -> Sampled:
        if not prompts:
            return Sampled([], [])
        device = model.get_input_embeddings().weight.device
        if not model._supports_attention_backend or any(each.device != device for each in model.parameters()):
            problem = f"rollout.engine=continuous cannot run {type(model).__name__} on {device}: transformers needs a"
            raise UserError("CONFIG", f"{problem} model with a paged attention, on one device", USE_LOOP)
        limits = token_limits(prompts, sampling)
        rows: dict[int, list[Row]] = {}  # of each prompt
        for limit in sorted(set(limits)):  # transformers takes one for all
            places = [place for place, each in enumerate(limits) if each == limit]
            one = sampling._replace(max_new_tokens=limit)
            found = self._sample_rows(
                model, [prompts[place] for place in places], [seeds[place] for place in places], one
            )
            rows |= {
                place: found[number * sampling.num_samples :][: sampling.num_samples]
                for number, place in enumerate(places)
            }
        return in_groups([row for place in range(len(prompts)) for row in rows[place]], limits, sampling.num_samples)

    def _sample_rows(
        self,
        model: PreTrainedModel,
        prompts: Sequence[np.ndarray],
        seeds: Sequence[Sequence[int]],
        sampling: Sampling,
    ) -> list[Row]:
        """Responses of at most max_new_tokens, those of a prompt one after the other."""
        device = model.get_input_embeddings().weight.device
        pages_of_row = math.ceil((max(map(len, prompts)) + sampling.max_new_tokens) / PAGE_SIZE)
        settings = GenerationConfig(
            do_sample=True,
            temperature=sampling.temperature,
            top_k=0,
            top_p=sampling.top_p,
            num_return_sequences=sampling.num_samples,
            max_new_tokens=sampling.max_new_tokens,
            eos_token_id=sampling.eos_token_id,
            pad_token_id=sampling.pad_token_id,
        )
        paging = ContinuousBatchingConfig(
            **{PAGE_KEY: PAGE_SIZE},
            num_blocks=sampling.max_rows * (pages_of_row + 1),
            max_batch_tokens=max(sampling.max_rows, MAX_BATCH_TOKENS),
            max_requests_per_batch=sampling.max_rows,
            use_cuda_graph=False,  # they would be captured again in each iteration
            return_logprobs=True,
            seed=one_seed([number for seed in seeds for number in seed]),
        )
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), ready_to_sample(model):
            outputs = [
                *model.generate_batch(
                    [prompt.tolist() for prompt in prompts],
                    generation_config=settings,
                    continuous_batching_config=paging,
                    warmup=False,
                ).values()
            ]
        errors = [output.error for output in outputs if output.error is not None]
        num_missing = len(prompts) * sampling.num_samples - len(outputs)
        if errors or num_missing:
            reason = errors[0] if errors else f"{num_missing} responses are missing"
            raise UserError("CONFIG", f"rollout.engine=continuous: transformers' batching failed: {reason}", USE_LOOP)
        return [
            (np.array(output.generated_tokens, dtype=np.int32), np.array(output.logprobs, dtype=np.float64))
            for output in outputs
        ]


def token_limits(prompts: Sequence[np.ndarray], sampling: Sampling) -> list[int]:
    """The most tokens of a response to each prompt."""
    return [min(sampling.max_new_tokens, sampling.max_length - len(prompt)) for prompt in prompts]


def in_groups(rows: Sequence[Row], limits: Sequence[int], num_samples: int) -> Sampled:
    """Responses and their log-probs by prompt, cut to the limit of each prompt."""
    tokens, logps = (
        [
            [row[part][:limit] for row in rows[number * num_samples :][:num_samples]]
            for number, limit in enumerate(limits)
        ]
        for part in (0, 1)
    )
    return Sampled(tokens, logps)


def one_seed(numbers: Sequence[int]) -> int:
    """A seed of 31 bits from others."""
    return int(np.random.SeedSequence([*numbers]).generate_state(1)[0] >> 1)
