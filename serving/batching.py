"""One queue in front of one model thread: products that arrive at about the same time are priced together.

A product alone costs a model nearly as much as several at once, and two model calls at once only slow each other down.
The event loop stays free meanwhile, so that the service can say that it is alive.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Generic, TypeVar

from contracts.errors import InputError
from serving.config import ServiceSettings

Item = TypeVar("Item")
Answer = TypeVar("Answer")

log = logging.getLogger("serving")


class Busy(Exception):
    """The queue is full."""


@dataclass
class _Waiting(Generic[Item, Answer]):
    item: Item
    answer: asyncio.Future[Answer]


class Batcher(Generic[Item, Answer]):
    """Answers items in batches.

    Args:
        answer: called in the model thread with 1 to `settings.batch` items; returns as many answers, in their order.
            An answer may be an exception, which its request then raises. If the call itself raises, its items are
            tried one by one, so that an item which cannot be answered spoils no other.
        thread: the model thread; several batchers may share one.
    """

    def __init__(
        self,
        answer: Callable[[Sequence[Item]], Sequence[Answer | Exception]],
        settings: ServiceSettings,
        thread: ThreadPoolExecutor,
    ):
        self.answer = answer
        self.most = settings.batch
        self.wait = settings.wait_ms / 1000
        self.queue: asyncio.Queue[_Waiting[Item, Answer]] = asyncio.Queue(settings.queue)
        self.thread = thread
        self.task: asyncio.Task[None] | None = None
        self.batch_sizes: Callable[[int], None] = lambda size: None
        """told the size of every batch"""

    def start(self) -> None:
        self.task = asyncio.create_task(self._answer_batches())

    async def stop(self) -> None:
        """What still waits is not answered."""
        if self.task is not None:
            self.task.cancel()
            await asyncio.gather(self.task, return_exceptions=True)

    def require_room(self) -> None:
        """Raises Busy where the queue is full, for requests of which nothing has been read yet."""
        if self.queue.full():
            raise Busy

    async def one(self, item: Item) -> Answer:
        """The answer to one item. Raises Busy, or whatever `answer` raises for this item."""
        return await self._enter(item)

    async def several(self, items: Sequence[Item]) -> list[Answer]:
        """The answers to several items, in their order.

        Only the first one needs a free place at once. The others take places as these become free, so that a long list
        leaves room for single items between its own.

        Raises:
            Busy: there is no place for the first one.
            Exception: of the first item that cannot be answered.
        """
        waiting = [self._enter(items[0])]
        for item in items[1:]:
            entry = self._entry(item)
            await self.queue.put(entry)
            waiting.append(entry.answer)
        # without return_exceptions, later failures would be reported as never retrieved
        answers = await asyncio.gather(*waiting, return_exceptions=True)
        for answer in answers:
            if isinstance(answer, BaseException):
                raise answer
        return answers  # type: ignore[return-value]

    def _enter(self, item: Item) -> asyncio.Future[Answer]:
        entry = self._entry(item)
        try:
            self.queue.put_nowait(entry)
        except asyncio.QueueFull:
            raise Busy from None
        return entry.answer

    def _entry(self, item: Item) -> _Waiting[Item, Answer]:
        return _Waiting(item, asyncio.get_running_loop().create_future())

    async def _answer_batches(self) -> None:
        while True:
            batch = [await self.queue.get()]
            if self.queue.qsize() + 1 < self.most:
                await asyncio.sleep(self.wait)
            while len(batch) < self.most and not self.queue.empty():
                batch.append(self.queue.get_nowait())
            # a client that has gone needs no answer
            batch = [entry for entry in batch if not entry.answer.done()]
            if batch:
                self.batch_sizes(len(batch))
                await self._answer(batch)

    async def _answer(self, batch: list[_Waiting[Item, Answer]]) -> None:
        loop = asyncio.get_running_loop()
        try:
            items = [entry.item for entry in batch]
            answers = await loop.run_in_executor(self.thread, self.answer, items)
            assert len(answers) == len(items)
        except Exception as error:
            if len(batch) > 1:
                for entry in batch:
                    await self._answer([entry])
                return
            if not isinstance(error, InputError):
                log.exception("the model failed")
            answers = [error]
        for entry, answer in zip(batch, answers, strict=True):
            if entry.answer.done():  # cancelled meanwhile
                continue
            if isinstance(answer, Exception):
                entry.answer.set_exception(answer)
            else:
                entry.answer.set_result(answer)
