"""Process reward models: how good is each step of a solution, as one number in [0, 1]?

arXiv 2502.13389 pays for them beside the outcome. Everyone asks through `ProcessModel`; a path's
steps go in as separate texts, so that what ends a step is known and never searched for. A failure
is never a number: a path that cannot be scored raises `Unscored`, and a model or server that is
down raises UserError.

1. The wire format is the official one: `{"input": "QUESTION Step 1: TEXT ки\\nStep 2: TEXT ки"}` ->
   `{"score": [0.9, 0.4]}`. The official server answers 0.2 per step when a path is too long for it;
   ours refuses with a reason (tools/prm_serve.py).
2. HTTP runs in a thread with an event loop of its own, for an engine in the caller's loop works
   between awaits for longer than sockets like to wait.
"""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import replace
from pathlib import Path
from random import Random
from statistics import fmean
from threading import Thread
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeVar

from rftt.engines.chat import decode
from rftt.mcts import Tree
from rftt.types import Problem, Rollout, UserError

if TYPE_CHECKING:
    from concurrent.futures import Future

    from transformers import PreTrainedTokenizerBase

    from rftt.run.config import EvalConfig, RLConfig, SearchConfig
    from rftt.tokens import FunctionIds

    ProcessConfig = SearchConfig | RLConfig | EvalConfig

T = TypeVar("T")
TAG = "ки"
"""Ends a step on the wire."""
FIRST_DELAY_S = 0.5
"""Before the second attempt; doubles with each."""


class Unscored(Exception):
    """This path cannot be scored, now or later; the message says why. Callers count it."""


class ProcessModel(Protocol):
    async def score(self, question: str, steps: Sequence[str]) -> list[float]:
        """One score in [0, 1] per step. Many callers at once fill a batch.

        Raises Unscored for a path that it refuses, UserError when nothing can be scored.
        """
        ...

    def close(self) -> None: ...


def reduce(scores: Sequence[float], how: Literal["min", "mean", "last", "prod"]) -> float:
    """The score of a path out of the scores of its steps."""
    match how:
        case "min":
            return min(scores)
        case "mean":
            return fmean(scores)
        case "last":
            return scores[-1]
        case "prod":
            return math.prod(scores)


async def score_paths(
    prm: ProcessModel, paths: Sequence[tuple[str, Sequence[str]]]
) -> list[list[float] | Unscored]:
    """Scores of many (question, steps) at once; a refused path gives its reason instead.

    Raises UserError, with how many paths are left unscored, as soon as the model is down.
    """

    async def one(question: str, steps: Sequence[str]) -> list[float] | Unscored:
        try:
            return await prm.score(question, steps)
        except Unscored as refusal:
            return refusal

    tasks = [asyncio.ensure_future(one(*path)) for path in paths]
    try:
        return list(await asyncio.gather(*tasks))
    except UserError as error:
        scored = [task for task in tasks if task.done() and not task.exception()]
        n_unscored = len(tasks) - len(scored)
        raise UserError(f"{error}; {n_unscored} of {len(tasks)} paths unscored") from error
    finally:
        for task in tasks:
            task.cancel()


async def score_steps(prm: ProcessModel, tree: Tree, problem: Problem) -> int:
    """Put a process score on every step of a prompted tree; return how many paths `prm` refuses.

    Steps that paths share get one score, which depends on the step and those before it.
    """
    paths = [[node for node in leaf.path() if node.step] for leaf in tree.leaves()]
    texts = [[node.step.text for node in path if node.step] for path in paths]
    found = await score_paths(prm, [(problem.question, steps) for steps in texts])
    for path, scores in zip(paths, found, strict=True):
        for node, score in zip(path, [] if isinstance(scores, Unscored) else scores, strict=False):
            node.step = replace(node.step, score=score) if node.step else None
    return sum(isinstance(scores, Unscored) for scores in found)


def accepted(found: Sequence[Rollout | Unscored], log: Callable[[str], None]) -> list[Rollout]:
    """Return the scored rollouts by group, and log how many the PRM refused.

    Raise UserError where it refused all of them.
    """
    rollouts = [rollout for rollout in found if isinstance(rollout, Rollout)]
    refused = [reason for reason in found if isinstance(reason, Unscored)]
    if refused and not rollouts:
        raise UserError(f"the PRM refuses all of {len(refused)} paths; the first: {refused[0]}.")
    if refused:
        log(f"the PRM refuses {len(refused)} paths: they are left out")
    return sorted(rollouts, key=lambda rollout: rollout.group)


def segment_text(
    tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[int], ids: FunctionIds | None
) -> str:
    """A step as a process reward model reads it: without delimiters and end of text."""
    silent = {*ids.openers, *ids.closers} if ids else set()
    return decode(tokenizer, [t for t in token_ids if t not in silent], skip_special=True)


def checked(scores: object, n_steps: int) -> list[float]:
    """`scores` as a list of `n_steps` numbers in [0, 1], or ValueError."""
    if not isinstance(scores, list) or len(scores) != n_steps:
        raise ValueError(f"{scores!r:.80} is not a list of {n_steps} scores")
    for score in scores:
        if isinstance(score, bool) or not isinstance(score, int | float) or not 0 <= score <= 1:
            raise ValueError(f"{score!r:.40} is not a score from 0 to 1")
    return [float(score) for score in scores]


# ---- Does it rank at all? ----

CHECK = {
    "question": "A box holds 12 red pens and twice as many blue pens. How many pens are in it?",
    "good": ["There are 2 * 12 = 24 blue pens.", "Together there are 12 + 24 = 36 pens."],
    "bad": ["There are 12 / 2 = 6 blue pens.", "Together there are 12 + 6 = 20 pens."],
}


async def ranking_warning(prm: ProcessModel, file: str | None) -> str | None:
    """Score a right and a wrong solution; None where the weakest step of the right one is better.

    Raises UserError on an example that cannot be used.
    """
    check: Any = CHECK
    if file is not None:
        try:
            check = json.loads(Path(file).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"prm_check_file {file} cannot be read ({error}).") from error
    shape = {"question": str, "good": list, "bad": list}
    if not isinstance(check, dict) or any(
        not isinstance(check.get(k), t) for k, t in shape.items()
    ):
        raise UserError(f"prm_check_file {file} must hold question, good and bad (lists of steps).")
    try:
        good, bad = [await prm.score(check["question"], check[kind]) for kind in ("good", "bad")]
    except Unscored as refusal:
        raise UserError(f"the PRM refuses the check of its ranking: {refusal}.") from refusal
    if reduce(good, "min") > reduce(bad, "min"):  # after a mistake the rest may be sound
        return None
    return (
        f"PRM ranks a wrong step above a right one on {file or 'the built-in check'}; step tag or "
        "label tokens are probably wrong. "
        f"Right steps {_shown(good)}, wrong steps {_shown(bad)}."
    )


def _shown(scores: list[float]) -> str:
    return ", ".join(f"{score:.3f}" for score in scores)


# ---- Behind a URL ----


def to_wire(question: str, steps: Sequence[str]) -> str:
    """The official text of a path. Raises Unscored where a tag inside would make another step."""
    if any(TAG in text for text in (question, *steps)):
        raise Unscored(f"the question or a step contains the step tag {TAG!r}")
    lines = [f"Step {n}: {text.strip()} {TAG}" for n, text in enumerate(steps, 1)]
    return f"{question.strip()} " + "\n".join(lines)


class RemotePRM:
    """ProcessModel behind `prm_url`."""

    def __init__(self, cfg: ProcessConfig) -> None:
        import httpx2

        from rftt.engines.http import Bounded

        self.url, self.tries, connections = str(cfg.prm_url), cfg.prm_tries, cfg.prm_max_concurrency
        self._gate = asyncio.Semaphore(connections)
        transport = Bounded(self.url, deadline_s=cfg.prm_timeout_s, max_connections=connections)
        self._where = f"prm_url {self.url}{transport.route}"
        self._client = httpx2.AsyncClient(transport=transport, timeout=None, trust_env=False)
        self._loop = asyncio.new_event_loop()
        self._thread = Thread(target=self._loop.run_forever, name="prm", daemon=True)
        self._thread.start()

    async def score(self, question: str, steps: Sequence[str]) -> list[float]:
        """See ProcessModel."""
        text = to_wire(question, steps)
        return await asyncio.wrap_future(self._submit(self._ask(text, len(steps))))

    def close(self) -> None:
        self._submit(self._client.aclose()).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _submit(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    async def _ask(self, text: str, n_steps: int) -> list[float]:
        """Up to `tries` attempts; the pauses between them grow, and differ from path to path."""
        random, failure = Random(text), ""
        for attempt in range(self.tries):
            if attempt:
                await asyncio.sleep(FIRST_DELAY_S * 2 ** (attempt - 1) * random.uniform(0.5, 1.5))
            async with self._gate:
                scores = await self._attempt(text, n_steps)
            if isinstance(scores, list):
                return scores
            failure = scores
        raise UserError(f"{self._where} not reachable after {self.tries} tries (last: {failure})")

    async def _attempt(self, text: str, n_steps: int) -> list[float] | str:
        """The scores, or why this attempt failed and another may not."""
        import httpx2

        from rftt.engines.http import RETRIED

        try:
            response = await self._client.post(self.url, json={"input": text})
        except httpx2.TransportError as error:
            return repr(error)
        if response.status_code in (413, 422):
            raise Unscored(f"{self.url} refuses it: {response.text[:200]}")
        if response.status_code in RETRIED:
            return f"HTTP {response.status_code}"
        if response.status_code != httpx2.codes.OK:
            raise UserError(f"{self._where}: HTTP {response.status_code}: {response.text[:200]!r}")
        try:
            return checked(response.json()["score"], n_steps)
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            return f"not an answer of a PRM: {error!r}"
