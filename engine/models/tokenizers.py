"""Tokenizers: from the hub, a directory, or the embedded one."""

from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from engine.data.chat_templates import without_end
from engine.models.archives import find_checkpoint
from engine.models.loading import loading_error
from engine.settings.schema import ModelSettings
from utils import UserError

EMBEDDED_TOKENIZER = "films"
END_OF_TEXT = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>")


def load_tokenizer(settings: ModelSettings) -> PreTrainedTokenizerBase:
    """Load the tokenizer of config.model, with a padding token.

    Raises:
        UserError: CONFIG, if it cannot be loaded or has no end-of-text token.
    """
    key = "model.name_or_path" if settings.tokenizer_name_or_path is None else "model.tokenizer_name_or_path"
    name = settings.tokenizer_name_or_path or settings.name_or_path
    if settings.architecture is not None and settings.tokenizer_name_or_path is None:
        key, name = "model.archive", _tokenizer_of_archive(settings)
    if name == EMBEDDED_TOKENIZER:
        from engine.data.films import film_tokenizer

        tokenizer: PreTrainedTokenizerBase = film_tokenizer()
    else:
        try:
            tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=settings.trust_remote_code)
        except Exception as error:  # damaged files raise nearly anything
            raise loading_error("tokenizer", key, name, error) from error
    tokenizer.chat_template = without_end(tokenizer.chat_template)  # of a reward model: responses get their EOS here
    if tokenizer.eos_token_id is None:  # a tokenizer.json alone does not name it
        vocabulary = tokenizer.get_vocab()
        known = next((token for token in END_OF_TEXT if token in vocabulary), None)
        if known is None:
            raise UserError(
                "CONFIG",
                f"model.tokenizer_name_or_path: the tokenizer {name} has no end-of-text token",
                "name it as eos_token in the tokenizer_config.json beside its tokenizer.json",
            )
        print(f"tokenizer: {name} names no end-of-text token; using {known}")
        tokenizer.add_special_tokens({"eos_token": known})
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _tokenizer_of_archive(settings: ModelSettings) -> str:
    """Where the tokenizer of a model made here is: beside its weights."""
    if settings.archive is None:
        problem = "model.tokenizer_name_or_path: a new model needs a tokenizer"
        raise UserError(
            "CONFIG", problem, "name one, or train one on the text of loss=pretrain by tokenizer.train=8192"
        )
    archive = Path(settings.archive)
    if archive.is_file():
        return str(archive.parent)
    if not (archive / "config.json").exists():  # a run directory
        archive = find_checkpoint(archive, "model.archive") or archive
    return str(archive)
