"""Convert rows of data sets to problems and training rows. Errors name the file and the line."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from typing import TYPE_CHECKING

from rftt.engines.chat import encode_chat, eos_id
from rftt.engines.templates import holds_control_text
from rftt.engines.vocabulary import turn_end
from rftt.graders.math import parse_gold, same_answer
from rftt.prompts import question_messages
from rftt.run.columns import (
    gold_texts,
    label_of,
    pair_in,
    proposed_answer,
    question_of,
    response_in,
    solution_of,
)
from rftt.run.files import Row
from rftt.run.own_rewards import check_functions
from rftt.run.tables import Record, name_of, read_table
from rftt.tokens import ALIASES, FUNCTIONS, FunctionIds, function_ids, render
from rftt.types import Problem, UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from rftt.run.config import RLConfig, SFTConfig


# ---- Problems ----


def load_problems(
    path: str,
    *,
    limit: int | None = None,
    graded: bool = True,
    keys: tuple[str | None, str | None] = (None, None),
    system_prompt: str | None = None,
) -> list[Problem]:
    """Read a public data set in its own format (GSM8K, MATH-500, AIME, SVAMP, DAPO, …).

    `path` is a source that tables.py reads. `keys` name the columns of question and answer if they
    are not among the usual names (columns.py). If ids repeat, rows are numbered instead.

    Raises UserError for a row without a question and for a system message other than
    `system_prompt`. If `graded`, missing or contradictory gold answers are errors as well.
    """
    prompt_key, answer_key = keys
    problems: list[Problem] = []
    unread: list[Record] = []
    records = read_table(path)[:limit]
    name = name_of(path)
    for record in records:
        row, place = record.row, record.place
        question = question_of(row, prompt_key, place, system_prompt)
        answer = _gold(row, answer_key, place)
        if answer is None:
            unread.append(record)
        problems.append(
            Problem(
                id=label_of(row, "id") or f"{name}-{record.number}",
                question=question,
                answer=answer,
                solution=solution_of(row),
                level=label_of(row, "level"),
                subject=label_of(row, "subject"),
            )
        )
    if graded and unread:
        raise UserError(_no_gold(unread, len(records), answer_key))
    if len({problem.id for problem in problems}) < len(problems):
        problems = [replace(p, id=f"{name}-{i}") for i, p in enumerate(problems)]
    return problems


def _gold(row: Row, key: str | None, place: str) -> str | None:
    """Return the gold answer of a row. Raises UserError if two columns have different ones."""
    parsed = {name: parse_gold(text) for name, text in gold_texts(row, key, place).items()}
    found = {name: answer for name, answer in parsed.items() if answer is not None}
    if not found:
        return None
    first, answer = next(iter(found.items()))
    for name, other in found.items():
        if other != answer and not same_answer(answer, other):
            raise UserError(
                f"{place} has different gold answers in '{first}' ({answer:.40}) and '{name}' "
                f"({other:.40}). Set answer_key: {first} or {name}."
            )
    return answer


def _no_gold(unread: list[Record], n_rows: int, key: str | None) -> str:
    """Return the error for rows without a gold answer, with a key that may name the answers."""
    row, place = unread[0].row, unread[0].place
    texts = gold_texts(row, key, place)
    found = proposed_answer(row)
    cure = f"'{found}' looks like it" if found else "or leave these rows out"
    return (
        f"{len(unread)} of {n_rows} rows have no gold answer that parses, first {place} "
        f"({key or 'answer'}: {next(iter(texts.values()), None)!r:.80}). Set answer_key: "
        f"{found or '…'} ({cure})."
    )


def read_problems(cfg: RLConfig) -> tuple[list[Problem], list[Problem]]:
    """Return the problems to explore and those to evaluate on.

    The reward_functions are imported here, so that a mistake in a name appears at startup.
    """
    keys, system_prompt = (cfg.prompt_key, cfg.answer_key), cfg.system_prompt
    problems = load_problems(cfg.train_file, keys=keys, system_prompt=system_prompt)
    eval_problems = load_problems(
        cfg.eval_file or cfg.train_file,
        limit=cfg.max_eval_problems,
        keys=keys,
        system_prompt=system_prompt,
    )
    check_functions(cfg)
    return problems, eval_problems


# ---- Training rows ----

Document = tuple[list[int], list[int], list[bool]]
"""(prompt ids, response ids, whether each response token counts in the loss)"""
Example = tuple[Document, ...]
"""The documents of a row: one response, or the chosen and the rejected one of a pair (DPO)."""


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
    response_key: str | None = None,
) -> tuple[list[Example], Counter[str]]:
    """Read SFT or DPO rows. Return the examples, and reason -> number of omitted rows.

    A row is omitted if it exceeds `max_length` tokens. It is also omitted if a response contains
    text that would become a special or functional token inside a step.

    An SFT row is {"question", "steps": [{"act", "text"}, …]} or, for a plain chain of thought,
    {"question", "response"}. With `pairs` a row is {"question", "chosen", "rejected"}, and both
    responses are steps or text. columns.py reads other formats.

    `mask_wrong` leaves the steps marked `"wrong": true` out of the loss: the model learns to
    correct a mistake and not to make it. Without `functional` tokens the same steps are written as
    plain lines, as a control that measures the value of the tokens.
    """
    examples: list[Example] = []
    left_out: Counter[str] = Counter()
    ids = function_ids(tokenizer) if functional else None
    turn = turn_end(tokenizer)
    end = eos_id(tokenizer) if turn is None else turn
    for record in read_table(path):
        row, where = record.row, record.place
        if pairs:
            question, responses = pair_in(row, prompt_key, where, system_prompt)
        else:
            question = question_of(row, prompt_key, where, system_prompt)
            responses = [response_in(row, response_key, where)]
        texts = [
            text
            for response in responses
            for text in ([response] if isinstance(response, str) else [s["text"] for s in response])
        ]
        if any(holds_control_text(tokenizer, text) for text in texts):
            left_out["with control text"] += 1
            continue
        prompt = encode_chat(tokenizer, question_messages(question, system_prompt))
        example: Example = ()
        for value in responses:
            if isinstance(value, str):
                response = tokenizer.encode(value, add_special_tokens=False)
                mask = [True] * len(response)
            else:
                response, mask = _encode_steps(value, tokenizer, ids, mask_wrong, where)
            example += ((prompt, [*response, end], [*mask, True]),)
        if len(prompt) + max(len(response) for _, response, _ in example) > max_length:
            left_out["too long"] += 1
        else:
            examples.append(example)
    if not examples:
        raise UserError(
            f"{path}: no row is left ({counted(left_out)}); raise max_length={max_length} or "
            "remove control tokens from the responses."
        )
    return examples, left_out


def counted(left_out: Counter[str]) -> str:
    """Return counts such as `2 too long, 1 with control text`."""
    return ", ".join(f"{n} {reason}" for reason, n in left_out.items()) or "0 left out"


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
        act = ALIASES.get(step["act"], step["act"])
        if act not in FUNCTIONS:
            raise UserError(
                f"{where}: an act must be one of {', '.join(FUNCTIONS)}, got {step['act']!r}; "
                "correct the row."
            )
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


def lengths_of(rows: Sequence[Example]) -> list[int]:
    """Return the number of tokens of every prompt with its response."""
    return [len(prompt) + len(response) for row in rows for prompt, response, _ in row]


def read_rows(cfg: SFTConfig, tokenizer) -> tuple[list[Example], list[Example], str]:
    """Return training rows, rows for the evaluation loss, and counts of the omitted rows."""

    def read(path: str) -> tuple[list[Example], Counter[str]]:
        return load_rows(
            path,
            tokenizer,
            pairs=cfg.loss == "dpo",
            system_prompt=cfg.system_prompt,
            mask_wrong=cfg.mask_wrong,
            functional=cfg.functional_tokens,
            max_length=cfg.max_length,
            prompt_key=cfg.prompt_key,
            response_key=cfg.response_key,
        )

    def drawn(n_rows: int, n: float, seed: int) -> list[int]:
        return list(islice(shuffled_epochs(n_rows, seed), int(n)))

    rows, left_out = read(cfg.train_file)
    if cfg.eval_file:
        held_out = read(cfg.eval_file)[0]
    else:
        chosen = set(drawn(len(rows), len(rows) * cfg.eval_ratio, cfg.seed + 1))
        held_out = [rows[i] for i in sorted(chosen)]
        rows = [row for i, row in enumerate(rows) if i not in chosen]
    if cfg.mix_file:
        more, more_left_out = read(cfg.mix_file)
        rows = rows + [more[i] for i in drawn(len(more), len(rows) * cfg.mix_ratio, cfg.seed + 2)]
        left_out += more_left_out
    if round(len(rows) * cfg.num_train_epochs) < 1:
        raise UserError(
            f"num_train_epochs={cfg.num_train_epochs} must cover at least one of {len(rows)} rows; "
            "raise it."
        )
    return rows, held_out, counted(left_out)
