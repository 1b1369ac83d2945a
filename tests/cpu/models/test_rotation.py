"""The rotations are orthogonal, and are applied as the matrices that they are."""

from __future__ import annotations

import pytest
import torch

from fourfold.models.rotation import Turn, orthogonal


@pytest.mark.parametrize("width", [1, 9, 32, 96, 256, 576, 2048])
def test_factors_are_applied_as_one_orthogonal_matrix(width: int) -> None:
    turn = Turn(width, seed=3, device=torch.device("cpu"))
    q_WW = orthogonal(width, seed=3).double()
    torch.testing.assert_close(q_WW.T @ q_WW, torch.eye(width).double(), rtol=0, atol=1e-5)
    rows, columns, scale_W = torch.randn(5, width), torch.randn(3, width, 7), torch.rand(width)
    close = {"rtol": 1e-4, "atol": 1e-4, "check_dtype": False}
    torch.testing.assert_close(turn.rows(rows), rows.double() @ q_WW, **close)
    torch.testing.assert_close(turn.rows(rows, scale_W), (rows * scale_W).double() @ q_WW, **close)
    torch.testing.assert_close(turn.columns(columns), q_WW.T @ columns.double(), **close)
