"""The load generator against a scripted server: what it sends, times, counts and writes.

Lower bounds on times since sending are exact, since the server sleeps at least that long; gaps have
none, for the first of two packets may be read late. Upper bounds are wide: the machine may be busy.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from scripted_server import (
    FIRST_S,
    GAP_S,
    TEMPLATE_TOKENS,
    TOKENS_PER_WORD,
    ScriptedServer,
    count_prompt,
)

from fourfold.bench.record import Record, load, write
from fourfold.bench.serve import main as serve_main
from fourfold.bench.serve.config import ServeBenchConfig
from fourfold.bench.serve.main import INTERRUPTED, main, run
from fourfold.bench.serve.report import Report, make_record
from fourfold.errors import ConfigError

BUSY_S = 0.5
EARLY_S = 0.002


def bench(server: ScriptedServer, **options: Any) -> Report:
    """A run with small defaults."""
    return asyncio.run(run(small(server, **options)))


def small(server: ScriptedServer, **options: Any) -> ServeBenchConfig:
    sizes = {"num_requests": 4, "prompt_tokens": "64", "output_tokens": "5"}
    return ServeBenchConfig(**{"base_url": server.url, "warmup_requests": 0, **sizes, **options})


def measured(server: ScriptedServer) -> list[dict[str, Any]]:
    return [request for request in server.requests if request.get("stream")]


def figures(record: Record) -> dict[str, float]:
    return {result.metric: result.value for result in record.results}


@pytest.mark.parametrize("endpoint", ["chat", "completions"])
def test_known_delays_are_measured(server: ScriptedServer, endpoint: str) -> None:
    report = bench(server, endpoint=endpoint)
    assert not report.failed
    for outcome in report.outcomes:
        assert outcome.ttft is not None
        assert outcome.tpot is not None
        assert outcome.e2e is not None
        assert FIRST_S - EARLY_S <= outcome.ttft < FIRST_S + BUSY_S
        assert outcome.ttft + 4 * outcome.tpot >= FIRST_S + 4 * GAP_S - EARLY_S
        assert outcome.tpot < GAP_S + BUSY_S
        assert len(outcome.gaps) == 4
        assert sum(outcome.gaps) == pytest.approx(4 * outcome.tpot, abs=BUSY_S)
        assert outcome.e2e >= FIRST_S + 4 * GAP_S - EARLY_S
        assert outcome.output_tokens == 5
    assert server.in_flight_peak == 4
    assert report.summary.peak_concurrency == 4
    assert report.server.software == "script 1.0"


def test_an_event_split_across_packets_is_timed_by_its_first_byte(server: ScriptedServer) -> None:
    """Each event's second packet comes GAP_S after its first."""
    (outcome,) = bench(server, model="split", num_requests=1, output_tokens="3").outcomes
    assert outcome.failure is None
    assert outcome.ttft is not None
    # The role event's tail, the pause, then the head of the first token: not its tail.
    assert outcome.ttft >= FIRST_S + GAP_S - EARLY_S
    assert len(outcome.gaps) == 2
    for number, came in enumerate(itertools.accumulate([outcome.ttft, *outcome.gaps])):
        assert came >= FIRST_S + (1 + 2 * number) * GAP_S - EARLY_S
    assert outcome.ended - outcome.sent >= FIRST_S + 8 * GAP_S


@pytest.mark.parametrize(
    ("model", "kind"),
    [
        ("stream-error", "stream error"),
        ("malformed", "malformed"),
        ("half-a-character", "malformed"),
        ("unfinished", "malformed"),
        ("html", "malformed"),
        ("disconnect", "disconnect"),
        ("hang", "timeout"),
    ],
)
def test_failures_are_counted_by_kind(server: ScriptedServer, model: str, kind: str) -> None:
    report = bench(server, model=model, num_requests=2, timeout=0.3)
    summary = report.summary
    assert summary.failures == {kind: 2}
    assert summary.completed == 0
    assert set(summary.latencies) == {"lateness"}
    assert any(remark.startswith(f"first {kind} failure: ") for remark in report.remarks())
    assert f"failed_{kind.replace(' ', '_')}" in figures(make_record(report.config, [report]))


def test_refusals_under_load_are_counted(server: ScriptedServer, tmp_path: Path) -> None:
    """With prompts from a file there is no calibration that a 429 could stop."""
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "hello"}\n')
    report = bench(server, model="busy", prompt_tokens=f"jsonl:{prompts}", warmup_requests=1)
    assert report.summary.failures == {"http 429": 4}
    remarks = report.remarks()
    assert "1 warm-up requests failed, the first by http 429: try later" in remarks
    assert "first http 429 failure: try later" in remarks


def test_a_server_that_goes_away_fails_what_comes_after() -> None:
    other = ScriptedServer()
    other.start()
    config = small(other, num_requests=20, request_rate=(40.0,), prompt_tokens="8")
    stopping: list[asyncio.Future[None]] = []

    def stop_at_first(outcome: object) -> None:
        if not stopping:
            stopping.append(asyncio.get_running_loop().run_in_executor(None, other.stop))

    report = asyncio.run(run(config, on_outcome=stop_at_first))
    assert len(report.outcomes) == 20
    assert report.summary.completed >= 1
    assert report.summary.failures["connect"] >= 1


def test_the_closed_loop_holds_its_concurrency(server: ScriptedServer) -> None:
    report = bench(server, num_requests=6, concurrency=2, output_tokens="2")
    assert len(report.outcomes) == 6
    assert server.in_flight_peak == 2
    assert "lateness" not in report.summary.latencies
    assert report.duration >= 3 * (FIRST_S + GAP_S) - EARLY_S


def test_the_open_loop_follows_its_schedule(server: ScriptedServer) -> None:
    report = bench(server, num_requests=10, request_rate=(50.0,), output_tokens="1")
    due = sorted(outcome.due for outcome in report.outcomes)
    assert len(set(due)) == 10
    assert all(outcome.sent >= outcome.due for outcome in report.outcomes)
    lateness = report.summary.latencies["lateness"]
    assert 0 <= lateness.mean < BUSY_S


def test_text_prompts_have_the_length_asked_for(server: ScriptedServer) -> None:
    """The scripted tokenizer has a template and two tokens a word; calibration finds both."""
    bench(server, prompt_tokens="uniform:40:400", num_requests=8, output_tokens="1")
    lengths = [count_prompt(request) for request in measured(server)]
    assert len(set(lengths)) > 1
    assert all(40 - TOKENS_PER_WORD <= length <= 400 + TOKENS_PER_WORD for length in lengths)


@pytest.mark.parametrize("tokens", [64, 301])
def test_calibration_is_exact_to_a_word(server: ScriptedServer, tokens: int) -> None:
    report = bench(server, prompt_tokens=str(tokens), num_requests=2, output_tokens="1")
    for outcome in report.outcomes:
        assert outcome.prompt_tokens is not None
        assert abs(outcome.prompt_tokens - tokens) <= TOKENS_PER_WORD / 2
        assert (outcome.prompt_tokens - TEMPLATE_TOKENS) % TOKENS_PER_WORD == 0


def test_token_ids_are_exact_where_the_server_takes_them(server: ScriptedServer) -> None:
    report = bench(server, endpoint="completions", prompt_tokens="77", output_tokens="1")
    assert [outcome.prompt_tokens for outcome in report.outcomes] == [77] * 4
    prompts = [request["prompt"] for request in measured(server)]
    assert all(isinstance(prompt, list) and len(prompt) == 77 for prompt in prompts)
    assert len({tuple(prompt) for prompt in prompts}) == 4


def test_text_is_sent_where_the_server_takes_no_ids(server: ScriptedServer) -> None:
    report = bench(server, endpoint="completions", model="text-only", output_tokens="1")
    assert not report.failed
    assert all(isinstance(request["prompt"], str) for request in measured(server))


def test_ids_that_were_asked_for_are_not_replaced_by_text(server: ScriptedServer) -> None:
    options = {"endpoint": "completions", "model": "text-only", "prompt_form": "tokens"}
    with pytest.raises(ConfigError, match=r"HTTP 400 \(try later\).*--prompt-form"):
        bench(server, **options)


def test_a_shared_prefix_is_shared_and_no_more(server: ScriptedServer) -> None:
    bench(
        server,
        endpoint="completions",
        shared_prefix_tokens=30,
        prompt_tokens="20",
        output_tokens="1",
    )
    prompts = [request["prompt"] for request in measured(server)]
    assert {len(prompt) for prompt in prompts} == {50}
    assert len({tuple(prompt[:30]) for prompt in prompts}) == 1
    assert len({tuple(prompt[30:34]) for prompt in prompts}) == 4


def test_a_seed_makes_the_same_requests(server: ScriptedServer) -> None:
    def requests(seed: int) -> list[dict[str, Any]]:
        server.requests.clear()
        bench(server, seed=seed, output_tokens="uniform:1:3")
        return sorted(measured(server), key=lambda request: json.dumps(request))

    first = requests(1)
    assert requests(1) == first
    assert requests(2) != first


def test_what_a_request_asks_for(server: ScriptedServer) -> None:
    bench(server, num_requests=1, ignore_eos=True, temperature=0.5, model="steady")
    (request,) = measured(server)
    (message,) = request.pop("messages")
    assert message["role"] == "user"
    assert request == {
        "model": "steady",
        "max_tokens": 5,
        "temperature": 0.5,
        "stream": True,
        "stream_options": {"include_usage": True},
        "ignore_eos": True,
    }


def test_prompts_from_a_file_come_in_order_and_again(
    server: ScriptedServer, tmp_path: Path
) -> None:
    prompts = tmp_path / "prompts.jsonl"
    chat = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    lines = [{"prompt": "first", "max_tokens": 2}, {"messages": chat}]
    prompts.write_text("\n\n".join(json.dumps(line) for line in lines))
    report = bench(
        server, prompt_tokens=f"jsonl:{prompts}", num_requests=3, concurrency=1, output_tokens="1"
    )
    assert not report.failed
    sent = [(request["messages"], request["max_tokens"]) for request in measured(server)]
    first = ([{"role": "user", "content": "first"}], 2)
    assert sent == [first, (chat, 1), first]
    [remark] = report.remarks()
    assert remark.startswith("3 requests, the warm-up's among them, take the 2 prompts of prompts")


def test_a_file_with_prompts_enough_needs_no_remark(server: ScriptedServer, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("\n".join(f'{{"prompt": "{number}"}}' for number in range(3)))
    options = {"prompt_tokens": f"jsonl:{prompts}", "num_requests": 2, "output_tokens": "1"}
    assert bench(server, warmup_requests=1, **options).remarks() == []
    [remark] = bench(server, warmup_requests=2, **options).remarks()
    assert "take the 3 prompts of prompts.jsonl again" in remark


def test_rates_that_share_a_file_say_so(
    server: ScriptedServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("\n".join(f'{{"prompt": "{number}"}}' for number in range(4)))
    rates = {"request_rate": (50.0, 60.0), "output_tokens": "1"}
    assert main(small(server, prompt_tokens=f"jsonl:{prompts}", **rates)) == 0
    assert capsys.readouterr().out.count("the prompts are those of the rates before") == 1


@pytest.mark.parametrize(
    ("line", "endpoint", "message"),
    [
        ('{"prompt": "a"', "chat", "line 2: .*truncated"),
        ('{"prompt": "\udcff"}', "chat", "line 2: .*(utf|UTF)-8"),
        ('{"prompt": "a", "n": 3}', "chat", "line 2: .*unknown field `n`"),
        ("{}", "chat", "line 2: give either"),
        ('{"prompt": "a", "messages": []}', "chat", "line 2: give either"),
        ('{"prompt": "a", "max_tokens": 0}', "chat", "line 2: .*>= 1"),
        ('{"prompt": [1, 2]}', "chat", "line 2: token ids need"),
        ('{"messages": []}', "completions", "line 2: messages need"),
    ],
)
def test_bad_prompt_files_name_the_line(
    server: ScriptedServer, tmp_path: Path, line: str, endpoint: str, message: str
) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(
        f'{{"prompt": "good"}}\n{line}\n', encoding="utf-8", errors="surrogateescape"
    )
    with pytest.raises(ConfigError, match=message):
        bench(server, prompt_tokens=f"jsonl:{prompts}", endpoint=endpoint)


def test_without_usage_events_are_counted_and_it_says_so(server: ScriptedServer) -> None:
    report = bench(server, model="no-usage", output_tokens="3")
    assert report.summary.output_tokens == 3
    assert report.summary.input_rate is None
    remarks = report.remarks()
    assert (
        "the server counts no prompt tokens: prompts have one word per token asked for" in remarks
    )
    assert "4 answers came without usage: their events were counted" in remarks


def test_warm_up_requests_are_sent_but_not_counted(server: ScriptedServer) -> None:
    report = bench(server, num_requests=2, warmup_requests=3, output_tokens="1")
    assert len(report.outcomes) == 2
    bodies = [json.dumps(request) for request in measured(server)]
    assert len(set(bodies)) == 5, "a warm-up that shares prompts would fill the prefix cache"


def test_main_prints_and_writes(
    server: ScriptedServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, details = tmp_path / "new" / "out.json", tmp_path / "details.jsonl"
    config = small(server, out=out, details=details, slo_ttft=10.0, slo_tpot=1e-6)
    assert main(config) == 0
    record = load(out)
    assert record.name == "serve"
    assert record.command == config.command()
    assert record.software["server"] == "script 1.0"
    values = figures(record)
    assert (values["completed"], values["failed"], values["goodput"]) == (4, 0, 0)
    assert values["ttft_p50"] >= FIRST_S - EARLY_S
    assert values["output_rate"] == pytest.approx(20 / values["duration"])
    assert {result.case for result in record.results} == {config.describe()}
    lines = [json.loads(line) for line in details.read_text().splitlines()]
    assert [line["output_tokens"] for line in lines] == [5] * 4
    assert all(len(line["itl"]) == 4 and line["ttft"] > 0 for line in lines)
    printed = capsys.readouterr()
    assert all(word in printed.out for word in ("ttft", "tpot", "itl", "p99", "goodput"))


def test_rising_rates_make_one_record(
    server: ScriptedServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, details = tmp_path / "out.json", tmp_path / "details.jsonl"
    rates = {"request_rate": (20.0, 40.0), "seconds": 0.2, "output_tokens": "2"}
    config = small(server, out=out, details=details, **rates)
    assert main(config) == 0
    record = load(out)
    assert record.command == config.command()
    completed = {r.case: r.value for r in record.results if r.metric == "completed"}
    assert completed == {
        "4 chat requests, 20 req/s, 64 in, 2 out": 4,
        "8 chat requests, 40 req/s, 64 in, 2 out": 8,
    }
    lines = [json.loads(line) for line in details.read_text().splitlines()]
    assert [line["rate"] for line in lines] == [20.0] * 4 + [40.0] * 8
    prompts = [json.dumps(request["messages"]) for request in measured(server)]
    assert len(set(prompts)) == 12, "a rate that shares prompts would find them in the cache"
    [curve] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("    40 ")]
    assert curve.split()[:3] == ["40", "8", "0"]


def test_a_server_that_breaks_leaves_what_was_measured_before(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    other = ScriptedServer()
    other.start()
    config = small(other, out=tmp_path / "out.json", request_rate=(20.0, 40.0), output_tokens="1")
    runs = []

    async def run_once(*arguments: Any, **options: Any) -> Report:
        if runs:
            await asyncio.to_thread(other.stop)
        runs.append(await run(*arguments, **options))
        return runs[-1]

    monkeypatch.setattr(serve_main, "run", run_once)
    assert main(config) == 1
    record = load(tmp_path / "out.json")
    assert {result.case for result in record.results} == {config.runs()[0].describe()}
    said = capsys.readouterr().err
    assert "40 req/s and what follows is left out: " in said
    assert "cannot be reached" in said


def test_main_says_when_a_request_failed(server: ScriptedServer) -> None:
    assert main(small(server, model="malformed", num_requests=1)) == 1


def test_a_peer_stands_beside(server: ScriptedServer, tmp_path: Path) -> None:
    theirs = tmp_path / "peer.json"
    report = bench(server)
    write(make_record(report.config, [report]), theirs)
    report = bench(server, peer=f"other 1.0={theirs}")
    record = make_record(report.config, [report])
    ttft = next(result for result in record.results if result.metric == "ttft_p50")
    assert (ttft.peer, ttft.peer_value) == ("other 1.0", figures(load(theirs))["ttft_p50"])
    with pytest.raises(ConfigError, match="give both runs the same load"):
        bench(server, peer=f"other 1.0={theirs}", num_requests=2)


def test_a_peer_of_every_rate_is_there_before_the_first(
    server: ScriptedServer, tmp_path: Path
) -> None:
    theirs = tmp_path / "peer.json"
    report = bench(server, request_rate=(20.0,))
    write(make_record(report.config, [report]), theirs)
    server.requests.clear()
    with pytest.raises(ConfigError, match=r"not 4 chat requests, 40 req/s"):
        main(small(server, peer=f"other 1.0={theirs}", request_rate=(20.0, 40.0)))
    assert server.requests == []


def test_an_interrupted_run_keeps_what_it_measured(server: ScriptedServer, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    options = {"request_rate": (100.0,), "num_requests": 1000, "output_tokens": "1"}
    arguments = {"base_url": server.url, "warmup_requests": 0, **options}
    code = (
        "import pathlib, sys; from fourfold.bench.serve.config import ServeBenchConfig; "
        "from fourfold.bench.serve.main import main; "
        f"sys.exit(main(ServeBenchConfig(out=pathlib.Path({str(out)!r}), **{arguments!r})))"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    while len(measured(server)) < 40:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    printed, _ = process.communicate(timeout=20)
    assert process.returncode == INTERRUPTED
    record = load(out)
    assert {result.case.endswith(" (partial)") for result in record.results} == {True}
    values = figures(record)
    assert values["completed"] > 0
    assert values["completed"] + values["unfinished"] == 1000
    assert "interrupted: " in printed


def test_an_unreachable_server_is_a_config_error() -> None:
    config = ServeBenchConfig(base_url="http://127.0.0.1:9")
    with pytest.raises(ConfigError, match=r"cannot be reached .*start the server"):
        asyncio.run(run(config))


def test_a_server_that_refuses_the_first_request_is_a_config_error(server: ScriptedServer) -> None:
    with pytest.raises(ConfigError, match=r"HTTP 429 \(try later\); see --model"):
        bench(server, model="busy")


def test_results_that_cannot_be_kept_are_refused_before_the_run(
    server: ScriptedServer, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="cannot be written"):
        main(small(server, out=tmp_path))
    assert server.requests == []
