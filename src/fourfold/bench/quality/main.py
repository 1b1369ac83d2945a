"""Reads windows of a text in two precisions and compares what the model thought of each token."""

from __future__ import annotations

import dataclasses
import math
import sys

from fourfold.bench.command_line import command_line
from fourfold.bench.quality.config import QualityBenchConfig
from fourfold.bench.quality.needles import Needle, hide_needles
from fourfold.bench.record import Result, check_out, new_record, write
from fourfold.engine.config import EngineConfig
from fourfold.engine.engine import Engine
from fourfold.engine.messages import SamplingParams, Submit, TokenLogprob
from fourfold.engine.runner import Runner
from fourfold.errors import ConfigError
from fourfold.gateway.tokenizer import Tokenizer, load_tokenizer
from fourfold.models.checkpoint.source import Source, find_source
from fourfold.models.loading import (
    LoadOptions,
    load_model,
    open_checkpoint,
    page_shape,
    pages_of,
    read_model_config,
    resolve_device,
    served_precision,
)
from fourfold.models.precision import PageFormat, Precision

Reading = list[TokenLogprob]
"""What a model thought of every token of a piece but the first."""


@dataclasses.dataclass(frozen=True)
class Readings:
    """What one contestant made of the pieces, and what it is called."""

    case: str
    windows: list[Reading]
    needles: list[Reading]


def main(config: QualityBenchConfig) -> int:
    """Runs the benchmark, prints its figures and writes its record."""
    check_out(config.out, config.name)
    source = find_source(config.model)
    original = source if config.reference is None else find_source(config.reference)
    contestants = (
        (original, Precision.FLOAT32, PageFormat.FLOAT),
        (source, config.precision, config.kv_pages),
    )
    cases = [_case(*contestant) for contestant in contestants]
    if cases[0] == cases[1]:
        raise ConfigError(
            f"the text would be read in {cases[0]} twice; give another --precision or --kv-pages"
        )
    tokenizer = load_tokenizer(source)
    ids = _text_ids(config, tokenizer)
    windows = _windows(config, ids)
    needles = hide_needles(ids, tokenizer, count=config.needles, length=config.needle_tokens)
    pieces = [*windows, *(needle.tokens for needle in needles)]
    readings = []
    for case, contestant in zip(cases, contestants, strict=True):
        print(f"reading {len(pieces)} pieces of text in {case}", file=sys.stderr)
        read = _read(*contestant, pieces)
        readings.append(Readings(case, read[: len(windows)], read[len(windows) :]))
    reference, other = readings
    results = _compare(reference, other, needles)
    for result in results:
        print(f"{result.case:<24} {result.metric:<16} {result.value:.4f} {result.unit}")
    if config.out is not None:
        command = command_line("fourfold bench quality", config, positional="model")
        write(new_record(config.name, command, results), config.out)
    return 0


def _text_ids(config: QualityBenchConfig, tokenizer: Tokenizer) -> list[int]:
    if config.text is None:
        from pydoc_data.topics import topics

        text = "\n\n".join(topics[name] for name in sorted(topics))
    else:
        try:
            text = config.text.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{config.text} cannot be read: {error}") from error
    ids = tokenizer.encode(text, add_special_tokens=False)
    needed = config.windows * config.window_tokens
    if config.needles:
        needed = max(needed, config.needle_tokens)
    if len(ids) < needed:
        raise ConfigError(f"the text has {len(ids)} tokens; {needed} are asked for, read fewer")
    return ids


def _windows(config: QualityBenchConfig, ids: list[int]) -> list[list[int]]:
    stride = len(ids) // config.windows
    return [ids[i * stride : i * stride + config.window_tokens] for i in range(config.windows)]


def _case(source: Source, precision: Precision, kv_pages: PageFormat) -> str:
    """What a model is read in, in words."""
    device, checkpoint = resolve_device("auto"), open_checkpoint(source)
    _, model = read_model_config(checkpoint.fields(), checkpoint.where)
    precision = served_precision(precision, device, checkpoint)
    codes = page_shape(model, precision, device, kv_pages).codes
    return str(precision) + (f", {codes} pages" if codes else "")


def _read(
    source: Source, precision: Precision, kv_pages: PageFormat, pieces: list[list[int]]
) -> list[Reading]:
    """What a model thought of the pieces."""
    model = load_model(source, LoadOptions(device=resolve_device("auto"), precision=precision))
    shape = pages_of(model, kv_pages)
    config = EngineConfig(prefix_cache=False)
    engine = Engine(Runner(model, config, shape), config)
    sampling = SamplingParams(temperature=0.0, max_tokens=1, logprobs=1, prompt_logprobs=True)
    for number, piece in enumerate(pieces):
        engine.submit(Submit(request_id=number, prompt_ids=tuple(piece), sampling=sampling))
    engine.receive()
    heard: dict[int, Reading] = {}
    while not engine.scheduler.idle:
        for output in engine.step() or ():
            if output.error is not None:
                raise ConfigError(f"a piece of the text could not be read: {output.error}")
            heard[output.request_id] = list(output.prompt_logprobs or ())
    return [heard[number] for number in sorted(heard)]


def _compare(reference: Readings, other: Readings, needles: list[Needle]) -> list[Result]:
    pairs = [
        (a, b)
        for ours, theirs in zip(reference.windows, other.windows, strict=True)
        for a, b in zip(ours, theirs, strict=True)
    ]
    same = sum(a.top[0][0] == b.top[0][0] for a, b in pairs)
    exact, ours = _perplexity([a for a, _ in pairs]), _perplexity([b for _, b in pairs])
    case = other.case
    results = [
        Result(case=reference.case, metric="perplexity", value=exact, unit="ppl"),
        Result(case=case, metric="perplexity", value=ours, unit="ppl"),
        Result(case=case, metric="over float32", value=100 * (ours / exact - 1), unit="%"),
        Result(
            case=case, metric="same likeliest", value=100 * same / len(pairs), unit="% of tokens"
        ),
        Result(case=case, metric="tokens read", value=len(pairs), unit="tokens"),
    ]
    if needles:
        results += [
            Result(
                case=f"{readings.case}, {len(needles)} facts in {len(needles[0].tokens)} tokens",
                metric="facts found",
                value=100 * _found(readings.needles, needles) / len(needles),
                unit="% of facts",
            )
            for readings in (reference, other)
        ]
    return results


def _found(readings: list[Reading], needles: list[Needle]) -> int:
    return sum(
        all(entry.top[0][0] == entry.token for entry in reading[-needle.answer :])
        for reading, needle in zip(readings, needles, strict=True)
    )


def _perplexity(reading: Reading) -> float:
    return math.exp(-sum(entry.logprob for entry in reading) / len(reading))
