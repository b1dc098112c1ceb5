"""The prompts: a bare question, and phase 1's instruction for each act.

In phase 1 an act is an instruction to an ordinary instruct model; tokens.py holds its limits.
"""

from __future__ import annotations

import re

from rftt.tokens import FUNCTIONS

Messages = list[dict[str, str]]

INSTRUCTIONS: dict[str, str] = {
    "clarify": "Restate the problem in your own words: what is given and what is asked. "
    "Use at most three sentences and do not solve it.",
    "analysis": "Analyse what is known so far: which quantities and relations lead towards the "
    "answer. Do not give the final answer yet.",
    "next_step": "Write only the next step of the solution. If it completes the solution, state "
    "the final answer in \\boxed{}.",
    "subquestion": "Ask the one sub-question that helps most now and answer it, on a single line.",
    "direct_answer": "Finish the solution from here and state the final answer in \\boxed{}.",
    "verify": "Say where continuation A goes wrong, comparing it with the similar steps of "
    "B. Write as if checking your own work: do not mention A or B, and do not give the final "
    "answer.",
    "refine": "The check above found a mistake. Say in one sentence from where the solution "
    "must be redone, without giving the final answer.",
    "output": "State the final answer in \\boxed{}.",
}
"""Phase 1: what the instruct model is asked to do, act by act."""


def question_messages(question: str, system_prompt: str | None = None) -> Messages:
    """Return the conversation of SFT, RL and evaluation; phase 1 has no system prompt."""
    system = [{"role": "system", "content": system_prompt}] if system_prompt else []
    return [*system, {"role": "user", "content": question}]


def ask(act: str, question: str, so_far: str) -> Messages:
    """Return messages that ask for one act as the continuation of the solution `so_far`.

    The instruction comes last, so that all acts of one node share a cached prefix.
    """
    return _user(question, f"Solution so far:\n{so_far}", INSTRUCTIONS[act])


def ask_verify(question: str, so_far: str, wrong: str, correct: str) -> Messages:
    """Return messages for cross verification: where does the wrong continuation err?"""
    return _user(
        question,
        f"Solution so far:\n{so_far}",
        f"Continuation A, which ends in a wrong answer:\n{wrong}",
        f"Continuation B, which ends in the right answer:\n{correct}",
        INSTRUCTIONS["verify"],
    )


def ask_refine(question: str, so_far: str, check: str) -> Messages:
    """Return messages that ask for the way back from a found mistake."""
    return _user(
        question, f"Solution so far:\n{so_far}", f"Check:\n{check}", INSTRUCTIONS["refine"]
    )


def _user(*parts: str) -> Messages:
    return [{"role": "user", "content": "\n\n".join(parts)}]


def clip_reply(act: str, text: str) -> str:
    """Apply the act's limits on lines and sentences to a reply (arXiv 2502.13389)."""
    function, text = FUNCTIONS[act], text.strip()
    if function.one_line:
        text = text.split("\n", 1)[0].strip()
    if function.max_sentences:
        text = " ".join(sentences(text)[: function.max_sentences])
    return text


def sentences(text: str) -> list[str]:
    """Return the sentences of `text`; a decimal point does not end one."""
    return [part for part in re.split(r"(?<=[.!?])\s+", text.strip()) if part]
