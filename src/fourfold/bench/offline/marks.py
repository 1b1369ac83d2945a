"""What is to be reached in each case, and what another engine reached: a file to compare with."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec
from msgspec import UNSET, UnsetType

from fourfold.bench.offline.cases import Case
from fourfold.bench.record import Result
from fourfold.errors import ConfigError


class Mark(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Of one figure, in `unit`: what is to be reached, and what `peer` reached."""

    case: str
    metric: str
    unit: str
    mark: float
    peer: str | UnsetType = UNSET
    peer_value: float | UnsetType = UNSET


class Marks(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All marks of one model on one kind of GPU; `source` says how the peer was measured."""

    source: str
    marks: tuple[Mark, ...]


def load_marks(path: Path, cases: Sequence[Case]) -> Marks:
    """Reads a file of marks. ConfigError where it is none, or has none of any of the cases."""
    try:
        marks = msgspec.json.decode(path.read_bytes(), type=Marks)
    except (OSError, msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} holds no marks ({error}); see benchmarks/marks") from error
    if not {mark.case for mark in marks.marks} & {case.title for case in cases}:
        raise ConfigError(f"none of the marks in {path} is of a case to be measured; see --cases")
    return marks


def with_marks(results: Sequence[Result], marks: Marks) -> list[Result]:
    """The results with their marks, and with the peer's figures where they have no peer yet."""
    by_figure = {(mark.case, mark.metric, mark.unit): mark for mark in marks.marks}
    marked = []
    for result in results:
        mark = by_figure.get((result.case, result.metric, result.unit))
        if mark is not None:
            result = msgspec.structs.replace(result, mark=mark.mark)
            if result.peer is UNSET and mark.peer is not UNSET:
                result = msgspec.structs.replace(result, peer=mark.peer, peer_value=mark.peer_value)
        marked.append(result)
    return marked
