"""Options of the load generator: what they mean, and that bad ones are refused with a remedy."""

from __future__ import annotations

import dataclasses
import math
import random
import shlex
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tyro
from hypothesis import given, settings
from hypothesis import strategies as st

from fourfold.bench.serve.config import ServeBenchConfig
from fourfold.bench.serve.lengths import Fixed, LogNormal, Uniform, parse_lengths
from fourfold.errors import ConfigError

counts = st.integers(1, 100_000)
deterministic = settings(derandomize=True, deadline=None)


@deterministic
@given(tokens=counts, seed=st.integers())
def test_fixed_lengths_are_fixed(tokens: int, seed: int) -> None:
    assert parse_lengths(str(tokens), "--x") == Fixed(tokens)
    assert Fixed(tokens).draw(random.Random(seed)) == tokens


@deterministic
@given(bounds=st.tuples(counts, counts), seed=st.integers())
def test_uniform_lengths_stay_within_bounds(bounds: tuple[int, int], seed: int) -> None:
    low, high = sorted(bounds)
    lengths = parse_lengths(f"uniform:{low}:{high}", "--x")
    assert lengths == Uniform(low, high)
    assert low <= lengths.draw(random.Random(seed)) <= high


@deterministic
@given(median=counts, sigma=st.floats(0, 4), extra=counts, seed=st.integers())
def test_log_normal_lengths_stay_within_bounds(
    median: int, sigma: float, extra: int, seed: int
) -> None:
    lengths = parse_lengths(f"lognormal:{median}:{sigma!r}:{median + extra}", "--x")
    assert lengths == LogNormal(median, sigma, median + extra)
    assert 1 <= lengths.draw(random.Random(seed)) <= median + extra


def test_distributions_are_what_they_are_called() -> None:
    rng = random.Random(0)
    uniform = [Uniform(1, 4).draw(rng) for _ in range(4000)]
    assert set(uniform) == {1, 2, 3, 4}
    assert statistics.mean(uniform) == pytest.approx(2.5, abs=0.1)
    lengths = parse_lengths("lognormal:512:0.5", "--x")
    drawn = [lengths.draw(rng) for _ in range(4000)]
    assert statistics.median(drawn) == pytest.approx(512, rel=0.05)
    assert statistics.stdev(map(math.log, drawn)) == pytest.approx(0.5, rel=0.05)
    assert max(drawn) <= 8 * 512


@pytest.mark.parametrize(
    "spec",
    [
        *("", "0", "-1", "1.5", "x", "²", "uniform:5", "uniform:5:1", "uniform:0:5", "zipf:2"),
        *("lognormal:512", "lognormal:512:-1", "lognormal:512:nan", "lognormal:512:1:8"),
    ],
)
def test_bad_lengths_are_refused(spec: str) -> None:
    with pytest.raises(ConfigError, match=r"--prompt-tokens .*write 512, uniform:128:1024"):
        ServeBenchConfig(prompt_tokens=spec)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_requests": 0}, "--num-requests 0 must be at least 1"),
        ({"warmup_requests": -1}, "--warmup-requests"),
        ({"concurrency": 0}, "--concurrency"),
        ({"request_rate": (0.0,)}, "--request-rate"),
        ({"request_rate": (4.0, math.nan)}, "--request-rate"),
        ({"request_rate": (4.0,), "concurrency": 2}, "exclude each other"),
        ({"burstiness": 0.5}, "--request-rate; give one"),
        ({"request_rate": ()}, "one rate or several"),
        ({"request_rate": (4.0, 4.0)}, "several different"),
        ({"request_rate": (4.0, 5.0), "case": "mine"}, "leave it out with several"),
        ({"seconds": 5.0}, "--seconds goes with finite rates"),
        ({"seconds": 0.0, "request_rate": (4.0,)}, "--seconds 0.0 must be"),
        ({"timeout": 0.0}, "--timeout"),
        ({"slo_ttft": -1.0}, "--slo-ttft"),
        ({"temperature": math.nan}, "--temperature"),
        ({"output_tokens": "jsonl:a"}, "--output-tokens"),
        ({"prompt_form": "tokens"}, "--endpoint completions"),
        ({"prompt_tokens": "jsonl:a", "shared_prefix_tokens": 3}, "synthetic prompts"),
        ({"base_url": "127.0.0.1:8000"}, "must look like http"),
        ({"base_url": "http://a:99999"}, "Port out of range"),
        ({"base_url": "http://user:secret@a"}, "a key goes into --api-key"),
        ({"api_key": "a\r\nx: y"}, "--api-key"),
        ({"peer": "vllm.json"}, "NAME=FILE"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        ServeBenchConfig(**options)
    assert "secret" not in str(caught.value)


def test_the_command_gives_the_options_again() -> None:
    config = ServeBenchConfig(
        model="a model",
        request_rate=(2.5, 4.0),
        ignore_eos=True,
        slo_ttft=0.5,
        prompt_tokens="uniform:1:9",
        out=Path("a.json"),
    )
    words = shlex.split(config.command())
    assert words[:3] == ["fourfold", "bench", "serve"]
    again = tyro.cli(ServeBenchConfig, args=words[3:])
    assert again == dataclasses.replace(config, out=None), "where it goes is not part of the run"


def test_the_command_keeps_the_key_to_itself() -> None:
    assert ServeBenchConfig(api_key="sk-1").command() == "fourfold bench serve --api-key API_KEY"


@pytest.mark.parametrize(
    ("options", "case"),
    [
        ({}, "100 chat requests, all at once, 512 in, 128 out"),
        (
            {"concurrency": 8, "endpoint": "completions", "shared_prefix_tokens": 64},
            "100 completions requests, 8 concurrent, 64 shared + 512 in, 128 out",
        ),
        (
            {"request_rate": (2.5,), "prompt_tokens": "jsonl:data/chats.jsonl"},
            "100 chat requests, 2.5 req/s, chats.jsonl in, 128 out",
        ),
        ({"case": "mine"}, "mine"),
    ],
)
def test_the_case_describes_the_load(options: dict[str, Any], case: str) -> None:
    assert ServeBenchConfig(**options).describe() == case


def test_importing_the_options_loads_nothing_heavy() -> None:
    heavy = ("torch", "numpy", "httpx", "httptools", "uvloop", "rich", "msgspec", "asyncio", "ssl")
    code = (
        "import sys; import fourfold.bench.serve.config; "
        f"print([name for name in {heavy} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_each_rate_is_a_run_of_its_own() -> None:
    config = ServeBenchConfig(request_rate=(0.5, 2.0), seconds=10.0, seed=3)
    runs = config.runs()
    assert [(run.rate, run.num_requests, run.seed) for run in runs] == [(0.5, 5, 3), (2.0, 20, 4)]
    assert runs[1].describe() == "20 chat requests, 2 req/s, 512 in, 128 out"
    assert ServeBenchConfig().runs() == [ServeBenchConfig()]
