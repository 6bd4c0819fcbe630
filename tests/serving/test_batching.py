"""The queue in front of the model thread."""

import asyncio
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from contracts.errors import InputError
from serving.batching import Batcher, Busy
from serving.config import ServiceSettings


class Doubler:
    """A model that notes its batches."""

    def __init__(self, seconds=0.0):
        self.batches = []
        self.seconds = seconds
        self.threads = set()

    def __call__(self, items):
        self.batches.append(list(items))
        self.threads.add(threading.get_ident())
        time.sleep(self.seconds)
        if "poison" in items:
            raise RuntimeError("the model broke")
        return [InputError("bad") if item == "bad" else 2 * item for item in items]


def run(model, scenario, **settings):
    async def inside():
        with ThreadPoolExecutor(1) as thread:
            batcher = Batcher(model, ServiceSettings(**settings), thread)
            batcher.start()
            try:
                return await scenario(batcher)
            finally:
                await batcher.stop()

    return asyncio.run(inside())


def test_items_that_arrive_together_share_a_batch():
    model = Doubler()

    async def scenario(batcher):
        return await asyncio.gather(*(batcher.one(number) for number in range(10)))

    assert run(model, scenario) == [2 * number for number in range(10)]
    assert model.batches == [list(range(10))]
    assert len(model.threads) == 1 and threading.get_ident() not in model.threads


def test_a_batch_has_a_largest_size():
    model = Doubler()

    async def scenario(batcher):
        return await asyncio.gather(*(batcher.one(number) for number in range(10)))

    assert run(model, scenario, batch=4) == [2 * number for number in range(10)]
    assert [len(batch) for batch in model.batches] == [4, 4, 2]


def test_a_late_item_within_the_wait_joins():
    model = Doubler()

    async def scenario(batcher):
        first = asyncio.ensure_future(batcher.one(1))
        await asyncio.sleep(0.01)
        return await asyncio.gather(first, batcher.one(2))

    assert run(model, scenario, wait_ms=200) == [2, 4]
    assert model.batches == [[1, 2]]


def test_a_full_queue_refuses_at_once():
    model = Doubler(seconds=0.2)

    async def scenario(batcher):
        working = asyncio.ensure_future(batcher.one(0))
        await asyncio.sleep(0.05)
        waiting = [asyncio.ensure_future(batcher.one(number)) for number in (1, 2)]
        await asyncio.sleep(0)
        started = time.monotonic()
        with pytest.raises(Busy):
            batcher.require_room()
        with pytest.raises(Busy):
            await batcher.one(3)
        assert time.monotonic() - started < 0.05
        return await asyncio.gather(working, *waiting)

    assert run(model, scenario, queue=2, wait_ms=0) == [0, 2, 4]


def test_the_loop_is_free_while_the_model_works():
    async def scenario(batcher):
        answer = asyncio.ensure_future(batcher.one(1))
        ticks = 0
        while not answer.done():
            await asyncio.sleep(0.01)
            ticks += 1
        return ticks

    assert run(Doubler(seconds=0.3), scenario) > 10


def test_an_item_that_cannot_be_answered_spoils_no_other():
    async def scenario(batcher):
        items = (1, "bad", 2, "poison")
        return await asyncio.gather(*(batcher.one(item) for item in items), return_exceptions=True)

    one, bad, two, poison = run(Doubler(), scenario)
    assert (one, two) == (2, 4)
    assert isinstance(bad, InputError) and isinstance(poison, RuntimeError)


def test_a_model_that_loses_an_answer_stops_no_later_request():
    def loses(items):
        return [] if "lost" in items else items

    async def scenario(batcher):
        with pytest.raises(AssertionError):
            await batcher.one("lost")
        return await batcher.one("kept")

    assert run(loses, scenario) == "kept"


def test_a_long_list_needs_one_free_place_and_leaves_room_between_its_items():
    model = Doubler(seconds=0.02)

    async def scenario(batcher):
        several = asyncio.ensure_future(batcher.several(list(range(40))))
        await asyncio.sleep(0.05)
        single = asyncio.ensure_future(batcher.one(100))
        done, _ = await asyncio.wait([several, single], return_when=asyncio.FIRST_COMPLETED)
        assert done == {single}
        return await several

    assert run(model, scenario, queue=8, batch=4, wait_ms=0) == [2 * number for number in range(40)]


def test_a_list_is_refused_when_there_is_no_place_and_fails_with_its_first_bad_item():
    async def scenario(batcher):
        working = asyncio.ensure_future(batcher.several([1, 2, 3, 4]))
        await asyncio.sleep(0.05)
        with pytest.raises(Busy):
            await batcher.several([3])
        await working
        with pytest.raises(InputError):
            await batcher.several([1, "bad", 2])

    run(Doubler(seconds=0.2), scenario, queue=1)


def test_an_item_whose_request_was_cancelled_is_not_answered():
    model = Doubler(seconds=0.1)

    async def scenario(batcher):
        working = asyncio.ensure_future(batcher.one(1))
        await asyncio.sleep(0.05)
        gone = asyncio.ensure_future(batcher.one(2))
        await asyncio.sleep(0)
        gone.cancel()
        await working
        return await batcher.one(3)

    assert run(model, scenario, wait_ms=0) == 6
    assert [2] not in model.batches
