"""Scores of a judge: a model on an OpenAI-compatible server."""

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from engine.judges.client import JudgeClient, Server
from engine.judges.texts import append_line, fill
from rewards import BatchReward, Judge, Sample
from utils import UserError


class JudgeReward(BatchReward):
    """The number in the judge's reply to each response. None for a reply without one.

    Args:
        cache: directory of replies.
        transcript: file of JSON lines that gets each request.

    Raises:
        UserError: CONFIG for an unusable option.
    """

    def __init__(self, options: Judge, cache: Path, transcript: Path):
        key = "reward_options.judge"
        try:
            self._pattern = re.compile(options.pattern)
        except re.error as error:
            problem = f"{key}.pattern: {options.pattern!r} is not a regular expression ({error})"
            raise UserError("CONFIG", problem, "correct it") from error
        if not self._pattern.groups:
            problem = f"{key}.pattern: {options.pattern!r} has no group"
            raise UserError("CONFIG", problem, r"put the number in parentheses, as in Score: (\d+)")
        server = Server.of(f"{key}.url", options.url, options)
        self._client, self._options, self._transcript = JudgeClient(server, cache), options, transcript

    def __call__(self, samples: Sequence[Sample]) -> Iterator[float | Exception | None]:
        template = self._options.prompt
        values = [{**each.row, "prompt": each.prompt, "response": each.response} for each in samples]
        prompts = [fill(template, of_sample) for of_sample in values]
        replies = self._client.replies([[{"role": "user", "content": prompt}] for prompt in prompts])
        for prompt, reply in zip(prompts, replies, strict=True):
            score = self.score_in(reply.text) if reply.error is None else None
            line = {
                "request": prompt,
                "reply": reply.text,
                "score": score,
                "attempts": reply.num_attempts,
                "cached": reply.is_cached,
            }
            if reply.error is not None:
                line["error"] = str(reply.error)
            append_line(self._transcript, json.dumps(line, ensure_ascii=False))
            yield score if reply.error is None else reply.error

    def score_in(self, reply: str) -> float | None:
        """The last score in a reply; None without one, or for one out of range."""
        scores = [match.group(1) for match in self._pattern.finditer(reply)]
        try:
            score = float(scores[-1])
        except (IndexError, TypeError, ValueError):
            return None
        return score if self._options.least <= score <= self._options.most else None
