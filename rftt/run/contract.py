"""The contract of each act: what a reply of phase 1 must be, checked before it becomes a step.

A small instruct model apologises, solves the whole problem when it is asked to restate it, or
repeats its instruction. Rows made of such replies teach exactly that. So every reply is cleaned
(`clean`), checked (`breach`), and counted under the reason for which it is rejected. The form of a
good reply comes from the examples in the prompt. Its truth comes from choice: of several checks
`best_check` takes one that names what only the wrong steps contain.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import cache

from rftt.graders.math import same_answer
from rftt.prompts import ActPrompt, Prompts, sentences
from rftt.tokens import FUNCTIONS

RUN = 8
"""Consecutive words in common with an instruction or an example that count as a repetition."""
NUMBER = re.compile(r"\d+(?:[.,]\d+)*")
CALCULATION = re.compile(r"(?<![\d.,])[.,]*+\d[\d.,]*+(?:\s*+[-+*/×÷=]\s*+-?\$?\d[\d.,]*+)+")
"""Numbers joined by signs. It reads each number once, so that long digits take linear time."""
OPEN = tuple("()[]{}+-*/×÷x^%\\=")
"""Signs beside a calculation that make it a part of a larger one, such as (2 + 3) * 4 = 20."""
MAX_CALCULATION = 100
"""Characters of the longest calculation that is checked."""
QUOTED = re.compile(f"{CALCULATION.pattern}|{NUMBER.pattern}")
MIN_REASON = 5
"""Words of the shortest reason that follows a quoted calculation."""
MAX_TRIMMED = 4
"""Sentences of the longest beginning of a refused reply that may be kept."""


# ---- Clean: forms that cost nothing to mend ----


def clean(prompts: Prompts, act: str, text: str) -> str:
    """Return a reply without labels, emphasis and what lies beyond the act's limits.

    The limits are in tokens.py (arXiv 2502.13389). A step and a check end with their first
    paragraph, a direct answer with the sentence that contains its last box.
    """
    text = text.replace("**", "").strip()
    text = _label(tuple(prompts.labels)).sub("", text).strip()
    function = FUNCTIONS[act]
    if function.one_line:
        text = text.split("\n", 1)[0].strip()
    if act in ("next_step", "verify"):
        text = text.split("\n\n", 1)[0].strip()
    parts = sentences(text)
    if function.max_sentences and len(parts) > function.max_sentences:
        text = " ".join(parts[: function.max_sentences])
    if act == "direct_answer" and (box := text.rfind("\\boxed{")) >= 0:
        text = text[:box] + sentences(text[box:])[0]
    return text


@cache
def _label(labels: tuple[str, ...]) -> re.Pattern[str]:
    """Match "Step 3:", "### Answer", "Sure," where a line begins."""
    names = "|".join(re.escape(label) for label in sorted(labels, key=len, reverse=True))
    return re.compile(rf"^[ \t]*+#*+[ \t]*+(?:(?:{names})(?: \d+)?[:.,!][ \t]*)+", re.I | re.M)


# ---- Check ----


def breach(
    prompts: Prompts,
    act: str,
    text: str,
    control: Callable[[str], bool],
    question: str,
    so_far: str = "",
) -> str | None:
    """Return the reason to reject a clean reply, or None if it keeps its act's contract.

    `control` finds control text, `so_far` is all that the model was shown of its solution.
    """
    prompt = prompts.acts[act]
    if not text:
        return "empty"
    if text[-1] in ":,{" or text.count("{") != text.count("}"):
        return "cut_off"
    if control(text):
        return "control_text"
    for reason, phrases in (prompts.refuse | prompt.refuse).items():
        if _any_of(tuple(phrases)).search(text):
            return reason
    known = f"{question}\n{so_far}"
    if _repeats(prompt, text, known):
        return "repeats_prompt"
    if not _new_sentences(text, so_far):
        return "repeats_step"
    if _borrowed(prompt, text, known):
        return "borrows_example"
    if reason := _breach_of_form(act, text):
        return reason
    for reason, phrases in prompt.require.items():
        if phrases and not _any_of(tuple(phrases)).search(text):
            return reason
    return None if _keeps_to_numbers(prompt, text, question, known) else "wrong_numbers"


def _keeps_to_numbers(prompt: ActPrompt, text: str, question: str, known: str) -> bool:
    """Return whether `text` contains only, or all, the numbers that its act may (prompts.yaml)."""
    said = set(NUMBER.findall(text))
    match prompt.numbers:
        case "none":
            return not said
        case "given":
            return said == set(NUMBER.findall(question))
        case "known":
            return said <= set(NUMBER.findall(known))
        case "any":
            return True


def _breach_of_form(act: str, text: str) -> str | None:
    """Check what only one act requires."""
    match act:
        case "subquestion":
            _, mark, answer = text.partition("?")
            if not mark:
                return "asks_nothing"
            if not re.search(r"\w", answer):
                return "answers_nothing"
        case "direct_answer" | "output" if "\\boxed{" not in sentences(text)[-1]:
            return "no_box"
    return None


def trimmed(
    text: str, refused: Callable[[str], str | None], *, whole: bool = True
) -> tuple[str, str | None]:
    """Return the longest beginning of a reply, in sentences, that is not rejected, and None.

    A model that has done what it was asked often goes on: to a calculation, or to the answer. If
    every beginning is rejected, return the reply and its reason. A reply that ran into its limit of
    tokens is not `whole`, so that its last sentence does not count.
    """
    reason = refused(text) if whole else "cut_off"
    if reason is None:
        return text, None
    parts = sentences(text)
    for n in range(min(len(parts) - 1, MAX_TRIMMED), 0, -1):
        beginning = " ".join(parts[:n])
        if refused(beginning) is None:
            return beginning, None
    return text, reason


def fresh(text: str, so_far: str) -> str:
    """Return a reply without the sentences that the solution contains already.

    A small model repeats a step before it goes on. A reply that says nothing new stays as it is.
    """
    new = _new_sentences(text, so_far)
    return " ".join(new) if 0 < len(new) < len(sentences(text)) else text


def _new_sentences(text: str, so_far: str) -> list[str]:
    known = {_words(part) for line in so_far.split("\n") for part in sentences(line)}
    return [part for part in sentences(text) if _words(part) not in known]


@cache
def _any_of(phrases: tuple[str, ...]) -> re.Pattern[str]:
    """Match any of `phrases`; letters and digits at its ends are the ends of words."""
    patterns = []
    for phrase in phrases:
        before = r"(?<!\w)" if phrase[0].isalnum() else ""
        after = r"(?!\w)" if phrase[-1].isalnum() else ""
        patterns.append(before + re.escape(phrase) + after)
    return re.compile("|".join(patterns) or r"(?!)", re.I)


def _words(text: str) -> tuple[str, ...]:
    return tuple(re.findall(r"\w+", text.lower()))


def _runs(words: Sequence[str]) -> set[tuple[str, ...]]:
    return {tuple(words[i : i + RUN]) for i in range(len(words) - RUN + 1)}


def _repeats(prompt: ActPrompt, text: str, known: str) -> bool:
    """Return whether `text` contains words in a row of the prompt that the problem does not."""
    own = _runs(_words(text)) - _runs(_words(known))
    shown = [prompt.system, prompt.instruction]
    for example in prompt.examples:
        shown += [example.question, example.reply]
    return any(own & _runs(_words(part)) or part.lower() in text.lower() for part in shown)


def _borrowed(prompt: ActPrompt, text: str, known: str) -> set[str]:
    """Return the words of `text` that come from the questions of the examples alone.

    A small model puts the train of an example into another problem. Short words are common ones.
    """
    shown = " ".join(example.question for example in prompt.examples)
    foreign = {word for word in _words(shown) if len(word) >= 5}
    return foreign & set(_words(text)) - set(_words(f"{known} {prompt.system}"))


# ---- Choose among paths and checks ----


def miscalculation(text: str) -> str | None:
    """Return the first calculation of numbers whose stated result is wrong, or None.

    >>> miscalculation("They pay 8 * 3 + 2 * 3 = 24 + 6 = 30 dollars, 30 / 4 = 7 each.")
    '30 / 4 = 7'
    """
    for found in CALCULATION.finditer(text):
        before, after = text[: found.start()][-2:].strip(), text[found.end() :][:2].strip()
        calculation = found[0].rstrip(".,")
        first, *others = calculation.split("=")
        if before.endswith(OPEN) or after.startswith(OPEN) or first.strip().isdecimal():
            continue
        if len(calculation) > MAX_CALCULATION:
            continue
        if not all(same_answer(first, other) for other in others):
            return calculation
    return None


def mentions(text: str, answer: str) -> bool:
    """Return whether `answer` stands alone in `text`, as text: 17 or 7.5 do not mention 7."""
    pattern = rf"(?<![\w.]){re.escape(answer.strip())}(?![\w]|\.\d)"
    return re.search(pattern, text) is not None


def leaks(text: str, answer: str, known: str) -> bool:
    """Return whether `text` states a gold answer that `known` (what precedes it) does not."""
    return mentions(text, answer) and not mentions(known, answer)


def misquotes(prompt: ActPrompt, text: str, written: str) -> bool:
    """Return whether `text` quotes a number or calculation that the steps `written` lack.

    The quotation follows one of the prompt's phrases `quotes`, such as "I wrote".
    """
    said = _any_of(tuple(prompt.quotes)).search(text)
    quoted = QUOTED.search(text, said.end()) if said else None
    return quoted is not None and not _written(quoted[0]) <= _written(written)


def nameable(wrong: str, correct: str, known: str) -> set[str]:
    """Return the numbers and calculations that only the wrong steps contain.

    A calculation whose result the right steps contain is not a mistake.

    >>> sorted(nameable("48 + 30 = 78 rolls", "48 - 30 = 18 rolls", "30 of 48 rolls"))
    ['48+30', '48+30=78', '78']
    """
    right = _things(correct)
    found = {thing for thing in _written(wrong) if thing.rpartition("=")[2] not in right}
    return _with_sums(found) - right - _things(known)


def _things(text: str) -> set[str]:
    """Return the numbers and calculations of a text, these with and without their results."""
    return _with_sums(_written(text))


def _written(text: str) -> set[str]:
    text = text.replace("\\boxed{", "").replace("\\times", "*")
    return {_compact(found) for found in CALCULATION.findall(text) + NUMBER.findall(text)}


def _compact(thing: str) -> str:
    """Return a number or calculation as texts are compared: without blanks and dollar signs."""
    return re.sub(r"[\s$]", "", thing).strip(".,")


def _with_sums(things: set[str]) -> set[str]:
    return things | {thing.split("=")[0] for thing in things}


def best_check(checks: Sequence[str], mistakes: set[str]) -> str | None:
    """Return the shortest check that names a mistake, best as the first that it quotes.

    None if no check names one: a model that compares a wrong with a right solution often finds
    fault with what both contain. A check that ends with a wrong calculation, or goes on with
    another mistake, explains nothing.
    """
    named = [check for check in checks if _names_one(check, mistakes)]

    def rank(check: str) -> tuple[bool, int]:
        quoted = CALCULATION.search(check)
        return bool(quoted and _things(quoted[0]) & mistakes), -len(check)

    return max(named, key=rank, default=None)


def _names_one(check: str, mistakes: set[str]) -> bool:
    """Return whether a mistake is quoted and a reason follows that calculates none."""
    for quoted in QUOTED.finditer(check):
        if _things(quoted[0]) & mistakes:
            reason = check[quoted.end() :]
            whole = _compact(quoted[0])
            if "=" in whole and whole in mistakes and len(_words(reason)) < MIN_REASON:
                return False  # it is not quoted but made again
            calculated = " ".join(CALCULATION.findall(reason))
            return not _things(calculated) & mistakes
    return False
