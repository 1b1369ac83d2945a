"""Who computes what: pure choices among workers that differ in speed, load, pages and memory."""

from __future__ import annotations

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from fourfold.engine.messages import Role
from fourfold.gateway.fleet.routing import (
    Asked,
    Route,
    WorkerView,
    choose_route,
    first_token_seconds,
    lacks_a_role,
)


def view(number: int, role: Role = Role.BOTH, **fields: object) -> WorkerView:
    usual: dict[str, object] = {
        "max_context": 4096,
        "page_tokens": 64,
        "pages_free": 1000,
        "samples": 0,
        "queued_tokens": 0,
        "prompt_rate": 1000.0,
        "token_rate": 100.0,
    }
    return WorkerView(number=number, role=role, **(usual | fields))  # type: ignore[arg-type]


def ask(tokens: int = 1000, max_tokens: int = 100, **fields: object) -> Asked:
    return Asked(
        tokens=tokens,
        prompt_tokens=tokens,
        max_tokens=max_tokens,
        **fields,  # type: ignore[arg-type]
    )


VIEWS = st.lists(
    st.builds(
        view,
        st.integers(0, 9),
        st.sampled_from(Role),
        max_context=st.integers(2, 3000),
        pages_free=st.integers(0, 100),
        samples=st.integers(0, 64),
        queued_tokens=st.integers(0, 10_000),
        prompt_rate=st.floats(1, 1e6),
        token_rate=st.floats(1, 1e5),
    ),
    max_size=6,
    unique_by=lambda worker: worker.number,
)
ASKED = st.builds(
    ask,
    st.integers(1, 2000),
    st.integers(1, 1000),
    n=st.integers(1, 4),
    uncut=st.booleans(),
    found=st.dictionaries(st.integers(0, 9), st.integers(0, 31)),
)
AVOIDED = st.sets(st.builds(Route, st.integers(0, 9), st.integers(0, 9)))


@given(ASKED, VIEWS, AVOIDED)
def test_a_route_leads_to_workers_that_can_and_may(
    asked: Asked, workers: list[WorkerView], avoided: set[Route]
) -> None:
    fit = {w.number: w for w in workers if asked.prompt_tokens + asked.max_tokens <= w.max_context}
    route = choose_route(asked, workers, avoided)
    assert (route is None) == (not fit)
    if route is None:
        return
    assert set(route) <= set(fit)
    if not route.whole:
        assert fit[route.prefill].role is not Role.DECODE
        assert fit[route.decode].role is not Role.PREFILL
        assert Role.BOTH not in (fit[route.prefill].role, fit[route.decode].role) or (
            fit[route.prefill].role is not fit[route.decode].role
        ), "a worker that takes both does not send a prompt to another of its kind"
        assert route not in avoided
        assert not asked.uncut
        known = asked.found.get(route.decode, 0) * 64
        assert asked.tokens - known > 64, "as much is computed where it is wanted"


@given(ASKED, VIEWS, st.randoms())
def test_the_order_of_workers_decides_nothing(
    asked: Asked, workers: list[WorkerView], random: object
) -> None:
    shuffled = list(workers)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert choose_route(asked, workers) == choose_route(asked, shuffled)


@given(ASKED, VIEWS)
def test_what_is_alike_for_all_goes_to_the_first_token_that_comes_first(
    asked: Asked, workers: list[WorkerView]
) -> None:
    alike = [
        msgspec.structs.replace(worker, role=Role.BOTH, pages_free=1000, max_context=4096)
        for worker in workers
    ]
    route = choose_route(asked, alike)
    if route is not None and asked.tokens > 64:
        seconds = {worker.number: first_token_seconds(asked, worker) for worker in alike}
        assert route.whole
        assert seconds[route.prefill] == min(seconds.values())


def test_prompts_and_answers_go_by_role() -> None:
    workers = [view(1, Role.PREFILL), view(2, Role.DECODE), view(3, Role.DECODE, samples=5)]
    assert choose_route(ask(), workers) == Route(1, 2)


def test_a_cached_prefix_is_worth_a_short_queue_and_not_a_long_one() -> None:
    workers = [view(1, queued_tokens=600), view(2)]
    assert choose_route(ask(found={1: 12}), workers) == Route(1, 1)
    assert choose_route(ask(found={1: 2}), workers) == Route(2, 2)


def test_a_faster_device_takes_more() -> None:
    fast = view(1, prompt_rate=10_000.0, queued_tokens=5000)
    assert choose_route(ask(), [fast, view(2)]) == Route(1, 1)


def test_an_answer_goes_where_its_pages_are_free_and_fewest_run_for_their_speed() -> None:
    prefill = view(1, Role.PREFILL)
    full = view(2, Role.DECODE, pages_free=3)
    slow = view(3, Role.DECODE, samples=2, token_rate=10.0)
    fast = view(4, Role.DECODE, samples=9, token_rate=100.0)
    assert choose_route(ask(), [prefill, full, slow, fast]) == Route(1, 4)
    assert choose_route(ask(), [prefill, full]) == Route(1, 2), "it waits for pages there"


def test_what_is_left_of_a_prompt_in_a_page_is_computed_where_the_answer_is() -> None:
    workers = [view(1, Role.PREFILL), view(2, Role.DECODE)]
    assert choose_route(ask(60), workers) == Route(2, 2)
    assert choose_route(ask(1000, found={2: 15}), workers) == Route(2, 2)
    assert choose_route(ask(1000, found={2: 14}), workers) == Route(1, 2)


def test_a_worker_that_takes_both_gives_answers_only_to_those_that_do_nothing_else() -> None:
    assert choose_route(ask(), [view(1), view(2, samples=3)]) == Route(1, 1)
    assert choose_route(ask(), [view(1, samples=3), view(2, Role.DECODE)]) == Route(1, 2)
    assert choose_route(ask(), [view(1, Role.PREFILL), view(2)]) == Route(1, 2)


def test_without_one_of_the_roles_whoever_is_there_computes_all() -> None:
    for role in Role:
        assert choose_route(ask(), [view(1, role)]) == Route(1, 1)
    assert lacks_a_role([view(1, Role.PREFILL)]) is Role.DECODE
    assert lacks_a_role([view(1, Role.DECODE)]) is Role.PREFILL
    assert lacks_a_role([view(1, Role.DECODE), view(2)]) is None
    assert lacks_a_role([]) is None


def test_a_pair_that_could_not_move_pages_is_avoided() -> None:
    workers = [view(1, Role.PREFILL), view(2, Role.DECODE), view(3, Role.DECODE, samples=1)]
    assert choose_route(ask(), workers, {Route(1, 2)}) == Route(1, 3)
    avoided = {Route(1, 2), Route(1, 3)}
    assert choose_route(ask(), workers, avoided) == Route(2, 2)
    slower = view(4, Role.PREFILL, queued_tokens=900)
    assert choose_route(ask(), [*workers, slower], avoided) == Route(4, 2)
