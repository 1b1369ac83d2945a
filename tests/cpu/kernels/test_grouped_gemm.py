"""The experts' product on a CPU, with widths that torch's own takes and with others."""

from __future__ import annotations

import pytest
import torch

from fourfold.kernels.grouped_gemm import grouped_gemm


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("inputs", "outputs"), [(16, 24), (17, 24), (16, 3), (7, 5)])
def test_each_expert_multiplies_its_rows(inputs: int, outputs: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(9, inputs, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(4, outputs, inputs, generator=generator).to(dtype).requires_grad_()
    ends = torch.tensor([2, 2, 8, 9], dtype=torch.int32)  # the second expert has no row
    expert = torch.tensor([0, 0, 2, 2, 2, 2, 2, 2, 3])
    wanted = torch.einsum("ri,roi->ro", x.double(), weight[expert].double())
    made = grouped_gemm(x, weight, ends)
    assert made.dtype == dtype
    near = {"rtol": 2e-2, "atol": 2e-2} if dtype is torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(made.double(), wanted, **near)
    ours, theirs = (torch.autograd.grad(y.double().sum(), (x, weight)) for y in (made, wanted))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, **near)
