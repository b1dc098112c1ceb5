"""Test rewards: the paper's amounts, the blend, and what counts as an answer."""

import asyncio
from dataclasses import replace
from decimal import Decimal
from fractions import Fraction
from importlib import import_module
from itertools import accumulate

import numpy as np
import pytest
import torch

from rftt.engines.chat import eos_id
from rftt.graders.prm import Unscored, accepted
from rftt.rewards import score_rollout, solves
from rftt.run.config import RLConfig
from rftt.run.judge import Reward
from rftt.run.own_rewards import check_functions
from rftt.run.stats import rollout_metrics
from rftt.tokens import add_function_tokens, function_ids, render
from rftt.types import Problem, Rollout, UserError
from tools.tiny_world import build_tokenizer


def config(**changes):
    needed = {"output_dir": "o", "model_name_or_path": "m", "train_file": "t", "learning_rate": 1}
    return RLConfig(**needed, **changes)


PAPER = config()
BLEND = config(reward_scheme="blend")
GAIN = config(reward_scheme="gain")
WHOLE = config(malformed_responses="reject")


def rollout(answer, finish="stop", acts=("analysis", "output"), gold="4"):
    return Rollout(
        problem=Problem("p", "2+2?", gold),
        prompt_ids=(1,),
        response_ids=(2, 3),
        sampling_logprobs=(-1.0, -1.0),
        action_mask=(True, True),
        step_ends=(0, 1),
        acts=acts,
        finish=finish,
        group=0,
        n_generated=2,
        answer=answer,
    )


def text(answer):
    return "so" if answer is None else f"<output>\\boxed{{{answer}}}</output>"


@pytest.mark.oracle
@pytest.mark.parametrize(
    ("scheme", "answer", "process", "rewards", "outcome"),
    [
        (PAPER, "4", None, (0.0, 1.0), 1.0),
        (PAPER, "5", None, (0.0, 0.1), 0.0),
        (PAPER, None, None, (0.0, 0.0), 0.0),
        (PAPER, "4", [0.7, 0.2], (0.7, 1.0), 1.0),
        (BLEND, "4", [0.7, 0.5], (0.7, 0.6 + 0.4 * 0.5), 1.0),
        (BLEND, "5", [0.7, 0.5], (0.7, 0.4 * 0.5), 0.0),
        (BLEND, "4", None, (0.0, 0.6), 1.0),
        (GAIN, "4", [0.7, 0.2], (0.7, 1.0 - 0.7), 1.0),
        (GAIN, "5", [0.7, 0.2], (0.7, 0.1 - 0.7), 0.0),
        (GAIN, None, [0.7, 0.9], (0.7, 0.0 - 0.7), 0.0),
        (GAIN, "4", None, (0.0, 1.0), 1.0),
    ],
)
def test_reward_of_every_step(scheme, answer, process, rewards, outcome):
    scored = score_rollout(scheme, rollout(answer), text(answer), process)
    assert scored.step_rewards == pytest.approx(rewards)
    assert scored.outcome == outcome


def test_a_response_cut_off_by_its_budget_has_no_answer():
    scored = score_rollout(PAPER, rollout("4", finish="length"), text("4"))
    assert (scored.outcome, scored.step_rewards) == (0.0, (0.0, 0.0))


def test_text_outside_whole_segments_is_refused_on_request():
    broken = rollout("4", acts=("analysis", ""))
    assert score_rollout(PAPER, broken, text("4")).outcome == 1.0
    assert score_rollout(WHOLE, broken, text("4")).step_rewards == (0.0, 0.0)
    assert score_rollout(WHOLE, broken, text("4"), functional=False).outcome == 1.0
    assert score_rollout(WHOLE, rollout("4"), text("4")).outcome == 1.0


def test_a_problem_without_gold_answer_cannot_be_rewarded():
    with pytest.raises(UserError, match="p has no gold answer"):
        score_rollout(PAPER, rollout("4", gold=None), text("4"))


# ---- The user's own functions ----


class Words:
    """A tokenizer whose ids are words, for decoding only."""

    def decode(self, ids, skip_special_tokens):
        return " ".join(f"word{i}" for i in ids)


HERE = "tests.test_rewards"


def shortness(problem: Problem, response: str) -> float:
    return len(problem.question) / len(response)


async def later(problem: Problem, response: str) -> float:
    await asyncio.sleep(0)
    return 0.25


def ranks(problem: Problem, responses: list[str]) -> list[int]:
    """Place of each response among those to its problem, by length."""
    return [sorted(map(len, responses)).index(len(response)) for response in responses]


async def ranks_later(problem: Problem, responses: list[str]) -> np.ndarray:
    return np.array(ranks(problem, responses), np.float32)


def rate(names, *, weights=(), rollouts=None):
    """The rewards that functions of this file give to two rollouts of each of two problems."""
    functions = [f"{HERE}:{name}" for name in names]
    own = config(reward_functions=functions, reward_weights=list(weights))
    group = [
        replace(rollout("4"), group=g, response_ids=ids, step_ends=(0, len(ids) - 1))
        for g in (0, 1)
        for ids in ((2, 3), (2, 3, 4))
    ]
    return asyncio.run(Reward(own, Words(), None, None).score(rollouts or group))


def test_functions_of_a_rollout_and_of_a_group_are_weighted_and_logged():
    names = ["shortness", "later", "ranks", "ranks_later"]
    scored = rate(names, weights=[2.0, 1.0, 10.0, 100.0])
    for place, found in enumerate(scored):
        text = " ".join(f"word{i}" for i in found.response_ids)
        values = [4 / len(text), 0.25, place % 2, place % 2]
        assert found.reward_parts == {f"{HERE}:{n}": v for n, v in zip(names, values, strict=True)}
        paid = 2 * values[0] + values[1] + 110 * values[2]
        assert found.step_rewards == (0.0, pytest.approx(paid))
    metrics = rollout_metrics(scored)
    assert metrics[f"rewards/{HERE}:ranks"] == 0.5
    assert metrics[f"rewards/{HERE}:later"] == 0.25
    assert metrics["reward"] == pytest.approx(sum(found.reward for found in scored) / 4)


def test_the_users_own_function_pays_the_last_step_and_leaves_the_outcome_to_the_grader():
    own = config(reward_functions=[f"{HERE}:shortness"])
    scored = score_rollout(own, rollout("4"), text("4"), [0.7, 0.2], {f"{HERE}:shortness": 0.5})
    assert scored.step_rewards == (0.7, 0.5)
    assert scored.outcome == 1.0


def define(monkeypatch, **functions):
    """Add functions to this file, as a reward function's name finds it."""
    for name, function in functions.items():
        monkeypatch.setattr(import_module(HERE), name, function, raising=False)


RETURNED = {
    "numpy": np.float32(0.5),
    "a numpy integer": np.int64(1),
    "an array": np.array(0.5),
    "torch": torch.tensor(0.5, dtype=torch.bfloat16),
    "a tensor with a gradient": torch.tensor(0.5, requires_grad=True),
    "Decimal": Decimal("0.5"),
    "Fraction": Fraction(1, 2),
    "a bool": True,
}


@pytest.mark.cases
@pytest.mark.parametrize("kind", RETURNED)
@pytest.mark.filterwarnings("ignore:Converting a tensor")
def test_numbers_of_other_libraries_are_numbers(kind, monkeypatch):
    define(monkeypatch, own=lambda problem, response: RETURNED[kind])
    define(monkeypatch, group=lambda problem, responses: [RETURNED[kind]] * 2)
    for name in ("own", "group"):
        rewards = {found.step_rewards[-1] for found in rate([name])}
        assert rewards == {float(RETURNED[kind])}


BAD = [None, "1", b"1", float("nan"), float("inf"), [1.0], {}, 1j, np.zeros(2), torch.zeros(2)]


@pytest.mark.cases
@pytest.mark.parametrize("value", BAD, ids=repr)
def test_what_is_not_a_number_is_one_line(value, monkeypatch):
    define(monkeypatch, own=lambda problem, response: value)
    define(monkeypatch, group=lambda problem, responses: [value] * 2)
    for name in ("own", "group"):
        with pytest.raises(UserError, match=rf"{name} must return a finite number, got") as error:
            rate([name])
        assert "for problem p" in str(error.value)


@pytest.mark.cases
@pytest.mark.parametrize("value", [None, 1.0, "12", {0: 1, 1: 2}, [1.0], [1.0] * 3, np.zeros(3)])
def test_a_group_gets_one_number_for_each_response(value, monkeypatch):
    define(monkeypatch, group=lambda problem, responses: value)
    with pytest.raises(UserError, match="must return one number for each of 2 responses, got"):
        rate(["group"])


def nobody(problem):
    return 1.0


@pytest.mark.cases
def test_mistakes_in_the_list_of_functions_are_one_line():
    with pytest.raises(UserError, match=r"nobody must have the parameters .*but it has .problem."):
        check_functions(config(reward_functions=[f"{HERE}:nobody"]))
    with pytest.raises(UserError, match="one weight for each of 1 reward_functions, got 2"):
        config(reward_functions=["a:b"], reward_weights=[1, 2])
    with pytest.raises(UserError, match="must not name a function twice"):
        config(reward_functions=["a:b", "a:b"])


# ---- With a process reward model ----

STEPS = (("analysis", "16+3=19."), ("next_step", "so \\boxed{19}."), ("output", "\\boxed{19}"))


class Marks:
    """ProcessModel whose score of a step is its length in hundredths; `refuses` names a step."""

    def __init__(self, refuses=None, down=False):
        self.refuses, self.down, self.seen = refuses, down, []

    async def score(self, question, steps):
        self.seen.append((question, list(steps)))
        if self.down:
            raise UserError("prm_url x not reachable after 3 tries")
        if self.refuses in steps:
            raise Unscored("path of 9 tokens; the process reward model reads 8")
        return [len(step) / 100 for step in steps]

    def close(self): ...


@pytest.fixture(scope="module")
def spoken():
    """(tokenizer, ids, a rollout of STEPS with end of text)."""
    tokenizer = build_tokenizer()
    add_function_tokens(tokenizer)
    ids = function_ids(tokenizer)
    pieces = [render([step], tokenizer, ids) for step in STEPS]
    pieces[-1].append(eos_id(tokenizer))
    tokens = [token for piece in pieces for token in piece]
    ends = tuple(end - 1 for end in accumulate(map(len, pieces)))
    made = replace(
        rollout("19", acts=tuple(act for act, _ in STEPS), gold="19"),
        response_ids=tuple(tokens),
        step_ends=ends,
    )
    return tokenizer, ids, made


def rewarded(spoken, prm, rollouts=None, **changes):
    tokenizer, ids, made = spoken
    reward = Reward(config(**changes), tokenizer, ids, prm)
    return asyncio.run(reward.score(rollouts or [made]))


@pytest.mark.oracle
def test_each_step_is_read_between_its_delimiters_and_earns_its_own_score(spoken):
    prm = Marks()
    (scored,) = rewarded(spoken, prm)
    texts = [text for _, text in STEPS]
    assert prm.seen == [("2+2?", texts)]
    scores = [len(text) / 100 for text in texts]
    assert scored.step_scores == pytest.approx(scores)
    assert scored.step_rewards == pytest.approx([*scores[:-1], 1.0])
    (blended,) = rewarded(spoken, prm, reward_scheme="blend")
    assert blended.step_rewards == pytest.approx([*scores[:-1], 0.6 + 0.4 * scores[-1]])


@pytest.mark.invariant
def test_gains_add_up_to_the_outcome_however_long_the_response(spoken):
    (scored,) = rewarded(spoken, Marks(), reward_scheme="gain", advantage_estimator="reinforce++")
    first, second, third = scored.step_rewards
    assert first + second + third == pytest.approx(1.0)
    assert second == pytest.approx(scored.step_scores[1] - scored.step_scores[0])
    with pytest.raises(UserError, match=r"gain rewards single steps, but grpo sums the rewards"):
        config(reward_scheme="gain", advantage_estimator="grpo")


def test_a_response_without_answer_ends_with_its_own_score():
    """arXiv 2502.13389: the reward is σ without an answer."""
    scored = score_rollout(PAPER, rollout(None), text(None), [0.3, 0.7])
    assert scored.step_rewards == scored.step_scores == (0.3, 0.7)
    assert scored.outcome == 0.0


def test_refused_paths_are_left_out_and_counted(spoken):
    _, _, made = spoken
    short = replace(made, response_ids=made.response_ids[: made.step_ends[0] + 1])
    short = replace(short, step_ends=made.step_ends[:1], acts=made.acts[:1])
    prm = Marks(refuses=STEPS[1][1])
    found = rewarded(spoken, prm, [made, short, made])
    said = []
    (kept,) = accepted(found, said.append)
    assert len(kept.step_scores) == 1
    assert said == ["the PRM cannot score 2 paths, which are omitted"]
    with pytest.raises(UserError, match=r"all 2 have no score; the first: path of 9 tokens"):
        accepted([found[0], found[2]], said.append)


def test_a_prm_that_is_down_stops_the_round_with_a_count(spoken):
    with pytest.raises(UserError, match=r"after 3 tries; 1 of 1 paths unscored$"):
        rewarded(spoken, Marks(down=True))


@pytest.mark.parametrize(("finish", "right"), [("stop", True), ("length", False)])
def test_a_box_in_a_response_that_was_cut_off_solves_nothing(finish, right):
    assert solves(Problem("p", "2+2?", "4"), "\\boxed{4}", finish) is right


def test_without_a_prm_steps_earn_nothing(spoken):
    (scored,) = rewarded(spoken, None)
    assert (scored.step_rewards, scored.step_scores) == ((0.0, 0.0, 1.0), ())
