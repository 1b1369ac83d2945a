"""Figures as files: the same data give the same bytes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from fourfold.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def write_figures(figures: Iterator[tuple[str, Figure]], folder: Path, ending: str) -> list[Path]:
    """Writes figures under their names; `ending` is svg, png or pdf. They are drawn while they are
    asked for. ConfigError without matplotlib, OSError for a folder that cannot be written."""
    try:
        import matplotlib
    except ImportError as error:
        raise ConfigError("figures need `pip install 'fourfold[plot]'`") from error
    folder.mkdir(parents=True, exist_ok=True)
    settings = {"svg.hashsalt": "fourfold", "font.size": 9, "axes.grid": True, "grid.alpha": 0.3}
    paths = []
    with matplotlib.rc_context(settings):
        for name, figure in figures:
            paths.append(folder / f"{name}.{ending}")
            metadata = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}.get(ending, {})
            figure.savefig(paths[-1], metadata=metadata, bbox_inches="tight", dpi=150)
    return paths
