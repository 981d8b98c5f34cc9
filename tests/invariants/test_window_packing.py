"""A packed row of windows gives the loss and gradient of its documents run alone, in plain cross-entropy."""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from engine.data.examples import Example
from engine.data.windows import TokenStream, Windows, with_token_weights
from engine.settings.schema import LossSettings
from engine.step.packing_check import use_packed_attention
from tests.invariants.batches import run_batch
from tests.invariants.test_packing import ARCHITECTURES, gradient
from tests.models import VOCABULARY, exact_norms, tiny_model

LOSS = LossSettings(name="pretrain", keywords={})
DOCUMENTS = (5, 9, 1, 14, 2, 30, 7)
LENGTH = 16


def windows(document_mask: bool) -> list[Example]:
    offsets = np.cumsum([0, *DOCUMENTS])
    tokens = np.random.default_rng(0).integers(2, VOCABULARY, offsets[-1]).astype(np.uint16)
    return with_token_weights(Windows([TokenStream("text", tokens, offsets)], LENGTH, document_mask=document_mask)[:])


def packed(
    model: PreTrainedModel, microbatches: Sequence[list[Example]], layout: str = "packed"
) -> tuple[float, Tensor]:
    """The loss of a batch by the runner of training, and its gradient."""
    (loss, found), logged, _ = run_batch(LOSS, model, microbatches, layout)
    assert loss == pytest.approx(logged["loss"], rel=1e-6)
    return loss, found


def alone(model: PreTrainedModel, examples: Sequence[Example]) -> tuple[float, Tensor]:
    """The oracle: each document of each window through the model's own forward, and cross_entropy over all tokens."""
    logits, targets = [], []
    for example in examples:
        assert example.documents is not None
        tokens = np.concatenate([example.prompt, *example.responses])
        for start, end in pairwise([0, *example.documents.tolist(), len(tokens)]):
            if end - start > 1:
                piece = torch.from_numpy(tokens[start:end].astype(np.int64))
                logits.append(model(piece[None, :-1]).logits[0])
                targets.append(piece[1:])
    loss = F.cross_entropy(torch.cat(logits), torch.cat(targets))
    loss.backward()
    return loss.item(), gradient(model)


@pytest.mark.parametrize("document_mask", [True, False])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_windows_are_their_documents_alone(architecture: str, document_mask: bool) -> None:
    model = exact_norms(tiny_model(architecture, torch.float64))
    examples = windows(document_mask)
    assert len(examples) == 5 and len(examples[-1].responses[0]) == 3  # 68 tokens: the last window is shorter
    expected, expected_gradient = alone(model, examples)
    use_packed_attention(model, None)
    for parts in ([examples], [examples[:2], examples[2:]], [[each] for each in examples]):
        loss, found = packed(model, parts)
        assert loss == pytest.approx(expected, abs=1e-10)
        torch.testing.assert_close(found, expected_gradient, rtol=0, atol=1e-10)


def test_padded_windows_without_a_document_mask_are_the_same() -> None:
    model = exact_norms(tiny_model("llama", torch.float64))
    examples = windows(document_mask=False)
    expected, expected_gradient = alone(model, examples)
    loss, found = packed(model, [examples[:3], examples[3:]], "padded")
    assert loss == pytest.approx(expected, abs=1e-10)
    torch.testing.assert_close(found, expected_gradient, rtol=0, atol=1e-10)
