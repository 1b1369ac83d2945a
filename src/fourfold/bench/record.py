"""The one schema of all benchmark records: what was run, on what, and the figures it gave.

A record is a JSON file under `benchmarks/results/` that anybody can make again with the `command`
it holds. What is not known is left out: a field is absent, never null or zero, so that a missing
figure cannot be mistaken for a measured one. Figures are finite and in the unit they name.

    results = [Result(case="batch 1", metric="tpot", value=0.0048, unit="s")]
    check_out(out, "decode")  # before anything is measured
    ...
    write(new_record("decode", "fourfold bench decode", results), out)
"""

from __future__ import annotations

import datetime
import functools
import importlib.metadata
import math
import os
import platform
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import UNSET, UnsetType

from fourfold.errors import ConfigError
from fourfold.files import write_atomically

DEFAULT_PACKAGES = ("fourfold", "torch", "triton", "transformers")


class Result(
    msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True
):
    """One figure. `limit`, `mark` and `peer_value` are in the unit of `value`.

    `limit` is what the device allows (`limit_name`: "copy bandwidth"), `mark` what is to be
    reached, `peer_value` what `peer` ("vLLM 0.23.0") reached on the same case. ValueError for a
    figure that is not finite, or a `limit` or `peer_value` without its name.
    """

    case: str
    metric: str
    value: float
    unit: str
    limit: float | UnsetType = UNSET
    limit_name: str | UnsetType = UNSET
    mark: float | UnsetType = UNSET
    peer: str | UnsetType = UNSET
    peer_value: float | UnsetType = UNSET

    def __post_init__(self) -> None:
        for field in ("value", "limit", "mark", "peer_value"):
            figure = getattr(self, field)
            if figure is not UNSET and not math.isfinite(figure):
                raise ValueError(f"{field} of {self.metric} ({self.case}) is {figure}, not finite")
        if (self.limit is UNSET) != (self.limit_name is UNSET):
            raise ValueError(f"{self.metric} ({self.case}) needs both limit and limit_name")
        if (self.peer is UNSET) != (self.peer_value is UNSET):
            raise ValueError(f"{self.metric} ({self.case}) needs both peer and peer_value")


class Hardware(
    msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True
):
    """The machine that ran the command: `cores` usable by this process, `memory_gib` of RAM."""

    cpu: str
    cores: int
    memory_gib: float
    gpus: tuple[str, ...] = ()


class Record(
    msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True
):
    """One run of one benchmark. `commit` ends in "-dirty" where the working tree differed.

    ValueError where one figure is given twice: same case, metric and peer.
    """

    name: str
    command: str
    commit: str | UnsetType = UNSET
    date: Annotated[datetime.datetime, msgspec.Meta(tz=True)]
    hardware: Hardware
    software: dict[str, str]
    results: tuple[Result, ...]

    def __post_init__(self) -> None:
        seen: set[tuple[str, str, str | UnsetType]] = set()
        for result in self.results:
            key = (result.case, result.metric, result.peer)
            if key in seen:
                raise ValueError(f"{result.metric} ({result.case}) appears twice in {self.name}")
            seen.add(key)


def new_record(
    name: str,
    command: str,
    results: Iterable[Result],
    *,
    packages: Sequence[str] = DEFAULT_PACKAGES,
) -> Record:
    """A record of figures measured just now: fills in commit, date, hardware and software. The
    commit is that at `check_out`, and dirty where it is another by now."""
    return Record(
        name=name,
        command=command,
        commit=_commit_of_run(),
        date=datetime.datetime.now(datetime.UTC).replace(microsecond=0),
        hardware=this_hardware(),
        software=software_versions(packages),
        results=tuple(results),
    )


def write(record: Record, path: str | Path) -> None:
    """Writes a record that `load` accepts, atomically. ValidationError for any other."""
    data = msgspec.json.encode(record)
    msgspec.json.decode(data, type=Record)  # structs do not check types when built in Python
    write_atomically(Path(path), msgspec.json.format(data, indent=2) + b"\n")


def check_out(path: Path | None, name: str) -> None:
    """Finds out before a run, not after it, that its record cannot be kept: ConfigError where
    `path` cannot be written, or holds anything but an earlier record of the same name. Notes the
    commit that the run is of."""
    if path is None:
        return
    _commit_at_start()
    check_writable(path)
    if not path.exists():
        return
    try:
        found = load(path).name
    except ConfigError as error:
        raise ConfigError(
            f"--out {path} exists and is not a benchmark record; give another file"
        ) from error
    if found != name:
        raise ConfigError(
            f"--out {path} holds the record {found!r}, which {name!r} would replace; "
            "give another file"
        )


def check_writable(path: Path) -> None:
    """ConfigError where no file of this path could be written, its folder made if need be."""
    folder = path.absolute().parent
    while not folder.exists():
        folder = folder.parent
    unfit = path.exists() and not path.is_file()
    if unfit or not folder.is_dir() or not os.access(folder, os.W_OK):
        raise ConfigError(f"{path} cannot be written; give another file")


def load(path: str | Path) -> Record:
    """Reads a record strictly: ConfigError for an unknown, missing, null or mistyped field."""
    try:
        return msgspec.json.decode(Path(path).read_bytes(), type=Record)
    except (OSError, msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"{path} is not a benchmark record ({error}); run its benchmark again"
        ) from error


def with_peer(results: Iterable[Result], peer: str, record: Record) -> list[Result]:
    """The results with `peer`'s figures beside them, where its record has the same case, metric
    and unit. ConfigError where it has none of them: then it ran another workload."""
    figures = {(r.case, r.metric, r.unit): r.value for r in record.results}
    joined = []
    for result in results:
        figure = figures.get((result.case, result.metric, result.unit))
        if figure is not None:
            result = msgspec.structs.replace(result, peer=peer, peer_value=figure)
        joined.append(result)
    if all(result.peer is UNSET for result in joined):
        raise ConfigError(
            f"the record of {peer} shares no figure with this one; run it with the same options"
        )
    return joined


def source_commit() -> str | UnsetType:
    """The commit of the checkout this package runs from; absent where it is not a checkout.

    Records themselves do not make a tree dirty, so that several benchmarks can run in a row.
    """
    here = Path(__file__)

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(here.parent), *arguments],
                capture_output=True,
                text=True,
                timeout=30,
                check=False,
            )
        except (FileNotFoundError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    # An installed package may lie inside somebody else's repository, which then does not track it.
    if git("ls-files", "--error-unmatch", here.name) is None:
        return UNSET
    commit = git("rev-parse", "HEAD")
    changes = git("status", "--porcelain", "--", ":(top)", ":(top,exclude)benchmarks/results")
    if commit is None or changes is None:
        return UNSET
    return f"{commit}-dirty" if changes else commit


@functools.cache
def _commit_at_start() -> str | UnsetType:
    return source_commit()


def _commit_of_run() -> str | UnsetType:
    # Processes that started after a change ran other code than this one.
    began = _commit_at_start()
    if began is UNSET or began == source_commit() or began.endswith("-dirty"):
        return began
    return f"{began}-dirty"


def this_hardware() -> Hardware:
    """This machine. GPUs are named only where torch is imported already and sees them."""
    torch = sys.modules.get("torch")
    gpus: tuple[str, ...] = ()
    if torch is not None and torch.cuda.is_available():
        gpus = tuple(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Hardware(
        cpu=_cpu_model(), cores=_usable_cores(), memory_gib=round(memory / 2**30, 1), gpus=gpus
    )


def _cpu_model() -> str:
    listing = Path("/proc/cpuinfo")
    if listing.exists():
        for line in listing.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _usable_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def software_versions(packages: Sequence[str] = DEFAULT_PACKAGES) -> dict[str, str]:
    """Versions of Python, of those `packages` that are installed, and of CUDA where torch is
    imported already and built with it."""
    versions = {"python": platform.python_version()}
    for package in packages:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    torch = sys.modules.get("torch")
    if torch is not None and torch.version.cuda is not None:
        versions["cuda"] = torch.version.cuda
    return versions
