"""The error for models outside llama.cpp's reach."""


class UnsupportedModel(ValueError):
    """llama.cpp cannot represent a model; the message gives the reason."""


def require(condition: bool, problem: str) -> None:
    """Raise UnsupportedModel with the problem unless the condition holds."""
    if not condition:
        raise UnsupportedModel(problem)
