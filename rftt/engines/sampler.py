"""Sample a policy through an engine: budgets, seeds, stop ids, requests and priors.

Input and output of an engine are ids only. The search over functional tokens (rollout.py) uses a
`Task`, which is one problem for one policy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from rftt.engines.base import Sampling
from rftt.engines.chat import decode, encode_chat, eos_id, reply_ends
from rftt.engines.vocabulary import check_free
from rftt.graders.math import extract
from rftt.prompts import question_messages
from rftt.tokens import ACTS, CLOSERS, OPENERS, FunctionIds, function_ids, successors
from rftt.types import Completion, Problem, Step, UserError, seed_for

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from rftt.engines.base import Engine
    from rftt.engines.lanes import Meter
    from rftt.run.config import EvalConfig, RLConfig


def functional_ids(tokenizer: PreTrainedTokenizerBase, *, required: bool) -> FunctionIds | None:
    """Return the ids of the functional tokens, or None for a policy without them.

    Raises UserError if they are `required` and one of them is not a single id, or if one has the id
    of another token.
    """
    present = set(OPENERS + CLOSERS) <= set(tokenizer.get_vocab())
    if not required and not present:
        return None
    if present:
        check_free(tokenizer, OPENERS + CLOSERS)
    return function_ids(tokenizer)


@dataclass(frozen=True)
class Sampler:
    """A policy behind an engine, with its sampling settings."""

    engine: Engine
    tokenizer: PreTrainedTokenizerBase
    ids: FunctionIds | None
    """None for a policy without functional tokens (plain chain of thought)."""
    temperature: float
    max_tokens: int
    """Maximum tokens of a whole response."""
    max_depth: int
    """Depth at which a tree still chooses."""
    seed: int
    stepwise: bool = False
    answer_format: str = "boxed"
    forbidden: tuple[str, ...] = ()
    """Acts that neither the policy nor a tree may begin."""
    children_per_act: int = 1
    ends: tuple[int, ...] = ()
    """Ids that end a turn (vocabulary.py:end_ids); the tokenizer's EOS if there are none here."""

    @property
    def required_ids(self) -> FunctionIds:
        """Ids of the functional tokens, which the policy must have."""
        assert self.ids is not None, "a tree over functional tokens needs them"
        return self.ids

    @property
    def stops(self) -> tuple[int, ...]:
        """Token ids that end a response."""
        return (self.ids.end, *self._ends) if self.ids else self._ends

    @property
    def stops_of_act(self) -> tuple[int, ...]:
        """Token ids that end one act, even a malformed one."""
        return (*self.required_ids.closers, *self.required_ids.openers, *self._ends)

    @property
    def _ends(self) -> tuple[int, ...]:
        return self.ends or (eos_id(self.tokenizer),)

    def acts_after(self, act: str | None) -> tuple[str, ...]:
        """Return the acts to try after `act` (None: at the root), `children_per_act` times each."""
        allowed = tuple(a for a in successors(act, "learned") if a not in self.forbidden)
        return allowed * self.children_per_act

    def room(self, n_prompt: int, n_used: int) -> int:
        """Return the number of tokens left for the response."""
        return min(self.max_tokens, self.engine.max_model_len - n_prompt) - n_used

    def sampling(self, max_tokens: int, *key: object) -> Sampling:
        """Return the settings of one request. Equal keys draw equal tokens."""
        return Sampling(
            max_tokens,
            self.temperature,
            seed=seed_for(self.seed, *key),
            stop_ids=self.stops,
            banned_ids=tuple(self.required_ids.open[act] for act in self.forbidden),
            watch_ids=self.ids.openers if self.ids else (),  # their log-probs are the priors
            watch_after=self.ids.closers if self.ids else (),  # an act may start after these
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
    """Return the sampler of a run's policy."""
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
        ends=reply_ends(tokenizer, cfg.model_name_or_path),
    )


@dataclass(frozen=True)
class Task:
    """One problem for one policy, the input of every search in rollout.py."""

    sampler: Sampler
    problem: Problem
    prompt: Sequence[int]
    """Token ids of the chat up to the response. (P,)"""
    group: int = 0
    meter: Meter | None = None
    """Counts the tokens of all requests, where a simulation asks them."""

    def room(self, n_used: int) -> int:
        """Return the number of tokens left after the first `n_used` of the response."""
        return self.sampler.room(len(self.prompt), n_used)

    async def ask(
        self, before: Sequence[int], max_tokens: int, *key: object, one_act: bool = False
    ) -> Completion:
        """Continue the response `before` to its end or, with `one_act`, to the end of an act."""
        sampling = self.sampler.sampling(max_tokens, self.problem.id, *key)
        sampling = replace(sampling, meter=self.meter)
        if one_act:
            sampling = replace(sampling, stop_ids=self.sampler.stops_of_act)
        completion = await self.sampler.engine.generate([*self.prompt, *before], sampling)
        if self.meter:
            self.meter.end(len(completion.token_ids))
        return completion

    async def log_priors(self, before: Sequence[int], *key: object) -> dict[str, float]:
        """Return log π(act | the response `before`): the priors of the acts that may follow."""
        completion = await self.ask(before, 1, *key)  # the one sampled token is not used
        return dict(zip(ACTS, completion.watched[0], strict=True))

    def answer(self, response: Sequence[int]) -> str | None:
        """Return the answer of a finished response. A truncated one has no answer."""
        if response[-1] not in self.sampler.stops:
            return None
        return extract(decode(self.sampler.tokenizer, response), self.sampler.answer_format)

    def text(self, steps: Sequence[Step]) -> str:
        """Return the decoded text of consecutive steps."""
        return decode(self.sampler.tokenizer, tokens_of(steps))


def tokens_of(steps: Sequence[Step]) -> list[int]:
    """Return the token ids of consecutive steps."""
    return [token for step in steps for token in step.token_ids]


def pose(
    sampler: Sampler, problem: Problem, system_prompt: str | None = None, *, group: int = 0
) -> Task:
    """Return the task for a problem, with its question after an optional system prompt.

    Raises UserError if the question leaves no room for a response.
    """
    prompt = encode_chat(sampler.tokenizer, question_messages(problem.question, system_prompt))
    task = Task(sampler, problem, prompt, group)
    if task.room(1) <= 0:
        raise UserError(
            f"problem {problem.id}: a prompt of {len(prompt)} tokens leaves no room for a response "
            f"in max_model_len={sampler.engine.max_model_len}; raise it or leave the problem out."
        )
    return task
