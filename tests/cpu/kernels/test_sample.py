"""`sample` against float64 and sorting: its reference, and its Triton form in the interpreter."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fourfold.kernels.sample import (
    Sampled,
    SampleParams,
    SampleRow,
    TokenTables,
    newest_tokens,
    noise_key,
    sample,
    triton_newest,
    triton_sample,
    uniform_numbers,
)
from fourfold.kernels.sample.choose import choose
from fourfold.kernels.sample.tables import seen
from tests.cpu.kernels.sample_oracle import (
    Asked,
    check_logprobs,
    check_token,
    pack,
    random_logits,
    random_rows,
)

CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def interpreted(
    logits_SV: Tensor,
    params: SampleParams,
    tables: TokenTables | None,
    *,
    tile: int = 128,
    listed: int = 16,
    limit: int = 128,
    last_N: Tensor | None = None,
) -> Sampled:
    """The kernels, cut as vocabularies a thousand times as large are."""
    rows, vocabulary = logits_SV.shape
    tokens_S = torch.full((rows,), -7)
    logprobs_S = torch.full((rows,), -7.0)
    cut = choose(vocabulary, tile=tile, listed=listed, limit=limit)
    triton_sample.launch(logits_SV, params.packed_SF, tables, cut, tokens_S, logprobs_S, last_N)
    return Sampled(tokens_S, logprobs_S)


def check(result: Sampled, logits_SV: Tensor, asked: list[Asked], params: SampleParams) -> None:
    for token, logits_V, entry, uniform in zip(
        result.tokens_S.tolist(), logits_SV, asked, params.uniform.tolist(), strict=True
    ):
        check_token(token, logits_V, entry, uniform)
    check_logprobs(result, logits_SV, asked)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocabulary", [3, 31, 1000, 5000])
def test_the_reference(vocabulary: int, dtype: torch.dtype) -> None:
    asked = random_rows(vocabulary, 64, vocabulary)
    logits_SV = random_logits(vocabulary, 64, vocabulary).to(dtype)
    params, tables = pack(asked, vocabulary, CPU)
    before = logits_SV.clone()
    check(sample(logits_SV, params, tables), logits_SV, asked, params)
    assert torch.equal(logits_SV, before)


@pytest.mark.parametrize(
    ("vocabulary", "dtype", "listed"),
    [
        (31, torch.float32, 16),
        (257, torch.bfloat16, 2),
        (600, torch.float16, 4),
        (800, torch.float32, 8),
    ],
)
def test_the_kernels(vocabulary: int, dtype: torch.dtype, listed: int) -> None:
    """Few chunks listed, so that many rows have to be gone over."""
    asked = random_rows(vocabulary, 8, vocabulary)
    logits_SV = random_logits(vocabulary, 8, vocabulary).to(dtype)
    params, tables = pack(asked, vocabulary, CPU)
    result = interpreted(logits_SV, params, tables, listed=listed)
    check(result, logits_SV, asked, params)
    assert torch.equal(result.tokens_S, sample(logits_SV, params, tables).tokens_S)


@pytest.mark.parametrize(("value", "listed"), [(0.0, 4), (-3.5, 32)])
def test_tokens_that_are_all_equal(value: float, listed: int) -> None:
    """More equals than any list of candidates holds: all of them are kept."""
    asked = random_rows(6, 6, 400, adjusted=False)
    logits_SV = torch.full((6, 400), value)
    logits_SV[::2, ::3] = value - 5
    params, _ = pack(asked, 400, CPU)
    check(sample(logits_SV, params), logits_SV, asked, params)
    check(interpreted(logits_SV, params, None, listed=listed), logits_SV, asked, params)


def test_one_row_without_tables_or_logprobs() -> None:
    logits_SV = random_logits(3, 4, 200)[2:3]
    row = SampleRow(noise_key(1, 2), 3, temperature=0.7, top_p=0.8, logprob=False)
    params = SampleParams.pack([row], CPU)
    result = interpreted(logits_SV, params, None)
    assert result.logprobs_S.isnan().all()
    check_token(result.tokens_S.item(), logits_SV[0], Asked(row, [], [], {}), params.uniform.item())


def test_greedy_takes_the_first_of_equals() -> None:
    logits_SV = torch.zeros(2, 300)
    logits_SV[0, [70, 200]] = 1.0
    params = SampleParams.pack([SampleRow(5, 6, temperature=0.0)] * 2, CPU)
    for result in (sample(logits_SV, params), interpreted(logits_SV, params, None)):
        assert result.tokens_S.tolist() == [70, 0]


@pytest.mark.parametrize("vocabulary", [100, 512])
def test_garbage_logits_give_a_token_of_the_vocabulary(
    vocabulary: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where tiles are whole and the kernels' scratch holds what an index must not be."""
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, **options: empty(*size, **options).fill_(-7))
    params, tables = pack(random_rows(8, 6, vocabulary), vocabulary, CPU)
    for value in (float("nan"), float("inf"), -float("inf")):
        logits_SV = torch.full((6, vocabulary), value)
        for result in (sample(logits_SV, params, tables), interpreted(logits_SV, params, tables)):
            assert all(0 <= token < vocabulary for token in result.tokens_S.tolist())


def test_the_kernels_make_the_same_numbers() -> None:
    """Of equally likely tokens the number alone chooses: half a million places tell it."""
    rows = [SampleRow(noise_key(seed, 1), (1 << 31) - 1 - seed) for seed in range(4)]
    params = SampleParams.pack(rows, CPU)
    tokens_S = interpreted(torch.zeros(4, 5000), params, None, tile=1024).tokens_S
    assert tokens_S.tolist() == (params.uniform * 5000).long().tolist()


@pytest.mark.parametrize(
    "row",
    [
        SampleRow(0, 0),
        SampleRow(0, 0, temperature=0.5, top_k=6),
        SampleRow(0, 0, temperature=1.5, top_p=0.8),
        SampleRow(0, 0, min_p=0.2),
        SampleRow(0, 0, top_k=8, top_p=0.9, min_p=0.1),
    ],
)
def test_frequencies_match_the_distribution(row: SampleRow) -> None:
    """Pearson's test; a true sampler fails it once in ten thousand seeds."""
    logits_V = torch.tensor([0.0, 1.0, -1.0, 2.0, 0.5, -2.0, 1.5, 0.2, -0.3, 0.9]).double()
    draws = 20_000
    rows = [row._replace(key=noise_key(7, 0), position=position) for position in range(draws)]
    tokens_S = sample(logits_V.float().expand(draws, -1), SampleParams.pack(rows, CPU)).tokens_S
    kept = _kept_by_sorting(logits_V.tolist(), row)
    seen = tokens_S.bincount(minlength=10).double()
    assert set(seen.nonzero()[:, 0].tolist()) == kept
    wanted = torch.zeros(10, dtype=torch.float64)
    places = torch.tensor(sorted(kept))
    wanted[places] = (logits_V[places] / row.temperature).softmax(0) * draws
    statistic = ((seen - wanted)[places] ** 2 / wanted[places]).sum()
    freedom = torch.tensor((len(kept) - 1) / 2).double()
    assert torch.special.gammaincc(freedom, statistic / 2).item() > 1e-4


def _kept_by_sorting(logits: list[float], row: SampleRow) -> set[int]:
    """Plain lists; no two logits are equal."""
    order = sorted(range(len(logits)), key=lambda token: -logits[token])
    order = order[: row.top_k or None]
    scaled = torch.tensor([logits[token] / row.temperature for token in order]).double()
    masses = scaled.softmax(0).tolist()
    kept: list[int] = []
    mass = 0.0
    for token, own in zip(order, masses, strict=True):
        if kept and (mass >= row.top_p or own < row.min_p * masses[0]):
            break
        kept.append(token)
        mass += own
    return set(kept)


def test_uniform_numbers() -> None:
    """Those of splitmix64's finaliser applied twice, in Python's integers."""
    mask = (1 << 64) - 1
    keys = [noise_key(seed, index) for seed in (-(2**63), -1, 0, 7, 2**64 - 1) for index in (0, 3)]
    positions = [0, 1, 77, 2**31 - 1]
    for key in keys:
        assert -(2**63) <= key < 2**63
        found = uniform_numbers(torch.tensor([key] * 4), torch.tensor(positions))
        for number, position in zip(found.tolist(), positions, strict=True):
            x = (key + position) & mask
            for _ in range(2):
                x = (x + 0x9E3779B97F4A7C15) & mask
                x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
                x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
                x ^= x >> 31
            assert number == (x >> 11) * 2.0**-53


def test_tables() -> None:
    tables = TokenTables(2, 70, CPU)
    tables.start(1, [5, 5, 31, 69], [5, 64, 64], {3: -2.0, 31: 1.0})
    assert seen(tables.tally_NV[1]).nonzero()[:, 0].tolist() == [5, 31, 64, 69]
    assert tables.tally_NV[1, [5, 31, 64, 69]].tolist() == [-1, 0, 2, 0]
    tables.add(torch.tensor([1, 0]), torch.tensor([63, 1]))
    tables.add(torch.tensor([1]), torch.tensor([5]))
    tables.add(torch.tensor([1]), torch.tensor([31]))
    assert tables.tally_NV[1, 31] == -1
    assert tables.tally_NV[1, [5, 63]].tolist() == [-2, 1]
    assert _bits(tables.touched_NW[1]) == [3, 5, 31, 63, 64, 69]
    assert _bits(tables.touched_NW[0]) == [1]
    assert tables.bias_NV is not None
    assert tables.bias_NV[1, [3, 31]].tolist() == [-2.0, 1.0]
    tables.start(1, [2], [], {})
    assert _bits(tables.touched_NW[1]) == [2]
    assert not tables.bias_NV.any()
    assert seen(tables.tally_NV[1]).nonzero()[:, 0].tolist() == [2]


def _bits(words_W: Tensor) -> list[int]:
    return [
        32 * place + bit
        for place, word in enumerate(words_W.tolist())
        for bit in range(32)
        if word >> bit & 1
    ]


@pytest.mark.parametrize("vocabulary", [1, 31, 1024, 8192, 8193, 49_152, 151_936, 262_144])
def test_the_choice_covers_the_vocabulary(vocabulary: int) -> None:
    cut = choose(vocabulary)
    assert (cut.tiles - 1) * cut.tile < vocabulary <= cut.tiles * cut.tile
    assert 32 * (cut.chunks - 1) < vocabulary <= 32 * cut.chunks
    assert {number.bit_count() for number in (cut.tile, cut.listed, cut.limit, cut.scan_warps)} == {
        1
    }


def test_what_is_drawn_is_its_slots_last_token() -> None:
    slots = [4, 0, 2]
    rows = [SampleRow(key=7, position=3, slot=slot) for slot in slots]
    params = SampleParams.pack(rows, CPU)
    logits_SV = torch.randn(3, 500, generator=torch.Generator().manual_seed(2))
    for drawn in (sample, interpreted):
        last_N = torch.full((6,), -5)
        tokens_S = drawn(logits_SV, params, None, last_N=last_N).tokens_S
        assert last_N[slots].tolist() == tokens_S.tolist()
        assert last_N[[1, 3, 5]].tolist() == [-5] * 3


@pytest.mark.parametrize("rows", [1, 5, 128, 300])
def test_a_step_begins_with_the_tokens_of_the_host_and_those_drawn_last(rows: int) -> None:
    generator = torch.Generator().manual_seed(rows)
    tokens_T = torch.randint(0, 1000, (rows,), dtype=torch.int32, generator=generator)
    sources_T = torch.randint(-1, 4, (rows,), dtype=torch.int32, generator=generator)
    last_N = torch.tensor([5000, 6000, 7000, 1 << 40])
    wanted = [
        int(last_N[source] if source >= 0 else token)
        for token, source in zip(tokens_T.tolist(), sources_T.tolist(), strict=True)
    ]
    for newest in (newest_tokens, triton_newest.launch):
        assert newest(tokens_T, sources_T, last_N).tolist() == wanted
