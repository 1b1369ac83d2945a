"""Products in the shapes of Qwen3-30B-A3B: the experts' FFN, dense projections in 4 and 8 bits.

With many tokens the work is operations and the baseline cuBLAS FP8 on a dense product of as many;
with few it is the bytes of the weights, codes and scales, of those experts that tokens go to.

Shapes: T tokens, K = 8 choices of a token, E experts, D model width, F expert width, O outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from fourfold.bench.kernels.case import Case
from fourfold.kernels.routing import RowGroups, combine, group_rows
from fourfold.kernels.rows import Rows, quantize_rows
from fourfold.kernels.w4a8_gemm import grouped_w4a8_gemm, w4a8_gemm, w8a8_gemm
from fourfold.kernels.w4a8_gemm.packing import PackedW4A8, W4A8Recipe, dequantize
from fourfold.quantize.w4a8 import quantize_w4a8

_EXPERTS, _CHOICES, _WIDTH, _HIDDEN = 128, 8, 2048, 768
_DENSE = ((5120, 2048), (2048, 4096))
_HEAD = (151936, 2048)
_PREFILL = 16384
_EXPERT_CASES = (
    (W4A8Recipe.INT8_CHANNEL, ("uniform", "zipf"), (1, 8, 64)),
    (W4A8Recipe.INT8_G64, ("uniform",), (1, 8, 32, 128, 256)),
    (W4A8Recipe.INT8_G128, ("uniform",), (64,)),
    (W4A8Recipe.FP8_CHANNEL, ("uniform",), (1, 64)),
    (W4A8Recipe.FP8_G128, ("uniform",), (1, 64)),
)
"""Recipes, the routings of many tokens, and how few tokens."""
_MARKS = {
    W4A8Recipe.INT8_CHANNEL: 0.90,
    W4A8Recipe.INT8_G128: 0.80,
    W4A8Recipe.FP8_CHANNEL: 0.90,
    W4A8Recipe.FP8_G128: 0.80,
}
_FFN_MARK, _DECODE_MARK = 0.75, 0.80
"""Shares of cuBLAS FP8 with many tokens, of a copy with few."""


def cases(device: torch.device) -> Iterator[Case]:
    """Every case, one after another."""
    for recipe, routings, decodes in _EXPERT_CASES:
        experts = _Experts(recipe, device)
        for routing in routings:
            yield from experts.prefill(routing)
        for tokens in decodes:
            yield from experts.decode(tokens)
        del experts
    for outputs, inputs in _DENSE:
        for tokens in (_PREFILL, 1):
            yield _dense(W4A8Recipe.INT8_CHANNEL, tokens, outputs, inputs, device)
        for tokens in (_PREFILL, 256, 32, 1):
            yield _dense_8_bits(tokens, outputs, inputs, device)
    yield _dense_8_bits(1, *_HEAD, device)


def random_rows(*shape: int, device: torch.device) -> Tensor:
    """bfloat16, Gaussian, with channels that stand out."""
    x = torch.randn(shape, device=device, dtype=torch.bfloat16)
    x[..., 5::193] *= 4
    return x


def random_experts(tokens: int, routing: str, device: torch.device) -> Tensor:
    """The different experts of every token, int32 [T, K]: any alike, or as Zipf's law has it."""
    chance_E = torch.ones(_EXPERTS, device=device)
    if routing == "zipf":
        chance_E /= 1 + torch.randperm(_EXPERTS, device=device)
    waited_TE = torch.rand(tokens, _EXPERTS, device=device).log().neg() / chance_E
    return waited_TE.topk(_CHOICES, largest=False).indices.to(torch.int32)


class _Experts:
    """The weights of one layer's experts, and the cases on them."""

    def __init__(self, recipe: W4A8Recipe, device: torch.device) -> None:
        self.recipe, self.device = recipe, device
        self.gate_up = self._weight(2 * _HIDDEN, _WIDTH)
        self.down = self._weight(_WIDTH, _HIDDEN)

    def _weight(self, outputs: int, inputs: int) -> PackedW4A8:
        scale = inputs**-0.5
        parts = [
            quantize_w4a8(random_rows(outputs, inputs, device=self.device) * scale, self.recipe)
            for _ in range(_EXPERTS)
        ]
        group = [part.group_EGO for part in parts if part.group_EGO is not None]
        return PackedW4A8(
            self.recipe,
            inputs,
            torch.cat([part.packed_EBOJ for part in parts]),
            torch.cat([part.scale_EO for part in parts]),
            torch.cat(group) if group else None,
        )

    def prefill(self, routing: str) -> Iterator[Case]:
        """Both products and the whole FFN of many tokens."""
        rows = _PREFILL * _CHOICES
        experts_TK = random_experts(_PREFILL, routing, self.device)
        x_TD, gates_TK = self._tokens(_PREFILL)
        groups = group_rows(experts_TK, _EXPERTS)
        name = f"{self.recipe} {routing} {_PREFILL}"
        flops = 2.0 * rows * _WIDTH * _HIDDEN
        dense = (_scaled_mm(rows, 2 * _HIDDEN, _WIDTH, self.device), 2 * flops)
        dense2 = (_scaled_mm(rows, _WIDTH, _HIDDEN, self.device), flops)

        def both() -> None:
            dense[0]()
            dense2[0]()

        x, hidden = self._encode(x_TD), self._encode(self._hidden(rows))
        run = partial(self._first, x, groups)
        yield self._products("first", name, run, partial(self._wanted_first, x_TD), groups, dense)
        run = partial(self._second, hidden, groups)
        wanted = partial(self._wanted_second, self._hidden(rows))
        yield self._products("second", name, run, wanted, groups, dense2)
        yield Case(
            kernel="grouped_w4a8_ffn",
            case=name,
            run=partial(self._ffn, x_TD, gates_TK, experts_TK),
            work=3 * flops,
            unit="FLOP",
            ceiling="cuBLAS FP8",
            error=partial(self._ffn_error, x_TD, gates_TK, experts_TK),
            baseline=both,
            baseline_name="cuBLAS FP8, dense products alone",
            mark=_FFN_MARK,
        )

    def decode(self, tokens: int) -> Iterator[Case]:
        """Both products and the whole FFN of few tokens."""
        experts_TK = random_experts(tokens, "uniform", self.device)
        touched = int(experts_TK.flatten().bincount().count_nonzero()) / _EXPERTS
        x_TD, gates_TK = self._tokens(tokens)
        groups = group_rows(experts_TK, _EXPERTS)
        name = f"{self.recipe} uniform {tokens}"
        rows = tokens * _CHOICES
        sizes = (self.gate_up.nbytes * touched, self.down.nbytes * touched)
        run = partial(self._first, self._encode(x_TD), groups)
        wanted = partial(self._wanted_first, x_TD)
        yield self._products("first", name, run, wanted, groups, None, sizes[0])
        hidden_RF = self._hidden(rows)
        run = partial(self._second, self._encode(hidden_RF), groups)
        wanted = partial(self._wanted_second, hidden_RF)
        yield self._products("second", name, run, wanted, groups, None, sizes[1])
        yield Case(
            kernel="grouped_w4a8_ffn",
            case=name,
            run=partial(self._ffn, x_TD, gates_TK, experts_TK),
            work=sum(sizes),
            unit="B",
            ceiling="copy bandwidth",
            error=partial(self._ffn_error, x_TD, gates_TK, experts_TK),
            mark=_DECODE_MARK,
        )

    def _products(
        self,
        which: str,
        name: str,
        run: Callable[[], Tensor],
        wanted: Callable[[Tensor, int], Tensor],
        groups: RowGroups,
        dense: tuple[Callable[[], object], float] | None,
        size: float = 0.0,
    ) -> Case:
        def error() -> float:
            """Of the experts with most rows."""
            out, ends = run().float(), groups.ends_E.tolist()
            starts = [0, *ends[:-1]]
            most = sorted(range(_EXPERTS), key=lambda e: starts[e] - ends[e])[:4]
            off = total = 0.0
            for expert in most:
                places = slice(starts[expert], ends[expert])
                order = groups.order_R[places].long()
                got = out[places] if which == "first" else out[order]
                sorted_rows = torch.arange(starts[expert], ends[expert], device=self.device)
                reference = wanted(order if which == "first" else sorted_rows, expert)
                off += float((got - reference).square().sum())
                total += float(reference.square().sum())
            return float((off / total) ** 0.5)

        return Case(
            kernel="grouped_w4a8_gemm",
            case=f"{which} {name}",
            run=run,
            work=dense[1] if dense else size,
            unit="FLOP" if dense else "B",
            ceiling="cuBLAS FP8" if dense else "copy bandwidth",
            error=error,
            baseline=dense[0] if dense else None,
            baseline_name="cuBLAS FP8, dense" if dense else None,
            mark=_MARKS.get(self.recipe) if dense else _DECODE_MARK,
        )

    def _tokens(self, tokens: int) -> tuple[Tensor, Tensor]:
        x_TD = random_rows(tokens, _WIDTH, device=self.device)
        return x_TD, torch.rand(tokens, _CHOICES, device=self.device) / _CHOICES

    def _hidden(self, rows: int) -> Tensor:
        torch.manual_seed(rows)
        return random_rows(rows, _HIDDEN, device=self.device)

    def _encode(self, x: Tensor) -> Rows:
        return quantize_rows(x, self.recipe.activations, x.shape[1])

    def _first(self, x: Rows, groups: RowGroups) -> Tensor:
        return grouped_w4a8_gemm(
            *x,
            self.gate_up,
            groups,
            gather=_CHOICES,
            scatter=False,
            swiglu=True,
            out_dtype=torch.bfloat16,
        )

    def _second(self, hidden: Rows, groups: RowGroups) -> Tensor:
        return grouped_w4a8_gemm(
            *hidden,
            self.down,
            groups,
            gather=None,
            scatter=True,
            swiglu=False,
            out_dtype=torch.bfloat16,
        )

    def _ffn(self, x_TD: Tensor, gates_TK: Tensor, experts_TK: Tensor) -> Tensor:
        groups = group_rows(experts_TK, _EXPERTS)
        hidden_RF = self._first(self._encode(x_TD), groups)
        out_RD = self._second(self._encode(hidden_RF), groups)
        out_TKD = out_RD.view(*gates_TK.shape, -1)
        return combine(out_TKD, gates_TK, out_dtype=torch.bfloat16)

    def _wanted_first(self, x_TD: Tensor, rows: Tensor, expert: int) -> Tensor:
        gate_up = x_TD[rows // _CHOICES].float() @ self._of_expert(self.gate_up, expert).T
        gate, up = gate_up.chunk(2, -1)
        return F.silu(gate) * up

    def _wanted_second(self, hidden_RF: Tensor, rows: Tensor, expert: int) -> Tensor:
        return hidden_RF[rows].float() @ self._of_expert(self.down, expert).T

    def _ffn_error(self, x_TD: Tensor, gates_TK: Tensor, experts_TK: Tensor) -> float:
        """Of a few tokens."""
        some = slice(0, min(16, x_TD.shape[0]))
        wanted = torch.zeros(len(x_TD[some]), _WIDTH, device=self.device)
        for token, experts in enumerate(experts_TK[some].tolist()):
            for choice, expert in enumerate(experts):
                row = torch.tensor([token * _CHOICES], device=self.device)
                hidden = self._wanted_first(x_TD, row, expert)
                out = hidden @ self._of_expert(self.down, expert).T
                wanted[token] += gates_TK[token, choice] * out[0]
        got = self._ffn(x_TD, gates_TK, experts_TK)[some].float()
        return float((got - wanted).norm() / wanted.norm())

    def _of_expert(self, weight: PackedW4A8, expert: int) -> Tensor:
        one = slice(expert, expert + 1)
        group_EGO = weight.group_EGO
        return dequantize(
            weight._replace(
                packed_EBOJ=weight.packed_EBOJ[one],
                scale_EO=weight.scale_EO[one],
                group_EGO=None if group_EGO is None else group_EGO[one],
            )
        )[0]


def _dense(
    recipe: W4A8Recipe, tokens: int, outputs: int, inputs: int, device: torch.device
) -> Case:
    weight = quantize_w4a8(random_rows(outputs, inputs, device=device) * inputs**-0.5, recipe)
    x_TI = random_rows(tokens, inputs, device=device)
    rows = quantize_rows(x_TI, recipe.activations, inputs)
    run = partial(w4a8_gemm, *rows, weight, out_dtype=torch.bfloat16)

    def wanted() -> Tensor:
        return x_TI.float() @ dequantize(weight)[0].T

    return _one(str(recipe), (tokens, outputs, inputs), run, wanted, weight.nbytes, device)


def _dense_8_bits(tokens: int, outputs: int, inputs: int, device: torch.device) -> Case:
    weight = quantize_rows(random_rows(outputs, inputs, device=device), torch.int8, inputs)
    x_TI = random_rows(tokens, inputs, device=device)
    rows = quantize_rows(x_TI, torch.int8, inputs)
    run = partial(w8a8_gemm, *rows, *weight, out_dtype=torch.bfloat16)

    def wanted() -> Tensor:
        return x_TI.float() @ (weight.codes_TW.float() * weight.scale_T[:, None]).T

    size = outputs * (inputs + 4)
    return _one("int8 weights of 8 bits", (tokens, outputs, inputs), run, wanted, size, device)


def _one(
    name: str,
    shape: tuple[int, int, int],
    run: Callable[[], Tensor],
    wanted: Callable[[], Tensor],
    size: int,
    device: torch.device,
) -> Case:
    """A dense product of tokens, outputs and inputs, with a weight of `size` bytes."""
    tokens, outputs, inputs = shape

    def error() -> float:
        reference = wanted()
        return float((run().float() - reference).norm() / reference.norm())

    many = tokens >= _PREFILL
    return Case(
        kernel="w4a8_gemm",
        case=f"{name} {tokens} x {outputs} x {inputs}",
        run=run,
        work=2.0 * tokens * outputs * inputs if many else float(size),
        unit="FLOP" if many else "B",
        ceiling="cuBLAS FP8" if many else "copy bandwidth",
        error=error,
        baseline=_scaled_mm(tokens, outputs, inputs, device) if many else None,
        baseline_name="cuBLAS FP8" if many else None,
        mark=_MARKS[W4A8Recipe.INT8_CHANNEL] if many else _DECODE_MARK,
    )


def _scaled_mm(rows: int, outputs: int, inputs: int, device: torch.device) -> Callable[[], object]:
    """cuBLAS's FP8 product of random codes, with fast accumulation."""
    x = random_rows(rows, inputs, device=device).to(torch.float8_e4m3fn)
    weight = random_rows(outputs, inputs, device=device).to(torch.float8_e4m3fn)
    one = torch.ones((), device=device)
    return partial(
        torch._scaled_mm,
        x,
        weight.t(),
        one,
        one,
        out_dtype=torch.bfloat16,
        use_fast_accum=True,
    )
