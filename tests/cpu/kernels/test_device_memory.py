"""Taking another process's descriptor, which is how GPU memory is shared; the rest needs a GPU."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from fourfold.kernels import device_memory
from fourfold.transport.peer import DeviceMemory

TAKE = """
import os, sys
from fourfold.kernels.device_memory import DeviceMemoryError, _descriptor_of
from fourfold.transport.peer import DeviceMemory
process, descriptor = map(int, sys.argv[1:])
try:
    print(os.pread(_descriptor_of(DeviceMemory(process, descriptor, 5)), 5, 0).decode())
except DeviceMemoryError as error:
    print(error)
"""


def taken_elsewhere(process: int, descriptor: int) -> str:
    arguments = [sys.executable, "-c", TAKE, str(process), str(descriptor)]
    return subprocess.run(arguments, stdout=subprocess.PIPE, text=True, check=True).stdout


@pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="needs Linux")
def test_a_neighbour_takes_the_memory_that_is_named() -> None:
    descriptor = os.memfd_create("pages")
    os.write(descriptor, b"pages")
    device_memory._let_others_ask()
    assert taken_elsewhere(os.getpid(), descriptor) == "pages\n"
    here = device_memory._descriptor_of(DeviceMemory(os.getpid(), descriptor, 5))
    assert os.pread(here, 5, 0) == b"pages"
    os.close(here)
    os.close(descriptor)
    assert "does not hand out its memory" in taken_elsewhere(os.getpid(), 1_000_000)


def test_a_process_that_has_gone_is_named() -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    with pytest.raises(device_memory.DeviceMemoryError, match=f"process {gone.pid}"):
        device_memory._descriptor_of(DeviceMemory(gone.pid, 3, 5))


def test_memory_that_cannot_be_mapped_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """The descriptor keeps it as well as a handle does."""
    descriptor, called = os.open(os.devnull, os.O_RDONLY), []

    def call(name: str, *arguments: object) -> None:
        called.append(name)
        if name == "cuMemExportToShareableHandle":
            arguments[0]._obj.value = descriptor  # type: ignore[attr-defined]
        if name == "cuMemAddressReserve":
            raise device_memory.DeviceMemoryError("no addresses are left")

    monkeypatch.setattr(device_memory, "_call", call)
    monkeypatch.setattr(device_memory, "_room", lambda size, properties: size)
    with pytest.raises(device_memory.DeviceMemoryError, match="no addresses"):
        device_memory.share(5, torch.device("cuda", 0))
    assert called[-1] == "cuMemRelease"
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)
