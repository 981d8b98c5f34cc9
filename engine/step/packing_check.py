"""Switch a model to packed attention, and check its log-probs or scores."""

from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedModel

from engine.data.examples import Example
from engine.models.precision import run_in_dtype
from engine.models.score_head import has_score_head, head_of
from engine.step.attention import register_packed_attention
from engine.step.heads import response_logps, run_head
from engine.step.layout import lay_out
from utils import UserError, clipped, is_out_of_memory


def tolerance_of(dtype: torch.dtype) -> float:
    """The relative difference of equal log-probs computed in two ways, with products in dtype."""
    if dtype == torch.float32:  # TF32 has two more bits than bf16
        return {"highest": 1e-4, "high": 0.005, "medium": 0.02}[torch.get_float32_matmul_precision()]
    return 1e-9 if dtype == torch.float64 else 0.02


def _outputs(model: PreTrainedModel, dtype: torch.dtype | None, examples: list[Example], layout: str) -> Tensor:
    """The log-prob or score of each response, [responses]."""
    gives_scores = has_score_head(model)
    batch = lay_out(examples, layout, feeds_last_token=gives_scores).to(head_of(model).weight.device)
    with run_in_dtype(model, dtype):
        return run_head(model, batch)[1] if gives_scores else response_logps(model, batch)


@torch.no_grad()
def use_packed_attention(
    model: PreTrainedModel, mixed_precision: torch.dtype | None = None, products: torch.dtype | None = None
) -> None:
    """Switch model to packed attention, and compare its log-probs or scores with those before.

    The check runs the model over a few tokens, packed and padded. It catches models that packing would break:
    - attention without a replacement hook
    - state across examples (Mamba)
    - position biases
    - scaled or capped logits after the head

    Args:
        mixed_precision: dtype of forward passes; None for the dtype of the weights.
        products: dtype of some matrix products; None for the same.

    Raises:
        UserError: CONFIG, naming batching=padded; NONFINITE for weights that give NaN or Inf.
    """
    register_packed_attention()
    name = type(model).__name__
    fix = "batching=padded"
    vocabulary = model.get_input_embeddings().weight.shape[0]
    tokens = torch.randint(vocabulary, (40,), generator=torch.Generator().manual_seed(0)).numpy().astype("int32")
    example = Example(tokens[:7], (tokens[7:12], tokens[12:20]), 0)
    changed = Example(example.prompt, (example.responses[0], (example.responses[1] + 1) % vocabulary), 0)
    other = Example(tokens[20:24], (tokens[24:29], tokens[29:40]), 1)
    kind = "scores" if has_score_head(model) else "log-probs"
    run = partial(_outputs, model, mixed_precision)
    model.original_attention = model.config._attn_implementation  # for sampling
    try:
        padded = run([example, other], "padded")
    except Exception as error:
        if is_out_of_memory(error):
            raise
        problem = f"model.architecture: {name} does not run ({type(error).__name__}: {clipped(str(error), 500)})"
        raise UserError("CONFIG", problem, "give consistent values, or another model") from error
    if not padded.isfinite().all():
        problem = f"the {kind} of {name} are NaN or Inf before training"
        raise UserError("NONFINITE", problem, "give weights without NaN and Inf, or a wider dtype")
    try:
        model.set_attn_implementation("packed")
        packed, packed_changed = (run([first, other], "packed") for first in (example, changed))
    except Exception as error:  # models raise nearly anything for unknown keywords or attention
        if is_out_of_memory(error):
            raise
        raise UserError("CONFIG", f"{name} does not run with batching=packed ({error})", fix) from error
    if model.config._attn_implementation != "packed":
        raise UserError("CONFIG", f"batching=packed cannot replace the attention of {name}", fix)
    tolerance = tolerance_of(products or mixed_precision or model.dtype) * (5 if kind == "scores" else 1)  # not a sum
    scale = padded.abs().max() if kind == "scores" else padded.abs()  # a score may be near 0
    difference = ((packed - padded) / scale).abs().max().item()
    unchanged = [0, 2, 3]  # all responses but the changed one
    leak = ((packed - packed_changed) / scale)[unchanged].abs().max().item()
    if not (difference <= tolerance and leak <= tolerance / 100):
        worst = max(difference, leak)
        raise UserError("CONFIG", f"{kind} of {name} change with batching=packed (off by {worst:.1%})", fix)
