"""`fourfold worker`: what it takes over from the gateway, and what it was told otherwise."""

from __future__ import annotations

from pathlib import Path

import pytest

from fourfold.cli.worker import Options, _own
from fourfold.engine.building import EngineSetup
from fourfold.engine.config import EngineConfig
from fourfold.models.checkpoint.source import Source, SourceKind
from fourfold.models.precision import PageFormat, Precision


@pytest.mark.parametrize(
    ("theirs", "mine", "built"),
    [
        (PageFormat.INT8, PageFormat.AUTO, PageFormat.INT8),
        (PageFormat.INT8, PageFormat.FLOAT, PageFormat.FLOAT),
        (PageFormat.AUTO, PageFormat.AUTO, PageFormat.AUTO),
        (PageFormat.AUTO, PageFormat.FP8, PageFormat.FP8),
    ],
)
def test_pages_are_the_gateways_unless_others_were_asked_for(
    theirs: PageFormat, mine: PageFormat, built: PageFormat, tmp_path: Path
) -> None:
    setup = EngineSetup(
        source=Source(SourceKind.DIRECTORY, tmp_path, "m"),
        precision=Precision.BFLOAT16,
        config=EngineConfig(kv_pages=theirs, max_running=3),
    )
    options = Options(join="a:1", engine=EngineConfig(kv_pages=mine, max_running=7))
    own = _own(setup, options, None)
    assert own.config == EngineConfig(kv_pages=built, max_running=7)
    assert own.precision is Precision.BFLOAT16
