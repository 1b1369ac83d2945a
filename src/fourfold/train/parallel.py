"""Several processes on one run: who holds what, and how tokens reach the experts of others.

Each process reads its own rows of a step. With `experts` processes to a group, a process holds its
share of every layer's experts and a token goes to whoever holds the experts it chose; groups hold
the same and add up their gradients. All other weights, and the experts where a group is one
process, are sharded over all processes (FSDP2) and gathered layer by layer. Gradients are summed,
not averaged: the loss is divided by the tokens of all.

Shapes: R rows that are sent, Q rows that are received, E experts of all, P processes of a group,
N = E / P experts of this process.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import os
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from fourfold.errors import ConfigError
from fourfold.models.decoder import Decoder
from fourfold.models.layers import SparseFFN
from fourfold.train.config import ParallelSection
from fourfold.train.rows import inverse_of, permuted


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, group: dist.ProcessGroup, sent: list[int], received: list[int]
    ) -> Tensor:
        ctx.group, ctx.sent, ctx.received = group, sent, received
        return _exchange(x, group, sent, received)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return _exchange(grad, ctx.group, ctx.received, ctx.sent), None, None, None


def _exchange(x: Tensor, group: dist.ProcessGroup, sent: list[int], received: list[int]) -> Tensor:
    out = x.new_empty((sum(received), *x.shape[1:]))
    dist.all_to_all_single(out, x.contiguous(), received, sent, group=group)
    return out


class Journey(NamedTuple):
    """Where the rows of one layer go, and where this process's experts find theirs."""

    group: dist.ProcessGroup
    sent: list[int]
    received: list[int]
    order_Q: Tensor
    """The received row at each place, sorted by expert."""
    place_Q: Tensor
    """Its inverse."""
    ends_E: Tensor
    """int32 [N]: where the rows of each expert of this process end."""

    def forth(self, rows: Tensor) -> Tensor:
        """Rows sorted by expert [R, ..] to those that this process computes [Q, ..]."""
        received: Tensor = _AllToAll.apply(  # type: ignore[no-untyped-call]
            rows, self.group, self.sent, self.received
        )
        return permuted(received, self.order_Q, self.place_Q)

    def back(self, rows: Tensor) -> Tensor:
        """What the experts made of them [Q, ..] to where they came from [R, ..]."""
        sorted_back = permuted(rows, self.place_Q, self.order_Q)
        returned: Tensor = _AllToAll.apply(  # type: ignore[no-untyped-call]
            sorted_back, self.group, self.received, self.sent
        )
        return returned


class ExpertExchange:
    """A group of processes that hold different experts."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group
        self._size = dist.get_world_size(group)

    def plan(self, ends_E: Tensor) -> Journey:
        """The journey of rows that are sorted by expert; waits for the device, because the sizes of
        messages must be known."""
        count_E = torch.diff(ends_E, prepend=ends_E.new_zeros(1)).long()
        count_PN = torch.empty_like(count_E)
        dist.all_to_all_single(count_PN, count_E, group=self._group)
        count_PN = count_PN.view(self._size, -1)
        local = torch.arange(count_PN.shape[1], device=count_PN.device).expand_as(count_PN)
        own_PN = count_E.view(self._size, -1)
        sent, received = torch.stack((own_PN.sum(1), count_PN.sum(1))).tolist()
        expert_Q = local.flatten().repeat_interleave(count_PN.flatten(), output_size=sum(received))
        order_Q = expert_Q.argsort(stable=True)
        ends = count_PN.sum(0).cumsum(0).int()
        return Journey(self._group, sent, received, order_Q, inverse_of(order_Q), ends)


@dataclasses.dataclass(frozen=True)
class Parallel:
    """This process among those of the run."""

    rank: int
    world: int
    device: torch.device
    mesh: DeviceMesh | None = None
    """[groups that hold the same, processes of a group], where there is more than one process."""

    @property
    def expert_size(self) -> int:
        """Processes that hold different experts."""
        return 1 if self.mesh is None else self.mesh.size(1)

    @property
    def exchange(self) -> ExpertExchange | None:
        """How tokens reach the experts of other processes; None where each has all."""
        if self.mesh is None or self.expert_size == 1:
            return None
        return ExpertExchange(self.mesh.get_group(1))

    def experts(self, experts: int) -> range:
        """The experts of this process, of all there are."""
        if self.mesh is None:
            return range(experts)
        share = experts // self.expert_size
        first = self.mesh.get_local_rank(1) * share
        return range(first, first + share)

    def summed(self, tensor: Tensor) -> Tensor:
        """The sum over all processes, in place."""
        if self.mesh is not None:
            dist.all_reduce(tensor)
        return tensor

    def shard(self, model: Decoder, dtype: torch.dtype) -> None:
        """Shards weights in place; they are gathered in `dtype`, routers in float32, and gradients
        are summed in float32."""
        if self.mesh is None:
            return
        everyone = init_device_mesh(self.device.type, (self.world,))
        own = {id(p) for p in self.own_experts(model)}
        for block in model.blocks:
            ffn = block.ffn
            if isinstance(ffn, SparseFFN):
                _sharded(ffn.router, everyone, torch.float32, own)
            _sharded(block, everyone, dtype, own)
        _sharded(model, everyone, dtype, own)

    def own_experts(self, model: Decoder) -> list[nn.Parameter]:
        """Expert weights that only this process's group position holds; none where groups are one
        process, whose experts are sharded like everything else."""
        if self.expert_size == 1:
            return []
        ffns = [block.ffn for block in model.blocks if isinstance(block.ffn, SparseFFN)]
        return [p for ffn in ffns for p in ffn.experts.parameters()]

    def sum_gradients(self, model: Decoder, *, now: bool) -> None:
        """Whether the next backward pass ends in gradients summed over the processes, or adds to
        those of this process only."""
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.set_requires_gradient_sync(now, recurse=False)

    def sum_copies(self, tensor: Tensor) -> Tensor:
        """The sum, float32, over the groups that hold the same experts; where there is one group,
        the tensor itself."""
        if self.mesh is None or self.mesh.size(0) == 1:
            return tensor
        # As the gradients of what is sharded are reduced.
        total = tensor.float()
        dist.all_reduce(total, group=self.mesh.get_group(0))
        return total

    def whole_experts(self, local: Tensor) -> Tensor:
        """The experts' tensors of the whole group, stacked: [N, ..] to [E, ..]."""
        assert self.mesh is not None
        parts = [torch.empty_like(local) for _ in range(self.expert_size)]
        dist.all_gather(parts, local.contiguous(), group=self.mesh.get_group(1))
        return torch.cat(parts)


ALONE = Parallel(0, 1, torch.device("cpu"))


def _sharded(module: nn.Module, mesh: DeviceMesh, dtype: torch.dtype, own: set[int]) -> None:
    ignored = {
        p
        for name, p in module.named_parameters()
        if id(p) in own or name.endswith("selection_bias")
    }
    policy = MixedPrecisionPolicy(dtype, torch.float32)
    sharded = fully_shard(module, mesh=mesh, mp_policy=policy, ignored_params=ignored)
    sharded.set_gradient_divide_factor(1.0)
    sharded.set_force_sum_reduction_for_comms(True)


def whole_like(part: Tensor, parameter: Tensor) -> Tensor:
    """The whole of what is sharded as `parameter` is, from this process's part."""
    if not isinstance(parameter, DTensor):
        return part
    mesh, placements = parameter.device_mesh, parameter.placements
    shape, stride = parameter.shape, parameter.stride()
    return DTensor.from_local(part, mesh, placements, shape=shape, stride=stride).full_tensor()


def shard_like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """This process's part of a whole tensor, sharded as `parameter` is."""
    if not isinstance(parameter, DTensor):
        return tensor
    tensor = tensor.to(parameter.device)
    mesh, placements = parameter.device_mesh, parameter.placements
    return distribute_tensor(tensor, mesh, placements, src_data_rank=None).to_local()


def local(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor, sharing its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _own_gpu(device: torch.device, world: int) -> torch.device:
    if world == 1:
        return torch.device("cuda", device.index or 0)
    local, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if local >= gpus:
        raise ConfigError(
            f"process {local} of this host has no GPU, there are {gpus}; start as many with "
            "torchrun --nproc-per-node"
        )
    return torch.device("cuda", local)


@contextlib.contextmanager
def joined(section: ParallelSection, device: torch.device) -> Iterator[Parallel]:
    """This process among those that `torchrun` started, or alone, while it lasts.

    ConfigError where the processes cannot be divided into groups, or are more than there are GPUs.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world % section.experts:
        raise ConfigError(
            f"parallel.experts = {section.experts} does not divide {world} processes; "
            "start a multiple of it with torchrun"
        )
    if device.type == "cuda":
        device = _own_gpu(device, world)
        # Kernels of Triton are launched on the current one, wherever their arguments are.
        torch.cuda.set_device(device)
    if world == 1:
        yield Parallel(0, 1, device)
        return
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        timeout=datetime.timedelta(seconds=section.timeout),
    )
    try:
        groups = world // section.experts
        mesh = init_device_mesh(device.type, (groups, section.experts))
        yield Parallel(dist.get_rank(), world, device, mesh)
    finally:
        dist.destroy_process_group()
