"""Switch a model's attention implementation temporarily."""

from collections.abc import Iterator
from contextlib import contextmanager

from transformers import PreTrainedModel


@contextmanager
def attention_of(model: PreTrainedModel, name: str) -> Iterator[None]:
    """Run model with another attention in a with block, such as sdpa."""
    original = model.config._attn_implementation
    if name == original:
        yield
        return
    model.set_attn_implementation(name)
    try:
        yield
    finally:
        model.set_attn_implementation(original)
