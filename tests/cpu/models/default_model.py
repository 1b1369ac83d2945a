"""The embedded default model, loaded once for all tests that ask it something."""

from __future__ import annotations

import functools

import pytest

from fourfold.errors import CheckpointError
from fourfold.gateway.tokenizer import Tokenizer, load_tokenizer
from fourfold.models.checkpoint.source import Source, SourceKind, find_source
from fourfold.models.decoder import Decoder
from fourfold.models.loading import LoadOptions, load_model
from fourfold.models.precision import Precision


def source() -> Source:
    try:
        return find_source(None)
    except CheckpointError as error:
        pytest.skip(str(error))


@functools.cache
def tokenizer() -> Tokenizer:
    return load_tokenizer(source())


@functools.cache
def upcycled(precision: Precision = Precision.FLOAT32) -> Decoder:
    """As it is served by default: a mixture of experts made from the dense file."""
    return load_model(source(), LoadOptions(precision=precision))


@functools.cache
def dense() -> Decoder:
    """The same file served as what it is."""
    file = source()
    plain = Source(SourceKind.GGUF, file.path, file.path.stem)
    return load_model(plain, LoadOptions(precision=Precision.FLOAT32))
