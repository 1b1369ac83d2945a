"""Small tokenizers of the two kinds there are, written by the `tokenizers` library itself.

Both fit the tiny checkpoints: 320 ids, of which 1 begins a text and 2 ends it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import (
    AddedToken,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)
from tokenizers import Tokenizer as Backend

from fourfold.gateway.tokenizer import Tokenizer, load_tokenizer
from fourfold.models.checkpoint.source import Source, SourceKind

PAD, BOS, EOS = 0, 1, 2
VOCABULARY = 320
TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
_SPECIALS = ["<|pad|>", "<|bos|>", "<|eos|>"]
_MERGES = "Ġ t|h e|i n|e r|a n|r e|o n|a t|Ġ a|Ġ s|Ġt he|e n|Ð ¼|ð Ł|ðŁ ĺ|Ġ ðŁ|Ĥ ã"


def byte_level(*, add_bos: bool = False) -> Backend:
    """Byte-level BPE as GPT-2, Llama 3 and Qwen have it; one token joins two halves of characters
    (the end of one, the beginning of the next), as large vocabularies do."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [tuple(merge.split(" ")) for merge in _MERGES.split("|")]
    pieces = [*_SPECIALS, *alphabet, *("".join(merge) for merge in merges)]
    pieces += [f"<|unused{index}|>" for index in range(VOCABULARY - len(pieces))]
    backend = Backend(models.BPE({piece: i for i, piece in enumerate(pieces)}, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(name, normalized=False) for name in _SPECIALS])
    if add_bos:
        backend.post_processor = processors.TemplateProcessing(
            single="<|bos|> $A", special_tokens=[("<|bos|>", BOS)]
        )
    return backend


def byte_fallback() -> Backend:
    """SentencePiece BPE as Llama 2 and Mixtral have it: spaces are characters of their own, the
    first one is dropped, and characters without a token are spelled in bytes."""
    letters = "\u2581abcdefghijklmnopqrstuvwxyzP.,!?é"
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *letters]
    merges = [("\u2581", "w"), ("o", "r"), ("l", "d"), ("or", "ld"), ("\u2581w", "orld")]
    pieces += ["".join(merge) for merge in merges]
    ids = {piece: index for index, piece in enumerate(pieces)}
    backend = Backend(models.BPE(ids, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", BOS)]
    )
    backend.add_special_tokens(
        [AddedToken(name, normalized=False) for name in ("<unk>", "<s>", "</s>")]
    )
    return backend


def write(path: Path, backend: Backend, **config: Any) -> Path:
    """Puts a tokenizer into a checkpoint's folder; `config` goes into tokenizer_config.json."""
    path.mkdir(parents=True, exist_ok=True)
    backend.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    return path


def load(path: Path, eos_token_ids: tuple[int, ...] = ()) -> Tokenizer:
    tokenizer = load_tokenizer(Source(SourceKind.DIRECTORY, path, path.name))
    return tokenizer.ending_with(eos_token_ids)


def write_default(path: Path) -> Path:
    """The tokenizer that a tiny checkpoint is served with."""
    return write(path, byte_level(), chat_template=TEMPLATE, eos_token="<|eos|>")
