"""Converts a model layer by layer: fill, rotate, choose codes, write, forget.

Never more than one layer is held in full. The text to calibrate on and the text to be tested on
pass through the layers beside each other, each through what was converted and through the model as
it was, so that both perplexities come of one pass.

Shapes: N windows of L tokens.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fourfold.errors import CheckpointError, ConfigError
from fourfold.kernels.w4a8_gemm.packing import W4A8Recipe
from fourfold.models.checkpoint.fingerprint import fingerprint
from fourfold.models.checkpoint.fourfold_format import FourfoldFormat
from fourfold.models.checkpoint.source import Source, SourceKind
from fourfold.models.config import ModelConfig
from fourfold.models.conversion.layer import LayerConverter, Text
from fourfold.models.conversion.options import ConversionOptions, Method
from fourfold.models.conversion.output import Output, coded_tensors
from fourfold.models.conversion.simulated import Codes, Int8Codes, SimulatedWeight
from fourfold.models.conversion.windows import Stream
from fourfold.models.decoder import Decoder
from fourfold.models.families.family import Placements
from fourfold.models.filling import CheckpointFiller
from fourfold.models.loading import (
    check_tensors,
    open_checkpoint,
    packed_format,
    read_model_config,
)
from fourfold.models.rotation import TURNED
from fourfold.quantize.calibration import Calibration
from fourfold.quantize.weights import DenseWeight


@dataclasses.dataclass(frozen=True)
class LayerReport:
    """What converting one layer did: relative errors of its products, and how far the text's stream
    after it is from that of the model as it was, relative to its size."""

    layer: int
    errors: Mapping[str, float]
    drift: float


@dataclasses.dataclass(frozen=True)
class Report:
    """Perplexity of the held-out text before and after, and what the quantised matrices take."""

    before: float
    after: float
    bits_per_weight: float


@dataclasses.dataclass(frozen=True)
class Texts:
    """Tokens [N, L] to calibrate on (None where the method needs none) and to be tested on."""

    calibration_NL: Tensor | None
    held_out_NL: Tensor


class Conversion:
    """One conversion, resumed where `out` holds the finished layers of the same."""

    def __init__(
        self,
        source: Source,
        options: ConversionOptions,
        texts: Texts,
        out: Path,
        device: torch.device,
    ) -> None:
        calibration_NL = texts.calibration_NL
        if options.method is Method.RTN:
            calibration_NL = None
        elif calibration_NL is None:
            raise ConfigError("gptq needs a text to calibrate on; give one or use --method rtn")
        self._texts = Texts(calibration_NL, texts.held_out_NL)
        self._source, self._options, self._device = source, options, device
        self._checkpoint = open_checkpoint(source)
        self._fields = dict(self._checkpoint.fields())
        self._family, self.config = read_model_config(self._fields, self._checkpoint.where)
        if packed_format(self._checkpoint) is not None:
            raise ConfigError(f"{source.path} was quantised by this program; give its original")
        for ids_NL in (calibration_NL, texts.held_out_NL):
            if ids_NL is not None:
                _check_text(ids_NL, self.config)
        placements = self._family.place(self.config)
        check_tensors(self._checkpoint, self.config, placements)
        self._output = Output(out, self._asked())
        self.finished = self._output.finished_layers()
        with torch.device("meta"):
            self._model = Decoder(self.config)
        self._filler = CheckpointFiller(
            self._model, placements, device, torch.float32, self._checkpoint, lambda done, all: None
        )

    @torch.inference_mode()
    def run(
        self, write_tokenizer: Callable[[Path], None], heard: Callable[[LayerReport], None]
    ) -> Report:
        """Converts what is left and finishes the folder; `heard` is told of each layer. Raises
        `ConfigError` where another process writes the folder."""
        with self._output.alone():
            # Another may have gone on since.
            self.finished = self._output.finished_layers()
            return self._convert(write_tokenizer, heard)

    def _convert(
        self, write_tokenizer: Callable[[Path], None], heard: Callable[[LayerReport], None]
    ) -> Report:
        model, converter = self._model, LayerConverter(self.config, self._options, self._device)
        for part in ("embedding.", "norm.", "head."):
            self._filler.fill(part)
        if self.config.tied_embeddings:
            model.head.weight = DenseWeight(model.embedding.weight)
        converter.rotation.rotate_ends(model)
        streams = self._streams()
        for layer in range(self.finished, self.config.layers):
            heard(self._convert_layer(layer, converter, streams))
        before = streams["exact"].perplexity(model, self._texts.held_out_NL)
        codes = {"head.weight": Int8Codes.of(self._head(streams))}
        model.head.weight = SimulatedWeight(codes["head.weight"], None, stacked=False)
        after = streams["converted"].perplexity(model, self._texts.held_out_NL)
        self._finish(codes, write_tokenizer)
        return Report(before, after, self._output.bits_per_weight())

    def _convert_layer(
        self, layer: int, converter: LayerConverter, streams: dict[str, Stream]
    ) -> LayerReport:
        self._filler.fill(f"layers.{layer}.")
        block = self._model.blocks[layer]
        converter.rotation.rotate_block(block)
        streams["exact"].advance(block)
        if not bool(streams["exact"].x_TD.isfinite().all()):
            raise CheckpointError(
                f"{self._checkpoint.where}: what layer {layer} computes is not finite; "
                "fetch the checkpoint again"
            )
        text = None
        if self._texts.calibration_NL is not None:
            text = Text(streams["calibration"], streams["calibration exact"])
        done = converter.convert(block, text)
        streams["converted"].advance(block)
        prefix = f"layers.{layer}."
        tensors = coded_tensors(
            self._placed(prefix),
            {f"{prefix}{name}": codes for name, codes in done.codes.items()},
            {f"{prefix}{name}": _stored(name, value) for name, value in block.named_parameters()},
        )
        if done.k_offset_GC is not None:
            tensors[f"model.layers.{layer}.self_attn.k_offset"] = done.k_offset_GC
        self._output.write_layer(
            layer, tensors, {name: stream.x_TD for name, stream in streams.items()}
        )
        self._model.layers[layer] = nn.Identity()
        exact_TD, converted_TD = streams["exact"].x_TD, streams["converted"].x_TD
        drift = float((converted_TD - exact_TD).norm() / exact_TD.norm())
        return LayerReport(layer, done.errors, drift)

    def _head(self, streams: Mapping[str, Stream]) -> Tensor:
        """The head's weight, moved to make good what its inputs lost."""
        model = self._model
        weight = _dense(model.head.weight)
        if "calibration" not in streams:
            return weight
        inputs = Calibration()
        x_TD = model.norm(streams["calibration"].x_TD)
        inputs.add(x_TD, model.norm(streams["calibration exact"].x_TD))
        return inputs.moved(weight)

    def _streams(self) -> dict[str, Stream]:
        held_out_NL = self._texts.held_out_NL
        streams = {
            "exact": Stream(self._model, held_out_NL),
            "converted": Stream(self._model, held_out_NL),
        }
        if self._texts.calibration_NL is not None:
            for name in ("calibration", "calibration exact"):
                streams[name] = Stream(self._model, self._texts.calibration_NL)
        if self.finished:
            for name, x_TD in self._output.state(self._device).items():
                if name in streams:
                    streams[name].x_TD = x_TD
        return streams

    def _finish(self, codes: Mapping[str, Codes], write_tokenizer: Callable[[Path], None]) -> None:
        model = self._model
        tensors = coded_tensors(
            {n: p for n, p in self._placed("").items() if not p.parameter.startswith("layers.")},
            codes,
            {
                name: _stored(name, value)
                for name, value in model.named_parameters()
                if not name.startswith("layers.")
            },
        )
        config = self._fields | {
            "tie_word_embeddings": False,
            "quantization_config": self._format().config(),
        }
        directory = self._source.kind is SourceKind.DIRECTORY
        original = self._source.path if directory else None
        self._output.finish(self.config.layers, tensors, config, original, write_tokenizer)

    def _placed(self, prefix: str) -> Placements:
        """Where the parameters of a part are stored; the head is always a tensor of its own."""
        untied = dataclasses.replace(self.config, tied_embeddings=False)
        return {
            name: place
            for name, place in self._family.place(untied).items()
            if place.parameter.startswith(prefix)
        }

    def _format(self) -> FourfoldFormat:
        made = {"method": str(self._options.method), "attention_bits": str(self._options.attention)}
        return FourfoldFormat(
            self._checkpoint.where,
            W4A8Recipe(self._options.recipe),
            upcycled=self._source.kind is SourceKind.EMBEDDED,
            turned=_turned_modules(self._placed("")),
            made=made,
        )

    def _asked(self) -> dict[str, Any]:
        """Everything that the result depends on."""
        texts = {
            name: None if ids is None else _digest(ids)
            for name, ids in dataclasses.asdict(self._texts).items()
        }
        options = {name: str(value) for name, value in dataclasses.asdict(self._options).items()}
        return {"model": fingerprint(self._source), **options, **texts}


def _check_text(ids_NL: Tensor, config: ModelConfig) -> None:
    """Raises `ConfigError` where a model cannot read windows of tokens."""
    length, largest = ids_NL.shape[1], int(ids_NL.max())
    if length > config.max_positions:
        raise ConfigError(
            f"windows of {length} tokens are longer than the {config.max_positions} positions that "
            "the model has; use a smaller --window-tokens"
        )
    if largest >= config.vocabulary:
        raise ConfigError(
            f"the tokenizer made token {largest} of the text, but the model has "
            f"{config.vocabulary} tokens; put the tokenizer files that belong to it into its folder"
        )


def _digest(ids_NL: Tensor) -> str:
    """Of windows of tokens: the same text cut otherwise is another."""
    windows = f"{list(ids_NL.shape)}".encode() + ids_NL.numpy().tobytes()
    return hashlib.sha256(windows).hexdigest()


def _turned_modules(placements: Placements) -> tuple[str, ...]:
    """The last names of modules whose input is turned while serving."""
    return tuple(
        sorted(
            {
                name.split(".")[-2]
                for name, place in placements.items()
                if place.parameter.endswith(TURNED)
            }
        )
    )


def _stored(name: str, value: Tensor) -> Tensor:
    """Routers decide by small differences; of everything else 16 bits are enough."""
    return value.float() if ".router." in name else value.to(torch.bfloat16)


def _dense(weight: nn.Module) -> Tensor:
    assert isinstance(weight, DenseWeight)
    return weight.weight
