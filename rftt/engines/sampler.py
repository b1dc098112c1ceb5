"""How a policy is sampled: budgets, seeds, the ids that end a response, the ids whose priors count.

Plumbing between an engine, which knows ids alone, and the search over functional tokens
(rollout.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from rftt.engines.base import Sampling
from rftt.engines.chat import eos_id
from rftt.tokens import FunctionIds, successors
from rftt.types import seed_for

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from rftt.engines.base import Engine
    from rftt.run.config import EvalConfig, RLConfig


@dataclass(frozen=True)
class Sampler:
    """A policy behind an engine, and how it is sampled."""

    engine: Engine
    tokenizer: PreTrainedTokenizerBase
    ids: FunctionIds | None
    """None for a policy without functional tokens (plain chain of thought)."""
    temperature: float
    max_tokens: int
    """Budget of a whole response."""
    max_depth: int
    seed: int
    stepwise: bool = False
    answer_format: str = "boxed"
    forbidden: tuple[str, ...] = ()
    """Acts that neither the policy nor a tree may begin."""
    children_per_act: int = 1

    @property
    def functions(self) -> FunctionIds:
        assert self.ids is not None, "a tree over functional tokens needs them"
        return self.ids

    @property
    def stops(self) -> tuple[int, ...]:
        """Token ids that end a response."""
        eos = eos_id(self.tokenizer)
        return (self.ids.end, eos) if self.ids else (eos,)

    @property
    def stops_of_act(self) -> tuple[int, ...]:
        """Token ids that end one act, well-formed or not."""
        return (*self.functions.closers, *self.functions.openers, eos_id(self.tokenizer))

    def acts_after(self, act: str | None) -> tuple[str, ...]:
        """Return the acts to try below a step by `act` (None: the root), repeated if allowed."""
        allowed = tuple(a for a in successors(act, "learned") if a not in self.forbidden)
        return allowed * self.children_per_act

    def room(self, n_prompt: int, n_used: int) -> int:
        """Return how many tokens the response may still take."""
        return min(self.max_tokens, self.engine.max_model_len - n_prompt) - n_used

    def sampling(self, max_tokens: int, *key: object) -> Sampling:
        """Return the settings of one request. Equal keys draw equal tokens."""
        return Sampling(
            max_tokens,
            self.temperature,
            seed=seed_for(self.seed, *key),
            stop_ids=self.stops,
            banned_ids=tuple(self.functions.open[act] for act in self.forbidden),
            watch_ids=self.ids.openers if self.ids else (),  # their log-probs are the priors
            watch_after=self.ids.closers if self.ids else (),  # an act may begin behind these
        )


def sampler_of(
    cfg: RLConfig | EvalConfig,
    engine: Engine,
    tokenizer: PreTrainedTokenizerBase,
    ids: FunctionIds | None,
    *,
    stepwise: bool = False,
    answer_format: str = "boxed",
) -> Sampler:
    """Return how a run samples its policy."""
    return Sampler(
        engine=engine,
        tokenizer=tokenizer,
        ids=ids,
        temperature=cfg.temperature,
        max_tokens=cfg.max_completion_length,
        max_depth=cfg.search_depth,
        seed=cfg.seed,
        stepwise=stepwise,
        answer_format=answer_format,
        forbidden=tuple(cfg.forbidden_acts),
        children_per_act=cfg.children_per_act,
    )
