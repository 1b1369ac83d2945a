"""The contestants of `fourfold bench offline`, each run as `python -m` in a process of its own.

Every engine answers the same random prompts: seconds until it is ready, then the figures of one
case after the other. What an engine cannot do (llama.cpp's Python binding has no batched decode) it
leaves out. Ours ends with the device's timeline, for recording that slows it down.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from fourfold.bench.answers import take_stdout
from fourfold.bench.figures import format_figure
from fourfold.bench.offline.cases import Kind
from fourfold.bench.offline.measure import Contestant, measure
from fourfold.bench.offline.task import Answer, Task
from fourfold.bench.record import Result
from fourfold.errors import FourfoldError

if TYPE_CHECKING:
    from fourfold.bench.offline.ours import Ours

READY = "start to ready"
_FIRST_PROMPT = 16


def main() -> int:
    """Reads a `Task` from standard input, writes an `Answer` to standard output."""
    task = msgspec.json.decode(sys.stdin.buffer.read(), type=Task)
    answers = take_stdout()
    try:
        answer = answer_task(task)
    except FourfoldError as error:
        print(f"{task.engine}: {error}", file=sys.stderr)
        return 2
    answers.write(msgspec.json.encode(answer))
    answers.close()
    return 0


def answer_task(task: Task) -> Answer:
    """Loads the engine and measures every case that it can do, saying each figure on stderr."""
    if task.engine != "fourfold":
        from fourfold.bench.offline.others import load_other

        other = load_other(task)
        return Answer(version=other.version, results=list(_measured(task, other)))
    from fourfold.bench.offline.ours import Ours

    ours = Ours(task)
    results = [_said(_ready(stage, seconds)) for stage, seconds in ours.stages.items()]
    results += _measured(task, ours)
    if ours.on_gpu:
        results += _timelines(task, ours)
    ours.close()
    return Answer(version=ours.version, results=results)


def _measured(task: Task, contestant: Contestant) -> Iterator[Result]:
    contestant.answer(task.draw_prompts("first", 1, _FIRST_PROMPT), 2)
    yield _said(_ready("ready", time.time() - task.started))
    for case in task.cases:
        if contestant.batches or case.requests == 1:
            prompts = task.draw_prompts(case.title, case.requests, case.prompt_tokens)
            for result in measure(contestant, case, prompts):
                yield _said(result)


def _timelines(task: Task, ours: Ours) -> Iterator[Result]:
    """Of each case but those of many requests, whose timeline would be too long."""
    from fourfold.bench.offline.trace import by_kernel, idle, record

    record(lambda: None)  # the first recording takes seconds to start
    for case in task.cases:
        if case.kind is Kind.REQUESTS:
            continue
        prompts = task.draw_prompts(case.title, case.requests, case.prompt_tokens)
        activities = ours.trace(case, prompts)
        if len(activities) < 2:
            print(f"  {case.title}: the profiler saw nothing of the GPU", file=sys.stderr)
            continue
        if task.profiles is not None:
            folder = Path(task.profiles)
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{case.title.replace(' ', '-')}.md").write_text(by_kernel(activities))
        spent = idle(activities)
        for metric, seconds in (
            ("idle between steps", spent.between),
            ("idle within steps", spent.within),
        ):
            share = 100 * seconds / spent.window
            yield _said(Result(case=case.title, metric=metric, value=share, unit="%"))


def _ready(metric: str, seconds: float) -> Result:
    return Result(case=READY, metric=metric, value=seconds, unit="s")


def _said(result: Result) -> Result:
    figure = format_figure(result.value, result.unit)
    print(f"  {result.case:<36} {result.metric:<24} {figure}", file=sys.stderr, flush=True)
    return result


if __name__ == "__main__":
    sys.exit(main())
