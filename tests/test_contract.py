"""Test the contract of each act: cleaning, every reason of a refusal, the choice of a check."""

import doctest
import re
from functools import partial
from random import Random

import pytest

from rftt.engines.templates import holds_control_text
from rftt.run import contract
from rftt.run.contract import (
    CALCULATION,
    best_check,
    breach,
    clean,
    fresh,
    leaks,
    miscalculation,
    misquotes,
    nameable,
    trimmed,
)
from rftt.run.prompts_file import load_prompts
from rftt.tokens import ACTS
from tools.tiny_world import build_tokenizer

PROMPTS = load_prompts()
CONTROL = partial(holds_control_text, build_tokenizer(), functional=True)
QUESTION = "Eva has 19 pens, triples them and gives 3 away. How many pens has she now?"


@pytest.mark.parametrize(
    ("act", "reply", "cleaned"),
    [
        ("clarify", " One. Two? Three! Four. ", "One. Two? Three!"),
        ("clarify", "It costs 3.5 each. We buy 2.", "It costs 3.5 each. We buy 2."),
        ("subquestion", "\nHow many? 12.\nThen I go on.", "How many? 12."),
        ("next_step", "a = 1.\nb = 2. c.", "a = 1.\nb = 2. c."),
        ("next_step", "a = 1.\nb = 2. c. d.", "a = 1. b = 2. c."),
        ("verify", "Wait, not 38. One more. And one more.", "Wait, not 38. One more."),
        ("refine", "Let me go back. Then on.", "Let me go back."),
        ("next_step", "**Step 3:** 19 * 3 = 57.\n\nStep 4: ...", "19 * 3 = 57."),
        ("next_step", "Sure, next step: 19 * 3 = 57.", "19 * 3 = 57."),
        ("next_step", "### Answer: 57 pens.", "57 pens."),
        ("next_step", "Steps are fine. Answers, too.", "Steps are fine. Answers, too."),
        ("direct_answer", "It is \\boxed{54}. I hope this helps!", "It is \\boxed{54}."),
        ("direct_answer", "First 57.\n\nThen \\boxed{54}", "First 57.\n\nThen \\boxed{54}"),
        ("verify", "Wait, not 58.\n\nThe right steps instead:\n57", "Wait, not 58."),
        ("refine", "", ""),
    ],
)
def test_clean(act: str, reply: str, cleaned: str) -> None:
    assert clean(PROMPTS, act, reply) == cleaned


GOOD = {
    "clarify": "Eva has 19 pens, triples them and gives 3 away. We look for the number of pens.",
    "analysis": "First the pens are multiplied, then some are taken away.",
    "subquestion": "How many pens are three times 19 pens? They are 19 * 3 = 57 pens.",
    "next_step": "Eva triples her pens, so she has 19 * 3 = 57 pens.",
    "direct_answer": "Eva has 57 pens and gives 3 away, so she has \\boxed{54} pens.",
    "verify": "Wait, I wrote 19 * 2 = 38, but she triples her pens.",
    "refine": "Let me go back to the 19 pens and triple them.",
    "output": "The final answer is \\boxed{54}.",
}


@pytest.mark.parametrize("act", ACTS)
def test_good_replies_keep_their_contract(act: str) -> None:
    so_far = "She has 19 * 2 = 38 pens."
    assert breach(PROMPTS, act, GOOD[act], CONTROL, question=QUESTION, so_far=so_far) is None


@pytest.mark.cases
@pytest.mark.parametrize(
    ("act", "text", "reason"),
    [
        ("next_step", "", "empty"),
        ("next_step", "So we have the following:", "cut_off"),
        ("next_step", "So she has \\boxed{57", "cut_off"),
        ("next_step", "I'm sorry, this is unclear.", "apology"),
        ("next_step", "I cannot solve it.", "apology"),
        ("next_step", "Let me know if it helps.", "addresses_user"),
        ("next_step", "In your problem she has 57.", "addresses_user"),
        ("verify", "Continuation A is wrong, but B is not.", "prompt_talk"),
        ("next_step", "The solution so far is 57.", "prompt_talk"),
        ("next_step", "<|end|> 57 pens.", "control_text"),
        ("next_step", "</next_step><output> 57", "control_text"),
        ("next_step", "Write only the next small step, in one sentence.", "repeats_prompt"),
        ("next_step", "There are 4 trays and each tray holds 12 rolls, so.", "repeats_prompt"),
        ("next_step", "Eva has 57 tickets.", "borrows_example"),
        ("next_step", "We BEGIN!", "repeats_step"),
        ("clarify", "Eva ends with 19 * 3 = 57 pens.", "calculates"),
        ("clarify", "Eva has 19 pens and gives 3 away, which leaves 57.", "wrong_numbers"),
        ("clarify", "Eva has 19 pens.", "wrong_numbers"),
        ("clarify", "Eva has 19 pens, so 3 are given away.", "concludes"),
        ("analysis", "Eva gives 3 of the pens away.", "wrong_numbers"),
        ("verify", "Wait, I wrote 19 * 2, but she has 57 then.", "wrong_numbers"),
        ("next_step", "Eva triples her pens.", "calculates_nothing"),
        ("subquestion", "How many pens has she? She triples them.", "calculates_nothing"),
        ("clarify", "The answer is to be found.", "states_answer"),
        ("analysis", "She has 19 * 3 = 57 pens.", "calculates"),
        ("analysis", "She has \\boxed{54} pens.", "states_answer"),
        ("subquestion", "She has 57 pens.", "asks_nothing"),
        ("subquestion", "How many pens has she?", "answers_nothing"),
        ("direct_answer", "\\boxed{54}. That was easy.", "no_box"),
        ("direct_answer", "She has 54 pens.", "no_box"),
        ("verify", "Wait, I wrote 19 * 2 = 38.", "explains_nothing"),
        ("verify", "Wait, not 38, the answer is 54.", "states_answer"),
        ("refine", "Let me use 19 * 3 = 57.", "calculates"),
    ],
)
def test_each_breach_has_its_reason(act: str, text: str, reason: str) -> None:
    assert breach(PROMPTS, act, text, CONTROL, question=QUESTION, so_far="We begin.") == reason


def test_a_reply_loses_the_sentences_that_the_solution_contains() -> None:
    so_far = "She has 57 pens.\nNow 3 are given away."
    assert fresh("She has 57 pens! So 54 are left.", so_far) == "So 54 are left."
    assert fresh("So 54\nare left.", so_far) == "So 54\nare left."
    assert fresh("Now 3 are given away.", so_far) == "Now 3 are given away."


def test_words_of_the_problem_are_never_borrowed_or_repeated() -> None:
    question = "A baker has 4 trays of 12 rolls and sells 30 of the rolls. What is left?"
    text = "A baker has 4 trays of 12 rolls and sells 30 of the rolls."
    assert breach(PROMPTS, "clarify", text, CONTROL, question=question) is None


def test_a_phrase_counts_only_as_whole_words() -> None:
    text = "Provide youth with examples: 57 = 57 pens."  # provided, you, example
    assert breach(PROMPTS, "next_step", text, CONTROL, question=QUESTION) is None


@pytest.mark.parametrize(
    ("text", "answer", "known", "leaked"),
    [
        ("It is 54.", "54", "", True),
        ("It is 54.", "54", "He has 54 pens.", False),
        ("It is 154 or 5.4 or 54.5.", "54", "", False),
        ("It is 4, not 5.", "5", "", True),
    ],
)
def test_leaks(text: str, answer: str, known: str, leaked: bool) -> None:
    assert leaks(text, answer, known) is leaked


@pytest.mark.oracle
def test_only_what_the_wrong_steps_alone_contain_can_be_named() -> None:
    wrong, right = "19 * 2 = 38 pens, then 38 - 3 = 35.", "19 * 3 = 57 pens, then 57 - 3 = 54."
    assert nameable(wrong, right, QUESTION) == {
        *("19*2=38", "19*2", "2", "38", "38-3=35", "38-3", "35")
    }
    assert nameable("She has 57 pens.", right, QUESTION) == set()
    assert nameable("She has 57 - 3 pens.", right, QUESTION) == set()  # its result is not given
    assert nameable("7 * 9 = 63 cans", r"7 \times 9 = \boxed{63}", "") == set()
    assert nameable("She has 1,200 pens.", right, QUESTION) == {"1,200"}


@pytest.mark.cases
def test_the_best_check_quotes_the_mistake_first() -> None:
    mistakes = nameable("19 * 2 = 38, 38 - 3 = 35", "19 * 3 = 57, 57 - 3 = 54", QUESTION)
    blind = "Wait, I wrote 19 * 3 = 57, but it is more."
    late = "Wait, I wrote 19 * 3 = 57, but then 19 * 2 = 38 is less than three times 19."
    good = "Wait, I wrote 19 * 2 = 38, but she triples them, so there are more than that."
    assert best_check([blind], mistakes) is None
    assert best_check([blind, late], mistakes) == late
    assert best_check([late, f"{good} Really.", good, blind], mistakes) == good
    assert best_check([], mistakes) is None


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("She has 40 + 50 - 4 = 96 points.", "40 + 50 - 4 = 96"),
        ("19 / 9 = 2 loads", "19 / 9 = 2"),
        ("2 + 3 = 5 * 2 = 10.", "2 + 3 = 5 * 2 = 10"),
        ("8 * $3 = $24, then 24 + 6 = 31", "24 + 6 = 31"),
        ("1,200 * 3 = 3,600, 45 / 2 = 22.5, 10 - 12 = -2, 15 ÷ 3 = 5, 5 × 3 = 15", None),
        ("so 32 - 42 = -20 pieces", "32 - 42 = -20"),
        ("(2 + 3) * 4 = 20, 2 * (3 + 4) = 14, 5 x 3 - 2 = 13, \\frac{80}{2} = 40", None),
        ("10% of 50 = 5, x = 3, 5 = 5, half of 10 = 5", None),
        ("1 + " * 100 + "1 = 5", None),  # longer than any that is checked
    ],
)
def test_a_wrong_calculation_is_found_where_it_stands_for_itself(text: str, wrong: str) -> None:
    assert miscalculation(text) == wrong


def test_a_check_that_makes_the_mistake_again_explains_nothing() -> None:
    mistakes = nameable("43 - 44 = 9 problems left", "43 + 12 = 55, 55 - 44 = 11", "43, 12, 44")
    again = "Wait, I wrote 43 - 44, but she has done 44, so 43 - 44 = 9 are left."
    assert best_check([again], mistakes) is None
    last = "Wait, I wrote 43 math problems, but she has done 44. So there are 43 - 44 = 9 left."
    assert best_check([last], mistakes) is None
    assert best_check([again, "Wait, I wrote 43 - 44 = 9, but 12 more are given."], mistakes)
    assert best_check(["43 and 12 is 55, not 9."], mistakes)


def test_what_a_check_quotes_stands_in_the_wrong_steps() -> None:
    verify, wrong = PROMPTS.acts["verify"], "They have 32 - 42 = -20 pieces, 2 * $3 = $6."
    for text, found in (
        ("Wait, I wrote 32 - 42 = -20, but they combine them.", False),
        ("Wait, I wrote 2*3=6 dollars, but it is more.", False),
        ("Wait, I wrote 32 + 42 = 74, but they combine them.", True),
        ("Wait, I wrote 9 shirts, but there are more.", True),
        ("Wait, 32 + 42 = 74, but I took the difference.", False),  # nothing is quoted
    ):
        assert misquotes(verify, text, wrong) is found


def test_a_reply_is_cut_where_it_breaks_its_contract() -> None:
    def refused(text: str) -> str | None:
        return "leaks" if "54" in text else None

    assert trimmed("Not 38.\nNot 35.", refused) == ("Not 38.\nNot 35.", None)
    assert trimmed("Not 38. Not 35. So 54. Bye.", refused) == ("Not 38. Not 35.", None)
    assert trimmed("It is 54. Bye.", refused) == ("It is 54. Bye.", "leaks")
    assert trimmed("Not 38. Not 3", refused, whole=False) == ("Not 38.", None)
    assert trimmed("Not 3", refused, whole=False) == ("Not 3", "cut_off")
    assert trimmed("A. B. C. D. E. 54.", refused)[0] == "A. B. C. D."


@pytest.mark.oracle
def test_the_linear_expression_finds_the_calculations_of_the_plain_one() -> None:
    plain = re.compile(r"\d[\d.,]*(?:\s*[-+*/×÷=]\s*\$?\d[\d.,]*)+")
    rng = Random(0)
    for _ in range(5000):
        text = "".join(rng.choices("12.,+=$ a", k=rng.randrange(1, 16)))
        assert [found.strip(".,") for found in CALCULATION.findall(text)] == [
            found.strip(".,") for found in plain.findall(text)
        ], text


@pytest.mark.oracle
def test_every_example_in_a_docstring_holds() -> None:
    result = doctest.testmod(contract)
    assert result.attempted > 0
    assert result.failed == 0
