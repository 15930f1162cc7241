"""Requests under way: read by event loops and threads, cancelled, and with callbacks that raise."""

import asyncio
import threading

import pytest
from request_helpers import (
    NEW,
    Case,
    Refused,
    check_empty,
    make_case,
    new_engine,
    random_ids,
    tokens_of,
)

from llama_flex.engine.request import Request
from llama_flex.masks.layout import BLOCK


async def read(request: Request) -> list[int]:
    """Return a request's tokens, read as they come."""
    return [step.token async for step in request]


def test_requests_are_read_as_they_come_several_at_once(dense, short_cases):
    engine = new_engine(dense, max_batch_size=3, max_slots=8 * BLOCK)

    async def read_late(case: Case, delay: int) -> list[int]:
        for _ in range(delay):
            await asyncio.sleep(0.002)
        return await read(engine.submit(case.prompt, **case.options))  # submitted while others run

    async def main():
        return await asyncio.gather(*(read_late(case, n) for n, case in enumerate(short_cases[:12])))

    assert asyncio.run(main()) == [case.expected for case in short_cases[:12]]
    assert asyncio.run(main()) == [case.expected for case in short_cases[:12]]  # in another event loop
    check_empty(engine)


def test_a_reader_that_stops_cancels_its_request_alone(dense):
    engine = new_engine(dense, max_batch_size=4, max_slots=8 * BLOCK)
    options = {"max_new_tokens": 40, "stop_token_ids": ()}
    one, other = (make_case(dense, random_ids(length), **options) for length in (150, 20))

    async def read_three(request: Request) -> list[int]:
        found = []
        async for step in request:
            found.append(step.token)
            if len(found) == 3:
                break
        return found

    async def main():
        left, kept = (engine.submit(x.prompt, **options) for x in (one, other))
        found, rest = await asyncio.gather(read_three(left), read(kept))
        assert found == one.expected[:3]
        assert rest == other.expected
        assert left.finish_reason == "cancelled"
        assert tokens_of(left) == one.expected[: len(left.steps)]
        assert len(left.steps) < 40
        late = engine.submit(one.prompt, **options)
        task = asyncio.create_task(read(late))
        await asyncio.sleep(0.02)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert late.finish_reason == "cancelled"

    asyncio.run(main())
    engine.run()
    check_empty(engine)


def test_an_exception_of_a_callback_is_raised_after_the_steps(dense, short_cases):
    engine = new_engine(dense, max_batch_size=4, max_slots=8 * BLOCK)
    one, other = short_cases[:4:2]

    def refuse(step):
        raise Refused("no")

    async def main():
        bad = engine.submit(one.prompt, callback=refuse, **one.options)
        good = engine.submit(other.prompt, **other.options)
        reading = aiter(bad)
        assert (await anext(reading)).token == one.expected[0]
        with pytest.raises(Refused, match="no"):
            await anext(reading)
        assert bad.finish_reason == "error"
        assert await read(good) == other.expected

    asyncio.run(main())
    check_empty(engine)


def test_a_cancel_from_another_thread_while_a_token_is_taken_in_stays(dense):
    """Cancel between the stepping thread's check whether the request has ended and its report that it goes on."""
    for last in (False, True):
        engine = new_engine(dense, max_batch_size=2, max_slots=512)
        request = engine.submit(random_ids(9), **NEW)
        put = request.output_processor.put

        def cancelled_meanwhile(token, logprob, *more, engine=engine, request=request, put=put, last=last):
            if request.output_processor.count == (5 if last else 2):
                engine.cancel(request)
            return put(token, logprob, *more)

        request.output_processor.put = cancelled_meanwhile
        ended = []
        while not engine.scheduler.idle:
            ended += engine.step()
        assert ended == [request]
        assert request.finish_reason == "cancelled"
        check_empty(engine)


def test_threads_and_event_loops_take_turns(dense, short_cases):
    engine = new_engine(dense, max_batch_size=3, max_slots=8 * BLOCK)
    cases, found = short_cases[:18], {}

    def run_each(some: list[Case]) -> None:
        for case in some:
            request = engine.submit(case.prompt, **case.options)
            engine.run()
            found[id(case)] = tokens_of(request)

    def read_all(some: list[Case]) -> None:
        async def read_one(case: Case) -> None:
            found[id(case)] = await read(engine.submit(case.prompt, **case.options))

        async def main():
            await asyncio.gather(*map(read_one, some))

        asyncio.run(main())

    ways = run_each, run_each, read_all, read_all
    threads = [threading.Thread(target=way, args=(cases[n::4],)) for n, way in enumerate(ways)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found.get(id(case)) for case in cases] == [case.expected for case in cases]
    check_empty(engine)
