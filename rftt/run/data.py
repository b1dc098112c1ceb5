"""Rows on disk <-> problems, prompts, training rows. JSONL only; errors name file and line."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from glob import escape
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from rftt.graders.math import parse_gold
from rftt.tokens import ALIASES, FUNCTIONS, FunctionIds, Messages, function_ids, render
from rftt.types import Problem, UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Row = dict[str, Any]

SYNONYMS = {
    "question": ("problem", "question", "prompt", "query"),
    "answer": ("answer", "final_answer", "gold"),
    "level": ("level", "difficulty"),
    "subject": ("subject", "subfield", "type"),
    "id": ("id", "unique_id", "idx"),
}
"""Names under which public data sets keep a field; the first that a row has is taken."""


# ---- Files ----


def read_jsonl(path: str | Path) -> list[tuple[int, Row]]:
    """(line number, row) for each line. Raises UserError on a missing, empty or broken file."""
    if not Path(path).is_file():
        raise UserError(f"{path} does not exist.")
    rows: list[tuple[int, Row]] = []
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise UserError(f"{path}:{number} is not JSON ({error.msg}).") from error
            if not isinstance(row, dict):
                raise UserError(f"{path}:{number} holds a {type(row).__name__}, not an object.")
            rows.append((number, row))
    if not rows:
        raise UserError(f"{path} has 0 rows; look at what should have written it.")
    return rows


def write_lines(path: str | Path, lines: Iterable[str]) -> None:
    """Write all lines or none: a temporary file takes the name only when it is whole."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.writelines(line + "\n" for line in lines)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def write_jsonl(path: str | Path, rows: Iterable[Row]) -> None:
    write_lines(path, (json.dumps(row, ensure_ascii=False) for row in rows))


def write_json(path: str | Path, value: object) -> None:
    """One readable value."""
    write_lines(path, [json.dumps(value, ensure_ascii=False, indent=1)])


class Journal:
    """An append-only JSONL of finished work: a killed job reopens it and does only the rest.

    One line per unit, flushed before the next is begun; a last line cut off by a kill is dropped.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        whole = self.path.read_bytes() if self.path.exists() else b""
        kept = whole[: whole.rfind(b"\n") + 1]
        if kept != whole:
            os.truncate(self.path, len(kept))
        self.rows: list[Row] = [json.loads(line) for line in kept.splitlines()]
        self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115 (open for its lifetime)

    def append(self, row: Row) -> None:
        self._file.write(json.dumps(row, ensure_ascii=False) + "\n")
        self._file.flush()
        self.rows.append(row)

    def close(self) -> None:
        """What was appended is on the disk then, whatever happens to the machine."""
        if not self._file.closed:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()


def part_of(path: Path, rank: int) -> Path:
    """The journal of one rank among several; rank 0 writes the whole one."""
    return path.with_suffix(f".rank{rank}{path.suffix}") if rank else path


def gather_parts(path: Path) -> Journal:
    """The journal of rank 0, closed, with the rows of all others, whose files are then gone."""
    whole = Journal(path)
    known = {row["id"] for row in whole.rows}
    names = sorted(path.parent.glob(f"{escape(path.stem)}.rank*{path.suffix}"))
    parts = [Journal(name) for name in names]
    for row in chain.from_iterable(part.rows for part in parts):
        if row["id"] not in known:  # killed before all parts are gone, it would come again
            whole.append(row)
    for journal in (whole, *parts):
        journal.close()
    for name in names:
        name.unlink()
    return whole


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


# ---- Prompts ----


def load_tokenizer(
    path: str, *, trust_remote_code: bool = False, chat: bool = True
) -> PreTrainedTokenizerBase:
    """Raises UserError where there is none, or where `chat` needs a template that it lacks."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise UserError(
            f"model_name_or_path {path} is neither a folder with a tokenizer nor a hub model that "
            f"can be reached ({str(error).splitlines()[0]})."
        ) from error
    if chat and tokenizer.chat_template is None:
        raise UserError(f"the tokenizer of {path} has no chat template; use an instruct model.")
    return tokenizer


def question_messages(question: str, system_prompt: str | None = None) -> Messages:
    """The conversation that SFT, RL and evaluation share: a system prompt if set, the question."""
    system = [{"role": "system", "content": system_prompt}] if system_prompt else []
    return [*system, {"role": "user", "content": question}]


def encode_chat(tokenizer: PreTrainedTokenizerBase, messages: Messages) -> list[int]:
    """Prompt ids up to where the reply begins: the one way from messages to ids.

    Raises UserError where the template doubles the BOS token.
    """
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    bos = tokenizer.bos_token_id
    if bos is not None and list(ids[:2]) == [bos, bos]:
        raise UserError(
            f"prompt starts with two BOS tokens; the chat template of {tokenizer.name_or_path} "
            "already adds one: take the other out of it, or out of system_prompt."
        )
    return cast(list[int], list(ids))


def decode(
    tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], *, skip_special: bool = False
) -> str:
    """The text of `ids`; functional tokens are not special and stay."""
    return cast(str, tokenizer.decode(list(ids), skip_special_tokens=skip_special))


def eos_id(tokenizer: PreTrainedTokenizerBase) -> int:
    if not isinstance(tokenizer.eos_token_id, int):
        raise UserError(f"the tokenizer of {tokenizer.name_or_path} has no single EOS token.")
    return tokenizer.eos_token_id


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
    """Indices 0 … n-1 in a new order each epoch, for ever; the same order in every process."""
    from random import Random

    epoch = 0
    while True:
        order = list(range(n))
        Random(f"{seed}-{epoch}").shuffle(order)
        yield from order
        epoch += 1
