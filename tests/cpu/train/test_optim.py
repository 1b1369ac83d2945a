"""Updates: what Muon makes of a matrix, masters behind bfloat16, clipping."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from fourfold.train.optim import _orthogonal
from tests.cpu.train import toy

MUON: dict[str, Any] = {"optimizer": {"kind": "muon", "weight_decay": 0.0, "clip": 1e9}}


@pytest.mark.parametrize("shape", [(24, 24), (48, 16), (3, 16, 40)])
def test_muon_evens_singular_values(shape: tuple[int, ...]) -> None:
    matrices = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    matrices = matrices * torch.logspace(0, -1, shape[-1])
    before = torch.linalg.svdvals(matrices)
    after = torch.linalg.svdvals(_orthogonal(matrices)) / (0.2 * max(shape[-2:]) ** 0.5)
    assert (before[..., 0] / before[..., -1]).min() > 5
    assert after.min() > 0.6
    assert after.max() < 1.3


def test_muon_takes_every_matrix_by_itself(tmp_path: Path) -> None:
    """Scaling the gradient of one expert, or of the keys alone, changes no other's update."""

    def updates(scaled: bool) -> dict[str, torch.Tensor]:
        trainer = toy.trainer(toy.config(tmp_path, MUON))
        before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
        generator = torch.Generator().manual_seed(0)
        for name, parameter in trainer.model.named_parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
            if scaled and ".experts." in name:
                parameter.grad[1] *= 50
            if scaled and ".qkv." in name:
                parameter.grad[32:48] *= 50
        trainer.optimizer.gather()
        trainer.optimizer.step(trainer.optimizer.begin_step(1.0))
        return {n: p.detach() - before[n] for n, p in trainer.model.named_parameters()}

    plain, scaled = updates(False), updates(True)
    for name, update in plain.items():
        torch.testing.assert_close(scaled[name], update, rtol=1e-3, atol=1e-6, msg=name)
        if ".experts." in name or ".qkv." in name:
            assert 0.1 < float(update.square().mean().sqrt()) / 1e-2 < 0.3, name


def test_muon_leaves_an_expert_that_no_token_chose(tmp_path: Path) -> None:
    """What is left of its momentum, orthogonalised, would push it on for hundreds of steps."""
    trainer = toy.trainer(toy.config(tmp_path, MUON))
    stacks = {n: p for n, p in trainer.model.named_parameters() if ".experts." in n}
    for chosen in (True, False):
        before = {name: stack.detach().clone() for name, stack in stacks.items()}
        for parameter in trainer.model.parameters():
            parameter.grad = torch.ones_like(parameter)
        for stack in stacks.values():
            assert stack.grad is not None
            stack.grad[1] *= chosen
        trainer.optimizer.gather()
        trainer.optimizer.step(trainer.optimizer.begin_step(1.0))
        for name, stack in stacks.items():
            moved_E = (stack.detach() != before[name]).flatten(1).any(1)
            assert moved_E.tolist() == [expert != 1 or chosen for expert in range(len(stack))]


def test_gradients_are_clipped_together(tmp_path: Path) -> None:
    trainer = toy.trainer(toy.config(tmp_path, {"optimizer": {"clip": 0.5}}))
    for each in trainer.optimizer.trained:
        each.parameter.grad = torch.ones_like(each.parameter)
    count = sum(each.parameter.numel() for each in trainer.optimizer.trained)
    trainer.optimizer.gather()
    assert float(trainer.optimizer.step(trainer.optimizer.begin_step(1.0))) == pytest.approx(
        count**0.5
    )
    # The first of the running means is a share of the clipped gradient.
    means = [each for name, each in trainer.optimizer.state() if name.startswith("exp_avg.")]
    share = 1 - trainer._config.optimizer.beta1
    clipped = float(torch.cat([mean.flatten() for mean in means]).norm())
    assert clipped == pytest.approx(share * 0.5, rel=1e-4)


def test_masters_are_what_was_drawn(tmp_path: Path) -> None:
    """Also where weights are rounded to compute: a model is the same on one process and on many,
    which keep no others."""
    wide, rounded = (
        toy.trainer(toy.config(tmp_path, {"run": {"dtype": dtype}}))
        for dtype in ("float32", "bfloat16")
    )
    for one, other in zip(wide.optimizer.trained, rounded.optimizer.trained, strict=True):
        assert torch.equal(one.master, other.master), one.name
        routes = ".router." in other.name
        assert other.parameter.dtype == (torch.float32 if routes else torch.bfloat16)
        assert torch.equal(other.parameter, other.master.to(other.parameter.dtype))


def test_updates_too_small_for_bfloat16_add_up(tmp_path: Path) -> None:
    """A weight near one moves by 1e-4 a step: bfloat16 alone would never move."""
    changes: dict[str, Any] = {
        "run": {"dtype": "bfloat16"},
        "optimizer": {"rate": 1e-4, "weight_decay": 0.0},
    }
    trainer = toy.trainer(toy.config(tmp_path, changes))
    norm = trainer.model.norm.weight
    assert norm.dtype == torch.bfloat16
    for _ in range(100):
        norm.grad = torch.ones_like(norm)
        trainer.optimizer.gather()
        trainer.optimizer.step(trainer.optimizer.begin_step(1.0))
    assert float(norm.detach().float().mean()) == pytest.approx(0.99, abs=0.004)
