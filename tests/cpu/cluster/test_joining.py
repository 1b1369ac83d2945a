"""Workers that join over the network, as programs: they come, outlive their gateway, and leave."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest

from fourfold.cli.main import run
from fourfold.cluster import joining
from fourfold.engine.worker import End
from fourfold.errors import AuthenticationError
from fourfold.transport import nixl
from fourfold.transport.config import TransportConfig
from tests.cpu.cli.conftest import served
from tests.cpu.cli.test_serve import MAIN

__all__ = ["served"]
PATIENCE = 60.0


class Program:
    """A running `fourfold`, and what it has said."""

    def __init__(self, log: Path, *arguments: str) -> None:
        self.log = log
        with log.open("ab") as output:
            self.process = subprocess.Popen([*MAIN, *arguments], stderr=output, stdout=output)

    @property
    def said(self) -> str:
        return self.log.read_text()

    def wait_for(self, pattern: str, times: int = 1) -> str:
        """The text of the last of `times` matches, once there are as many."""
        deadline = time.monotonic() + PATIENCE
        while len(found := re.findall(pattern, self.said)) < times:
            assert time.monotonic() < deadline, self.said
            assert self.process.poll() is None, self.said
            time.sleep(0.05)
        return str(found[-1])


Start = Callable[..., Program]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    programs: list[Program] = []

    def go(name: str, *arguments: str) -> Program:
        programs.append(Program(tmp_path / f"{name}.log", *arguments))
        return programs[-1]

    yield go
    for program in programs:
        program.process.kill()
        program.process.wait()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def ask(url: str, text: str) -> Any:
    body = {"model": "tiny-mixtral", "prompt": text, "max_tokens": 20, "temperature": 0}
    answer = httpx.post(f"{url}/v1/completions", json=body, timeout=PATIENCE)
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]["text"]


def eventually(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_worker_outlives_its_gateway_and_leaves_in_good_order(
    start: Start,
    served: Path,
    checkpoint: Callable[[str], Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    key = tmp_path / "key"
    key.write_text("a secret of the whole service\n")
    join = f"127.0.0.1:{free_port()}"
    little: Sequence[str] = ("--precision", "float32", "--device", "cpu", "--kv-memory-gib", "0.02")
    serve = (
        *("serve", str(served), *little, "--port", "0", "--workers", "0"),
        *("--cluster-port", join.rpartition(":")[2], "--key-file", str(key)),
    )
    gateway = start("gateway", *serve)
    gateway.wait_for(f"waiting for a worker: fourfold worker --join {join} --key-file KEY_FILE\n")
    # Whoever has another model is told so and let go, even where it is the first.
    strange = (str(checkpoint("llama")), *little[2:], "--key-file", str(key))
    stranger = start("stranger", "worker", *strange, "--join", join)
    assert stranger.process.wait(PATIENCE) == 2
    assert "fourfold: this worker serves the model" in stranger.said
    assert "start both with the same checkpoint" in stranger.said
    gateway.wait_for("is refused: this worker serves the model")
    worker = start(
        "worker",
        *("worker", "--join", join, "--name", "far", "--key-file", str(key), *little[2:]),
    )
    url = gateway.wait_for(r"at (http://\S+)/v1")
    answer = ask(url, "the rain in spain")

    # So is whoever has another key.
    assert run(["worker", "--join", join]) == 2
    assert "key differs from ours" in capsys.readouterr().err
    assert run(["cluster", "list", "--url", url]) == 0
    assert re.search(r"far +both +ready +cpu", capsys.readouterr().out)
    assert run(["cluster", "role", "far", "decode", "--url", url]) == 0
    assert run(["cluster", "role", "near", "decode", "--url", url]) == 2
    assert "no worker 'near'; the workers are far" in capsys.readouterr().err
    metrics = httpx.get(f"{url}/metrics").text
    assert 'fourfold_worker_state{role="decode",state="ready",worker="far"} 1.0' in metrics
    assert 'fourfold_fleet_parts_total{cut="whole"} 1.0' in metrics

    # The gateway dies. The worker keeps its engine for the next one.
    gateway.process.kill()
    worker.wait_for("the gateway is lost; joining again")
    gateway = start("second", *serve)
    url = gateway.wait_for(r"at (http://\S+)/v1")
    assert ask(url, "the rain in spain") == answer
    assert len(re.findall("engine ready after", worker.said)) == 1

    # It finishes what it has when it is told to end.
    body = {"model": "tiny-mixtral", "prompt": "a", "max_tokens": 300, "stream": True}
    with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=PATIENCE) as stream:
        lines = stream.iter_lines()
        next(lines)
        worker.process.send_signal(signal.SIGTERM)
        gateway.wait_for("worker far leaves")
        assert '"finish_reason":"length"' in "".join(lines)
    assert worker.process.wait(PATIENCE) == 0, worker.said
    workers = f"{url}/cluster/workers"
    eventually(lambda: httpx.get(workers).json()["data"] == [])
    assert "Traceback" not in worker.said + gateway.said


KEY = ("--key-file", __file__)
TLS_NOWHERE = ("--tls-cert", "/nowhere", "--tls-key", "/nowhere", "--tls-ca", "/nowhere")


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("worker", "--join", "nowhere"), "--join nowhere is no HOST:PORT"),
        (("worker", "--join", "a:1", "--host", "0.0.0.0"), "say with --advertise"),
        (("worker", "--join", "a:1", "--host", "10.0.0.1"), "needs a shared key"),
        (("worker", "--join", "a:1", "--tls-cert", "a"), "needs all of --tls-cert"),
        (("worker", "--join", "a:1", "--key-file", "/nowhere"), "cannot be read"),
        (
            ("worker", "--join", "a:1", "--port", "65536"),
            "--port 65536 must be between 0 and 65535",
        ),
        (("worker", "--join", "a:1", "--revision", "main"), "give that as MODEL"),
        (("worker", "--join", "a:1", "--advertise", "gpu-1"), "sends other workers to where"),
        (
            ("worker", "--join", "a:1", "--host", "0.0.0.0", *KEY, "--advertise", "gpu..1"),
            "--advertise 'gpu..1' is no address",
        ),
        (("serve", "--cluster-host", "::1"), "without a --cluster-port none may; give one"),
        (("serve", "--advertise", "gpu-1"), "without a --cluster-port none may; give one"),
        (("worker", "--join", "a:1", "--host", "192.0.2.1", *KEY), "choose another address"),
        (("serve", "--port", "0", *TLS_NOWHERE), "/nowhere"),
        (("serve", "--port", "7000", "--cluster-port", "7000"), "are both 7000"),
        (("serve", "--workers", "0"), "give a --cluster-port"),
        (("serve", "--prefill", "-1"), "--prefill -1 must be 0 or more"),
        (("serve", "--cluster-port", "0", "--cluster-host", "0.0.0.0"), "give a --key-file"),
        (("serve", "--worker-timeout", "0.1"), "at least 1"),
        (("serve", "--worker-timeout", "1e11"), "at most 86400"),
        (("cluster", "list", "--url", "http://127.0.0.1:9"), "no Fourfold server answers"),
    ],
)
def test_mistakes_are_said_at_once(
    arguments: Sequence[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(arguments) == 2
    assert complaint in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [("serve", "--port", "0", "--prefill", "1", "--decode", "1"), ("worker", "--join", "a:1")],
)
def test_rdma_that_cannot_be_had_is_said_before_a_model_is_loaded(
    arguments: Sequence[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nixl, "why_not", lambda host: "NIXL is not installed")
    monkeypatch.setattr("fourfold.cluster.cluster.LocalWorkers", lambda *_: pytest.fail("started"))
    assert run([*arguments, "--transport", "rdma"]) == 2
    assert "pages cannot go over RDMA: NIXL is not installed" in capsys.readouterr().err


class Served:
    """Stands for a worker whose gateway is lost once, and then lets it go."""

    refusal = None

    def __init__(self) -> None:
        self.ends = [End.LOST, End.STOPPED]
        self.left = False

    def leave(self) -> None:
        self.left = True

    def serve(self, connection: object) -> End:
        return self.ends.pop(0)


def test_whoever_waits_for_a_gateway_leaves_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The handler of a signal runs in the thread that waits."""
    monkeypatch.setattr(joining, "_LONGEST_PAUSE", 1e6)
    worker = Served()
    joins = joining.Joining(worker, "w", "127.0.0.1:1", TransportConfig())  # type: ignore[arg-type]

    def refuse(*arguments: object) -> None:
        raise OSError("nobody is there")

    monkeypatch.setattr(joining, "dial", refuse)
    before = signal.signal(signal.SIGUSR1, lambda number, frame: joins.leave())
    striking = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGUSR1))
    try:
        striking.start()
        joins.run()
    finally:
        striking.join()
        signal.signal(signal.SIGUSR1, before)
    assert joins.leaving
    assert worker.left


LOADING = """
import os, signal, sys, time
from fourfold.cli.main import run
from fourfold.cluster import joining

def load(self):
    try:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)
    except BaseException:  # as PyTorch does amid a conversion
        raise ValueError("a wrong shape") from None

joining.Joining.run = load
sys.exit(run(["worker", "--join", "127.0.0.1:1"]))
"""


def test_a_worker_that_loads_leaves_at_once() -> None:
    done = subprocess.run(
        [sys.executable, "-c", LOADING], capture_output=True, text=True, timeout=PATIENCE
    )
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("known", [True, False])
def test_a_proof_that_fails_ends_only_a_worker_that_never_had_the_key(
    known: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    dialled = iter([known, False, True])

    def dial(*arguments: object) -> tuple[object, object]:
        if not next(dialled):
            raise AuthenticationError("the other side's key differs")
        return None, None

    monkeypatch.setattr(joining, "dial", dial)
    monkeypatch.setattr(joining, "plain_socket", lambda *_, **__: None)
    worker = Served()
    joins = joining.Joining(worker, "w", "127.0.0.1:1", TransportConfig())  # type: ignore[arg-type]
    if known:
        joins.run()
        assert not worker.ends
    else:
        with pytest.raises(AuthenticationError):
            joins.run()
