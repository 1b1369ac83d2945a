"""`fourfold cluster role`: give a worker another role while it serves."""

from __future__ import annotations

import dataclasses
from typing import Annotated
from urllib.parse import quote

import tyro

from fourfold.cli.cluster import ServerOptions
from fourfold.engine.messages import Role


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Has a worker get new work by another role. What it computes now it finishes."""

    name: Annotated[str, tyro.conf.Positional]
    """The worker, as `fourfold cluster list` shows it."""
    role: Annotated[Role, tyro.conf.Positional, tyro.conf.EnumChoicesFromValues]
    """prefill, decode or both."""
    server: ServerOptions = ServerOptions()


def run(options: Options) -> int:
    path = f"/cluster/workers/{quote(options.name, safe='')}"
    worker = options.server.ask("POST", path, {"role": options.role.value})
    print(f"{worker['name']} takes {worker['role']} from now on")
    return 0
