"""What a finished run gave: one JSON file each. A run without a record was not finished."""

from __future__ import annotations

from pathlib import Path

import msgspec
from msgspec import UNSET, UnsetType

from fourfold.errors import ConfigError
from fourfold.files import write_atomically


class RunRecord(
    msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True
):
    """One trained model. Parameters leave out the embedding and the head. ValueError for figures
    that cannot be."""

    name: str
    chain: str
    """Runs of one chain share their stable phase, and so their luck."""
    model: str
    """Of which size, by the grid's name."""
    ratio: int
    """Experts for each that a token chooses; 1: dense."""
    chosen: int
    """Experts that a token chooses; of a dense model those that its sparse twins' tokens choose."""
    seed: int
    active: int
    """Parameters that a token passes."""
    total: int
    tokens: int
    """Predicted in training."""
    loss: float
    """On held-out text, nats per token."""
    evaluated_tokens: int
    bytes_per_token: float
    """Of the held-out text; with it a loss per token is one per byte."""
    flops_per_token: float
    """Of training, as `train.model.Counts` counts them."""
    layers: int
    width: int
    tokens_per_second: float | UnsetType = UNSET
    """The median of the steps that were logged; absent where none was."""
    mfu: float | UnsetType = UNSET
    """The same of the share of the devices' peak; absent where that is not known."""
    arguments: tuple[str, ...]
    """Of `fourfold train`, the configuration file first."""
    config_sha256: str
    """Of what its configuration says of the result: see `sweep`."""
    hardware: str
    """What each process that trained it computed on."""
    versions: dict[str, str]

    @property
    def steps(self) -> int | None:
        """Of the optimizer, where the arguments say it, as those of a sweep do."""
        name = "schedule.steps="
        given = [word.removeprefix(name) for word in self.arguments if word.startswith(name)]
        return int(given[-1]) if given else None

    def __post_init__(self) -> None:
        counts = (self.active, self.total, self.tokens, self.ratio, self.chosen)
        if min(*counts, self.evaluated_tokens) < 1:
            raise ValueError(f"{self.name}: parameters, tokens, experts and ratio are at least 1")
        # Also where it is not a number.
        if not 0 < self.loss < 1e3:
            raise ValueError(f"{self.name}: a loss of {self.loss} is none")
        if self.total < self.active:
            raise ValueError(f"{self.name}: {self.active} of {self.total} parameters are active")


def write_record(record: RunRecord, path: Path) -> None:
    """Writes what `read_records` reads."""
    write_atomically(path, msgspec.json.format(msgspec.json.encode(record), indent=2) + b"\n")


def read_record(path: Path) -> RunRecord:
    """ConfigError for what is no record."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=RunRecord)
    except (OSError, msgspec.DecodeError) as error:
        raise ConfigError(
            f"{path} is not the record of a run ({error}); delete it and run the sweep again"
        ) from error


def read_records(folder: Path, *, least_tokens: float = 0.0) -> list[RunRecord]:
    """The records in a folder, of runs on so many tokens or more, sorted by name. ConfigError where
    there is none, a name twice, or losses on different texts."""
    records = sorted(map(read_record, folder.glob("*.json")), key=lambda record: record.name)
    if not records:
        raise ConfigError(f"{folder} holds no records; run `fourfold law sweep` first")
    names = [record.name for record in records]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ConfigError(f"{folder} holds {', '.join(sorted(twice))} twice; delete one of each")
    first = records[0]
    for other in records:
        texts = [(each.bytes_per_token, each.evaluated_tokens) for each in (first, other)]
        if texts[0] != texts[1]:
            raise ConfigError(
                f"{folder}: {first.name} and {other.name} were evaluated on different texts, so "
                "their losses cannot be compared; delete the records of one kind"
            )
    kept = [record for record in records if record.tokens >= least_tokens]
    if not kept:
        raise ConfigError(
            f"{folder} holds no run on {least_tokens:,.0f} tokens or more; lower --least-tokens"
        )
    return kept
