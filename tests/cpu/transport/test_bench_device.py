"""The benchmark of pages on a GPU, with memory of the host in its place: all but CUDA's own calls.

Both sides run in this process, the far one on a thread, and tell each other what processes would.
"""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest
import torch

from fourfold.bench.record import load
from fourfold.bench.transport import device, main
from fourfold.bench.transport.config import TransportBenchConfig
from fourfold.bench.transport.far import Far
from fourfold.bench.transport.near import FarProcess
from fourfold.errors import ConfigError
from fourfold.kernels.device_memory import DeviceMemoryError
from fourfold.quadrants.kv_pages import FloatPages
from fourfold.transport.peer import DeviceMemory, DevicePages

CONFIG = TransportBenchConfig(
    size=4, page_bytes=8192, streams=2, rounds=1, run_pages=(4, 1), paths=("device",)
)


class FarThread(FarProcess):
    """The far side on a thread."""

    def __init__(self) -> None:
        (commands, told), (heard, answers) = os.pipe(), os.pipe()
        self._commands, self._answers = os.fdopen(told, "wb"), os.fdopen(heard, "rb")
        self._thread = threading.Thread(
            target=self._run, args=(Far(os.fdopen(commands, "rb"), os.fdopen(answers, "wb")),)
        )
        self._thread.start()

    def _run(self, far: Far) -> None:
        with far._commands, far._answers:
            far.run()
        if far._device is not None:
            far._device.close()

    def close(self) -> None:
        self._commands.close()
        self._thread.join(30)
        self._answers.close()


@pytest.fixture
def memories(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """What stands for the memory of a GPU, by descriptor."""
    found: list[torch.Tensor] = []

    def describe(pages: FloatPages) -> DevicePages:
        (memory,) = pages.memory
        found.append(memory.bytes)
        records = DeviceMemory(0, len(found) - 1, memory.bytes.numel())
        return DevicePages(gpu="one", pages=pages.data.shape[1], records=records)

    monkeypatch.setattr(device, "find_gpu", lambda: torch.device("cpu"))
    monkeypatch.setattr(device, "describe", describe)
    monkeypatch.setattr(device, "attach", lambda memory, device: found[memory.descriptor])
    monkeypatch.setattr(main, "FarProcess", FarThread)
    return found


def test_pages_are_pulled_and_timed_beside_a_plain_copy(
    memories: list[torch.Tensor], tmp_path: Path
) -> None:
    out = tmp_path / "transport.json"
    config = TransportBenchConfig(
        size=4, page_bytes=8192, streams=2, rounds=2, run_pages=(4, 1), paths=("device",), out=out
    )
    assert main.main(config) == 0
    record = load(out)
    assert "--paths device" in record.command
    cases = {result.case for result in record.results}
    assert cases == {
        "device memory, 4 MiB in pages of 8 KiB in runs of 4",
        "device memory, 4 MiB in pages of 8 KiB scattered",
    }
    metrics = [result.metric for result in record.results]
    assert metrics[:3] == ["rate", "rate_of_hashing", "rate_of_moving"]
    assert not any("checksums" in metric for metric in metrics)
    for rate in record.results:
        if rate.metric == "rate":
            assert rate.peer == "copy_ on the device"
            assert isinstance(rate.peer_value, float)
            assert rate.mark == pytest.approx(0.8 * rate.peer_value)
    near, far, *_ = memories
    pages = [set(map(bytes, each.view(-1, 8192).numpy())) for each in (near, far)]
    assert pages[0] == pages[1] != {bytes(8192)}


def test_a_copy_of_memory_does_not_pass_for_it(
    memories: list[torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As PyTorch makes one where it is asked for memory of one GPU on another."""
    copies = lambda memory, device: memories[memory.descriptor].clone()  # noqa: E731
    monkeypatch.setattr(device, "attach", copies)
    with pytest.raises(RuntimeError, match="changed while they were copied"):
        main.main(CONFIG)


def test_memory_that_cannot_be_mapped_is_an_error(
    memories: list[torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(memory: DeviceMemory, device: torch.device) -> torch.Tensor:
        raise DeviceMemoryError("process 0 does not hand out its memory")

    monkeypatch.setattr(device, "attach", refuse)
    with pytest.raises(ConfigError, match="out of this GPU: process 0 does not hand out"):
        main.main(CONFIG)


def test_pages_that_an_engine_would_not_pull_are_an_error(
    memories: list[torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device, "may_pull", lambda sender, receiver: False)
    with pytest.raises(ConfigError, match="see the same GPU"):
        main.main(CONFIG)


def test_memory_that_is_not_shared_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "find_gpu", lambda: torch.device("cpu"))
    monkeypatch.setattr(main, "FarProcess", FarThread)
    with pytest.raises(ConfigError, match=r"cannot be shared .* leave device out of --paths"):
        main.main(CONFIG)


def test_without_a_gpu_nothing_is_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delattr(main, "FarProcess")
    with pytest.raises(ConfigError, match="needs a GPU"):
        main.main(TransportBenchConfig(paths=("tcp", "device")))


def test_pages_of_odd_sizes_are_refused() -> None:
    with pytest.raises(ConfigError, match="multiple of 256"):
        TransportBenchConfig(page_bytes=10_000, paths=("device",))
