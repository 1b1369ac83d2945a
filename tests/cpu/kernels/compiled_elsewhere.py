"""Run with TRITON_INTERPRET=0: what `kernels.compiling` notes on a machine that pretends to have a
GPU, and that the compiler makes just that of it; with an argument, what becomes of a kernel that
does not compile. Prints what it found as JSON."""

from __future__ import annotations

import contextlib
import json
import sys
import threading
from typing import Any

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from fourfold.kernels import compiling
from fourfold.kernels.decode_attention import DecodeShape, PlanBuffers, PlanCapacity
from fourfold.kernels.decode_attention import launch as attention
from fourfold.kernels.pages.layout import PageLayout
from fourfold.kernels.pages.triton_move import launch_move
from fourfold.kernels.rows.triton_rows import launch_quantize
from fourfold.kernels.sample import SampleParams, SampleRow, triton_newest, triton_sample
from fourfold.kernels.sample.choose import choose


@triton.jit
def scale(x, y, count, KIND: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    factor: tl.constexpr = 2.0 if KIND == "int8" else 3.0
    tl.store(y + i, tl.load(x + i, i < count) * factor, i < count)


@triton.jit
def wrong(x, y, count):
    if count > 3:
        y = 7
    tl.store(x, y)


def launch(count: int, kind: str) -> Any:
    x = torch.empty(count)
    scale[(1,)](x, x, count, KIND=kind, BLOCK=128)
    return x


def walk() -> None:
    assert int(torch.empty(100, dtype=torch.int64).max()) == 0
    for count in (32, 48, 33, 1):  # a multiple of 16, another, none, one
        launch(count, "int8")
    for dtype in (torch.bfloat16, torch.float16):
        launch_quantize(torch.empty(4, 256, dtype=dtype), torch.int8, 256, None)
    attend()
    move()
    # The interpreter takes what the compiler does not: names that change their types.
    params = SampleParams.pack([SampleRow(key=1, position=1)], torch.device("cpu"))
    last_N = torch.zeros(2, dtype=torch.int64)
    triton_newest.launch(torch.zeros_like(last_N, dtype=torch.int32), last_N.int(), last_N)
    for kept in (None, last_N):
        tokens_S, logprobs_S = torch.empty(1, dtype=torch.int64), torch.empty(1)
        packed = params.packed_SF
        cut = choose(5000)
        triton_sample.launch(torch.zeros(1, 5000), packed, None, cut, tokens_S, logprobs_S, kept)


def attend() -> None:
    """Decode attention in both tiles, as on Hopper."""
    shape = DecodeShape(heads=32, kv_heads=4, head_width=128)
    layout = PageLayout(kv_heads=4, head_width=128)
    capacity = PlanCapacity.of_tasks(shape, rows=16, tasks=((64, 32), (16, 32)), pages=1, merged=64)
    records = torch.zeros(1, layout.record_bytes, dtype=torch.uint8)
    open_k, open_v = torch.zeros(2, 64, 4, 128, dtype=torch.bfloat16)
    q = torch.zeros(16, 32, 128, dtype=torch.bfloat16)
    buffers = PlanBuffers(shape, capacity, q.device)
    attention.launch_tasks(q, records, open_k, open_v, layout, buffers, 1.0)


def move() -> None:
    """Pages of one size, few and many of them, of all layers and of some."""
    for pages, jobs in ((1, 1), (7, 3), (64, 16), (48, 32)):
        source, target = (torch.empty(4, n, 16384, dtype=torch.uint8) for n in (pages, 33))
        ids = torch.zeros(jobs, dtype=torch.int64)
        for of in (slice(0, 4), slice(1, 2)):
            launch_move(None, None, source[of], ids)
            launch_move(target[of], ids, source[of], ids)


def walk_wrongly() -> None:
    for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.int32):
        for count in (5, 48):
            wrong[(1,)](torch.empty(4, dtype=dtype), torch.empty(4, dtype=dtype), count)


def pretend() -> None:
    compiling._compile_for(GPUTarget("cuda", 90, 32))
    type(driver.active).get_current_stream = lambda self, device: 0
    attention._is_hopper = attention.overlaps_launches = lambda device: True


def fail() -> None:
    """The compiler's error comes to who waits, and all processes end."""
    torch.cuda.set_device = lambda device: None
    with contextlib.suppress(Exception), compiling.KernelCompiler() as compiler:
        pretend()
        compiler.start(walk_wrongly, torch.device("cuda", 0))
        try:
            compiler.wait()
        except Exception as error:
            print(json.dumps(str(error)))
            raise


def main() -> None:
    pretend()
    with compiling.noted_launches() as noted:
        walk()
    first = sorted(form.name for form in noted.values())
    for form in noted.values():
        assert not form.is_cached
        assert form.compiled() is not None
        assert form.is_cached
    with compiling.noted_launches() as noted:
        walk()
        again = len(noted)
        launch(32, "other")
        other = len(noted)
        # Another thread's launches are made as ever; without a GPU they cannot be.
        errors: list[Exception] = []

        def elsewhere() -> None:
            try:
                launch(32, "int8")
            except Exception as error:
                errors.append(error)

        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
    late: list[str] = []
    compiling.tell_of_late_kernels(late.append)
    with compiling.noted_launches() as noted:
        launch(32, "third")
    for form in noted.values():
        form.compiled()
    assert not late
    with contextlib.suppress(Exception):  # as above
        launch(32, "fourth")
    print(
        json.dumps(
            {"first": first, "again": again, "other": other, "made": len(errors), "late": late}
        )
    )


if __name__ == "__main__":
    fail() if sys.argv[1:] else main()
