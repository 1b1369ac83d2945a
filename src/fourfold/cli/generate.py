"""`fourfold generate`: answer a JSONL file of prompts, in order, resuming where it stopped.

Each input line is an object with `messages` (a conversation, rendered by the model's chat template)
or `prompt` (text to continue as it is, without the template), and
may set the sampling fields of this command for itself. Each output line repeats the input line's
`id` if it has one and adds `text`, `finish_reason`, token counts and `request_hash`, by which
prompt, options and model are known again. Results are written in the order of the input, so the
lines already in the output file are the ones that are done; one with another hash than its prompt
has now ends the command instead.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import os
import re
import sys
from pathlib import Path
from typing import IO, TYPE_CHECKING, Annotated, Any

import msgspec
import tyro
import xxhash

from fourfold.cli.options import ModelOptions, check_asked, load_llm
from fourfold.engine.config import EngineConfig
from fourfold.errors import ConfigError, FourfoldError, meant

if TYPE_CHECKING:
    from fourfold.llm import LLM, Asked

_ANSWERED = ("text", "error")
"""Fields of which every answer has one."""
_HASH = "request_hash"
"""A field of every answer; files of older versions lack it."""
_BEGINNINGS = (b'{"id": ', b'{"text": ', b'{"error": ')
"""How a line of answers begins."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Answers every line of a JSONL file; run it again, with the same options, to resume."""

    input: Annotated[str, tyro.conf.Positional]
    """JSONL file with `prompt` or `messages` in every line; - reads standard input."""
    output: Annotated[str, tyro.conf.Positional] = "-"
    """JSONL file for the answers, continued if it exists and answers the same prompts under the
    same options; - writes standard output."""
    temperature: float = 0.0
    """0 always takes the likeliest token."""
    top_p: float = 1.0
    """Draw from the smallest set of tokens with this much probability."""
    max_tokens: int = 1024
    """Longest answer, shortened where the context leaves less."""
    stop: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """Texts that end an answer."""
    seed: int = 0
    """Makes drawn answers repeatable."""
    model: ModelOptions = ModelOptions()
    engine: EngineConfig = EngineConfig()


class Line(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """One input line. Sampling fields given here win over the command's."""

    id: str | int | None = None
    prompt: str | None = None
    messages: list[dict[str, str]] | None = None
    temperature: float | None = None
    top_p: float | None = None
    max_tokens: int | None = None
    stop: list[str] | None = None
    seed: int | None = None


def run(options: Options) -> int:
    lines = _read(options.input)
    check_asked(_asked(options, Line()))
    if not lines:
        print(f"{options.input} holds no prompts, so there is nothing to answer", file=sys.stderr)
        return 0
    done = _count_done(options, lines)
    if done == len(lines):
        print(f"{options.output} already holds all {done} answers", file=sys.stderr)
        return 0
    if done:
        print(f"{options.output} holds {done} answers; continuing behind them", file=sys.stderr)
    source = options.model.source()
    with (
        _open_output(options.output) as output,  # what cannot be written is known before loading
        load_llm(options.model, source, options.engine) as llm,
    ):
        return asyncio.run(_answer_all(llm, options, lines, done, output))


def _read(path: str) -> list[Line]:
    try:
        text = sys.stdin.read() if path == "-" else Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    lines = []
    for number, raw in enumerate(text.split("\n"), 1):  # JSON may hold U+2028
        if not raw.strip():
            continue
        try:
            line = msgspec.json.decode(raw, type=Line)
        except (msgspec.DecodeError, UnicodeEncodeError) as error:
            raise ConfigError(f"{path}, line {number}: {error}{_spelling(str(error))}") from error
        if (line.prompt is None) == (line.messages is None):
            raise ConfigError(f"{path}, line {number}: give either prompt or messages")
        lines.append(line)
    return lines


def _spelling(complaint: str) -> str:
    """What follows a complaint about a field that no line has: the one that was meant."""
    unknown = re.search("unknown field `(.*?)`", complaint)
    return f"; {meant(unknown[1], Line.__struct_fields__)}" if unknown else ""


def _count_done(options: Options, lines: list[Line]) -> int:
    """Answers already in the output; a last line cut short by a crash is removed, once it is known
    that the file holds answers to these lines and nothing else."""
    source, path = options.input, options.output
    if path == "-" or not Path(path).is_file():
        return 0
    try:
        if source != "-" and Path(path).samefile(source):
            raise ConfigError(f"{path} is the input itself; name another output")
        whole = Path(path).read_bytes()
    except OSError as error:
        raise ConfigError(f"{path} cannot be continued: {error}; name another output") from error
    *answers, tail = whole.split(b"\n")
    if len(answers) > len(lines):
        raise ConfigError(
            f"{path} holds {len(answers)} answers for {len(lines)} prompts, so it belongs to "
            "another input; name another output"
        )
    for number, (line, raw) in enumerate(zip(lines, answers, strict=False), 1):
        answer = _fields_of(raw)
        if line.id is not None and (answer is None or answer.get("id") != line.id):
            raise ConfigError(
                f"{path}, line {number} does not answer id {line.id!r}, so it belongs to another "
                "input; name another output"
            )
        if answer is None or answer.keys().isdisjoint(_ANSWERED):
            raise ConfigError(f"{path}, line {number} is no answer of ours; name another output")
        if answer.get(_HASH, ours := _hash(options, line)) != ours:
            raise ConfigError(
                f"{path}, line {number} answers another prompt, or under other options; name "
                "another output, or give those"
            )
    if tail:
        _remove_cut(path, tail, len(whole) - len(tail))
    return len(answers)


def _remove_cut(path: str, tail: bytes, keep: int) -> None:
    """Cuts the output to `keep` bytes, if the rest is what a crash left of an answer."""
    fields = _fields_of(tail)
    begins_like_ours = any(tail[: len(begin)] == begin[: len(tail)] for begin in _BEGINNINGS)
    is_other = fields is not None and fields.keys().isdisjoint(_ANSWERED)
    if is_other or not begins_like_ours:
        raise ConfigError(f"{path} ends with what is no answer of ours; name another output")
    try:
        os.truncate(path, keep)
    except OSError as error:
        raise ConfigError(f"{path} cannot be continued: {error}; name another output") from error


def _fields_of(answer: bytes) -> dict[str, Any] | None:
    """The object that a line holds; None for what is no object."""
    try:
        return msgspec.json.decode(answer, type=dict[str, Any])
    except msgspec.DecodeError:
        return None


def _open_output(path: str) -> contextlib.AbstractContextManager[IO[str]]:
    if path == "-":
        return contextlib.nullcontext(sys.stdout)
    try:
        return Path(path).open("a", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error}; name another output") from error


async def _answer_all(
    llm: LLM, options: Options, lines: list[Line], done: int, output: IO[str]
) -> int:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]:.0f} tok/s"),
        TimeElapsedColumn(),
    )
    failed = tokens = 0
    tasks = [asyncio.create_task(_answer(llm, options, line)) for line in lines[done:]]
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("generate", total=len(lines), completed=done, rate=0.0)
        for pending in tasks:
            result = await pending
            failed += "error" in result
            tokens += result.get("completion_tokens", 0)
            output.write(json.dumps(result, ensure_ascii=False) + "\n")
            output.flush()
            elapsed = bar.tasks[task].elapsed or 1.0
            bar.update(task, advance=1, rate=tokens / max(elapsed, 1e-3))
    if failed:
        print(f"fourfold: {failed} of {len(tasks)} lines failed; see `error`", file=sys.stderr)
    return 1 if failed else 0


def _asked(options: Options, line: Line) -> Asked:
    return {
        "temperature": options.temperature if line.temperature is None else line.temperature,
        "top_p": options.top_p if line.top_p is None else line.top_p,
        "seed": options.seed if line.seed is None else line.seed,
        "max_tokens": line.max_tokens,
        "up_to": options.max_tokens,
        "stop": options.stop if line.stop is None else line.stop,
    }


def _hash(options: Options, line: Line) -> str:
    """Of what an answer follows from: prompt, sampling, model and what it is computed in; of a
    folder the name alone, for it may have moved."""
    model, engine = options.model, options.engine
    path = Path(model.model or "default")
    name = path.name if path.is_absolute() or path.exists() else str(path)
    served = (
        *(name, model.revision, model.tokenizer),
        *(model.precision, engine.kv_pages, engine.max_context, model.load, model.routing),
    )
    asked = line.prompt, line.messages, _asked(options, line)
    request = json.dumps((asked, served), sort_keys=True)
    return xxhash.xxh3_64_hexdigest(request.encode())


async def _answer(llm: LLM, options: Options, line: Line) -> dict[str, Any]:
    result: dict[str, Any] = {} if line.id is None else {"id": line.id}
    told = {_HASH: _hash(options, line)}
    asked = _asked(options, line)
    try:
        if line.messages is not None:
            [answer] = await llm.achat([line.messages], **asked)
        else:
            [answer] = await llm.agenerate([line.prompt or ""], **asked)
    except FourfoldError as error:
        return result | {"error": str(error)} | told
    return result | {
        "text": answer.text,
        "finish_reason": answer.samples[0].finish_reason,
        "prompt_tokens": answer.usage.prompt_tokens,
        "completion_tokens": answer.usage.completion_tokens,
        **told,
    }
