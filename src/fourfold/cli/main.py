"""Finds the command, builds its options from the arguments, and runs it.

Commands are imported only when called, and their options need nothing heavy, so that help and
wrong arguments are answered at once. An error meant for a user is one line on stderr, exit code 2.
"""

from __future__ import annotations

import contextlib
import errno
import importlib
import io
import itertools
import os
import re
import sys
from collections.abc import Iterable, Sequence
from typing import Any

from fourfold import __version__
from fourfold.engine.shortage import is_shortage
from fourfold.errors import ConfigError, FourfoldError, meant

COMMANDS = {
    "serve": "answer OpenAI clients over HTTP",
    "worker": "compute for a gateway elsewhere",
    "cluster list": "show a server's workers",
    "cluster role": "give a worker another role while it serves",
    "chat": "talk to a model in the terminal",
    "generate": "answer a JSONL file of prompts, in order and resumable",
    "quantize": "write a model with 4-bit weights, calibrated on a text",
    "tokenize": "write texts as shards of token ids, to train on",
    "train": "train a sparse model that is served, or go on with a run",
    "train plot": "draw losses, speed and expert loads of runs",
    "corpus packages": "gather real text from installed packages, with their licences",
    "corpus sample": "write text that a model draws, in order and resumable",
    "corpus grammar": "write made-up text whose entropy is known",
    "law sweep": "train a grid of sizes, sparsities and tokens, resumable",
    "law fit": "fit the sparsity law to a sweep's records",
    "law plot": "draw losses, leverage, the fitted surface and residuals",
    "law advise": "the best sparsity for budgets of training and serving",
    "inspect": "show what a checkpoint holds, needs, and whether it would be served",
    "calibrate": "time the kernels on this GPU, for plans and schedules that suit it",
    "bench serve": "load an OpenAI-compatible server and measure it",
    "bench roles": "measure prompts and answers computed apart, beside together",
    "bench offline": "measure the engine alone, beside other engines",
    "bench kernels": "every kernel's speed beside this GPU's limits, and its error",
    "bench tiles": "the tiles that products are cut into, beside all others",
    "bench transport": "pages between processes, beside plain copies of as many bytes",
    "bench train": "training steps beside plain PyTorch and torchtitan",
    "bench quality": "what a precision costs in perplexity and agreement on a text",
    "bench layers": "what each layer of a quantised model is off by",
}
_HELP = ("-h", "--help")
_WRONG = 2
_INTERRUPTED = 130
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Errors of a disk that takes no more."""
_GAP = r"(?:[^\S\n]|\u2502|\x1b\[[\d;]*m)*"
"""Blanks, frames and colours in a row of a panel."""
_NO_DEFAULT = re.compile(rf"\(default:({_GAP})(None)?\)")
_NO_DEFAULT_IN_TWO_ROWS = re.compile(rf"\(default:({_GAP}\n){_GAP}None\){_GAP}\n")


def main() -> None:
    """The `fourfold` program."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: Sequence[str]) -> int:
    """Runs one command line; returns its exit code."""
    try:
        code = _run(arguments)
        sys.stdout.flush()  # what cannot be written is known here, not while Python ends
    except FourfoldError as error:
        print(f"fourfold: {error}", file=sys.stderr)
        return _WRONG
    except KeyboardInterrupt:
        return _INTERRUPTED
    except BrokenPipeError:  # the reader of our output has gone, for instance `| head`
        _drop_output()
        return 0
    except (OSError, MemoryError, RuntimeError) as error:
        if (remedy := _remedy(error)) is None:
            raise
        print(f"fourfold: {remedy}", file=sys.stderr)
        return _WRONG
    return code


def _remedy(error: Exception) -> str | None:
    """What helps where the machine is too small for what was asked; None for other errors."""
    number = error.errno if isinstance(error, OSError) else None
    if number in _FULL:
        _drop_output()
        return f"nothing more can be written ({error}); make room"
    if is_shortage(error):
        said = str(error).split("\n", 1)[0]
        return f"there is not enough memory ({said}); ask for less, or free some"
    return None


def _drop_output() -> None:
    """Sends what standard output still holds nowhere, so that Python can end."""
    with contextlib.suppress(io.UnsupportedOperation):  # what a program put there is its own affair
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _run(arguments: Sequence[str]) -> int:
    if not arguments or arguments[0] in (*_HELP, "help"):
        print(_usage("COMMAND", COMMANDS))
        return 0 if arguments else _WRONG
    group = [] if arguments[0] in COMMANDS else _group(arguments[0])
    if group and len(arguments) > 1 and arguments[1] in _HELP:
        print(_usage(f"{arguments[0]} COMMAND", group))
        return 0
    if arguments[0] in ("-V", "--version", "version"):
        print(f"fourfold {__version__}")
        return 0
    # Idle OpenMP threads spin before they sleep. libgomp's default, some milliseconds, takes the
    # core from whoever else wants it (our own HTTP thread for one); this is long enough to bridge
    # the gaps inside a step (docs/experiments-2026-11-24.md). Read when torch is imported.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    name, rest = _command(arguments)
    module = importlib.import_module(f"fourfold.cli.{name.replace(' ', '_')}")
    options = _parse(module.Options, f"fourfold {name}", rest)
    return int(module.run(options))


def _usage(shape: str, names: Iterable[str]) -> str:
    lines = [f"  {name:<16} {COMMANDS[name]}" for name in names]
    return "\n".join(
        [
            f"usage: fourfold {shape} [OPTIONS]",
            "",
            "Serves sparse Mixture-of-Experts language models, and trains those it serves.",
            "",
            *lines,
            "",
            f"`fourfold {shape} --help` shows a command's options.",
        ]
    )


def _group(word: str) -> list[str]:
    """The commands that begin with a word."""
    return [name for name in COMMANDS if name.startswith(f"{word} ")]


def _command(arguments: Sequence[str]) -> tuple[str, Sequence[str]]:
    for words in (2, 1):
        name = " ".join(arguments[:words])
        if name in COMMANDS:
            return name, arguments[words:]
    if group := _group(arguments[0]):
        raise ConfigError(f"{arguments[0]} needs one of its commands: {', '.join(group)}")
    raise ConfigError(f"there is no command {arguments[0]!r}; {meant(arguments[0], COMMANDS)}")


def _parse(kind: type[Any], program: str, arguments: Sequence[str]) -> Any:
    import tyro

    style = (
        tyro.conf.OmitArgPrefixes,
        tyro.conf.DisallowNone,  # leaving an option out says the same
        tyro.conf.PositionalMetavarFromFieldName,
    )
    if any(argument in _HELP for argument in arguments):
        page = _Page()
        try:
            with contextlib.redirect_stdout(page):
                return tyro.cli(kind, args=list(arguments), prog=program, config=style)
        finally:
            sys.stdout.write(_without_empty_defaults(page.getvalue()))
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint), contextlib.redirect_stdout(complaint):
            return tyro.cli(kind, args=list(arguments), prog=program, config=style)
    except SystemExit:
        problem = _first_sentence(complaint.getvalue()).removesuffix(".")
        if re.match("Unrecognized options:.* --model\\b", problem):
            problem += " (a model is named without an option)"
        raise ConfigError(f"{problem}; see `{program} --help`") from None


class _Page(io.StringIO):
    """Takes what is meant for standard output, in its characters and colours."""

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return getattr(sys.__stdout__, "encoding", None) or "ascii"

    def isatty(self) -> bool:
        return sys.__stdout__ is not None and sys.__stdout__.isatty()


def _without_empty_defaults(page: str) -> str:
    """Help without `(default: None)`: an option's text says what happens without it."""
    page = _NO_DEFAULT_IN_TWO_ROWS.sub(lambda hint: " " * 9 + hint[1], page)
    return _NO_DEFAULT.sub(lambda hint: " " * 9 + hint[1] + " " * (len(hint[2] or "") + 1), page)


def _first_sentence(panel: str) -> str:
    """What a complaint's panel says below its title, and the option it suggests."""
    lines = [line.strip(" \u2502\u256d\u256e\u2570\u256f\u2500") for line in panel.splitlines()]
    lines = ["" if set(line) <= {"-"} else line for line in lines]
    paragraphs = [" ".join(group) for full, group in itertools.groupby(lines, bool) if full]
    sentence = paragraphs[0] if paragraphs else "wrong arguments"
    if len(paragraphs) > 1 and "\u256d" not in panel:  # an unframed title stands alone
        sentence = paragraphs[1]
    suggested = re.search(r"Perhaps you meant:.*?(--[\w-]+)", panel, re.DOTALL)
    return sentence + (f" (perhaps {suggested[1]})" if suggested else "")
