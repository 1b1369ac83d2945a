"""Our tensor RPC: pages of keys and values from one worker's memory into another's."""

from fourfold.transport.config import TlsFiles, TransportConfig, TransportPath
from fourfold.transport.format import PageFormat
from fourfold.transport.identity import Identity
from fourfold.transport.link import Link, Transfer
from fourfold.transport.node import Node
from fourfold.transport.peer import Peer
from fourfold.transport.pieces import Landing, Part, Piece
from fourfold.transport.shared import SharedRegion
from fourfold.transport.stats import PathStats

__all__ = [
    "Identity",
    "Landing",
    "Link",
    "Node",
    "PageFormat",
    "Part",
    "PathStats",
    "Peer",
    "Piece",
    "SharedRegion",
    "TlsFiles",
    "Transfer",
    "TransportConfig",
    "TransportPath",
]
