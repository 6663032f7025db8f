"""Who may begin: within all limits, in a fair order, and nobody waits for ever."""

import asyncio

import pytest

from spa_jax.errors import UserError
from spa_jax.split.admission import Admission, Limits, Refused


def test_within_limits_everybody_begins_at_once_and_then_in_turn():
    async def scenario():
        queue = Admission(Limits(sessions=2, memory=100), has_tokens=False)
        first, second, third, fourth = (queue.join(owner, 40, 10) for owner in "abcd")
        assert [each.decided.is_set() for each in (first, second, third, fourth)] == [True, True, False, False]
        assert [await anext(queue.places(each)) for each in (third, fourth)] == [1, 2]
        queue.leave(third)
        assert await anext(queue.places(fourth)) == 1
        queue.leave(first)
        assert [place async for place in queue.places(fourth)] == []

    asyncio.run(scenario())


def test_the_least_served_comes_next_and_nobody_is_overtaken_for_taking_more_memory():
    async def scenario():
        queue = Admission(Limits(sessions=9, memory=100), has_tokens=True)
        busy = queue.join("a", 100, 50)
        others = [queue.join("a", 10, 50) for _ in range(2)]
        large, small = queue.join("b", 100, 1), queue.join("b", 10, 1)
        waiting = [large, small, *others]
        assert [await anext(queue.places(each)) for each in waiting] == [1, 2, 3, 4]
        queue.leave(busy)
        assert [each.decided.is_set() for each in waiting] == [True, False, False, False]
        queue.leave(large)
        assert all(each.decided.is_set() for each in waiting)

    asyncio.run(scenario())


def test_what_was_not_used_is_given_back():
    async def scenario():
        queue = Admission(Limits(sessions=2), has_tokens=True)
        inside = [queue.join(owner, 1, 50) for owner in "ab"]
        late = [queue.join(owner, 1, 50) for owner in "ab"]
        queue.leave(inside[1], unused=40)
        assert [each.decided.is_set() for each in late] == [False, True]

    asyncio.run(scenario())


def test_who_comes_back_has_no_more_credit_than_those_who_stayed():
    async def scenario():
        queue = Admission(Limits(sessions=1), has_tokens=True)
        inside = queue.join("a", 1, 100)
        for _ in range(5):
            waits = queue.join("a", 1, 100)
            queue.leave(inside)
            inside = waits
        stays, new = queue.join("a", 1, 100), [queue.join("b", 1, 100) for _ in range(3)]
        order = [await anext(queue.places(each)) for each in (stays, *new)]
        assert order == [2, 1, 3, 4]

    asyncio.run(scenario())


def test_a_token_at_its_limit_lets_others_pass():
    async def scenario():
        queue = Admission(Limits(sessions_per_token=1), has_tokens=True)
        one, two, other = (queue.join(owner, 1, 10) for owner in "aab")
        assert [each.decided.is_set() for each in (one, two, other)] == [True, False, True]
        queue.leave(one)
        assert two.decided.is_set()

    asyncio.run(scenario())


def test_a_full_queue_refuses_the_newest_of_whoever_has_most_in_it():
    async def scenario():
        queue = Admission(Limits(sessions=1, queue=2), has_tokens=False)
        queue.join("a", 1, 1)
        waiting = [queue.join("a", 1, 1) for _ in range(2)]
        with pytest.raises(Refused, match="as many sessions as it can take: try again later"):
            queue.join("a", 1, 1)
        other = queue.join("b", 1, 1)
        assert await anext(queue.places(waiting[0])) > 0
        with pytest.raises(Refused, match="as many sessions"):
            await anext(queue.places(waiting[1]))
        assert not other.refusal

    asyncio.run(scenario())


@pytest.mark.parametrize("end", ["late", "closed"])
def test_nobody_waits_for_ever(end):
    async def scenario():
        queue = Admission(Limits(sessions=1, queue_seconds=0.05 if end == "late" else 60), has_tokens=False)
        queue.join("a", 1, 1)
        places = queue.places(queue.join("b", 1, 1))
        assert await anext(places) == 1
        if end == "closed":
            queue.close()
        with pytest.raises(Refused, match={"late": "no room within 0.05 s", "closed": "the cloud stops"}[end]):
            async for _ in places:
                pass
        queue.close()
        with pytest.raises(Refused, match="the cloud stops"):
            queue.join("c", 1, 1)

    asyncio.run(scenario())


def test_one_that_the_cache_has_no_gap_for_waits_for_another_to_leave():
    async def scenario():
        queue = Admission(Limits(), has_tokens=False)
        first, second = queue.join("a", 1, 5), queue.join("b", 1, 5)
        assert queue.put_back(second)
        assert await anext(queue.places(second)) == 1
        queue.leave(first)
        assert second.decided.is_set()
        assert not queue.put_back(second)

    asyncio.run(scenario())


def test_what_could_never_begin_is_refused():
    with pytest.raises(UserError, match="takes 2 MiB, and the cloud has 1: ask for fewer"):
        Admission(Limits(memory=2**20), has_tokens=False).join("a", 2**21, 1)
