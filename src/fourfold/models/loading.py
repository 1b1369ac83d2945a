"""Builds a `Decoder` and fills it from a checkpoint, straight to its device and precision.

Memory stays bounded: tensors are memory-mapped, and a layer is quantised as soon as it is filled.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from fourfold.errors import CheckpointError, ConfigError
from fourfold.kernels.cpu_w8a8_gemm import exact_on_cpu
from fourfold.kernels.pages.layout import PageCodes
from fourfold.kernels.rows.quantize import WIDEST
from fourfold.models.checkpoint.fourfold_format import FourfoldFormat
from fourfold.models.checkpoint.source import Source, SourceKind
from fourfold.models.checkpoint.tensors import Checkpoint
from fourfold.models.config import ConfigReader, ModelConfig
from fourfold.models.decoder import Block, Decoder
from fourfold.models.dummy import RandomCodes
from fourfold.models.families.family import Family, Placements
from fourfold.models.families.registry import find_family
from fourfold.models.filling import CheckpointFiller, Filler, ModelFiller, Progress, RandomFiller
from fourfold.models.layers import SparseFFN
from fourfold.models.precision import PageFormat, Precision
from fourfold.models.quantising import RECIPES, Quantiser
from fourfold.models.router import UniformRouter
from fourfold.models.upcycle import upcycle
from fourfold.quadrants.kv_pages import PageShape
from fourfold.quantize.weights import DenseWeight

logger = logging.getLogger(__name__)

# What the kernels that read 8-bit pages on a GPU are made for.
KERNEL_HEAD_WIDTHS = (64, 128)
KERNEL_MOST_SHARED = 64
"""Query heads of a KV head: a tile of decode attention has a row for each."""
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoadOptions:
    """Where and how a model is loaded."""

    device: torch.device = torch.device("cpu")
    precision: Precision = Precision.AUTO
    dummy: bool = False
    """Random weights instead of the checkpoint's; only its configuration is read."""
    uniform_routing: bool = False
    """Route evenly whatever the tokens say; only with `dummy`."""

    def __post_init__(self) -> None:
        if self.uniform_routing and not self.dummy:
            raise ConfigError(
                "uniform routing makes real weights answer nonsense; add --load dummy"
            )


def resolve_device(device: str) -> torch.device:
    """The device that was named, or for `auto` the first GPU if there is one. `ConfigError` where
    it does not exist."""
    if device == "auto":
        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    try:
        wanted = torch.device(device)
    except RuntimeError:
        raise ConfigError(f"device {device!r} is not known; use cpu, cuda or cuda:N") from None
    if wanted.type == "cuda" and (wanted.index or 0) >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise ConfigError(f"device {device!r} does not exist; this machine has {count} GPUs")
    if wanted.type not in ("cpu", "cuda"):
        raise ConfigError(f"device {device!r} is not supported; use cpu, cuda or cuda:N")
    return torch.device("cuda:0") if device == "cuda" else wanted


def made_current(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """A GPU is the thread's current one within it. Triton launches on that, whatever its arguments
    are on."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def choose_precision(asked: Precision, device: torch.device) -> Precision:
    """The precision to serve in; `ConfigError` where the device cannot do what was asked.

    AUTO is bfloat16 on a GPU. On a CPU it is W8A8 where int8 products are exact (VNNI), else
    bfloat16 where the CPU multiplies it natively, else float32.
    """
    on_cpu = device.type == "cpu"
    if asked is Precision.W8A8 and not on_cpu:
        raise ConfigError("precision w8a8 runs on the CPU only; use w4a8 or bfloat16 on a GPU")
    if asked is Precision.W4A8_FP8 and not _multiplies_fp8(device):
        raise ConfigError("precision w4a8-fp8 needs a Hopper or Ada GPU; use w4a8")
    if asked is Precision.W4A8 and not on_cpu and torch.cuda.get_device_capability(device) < (8, 0):
        raise ConfigError("precision w4a8 needs an Ampere or newer GPU; use bfloat16")
    if asked is not Precision.AUTO:
        return asked
    return Precision.W8A8 if on_cpu and exact_on_cpu() else _floating(device)


def _floating(device: torch.device) -> Precision:
    """What a device multiplies fastest in floating point."""
    native = device.type != "cpu" or torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return Precision.BFLOAT16 if native else Precision.FLOAT32


def _multiplies_fp8(device: torch.device) -> bool:
    return device.type != "cpu" and torch.cuda.get_device_capability(device) >= (8, 9)


def served_precision(asked: Precision, device: torch.device, checkpoint: Checkpoint) -> Precision:
    """`choose_precision` for a checkpoint: AUTO serves weights that are packed as they are, where
    the device can, and in floating point where it cannot. `ConfigError` where they would have to be
    quantised a second time."""
    packed = packed_format(checkpoint)
    if packed is None:
        return choose_precision(asked, device)
    fp8 = packed.recipe.activations == torch.float8_e4m3fn
    own, other = Precision.W4A8, Precision.W4A8_FP8
    if fp8:
        own, other = other, own
    if fp8 and asked in (own, other) and not _multiplies_fp8(device):
        raise ConfigError(
            f"{checkpoint.where} is packed as {packed.recipe}, which needs a Hopper or Ada GPU; "
            "serve it with --precision bfloat16 or float32, or quantise the original again with "
            "--recipe int8-g64"
        )
    if asked in (other, Precision.W8A8):
        use = "bfloat16 or float32" if fp8 and not _multiplies_fp8(device) else own
        raise ConfigError(f"{checkpoint.where} is packed as {packed.recipe}; use --precision {use}")
    runs = _multiplies_fp8(device) if fp8 else device.type != "cpu" or exact_on_cpu()
    if asked is Precision.AUTO:
        asked = own if runs else _floating(device)
    return choose_precision(asked, device)


def packed_format(checkpoint: Checkpoint) -> FourfoldFormat | None:
    """How a checkpoint's weights are packed, where `fourfold quantize` wrote it."""
    from fourfold.models.checkpoint.directory import DirectoryCheckpoint

    return checkpoint.quantised if isinstance(checkpoint, DirectoryCheckpoint) else None


def activation_dtype(precision: Precision, device: torch.device) -> torch.dtype:
    """What hidden states are kept in."""
    if precision is Precision.BFLOAT16 or (precision.quantised and device.type != "cpu"):
        return torch.bfloat16
    return torch.float32


def page_shape(
    config: ModelConfig, precision: Precision, device: torch.device, asked: PageFormat
) -> PageShape:
    """The pages of a model served in a precision; `ConfigError` where the device cannot read them.

    FLOAT pages have 16 bits wherever the device multiplies them natively. Open pages of 8-bit ones
    are in the dtype of the activations: a chunk reads its own page from those, a decoding sequence
    from its open page, and both must be the same. AUTO is INT8 on a GPU, whose steps are graphs
    then, if the kernels read heads like the model's; but not in bfloat16 for keys with biases,
    which 8 bits cost precision.
    """
    dtype = activation_dtype(precision, device)
    on_gpu = device.type != "cpu"
    too_old = on_gpu and torch.cuda.get_device_capability(device) < (8, 0)
    unreadable = _unreadable(config)
    if asked is PageFormat.AUTO:
        readable = on_gpu and not too_old and dtype is torch.bfloat16 and unreadable is None
        coded = readable and (precision.quantised or not config.qkv_bias)
        asked = PageFormat.INT8 if coded else PageFormat.FLOAT
    if asked is PageFormat.FP8 and on_gpu and torch.cuda.get_device_capability(device) < (8, 9):
        raise ConfigError("--kv-pages fp8 needs a Hopper or Ada GPU; use int8")
    if asked is not PageFormat.FLOAT and too_old:
        raise ConfigError("8-bit pages need an Ampere or newer GPU; use --kv-pages float")
    if asked is not PageFormat.FLOAT and on_gpu and unreadable is not None:
        raise ConfigError(
            f"8-bit pages of {unreadable} cannot be read on a GPU; use --kv-pages float"
        )
    if asked is not PageFormat.FLOAT and on_gpu and dtype is torch.float32:
        raise ConfigError(
            "8-bit pages on a GPU go with 16-bit activations; use another --precision than float32"
        )
    if asked is PageFormat.FLOAT and precision.quantised:
        dtype = torch.bfloat16 if torch.ops.mkldnn._is_mkldnn_bf16_supported() else dtype
    return PageShape(
        layers=config.layers,
        kv_heads=config.kv_heads,
        head_width=config.head_width,
        dtype=dtype,
        codes=None if asked is PageFormat.FLOAT else PageCodes(asked.value),
    )


def _unreadable(config: ModelConfig) -> str | None:
    """What keeps a GPU's kernels from reading 8-bit pages of a model, with what they read."""
    if config.head_width not in KERNEL_HEAD_WIDTHS:
        widths = " and ".join(map(str, KERNEL_HEAD_WIDTHS))
        return f"heads {config.head_width} wide (only {widths})"
    shared = config.query_heads // config.kv_heads
    if shared > KERNEL_MOST_SHARED:
        return f"{shared} query heads per KV head (at most {KERNEL_MOST_SHARED})"
    return None


def pages_of(model: Decoder, asked: PageFormat) -> PageShape:
    """`page_shape` of a model that is loaded."""
    return page_shape(model.config, model.precision, model.frequencies.device, asked)


def open_checkpoint(source: Source) -> Checkpoint:
    """The checkpoint's reader; only its index is read yet."""
    if source.kind is SourceKind.DIRECTORY:
        from fourfold.models.checkpoint.directory import DirectoryCheckpoint

        return DirectoryCheckpoint(source.path)
    from fourfold.models.checkpoint.gguf import GGUFCheckpoint

    return GGUFCheckpoint(source.path)


def read_model_config(fields: Mapping[str, Any], where: str) -> tuple[Family, ModelConfig]:
    """The family and configuration of a config.json; every field is honoured or refused."""
    family = find_family(fields.get("model_type"), where)
    reader = ConfigReader(fields, where)
    config = family.read_config(reader)
    reader.finish()
    return family, config


def check_tensors(checkpoint: Checkpoint, config: ModelConfig, placements: Placements) -> None:
    """Raises `CheckpointError` naming tensors that are missing, left over or misshapen, or a head
    that is not the embedding that the configuration says it is."""
    shapes = checkpoint.shapes()
    unneeded = {name for name in shapes if name.endswith("rotary_emb.inv_freq")}
    if config.tied_embeddings:
        unneeded.add(_HEAD)
    missing = sorted(set(placements) - set(shapes))
    extra = sorted(set(shapes) - set(placements) - unneeded)
    misshapen = [
        f"{name} is {list(shapes[name])}, not {list(place.shape)}"
        for name, place in placements.items()
        if name in shapes and shapes[name] != place.shape
    ]
    problems = [
        f"{len(names)} tensors {what}: {', '.join(names[:4])}{', ...' if len(names) > 4 else ''}"
        for what, names in (("missing", missing), ("not used", extra), ("misshapen", misshapen))
        if names
    ]
    if problems:
        raise CheckpointError(
            f"{checkpoint.where}: {'; '.join(problems)}; fetch it again if files are missing or "
            "mixed, or use another checkpoint of the model"
        )
    if config.tied_embeddings and _HEAD in shapes and not _same(checkpoint, _EMBEDDING, _HEAD):
        raise CheckpointError(
            f"{checkpoint.where} has another {_HEAD} than {_EMBEDDING}, though config.json ties "
            "them; set its tie_word_embeddings to false if the head is meant"
        )


def _same(checkpoint: Checkpoint, one: str, other: str) -> bool:
    """Whether two tensors hold the same numbers."""
    tensors = dict(checkpoint.tensors({one, other}))
    return torch.equal(tensors[one], tensors[other].to(tensors[one].dtype))


def check_widths(config: ModelConfig, device: torch.device, precision: Precision) -> None:
    """Raises `CheckpointError` where a GPU could not multiply the model's matrices."""
    if device.type != "cuda":
        return
    widest = max(_widths_read(config))
    if precision.quantised and widest > WIDEST:
        raise CheckpointError(
            f"rows of {widest} numbers cannot be rounded to 8 bits on a GPU, which does {WIDEST} "
            "at most; use --precision bfloat16"
        )
    if config.moe is None:
        return
    # torch's grouped product wants rows of whole 16 bytes; the W4A8 kernels write tiles of 16.
    step = 16 if precision.quantised else 16 // activation_dtype(precision, device).itemsize
    if config.width % step or config.moe.expert_width % step:
        raise CheckpointError(
            f"experts of {config.width} x {config.moe.expert_width} cannot be multiplied on a GPU, "
            f"which needs multiples of {step} in {precision}; use --device cpu"
        )


def _widths_read(config: ModelConfig) -> set[int]:
    """How wide the rows are that the matrices of layers are multiplied with."""
    widths = {config.width, config.query_heads * config.head_width}
    if config.moe is not None:
        widths |= {config.moe.expert_width, config.moe.shared_width}
    if not all(config.is_sparse(layer) for layer in range(config.layers)):
        widths.add(config.ffn_width)
    return widths


def load_model(
    source: Source,
    options: LoadOptions,
    progress: Progress = lambda done, total: None,
    first_layers: Callable[[Decoder], None] = lambda model: None,
) -> Decoder:
    """The model, ready to compute. Raises `CheckpointError` or `ConfigError`.

    Args:
        source: where it is.
        options: how it is loaded.
        progress: is told how far it is.
        first_layers: is called once, before most layers are there, with a model of the first layer
            of each kind, in every order, that shares the weights of this one: whoever prepares
            something for the model need not wait for all of it. Of what `upcycle` makes it is
            called when all is there.
    """
    device, checkpoint = options.device, open_checkpoint(source)
    family, config = read_model_config(checkpoint.fields(), checkpoint.where)
    precision = served_precision(options.precision, device, checkpoint)
    check_widths(config, device, precision)
    with torch.device("meta"):
        model = Decoder(config)
    model.precision = precision
    model.frequencies = model.frequencies.to(device)
    placements = family.place(config)
    if not options.dummy:
        check_tensors(checkpoint, config, placements)
    with made_current(device):
        filler = _choose_filler(model, placements, options, checkpoint, progress)
        upcycled = is_upcycled(source, checkpoint)
        kinds = _first_of_each_kind(config)
        filler.fill_ends()
        for layer, block in enumerate(model.blocks):
            filler.fill_layer(layer)
            if options.uniform_routing:
                route_uniformly(block)
            if layer == kinds[-1] and not upcycled:
                first_layers(_part_of(model, kinds))
        if upcycled:
            upcycle(model)
            for block in model.blocks:
                if options.uniform_routing:
                    route_uniformly(block)
            first_layers(_part_of(model, kinds))
    if device.type == "cuda":
        # What filling needed besides; whoever sizes something asks the device what is free.
        torch.cuda.empty_cache()
    return model.eval()


def _choose_filler(
    model: Decoder,
    placements: Placements,
    options: LoadOptions,
    checkpoint: Checkpoint,
    progress: Progress,
) -> ModelFiller:
    precision, device = model.precision, options.device
    packed = packed_format(checkpoint)
    dtype = activation_dtype(precision, device)
    as_packed = packed is not None and precision in (Precision.W4A8, Precision.W4A8_FP8)
    if options.dummy and precision.quantised:
        recipe = packed.recipe if as_packed and packed is not None else RECIPES.get(precision)
        return RandomCodes(model, recipe, device)
    if as_packed and not options.dummy:
        from fourfold.models.checkpoint.directory import DirectoryCheckpoint
        from fourfold.models.packed_filling import PackedFiller

        assert isinstance(checkpoint, DirectoryCheckpoint)
        return PackedFiller(model, placements, device, dtype, checkpoint, progress)
    if precision.quantised:
        dtype = torch.float32
    if precision in RECIPES and not options.dummy:
        logger.info(
            "weights are rounded to %s while they load; fourfold quantize does it once, and better",
            precision,
        )
    filler: Filler = (
        RandomFiller(model, placements, device, dtype)
        if options.dummy
        else CheckpointFiller(model, placements, device, dtype, checkpoint, progress)
    )
    return _DenseFiller(model, filler, device)


class _DenseFiller:
    """Fills a model in floating point and quantises each part, if its precision asks for it, before
    the next."""

    def __init__(self, model: Decoder, filler: Filler, device: torch.device) -> None:
        self._model, self._filler = model, filler
        self._quantiser = (
            Quantiser(model.config, model.precision, device) if model.precision.quantised else None
        )

    def fill_ends(self) -> None:
        model = self._model
        for part in ("embedding.", "norm.", "head."):
            self._filler.fill(part)
        if model.config.tied_embeddings:
            model.head.weight = DenseWeight(model.embedding.weight)
        if self._quantiser is not None:
            self._quantiser.quantise_ends(model)

    def fill_layer(self, layer: int) -> None:
        self._filler.fill(f"layers.{layer}.")
        if self._quantiser is not None:
            self._quantiser.quantise_block(self._model.blocks[layer])


def _first_of_each_kind(config: ModelConfig) -> list[int]:
    """The first dense and the first sparse layer, as far as there are such, in order."""
    firsts = {config.is_sparse(layer): layer for layer in reversed(range(config.layers))}
    return sorted(firsts.values())


def _part_of(model: Decoder, layers: Sequence[int]) -> Decoder:
    """A model of one or two layers of another, whose weights it shares. Each follows each, itself
    too, because what a layer is handed depends on the one before."""
    order = [layer for layer in layers for _ in range(2)]
    if len(layers) > 1:
        order.append(layers[0])
    with torch.device("meta"):
        part = Decoder(dataclasses.replace(model.config, layers=layers[-1] + 1))
    part.layers = nn.ModuleList(model.layers[layer] for layer in order)
    part.embedding, part.norm, part.head = model.embedding, model.norm, model.head
    part.frequencies, part.precision = model.frequencies, model.precision
    return part.eval()


def is_upcycled(source: Source, checkpoint: Checkpoint) -> bool:
    """Whether a dense checkpoint is served as a mixture of experts, as the embedded default is."""
    packed = packed_format(checkpoint)
    return source.kind is SourceKind.EMBEDDED or (packed is not None and packed.upcycled)


def route_uniformly(block: Block) -> None:
    """Replaces a layer's router by one that spreads tokens evenly over the experts."""
    if isinstance(block.ffn, SparseFFN):
        block.ffn.router = UniformRouter(block.ffn.router, block.layer)
