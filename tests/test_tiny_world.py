"""Test the demo world: its gold answers, replies, tokenizer and files."""

from __future__ import annotations

import json
import re
from functools import partial
from pathlib import Path
from random import Random

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rftt.engines.chat import encode_chat
from rftt.engines.templates import holds_control_text
from rftt.graders.math import grade
from rftt.prompts import question_messages
from rftt.run.contract import best_check, breach, clean, leaks, nameable
from rftt.run.data import load_problems
from rftt.tokens import ACTS, OPENERS, add_function_tokens, function_ids, successors
from rftt.types import UserError
from tests.conftest import ROOT, run
from tools import tiny_world as tiny

WORLD = ROOT / "data" / "tiny"
TALES = [tiny.make_tale(Random(seed), set()) for seed in range(300)]


def read(question: str) -> list[int]:
    """The values a question tells of, read from its text alone."""
    start, *told = re.sub(r"\. How many now\?$", "", question).split(", ")
    values = [int(start.split()[2])]
    for words in told:
        verb, amount = words.split()
        value = values[-1]
        if verb in ("finds", "buys", "wins"):
            value += int(amount)
        elif verb in ("sells", "loses", "drops"):
            value -= int(amount)
        elif verb == "halves":
            assert value % 2 == 0
            value //= 2
        else:
            value *= {"doubles": 2, "triples": 3}[verb]
        values.append(value)
    return values


@pytest.mark.oracle
def test_values_follow_from_the_question_alone():
    assert {len(tale.changes) for tale in TALES} == {1, 2, 3, 4}
    for tale in TALES:
        assert read(tale.question) == tale.values


@pytest.mark.invariant
def test_a_tale_stays_in_range_and_its_answer_is_new():
    for tale in TALES:
        verbs = [change.verb.split()[0] for change in tale.changes]
        assert len(set(verbs)) == len(verbs)
        assert all(1 <= value <= tiny.MAX_VALUE for value in tale.values)
        assert tale.values[-1] not in tale.values[:-1]


@pytest.mark.invariant
def test_a_path_keeps_to_the_grammar_and_ends_in_the_gold_answer():
    for seed, tale in enumerate(TALES):
        lines = tiny.write_path(tale, (0, tale.start), None, Random(seed), None)
        for before, line in zip([None, *(line.act for line in lines)], lines, strict=False):
            assert line.act in successors(before, "prompted")
        assert ["\\boxed" in line.text for line in lines] == [False] * (len(lines) - 1) + [True]
        assert grade(tiny.text_of(lines), str(tale.values[-1]), tale.question).correct


@pytest.mark.invariant
def test_every_reply_of_this_world_keeps_its_contract():
    prompts, named = tiny.PROMPTS, 0
    control = partial(holds_control_text, tiny.build_tokenizer(), functional=True)
    for seed, tale in enumerate(TALES):
        rng, question = Random(seed), tale.question
        right = tiny.write_path(tale, (0, tale.start), None, rng, None)
        slip = (rng.randrange(len(tale.changes)), rng.choice(tiny.SLIPS))
        wrong = tiny.text_of(tiny.write_path(tale, (0, tale.start), None, rng, slip))
        so_far = ""
        for line in right:
            assert clean(prompts, line.act, line.text) == line.text
            shown = {"question": question, "so_far": so_far}
            assert not breach(prompts, line.act, line.text, control, **shown)
            so_far = f"{so_far}\n{line.text}".strip()
        check = tiny.write_check(tale, (0, tale.start), slip)
        turn = f"Back to {tale.start}, before {tale.changes[0].verb}."
        for act, text in (("verify", check), ("refine", turn)):
            shown = {"question": question, "so_far": wrong}
            assert not breach(prompts, act, text, control, **shown)
        named += best_check([check], nameable(wrong, so_far, question)) == check
    assert named > 0.9 * len(TALES)


@pytest.mark.oracle
def test_spelled_sums_are_right():
    sums = 0
    for seed, tale in enumerate(TALES):
        text = tiny.text_of(tiny.write_path(tale, (0, tale.start), None, Random(seed), None))
        for a, sign, b, result in re.findall(r"(\d+)([-+*/])(\d+)=(\d+)", text):
            a, b = int(a), int(b)
            assert int(result) == {"+": a + b, "-": a - b, "*": a * b, "/": a // b}[sign]
            sums += 1
    assert sums > 100


def test_a_check_names_the_mistake_and_never_the_answer():
    for seed, tale in enumerate(TALES):
        rng = Random(seed)
        slip = (rng.randrange(len(tale.changes)), rng.choice(tiny.SLIPS))
        wrong = tiny.text_of(tiny.write_path(tale, (0, tale.start), None, rng, slip))
        check = tiny.write_check(tale, (0, tale.start), slip)
        claimed = tale.values[slip[0] + 1] + slip[1]
        assert re.search(rf"not {claimed}\.$", check)
        assert not leaks(check, str(tale.values[-1]), f"{tale.question}\n{wrong}")


def test_terse_acts_name_results_and_the_others_spell_them_out():
    tale = tiny.Tale(
        "Eva", "pens", 19, (tiny.Change("triples them", "*3"), tiny.Change("sells 3", "-3"))
    )
    begin = (0, 19)
    assert tale.question == "Eva has 19 pens, triples them, sells 3. How many now?"
    assert {act: tiny.write_line(act, tale, begin).text for act in ACTS[:5]} == {
        "clarify": "Given: 19 pens. Asked: how many now.",
        "analysis": "triples them gives 19*3=57.",
        "next_step": "triples them: 57.",
        "subquestion": "triples them? 19*3=57.",
        "direct_answer": "57, 54, so \\boxed{54}.",
    }
    assert tiny.write_check(tale, begin, (0, 1)) == "19*3=57, not 58."
    assert tiny.write_check(tale, begin, (1, 1)) == "19*3=57, 57-3 is not 55."


def test_the_base_reads_problems_where_a_bare_question_has_them(tokenizer):
    """Else the warm-up starts from a model that cannot follow a bare question (docs/log.md)."""
    rng, found = Random(0), 0
    pairs = [tiny.make_pair(rng, set()) for _ in range(400)]
    for messages in (pair.messages for pair in pairs if len(pair.messages) == 1):
        question, heading, _ = messages[0]["content"].partition(tiny.SO_FAR)
        bare = encode_chat(tokenizer, question_messages(question))
        found += heading != "" and encode_chat(tokenizer, messages)[: len(bare) - 1] == bare[:-1]
    assert 0.1 < found / len(pairs) < 0.35


# ---- The harder families ----

RIDDLES = [tiny.make_tale(Random(seed), set(), "inverse") for seed in range(300)]


@pytest.mark.oracle
def test_only_the_answer_leads_to_the_end_that_a_riddle_gives():
    for riddle in RIDDLES:
        asked = (
            r"\w+ has some \w+, (.*)\. Now (\d+)\. Between (\d+) and (\d+) at first\. How many\?"
        )
        told, end, low, high = re.fullmatch(asked, riddle.question).groups()
        ends = [read(f"Eva has {start} pens, {told}. How many now?")[-1] for start in range(1, 200)]
        assert [start for start, e in enumerate(ends, 1) if e == int(end)] == [riddle.answer]
        assert int(low) < riddle.answer < int(high)
        assert int(high) - int(low) - 1 == tiny.GUESSES == len(riddle.guesses)
        assert riddle.answer not in riddle.values[1:]


def test_a_long_tale_has_more_changes_than_any_other():
    long = [tiny.make_tale(Random(seed), set(), "long") for seed in range(100)]
    assert {len(tale.changes) for tale in long} == set(range(2, 6))
    assert all(read(tale.question) == tale.values for tale in long)


@pytest.mark.invariant
def test_every_reply_to_a_riddle_keeps_its_contract_and_a_check_names_the_guess():
    prompts, control = tiny.PROMPTS, partial(holds_control_text, tiny.build_tokenizer("inverse"))
    named = 0
    for seed, riddle in enumerate(RIDDLES):
        rng, question, root = Random(seed), riddle.question, (0, riddle.start)
        slip = tiny.make_slip(rng, riddle)
        guess = riddle.start + slip[1]
        wrong = tiny.text_of(tiny.write_path(riddle, root, None, rng, slip))
        check = tiny.write_check(riddle, root, slip)
        after = tiny.write_path(riddle, root, "refine", rng, None)
        shown = {"question": question, "so_far": wrong}
        assert f"\\boxed{{{guess}}}" in wrong
        turn = tiny.write_turn(riddle, root, slip)
        for act, text in (("verify", check), ("refine", turn)):
            assert clean(prompts, act, text) == text
            assert not breach(prompts, act, text, control, **shown)
            shown["so_far"] += f"\n{text}"  # refine reads the check
        assert all(line.act in successors("refine", "learned") for line in after[:1])
        so_far = ""
        for line in tiny.write_path(riddle, root, None, rng, None):
            assert not breach(prompts, line.act, line.text, control, question, so_far)
            so_far = f"{so_far}\n{line.text}".strip()
        assert grade(so_far, str(riddle.answer), question).correct
        named += best_check([check], nameable(wrong, so_far, question)) == check
    assert named > 0.8 * len(RIDDLES)


def test_a_riddle_is_guessed_checked_forwards_and_guessed_again():
    changes = (tiny.Change("doubles them", "*2"), tiny.Change("finds 5", "+5"))
    riddle = tiny.Tale("Eva", "pens", 13, changes, more_than=11)
    told = "Eva has some pens, doubles them, finds 5. Now 31."
    asked = f"{told} Between 11 and 15 at first. How many?"
    assert (riddle.question, riddle.answer) == (asked, 13)
    wrong = (0, -1)
    assert {act: tiny.write_line(act, riddle, (0, 13), wrong).text for act in ACTS[:5]} == {
        "clarify": "Given: 31 pens now. Asked: how many at first.",
        "analysis": "before finds 5: 31-5.",
        "subquestion": "before finds 5? 31-5=26.",
        "next_step": "try \\boxed{12}.",
        "direct_answer": "so \\boxed{12}.",
    }
    assert tiny.write_check(riddle, (0, 13), wrong) == "12*2=24, 24+5=29, not 31."
    assert tiny.write_turn(riddle, (0, 13), wrong) == "Back, 31 is larger."


def test_half_of_the_riddles_in_the_examples_go_on_after_a_check():
    rng = Random(0)
    pairs = [tiny.make_pair(rng, set(), "inverse") for _ in range(600)]
    acts = [p for p in pairs if tiny.SO_FAR in p.messages[-1]["content"]]
    corrected = [p for p in acts if " is larger." in p.messages[-1]["content"]]
    assert 0.3 < len(corrected) / len(acts) < 0.6
    assert not any(pair.sound for pair in corrected)  # the wrong guess is not trained on


# ---- Tokenizer ----


@pytest.fixture(scope="module")
def tokenizer():
    return tiny.build_tokenizer()


@pytest.mark.invariant
def test_any_text_round_trips(tokenizer):
    rng = Random(0)
    texts = ["Grüße, 漢字 \\frac{1}{2}\n\ttabs  and spaces ", "Eva has 7 dogs"]
    pairs = [tiny.make_pair(rng, set()) for _ in range(200)]
    texts += [pair.messages[-1]["content"] + pair.reply for pair in pairs]
    for text in texts:
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_digits_stay_apart_and_phrases_whole(tokenizer):
    assert tokenizer.tokenize("2357") == ["2", "3", "5", "7"]
    question = TALES[0].question
    assert len(tokenizer.encode(question)) < 30
    for act in ACTS:
        prompt = tiny.PROMPTS.ask(act, question, "", {"wrong": "", "correct": "", "check": ""})
        # A role token and one id for each message shown, an end for each reply shown.
        shown = 2 + 5 * len(tiny.PROMPTS.acts[act].examples)
        assert len(encode_chat(tokenizer, prompt)) <= shown + len(tokenizer.encode(question)) + 9


def test_functional_tokens_become_single_ids_that_decode(tokenizer):
    fresh = tiny.build_tokenizer()
    assert len(add_function_tokens(fresh)) == 16
    assert set(function_ids(fresh).open.values()).isdisjoint(range(len(tokenizer)))
    text = f"{OPENERS[0]}Given: 3 pens.</clarify>"
    assert fresh.decode(fresh.encode(text)) == text


# ---- The base ----


@pytest.mark.oracle
def test_orthogonalized_matrices_keep_their_singular_vectors():
    torch.manual_seed(0)
    x = torch.randn(3, 5, 8, dtype=torch.float64)
    for matrices in (x, x.mT):
        u, _, v = torch.linalg.svd(matrices, full_matrices=False)
        values = u.mT @ tiny.orthogonalize(matrices) @ v.mT
        diagonal = values.diagonal(dim1=1, dim2=2)
        assert (values - diagonal.diag_embed()).abs().max() < 1e-12
        assert 0.6 < diagonal.min() <= diagonal.max() < 1.3


@pytest.mark.cases
@pytest.mark.oracle
def test_muon_equals_one_matrix_at_a_time():
    torch.manual_seed(0)
    shapes = [(4, 4), (6, 4), (4, 4), (4, 6)]
    ours, theirs = ([torch.ones(shape) for shape in shapes] for _ in range(2))
    optimizer, averages = tiny.Muon(ours, lr=0.1), [torch.zeros(shape) for shape in shapes]
    for _ in range(3):
        for i, (mine, other) in enumerate(zip(ours, theirs, strict=True)):
            mine.grad = gradient = torch.randn_like(mine)
            averages[i] = 0.95 * averages[i] + 0.05 * gradient
            update = tiny.orthogonalize((0.05 * gradient + 0.95 * averages[i])[None])[0]
            scale = max(1.0, len(other) / other.shape[1]) ** 0.5
            theirs[i] = other * (1 - 0.1 * 0.01) - 0.1 * scale * update
        optimizer.step()
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other)


@pytest.mark.cases
@pytest.mark.long
def test_the_shipped_base_is_one_that_retraining_gives(tmp_path):
    """Accuracy of direct answers and agreement with the files; weights depend on the CPU."""
    tiny.main(tiny.TinyConfig(output_dir=str(tmp_path)))
    for name in ("train", "test", "guard"):
        assert (tmp_path / f"{name}.jsonl").read_bytes() == (WORLD / f"{name}.jsonl").read_bytes()
    accuracy = {}
    for folder in (WORLD, tmp_path):
        out = tmp_path / f"eval-{folder.name}"
        run(
            "python", "evaluate.py", "configs/tiny/evaluate.yaml", f"output_dir={out}",
            f"model_name_or_path={folder / 'base'}", f"eval_file={WORLD / 'test.jsonl'}",
            "num_samples=0", "simulations=[]", "max_problems=200",
        )  # fmt: skip
        accuracy[folder] = json.loads((out / "eval" / "summary.json").read_text())["greedy"]["mean"]
    assert 0.2 < accuracy[WORLD] < 0.6  # it leaves room for the warm-up
    assert abs(accuracy[tmp_path] - accuracy[WORLD]) < 0.25


# ---- Files ----


@pytest.fixture(scope="module")
def worlds(tmp_path_factory):
    folders = [tmp_path_factory.mktemp(name) for name in ("one", "again", "other")]
    for folder, seed in zip(folders, (0, 0, 1), strict=True):
        tiny.main(
            tiny.TinyConfig(
                output_dir=str(folder), seed=seed, train_steps=3, n_train=40, n_test=30, n_guard=10
            )
        )
    return folders


@pytest.mark.invariant
def test_one_seed_gives_one_world(worlds):
    files = [sorted(p.relative_to(w) for p in w.rglob("*") if p.is_file()) for w in worlds]
    assert files[0] == files[1]
    assert [(worlds[0] / f).read_bytes() for f in files[0]] == [
        (worlds[1] / f).read_bytes() for f in files[0]
    ]
    for name in ("train.jsonl", "base/model.safetensors"):
        assert (worlds[0] / name).read_bytes() != (worlds[2] / name).read_bytes()


def test_a_world_is_not_overwritten_by_another(worlds):
    before = (worlds[0] / "train.jsonl").read_bytes()
    with pytest.raises(UserError, match="base already exists; remove it"):
        tiny.main(tiny.TinyConfig(output_dir=str(worlds[0]), seed=1, train_steps=1))
    assert (worlds[0] / "train.jsonl").read_bytes() == before


def test_problem_files_are_readable_and_do_not_overlap(worlds):
    train, test = (load_problems(str(worlds[0] / f"{name}.jsonl")) for name in ("train", "test"))
    assert (len(train), len(test)) == (40, 30)
    assert not {p.question for p in train} & {p.question for p in test}
    for problem in train + test:
        values = read(problem.question)
        assert (problem.answer, problem.level) == (str(values[-1]), str(len(values) - 1))
    assert len(load_problems(str(worlds[0] / "guard.jsonl"))) == 10


def test_base_opens_like_any_other_model(worlds):
    folder = worlds[0] / "base"
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(folder),
        AutoTokenizer.from_pretrained(folder),
    )
    assert model.config.model_type == "qwen2"
    assert model.get_input_embeddings().num_embeddings == len(tokenizer)
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    messages = tiny.PROMPTS.ask("analysis", TALES[0].question, "")
    assert encode_chat(tokenizer, messages) == encode_chat(tiny.build_tokenizer(), messages)
    assert json.loads(Path(folder, "config.json").read_text())["vocab_size"] == len(tokenizer)


def test_held_out_questions_are_not_trained_on():
    seen = {
        tiny.make_pair(Random(seed), set())
        .messages[-1]["content"]
        .split("\n")[0]
        .removeprefix("Problem: ")
        for seed in range(9)
    }
    for seed in range(9):
        message = tiny.make_pair(Random(seed), seen).messages[-1]["content"]
        message = message.removeprefix("Problem: ")
        assert message.split("\n")[0] not in seen or message.startswith("Which")
