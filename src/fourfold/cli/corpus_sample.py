"""`fourfold corpus sample`: text drawn from a model by our own engine, resuming where it stopped.

Text number i depends on the options and i alone, and texts are written in order, so the lines
already in the output are the ones that are done.
"""

from __future__ import annotations

import asyncio
import collections
import dataclasses
import sys
from typing import IO, TYPE_CHECKING

import msgspec

from fourfold.cli.options import ModelOptions, load_llm
from fourfold.engine.config import EngineConfig
from fourfold.errors import CheckpointError, ConfigError
from fourfold.train.data.config import SampleConfig

if TYPE_CHECKING:
    from fourfold.llm import LLM
    from fourfold.models.checkpoint.source import Source
    from fourfold.train.data.sampling import Sampled, Sampling, Wanted

_ASKED_AT_ONCE = 512
_END_OF_DOCUMENT = "<|endoftext|>"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(SampleConfig):
    """Writes texts that a model draws; run it again to resume."""

    model: ModelOptions = ModelOptions()
    engine: EngineConfig = EngineConfig()


def run(options: Options) -> int:
    from fourfold.train.data.sampling import Sampling

    source = options.model.source()
    sampling = Sampling(options)
    try:
        done = sampling.done(source.model_id)
        if done >= options.documents:
            print(f"{options.out} already holds {done} texts", file=sys.stderr)
            return 0
        options.out.parent.mkdir(parents=True, exist_ok=True)
        with (
            options.out.open("ab") as output,  # what cannot be written is known before loading
            load_llm(options.model, source, options.engine) as llm,
        ):
            begin = _beginning(options.model, source) if options.openings is None else None
            asyncio.run(_sample_all(llm, options, sampling, begin, done, output))
    except OSError as error:
        raise ConfigError(f"{options.out} cannot be continued ({error}); set --out") from error
    return 0


def _beginning(model: ModelOptions, source: Source) -> int:
    """The token that stands before a text: the end of the one before it."""
    from fourfold.gateway.tokenizer import load_tokenizer

    words = load_tokenizer(model.words(source))
    specials = words.specials
    for mark in (_END_OF_DOCUMENT, specials.get("bos_token"), specials.get("eos_token")):
        token = None if mark is None else words.backend.token_to_id(mark)
        if token is not None:
            return int(token)
    raise CheckpointError("the tokenizer has no mark that begins a text; give --openings")


async def _sample_all(
    llm: LLM, options: Options, sampling: Sampling, begin: int | None, done: int, output: IO[bytes]
) -> None:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = TextColumn("sample"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    console = Console(stderr=True)
    pending: collections.deque[asyncio.Task[Sampled]] = collections.deque()
    asked = done
    with Progress(*columns, console=console, disable=not console.is_interactive) as bar:
        task = bar.add_task("sample", total=options.documents, completed=done)
        while asked < options.documents or pending:
            while asked < options.documents and len(pending) < _ASKED_AT_ONCE:
                drawing = _draw(llm, options, sampling.wanted(asked), begin)
                pending.append(asyncio.create_task(drawing))
                asked += 1
            line = await pending.popleft()
            output.write(msgspec.json.encode(line) + b"\n")
            output.flush()
            bar.advance(task)


async def _draw(llm: LLM, options: Options, wanted: Wanted, begin: int | None) -> Sampled:
    from fourfold.train.data.sampling import Sampled

    [result] = await llm.agenerate(
        wanted.opening if begin is None else [begin],
        max_tokens=options.tokens,
        temperature=options.temperature,
        top_p=options.top_p,
        seed=wanted.seed,
    )
    return Sampled(
        index=wanted.index,
        seed=wanted.seed,
        model=llm.name,
        temperature=options.temperature,
        top_p=options.top_p,
        tokens=options.tokens,
        text=wanted.opening + result.text,
        finish_reason=result.samples[0].finish_reason,
    )
