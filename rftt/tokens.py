"""The eight acts and their sixteen functional tokens: table, vocabulary, rendering and parsing.

A reasoning act is a segment `<act> text </act>` whose two delimiters are single vocabulary entries
(arXiv 2502.13389). They are *normal* added tokens: decoders drop "special" ones. In phase 1 (search
with prompts) an act is an instruction to an ordinary instruct model (prompts.py); in phase 2 (RL)
it is a token that the policy emits. Limits and both grammars are the table below.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from rftt.types import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Phase = Literal["prompted", "learned"]


@dataclass(frozen=True)
class Function:
    """An act: its description, the limits of a reply in phase 1, its allowed transitions."""

    description: str  # new vocabulary rows start as the mean of this text's token embeddings
    max_tokens: int  # budget of a reply, in tokens (arXiv 2502.13389)
    max_sentences: int | None = None  # clarify's is the paper's, the others are ours
    one_line: bool = False
    next_in_phase_1: tuple[str, ...] = ()  # acts that may follow: the allowed transitions
    next_in_phase_2: tuple[str, ...] = ()


FUNCTIONS: dict[str, Function] = {
    "clarify": Function(
        description="clarify the problem",
        max_tokens=512,
        max_sentences=3,
        next_in_phase_1=("analysis", "next_step", "direct_answer", "subquestion"),
        next_in_phase_2=("analysis", "subquestion", "next_step", "direct_answer"),
    ),
    "analysis": Function(
        description="analyse the conditions",
        max_tokens=512,
        next_in_phase_1=("direct_answer", "next_step", "subquestion"),
        next_in_phase_2=("subquestion", "next_step", "direct_answer"),
    ),
    "next_step": Function(
        description="take the next step",
        max_tokens=512,
        max_sentences=3,
        next_in_phase_1=("next_step", "direct_answer", "subquestion"),
        next_in_phase_2=("next_step", "direct_answer", "subquestion", "verify", "output"),
    ),
    "subquestion": Function(
        description="ask and answer a sub-question",
        max_tokens=256,
        one_line=True,
        next_in_phase_1=("direct_answer", "next_step"),
        next_in_phase_2=("next_step", "direct_answer"),
    ),
    "direct_answer": Function(
        description="finish and answer directly",
        max_tokens=4096,
        next_in_phase_2=("output", "verify"),
    ),
    "verify": Function(
        description="verify the steps and find the mistake",
        max_tokens=512,
        max_sentences=2,
        next_in_phase_2=("next_step", "refine", "direct_answer", "subquestion", "verify", "output"),
    ),
    "refine": Function(
        description="refine and correct the solution",
        max_tokens=256,
        max_sentences=1,
        one_line=True,
        next_in_phase_2=("next_step", "direct_answer", "output", "subquestion", "verify"),
    ),
    "output": Function(description="output the final answer", max_tokens=512),
}
ROOT = {  # acts that may begin a solution; an act named twice may be tried twice
    "prompted": ("clarify", "analysis", "subquestion", "next_step") * 2 + ("direct_answer",),
    "learned": ("clarify", "subquestion", "analysis", "next_step"),
}
ALIASES = {"analyze": "analysis"}  # spellings in rows of other programs
ACTS = tuple(FUNCTIONS)
OPENERS = tuple(f"<{act}>" for act in ACTS)
CLOSERS = tuple(f"</{act}>" for act in ACTS)


def successors(act: str | None, phase: Phase) -> tuple[str, ...]:
    """Return the acts that may follow `act` (None: the root; "": no segment, a dead end)."""
    if act is None:
        return ROOT[phase]
    if act == "":
        return ()
    function = FUNCTIONS[act]
    return function.next_in_phase_1 if phase == "prompted" else function.next_in_phase_2


# ---- Vocabulary ----


@dataclass(frozen=True)
class FunctionIds:
    """The ids of the sixteen delimiters in one tokenizer."""

    open: dict[str, int]
    close: dict[str, int]

    @property
    def end(self) -> int:
        """The id of `</output>`, which ends a response."""
        return self.close["output"]

    @property
    def openers(self) -> tuple[int, ...]:
        """Ids of the openers, in the order of ACTS."""
        return tuple(self.open.values())

    @property
    def closers(self) -> tuple[int, ...]:
        """Ids of the closers, in the order of ACTS."""
        return tuple(self.close.values())


def add_function_tokens(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Give each delimiter one id of its own; return the tokens that were new."""
    from tokenizers import AddedToken

    present = tokenizer.get_vocab()
    new = [token for token in OPENERS + CLOSERS if token not in present]  # none after the warm-up
    tokenizer.add_tokens([AddedToken(t, special=False, normalized=False) for t in new])  # pyright: ignore[reportArgumentType]
    return new


def description_of(token: str) -> str:
    """Return the text that initialises a delimiter's embedding; no two may be equal."""
    description = FUNCTIONS[token.strip("</>")].description
    return f"end: {description}" if token in CLOSERS else description


def function_ids(tokenizer: PreTrainedTokenizerBase) -> FunctionIds:
    """Return the ids of the delimiters. Raise UserError if one is not a single id."""
    ids = {token: tokenizer.encode(token, add_special_tokens=False) for token in OPENERS + CLOSERS}
    for token, encoded in ids.items():
        if len(encoded) != 1:
            raise UserError(
                f"functional token {token!r} encodes to {len(encoded)} ids with the tokenizer of "
                f"{tokenizer.name_or_path}; warm the model up with train_sft.py first."
            )
    return FunctionIds(
        {act: ids[f"<{act}>"][0] for act in ACTS}, {act: ids[f"</{act}>"][0] for act in ACTS}
    )


# ---- Render and parse, by id ----


@dataclass(frozen=True)
class Span:
    """A whole segment inside a response: ids[start] is the opener, ids[stop - 1] the closer."""

    act: str
    start: int
    stop: int


def render(
    steps: Sequence[tuple[str, str]], tokenizer: PreTrainedTokenizerBase, ids: FunctionIds
) -> list[int]:
    """Return the response ids of (act, text) pairs, with nothing between the segments."""
    rendered: list[int] = []
    for act, text in steps:
        encoded = tokenizer.encode(text, add_special_tokens=False)
        rendered += [ids.open[act], *encoded, ids.close[act]]
    return rendered


def parse_response(token_ids: Sequence[int], ids: FunctionIds) -> tuple[list[Span], int]:
    """Cut a response into segments, by id.

    Return the well-formed segments from the start, and how many ids they cover. Fewer ids than
    len(token_ids) mean text outside any segment, or a segment that is never closed.
    """
    act_of = {token: act for act, token in ids.open.items()}
    delimiters = {*ids.openers, *ids.closers}  # none of these may stand inside a segment
    spans: list[Span] = []
    position = 0
    while position < len(token_ids) and (act := act_of.get(token_ids[position])):
        stop = position + 1  # ends up behind the segment's text
        while stop < len(token_ids) and token_ids[stop] not in delimiters:
            stop += 1
        if stop == len(token_ids) or token_ids[stop] != ids.close[act]:
            break  # the segment is never closed, or another delimiter interrupts it
        spans.append(Span(act, position, stop + 1))
        position = stop + 1
        if act == "output":  # the response is complete
            break
    return spans, position
