"""AdamW and Muon over float32 master weights.

What is computed in bfloat16 has a float32 master here that takes the updates and is rounded to it
after each step; gradients of several micro-batches add up in float32, those of one stay as they
are. Muon orthogonalises the momentum of
every hidden matrix, one matrix at a time: each expert's, and queries, keys, values, gate and up
apart although they lie in one tensor.

Shapes: O rows and I columns of a matrix.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from fourfold.kernels.training import accumulate, adamw
from fourfold.models.decoder import Decoder
from fourfold.models.router import Router
from fourfold.train.config import OptimizerSection
from fourfold.train.parallel import Parallel, local, shard_like, whole_like

# Newton-Schulz steps and coefficients (K. Jordan, Muon, 2024): singular values to about one.
_ROUNDS = 5
_A, _B, _C = 3.4445, -4.7750, 2.0315
# The root mean square of AdamW's updates that Muon's are scaled to (arXiv 2502.16982).
_UPDATE_RMS = 0.2
_STEPS = "steps"
"""What `state` calls the number of steps."""


@dataclasses.dataclass
class Trained:
    """One parameter and how it is trained. `master` is the float32 of what this process holds of
    it, the same memory where it is computed in float32; `parts` are the rows of the matrices that
    lie in it one after the other, where Muon takes it; `grad` is of the micro-batches so far."""

    name: str
    parameter: nn.Parameter
    master: Tensor
    decayed: bool
    own_experts: bool
    parts: tuple[int, ...] = ()
    grad: Tensor | None = None

    @property
    def rounded(self) -> Tensor | None:
        """What is computed with where that is not the master."""
        held = local(self.parameter.detach())
        return None if held.dtype == torch.float32 else held


class Optimizer:
    """Updates all weights of a model from its gradients."""

    def __init__(
        self, model: Decoder, section: OptimizerSection, parallel: Parallel, dtype: torch.dtype
    ) -> None:
        """
        Args:
            model: its weights, float32, become the masters; what is computed in `dtype` is given
                rounded weights instead.
            section: how weights follow gradients.
            parallel: this process among the others.
            dtype: what all but the routers are computed in.
        """
        self._section = section
        self._parallel = parallel
        own = {id(parameter) for parameter in parallel.own_experts(model)}
        self.trained = list(_trained(model, section.kind == "muon", own, dtype))
        self._steps = torch.zeros((), dtype=torch.int64)
        self._moments: dict[str, dict[str, Tensor]] = {
            each.name: {
                kind: torch.zeros_like(each.master)
                for kind in (("momentum",) if each.parts else ("exp_avg", "exp_avg_sq"))
            }
            for each in self.trained
        }

    @torch.no_grad()
    def gather(self) -> None:
        """Takes the gradients of a micro-batch to the masters; those of the parameters are gone."""
        for each in self.trained:
            grad, each.parameter.grad = each.parameter.grad, None
            if grad is None:
                continue
            grad = local(grad)
            each.grad = grad if each.grad is None else accumulate(each.grad, grad)

    def begin_step(self, share: float) -> Tensor:
        """Counts a step that takes `share` of the peak rate. Returns what `step` wants on the
        device, float32 [3] on the host: the rate, and what makes up for means and roots of squares
        that began at zero."""
        self._steps += 1
        section, step = self._section, int(self._steps)
        of_mean, of_root = 1 / (1 - section.beta1**step), (1 - section.beta2**step) ** -0.5
        return torch.tensor([section.rate * share, of_mean, of_root])

    @torch.no_grad()
    def step(self, numbers_3: Tensor) -> Tensor:
        """Clips and updates; returns the norm of all gradients before clipping, float32, on the
        device. Gradients are gone then. Nothing of a single step is read on the host, so that a
        step can be captured."""
        for each in self.trained:
            if each.own_experts and each.grad is not None:
                each.grad = self._parallel.sum_copies(each.grad)
        norm = self._norm()
        scale = (self._section.clip / (norm + 1e-6)).clamp(max=1.0)
        adam_4 = torch.cat((scale[None], numbers_3))
        for each in self.trained:
            grad, each.grad = each.grad, None
            if grad is None:
                continue
            if each.parts:
                self._step_muon(each, grad * scale, numbers_3[0])
            else:
                self._step_adam(each, grad, adam_4)
        return norm

    def _norm(self) -> Tensor:
        """Of all gradients of all processes. Experts that several groups hold count once."""
        copies = self._parallel.world // self._parallel.expert_size
        total = torch.zeros((), device=self._parallel.device)
        for own in (False, True):
            by_dtype: dict[torch.dtype, list[Tensor]] = {}
            for each in self.trained:
                if each.grad is not None and each.own_experts is own:
                    by_dtype.setdefault(each.grad.dtype, []).append(each.grad)
            # One kernel takes many gradients if they are of one dtype.
            for grads in by_dtype.values():
                norms = torch._foreach_norm(grads, dtype=torch.float32)
                squares = torch.stack(norms).square().sum()
                total += squares / copies if own else squares
        return self._parallel.summed(total).sqrt()

    def _step_adam(self, each: Trained, grad: Tensor, numbers_4: Tensor) -> None:
        section, moments = self._section, self._moments[each.name]
        adamw(
            each.master,
            grad.contiguous(),
            moments["exp_avg"],
            moments["exp_avg_sq"],
            each.rounded,
            numbers_4,
            beta1=section.beta1,
            beta2=section.beta2,
            eps=section.eps,
            decay=section.weight_decay if each.decayed else 0.0,
        )

    def _step_muon(self, each: Trained, grad: Tensor, rate: Tensor) -> None:
        momentum = self._moments[each.name]["momentum"]
        momentum.mul_(self._section.momentum).add_(grad)
        wanted = grad.add(momentum, alpha=self._section.momentum)
        cut = isinstance(each.parameter, DTensor) and not _cut_between_matrices(each.parameter)
        matrices = whole_like(wanted, each.parameter) if cut else wanted
        parts = torch.split(matrices, list(each.parts), dim=-2)
        update = torch.cat([_orthogonal(part) for part in parts], dim=-2)
        if cut:
            update = shard_like(update, each.parameter)
        if grad.dim() > 2:
            # Orthogonalised, what is left of a momentum never gets smaller: an expert that no token
            # chooses would move on for good.
            update = update * (torch.linalg.vector_norm(grad, math.inf, (-2, -1), keepdim=True) > 0)
        each.master.mul_(1 - rate * self._section.weight_decay).sub_(rate * update)
        if each.rounded is not None:
            each.rounded.copy_(each.master)

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Masters by their parameters' names, whole: every process must ask for all of them."""
        for each in self.trained:
            yield each.name, self._whole(each, each.master)

    def names(self) -> Iterator[str]:
        """Of all that `state` gives."""
        yield _STEPS
        for each in self.trained:
            yield f"weight.{each.name}"
            for kind in self._moments[each.name]:
                yield f"{kind}.{each.name}"

    def state(self) -> Iterator[tuple[str, Tensor]]:
        """Masters and moments by name, whole, and the number of steps: every process must ask for
        all of them."""
        yield _STEPS, self._steps
        for each in self.trained:
            yield f"weight.{each.name}", self._whole(each, each.master)
            for kind, tensor in self._moments[each.name].items():
                yield f"{kind}.{each.name}", self._whole(each, tensor)

    @torch.no_grad()
    def load(self, read: Callable[[str], Tensor]) -> None:
        """Takes back what `state` gave, by name, and rounds it."""
        self._steps.copy_(read(_STEPS))
        for each in self.trained:
            each.master.copy_(self._part(each, read(f"weight.{each.name}")))
            for kind, tensor in self._moments[each.name].items():
                tensor.copy_(self._part(each, read(f"{kind}.{each.name}")))
            if each.rounded is not None:
                each.rounded.copy_(each.master)

    def _whole(self, each: Trained, tensor: Tensor) -> Tensor:
        if each.own_experts:
            return self._parallel.whole_experts(tensor)
        return whole_like(tensor, each.parameter)

    def _part(self, each: Trained, tensor: Tensor) -> Tensor:
        if each.own_experts:
            held = self._parallel.experts(len(tensor))
            return tensor[held.start : held.stop]
        return shard_like(tensor, each.parameter)


def _trained(model: Decoder, muon: bool, own: set[int], dtype: torch.dtype) -> Iterator[Trained]:
    config = model.config
    heads = [config.query_heads, config.kv_heads, config.kv_heads]
    qkv = tuple(config.head_width * count for count in heads)
    owners = dict(model.named_modules())
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        matrix = parameter.dim() > 1
        routes = isinstance(owners[name.rpartition(".")[0]], Router)
        parts: tuple[int, ...] = ()
        if muon and matrix and name.startswith("layers.") and not routes:
            rows = parameter.shape[-2]
            halves = (rows // 2, rows // 2)
            parts = qkv if ".qkv." in name else halves if ".gate_up." in name else (rows,)
        master = local(parameter.detach())
        # Sharded weights are masters themselves, and rounded when they are gathered.
        if not routes and not isinstance(parameter, DTensor):
            parameter.data = master.to(dtype)
        yield Trained(
            name,
            parameter,
            master,
            matrix and not name.startswith("embedding."),
            id(parameter) in own,
            parts,
        )


def _cut_between_matrices(tensor: DTensor) -> bool:
    """Whether it is a stack of matrices of which a process holds whole ones."""
    return tensor.dim() == 3 and all(placement.is_shard(0) for placement in tensor.placements)


def _orthogonal(x: Tensor) -> Tensor:
    """The matrices [.., O, I] with all singular values about one, scaled to AdamW's size."""
    tall = x.shape[-2] > x.shape[-1]
    y = x.mT if tall else x
    y = y.to(torch.bfloat16) if x.is_cuda else y
    y = y / (torch.linalg.matrix_norm(y, keepdim=True) + 1e-7)
    for _ in range(_ROUNDS):
        square = y @ y.mT
        y = _A * y + (_B * square + _C * (square @ square)) @ y
    y = y.mT if tall else y
    update: Tensor = y.to(x.dtype) * (_UPDATE_RMS * math.sqrt(max(x.shape[-2:])))
    return update
