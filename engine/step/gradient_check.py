"""Find trained parameters without a gradient."""

from torch import nn

from utils import UserError


def check_gradients(model: nn.Module) -> None:
    """Raise a UserError if trained parameters have no gradient after a backward pass."""
    without = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    if without:
        shown = ", ".join(without[:5]) + (f" and {len(without) - 5} more" if len(without) > 5 else "")
        problem = f"model: {len(without)} parameters received no gradient: {shown}"
        raise UserError("CONFIG", problem, "use a model without them")
