"""What is kept of a text to choose codes by: second moments of a weight's inputs.

Codes chosen layer by layer meet inputs that earlier codes have already changed. Besides `hessian`,
the moments of the inputs as they are, `drift` keeps how they go with what is missing in them, so
that a weight can be moved to make good what its inputs lost, before it is rounded (the idea is
GPTAQ's, Li et al. 2025, in closed form); `lag` does the same for the residual stream that a weight
adds to.

Shapes: K input and O output channels of a weight, T rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Of the mean second moment. Larger than GPTQ's: what was lost is learnt from the text, and must
# hold for another.
_DAMPING = 0.1


class Calibration:
    """Sums over the rows one weight met; float32, on the rows' device."""

    def __init__(self) -> None:
        self._hessian_KK: Tensor | None = None
        self._drift_KK: Tensor | None = None
        self._lag_KO: Tensor | None = None

    def add(self, x_TK: Tensor, exact_TK: Tensor, lag_TO: Tensor | None = None) -> None:
        """More rows: inputs as converted layers make them and as the original layers do, and how
        far the stream that the weight adds to is behind the original's."""
        self._hessian_KK = _added(self._hessian_KK, x_TK.T @ x_TK)
        self._drift_KK = _added(self._drift_KK, x_TK.T @ (exact_TK - x_TK))
        if lag_TO is not None:
            self._lag_KO = _added(self._lag_KO, x_TK.T @ lag_TO)

    def hessian(self) -> Tensor:
        """[K, K]; there must have been rows."""
        assert self._hessian_KK is not None
        return self._hessian_KK

    def moved(self, weight_OK: Tensor) -> Tensor:
        """The weight whose products with the inputs are nearest to the original's with the
        originals, float32 [O, K]."""
        hessian_KK = self.hessian().double()
        mean = hessian_KK.diagonal().mean()
        if float(mean) <= 0.0:
            return weight_OK.float()
        assert self._drift_KK is not None
        missing_KO = self._drift_KK.double() @ weight_OK.double().T
        if self._lag_KO is not None:
            missing_KO += self._lag_KO
        eye = torch.eye(len(hessian_KK), dtype=torch.float64, device=hessian_KK.device)
        step_KO = torch.linalg.solve(hessian_KK + _DAMPING * mean * eye, missing_KO)
        moved_OK: Tensor = weight_OK + step_KO.T.float()
        return moved_OK


def _added(total: Tensor | None, part: Tensor) -> Tensor:
    return part if total is None else total.add_(part)
