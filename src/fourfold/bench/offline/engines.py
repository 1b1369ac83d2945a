"""The contestants of `fourfold bench offline`, each run as `python -m` in a process of its own.

Every engine answers the same questions about the same random prompts: seconds to be ready, tokens
per second of prefill, and of decoding alone and in a batch. What an engine cannot do (llama.cpp's
Python binding has no batched decode) it leaves out.
"""

from __future__ import annotations

import os
import random
import sys
import time
from collections.abc import Callable
from typing import NamedTuple

import msgspec

from fourfold.models.checkpoint.source import Source, find_source
from fourfold.models.precision import PageFormat, Precision


class Task(msgspec.Struct, frozen=True, kw_only=True):
    """What one engine is asked; lengths in tokens."""

    engine: str
    model: str | None
    precision: Precision
    kv_pages: PageFormat
    dummy: bool
    uniform_routing: bool
    prompt_tokens: int
    batch: int
    batch_prompt_tokens: int
    output_tokens: int


class Figures(msgspec.Struct, kw_only=True, omit_defaults=True):
    """What one engine answered. Rates are tokens per second, the rest seconds."""

    version: str
    ready: float
    prefill: float
    first_token: float
    decode: float
    decode_batch: float | None = None


# (prompts, tokens to decode) -> seconds until the first tokens, seconds for the others
Timed = Callable[[list[list[int]], int], tuple[float, float]]


def main() -> None:
    """Reads a `Task` from standard input, writes `Figures` to standard output."""
    started = time.perf_counter()
    task = msgspec.json.decode(sys.stdin.buffer.read(), type=Task)
    engines = {"fourfold": _fourfold, "transformers": _transformers, "llama.cpp": _llama_cpp}
    version, timed, batches = engines[task.engine](find_source(task.model), task)
    ready = time.perf_counter() - started
    prompts = _prompts(task.batch, max(task.prompt_tokens, task.batch_prompt_tokens))
    one = [prompts[0][: task.prompt_tokens]]
    timed([prompts[1 % task.batch][: task.prompt_tokens]], 4)  # warm caches and allocators
    first, rest = timed(one, task.output_tokens)
    figures = Figures(
        version=version,
        ready=ready,
        prefill=task.prompt_tokens / first,
        first_token=first,
        decode=(task.output_tokens - 1) / rest,
    )
    if batches:
        several = [prompt[: task.batch_prompt_tokens] for prompt in prompts]
        _, rest = timed(several, task.output_tokens)
        figures.decode_batch = task.batch * (task.output_tokens - 1) / rest
    sys.stdout.buffer.write(msgspec.json.encode(figures))


def _prompts(count: int, length: int) -> list[list[int]]:
    """Random token ids, different from the first on, so that no prefix cache helps."""
    numbers = random.Random(0)
    return [[numbers.randrange(1000, 30000) for _ in range(length)] for _ in range(count)]


class Contestant(NamedTuple):
    """A loaded engine; `batches` says whether it decodes several prompts at once."""

    version: str
    timed: Timed
    batches: bool


def _fourfold(source: Source, task: Task) -> Contestant:
    from fourfold import __version__
    from fourfold.engine.config import EngineConfig
    from fourfold.engine.engine import Engine as Heart
    from fourfold.engine.messages import SamplingParams, Submit
    from fourfold.engine.runner import Runner
    from fourfold.models.loading import LoadOptions, load_model, pages_of, resolve_device
    from fourfold.quadrants.kv_pages import PAGE_TOKENS

    options = LoadOptions(
        device=resolve_device("auto"),
        precision=task.precision,
        dummy=task.dummy,
        uniform_routing=task.uniform_routing,
    )
    model = load_model(source, options)
    longest = max(task.prompt_tokens, task.batch * task.batch_prompt_tokens)
    config = EngineConfig(
        prefix_cache=False,
        max_running=task.batch,
        step_tokens=max(longest, task.batch + PAGE_TOKENS),
    )
    heart = Heart(Runner(model, config, pages_of(model, task.kv_pages)), config)

    def timed(prompts: list[list[int]], tokens: int) -> tuple[float, float]:
        sampling = SamplingParams(temperature=0.0, max_tokens=tokens)
        for number, prompt in enumerate(prompts):
            request = Submit(request_id=number, prompt_ids=tuple(prompt), sampling=sampling)
            heart.submit(request)
        heart.receive(wait=False)
        begin = time.perf_counter()
        waiting = set(range(len(prompts)))
        while waiting:
            waiting -= {output.request_id for output in heart.step() or ()}
        first = time.perf_counter()
        while not heart.scheduler.idle:
            heart.step()
        return first - begin, time.perf_counter() - first

    return Contestant(f"fourfold {__version__}", timed, True)


def _transformers(source: Source, task: Task) -> Contestant:
    import torch
    import transformers

    from fourfold.models.loading import open_checkpoint

    checkpoint = open_checkpoint(source)
    fields = dict(checkpoint.fields())
    config = transformers.AutoConfig.for_model(fields.pop("model_type"), **fields)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    weights = dict(checkpoint.tensors(set(checkpoint.shapes())))
    model.load_state_dict(weights, strict=False, assign=True)
    model.tie_weights()
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    model.eval()

    @torch.inference_mode()
    def timed(prompts: list[list[int]], tokens: int) -> tuple[float, float]:
        ids = torch.tensor(prompts)
        begin = time.perf_counter()
        out = model(ids, use_cache=True, logits_to_keep=1)
        chosen = out.logits[:, -1].argmax(-1, keepdim=True)
        first = time.perf_counter()
        for _ in range(tokens - 1):
            out = model(chosen, past_key_values=out.past_key_values, use_cache=True)
            chosen = out.logits[:, -1].argmax(-1, keepdim=True)
        return first - begin, time.perf_counter() - first

    return Contestant(f"transformers {transformers.__version__}, float32", timed, True)


def _llama_cpp(source: Source, task: Task) -> Contestant:
    import llama_cpp

    threads = len(os.sched_getaffinity(0))
    model = llama_cpp.Llama(
        str(source.path),
        n_ctx=task.prompt_tokens + task.output_tokens + 8,
        n_batch=task.prompt_tokens,
        n_threads=threads,
        n_threads_batch=threads,
        verbose=False,
    )

    def timed(prompts: list[list[int]], tokens: int) -> tuple[float, float]:
        [prompt] = prompts
        model.reset()
        begin = time.perf_counter()
        model.eval(prompt)
        token = model.sample(temp=0.0)
        first = time.perf_counter()
        for _ in range(tokens - 1):
            model.eval([token])
            token = model.sample(temp=0.0)
        return first - begin, time.perf_counter() - first

    return Contestant(f"llama.cpp ({llama_cpp.__version__}), as stored", timed, False)


if __name__ == "__main__":
    main()
