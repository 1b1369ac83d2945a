"""`fourfold law fit`: the law's coefficients, their intervals, and the leverage of sparsity."""

from __future__ import annotations

from fourfold.errors import ConfigError
from fourfold.train.law.config import FitConfig as Options

__all__ = ["Options", "run"]


def run(options: Options) -> int:
    from fourfold.train.law.records import read_records
    from fourfold.train.law.report import lines_of, make_report, write_report

    out = options.out or options.records.parent / "fit.json"
    if options.out is None and out.exists():
        raise ConfigError(f"{out} is there already; replace it with --out {out}, or name another")
    report = make_report(
        read_records(options.records, least_tokens=options.least_tokens),
        starts=options.starts,
        resamplings=options.resamplings,
        seed=options.seed,
        least_tokens=options.least_tokens,
    )
    try:
        write_report(report, out)
    except OSError as error:
        raise ConfigError(f"{out} cannot be written ({error}); set --out") from error
    for line in lines_of(report):
        print(line)
    return 0
