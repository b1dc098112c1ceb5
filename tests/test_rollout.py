"""Test functional tokens on a scripted engine: its requests and its replies."""

import asyncio
import math
from dataclasses import dataclass, field, replace
from functools import partial
from typing import ClassVar

import pytest

from rftt.engines.base import Counters
from rftt.engines.chat import engine_chat
from rftt.engines.sampler import Sampler, Task
from rftt.mcts import Tree
from rftt.prompted import Prompted
from rftt.prompts import ActPrompt
from rftt.rollout import cut, expand_learned, learned_tree, sample, tree_rollouts
from rftt.run.config import Acts, load_config
from rftt.run.prompts_file import load_prompts
from rftt.tokens import ACTS, CLOSERS, OPENERS, ROOT, FunctionIds
from rftt.types import Completion, Problem, Step, UserError

EOS = 2
FIRST = 10
IDS = FunctionIds(
    {act: FIRST + i for i, act in enumerate(ACTS)},
    {act: FIRST + 8 + i for i, act in enumerate(ACTS)},
)
NAMES = {FIRST + i: token for i, token in enumerate(OPENERS + CLOSERS)}
OPEN, CLOSE = IDS.open, IDS.close
PROBLEM = Problem("p", "2+2?", "4")


class Letters:
    """Characters as ids from 100, delimiters by their ids; enough of a tokenizer."""

    eos_token_id = EOS
    bos_token_id = None
    added_tokens_decoder: ClassVar = {}

    def __len__(self):
        return 300

    def encode(self, text, add_special_tokens=False):
        return [100 + ord(letter) for letter in text]

    def decode(self, ids, skip_special_tokens=False):
        return "".join(NAMES.get(i, chr(i - 100) if i > 100 else "") for i in ids)

    def apply_chat_template(self, messages, add_generation_prompt, return_dict):
        return self.encode(messages[-1]["content"])


@dataclass
class Scripted:
    """Answers every request with the next of `replies`: texts, or lists of ids."""

    replies: list
    max_model_len: int = 10_000
    asked: list = field(default_factory=list)
    generated: int = 0
    counters: Counters = field(default_factory=Counters)

    async def generate(self, prompt_ids, sampling):
        self.asked.append((list(prompt_ids), sampling))
        await asyncio.sleep(0)
        if sampling.max_tokens == 1:
            ids = [OPEN["analysis"]]
        else:
            reply = self.replies.pop(0)
            ids = [*Letters().encode(reply), EOS] if isinstance(reply, str) else reply
        watched = {
            i: tuple(-float(j + 1) for j in range(8))
            for i in range(len(ids))
            if sampling.watch_ids and (i == 0 or ids[i - 1] in sampling.watch_after)
        }
        self.generated += len(ids)
        finish = "stop" if ids[-1] in sampling.stop_ids else "length"
        return Completion(tuple(ids), (-0.5,) * len(ids), finish, watched)


BARE = {act: ActPrompt(system=act, instruction=f"Now {act}.") for act in ACTS}
LENIENT = load_prompts().model_copy(update={"acts": BARE, "refuse": {}})
"""Prompts without examples, whose contract names no words."""


def prompted(replies, **changes):
    """A searcher, and the engine that it asks."""
    settings = {"temperature": 1.0, "max_tokens": 500, "max_depth": 15, "max_direct_sentences": 4}
    settings |= {"prompts": LENIENT, "contract_tries": 3, "control": lambda _: False}
    engine = Scripted(replies)
    chat = partial(engine_chat, engine, Letters())
    return Prompted(chat, **settings | {"seed": 0} | changes), engine


def learned(replies, **changes):
    settings = {"temperature": 1.0, "max_tokens": 400, "max_depth": 18, "seed": 0}
    return Sampler(Scripted(replies), Letters(), IDS, **(settings | changes))


def choose(act, before=()):
    tree = Tree(lambda _: ACTS, max_depth=18, exploration_weight=2.0, seed=0)
    tree.root_log_priors = {act: 1.0} if not before else {before[0].act: 1.0}
    if before:
        tree.land(tree.select(), [*before, Step("output", "")], 0.0)
        node = tree.nodes[len(before)]
        return type(tree.select())(node, act, (*node.key, f"{act}.1"))
    return tree.select()


def segment(act, text):
    return [OPEN[act], *Letters().encode(text), CLOSE[act]]


BOXED = Letters().encode("\\boxed{4} an")


def test_one_request_gives_the_whole_rollout_with_priors():
    tail = [*Letters().encode("so"), CLOSE["analysis"], *segment("output", "\\boxed{4}")]
    ctx = learned([tail])
    steps = asyncio.run(expand_learned(Task(ctx, PROBLEM, [7, 8]), choose("analysis"), -1.25))
    assert [step.act for step in steps] == ["analysis", "output"]
    assert len(ctx.engine.asked) == 1
    assert ctx.engine.asked[0][0] == [7, 8, OPEN["analysis"]]
    assert steps[0].forced
    assert not steps[1].forced
    assert steps[0].logprobs[0] == -1.25
    assert steps[0].log_priors["clarify"] == -1.0
    assert steps[1].answer == "4"
    assert [t for step in steps for t in step.token_ids] == [OPEN["analysis"], *tail]


@pytest.mark.parametrize(
    ("tokens", "acts"),
    [
        ([165], ["verify"]),
        ([165, CLOSE["verify"], 166], ["verify", ""]),
        ([165, CLOSE["analysis"], 166], ["verify"]),
        ([CLOSE["verify"], OPEN["output"], 165], ["verify", ""]),
    ],
    ids=["never closed", "text between", "wrong closer", "cut off"],
)
def test_what_no_segment_holds_is_one_last_step(tokens, acts):
    steps = cut(Completion(tuple(tokens), (0.0,) * len(tokens), "length"), IDS, "verify")
    assert [step.act for step in steps] == acts
    assert sum((step.token_ids for step in steps), ()) == (OPEN["verify"], *tokens)
    assert [step.forced for step in steps] == [True] + [False] * (len(acts) - 1)


def test_stepwise_takes_the_most_likely_act_that_the_grammar_allows():
    """The script prefers clarify, then analysis …; after analysis the grammar offers neither."""
    replies = [
        [165, CLOSE["analysis"]],
        [166, CLOSE["next_step"]],
        [167, CLOSE["next_step"]],
    ]
    ctx = learned(replies, stepwise=True, max_depth=3)
    steps = asyncio.run(expand_learned(Task(ctx, PROBLEM, [7]), choose("analysis"), -1.0))
    assert [step.act for step in steps] == ["analysis", "next_step", "next_step"]
    assert all(step.forced for step in steps)
    assert steps[1].logprobs[0] == -float(1 + ACTS.index("next_step"))
    again = [[165, CLOSE["analysis"]], [166, CLOSE["subquestion"]]]
    other = learned(again, stepwise=True, max_depth=2, forbidden=("next_step",))
    steps = asyncio.run(expand_learned(Task(other, PROBLEM, [7]), choose("analysis"), -1.0))
    assert [step.act for step in steps] == ["analysis", "subquestion"]


def test_stepwise_asks_for_no_priors_that_a_full_response_cannot_use():
    """Room for an opener and one token is room for an act; for the opener alone it is not."""
    body = [165, CLOSE["analysis"]]
    for max_tokens, n_requests in ((4, 1), (5, 3)):
        ctx = learned([body, [165]], stepwise=True, max_tokens=max_tokens)
        asyncio.run(expand_learned(Task(ctx, PROBLEM, [7]), choose("analysis"), -1.0))
        assert len(ctx.engine.asked) == n_requests


def test_stepwise_ends_where_every_act_that_may_follow_is_forbidden():
    ctx = learned([[165, CLOSE["subquestion"]]], stepwise=True,
                  forbidden=("next_step", "direct_answer"))  # fmt: skip
    steps = asyncio.run(expand_learned(Task(ctx, PROBLEM, [7]), choose("subquestion"), -1.0))
    assert [(step.act, step.answer) for step in steps] == [("subquestion", None)]


@pytest.mark.invariant
def test_budget_counts_the_whole_response():
    before = [Step("analysis", "", tuple(segment("analysis", "abc")), (0.0,) * 5)]
    ctx = learned([[165] * 4], max_tokens=10)
    asyncio.run(expand_learned(Task(ctx, PROBLEM, [7]), choose("next_step", before), -1.0))
    assert ctx.engine.asked[0][1].max_tokens == 10 - 5 - 1
    full = learned([], max_tokens=6)
    (step,) = asyncio.run(
        expand_learned(Task(full, PROBLEM, [7]), choose("next_step", before), -1.0)
    )
    assert step.token_ids == (OPEN["next_step"],)


@pytest.mark.invariant
def test_rollouts_share_prefixes_and_pay_for_them_once():
    answers = [[165, CLOSE[a], *segment("next_step", "y"), *segment("output", "\\boxed{4}")]
               for a in ("clarify", "analysis", "next_step", "subquestion")]  # fmt: skip
    more = [[168, CLOSE["direct_answer"], *segment("output", "\\boxed{5}")]] * 8
    ctx = learned(answers + more)
    tree = asyncio.run(
        learned_tree(Task(ctx, PROBLEM, [7]), simulations=7, exploration_weight=2.0, in_flight=2)
    )
    rollouts = tree_rollouts(Task(ctx, PROBLEM, [7], group=3), tree, mask_forced=True)
    assert len(rollouts) == 7
    root_priors = 1
    assert sum(r.n_generated for r in rollouts) + root_priors == ctx.engine.generated
    for rollout in rollouts:
        assert len(rollout.response_ids) == len(rollout.sampling_logprobs)
        assert rollout.step_ends[-1] == len(rollout.response_ids) - 1
        assert not rollout.action_mask[0]  # every path begins with an opener the tree chose
        assert rollout.finish == "stop"
    openers = {}  # of the root's acts, which the tree tried in turn
    for rollout in rollouts:
        openers.setdefault(rollout.nodes[0], []).append(rollout.branching[0])
    for ratios in openers.values():
        assert ratios == [7 / len(ratios)] * len(ratios)  # N(s) / N(s, a)
    assert {rollout.branching[1] for rollout in rollouts} == {0.0}


class Paced(Scripted):
    """Its replies depend on their seeds, have 1 to 9 tokens more, and take a step each."""

    async def generate(self, prompt_ids, sampling):
        reply = [*[165] * (sampling.seed % 9), *segment("output", "\\boxed{4}")]
        completion = await Scripted([reply]).generate(prompt_ids, sampling)
        for _ in completion.token_ids:
            await asyncio.sleep(0)
        return completion


@pytest.mark.invariant
def test_a_search_in_order_begins_with_the_paths_of_a_shorter_one():
    """Else the first k paths would be short ones, and accuracy after k simulations theirs."""
    grown = {}
    for in_order, simulations in ((True, 12), (True, 5), (False, 12)):
        ctx = replace(learned([]), engine=Paced([]))
        how = {"exploration_weight": 2.0, "in_flight": 4, "in_order": in_order}
        search = learned_tree(Task(ctx, PROBLEM, [7]), simulations=simulations, **how)
        grown[in_order, simulations] = [leaf.key for leaf in asyncio.run(search).leaves()]
    assert grown[True, 12][:5] == grown[True, 5]
    assert grown[False, 12][:5] != grown[True, 5]


@pytest.mark.parametrize("act", ["clarify", "next_step"])
def test_neither_tree_nor_policy_opens_a_forbidden_act(act):
    replies = [[165, *segment("output", "\\boxed{4}")] for _ in range(9)]
    ctx = learned(replies, forbidden=(act,))
    tree = asyncio.run(
        learned_tree(Task(ctx, PROBLEM, [7]), simulations=4, exploration_weight=2.0, in_flight=1)
    )
    assert all(OPEN[act] in sampling.banned_ids for _, sampling in ctx.engine.asked)
    assert {node.act for node in tree.root.children} <= {*ROOT["learned"]} - {act}


@pytest.mark.invariant
def test_an_act_may_have_several_texts_and_the_likeliest_comes_first():
    replies = [[165 + i, CLOSE["analysis"], *segment("output", "\\boxed{4}")] for i in range(4)]
    ctx = learned(replies, children_per_act=2)
    tree = asyncio.run(
        learned_tree(Task(ctx, PROBLEM, [7]), simulations=4, exploration_weight=2.0, in_flight=1)
    )
    acts = [node.act for node in tree.root.children]
    assert acts == ["clarify", "clarify", "analysis", "analysis"]  # by prior, each twice
    assert len({node.key for node in tree.nodes}) == len(tree.nodes)
    assert len({sampling.seed for _, sampling in ctx.engine.asked}) == len(ctx.engine.asked)
    with pytest.raises(
        UserError, match="`children_per_act` must be an integer of at least 1, got 0"
    ):
        load_config(Acts, ["children_per_act=0"])


def test_plain_samples_have_no_steps():
    ctx = learned(["It is \\boxed{4}", "It is \\boxed{5}"])
    plain = Sampler(ctx.engine, Letters(), None, 1.0, 400, 1, 0)
    rollouts = asyncio.run(sample(Task(plain, PROBLEM, [7]), n=2))
    assert [rollout.acts for rollout in rollouts] == [("",), ("",)]
    assert [rollout.answer for rollout in rollouts] == ["4", "5"]
    assert all(math.isclose(x, -0.5) for r in rollouts for x in r.sampling_logprobs)
