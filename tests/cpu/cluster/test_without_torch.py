"""Torch is for workers: they import it early, and the process that speaks HTTP never does."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fourfold.engine.channel import Channel, FromEngine, Hello
from fourfold.engine.messages import Role
from tests.cpu.gateway.made_tokenizers import byte_level
from tests.cpu.gateway.test_tokenizer_files import merges_of, write_gguf

_START = """
import sys
from fourfold.api.app import create_app
from fourfold.api.config import ApiConfig
from fourfold.cli import serve
from fourfold.cli.options import ModelOptions
from fourfold.cluster.cluster import make_cluster
from fourfold.cluster.local import LocalWorkers
from fourfold.engine.building import ModelFacts
from fourfold.engine.config import EngineConfig
from fourfold.gateway.config import GatewayLimits

async def load(self, progress):  # what a worker would say of the model
    self._fleet.model = ModelFacts(
        vocabulary=1 << 20, eos_token_ids=(), checkpoint="", fingerprint=""
    )

LocalWorkers.start = lambda self: None
LocalWorkers.load = load
model, load = sys.argv[1:]
options = ModelOptions(model=model, load=load)
setup = options.setup(options.source(), EngineConfig(), GatewayLimits())
cluster = make_cluster(setup)
create_app(cluster.gateway, ApiConfig(), cluster.fleet)
sys.exit("torch was imported" if "torch" in sys.modules else 0)
"""


@pytest.mark.parametrize("model", ["dummy", "gguf"])
def test_http_needs_none(model: str, tmp_path: Path) -> None:
    if model == "dummy":
        arguments = ["benchmarks/shapes/served-16m", "dummy"]
    else:
        words = byte_level()
        file = write_gguf(tmp_path / "a.gguf", words, pre="gpt-2", merges=merges_of(words))
        arguments = [str(file.path), "checkpoint"]
    command = [sys.executable, "-c", _START, *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-600:]


def test_a_worker_imports_it_before_it_knows_what_to_load() -> None:
    ours, theirs = socket.socketpair()
    command = ["-m", "fourfold.engine.worker", str(theirs.fileno()), "both-0", "both"]
    with theirs:
        worker = subprocess.Popen([sys.executable, *command], pass_fds=(theirs.fileno(),))
    try:
        maps, deadline = Path(f"/proc/{worker.pid}/maps"), time.monotonic() + 90
        while "libtorch" not in maps.read_text():
            assert worker.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        [hello] = Channel[FromEngine](ours, FromEngine).receive()
        assert hello == Hello("both-0", Role.BOTH, worker.pid)
        ours.close()  # it is in the midst of importing
        assert worker.wait(60) == 1
    finally:
        ours.close()
        worker.kill()
        worker.wait()
