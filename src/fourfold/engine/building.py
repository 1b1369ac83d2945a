"""Builds an engine from what a user chose. Importing this needs no torch; building does."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import msgspec

from fourfold.engine.config import EngineConfig
from fourfold.errors import ConfigError
from fourfold.kernels.own_thread import on_own_thread
from fourfold.models.checkpoint.fingerprint import fingerprint
from fourfold.models.checkpoint.source import Source
from fourfold.models.phases import Phases
from fourfold.models.precision import PageFormat, Precision

if TYPE_CHECKING:
    import torch

    from fourfold.engine.engine import Engine
    from fourfold.models.decoder import Decoder

logger = logging.getLogger(__name__)

Progress = Callable[[int, int], None]
"""Called with (bytes read so far, bytes in all)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineSetup:
    """What an engine is made of."""

    source: Source
    device: str = "auto"
    """cpu, cuda, cuda:1, ...; auto takes the first GPU there is."""
    precision: Precision = Precision.AUTO
    dummy: bool = False
    """Random weights instead of the checkpoint's; only its configuration is read."""
    uniform_routing: bool = False
    """Route evenly whatever the tokens say; only with `dummy`."""
    share_pages: bool = False
    """Let other workers of the machine read a GPU's pages."""
    config: EngineConfig = EngineConfig()


class ModelFacts(msgspec.Struct, frozen=True, kw_only=True):
    """What a gateway must know of the model that its engine serves."""

    vocabulary: int
    """Number of token ids that may be asked for."""
    eos_token_ids: tuple[int, ...]
    """Ends of text that the model's configuration names."""
    checkpoint: str
    """`checkpoint_of` what it was built from."""
    fingerprint: str
    """Equal for engines whose keys and values mean the same."""


def checkpoint_of(setup: EngineSetup) -> str:
    """Equal for setups that load copies of one checkpoint, whatever they make of them."""
    return " ".join((fingerprint(setup.source), *["dummy"] * setup.dummy))


def build_engine(setup: EngineSetup, progress: Progress) -> tuple[Engine, ModelFacts]:
    """Loads the model and puts an engine around it; its thread is not started. Raises
    `ConfigError` and `CheckpointError`.

    On a GPU, kernels are compiled while weights load, and the usual steps are recorded.
    """
    phases = Phases()
    with phases("imports"):
        from fourfold.models.loading import resolve_device

    device = resolve_device(setup.device)
    if device.type != "cpu":
        return _build(setup, device, progress, phases)
    interrupted = threading.Event()

    def advance(done: int, total: int) -> None:
        if interrupted.is_set():
            raise KeyboardInterrupt
        progress(done, total)

    return on_own_thread(lambda: _build(setup, device, advance, phases), interrupted.set)


def _build(
    setup: EngineSetup, device: torch.device, progress: Progress, phases: Phases
) -> tuple[Engine, ModelFacts]:
    with phases("imports"):
        from fourfold.engine.engine import Engine
        from fourfold.engine.runner import Runner
        from fourfold.models.loading import LoadOptions, load_model, pages_of
        from fourfold.models.memory import told, weight_bytes

    options = LoadOptions(
        device=device,
        precision=setup.precision,
        dummy=setup.dummy,
        uniform_routing=setup.uniform_routing,
    )
    with _compiler(device, setup, phases) as first_layers, phases("weights"):
        model = load_model(setup.source, options, progress, first_layers)
    with phases("pages"):
        shape = pages_of(model, setup.config.kv_pages)
        if shape.codes is not None:
            _tell_of_biased_keys(model)
        elif device.type == "cuda" and setup.config.cuda_graphs:
            _tell_of_float_pages(model)
        runner = Runner(model, setup.config, shape, share_pages=setup.share_pages)
    with phases("graphs"):
        runner.warm()
    if device.type == "cuda":
        from fourfold.kernels.compiling import tell_of_late_kernels

        tell_of_late_kernels(lambda name: logger.info("%s was compiled while serving", name))
    kept = shape.codes or str(shape.dtype).removeprefix("torch.")
    logger.info("serving in %s over %s pages on %s", model.precision, kept, device)
    logger.info("weights: %s", told(weight_bytes(model)))
    logger.info("engine %s", phases.ready())
    checkpoint = checkpoint_of(setup)
    facts = ModelFacts(
        vocabulary=model.config.vocabulary,
        eos_token_ids=model.config.eos_token_ids,
        checkpoint=checkpoint,
        fingerprint=f"{checkpoint} {model.precision.value}",
    )
    return Engine(runner, setup.config), facts


def _tell_of_float_pages(model: Decoder) -> None:
    """What floating-point pages cost where 8-bit ones could be had."""
    from fourfold.models.loading import pages_of

    try:
        pages_of(model, PageFormat.INT8)
    except ConfigError:
        return
    biased = ", and keys with biases some precision" if model.config.qkv_bias else ""
    logger.warning(
        "steps over floating-point KV pages are launched kernel by kernel, which takes the host a "
        "millisecond or two a layer; --kv-pages int8 makes graphs of them%s",
        biased,
    )


def _tell_of_biased_keys(model: Decoder) -> None:
    """8 bits of a page are shared by all channels of its keys, so one that stands off from zero
    takes them from the others, unless calibration centred it."""
    centred = all(block.attention.k_offset_GC is not None for block in model.blocks)
    if model.config.qkv_bias and not centred:
        logger.warning(
            "keys have biases that nothing has centred, which costs 8-bit KV pages precision; "
            "calibrate the model with fourfold quantize, or serve it with --kv-pages float"
        )


@contextlib.contextmanager
def _compiler(
    device: torch.device, setup: EngineSetup, phases: Phases
) -> Iterator[Callable[[Decoder], None]]:
    """What is to be told of a model's first layers; kernels are compiled at the end of it."""
    if device.type != "cuda":
        yield lambda part: None
        return
    from fourfold.engine.warming import walk_moves, walk_steps
    from fourfold.kernels.compiling import KernelCompiler
    from fourfold.models.loading import pages_of

    with KernelCompiler() as compiler:
        started = False

        def first_layers(part: Decoder) -> None:
            nonlocal started
            config = setup.config
            shape = pages_of(part, config.kv_pages)

            def walk() -> None:
                if shape.codes is not None:
                    walk_steps(part, config, shape)
                if setup.share_pages:
                    walk_moves(shape, device)

            started = shape.codes is not None or setup.share_pages
            if started:
                compiler.start(walk, device)

        yield first_layers
        if started:
            with phases("kernels"):
                compiled = compiler.wait()
            logger.info("%d kernels compiled or loaded", compiled.kernels)
