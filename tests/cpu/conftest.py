"""What many tests share: tiny checkpoints, made once, and the reference that answers for them."""

from __future__ import annotations

import gc
import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    import transformers

# What is imported stays: looking through it again and again is a fifth of the time of importing.
gc.disable()
# As the command line sets it, before torch is imported: runs that share cores end much sooner.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")
# Kernels run in Triton's interpreter here; transformers imports Triton, which then looks once.
os.environ.setdefault("TRITON_INTERPRET", "1")
# A shell has what it runs in the background ignore Ctrl-C, and so would the programs tested.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int | None:
    """One more than there are cores: now and then a test waits, for a process or for time."""
    if "PYTEST_XDIST_AUTO_NUM_WORKERS" in os.environ or not hasattr(os, "sched_getaffinity"):
        return None  # as pytest-xdist would have it
    return 1 + len(os.sched_getaffinity(0))


def pytest_sessionstart(session: pytest.Session) -> None:
    """Where several processes test, the one that starts them collects nothing, and needs no
    torch."""
    if getattr(session.config.option, "numprocesses", None):
        gc.enable()


def pytest_collection_finish() -> None:
    import torch

    torch.set_num_threads(1)  # the models are tiny, and test runs share their cores
    gc.freeze()
    gc.enable()


@pytest.fixture(autouse=True)
def own_excepthook() -> Iterator[None]:
    """A worker made by a test has every thread that fails end the process; not that of others."""
    hook = threading.excepthook
    yield
    threading.excepthook = hook


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a family's tiny checkpoint, by the family's name."""
    from tests.cpu import tiny

    made: dict[str, Path] = {}

    def find(name: str) -> Path:
        if name not in made:
            made[name] = tiny.save_checkpoint(name, tmp_path_factory.mktemp(name))
        return made[name]

    return find


@pytest.fixture(scope="session")
def reference(
    checkpoint: Callable[[str], Path],
) -> Callable[[str], transformers.PreTrainedModel]:
    """transformers' model of a family's tiny checkpoint."""
    from tests.cpu import tiny

    made: dict[str, transformers.PreTrainedModel] = {}

    def find(name: str) -> transformers.PreTrainedModel:
        if name not in made:
            made[name] = tiny.load_reference(checkpoint(name))
        return made[name]

    return find
