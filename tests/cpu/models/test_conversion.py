"""Converting tiny models layer by layer, and loading what was written."""

from __future__ import annotations

import dataclasses
import errno
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fourfold.errors import CheckpointError, ConfigError
from fourfold.kernels.cpu_w8a8_gemm import exact_on_cpu
from fourfold.models.checkpoint.directory import DirectoryCheckpoint
from fourfold.models.checkpoint.source import Source, SourceKind, find_source
from fourfold.models.conversion import layer, output
from fourfold.models.conversion.convert import Conversion, LayerReport, Report, Texts
from fourfold.models.conversion.options import Bits, ConversionOptions, Method
from fourfold.models.decoder import Decoder
from fourfold.models.layers import SparseFFN
from fourfold.models.loading import LoadOptions, load_model
from fourfold.models.precision import Precision
from fourfold.models.router import Router
from fourfold.quadrants.experts import Routing
from fourfold.quantize import weights
from tests.cpu.models.computing import PROMPT, logits
from tests.cpu.models.gguf_writing import write_gguf

Find = Callable[[str], Path]
FAMILIES = ["llama", "llama-bias-rope3", "qwen3-moe", "olmoe", "mixtral", "glm4-moe"]
CPU = torch.device("cpu")


def tokens(windows: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 320, (windows, 32), generator=generator)


TEXTS = Texts(tokens(8, 1), tokens(2, 2))


def convert(
    path: Path,
    out: Path,
    options: ConversionOptions | None = None,
    *,
    texts: Texts = TEXTS,
    heard: Callable[[LayerReport], None] = lambda layer: None,
) -> Report:
    options = options or ConversionOptions()
    conversion = Conversion(find_source(str(path)), options, texts, out, CPU)
    return conversion.run(lambda folder: None, heard)


def load(path: Path, precision: Precision = Precision.FLOAT32) -> Decoder:
    return load_model(find_source(str(path)), LoadOptions(precision=precision))


def off(path: Path, original: Path) -> float:
    """How far the logits of a converted model are from the original's, relative to their size."""
    ours, wanted = logits(load(path), PROMPT), logits(load(original), PROMPT)
    return float((ours - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("family", FAMILIES)
def test_converted_models_compute_the_same(family: str, checkpoint: Find, tmp_path: Path) -> None:
    """Nearly: 4-bit weights lose a tenth in each product. A rotation, a turn or a row in the wrong
    place would leave nothing in common (an error of about 1.4)."""
    out = tmp_path / "out"
    report = convert(checkpoint(family), out, ConversionOptions(recipe="int8-g64"))
    assert off(out, checkpoint(family)) < 0.5
    assert abs(report.after / report.before - 1) < 0.25
    config = json.loads((out / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "fourfold"
    assert config["tie_word_embeddings"] is False
    assert not list(out.glob("conversion*"))
    assert not list(out.glob("*.part"))


@pytest.mark.parametrize("recipe", ["int8-channel", "int8-g128", "fp8-channel", "fp8-g128"])
def test_every_recipe_is_written(recipe: str, checkpoint: Find, tmp_path: Path) -> None:
    out = tmp_path / "out"
    options = ConversionOptions(recipe=recipe, method=Method.RTN, attention=Bits.FOUR)
    convert(checkpoint("qwen3-moe"), out, options, texts=Texts(None, tokens(1, 2)))
    assert off(out, checkpoint("qwen3-moe")) < 0.8
    stored = load_file(out / "model-layer-00000.safetensors")
    name = "model.layers.0.mlp.experts.3.up_proj"
    assert stored[f"{name}.weight_packed"].shape == (1, 48, 64)
    assert (f"{name}.weight_group" in stored) == ("-g" in recipe)
    assert "model.layers.0.self_attn.q_proj.weight_packed" in stored


def test_attention_has_eight_bits_unless_asked(checkpoint: Find, tmp_path: Path) -> None:
    convert(checkpoint("llama"), tmp_path / "out")
    stored = load_file(tmp_path / "out" / "model-layer-00001.safetensors")
    name = "model.layers.1.self_attn"
    assert stored[f"{name}.k_proj.weight_codes"].dtype == torch.int8
    assert stored[f"{name}.k_offset"].shape == (2, 16)
    assert stored["model.layers.1.mlp.down_proj.weight_packed"].dtype == torch.uint8


def test_calibration_loses_less_than_rounding(checkpoint: Find, tmp_path: Path) -> None:
    """On the products of the text, which is what each method reports of itself."""
    lost: dict[Method, list[LayerReport]] = {method: [] for method in Method}
    for method in Method:
        options = ConversionOptions(method=method)
        convert(checkpoint("mixtral"), tmp_path / method, options, heard=lost[method].append)
    for calibrated, rounded in zip(lost[Method.GPTQ], lost[Method.RTN], strict=True):
        for name in ("experts.gate_up", "experts.down"):
            assert calibrated.errors[name] < 0.9 * rounded.errors[name]


def test_experts_are_calibrated_alike_however_few_at_once(
    checkpoint: Find, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And their router is not asked again for each few of them."""
    asked: list[int] = []
    forward = Router.forward

    def counted(router: Router, x_TD: Tensor) -> Routing:
        asked[-1] += 1
        return forward(router, x_TD)

    monkeypatch.setattr(Router, "forward", counted)
    for few in (8, 1):
        asked.append(0)
        monkeypatch.setattr(layer, "_EXPERTS_AT_ONCE", few)
        convert(checkpoint("qwen3-moe"), tmp_path / f"{few}")
    assert asked[0] == asked[1] > 0
    models = [load(tmp_path / f"{few}") for few in (8, 1)]
    torch.testing.assert_close(logits(models[0], PROMPT), logits(models[1], PROMPT))


@pytest.fixture
def exact_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Int8 products on a CPU that cannot multiply int8 exactly: int32 sums by float64."""
    if exact_on_cpu():
        return

    def product(codes: Tensor, scale_T1: Tensor, weight: Tensor, scale_O: Tensor) -> Tensor:
        sums = (codes.double() - 128) @ weight.double().T
        return sums.float() * scale_O * scale_T1

    monkeypatch.setattr(weights, "pack_weight", lambda codes: codes)
    monkeypatch.setattr(weights, "cpu_w8a8_gemm", product)


@pytest.mark.usefixtures("exact_products")
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_weights_are_served_as_they_are(
    family: str, checkpoint: Find, tmp_path: Path
) -> None:
    """As what they stand for, but for the rounding of activations."""
    out = tmp_path / "out"
    convert(checkpoint(family), out)
    packed, plain = load(out, Precision.W4A8), load(out)
    ours, wanted = logits(packed, PROMPT), logits(plain, PROMPT)
    assert float((ours - wanted).norm() / wanted.norm()) < 0.15
    assert packed.blocks[0].attention.k_offset_GC is not None


@pytest.mark.usefixtures("exact_products")
def test_progress_grows_to_its_total(checkpoint: Find, tmp_path: Path) -> None:
    convert(checkpoint("mixtral"), tmp_path / "out")
    steps: list[tuple[int, int]] = []
    source = find_source(str(tmp_path / "out"))
    options = LoadOptions(precision=Precision.W4A8)
    load_model(source, options, lambda done, total: steps.append((done, total)))
    assert steps == sorted(steps)
    assert steps[-1][0] == steps[-1][1] == steps[0][1]


def test_the_embedded_default_stays_a_mixture(checkpoint: Find, tmp_path: Path) -> None:
    """A dense file that is upcycled at load is also after its conversion."""
    file = write_gguf(checkpoint("llama"), tmp_path / "dense.gguf")
    source = Source(SourceKind.EMBEDDED, file, "tiny-8x")
    out = tmp_path / "out"
    Conversion(source, ConversionOptions(recipe="int8-g64"), TEXTS, out, CPU).run(
        lambda folder: None, lambda layer: None
    )
    converted = load(out)
    assert isinstance(converted.blocks[0].ffn, SparseFFN)
    original = load_model(source, LoadOptions(precision=Precision.FLOAT32))
    wanted = logits(original, PROMPT)
    assert float((logits(converted, PROMPT) - wanted).norm() / wanted.norm()) < 0.5


class StopError(Exception):
    """An interruption."""


def test_an_interrupted_conversion_goes_on(checkpoint: Find, tmp_path: Path) -> None:
    def stop(layer: LayerReport) -> None:
        if layer.layer == 1:
            raise StopError

    whole, broken = tmp_path / "whole", tmp_path / "broken"
    path = checkpoint("qwen3-moe")
    report = convert(path, whole)
    with pytest.raises(StopError):
        convert(path, broken, heard=stop)
    assert not (broken / "config.json").exists()
    with pytest.raises(CheckpointError, match=r"config\.json"):
        find_source(str(broken))
    kept = (broken / "model-layer-00001.safetensors").stat().st_mtime_ns
    heard: list[LayerReport] = []
    assert convert(path, broken, heard=heard.append) == report
    assert [layer.layer for layer in heard] == [2]
    assert (broken / "model-layer-00001.safetensors").stat().st_mtime_ns == kept
    for file in whole.iterdir():
        assert (broken / file.name).read_bytes() == file.read_bytes(), file.name


def test_layers_of_other_options_are_kept(checkpoint: Find, tmp_path: Path) -> None:
    def stop(layer: LayerReport) -> None:
        raise StopError

    out, source = tmp_path / "out", find_source(str(checkpoint("llama")))
    with pytest.raises(StopError):
        convert(checkpoint("llama"), out, heard=stop)
    text = Texts(tokens(8, 9), TEXTS.held_out_NL)
    for options, asked in (
        (ConversionOptions(recipe="int8-g128"), TEXTS),
        (ConversionOptions(), text),
    ):
        with pytest.raises(ConfigError, match=r"1 finished layers .* give those to go on, remove"):
            Conversion(source, options, asked, out, CPU)
    assert Conversion(source, ConversionOptions(), TEXTS, out, CPU).finished == 1


def test_what_has_no_finished_layer_starts_anew(checkpoint: Find, tmp_path: Path) -> None:
    out, source = tmp_path / "out", find_source(str(checkpoint("llama")))
    Conversion(source, ConversionOptions(), TEXTS, out, CPU)
    other = ConversionOptions(recipe="int8-g128")
    assert Conversion(source, other, TEXTS, out, CPU).finished == 0
    convert(checkpoint("llama"), out, other)


def test_what_fails_at_the_end_costs_no_layer(checkpoint: Find, tmp_path: Path) -> None:
    """Writing the tokenizer is the last of hours of work."""

    def stop(folder: Path) -> None:
        raise OSError(errno.ENOSPC, "full", folder / "tokenizer.json")

    out, source = tmp_path / "out", find_source(str(checkpoint("llama")))
    with pytest.raises(ConfigError, match=r"full.*tokenizer\.json.* free some space"):
        Conversion(source, ConversionOptions(), TEXTS, out, CPU).run(stop, lambda layer: None)
    assert not (out / "config.json").exists()
    heard: list[LayerReport] = []
    report = convert(checkpoint("llama"), out, heard=heard.append)
    assert not heard
    whole = tmp_path / "whole"
    assert report == convert(checkpoint("llama"), whole)
    assert {file.name for file in out.iterdir()} == {file.name for file in whole.iterdir()}


@pytest.mark.parametrize("full", [SafetensorError("No space left"), OSError(errno.ENOSPC, "full")])
def test_a_full_disk_is_named_and_costs_no_layer(
    full: Exception, checkpoint: Find, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, out = checkpoint("llama"), tmp_path / "out"

    def fail(tensors: dict[str, Tensor], file: Path, metadata: dict[str, str]) -> None:
        if "00001" in file.name:
            file.write_bytes(b"half")
            raise full
        save_file(tensors, file, metadata)

    with monkeypatch.context() as patch:
        patch.setattr(output, "save_file", fail)
        with pytest.raises(ConfigError, match=r"00001.* cannot be written .* free some space"):
            convert(path, out)
    assert not list(out.glob("*.part"))
    heard: list[LayerReport] = []
    convert(path, out, heard=heard.append)
    assert [layer.layer for layer in heard] == [1, 2]


def test_layers_of_another_configuration_are_kept(checkpoint: Find, tmp_path: Path) -> None:
    """Layers that were calibrated by another configuration do not fit it."""

    def stop(layer: LayerReport) -> None:
        raise StopError

    path, out = tmp_path / "original", tmp_path / "out"
    shutil.copytree(checkpoint("llama"), path)
    with pytest.raises(StopError):
        convert(path, out, heard=stop)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-5}))
    with pytest.raises(ConfigError, match="of another model or with other options"):
        Conversion(find_source(str(path)), ConversionOptions(), TEXTS, out, CPU)


@pytest.mark.parametrize("method", list(Method))
def test_what_grows_beyond_all_numbers_is_named(
    method: Method, checkpoint: Find, tmp_path: Path
) -> None:
    path = tmp_path / "broken"
    shutil.copytree(checkpoint("llama"), path)
    tensors = load_file(path / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"] *= 1e37
    tensors["model.layers.1.mlp.down_proj.weight"] *= 1e37
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"layer 1 .* not finite"):
        convert(path, tmp_path / "out", ConversionOptions(method=method))


@pytest.mark.parametrize("name", ["lm_head", "model.embed_tokens"])
def test_ends_that_are_no_numbers_are_named(name: str, checkpoint: Find, tmp_path: Path) -> None:
    """Also where no token of the text meets them."""
    path = tmp_path / "broken"
    shutil.copytree(checkpoint("qwen3"), path)
    tensors = load_file(path / "model.safetensors")
    tensors[f"{name}.weight"][0, 5] = torch.nan
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=rf"{name}.* not finite"):
        convert(path, tmp_path / "out")


def test_a_model_that_knows_nothing_is_converted(checkpoint: Find, tmp_path: Path) -> None:
    """Its perplexity is beyond what a float holds."""
    path = tmp_path / "loud"
    shutil.copytree(checkpoint("qwen3"), path)
    tensors = load_file(path / "model.safetensors")
    tensors["lm_head.weight"] *= 1e4
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    assert convert(path, tmp_path / "out").before == float("inf")
    assert (tmp_path / "out" / "config.json").exists()


def test_gptq_needs_a_text(checkpoint: Find, tmp_path: Path) -> None:
    texts = Texts(None, tokens(1, 2))
    with pytest.raises(ConfigError, match="needs a text"):
        convert(checkpoint("llama"), tmp_path / "out", texts=texts)


@pytest.mark.parametrize("place", ["calibration_NL", "held_out_NL"])
def test_tokens_that_the_model_does_not_have_are_named(
    place: str, checkpoint: Find, tmp_path: Path
) -> None:
    """Of a tokenizer that belongs to another model."""
    ids = tokens(2, 1)
    ids[1, 3] = 320
    texts = dataclasses.replace(TEXTS, **{place: ids})
    with pytest.raises(ConfigError, match=r"token 320 .* has 320 tokens"):
        convert(checkpoint("llama"), tmp_path / "out", texts=texts)
    assert not (tmp_path / "out").exists()


def test_folders_that_hold_something_are_left_alone(checkpoint: Find, tmp_path: Path) -> None:
    path = checkpoint("llama")
    convert(path, tmp_path / "done")
    with pytest.raises(ConfigError, match="finished checkpoint"):
        convert(path, tmp_path / "done")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").write_text("dear")
    with pytest.raises(ConfigError, match="not empty"):
        convert(path, tmp_path / "full")
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be written"):
        convert(path, tmp_path / "file" / "out")
    with pytest.raises(ConfigError, match="cannot be written"):
        convert(path, tmp_path / ("long" * 100))
    with pytest.raises(ConfigError, match="give its original"):
        convert(tmp_path / "done", tmp_path / "twice")


@pytest.fixture(scope="module")
def written(checkpoint: Find, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("written") / "out"
    options = ConversionOptions(method=Method.RTN)
    convert(checkpoint("llama"), out, options, texts=Texts(None, tokens(1, 2)))
    return out


def test_whoever_may_read_the_configuration_may_read_the_weights(written: Path) -> None:
    assert len({path.stat().st_mode for path in written.iterdir()}) == 1


def test_tokenizer_and_generation_files_come_along(checkpoint: Find, tmp_path: Path) -> None:
    path = tmp_path / "original"
    shutil.copytree(checkpoint("llama"), path)
    (path / "tokenizer.json").write_text("{}")
    (path / "chat_template.jinja").write_text("hello")
    (path / "tokenizer").mkdir()  # folders stay where they are
    convert(path, tmp_path / "out")
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == "hello"
    assert (tmp_path / "out" / "tokenizer.json").exists()
    assert (tmp_path / "out" / "generation_config.json").exists()
    assert not (tmp_path / "out" / "model.safetensors").exists()


@pytest.mark.parametrize(
    "change",
    [
        {"version": 2},
        {"recipe": "int3-g8"},
        {"rotated": False},
        {"turned": 4},
        {"brand_new": 1},
    ],
)
def test_settings_of_another_version_are_refused_by_name(
    change: dict[str, object], written: Path, tmp_path: Path
) -> None:
    path = tmp_path / "changed"
    shutil.copytree(written, path)
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"] |= change
    (path / "config.json").write_text(json.dumps(config))
    (name,) = change
    with pytest.raises(CheckpointError, match=rf"quantization_config\.{name}"):
        load(path)


def test_a_part_that_is_missing_is_named(written: Path, tmp_path: Path) -> None:
    path = tmp_path / "broken"
    shutil.copytree(written, path)
    file = path / "model-layer-00002.safetensors"
    tensors = load_file(file)
    name = "model.layers.2.mlp.gate_proj.weight_group"
    del tensors[name]
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match="weight_group"):
        load(path)


@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("weight_group", lambda t: t[:1]),
        ("weight_packed", lambda t: t[:, :-1]),
        ("weight_packed", lambda t: t.view(torch.int8)),
        ("weight_scale", lambda t: t.double()),
        ("weight_shape", lambda t: t + 1),
        ("weight_shape", lambda t: t[:1]),
    ],
)
def test_a_part_that_does_not_fit_is_named(
    part: str, change: Callable[[Tensor], Tensor], written: Path, tmp_path: Path
) -> None:
    path = tmp_path / "broken"
    shutil.copytree(written, path)
    file = path / "model-layer-00002.safetensors"
    tensors = load_file(file)
    name = "model.layers.2.mlp.gate_proj"
    tensors[f"{name}.{part}"] = change(tensors[f"{name}.{part}"]).contiguous()
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match=rf"{name}\.weight_.* quantise the model again"):
        load(path)


@pytest.mark.parametrize(
    ("part", "values"),
    [("weight", torch.randn(96, 64)), ("weight_codes", torch.ones(96, 64, dtype=torch.int8))],
)
def test_a_weight_in_two_forms_is_refused(
    part: str, values: Tensor, written: Path, tmp_path: Path
) -> None:
    path = tmp_path / "twice"
    shutil.copytree(written, path)
    file, name = path / "model-layer-00002.safetensors", "model.layers.2.mlp.gate_proj"
    save_file(load_file(file) | {f"{name}.{part}": values}, file)
    with pytest.raises(CheckpointError, match=rf"{name} is stored in two forms"):
        load(path)


def test_parts_of_another_recipe_are_named(written: Path, tmp_path: Path) -> None:
    """A configuration that was copied from another conversion."""
    path = tmp_path / "mixed"
    shutil.copytree(written, path)
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"]["recipe"] = "int8-g128"
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"weight_group .* int8-g128"):
        load(path)


def test_shapes_are_those_of_the_original(written: Path, checkpoint: Find) -> None:
    ours = dict(DirectoryCheckpoint(written).shapes())
    head = ours.pop("lm_head.weight")
    assert head == ours["model.embed_tokens.weight"]
    assert ours == dict(DirectoryCheckpoint(checkpoint("llama")).shapes())
