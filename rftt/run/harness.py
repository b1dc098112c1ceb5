"""Let other harnesses check an evaluation: samples of lm-evaluation-harness, Math-Verify's verdict.

Neither package is imported to evaluate. lm-evaluation-harness writes its samples with
`--log_samples`, one line per document and filter (lm_eval/evaluator.py). The file here has the same
keys. Math-Verify is optional. Its verdict stands beside ours and pays nothing.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from hashlib import sha256
from typing import TYPE_CHECKING, Any

from rftt.engines.chat import decode, encode_chat
from rftt.prompts import question_messages
from rftt.run.files import Row
from rftt.types import Problem, UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from rftt.run.config import EvalConfig

Judge = Callable[[str, str], bool]
"""(response, gold answer) -> whether the response is right."""


def open_judge(cfg: EvalConfig) -> Judge | None:
    """Return Math-Verify's judgement, or None if it is not asked for.

    Raises UserError without the package.
    """
    if not cfg.math_verify:
        return None
    try:
        from math_verify import parse, verify  # type: ignore[import-not-found]
    except ImportError as error:
        raise UserError(
            "math_verify: true needs the package math-verify; pip install math-verify."
        ) from error

    def judge(response: str, gold: str) -> bool:
        return bool(verify(parse(f"${gold}$"), parse(response)))

    return judge


def agreement(rows: Sequence[Row]) -> dict[str, float] | None:
    """Return the shares of greedy responses that Math-Verify accepts, and of equal verdicts.

    None if it was not asked.
    """
    greedy = [row["greedy"] for row in rows if "math_verify" in row["greedy"]]
    if not greedy:
        return None
    every = greedy + [sample for row in rows for sample in row["samples"]]
    equal = [sample["math_verify"] == sample["correct"] for sample in every]
    return {
        "greedy": sum(response["math_verify"] for response in greedy) / len(greedy),
        "agreement": sum(equal) / len(equal),
        "responses": len(every),
    }


def lm_eval_rows(
    cfg: EvalConfig,
    tokenizer: PreTrainedTokenizerBase,
    problems: Sequence[Problem],
    rows: Sequence[Row],
) -> Iterator[Row]:
    """Yield the samples as lm-evaluation-harness logs them: greedy ones, then sampled ones.

    `rows` are the lines of eval/<set>.jsonl of the same problems, with the samples' texts.
    """
    for number, (problem, row) in enumerate(zip(problems, rows, strict=True)):
        messages = question_messages(problem.question, cfg.system_prompt)
        prompt = decode(tokenizer, encode_chat(tokenizer, messages))
        doc = {"id": problem.id, "question": problem.question, "answer": problem.answer}
        yield _sample(cfg, number, doc, prompt, [row["greedy"]], "greedy")
        if row["samples"]:
            yield _sample(cfg, number, doc, prompt, row["samples"], "sampled")


def _sample(
    cfg: EvalConfig, number: int, doc: Row, prompt: str, responses: Sequence[Row], name: str
) -> Row:
    temperature = cfg.temperature if name == "sampled" else 0.0
    settings: dict[str, Any] = {
        "until": [],
        "do_sample": temperature > 0,
        "temperature": temperature,
        "max_gen_toks": cfg.max_completion_length,
    }
    return {
        "doc_id": number,
        "doc": doc,
        "target": doc["answer"],
        "arguments": {"gen_args_0": {"arg_0": prompt, "arg_1": settings}},
        "resps": [[response["text"] for response in responses]],
        "filtered_resps": [[response["answer"] or "[invalid]" for response in responses]],
        "filter": name,
        "metrics": ["exact_match"],
        "doc_hash": _hash(json.dumps(doc, indent=2, ensure_ascii=False)),
        "prompt_hash": _hash(prompt),
        "target_hash": _hash(str(doc["answer"])),
        "exact_match": sum(response["correct"] for response in responses) / len(responses),
    }


def _hash(text: str) -> str:
    return sha256(text.encode()).hexdigest()
