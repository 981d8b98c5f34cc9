"""The sampled responses of a microbatch, and the numbers of their tokens.

The layout holds equal responses to a prompt once. So samples are indices into its targets.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine.data.examples import Example
from utils import to_device

COLUMNS = ("weights", "old_logps", "reference_logps", "advantages", "values", "returns")  # of the tokens


@dataclass(frozen=True)
class Samples:
    """Samples of consecutive examples.

    Args:
        index: the target of each token of each sample, int64 [tokens].
        lengths: tokens of each sample, int64 [samples].
        num_tokens: of the samples of each example, int64 [examples].
        sample_offsets, token_offsets: where each example starts in lengths and in index, and the ends.
        weights, old_logps, reference_logps, advantages, values, returns: of the tokens, [tokens]; None before they are
            known. The last two are of a critic.
    """

    index: Tensor
    lengths: Tensor
    num_tokens: Tensor
    sample_offsets: Sequence[int]
    token_offsets: Sequence[int]
    weights: Tensor | None = None
    old_logps: Tensor | None = None
    reference_logps: Tensor | None = None
    advantages: Tensor | None = None
    values: Tensor | None = None
    returns: Tensor | None = None

    def to(self, device: torch.device) -> "Samples":
        """The samples with their tensors on device."""
        values = {each.name: getattr(self, each.name) for each in fields(self)}
        moved: dict[str, Any] = {
            name: to_device(value, device) for name, value in values.items() if isinstance(value, Tensor)
        }
        return replace(self, **moved)

    def of_examples(self, examples: slice) -> "Samples":
        """The samples of some examples. Offsets stay as they are."""
        samples = slice(self.sample_offsets[examples.start], self.sample_offsets[examples.stop])
        tokens = slice(self.token_offsets[examples.start], self.token_offsets[examples.stop])
        values = {name: getattr(self, name) for name in ("index", *COLUMNS)}
        return replace(
            self,
            lengths=self.lengths[samples],
            num_tokens=self.num_tokens[examples],
            **{name: value[tokens] for name, value in values.items() if value is not None},
        )


def lay_out_samples(
    examples: Sequence[Example], numbers: Sequence[tuple[int, ...]], response_lengths: np.ndarray
) -> Samples:
    """The samples of a microbatch.

    Args:
        examples: in the order of the groups.
        numbers: of the responses of each example.
        response_lengths: of the microbatch, [responses].
    """
    starts = np.cumsum(response_lengths) - response_lengths  # targets
    samples = [number for of_example in numbers for number in of_example]
    index = [starts[number] + np.arange(response_lengths[number]) for number in samples]
    num_tokens = [sum(int(response_lengths[number]) for number in of_example) for of_example in numbers]
    rollouts = [example.rollout for example in examples if example.rollout is not None]

    def column(name: str) -> Tensor | None:
        of_examples = [getattr(rollout, name) for rollout in rollouts]
        if not of_examples or of_examples[0] is None:
            return None
        return torch.from_numpy(np.concatenate([values for each in of_examples for values in each]))

    return Samples(
        index=torch.from_numpy(np.concatenate(index).astype(np.int64)),
        lengths=torch.from_numpy(response_lengths[samples].astype(np.int64)),
        num_tokens=torch.tensor(num_tokens),
        sample_offsets=np.cumsum([0, *map(len, numbers)]).tolist(),
        token_offsets=np.cumsum([0, *num_tokens]).tolist(),
        **{name: column(name) for name in COLUMNS},
    )


def no_samples() -> Samples:
    """The samples of a microbatch without examples."""
    none, values = torch.zeros(0, dtype=torch.int64), torch.zeros(0)
    return Samples(none, none, none, [0], [0], **dict.fromkeys(COLUMNS, values))
