"""Win rates in evaluations: samples of the policy against samples of the reference."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from engine.data.examples import Example
from engine.judges.pairwise import PairwiseJudge
from engine.judges.texts import append_line
from engine.judges.win_rates import WinRate, describe
from engine.models.adapters import adapter_of
from engine.models.group_sampling import Sampling
from engine.models.precision import run_in_dtype
from engine.models.sampling_engines import Loop
from engine.placement.placement import Placement
from engine.rewards.comparing import (
    AUTO,
    GROUND_TRUTH,
    NUM_PROMPTS,
    NUM_PROMPTS_OF_ENDPOINT,
    EndpointJudge,
    Judged,
    Pair,
    PairJudge,
    ScoreJudge,
    describe_left_out,
    ground_truth_judge,
    judge_pairs,
    row_of,
)
from engine.rewards.reward_model import RewardModelReward
from engine.settings.endpoint import Endpoint, is_url
from engine.settings.schema import Settings
from rewards import RewardModel
from utils import UserError

TRANSCRIPT = "win_rates.jsonl"
KEY = "win_rate.judge"
POLICY, REFERENCE = 100, 101  # streams of random numbers, apart from those of engine/run/sampler.py
Samples = list[np.ndarray]


def build_judge(
    settings: Settings,
    tokenizer: PreTrainedTokenizerBase,
    placement: Placement,
    ground_truth: Callable[[str], float] | None,
    chat_form: Callable[[Sequence[str]], str | None],
) -> PairJudge | None:
    """The judge of the settings; None for no win rates.

    Raises:
        UserError: CONFIG for a judge that cannot be had.
    """
    name = settings.win_rate.judge
    if name is None or not settings.measures_win_rates(ground_truth is not None):
        if settings.win_rate.prompts is not None and settings.measures_kl:
            problem = f"win_rate.prompts: {settings.win_rate.prompts} would change nothing: nobody judges"
            raise UserError("CONFIG", problem, "give win_rate.judge, or leave it out")
        return None
    if name in (AUTO, GROUND_TRUTH):
        if ground_truth is None:
            problem = f"{KEY}: ground_truth needs a data set with one, and {','.join(settings.datasets)} has none"
            raise UserError("CONFIG", problem, "give a reward model or a server")
        return ground_truth_judge(ground_truth)
    if is_url(name):
        assert settings.cache_dir is not None  # the run has named it
        cache = Path(settings.cache_dir) / "judge"
        return EndpointJudge(PairwiseJudge(KEY, name, Endpoint(**settings.win_rate.endpoint or {}), cache))
    if placement.rank > 0:  # rank 0 judges
        return ScoreJudge(lambda samples: [])
    options = RewardModel(path=name, normalize=False)
    return ScoreJudge(RewardModelReward(options, settings, tokenizer, placement.device, chat_form, key=KEY))


class WinRates:
    """Judges samples of the policy against samples of the reference. All ranks sample, and rank 0 judges.

    Args:
        examples: held-out ones; each of their prompts counts once.
        say: prints a notice.

    Attributes:
        indices: of the first example of each prompt.
        prompts: token ids, each [prompt tokens].
        reference_samples: a response to each prompt, int32 [response tokens].
    """

    def __init__(
        self,
        judge: PairJudge,
        settings: Settings,
        tokenizer: PreTrainedTokenizerBase,
        placement: Placement,
        examples: Sequence[Example],
        say: Callable[[str], None],
    ):
        first = {example.prompt.tobytes(): index for index, example in reversed([*enumerate(examples)])}
        is_paid = is_url(settings.win_rate.judge)
        count = settings.win_rate.prompts or (NUM_PROMPTS_OF_ENDPOINT if is_paid else NUM_PROMPTS)
        self.indices = sorted(first.values())[:count]
        self.prompts = [examples[index].prompt for index in self.indices]
        self.reference_samples: Samples = []
        self._has_judged = False
        self._judge, self._settings, self._tokenizer = judge, settings, tokenizer
        self._placement, self._say = placement, say
        self._texts = tokenizer.batch_decode(self.prompts, skip_special_tokens=True)
        self._rows = [row_of(examples[index], tokenizer) for index in self.indices]

    @property
    def num_bytes(self) -> int:
        """Of a reward model, on the device of training."""
        return self._judge.num_bytes

    def sample(self, model: PreTrainedModel, first: int, stream: int) -> Samples:
        """A response to each prompt from the number first on. Ranks share the work; all call this together.

        Args:
            stream: of random numbers. They are the same in each evaluation.
        """
        settings, tokenizer, placement = self._settings, self._tokenizer, self._placement
        numbers = [*range(first, len(self.prompts))]
        local = numbers[placement.data_rank :: placement.num_data_ranks]
        sampling = Sampling(
            1,
            settings.max_new_tokens,
            settings.max_length,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            temperature=settings.rollout.temperature if settings.loss.is_online else 1.0,
            max_rows=settings.rollout.max_rows if settings.loss.is_online else settings.eval_batch_size,
        )
        # As in Evaluator.sample().
        dtype = placement.compute_dtype if adapter_of(model) else None
        with run_in_dtype(model, dtype), placement.gathered(model):
            seeds = [[settings.seed, stream, number] for number in local]
            groups = Loop().sample(model, [self.prompts[number] for number in local], seeds, sampling).tokens
        by_rank, num_ranks = placement.gather_from_data_ranks([group[0] for group in groups]), placement.num_data_ranks
        return [by_rank[place % num_ranks][place // num_ranks] for place in range(len(numbers))]

    def measure(self, policy: PreTrainedModel, samples: Sequence[np.ndarray], num_examples: int) -> dict[str, float]:
        """The metrics of the policy, after a line about them. All ranks call this together.

        Args:
            samples: of the policy, for the first prompts at least; the others are sampled here.
            num_examples: trained on so far.
        """
        of_policy = [*samples[: len(self.prompts)]]
        if len(of_policy) < len(self.prompts):
            of_policy += self.sample(policy, len(of_policy), POLICY)
        judged = self._placement.gather_from_data_ranks(self._judged(of_policy) if self._is_first else None)[0]
        if judged is None:
            return {}
        if self._is_first:
            self._write(judged, num_examples)
        left_out = {"win_rate_eval/unparsed": judged.num_unparsed, "win_rate_eval/failed": judged.num_failed}
        metrics = {name: float(number) for name, number in left_out.items() if number}
        result = judged.result
        about = "no pair has a verdict" if result is None else describe(result)
        self._say(f"win rate over the reference: {'; '.join(filter(None, (about, describe_left_out(judged))))}")
        return metrics if result is None else metrics | metrics_of(result)

    def _judged(self, of_policy: Sequence[np.ndarray]) -> Judged | None:
        """The judged pairs; None after a notice if a judge that worked before refuses: the run continues.

        Raises:
            UserError: of the first evaluation of this process, as for a wrong key.
        """
        try:
            judged = judge_pairs(self._judge, self._pairs(of_policy), ("policy", "reference"))
        except UserError as error:
            if not self._has_judged:
                raise
            self._say(f"win rate over the reference: none in this evaluation ({error.what})")
            return None
        self._has_judged = True
        return judged

    @property
    def _is_first(self) -> bool:
        return self._placement.rank == 0

    def _pairs(self, of_policy: Sequence[np.ndarray]) -> list[Pair]:
        tokenizer = self._tokenizer
        both = (of_policy, self.reference_samples)
        texts = [tokenizer.batch_decode(samples, skip_special_tokens=True) for samples in both]
        truncated = [[int(sample[-1]) != tokenizer.eos_token_id for sample in samples] for samples in both]
        return [
            Pair(prompt, row, responses, are_truncated)
            for prompt, row, responses, are_truncated in zip(
                self._texts, self._rows, zip(*texts, strict=True), zip(*truncated, strict=True), strict=True
            )
        ]

    def _write(self, judged: Judged, num_examples: int) -> None:
        """Add the pairs to the transcript."""
        assert self._settings.local_run_dir is not None  # the run has named it
        lines = [json.dumps({"examples": num_examples, **line}, ensure_ascii=False) for line in judged.lines]
        append_line(Path(self._settings.local_run_dir) / TRANSCRIPT, "\n".join(lines))


def metrics_of(result: WinRate) -> dict[str, float]:
    """A result as metrics of an evaluation."""
    estimates = {"win_rate_eval": result.rate}
    if result.length_controlled is not None:
        estimates["win_rate_eval/length_controlled"] = result.length_controlled
    metrics: dict[str, float] = {}
    for name, estimate in estimates.items():
        metrics |= {name: estimate.value, f"{name}/low": estimate.low, f"{name}/high": estimate.high}
    return metrics | {
        "win_rate_eval/ties": result.ties / result.num_pairs,
        "win_rate_eval/p_value": result.p_value,
        "win_rate_eval/length_difference": result.length_difference,
        "win_rate_eval/pairs": float(result.num_pairs),
    }
