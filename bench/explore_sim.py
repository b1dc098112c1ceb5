"""Measure how full a round of exploration keeps its engines, on a virtual clock instead of GPUs.

    python bench/explore_sim.py [--ranks 8] [--problems 16] [--simulations 16] [--rounds 4]

The search is train_rl.py's own: `Explorer` with RLConfig, one event loop for each rank. Only the
engine is replaced. It decodes one token for every running request in a step of 6 ms, and of 6 ms x
n / 64 with n > 64 requests: weights are read once however many sequences there are (an estimate for
a 7B model on an H100; not measured). Prefill and grading cost nothing. Acts follow the grammar, the
length of a segment is log-normal, and both are functions of the request's seed alone, so every
table is the same on every machine.

in order      simulations of a tree land in the order in which they started, as until 2026-11-27
by tokens     the one with the fewest tokens lands first (rftt/engines/lanes.py), as now
independent   no tree: as many responses for each problem, all at once

seconds    of a round: from its start to the end of the slowest rank
longest    seconds of the longest response: no rule makes a round shorter
busy       mean number of requests that a rank decodes at once, until the end of the round
idle       share of lanes without a request from the start to the end of the round. A rank has as
           many lanes as its problems may have requests in flight
right      share of right rollouts. The chance of a right answer depends on the problem and on the
           first act, so that a tree which learns early from its values finds more of them
decoded    tokens of all rollouts
Every number is the mean over rounds.
"""

from __future__ import annotations

import argparse
import asyncio
import heapq
import itertools
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any, cast
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).parents[1]))

from rftt.engines.base import Counters, Sampling
from rftt.engines.lanes import Meter
from rftt.engines.loop import StepLoop
from rftt.engines.sampler import Sampler
from rftt.rollout import Explorer
from rftt.run.config import RLConfig
from rftt.tokens import ACTS, FunctionIds, add_function_tokens, function_ids, successors
from rftt.types import Completion, Problem, seed_for
from tools.tiny_world import build_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from rftt.engines.base import Engine

STEP_SECONDS, FREE_BATCH = 0.006, 64
"""Seconds of a decode step, and the batch up to which it costs no more."""
MEDIAN, SIGMA = 90, 1.0
"""Log-normal tokens of a segment, a guess. Responses have about 800, the longest of 256 5,000."""
MAX_TOKENS, MAX_MODEL_LEN = 6144, 8192  # configs/qwen2.5-7b/rl.yaml
LOW = -20.0  # log-prior of an act that the grammar does not allow


# ---- An engine that only keeps time ----


@dataclass(eq=False)
class _Running:
    completion: Completion
    done: asyncio.Future[Completion]
    meter: Meter


class ClockEngine:
    """Implementation of base.Engine whose tokens are drawn and whose time is counted."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.counters = Counters()
        self.max_model_len, self.n_tokens = MAX_MODEL_LEN, len(tokenizer)
        self.seconds = 0.0
        self._ids = function_ids(tokenizer)
        self._words = tokenizer.encode("a", add_special_tokens=False)
        self._answers = [tokenizer.encode(f"\\boxed{{{n}}}") for n in (8, 7)]  # wrong, right
        self._running: list[tuple[int, int, _Running]] = []  # (last step, tie, request): a heap
        self._ties = itertools.count()
        self._loop = StepLoop(self._step, self._running.clear)

    async def generate(self, prompt_ids: Sequence[int], sampling: Sampling) -> Completion:
        """Draw the response now and return it after as many steps as it has tokens."""
        future = self._loop.submit()
        completion = self._draw(prompt_ids, sampling)
        last = self.counters.steps + len(completion.token_ids)
        entry = (last, next(self._ties), _Running(completion, future, sampling.meter or Meter()))
        heapq.heappush(self._running, entry)
        try:
            return await future
        except asyncio.CancelledError:
            if entry in self._running:
                self._running.remove(entry)
                heapq.heapify(self._running)
            raise

    def _step(self) -> None:
        n = len(self._running)
        if not n:  # the next requests are on their way
            return
        self.seconds += STEP_SECONDS * max(1.0, n / FREE_BATCH)
        self.counters.steps += 1
        self.counters.generated_tokens += n
        for *_, request in self._running:
            request.meter.see(request.meter.running + 1)
        while self._running and self._running[0][0] <= self.counters.steps:
            _, _, request = heapq.heappop(self._running)
            if not request.done.done():
                request.done.set_result(request.completion)

    def _draw(self, prompt_ids: Sequence[int], sampling: Sampling) -> Completion:
        """Draw acts by the grammar from where the prompt ends, and the length of each."""
        ids, random = self._ids, Random(sampling.seed)
        tokens: list[int] = []
        watched: dict[int, tuple[float, ...]] = {}
        act = _open_act(prompt_ids, ids)
        last = _last_act(prompt_ids, ids)
        while len(tokens) < sampling.max_tokens:
            if act is None:
                after = successors(last, "learned")
                watched[len(tokens)] = tuple(0.0 if a in after else LOW for a in ACTS)
                act = random.choice(after)
                tokens.append(ids.open[act])
            length = max(1, round(random.lognormvariate(0, SIGMA) * MEDIAN))
            if act == "output":
                tokens += self._answers[random.random() < self._chance(prompt_ids, tokens)]
            else:
                tokens += self._words * length
            tokens.append(ids.close[act])
            if act == "output":
                break
            last, act = act, None
        cut = tuple(tokens[: sampling.max_tokens])
        watched = {at: values for at, values in watched.items() if at < len(cut)}
        finish = "stop" if cut[-1] in sampling.stop_ids else "length"
        return Completion(cut, (0.0,) * len(cut), finish, watched, n_prompt=len(prompt_ids))

    def _chance(self, prompt_ids: Sequence[int], tokens: Sequence[int]) -> float:
        """Return the probability of a right answer, by the problem and its first act."""
        whole = [*prompt_ids, *tokens]
        first = next(i for i, token in enumerate(whole) if token in self._ids.openers)
        return Random(seed_for(whole[: first + 1])).random()


def _open_act(tokens: Sequence[int], ids: FunctionIds) -> str | None:
    """Return the act whose opener is the last token."""
    return next((act for act in ACTS if ids.open[act] == tokens[-1]), None)


def _last_act(tokens: Sequence[int], ids: FunctionIds) -> str | None:
    """Return the act whose closer is the last token."""
    return next((act for act in ACTS if ids.close[act] == tokens[-1]), None)


# ---- A round ----


@dataclass(frozen=True)
class Round:
    """What one round of all ranks took."""

    seconds: float
    busy: float
    idle: float
    right: float
    longest: float
    decoded: float


def explore(
    tokenizer: PreTrainedTokenizerBase, ranks: int, problems: int, seed: int, **settings: Any
) -> Round:
    """Search `problems` on `ranks` as train_rl.py does, each rank its share."""
    cfg = RLConfig(
        output_dir="", model_name_or_path="", train_file="", learning_rate=1e-6, **settings
    )
    picked = [(i, Problem(str(i), f"question {i}", answer="7")) for i in range(problems)]
    engines, rollouts = [], []
    for rank in range(ranks):
        engine = ClockEngine(tokenizer)
        sampler = Sampler(
            cast("Engine", engine), tokenizer, function_ids(tokenizer), cfg.temperature, MAX_TOKENS,
            cfg.search_depth, cfg.seed,
        )  # fmt: skip
        search = Explorer(cfg, sampler).rollouts(picked[rank::ranks], seed=seed)
        rollouts += asyncio.run(search)
        engines.append(engine)
    steps = max(engine.counters.steps for engine in engines)
    decoded = sum(engine.counters.generated_tokens for engine in engines)
    tree = cfg.sampling_method == "mcts"
    lanes = problems * (cfg.leaves_in_flight if tree else cfg.num_generations)
    lengths = [len(rollout.response_ids) for rollout in rollouts]
    return Round(
        seconds=max(engine.seconds for engine in engines),
        longest=STEP_SECONDS * max(lengths),
        busy=decoded / steps / ranks,
        idle=1 - decoded / (lanes * steps),
        right=sum(rollout.answer == "7" for rollout in rollouts) / len(rollouts),
        decoded=sum(rollout.n_generated for rollout in rollouts),
    )


def mean(rounds: Sequence[Round]) -> Round:
    """Return the mean of every number."""
    columns = zip(*(astuple(one) for one in rounds), strict=True)
    return Round(*(sum(column) / len(rounds) for column in columns))


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    for name, default in (("ranks", 8), ("problems", 16), ("simulations", 16), ("rounds", 4)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    tokenizer = build_tokenizer()
    add_function_tokens(tokenizer)
    print(f"{'setting':22}", *(f"{field.name:>8}" for field in fields(Round)))
    settings = [(f"in order, {n} in flight", {"leaves_in_flight": n}) for n in (1, 4, 8, 16)]
    settings += [(f"by tokens, {n} in flight", {"leaves_in_flight": n}) for n in (1, 4, 8, 16)]
    settings += [("independent", {"sampling_method": "normal"})]
    for name, setting in settings:
        # If every length is 0, simulations land in the order in which they started.
        rule = patch.object(Meter, "tokens", 0) if "in order" in name else nullcontext()
        with rule:
            rounds = [
                explore(tokenizer, args.ranks, args.problems, seed_for("round", i),
                        num_generations=args.simulations, **setting)
                for i in range(args.rounds)
            ]  # fmt: skip
        print(f"{name:22}", *(f"{value:8.3g}" for value in astuple(mean(rounds))), flush=True)


if __name__ == "__main__":
    main()
