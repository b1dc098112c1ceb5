"""Test the prompts of phase 1: their order, the examples of the default file, a user's own file."""

import pytest

from rftt.contract import breach, clean
from rftt.prompts import HOLES
from rftt.run.prompts_file import DEFAULT, load_prompts
from rftt.tokens import ACTS
from rftt.types import UserError

PROMPTS = load_prompts()
PARTS = {"wrong": "wrong way", "correct": "right way", "check": "the check"}


@pytest.mark.parametrize("act", ACTS)
def test_messages_are_the_role_the_examples_and_the_problem(act: str) -> None:
    first, *turns, last = PROMPTS.ask(act, "Q {so_far}?", "so far", PARTS)
    assert first == {"role": "system", "content": PROMPTS.acts[act].system}
    assert [turn["role"] for turn in turns] == ["user", "assistant"] * (len(turns) // 2)
    assert len(turns) == 2 * len(PROMPTS.acts[act].examples) > 0
    text = last["content"]
    shown = ["Q {so_far}?", "so far"]  # a question that looks like a template stays as it is
    shown += [PARTS[hole] for hole in ("wrong", "correct", "check") if hole in HOLES.get(act, ())]
    positions = [text.index(part) for part in shown]
    assert positions == sorted(positions)
    assert text.endswith(PROMPTS.acts[act].instruction)


def test_all_requests_of_an_act_begin_alike() -> None:
    one, other = (PROMPTS.ask("next_step", question, "") for question in ("A?", "B?"))
    assert one[:-1] == other[:-1]
    assert PROMPTS.nothing_yet in one[-1]["content"]


@pytest.mark.invariant
@pytest.mark.parametrize("act", ACTS)
def test_every_example_keeps_the_contract_that_it_teaches(act: str) -> None:
    prompt = PROMPTS.acts[act]
    for example in prompt.examples:
        shown = [e for e in prompt.examples if e.question != example.question]
        others = PROMPTS.acts | {act: prompt.model_copy(update={"examples": shown})}
        prompts = PROMPTS.model_copy(update={"acts": others})
        so_far = "\n".join(filter(None, (example.so_far, example.wrong, example.check)))
        assert clean(prompts, act, example.reply) == example.reply
        shown = {"question": example.question, "so_far": so_far}
        assert breach(prompts, act, example.reply, lambda _: False, **shown) is None


def test_a_file_replaces_only_what_it_names(tmp_path) -> None:
    own = tmp_path / "own.yaml"
    own.write_text("acts:\n  analysis:\n    instruction: Erkläre.\n    examples: []\n", "utf-8")
    prompts = load_prompts(str(own))
    assert prompts.acts["analysis"].instruction == "Erkläre."
    assert prompts.acts["analysis"].examples == []
    assert prompts.acts["analysis"].system == PROMPTS.acts["analysis"].system
    assert prompts.acts["verify"] == PROMPTS.acts["verify"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("acts: {think: {system: a, instruction: b}}", "`acts.think` is not an act"),
        ("acts: {verify: {role: a}}", "`acts.verify.role` is not valid"),
        ("acts: {verify: {system: 3}}", "`acts.verify.system` is not valid"),
        ("templates: {act: '{question} {instruction}'}", "must contain {instruction}, {question}"),
        ("templates: {act: '{question} {so_far} {instruction} {x}'}", "no other placeholder"),
        ("templates: {plan: x}", "`templates.plan` is not a template"),
        ("acts: {refine: {examples: [{question: q, reply: r}]}}", "`acts.refine.examples.0` must"),
        ("nothing_yet: <verify>", "functional token <verify>"),
        ("nothing_yet: ''", "`nothing_yet` is not valid"),
        ("- a list", "must be a mapping"),
        ("a: [", "is not YAML"),
    ],
)
def test_a_mistake_in_a_file_is_one_line_with_its_key(tmp_path, text: str, words: str) -> None:
    own = tmp_path / "own.yaml"
    own.write_text(text, encoding="utf-8")
    with pytest.raises(UserError) as error:
        load_prompts(str(own))
    assert words in str(error.value)
    assert str(own) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_file_that_is_missing_is_one_line(tmp_path) -> None:
    with pytest.raises(UserError, match="cannot be read"):
        load_prompts(str(tmp_path / "none.yaml"))


def test_the_default_file_belongs_to_the_package() -> None:
    assert DEFAULT.is_file()
