"""Tokenizers from a checkpoint's folder and from GGUF files of several kinds."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import gguf
import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers

from fourfold.errors import CheckpointError
from fourfold.gateway.tokenizer import load_tokenizer
from fourfold.models.checkpoint.source import Source, SourceKind
from tests.cpu.gateway.made_tokenizers import BOS, EOS, byte_fallback, byte_level, load, write


def test_text_comes_back_from_a_byte_level_folder(tmp_path: Path) -> None:
    tokenizer = load(write(tmp_path, byte_level()))
    text = "the  rain in 漢字\n😀 \x00\x07"
    ids = tokenizer.encode(text, add_special_tokens=True)
    assert tokenizer.decode(ids) == text
    assert b"".join(map(tokenizer.token_bytes, ids)) == text.encode()
    assert tokenizer.chat_template is None
    assert tokenizer.eos_token_ids == ()


def test_text_comes_back_from_a_byte_fallback_folder(tmp_path: Path) -> None:
    tokenizer = load(write(tmp_path, byte_fallback()))
    ids = tokenizer.encode("hello world 漢!", add_special_tokens=True)
    assert ids[0] == BOS
    assert tokenizer.decode(ids) == "hello world 漢!"
    assert b"".join(map(tokenizer.token_bytes, ids[1:])) == " hello world 漢!".encode()


def test_the_post_processor_adds_the_beginning_only_where_asked(tmp_path: Path) -> None:
    tokenizer = load(write(tmp_path, byte_level(add_bos=True)))
    plain = tokenizer.encode("a", add_special_tokens=False)
    assert tokenizer.encode("a", add_special_tokens=True) == [BOS, *plain]


@pytest.mark.parametrize(
    ("config", "file", "wanted"),
    [
        ({"chat_template": "one"}, None, "one"),
        ({}, "file", "file"),
        ({"chat_template": "one"}, "file", "file"),  # as transformers prefers
        (
            {
                "chat_template": [
                    {"name": "tool_use", "template": "tools"},
                    {"name": "default", "template": "plain"},
                ]
            },
            None,
            "plain",
        ),
        ({"chat_template": [{"name": "rag", "template": "r"}]}, None, None),
        ({}, None, None),
    ],
)
def test_where_the_chat_template_is(
    tmp_path: Path, config: dict[str, Any], file: str | None, wanted: str | None
) -> None:
    write(tmp_path, byte_level(), **config)
    if file is not None:
        (tmp_path / "chat_template.jinja").write_text(file)
    assert load(tmp_path).chat_template == wanted


@pytest.mark.parametrize(
    ("eos", "generation", "config_ids", "wanted"),
    [
        ("<|eos|>", None, (), (EOS,)),
        ({"content": "<|eos|>", "lstrip": False}, None, (), (EOS,)),
        (None, {"eos_token_id": [7, 5]}, (), (5, 7)),
        (None, {"eos_token_id": 9}, (), (9,)),
        ("<|eos|>", {"eos_token_id": [EOS, 9]}, (4,), (EOS, 4, 9)),
        ("<|no such|>", {"eos_token_id": None}, (4,), (4,)),
    ],
)
def test_every_file_that_names_an_end_of_text_is_heard(
    tmp_path: Path,
    eos: Any,
    generation: dict[str, Any] | None,
    config_ids: tuple[int, ...],
    wanted: tuple[int, ...],
) -> None:
    write(tmp_path, byte_level(), eos_token=eos)
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    assert load(tmp_path, config_ids).eos_token_ids == tuple(sorted(wanted))


def test_marks_are_named_for_templates(tmp_path: Path) -> None:
    write(tmp_path, byte_level(), bos_token={"content": "<|bos|>"}, eos_token="<|eos|>", x=1)
    assert load(tmp_path).specials == {"bos_token": "<|bos|>", "eos_token": "<|eos|>"}


def test_a_prompt_is_never_cut_or_padded(tmp_path: Path) -> None:
    """Some tokenizer.json keep the settings of the training run; transformers ignores them too."""
    backend = byte_level()
    backend.enable_truncation(4)
    backend.enable_padding(length=8)
    tokenizer = load(write(tmp_path, backend))
    text = "a text of more than four tokens"
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=True)) == text
    assert len(tokenizer.encode("a", add_special_tokens=True)) == 1


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", "{"),
        ("tokenizer.json", '{"model": {"type": "Unheard"}}'),
        ("tokenizer_config.json", "{"),
        ("generation_config.json", "nonsense"),
        ("tokenizer_config.json", '{"chat_template": 5}'),
        ("tokenizer_config.json", '{"chat_template": [{"name": "default"}]}'),
        ("tokenizer_config.json", '{"chat_template": [5]}'),
        ("tokenizer_config.json", '{"eos_token": {"lstrip": false}}'),
        ("tokenizer_config.json", '{"eos_token": {"content": 5}}'),
        ("generation_config.json", '{"eos_token_id": "2"}'),
        ("generation_config.json", '{"eos_token_id": [null]}'),
        ("generation_config.json", '{"eos_token_id": -3}'),
        ("generation_config.json", '{"eos_token_id": 1.5}'),
        ("generation_config.json", f'{{"eos_token_id": {10**30}}}'),
    ],
)
def test_a_broken_file_is_named(tmp_path: Path, name: str, content: str) -> None:
    write(tmp_path, byte_level())
    (tmp_path / name).write_text(content)
    with pytest.raises(CheckpointError, match=name):
        load(tmp_path)


def test_a_template_that_is_no_text_is_named(tmp_path: Path) -> None:
    write(tmp_path, byte_level())
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(CheckpointError, match=r"chat_template.jinja is not UTF-8"):
        load(tmp_path)


def test_a_folder_without_tokenizer_says_so(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(CheckpointError, match=r"tokenizer\.json") as caught:
        load(tmp_path)
    assert "\n" not in str(caught.value)


def write_gguf(path: Path, backend: Backend, *, pre: str, merges: list[str], **more: Any) -> Source:
    vocabulary = backend.get_vocab()
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    marks = {added.content for added in backend.get_added_tokens_decoder().values()}
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model(more.pop("model", "gpt2"))
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in marks else 1 for token in tokens])
    writer.add_token_merges(merges)
    writer.add_eos_token_id(EOS)
    for name, value in more.items():
        getattr(writer, name)(value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return Source(SourceKind.GGUF, path, path.stem)


def merges_of(backend: Backend) -> list[str]:
    return [" ".join(pair) for pair in json.loads(backend.to_str())["model"]["merges"]]


def test_gguf_and_folder_agree(tmp_path: Path) -> None:
    backend = byte_level()
    source = write_gguf(
        tmp_path / "plain.gguf",
        backend,
        pre="gpt-2",
        merges=merges_of(backend),
        add_chat_template="hello",
        add_eot_token_id=77,
    )
    tokenizer, folder = load_tokenizer(source), load(write(tmp_path / "folder", backend))
    for text in ("the rain in the 漢字 123", "a<|eos|>b"):
        wanted = folder.encode(text, add_special_tokens=True)
        assert tokenizer.encode(text, add_special_tokens=True) == wanted
        assert tokenizer.decode(wanted) == folder.decode(wanted)
    assert tokenizer.chat_template == "hello"
    assert tokenizer.eos_token_ids == (EOS, 77)


def test_gguf_that_wants_a_beginning(tmp_path: Path) -> None:
    backend = byte_level()
    merges = merges_of(backend)
    more = {"add_bos_token_id": BOS, "add_add_bos_token": True}
    source = write_gguf(tmp_path / "bos.gguf", backend, pre="gpt-2", merges=merges, **more)
    tokenizer = load_tokenizer(source)
    plain = tokenizer.encode("a", add_special_tokens=False)
    assert tokenizer.encode("a", add_special_tokens=True) == [BOS, *plain]


@pytest.mark.parametrize(
    ("pre", "text", "cut"),
    [
        ("gpt-2", "x 1234\n\n y", ["x", " 1234", "\n\n", " y"]),
        ("smollm", "x 1234", ["x", " ", "1", "2", "3", "4"]),
        (
            "qwen2",
            "x 1234 (a)\n\nB'S",
            ["x", " ", "1", "2", "3", "4", " (", "a", ")\n\n", "B", "'S"],
        ),
        ("llama-bpe", "x 12345 !?\n", ["x", " ", "123", "45", " !?\n"]),
    ],
)
def test_how_text_is_cut_by_each_name(tmp_path: Path, pre: str, text: str, cut: list[str]) -> None:
    backend = byte_level()
    source = write_gguf(tmp_path / f"{pre}.gguf", backend, pre=pre, merges=merges_of(backend))
    pieces = load_tokenizer(source).backend.pre_tokenizer.pre_tokenize_str(text)
    assert [text[begin:end] for _, (begin, end) in pieces] == cut


def test_llama3_takes_whole_words_of_its_vocabulary_first(tmp_path: Path) -> None:
    """Its tokenizer.json says `ignore_merges`: a word in the vocabulary needs no merges to it."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = ["<a>", "<b>", "<c>", *alphabet, "ab", "bc", "abc"]
    backend = Backend(models.BPE({piece: i for i, piece in enumerate(pieces)}, []))
    source = write_gguf(tmp_path / "l3.gguf", backend, pre="llama-bpe", merges=["b c", "ab c"])
    tokenizer = load_tokenizer(source)
    ids = tokenizer.encode("abc", add_special_tokens=False)
    assert [tokenizer.token_bytes(token) for token in ids] == [b"abc"]


@pytest.mark.parametrize(
    ("model", "pre", "said"), [("gpt2", "viking", "viking"), ("t5", "gpt-2", "t5")]
)
def test_what_cannot_be_cut_is_refused(tmp_path: Path, model: str, pre: str, said: str) -> None:
    backend = byte_level()
    path = tmp_path / f"{said}.gguf"
    source = write_gguf(path, backend, pre=pre, merges=merges_of(backend), model=model)
    with pytest.raises(CheckpointError, match=said):
        load_tokenizer(source)


def test_a_folder_without_a_tokenizer_says_so(tmp_path: Path) -> None:
    """transformers makes one without words of the configuration of some families."""
    (tmp_path / "config.json").write_text('{"model_type": "qwen3_moe"}')
    with pytest.raises(CheckpointError, match=r"has no tokenizer; add its tokenizer\.json"):
        load_tokenizer(Source(SourceKind.DIRECTORY, tmp_path, "bare"))


def test_what_makes_a_tokenizer_of_other_files_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    (tmp_path / "config.json").write_text('{"model_type": "qwen3_moe"}')
    with pytest.raises(CheckpointError, match=r"add it, or .* 'fourfold\[transformers\]'"):
        load_tokenizer(Source(SourceKind.DIRECTORY, tmp_path, "bare"))


def test_a_shape_of_dummy_weights_needs_none(tmp_path: Path) -> None:
    shape = Path("benchmarks/shapes/qwen3-30b-a3b/config.json")
    (tmp_path / "config.json").write_text(shape.read_text())
    source = Source(SourceKind.DIRECTORY, tmp_path, "bare")
    tokenizer = load_tokenizer(source, dummy=True)
    assert tokenizer.backend.get_vocab_size() == 151_936
    assert tokenizer.encode("<7> hello <151935>", add_special_tokens=True) == [7, 0, 151_935]
    assert tokenizer.decode([151_935, 7]) == "<151935> <7>"
    write(tmp_path, byte_level())
    assert load_tokenizer(source, dummy=True).backend.get_vocab_size() < 151_936


def test_gguf_without_a_tokenizer_says_so(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "bare.gguf", "llama")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(CheckpointError):
        load_tokenizer(Source(SourceKind.GGUF, tmp_path / "bare.gguf", "bare"))


def test_gguf_without_merges_says_so(tmp_path: Path) -> None:
    source = write_gguf(tmp_path / "unmerged.gguf", byte_level(), pre="gpt-2", merges=[])
    with pytest.raises(CheckpointError, match="merges"):
        load_tokenizer(source)
