"""A tokenizer trained on the texts that a model will be trained on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from fourfold.errors import ConfigError

END_OF_TEXT = "<|endoftext|>"
SMALLEST_BPE = 257
"""Every byte, and the end of a text."""


def train_bpe(texts: Iterable[str], vocabulary: int) -> Tokenizer:
    """Byte-level BPE with single digits, of exactly so many ids; id 0 is the end of a text.
    ConfigError where the texts give fewer."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if (got := tokenizer.get_vocab_size()) != vocabulary:
        raise ConfigError(f"the texts give only {got} of {vocabulary} ids; set --train-bpe {got}")
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, end_of_text: str | None, folder: Path) -> None:
    """Writes what transformers and `fourfold serve` load beside a checkpoint."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": False}
    if end_of_text is not None:
        config["eos_token"] = end_of_text
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    tokenizer.save(str(folder / "tokenizer.json"))


def fingerprint(tokenizer: Tokenizer) -> str:
    """SHA-256 of a tokenizer as `save_tokenizer` writes it."""
    return hashlib.sha256(tokenizer.to_str(pretty=True).encode()).hexdigest()
