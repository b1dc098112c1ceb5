"""Test the prompts of phase 1: their order, the examples of the default file, a user's own file."""

from dataclasses import replace

import pytest
import yaml

from rftt import tokens
from rftt.prompts import HOLES
from rftt.run import prompts_file
from rftt.run.contract import breach, clean
from rftt.run.prompts_file import DEFAULT, load_prompts
from rftt.tokens import ACTS, Function
from rftt.types import UserError

PROMPTS = load_prompts()
PARTS = {"wrong": "wrong way", "correct": "right way", "check": "the check"}


@pytest.mark.cases
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


def test_the_solution_so_far_opens_a_reply_that_the_model_can_continue() -> None:
    messages = PROMPTS.ask("next_step", "A?", "One.\nTwo.", continues=True)
    *_, shown, asked, begun = messages
    examples = PROMPTS.acts["next_step"].examples
    assert shown["content"] == f"{examples[-1].so_far}\n{examples[-1].reply}"
    assert asked["role"] == "user"
    assert "One." not in asked["content"]
    assert begun == {"role": "assistant", "content": "One.\nTwo.\n"}
    for act, so_far, can in (("next_step", "", True), ("analysis", "x", True), ("output", "x", 0)):
        messages = PROMPTS.ask(act, "A?", so_far, continues=bool(can))
        assert messages == PROMPTS.ask(act, "A?", so_far)
        assert messages[-1]["role"] == "user"


@pytest.mark.cases
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


@pytest.mark.parametrize("transition", ["root", "clarify", "check"])
def test_an_act_without_a_prompt_is_found_before_a_model_is_loaded(
    tmp_path, monkeypatch, transition: str
) -> None:
    """Each act of phase 1's tree and of a merged row needs a prompt; an act of phase 2 alone none.

    The default file is the one at fault, so it is the one named.
    """
    default, own = tmp_path / "prompts.yaml", tmp_path / "own.yaml"
    texts = yaml.safe_load(DEFAULT.read_text(encoding="utf-8"))
    own.write_text("nothing_yet: nothing", encoding="utf-8")
    monkeypatch.setattr(prompts_file, "DEFAULT", default)
    monkeypatch.setattr(prompts_file, "ACTS", (*ACTS, "recall"))
    monkeypatch.setitem(tokens.FUNCTIONS, "recall", Function("recall a theorem", max_tokens=9))
    default.write_text(yaml.safe_dump(texts), encoding="utf-8")
    load_prompts.__wrapped__()  # the tree never asks for it

    match transition:
        case "root":
            monkeypatch.setitem(tokens.ROOT, "prompted", (*tokens.ROOT["prompted"], "recall"))
        case "clarify":
            clarify = replace(tokens.FUNCTIONS["clarify"], next_in_phase_1=("recall",))
            monkeypatch.setitem(tokens.FUNCTIONS, "clarify", clarify)
        case "check":
            del texts["acts"]["verify"]
            default.write_text(yaml.safe_dump(texts), encoding="utf-8")
    act = "verify" if transition == "check" else "recall"
    words = f"`acts.{act}` must have a system text and an instruction; add them to"
    for path, named in ((None, default), (str(own), own)):
        with pytest.raises(UserError) as error:
            load_prompts.__wrapped__(path)
        assert str(error.value).startswith(f"{named}: {words}")
        assert "\n" not in str(error.value)


def test_a_file_that_is_missing_is_one_line(tmp_path) -> None:
    with pytest.raises(UserError, match="cannot be read"):
        load_prompts(str(tmp_path / "none.yaml"))


def test_the_default_file_belongs_to_the_package() -> None:
    assert DEFAULT.is_file()
