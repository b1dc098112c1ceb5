"""Run a local engine in a single asyncio task.

Without threads and clocks, equal requests in the same order always form the same batches.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any


class StepLoop:
    """A task that calls `step` while a request is pending. Coroutines may submit in between."""

    def __init__(self, step: Callable[[], None], reset: Callable[[], None]) -> None:
        self.pending: set[asyncio.Future[Any]] = set()
        self._step, self._reset = step, reset
        self._task: asyncio.Task[None] | None = None

    def submit(self) -> asyncio.Future[Any]:
        """Return a future that `step` resolves. Start the task if this event loop has none."""
        loop = asyncio.get_running_loop()
        if self._task is not None and self._task.done():
            self._release(self._task)
        if self._task is not None and self._task.get_loop() is not loop:
            self.pending.clear()  # that loop died without cancelling its tasks
            self._task = None
            self._reset()
        if self._task is None:
            self._task = loop.create_task(self._run())
            self._task.add_done_callback(self._release)
        future: asyncio.Future[Any] = loop.create_future()
        self.pending.add(future)
        future.add_done_callback(self.pending.discard)
        return future

    async def _run(self) -> None:
        while self.pending:
            self._step()
            await asyncio.sleep(0)

    def _release(self, task: asyncio.Task[None]) -> None:
        """End every waiting request with the task's error or, without one, by cancelling it."""
        if task is not self._task:  # `submit` has already released this task
            return
        error = None if task.cancelled() else task.exception()
        waiting = [future for future in self.pending if not future.done()]
        for future in waiting:
            if error:
                future.set_exception(error)
            else:
                future.cancel()
        self.pending.clear()
        self._task = None
        if error or waiting:
            self._reset()
