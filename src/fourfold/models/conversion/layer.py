"""Converting one layer: its weights to codes, each calibrated on what the codes before it make.

A matrix is calibrated on the inputs that it will meet while serving: the stream that layers already
converted make of the text, through the matrices of this layer that come before it. What it is to
compute of them is what the original computes of the original's.

Shapes: T rows of the text, D model width, K input and O output channels of a weight, F FFN width,
E experts, G KV heads, C head width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fourfold.kernels.w4a8_gemm.packing import PackedW4A8, W4A8Recipe
from fourfold.models.config import ModelConfig
from fourfold.models.conversion.options import Bits, ConversionOptions
from fourfold.models.conversion.simulated import Codes, Int8Codes, SimulatedWeight, values
from fourfold.models.conversion.windows import Stream, WindowStep
from fourfold.models.decoder import Block
from fourfold.models.layers import Attention, DenseFFN, Linear, SparseFFN
from fourfold.models.rotation import Rotation, input_turn
from fourfold.models.router import Router
from fourfold.quadrants.experts import ExpertWeights, swiglu
from fourfold.quantize.calibration import Calibration
from fourfold.quantize.gptq import gptq
from fourfold.quantize.w4a8 import quantize_w4a8
from fourfold.quantize.weights import Activations, DenseWeight, turned

_EXPERTS_AT_ONCE = 8
# An expert that met fewer rows is calibrated also on those that its router would send it next.
_ROWS_PER_EXPERT = 512


@dataclasses.dataclass
class ConvertedLayer:
    """The codes of a layer by the names of their parameters in it, and what rounding did."""

    codes: dict[str, Codes] = dataclasses.field(default_factory=dict)
    errors: dict[str, float] = dataclasses.field(default_factory=dict)
    """Of each product (or weight, where nothing was calibrated), relative to its own size."""
    k_offset_GC: Tensor | None = None


class Text(NamedTuple):
    """The text to calibrate on: its stream through what was converted, and through the original."""

    stream: Stream
    exact: Stream


class LayerConverter:
    """Converts the layers of one model, one after the other. Weights must be filled in float32."""

    def __init__(
        self, config: ModelConfig, options: ConversionOptions, device: torch.device
    ) -> None:
        self.rotation = Rotation(config, device)
        self._recipe = W4A8Recipe(options.recipe)
        self._attention_bits = options.attention

    def convert(self, block: Block, text: Text | None) -> ConvertedLayer:
        """Replaces the weights of a rotated layer by codes (computed in float32), and takes the
        text through it. Without a text codes are the nearest to the weights."""
        done = ConvertedLayer()
        if text is None:
            self._round(block, done)
            return done
        self._attention(block, text, done)
        x_TD = block.ffn_norm(text.stream.x_TD)
        exact_TD = block.ffn_norm(text.exact.x_TD)
        lag_TD = text.exact.x_TD - text.stream.x_TD
        text.exact.x_TD += _through(block.ffn, exact_TD, text.exact)
        if isinstance(block.ffn, DenseFFN):
            self._dense(block.ffn, "ffn.", text.stream, x_TD, exact_TD, lag_TD, done)
        else:
            if block.ffn.shared is not None:
                shared = block.ffn.shared
                self._dense(shared, "ffn.shared.", text.stream, x_TD, exact_TD, None, done)
            self._experts(block.ffn, x_TD, exact_TD, done)
        text.stream.x_TD += _through(block.ffn, x_TD, text.stream)
        return done

    def _round(self, block: Block, done: ConvertedLayer) -> None:
        for name, module in list(block.named_modules()):
            if isinstance(module, Linear):
                turn = _turn_of(module.weight) if name.endswith("down") else None
                bits = self._attention_bits if name.startswith("attention.") else Bits.FOUR
                self._linear(module, name, None, bits, done, turn)
            elif isinstance(module, ExpertWeights):
                turn = _turn_of(module.down)
                gate_up = self._weigh(_dense(module.gate_up), None, Bits.FOUR)
                down = self._weigh(_turned(_dense(module.down), turn), None, Bits.FOUR)
                self._put(module, "gate_up", [gate_up], None, done)
                self._put(module, "down", [down], turn, done)

    def _attention(self, block: Block, text: Text, done: ConvertedLayer) -> None:
        attention, (stream, exact) = block.attention, text
        x_TD, exact_TD = block.attention_norm(stream.x_TD), block.attention_norm(exact.x_TD)
        exact_TA = _heads(attention, exact_TD, exact, WindowStep(exact.length))
        delta_TD = attention.output(Activations(exact_TA))
        inputs = Calibration()
        inputs.add(x_TD, exact_TD)
        self._linear(attention.qkv, "attention.qkv", inputs, self._attention_bits, done)
        step = WindowStep(stream.length)
        heads_TA = _heads(attention, x_TD, stream, step)
        inputs = Calibration()
        inputs.add(heads_TA, exact_TA, exact.x_TD - stream.x_TD)
        self._linear(attention.output, "attention.output", inputs, self._attention_bits, done)
        stream.x_TD += attention.output(Activations(heads_TA))
        exact.x_TD += delta_TD
        done.k_offset_GC = step.keys.mean()

    def _dense(
        self,
        ffn: DenseFFN,
        name: str,
        stream: Stream,
        x_TD: Tensor,
        exact_TD: Tensor,
        lag_TD: Tensor | None,
        done: ConvertedLayer,
    ) -> None:
        before, turn = ffn.gate_up.weight, _turn_of(ffn.down.weight)
        inputs = Calibration()
        inputs.add(x_TD, exact_TD)
        self._linear(ffn.gate_up, f"{name}gate_up", inputs, Bits.FOUR, done)
        inputs = Calibration()
        for rows, _ in stream.chunks():
            hidden_TF = swiglu(ffn.gate_up(Activations(x_TD[rows])))
            exact_TF = swiglu(before.product(before.encode(exact_TD[rows])))
            lag = None if lag_TD is None else lag_TD[rows]
            inputs.add(_turned(hidden_TF, turn), _turned(exact_TF, turn), lag)
        self._linear(ffn.down, f"{name}down", inputs, Bits.FOUR, done, turn)

    def _experts(
        self, ffn: SparseFFN, x_TD: Tensor, exact_TD: Tensor, done: ConvertedLayer
    ) -> None:
        """Each expert on its own rows, a few experts at a time."""
        experts, turn = ffn.experts, _turn_of(ffn.experts.down)
        dense = _dense(experts.gate_up), _dense(experts.down)
        chosen_TK = ffn.router(x_TD).experts_TK
        gate_up: list[_Weighed] = []
        down: list[_Weighed] = []
        for first in range(0, experts.slots, _EXPERTS_AT_ONCE):
            some = slice(first, min(first + _EXPERTS_AT_ONCE, experts.slots))
            rows = _rows_of(ffn.router, x_TD, chosen_TK, some)
            inputs = [Calibration() for _ in rows]
            for each, own in zip(inputs, rows, strict=True):
                each.add(x_TD[own], exact_TD[own])
            gate_up.append(self._weigh(dense[0][some], inputs, Bits.FOUR))
            weight = SimulatedWeight(gate_up[-1].codes, None, stacked=True)
            inputs = [Calibration() for _ in rows]
            for slot, own in enumerate(rows):
                hidden = swiglu(weight.product(weight.encode(x_TD[own]), slot))
                exact = swiglu(exact_TD[own] @ dense[0][first + slot].T)
                inputs[slot].add(_turned(hidden, turn), _turned(exact, turn))
            down.append(self._weigh(_turned(dense[1][some], turn), inputs, Bits.FOUR))
        self._put(experts, "gate_up", gate_up, None, done)
        self._put(experts, "down", down, turn, done)

    def _linear(
        self,
        linear: Linear,
        name: str,
        inputs: Calibration | None,
        bits: Bits,
        done: ConvertedLayer,
        turn: Tensor | None = None,
    ) -> None:
        weight = _turned(_dense(linear.weight), turn)
        weighed = self._weigh(weight, None if inputs is None else [inputs], bits)
        done.codes[f"{name}.weight"] = weighed.codes
        done.errors[name.removeprefix("ffn.")] = weighed.error()
        linear.weight = SimulatedWeight(weighed.codes, turn, stacked=False)

    def _put(
        self,
        experts: ExpertWeights,
        name: str,
        parts: list[_Weighed],
        turn: Tensor | None,
        done: ConvertedLayer,
    ) -> None:
        squares = torch.stack([part.squares for part in parts]).sum(0)
        whole = _Weighed(_joined([part.codes for part in parts]), squares)
        done.codes[f"ffn.experts.{name}"] = whole.codes
        done.errors[f"experts.{name}"] = whole.error()
        setattr(experts, name, SimulatedWeight(whole.codes, turn, stacked=True))

    def _weigh(self, weight: Tensor, inputs: Sequence[Calibration] | None, bits: Bits) -> _Weighed:
        """Codes for a weight [O, K], or for a stack of as many as there are inputs."""
        target = weight.view(-1, *weight.shape[-2:]).float()
        hessian = None
        if inputs is not None:
            hessian = torch.stack([each.hessian() for each in inputs])
            target = torch.stack([e.moved(w) for e, w in zip(inputs, target, strict=True)])
        codes: Codes
        if bits is Bits.EIGHT:
            codes = Int8Codes.of(target)
        elif hessian is None:
            codes = quantize_w4a8(target, self._recipe)
        else:
            codes = gptq(target, hessian, self._recipe)
        squares = []
        for part in (values(codes) - target, target):
            seen = part if hessian is None else part @ hessian
            squares.append((seen * part).sum(dtype=torch.float64))
        return _Weighed(codes, torch.stack(squares).cpu())


class _Weighed(NamedTuple):
    """Codes, and the squares of what a product loses by them and of the product itself."""

    codes: Codes
    squares: Tensor

    def error(self) -> float:
        """What is lost, relative to the product."""
        return float((self.squares[0] / self.squares[1].clamp_min(1e-30)).sqrt())


def _dense(weight: nn.Module) -> Tensor:
    assert isinstance(weight, DenseWeight)
    return weight.weight


def _turn_of(weight: nn.Module) -> Tensor | None:
    dense = _dense(weight)
    turn = input_turn(dense.shape[-1])
    return None if turn is None else turn.to(dense.device)


def _turned(x: Tensor, turn: Tensor | None) -> Tensor:
    return x if turn is None else turned(x, turn)


def _heads(attention: Attention, x_TD: Tensor, stream: Stream, step: WindowStep) -> Tensor:
    """What the output projection reads, [T, H * C]."""
    chunks = stream.chunks()
    heads = [attention.heads(Activations(x_TD[rows]), rope, 0, step) for rows, rope in chunks]
    return torch.cat([part.kept for part in heads])


def _through(ffn: DenseFFN | SparseFFN, x_TD: Tensor, stream: Stream) -> Tensor:
    step = WindowStep(stream.length)
    return torch.cat([ffn(Activations(x_TD[rows]), step) for rows, _ in stream.chunks()])


def _rows_of(router: Router, x_TD: Tensor, chosen_TK: Tensor, some: slice) -> list[Tensor]:
    """Which rows each of some experts is calibrated on, bool [T]; `chosen_TK` are the experts that
    the router chose for each row."""
    scores_ET = F.linear(router.weight[some], x_TD.float())
    likeliest = scores_ET.topk(min(_ROWS_PER_EXPERT, x_TD.shape[0]), dim=-1).indices
    rows = []
    for place, expert in enumerate(range(some.start, some.stop)):
        own = (chosen_TK == expert).any(-1)
        if int(own.sum()) < _ROWS_PER_EXPERT:
            own[likeliest[place]] = True
        rows.append(own)
    return rows


def _joined(parts: Sequence[Codes]) -> Codes:
    """Codes of successive experts as one."""
    if isinstance(parts[0], Int8Codes):
        return Int8Codes(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))
    packed = [part for part in parts if isinstance(part, PackedW4A8)]
    groups = [part.group_EGO for part in packed if part.group_EGO is not None]
    return PackedW4A8(
        packed[0].recipe,
        packed[0].inputs,
        torch.cat([part.packed_EBOJ for part in packed]),
        torch.cat([part.scale_EO for part in packed]),
        torch.cat(groups) if groups else None,
    )
