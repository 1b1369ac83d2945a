"""`fourfold inspect`: what a checkpoint holds, what it needs, and whether it would be served."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from fourfold.cli.options import ModelOptions
from fourfold.errors import CheckpointError

if TYPE_CHECKING:
    from rich.table import Table

    from fourfold.models.config import ModelConfig
    from fourfold.models.storage import Storage

_GIB = 2**30


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Shows a checkpoint's architecture, size and memory, and what would be refused and why."""

    model: ModelOptions = ModelOptions()


def run(options: Options) -> int:
    from rich.console import Console

    from fourfold.gateway.chat_template import ChatTemplate
    from fourfold.gateway.tokenizer import load_tokenizer
    from fourfold.models.loading import (
        LoadOptions,
        check_tensors,
        check_widths,
        is_upcycled,
        open_checkpoint,
        packed_format,
        page_shape,
        read_model_config,
        resolve_device,
        served_precision,
    )
    from fourfold.models.precision import PageFormat
    from fourfold.models.storage import storage_of
    from fourfold.models.upcycle import upcycled_config
    from fourfold.quadrants.kv_pages import PAGE_TOKENS

    console = Console(highlight=False, soft_wrap=True, markup=False, emoji=False)
    dummy, uniform = options.model.load == "dummy", options.model.routing == "uniform"
    LoadOptions(dummy=dummy, uniform_routing=uniform)  # refuses what contradicts
    source = options.model.source()
    words = options.model.words(source)
    device = resolve_device(options.model.device)
    try:
        checkpoint = open_checkpoint(source)
        precision = served_precision(options.model.precision, device, checkpoint)
        family, config = read_model_config(checkpoint.fields(), checkpoint.where)
        check_widths(config, device, precision)
        if not dummy:
            check_tensors(checkpoint, config, family.place(config))
        tokenizer = load_tokenizer(words, dummy=dummy)
        if tokenizer.chat_template is not None:
            ChatTemplate(tokenizer.chat_template, tokenizer.specials)
    except CheckpointError as error:
        console.print(f"{source.model_id} would be refused: {error}")
        return 1
    embedded = is_upcycled(source, checkpoint)
    if embedded:
        config = upcycled_config(config)
    console.print(source.model_id, style="bold", end="  ")
    console.print(str(source.path))
    for name, value in _architecture(config):
        console.print(f"  {name:<12} {value}")
    storage = storage_of(precision, device, packed_format(checkpoint))
    console.print(_sizes(config, storage, experts_share_storage=embedded))
    pages = page_shape(config, precision, device, PageFormat.AUTO)
    kept = pages.codes or str(pages.dtype).removeprefix("torch.")
    token = pages.page_bytes / PAGE_TOKENS
    console.print(f"KV pages ({kept}) take {token / 2**10:.1f} KiB a token.")
    console.print("It would be served.")
    return 0


def _architecture(config: ModelConfig) -> list[tuple[str, str]]:
    rows = [
        ("family", config.family),
        ("layers", f"{config.layers} of width {config.width}"),
        (
            "attention",
            f"{config.query_heads} query and {config.kv_heads} KV heads of width "
            f"{config.head_width}, rope theta {config.rope.theta:g} ({config.rope.kind})",
        ),
        ("vocabulary", f"{config.vocabulary} tokens, ends at {list(config.eos_token_ids)}"),
        ("context", f"{config.max_positions} tokens"),
    ]
    moe = config.moe
    if moe is None:
        return [*rows, ("FFN", f"dense, width {config.ffn_width}")]
    sparse = sum(config.is_sparse(layer) for layer in range(config.layers))
    gates = f"{moe.score} scores{', normalised' if moe.normalise else ''}"
    experts = f"top {moe.experts_per_token} of {moe.experts} experts of width {moe.expert_width}"
    return [*rows, ("FFN", f"{experts} in {sparse} of {config.layers} layers, {gates}")]


def _sizes(config: ModelConfig, storage: Storage, *, experts_share_storage: bool) -> Table:
    from rich.table import Table

    from fourfold.models.footprint import EXPERTS, footprint

    table = Table("part", "parameters", "active per token", f"GiB as {storage.precision}", box=None)
    total = active = 0
    stored = 0.0
    for part in footprint(config):
        held = part.total
        if experts_share_storage and part.name == EXPERTS:
            held //= config.moe.experts if config.moe else 1
        size = held * storage.bytes_held(part.name)
        table.add_row(part.name, f"{part.total:,}", f"{part.active:,}", f"{size / _GIB:.3f}")
        total, active, stored = total + part.total, active + part.active, stored + size
    table.add_row("all", f"{total:,}", f"{active:,}", f"{stored / _GIB:.3f}")
    if experts_share_storage:
        table.caption = "The experts share one storage: the model is upcycled at load."
    return table
