"""Rows on disk <-> problems, prompts, training rows. JSONL only; errors name file and line."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, cast

from rftt.engines.chat import encode_chat, eos_id
from rftt.graders.math import parse_gold
from rftt.prompts import question_messages
from rftt.run.cli import load_function
from rftt.run.files import Row, read_jsonl
from rftt.tokens import ALIASES, FUNCTIONS, FunctionIds, function_ids, render
from rftt.types import Problem, UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from rftt.run.config import RLConfig, SFTConfig


SYNONYMS = {
    "question": ("problem", "question", "prompt", "query"),
    "answer": ("answer", "final_answer", "gold"),
    "level": ("level", "difficulty"),
    "subject": ("subject", "subfield", "type"),
    "id": ("id", "unique_id", "idx"),
}
"""Names under which public data sets keep a field; the first that a row has is taken."""


# ---- Problems ----


def load_problems(
    path: str,
    *,
    limit: int | None = None,
    graded: bool = True,
    keys: tuple[str | None, str | None] = (None, None),
) -> list[Problem]:
    """Read any of the usual data sets as it is (GSM8K, MATH-500, AIME, AMC, OlympiadBench, …).

    Raises UserError on a row without a question and, where `graded`, on gold answers that do not
    parse. Where ids repeat, rows are numbered instead. `keys` are
    the fields that hold question and answer, where they are not among the SYNONYMS.
    """
    prompt_key, answer_key = keys
    problems: list[Problem] = []
    unread: list[tuple[int, Row]] = []
    rows = read_jsonl(path)[:limit]
    for number, row in rows:
        question = _question(row, prompt_key, f"{path}:{number}")
        gold = _field(row, "answer", answer_key)
        answer = parse_gold(gold if gold is not None else str(row.get("solution") or ""))
        unread += [(number, row)] if answer is None else []
        solution = row.get("solution")
        problems.append(
            Problem(
                id=_field(row, "id") or f"{Path(path).stem}-{number}",
                question=question,
                answer=answer,
                solution=solution if isinstance(solution, str) else None,
                level=_field(row, "level"),
                subject=_field(row, "subject"),
            )
        )
    if graded and unread:
        raise UserError(_no_gold(path, unread, len(rows), answer_key))
    if len({problem.id for problem in problems}) < len(problems):
        problems = [replace(p, id=f"{Path(path).stem}-{i}") for i, p in enumerate(problems)]
    return problems


def _question(row: Row, key: str | None, where: str) -> str:
    question = _field(row, "question", key)
    if not question:
        wanted = key or "' or '".join(SYNONYMS["question"])
        guess = next((name for name, value in row.items() if isinstance(value, str)), "…")
        raise UserError(
            f"{where} has no '{wanted}' (found: {', '.join(row)}). Set prompt_key: {guess}."
        )
    return question


def _no_gold(path: str, unread: list[tuple[int, Row]], n_rows: int, key: str | None) -> str:
    """What to say of `unread` (line, row) among `n_rows`, and where their gold answers may be."""
    number, row = unread[0]
    found = next((k for k, v in row.items() if "####" in str(v) or "\\boxed" in str(v)), None)
    cure = f"'{found}' looks like it" if found else "or leave these rows out"
    return (
        f"{len(unread)} of {n_rows} rows have no gold answer that parses, first {path}:{number} "
        f"({key or 'answer'}: {_field(row, 'answer', key)!r}). Set answer_key: {found or '…'} "
        f"({cure})."
    )


def _field(row: Row, name: str, key: str | None = None) -> str | None:
    names = (key,) if key else SYNONYMS[name]
    found = (row[name] for name in names if row.get(name) not in (None, "", []))
    value = next((v for v in found if not isinstance(v, list) or not isinstance(v[0], dict)), None)
    if isinstance(value, list):  # OlympiadBench: a list of answers; of dicts it is a conversation
        return ", ".join(map(str, value))
    if isinstance(value, float) and value.is_integer():  # AMC: 27.0
        value = int(value)
    return None if value is None else str(value)


def read_problems(cfg: RLConfig) -> tuple[list[Problem], list[Problem]]:
    """Return problems to explore and to evaluate on. A missing reward_function fails here."""
    keys = (cfg.prompt_key, cfg.answer_key)
    problems = load_problems(cfg.train_file, keys=keys)
    eval_file = cfg.eval_file or cfg.train_file
    eval_problems = load_problems(eval_file, limit=cfg.max_eval_problems, keys=keys)
    if cfg.reward_function is not None:
        load_function("reward_function", cfg.reward_function)
    return problems, eval_problems


# ---- Training rows ----

Document = tuple[list[int], list[int], list[bool]]
"""prompt ids, response ids, which response tokens count in the loss"""
Example = tuple[Document, ...]
"""What a row trains on: one response, or the chosen and the rejected one of a pair (DPO)."""


def load_rows(
    path: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    pairs: bool = False,
    system_prompt: str | None,
    mask_wrong: bool,
    functional: bool,
    max_length: int,
    prompt_key: str | None = None,
) -> tuple[list[Example], int]:
    """Read SFT or DPO rows; returns examples and how many rows exceed `max_length`: those are out.

    A row is {"question", "steps": [{"act", "text"}, …]} or, for a plain chain of thought,
    {"question", "response"} (a data set's own "solution" will do); with `pairs` {"question",
    "chosen", "rejected"}, each of them steps or text. `mask_wrong` leaves the steps marked
    `"wrong": true` out of the loss: the model learns to mend a mistake without learning to make it.
    Without `functional` tokens the same steps are written as plain lines: the control that shows
    what the tokens are worth.
    """
    examples: list[Example] = []
    too_long = 0
    ids = function_ids(tokenizer) if functional else None
    for number, row in read_jsonl(path):
        question = _question(row, prompt_key, where := f"{path}:{number}")
        prompt = encode_chat(tokenizer, question_messages(question, system_prompt))
        example: Example = ()
        for value in _responses(row, pairs, where):
            if isinstance(value, str):
                response = tokenizer.encode(value, add_special_tokens=False)
                mask = [True] * len(response)
            else:
                response, mask = _encode_steps(value, tokenizer, ids, mask_wrong, where)
            example += ((prompt, [*response, eos_id(tokenizer)], [*mask, True]),)
        if len(prompt) + max(len(response) for _, response, _ in example) > max_length:
            too_long += 1
        else:
            examples.append(example)
    if not examples:
        raise UserError(f"{path}: all {too_long} rows exceed max_length {max_length}; raise it.")
    return examples, too_long


def _responses(row: Row, pairs: bool, where: str) -> list[str | list[Row]]:
    """The text or the steps of each response in a row."""
    if pairs:
        responses = [row.get("chosen"), row.get("rejected")]
        lacks, name = "lacks 'chosen' or 'rejected', text or steps", "dpo"
    else:
        responses = [row.get("steps") or row.get("response") or row.get("solution")]
        lacks, name = "has neither 'steps' nor 'response'", "sft"
    if not all(isinstance(response, str | list) and response for response in responses):
        raise UserError(
            f"{where} {lacks} (found: {', '.join(row)}); search.py writes such rows to "
            f"data/{name}.jsonl."
        )
    return cast("list[str | list[Row]]", responses)


def _encode_steps(
    steps: Sequence[Row],
    tokenizer: PreTrainedTokenizerBase,
    ids: FunctionIds | None,
    mask_wrong: bool,
    where: str,
) -> tuple[list[int], list[bool]]:
    response: list[int] = []
    mask: list[bool] = []
    for i, step in enumerate(steps):
        if not isinstance(step, dict) or not {"act", "text"} <= step.keys():
            raise UserError(f"{where} has a step without act and text: {step!r:.80}.")
        act = ALIASES.get(step["act"], step["act"])
        if act not in FUNCTIONS:
            raise UserError(f"{where} has the unknown act {step['act']!r}.")
        if ids is None:
            line = step["text"] if i == 0 else "\n" + step["text"]
            segment = tokenizer.encode(line, add_special_tokens=False)
        else:
            segment = render([(act, step["text"])], tokenizer, ids)
        response += segment
        mask += [not (mask_wrong and step.get("wrong", False))] * len(segment)
    return response, mask


def shuffled_epochs(n: int, seed: int) -> Iterator[int]:
    """Yield indices 0 … n-1 in a new order each epoch, for ever, equal in every process."""
    from random import Random

    epoch = 0
    while True:
        order = list(range(n))
        Random(f"{seed}-{epoch}").shuffle(order)
        yield from order
        epoch += 1


def endless(problems: Sequence[Problem], seed: int, *, skip: int) -> Iterator[Problem]:
    """Yield the problems for ever, in a new order each epoch, from the one after `skip` others."""
    for i in islice(shuffled_epochs(len(problems), seed), skip, None):
        yield problems[i]


def read_rows(cfg: SFTConfig, tokenizer) -> tuple[list[Example], list[Example], int]:
    """Training rows, rows for the evaluation loss, and how many were too long."""

    def read(path: str) -> tuple[list[Example], int]:
        return load_rows(
            path,
            tokenizer,
            pairs=cfg.loss == "dpo",
            system_prompt=cfg.system_prompt,
            mask_wrong=cfg.mask_wrong,
            functional=cfg.functional_tokens,
            max_length=cfg.max_length,
            prompt_key=cfg.prompt_key,
        )

    def drawn(n_rows: int, n: float, seed: int) -> list[int]:
        return list(islice(shuffled_epochs(n_rows, seed), int(n)))

    rows, too_long = read(cfg.train_file)
    if cfg.eval_file:
        held_out = read(cfg.eval_file)[0]
    else:
        chosen = set(drawn(len(rows), len(rows) * cfg.eval_ratio, cfg.seed + 1))
        held_out = [rows[i] for i in sorted(chosen)]
        rows = [row for i, row in enumerate(rows) if i not in chosen]
    if cfg.mix_file:
        more, more_too_long = read(cfg.mix_file)
        rows = rows + [more[i] for i in drawn(len(more), len(rows) * cfg.mix_ratio, cfg.seed + 2)]
        too_long += more_too_long
    return rows, held_out, too_long
