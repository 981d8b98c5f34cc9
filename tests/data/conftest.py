"""Tokenizers shared by the tests of data."""

import pytest
from transformers import PreTrainedTokenizerFast

from tests.data.samples import CHATML, byte_tokenizer


@pytest.fixture(scope="session")
def plain() -> PreTrainedTokenizerFast:
    return byte_tokenizer()


@pytest.fixture(scope="session")
def with_bos() -> PreTrainedTokenizerFast:
    return byte_tokenizer("<s> $A")


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer(chat_template=CHATML)
