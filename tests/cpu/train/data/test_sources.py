"""Endless sources: their entropy is what they say, and their rows are functions of their numbers.

The oracle for entropies is counting.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fourfold.cli.main import run
from fourfold.errors import ConfigError
from fourfold.train.data.batches import Batches
from fourfold.train.data.grammar import Grammar, GrammarBatches
from fourfold.train.data.grammar_config import GrammarConfig
from fourfold.train.data.markov import MarkovBatches, MarkovSource, _stationary
from fourfold.train.data.shards import Shards


def markov(order: int = 2, vocabulary: int = 5) -> MarkovSource:
    return MarkovSource(vocabulary=vocabulary, order=order, concentration=0.5, seed=1)


@pytest.mark.parametrize("order", [1, 2, 3])
def test_a_markov_table_in_its_own_words(order: int) -> None:
    """A model that knows the table has the source's entropy as its loss, at every place."""
    source = markov(order, vocabulary=4)
    draws = np.random.default_rng(0)
    tokens_BL = source.tokens(draws.random((8000, 6)))
    for place in range(6):
        joint = Counter(map(tuple, tokens_BL[:, : place + 1].tolist()))
        before = Counter(map(tuple, tokens_BL[:, :place].tolist()))
        if place < order:  # few enough to count
            counted = -sum(
                n * math.log(n / before[block[:-1]]) for block, n in joint.items()
            ) / len(tokens_BL)
        else:
            state_B = np.zeros(len(tokens_BL), np.int64)
            for back in range(order):
                state_B = state_B * 4 + tokens_BL[:, place - order + back]
            chance_B = source.table_SV[state_B, tokens_BL[:, place]]
            counted = -float(np.log(chance_B).mean())
        assert source.entropy(place) == pytest.approx(counted, abs=0.03)


def test_a_markov_source_is_stationary() -> None:
    source = markov()
    flow = (source.stationary_S[:, None] * source.table_SV).reshape(5, -1).sum(0)
    assert flow == pytest.approx(source.stationary_S, abs=1e-12)


def test_rows_of_several_documents_have_the_mean_of_their_places() -> None:
    source = markov()
    batches = MarkovBatches(source, rows=2, length=8, document=3, seed=0)
    # Places of the predicted tokens 1..8: 1 2 | 0 1 2 | 0 1 2, and a 0 is not predicted.
    assert batches.entropy == pytest.approx(
        (3 * source.entropy(1) + 3 * source.entropy(2)) / 6, rel=1e-12
    )
    assert batches.batch(0).document.tolist() == [[0, 0, 0, 1, 1, 1, 2, 2, 2]] * 2


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"vocabulary": 1}, "vocabulary of 2"),
        ({"vocabulary": 300, "order": 2}, "90000 states"),
        ({"concentration": 0.0}, "positive concentration"),
    ],
)
def test_impossible_markov_sources_are_refused(fields: dict[str, float], complaint: str) -> None:
    options = {"vocabulary": 4, "order": 1, "concentration": 1.0, "seed": 0} | fields
    with pytest.raises(ConfigError, match=complaint):
        MarkovSource(**options)  # type: ignore[arg-type]


def test_a_source_that_hardly_mixes_is_refused() -> None:
    table = np.array([[1 - 1e-9, 1e-9], [1e-7, 1 - 1e-7]])
    with pytest.raises(ConfigError, match="mixes too slowly"):
        _stationary(table, 2)


SMALL = GrammarConfig(levels=2, symbols=3, rules=2, words=2, topics=2, sentences=2.0)


def test_a_grammar_s_sentences_have_one_tree_and_the_entropy_it_says() -> None:
    """All trees of a small grammar, one after the other: no two write the same sentence, so the
    entropy of sentences is that of trees."""
    grammar = Grammar(SMALL)
    rule, word, roots = grammar._rule_R, grammar._word_W, grammar._root_ZK[0]
    chances: Counter[tuple[int, ...]] = Counter()
    for root in range(3):
        for first, left, right in itertools.product(range(2), repeat=3):
            pair = divmod(int(grammar._pairs[0][root, first]), 3)
            low = [
                symbol
                for side, choice in zip(pair, (left, right), strict=True)
                for symbol in divmod(int(grammar._pairs[1][side, choice]), 3)
            ]
            for words in itertools.product(range(2), repeat=4):
                ids = (*(int(grammar._word_MW[s, w]) for s, w in zip(low, words, strict=True)), 0)
                chance = roots[root] * rule[first] * rule[left] * rule[right]
                assert ids not in chances
                chances[ids] += chance * math.prod(word[w] for w in words)
    assert sum(chances.values()) == pytest.approx(1.0)
    entropy = -sum(p * math.log(p) for p in chances.values())
    assert grammar.sentence_entropy == pytest.approx(entropy, rel=1e-12)
    drawn = Counter(
        map(
            tuple,
            grammar.sentences(
                np.random.default_rng(0).choice(3, size=40000, p=roots), np.random.default_rng(1)
            ).tolist(),
        )
    )
    off = sum(abs(drawn[ids] / 40000 - p) for ids, p in chances.items())
    assert drawn.keys() <= chances.keys()
    assert off < 0.12


def test_a_grammar_s_bounds_lie_close_together() -> None:
    low, high = Grammar(GrammarConfig()).entropy
    assert low < high < 1.02 * low
    assert high < math.log(GrammarConfig().vocabulary)


def test_a_document_s_length_is_as_configured() -> None:
    grammar = Grammar(SMALL)
    draws = np.random.default_rng(0)
    lengths = [len(grammar.document(draws)) for _ in range(4000)]
    assert np.mean(lengths) == pytest.approx(2.0 * SMALL.sentence_tokens + 1, rel=0.05)


def sources() -> dict[str, tuple[Batches, Batches]]:
    """Each source twice, by itself."""
    return {
        "markov": (
            MarkovBatches(markov(), rows=3, length=40, document=16, seed=4),
            MarkovBatches(markov(), rows=3, length=40, document=16, seed=4),
        ),
        "grammar": (
            GrammarBatches(Grammar(SMALL), rows=3, length=40, seed=4),
            GrammarBatches(Grammar(SMALL), rows=3, length=40, seed=4),
        ),
    }


@pytest.mark.parametrize("name", ["markov", "grammar"])
def test_a_source_s_batch_is_a_function_of_its_number(name: str) -> None:
    one, other = sources()[name]
    onwards = [one.batch(i) for i in range(4)]
    for index in (3, 0):
        batch = other.batch(index)
        assert torch.equal(batch.tokens, onwards[index].tokens)
        assert torch.equal(batch.document, onwards[index].document)
        assert batch.tokens.shape == batch.document.shape == (3, 41)
        assert batch.tokens.dtype == torch.int64
        assert batch.document.dtype == torch.int32
    assert not torch.equal(onwards[0].tokens, onwards[1].tokens)


def test_more_rules_than_pairs_are_refused() -> None:
    with pytest.raises(ConfigError, match="9 pairs, too few for 4 rules each"):
        GrammarConfig(symbols=3, rules=4)


@pytest.mark.parametrize(
    "wrong",
    [
        {"levels": 0},
        {"levels": 60},
        {"symbols": 10**7},
        {"words": 10**9},
        {"topics": 10**9},
        {"sentences": math.inf},
        {"sentences": math.nan},
        {"exponent": math.nan},
        {"exponent": -1.0},
        {"seed": -1},
    ],
)
def test_a_size_beyond_all_reason_is_named(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"--{next(iter(wrong))} .*must be"):
        GrammarConfig(**wrong)


def test_a_grammar_is_written_as_shards(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--levels", "2", "--symbols", "3", "--rules", "2", "--words", "2"]
    line = ["corpus", "grammar", "--out", str(tmp_path), "--tokens", "3000", *sizes]
    assert run([*line, "--held-out-tokens", "500"]) == 0
    said = capsys.readouterr().err
    grammar = Grammar(GrammarConfig(levels=2, symbols=3, rules=2, words=2))
    assert "entropy: {:.4f} to {:.4f} nats".format(*grammar.entropy) in said
    train, held_out = (Shards(tmp_path / split) for split in ("train", "held-out"))
    assert train.meta.tokens >= 3000
    assert 500 <= held_out.meta.tokens < 1500
    assert train.meta.vocabulary == held_out.meta.vocabulary
    for shards in (train, held_out):
        last = [shards.document(i)[-1] for i in range(shards.meta.documents)]
        assert set(last) == {1}
    assert train.document(0).tolist() != held_out.document(0).tolist()
