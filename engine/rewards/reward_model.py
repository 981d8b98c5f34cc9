"""Scores of a reward model, for rewards."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import torch
from transformers import PreTrainedTokenizerBase

from engine.data.chat_templates import read_template
from engine.data.examples import PromptRow
from engine.data.forms import ParsedRow
from engine.data.special_tokens import special_token_marker
from engine.export.run_record import RunRecord, read_run
from engine.export.saved_models import find_saved
from engine.export.scoring import open_reward_model
from engine.rewards.samples import PromptSample
from engine.settings.schema import Settings
from rewards import BatchReward, RewardModel, Sample
from utils import UserError

KEY = "reward_options.reward_model.path"


class RewardModelReward(BatchReward):
    """The score of each response, by the tokens and the truncation of the reward model's training.

    Args:
        tokenizer: of the policy. The reward model reads the text by its own.
        chat_form: names of data sets -> their common chat template.
        key: the option with the path, for errors.

    Raises:
        UserError: CONFIG, CHECKPOINT or NONFINITE if it cannot score these responses.
    """

    def __init__(
        self,
        options: RewardModel,
        settings: Settings,
        tokenizer: PreTrainedTokenizerBase,
        device: torch.device,
        chat_form: Callable[[Sequence[str]], str | None],
        key: str = KEY,
    ):
        directory = find_saved(options.path)
        self._record = RunRecord() if directory is None else read_run(directory, chat_form)
        of_run = self._record.config
        self._scorer = open_reward_model(
            options.path,
            self._record,
            key=key,
            layout=options.batching,
            # No response loses its end, where the reward model has positions for it.
            max_length=_larger(of_run.get("max_length"), settings.max_length),
            max_prompt_length=_larger(of_run.get("max_prompt_length"), settings.max_prompt_length),
            shortens=True,
            show_progress=False,
            device=device,
        )
        if options.normalize:
            normalize = key.replace(".path", ".normalize")
            fix = f"give a checkpoint saved after an evaluation, or {normalize}=false"
            self._scorer.normalize(normalize, options.path, fix)
        self._key, self._name = key, options.path
        self._settings, self._tokenizer = settings, tokenizer
        self._is_checked = False

    @property
    def num_bytes(self) -> int:
        """Of the weights, on the device of training."""
        return self._scorer.num_bytes

    def __call__(self, samples: Sequence[Sample]) -> Iterable[float | Exception | None]:
        by_prompt: dict[int, list[int]] = {}  # a prompt is run once for all its responses
        rows: list[PromptRow] = []
        for number, sample in enumerate(samples):
            assert isinstance(sample, PromptSample)
            by_prompt.setdefault(id(sample.source), []).append(number)
            if len(by_prompt) > len(rows):
                rows.append(sample.source)
        if any(row.from_template for row in rows):
            self._check_template()
        parsed = [
            ParsedRow(
                None,
                row.text,
                [self._text(samples[number].response, row.from_template) for number in numbers],
                [],
                from_template=row.from_template,
            )
            for row, numbers in zip(rows, by_prompt.values(), strict=True)
        ]
        examples = []
        for (example, _, _), numbers in zip(self._scorer.examples(parsed), by_prompt.values(), strict=True):
            eos = self._scorer.tokenizer.eos_token_id
            responses = tuple(
                tokens[:-1] if samples[number].is_truncated and len(tokens) > 1 and tokens[-1] == eos else tokens
                for tokens, number in zip(example.responses, numbers, strict=True)
            )
            examples.append(replace(example, responses=responses))
        rewards = [0.0] * len(samples)
        for scores, numbers in zip(self._scorer.score_examples(examples), by_prompt.values(), strict=True):
            for score, number in zip(scores, numbers, strict=True):
                rewards[number] = score
        return rewards

    def _text(self, response: str, from_template: bool) -> str:
        """A response as text to encode: what the policy spells out is no special token."""
        return special_token_marker(self._scorer.tokenizer)(response) if from_template else response

    def _check_template(self) -> None:
        """Refuse prompts by another chat template than that of the reward model's training."""
        if self._is_checked:
            return
        name, tokenizer = self._settings.chat_template, self._scorer.tokenizer
        template = self._tokenizer.chat_template if name is None else read_template(name, "give another chat_template")
        trained = self._record.template_text() if self._record.chat_template else tokenizer.chat_template
        special = [name for name in ("bos_token", "eos_token") if name in str(template)]
        differing = [name for name in special if getattr(self._tokenizer, name) != getattr(tokenizer, name)]
        if template != trained or differing:
            reason = f"its {differing[0]} is another" if template == trained else "it was trained with another"
            problem = f"{self._key}: {self._name} does not read prompts by this chat template ({reason})"
            raise UserError("CONFIG", problem, "set chat_template to that of the reward model, or give another one")
        self._is_checked = True


def _larger(of_run: object, of_policy: int) -> int:
    return max(of_run, of_policy) if isinstance(of_run, int) else of_policy
