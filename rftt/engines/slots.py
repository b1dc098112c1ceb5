"""Implement the tensors of the transformers engine: key/value slots, decoding, sampling.

Departures from `model.generate`:
1. A row's tokens start at column 0 of its slot, and each row writes at its own length. The last
   running row replaces a retired one. Decoding never pads, shifts or concatenates.
2. The query heads of a group share one attention call instead of copies of their keys.
3. A prompt is prefilled without its last token. That token is decoded like any other, so sampling
   happens in one place. Equal prompts that arrive together are prefilled once.
4. Finished rows remain in free slots until these are needed. A new prompt copies the longest prefix
   that it shares with any slot and prefills only the remaining tokens.
5. A sampled token depends on one uniform number per (seed, position), through the inverse CDF. It
   does not depend on other rows of the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, AutoModelForCausalLM

from rftt.engines.attend import attend
from rftt.engines.base import Sampling
from rftt.engines.opened import check_same, open_model, own_logits, probes, quiet
from rftt.types import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from rftt.engines.base import EngineConfig

Watched = list[tuple[int, int, tuple[float, ...]]]
"""(slot, position, log-probs of the watched ids)"""


def load_model(cfg: EngineConfig, path: str, n_tokens: int) -> PreTrainedModel:
    """Load a frozen causal LM that uses `grouped_attention`; ids are below `n_tokens`.

    Raises UserError if it is not what its folder says, or would sample from other log-probs.
    """
    if cfg.device == "cuda" and not torch.cuda.is_available():
        raise UserError("device=cuda is not available here; use auto or cpu.")
    model = open_model(
        AutoModelForCausalLM,
        path,
        getattr(torch, cfg.dtype),
        trust_remote_code=cfg.trust_remote_code,
        check=not cfg.skip_model_check,
    )
    grouped(model.requires_grad_(False))
    if not cfg.skip_model_check:
        check_engine(model, n_tokens)
    if cfg.device != "cpu" and torch.cuda.is_available():
        torch.nn.Module.cuda(model)
    return model


def grouped(model: PreTrainedModel) -> PreTrainedModel:
    """Let a causal LM use `grouped_attention`, in place."""
    AttentionInterface.register("grouped", grouped_attention)
    with quiet():  # `check_engine` finds a model that takes no other attention
        model.set_attn_implementation("grouped")
    return model


def check_engine(model: PreTrainedModel, n_tokens: int) -> None:
    """Raise UserError if prefill, cache and decoding do not give the model's own log-probs.

    Two sequences are prefilled without their last six tokens, which are then decoded one by one.
    The second one reuses the beginning that it shares with the first.
    """
    sequences, n_decoded = probes(n_tokens), 6

    @torch.inference_mode()
    def compute() -> tuple[Tensor, Tensor]:
        own = [own_logits(model, ids, n_tokens)[-n_decoded:] for ids in sequences]
        ours = Slots(model, n_tokens, len(sequences), max(map(len, sequences))).continued(
            sequences, n_decoded
        )
        return ours.log_softmax(-1), torch.stack(own).log_softmax(-1)

    cure = "set engine: vllm, or use a model of docs/models.md that is right there"
    check_same(model, "transformers engine (engine=hf)", compute, cure=cure)


def grouped_attention(
    module: torch.nn.Module,  # noqa: ARG001 - transformers calls it with these
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: object,
) -> tuple[Tensor, None]:
    """Compute SDPA with the query heads of a group as further queries of its single key head.

    query (B, H, T, D), key and value (B, H_kv, W, D), mask (1 or B, 1, T, W) -> (B, T, H, D).
    The mask is causal. `s_aux` (H,) are attention sinks.
    """
    if sliding_window is not None and sliding_window < attention_mask.shape[-1]:
        position = attention_mask.sum(-1, keepdim=True) - 1  # (1 or B, 1, T, 1)
        columns = torch.arange(attention_mask.shape[-1], device=query.device)
        attention_mask = attention_mask & (columns > position - sliding_window)
    if softcap is not None or s_aux is not None:
        mixed = attend(query, key, value, attention_mask, scaling, softcap, s_aux)
        return mixed.transpose(1, 2).contiguous(), None  # some models call view()
    batch, heads, length, dim = query.shape
    groups = heads // key.shape[1]
    mask = attention_mask if length == 1 else attention_mask.repeat(1, 1, groups, 1)
    grouped = query.reshape(batch, key.shape[1], groups * length, dim)
    mixed = F.scaled_dot_product_attention(grouped, key, value, attn_mask=mask, scale=scaling)
    return mixed.reshape(batch, heads, length, dim).transpose(1, 2).contiguous(), None


class Slots:
    """State of all rows on the device. Slots 0 … n-1 run, later ones may contain finished rows.

    Shapes: S slots, M = max_len, C columns, K kinds, V = n_tokens. With its method `update` it
    replaces a transformers cache.
    """

    def __init__(self, model: PreTrainedModel, n_tokens: int, n_slots: int, max_len: int) -> None:
        self.model, self.n_tokens = model, n_tokens

        def empty(*shape: int, dtype: torch.dtype = torch.long) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=model.device)

        self.every = torch.arange(n_slots, device=model.device)
        self.length = empty(n_slots)  # (S,) filled columns: those of `tokens[:length]`
        # (S, M) prompt and response. `tokens[length]` is decoded next.
        self.tokens = empty(n_slots, max_len)
        self.drop()
        self.count, self.limit = empty(n_slots), empty(n_slots)  # sampled tokens and max_tokens
        self.kind = empty(n_slots)  # row of the tables below
        self.begins = empty(n_slots, dtype=torch.bool)  # a segment may begin with the next token
        self.temperature = empty(n_slots, dtype=torch.float)
        self.top_p = empty(n_slots, dtype=torch.float)
        self.uniforms = empty(n_slots, max_len, dtype=torch.float)
        self.logprobs = empty(n_slots, max_len, dtype=torch.float)
        self.kinds: dict[tuple[tuple[int, ...], ...], int] = {}  # (stop, watch, after, ban) -> row
        self.stops = empty(0, n_tokens, dtype=torch.bool)  # (K, V)
        self.closers = empty(0, n_tokens, dtype=torch.bool)  # (K, V)
        self.banned = empty(0, n_tokens, dtype=torch.bool)  # (K, V)
        self.generator = torch.Generator()

    def forget(self) -> None:
        """Stop all rows and mark all slots as empty."""
        self.n = 0
        self.length.zero_()

    def drop(self) -> None:
        """Free the keys and values (≤ S, layers, 2, H_kv, C, D). `_reserve` allocates new ones."""
        config = self.model.config
        dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        shape = (0, config.num_hidden_layers, 2, heads, 0, dim)
        self.kv = torch.empty(shape, dtype=self.model.dtype, device=self.model.device)
        self.forget()

    def continued(self, sequences: Sequence[Sequence[int]], n_decoded: int) -> Tensor:
        """Return logits (B, n_decoded, V) after each of the last tokens of B sequences.

        The other tokens are prefilled, one sequence after the other, the last ones decoded.
        """
        for slot, ids in enumerate(sequences):
            prefix = tuple(ids[:-n_decoded])
            self._prefill(slot, [prefix])
            self.tokens[slot, : len(prefix)] = torch.tensor(prefix)
            self.length[slot] = len(prefix)
            self.n = slot + 1
        run, logits = slice(self.n), []
        for place in range(-n_decoded, 0):
            ids = torch.tensor([[ids[place]] for ids in sequences], device=self.model.device)
            logits.append(self._forward(ids, run, self.length[run, None]).float())
            self.length[run] += 1
        return torch.stack(logits, 1)

    # ---- New rows ----

    def admit(self, prompts: Sequence[tuple[int, ...]], samplings: Sequence[Sampling]) -> list[int]:
        """Start `prompts` in the next slots. Return the number of cached tokens of each."""
        new = slice(self.n, self.n + len(prompts))
        prefixes = [prompt[:-1] for prompt in prompts]
        shared = self._prefill(new.start, prefixes)
        for slot, prompt in enumerate(prompts, new.start):
            self.tokens[slot, : len(prompt)] = torch.tensor(prompt)
        for slot, sampling in enumerate(samplings, new.start):
            self.generator.manual_seed(sampling.seed)
            draws = torch.rand(sampling.max_tokens, generator=self.generator)
            self.uniforms[slot, : sampling.max_tokens] = draws
        self.length[new] = torch.tensor([len(prefix) for prefix in prefixes])
        self.count[new] = 0
        self.limit[new] = torch.tensor([s.max_tokens for s in samplings])
        self.kind[new] = torch.tensor([self._kind(s) for s in samplings])
        self.begins[new] = torch.tensor([bool(s.watch_ids) for s in samplings])
        self.temperature[new] = torch.tensor([float(s.temperature) for s in samplings])
        self.top_p[new] = torch.tensor([float(s.top_p) for s in samplings])
        self.n = new.stop
        return shared

    def _prefill(self, first: int, prefixes: Sequence[tuple[int, ...]]) -> list[int]:
        """Fill the slots from `first` on with `prefixes`, computing equal ones once.

        Returns the number of cached tokens of each.
        """
        slot_of = {prefix: first + i for i, prefix in reversed(list(enumerate(prefixes)))}
        last, longest = first + len(prefixes), max(map(len, prefixes))
        self._reserve(last, longest)
        found = {prefix: self._find(prefix) for prefix in slot_of}
        width = max(n for _, n in found.values())
        targets, sources = list(slot_of.values()), [source for source, _ in found.values()]
        self.kv[targets, :, :, :, :width] = self.kv[sources, :, :, :, :width]
        if rest := {p: p[n:] for p, (_, n) in found.items() if n < len(p)}:
            self._extend(
                [slot_of[p] for p in rest], [found[p][1] for p in rest], list(rest.values())
            )
        copies = [slot_of[prefix] for prefix in prefixes]
        self.kv[first:last, :, :, :, :longest] = self.kv[copies, :, :, :, :longest]
        return [
            found[prefix][1] if slot_of[prefix] == slot else len(prefix)
            for slot, prefix in enumerate(prefixes, first)
        ]

    def _find(self, prefix: tuple[int, ...]) -> tuple[int, int]:
        """Return (slot, columns) of the longest beginning of `prefix` that any slot holds."""
        known = self.kv.shape[0]
        wanted = torch.tensor(prefix, dtype=torch.long, device=self.tokens.device)
        same = (self.tokens[:known, : len(prefix)] == wanted).cumprod(1).sum(1)
        shared, slot = torch.minimum(same, self.length[:known]).max(0)
        return int(slot), int(shared)

    def _extend(self, slots: list[int], starts: list[int], rest: list[tuple[int, ...]]) -> None:
        """Run one forward over `rest`, right-padded, behind the `starts` columns of `slots`.

        Padding lands behind a row's last token, where decoding overwrites it before it is read.
        """
        width = max(map(len, rest))
        ids = [[*tokens, *[0] * (width - len(tokens))] for tokens in rest]
        device = self.model.device
        columns = torch.tensor(starts, device=device)[:, None] + torch.arange(width, device=device)
        self._forward(torch.tensor(ids, device=device), torch.tensor(slots, device=device), columns)

    def _forward(self, ids: Tensor, slots: Tensor | slice, columns: Tensor) -> Tensor:
        """Put `ids` (B, T) into `columns` (B, T) of B slots. Return logits (B, V) after the last.

        If `slots` is a slice, the attention reads keys and values without copying them.
        """
        width = int(columns.max()) + 1
        self._reserve(self.n, width)
        self.write = (slots, columns, width)
        seen = torch.arange(width, device=ids.device) <= columns[:, :, None]
        return self.model(
            ids,
            attention_mask=seen[:, None],
            position_ids=columns,
            past_key_values=self,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1, : self.n_tokens]

    def _reserve(self, slots: int, columns: int) -> None:
        """Enlarge the keys and values, about twofold, if `slots` or `columns` do not fit."""
        old = self.kv
        shape = list(old.shape)
        if slots > shape[0]:
            shape[0] = min(len(self.length), 2 * slots)  # room for finished rows
        if columns > shape[4]:
            shape[4] = max(columns, min(self.tokens.shape[1], 2 * shape[4]))
        if shape != list(old.shape):
            self.kv = old.new_zeros(shape)  # zeros: masked entries must be finite
            self.kv[: old.shape[0], :, :, :, : old.shape[4]] = old

    def _kind(self, sampling: Sampling) -> int:
        """Return the row of `stops`, `closers` and `banned` for these ids.

        Most requests have the same ids, so these tables stay small.
        """
        key = (sampling.stop_ids, sampling.watch_ids, sampling.watch_after, sampling.banned_ids)
        if key not in self.kinds:
            self.kinds[key] = len(self.kinds)
            stops, closers, banned = self.stops.new_zeros(3, 1, self.n_tokens)
            stops[0, list(sampling.stop_ids)] = True
            closers[0, list(sampling.watch_after if sampling.watch_ids else ())] = True
            banned[0, list(sampling.banned_ids)] = True
            self.stops = torch.cat((self.stops, stops))
            self.closers = torch.cat((self.closers, closers))
            self.banned = torch.cat((self.banned, banned))
        return self.kinds[key]

    # ---- One token for every row ----

    def decode(self) -> tuple[list[int], Watched]:
        """Sample one token in every running slot. Return the finished slots and watched values."""
        run = slice(self.n)
        slots = self.every[run]
        length, count = self.length[run], self.count[run]
        logits = self._forward(self.tokens[slots, length][:, None], run, length[:, None])
        if any(banned for *_, banned in self.kinds):
            logits = logits.masked_fill(self.banned[self.kind[run]], -torch.inf)
        greedy = self.temperature[run] == 0
        temperature = self.temperature[run].masked_fill(greedy, 1.0)
        logprobs = torch.log_softmax(logits.float() / temperature[:, None], dim=-1)
        token = pick(logprobs, self.uniforms[slots, count], self.top_p[run], greedy)
        watched = self._watch(logprobs) if self.begins[run].any() else []
        self.tokens[slots, length + 1] = token
        self.logprobs[slots, count] = logprobs[slots, token]
        self.begins[run] = self.closers[self.kind[run], token]
        self.length[run] += 1
        self.count[run] += 1
        done = self.stops[self.kind[run], token] | (self.count[run] == self.limit[run])
        return done.nonzero()[:, 0].tolist(), watched

    def update(self, key: Tensor, value: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """Store a layer's new keys and values. Return all of them, each (B, H_kv, W, D)."""
        slots, columns, width = self.write
        kv, rows = self.kv[:, layer], self.every[slots][:, None]
        kv[rows, 0, :, columns] = key.transpose(1, 2)
        kv[rows, 1, :, columns] = value.transpose(1, 2)
        return kv[slots, 0, :, :width], kv[slots, 1, :, :width]

    def _watch(self, logprobs: Tensor) -> Watched:
        """Return log-probs of each row's watched ids where a segment may begin with this token."""
        watched: Watched = []
        for (_, ids, *_), kind in self.kinds.items():
            slots = (self.begins[: self.n] & (self.kind[: self.n] == kind)).nonzero()[:, 0]
            values = logprobs[slots][:, list(ids)].tolist()
            positions = self.count[slots].tolist()
            watched += zip(slots.tolist(), positions, map(tuple, values), strict=True)
        return watched

    # ---- Finished rows ----

    def outputs(self, slots: list[int]) -> list[tuple[list[int], list[float]]]:
        """Return the (ids, log-probs) that each of `slots` has sampled."""
        ends, counts = (self.length[slots] + 1).tolist(), self.count[slots].tolist()
        return [
            (self.tokens[slot, end - count : end].tolist(), self.logprobs[slot, :count].tolist())
            for slot, end, count in zip(slots, ends, counts, strict=True)
        ]

    def retire(self, slots: list[int]) -> list[int]:
        """Swap `slots` with the last running ones. Return the old slot of each running row."""
        gone, n = set(slots), self.n - len(set(slots))
        movers = [slot for slot in range(n, self.n) if slot not in gone]
        origin = [movers.pop() if slot in gone else slot for slot in range(n)] + slots
        to = [slot for slot, source in enumerate(origin) if slot != source]
        source = [origin[slot] for slot in to]
        for tensor in (
            self.kv, self.length, self.tokens, self.count, self.limit, self.kind, self.begins,
            self.temperature, self.top_p, self.uniforms, self.logprobs,
        ):  # fmt: skip
            tensor[to] = tensor[source]
        self.n = n
        return origin[:n]


def pick(logprobs: Tensor, uniform: Tensor, top_p: Tensor, greedy: Tensor) -> Tensor:
    """Pick one token per row by inverse CDF, or the most likely one where `greedy`.

    Arguments are logprobs (n, V), uniform (n,) in [0, 1), top_p (n,) and greedy (n,). Returns ids
    (n,). Raises UserError for logits that are not finite.
    """
    likeliest = logprobs.argmax(-1)
    if greedy.all():
        return likeliest
    probs = logprobs.exp()
    if (top_p < 1).any():
        ordered, order = probs.sort(-1, descending=True)
        outside = ordered.cumsum(-1) - ordered >= top_p[:, None]
        probs = torch.zeros_like(probs).scatter(-1, order, ordered.masked_fill(outside, 0))
    cdf = probs.cumsum(-1)
    total = cdf[:, -1]
    if not total.isfinite().all():
        raise UserError(
            "engine=hf: the model's logits must be finite, got NaN or infinity; its weights are "
            "damaged, so use an earlier checkpoint."
        )
    # Strictly below the total even after rounding, so that the id found has probability.
    target = torch.minimum(uniform * total, torch.nextafter(total, torch.zeros_like(total)))
    drawn = torch.searchsorted(cdf, target[:, None], right=True)[:, 0]
    return torch.where(greedy, likeliest, drawn)
