"""Test the virtual clock of bench/explore_sim.py against rounds whose time is known."""

import pytest

from bench import explore_sim
from bench.explore_sim import STEP_SECONDS, explore
from rftt.tokens import add_function_tokens
from tools.tiny_world import build_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    tokenizer = build_tokenizer()
    add_function_tokens(tokenizer)
    return tokenizer


@pytest.mark.oracle
def test_one_leaf_in_flight_takes_the_sum_of_all_lengths(tokenizer):
    root_priors = 1
    found = explore(tokenizer, 1, 1, seed=1, num_generations=6, leaves_in_flight=1)
    assert found.seconds == pytest.approx(STEP_SECONDS * (found.decoded + root_priors))
    assert found.busy == pytest.approx(1.0)
    assert found.idle == pytest.approx(0.0)


@pytest.mark.oracle
def test_independent_responses_take_the_longest_and_a_full_batch_is_slower(tokenizer, monkeypatch):
    how = {"seed": 1, "num_generations": 6, "sampling_method": "normal"}
    found = explore(tokenizer, 2, 4, **how)
    assert found.seconds == pytest.approx(found.longest)  # of all ranks
    assert found.idle == pytest.approx(1 - found.decoded * STEP_SECONDS / found.seconds / 4 / 6)
    monkeypatch.setattr(explore_sim, "FREE_BATCH", 1)  # every token costs a step
    alone = explore(tokenizer, 1, 1, **how)
    assert alone.seconds == pytest.approx(STEP_SECONDS * alone.decoded)
