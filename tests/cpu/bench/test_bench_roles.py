"""`fourfold bench roles`: what is asked of which servers, and the figures made of it."""

from __future__ import annotations

import asyncio
import math
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import pytest
import tyro
from scripted_server import ScriptedServer

from fourfold.bench.record import load
from fourfold.bench.roles import main as roles
from fourfold.bench.roles import serving
from fourfold.bench.roles.config import RolesBenchConfig
from fourfold.bench.serve.answer import Failure
from fourfold.bench.serve.config import ServeBenchConfig
from fourfold.bench.serve.measure import Outcome
from fourfold.errors import ConfigError, FourfoldError


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"layouts": ("0",)}, "--layouts 0"),
        ({"layouts": ("1:0",)}, "--layouts 1:0"),
        ({"layouts": ("1", "1")}, "--layouts"),
        ({"layouts": ()}, "--layouts"),
        ({"streams": 0}, "--streams"),
        ({"settle": -1.0}, "--settle"),
        ({"settle": math.inf}, "--settle"),
        ({"stream_tokens": 1}, "--stream-tokens"),
        ({"arriving_rate": 0.0}, "--arriving-rate"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        RolesBenchConfig(**options)  # type: ignore[arg-type]


def test_layouts_are_served_with_the_options_given() -> None:
    config = RolesBenchConfig(model="m", server="--precision w4a8 --device 'cuda:0'")
    tail = ["--precision", "w4a8", "--device", "cuda:0", "--port", "0"]
    assert config.serve("2") == ["serve", "m", "--workers", "2", *tail]
    assert config.serve("1:3") == ["serve", "m", "--prefill", "1", "--decode", "3", *tail]
    words = shlex.split(config.command())
    assert words[:4] == ["fourfold", "bench", "roles", "m"]
    assert tyro.cli(RolesBenchConfig, args=words[3:]) == config


@contextmanager
def pretended(arguments: list[str]) -> Iterator[str]:
    """An address that tells which layout is asked."""
    yield "http://127.0.0.1:" + ("2" if "--prefill" in arguments else "1")


class Report(msgspec.Struct):
    outcomes: list[Outcome]


async def answered(config: ServeBenchConfig, **_: object) -> Report:
    """Layouts of two workers are twice as slow to begin, and steady."""
    apart = config.base_url.endswith("2")
    ttft, gap = (0.2, 0.01) if apart else (0.1, 0.03)
    gaps = (2 * gap,) if config.output_tokens == "2" else (gap, gap)
    outcome = Outcome(due=0.0, sent=0.0, ended=1.0, first=ttft, last=1.0, gaps=gaps)
    return Report([outcome] * config.num_requests)


def test_figures_stand_beside_those_of_the_first_layout(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(roles, "serving", pretended)
    monkeypatch.setattr(roles, "run", answered)
    out = tmp_path / "roles.json"
    assert roles.main(RolesBenchConfig(out=out, turns=2)) == 0
    results = {(r.case, r.metric): r for r in load(out).results}
    lone = results["1:1: prompts of 4096, one by one", "ttft_p50"]
    assert (lone.value, lone.peer, lone.peer_value) == (0.2, "1", 0.1)
    moved = "prompts of 4096, one by one, after the first token"
    second = results[f"1:1: {moved}", "second_token_p50"]
    assert (second.value, second.peer_value) == (0.02, 0.06)
    assert results[f"1:1: {moved}", "second_token_p99"].value == 0.02
    counted = results[f"1: {moved}", "measured"]
    assert (counted.value, counted.unit) == (16, "gaps")
    beside = results["1:1: 8 streams beside prompts of 1024 at 2/s", "itl_p99"]
    assert (beside.value, beside.peer_value) == (0.01, 0.03)
    assert results["1: 8 streams alone", "itl_p50"].peer is msgspec.UNSET
    counted = results["1:1: prompts of 4096, one by one", "measured"]
    assert (counted.value, counted.unit, counted.peer) == (16, "requests", msgspec.UNSET)
    assert results["1: 8 streams alone", "measured"].value == 2 * 2 * 3 * 8
    said = capsys.readouterr().err
    assert "turn 2 of 2: 1:1" in said
    assert said.count("prompts of 4096, one by one") == 6 * 4, "figures are told as they come"


def test_a_request_that_fails_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    async def failing(config: ServeBenchConfig, **_: object) -> Report:
        failure = Failure("http 500", "broken")
        return Report([Outcome(due=0, sent=0, ended=1, failure=failure)])

    monkeypatch.setattr(roles, "serving", pretended)
    monkeypatch.setattr(roles, "run", failing)
    with pytest.raises(FourfoldError, match="1 requests failed, the first: broken"):
        roles.main(RolesBenchConfig())


def test_a_failure_comes_with_what_the_server_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "fourfold.bench.roles.serving._PROGRAM",
        (
            sys.executable,
            "-c",
            "import sys, time; print('pages are lost', file=sys.stderr);"
            "print('x at http://127.0.0.1:1/v1 (ready after 1 s)', file=sys.stderr, flush=True);"
            "time.sleep(60)",
        ),
    )
    said = "no answer; the server said last:\\npages are lost"
    with pytest.raises(FourfoldError, match=said), serving.serving([]):
        raise FourfoldError("no answer")


def test_prompts_that_still_wait_at_the_end_are_measured(server: ScriptedServer) -> None:
    """Those that have waited longest are the last to be answered."""
    config = RolesBenchConfig(
        prompt_tokens=8, prompts=1, streams=1, stream_tokens=10, arriving_tokens=8, arriving_rate=50
    )
    seen = roles.Seen()
    asyncio.run(roles._measure(config, server.url, 0, seen))
    prompts = [request for request in server.requests if request.get("stream")]
    warmed = 3
    others = len(seen.lone) + len(seen.quiet) + len(seen.streams)
    assert (len(seen.lone), len(seen.quiet), len(seen.streams)) == (1, 3, 3)
    assert len(seen.arriving) == len(prompts) - others - warmed


def test_answers_without_text_are_no_figures() -> None:
    """A tokenizer that knows fewer ids than the model has no text for most that it says."""
    silent = Outcome(due=0.0, sent=0.0, ended=1.0, first=0.5, last=0.5)
    seen = roles.Seen(lone=[silent], quiet=[silent], streams=[silent], arriving=[silent])
    with pytest.raises(FourfoldError, match=r"after the first token: no token .* tokenizer"):
        list(roles._figures(RolesBenchConfig(), seen))


def test_a_server_that_does_not_come_up_is_quoted(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = (sys.executable, "-c", "import sys; sys.exit('no such model')")
    monkeypatch.setattr(serving, "_PROGRAM", broken)
    with pytest.raises(FourfoldError, match="no such model"), serving.serving([]):
        pass
