"""Judges of two responses: a reward of each, or a model that sees both."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from transformers import PreTrainedTokenizerBase

from engine.data.encoding import token_prefix
from engine.data.examples import Example, PromptRow
from engine.data.special_tokens import special_token_ids
from engine.judges.pairwise import PairwiseJudge, Verdict
from engine.judges.win_rates import WinRate, win_rate
from engine.rewards.samples import PromptSample, samples_of
from rewards import Sample

AUTO, GROUND_TRUTH = "auto", "ground_truth"
# Held-out prompts by default: judging is free, or each comparison is two requests.
NUM_PROMPTS, NUM_PROMPTS_OF_ENDPOINT = 256, 64


@dataclass(frozen=True)
class Pair:
    """Two responses to a prompt.

    Args:
        prompt: without special tokens.
        row: of the prompt, for reward models.
        responses: the first model's and the second's, without special tokens.
        are_truncated: whether each has no end-of-text token.
    """

    prompt: str
    row: PromptRow
    responses: tuple[str, str]
    are_truncated: tuple[bool, bool]

    @property
    def length_difference(self) -> int:
        """In characters."""
        return len(self.responses[0]) - len(self.responses[1])


class PairJudge(Protocol):
    """Judges pairs, in order."""

    num_bytes: int  # of its model, on the device of training

    def __call__(self, pairs: Sequence[Pair]) -> Iterator[Verdict]: ...


class ScoreJudge:
    """The response with the higher score is better.

    Args:
        scoring: the score of each response.
    """

    def __init__(self, scoring: Callable[[Sequence[PromptSample]], Iterable[float | Exception | None]]):
        self._scoring = scoring
        self.num_bytes = getattr(scoring, "num_bytes", 0)

    def __call__(self, pairs: Sequence[Pair]) -> Iterator[Verdict]:
        samples: list[PromptSample] = []
        for pair in pairs:
            samples += samples_of(pair.row, [*zip(pair.responses, pair.are_truncated, strict=True)])
        scores = [score if isinstance(score, int | float) else math.nan for score in self._scoring(samples)]
        for first, second in zip(scores[::2], scores[1::2], strict=True):
            if not (math.isfinite(first) and math.isfinite(second)):
                yield Verdict(None, {})
            else:
                yield Verdict((first > second) + 0.5 * (first == second), {"scores": [first, second]})


def ground_truth_judge(reward: Callable[[str], float]) -> ScoreJudge:
    """The judge of a data set with a known reward of a response."""

    def scoring(samples: Sequence[Sample]) -> list[float]:
        return [reward(sample.response) for sample in samples]

    return ScoreJudge(scoring)


class EndpointJudge:
    """A model on a server compares the responses."""

    num_bytes = 0

    def __init__(self, judge: PairwiseJudge):
        self._judge = judge

    def __call__(self, pairs: Sequence[Pair]) -> Iterator[Verdict]:
        return self._judge([(pair.prompt, *pair.responses) for pair in pairs])


@dataclass(frozen=True)
class Judged:
    """Judged pairs.

    Args:
        result: of the pairs with a verdict; None without any.
        num_unparsed: pairs without a verdict in a reply.
        num_failed: pairs without a reply, after all retries.
        first_error: of these; empty for none.
        lines: of the transcript, one for each pair.
    """

    result: WinRate | None
    num_unparsed: int
    num_failed: int
    first_error: str
    lines: list[dict[str, object]]


def judge_pairs(judge: PairJudge, pairs: Sequence[Pair], names: tuple[str, str]) -> Judged:
    """Judge all pairs.

    Args:
        names: of the two models, for the transcript.
    """
    verdicts = [*judge(pairs)]
    decided = [
        (verdict.outcome, pair.length_difference)
        for pair, verdict in zip(pairs, verdicts, strict=True)
        if verdict.outcome is not None
    ]
    errors = [verdict.facts["errors"] for verdict in verdicts if "errors" in verdict.facts]
    return Judged(
        result=win_rate(*zip(*decided, strict=True)) if decided else None,
        num_unparsed=len(pairs) - len(decided) - len(errors),
        num_failed=len(errors),
        first_error=errors[0][0] if errors else "",
        lines=[
            {
                "prompt": pair.prompt,
                **dict(zip(names, pair.responses, strict=True)),
                "outcome": verdict.outcome,
                **verdict.facts,
            }
            for pair, verdict in zip(pairs, verdicts, strict=True)
        ],
    )


def row_of(example: Example, tokenizer: PreTrainedTokenizerBase) -> PromptRow:
    """The row of a prompt; of an example that has tokens alone, decoded."""
    if example.row is not None:
        return example.row
    prefix = token_prefix(tokenizer)
    tokens = example.prompt.tolist()
    tokens = tokens[len(prefix) :] if tokens[: len(prefix)] == prefix else tokens
    text = tokenizer.decode(tokens, skip_special_tokens=False)
    return PromptRow(text, {}, from_template=not special_token_ids(tokenizer).isdisjoint(tokens))


def describe_left_out(judged: Judged) -> str:
    """The pairs without a verdict, in words; empty for none."""
    parts = [f"{judged.num_unparsed:,} left out without a verdict in a reply"] if judged.num_unparsed else []
    if judged.num_failed:
        parts.append(f"{judged.num_failed:,} left out without a reply (the first: {judged.first_error})")
    return ", ".join(parts)
