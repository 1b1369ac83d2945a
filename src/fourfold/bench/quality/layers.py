"""`fourfold bench layers`: three models of the same weights, one layer of each at a time.

Shapes: N prompts, M tokens of each (the last is decoded), D model width, V vocabulary.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import sys
from functools import partial

import torch
import torch.nn.functional as F
from msgspec import UNSET
from torch import Tensor, nn

from fourfold.bench.command_line import command_line
from fourfold.bench.quality.layers_config import LayersBenchConfig
from fourfold.bench.quality.plain import cast, in_plain_float32
from fourfold.bench.quality.streams import (
    Following,
    PagedPath,
    PlainPath,
    Recording,
    Routes,
    replace_router,
    stream_turn,
)
from fourfold.bench.record import Result, check_out, new_record, write
from fourfold.kernels.tolerance import tolerance
from fourfold.models.checkpoint.source import find_source
from fourfold.models.decoder import Decoder
from fourfold.models.families.family import Placements
from fourfold.models.filling import CheckpointFiller, Filler, RandomFiller
from fourfold.models.loading import (
    activation_dtype,
    check_tensors,
    choose_precision,
    made_current,
    open_checkpoint,
    page_shape,
    read_model_config,
    resolve_device,
)
from fourfold.models.precision import PageFormat, Precision
from fourfold.models.quantising import RECIPES, Quantiser
from fourfold.quantize.weights import DenseWeight

_ENDS = ("embedding", "norm", "head")
_COMPARED_LOGITS = 16
"""Of each prompt's last tokens that are prefilled."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerErrors:
    """Of one layer; differences relative to what it adds to the stream that the exact model has
    before it, `drift` relative to the stream."""

    prefill: float
    """Served to plain, of the tokens that are prefilled."""
    decode: float
    """Of those that are decoded."""
    codes: float
    """Plain to exact."""
    routing: float
    """Share of the experts chosen that the served layer would not have chosen."""
    drift: float
    """Of the served model's own stream from the exact one's after this layer."""


def main(config: LayersBenchConfig) -> int:
    """Compares, prints every layer and writes the record; 1 where a layer is beyond what its
    kernels are allowed."""
    check_out(config.out, config.name)
    with made_current(resolve_device(config.device)):
        return _compare(config)


def _compare(config: LayersBenchConfig) -> int:
    comparison = Comparison(config)
    allowed = Allowed.of(config.precision)
    errors = []
    names = [field.name for field in dataclasses.fields(LayerErrors)]
    print("layer", *(f"{name:>9}" for name in names))
    for layer in range(comparison.config.layers):
        errors.append(comparison.compare_layer(layer))
        figures = dataclasses.astuple(errors[-1])
        print(f"{layer:>5}", *(f"{100 * figure:>8.2f}%" for figure in figures), flush=True)
        if not all(map(math.isfinite, figures)):
            print(f"fourfold: layer {layer} gave numbers that are not finite", file=sys.stderr)
            return 1
    results = [*layer_results(errors, allowed), *comparison.compare_logits(allowed)]
    for result in results:
        print(f"{result.case:<40} {result.metric:<28} {result.value:.4g} {result.unit}")
    if config.out is not None:
        command = command_line("fourfold bench layers", config, positional="model")
        write(new_record(config.name, command, results), config.out)
    beyond = [each for each in results if each.limit is not UNSET and each.value > each.limit]
    for each in beyond:
        print(
            f"fourfold: {each.case}, {each.metric}: {each.value:.3g} %, more than the "
            f"{each.limit:g} % that are allowed",
            file=sys.stderr,
        )
    return 1 if beyond else 0


@dataclasses.dataclass(frozen=True)
class Allowed:
    """By how much one may be off the other, of what a layer adds or of the logits."""

    kernels: float
    """Served from plain."""
    codes: float
    """Plain from exact."""

    @classmethod
    def of(cls, precision: Precision) -> Allowed:
        """For kernels what their recipe is allowed. Rounding to a grid of n steps across the 5
        deviations that 64 Gaussian weights span is off by 5 / n / sqrt(12): 0.096 of a weight in
        4 bits and 0.006 in 8, in each of the three products of an FFN. Twice what they come to
        in 4 bits is allowed, and in 8, where activations and outliers weigh more, a tenth."""
        recipe = RECIPES.get(precision)
        kernels = tolerance("grouped_w4a8_ffn", "int8" if recipe is None else recipe.value)
        return cls(kernels, 0.1 if recipe is None else 0.3)


def layer_results(errors: list[LayerErrors], allowed: Allowed) -> list[Result]:
    """The worst and the mean of each error over the layers, in percent."""
    limits = {"prefill": allowed.kernels, "decode": allowed.kernels, "codes": allowed.codes}
    results = []
    for field in dataclasses.fields(LayerErrors):
        values = [100 * getattr(each, field.name) for each in errors]
        figures = {"worst layer": max(values), "mean of the layers": sum(values) / len(values)}
        if field.name == "drift":
            figures = {"last layer": values[-1]}
        for case, value in figures.items():
            limit = limits.get(field.name) if case == "worst layer" else None
            results.append(_result(f"{case} of {len(errors)}", field.name, value, limit))
    return results


def _result(case: str, metric: str, percent: float, limit: float | None) -> Result:
    if limit is None:
        return Result(case=case, metric=metric, value=percent, unit="%")
    return Result(
        case=case,
        metric=metric,
        value=percent,
        unit="%",
        limit=100 * limit,
        limit_name="allowed",
    )


class Comparison:
    """The three models and where their streams are."""

    def __init__(self, options: LayersBenchConfig) -> None:
        device = resolve_device(options.device)
        precision = choose_precision(options.precision, device)
        checkpoint = open_checkpoint(find_source(options.model))
        family, config = read_model_config(checkpoint.fields(), checkpoint.where)
        self.config = config
        placements = family.place(config)
        if options.load == "checkpoint":
            check_tensors(checkpoint, config, placements)
        with torch.device("meta"):
            self._exact, self._served, self._plain = (Decoder(config) for _ in range(3))
        layers = {n: p for n, p in placements.items() if p.parameter.startswith("layers.")}
        ends = {n: p for n, p in placements.items() if n not in layers}

        def filler(part: Placements) -> Filler:
            if options.load == "dummy":
                return RandomFiller(self._served, part, device, torch.float32)
            return CheckpointFiller(
                self._served, part, device, torch.float32, checkpoint, lambda done, all: None
            )

        self._filler = filler(layers)
        self._quantiser = Quantiser(config, precision, device)
        self._turn_DD = stream_turn(config, device)
        self._make_ends(filler(ends))
        prompts, tokens = options.prompts, options.prompt_tokens + 1
        frequencies = self._exact.frequencies.to(device)
        paged = partial(
            PagedPath,
            heads=config.query_heads,
            frequencies=frequencies,
            prompts=prompts,
            tokens=tokens,
        )
        exact = page_shape(config, Precision.BFLOAT16, device, PageFormat.FLOAT)
        served = page_shape(config, precision, device, options.kv_pages)
        self._exactly = paged(exact, dtype=torch.bfloat16)
        self._serving = paged(served, dtype=activation_dtype(precision, device))
        self._plainly = PlainPath(frequencies, prompts, tokens)
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(config.vocabulary, (prompts, tokens), generator=generator).to(device)
        self._exact_NMD, self._served_NMD, self._plain_NMD = (
            F.embedding(ids, model.embedding.weight).float()
            for model in (self._exact, self._served, self._plain)
        )

    @torch.inference_mode()
    def compare_layer(self, layer: int) -> LayerErrors:
        """Takes all streams through the next layer."""
        self._filler.fill(f"layers.{layer}.")
        served = self._served.blocks[layer]
        exact = cast(copy.deepcopy(served), torch.bfloat16)
        self._quantiser.quantise_block(served)
        plain = in_plain_float32(served)
        routes = Routes(len(self._exact_NMD))
        replace_router(exact, Recording, routes)
        for block in (served, plain):
            replace_router(block, Following, routes)

        before_NMD = self._exact_NMD
        self._exact_NMD = self._exactly.through(exact, before_NMD, routes)
        turned_NMD = before_NMD @ self._turn_DD
        by_codes_NMD = self._plainly.through(plain, turned_NMD, routes)
        computed_NMD = self._serving.through(served, turned_NMD, routes)
        agreement = routes.agreement[-2:]
        self._plain_NMD = self._plainly.through(plain, self._plain_NMD, routes)
        self._served_NMD = self._serving.through(served, self._served_NMD, routes)
        self._served.layers[layer] = nn.Identity()

        off_NMD, added_NMD = computed_NMD - by_codes_NMD, by_codes_NMD - turned_NMD
        exact_NMD = self._exact_NMD @ self._turn_DD
        return LayerErrors(
            prefill=_relative(off_NMD[:, :-1], added_NMD[:, :-1]),
            decode=_relative(off_NMD[:, -1:], added_NMD[:, -1:]),
            codes=_relative(by_codes_NMD - exact_NMD, exact_NMD - turned_NMD),
            routing=1 - min(agreement, default=1.0),
            drift=_relative(self._served_NMD - exact_NMD, exact_NMD),
        )

    @torch.inference_mode()
    def compare_logits(self, allowed: Allowed) -> list[Result]:
        """Logits after the last layer, each of its model's own stream."""
        parts = {"prefilled": slice(-1 - _COMPARED_LOGITS, -1), "decoded": slice(-1, None)}
        results = []
        for name, rows in parts.items():
            exact_SV, served_SV, plain_SV = (
                model.logits(
                    model.norm(x_NMD[:, rows].flatten(0, 1).to(model.norm.weight.dtype))
                ).float()
                for model, x_NMD in (
                    (self._exact, self._exact_NMD),
                    (self._served, self._served_NMD),
                    (self._plain, self._plain_NMD),
                )
            )
            same = (served_SV.argmax(-1) == exact_SV.argmax(-1)).float().mean()
            case = f"logits of {name} tokens"
            for metric, one_SV, other_SV, limit in (
                ("served to plain", served_SV, plain_SV, allowed.kernels),
                ("plain to exact", plain_SV, exact_SV, allowed.codes),
                ("served to exact", served_SV, exact_SV, None),
            ):
                off = 100 * _relative(one_SV - other_SV, other_SV)
                results.append(_result(case, metric, off, limit))
            likeliest = 100 * float(same)
            results.append(
                Result(case=case, metric="same likeliest", value=likeliest, unit="% of tokens")
            )
        return results

    def _make_ends(self, filler: Filler) -> None:
        """Embedding, last norm and head of each model."""
        exact, served, plain = self._exact, self._served, self._plain
        filler.fill("")
        if self.config.tied_embeddings:
            served.head.weight = DenseWeight(served.embedding.weight)
        for name in _ENDS:
            setattr(exact, name, cast(copy.deepcopy(getattr(served, name)), torch.bfloat16))
        self._quantiser.quantise_ends(served)
        for name in _ENDS:
            setattr(plain, name, in_plain_float32(getattr(served, name)))


def _relative(off: Tensor, of: Tensor) -> float:
    return float(off.norm() / of.norm())
