"""`python -m tests.cpu.transport.owner`: a process whose memory others read over RDMA, until its
standard input ends."""

from __future__ import annotations

import base64
import sys

from fourfold.transport import SharedRegion
from fourfold.transport.control import encode
from fourfold.transport.rdma import Exposure

SIZE = 1 << 20
BYTE = 7
"""What is in all of it."""


def main() -> None:
    region = SharedRegion(SIZE)
    region.buffer[:] = bytes([BYTE]) * SIZE
    exposure = Exposure("owner", "127.0.0.1")
    exposure.add(0, region)
    print(base64.b64encode(encode(exposure.offer())).decode(), flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()
