"""`fourfold quantize`: a model's weights in 4 bits, written once instead of at every start."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from fourfold.errors import ConfigError
from fourfold.models.checkpoint.source import Source, SourceKind, find_source
from fourfold.models.conversion.options import Bits, ConversionOptions, Method

if TYPE_CHECKING:
    from rich.console import Console
    from torch import Tensor

    from fourfold.gateway.tokenizer import Tokenizer
    from fourfold.models.conversion.convert import Conversion, LayerReport, Report


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Converts a model to 4-bit weights with 8-bit activations, one layer at a time.

    Each layer that is done is reported: by how much rounding changes the products of its weights,
    and by how much the text that reaches the next layer. A conversion that was interrupted goes on
    where it stopped. `fourfold serve DIR` serves what it wrote, without the original."""

    model: Annotated[str | None, tyro.conf.Positional] = None
    """A Hugging Face directory, a .gguf file or a hub id; without it, the embedded default."""
    out: Path
    """The folder to write."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    method: Annotated[Method, tyro.conf.EnumChoicesFromValues] = Method.GPTQ
    """gptq: codes that change the products of a text least; rtn: the codes nearest to the weights,
    without a text."""
    recipe: Literal["int8-channel", "int8-g128", "int8-g64", "fp8-channel", "fp8-g128"] = "int8-g64"
    """What 4-bit weights become before they are multiplied (int8 or e4m3), and how many channels
    share their scales."""
    attention: Annotated[Bits, tyro.conf.EnumChoicesFromValues] = Bits.EIGHT
    """Bits of the attention projections; the head always has 8."""
    text: Path | None = None
    """A text to calibrate on, like what the model will read. Default: the docstrings of Python's
    standard library."""
    held_out: Path | None = None
    """A text to test on. Default: the language reference that Python carries."""
    windows: int = 128
    """How many pieces of the text are read, evenly spread over it."""
    held_out_windows: int = 16
    """How many pieces of the text to test on are read."""
    window_tokens: int = 512
    """Tokens of such a piece."""
    device: str = "auto"
    """cpu, cuda, cuda:1, ...; auto takes the first GPU there is."""

    def __post_init__(self) -> None:
        if min(self.windows, self.held_out_windows) < 1 or self.window_tokens < 2:
            raise ConfigError(
                "--windows and --held-out-windows must be at least 1 and --window-tokens 2"
            )
        if self.method is Method.RTN and self.text is not None:
            raise ConfigError("--method rtn reads no --text; leave one of them out")


def run(options: Options) -> int:
    from rich.console import Console

    from fourfold.gateway.tokenizer import load_tokenizer
    from fourfold.models.conversion.convert import Conversion, Texts
    from fourfold.models.conversion.text import calibration_text, held_out_text
    from fourfold.models.loading import made_current, resolve_device

    console = Console(stderr=True, highlight=False, soft_wrap=True, markup=False, emoji=False)
    source = find_source(options.model, revision=options.revision)
    device = resolve_device(options.device)
    tokenizer = load_tokenizer(source)
    calibration = None
    if options.method is not Method.RTN:
        calibration = _windows(options, tokenizer, options.text, calibration_text, options.windows)
    held_out = _windows(
        options, tokenizer, options.held_out, held_out_text, options.held_out_windows
    )
    conversion = Conversion(
        source,
        ConversionOptions(
            recipe=options.recipe, method=options.method, attention=options.attention
        ),
        Texts(calibration, held_out),
        options.out,
        device,
    )
    for name, read_NL, wanted in (
        ("--text", calibration, options.windows),
        ("--held-out", held_out, options.held_out_windows),
    ):
        if read_NL is not None and len(read_NL) < wanted:
            console.print(f"{name} is enough for {len(read_NL)} of the {wanted} windows only.")
    if conversion.finished:
        console.print(f"{conversion.finished} layers were finished before.")
    with made_current(device):
        report = _convert(
            conversion, console, lambda path: _write_tokenizer(source, tokenizer, path)
        )
    _tell(report, options.out)
    return 0


def _windows(
    options: Options,
    tokenizer: Tokenizer,
    file: Path | None,
    default: Callable[[], str],
    count: int,
) -> Tensor:
    from fourfold.models.conversion.text import cut

    if file is None:
        text, what = default(), "the default text"
    else:
        what = str(file)
        try:
            text = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{file} cannot be read: {error}") from error
    ids = tokenizer.encode(text, add_special_tokens=False)
    return cut(ids, count, options.window_tokens, what)


def _convert(
    conversion: Conversion, console: Console, write_tokenizer: Callable[[Path], None]
) -> Report:
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("layers"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    # In a log a bar would leave an empty line; the lines of the layers say enough.
    with Progress(*columns, console=console, disable=not console.is_interactive) as bar:
        task = bar.add_task("layers", total=conversion.config.layers, completed=conversion.finished)

        def heard(layer: LayerReport) -> None:
            errors = "  ".join(f"{name} {100 * e:.1f} %" for name, e in layer.errors.items())
            bar.console.print(
                f"layer {layer.layer}: {errors}; text off by {100 * layer.drift:.1f} %"
            )
            bar.update(task, advance=1)

        return conversion.run(write_tokenizer, heard)


def _tell(report: Report, out: Path) -> None:
    change = 100 * (report.after / report.before - 1)
    print(f"perplexity  {report.before:.3f} before, {report.after:.3f} after ({change:+.2f} %)")
    print(f"weights     {report.bits_per_weight:.2f} bits each, scales included")
    print(f"written to  {out}")


def _write_tokenizer(source: Source, tokenizer: Tokenizer, path: Path) -> None:
    """Writes what a GGUF file holds in itself as a Hugging Face folder has it."""
    if source.kind is SourceKind.DIRECTORY:
        return
    backend = tokenizer.backend.to_str(pretty=True)
    (path / "tokenizer.json").write_text(backend, encoding="utf-8")
    settings = tokenizer.specials | {"chat_template": tokenizer.chat_template}
    for name, fields in (
        ("tokenizer_config.json", {k: v for k, v in settings.items() if v is not None}),
        ("generation_config.json", {"eos_token_id": list(tokenizer.eos_token_ids)}),
    ):
        (path / name).write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
