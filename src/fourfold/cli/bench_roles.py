"""`fourfold bench roles`: what computing prompts and answers apart costs and gains."""

from __future__ import annotations

from fourfold.bench.roles.config import RolesBenchConfig as Options

__all__ = ["Options", "run"]


def run(options: Options) -> int:
    from fourfold.bench.roles.main import main

    return main(options)
