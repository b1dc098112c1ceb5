"""Judge rollouts: the grader decides on the answer, the PRM, if any, on the steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rftt.engines.chat import decode
from rftt.graders.prm import ProcessModel, Unscored, score_paths, segment_text
from rftt.rewards import score_rollout
from rftt.run.own_rewards import own_rewards
from rftt.types import Rollout

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from rftt.run.config import RLConfig
    from rftt.tokens import FunctionIds


@dataclass(frozen=True)
class Reward:
    """Scores rollouts with the grader, the user's functions and the PRM, if any."""

    cfg: RLConfig
    tokenizer: PreTrainedTokenizerBase
    ids: FunctionIds | None  # None for a policy without functional tokens
    prm: ProcessModel | None

    async def score(self, rollouts: Sequence[Rollout]) -> list[Rollout | Unscored]:
        """Return every rollout with a reward on each step, or the reason why the PRM refuses it.

        Raise UserError when the PRM is down.
        """
        texts = [decode(self.tokenizer, rollout.response_ids) for rollout in rollouts]
        parts = await own_rewards(self.cfg, rollouts, texts)
        process = await self._process_scores(rollouts)
        functional = self.ids is not None
        found: list[Rollout | Unscored] = []
        for rollout, text, own, scores in zip(rollouts, texts, parts, process, strict=True):
            if isinstance(scores, Unscored):
                found.append(scores)
                continue
            scored = score_rollout(self.cfg, rollout, text, scores, own, functional=functional)
            found.append(scored)
        return found

    async def _process_scores(
        self, rollouts: Sequence[Rollout]
    ) -> Sequence[list[float] | Unscored | None]:
        """Return the (S,) scores of each rollout, None for all of them without a PRM."""
        if self.prm is None:
            return [None] * len(rollouts)
        paths = []
        for rollout in rollouts:
            steps = [segment_text(self.tokenizer, ids, self.ids) for ids in rollout.step_ids()]
            paths.append((rollout.problem.question, steps))
        return await score_paths(self.prm, paths)
