"""Several processes take the same steps as one, however weights and experts are dealt to them."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from fourfold.errors import ConfigError
from fourfold.train import checkpoint, parallel
from fourfold.train.metrics import EvaluationRecord, StepRecord, read_records
from fourfold.train.parallel import joined
from tests.cpu.instead import Instead
from tests.cpu.train import ranks, toy

ALONE: dict[str, Any] = {"parallel": {"experts": 1}}


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes left of every case, and four of theirs."""
    return ranks.run_all(tmp_path_factory.mktemp("together"))


def takes_the_steps_of_one(case: str, together: Path, tmp_path: Path) -> None:
    config = ranks.config_of(case, tmp_path, ALONE)
    # Sums that are added in another order round to other bfloat16s.
    near = 5e-2 if config.run.dtype == "bfloat16" else 1e-3
    trainer = toy.trainer(config)
    trainer.run(held_out=toy.chain(config, seed=1))
    trainer.export(Path(config.run.folder) / "model")
    theirs = Path(ranks.config_of(case, together).run.folder)
    mine = Path(config.run.folder)
    records = [read_records(folder / "metrics.jsonl") for folder in (mine, theirs)]
    assert len(records[0]) == len(records[1]) == ranks.STEPS + 1
    for one, two in zip(*records, strict=True):
        assert one.tokens == two.tokens
        if isinstance(one, EvaluationRecord):
            assert isinstance(two, EvaluationRecord)
            assert two.held_out_loss == pytest.approx(one.held_out_loss, rel=near / 10)
            continue
        assert isinstance(two, StepRecord)
        for name in ("loss", "gradient_norm", "balance", "z", "load_most"):
            wanted, got = getattr(one, name), getattr(two, name)
            if wanted is not msgspec.UNSET:
                assert got == pytest.approx(wanted, rel=near), name
    files = (
        "checkpoints/step-00000003/state.safetensors",
        "model/model-00001-of-00001.safetensors",
    )
    for file in files:
        one, two = load_file(mine / file), load_file(theirs / file)
        assert one.keys() == two.keys()
        for name, tensor in one.items():
            # AdamW moves a weight by its gradient's sign, however small that gradient is.
            off = (two[name].float() - tensor.float()).norm() / tensor.float().norm().clamp_min(1)
            # And in bfloat16 a token near a tie of the router may go elsewhere.
            assert off < (2 * near if config.run.dtype == "bfloat16" else near), name


@pytest.mark.parametrize("case", sorted(ranks.CASES))
def test_two_processes_take_the_steps_of_one(case: str, together: Path, tmp_path: Path) -> None:
    takes_the_steps_of_one(case, together, tmp_path)


@pytest.mark.parametrize("case", sorted(ranks.OF_FOUR))
def test_groups_that_hold_the_same_experts_take_the_steps_of_one(
    case: str, together: Path, tmp_path: Path
) -> None:
    takes_the_steps_of_one(case, together, tmp_path)


def test_two_processes_end_at_the_same_step(together: Path) -> None:
    """One was asked when so many steps were taken; all know it after the next."""
    found = [
        [path.name for path in checkpoint.checkpoints(together / name / "checkpoints")]
        for name in ("whole", "stopped")
    ]
    assert found == [["step-00000008"], [f"step-{ranks.STOPPED + 1:08d}", "step-00000008"]]
    whole, stopped = (
        [
            (r.step, r.loss)
            for r in read_records(path / "metrics.jsonl")
            if isinstance(r, StepRecord)
        ]
        for path in (together / "whole", together / "stopped")
    )
    assert len(whole) == 8
    assert stopped == whole


def test_one_process_goes_on_where_two_were(together: Path, tmp_path: Path) -> None:
    case = "experts apart, sigmoid, muon"
    theirs = Path(ranks.config_of(case, together).run.folder) / "checkpoints" / "step-00000003"
    more = {"schedule": {"steps": 5}, "run": {"start_from": str(theirs)}}
    trainer = toy.trainer(ranks.config_of(case, tmp_path, ALONE, more))
    assert trainer.steps == 3
    trainer.run()
    whole = toy.trainer(
        ranks.config_of(case, tmp_path / "whole", ALONE, {"schedule": {"steps": 5}})
    )
    whole.run()
    losses = [
        record.loss
        for folder in (tmp_path, tmp_path / "whole")
        for record in read_records(next(folder.glob("experts*")) / "metrics.jsonl")
        if isinstance(record, StepRecord) and record.step > 3
    ]
    assert losses[:2] == pytest.approx(losses[2:], rel=1e-3)


def test_gradients_of_copies_add_up_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where bfloat16 would lose a small one beside a large one."""
    mesh: Any = SimpleNamespace(size=lambda axis: 2, get_group=lambda axis: None)
    others = Instead(dist, all_reduce=lambda tensor, group: tensor.add_(2.0**-9))
    monkeypatch.setattr(parallel, "dist", others)
    of_two = parallel.Parallel(0, 4, torch.device("cpu"), mesh)
    total = of_two.sum_copies(torch.ones(3, dtype=torch.bfloat16))
    assert torch.equal(total, torch.full((3,), 1 + 2.0**-9))


def test_experts_that_cannot_be_dealt_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    section = toy.config(Path("nowhere"), {"parallel": {"experts": 2}}).parallel
    refused = pytest.raises(ConfigError, match=r"parallel\.experts = 2")
    with refused, joined(section, torch.device("cpu")):
        pass


def test_a_process_computes_on_its_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also a lone one on a GPU that is not the first: kernels are launched on the current one."""
    section = toy.config(Path("nowhere")).parallel
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    current: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    for asked, given in (("cuda", "cuda:0"), ("cuda:1", "cuda:1")):
        with joined(section, torch.device(asked)) as parallel:
            assert parallel.device == current.pop() == torch.device(given)
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("LOCAL_RANK", "2")
    refused = pytest.raises(ConfigError, match="process 2 of this host has no GPU")
    with refused, joined(section, torch.device("cuda")):
        pass
