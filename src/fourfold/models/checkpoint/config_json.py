"""The config.json of a Hugging Face directory. Imports no torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fourfold.errors import CheckpointError


def read_config_json(folder: Path) -> dict[str, Any]:
    """All fields as they are written. Raises `CheckpointError` where it cannot be read."""
    file = folder / "config.json"
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} is not readable JSON ({error})") from error
    if not isinstance(fields, dict):
        raise CheckpointError(f"{file} is not a JSON object")
    return fields
