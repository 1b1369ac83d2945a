"""What is loaded to a GPU: streamed tensors are those of the files, packed weights those that a CPU
packs, and kernels compiled beforehand are all that a model needs."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from random import Random
from typing import Any

import msgspec
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from triton import knobs

from fourfold.engine.building import EngineSetup, build_engine
from fourfold.engine.config import EngineConfig
from fourfold.engine.engine import Engine
from fourfold.engine.graphs import round_room
from fourfold.engine.handover.pulling import PagedMemory
from fourfold.engine.messages import SamplingParams
from fourfold.engine.runner import Runner
from fourfold.engine.warming import walk_rooms, walk_steps
from fourfold.kernels.compiling import KernelCompiler, noted_launches
from fourfold.kernels.pages import hash_pages, move_pages
from fourfold.kernels.w4a8_gemm.packing import PackedW4A8, W4A8Recipe
from fourfold.kernels.w4a8_pack import pack_nearest
from fourfold.models.checkpoint.directory import DirectoryCheckpoint
from fourfold.models.checkpoint.source import find_source
from fourfold.models.checkpoint.streaming import StreamingReader
from fourfold.models.conversion.convert import Conversion, Texts
from fourfold.models.conversion.options import ConversionOptions, Method
from fourfold.models.decoder import Decoder
from fourfold.models.loading import LoadOptions, load_model, pages_of
from fourfold.models.precision import PageFormat, Precision
from fourfold.quadrants.decode_attention import decode_planner
from fourfold.quadrants.kv_pages import PAGE_TOKENS, CodedPages, Span
from fourfold.quadrants.step import CodedWork
from fourfold.quantize.w4a8 import quantize_w4a8
from fourfold.quantize.weights import CudaW4A8Weight
from fourfold.transport.pieces import Part
from tests.cpu import tiny
from tests.cpu.driving import GREEDY, run, submit, tokens
from tests.cpu.engine.test_warming import batch
from tests.cpu.models.test_streaming import DTYPES

GPU, CPU = torch.device("cuda:0"), torch.device("cpu")
GROUPED = [recipe for recipe in W4A8Recipe if recipe.group is not None]


@pytest.mark.parametrize("chunk", [1000, 64 << 20])
def test_streamed_tensors_are_those_of_the_file(chunk: int, tmp_path: Path) -> None:
    """While whoever uses them keeps the GPU busy."""
    tensors = {
        f"{dtype}.{size}.weight": (torch.randn(size, 33) * 50).to(dtype)
        for dtype in DTYPES
        for size in (1, 7, 400)
    }
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    checkpoint = DirectoryCheckpoint(tmp_path)
    reader = StreamingReader(GPU, chunk_bytes=chunk)
    busy = torch.randn(2048, 2048, device=GPU)
    for _ in range(3):
        arrived: dict[str, Tensor] = {}
        for name, _, tensor in checkpoint.parts(set(tensors), reader):
            busy = busy @ busy * 1e-3
            arrived[name] = tensor.clone()
        for name, tensor in tensors.items():
            assert arrived[name].dtype == tensor.dtype
            same = torch.equal(arrived[name].cpu().view(torch.uint8), tensor.view(torch.uint8))
            assert same, name


def assert_same_codes(ours: PackedW4A8, theirs: PackedW4A8) -> None:
    assert ours[:2] == theirs[:2]
    for a, b in zip(ours[2:], theirs[2:], strict=True):
        assert (a is None) == (b is None)
        assert a is None or b is None or torch.equal(a.cpu(), b.cpu())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("recipe", GROUPED)
def test_packed_on_a_gpu_as_on_a_cpu(recipe: W4A8Recipe, dtype: torch.dtype) -> None:
    weight = torch.randn(3, 250, 704) * torch.rand(3, 250, 1) * 0.05
    weight.view(-1)[::331] *= 6
    weight[1, 3] = 0
    weight = weight.to(dtype)
    assert_same_codes(pack_nearest(weight.to(GPU), recipe), quantize_w4a8(weight, recipe))


def test_a_packed_checkpoint_is_served_as_it_is(tmp_path: Path) -> None:
    path = tiny.save_checkpoint("qwen3-moe-wide", tmp_path / "original")
    texts = Texts(None, torch.randint(3, 320, (2, 64)))
    options = ConversionOptions(method=Method.RTN)
    out = tmp_path / "packed"
    Conversion(find_source(str(path)), options, texts, out, CPU).run(
        lambda folder: None, lambda layer: None
    )
    steps: list[tuple[int, int]] = []
    model = load_model(
        find_source(str(out)), LoadOptions(device=GPU), lambda *step: steps.append(step)
    )
    assert steps[-1][0] == steps[-1][1]
    checkpoint = DirectoryCheckpoint(out)
    for layer, block in enumerate(model.blocks):
        experts = block.ffn.experts
        assert isinstance(experts, nn.Module)
        down = experts.down
        assert isinstance(down, CudaW4A8Weight)
        for expert in range(8):
            name = f"model.layers.{layer}.mlp.experts.{expert}.down_proj.weight"
            parts = {part: tensor for _, part, tensor in checkpoint.parts({name})}
            assert torch.equal(down.packed.packed_EBOJ[expert].cpu(), parts["weight_packed"])
            assert torch.equal(down.packed.scale_EO[expert].cpu(), parts["weight_scale"])


def test_an_engine_that_shares_its_pages_moves_them_without_compiling(tmp_path: Path) -> None:
    setup = EngineSetup(
        source=find_source(str(tiny.save_checkpoint("llama-wide", tmp_path))),
        device="cuda",
        precision=Precision.W4A8,
        share_pages=True,
        config=EngineConfig(kv_memory_gib=0.1, max_running=8, step_tokens=400),
    )
    engine, _ = build_engine(setup, lambda read, size: None)
    memory = PagedMemory.of(engine._runner.pages)
    assert memory.parts == [Part.PAGES, Part.OPEN]
    compiled_later: list[str] = []
    knobs.compilation.listener = lambda *, src, **_: compiled_later.append(src.name)
    try:
        for part, jobs, layers in product(memory.parts, (1, 3, 8), (slice(1, 2), slice(None))):
            records, ids = memory.part(part)[layers], torch.arange(jobs, device=GPU)
            assert torch.equal(
                move_pages(records, ids + jobs, records, ids), hash_pages(records, ids)
            )
    finally:
        knobs.compilation.listener = None
    assert not compiled_later


def test_nothing_that_a_walk_needed_is_compiled_later(tmp_path: Path) -> None:
    path = tiny.save_checkpoint("qwen3-moe-wide", tmp_path)
    config = EngineConfig(kv_memory_gib=0.25, max_running=8, step_tokens=1000).on("cuda")
    options = LoadOptions(device=GPU, precision=Precision.W4A8, dummy=True)
    with KernelCompiler() as compiler:

        def compile_for(part: Decoder) -> None:
            shape = pages_of(part, PageFormat.AUTO)
            compiler.start(lambda: walk_steps(part, config, shape), GPU)

        model = load_model(find_source(str(path)), options, first_layers=compile_for)
        compiled = compiler.wait()
    assert compiled.compiled <= compiled.kernels
    runner = Runner(model, config, pages_of(model, PageFormat.AUTO))
    common = [token % 90 for token in range(900)]
    penalised = SamplingParams(max_tokens=4, temperature=0.7, frequency_penalty=0.5, seed=1)
    requests = [
        submit(0, [5, 6, 7], GREEDY),
        submit(1, common, GREEDY),
        submit(2, [*range(3, 90), *common], GREEDY, n=8),
        submit(3, [8, 9], penalised),
        *(submit(4 + tail, [*common, tail], GREEDY) for tail in range(8)),
    ]
    compiled_later: list[str] = []

    def note(*, src: Any, **_: object) -> None:
        compiled_later.append(f"{src.name} {src.signature} {src.constants} {src.attrs}")

    knobs.compilation.listener = note
    try:
        runner.warm()
        engine = Engine(runner, config)
        alone = [run(engine, [request]) for request in requests[:4]]
        together = run(
            engine, [msgspec.structs.replace(r, request_id=20 + r.request_id) for r in requests]
        )
    finally:
        knobs.compilation.listener = None
    assert all(tokens(news) for answers in (*alone, together) for news in answers.values())
    assert not compiled_later, "\n".join(compiled_later)
    assert isinstance(runner.pages, CodedPages)
    planner = decode_planner(runner.pages, model.config.query_heads)
    random = Random(0)
    rooms = []
    for rows in range(0, 1001, 24):
        prompts = [Span(0, rows, range(-(-rows // PAGE_TOKENS)))] if rows else []
        rooms.append(
            round_room(
                CodedWork(batch(random)[: config.running], prompts, planner), 1024 // PAGE_TOKENS
            )
        )
    with noted_launches() as missing:
        walk_rooms(model, runner.pages, [room for room in rooms if room is not None])
    assert not missing, "\n".join(map(str, missing))
