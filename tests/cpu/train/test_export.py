"""What training computes is what transformers and our engine compute of the exported model."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from fourfold.models.checkpoint.source import find_source
from fourfold.models.loading import LoadOptions, load_model
from fourfold.models.precision import Precision
from fourfold.train.data.batches import Batch
from fourfold.train.loop import Trainer
from fourfold.train.step import TrainStep, lay_out
from tests.cpu.models.computing import logits
from tests.cpu.train import toy

FORMS = {
    "softmax": {"model": {"dense_layers": 1}},
    "scaled": {"router": {"gate_scale": 3.0}},
    "sigmoid": toy.SIGMOID,
    "dense": toy.DENSE,
}
PROMPT = torch.randint(toy.VOCABULARY, (40,), generator=torch.Generator().manual_seed(5)).tolist()


@pytest.fixture(scope="module", params=sorted(FORMS))
def trained(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Trainer, Path]:
    folder = tmp_path_factory.mktemp(request.param)
    changes: dict[str, Any] = FORMS[request.param]
    config = toy.config(folder, changes, {"schedule": {"steps": 6}, "router": {"bias_rate": 0.05}})
    trainer = toy.trainer(config)
    trainer.run()
    trainer.export(folder / "model")
    return trainer, folder / "model"


@torch.no_grad()
def trained_logits(trainer: Trainer, documents: list[list[int]]) -> torch.Tensor:
    """Logits of documents that lie in one row, one after the other."""
    tokens = [token for document in documents for token in document] + [0]
    numbers = [n for n, document in enumerate(documents) for _ in document] + [len(documents)]
    batch = Batch(torch.tensor([tokens]), torch.tensor([numbers], dtype=torch.int32))
    layout, tokens_T, _ = lay_out(batch, torch.device("cpu"))
    hidden = trainer.model(tokens_T, layout.positions_T, TrainStep(layout))
    return trainer.model.logits(hidden)


def test_whoever_may_read_the_configuration_may_read_the_weights(
    trained: tuple[Trainer, Path],
) -> None:
    _, folder = trained
    files = [*folder.glob("*"), *(folder.parent / "checkpoints").glob("*/*")]
    assert {path.suffix for path in files} == {".json", ".safetensors"}
    assert len({path.stat().st_mode for path in files}) == 1


def test_transformers_computes_the_same(trained: tuple[Trainer, Path]) -> None:
    trainer, folder = trained
    loaded = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        wanted = loaded.eval()(torch.tensor([PROMPT])).logits[0]
    torch.testing.assert_close(trained_logits(trainer, [PROMPT]), wanted, rtol=1e-4, atol=1e-5)


def test_serving_computes_the_same(trained: tuple[Trainer, Path]) -> None:
    trainer, folder = trained
    served = load_model(find_source(str(folder)), LoadOptions(precision=Precision.FLOAT32))
    config = trainer.model.config
    if config.moe is not None:
        # Its family has no such factor; that is in the experts' weights.
        config = dataclasses.replace(config, moe=dataclasses.replace(config.moe, scale=1.0))
    assert served.config == config
    wanted = logits(served, PROMPT)
    torch.testing.assert_close(trained_logits(trainer, [PROMPT]), wanted, rtol=1e-4, atol=1e-5)


def test_documents_in_one_row_do_not_see_each_other(trained: tuple[Trainer, Path]) -> None:
    trainer, _ = trained
    first, second = PROMPT[:17], PROMPT[17:]
    apart = torch.cat([trained_logits(trainer, [part]) for part in (first, second)])
    together = trained_logits(trainer, [first, second])
    torch.testing.assert_close(together, apart, rtol=1e-5, atol=1e-6)
    as_one = trained_logits(trainer, [PROMPT])
    assert (together[17:] - as_one[17:]).abs().max() > 1e-3


def test_experts_are_exported_under_the_familys_names(trained: tuple[Trainer, Path]) -> None:
    trainer, folder = trained
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    moe = trainer.model.config.moe
    experts = {name for name in index if ".experts." in name}
    sparse = sum(map(trainer.model.config.is_sparse, range(trainer.model.config.layers)))
    assert len(experts) == (3 * moe.experts * sparse if moe else 0)
