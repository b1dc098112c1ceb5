"""Call the user's reward functions and check what they return.

A function has two parameters: the Problem, and the decoded response. If the second one is named
`responses`, the function is called once for all rollouts of a problem and returns one number per
response. A function may be asynchronous. All of them are then awaited together.
"""

from __future__ import annotations

import asyncio
import inspect
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from rftt.run.cli import load_function
from rftt.types import Problem, Rollout, UserError

if TYPE_CHECKING:
    from rftt.run.config import RLConfig


async def own_rewards(
    cfg: RLConfig, rollouts: Sequence[Rollout], texts: Sequence[str]
) -> list[dict[str, float]]:
    """Return name of a function -> its number, for each rollout with its decoded text.

    The rollouts of a problem have the same `group`. Raises UserError for what is not a number.
    """
    parts: list[dict[str, float]] = [{} for _ in rollouts]
    groups: dict[int, list[int]] = {}
    for i, rollout in enumerate(rollouts):
        groups.setdefault(rollout.group, []).append(i)

    async def rate(name: str, function: Callable[..., Any], of_group: bool, own: list[int]) -> None:
        problem, responses = rollouts[own[0]].problem, [texts[i] for i in own]
        found = function(problem, responses if of_group else responses[0])
        if inspect.isawaitable(found):
            found = await found
        numbers = _numbers(name, found, len(own), problem) if of_group else [found]
        for i, value in zip(own, numbers, strict=True):
            parts[i][name] = _number(name, value, problem)

    work = []
    for name in cfg.reward_functions:
        function = load_function("reward_functions", name)
        of_group = takes_group(name, function)
        calls = list(groups.values()) if of_group else [[i] for i in range(len(rollouts))]
        work += [rate(name, function, of_group, own) for own in calls]
    await asyncio.gather(*work)
    return parts


def takes_group(name: str, function: Callable[..., Any]) -> bool:
    """Return whether a function rates all responses to a problem together.

    Raises UserError unless it can be called with two arguments.
    """
    try:
        signature = inspect.signature(function)
    except ValueError:  # a function written in C
        return False
    try:
        signature.bind("problem", "response")
    except TypeError as error:
        raise UserError(
            f"reward_functions: {name} must have the parameters (problem, response) or (problem, "
            f"responses), but it has {signature}; correct the function."
        ) from error
    names = list(signature.parameters)
    return len(names) > 1 and names[1] == "responses"


def check_functions(cfg: RLConfig) -> None:
    """Import the user's functions, so that a mistake appears at startup."""
    for name in cfg.reward_functions:
        takes_group(name, load_function("reward_functions", name))


def weighted(cfg: RLConfig, parts: dict[str, float]) -> float:
    """Return the sum of the functions' numbers with their weights."""
    weights = cfg.reward_weights or [1.0] * len(parts)
    return sum(
        weight * parts[name] for name, weight in zip(cfg.reward_functions, weights, strict=True)
    )


def part_metrics(rollouts: Sequence[Rollout]) -> dict[str, float]:
    """Return the mean of each function over the rollouts, without its weight."""
    sums: dict[str, float] = {}
    for rollout in rollouts:
        for name, value in rollout.reward_parts.items():
            sums[name] = sums.get(name, 0.0) + value
    return {f"rewards/{name}": total / len(rollouts) for name, total in sums.items()}


def _numbers(name: str, found: Any, n: int, problem: Problem) -> list[Any]:
    """Return what a function of a group returned as a list of `n` values."""
    try:
        values = [] if isinstance(found, str | dict) else list(found)
    except TypeError:  # not iterable, which a tensor without dimensions is neither
        values = []
    if len(values) != n:
        raise UserError(
            f"reward_functions: {name} must return one number for each of {n} responses, got "
            f"{found!r:.80} for problem {problem.id}; correct the function."
        )
    return values


def _number(name: str, value: Any, problem: Problem) -> float:
    """Return a number, also one of numpy, torch, Decimal or Fraction, as a float."""
    try:
        number = math.nan if isinstance(value, str | bytes) else float(value)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise UserError(
            f"reward_functions: {name} must return a finite number, got {value!r:.80} for problem "
            f"{problem.id}; correct the function."
        )
    return number
