"""Other engines as contestants: what is needed of each to answer token ids."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Sequence

from fourfold.bench.offline.cases import Case
from fourfold.bench.offline.measure import Answered, Prompts
from fourfold.bench.offline.task import Task
from fourfold.bench.record import Result
from fourfold.models.checkpoint.source import Source, find_source


@dataclasses.dataclass(frozen=True)
class Other:
    """A loaded engine, as a `Contestant`. `run` says when prompts had their first tokens, and when
    all, in seconds since it was called."""

    version: str
    batches: bool
    run: Callable[[Prompts, int], tuple[float, float]]

    def answer(self, prompts: Prompts, tokens: int) -> Answered:
        """As `Contestant.answer`."""
        first, whole = self.run(prompts, tokens)
        return Answered(first=first, whole=whole)

    def complete(self, case: Case, results: Sequence[Result]) -> list[Result]:
        """As `Contestant.complete`: there is nothing more to say."""
        return list(results)


def load_other(task: Task) -> Other:
    """Loads the engine that a task names."""
    source = find_source(task.model)
    if task.engine == "transformers":
        return _transformers(source)
    longest = max(case.prompt_tokens for case in task.cases if case.requests == 1)
    answer = max(case.output_tokens for case in task.cases if case.requests == 1)
    return _llama_cpp(source, longest, answer)


def _transformers(source: Source) -> Other:
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
    def run(prompts: Prompts, tokens: int) -> tuple[float, float]:
        ids = torch.tensor(prompts)
        begin = time.perf_counter()
        out = model(ids, use_cache=True, logits_to_keep=1)
        chosen = out.logits[:, -1].argmax(-1, keepdim=True)
        first = time.perf_counter()
        for _ in range(tokens - 1):
            out = model(chosen, past_key_values=out.past_key_values, use_cache=True)
            chosen = out.logits[:, -1].argmax(-1, keepdim=True)
        return first - begin, time.perf_counter() - begin

    return Other(f"transformers {transformers.__version__}, float32", True, run)


def _llama_cpp(source: Source, prompt_tokens: int, output_tokens: int) -> Other:
    import llama_cpp

    threads = len(os.sched_getaffinity(0))
    model = llama_cpp.Llama(
        str(source.path),
        n_ctx=prompt_tokens + output_tokens + 8,
        n_batch=prompt_tokens,
        n_threads=threads,
        n_threads_batch=threads,
        verbose=False,
    )

    def run(prompts: Prompts, tokens: int) -> tuple[float, float]:
        [prompt] = prompts
        model.reset()
        begin = time.perf_counter()
        model.eval(prompt)
        token = model.sample(temp=0.0)
        first = time.perf_counter()
        for _ in range(tokens - 1):
            model.eval([token])
            token = model.sample(temp=0.0)
        return first - begin, time.perf_counter() - begin

    return Other(f"llama.cpp ({llama_cpp.__version__}), as stored", False, run)
