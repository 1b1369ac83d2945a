"""What the gateway's tests share."""

from __future__ import annotations

import pytest

from fourfold.gateway.tokenizer import Tokenizer
from tests.cpu.gateway import made_tokenizers


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """The byte-level tokenizer that fits the tiny checkpoints."""
    return made_tokenizers.load(made_tokenizers.write_default(tmp_path_factory.mktemp("words")))
