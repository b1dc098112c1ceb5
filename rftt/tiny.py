"""The embedded demo world: word problems, a tokenizer, and a Qwen2 model trained on the spot.

    python -m rftt.tiny output_dir=outputs/tiny [seed=0] [train_steps=1000]

writes `base/` (an ordinary Hugging Face folder), `train.jsonl`, `test.jsonl` and `guard.jsonl`. The
model learns (prompt -> reply) pairs, its prompts being those of rftt/functions.py, until it is an
imperfect instruct model: it follows every instruction and errs by itself. Nothing else in rftt/
knows that it is tiny.

The acts differ in what they cost and how far they can be trusted, so that choosing among them
matters: `analysis` and `subquestion` spell sums out ("19*3=57"), `next_step` and `direct_answer`
only name results. Checking can pay: `verify` spells out again what a terse step only named. Never
is an answer equal to an earlier value of its problem, so a check seldom leaks it. PAPER §1.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

from rftt.cli import cli
from rftt.data import encode_chat, question_messages, write_jsonl
from rftt.functions import (
    ACTS,
    Messages,
    ask,
    ask_refine,
    ask_verify,
    description_of,
    successors,
)

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase, Qwen2ForCausalLM


@dataclass(frozen=True, kw_only=True)
class TinyConfig:
    """rftt.tiny: write the demo world (base model and problem files)."""

    output_dir: str
    """Folder that receives base/, train.jsonl, test.jsonl and guard.jsonl."""
    seed: int = 0
    """Decides the problems, the initial weights and the order of the examples."""
    train_steps: int = 1000
    """Optimizer steps of the base model: about a tenth of a CPU second each."""
    learning_rate: float = 4e-3
    """Peak rate: linear rise over 5 % of the steps, then cosine to 0."""
    batch_size: int = 64
    """(prompt, reply) pairs per optimizer step."""
    n_train: int = 2000
    """Problems for search and RL."""
    n_test: int = 500
    """Held-out problems; none occurs in train.jsonl or in the base model's examples."""
    n_guard: int = 300
    """Problems of another family, to see what training on the first one makes it forget."""
    hidden_size: int = 96
    """Width of the model."""
    num_hidden_layers: int = 4
    """Depth of the model."""


# ---- Problems ----

NAMES = ("Eva", "Tom", "Mia", "Ben", "Zoe", "Sam")
THINGS = ("pens", "nuts", "keys", "eggs", "cards", "coins")
VERBS = {
    "finds": "+",
    "buys": "+",
    "wins": "+",
    "sells": "-",
    "loses": "-",
    "drops": "-",
    "doubles them": "*2",
    "triples them": "*3",
    "halves them": "/2",
}
MAX_OPERATIONS = 5
MAX_VALUE = 99
MAX_AMOUNT = 9


@dataclass(frozen=True)
class Change:
    """One operation: `verb` as the question says it ("sells 3"), and its sum ("-3")."""

    verb: str
    sum: str

    def apply(self, value: int) -> int:
        amount = int(self.sum[1:])
        match self.sum[0]:
            case "+":
                return value + amount
            case "-":
                return value - amount
            case "*":
                return value * amount
        return value // amount


@dataclass(frozen=True)
class Tale:
    """A word problem: the changes of one quantity."""

    name: str
    thing: str
    start: int
    changes: tuple[Change, ...]

    @property
    def question(self) -> str:
        told = ", ".join(change.verb for change in self.changes)
        return f"{self.name} has {self.start} {self.thing}, {told}. How many now?"

    @property
    def values(self) -> list[int]:
        """The quantity before the first change, after it, …, at the end."""
        values = [self.start]
        for change in self.changes:
            values.append(change.apply(values[-1]))
        return values


def make_tale(rng: Random) -> Tale:
    """Each verb once, every value in 1 … MAX_VALUE, the answer unlike the values before it."""
    n = rng.randint(1, MAX_OPERATIONS)
    while True:
        values, changes = [rng.randint(2, 40)], []
        for verb in rng.sample(sorted(VERBS), n):
            change = _change(verb, rng)
            exact = change.sum[0] != "/" or values[-1] % 2 == 0
            values.append(change.apply(values[-1]) if exact else 0)
            changes.append(change)
        if all(1 <= value <= MAX_VALUE for value in values) and values[-1] not in values[:-1]:
            return Tale(rng.choice(NAMES), rng.choice(THINGS), values[0], tuple(changes))


def _change(verb: str, rng: Random) -> Change:
    if VERBS[verb] in "+-":
        amount = rng.randint(2, MAX_AMOUNT)
        return Change(f"{verb} {amount}", f"{VERBS[verb]}{amount}")
    return Change(verb, VERBS[verb])


def make_guard(rng: Random) -> tuple[str, str]:
    """Question and answer of the other family."""
    a, b = rng.sample(range(1, MAX_VALUE + 1), 2)
    larger = rng.random() < 0.5
    word, answer = ("larger", max(a, b)) if larger else ("smaller", min(a, b))
    return f"Which is {word}, {a} or {b}?", str(answer)


# ---- Replies ----

Point = tuple[int, int]
"""How many changes are done, and the value then."""
Slip = tuple[int, int]
"""The change that is got wrong, and by how much."""


@dataclass(frozen=True)
class Line:
    """One reply, and where in the tale it begins and ends."""

    act: str
    text: str
    begin: Point
    end: Point


def write_line(act: str, tale: Tale, begin: Point, slip: Slip | None = None) -> Line:
    """What a good solver replies to `act` at `begin`; `slip` makes one of its results wrong."""
    done, value = begin
    left = len(tale.changes) - done
    n_changes = {
        "clarify": 0,
        "analysis": min(2, left - 1),
        "subquestion": min(1, left),
        "next_step": min(1, left),
        "direct_answer": left,
        "output": 0,
    }[act]
    terse, spelled = [], []
    for i in range(done, done + n_changes):
        change, before = tale.changes[i], value
        value = change.apply(value) + (slip[1] if slip and slip[0] == i else 0)
        terse.append(f"{change.verb}: {value}" if act == "next_step" else f"{value}")
        spelled.append(f"{change.verb}? {before}{change.sum}={value}")
    end = (done + n_changes, value)
    boxed = f"so \\boxed{{{value}}}."
    match act:
        case "clarify":
            text = f"Given: {value} {tale.thing}. Asked: how many now."
        case "analysis" if not spelled:
            text = f"It takes {value}{tale.changes[done].sum}."
        case "analysis" | "subquestion":
            text = ", ".join(spelled) + "."
        case "next_step" if end[0] < len(tale.changes):
            text = ", ".join(terse) + "."
        case "output":
            text = f"The final answer is \\boxed{{{value}}}."
        case _:
            text = ", ".join([*terse, boxed])
    return Line(act, text, begin, end)


def write_path(
    tale: Tale, begin: Point, act: str | None, rng: Random, slip: Slip | None = None
) -> list[Line]:
    """A random walk through phase 1's grammar from `begin`, `act` being done, to a boxed answer."""
    lines: list[Line] = []
    while not (lines and "\\boxed" in lines[-1].text):
        act = rng.choice(successors(act, "prompted"))
        lines.append(write_line(act, tale, lines[-1].end if lines else begin, slip))
    return lines


def text_of(lines: list[Line]) -> str:
    return "\n".join(line.text for line in lines)


def write_check(tale: Tale, begin: Point, slip: Slip) -> str:
    """Spell the changes out from `begin` to the wrong one. The last result is not given."""
    done, value = begin
    parts = []
    for change in tale.changes[done : slip[0] + 1]:
        before, value = value, change.apply(value)
        parts.append(f"{before}{change.sum}={value}")
    claimed = value + slip[1]
    if slip[0] == len(tale.changes) - 1:
        parts[-1] = f"{before}{change.sum} is not {claimed}."
        return ", ".join(parts)
    return ", ".join(parts) + f", not {claimed}."


# ---- (prompt, reply) pairs ----

PAIR_WEIGHTS = (60, 12, 12, 6, 4, 6)
"""Of act, plain, verify, refine, output, guard."""
SLIP_SHARE = 0.2
"""Of the solutions so far that contain a mistake, which the reply then continues from."""
SLIPS = (-11, -10, -9, -2, -1, 1, 2, 9, 10, 11)
IGNORED = -100
"""Label of tokens that are not learnt."""


def make_pair(rng: Random, seen: set[str]) -> tuple[Messages, str]:
    """One training example of the base model; questions in `seen` are not used."""
    while (tale := make_tale(rng)).question in seen:
        pass
    question, root = tale.question, (0, tale.start)
    kind = rng.choices(("act", "plain", "verify", "refine", "output", "guard"), PAIR_WEIGHTS)[0]
    if kind == "guard":
        question, answer = make_guard(rng)
        return question_messages(question), f"So \\boxed{{{answer}}}."
    if kind == "plain":
        return question_messages(question), write_line("direct_answer", tale, root).text
    slip = (rng.randrange(len(tale.changes)), rng.choice(SLIPS))
    path = write_path(tale, root, None, rng, slip if rng.random() < SLIP_SHARE else None)
    cut = rng.randrange(len(path))
    done, line = path[:cut], path[cut]
    if kind == "act":
        line = write_line(line.act, tale, line.begin)
        return ask(line.act, question, text_of(done)), line.text
    if kind == "output":
        line = path[-1]
        return ask("output", question, text_of(path)), write_line("output", tale, line.end).text
    if line.begin[0] == len(tale.changes):
        done, line = [], path[0]
    act = done[-1].act if done else None
    slip = (rng.randrange(line.begin[0], len(tale.changes)), rng.choice(SLIPS))
    wrong = write_path(tale, line.begin, act, rng, slip)
    check = write_check(tale, line.begin, slip)
    if kind == "refine":
        messages = ask_refine(question, text_of([*done, *wrong]), check)
        return messages, f"Back to {line.begin[1]}, before {tale.changes[line.begin[0]].verb}."
    right = write_path(tale, line.begin, act, rng)
    return ask_verify(question, text_of(done), text_of(wrong), text_of(right)), check


# ---- Tokenizer ----


def build_tokenizer() -> PreTrainedTokenizerBase:
    """Qwen2's tokenizer over bytes, plus one entry for every phrase of this world.

    Phrases keep sequences short; digits are never merged; any other text falls back to bytes. It is
    Qwen2's own class because AutoTokenizer opens no other for a Qwen2 folder.
    """
    from tokenizers import AddedToken, pre_tokenizers
    from transformers import Qwen2Tokenizer

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Qwen2Tokenizer(
        vocab={character: index for index, character in enumerate(alphabet)},
        unk_token=None,
        pad_token="<|pad|>",
        eos_token="<|end|>",
        additional_special_tokens=["<|system|>", "<|user|>", "<|assistant|>"],
    )
    tokenizer.add_tokens([AddedToken(phrase, normalized=False) for phrase in sorted(_phrases())])
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content }}"
        "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
    )
    return tokenizer


def _phrases() -> set[str]:
    """The fixed parts of prompts, replies and questions."""
    hole = "\0"
    prompts = [ask(act, hole, hole) for act in ACTS]
    prompts += [ask_verify(hole, hole, hole, hole), ask_refine(hole, hole, hole)]
    phrases = {part for messages in prompts for part in messages[0]["content"].split(hole)}
    phrases |= {description_of(f"<{act}>") for act in ACTS} | {"end: "}
    phrases |= {f"{name} has " for name in NAMES} | {f" {thing}" for thing in THINGS}
    phrases |= {verb if sum_[1:] else f"{verb} " for verb, sum_ in VERBS.items()}
    phrases |= {"Which is larger, ", "Which is smaller, ", " or ", ". How many now?", "Given: "}
    phrases |= {
        ". Asked: how many now.",
        "It takes ",
        "Back to ",
        ", before ",
        ", not ",
        " is not ",
    }
    phrases |= {
        "The final answer is \\boxed{",
        "so \\boxed{",
        "So \\boxed{",
        "}.",
        ", ",
        ": ",
        "? ",
    }
    return phrases - {""}


# ---- Model ----


def train_model(
    config: TinyConfig, tokenizer: PreTrainedTokenizerBase, pairs: Iterator[tuple[Messages, str]]
) -> Qwen2ForCausalLM:
    """A Qwen2 model trained from scratch on the replies."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM, get_cosine_schedule_with_warmup

    torch.manual_seed(config.seed)
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=len(tokenizer),
            hidden_size=config.hidden_size,
            intermediate_size=config.hidden_size * 8 // 3,
            num_hidden_layers=config.num_hidden_layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=1024,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=config.learning_rate, betas=(0.9, 0.98), weight_decay=0.01
    )
    schedule = get_cosine_schedule_with_warmup(
        optimizer, config.train_steps // 20, config.train_steps
    )
    for step, (ids, labels) in zip(
        range(config.train_steps), _batches(config, tokenizer, pairs), strict=False
    ):
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
        counts = labels[:, 1:] != IGNORED
        loss = torch.nn.functional.cross_entropy(
            model.lm_head(hidden[counts]), labels[:, 1:][counts]
        )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 100 == 99:
            sys.stderr.write(f"tiny: step {step + 1}/{config.train_steps} loss {loss:.3f}\n")
    return model.eval()


def _batches(
    config: TinyConfig, tokenizer: PreTrainedTokenizerBase, pairs: Iterator[tuple[Messages, str]]
) -> Iterator[tuple[Tensor, Tensor]]:
    """(ids, labels), both (batch_size, T), padded on the right; pairs of like length together."""
    import torch

    rng = Random(config.seed)
    while True:
        rows = [_encode(tokenizer, *next(pairs)) for _ in range(16 * config.batch_size)]
        rows.sort(key=lambda row: len(row[0]))
        starts = list(range(0, len(rows), config.batch_size))
        rng.shuffle(starts)
        for start in starts:
            batch = rows[start : start + config.batch_size]
            width = max(len(ids) for ids, _ in batch)
            pad = tokenizer.pad_token_id
            yield (
                torch.tensor([ids + [pad] * (width - len(ids)) for ids, _ in batch]),
                torch.tensor([labels + [IGNORED] * (width - len(labels)) for _, labels in batch]),
            )


def _encode(
    tokenizer: PreTrainedTokenizerBase, messages: Messages, reply: str
) -> tuple[list[int], list[int]]:
    prompt = encode_chat(tokenizer, messages)
    response = [*tokenizer.encode(reply), tokenizer.eos_token_id]
    return prompt + response, [IGNORED] * len(prompt) + response


# ---- Files ----


def main(config: TinyConfig) -> None:
    from transformers import GenerationConfig

    folder, rng = Path(config.output_dir), Random(config.seed)
    seen: set[str] = set()
    for name, n in (("test", config.n_test), ("train", config.n_train)):
        tales = []
        while len(tales) < n:
            if (tale := make_tale(rng)).question not in seen:
                seen.add(tale.question)
                tales.append(tale)
        write_jsonl(folder / f"{name}.jsonl", [_row(f"{name}-{i}", t) for i, t in enumerate(tales)])
    guard = [make_guard(rng) for _ in range(config.n_guard)]
    write_jsonl(
        folder / "guard.jsonl",
        [{"id": f"guard-{i}", "problem": q, "answer": a} for i, (q, a) in enumerate(guard)],
    )
    tokenizer = build_tokenizer()
    held_out = seen | {question for question, _ in guard}
    model = train_model(config, tokenizer, iter(lambda: make_pair(rng, held_out), None))
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    model.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")


def _row(name: str, tale: Tale) -> dict[str, Any]:
    return {
        "id": name,
        "problem": tale.question,
        "answer": str(tale.values[-1]),
        "level": len(tale.changes),
    }


if __name__ == "__main__":
    cli(main, TinyConfig)
