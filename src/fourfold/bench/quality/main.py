"""Reads windows of a text in two precisions and compares what the model thought of each token."""

from __future__ import annotations

import math
import sys

from fourfold.bench.command_line import command_line
from fourfold.bench.quality.config import QualityBenchConfig
from fourfold.bench.record import Result, new_record, write
from fourfold.engine.config import EngineConfig
from fourfold.engine.engine import Engine
from fourfold.engine.messages import SamplingParams, Submit, TokenLogprob
from fourfold.engine.runner import Runner
from fourfold.errors import ConfigError
from fourfold.gateway.tokenizer import load_tokenizer
from fourfold.models.checkpoint.source import Source, find_source
from fourfold.models.loading import (
    LoadOptions,
    choose_precision,
    kv_dtype,
    load_model,
    resolve_device,
)
from fourfold.models.precision import Precision

Reading = list[TokenLogprob]


def main(config: QualityBenchConfig) -> int:
    """Runs the benchmark, prints its figures and writes its record."""
    source = find_source(config.model)
    device = resolve_device("auto")
    precision = choose_precision(config.precision, device)
    windows = _windows(config, source)
    readings = {}
    for asked in dict.fromkeys((Precision.FLOAT32, precision)):
        print(f"reading {len(windows)} windows in {asked}", file=sys.stderr)
        readings[asked] = _read(source, LoadOptions(device=device, precision=asked), windows)
    results = _compare(readings[Precision.FLOAT32], readings[precision], precision)
    for result in results:
        print(f"{result.case:<10} {result.metric:<16} {result.value:.4f} {result.unit}")
    if config.out is not None:
        write(
            new_record(
                "quality",
                command_line("fourfold bench quality", config, positional="model"),
                results,
            ),
            config.out,
        )
    return 0


def _windows(config: QualityBenchConfig, source: Source) -> list[list[int]]:
    if config.text is None:
        from pydoc_data.topics import topics

        text = "\n\n".join(topics[name] for name in sorted(topics))
    else:
        try:
            text = config.text.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{config.text} cannot be read: {error}") from error
    ids = load_tokenizer(source).encode(text, add_special_tokens=False)
    needed = config.windows * config.window_tokens
    if len(ids) < needed:
        raise ConfigError(f"the text has {len(ids)} tokens; {needed} are asked for, read fewer")
    stride = len(ids) // config.windows
    return [ids[i * stride : i * stride + config.window_tokens] for i in range(config.windows)]


def _read(source: Source, options: LoadOptions, windows: list[list[int]]) -> Reading:
    """What the model thought of every token of every window but the first ones."""
    model = load_model(source, options)
    config = EngineConfig(prefix_cache=False)
    engine = Engine(Runner(model, config, kv_dtype(model)), config)
    sampling = SamplingParams(temperature=0.0, max_tokens=1, logprobs=1, prompt_logprobs=True)
    for number, window in enumerate(windows):
        engine.submit(Submit(request_id=number, prompt_ids=tuple(window), sampling=sampling))
    engine.receive(wait=False)
    heard: dict[int, tuple[TokenLogprob, ...]] = {}
    while not engine.scheduler.idle:
        for output in engine.step() or ():
            heard[output.request_id] = output.prompt_logprobs or ()
    return [entry for number in sorted(heard) for entry in heard[number]]


def _compare(reference: Reading, other: Reading, precision: Precision) -> list[Result]:
    tokens = len(reference)
    same = sum(a.top[0][0] == b.top[0][0] for a, b in zip(reference, other, strict=True))
    exact, ours, case = _perplexity(reference), _perplexity(other), str(precision)
    return [
        Result(case="float32", metric="perplexity", value=exact, unit="ppl"),
        Result(case=case, metric="perplexity", value=ours, unit="ppl"),
        Result(case=case, metric="over float32", value=100 * (ours / exact - 1), unit="%"),
        Result(case=case, metric="same likeliest", value=100 * same / tokens, unit="% of tokens"),
        Result(case=case, metric="tokens read", value=tokens, unit="tokens"),
    ]


def _perplexity(reading: Reading) -> float:
    return math.exp(-sum(entry.logprob for entry in reading) / len(reading))
