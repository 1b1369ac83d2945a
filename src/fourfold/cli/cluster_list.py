"""`fourfold cluster list`: show a server's workers."""

from __future__ import annotations

import dataclasses

from fourfold.cli.cluster import ServerOptions


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Shows the workers of a running server."""

    server: ServerOptions = ServerOptions()


def run(options: Options) -> int:
    from rich.console import Console
    from rich.table import Table

    columns = ("name", "role", "state", "device", "pid", "samples", "pages", "peer")
    table = Table(*columns, box=None, pad_edge=False)
    for worker in options.server.ask("GET", "/cluster/workers")["data"]:
        stats = worker["stats"]
        pages = f"{stats['pages_in_use']}/{stats['pages_total']}"
        cells = {**worker, "pages": pages}
        table.add_row(*(str(cells[column]) for column in columns))
    Console(soft_wrap=True).print(table)
    return 0
