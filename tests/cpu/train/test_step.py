"""A training step computes, with gradients, what plain formulas say."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_leaves

from fourfold.models.layers import SparseFFN
from fourfold.quadrants.experts import ExpertWeights
from fourfold.quantize.weights import Activations, DenseWeight
from fourfold.train.data.batches import Batch
from fourfold.train.losses import Objective, Scale, balance_loss, cross_entropy
from fourfold.train.model import build, count
from fourfold.train.router import TrainedRouter, TrainedRouting
from fourfold.train.step import TrainStep, _expert_ffn, lay_out
from tests.cpu.train import toy

TOKENS, WIDTH, EXPERTS, CHOICES, NARROW = 13, 8, 6, 2, 4


def drawn(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()


def routing_of(gates_TK: Tensor, experts_TK: Tensor) -> TrainedRouting:
    empty = torch.zeros(len(experts_TK), EXPERTS, dtype=gates_TK.dtype)
    return TrainedRouting(gates_TK, experts_TK, empty, empty)


def plain_experts(
    x_TD: Tensor, gates_TK: Tensor, experts_TK: Tensor, gate_up: Tensor, down: Tensor
) -> Tensor:
    """One token and one choice after the other."""
    out = []
    for token, (gates, experts) in enumerate(zip(gates_TK, experts_TK.tolist(), strict=True)):
        parts = []
        for gate, expert in zip(gates, experts, strict=True):
            one, other = (gate_up[expert] @ x_TD[token]).chunk(2)
            parts.append(gate * (down[expert] @ (F.silu(one) * other)))
        out.append(torch.stack(parts).sum(0))
    return torch.stack(out)


def test_experts_and_their_gradients_are_those_of_the_formula() -> None:
    """Expert 3 gets no token at all."""
    x_TD, gates_TK = drawn(TOKENS, WIDTH), drawn(TOKENS, CHOICES, seed=1)
    gate_up = drawn(EXPERTS, 2 * NARROW, WIDTH, seed=2)
    down = drawn(EXPERTS, WIDTH, NARROW, seed=3)
    wanted_TE = drawn(TOKENS, EXPERTS, seed=4).detach()
    wanted_TE[:, 3] = -100
    experts_TK = wanted_TE.topk(CHOICES).indices
    inputs = (x_TD, gates_TK, gate_up, down)
    plain = plain_experts(x_TD, gates_TK, experts_TK, gate_up, down)
    upstream = drawn(TOKENS, WIDTH, seed=5).detach()
    wanted = torch.autograd.grad((plain * upstream).sum(), inputs)

    # The step rounds nothing that is float32; its grouped products take no float64.
    singles = [tensor.detach().float().requires_grad_() for tensor in inputs]
    weights = ExpertWeights(DenseWeight(singles[2]), DenseWeight(singles[3]), slots=EXPERTS)
    for weight, single in ((weights.gate_up, singles[2]), (weights.down, singles[3])):
        assert isinstance(weight, DenseWeight)
        weight.weight = torch.nn.Parameter(single.detach())
    documents, _, _ = lay_out(toy.Chain(1, TOKENS).batch(0), torch.device("cpu"))
    step = TrainStep(documents)
    got = step.experts(Activations(singles[0]), routing_of(singles[1], experts_TK), weights)
    torch.testing.assert_close(got.double(), plain, rtol=1e-4, atol=1e-5)
    (got * upstream.float()).sum().backward()
    assert isinstance(weights.gate_up, DenseWeight)
    assert isinstance(weights.down, DenseWeight)
    grads = (singles[0], singles[1], weights.gate_up.weight, weights.down.weight)
    for leaf, gradient in zip(grads, wanted, strict=True):
        assert leaf.grad is not None
        torch.testing.assert_close(leaf.grad.double(), gradient, rtol=1e-4, atol=1e-5)
    assert not weights.gate_up.weight.grad[3].any()


def test_experts_without_any_row_have_gradients() -> None:
    """Of zero: a process that no token was sent to takes part in adding up all the same."""
    rows_RD, gates_R = torch.zeros(0, WIDTH).requires_grad_(), torch.zeros(0).requires_grad_()
    gate_up = torch.ones(EXPERTS, 2 * NARROW, WIDTH).requires_grad_()
    down = torch.ones(EXPERTS, WIDTH, NARROW).requires_grad_()
    ends_E = torch.zeros(EXPERTS, dtype=torch.int32)
    out_RD = _expert_ffn(rows_RD, gates_R, gate_up, down, ends_E)
    assert out_RD.shape == (0, WIDTH)
    out_RD.sum().backward()
    for tensor in (rows_RD, gates_R, gate_up, down):
        assert tensor.grad is not None
        assert tensor.grad.shape == tensor.shape
        assert not tensor.grad.any()


@pytest.mark.parametrize("chunk_bytes", [1, 200, 1 << 20])
def test_chunks_do_not_change_the_cross_entropy(
    chunk_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fourfold.train.losses._CHUNK_BYTES", chunk_bytes)
    hidden, weight = drawn(TOKENS, WIDTH), drawn(11, WIDTH, seed=1)
    target = torch.randint(11, (TOKENS,), generator=torch.Generator().manual_seed(2))
    target[4] = target[12] = -1
    plain = F.cross_entropy(hidden @ weight.T, target, ignore_index=-1, reduction="sum")
    wanted = torch.autograd.grad(3 * plain, (hidden, weight))
    singles = [tensor.detach().float().requires_grad_() for tensor in (hidden, weight)]
    loss = cross_entropy(*singles, target)
    (3 * loss).backward()
    torch.testing.assert_close(loss.double(), plain, rtol=1e-5, atol=0)
    for leaf, gradient in zip(singles, wanted, strict=True):
        assert leaf.grad is not None
        torch.testing.assert_close(leaf.grad.double(), gradient, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(cross_entropy(*singles, target), loss.detach())


def test_a_steps_scale_is_not_rounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 60,000 tokens, in bfloat16: gradients of what is below the head would be 0.1 % larger."""
    monkeypatch.setattr("fourfold.train.losses._ROWS", 5)
    target = torch.arange(TOKENS) % 11
    gradients = []
    for scale in (1.0, 1 / 60_000):
        hidden = drawn(TOKENS, WIDTH).detach().bfloat16().requires_grad_()
        weight = drawn(11, WIDTH, seed=1).detach().bfloat16().requires_grad_()
        (scale * cross_entropy(hidden, weight, target)).backward()
        assert hidden.grad is not None
        gradients.append(hidden.grad)
    whole, share = gradients
    assert torch.equal(share, (whole.float() * torch.tensor(1 / 60_000)).bfloat16())


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_the_router_chooses_and_weighs_as_when_serving(score: str, tmp_path: Path) -> None:
    changes: dict[str, Any] = toy.SIGMOID if score == "sigmoid" else {}
    config = toy.config(tmp_path, changes, {"model": {"width": 16}})
    model = toy.trainer(config).model
    ffn = model.blocks[-1].ffn
    assert isinstance(ffn, SparseFFN)
    router = ffn.router
    assert isinstance(router, TrainedRouter)
    if router.selection_bias is not None:
        router.selection_bias.uniform_(-0.5, 0.5, generator=torch.Generator().manual_seed(1))
    x_TD = torch.randn(50, 16, generator=torch.Generator().manual_seed(2)) * 20
    with torch.no_grad():
        got, wanted = router(x_TD), super(TrainedRouter, router).forward(x_TD)
    assert torch.equal(got.experts_TK, wanted.experts_TK)
    torch.testing.assert_close(got.gates_TK, wanted.gates_TK)
    torch.testing.assert_close(got.share_TE.sum(1), torch.ones(50))


def test_a_routing_shows_its_tensors(tmp_path: Path) -> None:
    """FSDP of torch 2.11 gathers a router's weights for its gradients only if it finds some that
    want gradients in what the router returns."""
    model = toy.trainer(toy.config(tmp_path)).model
    ffn = model.blocks[0].ffn
    assert isinstance(ffn, SparseFFN)
    leaves = tree_leaves(ffn.router(torch.ones(3, 32)))
    assert len(leaves) == 4
    assert sum(leaf.requires_grad for leaf in leaves) == 3


def test_a_bias_evens_loads(tmp_path: Path) -> None:
    """Tokens that all want the same experts are spread within some hundred moves."""
    trainer = toy.trainer(toy.config(tmp_path, toy.SIGMOID))
    ffn = trainer.model.blocks[-1].ffn
    assert isinstance(ffn, SparseFFN)
    router = ffn.router
    assert isinstance(router, TrainedRouter)
    x_TD = torch.randn(400, 32, generator=torch.Generator().manual_seed(0)) + 2.0
    most = []
    with torch.no_grad():
        for _ in range(200):
            load_E = torch.bincount(router(x_TD).experts_TK.flatten(), minlength=4).float()
            most.append(float(load_E.max() / load_E.mean()))
            router.move_bias(load_E, 1e-3)
    assert most[0] > 1.4
    assert most[-1] < 1.1


def test_even_loads_have_a_balance_loss_of_one() -> None:
    share = torch.full((8, 4), 0.25)
    experts = torch.arange(8)[:, None] % 4
    even = TrainedRouting(torch.ones(8, 1), experts, share, share)
    assert balance_loss(even, torch.full((1, 4), 2.0)) == 1
    crowded = torch.tensor([[1.0, 0, 0, 0]]).expand(8, 4)
    all_at_one = TrainedRouting(torch.ones(8, 1), torch.zeros_like(experts), crowded, crowded)
    assert balance_loss(all_at_one, torch.tensor([[8.0, 0, 0, 0]])) == 4
    # Each row crowds an expert of its own: even over the batch, uneven over rows.
    rows = torch.eye(4)[:2].repeat_interleave(4, 0)
    apart = TrainedRouting(torch.ones(8, 1), experts, rows, rows)
    assert balance_loss(apart, torch.eye(4)[:2] * 4) == 4
    assert balance_loss(apart, torch.tensor([[4.0, 4, 0, 0]])) == 2


@pytest.mark.parametrize("form", [{}, toy.SIGMOID, toy.DENSE])
def test_what_a_token_costs_is_what_a_model_multiplies(
    form: dict[str, Any], tmp_path: Path
) -> None:
    """Counted by torch's own counter, but for attention, of which a CPU computes the masked half
    too."""
    from torch.utils.flop_counter import FlopCounterMode

    config = toy.config(tmp_path, form, {"data": {"rows": 1, "length": 64}})
    trainer = toy.trainer(config)
    batch = toy.chain(config).batch(0)
    batch.document.zero_()
    documents, tokens_T, _ = lay_out(batch, torch.device("cpu"))
    grouped = {torch.ops.aten._grouped_mm: grouped_flops}
    with FlopCounterMode(display=False, custom_mapping=grouped) as counter, torch.no_grad():
        hidden = trainer.model(tokens_T, documents.positions_T, TrainStep(documents))
        trainer.model.logits(hidden)
    seen = counter.get_flop_counts()["Global"]
    products = sum(flops for kind, flops in seen.items() if "attention" not in str(kind))
    model = trainer.model.config
    scores_and_values = 4 * model.layers * model.query_heads * model.head_width * 65 / 2
    assert products == (count(model, 64).flops_per_token / 3 - scores_and_values) * 64


def grouped_flops(x: Any, weight: Any, *_: Any, **__: Any) -> int:
    """Every row meets one matrix, whichever it is."""
    rows, inputs = x
    return 2 * int(rows) * int(inputs) * int(weight[-1])


def test_a_model_is_the_same_however_it_is_dealt(tmp_path: Path) -> None:
    config = toy.config(tmp_path)
    model = toy.decoder_config(config)
    options: dict[str, Any] = {
        "seed": 3,
        "deviation": 0.02,
        "device": torch.device("cpu"),
    }
    whole = dict(build(model, **options).named_parameters())
    part = dict(build(model, **options, experts=range(2, 4)).named_parameters())
    for name, parameter in part.items():
        wanted = whole[name][2:4] if ".experts." in name else whole[name]
        assert torch.equal(parameter, wanted), name
    other = dict(build(model, **{**options, "seed": 4}).named_parameters())
    assert not torch.equal(other["embedding.weight"], whole["embedding.weight"])


def by_documents(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    starts: Tensor,
    again: Tensor,
    most: int,
    most_again: int,
    *,
    window_size: tuple[int, int],
    enable_gqa: bool = True,
) -> Tensor:
    """What torch's `varlen_attn` computes, one document after the other."""
    assert starts is again
    assert most == most_again
    assert window_size == (-1, 0)  # causal
    parts = []
    for start, end in itertools.pairwise(starts.tolist()):
        assert 0 <= end - start <= most
        mine = [x[start:end].transpose(0, 1) for x in (q, k, v)]
        out = F.scaled_dot_product_attention(*mine, is_causal=True, enable_gqa=True)
        parts.append(out.transpose(0, 1))
    return torch.cat(parts)


def test_attention_by_documents_is_attention_by_mask(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A GPU is told where documents begin, a CPU which token reads which."""
    trainer = toy.trainer(toy.config(tmp_path))
    batch = toy.Chain(5, 40).batch(0)
    assert batch.document.max() > 1
    by_mask, tokens_T, target_T = lay_out(batch, torch.device("cpu"))
    monkeypatch.setattr("fourfold.train.step.moved", lambda tensor, device: tensor)
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", by_documents)
    by_starts, tokens_again_T, target_again_T = lay_out(batch, torch.device("cuda"))
    assert by_starts.mask_BLL is None
    assert torch.equal(by_starts.positions_T, by_mask.positions_T)
    assert torch.equal(tokens_again_T, tokens_T)
    assert torch.equal(target_again_T, target_T)
    with torch.no_grad():
        wanted, got = (
            trainer.model(tokens_T, documents.positions_T, TrainStep(documents))
            for documents in (by_mask, by_starts)
        )
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


def test_rows_of_one_document_need_no_mask(tmp_path: Path) -> None:
    trainer = toy.trainer(toy.config(tmp_path))
    batch = toy.Chain(5, 40).batch(0)
    batch = Batch(batch.tokens, torch.zeros_like(batch.document))
    documents, tokens_T, _ = lay_out(batch, torch.device("cpu"))
    assert documents.mask_BLL is None
    assert documents.starts_N is None
    length = documents.length
    triangle_BLL = torch.ones(documents.rows, length, length, dtype=torch.bool).tril()
    masked = dataclasses.replace(documents, mask_BLL=triangle_BLL)
    with torch.no_grad():
        got, wanted = (
            trainer.model(tokens_T, documents.positions_T, TrainStep(each))
            for each in (documents, masked)
        )
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


def test_documents_are_laid_out() -> None:
    tokens = torch.tensor([[5, 6, 7, 8, 9], [1, 2, 3, 4, 5]])
    document = torch.tensor([[0, 0, 1, 1, 1], [0, 1, 1, 1, 2]], dtype=torch.int32)
    documents, tokens_T, target_T = lay_out(Batch(tokens, document), torch.device("cpu"))
    assert tokens_T.tolist() == [5, 6, 7, 8, 1, 2, 3, 4]
    assert target_T.tolist() == [6, -1, 8, 9, -1, 3, 4, -1]
    assert documents.positions_T.tolist() == [0, 1, 0, 1, 0, 0, 1, 2]
    assert documents.mask_BLL is not None
    assert documents.mask_BLL[0].int().tolist() == [
        [1, 0, 0, 0],
        [1, 1, 0, 0],
        [0, 0, 1, 0],
        [0, 0, 1, 1],
    ]


def test_a_loss_is_made_of_what_it_reports(tmp_path: Path) -> None:
    router = {"balance_loss": 0.2, "z_loss": 0.1}
    config = toy.config(tmp_path, {"router": router})
    trainer = toy.trainer(config)
    objective = Objective(config.router, toy.ALONE)
    documents, tokens_T, target_T = lay_out(toy.chain(config).batch(0), torch.device("cpu"))
    step = TrainStep(documents)
    losses = objective(trainer.model, step, tokens_T, target_T, Scale(0.5, 0.25))
    made = 0.5 * losses.cross_entropy + 0.25 * (0.2 * losses.balance + 0.1 * losses.z)
    torch.testing.assert_close(losses.total.detach(), made)
    squares = [each.logits_TE.exp().sum(1).log().square().mean() for each in step.routings]
    torch.testing.assert_close(losses.z, torch.stack(squares).mean().detach())
    losses.total.backward()
    ffn = trainer.model.blocks[0].ffn
    assert isinstance(ffn, SparseFFN)
    assert ffn.router.weight.grad is not None
    assert ffn.router.weight.grad.abs().max() > 0


@pytest.mark.parametrize("form", [{}, toy.DENSE])
def test_micro_batches_add_up(form: dict[str, Any], tmp_path: Path) -> None:
    changes: dict[str, Any] = {"router": {"balance_over": "sequence"}}
    norms = []
    for rows in (8, 2):
        config = toy.config(tmp_path, form, changes, {"run": {"micro_rows": rows}})
        launched = toy.trainer(config).launch()
        norms.append(launched.sums_5)
        assert launched.load_LE is None or float(launched.load_LE.sum()) == 8 * 24 * 2 * 2
    torch.testing.assert_close(norms[0], norms[1], rtol=1e-4, atol=1e-5)
