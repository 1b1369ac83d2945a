"""`fourfold law plot`: figures of a fitted law."""

from __future__ import annotations

from fourfold.errors import ConfigError
from fourfold.train.law.config import PlotConfig as Options

__all__ = ["Options", "run"]


def run(options: Options) -> int:
    from fourfold.train.law.plots import draw
    from fourfold.train.law.records import read_records
    from fourfold.train.law.report import read_report

    folder = options.fit.parent
    report = read_report(options.fit)
    records = read_records(options.records or folder / "records", least_tokens=report.least_tokens)
    out = options.out or folder / "plots"
    try:
        paths = draw(report, records, out, options.form)
    except OSError as error:
        raise ConfigError(f"{out} cannot be written ({error}); set --out") from error
    for path in paths:
        print(path)
    return 0
