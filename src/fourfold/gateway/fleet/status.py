"""What operators see of a worker."""

from __future__ import annotations

import msgspec

from fourfold.engine.messages import EngineStats, Role
from fourfold.gateway.fleet.members import Member, State
from fourfold.transport.stats import PathStats


class WorkerStatus(msgspec.Struct, frozen=True, kw_only=True):
    """One worker at this moment."""

    name: str
    role: Role
    state: State
    pid: int
    local: bool
    """Whether the gateway started it."""
    device: str
    """What it computes on; empty while it loads."""
    peer: str
    """Where others send pages to it; empty while it loads."""
    samples: int
    """That it was given and has not finished."""
    queued_tokens: int
    """Of prompts that it was given and has not computed."""
    prompt_rate: float | None
    """Prompt tokens per second that it was seen to compute."""
    token_rate: float | None
    """Tokens of answers per second, over all samples, likewise."""
    stats: EngineStats
    paths: list[PathStats]
    """What came of its links to other workers."""


def describe(member: Member) -> WorkerStatus:
    """A member as others see it."""
    ready = member.ready
    return WorkerStatus(
        name=member.name,
        role=member.role,
        state=member.state,
        pid=member.hello.pid,
        local=member.local,
        device="" if ready is None else ready.device,
        peer="" if ready is None else f"{ready.peer.host}:{ready.peer.port}",
        samples=member.burden.samples,
        queued_tokens=member.burden.tokens,
        prompt_rate=member.prompt_rate,
        token_rate=member.token_rate,
        stats=member.stats,
        paths=member.paths,
    )
