"""Score each step of a solution with a process reward model (PRM), as a number in [0, 1].

arXiv 2502.13389 adds these scores to the reward of the outcome. `ProcessModel` is the interface. It
receives the steps of a path as separate texts, so it need not search for their ends. A failure
never becomes a number: a path that cannot be scored raises `Unscored`, and a model or server that
does not work raises UserError.

1. The wire format is the official one: `{"input": "QUESTION Step 1: TEXT ки\\nStep 2: TEXT ки"}` ->
   `{"score": [0.9, 0.4]}`. If a path is too long, the official server returns 0.2 per step. Our
   server returns an error with a reason (tools/prm_serve.py).
2. HTTP runs in a thread with its own event loop. An engine in the caller's loop works so long
   between two awaits that connections would time out.
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
"""Mark of the end of a step in the wire format."""
FIRST_DELAY_S = 0.5
"""Pause before the second attempt, in seconds. It doubles with each further attempt."""


class Unscored(Exception):
    """A path that can never be scored. The message gives the reason, and callers count it."""


class ProcessModel(Protocol):
    """A process reward model, in this process or behind a URL."""

    async def score(self, question: str, steps: Sequence[str]) -> list[float]:
        """Return one score in [0, 1] per step. Concurrent calls share a batch.

        Raises Unscored for a path that cannot be scored, UserError if the model does not work.
        """
        ...

    def close(self) -> None:
        """Release all resources. The model cannot be used afterwards."""
        ...


def reduce(scores: Sequence[float], how: Literal["min", "mean", "last", "prod"]) -> float:
    """Return the score of a path from the scores of its steps."""
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
    """Return the scores of many (question, steps), or Unscored for a path that has no score.

    Raises UserError with the number of unscored paths as soon as the model fails.
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
    """Set the process score of every step of a prompted tree. Return the number of unscored paths.

    A step that several paths share has one score, because only it and earlier steps matter.
    """
    paths = [[node for node in leaf.path() if node.step] for leaf in tree.leaves()]
    texts = [[node.step.text for node in path if node.step] for path in paths]
    found = await score_paths(prm, [(problem.question, steps) for steps in texts])
    for path, scores in zip(paths, found, strict=True):
        for node, score in zip(path, [] if isinstance(scores, Unscored) else scores, strict=False):
            node.step = replace(node.step, score=score) if node.step else None
    return sum(isinstance(scores, Unscored) for scores in found)


def accepted(found: Sequence[Rollout | Unscored], log: Callable[[str], None]) -> list[Rollout]:
    """Return the scored rollouts by group, and log how many the PRM could not score.

    Raises UserError if it could score none of them.
    """
    rollouts = [rollout for rollout in found if isinstance(rollout, Rollout)]
    refused = [reason for reason in found if isinstance(reason, Unscored)]
    if refused and not rollouts:
        raise UserError(
            f"the PRM must score at least one path, but all {len(refused)} have no score; the "
            f"first: {refused[0]}."
        )
    if refused:
        log(f"the PRM cannot score {len(refused)} paths, which are omitted")
    return sorted(rollouts, key=lambda rollout: rollout.group)


def segment_text(
    tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[int], ids: FunctionIds | None
) -> str:
    """Return the text of a step for a process reward model, without delimiters and EOS."""
    silent = {*ids.openers, *ids.closers} if ids else set()
    return decode(tokenizer, [t for t in token_ids if t not in silent], skip_special=True)


def checked(scores: object, n_steps: int) -> list[float]:
    """Return `scores` as floats. Raises ValueError unless they are `n_steps` numbers in [0, 1]."""
    if not isinstance(scores, list) or len(scores) != n_steps:
        raise ValueError(f"{scores!r:.80} is not a list of {n_steps} scores")
    for score in scores:
        if isinstance(score, bool) or not isinstance(score, int | float) or not 0 <= score <= 1:
            raise ValueError(f"{score!r:.40} is not a score from 0 to 1")
    return [float(score) for score in scores]


# ---- Check of the ranking ----

CHECK = {
    "question": "A box holds 12 red pens and twice as many blue pens. How many pens are in it?",
    "good": ["There are 2 * 12 = 24 blue pens.", "Together there are 12 + 24 = 36 pens."],
    "bad": ["There are 12 / 2 = 6 blue pens.", "Together there are 12 + 6 = 20 pens."],
}


async def ranking_warning(prm: ProcessModel, file: str | None) -> str | None:
    """Return a warning if the model ranks a wrong solution above a right one, otherwise None.

    The scores of the weakest steps are compared. `file` replaces the built-in example. Raises
    UserError if the example cannot be used.
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
        raise UserError(
            f"prm_check_file {file} must contain question (text), good and bad (lists of steps); "
            "add what is missing."
        )
    try:
        good, bad = [await prm.score(check["question"], check[kind]) for kind in ("good", "bad")]
    except Unscored as refusal:
        raise UserError(
            f"the PRM cannot score the example of its check ({refusal}); set prm_check_file to "
            "another one."
        ) from refusal
    if reduce(good, "min") > reduce(bad, "min"):  # steps after a mistake may be right again
        return None
    return (
        f"PRM ranks a wrong step above a right one on {file or 'the built-in check'}; step tag or "
        "label tokens are probably wrong, so check prm_step_tag, prm_good_token and prm_bad_token. "
        f"Right steps {_shown(good)}, wrong steps {_shown(bad)}."
    )


def _shown(scores: list[float]) -> str:
    return ", ".join(f"{score:.3f}" for score in scores)


# ---- Behind a URL ----


def to_wire(question: str, steps: Sequence[str]) -> str:
    """Return the wire format of a path. Raises Unscored if a text contains the step tag itself."""
    if any(TAG in text for text in (question, *steps)):
        raise Unscored(f"the question or a step contains the step tag {TAG!r}")
    lines = [f"Step {n}: {text.strip()} {TAG}" for n, text in enumerate(steps, 1)]
    return f"{question.strip()} " + "\n".join(lines)


class RemotePRM:
    """Implementation of ProcessModel that calls the server at `prm_url`."""

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
        """See ProcessModel."""
        self._submit(self._client.aclose()).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _submit(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    async def _ask(self, text: str, n_steps: int) -> list[float]:
        """Make up to `tries` attempts. Pauses grow, with a random factor that depends on the path.

        The factor spreads the retries of concurrent requests over time.
        """
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
        """Return the scores, or a reason after which another attempt may succeed."""
        import httpx2

        from rftt.engines.http import RETRIED

        try:
            response = await self._client.post(self.url, json={"input": text})
        except httpx2.TransportError as error:
            return repr(error)
        if response.status_code in (413, 422):
            raise Unscored(f"{self.url} does not accept the path: {response.text[:200]}")
        if response.status_code in RETRIED:
            return f"HTTP {response.status_code}"
        if response.status_code != httpx2.codes.OK:
            raise UserError(f"{self._where}: HTTP {response.status_code}: {response.text[:200]!r}")
        try:
            return checked(response.json()["score"], n_steps)
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            return f"the reply is not that of a PRM: {error!r}"
