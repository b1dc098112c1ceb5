"""Records that flow between the modules: problems in; steps, traces and rollouts out. No torch.

Token ids are the truth and text is derived from them. Only the tree's `Node` (mcts.py) is edited.
Every other record is frozen, and extended with `dataclasses.replace`.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Literal


class UserError(Exception):
    """Bad input or an impossible request. Its one line names what, where, and how to mend it."""


Finish = Literal["stop", "length"]


@dataclass(frozen=True)
class Problem:
    """One problem of a file."""

    id: str
    question: str
    answer: str | None = None  # gold; None at inference, so that no sampler can see it
    solution: str | None = None
    level: str | None = None
    subject: str | None = None


@dataclass(frozen=True)
class Completion:
    """What an engine returns for one request."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    """log π of each token under the sampling temperature, over the tokenizer's ids."""
    finish: Finish
    watched: dict[int, tuple[float, ...]] = field(default_factory=dict)
    """position -> log-probs of `Sampling.watch_ids` for the token at that position."""
    n_prompt: int = 0
    n_cached: int = 0  # prompt tokens that the prefix cache saved


@dataclass(frozen=True)
class Step:
    """One functional segment: opener, text, closer."""

    act: str
    text: str  # always "" in phase 2, where `token_ids` are the step
    token_ids: tuple[int, ...] = ()
    """Opener to closer, as the policy emitted them. Empty in phase 1: a step is still text."""
    logprobs: tuple[float, ...] = ()
    forced: bool = False
    """The tree, not the policy, chose the opener."""
    log_priors: dict[str, float] = field(default_factory=dict)
    """log π(act | this step has just ended): the priors of the acts that may follow."""
    answer: str | None = None
    """Final answer that this step states, if any: the path ends here."""
    score: float | None = None
    """Process reward of the step (PRM), in [0, 1]."""
    refused: str | None = None
    """Phase 1: reason why the text breaks its act's contract; the path ends here, unanswered."""


@dataclass(frozen=True)
class Trace:
    """A root-to-leaf path of a tree. Curation reads it and SFT rows are written from it."""

    problem: Problem
    steps: tuple[Step, ...]
    nodes: tuple[int, ...]
    answer: str | None
    correct: bool


@dataclass(frozen=True)
class Rollout:
    """One finished response used for learning. P prompt tokens, R response tokens, S steps."""

    problem: Problem
    prompt_ids: tuple[int, ...]  # (P,)
    response_ids: tuple[int, ...]  # (R,)
    sampling_logprobs: tuple[float, ...]  # (R,) the engine's, when the tokens were sampled
    action_mask: tuple[bool, ...]  # (R,) tokens that count as the policy's actions
    step_ends: tuple[int, ...]  # (S,) index of each step's last token; the last is always R - 1
    acts: tuple[str, ...]  # (S,) act of each step, "" for text outside any segment
    finish: Finish
    group: int  # number of the problem in this batch; its rollouts share it
    n_generated: int  # tokens sampled for it, without a prefix shared with an earlier rollout
    forced: tuple[bool, ...] = ()  # (R,) openers that the tree chose; empty if there are none
    branching: tuple[float, ...] = ()
    """(R,) N(s) / N(s, a) on openers a at nodes s where the tree forced an act, else 0."""
    answer: str | None = None
    outcome: float = 0.0  # 1 if the grader accepts the answer, else 0
    step_scores: tuple[float, ...] = ()  # (S,) process scores in [0, 1]; empty without a PRM
    step_rewards: tuple[float, ...] = ()  # (S,) on the last token of each step (rewards.py)
    reward_parts: dict[str, float] = field(default_factory=dict)  # numbers of the user's functions
    nodes: tuple[int, ...] = ()  # ids of the tree nodes on its path; empty without a tree
    fork: int = 0  # node after which its own tokens begin; 0: all of them are its own

    @property
    def reward(self) -> float:
        """Reward of the whole response. Rounded, so that equal sums of floats compare equal."""
        return round(sum(self.step_rewards), 9)

    def step_ids(self) -> list[tuple[int, ...]]:
        """Return the response cut into its S steps."""
        steps, start = [], 0
        for end in self.step_ends:  # inclusive
            steps.append(self.response_ids[start : end + 1])
            start = end + 1
        return steps


def seed_for(*keys: object) -> int:
    """Return a 63-bit seed from (run seed, problem id, path, …), equal in every process."""
    digest = hashlib.blake2b(repr(keys).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
