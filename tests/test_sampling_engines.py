"""Engines of sampling: continuous batching on a CPU, vLLM by a stand-in, and the scale of losses for both."""

import copy
import re
import sys
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from peft import LoraConfig
from transformers import AutoConfig, AutoModelForCausalLM

from engine.models import sampling_engines
from engine.models.adapters import Adapter, inject
from engine.models.group_sampling import Sampling
from engine.models.sampling_engines import ContinuousBatching, Loop, Sampled, token_limits
from engine.models.vllm_engine import Vllm, merged_weights
from engine.run import sampler
from online_losses import sampler_ratios
from tests.quick import slow_except
from tests.runs import ONLINE, QUICK, SMALL
from utils import UserError

ONLINE_DEFAULTS = (*SMALL, *QUICK, *ONLINE, "sample_during_eval=false", "do_first_eval=false")
PROMPTS = [np.array(each, dtype=np.int32) for each in ([5, 6, 7], [*range(3, 40)], [9] * 17)]
SEEDS = [[0, 0, number] for number in range(len(PROMPTS))]
SAMPLING = Sampling(3, 8, 44, eos_token_id=2, pad_token_id=0, temperature=0.7)
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1},
    "gpt_neox": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2},
    "gpt2": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2},
}


def make_model(kind="llama"):
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": 64, "max_position_embeddings": 44, "tie_word_embeddings": False}
    if kind != "gpt2":
        sizes["intermediate_size"] = 48
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes, **ARCHITECTURES[kind])).eval()
    model.get_output_embeddings().weight.data *= 20  # far from uniform
    return model


@torch.no_grad()
def logps_of(model, prompt, response, temperature):
    logits = model(torch.tensor([[*prompt, *response]])).logits[0, len(prompt) - 1 : -1] / temperature
    return logits.log_softmax(-1)[range(len(response)), response.tolist()].numpy()


# ---- Continuous batching ----


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_continuous_batching_samples_the_model(kind):
    model = make_model(kind)
    state, attention = torch.get_rng_state(), model.config._attn_implementation
    tokens, logps = ContinuousBatching().sample(model, PROMPTS, SEEDS, SAMPLING)
    assert logps is not None
    assert torch.equal(torch.get_rng_state(), state) and model.config._attn_implementation == attention
    assert [len(group) for group in tokens] == [3, 3, 3]
    limits = token_limits(PROMPTS, SAMPLING)
    assert limits == [8, 7, 8]
    for prompt, group, of_group, limit in zip(PROMPTS, tokens, logps, limits, strict=True):
        assert len({each.tobytes() for each in group}) > 1
        for response, of_response in zip(group, of_group, strict=True):
            assert response.dtype == np.int32
            assert len(response) == limit or response[-1] == 2
            assert 2 not in response[:-1]
            np.testing.assert_allclose(of_response, logps_of(model, prompt, response, 0.7), atol=1e-5)


def test_continuous_batching_has_the_frequencies_of_the_model():
    """400 first tokens against their probabilities, by chi squared."""
    model, sampling = make_model(), SAMPLING._replace(num_samples=400, max_new_tokens=1, temperature=1.0)
    tokens, _ = ContinuousBatching().sample(model, PROMPTS[:1], SEEDS[:1], sampling)
    with torch.no_grad():
        expected = 400 * model(torch.tensor([PROMPTS[0].tolist()])).logits[0, -1].double().softmax(-1).numpy()
    counts = np.bincount([each[0] for each in tokens[0]], minlength=64)
    is_common = expected >= 5
    pairs = [
        (counts[is_common], expected[is_common]),
        ([counts[~is_common].sum()], [expected[~is_common].sum()]),
    ]
    distance = sum(((np.array(found) - wanted) ** 2 / wanted).sum() for found, wanted in pairs)
    num_free = int(is_common.sum())
    assert num_free > 3 and distance < num_free + 5 * np.sqrt(2 * num_free)


def test_continuous_batching_refuses_models_without_paged_attention(monkeypatch):
    model = make_model()
    monkeypatch.setattr(type(model), "_supports_attention_backend", False)
    with pytest.raises(UserError, match="cannot run LlamaForCausalLM on cpu"):
        ContinuousBatching().sample(model, PROMPTS, SEEDS, SAMPLING)


def test_failures_of_continuous_batching_are_errors(monkeypatch):
    model = make_model()
    monkeypatch.setattr(type(model), "generate_batch", lambda *args, **kwargs: {})
    with pytest.raises(UserError, match=r"3 responses are missing.*use rollout\.engine=loop"):
        ContinuousBatching().sample(model, PROMPTS, SEEDS, SAMPLING)


@pytest.mark.parametrize(("precision", "mismatch"), slow_except([("null", 1e-6), ("bfloat16", 1e-2)], "bfloat16"))
def test_run_of_continuous_batching(precision, mismatch, online):
    """The ratio of the first pass is 1 to the bit, whatever sampled."""
    run = online("rollout.engine=continuous", "peft=lora", "n_examples=8", f"mixed_precision={precision}")
    assert run.status == 0, run.err
    assert all(row["policy/ratio_max"] == 1 and row["policy/approxkl"] == 0 for row in run.steps)
    assert all(0 <= row["rollout/mismatch_k3"] < mismatch for row in run.steps)


# ---- vLLM, by a stand-in with the same interface ----


class StandIn:
    """vllm.LLM as far as the engine uses it, by the loop of this program. It samples hotter than it is told."""

    started: ClassVar[list["StandIn"]] = []
    heat = 1.25

    def __init__(self, model, **arguments):
        assert arguments["load_format"] == "dummy" and arguments["skip_tokenizer_init"] is True
        assert arguments["logprobs_mode"] == "processed_logprobs"
        self.model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model)).eval()
        self.arguments, self.num_resets = arguments, 0
        runner = SimpleNamespace(model=SimpleNamespace(load_weights=self.load_weights))
        driver = SimpleNamespace(model_runner=runner)
        self.llm_engine = SimpleNamespace(model_executor=SimpleNamespace(driver_worker=driver))
        self.started.append(self)

    def load_weights(self, pairs):
        parameters = dict(self.model.named_parameters())
        for name, weight in pairs:
            parameters[name].data.copy_(weight)

    def reset_prefix_cache(self):
        self.num_resets += 1

    def generate(self, prompts, *, sampling_params, use_tqdm):
        found = []
        for prompt, settings in zip(prompts, sampling_params, strict=True):
            ids, heat = np.array(prompt["prompt_token_ids"], dtype=np.int32), settings.temperature * self.heat
            (eos,) = settings.stop_token_ids
            sampling = Sampling(settings.n, settings.max_tokens, 64, eos, 0, temperature=heat, top_p=settings.top_p)
            group = Loop().sample(self.model, [ids], [[settings.seed]], sampling).tokens[0]
            outputs = []
            for tokens in group:
                logps = logps_of(self.model, ids, tokens, heat).tolist()
                of_tokens = [
                    {token: SimpleNamespace(logprob=logp)} for token, logp in zip(tokens.tolist(), logps, strict=True)
                ]
                outputs.append(SimpleNamespace(token_ids=tokens.tolist(), logprobs=of_tokens))
            found.append(SimpleNamespace(outputs=outputs))
        return found


class Parameters(SimpleNamespace):
    """vllm.SamplingParams."""


@pytest.fixture
def vllm(monkeypatch):
    module = ModuleType("vllm")
    module.LLM, module.SamplingParams = StandIn, Parameters  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm", module)
    monkeypatch.setattr(sampling_engines, "find_spec", lambda name: object())
    monkeypatch.setattr(StandIn, "started", [])
    return StandIn


def test_vllm_has_the_weights_of_the_policy(vllm):
    model, engine = make_model(), Vllm(dtype="float32", max_length=44, memory_share=0.3)
    tokens, logps = engine.sample(model, PROMPTS, SEEDS, SAMPLING)
    assert logps is not None
    model.get_output_embeddings().weight.data *= -1
    again, _ = engine.sample(model, PROMPTS, SEEDS, SAMPLING)
    assert again[0][0].tolist() != tokens[0][0].tolist()
    (started,) = vllm.started  # once
    assert started.num_resets == 2
    assert started.arguments["gpu_memory_utilization"] == 0.3 and started.arguments["max_model_len"] == 44
    for name, weight in started.model.named_parameters():
        torch.testing.assert_close(weight, model.get_parameter(name), rtol=0, atol=0)
    assert [len(group) for group in tokens] == [3, 3, 3] == [len(group) for group in logps]
    assert max(len(response) for response in tokens[1]) <= 7


@pytest.mark.parametrize("kind", ARCHITECTURES)  # GPT-2's weights are transposed
def test_merged_weights_give_the_logits_of_adapters(kind):
    model = make_model(kind)
    plain = copy.deepcopy(model)
    inject(model, Adapter(LoraConfig(r=4, target_modules="all-linear"), [], None, True, None, ""), with_copy=False)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    found = dict(merged_weights(model))
    assert found.keys() == {name for name, _ in plain.named_parameters()}
    plain.load_state_dict(found, strict=False)
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        wanted = model(ids).logits
        torch.testing.assert_close(plain(ids).logits, wanted, atol=1e-3, rtol=1e-4)
        assert not torch.allclose(make_model(kind)(ids).logits, wanted, atol=1)


@pytest.mark.parametrize("peft", ["none", "lora"])
def test_run_of_vllm(peft, online, vllm):
    run = online("rollout.engine=vllm", "rollout.epochs=2", f"peft={peft}")
    assert run.status == 0, run.err
    first = [row for row in run.steps if "rollout/mismatch_k3" in row]
    assert first and all(row["policy/ratio_max"] == 1 and row["policy/approxkl"] == 0 for row in first)
    assert all(row["rollout/mismatch_k3"] > 1e-4 for row in first)  # the stand-in is hotter
    (started,) = vllm.started
    assert started.num_resets == len(first)


# ---- The scale of losses ----


def test_sampler_ratios_by_hand():
    logps, lengths = torch.tensor([-1.0, -2.0, -3.0]).double(), torch.tensor([1, 2])
    by_sampler = logps - torch.tensor([0.5, 3.0, 0.25]).double().log()
    assert sampler_ratios(logps, by_sampler, lengths, "tokens").tolist() == pytest.approx([0.5, 2, 0.25])
    assert sampler_ratios(logps, by_sampler, lengths, "responses").tolist() == pytest.approx([0.5, 0.75, 0.75])
    assert sampler_ratios(logps, logps, lengths, "responses").tolist() == [1, 1, 1]


class Surprised(Loop):
    """The loop, as if each token had been very unlikely: policy / sampler is then at its limit."""

    def sample(self, *arguments):
        tokens, _ = super().sample(*arguments)
        return Sampled(tokens, [[np.full(len(each), -100.0) for each in group] for group in tokens])


@pytest.mark.parametrize(
    ("loss", "scale"),
    slow_except(
        [("grpo", 2), ("rloo", 2), ("reinforce_pp", 2), ("best_of_n", 1), ("online_dpo", 1)], "grpo", "best_of_n"
    ),
)
def test_ratios_scale_the_loss(loss, scale, online, monkeypatch):
    options = (f"loss={loss}", "n_examples=4", "max_grad_norm=1e9", *(["loss.beta=0"] if scale == 2 else []))
    plain = online(*options)
    monkeypatch.setattr(sampler, "build_engine", lambda settings: Surprised())
    scaled = online(*options)
    assert plain.status == 0 == scaled.status, plain.err + scaled.err
    assert scaled.steps[0]["grad_norm"] == pytest.approx(scale * plain.steps[0]["grad_norm"], rel=1e-4)
    assert plain.steps[0]["grad_norm"] > 0
    assert "rollout/mismatch_k3" in scaled.steps[0] and "rollout/mismatch_k3" not in plain.steps[0]


# ---- What is refused ----


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["rollout.engine=vllm"], "rollout.engine=vllm needs the package vllm; fix: pip install vllm"),
        (["rollout.engine=vllm", "peft=qlora"], "vllm takes the weights of peft=none or lora, not qlora"),
        (["rollout.engine=vllm", "peft=lora", "peft.dora=true"], "vllm takes the weights .* not DoRA"),
        (["rollout.engine=continuous", "trainer=FSDPTrainer", "num_processes=1"], "continuous samples whole models"),
        (["rollout.engine=continuous", "deterministic=true"], "continuous samples other responses in each run"),
        (["rollout.engine=fast"], "rollout.engine"),
    ],
)
def test_refused(overrides, message, online):
    run = online(*overrides)
    assert run.status == 2
    assert re.search(message, run.err), run.err
