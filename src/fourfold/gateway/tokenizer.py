"""Text to tokens and back, and the marks that a model's conversations need.

The `tokenizers` library does the work. A Hugging Face directory brings a tokenizer.json; a GGUF
file brings vocabulary and merges, from which the same tokenizer is built; anything older goes
through transformers' converters.
"""

from __future__ import annotations

import bisect
import dataclasses
import functools
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any

import msgspec
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend

from fourfold.errors import CheckpointError
from fourfold.models.checkpoint.config_json import read_config_json
from fourfold.models.checkpoint.source import Source, SourceKind
from fourfold.models.config import ConfigReader, read_vocabulary

_QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_CONTROL, _USER_DEFINED = 3, 4
_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt")
"""At least one of which is where there is a tokenizer."""
_MARK = re.compile(r"<[|\uff5c].+[|\uff5c]>", re.DOTALL)


class _Mark(msgspec.Struct):
    """A special token in tokenizer_config.json, as far as its text goes."""

    content: str


class _Template(msgspec.Struct):
    """One of several chat templates there."""

    name: str
    template: str


_TEMPLATES = str | list[_Template] | None
_TokenId = Annotated[int, msgspec.Meta(ge=0, lt=1 << 31)]
_ENDS = _TokenId | list[_TokenId] | None


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """A model's tokenizer with its chat template (None: the model has none) and end-of-text ids.

    `specials` are the named marks a chat template may use (`bos_token`, `eos_token`, ...).
    """

    backend: Backend
    chat_template: str | None
    specials: dict[str, str]
    eos_token_ids: tuple[int, ...]

    def encode(
        self, text: str, *, add_special_tokens: bool, quoted: Sequence[int] = ()
    ) -> list[int]:
        """Token ids of a text; `add_special_tokens` adds what the model wants before plain text.
        Where one of `marks` begins at a place in `quoted`, ascending, it is spelled out as text."""
        encoding = self.backend.encode(text, add_special_tokens=add_special_tokens)
        if not quoted:
            return list(encoding.ids)
        ids: list[int] = []
        for token, (start, end) in zip(encoding.ids, encoding.offsets, strict=True):
            place = bisect.bisect_left(quoted, start)
            if token in self.marks and place < len(quoted) and quoted[place] < end:
                ids += self._spelled(text[start:end])
            else:
                ids.append(token)
        return ids

    def decode(self, ids: list[int], *, skip_special_tokens: bool = True) -> str:
        return str(self.backend.decode(ids, skip_special_tokens=skip_special_tokens))

    def token_bytes(self, token: int) -> bytes:
        """The exact bytes a token stands for; special tokens stand for their own name."""
        piece = self.backend.id_to_token(token)
        if piece is None:
            return b""
        if token in self._added:
            return piece.encode()
        if isinstance(self.backend.decoder, decoders.ByteLevel):
            table = _byte_of_character()
            return bytes(table[character] for character in piece if character in table)
        if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
            return bytes([int(piece[3:5], 16)])
        return piece.replace("\u2581", " ").encode()

    def ending_with(self, eos_token_ids: Iterable[int]) -> Tokenizer:
        """The same with further end-of-text ids, those that a model's configuration names."""
        ends = sorted({*self.eos_token_ids, *eos_token_ids})
        return dataclasses.replace(self, eos_token_ids=tuple(ends))

    def is_special(self, token: int) -> bool:
        """Whether a token is a mark that has no text."""
        return self._added.get(token, False)

    @functools.cached_property
    def marks(self) -> dict[int, str]:
        """The names of tokens that are no text: the special ones, and others that are written as
        such, as are the marks of turns in some tokenizers."""
        added = self.backend.get_added_tokens_decoder()
        return {
            token: entry.content
            for token, entry in added.items()
            if entry.special or _MARK.fullmatch(entry.content)
        }

    def _spelled(self, text: str) -> list[int]:
        """Token ids of a text in which nothing is looked for but text."""
        backend = self.backend
        if backend.normalizer is not None:
            text = backend.normalizer.normalize_str(text)
        words = [text]
        if backend.pre_tokenizer is not None:
            words = [word for word, _ in backend.pre_tokenizer.pre_tokenize_str(text)]
        ids = [token.id for word in words for token in backend.model.tokenize(word)]
        if self.marks.keys().isdisjoint(ids):
            return ids
        letters = (backend.model.tokenize(letter) for word in words for letter in word)
        return [token.id for of_letter in letters for token in of_letter]

    @functools.cached_property
    def _added(self) -> dict[int, bool]:
        """Tokens added to the vocabulary, and whether each is special."""
        added = self.backend.get_added_tokens_decoder()
        return {token: entry.special for token, entry in added.items()}


def load_tokenizer(source: Source, *, dummy: bool = False) -> Tokenizer:
    """The tokenizer of a checkpoint, with the ends of text that its own files name. For `dummy`
    weights, which make no sense in any language, a folder need not have one: each id is a word."""
    if source.kind is not SourceKind.DIRECTORY:
        return _from_gguf(source.path)
    if dummy and not any((source.path / name).exists() for name in _FILES):
        return _numbered(source.path)
    return _from_directory(source.path)


def _numbered(path: Path) -> Tokenizer:
    vocabulary = read_vocabulary(ConfigReader(read_config_json(path), str(path)))
    ids = {f"<{number}>": number for number in range(vocabulary)}
    backend = Backend(models.WordLevel(ids, unk_token="<0>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return Tokenizer(backend, None, {}, ())


def _from_directory(path: Path) -> Tokenizer:
    file = path / "tokenizer.json"
    backend = _read_backend(file) if file.is_file() else _converted(path)
    # Some files carry the settings of a training run, which would cut or pad prompts.
    backend.no_truncation()
    backend.no_padding()
    file = path / "tokenizer_config.json"
    config = _read_json(file)
    specials = {
        name: mark if isinstance(mark, str) else mark.content
        for name, value in config.items()
        if name.endswith("_token") and isinstance(value, str | dict)
        for mark in [_field(file, name, value, str | _Mark)]
    }
    template = _field(file, "chat_template", config.get("chat_template"), _TEMPLATES)
    if isinstance(template, list):  # several named ones: the default is meant
        template = next((each.template for each in template if each.name == "default"), None)
    jinja = path / "chat_template.jinja"
    if jinja.is_file():
        template = _read_text(jinja)
    file = path / "generation_config.json"
    named = _field(file, "eos_token_id", _read_json(file).get("eos_token_id"), _ENDS)
    ends = set(named if isinstance(named, list) else [] if named is None else [named])
    end = backend.token_to_id(specials.get("eos_token", ""))
    if end is not None:
        ends.add(end)
    return Tokenizer(backend, template, specials, tuple(sorted(ends)))


def _read_backend(file: Path) -> Backend:
    try:
        return Backend.from_file(str(file))
    except Exception as error:  # the library raises nothing more exact
        raise CheckpointError(f"{file} is not a readable tokenizer ({error})") from error


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        fields = json.loads(_read_text(path))
    except ValueError as error:
        raise CheckpointError(f"{path} is not readable JSON ({error})") from error
    return fields if isinstance(fields, dict) else {}


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path} is not UTF-8 ({error})") from error


def _field(file: Path, name: str, value: Any, kind: Any) -> Any:
    """A field's value as `kind`. Raises `CheckpointError` for any other."""
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        raise CheckpointError(f"{file}: {name} cannot be read ({error}); mend the file") from error


def _converted(path: Path) -> Backend:
    try:
        from transformers import AutoTokenizer
    except ModuleNotFoundError:
        raise CheckpointError(
            f"{path} has no tokenizer.json; add it, or have one made of its other files: "
            "pip install 'fourfold[transformers]'"
        ) from None
    try:
        backend: Backend = AutoTokenizer.from_pretrained(path).backend_tokenizer
    except (OSError, ValueError, AttributeError, KeyError, ImportError) as error:
        raise CheckpointError(
            f"{path} has no tokenizer that can be read ({str(error).splitlines()[0]}); "
            "add its tokenizer.json"
        ) from error
    # What is made where there are no words has marks alone.
    if backend.get_vocab_size() <= len(backend.get_added_tokens_decoder()):
        raise CheckpointError(f"{path} has no tokenizer; add its tokenizer.json")
    return backend


def _from_gguf(path: Path) -> Tokenizer:
    from fourfold.models.checkpoint.gguf_metadata import read_gguf, read_value

    reader = read_gguf(path)

    def value(key: str) -> Any:
        return read_value(reader, f"tokenizer.{key}")

    if value("ggml.model") != "gpt2":
        raise CheckpointError(
            f"{path}: GGUF tokenizer {value('ggml.model')!r} is not supported (only gpt2); "
            "use the Hugging Face checkpoint"
        )
    tokens: list[str] = value("ggml.tokens")
    if not tokens or not value("ggml.merges"):
        raise CheckpointError(f"{path} lacks its tokens or merges; use another conversion of it")
    merges = [tuple(merge.split(" ", 1)) for merge in value("ggml.merges")]
    ids = {token: index for index, token in enumerate(tokens)}
    split = str(value("ggml.pre") or "default")
    llama3 = split == "llama-bpe"  # takes a word that is a token whole, and begins with its mark
    backend = Backend(models.BPE(vocab=ids, merges=merges, ignore_merges=llama3))
    _split_as(backend, split, path)
    backend.decoder = decoders.ByteLevel()
    kinds = value("ggml.token_type") or []
    added = [(t, k) for t, k in zip(tokens, kinds, strict=True) if k in (_CONTROL, _USER_DEFINED)]
    backend.add_special_tokens([AddedToken(t, normalized=False) for t, k in added if k == _CONTROL])
    backend.add_tokens([AddedToken(t, normalized=False) for t, k in added if k == _USER_DEFINED])
    specials = {
        f"{name}_token": tokens[token]
        for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))
        if (token := value(f"ggml.{key}_token_id")) is not None
    }
    add_bos = value("ggml.add_bos_token")
    if "bos_token" in specials and (llama3 if add_bos is None else add_bos):
        bos = specials["bos_token"]
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, ids[bos])]
        )
    ends = {token for key in ("eos", "eot") if (token := value(f"ggml.{key}_token_id")) is not None}
    return Tokenizer(backend, value("chat_template"), specials, tuple(sorted(ends)))


def _split_as(backend: Backend, name: str, path: Path) -> None:
    """Sets how text is cut before merging, by the name GGUF has for it."""
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    if name in ("smollm", "default", "gpt-2", "olmo"):
        regex = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        digits = pre_tokenizers.Digits(individual_digits=True)
        backend.pre_tokenizer = (
            pre_tokenizers.Sequence([digits, regex]) if name == "smollm" else regex
        )
    elif name in ("qwen2", "llama-bpe"):
        pattern = Regex(_QWEN2 if name == "qwen2" else _LLAMA3)
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Split(pattern, behavior="isolated"), byte_level]
        )
        if name == "qwen2":
            backend.normalizer = normalizers.NFC()
    else:
        raise CheckpointError(
            f"{path}: GGUF pre-tokenizer {name!r} is not supported (smollm, default, gpt-2, olmo, "
            "qwen2, llama-bpe); use the Hugging Face checkpoint"
        )


@functools.cache
def _byte_of_character() -> dict[str, int]:
    """GPT-2's printable stand-ins for bytes, reversed."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    table = {chr(byte): byte for byte in printable}
    table.update({chr(256 + index): byte for index, byte in enumerate(others)})
    return table
