"""Grammars: their entropy is what they say, and their splits are shards. The oracle is counting."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fourfold.cli.main import run
from fourfold.errors import ConfigError
from fourfold.train.data.grammar import Grammar
from fourfold.train.data.grammar_config import GrammarConfig
from fourfold.train.data.shards import Shards

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
