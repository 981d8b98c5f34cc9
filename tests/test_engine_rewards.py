"""Reward models, judges, tests of code and penalties as rewards of a run."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from engine.data.examples import PromptRow
from engine.rewards.reward_model import RewardModelReward
from engine.rewards.samples import samples_of
from engine.run.sampler import overlong_penalty
from preference_datasets import chat_form
from rewards import REWARDS, BatchReward, RewardModel, Sample
from tests.configs import make_settings
from tests.runs import ONLINE, QUICK, REWARD, SMALL, vowels
from tests.test_judge import StandIn, server, status  # noqa: F401  a fixture
from tests.test_online import prompts_file, weights_of
from tests.tokenizer_files import byte_level
from utils import UserError

ONLINE_DEFAULTS = (*SMALL, *QUICK, *ONLINE, "do_first_eval=false")
FILMS = PromptRow("\n\nHuman: Is The Northern Forest good?\n\nAssistant:", {})


def scores_by_hand(path: Path, samples: Sequence[Sample]) -> list[float]:
    """Normalised scores by transformers alone, one text at a time."""
    tokenizer = AutoTokenizer.from_pretrained(path)
    model: Any = AutoModelForSequenceClassification.from_pretrained(path).eval()
    config = json.loads((path / "config.json").read_text())
    scores = []
    for sample in samples:
        eos = "" if sample.is_truncated and sample.response else tokenizer.eos_token
        ids = tokenizer(sample.prompt, add_special_tokens=False)["input_ids"]
        ids += tokenizer(f"{sample.response}{eos}", add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            hidden = model.model(torch.tensor([ids])).last_hidden_state[0, -1]
        score = (hidden @ model.score.weight[0]).item()
        scores.append((score - config["reward_mean"]) / config["reward_std"])
    return scores


@pytest.mark.slow
def test_a_reward_model_equals_a_function_that_computes_the_same(online, monkeypatch, reward_run):
    class ByHand(BatchReward):
        def __call__(self, samples: Sequence[Sample]) -> list[float]:
            seen.extend(samples)
            return scores_by_hand(reward_run / "LATEST", samples)

    seen: list[Sample] = []
    monkeypatch.setitem(REWARDS, "by_hand", ByHand)
    expected = online("rewards=[by_hand]", "rollout.missing_eos_penalty=0.5", "rollout.max_new_tokens=16")
    assert expected.status == 0, expected.err
    found = online(
        "rewards=[reward_model]",
        f"reward_options.reward_model.path={reward_run}",
        "rollout.missing_eos_penalty=0.5",
        "rollout.max_new_tokens=16",
    )
    assert found.status == 0, found.err
    assert {sample.is_truncated for sample in seen} == {True, False}
    for row, other in zip(found.metrics, expected.metrics, strict=True):
        for name in ("objective/scores", "rewards_eval/sampled", "grad_norm", "loss/train", "rewards_eval/greedy"):
            assert row.get(name) == pytest.approx(other.get(name), abs=1e-3)
        assert row.get("rewards_train/reward_model") == pytest.approx(other.get("rewards_train/by_hand"), abs=1e-4)
    assert any(abs(row["objective/scores"]) > 0.05 for row in found.steps)
    weights, others = weights_of(found.dir, 16), weights_of(expected.dir, 16)
    assert all(torch.allclose(weights[name], others[name], atol=1e-4) for name in others)


def reward_model(options: RewardModel, *overrides: str, tokenizer: Any = None) -> RewardModelReward:
    settings = make_settings("loss=grpo", "max_length=64", "max_prompt_length=40", *overrides)
    return RewardModelReward(options, settings, tokenizer or byte_level(), torch.device("cpu"), chat_form)


def test_a_reward_model_reads_text_by_its_own_tokenizer(reward_run):
    scored = reward_model(RewardModel(path=str(reward_run)))  # the policy has other tokens
    samples = samples_of(FILMS, [(" What a charming film!", False), (" It was", True), ("", False), ("", True)])
    others = samples_of(FILMS._replace(text="\n\nHuman: Which?\n\nAssistant:"), [(" What a charming film!", False)])
    found = [*scored([samples[0], others[0], *samples[1:]])]
    assert found == pytest.approx(
        scores_by_hand(reward_run / "LATEST", [samples[0], others[0], *samples[1:]]), abs=1e-5
    )
    raw = reward_model(RewardModel(path=str(reward_run), normalize=False, batching="padded"))
    config = json.loads((reward_run / "LATEST" / "config.json").read_text())
    assert [*raw(samples)] == pytest.approx(
        [score * config["reward_std"] + config["reward_mean"] for score in [found[0], *found[2:]]], abs=1e-5
    )


def test_a_reward_model_of_a_shorter_context_than_the_policy(reward_run):
    samples = samples_of(FILMS, [(" What a charming film!", False), (" It was", False)])
    model = RewardModel(path=str(reward_run))
    longer = reward_model(model, "max_length=10000000", "max_prompt_length=9000000")
    assert [*longer(samples)] == pytest.approx([*reward_model(model)(samples)], abs=1e-5)


def test_prompts_by_another_template_are_refused(reward_run, program, tmp_path):
    from_template = FILMS._replace(text="<|im_start|>user\nGood?<|im_end|>\n", from_template=True)
    samples = samples_of(from_template, [("Yes.", False)])
    with pytest.raises(
        UserError, match=r"reward_options.reward_model.path: .* does not read prompts by this chat temp"
    ):
        reward_model(RewardModel(path=str(reward_run)), "chat_template=chatml")(samples)
    data = tmp_path / "messages.jsonl"
    rows = [{"prompt": f"Good {number}?", "chosen": "Yes.", "rejected": "No."} for number in range(40)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = program.ok(
        *REWARD,
        f"datasets={data}",
        "format=messages",
        "chat_template=chatml",
        "test_fraction=0.2",
        f"local_run_dir={tmp_path}/r",
    )
    scored = reward_model(RewardModel(path=str(run.dir)), "chat_template=chatml")
    (score,) = scored(samples)
    assert isinstance(score, float)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({}, "reward_options: lack reward_model.path"),
        ({"path": "/nowhere"}, "/nowhere does not exist"),
        ({"path": "SFT"}, "is a model of text, not a reward model"),
        ({"path": "BARE"}, "reward_options.reward_model.normalize: config.json of .* has no reward_mean"),
    ],
)
def test_reward_models_that_do_not_fit(online, sft_run, reward_run, tmp_path, options, problem):
    if options.get("path") == "SFT":
        options = {"path": str(sft_run)}
    elif options.get("path") == "BARE":  # no statistics
        model = AutoModelForSequenceClassification.from_pretrained(reward_run / "LATEST")
        model.config.reward_mean = model.config.reward_std = None
        model.save_pretrained(tmp_path / "bare")
        AutoTokenizer.from_pretrained(reward_run / "LATEST").save_pretrained(tmp_path / "bare")
        options = {"path": str(tmp_path / "bare")}
    given = [f"reward_options.reward_model.{name}={value}" for name, value in options.items()]
    run = online("rewards=[reward_model]", *(given or ["reward_options={reward_model:{}}"]))
    assert run.status in (2, 4)
    assert run.err.count("\n") == 1
    assert re.search(problem, run.err), run.err


def test_a_judge_scores_a_run(online, server, monkeypatch, capsys):  # noqa: F811
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret-0123")
    server.reply = lambda text: f"Score: {1 + len(text) % 10}" if len(text) % 7 else "I cannot say"
    server.faults = [status(503)]
    arguments = (
        "rewards=[judge]",
        f"reward_options.judge={{url:'{server.url}',model:m}}",
        "reward_options.judge.retries=5",
    )
    run = online(*arguments)
    assert run.status == 0, run.err
    assert server.keys[0] == "Bearer sk-secret-0123"
    lines = [json.loads(line) for line in (run.dir / "judge.jsonl").read_text().splitlines()]
    unparsed = [line for line in lines if line["score"] is None]
    assert unparsed and all(line["reply"] == "I cannot say" for line in unparsed)
    none = sum(row.get(f"rewards_{kind}/judge/none", 0) for row in run.metrics for kind in ("train", "eval"))
    greedy = 2 * 8  # of the evaluations; their None is in no metric
    assert none <= len(unparsed) <= none + greedy
    assert all(1 <= row["objective/scores"] <= 10 for row in run.steps)
    files = [path for path in run.dir.rglob("*") if path.is_file()]
    assert not any(b"sk-secret" in path.read_bytes() for path in files)
    assert "sk-secret" not in run.out + run.err
    num_requests = len(server.requests)
    again = online(*arguments)  # its replies are on disk
    assert again.status == 0 and len(server.requests) == num_requests
    assert [row["objective/scores"] for row in again.steps] == [row["objective/scores"] for row in run.steps]


def test_a_judge_that_is_away(online, server):  # noqa: F811
    server.faults = [status(400, b"content filter")] * 10**4
    arguments = ("rewards=[judge]", f"reward_options.judge={{url:'{server.url}',model:gone}}")
    run = online(*arguments)
    assert run.status == 3
    assert f"rewards: judge failed with JudgeError ({server.url}: HTTP 400 content filter) for the prompt" in run.err
    assert run.err.count("\n") == 1


@pytest.mark.slow
def test_python_tests_score_a_run(online, tmp_path):
    path = prompts_file(tmp_path / "questions.jsonl", tests="assert True")
    run = online(f"datasets={path}", "rewards=[python_tests,length]", "reward_options.python_tests.seconds=5")
    assert run.status == 0, run.err
    assert all(0 <= row["rewards_train/python_tests"] <= 1 for row in run.steps)


def test_a_reward_that_takes_too_long_ends_the_run(online, monkeypatch):
    def stuck(prompt: str, response: str, row: Any) -> float:
        while True:
            pass

    monkeypatch.setitem(REWARDS, "stuck", stuck)
    run = online("rewards=[stuck]", "reward_timeout=0.2")
    assert run.status == 3
    assert "rewards: stuck failed with TimeoutError (it took more than 0.2 s) for the prompt ..." in run.err
    assert run.err.count("\n") == 1


@pytest.mark.parametrize(("length", "penalty"), [(1, 0), (80, 0), (81, 0.05), (90, 0.5), (100, 1), (101, 1)])
def test_the_overlong_penalty_by_hand(length, penalty):
    """Equation 13 of DAPO with 100 tokens at most, the last 20 of them as its buffer."""
    assert overlong_penalty(length, 100, 20) == pytest.approx(penalty)


def test_long_responses_lose_reward(online, monkeypatch):
    monkeypatch.setitem(REWARDS, "vowels", vowels)
    plain = online("rollout.max_new_tokens=8")
    run = online("rollout.max_new_tokens=8", "rollout.overlong_buffer=8", "rollout.overlong_penalty=2")
    assert plain.status == run.status == 0, run.err
    lost = plain.steps[0]["objective/scores"] - run.steps[0]["objective/scores"]
    assert lost == pytest.approx(2 * run.steps[0]["rollout/length_mean"] / 8)
    assert run.steps[0]["rewards_train/vowels"] == plain.steps[0]["rewards_train/vowels"]
    refused = online("rollout.max_new_tokens=8", "rollout.overlong_buffer=9")
    assert refused.status == 2
    assert "rollout.overlong_buffer: must be at most the longest response (8 tokens), not 9" in refused.err
