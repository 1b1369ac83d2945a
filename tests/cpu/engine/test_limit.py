"""What a step may hold after one did not fit into memory, and how that grows back."""

from __future__ import annotations

import dataclasses

import pytest

from fourfold.engine.limit import Limit


@dataclasses.dataclass
class Device:
    """Memory that holds steps up to `room`, and whoever fills them."""

    limit: Limit
    room: int
    failures: int = 0

    def step(self, wanted: int) -> None:
        """As the engine does: a step that does not fit is tried with half."""
        used = min(wanted, self.limit.value)
        while used > self.room:
            self.failures += 1
            self.limit.fall(used, used // 2)
            used = min(wanted, self.limit.value)
        self.limit.fitted(used)

    def run(self, steps: int, wanted: int = 10**6) -> None:
        for _ in range(steps):
            self.step(wanted)


@pytest.mark.parametrize(("most", "rise", "room"), [(8192, 512, 5000), (256, 1, 200), (40, 3, 2)])
def test_a_size_that_does_not_fit_is_tried_ever_more_rarely(
    most: int, rise: int, room: int
) -> None:
    device = Device(Limit(most, rise), room)
    device.run(100_000)
    early = device.failures
    assert room - rise < device.limit.value <= room
    device.run(100_000)
    assert early < 25
    assert device.failures - early <= 7


@pytest.mark.parametrize(("most", "rise"), [(8192, 512), (256, 1)])
def test_all_is_allowed_again_once_there_is_more_memory(most: int, rise: int) -> None:
    device = Device(Limit(most, rise), most // 2)
    device.run(1000)
    assert device.limit.value <= most // 2
    device.room = most
    device.run(40_000)
    assert device.limit.value == most
    failures = device.failures
    device.room = most // 2  # it is as wary as at first, not as it was at last
    device.step(most)
    device.room = most
    device.run(32 * most // rise // 2)
    assert device.limit.value == most
    assert device.failures == failures + 1


def test_a_rise_that_went_wrong_costs_no_more_than_itself() -> None:
    device = Device(Limit(8192, 512), 4607)
    device.run(32)
    assert device.limit.value == 4608
    device.run(1)
    assert device.limit.value == 4096
    assert device.failures == 2


def test_steps_that_do_not_need_it_say_nothing_about_a_limit() -> None:
    device = Device(Limit(8192, 512), 5000)
    device.step(8192)
    assert device.limit.value == 4096
    device.run(10_000, wanted=300)
    assert device.limit.value == 4096
    device.run(30)
    assert device.limit.value == 4096
    device.run(1)
    assert device.limit.value == 4608


def test_memory_that_runs_out_at_once_halves_a_limit_again_and_again() -> None:
    device = Device(Limit(8192, 512), 600)
    device.step(8192)
    assert (device.limit.value, device.failures) == (512, 4)
    device.room = 8192
    device.run(31)
    assert device.limit.value == 1024  # none of it was a rise that went wrong


def test_it_says_once_that_all_is_allowed_again() -> None:
    limit = Limit(80, 10)
    limit.fall(80, 60)
    said = [limit.fitted(limit.value) for _ in range(300)]
    assert said.count(True) == 1
    assert said.index(True) == 2 * 32 - 1
