"""Sampling with a KV cache in left-padded batches, against the distribution of the model."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch

from engine.models.attention_switch import attention_of
from engine.models.generation import sample_responses
from engine.step.packing_check import use_packed_attention
from tests.models import VOCABULARY, random_examples, tiny_model
from tests.ranks import make_trainer


class Tokens:
    pad_token_id = 0
    eos_token_id = 1


def sample(model, prompts, seed=0, batch_size=3, max_new_tokens=6):
    return sample_responses(
        model,
        Tokens(),
        prompts,
        max_new_tokens=max_new_tokens,
        max_length=100,
        batch_size=batch_size,
        seed=seed,
    )


def test_samples_follow_the_seed_and_leave_the_generator_alone() -> None:
    model = tiny_model("llama")
    use_packed_attention(model)
    model.train()
    prompts = [example.prompt for example in random_examples([(4, 1), (9, 1), (1, 1), (6, 1)])]
    state = torch.random.get_rng_state()
    first = sample(model, prompts)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert model.training and model.config._attn_implementation == "packed"
    assert [response.tolist() for response in sample(model, prompts)] == [response.tolist() for response in first]
    assert [response.tolist() for response in sample(model, prompts, seed=1)] != [
        response.tolist() for response in first
    ]
    for response in first:
        assert 1 <= len(response) <= 6 and response.dtype == np.int32
        assert 1 not in response[:-1]  # no token after the end of text


def test_samples_are_drawn_from_the_model() -> None:
    """First tokens of many responses match the model's probabilities, with two prompt lengths a batch."""
    model = tiny_model("gpt_neox")
    prompts = [example.prompt for example in random_examples([(3, 1), (8, 1)])]
    responses = sample(model, prompts * 1500, batch_size=1000, max_new_tokens=1)
    for index, prompt in enumerate(prompts):
        with torch.no_grad():
            logits = model(torch.from_numpy(prompt.astype(np.int64))[None]).logits[0, -1]
        counts = np.bincount([response[0] for response in responses[index::2]], minlength=VOCABULARY) / 1500
        assert np.abs(counts - logits.softmax(-1).numpy()).sum() < 0.2


def test_attention_of_restores_the_attention() -> None:
    model = tiny_model("llama")
    use_packed_attention(model)
    with attention_of(model, "sdpa"):
        assert model.config._attn_implementation == "sdpa"
    assert model.config._attn_implementation == "packed"


def test_generation_settings_of_the_model_are_ignored() -> None:
    """Some published models set a repetition penalty; with it, samples would not be from the policy."""
    model = tiny_model("llama")
    prompts = [example.prompt for example in random_examples([(4, 1), (9, 1)])]
    plain = [response.tolist() for response in sample(model, prompts, max_new_tokens=20)]
    model.generation_config.repetition_penalty = 5.0
    model.generation_config.min_p = 0.5
    assert [response.tolist() for response in sample(model, prompts, max_new_tokens=20)] == plain
    assert model.generation_config.min_p == 0.5


def test_the_kl_is_the_mean_log_ratio_of_policy_to_reference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Computed from the logits of both models, one response at a time, in fp64."""
    overrides = ("reference=live", "sample_during_eval=true", "n_eval_model_samples=3", "batching=padded")
    trainer = make_trainer(("llama", "dpo", (*overrides, "model.policy_dtype=float64")), tmp_path)
    evaluator, reference = trainer.evaluator, copy.deepcopy(trainer.policy)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in trainer.policy.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    prompts = list({example.prompt.tobytes(): example.prompt for example in evaluator.examples}.values())[:3]
    responses = [example.responses[0] for example in random_examples([(1, 4), (1, 1), (1, 7)])]
    monkeypatch.setattr(evaluator, "sample", lambda model, num_examples: responses)
    _, metrics = evaluator.sample_policy(0, trainer.token_budget, is_last=False)

    @torch.no_grad()
    def log_prob(model, prompt: np.ndarray, response: np.ndarray) -> float:
        tokens = torch.from_numpy(np.concatenate([prompt, response]).astype(np.int64))
        logps = model(tokens[None]).logits[0, :-1].log_softmax(-1)
        return logps.gather(1, tokens[1:, None])[len(prompt) - 1 :].sum().item()

    pairs = list(zip(prompts, responses, strict=True))
    ratios = [log_prob(trainer.policy, *pair) - log_prob(reference, *pair) for pair in pairs]
    assert metrics["kl_eval"] == pytest.approx(sum(ratios) / 3, rel=1e-6)
    assert abs(sum(ratios)) > 0.01  # its sign is visible
