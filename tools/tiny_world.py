"""Make the demo world: word problems, a tokenizer, and a Qwen2 model trained from scratch.

    python tools/tiny_world.py output_dir=outputs/tiny [family=tale] [seed=0] [train_steps=2500]

This writes `base/` (a Hugging Face folder), `train.jsonl`, `test.jsonl` and `guard.jsonl`. The
model is trained on replies to the prompts of rftt/prompts.py. It becomes an imperfect instruct
model, which follows every instruction but makes mistakes. No code in rftt/ depends on this world.

Acts differ in reliability, so that choosing among them matters (arXiv 2502.13389). `analysis` and
`subquestion` spell sums out ("19*3=57"). `next_step` and `direct_answer` only name results, which
`verify` spells out. No answer equals an earlier value, so checks seldom leak it.

Two families are harder (docs/log.md has what was tried). `long` has more operations per problem. In
`inverse` the end is given, and the start is one of GUESSES numbers. Checking is easier than
solving: an act names a guess, `verify` spells out where it leads, and another guess may follow.
"""

from __future__ import annotations

import operator
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from rftt.engines.chat import encode_chat
from rftt.prompts import Messages, question_messages
from rftt.run.cli import cli
from rftt.run.config import Count, LocalPath, Seed, Whole, config_class
from rftt.run.files import make_folder, write_jsonl
from rftt.run.prompts_file import load_prompts
from rftt.tokens import ACTS, description_of, successors
from rftt.types import UserError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase, Qwen2ForCausalLM


Family = Literal["tale", "long", "inverse"]


@config_class
class TinyConfig:
    """tools/tiny_world.py: write the demo world (base model and problem files)."""

    output_dir: LocalPath
    """Folder that receives the model and the three files."""
    family: Family = "tale"
    """Kind of problems: `tale`, `long` (more operations) or `inverse` (the start is asked for)."""
    seed: Seed = 0
    """Seed of the problems, the initial weights and the order of the examples."""
    train_steps: Count = 2500
    """Optimizer steps of the base model: about 0.07 CPU seconds each."""
    n_train: Count = 2000
    """Problems for search and RL."""
    n_test: Count = 500
    """Held-out problems, which occur neither in train.jsonl nor in the base model's examples."""
    n_guard: Whole = 300
    """Problems of another family, to measure forgetting."""


# ---- Problems ----

NAMES = ("Eva", "Tom", "Mia", "Ben", "Zoe", "Sam")
THINGS = ("pens", "nuts", "keys", "eggs", "cards", "coins")
VERBS = {"finds ": "+", "buys ": "+", "wins ": "+", "sells ": "-", "loses ": "-", "drops ": "-"}
VERBS |= {"doubles them": "*2", "triples them": "*3", "halves them": "/2"}
APPLY = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.floordiv}
MAX_VALUE, MAX_AMOUNT = 99, 9
OPERATIONS = {"tale": (1, 4), "long": (2, 5), "inverse": (2, 3)}
"""Family -> the smallest and the largest number of operations of a problem."""
GUESSES = 3
"""Numbers that may be the answer of an `inverse` problem, as its question states."""


@dataclass(frozen=True)
class Change:
    """One operation: `verb` as in the question ("sells 3"), and its arithmetic, `sum` ("-3")."""

    verb: str
    sum: str

    def apply(self, value: int) -> int:
        """Return the quantity after this change."""
        return APPLY[self.sum[0]](value, int(self.sum[1:]))


@dataclass(frozen=True)
class Tale:
    """A word problem: the changes of one quantity, whose end or (`inverse`) start is unknown."""

    name: str
    thing: str
    start: int
    changes: tuple[Change, ...]
    more_than: int | None = None
    """For `inverse`: the start is one of the GUESSES numbers after this one."""

    @property
    def inverse(self) -> bool:
        """Whether the start is the unknown quantity."""
        return self.more_than is not None

    @property
    def guesses(self) -> range:
        """Numbers that may be the start."""
        first = self.start if self.more_than is None else self.more_than + 1
        return range(first, first + (GUESSES if self.inverse else 1))

    @property
    def question(self) -> str:
        """Text of the problem."""
        told = ", ".join(change.verb for change in self.changes)
        if self.inverse:
            known = f"Now {self.end}. Between {self.more_than} and {self.guesses.stop} at first"
            return f"{self.name} has some {self.thing}, {told}. {known}. How many?"
        return f"{self.name} has {self.start} {self.thing}, {told}. How many now?"

    @property
    def values(self) -> list[int]:
        """Return the quantity before the first change, after it, …, at the end."""
        return self.values_from(self.start)

    def values_from(self, start: int) -> list[int]:
        """Return the values that follow from another start, such as a guess."""
        values = [start]
        for change in self.changes:
            values.append(change.apply(values[-1]))
        return values

    @property
    def end(self) -> int:
        """The quantity after the last change."""
        return self.values[-1]

    @property
    def answer(self) -> int:
        """The unknown quantity."""
        return self.start if self.inverse else self.end


def make_tale(rng: Random, seen: set[str], family: Family = "tale") -> Tale:
    """Return a random problem whose question is not in `seen`.

    Verbs are distinct, values are in 1 … MAX_VALUE, and no other value equals the answer. The same
    holds for the values that follow from the other guesses of `inverse`. Nothing is halved there:
    an odd guess could not be checked.
    """
    n, inverse = rng.randint(*OPERATIONS[family]), family == "inverse"
    known = [verb for verb in VERBS if not (inverse and VERBS[verb] == "/2")]
    while True:
        verbs = rng.sample(known, n)
        amount = [str(rng.randint(2, MAX_AMOUNT)) if VERBS[v] in APPLY else "" for v in verbs]
        changes = [Change(v + a, VERBS[v] + a) for v, a in zip(verbs, amount, strict=True)]
        start, name, thing = rng.randint(2, 40), rng.choice(NAMES), rng.choice(THINGS)
        more_than = start - rng.randint(1, GUESSES) if inverse else None
        tale = Tale(name, thing, start, tuple(changes), more_than)
        *before, _ = values = tale.values
        whole = all(v % 2 == 0 or c.sum != "/2" for v, c in zip(before, changes, strict=True))
        reached = [v for g in (tale.guesses[0], tale.guesses[-1]) for v in tale.values_from(g)]
        in_range = min(reached) >= 1 and max(reached) <= MAX_VALUE
        new = values.count(tale.answer) == 1
        if whole and in_range and new and tale.question not in seen:
            return tale


def make_guard(rng: Random, seen: set[str]) -> tuple[str, str]:
    """Return a question and its answer from the other family."""
    while True:
        pair = rng.sample(range(1, MAX_VALUE + 1), 2)
        word, choose = rng.choice([("larger", max), ("smaller", min)])
        if (question := f"Which is {word}, {pair[0]} or {pair[1]}?") not in seen:
            return question, str(choose(pair))


# ---- Replies ----

Point = tuple[int, int]  # number of changes done, and the value after them
SHARES = {"clarify": 1, "analysis": 3, "subquestion": 4, "next_step": 1, "direct_answer": 0.5}
"""Relative frequency of each act in the examples. Terse acts are rare, hence less reliable."""
AFTER_REFINE = ("subquestion", "next_step", "direct_answer")
Slip = tuple[int, int]  # index of the wrong change, and its error; for `inverse` that of the guess
UNDO = {"+": "-", "-": "+", "*": "/"}
Lines = list["Line"]


class Line(NamedTuple):
    """One reply, with the points of the tale at which it begins and ends."""

    act: str
    text: str
    begin: Point
    end: Point


def write_line(act: str, tale: Tale, begin: Point, slip: Slip | None = None) -> Line:
    """Write a correct reply to `act` at `begin`. `slip` makes one of its results wrong."""
    if tale.inverse:
        return write_guess(act, tale, tale.start + (slip[1] if slip else 0))
    (done, value), left = begin, len(tale.changes) - begin[0]
    reach = {"analysis": min(2, left - 1), "direct_answer": left}
    reach |= dict.fromkeys(("subquestion", "next_step"), min(1, left))
    end = done + reach.get(act, 0)
    terse, spelled = [], []
    for i in range(done, end):
        change, before = tale.changes[i], value
        value = change.apply(value) + (slip[1] if slip and slip[0] == i else 0)
        terse.append(f"{change.verb}: {value}" if act == "next_step" else f"{value}")
        link = " gives " if act == "analysis" else "? "
        spelled.append(f"{change.verb}{link}{before}{change.sum}={value}")
    boxed = f"so \\boxed{{{value}}}."
    match act:
        case "clarify":
            text = f"Given: {value} {tale.thing}. Asked: how many now."
        case "analysis" if not spelled:
            text = f"{tale.changes[done].verb} gives {value}{tale.changes[done].sum}."
        case "analysis" | "subquestion":
            text = ", ".join(spelled) + "."
        case "next_step" if end < len(tale.changes):
            text = ", ".join(terse) + "."
        case "output":
            text = f"The final answer is \\boxed{{{value}}}."
        case _:
            text = ", ".join([*terse, boxed])
    return Line(act, text, begin, (end, value))


def write_guess(act: str, tale: Tale, guess: int) -> Line:
    """Write a reply to `act` for `inverse`. It undoes at most the last change, and then guesses."""
    last, (before, end) = tale.changes[-1], tale.values[-2:]
    undone = f"before {last.verb}{{}} {end}{UNDO[last.sum[0]]}{last.sum[1:]}"
    match act:
        case "clarify":
            text = f"Given: {end} {tale.thing} now. Asked: how many at first."
        case "analysis":
            text = f"{undone.format(':')}."
        case "subquestion":
            text = f"{undone.format('?')}={before}."
        case "output":
            text = f"The final answer is \\boxed{{{guess}}}."
        case _:
            text = f"{'try' if act == 'next_step' else 'so'} \\boxed{{{guess}}}."
    return Line(act, text, (0, guess), (0, guess))


def write_path(tale: Tale, at: Point, act: str | None, rng: Random, slip: Slip | None) -> Lines:
    """Write a random path of phase 1's allowed acts from `at`, after `act`, to a boxed answer."""
    lines: Lines = []
    while not (lines and "\\boxed" in lines[-1].text):
        acts = AFTER_REFINE if act == "refine" else successors(act, "prompted")
        (act,) = rng.choices(acts, [SHARES[a] for a in acts])
        lines.append(write_line(act, tale, at, slip))
        at = lines[-1].end
    return lines


def text_of(lines: Lines) -> str:
    """Return the replies as text, one per line."""
    return "\n".join(line.text for line in lines)


def write_check(tale: Tale, begin: Point, slip: Slip) -> str:
    """Write a check that spells out the changes from `begin` to the wrong one.

    The last result is omitted, so that the check does not contain the answer. For `inverse` the
    check spells out where the wrong guess leads.
    """
    if tale.inverse:
        values = tale.values_from(tale.start + slip[1])
        steps = zip(values, tale.changes, values[1:], strict=False)
        sums = ", ".join(f"{a}{change.sum}={b}" for a, change, b in steps)
        return f"{sums}, not {tale.end}."
    value, sums = begin[1], []
    for change in tale.changes[begin[0] : slip[0] + 1]:
        sums.append(f"{value}{change.sum}={(value := change.apply(value))}")
    if slip[0] < len(tale.changes) - 1:
        return ", ".join(sums) + f", not {value + slip[1]}."
    return ", ".join(sums).rpartition("=")[0] + f" is not {value + slip[1]}."


def write_turn(tale: Tale, begin: Point, slip: Slip) -> str:
    """Write the sentence that leads back to the point before a mistake.

    For `inverse` it names the larger of the end that a guess leads to and the one that is given.
    """
    if tale.inverse:
        reached = tale.values_from(tale.start + slip[1])[-1]
        return f"Back, {max(reached, tale.end)} is larger."
    return f"Back to {begin[1]}, before {tale.changes[begin[0]].verb}."


# ---- (prompt, reply) pairs ----

PAIRS = {"act": 48, "bare": 20, "plain": 2, "verify": 12, "refine": 4, "output": 3, "guard": 7}
"""Shares of the kinds of training examples.

`bare` asks for an act without role, examples and label. The question is then where a bare question
has it, so that the warm-up starts from a model that can read one (docs/log.md).
"""
CHECKED = {"act": 30, "verify": 40, "refine": 20}
"""The shares that differ for `inverse`: only checks spell sums out, and refine compares numbers."""
SLIPS = (-11, -10, -9, -2, -1, 1, 2, 9, 10, 11)
CORRECTIONS = 0.5
"""Share of the `inverse` examples whose solution so far ends with a wrong guess and its check.

Without them the base has never read a check, and its second guess is as bad as its first.
"""
PROMPTS = load_prompts(str(Path(__file__).parents[1] / "data/tiny/prompts.yaml"))
LABEL, AFTER = PROMPTS.templates["act"].split("{question}")
SO_FAR = AFTER.split("{so_far}")[0]
"""Heading of the solution so far."""
IGNORED, BATCH = -100, 24  # label of tokens without loss, and pairs per optimizer step


class Pair(NamedTuple):
    """One training example of the base model: a prompt and its reply."""

    messages: Messages
    reply: str
    sound: bool = False
    """Whether the solution so far is right, so that it is trained on like the reply."""


def make_slip(rng: Random, tale: Tale, first: int = 0) -> Slip:
    """Return a random mistake in one of the changes from `first` on, or in a guess."""
    if tale.inverse:
        return 0, rng.choice([guess for guess in tale.guesses if guess != tale.start]) - tale.start
    return rng.randrange(first, len(tale.changes)), rng.choice(SLIPS)


def make_pair(rng: Random, seen: set[str], family: Family = "tale") -> Pair:
    """Make one training example of the base model. Questions in `seen` are not used."""
    tale = make_tale(rng, seen, family)
    question, root = tale.question, (0, tale.start)
    shares = PAIRS | CHECKED if tale.inverse else PAIRS
    (kind,) = rng.choices(list(shares), list(shares.values()))
    if kind == "guard":
        asked, answer = make_guard(rng, seen)
        return Pair(question_messages(asked), f"So \\boxed{{{answer}}}.")
    if kind == "plain":
        return Pair(question_messages(question), write_line("direct_answer", tale, root).text)
    slip = make_slip(rng, tale)
    sound = rng.random() < 0.8  # else the reply continues from a mistake
    path = write_path(tale, root, None, rng, None if sound else slip)
    if kind == "output":
        guessed = slip if tale.inverse and not sound else None  # output repeats a wrong guess
        reply = write_line("output", tale, path[-1].end, guessed).text
        return Pair(PROMPTS.ask("output", question, text_of(path)), reply, sound)
    failed: Lines = []
    if tale.inverse and kind in ("act", "bare") and rng.random() < CORRECTIONS:
        failed, sound = write_path(tale, root, None, rng, slip), False
        for text in (write_check(tale, root, slip), write_turn(tale, root, slip)):
            failed.append(Line("refine", text, root, root))
        path = write_path(tale, root, "refine", rng, None)
    (cut,) = rng.choices(range(len(path)), [SHARES[line.act] for line in path])
    done, line = failed + path[:cut], path[cut]
    if kind in ("act", "bare"):
        line = write_line(line.act, tale, line.begin)
        messages = PROMPTS.ask(line.act, question, text_of(done))
        if kind == "bare":  # the last message alone
            messages = question_messages(messages[-1]["content"].removeprefix(LABEL))
        return Pair(messages, line.text, sound)
    if line.begin[0] == len(tale.changes):
        done, line = [], path[0]
    act = done[-1].act if done else None
    slip = make_slip(rng, tale, line.begin[0])
    wrong = write_path(tale, line.begin, act, rng, slip)
    check = write_check(tale, line.begin, slip)
    if kind == "refine":
        reply = write_turn(tale, line.begin, slip)
        messages = PROMPTS.ask("refine", question, text_of([*done, *wrong]), {"check": check})
        return Pair(messages, reply)
    right = write_path(tale, line.begin, act, rng, None)
    parts = {"wrong": text_of(wrong), "correct": text_of(right)}
    return Pair(PROMPTS.ask("verify", question, text_of(done), parts), check)


# ---- Tokenizer ----

PAD, END = "<|pad|>", "<|end|>"


def build_tokenizer(family: Family = "tale", n_unused: int = 0) -> PreTrainedTokenizerBase:
    """Build Qwen2's tokenizer over bytes, plus one entry for every phrase of this world.

    Phrases keep sequences short, digits are never merged, and other text is encoded as bytes. The
    class is Qwen2's, because AutoTokenizer uses no other one for a Qwen2 folder. Ids that no text
    uses (`n_unused`) make the vocabulary as large as a real model's.
    """
    from tokenizers import pre_tokenizers
    from transformers import AddedToken, Qwen2Tokenizer

    entries = sorted(pre_tokenizers.ByteLevel.alphabet()) + [f"unused{i}" for i in range(n_unused)]
    tokenizer = Qwen2Tokenizer(
        vocab={entry: i for i, entry in enumerate(entries)},
        unk_token=PAD,
        pad_token=PAD,
        eos_token=END,
        additional_special_tokens=["<|system|>", "<|user|>", "<|assistant|>"],
    )
    for phrase in sorted(_phrases(family)):
        tokenizer.add_tokens(AddedToken(phrase, normalized=False))
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content }}"
        "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
    )
    return tokenizer


PHRASES = (
    "Which is larger, |Which is smaller, | or |. How many now?|Given: |. Asked: how many now.|"
    " gives |Back to |, before |, not | is not |The final answer is \\boxed{|so \\boxed{|"
    "So \\boxed{|}.|, |: |? "
)
GUESSED = (
    ". Now |. Between | and | at first. How many?|. Asked: how many at first.|try \\boxed{|Back, |"
    " is larger."
)
"""Further phrases of `inverse`."""


def _phrases(family: Family) -> set[str]:
    """Return the fixed parts of prompts, replies and questions."""
    hole = "\0"
    others = {"wrong": hole, "correct": hole, "check": hole}
    shown = [PROMPTS.ask(act, hole, hole, others) for act in ACTS]
    texts = [message["content"] for messages in shown for message in messages]
    phrases = {part for text in texts for part in text.split(hole)} | {PROMPTS.nothing_yet}
    phrases |= {description_of(f"<{act}>") for act in ACTS} | {"end: "}
    if family == "inverse":
        phrases |= {f"{name} has some" for name in NAMES} | set(GUESSED.split("|"))
    phrases |= {f"{name} has " for name in NAMES} | {f" {thing}" for thing in THINGS}
    return phrases.union(VERBS, PHRASES.split("|")) - {""}


# ---- Model ----


def train_model(
    config: TinyConfig, tokenizer: PreTrainedTokenizerBase, pairs: Iterator[Pair]
) -> Qwen2ForCausalLM:
    """Train a Qwen2 model from scratch on the replies."""
    from torch.nn.functional import cross_entropy
    from transformers import Qwen2Config, Qwen2ForCausalLM, get_cosine_schedule_with_warmup

    torch.manual_seed(config.seed)
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=len(tokenizer),
            hidden_size=96,
            intermediate_size=256,
            num_hidden_layers=4,
            num_attention_heads=3,
            num_key_value_heads=3,
            max_position_embeddings=1024,
            tie_word_embeddings=True,
            initializer_range=0.1,
            bos_token_id=None,
            eos_token_id=tokenizer.get_vocab()[END],
            pad_token_id=tokenizer.get_vocab()[PAD],
        )
    )
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if all(p is not m for m in matrices)]
    n, rate = config.train_steps, 1e-2
    adamw = torch.optim.AdamW(others, lr=rate / 6, betas=(0.9, 0.98))
    optimizers = [Muon(matrices, lr=rate), adamw]
    schedules = [get_cosine_schedule_with_warmup(o, n // 20, n) for o in optimizers]
    batches = _batches(config, tokenizer, pairs)
    for step, (tokens, labels) in zip(range(n), batches, strict=False):
        hidden = model.model(input_ids=tokens, use_cache=False).last_hidden_state[:, :-1]
        counts = labels[:, 1:] != IGNORED
        loss = cross_entropy(model.lm_head(hidden[counts]), labels[:, 1:][counts])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for stepper in (*optimizers, *schedules):
            stepper.step()
        model.zero_grad()
        if step % 100 == 99:
            sys.stderr.write(f"tiny: step {step + 1}/{n} loss {loss:.3f}\n")
    return model.eval()


class Muon(torch.optim.Optimizer):
    """Muon in float32 for 2-D matrices (Jordan 2024, kellerjordan.github.io/posts/muon).

    torch.optim.Muon orthogonalizes in bfloat16. A CPU without bfloat16 instructions emulates it, so
    that a step takes 0.51 s instead of 0.026 s.
    """

    def __init__(self, matrices: Sequence[Tensor], lr: float) -> None:
        shapes = dict.fromkeys(matrix.shape for matrix in matrices)
        groups = [{"params": [m for m in matrices if m.shape == shape]} for shape in shapes]
        super().__init__(groups, {"lr": lr, "momentum": 0.95, "weight_decay": 0.01})

    @torch.no_grad()
    def step(self) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        for group in self.param_groups:  # one for each shape, so that its matrices share products
            matrices, rate, momentum = group["params"], group["lr"], group["momentum"]
            gradients = torch.stack([matrix.grad for matrix in matrices])  # (n, rows, columns)
            average = self.state[matrices[0]].setdefault("average", torch.zeros_like(gradients))
            average.lerp_(gradients, 1 - momentum)
            updates = orthogonalize(gradients.lerp(average, momentum))  # Nesterov's momentum
            _, rows, columns = updates.shape
            for matrix, update in zip(matrices, updates, strict=True):
                matrix.mul_(1 - rate * group["weight_decay"])
                matrix.add_(update, alpha=-rate * max(1.0, rows / columns) ** 0.5)


def orthogonalize(x: Tensor) -> Tensor:
    """Return (n, rows, columns) matrices with the singular vectors of x and values near 1.

    Five Newton-Schulz steps with Jordan's coefficients: the values end between 0.6 and 1.3.
    """
    if x.shape[-2] > x.shape[-1]:
        return orthogonalize(x.mT).mT
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x


def _batches(
    config: TinyConfig, tokenizer: PreTrainedTokenizerBase, pairs: Iterator[Pair]
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (ids, labels), both (BATCH, T) and right-padded, with pairs of similar length."""
    from torch.nn.utils.rnn import pad_sequence

    rng, pad = Random(config.seed), tokenizer.get_vocab()[PAD]
    while True:
        rows = [_encode(tokenizer, next(pairs)) for _ in range(16 * BATCH)]
        rows.sort(key=lambda row: len(row[0]))
        batches = [rows[i : i + BATCH] for i in range(0, len(rows), BATCH)]
        rng.shuffle(batches)
        for batch in batches:
            ids, labels = ([torch.tensor(c) for c in column] for column in zip(*batch, strict=True))
            yield pad_sequence(ids, True, pad), pad_sequence(labels, True, IGNORED)


def _encode(tokenizer: PreTrainedTokenizerBase, pair: Pair) -> tuple[list[int], list[int]]:
    prompt = encode_chat(tokenizer, pair.messages)
    labels = [IGNORED] * len(prompt)
    if pair.sound:  # all between the heading and the instruction
        (heading,) = tokenizer.encode(SO_FAR)
        begin = prompt.index(heading) + 1  # an example is one id, and so is the instruction
        labels[begin:-2] = prompt[begin:-2]
    response = tokenizer.encode(pair.reply + END)
    return prompt + response, labels + response


# ---- Files ----


def main(config: TinyConfig) -> None:
    """Write the problem files, train the base model and write it last."""
    folder, rng, seen = Path(config.output_dir), Random(config.seed), set[str]()
    make_folder(folder)
    if (folder / "base").exists():  # new problem files would not fit the existing model
        raise UserError(f"{folder}/base already exists; remove it or use another output_dir.")
    for name, n in (("test", config.n_test), ("train", config.n_train)):
        rows = []
        for i in range(n):
            tale = make_tale(rng, seen, config.family)
            seen.add(tale.question)
            own = Random(f"{config.seed}-{name}-{i}")  # solutions do not change the problems
            lines = write_path(tale, (0, tale.start), None, own, None)
            row = {"id": f"{name}-{i}", "problem": tale.question, "solution": text_of(lines)}
            rows.append(row | {"answer": str(tale.answer), "level": len(tale.changes)})
        write_jsonl(folder / f"{name}.jsonl", rows)
    guard = dict(make_guard(rng, seen) for _ in range(config.n_guard))
    rows = [{"id": f"guard-{i}", "problem": q, "answer": guard[q]} for i, q in enumerate(guard)]
    write_jsonl(folder / "guard.jsonl", rows)
    seen |= set(guard)
    tokenizer = build_tokenizer(config.family)
    pairs = iter(lambda: make_pair(rng, seen, config.family), None)
    model = train_model(config, tokenizer, pairs)
    for part in (model.bfloat16(), tokenizer):  # half the size on disk
        part.save_pretrained(folder / "base.tmp")
    (folder / "base.tmp").rename(folder / "base")  # so an existing base is complete


if __name__ == "__main__":
    cli(main, TinyConfig)
