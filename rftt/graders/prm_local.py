"""Run a process reward model in this process: three families with one batched forward pass.

Families differ in the format of a solution (`StepFormat`) and in the output at the end of each step
(`Readout`):

math_shepherd: the input of a causal LM is "Step 1: … ки". The score is P(good) among the good and
    the bad token (arXiv 2312.08935).
qwen: a two-class head at `<extra_0>` in the assistant's turn (Qwen2.5-Math-PRM, 2501.07301).
value: a head with one output and a sigmoid at the end of each line (Skywork-o1-Open-PRM and other
    value heads), or a head with two classes (TRL's PRMTrainer).

1. A step's mark is the token with the last character of its tag, found by character offsets. A tag
   that a step quotes does not cause another score.
2. The head is read directly from the safetensors (`score.*`, `v_head.*`, `classifier.*`), so no
   code of a model folder is executed.
3. Rows are padded on the right, which causal attention does not reach. A mask is not needed.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from torch import Tensor
from torch.nn.functional import linear
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModel, AutoModelForCausalLM

from rftt.engines.chat import load_tokenizer
from rftt.engines.loop import StepLoop
from rftt.engines.opened import HEADS, check_files, check_same, logit_head, open_model, probes
from rftt.engines.templates import CUT, FAULTS, cut_control, single_template, with_date
from rftt.engines.vocabulary import check_question, check_text
from rftt.graders.prm import TAG, Unscored, checked
from rftt.prompts import question_messages
from rftt.run.files import one_line
from rftt.types import UserError

if TYPE_CHECKING:
    import asyncio

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from rftt.graders.prm import ProcessConfig
    from rftt.run.config import ServeConfig

Readout = Callable[[Tensor], Tensor]
"""(S, hidden) states at the marks -> (S,) scores."""
Head = list[tuple[Tensor, Tensor | None]]
"""Weight and bias of each layer, with a ReLU between two layers."""


@dataclass(frozen=True)
class StepFormat:
    """Format of a solution for one family of models."""

    tag: str
    """Mark of the end of a step."""
    step: str
    """Template of the text before the tag."""
    between: str = ""
    """Text between two steps."""
    lead: str = ""
    """Text between the question and the first step."""
    chat: bool = False
    """Whether the question is the user's turn and the steps are the assistant's turn."""


FORMATS = {
    "math_shepherd": StepFormat(TAG, "Step {n}: {text} ", between="\n", lead=" "),
    "qwen": StepFormat("<extra_0>", "{text}", chat=True),
    "value": StepFormat("\n", "{text}", lead="\n"),
}


@dataclass(frozen=True)
class Writer:
    """Encoder of solutions for the model of a family."""

    tokenizer: PreTrainedTokenizerBase
    form: StepFormat
    tag: str
    system_prompt: str | None = None

    def write(self, question: str, steps: Sequence[str]) -> tuple[str, list[int]]:
        """Return the input text and the position of the last character of each step's tag.

        Question and steps are foreign texts: CUT marks where their control texts are cut, so that
        no piece becomes a control id. Positions do not count the CUTs.
        """
        body, ends, form = "", [], self.form
        question = cut_control(self.tokenizer, question)
        steps = [cut_control(self.tokenizer, text, in_responses=True) for text in steps]
        for n, text in enumerate(steps, 1):
            body += form.between if body else ""
            body += form.step.format(n=n, text=text.strip()) + self.tag
            ends.append(len(body) - 1)
        text = question.strip() + form.lead + body
        if form.chat:
            turns = [("system", self.system_prompt)] if self.system_prompt else []
            turns += [("user", question), ("assistant", body)]
            messages = [{"role": role, "content": content} for role, content in turns]
            try:
                text = str(self.tokenizer.apply_chat_template(messages, tokenize=False))
            except FAULTS as error:
                raise UserError(
                    f"the PRM's chat template must accept the roles {', '.join(dict(turns))} "
                    f"({one_line(error)}); use a tokenizer with another template."
                ) from error
        start = text.rfind(body)
        if start < 0:
            raise UserError(
                "the PRM's chat template must keep the assistant's turn unchanged, but changes it; "
                "use a tokenizer with another template."
            )
        return text, [_bare(text[: start + end]) for end in ends]

    def encode(self, question: str, steps: Sequence[str]) -> tuple[list[int], list[int]]:
        """Return the token ids of a path and the index of the token that scores each step."""
        text, ends = self.write(question, steps)
        ids, spans = self._tokens(text.split(CUT))
        held = [(stop, i) for i, (start, stop) in enumerate(spans) if stop > start]
        stops = [stop for stop, _ in held]
        # One character may have several tokens with equal offsets, one per byte. The last counts.
        last = [bisect_right(stops, stops[bisect_right(stops, end)]) - 1 for end in ends]
        return ids, [held[i][1] for i in last]

    def _tokens(self, pieces: list[str]) -> tuple[list[int], list[tuple[int, int]]]:
        """Return ids and character offsets of a text in pieces, which no token crosses."""
        encode: Any = partial(self.tokenizer, return_offsets_mapping=True)
        if len(pieces) == 1:
            whole = encode(pieces[0], add_special_tokens=not self.form.chat)
            return list(whole["input_ids"]), list(whole["offset_mapping"])
        ids: list[int] = []
        spans: list[tuple[int, int]] = []
        begin = 0
        for piece in pieces:
            part = encode(piece, add_special_tokens=False)
            ids += part["input_ids"]
            spans += [(begin + start, begin + stop) for start, stop in part["offset_mapping"]]
            begin += len(piece)
        if not self.form.chat:  # the special tokens around a text, such as BOS
            around, bare = (
                encode("x", add_special_tokens=special)["input_ids"] for special in (True, False)
            )
            n_before = next((i for i, one in enumerate(around) if one == bare[0]), 0)
            before, after = around[:n_before], around[n_before + len(bare) :]
            ids = [*before, *ids, *after]
            spans = [*[(0, 0)] * len(before), *spans, *[(begin, begin)] * len(after)]
        return ids, spans


def _bare(text: str) -> int:
    """Return the number of characters without the CUTs."""
    return len(text) - text.count(CUT)


def settle_template(
    tokenizer: PreTrainedTokenizerBase, cfg: ProcessConfig | ServeConfig, *, check: bool
) -> None:
    """Fix the date in a PRM's template. Raises UserError if the template drops the question.

    The date is that of the run, or of the day on which a server starts.
    """
    day = getattr(cfg, "template_date", None)
    today = date.fromisoformat(day) if day else date.today()
    tokenizer.chat_template = with_date(single_template(tokenizer, None), today)
    if check:
        reply = {"role": "assistant", "content": "1"}
        check_question(
            tokenizer,
            lambda question: [*question_messages(question, cfg.system_prompt), reply],
            "use a PRM with another template",
        )


@dataclass(eq=False)
class _Path:
    ids: list[int]
    marks: list[int]
    done: asyncio.Future[list[float]]


class LocalPRM:
    """Implementation of ProcessModel with one transformers model."""

    def __init__(self, cfg: ProcessConfig | ServeConfig) -> None:
        path, trust = str(cfg.prm_model_name_or_path), cfg.trust_remote_code
        if not cfg.skip_model_check:
            check_files(path, trust_remote_code=trust)
        tokenizer = load_tokenizer(path, trust_remote_code=trust, chat=False)
        if not tokenizer.is_fast:
            raise UserError(
                f"a PRM needs a fast tokenizer, which returns character offsets, but {path} has a "
                "slow one; add its tokenizer.json."
            )
        head, tag_id = read_head(path), tokenizer.convert_tokens_to_ids(FORMATS["qwen"].tag)
        family = cfg.prm_family
        if family == "auto":
            family = "value" if tag_id in (None, tokenizer.unk_token_id) else "qwen"
            family = family if head else "math_shepherd"
        if not head and family != "math_shepherd":
            raise UserError(
                f"prm_family={family} needs a score, v_head or classifier head, which {path} does "
                "not have; set prm_family: auto."
            )
        kind = AutoModelForCausalLM if family == "math_shepherd" else AutoModel
        dtype = getattr(torch, cfg.dtype)
        check, extra = not cfg.skip_model_check, HEADS if head else ()
        model = open_model(
            kind, path, dtype, trust_remote_code=trust, check=check, extra=extra
        ).requires_grad_(False)
        if check:
            check_text(tokenizer)
            check_padding(model)
        if cfg.device != "cpu" and torch.cuda.is_available():
            torch.nn.Module.cuda(model)
        self.device, self.max_length = model.device, model.config.max_position_embeddings
        if family == "math_shepherd":
            labels = label_ids(tokenizer, cfg.prm_good_token, cfg.prm_bad_token)
            rows = logit_head(model).rows(labels)
            self._readout: Readout = lambda hidden: rows.logits(hidden).softmax(-1)[:, 0]
            model = model.base_model
        else:
            self._readout = readout_of(_on(head, self.device), path)
        form = FORMATS[family]
        if form.chat:
            settle_template(tokenizer, cfg, check=check)
        tag = cfg.prm_step_tag or form.tag
        self._model, self.writer = model, Writer(tokenizer, form, tag, cfg.system_prompt)
        self._batch_tokens = cfg.prm_max_tokens_per_batch
        self._waiting: list[_Path] = []
        self._loop = StepLoop(self._step, self._waiting.clear)

    async def score(self, question: str, steps: Sequence[str]) -> list[float]:
        """See ProcessModel."""
        ids, marks = self.writer.encode(question, steps)
        if len(ids) > self.max_length:
            raise Unscored(
                f"path of {len(ids)} tokens; the process reward model accepts {self.max_length}"
            )
        path = _Path(ids, marks, self._loop.submit())
        self._waiting.append(path)
        try:
            return checked(await path.done, len(steps))
        except ValueError as error:  # a broken model returns NaN
            raise UserError(
                f"the process reward model must return scores from 0 to 1 ({error}); its weights "
                "are damaged, so use another prm_model_name_or_path."
            ) from error

    def close(self) -> None:
        """Do nothing, because nothing runs between two calls."""

    @torch.inference_mode()
    def _step(self) -> None:
        """Score all waiting paths, with paths of similar length in one batch."""
        waiting = sorted((p for p in self._waiting if not p.done.done()), key=lambda p: -len(p.ids))
        self._waiting.clear()
        while waiting:
            size = max(1, self._batch_tokens // len(waiting[0].ids))
            batch, waiting = waiting[:size], waiting[size:]
            rows = [torch.tensor(path.ids) for path in batch]
            ids = pad_sequence(rows, batch_first=True).to(self.device)
            hidden = self._model(input_ids=ids, use_cache=False).last_hidden_state
            at = [(row, mark) for row, path in enumerate(batch) for mark in path.marks]
            states = hidden[[row for row, _ in at], [mark for _, mark in at]]
            scores = iter(self._readout(states.float()).tolist())
            for path in batch:
                path.done.set_result([next(scores) for _ in path.marks])


def check_padding(model: PreTrainedModel) -> None:
    """Raise UserError if a path's hidden states depend on the padding behind it.

    They are compared in units of their standard deviation.
    """
    _, path = probes(model.config.get_text_config().vocab_size)

    @torch.inference_mode()
    def compute() -> tuple[Tensor, Tensor]:
        states = [
            model.base_model(
                input_ids=torch.tensor([ids], device=model.device), use_cache=False
            ).last_hidden_state[0, : len(path)].float()
            for ids in ([*path, *[0] * len(path)], path)
        ]  # fmt: skip
        return states[0] / states[1].std(), states[1] / states[1].std()

    check_same(model, "process reward model", compute, "hidden states")


def label_ids(tokenizer: Any, good: str, bad: str) -> list[int]:
    """Return the ids of the good and the bad token. Raises UserError unless each is a single id.

    They are encoded separately, because byte-level BPE would encode "+ -" as "+" and " -".
    """
    found = [tokenizer.encode(token, add_special_tokens=False) for token in (good, bad)]
    if any(len(ids) != 1 for ids in found):
        raise UserError(
            f"prm_good_token {good!r} and prm_bad_token {bad!r} must be one id each, got "
            f"{[len(ids) for ids in found]} ids; use the labels of this model, such as ' +'."
        )
    return [ids[0] for ids in found]


# ---- Heads ----

HEAD = re.compile(r"(?:score|v_head|classifier)\..*?(weight|bias)")


def read_head(path: str) -> Head:
    """Return the layers of a PRM's head, in order. A plain language model has none."""
    from huggingface_hub import snapshot_download

    kept = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
    folder = (
        Path(path) if Path(path).is_dir() else Path(snapshot_download(path, allow_patterns=kept))
    )
    found: dict[str, Tensor] = {}
    for file in sorted(folder.glob("[!.]*.safetensors")):
        with safe_open(file, "pt") as tensors:
            found |= {k: tensors.get_tensor(k).float() for k in tensors.keys() if HEAD.fullmatch(k)}  # noqa: SIM118
    weights = sorted(name for name in found if name.endswith("weight"))
    return [(found[name], found.get(name.removesuffix("weight") + "bias")) for name in weights]


def readout_of(head: Head, path: str) -> Readout:
    """Return the function from states to scores.

    Two outputs of the head are the classes wrong and right. A single output is a logit.
    """
    outputs, fits = len(head[-1][0]), all(len(a) == b.shape[1] for (a, _), (b, _) in pairwise(head))
    if outputs not in (1, 2) or not fits:
        raise UserError(
            f"the head of {path} must have consecutive layers and 1 or 2 outputs, got {outputs}; "
            "use a process reward model."
        )

    def readout(hidden: Tensor) -> Tensor:
        for i, (weight, bias) in enumerate(head):
            hidden = linear(hidden.relu() if i else hidden, weight, bias)
        return hidden.softmax(-1)[:, 1] if outputs == 2 else hidden.sigmoid()[:, 0]

    return readout


def _on(head: Head, device: torch.device) -> Head:
    return [(w.to(device), None if b is None else b.to(device)) for w, b in head]
