"""Ask a model on an OpenAI-compatible server which of two responses is better, in both orders."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.judges.client import JudgeClient, Reply, Server
from engine.judges.texts import fill
from engine.settings.endpoint import Endpoint

VERDICT = re.compile(r"\[\[\s*([ABC])\s*\]\]")
OUTCOMES = {"A": 1.0, "B": 0.0, "C": 0.5}  # of the first response


@dataclass(frozen=True)
class Verdict:
    """What a judge says of two responses.

    Args:
        outcome: 1 if the first is better, 0 if the second is, 0.5 for a tie; None without a verdict.
        facts: for the transcript.
    """

    outcome: float | None
    facts: dict[str, Any]


class PairwiseJudge:
    """Compares two responses in both orders. Verdicts that differ are a tie.

    Args:
        key: the option with the url, for errors.
        cache: directory of replies.

    Raises:
        UserError: CONFIG for an unusable url.
    """

    def __init__(self, key: str, url: str, options: Endpoint, cache: Path):
        self._client, self._prompt = JudgeClient(Server.of(key, url, options), cache), options.prompt

    def __call__(self, pairs: Sequence[tuple[str, str, str]]) -> Iterator[Verdict]:
        """The verdict on each pair, in order.

        Args:
            pairs: prompt, first and second response. Equal responses are a tie, without a request.

        Raises:
            UserError: CONFIG if the server refuses all requests, as for a wrong key or model.
        """
        requests = [
            fill(self._prompt, {"prompt": prompt, "response_a": one, "response_b": other})
            for prompt, first, second in pairs
            if first != second
            for one, other in ((first, second), (second, first))
        ]
        replies = self._client.replies([[{"role": "user", "content": request}] for request in requests])
        for _, first, second in pairs:
            yield Verdict(0.5, {}) if first == second else join_orders(next(replies), next(replies))


def join_orders(forward: Reply, backward: Reply) -> Verdict:
    """The verdict of both orders.

    Args:
        forward: about the first response as A.
        backward: about the first response as B.
    """
    outcomes = [outcome_of(reply) for reply in (forward, backward)]
    facts: dict[str, Any] = {
        "replies": [forward.text, backward.text],
        "cached": [forward.is_cached, backward.is_cached],
    }
    errors = [str(reply.error) for reply in (forward, backward) if reply.error is not None]
    if errors:
        facts["errors"] = errors
    first, second = outcomes
    if first is None or second is None:
        return Verdict(None, facts)
    return Verdict(first if first == 1 - second else 0.5, facts)


def outcome_of(reply: Reply) -> float | None:
    """The last verdict of a reply, for response A; None without one."""
    found = VERDICT.findall(reply.text) if reply.error is None else []
    return OUTCOMES[found[-1]] if found else None
