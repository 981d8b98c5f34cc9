"""Heads: outputs of a model at the positions of a microbatch.

The language-model head gives the log-prob of each target token. It is the only head today. A response's last token
predicts nothing, so the layout does not feed it.
"""

from functools import partial

from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from engine.models.precision import low_weight
from engine.step.layout import Microbatch
from engine.step.logprobs import SpanLoss, VocabularyShard, chunked_head, plain_token_logps, sum_by_response


def run_head(model: PreTrainedModel, batch: Microbatch, span_loss: SpanLoss | None = None) -> tuple[Tensor, Tensor]:
    """Run model and LM head over batch once.

    Sharded models gather their weights for it.

    Args:
        batch: on the device of the model's LM head.
        span_loss: called on spans, which together cover the batch. None: no loss and no gradient.

    Returns:
        the loss (0 without a span_loss), a scalar to call backward on, and the detached log-prob of each target,
        [targets]. Both are fp32, or fp64 for a model in fp64.
    """
    run = getattr(model, "run_sharded", partial(run_unsharded_head, model))
    return run(batch, span_loss)


def response_logps(model: PreTrainedModel, batch: Microbatch) -> Tensor:
    """Sums of the log-probs of each response's tokens, [responses], detached."""
    return sum_by_response(run_head(model, batch)[1], batch.response_lengths)


def run_unsharded_head(
    model: PreTrainedModel, batch: Microbatch, span_loss: SpanLoss | None = None
) -> tuple[Tensor, Tensor]:
    """run_head() for a model with its weights at hand."""
    if batch.attention_mask is not None:  # padded: logits of the model, and a plain log-softmax
        head = model.get_output_embeddings()
        with head.register_forward_pre_hook(lambda head, inputs: (inputs[0].to(head.weight.dtype),)):
            logits = model(batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits
        logps = plain_token_logps(logits.flatten(0, 1)[batch.predict_index], batch.targets)
        loss = logps.new_zeros(()) if span_loss is None else span_loss(logps, batch.span)
        return loss, logps.detach()
    hidden = model.base_model(
        batch.input_ids, position_ids=batch.position_ids, segments=batch.segments, use_cache=False
    ).last_hidden_state
    head = model.get_output_embeddings()
    weight, bias, shard = _head_shard(head)
    # With layers split among GPUs, the last layer may be on another device than head and batch.
    hidden = hidden[0].to(weight.device)
    return chunked_head(hidden, weight, bias, batch, span_loss, shard, low_weight(head, hidden.dtype))


def _head_shard(head: nn.Module) -> tuple[Tensor, Tensor | None, VocabularyShard | None]:
    """This rank's weight, bias and vocabulary slice of the LM head."""
    if not isinstance(head.weight, DTensor):
        return head.weight, head.bias, None  # type: ignore[return-value]
    mesh = head.weight.device_mesh
    largest = -(-len(head.weight) // mesh.size())
    shard = VocabularyShard(mesh.get_group(), largest * mesh.get_local_rank(), largest)
    return head.weight.to_local(), None if head.bias is None else head.bias.to_local(), shard  # type: ignore
