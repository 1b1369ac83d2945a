"""Prompts computed on a GPU and answered elsewhere, and the other way round."""

from __future__ import annotations

import statistics
from pathlib import Path

import pytest
import torch

from fourfold.engine import progress
from fourfold.engine.config import EngineConfig
from fourfold.engine.engine import Engine
from fourfold.engine.handover import sending
from fourfold.engine.handover.pages import STEP_BYTES, Prompt, page_format
from fourfold.engine.handover.sending import Route, Sending
from fourfold.engine.handover.staged import StagedLanding, StagedPages
from fourfold.engine.messages import SamplingParams, TokenOutput
from fourfold.engine.runner import Runner
from fourfold.kernels.pages.layout import PageCodes
from fourfold.models.checkpoint.source import find_source
from fourfold.models.loading import LoadOptions, load_model, pages_of
from fourfold.models.precision import PageFormat, Precision
from fourfold.quadrants.kv_pages import PAGE_TOKENS, CodedPages, PageShape, make_pages
from fourfold.transport.pieces import Part
from fourfold.transport.stats import DEVICE_MEMORY
from tests.cpu import tiny
from tests.cpu.driving import run, submit
from tests.cpu.engine.couple import couple, prompt_of
from tests.cpu.engine.test_handover_pages import Wire

GPU, CPU = torch.device("cuda:0"), torch.device("cpu")
LENGTHS = (1, 63, 64, 65, 130, 300)
GREEDY = SamplingParams(temperature=0.0, max_tokens=40, logprobs=0)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_checkpoint("qwen3-moe-wide", tmp_path_factory.mktemp("handover"))


def make_engine(
    path: Path,
    device: torch.device,
    precision: Precision,
    kv_pages: PageFormat,
    *,
    shared: bool = False,
    step_tokens: int = 400,
) -> Engine:
    model = load_model(find_source(str(path)), LoadOptions(device=device, precision=precision))
    config = EngineConfig(
        kv_memory_gib=0.1, max_running=8, step_tokens=step_tokens, kv_pages=kv_pages
    )
    runner = Runner(model, config, pages_of(model, kv_pages), share_pages=shared)
    return Engine(runner, config)


def chosen(outputs: list[TokenOutput]) -> list[tuple[int, float]]:
    return [(o.logprob.token, o.logprob.logprob) for o in outputs if o.logprob is not None]


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize(
    ("first", "second", "precision", "kv_pages"),
    [
        (GPU, GPU, Precision.W4A8, PageFormat.INT8),
        (GPU, GPU, Precision.BFLOAT16, PageFormat.FLOAT),
        (GPU, CPU, Precision.W4A8, PageFormat.INT8),
        (CPU, GPU, Precision.W4A8, PageFormat.INT8),
    ],
)
def test_answers_are_those_of_one_engine(
    checkpoint: Path,
    first: torch.device,
    second: torch.device,
    precision: Precision,
    kv_pages: PageFormat,
    shared: bool,
) -> None:
    """Requests come one by one, so that steps are those of one engine: on one device the answers
    are the same; on two the log-probabilities are, nearly, as far as the tokens are."""
    engines = [
        make_engine(checkpoint, device, precision, kv_pages, shared=shared)
        for device in (first, second)
    ]
    on_gpus = sum(device.type == "cuda" for device in (first, second))
    assert sum(engine.device_pages is not None for engine in engines) == shared * on_gpus
    alone = make_engine(checkpoint, second, precision, kv_pages)
    requests = [submit(n, prompt_of(length, length), GREEDY) for n, length in enumerate(LENGTHS)]
    differences = []
    with couple(*engines) as pair:
        for request in requests:
            wanted = chosen(run(alone, [request])[request.request_id, 0])
            pair.answers(request)
            got = chosen(pair.outputs[request.request_id, 0])
            assert len(got) == len(wanted)
            if first == second:
                assert [token for token, _ in got] == [token for token, _ in wanted]
            for (token, logprob), (other, expected) in zip(got, wanted, strict=True):
                if token != other:
                    break
                differences.append(abs(logprob - expected))
        pair.wait_until_free()
        (stats,) = pair.first_node.stats()
        assert (stats.path == DEVICE_MEMORY) == (shared and first == second)
        assert all(news == [None, None] for news in pair.moved.values())
    assert len(differences) >= len(LENGTHS)
    # Quantising costs about 0.14 (test_quantised_engine); pages gone wrong cost several.
    assert statistics.median(differences) < 0.14
    assert max(differences) < 1.5


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize(
    ("precision", "kv_pages"),
    [(Precision.W4A8, PageFormat.INT8), (Precision.BFLOAT16, PageFormat.FLOAT)],
)
def test_layers_are_sent_while_later_ones_are_computed(
    checkpoint: Path,
    monkeypatch: pytest.MonkeyPatch,
    precision: Precision,
    kv_pages: PageFormat,
    shared: bool,
) -> None:
    """Prompts of one step and of several; each layer leaves by itself, in graphs and without, but
    for a receiver that takes pages out of the memory of the same GPU."""
    monkeypatch.setattr(progress, "_LAYERS", 1)
    monkeypatch.setattr(sending, "_AT_ONCE", 0)
    told: list[int] = []
    news = sending.Computing.news

    def heard(computing: sending.Computing) -> list[sending.Stored]:
        stored = news(computing)
        told.extend(layer for each in stored for layer in each.layers)
        return stored

    monkeypatch.setattr(sending.Computing, "news", heard)
    engines = [
        make_engine(checkpoint, GPU, precision, kv_pages, shared=shared, step_tokens=700)
        for _ in range(3)
    ]
    requests = [submit(n, prompt_of(n, n), GREEDY) for n in (550, 640, 900)]
    with couple(*engines[:2]) as pair:
        for request in requests:
            wanted = chosen(run(engines[2], [request])[request.request_id, 0])
            pair.answers(request)
            assert chosen(pair.outputs[request.request_id, 0]) == wanted
        pair.wait_until_free()
        assert all(news == [None, None] for news in pair.moved.values())
    assert set(told) == set(() if shared else range(engines[0].page_format.layers))


def test_a_long_prompt_takes_little_memory_beside_its_pages() -> None:
    """It is read when all of it is computed, in steps; each layer has more than one."""
    shape = PageShape(
        layers=6, kv_heads=4, head_width=128, dtype=torch.bfloat16, codes=PageCodes.INT8
    )
    source, target = (make_pages(shape, 1300, 2, GPU) for _ in range(2))
    assert isinstance(source, CodedPages)
    assert isinstance(target, CodedPages)
    source.records.random_()
    source.open.normal_()
    here, there = (torch.randperm(1300)[:1200].tolist() for _ in range(2))
    tokens = 1200 * PAGE_TOKENS + 5
    form = page_format(source)
    assert 1200 * form.record_bytes > STEP_BYTES
    wire = Wire(StagedLanding(StagedPages(target), Prompt(there, 1, tokens), 0))
    sent = Sending(Prompt(here, 0, tokens), form.layers, pytest.fail)
    sent.begin(Route(wire, StagedPages(source), form, 0))
    sent.stored(range(form.layers), tokens)
    torch.cuda.synchronize()
    for move in (sent.advance, wire.landing.land):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        move()
        torch.cuda.synchronize()
        assert torch.cuda.max_memory_allocated() - before < STEP_BYTES + (1 << 20)
    assert wire.finished
    assert torch.equal(target.records[:, there], source.records[:, here])
    row = PAGE_TOKENS  # of the second slot
    assert torch.equal(target.open[:, :, row : row + 5], source.open[:, :, :5])


@pytest.mark.parametrize("late", ["the step before", "what lands"])
def test_landed_pages_come_between_the_steps_around_them(late: str) -> None:
    shape = PageShape(
        layers=2, kv_heads=2, head_width=128, dtype=torch.bfloat16, codes=PageCodes.INT8
    )
    pages = make_pages(shape, 8, 2, GPU)
    assert isinstance(pages, CodedPages)
    memory = StagedPages(pages)
    landing = StagedLanding(memory, Prompt([3, 4], 0, 2 * PAGE_TOKENS), 0)
    for layer in range(2):
        for view in landing.views(Part.PAGES, layer, 0, 2):
            view[:] = bytes([5 + layer]) * len(view)
    engine = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(engine if late == "the step before" else memory._landing_stream):
        torch.cuda._sleep(100_000_000)
    with torch.cuda.stream(engine):
        pages.records.fill_(9)
        landing.land()
        seen = pages.records.clone()
    torch.cuda.synchronize()
    for records in (seen, pages.records):
        assert records[:, [3, 4]].flatten(1).float().mean(1).tolist() == [5.0, 6.0]
        assert bool((records[:, [0, 1, 2, 5, 6, 7]] == 9).all())


def test_landed_memory_may_be_let_go_of_amid_a_recording() -> None:
    """As a thread of the transport does that comes late; there is pinned memory for all then."""
    shape = PageShape(
        layers=2, kv_heads=2, head_width=128, dtype=torch.bfloat16, codes=PageCodes.INT8
    )
    pages, engine = make_pages(shape, 8, 2, GPU), torch.cuda.Stream()
    x, graph = torch.zeros(8, device=GPU), torch.cuda.CUDAGraph()
    with torch.cuda.stream(engine):
        landing = StagedLanding(StagedPages(pages), Prompt([3, 4], 0, 2 * PAGE_TOKENS), 0)
        landing.views(Part.PAGES, 0, 0, 2)
        landing.land()
        graph.capture_begin(capture_error_mode="relaxed")
        del landing
        x += 1
        graph.capture_end()
        for _ in range(3):
            torch.empty(1 << 16, pin_memory=True)
        graph.replay()
    torch.cuda.synchronize()
    assert x.tolist() == [1.0] * 8


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("kv_pages", [PageFormat.INT8, PageFormat.FP8])
def test_pages_are_pulled_out_of_another_gpu(checkpoint: Path, kv_pages: PageFormat) -> None:
    """Over NVLink or PCIe; nothing but tickets goes through the host."""
    other = torch.device("cuda:1")
    requests = [submit(n, prompt_of(length, length), GREEDY) for n, length in enumerate(LENGTHS)]
    engines = [
        make_engine(checkpoint, device, Precision.W4A8, kv_pages, shared=True)
        for device in (GPU, other)
    ]
    alone = make_engine(checkpoint, other, Precision.W4A8, kv_pages)
    with couple(*engines) as pair:
        for request in requests:
            wanted = chosen(run(alone, [request])[request.request_id, 0])
            pair.answers(request)
            assert chosen(pair.outputs[request.request_id, 0]) == wanted
        pair.wait_until_free()
        assert [stats.path for stats in pair.second_node.stats()] == [DEVICE_MEMORY]
        assert all(news == [None, None] for news in pair.moved.values())
