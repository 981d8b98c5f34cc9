"""Win rates: their statistics, their judges, and both in runs and in evaluate.py."""

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from scipy.optimize import minimize
from scipy.special import expit, logit
from scipy.stats import binomtest

import evaluate
from engine.data.examples import PromptRow
from engine.judges.pairwise import PairwiseJudge
from engine.judges.win_rates import (
    NORMAL_QUANTILE,
    describe,
    length_controlled,
    sign_test,
    wilson_interval,
    win_rate,
)
from engine.models.archives import STATE_FILE
from engine.rewards.comparing import EndpointJudge, Pair, ScoreJudge, describe_left_out, judge_pairs
from engine.run.win_rates import REFERENCE, WinRates
from engine.settings.endpoint import Endpoint
from tests.ranks import Job, make_trainer, on_ranks
from tests.runs import Program, Run, stop_after
from tests.test_judge import StandIn, server, status  # noqa: F401  a fixture
from utils import UserError

DPO = ("loss=dpo", "loss.beta=0.1", "sample_during_eval=true", "n_eval_model_samples=3", "max_length=264")

# ---- Statistics ----


@pytest.mark.parametrize(("wins", "losses"), [(0, 1), (7, 3), (50, 50), (256, 0), (1, 999)])
def test_intervals_and_sign_tests_are_those_of_scipy(wins: int, losses: int) -> None:
    expected = binomtest(wins, wins + losses).proportion_ci(method="wilson")
    found = wilson_interval(wins, 0, losses)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=1e-9)
    assert found.value == wins / (wins + losses)
    assert sign_test(wins, losses) == pytest.approx(binomtest(wins, wins + losses).pvalue, rel=1e-9)


def test_ties_narrow_the_interval_but_prove_nothing_alone() -> None:
    without, with_ties = wilson_interval(60, 0, 40), wilson_interval(40, 40, 20)
    assert with_ties.value == without.value == 0.6
    assert without.low < with_ties.low < 0.6 < with_ties.high < without.high
    of_three, of_many = wilson_interval(0, 3, 0), wilson_interval(0, 1000, 0)
    assert of_three.high - of_three.low > 0.5 > 0.1 > of_many.high - of_many.low > 0
    assert sign_test(0, 0) == 1


@pytest.mark.parametrize(
    ("number", "won", "tied"), [(256, 0.5, 0.0), (256, 0.7, 0.0), (64, 0.5, 0.2), (256, 0.6, 0.3), (256, 0.85, 0.1)]
)
def test_intervals_hold_the_true_rate_as_often_as_they_say(number: int, won: float, tied: float) -> None:
    draws = np.random.default_rng(0).multinomial(number, [won, tied, 1 - won - tied], size=1000)
    intervals = [wilson_interval(*map(int, draw)) for draw in draws]
    assert 0.93 <= np.mean([each.low <= won + tied / 2 <= each.high for each in intervals]) <= 0.97


def draw_pairs(
    generator: np.random.Generator, number: int, centre: float, slope: float, ties: float
) -> tuple[np.ndarray, np.ndarray]:
    """Outcomes and length differences by the model of the regression."""
    differences = generator.normal(20, 40, number)
    rates = expit(centre + slope * np.tanh(differences / differences.std()))
    tied = ties * 4 * rates * (1 - rates)  # the mean outcome stays
    numbers = generator.random(number)
    return np.where(numbers < tied, 0.5, np.where(numbers < tied / 2 + rates, 1.0, 0.0)), differences


@pytest.mark.parametrize(
    ("number", "centre", "slope", "ties"), [(256, 0, 0, 0), (256, 0.5, 1, 0), (64, 0.5, 1, 0), (256, 0.5, 1, 0.3)]
)
def test_length_controlled_intervals_hold_the_true_rate(number: int, centre: float, slope: float, ties: float) -> None:
    generator = np.random.default_rng(0)
    holds = []
    for _ in range(1000):
        found = length_controlled(*draw_pairs(generator, number, centre, slope, ties))
        assert found is not None
        holds.append(found.low <= expit(centre) <= found.high)
    assert 0.93 <= np.mean(holds) <= 0.97


def test_length_controlled_by_hand() -> None:
    """Differences of +40 and -40, 50 each: tanh is +-tanh(1), so the regression fits both win rates exactly."""
    differences = np.array([40.0] * 50 + [-40.0] * 50)
    outcomes = np.array([1.0] * 45 + [0.0] * 5 + [1.0] * 20 + [0.0] * 30)  # 0.9 where longer, 0.4 where shorter
    found = length_controlled(outcomes, differences)
    assert found is not None
    centre = (math.log(0.9 / 0.1) + math.log(0.4 / 0.6)) / 2
    width = NORMAL_QUANTILE * math.sqrt((1 / (50 * 0.9 * 0.1) + 1 / (50 * 0.4 * 0.6)) / 4)
    expected = [1 / (1 + math.exp(-each)) for each in (centre, centre - width, centre + width)]
    assert [found.value, found.low, found.high] == pytest.approx(expected, abs=1e-9)
    assert win_rate(list(outcomes), list(differences)).rate.value == 0.65 < found.value


def test_length_controlled_with_ties_is_the_largest_likelihood() -> None:
    outcomes, differences = draw_pairs(np.random.default_rng(3), 200, 0.4, 1.5, 0.4)
    features = np.tanh(differences / differences.std())

    def loss(coefficients: np.ndarray) -> float:
        scores = coefficients[0] + coefficients[1] * features
        return float(np.sum(np.logaddexp(0, scores) - outcomes * scores))

    best = minimize(loss, np.zeros(2), method="BFGS", options={"gtol": 1e-9}).x
    found = length_controlled(outcomes, differences)
    assert found is not None and logit(found.value) == pytest.approx(best[0], abs=1e-5)


def test_a_model_that_is_longer_alone_does_not_win_at_equal_lengths() -> None:
    outcomes, differences = draw_pairs(np.random.default_rng(1), 2000, 0.0, 2.0, 0.0)
    result = win_rate(list(outcomes), list(differences))
    assert result.length_controlled is not None
    assert result.rate.low > 0.6 > 0.55 > result.length_controlled.value > 0.45
    assert result.length_difference == pytest.approx(20, abs=3)


@pytest.mark.parametrize(
    ("outcomes", "differences"),
    [
        ([1.0] * 20, [*range(20)]),  # all won
        ([1.0] * 10 + [0.0] * 10, [*range(20, 0, -1)]),  # separated by length
        ([1.0] * 10 + [0.0] * 10, [5] * 10 + [3] * 10),
        ([1.0, 0.0] * 4 + [0.5] * 50, [*range(58)]),  # eight decided pairs
    ],
)
def test_no_rate_at_equal_lengths(outcomes: list[float], differences: list[float]) -> None:
    result = win_rate(outcomes, differences)
    assert result.length_controlled is None and "at equal lengths unknown" in describe(result)


def test_equal_lengths_need_no_control() -> None:
    result = win_rate([1.0] * 30 + [0.0] * 10, [7.0] * 40)
    assert result.length_controlled is not None and result.length_controlled.value == pytest.approx(0.75)
    assert describe(result).startswith("0.750 (0.598 to 0.858), 30 won, 0 tied, 10 lost (sign test p=0.0022);")


# ---- Judges ----


def pairs_of(*responses: tuple[str, str]) -> list[Pair]:
    row = PromptRow("Is it good?", {})
    return [Pair("Is it good?", row, both, (False, False)) for both in responses]


def endpoint_judge(server: StandIn, tmp_path: Path, **options: Any) -> EndpointJudge:  # noqa: F811
    endpoint = replace(Endpoint(model="m", timeout=10, retries=0, concurrency=1), **options)
    return EndpointJudge(PairwiseJudge("judge", server.url, endpoint, tmp_path / "cache"))


PROMPT = "{prompt}|{response_a}|{response_b}"


def judge_by(preference: Callable[[str, str], str]) -> Callable[[str], str]:
    """Replies to PROMPT."""
    return lambda text: preference(*text.split("|")[1:])


def test_a_server_is_asked_in_both_orders(server, tmp_path):  # noqa: F811
    server.reply = judge_by(lambda a, b: "One is longer.\n[[A]]" if len(a) > len(b) else "[[A]]? No: [[B]]")
    judged = judge_pairs(
        endpoint_judge(server, tmp_path, prompt=PROMPT), pairs_of(("long one", "short"), ("a", "{prompt}")), ("x", "y")
    )
    assert [request["messages"][0]["content"] for request in server.requests] == [
        "Is it good?|long one|short",
        "Is it good?|short|long one",
        "Is it good?|a|{prompt}",
        "Is it good?|{prompt}|a",
    ]
    assert [line["outcome"] for line in judged.lines] == [1, 0]
    assert judged.lines[0] | {"cached": None} == {
        "prompt": "Is it good?",
        "x": "long one",
        "y": "short",
        "outcome": 1,
        "replies": ["One is longer.\n[[A]]", "[[A]]? No: [[B]]"],
        "cached": None,
    }
    again = judge_pairs(endpoint_judge(server, tmp_path, prompt=PROMPT), pairs_of(("long one", "short")), ("x", "y"))
    assert again.lines[0]["cached"] == [True, True] and len(server.requests) == 4


def test_disagreement_is_a_tie(server, tmp_path):  # noqa: F811
    """A judge of the first response, of the second, and one that says so once."""
    verdicts = iter(["[[A]]", "[[A]]", "[[B]]", "[[B]]", "[[C]]", "[[B]]", "[[C]]", "[[C]]"])
    server.reply = lambda text: next(verdicts)
    judged = judge_pairs(endpoint_judge(server, tmp_path), pairs_of(*[(f"a{n}", "b") for n in range(4)]), ("x", "y"))
    assert [line["outcome"] for line in judged.lines] == [0.5] * 4
    assert judged.result is not None and (judged.result.ties, judged.result.num_pairs) == (4, 4)


def test_equal_responses_are_a_tie_without_a_request(server, tmp_path):  # noqa: F811
    server.reply = judge_by(lambda a, b: "[[A]]" if a == "good" else "[[B]]")
    pairs = pairs_of(("same", "same"), ("good", "bad"), ("same", "same"))
    judged = judge_pairs(endpoint_judge(server, tmp_path, prompt=PROMPT), pairs, ("x", "y"))
    assert [line["outcome"] for line in judged.lines] == [0.5, 1, 0.5] and len(server.requests) == 2


def test_replies_without_a_verdict_and_failures_are_counted_apart(server, tmp_path):  # noqa: F811
    server.reply = judge_by(lambda a, b: "I cannot say." if "odd" in (a, b) else "[[A]]" if a == "good" else "[[B]]")
    server.faults = [status(400, b"too long")]
    pairs = pairs_of(("failed", "bad"), ("odd", "bad"), ("good", "bad"))
    judged = judge_pairs(endpoint_judge(server, tmp_path, prompt=PROMPT), pairs, ("x", "y"))
    assert (judged.num_failed, judged.num_unparsed) == (1, 1)
    assert judged.result is not None and (judged.result.wins, judged.result.num_pairs) == (1, 1)
    assert [line["outcome"] for line in judged.lines] == [None, None, 1]
    expected = "1 left out without a verdict in a reply, 1 left out without a reply (the first:"
    assert describe_left_out(judged).startswith(expected) and "HTTP 400 too long)" in describe_left_out(judged)


def test_a_busy_server_is_asked_again(server, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr("engine.judges.client.LONGEST_WAIT", 0.01)
    server.reply = judge_by(lambda a, b: "[[A]]" if a == "good" else "[[B]]")
    server.faults = [status(429), status(503)]
    judged = judge_pairs(
        endpoint_judge(server, tmp_path, prompt=PROMPT, retries=2), pairs_of(("good", "bad")), ("x", "y")
    )
    assert judged.lines[0]["outcome"] == 1 and len(server.requests) == 4


def test_scores_decide_and_bad_ones_are_left_out() -> None:
    judge = ScoreJudge(lambda samples: [float(sample.response) for sample in samples])
    judged = judge_pairs(judge, pairs_of(("2", "1"), ("1", "1"), ("-1", "0"), ("nan", "1")), ("x", "y"))
    assert [line["outcome"] for line in judged.lines] == [1, 0.5, 0, None]
    assert judged.lines[0]["scores"] == [2, 1] and judged.num_unparsed == 1


# ---- In a run ----


def pairs_in(run: Run) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run.dir / "win_rates.jsonl").read_text(encoding="utf-8").splitlines()]


def test_a_run_judges_by_the_ground_truth(program: Program) -> None:
    run = program.ok(*DPO, "eval_every=8")
    rows = pairs_in(run)
    assert [row["examples"] for row in rows] == [0] * 8 + [8] * 8 + [16] * 8
    for evaluation in run.evals:
        here = [row for row in rows if row["examples"] == evaluation["counters/examples"]]
        assert evaluation["win_rate_eval"] == np.mean([row["outcome"] for row in here])
        lengths = [len(row["policy"]) - len(row["reference"]) for row in here]
        assert evaluation["win_rate_eval/length_difference"] == np.mean(lengths)
        assert evaluation["win_rate_eval/pairs"] == 8
    assert run.out.count("win rate over the reference: ") == 3
    # The samples of samples.jsonl are the first.
    last = [row for row in run.samples if row["examples"] == 16]
    assert [(row["prompt"], row["policy"], row["reference"]) for row in last] == [
        (row["prompt"], row["policy"], row["reference"]) for row in rows[16:19]
    ]
    assert all(row["policy"] != row["reference"] for row in rows[3:8])  # random numbers of their own
    references = [[row["reference"] for row in rows[start : start + 8]] for start in (0, 8, 16)]
    assert references[0] == references[1] == references[2]


def test_the_references_samples_are_kept_and_a_resumed_run_has_no_pair_twice(program: Program, monkeypatch) -> None:
    streams: list[int] = []
    sample = WinRates.sample

    def counted(self: WinRates, model: Any, first: int, stream: int) -> Any:
        streams.append(stream)
        return sample(self, model, first, stream)

    monkeypatch.setattr(WinRates, "sample", counted)
    overrides = (*DPO, "eval_every=8", "seed=7", "keep_best=win_rate_eval")
    run = program.ok(*overrides)
    whole = pairs_in(run)
    assert streams.count(REFERENCE) == 1 and len(whole) == 24
    stop_after(run.dir, 8)
    resumed = program.ok(*overrides, f"local_run_dir={run.dir}", "resume=auto")
    assert pairs_in(resumed) == whole and streams.count(REFERENCE) == 1
    assert (run.dir / "BEST").is_symlink()


def test_more_samples_than_prompts_to_judge(program: Program) -> None:
    run = program.ok(*DPO, "win_rate.prompts=2", "do_first_eval=false", "n_examples=4")
    assert run.evals[-1]["win_rate_eval/pairs"] == 2


def test_online_training_is_judged_too(program: Program) -> None:
    run = program.ok(
        *("loss=grpo", "sample_during_eval=true", "n_eval_model_samples=2", "rollout.max_new_tokens=6"),
        *("n_examples=4", "do_first_eval=false", "rollout.num_responses=2"),
    )
    row = next(row for row in run.metrics if "win_rate_eval" in row)
    assert row["win_rate_eval/pairs"] == len(pairs_in(run)) == 8
    assert all(row["policy"] != row["reference"] for row in pairs_in(run))


@pytest.mark.parametrize(
    "overrides", [("win_rate.judge=null",), ("sample_during_eval=false",), ("loss=sft",), ("n_eval_model_samples=0",)]
)
def test_runs_without_win_rates(program: Program, overrides: tuple[str, ...]) -> None:
    kept = [each for each in DPO if each.split("=")[0] not in {other.split("=")[0] for other in overrides}]
    kept = [each for each in kept if "loss=sft" not in overrides or not each.startswith("loss.")]
    run = program.ok(*kept, *overrides, "n_examples=4", "do_first_eval=false")
    assert not any(name.startswith("win_rate") for row in run.metrics for name in row)
    assert not (run.dir / "win_rates.jsonl").exists()


def test_a_run_judges_by_a_server_and_says_what_failed(server, program: Program) -> None:  # noqa: F811
    server.reply = lambda text: "[[A]]"  # of every first response: ties
    judge = (f"win_rate.judge={server.url}", "win_rate.endpoint.model=m", "win_rate.prompts=4")
    run = program.ok(*DPO, *judge, "do_first_eval=false", "n_examples=4")
    assert run.evals[-1]["win_rate_eval"] == 0.5 and len(server.requests) == 8
    assert [row["replies"] for row in pairs_in(run)] == [["[[A]]", "[[A]]"]] * 4
    server.reply = lambda text: "no idea"
    run = program.ok(*DPO, *judge, "do_first_eval=false", "n_examples=4", "seed=1", "keep_best=win_rate_eval")
    assert "win_rate_eval" not in run.evals[-1] and run.evals[-1]["win_rate_eval/unparsed"] == 4
    assert "no pair has a verdict; 4 left out without a verdict in a reply" in run.out
    assert "keep_best: this evaluation has no win_rate_eval, as no pair has a verdict" in run.out
    server.faults = [status(401)] * 8
    refused = program(*DPO, *judge, "do_first_eval=false", "n_examples=4", "seed=2")
    assert refused.status == 2 and "win_rate.judge" in refused.err and "refuses requests (HTTP 401" in refused.err


def test_a_server_that_refuses_later_ends_no_run(server, program: Program) -> None:  # noqa: F811
    """A key may expire after hours. One that is wrong from the start ends the run."""

    def reply(text: str) -> str:  # in the first evaluation, one pair needs requests
        server.faults = [status(401)] * 100 if len(server.requests) == 2 else []
        return "[[A]]"

    server.reply = reply
    judge = (f"win_rate.judge={server.url}", "win_rate.endpoint.model=m", "win_rate.endpoint.concurrency=1")
    run = program.ok(*DPO, *judge, "win_rate.prompts=4", "n_examples=4", "seed=3")
    assert ["win_rate_eval" in row for row in run.evals] == [True, False] and "kl_eval" in run.evals[-1]
    assert "win rate over the reference: none in this evaluation (win_rate.judge: http" in run.out
    assert len(pairs_in(run)) == 4


def test_a_run_judges_by_a_reward_model(program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    """The scores are those of evaluate.py, if the responses have ends as those of a file do."""
    pairs = WinRates._pairs

    def with_ends(self: WinRates, samples: Any) -> list[Pair]:
        return [replace(pair, are_truncated=(False, False)) for pair in pairs(self, samples)]

    monkeypatch.setattr(WinRates, "_pairs", with_ends)
    reward = program.ok("loss=reward", "n_examples=4", "local_run_dir=" + str(program.directory / "reward"))
    run = program.ok(*DPO, f"win_rate.judge={reward.dir}", "do_first_eval=false", "n_examples=4")
    for row in pairs_in(run):
        first, second = row["scores"]
        assert first != second and row["outcome"] == (first > second)
    data, scores = program.directory / "pairs.jsonl", program.directory / "scores.jsonl"
    names = {"prompt": "prompt", "policy": "chosen", "reference": "rejected"}
    lines = [{names[key]: text for key, text in row.items() if key in names} for row in pairs_in(run)]
    data.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    monkeypatch.setattr("sys.argv", ["evaluate.py", f"model={reward.dir}", f"data={data}", f"to={scores}"])
    assert evaluate.main() == 0
    for row, line in zip(pairs_in(run), scores.read_text().splitlines(), strict=True):
        assert row["scores"] == pytest.approx(json.loads(line)["scores"], abs=1e-4)


def judged(job: Job, directory: Path) -> dict[str, float]:
    """The metrics of win rates of an untrained policy."""
    trainer = make_trainer(job, directory)
    directory.mkdir(exist_ok=True, parents=True)
    return trainer.evaluator.win_rates.measure(trainer.policy, [], 0)


@pytest.mark.alone
def test_two_processes_judge_what_one_does(tmp_path: Path) -> None:
    overrides = ("sample_during_eval=true", "n_eval_model_samples=2", "n_eval_examples=7")
    expected = judged(("llama", "dpo", overrides), tmp_path / "one")
    first, second = on_ranks(2, judged, ("llama", "dpo", (*overrides, "trainer=FSDPTrainer")), tmp_path / "two")
    assert first == second and first.keys() == expected.keys()
    rows, of_one = (
        [json.loads(line) for line in (tmp_path / name / "win_rates.jsonl").read_text(encoding="utf-8").splitlines()]
        for name in ("two", "one")
    )
    assert len(rows) == len(of_one) == expected["win_rate_eval/pairs"] > 2  # rank 0 alone judges
    assert [row["policy"] for row in rows] == [row["policy"] for row in of_one]
    assert rows[2:] == of_one[2:]  # the first two references are those of samples.jsonl, drawn by rank


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        (("win_rate.prompts=99",), "win_rate.prompts: must be at most n_eval_examples (8), not 99"),
        (("win_rate.endpoint.model=m",), "win_rate.endpoint: is for a judge of http://... or https://..."),
        (("win_rate.judge=http://a",), "win_rate.endpoint: lacks model, the name of a model on the server"),
        (("win_rate.judge=http://a", "win_rate.endpoint.mdel=m"), "win_rate.endpoint: has mdel, and it takes model,"),
        (
            ("win_rate.judge=http://a", "win_rate.endpoint.model=m", "win_rate.endpoint.retries=-1"),
            "win_rate.endpoint: .retries must be an integer of at least 0, not -1",
        ),
        (("win_rate.judge=./nothing",), "nothing does not exist"),
        (("win_rate.judge=null", "win_rate.prompts=4"), "win_rate.prompts: 4 would change nothing"),
        (("win_rate.judge=null", "keep_best=win_rate_eval"), "keep_best: win_rate_eval needs a judge"),
    ],
)
def test_wrong_settings(program: Program, overrides: tuple[str, ...], problem: str) -> None:
    run = program(*DPO, *overrides)
    assert run.status != 0 and problem in run.err


@pytest.mark.parametrize("key", ["win_rate.judge=ground_truth", "win_rate.prompts=4"])
def test_data_without_a_ground_truth(program: Program, tmp_path: Path, key: str) -> None:
    data = tmp_path / "mine.jsonl"
    rows = [{"prompt": f"Q{n}?", "chosen": f" yes, {n}.", "rejected": f" no, {n}."} for n in range(40)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = (*DPO, f"datasets={data}", "test_fraction=0.2", "n_eval_examples=6", "n_examples=4")
    run = program(*common, key)
    assert run.status == 2 and f"error[CONFIG] {key.partition('=')[0]}: " in run.err
    assert not any("win_rate_eval" in row for row in program.ok(*common).metrics)


# ---- evaluate.py ----


@pytest.fixture(scope="module")
def two_runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two runs of SFT from different seeds."""
    import train
    from tests.runs import QUICK, SMALL

    directory = tmp_path_factory.mktemp("runs")
    for seed in (0, 1):
        with pytest.MonkeyPatch.context() as patch:
            overrides = [f"seed={seed}", f"local_run_dir={directory}/{seed}", f"cache_dir={directory}/cache"]
            lengths = ["max_length=240", "max_prompt_length=220"]
            patch.setattr("sys.argv", ["train.py", *SMALL, *QUICK, "n_examples=8", *lengths, *overrides])
            assert train.main() == 0
    return directory / "0", directory / "1"


@pytest.fixture
def compare(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Run evaluate.py; returns (exit status, stdout, stderr)."""

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["evaluate.py", *arguments])
        capsys.readouterr()
        return evaluate.main(), *capsys.readouterr()

    return run


def test_two_models_on_held_out_prompts(compare, two_runs, tmp_path: Path) -> None:
    first, second = two_runs
    target = tmp_path / "pairs.jsonl"
    arguments = (f"model={first}", f"against={second}", "judge=ground_truth", "prompts=6")
    code, out, err = compare(*arguments, f"to={target}")
    assert code == 0, err
    lines = [json.loads(line) for line in target.read_text(encoding="utf-8").splitlines()]
    assert len(lines) == 6 == len({line["prompt"] for line in lines})
    outcomes = [line["outcome"] for line in lines]
    assert all(line["scores"] == [-1, -1] for line in lines) and outcomes == [0.5] * 6  # of an untrained model
    assert f"{first} against {second}: 6 prompts, judged by ground_truth" in out
    assert "win rate           0.500" in out and "0 won, 6 tied, 0 lost" in out and "at equal lengths   unknown" in out
    again = tmp_path / "again.jsonl"
    assert compare(*arguments, f"to={again}")[0] == 0 and again.read_bytes() == target.read_bytes()
    other = tmp_path / "other.jsonl"
    assert compare(*arguments, f"to={other}", "seed=1")[0] == 0 and other.read_bytes() != target.read_bytes()


def test_likeliest_responses_of_one_model_tie(compare, two_runs, tmp_path: Path) -> None:
    """Messages of a file, by the chat template of each model."""
    data = tmp_path / "chats.jsonl"
    rows = [{"messages": [{"role": "user", "content": f"Is {n} good?"}]} for n in range(5)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    target = tmp_path / "pairs.jsonl"
    model = two_runs[0]
    code, _, err = compare(
        f"model={model}", f"against={model}", "judge=http://127.0.0.1:9", "endpoint.model=m", "endpoint.retries=0",
        f"data={data}", "temperature=0", f"to={target}",
    )  # fmt: skip
    assert code == 0, err  # equal responses: no request
    lines = [json.loads(line) for line in target.read_text(encoding="utf-8").splitlines()]
    assert [line["outcome"] for line in lines] == [0.5] * 5
    assert {line["prompt"] for line in lines} == {f"\n\nHuman: Is {n} good?\n\nAssistant:" for n in range(5)}


def test_templates_that_write_other_numbers_of_prompts_are_refused(compare, two_runs, tmp_path: Path) -> None:
    """One strips spaces, so two prompts are one to it. A part of the prompts would be of other dialogues then."""
    data = tmp_path / "chats.jsonl"
    questions = [f"Is {n} good?" for n in range(5)] + ["Is 1 good? "]
    rows = [{"messages": [{"role": "user", "content": question}]} for question in questions]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    stripping = tmp_path / "stripping"
    shutil.copytree(two_runs[1], stripping, symlinks=True)
    config = yaml.safe_load((stripping / "config.yaml").read_text())
    (stripping / "config.yaml").write_text(yaml.safe_dump(config | {"chat_template": "llama2"}))
    arguments = (f"model={two_runs[0]}", f"against={stripping}", "judge=http://127.0.0.1:9", "endpoint.model=m")
    code, _, err = compare(*arguments, f"data={data}", "prompts=3", f"to={tmp_path / 'pairs.jsonl'}")
    assert code == 3 and "data: the models have 6 and 5 prompts" in err


def test_a_server_judges_two_models(server, compare, two_runs, tmp_path: Path) -> None:  # noqa: F811
    def prefer_short(a: str, b: str) -> str:
        return "[[A]]" if len(a) < len(b) else "[[B]]" if len(a) > len(b) else "[[C]]"

    server.reply = judge_by(prefer_short)
    target = tmp_path / "pairs.jsonl"
    common = (f"model={two_runs[0]}", f"against={two_runs[1]}", f"judge={server.url}", "endpoint.model=m", "prompts=5")
    code, out, err = compare(*common, f"endpoint.prompt={PROMPT}", f"to={target}")
    assert code == 0, err
    lines = [json.loads(line) for line in target.read_text(encoding="utf-8").splitlines()]
    for line in lines:
        shorter = np.sign(len(line["against"]) - len(line["model"]))
        assert line["outcome"] == (shorter + 1) / 2 and len(line["replies"]) == 2
    server.reply = lambda text: "?"
    code, out, err = compare(*common, f"to={tmp_path / 'none.jsonl'}")
    assert code == 3 and "5 left out without a verdict in a reply" in out and "no pair has a verdict" in err


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (("judge=ground_truth", "to={data}"), "to: .* exists"),
        (("judge=ground_truth", "to=no/where.jsonl"), "to: no is not a directory"),
        (("judge=ground_truth", "data={data}"), "judge: ground_truth needs a data set with one"),
        (("judge=http://a", "endpoint.model=m"), "to: a server's replies need a file"),
        (("judge=http://a", "to=new"), "endpoint lacks model"),
        (("judge=ground_truth", "endpoint.model=m"), "endpoint is for a judge of http"),
        (("judge=http://a", "endpoint.model=m", "endpoint.timeout=0", "to=new"), "endpoint.timeout must be .* above 0"),
        (("judge=./nothing",), "nothing does not exist"),
        (("judge={run}",), "judge: .* is a model of text, not a reward model"),
        (("judge=ground_truth", "data=./nothing.jsonl"), "nothing.jsonl"),
        ((), "judge is required"),
    ],
)
def test_wrong_options(compare, two_runs, tmp_path: Path, arguments: tuple[str, ...], problem: str) -> None:
    data = tmp_path / "mine.jsonl"
    data.write_text(json.dumps({"prompt": "Q?", "chosen": " yes", "rejected": " no"}) + "\n")
    filled = [each.format(data=data, run=two_runs[0]) for each in arguments]
    code, _, err = compare(f"model={two_runs[0]}", f"against={two_runs[1]}", "prompts=1", *filled)
    assert code in (2, 3, 4)
    with pytest.raises(UserError, match=problem):
        raise UserError("CONFIG", err.strip(), "")


def test_models_without_a_run_need_data(compare, two_runs, tmp_path: Path) -> None:
    copies = [tmp_path / name for name in ("a", "b")]
    for run, copy in zip(two_runs, copies, strict=True):
        shutil.copytree(run / "LATEST", copy, ignore=shutil.ignore_patterns(STATE_FILE))
    code, _, err = compare(f"model={copies[0]}", f"against={copies[1]}", "judge=ground_truth")
    assert code == 2 and "data: neither" in err
    code, out, err = compare(
        f"model={copies[0]}", f"against={copies[1]}", "judge=ground_truth", "data=films", "prompts=2",
        "max_length=210", "max_prompt_length=200",
    )  # fmt: skip
    assert code == 0 and "2 prompts" in out, err
