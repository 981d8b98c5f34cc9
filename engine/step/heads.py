"""Heads: outputs of a model at the positions of a microbatch.

The language-model head gives the log-prob of each target token. A response's last token predicts nothing, so the layout
does not feed it. The score head of a reward model gives one score per response, at its last token.
That of a critic gives a value at each position that predicts a token of a response.
"""

from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from engine.models.precision import low_weight
from engine.models.score_head import has_score_head, head_of
from engine.step.layout import Microbatch
from engine.step.logprobs import SpanLoss, VocabularyShard, chunked_head, sum_by_response
from engine.step.token_needs import NO_NEEDS, ReferenceHead, TokenNeeds, plain_token_columns


def run_head(
    model: PreTrainedModel, batch: Microbatch, span_loss: SpanLoss | None = None, needs: TokenNeeds = NO_NEEDS
) -> tuple[Tensor, Tensor]:
    """Run model and LM head over batch once.

    Sharded models gather their weights for it.

    Args:
        batch: on the device of the model's head.
        span_loss: called on spans, which together cover the batch. None: no loss and no gradient.
        needs: columns for span_loss.

    Returns:
        the loss (0 without a span_loss), a scalar to call backward on, and the detached log-prob of each target,
        [targets]; of a score head the score of each response, [responses], or without their last tokens the value at
        each target, [targets]. Both are fp32, or fp64 for a model in fp64.
    """
    run = getattr(model, "run_sharded", partial(run_unsharded_head, model))
    return run(batch, span_loss, needs)


def run_reference(model: PreTrainedModel, batch: Microbatch) -> ReferenceHead | Tensor:
    """The distributions of a reference at the targets of batch, for TokenNeeds.

    Sharded models gather their weights for it. The head of the result is at hand inside of head_at_hand() alone.
    """
    run = getattr(model, "run_sharded_reference", partial(run_unsharded_reference, model))
    return run(batch)


def head_at_hand(model: PreTrainedModel) -> AbstractContextManager[None]:
    """Keep the LM head at hand after a forward pass, until the end of a with block."""
    return getattr(model, "head_at_hand", nullcontext)()


def response_logps(model: PreTrainedModel, batch: Microbatch) -> Tensor:
    """Sums of the log-probs of each response's tokens, [responses], detached."""
    return sum_by_response(run_head(model, batch)[1], batch.response_lengths)


def run_unsharded_head(
    model: PreTrainedModel, batch: Microbatch, span_loss: SpanLoss | None = None, needs: TokenNeeds = NO_NEEDS
) -> tuple[Tensor, Tensor]:
    """run_head() for a model with its weights at hand."""
    if has_score_head(model):
        return _run_score_head(model, batch, span_loss)
    if batch.attention_mask is not None:  # padded: logits of the model, and a plain log-softmax
        logps, columns = plain_token_columns(_padded_logits(model, batch), batch.targets, needs)
        loss = logps.new_zeros(()) if span_loss is None else span_loss(logps, batch.span, **columns)
        return loss, logps.detach()
    head = model.get_output_embeddings()
    hidden = _packed_hidden(model, batch)
    weight, bias, shard = _head_shard(head)
    if needs.temperature != 1:
        hidden, bias = hidden / needs.temperature, None if bias is None else bias / needs.temperature
    return chunked_head(hidden, weight, bias, batch, span_loss, shard, low_weight(head, hidden.dtype), needs)


def run_unsharded_reference(model: PreTrainedModel, batch: Microbatch) -> ReferenceHead | Tensor:
    """run_reference() for a model with its weights at hand."""
    if batch.attention_mask is not None:
        return _padded_logits(model, batch)
    head = model.get_output_embeddings()
    hidden = _packed_hidden(model, batch)
    weight, bias, _ = _head_shard(head)
    return ReferenceHead(hidden[batch.predict_index], weight, bias, low_weight(head, hidden.dtype))


def _padded_logits(model: PreTrainedModel, batch: Microbatch) -> Tensor:
    """Logits of padded rows at the targets, [targets, vocabulary]."""
    head = model.get_output_embeddings()
    with head.register_forward_pre_hook(lambda head, inputs: (inputs[0].to(head.weight.dtype),)):
        logits = model(batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits
    return logits.flatten(0, 1)[batch.predict_index]


def _packed_hidden(model: PreTrainedModel, batch: Microbatch) -> Tensor:
    """Hidden states of a packed row, [tokens, hidden size], on the device of the LM head."""
    hidden = model.base_model(
        batch.input_ids, position_ids=batch.position_ids, segments=batch.segments, use_cache=False
    ).last_hidden_state
    # With layers split among GPUs, the last layer may be on another device than head and batch.
    return hidden[0].to(model.get_output_embeddings().weight.device)


def _run_score_head(model: PreTrainedModel, batch: Microbatch, span_loss: SpanLoss | None) -> tuple[Tensor, Tensor]:
    """run_head() for a score head. Its products are few, so autograd serves."""
    layout: dict[str, Any] = {"attention_mask": batch.attention_mask}
    if batch.attention_mask is None:
        layout = {"position_ids": batch.position_ids, "segments": batch.segments}
    hidden = model.base_model(batch.input_ids, **layout, use_cache=False).last_hidden_state.flatten(0, 1)
    head = head_of(model)
    index = batch.predict_index if batch.score_index is None else batch.score_index
    scores = head(hidden.to(index.device)[index].to(head.weight.dtype)).squeeze(-1)  # [targets] or [responses]
    loss = scores.new_zeros(()) if span_loss is None else span_loss(scores, batch.span)
    return loss, scores.detach()


def _head_shard(head: nn.Module) -> tuple[Tensor, Tensor | None, VocabularyShard | None]:
    """This rank's weight, bias and vocabulary slice of the LM head."""
    if not isinstance(head.weight, DTensor):
        return head.weight, head.bias, None  # type: ignore[return-value]
    mesh = head.weight.device_mesh
    largest = -(-len(head.weight) // mesh.size())
    shard = VocabularyShard(mesh.get_group(), largest * mesh.get_local_rank(), largest)
    return head.weight.to_local(), None if head.bias is None else head.bias.to_local(), shard  # type: ignore
