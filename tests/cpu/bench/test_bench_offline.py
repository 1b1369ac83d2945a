"""The offline benchmark: what its cases mean, its figures of a known engine, and a real run."""

from __future__ import annotations

import dataclasses
import json
import shlex
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
import tyro
from tests.cpu.tiny import WIDE

from fourfold.bench.command_line import command_line
from fourfold.bench.offline import main as offline_main
from fourfold.bench.offline.cases import Case, Kind, parse_case
from fourfold.bench.offline.config import OfflineBenchConfig
from fourfold.bench.offline.floors import decode_bytes, prefill_operations, with_floor
from fourfold.bench.offline.main import main, merge
from fourfold.bench.offline.marks import load_marks, with_marks
from fourfold.bench.offline.measure import Answered, Prompts, measure
from fourfold.bench.offline.ours import Run
from fourfold.bench.offline.task import Answer
from fourfold.bench.record import Result, load
from fourfold.engine.messages import EngineStats, FinishReason, TokenOutput
from fourfold.errors import ConfigError
from fourfold.kernels.pages.layout import PageCodes
from fourfold.models.config import ModelConfig
from fourfold.models.loading import read_model_config
from fourfold.models.precision import Precision
from fourfold.models.storage import storage_of
from fourfold.quadrants.costs import Limits
from fourfold.quadrants.kv_pages import PageShape

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"
SHAPE = BENCHMARKS / "shapes" / "qwen3-30b-a3b"
MARKS = BENCHMARKS / "marks" / "qwen3-30b-a3b-h100.json"
MARKED = (
    *(f"decode-{batch}x512" for batch in (1, 8, 32, 128, 256)),
    *("decode-64x4096", "prefill-16x4096", "prefill-1x16000", "requests-512x1000x256"),
)


@pytest.fixture(scope="module")
def shape() -> ModelConfig:
    return read_model_config(json.loads((SHAPE / "config.json").read_text()), "the shape")[1]


@pytest.fixture
def tiny_shape(tmp_path: Path) -> Path:
    """A folder with nothing but a configuration."""
    fields = WIDE["qwen3-moe-wide"][1] | {
        **{"model_type": "qwen3_moe", "vocab_size": 320, "intermediate_size": 96},
        **{"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1},
        **{"max_position_embeddings": 1024, "rms_norm_eps": 1e-6},
    }
    (tmp_path / "config.json").write_text(json.dumps(fields))
    return tmp_path


@pytest.mark.parametrize(
    ("name", "case", "title"),
    [
        ("prefill-1x512", (Kind.PREFILL, 1, 512, 1), "prompt of 512 tokens"),
        ("prefill-16x4096", (Kind.PREFILL, 16, 4096, 1), "16 prompts of 4096 tokens"),
        ("decode-8x512", (Kind.DECODE, 8, 512, 136), "batch 8 after 512 tokens"),
        ("requests-9x10x11", (Kind.REQUESTS, 9, 10, 11), "9 requests, 10 in, 11 out"),
    ],
)
def test_names_of_cases(name: str, case: tuple[Kind, int, int, int], title: str) -> None:
    kind, requests, prompt, output = case
    parsed = parse_case(name)
    assert parsed == Case(kind=kind, requests=requests, prompt_tokens=prompt, output_tokens=output)
    assert parsed.title == title


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cases": ("decode-8",)}, "'decode-8' is no case; write prefill-PROMPTSxTOKENS"),
        ({"cases": ("prefill-0x5",)}, "is no case"),
        ({"cases": ("prefill-1x2x3",)}, "is no case"),
        ({"cases": ("requests-1x2",)}, "is no case"),
        ({"cases": ()}, "names nothing"),
        ({"cases": ("decode-8x16",), "max_running": 4}, "less than a batch of 8"),
        ({"kv_memory_gib": 0.0}, "must be positive"),
        ({"rounds": 0}, "--rounds"),
        ({"peers": ("transformers",), "load": "dummy"}, "leave out --peers"),
        ({"marks": Path("nowhere.json")}, "is not a file"),
        ({"peers": ("llama.cpp",), "cases": ("decode-2x5",)}, "one prompt at a time"),
    ],
)
def test_bad_options_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        OfflineBenchConfig(**options)  # type: ignore[arg-type]


class Steady:
    """An engine that takes a second for every prompt and a tenth for every further token."""

    version = "steady 1"
    batches = True

    def __init__(self) -> None:
        self.runs: list[tuple[int, int]] = []

    def answer(self, prompts: Prompts, tokens: int) -> Answered:
        self.runs.append((len(prompts), tokens))
        first = float(len(prompts))
        ttft = tuple(range(1, len(prompts) + 1))
        whole = first + 0.1 * (tokens - 1)
        return Answered(first=first, whole=whole, ttft=ttft, tpot=(0.1,) * len(prompts))

    def complete(self, case: Case, results: list[Result]) -> list[Result]:
        return results


@pytest.mark.parametrize(
    ("name", "figures", "runs"),
    [
        ("prefill-2x100", {"prefill": 100.0, "first token": 2.0}, [(2, 1)] * 3),
        ("decode-4x10", {"tpot": 0.1, "decode": 40.0}, [(4, 136), (4, 8), (4, 136)]),
        (
            "requests-3x10x21",
            {
                **{"output rate": 63 / 5, "whole": 5.0, "ttft p50": 2.0, "ttft p99": 2.98},
                **{"tpot p50": 0.1, "tpot p99": 0.1},
            },
            [(3, 21)] * 2,
        ),
    ],
)
def test_figures_of_a_known_engine(
    name: str, figures: dict[str, float], runs: list[tuple[int, int]]
) -> None:
    case, engine = parse_case(name), Steady()
    results = measure(engine, case, [[1] * case.prompt_tokens] * case.requests)
    assert {result.metric: result.value for result in results} == pytest.approx(figures)
    assert {result.case for result in results} == {case.title}
    assert engine.runs == runs, "the first run is a warm-up"


@pytest.mark.parametrize("late", [13.0, 20.0])
def test_noise_is_no_time_of_a_token(late: float) -> None:
    class Disturbed(Steady):
        def answer(self, prompts: Prompts, tokens: int) -> Answered:
            answered = super().answer(prompts, tokens)
            short = dataclasses.replace(answered, whole=answered.whole + late)
            return short if tokens == 8 else answered

    with pytest.raises(ConfigError, match="136 tokens took no longer than 8"):
        measure(Disturbed(), parse_case("decode-1x5"), [[1] * 5])


W4A8 = storage_of(Precision.W4A8, torch.device("cuda"), None)


@pytest.mark.parametrize("batch", [1, 8, 256])
def test_floors_of_decoding(batch: int, shape: ModelConfig) -> None:
    """By hand: 29 G expert weights at 17/32 byte, of which a batch touches some, 0.9 G of attention
    and 0.3 G of the head at one, 50 MB of routers in float32, and 49 KB of keys and values a token,
    scales included."""
    case = parse_case(f"decode-{batch}x512")
    pages = PageShape(
        layers=48, kv_heads=4, head_width=128, dtype=torch.bfloat16, codes=PageCodes.INT8
    )
    read = decode_bytes(case, shape, W4A8, pages)
    experts = 28.99e9 * 17 / 32 * (1 - (1 - 8 / 128) ** batch)
    cached = batch * (512 + 72) * 48 * (2 * 4 * 128 + 2)
    routers = 48 * 128 * 2048 * 4
    assert read == pytest.approx(experts + 0.906e9 + 0.311e9 + routers + cached, rel=1e-3)
    limits = Limits(bandwidth=3.02e12, operations=1.5e15)
    tpot = Result(case="any", metric="tpot", value=0.01, unit="s")
    limited = with_floor(tpot, case, shape, W4A8, pages, limits)
    assert limited.limit == pytest.approx(read / 3.02e12)
    assert str(limited.limit_name).endswith("GB at 3.02 TB/s")
    # A table that is also the head is read as the head is, in 8 bits.
    tied = dataclasses.replace(shape, tied_embeddings=True)
    assert decode_bytes(case, tied, W4A8, pages) == read


def test_operations_of_prefill(shape: ModelConfig) -> None:
    """By hand: 2 operations for each of 2.7 G active weights, and attention to half the prompt."""
    operations = prefill_operations(parse_case("prefill-2x4096"), shape)
    expert, attention = 8 * 3 * 2048 * 768 + 2048 * 128, 2048 * 128 * (2 * 32 + 2 * 4)
    norms = 48 * (2 * 2048 + 2 * 128) + 2048
    products = 2 * (48 * (expert + attention) + norms)
    pairs = 4 * 32 * 128 * 4097 / 2 * 48
    assert operations == pytest.approx(8192 * (products + pairs), rel=1e-6)


def test_medians_stand_beside_each_peer() -> None:
    def answer(version: str, tpot: float, more: list[Result]) -> Answer:
        result = Result(case="c", metric="tpot", value=tpot, unit="s")
        return Answer(version=version, results=[result, *more])

    ready = Result(case="r", metric="ready", value=1.0, unit="s")
    results = merge(
        {
            "fourfold": [answer("ours", value, [ready]) for value in (3.0, 1.0, 2.0)],
            "a": [answer("A 1", 5.0, [])],
            "b": [answer("B 1", value, [ready]) for value in (7.0, 8.0, 9.0)],
        }
    )
    assert [(r.metric, r.value, r.peer, r.peer_value) for r in results] == [
        ("tpot", 2.0, "A 1", 5.0),
        ("tpot", 2.0, "B 1", 8.0),
        ("ready", 1.0, "B 1", 1.0),
    ]


def test_marks_are_of_cases_that_can_be_measured() -> None:
    cases = [parse_case(name) for name in MARKED]
    marks = load_marks(MARKS, cases).marks
    titles = {case.title for case in cases} | {"start to ready"}
    assert {mark.case for mark in marks} == titles
    results = [Result(case=m.case, metric=m.metric, value=1.0, unit=m.unit) for m in marks]
    for result, mark in zip(
        with_marks(results, load_marks(MARKS, cases)),
        marks,
        strict=True,
    ):
        assert (result.mark, result.peer, result.peer_value) == (
            mark.mark,
            mark.peer,
            mark.peer_value,
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"marks": MARKS}, "none of the marks in .* see --cases"),
        ({"peers": ("transformers",)}, "--peers read GGUF files, not "),
        pytest.param(
            {"profiles": Path("profiles")},
            "--profiles are of a GPU",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
    ],
)
def test_what_could_not_be_used_is_refused_before_anything_is_loaded(
    options: dict[str, Any],
    message: str,
    tiny_shape: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(offline_main, "_run", lambda *_: pytest.fail("an engine was started"))
    with pytest.raises(ConfigError, match=message):
        main(OfflineBenchConfig(model=str(tiny_shape), cases=("decode-3x5",), **options))


def test_the_command_gives_the_options_again() -> None:
    config = OfflineBenchConfig(
        model="shape", cases=("decode-1x8", "prefill-1x8"), marks=SHAPE / "config.json", rounds=1
    )
    words = shlex.split(command_line("fourfold bench offline", config, positional="model"))
    assert tyro.cli(OfflineBenchConfig, args=words[3:]) == config


def test_a_run_of_a_tiny_dummy(tiny_shape: Path, tmp_path: Path) -> None:
    marks = tmp_path / "marks.json"
    mark = {"case": "batch 2 after 5 tokens", "metric": "tpot", "unit": "s", "mark": 1000.0}
    marks.write_text(json.dumps({"source": "made up", "marks": [mark]}))
    config = OfflineBenchConfig(
        model=str(tiny_shape),
        precision=Precision.FLOAT32,
        load="dummy",
        routing="uniform",
        cases=("prefill-2x70", "decode-2x5", "requests-5x9x3"),
        max_running=3,
        step_tokens=100,
        kv_memory_gib=0.02,
        rounds=1,
        marks=marks,
        out=tmp_path / "record.json",
    )
    assert main(config) == 0
    record = load(tmp_path / "record.json")
    figures = {(result.case, result.metric): result for result in record.results}
    assert all(result.value > 0 for result in record.results)
    assert figures["batch 2 after 5 tokens", "tpot"].mark == 1000.0
    for metric in ("step p50", "schedule per step", "launch per step", "commit per step"):
        assert ("batch 2 after 5 tokens", metric) in figures
    for metric in ("output rate", "ttft p50", "ttft p99", "tpot p50", "tpot p99"):
        assert ("5 requests, 9 in, 3 out", metric) in figures
    stages = [figures["start to ready", name].value for name in ("imports", "engine")]
    assert sum(stages) <= figures["start to ready", "ready"].value
    assert record.command.startswith(f"fourfold bench offline {tiny_shape} --precision float32")
    assert msgspec.json.decode(marks.read_bytes())["source"] == "made up"


def test_a_case_that_the_context_would_cut_off_is_refused(
    tiny_shape: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Its answers of 8 and of 136 tokens would both be short, and the slope far too fast."""
    config = OfflineBenchConfig(
        model=str(tiny_shape),
        load="dummy",
        kv_memory_gib=0.02,
        rounds=1,
        cases=("prefill-1x5", "decode-1x1000"),
    )
    with pytest.raises(ConfigError, match="could not be measured"):
        main(config)
    said = capfd.readouterr().err
    assert "batch 1 after 1000 tokens takes 1136 tokens a request and the engine holds" in said
    assert "prefill" not in said


def test_a_request_that_ends_early_makes_no_figure() -> None:
    run = Run(2, EngineStats())
    for token in range(4):
        run.hear([TokenOutput(request_id=n, index=0, token=token) for n in (0, 1)], EngineStats())
    over = FinishReason.LENGTH
    run.hear([TokenOutput(request_id=0, index=0, token=4, finish=over)], EngineStats())
    run.hear([TokenOutput(request_id=1, index=0, finish=over)], EngineStats())
    assert run.ended.is_set()
    with pytest.raises(ConfigError, match=r"ended a request after 4 of 5 tokens"):
        run.answered(5)


def test_an_engine_that_cannot_start_says_why(
    tiny_shape: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = OfflineBenchConfig(
        model=str(tiny_shape), load="dummy", kv_memory_gib=1e-9, rounds=1, cases=("decode-1x5",)
    )
    with pytest.raises(ConfigError, match="could not be measured"):
        main(config)
    assert "raise --kv-memory-gib" in capfd.readouterr().err
