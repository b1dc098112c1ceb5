"""Test every local engine against one interface; vLLM runs where installed (`-m vllm`)."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, cast

import pytest
import torch
from transformers import Qwen2ForCausalLM

from rftt.engines import build_engine
from rftt.engines.base import Engine, Sampling, checksum
from rftt.engines.lanes import Meter
from rftt.engines.loop import StepLoop
from rftt.engines.slots import pick
from rftt.run.config import SearchConfig
from rftt.types import Completion, UserError
from tests.learners import random_qwen2

N_TOKENS = 61
"""Ids of the tokenizer; the model has rows for three more."""
STOP, OPENERS, CLOSERS = 7, (3, 4, 5), (10, 11, 12, 13, 14, 15)
MODELS = {"tied": True, "untied": False}


def make_model(tied: bool, seed: int = 0) -> Qwen2ForCausalLM:
    return random_qwen2(64, seed=seed, tie_word_embeddings=tied)


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    paths = {name: tmp_path_factory.mktemp(name) for name in MODELS}
    for name, tied in MODELS.items():
        make_model(tied).save_pretrained(paths[name])
    return paths


@pytest.fixture(scope="session")
def open_engine(folders: dict[str, Path]) -> Iterator[Callable[[str, str], Engine]]:
    """Engines by (engine, model), opened once: closing one vLLM breaks every other."""
    opened: dict[tuple[str, str], Engine] = {}

    def get(name: str, model: str) -> Engine:
        if (name, model) not in opened:
            opened[name, model] = build(name, folders[model])
        return opened[name, model]

    yield get
    for built in opened.values():
        built.close()


ENGINES = ["hf", pytest.param("vllm", marks=pytest.mark.vllm)]


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest, open_engine: Callable[[str, str], Engine]) -> Engine:
    return open_engine(request.param, "untied")


def build(name: str, folder: Path) -> Engine:
    cfg = SearchConfig(
        output_dir="",
        model_name_or_path=str(folder),
        train_file="",
        engine=cast(Literal["hf", "vllm"], name),
        dtype="float32",
        device="cpu",
        max_model_len=128,
        max_num_seqs=36,
    )
    return build_engine(cfg, str(folder), N_TOKENS)


def sample(engine: Engine, *requests: tuple[list[int], Sampling]) -> list[Completion]:
    async def together() -> list[Completion]:
        return await asyncio.gather(*(engine.generate(ids, how) for ids, how in requests))

    return asyncio.run(together())


def random_prompts(n: int, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 30, (n,), generator=generator).tolist()
    return [torch.randint(16, N_TOKENS, (k,), generator=generator).tolist() for k in lengths]


@torch.no_grad()
def reference_logprobs(
    model: Qwen2ForCausalLM, prompt: list[int], response: tuple[int, ...], temperature: float = 1.0
) -> torch.Tensor:
    """(R, N_TOKENS) what an unpadded forward says of each position of the response."""
    logits = model(torch.tensor([[*prompt, *response]])).logits[0, len(prompt) - 1 : -1, :N_TOKENS]
    return torch.log_softmax(logits.double() / temperature, -1)


def agrees_with_model(
    model: Qwen2ForCausalLM, prompt: list[int], got: Completion, t: float
) -> float:
    """Largest difference between the engine's log-probs and the model's."""
    table = reference_logprobs(model, prompt, got.token_ids, t)
    own = table[range(len(got.token_ids)), list(got.token_ids)]
    return (own - torch.tensor(got.logprobs, dtype=torch.double)).abs().max().item()


@pytest.mark.oracle
def test_greedy_tokens_are_the_argmax_of_an_unpadded_forward(engine: Engine) -> None:
    model = make_model(tied=False)
    prompts = random_prompts(40)
    got = sample(engine, *((p, Sampling(max_tokens=20, temperature=0.0)) for p in prompts))
    for prompt, completion in zip(prompts, got, strict=True):
        table = reference_logprobs(model, prompt, completion.token_ids)
        assert completion.token_ids == tuple(table.argmax(-1).tolist())
        assert completion.finish == "length"
        assert len(completion.token_ids) == 20
        assert agrees_with_model(model, prompt, completion, 1.0) < 1e-4
    assert len({completion.token_ids for completion in got}) > 20


def test_many_long_prompts_at_once_are_sampled_as_each_alone(engine: Engine) -> None:
    """36 prompts of 120 tokens are more than vLLM reads in one step (4,096 on a CPU)."""
    generator = torch.Generator().manual_seed(9)
    prompts = torch.randint(16, N_TOKENS, (36, 120), generator=generator).tolist()
    requests = [(prompt, Sampling(max_tokens=5, seed=i)) for i, prompt in enumerate(prompts)]
    together = sample(engine, *requests)
    alone = [sample(engine, request)[0] for request in requests]
    assert [got.token_ids for got in together] == [got.token_ids for got in alone]


@pytest.mark.oracle
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_of_samples_and_openers(engine: Engine, temperature: float) -> None:
    model = make_model(tied=False)
    prompts = random_prompts(40, seed=1)
    how = [
        Sampling(
            max_tokens=5 + i,
            temperature=temperature,
            seed=i,
            watch_ids=OPENERS,
            watch_after=CLOSERS,
        )
        for i in range(40)
    ]
    for prompt, sampling, got in zip(
        prompts, how, sample(engine, *zip(prompts, how, strict=True)), strict=True
    ):
        assert len(got.token_ids) == len(got.logprobs) == sampling.max_tokens
        assert agrees_with_model(model, prompt, got, temperature) < 1e-4
        begins = [0, *(i + 1 for i, token in enumerate(got.token_ids[:-1]) if token in CLOSERS)]
        assert sorted(got.watched) == begins
        table = reference_logprobs(model, prompt, got.token_ids, temperature)
        for position, logprobs in got.watched.items():
            torch.testing.assert_close(
                torch.tensor(logprobs, dtype=torch.double),
                table[position, list(OPENERS)],
                atol=1e-4,
                rtol=0,
            )


@pytest.mark.oracle
def test_samples_follow_the_models_distribution(engine: Engine) -> None:
    prompt, n = [20, 21, 22], 2000
    got = sample(engine, *((prompt, Sampling(max_tokens=1, seed=i)) for i in range(n)))
    counts = torch.bincount(torch.tensor([c.token_ids[0] for c in got]), minlength=N_TOKENS)
    expected = n * reference_logprobs(make_model(tied=False), prompt, (0,))[0].exp()
    assert counts.sum() == n
    common = expected >= 5
    chi2 = ((counts - expected)[common] ** 2 / expected[common]).sum().item()
    freedom = int(common.sum())
    assert chi2 < freedom + 5 * math.sqrt(2 * freedom)


@pytest.mark.oracle
def test_positions_draw_independently(engine: Engine) -> None:
    prompt, n, model = [20, 21, 22], 2000, make_model(tied=False)
    got = sample(engine, *((prompt, Sampling(max_tokens=2, seed=i)) for i in range(n)))
    first = reference_logprobs(model, prompt, (0,))[0].exp()
    after = {c.token_ids[0]: c.token_ids for c in got}
    second = {t: reference_logprobs(model, prompt, ids)[1].exp() for t, ids in after.items()}
    quantiles = torch.tensor(
        [
            [(p.cumsum(0) - p / 2)[token].item() for p, token in ((first, a), (second[a], b))]
            for a, b in (c.token_ids for c in got)
        ]
    )
    assert torch.corrcoef(quantiles.T)[0, 1].abs() < 5 / math.sqrt(n)


@pytest.mark.invariant
def test_a_request_does_not_depend_on_its_batch(engine: Engine) -> None:
    prompts = random_prompts(40, seed=2)
    how = [
        Sampling(
            max_tokens=5 + 7 * i % 31,
            temperature=(1.0, 0.7, 0.0)[i % 3],
            top_p=(1.0, 0.8)[i % 2],
            seed=i,
            stop_ids=((STOP,), (), (8, 9))[i % 3],
            watch_ids=OPENERS if i % 4 else (),
            watch_after=CLOSERS[i % 3 :],
        )
        for i in range(40)
    ]
    requests = list(zip(prompts, how, strict=True))
    together = sample(engine, *requests)
    alone = [sample(engine, request)[0] for request in requests[:12]]
    backwards = sample(engine, *reversed(requests))[::-1]
    for other in (alone, backwards):
        for a, b in zip(other, together, strict=False):
            assert (a.token_ids, a.finish) == (b.token_ids, b.finish)
            assert a.logprobs == pytest.approx(b.logprobs, abs=1e-4)
            assert a.watched.keys() == b.watched.keys()
    other_seeds = sample(engine, *((p, Sampling(max_tokens=30, seed=99)) for p in prompts))
    assert [c.token_ids for c in other_seeds] != [c.token_ids for c in together]


def test_stop_id_ends_the_completion_and_stays_in_it(engine: Engine) -> None:
    prompts = random_prompts(60, seed=3)
    how = [Sampling(max_tokens=60, seed=i, stop_ids=(STOP, 8)) for i in range(60)]
    got = sample(engine, *zip(prompts, how, strict=True))
    stopped = [c for c in got if c.finish == "stop"]
    assert 0 < len(stopped) < 60
    for completion in got:
        body = completion.token_ids[:-1]
        assert STOP not in body
        assert 8 not in body
        assert (completion.token_ids[-1] in (STOP, 8)) == (completion.finish == "stop")
        assert completion.finish == "stop" or len(completion.token_ids) == 60


def test_top_p_keeps_to_the_nucleus(engine: Engine) -> None:
    model = make_model(tied=False)
    prompts = random_prompts(30, seed=4)
    how = [Sampling(2 + i % 7, seed=i, top_p=(0.3, 0.6, 1.0)[i % 3]) for i in range(30)]
    outside = 0
    for prompt, s, got in zip(
        prompts, how, sample(engine, *zip(prompts, how, strict=True)), strict=True
    ):
        probs = reference_logprobs(model, prompt, got.token_ids).exp()
        for row, token in zip(probs, got.token_ids, strict=True):
            likelier = row[row > row[token]].sum()
            assert likelier < s.top_p + 1e-6
            outside += int(likelier > 0.6)
    assert outside > 0


def test_ids_beyond_the_tokenizer_are_never_sampled(engine: Engine) -> None:
    model = make_model(tied=False)
    model.lm_head.weight.data[N_TOKENS:] = 50 * model.lm_head.weight.data[:3]
    prompts = random_prompts(20)
    engine.load_weights(model.named_parameters())
    got = sample(engine, *((p, Sampling(max_tokens=20, seed=1)) for p in prompts))
    engine.load_weights(make_model(tied=False).named_parameters())
    assert max(max(c.token_ids) for c in got) < N_TOKENS
    for prompt, completion in zip(prompts, got, strict=True):
        assert agrees_with_model(model, prompt, completion, 1.0) < 1e-4


@pytest.mark.oracle
def test_banned_ids_are_never_sampled_and_the_rest_is_renormalised(engine: Engine) -> None:
    """Beside requests that may sample them, and greedily too."""
    model, banned = make_model(tied=False), tuple(range(16, 40))
    prompts = random_prompts(24)
    how = [
        Sampling(max_tokens=20, temperature=float(i % 3 > 0), seed=i, banned_ids=banned * (i % 2))
        for i in range(24)
    ]
    got = sample(engine, *zip(prompts, how, strict=True))
    assert all(set(completion.token_ids) & set(banned) for completion in got[::2])
    for prompt, completion in list(zip(prompts, got, strict=True))[1::2]:
        assert not set(completion.token_ids) & set(banned)
        table = reference_logprobs(model, prompt, completion.token_ids)
        left = table.index_fill(1, torch.tensor(banned), -math.inf).log_softmax(-1)
        own = left[range(20), list(completion.token_ids)]
        assert (own - torch.tensor(completion.logprobs).double()).abs().max() < 1e-4


@pytest.mark.invariant
def test_engine_tells_a_meter_how_far_a_request_is(engine: Engine) -> None:
    """In every step at most the tokens sampled so far, so that nothing that lands is late."""
    meter = Meter()

    async def scenario() -> tuple[list[int], int]:
        how = Sampling(max_tokens=20, seed=3, meter=meter)
        request = asyncio.create_task(engine.generate([20, 21], how))
        seen = []
        while not request.done():
            seen.append(meter.running)
            await asyncio.sleep(0)
        return seen, len((await request).token_ids)

    seen, n = asyncio.run(scenario())
    assert seen == sorted(seen)
    assert max(seen) in (n - 1, n)
    assert len({*seen}) >= n - 1  # each step tells one more


def test_cancelled_request_frees_its_place(engine: Engine) -> None:
    before = engine.counters.steps

    async def scenario() -> Completion:
        long = [
            asyncio.create_task(engine.generate([20], Sampling(max_tokens=120))) for _ in "x" * 40
        ]
        await asyncio.sleep(0)
        short = asyncio.create_task(engine.generate([21], Sampling(max_tokens=3, seed=5)))
        for _ in range(5):
            await asyncio.sleep(0)
        for task in long:
            task.cancel()
        outcomes = await asyncio.gather(*long, return_exceptions=True)
        assert all(isinstance(outcome, asyncio.CancelledError) for outcome in outcomes)
        return await short

    short = asyncio.run(scenario())
    assert engine.counters.steps - before < 20
    assert short.token_ids == sample(engine, ([21], Sampling(max_tokens=3, seed=5)))[0].token_ids


def test_engine_error_reaches_every_waiter_and_the_next_run_works(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = ([20, 21], Sampling(max_tokens=4))
    [before] = sample(engine, request)

    def broken() -> None:
        raise FloatingPointError("broken forward")

    async def three() -> list[object]:
        waiting = (engine.generate(*request) for _ in range(3))
        return await asyncio.gather(*waiting, return_exceptions=True)

    with monkeypatch.context() as patch:
        patch.setattr(engine, "_loop", StepLoop(broken, cast(Any, engine)._loop._reset))
        assert [type(error) for error in asyncio.run(three())] == [FloatingPointError] * 3
    generated = engine.counters.generated_tokens
    assert sample(engine, request)[0].token_ids == before.token_ids
    assert engine.counters.generated_tokens == generated + 4


def test_interrupted_event_loop_leaves_a_working_engine(engine: Engine) -> None:
    async def give_up() -> None:
        async with asyncio.timeout(0.05):
            await asyncio.gather(
                *(engine.generate([20], Sampling(max_tokens=120, seed=i)) for i in range(3))
            )
            await asyncio.sleep(1)

    with pytest.raises(TimeoutError):
        asyncio.run(give_up())
    assert len(sample(engine, ([20], Sampling(max_tokens=5)))[0].token_ids) == 5


@pytest.mark.parametrize(
    ("prompt", "sampling", "message"),
    [
        ([], Sampling(max_tokens=1), "at least one prompt token"),
        ([20], Sampling(max_tokens=0), "max_tokens of at least 1"),
        ([20] * 100, Sampling(max_tokens=29), "max_model_len=128"),
        ([N_TOKENS], Sampling(max_tokens=1), "token ids must be from 0 to"),
        ([20], Sampling(max_tokens=1, stop_ids=(-1,)), "token ids must be from 0 to"),
    ],
)
def test_impossible_request_is_one_clear_error(
    engine: Engine, prompt: list[int], sampling: Sampling, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        sample(engine, (prompt, sampling))


def test_counters_count_every_token_and_shared_prompts(engine: Engine) -> None:
    before = vars(engine.counters).copy()
    prompt = list(range(16, 60))
    got = sample(engine, *((prompt, Sampling(max_tokens=6, seed=i)) for i in range(8)))
    spent = {name: value - before[name] for name, value in vars(engine.counters).items()}
    assert spent["requests"] == 8
    assert spent["generated_tokens"] == sum(len(c.token_ids) for c in got) == 48
    assert spent["prompt_tokens"] == 8 * len(prompt) == sum(c.n_prompt for c in got)
    assert spent["cached_tokens"] == sum(c.n_cached for c in got)
    assert spent["cached_tokens"] > 0
    assert 6 <= spent["steps"] <= 20


@pytest.mark.oracle
def test_prompts_that_arrive_together_share_their_examples(
    open_engine: Callable[[str, str], Engine],
) -> None:
    examples = [16 + i % 40 for i in range(80)]
    prompts = [[*examples, 20 + i, 30] for i in range(5)]
    how = [Sampling(max_tokens=10, seed=i) for i in range(5)]
    engine, model = open_engine("hf", "untied"), make_model(tied=False)
    engine.load_weights(model.named_parameters())  # nothing is cached
    got = sample(engine, *zip(prompts, how, strict=True))
    assert sorted(completion.n_cached for completion in got) == [0, *[len(examples)] * 4]
    for prompt, completion in zip(prompts, got, strict=True):
        assert agrees_with_model(model, prompt, completion, 1.0) < 1e-4


@pytest.mark.oracle
def test_continuations_reuse_what_was_sampled(engine: Engine) -> None:
    model, prompt = make_model(tied=False), list(range(16, 56))
    roots = sample(engine, *((prompt, Sampling(max_tokens=30, seed=i)) for i in range(6)))
    paths = [[*prompt, *c.token_ids[: 5 * i]] for i, c in enumerate(roots)]
    how = [Sampling(max_tokens=20, seed=i) for i in range(6)]
    for path, got in zip(paths, sample(engine, *zip(paths, how, strict=True)), strict=True):
        assert 32 <= got.n_cached < len(path)  # vLLM reuses whole blocks of 32
        assert agrees_with_model(model, path, got, 1.0) < 1e-4
    engine.load_weights(model.named_parameters())
    assert sample(engine, (paths[0], how[0]))[0].n_cached == 0


@pytest.mark.oracle
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", ENGINES)
def test_synced_engine_samples_as_the_learner(
    name: str, model: str, open_engine: Callable[[str, str], Engine]
) -> None:
    engine, prompts = open_engine(name, model), random_prompts(12, seed=5)
    greedy = [(p, Sampling(max_tokens=12, temperature=0.0)) for p in prompts]
    for seed in (7, 8, 0):
        stale, learner = sample(engine, *greedy), make_model(MODELS[model], seed)
        engine.sleep()
        engine.wake()
        held = engine.load_weights(learner.named_parameters())
        assert held == pytest.approx(sum(map(checksum, learner.parameters())), rel=1e-9)
        for prompt, old, got in zip(prompts, stale, sample(engine, *greedy), strict=True):
            table = reference_logprobs(learner, prompt, got.token_ids)
            assert got.token_ids == tuple(table.argmax(-1).tolist()) != old.token_ids
            assert agrees_with_model(learner, prompt, got, 1.0) < 1e-4


def test_load_weights_names_what_is_wrong(engine: Engine) -> None:
    weights = dict(make_model(tied=False).named_parameters())
    head = weights.pop("lm_head.weight")
    with pytest.raises(UserError, match=r"the learner did not send .*lm_head\.weight"):
        engine.load_weights(weights.items())
    with pytest.raises(UserError, match=r"lm_head\.weight"):
        engine.load_weights([("lm_head.weight", head[1:])])
    with pytest.raises(UserError, match=r"strange\.weight"):
        engine.load_weights([("strange.weight", head)])

    async def while_running() -> None:
        running = asyncio.create_task(engine.generate([20], Sampling(max_tokens=9)))
        await asyncio.sleep(0)
        with pytest.raises(UserError, match="while requests run"):
            engine.load_weights(weights.items())
        await running

    asyncio.run(while_running())


@pytest.mark.oracle
def test_pick_is_the_inverse_cdf() -> None:
    probs = torch.tensor([[0.0, 0.5, 0.0, 0.25, 0.25]]).repeat(8, 1)
    uniform = torch.tensor([0.0, 0.49, 0.5, 0.74, 0.75, 1 - 2**-24, 0.9, 0.9])
    greedy = torch.tensor([False] * 6 + [True] * 2)
    got = pick(probs.log(), uniform, torch.ones(8), greedy)
    assert got.tolist() == [1, 1, 3, 3, 4, 4, 1, 1]
    nucleus = pick(probs.log(), uniform, torch.full((8,), 0.6), greedy)
    assert nucleus.tolist() == [1, 1, 1, 3, 3, 3, 1, 1]
