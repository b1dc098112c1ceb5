"""The prompts: a bare question, and phase 1's messages for each act.

In phase 1 an act is an instruction to an ordinary instruct model, shown to it on a few examples.
The texts are in prompts.yaml; run/prompts_file.py reads it and the user's `prompts_file`, which
replaces any part of it. run/contract.py checks the replies.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, StringConstraints

Messages = list[dict[str, str]]
Text = Annotated[str, StringConstraints(strict=True, min_length=1)]
Reasons = dict[str, list[Text]]
"""Reason of a refusal -> phrases."""

HOLES = {
    "act": {"question", "so_far", "instruction"},
    "verify": {"question", "so_far", "wrong", "correct", "instruction"},
    "refine": {"question", "so_far", "check", "instruction"},
    "continued": {"question", "instruction"},
}
"""The placeholders of each template."""


class Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Example(Part):
    """One worked example: what the model is shown, and what it should reply."""

    question: Text
    so_far: str = ""
    wrong: str | None = None
    correct: str | None = None
    check: str | None = None
    reply: Text


class ActPrompt(Part):
    system: Text
    instruction: Text
    examples: list[Example] = []
    refuse: Reasons = {}
    require: Reasons = {}
    numbers: Literal["any", "known", "given", "none"] = "any"
    continues: bool = False
    quotes: list[Text] = []


class Prompts(Part):
    """All texts of phase 1; prompts.yaml describes each field."""

    nothing_yet: Text
    templates: dict[str, Text]
    labels: list[Text]
    refuse: Reasons
    acts: dict[str, ActPrompt]

    def ask(
        self,
        act: str,
        question: str,
        so_far: str,
        parts: Mapping[str, str] | None = None,
        *,
        continues: bool = False,
    ) -> Messages:
        """Return messages that ask for one act as the continuation of the solution `so_far`.

        `parts` are the other placeholders of the act's template: `wrong` and `correct` of verify,
        `check` of refine. If the model `continues` a reply, the last message may be the beginning
        of its reply (prompts.yaml).
        """
        prompt = self.acts[act]
        opened = continues and prompt.continues and so_far != ""
        template = "continued" if opened else act if act in self.templates else "act"
        messages = [{"role": "system", "content": prompt.system}]
        for example in prompt.examples:
            shown = example.model_dump(exclude_none=True, exclude={"reply"})
            begun = f"{example.so_far}\n" if opened and example.so_far else ""
            messages.append({"role": "user", "content": self._fill(template, act, shown)})
            messages.append({"role": "assistant", "content": begun + example.reply})
        asked = {"question": question, "so_far": so_far, **(parts or {})}
        messages.append({"role": "user", "content": self._fill(template, act, asked)})
        if opened:
            messages.append({"role": "assistant", "content": f"{so_far}\n"})
        return messages

    def _fill(self, template: str, act: str, parts: Mapping[str, str]) -> str:
        values = dict(parts)
        values["so_far"] = parts["so_far"] or self.nothing_yet
        values["instruction"] = self.acts[act].instruction
        return re.sub(r"\{(\w+)\}", lambda hole: values[hole[1]], self.templates[template])


def question_messages(question: str, system_prompt: str | None = None) -> Messages:
    """Return the conversation of SFT, RL and evaluation; phase 1 has no system prompt."""
    system = [{"role": "system", "content": system_prompt}] if system_prompt else []
    return [*system, {"role": "user", "content": question}]


def sentences(text: str) -> list[str]:
    """Return the sentences of `text`; a decimal point does not end one."""
    return [part for part in re.split(r"(?<=[.!?])\s+", text.strip()) if part]
