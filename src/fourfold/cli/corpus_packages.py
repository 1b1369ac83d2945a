"""`fourfold corpus packages`: real text that anybody can gather again, from installed packages."""

from __future__ import annotations

import itertools
import sys

from fourfold.errors import ConfigError
from fourfold.train.data.config import PackagesConfig as Options

__all__ = ["Options", "run"]

_LICENCES_SHOWN = 8


def run(options: Options) -> int:
    from rich.console import Console
    from rich.progress import Progress, TextColumn, TimeElapsedColumn

    from fourfold.train.data.packages import gather, licences

    found = TextColumn("{task.completed:,} texts, {task.fields[size]:.0f} MB")
    columns = found, TimeElapsedColumn()
    console = Console(stderr=True)
    try:
        with Progress(*columns, console=console, disable=not console.is_interactive) as bar:
            task = bar.add_task("gather", total=None, size=0.0)
            corpus = gather(
                options, lambda done, size: bar.update(task, completed=done, size=size / 1e6)
            )
    except OSError as error:
        raise ConfigError(f"{options.out} cannot be written ({error}); set --out") from error
    left = ", ".join(f"{count:,} {reason}" for reason, count in corpus.left_out.items()) or "none"
    print(
        f"{options.out}: {corpus.documents:,} texts of {len(corpus.sources)} packages, "
        f"{corpus.bytes / 1e6:.1f} MB; left out: {left}",
        file=sys.stderr,
    )
    for licence, size in itertools.islice(licences(corpus.sources), _LICENCES_SHOWN):
        print(f"  {size / 1e6:8.1f} MB  {licence}", file=sys.stderr)
    return 0
