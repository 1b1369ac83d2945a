"""What a training run is: a TOML file of seven sections, checked before anything is allocated.

Imports nothing heavy. Every error names the field, its value and the remedy.
"""

from __future__ import annotations

import importlib.util
import math
import tomllib
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import msgspec

from fourfold.errors import ConfigError
from fourfold.models.config import MOST_HEADS, MOST_LAYERS, MOST_WIDTH

# torch's grouped product takes rows of whole 16 bytes, of bfloat16.
_GROUPED_STEP = 8
# Flash attention has kernels for these, rotation needs halves.
_HEAD_WIDTHS = (8, 16, 32, 64, 128, 256)
# What rows are sorted by on a GPU.
_MOST_EXPERTS = 1024


def _positive(section: str, fields: msgspec.Struct, *names: str) -> None:
    for name in names:
        value = getattr(fields, name)
        if value is not None and not 0 < value < math.inf:
            raise ConfigError(f"{section}.{name} = {value} must be more than zero, and finite")


def _at_most(section: str, fields: msgspec.Struct, **most: int) -> None:
    """Refuses sizes that no model comes near, and that would never be built."""
    for name, bound in most.items():
        value = getattr(fields, name)
        if value > bound:
            raise ConfigError(f"{section}.{name} = {value} is more than {bound}; lower it")


def _share(section: str, fields: msgspec.Struct, *names: str) -> None:
    for name in names:
        value = getattr(fields, name)
        if not 0 <= value <= 1:
            raise ConfigError(f"{section}.{name} = {value} is a share; it must lie in 0 to 1")


def _at_least_zero(section: str, fields: msgspec.Struct, *names: str) -> None:
    for name in names:
        value = getattr(fields, name)
        if not 0 <= value < math.inf:
            raise ConfigError(f"{section}.{name} = {value} must be zero or more, and finite")


class ModelSection(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The decoder. A dense twin has FFNs as wide as what a token passes of the sparse ones."""

    layers: int
    width: int
    heads: int
    kv_heads: int
    head_width: int
    form: Literal["sparse", "dense"] = "sparse"
    experts: int
    experts_per_token: int
    expert_width: int
    shared_experts: int = 0
    """Experts that every token passes, besides the chosen ones."""
    dense_layers: int = 0
    """The first layers whose FFN is dense, as wide as what a token passes in the others."""
    vocabulary: int | None = None
    """Default: the data's, rounded up to a multiple of 64."""
    max_positions: int = 4096
    rope_theta: float = 10000.0
    norm_eps: float = 1e-6
    tied_embeddings: bool = False
    deviation: float = 0.02
    """Of the initial weights; over sqrt(2 layers) where they write to the residual stream."""

    def __post_init__(self) -> None:
        names = ("layers", "width", "heads", "kv_heads", "head_width", "experts", "expert_width")
        _positive("model", self, *names, "experts_per_token", "vocabulary", "max_positions")
        _positive("model", self, "rope_theta", "norm_eps", "deviation")
        _at_most("model", self, layers=MOST_LAYERS, width=MOST_WIDTH, heads=MOST_HEADS)
        _at_most("model", self, shared_experts=_MOST_EXPERTS, expert_width=MOST_WIDTH)
        _at_least_zero("model", self, "shared_experts", "dense_layers")
        if self.experts_per_token > self.experts:
            raise ConfigError(
                f"model.experts_per_token = {self.experts_per_token} is more than "
                f"model.experts = {self.experts}; lower one or raise the other"
            )
        if self.heads % self.kv_heads:
            raise ConfigError(
                f"model.heads = {self.heads} is not a multiple of model.kv_heads = "
                f"{self.kv_heads}; choose kv_heads that divides it"
            )
        if self.head_width not in _HEAD_WIDTHS:
            raise ConfigError(
                f"model.head_width = {self.head_width} is none of "
                f"{', '.join(map(str, _HEAD_WIDTHS))}; use one of them"
            )
        if self.dense_layers >= self.layers and self.form == "sparse":
            raise ConfigError(
                f"model.dense_layers = {self.dense_layers} leaves none of {self.layers} layers "
                'sparse; lower it, or say form = "dense"'
            )

    @property
    def active_width(self) -> int:
        """What a token passes of one FFN."""
        return (self.experts_per_token + self.shared_experts) * self.expert_width


class RouterSection(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How tokens choose experts, and what keeps the experts evenly loaded."""

    score: Literal["softmax", "sigmoid"] = "softmax"
    """softmax: balanced by `balance_loss`. sigmoid: by a selection bias too, and with shared
    experts."""
    gate_scale: float = 1.0
    """A factor of the gates, which sum to one without it. With as many as a token's experts, a new
    FFN writes as much as its dense twin does."""
    bias_rate: float = 1e-3
    """How far a selection bias moves in a step; only read with sigmoid."""
    bias_frozen: float = 0.05
    """The last share of the steps, in which selection biases stay as they are."""
    balance_loss: float = 1e-2
    """Weight of the balance loss; with sigmoid 1e-4 is usual."""
    balance_over: Literal["sequence", "batch"] = "batch"
    """Where loads are to be even: in each row, or in what all processes compute at a time: the
    global batch, or one of its micro-batches where `run.micro_rows` cuts it."""
    z_loss: float = 0.0
    """Weight of the mean squared log-sum-exp of router logits."""

    def __post_init__(self) -> None:
        _positive("router", self, "gate_scale")
        _share("router", self, "bias_frozen")
        _at_least_zero("router", self, "bias_rate", "balance_loss", "z_loss")


class DataSection(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What is read: folders of shards, and how they are cut."""

    train: str
    """A folder made by `fourfold tokenize`."""
    held_out: str | None = None
    """The same, of text that is never trained on."""
    length: int = 1024
    """Tokens of a row that are predicted from."""
    rows: int = 64
    """Rows of the global batch: of one step, over all processes."""
    seed: int = 0
    """Of the order of documents and rows."""

    def __post_init__(self) -> None:
        _positive("data", self, "length", "rows")
        _at_least_zero("data", self, "seed")
        if self.held_out is not None and Path(self.held_out) == Path(self.train):
            raise ConfigError(
                f"data.held_out = {self.held_out} is what is trained on; name the split that "
                "`fourfold tokenize` held out"
            )


class OptimizerSection(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How weights follow gradients."""

    kind: Literal["adamw", "muon"] = "adamw"
    """muon: hidden matrices by Muon, embeddings, head, routers and norms by AdamW."""
    rate: float = 3e-3
    """Peak learning rate. Muon's updates are scaled to the size of AdamW's, so that it serves
    both."""
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    momentum: float = 0.95
    """Muon's; only read with it."""
    weight_decay: float = 0.1
    """Of matrices; norms and embeddings are not decayed."""
    clip: float = 1.0
    """The largest norm of all gradients together."""

    def __post_init__(self) -> None:
        _positive("optimizer", self, "rate", "eps", "clip")
        for name in ("beta1", "beta2", "momentum"):
            if not 0 <= (value := getattr(self, name)) < 1:
                raise ConfigError(f"optimizer.{name} = {value} must be at least 0 and below 1")
        _at_least_zero("optimizer", self, "weight_decay")


class ScheduleSection(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Warm-up, then a stable rate, then decay to `final` of it by the square root of time."""

    steps: int
    warmup: int = 100
    """Steps."""
    decay: float = 0.2
    """The last share of the steps."""
    final: float = 0.0
    """Share of the peak rate that the decay leads to: a step after the last would have it."""

    def __post_init__(self) -> None:
        _positive("schedule", self, "steps")
        _share("schedule", self, "decay", "final")
        _at_least_zero("schedule", self, "warmup")
        if self.warmup + self.decay * self.steps > self.steps:
            raise ConfigError(
                f"schedule.warmup = {self.warmup} and schedule.decay = {self.decay} are more than "
                f"schedule.steps = {self.steps}; shorten one of them"
            )


class RunSection(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where and how it runs, and what it leaves behind."""

    folder: str
    """Takes metrics, checkpoints and the model; a run found there is continued."""
    start_from: str | None = None
    """A checkpoint of another run, whose weights, optimizer and place in the data a fresh run
    takes over: how several decays branch from one stable phase."""
    seed: int = 0
    """Of the initial weights."""
    device: str = "auto"
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """What is computed in; master weights are float32. auto: bfloat16 on a GPU, else float32."""
    micro_rows: int | None = None
    """Rows that one process computes at a time. Default: all of its rows of a step."""
    compile: bool = False
    """Compile layers with torch.compile: slow to start, then faster."""
    cuda_graph: bool | None = None
    """Launch a step as one CUDA graph. Default: where one process trains on a GPU, in 16
    micro-batches a step at most."""
    save_every: int = 500
    """Steps between checkpoints; the last step always makes one."""
    keep: int = 2
    """Checkpoints that stay; older ones are removed."""
    evaluate_every: int = 500
    """Steps between evaluations; the last step always makes one."""
    evaluate_batches: int = 16
    """Global batches of held-out text that an evaluation reads, at most all there are."""
    log_every: int = 10
    tensorboard: bool = False
    """Write TensorBoard events too; needs `pip install 'fourfold[tensorboard]'`."""
    export: bool = True
    """Write the trained model as a Hugging Face directory."""

    def __post_init__(self) -> None:
        _positive("run", self, "micro_rows", "save_every", "keep", "evaluate_every", "log_every")
        _positive("run", self, "evaluate_batches")
        _at_least_zero("run", self, "seed")
        if self.tensorboard and importlib.util.find_spec("tensorboard") is None:
            raise ConfigError("run.tensorboard = true needs `pip install 'fourfold[tensorboard]'`")


class ParallelSection(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How processes share the work; started by `torchrun`, one process a device."""

    experts: int = 1
    """Processes that hold different experts and exchange tokens; divides the number of processes.
    All other weights are sharded over all processes."""
    timeout: float = 600.0
    """Seconds until a process that others wait for is given up."""

    def __post_init__(self) -> None:
        _positive("parallel", self, "experts", "timeout")


class TrainConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A whole run."""

    model: ModelSection
    data: DataSection
    schedule: ScheduleSection
    run: RunSection
    router: RouterSection = RouterSection()
    optimizer: OptimizerSection = OptimizerSection()
    parallel: ParallelSection = ParallelSection()

    def __post_init__(self) -> None:
        if self.model.form == "sparse":
            self._check_sparse()
        if self.data.length > self.model.max_positions:
            raise ConfigError(
                f"data.length = {self.data.length} is more than model.max_positions = "
                f"{self.model.max_positions}; raise the latter"
            )

    def _check_sparse(self) -> None:
        shared, experts = self.model.shared_experts, self.model.experts
        if (self.router.score == "sigmoid") != (shared > 0):
            raise ConfigError(
                f'router.score = "{self.router.score}" with model.shared_experts = {shared} is no '
                "family that can be served: softmax goes without shared experts, sigmoid with them"
            )
        for name in ("width", "expert_width"):
            if (value := getattr(self.model, name)) % _GROUPED_STEP:
                raise ConfigError(
                    f"model.{name} = {value} is not a multiple of {_GROUPED_STEP}, which products "
                    "of experts need; round it"
                )
        if experts > _MOST_EXPERTS:
            raise ConfigError(
                f"model.experts = {experts} is more than a GPU sorts rows by; use at most "
                f"{_MOST_EXPERTS}"
            )
        if experts % self.parallel.experts:
            raise ConfigError(
                f"model.experts = {experts} cannot be divided among parallel.experts = "
                f"{self.parallel.experts} processes; choose a divisor"
            )


def read_config(path: Path, overrides: Sequence[str] = ()) -> TrainConfig:
    """A TOML file with `section.field=value` overrides, the value in TOML or a bare word.

    `ConfigError` for a file that cannot be read and for every field that cannot be honoured.
    """
    try:
        fields = tomllib.loads(path.read_text())
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: is not TOML ({error})") from None
    for override in overrides:
        _override(fields, override)
    return make_config(fields, str(path))


def make_config(fields: dict[str, Any], where: str) -> TrainConfig:
    """A configuration of plain values; `where` is named in errors."""
    try:
        return msgspec.convert(fields, TrainConfig)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None
    except msgspec.ValidationError as error:
        problem, _, path = str(error).partition(" - at `$.")
        path = path.rstrip("`")
        value: Any = fields
        for name in path.split(".") if path else ():
            value = value.get(name) if isinstance(value, dict) else None
        shown = f"{path} = {value!r}: " if path and not isinstance(value, dict) else ""
        section = f" in [{path}]" if path and not shown else ""
        problem = problem[:1].lower() + problem[1:]
        remedy = _remedy(problem, path)
        raise ConfigError(f"{where}: {shown}{problem}{section}; {remedy}") from None


def _remedy(problem: str, path: str) -> str:
    """What a field may be, or a section may have, where the problem does not say it."""
    section, _, field = path.partition(".")
    kind = typing.get_type_hints(TrainConfig)[section] if section else TrainConfig
    if "unknown field" in problem:
        known = ", ".join(kind.__struct_fields__)
        return f"its fields are {known}" if section else f"the sections are {known}"
    if field and "enum" in problem:
        choices = typing.get_args(typing.get_type_hints(kind)[field])
        return "use " + " or ".join(f'"{choice}"' for choice in choices)
    return "correct that field"


def _override(fields: dict[str, Any], override: str) -> None:
    name, equals, text = override.partition("=")
    section, dot, field = name.strip().partition(".")
    if not equals or not dot or not field:
        raise ConfigError(f"--set {override!r} is not section.field=value")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text.strip()
    target = fields.setdefault(section, {})
    if not isinstance(target, dict):
        raise ConfigError(f"--set {override!r}: {section} is a value, not a section")
    target[field] = value
