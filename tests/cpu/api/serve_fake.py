"""Serves a scripted gateway in a process of its own, for the tests that send signals.

Prints the URL once it accepts connections, and "ended" when `serve` has returned.
"""

from __future__ import annotations

import sys
from typing import Any

from fourfold.api.app import create_app
from fourfold.api.config import ApiConfig
from fourfold.api.server import run, serve
from tests.cpu.api.fakes import FakeGateway


def main(drain_timeout: float, words: int) -> None:
    gateway: Any = FakeGateway()
    gateway.say(*["word "] * words, delay=0.1)
    config = ApiConfig(port=0, drain_timeout=drain_timeout)
    gateway.start()
    app = create_app(gateway, config)
    run(serve(app, gateway, config, on_ready=lambda url: print(url, flush=True)))
    assert gateway.active == 0
    print("ended", flush=True)


if __name__ == "__main__":
    main(float(sys.argv[1]), int(sys.argv[2]))
