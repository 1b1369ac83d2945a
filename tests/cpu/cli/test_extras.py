"""Messages that say what to install name the project's extras where there are some."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
from pathlib import Path

import pytest

import fourfold
from fourfold.bench.offline.config import OfflineBenchConfig
from fourfold.bench.offline.main import main
from fourfold.errors import ConfigError

PACKAGES = {"matplotlib", "nixl", "pyarrow", "tensorboard", "transformers"}
"""What an extra brings, with the version that it needs."""


def test_no_message_names_a_package_that_an_extra_brings() -> None:
    extras = set(importlib.metadata.metadata("fourfold").get_all("Provides-Extra") or ())
    named = set()
    for path in Path(fourfold.__file__).parent.rglob("*.py"):
        for what in re.findall(r"pip install ([^`\s)]+)", path.read_text(encoding="utf-8")):
            assert what not in PACKAGES, path
            named |= set(re.findall(r"^'fourfold\[(.+)\]'", what))
    assert named
    assert named <= extras


def test_a_peer_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'fourfold\[transformers\]'"):
        main(OfflineBenchConfig(peers=("transformers",), out=None))
