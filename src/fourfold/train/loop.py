"""The training loop: a run from its first step, or from where it was left, to its last.

What a step reports is read when the next one has been launched, so that a GPU is never idle while
the host looks at numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
import torch
from torch import Tensor

from fourfold.errors import ConfigError
from fourfold.files import write_atomically
from fourfold.models.config import ModelConfig
from fourfold.models.layers import SparseFFN
from fourfold.train import checkpoint
from fourfold.train.config import TrainConfig
from fourfold.train.data.batches import Batch, Batches
from fourfold.train.data.shards import Contents
from fourfold.train.export import export
from fourfold.train.losses import Objective, Scale, prediction_loss
from fourfold.train.metrics import EvaluationRecord, Metrics, SpikeWatch, peak_flops
from fourfold.train.model import build, count
from fourfold.train.optim import Optimizer
from fourfold.train.parallel import Parallel
from fourfold.train.reporting import Launched, Reporter, Watch
from fourfold.train.router import TrainedRouter
from fourfold.train.schedule import bias_moves, rate_at
from fourfold.train.step import MicroBatch, TrainStep, lay_out, moved
from fourfold.train.step_graph import StepGraph

_MOST_CAPTURED = 16
"""Micro-batches of a step that is captured unasked: its graph holds every kernel of all of them."""


class Trainer:
    """One run in this process, ready to go on from where its folder says."""

    def __init__(
        self,
        config: TrainConfig,
        model: ModelConfig,
        batches: Batches,
        parallel: Parallel,
        *,
        contents: Contents | None = None,
    ) -> None:
        """
        Args:
            config: the run.
            model: the decoder, as `model.model_config` makes it.
            batches: what is trained on.
            parallel: this process among the others.
            contents: of the shards that batches are cut from, which a checkpoint is continued on.
                None where they come from elsewhere.
        """
        self._config, self._batches, self._parallel = config, batches, parallel
        self._contents = contents
        self._rows, rest = divmod(config.data.rows, parallel.world)
        self._micro = config.run.micro_rows or self._rows
        if rest or self._rows % self._micro:
            raise ConfigError(
                f"data.rows = {config.data.rows} cannot be dealt to {parallel.world} processes in "
                f"micro-batches of run.micro_rows = {self._micro}; make it a multiple of both"
            )
        self.dtype = choose_dtype(config, parallel.device)
        self.model = build(
            model,
            seed=config.run.seed,
            deviation=config.model.deviation,
            device=parallel.device,
            experts=parallel.experts(model.moe.experts) if model.moe else None,
        )
        parallel.shard(self.model, self.dtype)
        self.optimizer = Optimizer(self.model, config.optimizer, parallel, self.dtype)
        self._objective = Objective(config.router, parallel)
        captured = captures(config, parallel, self._rows // self._micro)
        self._step = StepGraph(self._compute) if captured else self._compute
        self._folder = Path(config.run.folder)
        self.steps = self.tokens = 0
        self._seconds = 0.0
        self._spikes = SpikeWatch()
        self._resume()
        if config.run.compile:
            for block in self.model.blocks:
                # A training step does not tell layers apart, and what is compiled for one serves
                # all; torch gives up after eight.
                block.layer = 0
                block.compile()

    def _resume(self) -> None:
        found = checkpoint.checkpoints(self._folder / "checkpoints")
        self._continued = bool(found)
        start = self._config.run.start_from
        path = found[-1] if found else None if start is None else Path(start)
        if path is None:
            return
        progress = checkpoint.load(path, self.model, self.optimizer, self._contents)
        for name in ("rows", "length", "seed"):
            was, now = getattr(progress, name), getattr(self._config.data, name)
            if was != now:
                raise ConfigError(
                    f"data.{name} = {now}, but {path} was trained with {was}, and counts its place "
                    "in the data in such batches; use that, or a new run.folder"
                )
        if progress.steps > (last := self._config.schedule.steps):
            raise ConfigError(
                f"schedule.steps = {last}, but {path} has taken {progress.steps} steps; raise it, "
                "or take a new run.folder"
            )
        self.steps, self.tokens, self._seconds = progress.steps, progress.tokens, progress.seconds
        self._spikes = SpikeWatch(progress.steps, progress.loss_mean, progress.loss_deviation)

    def run(
        self,
        *,
        held_out: Batches | None = None,
        watch: Watch = lambda record: None,
        asked: Callable[[], bool] = lambda: False,
    ) -> bool:
        """Takes all steps that are left, and leaves metrics and checkpoints.

        Args:
            held_out: what is evaluated on.
            watch: is told every record, in the first process.
            asked: whether this process is to end. All processes of the run leave a checkpoint of
                the same step then, the one under way or, of several processes, soon after.

        Returns:
            Whether it was ended so.

        Raises:
            TrainingError: where the loss is no number.
        """
        run, last = self._config.run, self._config.schedule.steps
        log: Metrics | None = None
        if self._parallel.rank == 0:
            config = msgspec.json.format(msgspec.json.encode(self._config), indent=2)
            write_atomically(self._folder / "config.json", config + b"\n")
            log = Metrics(self._folder, steps=self.steps, tensorboard=run.tensorboard)
        peak = peak_flops(self._parallel.device)
        reporter = Reporter(
            log,
            watch,
            device=self._parallel.device,
            every=run.log_every,
            last=last,
            flops_per_token=count(self.model.config, self._config.data.length).flops_per_token,
            peak=None if peak is None else peak * self._parallel.world,
            spikes=self._spikes,
        )
        before = self._seconds
        unread: Launched | None = None
        stops = False
        try:
            if held_out is not None and self._lacks_evaluation(log):
                reporter.tell(self.evaluate(held_out))
            while self.steps < last and not stops:
                current = self.launch(asked=asked())
                if unread is not None:
                    stops = reporter.read(unread)
                # Several processes learn from a step's sums that they end, so that all know it at
                # the same step; one alone need not wait for them.
                stops = stops or (self._parallel.mesh is None and asked())
                unread = current
                evaluates = held_out is not None and self._is_due(run.evaluate_every)
                saves = self._is_due(run.save_every)
                # Where launching is computing nothing is gained by waiting with what it says.
                if evaluates or saves or stops or self._parallel.device.type == "cpu":
                    stops = reporter.read(current) or stops
                    unread = None
                self._seconds = before + reporter.seconds
                if evaluates and held_out is not None and not stops:
                    reporter.tell(self.evaluate(held_out))
                if saves or stops:
                    self.save()
                if evaluates or saves:
                    reporter.begin()
            if stops:
                # The first process writes still, and launchers end all where one has ended.
                self._in_any(False)
        finally:
            if log is not None:
                log.close()
        return stops

    def _lacks_evaluation(self, log: Metrics | None) -> bool:
        """Whether an evaluation of here is due that the metrics, which only the first process has,
        do not hold: a run that was asked to end leaves it to the next start."""
        if not self._continued and self.steps < self._config.schedule.steps:
            return False
        if not self._is_due(self._config.run.evaluate_every):
            return False
        return not self._in_any(log is not None and log.evaluated == self.steps)

    def _in_any(self, here: bool) -> bool:
        """Whether something is so in any process; waits for all."""
        known = torch.full((), float(here), device=self._parallel.device)
        return bool(self._parallel.summed(known))

    def _is_due(self, every: int) -> bool:
        return self.steps % every == 0 or self.steps == self._config.schedule.steps

    def launch(self, *, asked: bool = False) -> Launched:
        """One step: gradients of all micro-batches, then the update. `asked`: whether this process
        was asked to end, which all learn."""
        config, parallel = self._config, self._parallel
        batch = self._batches.batch(self.steps)
        mine, counted = batch.rows(parallel.rank, parallel.world), predicted(batch)
        micros = [
            lay_out(_part(mine, number, self._micro), parallel.device)
            for number in range(self._rows // self._micro)
        ]
        share = rate_at(self.steps, config.schedule)
        moves = bias_moves(self.steps, config.schedule, config.router.bias_frozen)
        moved_by = config.router.bias_rate if moves else 0.0
        own_3 = torch.tensor([1 / max(1, counted), moved_by, float(asked)])
        numbers_6 = torch.cat((own_3, self.optimizer.begin_step(share)))
        sums_5, load_LE = self._step(micros, moved(numbers_6, parallel.device))
        self.steps += 1
        self.tokens += counted
        rate = share * config.optimizer.rate
        return Launched.fetched(self.steps, counted, self.tokens, rate, sums_5, load_LE)

    def _compute(
        self, micros: Sequence[MicroBatch], numbers_6: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """What a device does in a step: returns the sums and loads of `Launched`. The numbers are
        what a token counts for in the loss, how far biases move, whether this process was asked to
        end, and the optimizer's."""
        parallel = self._parallel
        scale = Scale(numbers_6[0], 1 / (len(micros) * parallel.world))
        sums_5 = torch.zeros(5, device=parallel.device)
        sums_5[4] = numbers_6[2]
        load_LE: Tensor | None = None
        for number, micro in enumerate(micros, start=1):
            parallel.sum_gradients(self.model, now=number == len(micros))
            load_LE = self._micro_batch(micro, scale, sums_5, load_LE)
        parallel.summed(sums_5)
        if load_LE is not None:
            parallel.summed(load_LE)
            self._move_biases(load_LE, numbers_6[1])
        sums_5[3] = self.optimizer.step(numbers_6[3:])
        return sums_5, load_LE

    def _micro_batch(
        self, micro: MicroBatch, scale: Scale, sums_5: Tensor, load_LE: Tensor | None
    ) -> Tensor | None:
        """Adds a micro-batch's gradients, losses and loads to the step's; returns the loads."""
        step = TrainStep(micro.documents, self._parallel.exchange)
        losses = self._objective(self.model, step, micro.tokens_T, micro.target_T, scale)
        losses.total.backward()  # type: ignore[no-untyped-call]
        self.optimizer.gather()
        with torch.no_grad():
            parts = (losses.cross_entropy, losses.balance, losses.z)
            weights = (1.0, scale.of_micro_batch, scale.of_micro_batch)
            for place, (part, weight) in enumerate(zip(parts, weights, strict=True)):
                sums_5[place] += part * weight
            if not step.routings:
                return None
            counts_LE = step.loads()
            return counts_LE if load_LE is None else load_LE + counts_LE

    def _move_biases(self, load_LE: Tensor, rate: Tensor) -> None:
        sparse = [block.ffn for block in self.model.blocks if isinstance(block.ffn, SparseFFN)]
        for ffn, load_E in zip(sparse, load_LE, strict=True):
            assert isinstance(ffn.router, TrainedRouter)
            ffn.router.move_bias(load_E, rate)

    @torch.no_grad()
    def evaluate(self, batches: Batches) -> EvaluationRecord:
        """The loss on the first global batches of a series."""
        parallel = self._parallel
        sums_2 = torch.zeros(2, dtype=torch.float64, device=parallel.device)
        for number in range(self._config.run.evaluate_batches):
            mine = batches.batch(number).rows(parallel.rank, parallel.world)
            for part in range(self._rows // self._micro):
                batch = _part(mine, part, self._micro)
                documents, tokens_T, target_T = lay_out(batch, parallel.device)
                step = TrainStep(documents, parallel.exchange)
                sums_2[0] += prediction_loss(self.model, step, tokens_T, target_T)
                sums_2[1] += predicted(batch)
        total, counted = parallel.summed(sums_2).tolist()
        return EvaluationRecord(
            step=self.steps,
            tokens=self.tokens,
            held_out_loss=total / max(1, counted),
            evaluated_tokens=int(counted),
        )

    def save(self) -> None:
        """Leaves a checkpoint of where the run is. Every process must call it."""
        progress = checkpoint.Progress(
            steps=self.steps,
            tokens=self.tokens,
            seconds=self._seconds,
            loss_mean=self._spikes.mean,
            loss_deviation=self._spikes.deviation,
            rows=self._config.data.rows,
            length=self._config.data.length,
            seed=self._config.data.seed,
            model=self.model.config,
            contents=self._contents,
        )
        checkpoint.save(
            self._folder / "checkpoints",
            progress,
            self.model,
            self.optimizer,
            self._parallel,
            keep=self._config.run.keep,
        )

    def export(self, folder: Path, tokenizer: Path | None = None) -> None:
        """Writes the model as a Hugging Face directory. Every process must call it."""
        weights = checkpoint.weights_of(self.model, self.optimizer, self._parallel)
        if self._parallel.rank == 0:
            export(weights, self.model.config, folder, dtype=self.dtype, tokenizer=tokenizer)


def captures(config: TrainConfig, parallel: Parallel, micro_batches: int) -> bool:
    """Whether steps of so many micro-batches are launched as CUDA graphs. ConfigError where they
    are to be and cannot."""
    able = parallel.device.type == "cuda" and parallel.mesh is None
    if config.run.cuda_graph and not able:
        raise ConfigError(
            "run.cuda_graph = true: a step is captured where one process trains on a GPU, for "
            "several wait for each other on the host; leave it out"
        )
    if config.run.cuda_graph is None:
        return able and micro_batches <= _MOST_CAPTURED
    return config.run.cuda_graph


def choose_dtype(config: TrainConfig, device: torch.device) -> torch.dtype:
    """What is computed in. ConfigError for what a GPU has no kernels for."""
    on_gpu = device.type == "cuda"
    if config.run.dtype == "float32" and on_gpu:
        raise ConfigError(
            'run.dtype = "float32": attention and products of experts are in bfloat16 on a GPU; '
            "use that, or a CPU"
        )
    wide = config.run.dtype == "float32" or not (on_gpu or config.run.dtype == "bfloat16")
    return torch.float32 if wide else torch.bfloat16


def predicted(batch: Batch) -> int:
    """How many tokens a batch predicts."""
    return int((batch.document[:, 1:] == batch.document[:, :-1]).sum())


def _part(batch: Batch, number: int, rows: int) -> Batch:
    part = slice(number * rows, (number + 1) * rows)
    return Batch(batch.tokens[part], batch.document[part])
