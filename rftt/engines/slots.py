"""The tensor half of the transformers engine: key/value slots, one decoding step, sampling.

Departures from `model.generate`:
1. A row's tokens start at column 0 of its slot and each row writes at its own length; a retired row
   is overwritten by the last one. Nothing is padded, shifted or concatenated while decoding.
2. The query heads of a group share one attention call instead of copies of their keys.
3. A prompt is prefilled without its last token, which is decoded like any other, so that sampling
   happens in one place; equal prompts that arrive together are prefilled once.
4. Randomness is one uniform per (seed, position) through the inverse CDF: what a request samples
   does not depend on its neighbours.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, AutoModelForCausalLM, DynamicCache

from rftt.schema import Sampling, UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from rftt.engines.base import EngineConfig

Watched = list[tuple[int, int, tuple[float, ...]]]
"""(slot, position, log-probs of the watched ids)"""


def load_model(cfg: EngineConfig, path: str) -> PreTrainedModel:
    """A frozen causal LM that attends with `grouped_attention`."""
    AttentionInterface.register("grouped", grouped_attention)
    model = AutoModelForCausalLM.from_pretrained(
        path,
        dtype=getattr(torch, cfg.dtype),
        attn_implementation="grouped",
        trust_remote_code=cfg.trust_remote_code,
    )
    if "sliding_attention" in (getattr(model.config, "layer_types", None) or ()):
        raise UserError(f"engine=hf has no sliding-window attention, which {path} uses; try vllm.")
    if cfg.device != "cpu" and torch.cuda.is_available():
        torch.nn.Module.cuda(model)
    return model.eval().requires_grad_(False)


def grouped_attention(
    module: torch.nn.Module,  # noqa: ARG001 - transformers calls it with these
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    scaling: float,
    **_: object,
) -> tuple[Tensor, None]:
    """SDPA where the query heads of a group are more queries of its one key head.

    query (B, H, T, D), key and value (B, H_kv, W, D), mask (1 or B, 1, T, W) -> (B, T, H, D).
    """
    batch, heads, length, dim = query.shape
    groups = heads // key.shape[1]
    mask = attention_mask if length == 1 else attention_mask.repeat(1, 1, groups, 1)
    grouped = query.reshape(batch, key.shape[1], groups * length, dim)
    mixed = F.scaled_dot_product_attention(grouped, key, value, attn_mask=mask, scale=scaling)
    return mixed.reshape(batch, heads, length, dim).transpose(1, 2), None


class Slots:
    """Everything the running rows need on the device; slots 0 … n-1 are running.

    Shapes: S slots, M = max_len, C columns, K kinds, V = n_tokens. While decoding, it stands in for
    a transformers cache (`update`).
    """

    def __init__(self, model: PreTrainedModel, n_tokens: int, n_slots: int, max_len: int) -> None:
        self.model, self.n_tokens = model, n_tokens

        def empty(*shape: int, dtype: torch.dtype = torch.long) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=model.device)

        self.n = 0
        self.drop()
        self.length = empty(n_slots)  # columns filled; the position of `token`
        self.token = empty(n_slots)  # decoded next: the prompt's last or the last sampled
        self.count, self.limit = empty(n_slots), empty(n_slots)  # tokens sampled; max_tokens
        self.kind = empty(n_slots)  # row of the tables below
        self.begins = empty(n_slots, dtype=torch.bool)  # a segment may begin with the next token
        self.temperature = empty(n_slots, dtype=torch.float)
        self.top_p = empty(n_slots, dtype=torch.float)
        self.uniforms = empty(n_slots, max_len, dtype=torch.float)
        self.ids = empty(n_slots, max_len)
        self.logprobs = empty(n_slots, max_len, dtype=torch.float)
        self.kinds: dict[tuple[tuple[int, ...], ...], int] = {}  # (stop, watch, after) -> row
        self.stops = empty(0, n_tokens, dtype=torch.bool)  # (K, V)
        self.closers = empty(0, n_tokens, dtype=torch.bool)  # (K, V)
        self.generator = torch.Generator()

    def drop(self) -> None:
        """Free the keys and values; (≤ S, layers, 2, H_kv, C, D), `_reserve` grows them again."""
        config = self.model.config
        dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        shape = (0, config.num_hidden_layers, 2, config.num_key_value_heads, 0, dim)
        self.kv = torch.empty(shape, dtype=self.model.dtype, device=self.model.device)

    # ---- Rows come ----

    def admit(self, prompts: Sequence[tuple[int, ...]], samplings: Sequence[Sampling]) -> list[int]:
        """Run `prompts` in the next slots. Returns how many tokens of each another one shared."""
        new = slice(self.n, self.n + len(prompts))
        prefixes = [prompt[:-1] for prompt in prompts]
        self._prefill(new.start, prefixes)
        for slot, sampling in enumerate(samplings, new.start):
            self.generator.manual_seed(sampling.seed)
            draws = torch.rand(sampling.max_tokens, generator=self.generator)
            self.uniforms[slot, : sampling.max_tokens] = draws
        self.length[new] = torch.tensor([len(prefix) for prefix in prefixes])
        self.token[new] = torch.tensor([prompt[-1] for prompt in prompts])
        self.count[new] = 0
        self.limit[new] = torch.tensor([s.max_tokens for s in samplings])
        self.kind[new] = torch.tensor([self._kind(s) for s in samplings])
        self.begins[new] = torch.tensor([bool(s.watch_ids) for s in samplings])
        self.temperature[new] = torch.tensor([float(s.temperature) for s in samplings])
        self.top_p[new] = torch.tensor([float(s.top_p) for s in samplings])
        self.n = new.stop
        first = {prefix: i for i, prefix in reversed(list(enumerate(prefixes)))}
        return [len(prefix) if first[prefix] != i else 0 for i, prefix in enumerate(prefixes)]

    def _prefill(self, first: int, prefixes: Sequence[tuple[int, ...]]) -> None:
        """One forward over the distinct `prefixes`, right-padded: no real token sees padding."""
        rank = {prefix: i for i, prefix in enumerate(dict.fromkeys(prefixes))}
        width = max(map(len, rank))
        if width == 0:
            return
        ids = [[*prefix, *[0] * (width - len(prefix))] for prefix in rank]
        device = self.model.device
        cache = DynamicCache()
        self.model(
            torch.tensor(ids, device=device),
            attention_mask=torch.ones(1, 1, width, width, dtype=torch.bool, device=device).tril(),
            position_ids=torch.arange(width, device=device)[None],
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        sources = torch.tensor([rank[prefix] for prefix in prefixes], device=device)
        slots = slice(first, first + len(prefixes))
        self._reserve(slots.stop, width)
        for i, (keys, values, _) in enumerate(cache):
            assert keys is not None, "the prefill has filled every layer"
            assert values is not None, "the prefill has filled every layer"
            self.kv[slots, i, 0, :, :width] = keys[sources]
            self.kv[slots, i, 1, :, :width] = values[sources]

    def _reserve(self, slots: int, columns: int) -> None:
        """Double the key/value slots or columns where `slots` or `columns` would not fit."""
        old = self.kv
        shape = list(old.shape)
        for axis, need, most in ((0, slots, len(self.length)), (4, columns, self.ids.shape[1])):
            if need > shape[axis]:
                shape[axis] = min(most, max(need, 2 * shape[axis]))
        if shape != list(old.shape):
            self.kv = old.new_zeros(shape)  # zeros: what a mask hides must be finite
            self.kv[: old.shape[0], :, :, :, : old.shape[4]] = old

    def _kind(self, sampling: Sampling) -> int:
        """Row of `stops` and `closers` for these ids; few requests differ in them."""
        key = (sampling.stop_ids, sampling.watch_ids, sampling.watch_after)
        if key not in self.kinds:
            self.kinds[key] = len(self.kinds)
            stops, closers = self.stops.new_zeros(2, 1, self.n_tokens)
            stops[0, list(sampling.stop_ids)] = True
            closers[0, list(sampling.watch_after if sampling.watch_ids else ())] = True
            self.stops = torch.cat((self.stops, stops))
            self.closers = torch.cat((self.closers, closers))
        return self.kinds[key]

    # ---- One token for every row ----

    def decode(self) -> tuple[list[int], Watched]:
        """Sample one token in every running slot. Returns who finished and what was watched."""
        run, device = slice(self.n), self.model.device
        slots, length, count = (
            torch.arange(self.n, device=device),
            self.length[run],
            self.count[run],
        )
        width = int(length.max()) + 1
        self._reserve(self.n, width)
        self.write = (slots, length, width)
        logits = self.model(
            self.token[run, None],
            attention_mask=(torch.arange(width, device=device) <= length[:, None])[:, None, None],
            position_ids=length[:, None],
            past_key_values=self,
            use_cache=True,
        ).logits[:, -1, : self.n_tokens]
        greedy = self.temperature[run] == 0
        temperature = self.temperature[run].masked_fill(greedy, 1.0)
        logprobs = torch.log_softmax(logits.float() / temperature[:, None], dim=-1)
        token = pick(logprobs, self.uniforms[slots, count], self.top_p[run], greedy)
        watched = self._watch(logprobs) if self.begins[run].any() else []
        self.ids[slots, count] = self.token[run] = token
        self.logprobs[slots, count] = logprobs[slots, token]
        self.begins[run] = self.closers[self.kind[run], token]
        self.length[run] += 1
        self.count[run] += 1
        done = self.stops[self.kind[run], token] | (self.count[run] == self.limit[run])
        return done.nonzero()[:, 0].tolist(), watched

    def update(self, key: Tensor, value: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """Called by each attention layer: keep the new token, return all (n, H_kv, W, D)."""
        slots, columns, width = self.write
        kv = self.kv[: self.n, layer]
        kv[slots, 0, :, columns], kv[slots, 1, :, columns] = key[:, :, 0], value[:, :, 0]
        return kv[:, 0, :, :width], kv[:, 1, :, :width]

    def _watch(self, logprobs: Tensor) -> Watched:
        """Log-probs of each row's watched ids, where a segment may begin with this token."""
        watched: Watched = []
        for (_, ids, _), kind in self.kinds.items():
            slots = (self.begins[: self.n] & (self.kind[: self.n] == kind)).nonzero()[:, 0]
            values = logprobs[slots][:, list(ids)].tolist()
            positions = self.count[slots].tolist()
            watched += zip(slots.tolist(), positions, map(tuple, values), strict=True)
        return watched

    # ---- Rows go ----

    def outputs(self, slots: list[int]) -> list[tuple[list[int], list[float]]]:
        """(ids, log-probs) that each of `slots` has sampled."""
        counts = self.count[slots].tolist()
        return [
            (self.ids[slot, :count].tolist(), self.logprobs[slot, :count].tolist())
            for slot, count in zip(slots, counts, strict=True)
        ]

    def retire(self, slots: list[int]) -> list[int]:
        """Free `slots`, close the gaps with the last rows. Returns where each slot came from."""
        gone, n = set(slots), self.n - len(set(slots))
        movers = [slot for slot in range(n, self.n) if slot not in gone]
        origin = [movers.pop() if slot in gone else slot for slot in range(n)]
        to = [slot for slot in range(n) if slot in gone]
        source = [origin[slot] for slot in to]
        for tensor in (
            self.kv, self.length, self.token, self.count, self.limit, self.kind, self.begins,
            self.temperature, self.top_p, self.uniforms, self.ids, self.logprobs,
        ):  # fmt: skip
            tensor[to] = tensor[source]
        self.n = n
        return origin


def pick(logprobs: Tensor, uniform: Tensor, top_p: Tensor, greedy: Tensor) -> Tensor:
    """One token per row by inverse CDF, or the likeliest where `greedy`.

    logprobs (n, V); uniform in [0, 1), top_p and greedy (n,) -> ids (n,).
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
        raise UserError("engine=hf: the model's logits are not finite; its weights are damaged.")
    # Strictly below the total even after rounding, so that the id found has probability.
    target = torch.minimum(uniform * total, torch.nextafter(total, torch.zeros_like(total)))
    drawn = torch.searchsorted(cdf, target[:, None], right=True)[:, 0]
    return torch.where(greedy, likeliest, drawn)
