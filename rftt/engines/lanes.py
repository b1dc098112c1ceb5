"""Land the simulations of a tree in an order that no clock decides, and yet about as they end.

The time of a simulation is the number of tokens that it has sampled. An engine decodes one token of
every running request in a step, so that the simulation with the fewest tokens is about the first to
end, and its lane does not wait for an older one. Tokens follow from seeds. When an engine ends a
request also depends on what shares its batch.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Coroutine
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rftt.mcts import Choice
    from rftt.types import Step


@dataclass(eq=False)
class Meter:
    """Counts the tokens of one simulation, whose requests run one after the other."""

    ended: int = 0  # tokens of the requests that have ended
    running: int = 0  # tokens of the one that runs, as far as its engine has told
    _goal: float = math.inf
    _gate: asyncio.Future[None] | None = None

    @property
    def tokens(self) -> int:
        return self.ended + self.running

    def see(self, n: int) -> None:
        """Note that the running request has `n` tokens. If an engine does not tell, others wait."""
        self.running = n
        self._open_gate()

    def end(self, n: int) -> None:
        """Count the `n` tokens of a request that has ended."""
        self.ended, self.running = self.ended + n, 0
        self._open_gate()

    def _open_gate(self) -> None:
        if self._gate and self.tokens >= self._goal and not self._gate.done():
            self._gate.set_result(None)

    async def reach(self, goal: int, task: asyncio.Task[Any]) -> None:
        """Wait for `goal` tokens, or for the end of the simulation's task."""
        gate = asyncio.get_running_loop().create_future()
        self._goal, self._gate = goal, gate
        task.add_done_callback(lambda _: gate.done() or gate.set_result(None))
        await gate


@dataclass(eq=False)
class _Lane:
    choice: Choice
    task: asyncio.Task[list[Step]]
    meter: Meter
    start: int  # tokens of the lane before this simulation
    number: int  # of the simulation: ties go to the older one

    @property
    def time(self) -> tuple[int, int]:
        """Return when the simulation ended or, if it runs, a time before which it cannot end."""
        return self.start + self.meter.tokens, self.number


class Lanes:
    """Simulations in flight, each as long as its tokens. A new one starts where the last landed.

    Without meters every length is 0, and simulations land in the order in which they started.
    """

    def __init__(self) -> None:
        self._lanes: list[_Lane] = []
        self._now, self._started = 0, 0

    def __len__(self) -> int:
        return len(self._lanes)

    def start(self, choice: Choice, work: Coroutine[Any, Any, list[Step]], meter: Meter) -> None:
        """Let `work` run as the simulation of `choice`."""
        task = asyncio.create_task(work)
        self._lanes.append(_Lane(choice, task, meter, self._now, self._started))
        self._started += 1

    async def first(self) -> tuple[Choice, list[Step]]:
        """Return the simulation that ends first, once no other one can end before it."""
        while True:
            ended = [lane for lane in self._lanes if lane.task.done()]
            if not ended:
                tasks = [lane.task for lane in self._lanes]
                await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
                continue
            first = min(ended, key=lambda lane: lane.time)
            late = [lane for lane in self._lanes if not lane.task.done() and lane.time < first.time]
            if not late:
                self._lanes.remove(first)
                self._now = first.time[0]
                return first.choice, first.task.result()
            lane = late[0]
            goal = first.time[0] - lane.start + (lane.number < first.number)
            await lane.meter.reach(goal, lane.task)

    def cancel(self) -> None:
        """Cancel what still runs."""
        for lane in self._lanes:
            lane.task.cancel()
