"""Sample by vLLM inside this process. Its weights become the policy's before each sampling.

It has been run against a stand-in alone, without vLLM and without a GPU.
"""

import os
from collections.abc import Iterator, Sequence
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from engine.models.adapters import TRAINED_ADAPTER, adapter_of, is_adapter_weight
from engine.models.group_sampling import Sampling
from engine.models.sampling_engines import Sampled, in_groups, one_seed, token_limits


class Vllm:
    """Samples by vLLM.

    Args:
        dtype: of its weights, such as "bfloat16".
        max_length: of prompt + response.
        memory_share: the share of the GPU's memory it takes.
    """

    def __init__(self, *, dtype: str, max_length: int, memory_share: float):
        self._dtype, self._max_length, self._memory_share = dtype, max_length, memory_share
        self._llm: Any = None

    def sample(
        self,
        model: PreTrainedModel,
        prompts: Sequence[np.ndarray],
        seeds: Sequence[Sequence[int]],
        sampling: Sampling,
    ) -> Sampled:
        if not prompts:
            return Sampled([], [])
        from vllm import SamplingParams

        if self._llm is None:
            self._llm = self._start(model, one_seed(seeds[0]))
        self._load_weights(model)
        limits = token_limits(prompts, sampling)
        settings = [
            SamplingParams(
                n=sampling.num_samples,
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                max_tokens=limit,
                seed=one_seed(seed),
                stop_token_ids=[sampling.eos_token_id],
                logprobs=0,  # of the sampled token alone
                detokenize=False,
            )
            for seed, limit in zip(seeds, limits, strict=True)
        ]
        texts = [{"prompt_token_ids": prompt.tolist()} for prompt in prompts]
        rows = []
        for output in self._llm.generate(texts, sampling_params=settings, use_tqdm=False):
            for response in output.outputs:
                tokens = np.array(response.token_ids, dtype=np.int32)
                pairs = zip(response.token_ids, response.logprobs, strict=True)
                rows.append((tokens, np.array([of_tokens[token].logprob for token, of_tokens in pairs])))
        return in_groups(rows, limits, sampling.num_samples)

    def _start(self, model: PreTrainedModel, seed: int) -> Any:
        """vLLM with the architecture of a model, and no weights yet."""
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # its model is then in this process
        from vllm import LLM

        with TemporaryDirectory(prefix="vllm-") as folder:
            model.config.save_pretrained(folder)
            return LLM(
                model=folder,
                load_format="dummy",
                skip_tokenizer_init=True,
                dtype=self._dtype,
                max_model_len=self._max_length,
                gpu_memory_utilization=self._memory_share,
                logprobs_mode="processed_logprobs",  # at the temperature of sampling
                seed=seed,
            )

    @torch.no_grad()
    def _load_weights(self, model: PreTrainedModel) -> None:
        runner = self._llm.llm_engine.model_executor.driver_worker.model_runner
        for name, weight in merged_weights(model):
            runner.model.load_weights([(name, weight)])
        self._llm.reset_prefix_cache()  # of the weights before


def merged_weights(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """Names and weights of a model, its adapters merged. One merged weight exists at a time."""
    if adapter_of(model) is None:
        yield from model.named_parameters()
        return
    from peft.tuners.lora import LoraLayer

    layers = {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    for name, weight in model.named_parameters():
        if is_adapter_weight(name):
            continue
        layer = layers.get(name.removesuffix(".base_layer.weight"))
        if layer is not None:
            delta: Tensor = layer.get_delta_weight(TRAINED_ADAPTER)
            weight = (weight.to(delta.dtype) + delta).to(weight.dtype)
        yield name.replace(".base_layer.", "."), weight
