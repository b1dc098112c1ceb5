"""Test DPO through train_sft.py: rows, packing, cached reference, loss and formula."""

import json
import math
import shutil

import pytest
import torch
from conftest import ROOT, TORCHRUN, run
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from rftt.engines.chat import encode_chat
from rftt.learner.fsdp import empty_like, flat_microbatches
from rftt.learner.offline import collate_examples, offline_loss
from rftt.prompts import question_messages
from rftt.run.config import SFTConfig, load_config
from rftt.run.data import load_rows
from rftt.run.files import read_jsonl, write_jsonl
from rftt.tokens import add_function_tokens, function_ids, render
from rftt.types import UserError
from tests.learners import random_qwen2
from tools.tiny_world import build_tokenizer

PAIRS = [
    {
        "question": f"Eva has {i} pens.",
        "chosen": [
            {"act": "next_step", "text": f"{i}+{i}={2 * i}"},
            {"act": "output", "text": f"\\boxed{{{2 * i}}}"},
        ],
        "rejected": f"{i}+{i}={2 * i + 1}" + " or so" * i,
    }
    for i in range(7)
]
BETA, SMOOTHING = 0.3, 0.1


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with a random model that knows functional tokens, and seven pairs."""
    path = tmp_path_factory.mktemp("dpo")
    tokenizer = build_tokenizer()
    add_function_tokens(tokenizer)
    sizes = {"hidden_size": 24, "intermediate_size": 40, "initializer_range": 0.2}
    eos = {"eos_token_id": tokenizer.eos_token_id}
    random_qwen2(len(tokenizer), **sizes, **eos).save_pretrained(path / "model")
    tokenizer.save_pretrained(path / "model")
    write_jsonl(path / "pairs.jsonl", PAIRS)
    return path


def train(world, name, *changes, ranks=1):
    """Run train_sft.py to the end; its metrics without what depends on the clock."""
    launch = [*TORCHRUN, f"--nproc_per_node={ranks}"] if ranks > 1 else ["python"]
    run(
        *launch, ROOT / "train_sft.py", f"model_name_or_path={world / 'model'}", "loss=dpo",
        f"train_file={world / 'pairs.jsonl'}", f"output_dir={world / name}", "dtype=float32",
        "device=cpu", f"label_smoothing={SMOOTHING}", "learning_rate=3e-3", "eval_ratio=0.3",
        "num_train_epochs=4", "train_batch_size=5", "max_tokens_per_microbatch=60",
        "save_steps=1", "save_total_limit=9", "eval_steps=2", *changes,
    )  # fmt: skip
    return [row for _, row in read_jsonl(world / name / "metrics.jsonl")]


@pytest.fixture(scope="module")
def unbroken(world):
    return train(world, "unbroken")


# ---- Rows and packing ----


def read(path, **changes):
    tokenizer = AutoTokenizer.from_pretrained(path / "model")
    arguments = {"system_prompt": None, "mask_wrong": True, "functional": True, "max_length": 99}
    return load_rows(str(path / "pairs.jsonl"), tokenizer, **arguments | {"pairs": True} | changes)


def test_a_dpo_row_is_one_prompt_with_two_responses(world):
    tokenizer = AutoTokenizer.from_pretrained(world / "model")
    examples, _ = read(world)
    for example, row in zip(examples, PAIRS, strict=True):
        chosen, rejected = example
        prompt = encode_chat(tokenizer, question_messages(row["question"]))
        steps = [(step["act"], step["text"]) for step in row["chosen"]]
        eos = [tokenizer.eos_token_id]
        assert chosen[:2] == (prompt, render(steps, tokenizer, function_ids(tokenizer)) + eos)
        assert rejected[:2] == (prompt, tokenizer.encode(row["rejected"]) + eos)
        assert all(chosen[2])
        assert all(rejected[2])
    size = sorted(max(len(p) + len(r) for p, r, _ in example) for example in examples)[4]
    kept, left_out = read(world, max_length=size)
    assert (len(kept), left_out) == (5, {"too long": 2})  # one long response is enough


@pytest.mark.parametrize(
    ("row", "pairs", "message"),
    [
        ({"question": "q", "chosen": "a"}, True, "pairs.jsonl:1 lacks 'chosen' or 'rejected'"),
        (
            {"question": "q", "chosen": "a", "rejected": 3},
            True,
            "found: question, chosen, rejected",
        ),
        (
            {"question": "q", "chosen": "a", "rejected": "b"},
            False,
            "has neither 'steps' nor 'response'",
        ),
    ],
)
def test_dpo_rows_that_will_not_do_are_named(world, tmp_path, row, pairs, message):
    shutil.copytree(world / "model", tmp_path / "model")
    write_jsonl(tmp_path / "pairs.jsonl", [row])
    with pytest.raises(UserError, match=message):
        read(tmp_path, pairs=pairs)


@pytest.mark.invariant
@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.tuples(st.integers(1, 20), st.integers(1, 20)), min_size=1, max_size=12),
    st.integers(4, 60),
)
def test_dpo_pairs_share_a_microbatch_and_memory_is_bounded(sizes, budget):
    examples = [tuple(([1], [2] * n, [True] * n) for n in pair) for pair in sizes]
    sums = [(float(-i), 0.5) for i in range(len(sizes))]
    batch = collate_examples(examples, sums, ["row"] * len(sizes), each=2)
    assert batch.n_terms == len(sizes)
    groups = flat_microbatches(batch, budget)
    assert sorted(i for group in groups for i in group) == list(range(2 * len(sizes)))
    for group in groups:
        assert all(b == a + 1 for a, b in zip(group[::2], group[1::2], strict=True))
        assert len(group) == 2 or sum(batch.lengths[i] for i in group) <= budget
        part = batch.select(group)
        assert sum(part.ref_sums) == sum(0.5 - i // 2 for i in group[::2])


@pytest.mark.invariant
def test_dpo_loss_of_many_microbatches_is_that_of_one():
    cfg = SFTConfig(
        output_dir="o", model_name_or_path="m", train_file="t", learning_rate=1, loss="dpo"
    )
    examples = [tuple(([1], [2] * n, [True] * n) for n in pair) for pair in ((3, 9), (5, 2))]
    batch = collate_examples(examples, [(-1.0, -2.0), (-3.0, -0.5)], ["a", "b"], each=2)
    logprobs = -torch.rand(len(batch.input_ids))
    whole, _ = offline_loss(logprobs, batch, cfg)
    parts = [
        offline_loss(logprobs[batch.token_index(g)], batch.select(g), cfg)[0]
        for g in ([2, 3], [0, 1])
    ]
    assert sum(parts) == pytest.approx(float(whole))
    noise = torch.zeros(4, requires_grad=True)
    nothing, zero = offline_loss(noise, empty_like(batch), cfg)
    nothing.backward()
    assert (nothing.item(), float(zero["dpo_accuracy"])) == (0.0, 0.0)
    assert noise.grad.abs().sum() == 0  # yet it is part of the graph, as FSDP needs


# ---- The script ----


def response_logprob(model, tokenizer, question, response):
    """Unpacked, one token at a time, in the words of the definition."""
    prompt = encode_chat(tokenizer, question_messages(question))
    if not isinstance(response, str):
        response = "".join(f"<{s['act']}>{s['text']}</{s['act']}>" for s in response)
    ids = prompt + tokenizer.encode(response) + [tokenizer.eos_token_id]
    logprobs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    return sum(logprobs[t - 1, ids[t]] for t in range(len(prompt), len(ids)))


@pytest.mark.oracle
def test_dpo_loss_and_gradient_from_the_formula(world, unbroken):
    """−(1−ε) log σ(m) − ε log σ(−m), m = β (log π/π_ref (chosen) − log π/π_ref (rejected))."""
    from itertools import islice

    from rftt.run.data import shuffled_epochs

    tokenizer = AutoTokenizer.from_pretrained(world / "model")
    start = AutoModelForCausalLM.from_pretrained(world / "model")
    held_out = set(islice(shuffled_epochs(7, 1), 2))
    kept = [row for i, row in enumerate(PAIRS) if i not in held_out]
    assert len(unbroken) == 4
    for step in (1, 3):  # every step sees all five pairs
        folder = world / "unbroken" / "checkpoints" / f"step_{step:06d}" / "hf"
        model = AutoModelForCausalLM.from_pretrained(folder)
        losses, rewards = [], []
        for row in kept:
            gain = [
                BETA * (response_logprob(model, tokenizer, row["question"], row[side])
                - response_logprob(start, tokenizer, row["question"], row[side]).detach())
                for side in ("chosen", "rejected")
            ]  # fmt: skip
            sigma = torch.sigmoid(gain[0] - gain[1])
            losses.append(-(1 - SMOOTHING) * sigma.log() - SMOOTHING * (1 - sigma).log())
            rewards.append([x.item() for x in gain])
        loss = sum(losses) / len(losses)
        loss.backward()
        norm = math.sqrt(sum(float(p.grad.square().sum()) for p in model.parameters()))
        logged = unbroken[step]
        assert logged["loss"] == pytest.approx(loss.item(), rel=1e-4)
        assert logged["grad_norm"] == pytest.approx(norm, rel=1e-3)
        assert logged["dpo_accuracy"] == sum(a > b for a, b in rewards) / 5
        means = [sum(side) / 5 for side in zip(*rewards, strict=True)]
        assert logged["dpo_chosen_reward"] == pytest.approx(means[0], abs=1e-4)
        assert logged["dpo_rejected_reward"] == pytest.approx(means[1], abs=1e-4)
        assert logged["dpo_margin"] == pytest.approx(means[0] - means[1], abs=1e-4)


def test_dpo_starts_at_log_2_and_learns_the_pairs(unbroken):
    assert unbroken[0]["loss"] == pytest.approx(math.log(2), rel=1e-5)
    assert unbroken[0]["dpo_margin"] == pytest.approx(0, abs=1e-4)
    assert unbroken[-1]["loss"] < unbroken[0]["loss"]
    assert unbroken[-1]["dpo_margin"] > 0.1
    evaluated = [row for row in unbroken if "eval_dpo_accuracy" in row]  # at least with checkpoints
    assert [row["step"] for row in evaluated] == [0, 1, 2, 3]
    assert all(0 <= row["eval_dpo_accuracy"] <= 1 for row in evaluated)


@pytest.mark.invariant
def test_dpo_resumed_equals_unbroken(world, unbroken):
    """Bit for bit, without computing the reference again; and also when its file is gone."""
    cache = (world / "unbroken" / "data" / "reference.jsonl").read_text()
    assert cache.count("\n") == len(PAIRS)
    for name, left in (("killed", cache), ("lost", cache[:-9])):
        copy = world / name
        shutil.copytree(world / "unbroken", copy)
        for step in (3, 4):
            (copy / "checkpoints" / f"step_{step:06d}" / "COMPLETE").unlink()
        (copy / "data" / "reference.jsonl").write_text(left)
        assert train(world, name) == unbroken
        weights = [f / "hf" / "model.safetensors" for f in (copy, world / "unbroken")]
        assert weights[0].read_bytes() == weights[1].read_bytes()
        assert (copy / "data" / "reference.jsonl").read_text() == cache


def test_dpo_cache_is_what_training_uses(world, unbroken):
    """A reference read from disk that favours the rejected ones changes the first loss."""
    (world / "edited" / "data").mkdir(parents=True)
    rows = [json.loads(line) for line in (world / "unbroken/data/reference.jsonl").open()]
    for row in rows:
        row["logprobs"][0] -= 10
    write_jsonl(world / "edited" / "data" / "reference.jsonl", rows)
    first = train(world, "edited")[0]
    assert first["dpo_margin"] == pytest.approx(10 * BETA, rel=1e-4)
    assert first["loss"] < unbroken[0]["loss"]


@pytest.mark.cases
def test_dpo_reference_is_not_that_of_other_weights_of_the_same_name(world, unbroken):
    """The folder of a warm-up that was trained again, and a run begun anew beside its old cache."""
    shutil.copytree(world / "unbroken" / "data", world / "retrained" / "data")
    first, held = world / "model" / "model.safetensors", world / "before"
    shutil.copy(first, held)
    shutil.copy(world / "unbroken" / "hf" / "model.safetensors", first)
    try:
        assert train(world, "retrained")[0]["dpo_margin"] == pytest.approx(0, abs=1e-4)
    finally:
        shutil.copy(held, first)


@pytest.mark.invariant
@pytest.mark.dist
def test_dpo_on_two_ranks_equals_one(world, unbroken):
    two = train(world, "two", ranks=2)
    for a, b in zip(unbroken, two, strict=True):
        for key in a:
            assert b[key] == pytest.approx(a[key], abs=2e-5, rel=2e-4), key


def test_mix_file_adds_rows_by_ratio(world):
    from rftt.engines.chat import load_tokenizer
    from train_sft import read_rows

    write_jsonl(world / "rows.jsonl", [{"question": f"{i}", "response": "a"} for i in range(10)])
    write_jsonl(world / "more.jsonl", [{"question": f"m{i}", "response": "b"} for i in range(3)])
    cfg = {
        "output_dir": "o", "model_name_or_path": "m", "learning_rate": 1.0, "eval_ratio": 0.2,
        "train_file": str(world / "rows.jsonl"), "mix_file": str(world / "more.jsonl"),
    }  # fmt: skip
    tokenizer = load_tokenizer(str(world / "model"))
    n_mixed = {}
    for ratio in (0.25, 0.5, 2.0):
        rows, held_out, _ = read_rows(SFTConfig(**cfg, mix_ratio=ratio), tokenizer)
        questions = [tokenizer.decode(prompt) for ((prompt, _, _),) in rows]
        mixed = [text for text in questions if "m" in text.split("user")[-1]]
        n_mixed[ratio] = (len(rows) - len(mixed), len(mixed), len(set(mixed)), len(held_out))
    assert n_mixed == {0.25: (8, 2, 2, 2), 0.5: (8, 4, 3, 2), 2.0: (8, 16, 3, 2)}


def test_label_smoothing_is_bounded():
    needed = ["output_dir=o", "model_name_or_path=m", "train_file=t", "learning_rate=1"]
    with pytest.raises(UserError, match=r"`label_smoothing` must be .* below 0.5, got 0.5"):
        load_config(SFTConfig, [*needed, "label_smoothing=0.5"])
