"""Groups of config fields that config.py has no room for: process rewards, URLs, filters, acts."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from rftt.types import UserError

Script = Literal[
    "latin", "cyrillic", "greek", "cjk", "hiragana", "katakana", "hangul", "arabic", "thai"
]
"""How the Unicode names of a script's letters begin."""
Act = Literal[
    "clarify", "analysis", "next_step", "subquestion", "direct_answer", "verify", "refine"
]
"""Functional tokens that a response can do without."""


@dataclass(frozen=True, kw_only=True)
class StepModel:
    """A process reward model that runs in this process."""

    prm_model_name_or_path: str | None = None
    """Hugging Face folder or hub name of the process reward model."""
    prm_family: Literal["auto", "math_shepherd", "qwen", "value"] = "auto"
    """How it reads a solution: a good/bad token after a step tag (math_shepherd), a head at
    <extra_0> (qwen) or at line ends (value). auto looks at its weights."""
    prm_step_tag: str | None = None
    """What marks the end of a step; None is the family's own: ки, <extra_0>, a line break."""
    prm_good_token: str = "+"
    """math_shepherd: its share of good + bad is the score (Math-Shepherd). A model over byte-level
    BPE may have learnt " +" and " -", spaces included."""
    prm_bad_token: str = "-"
    """math_shepherd: the other one."""
    prm_max_tokens_per_batch: int = 16384
    """Padded tokens of one forward pass of the process reward model: its knob for memory."""
    prm_check_file: str | None = None
    """JSON {question, good, bad} of a right and a wrong list of steps that it must rank before it
    is trusted; None takes a built-in example."""


@dataclass(frozen=True, kw_only=True)
class ServeConfig(StepModel):
    """tools/prm_serve.py: a process reward model behind a URL."""

    host: str = "127.0.0.1"
    """Address to bind; anything but loopback lets others in."""
    port: int = 8008
    """Port to bind (the official server's); 0 takes a free one."""
    max_body_bytes: int = 1 << 20
    """Longer requests are refused."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Precision of the weights; auto is bfloat16 where the device computes in it, else float32."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes a GPU when there is one."""
    system_prompt: str | None = None
    """qwen: instead of the chat template's own."""
    trust_remote_code: bool = False
    """Run Python code that comes with a model folder."""


@dataclass(frozen=True, kw_only=True)
class Process(StepModel):
    """Process rewards (arXiv 2502.13389), from a model in this process or behind a URL."""

    use_prm: bool = False
    """Score every step with a process reward model."""
    prm_url: str | None = None
    """Server to ask instead (official: remote_rm_url): POST {"input": …} -> {"score": […]}."""
    prm_reduce: Literal["min", "mean", "last", "prod"] = "mean"
    """The score of a path out of its steps' (arXiv 2502.13389: the mean chooses pairs)."""
    prm_timeout_s: float = 60.0
    """Of one attempt."""
    prm_tries: int = 3
    """Attempts, with growing pauses, before the server counts as not reachable."""
    prm_max_concurrency: int = 64
    """Requests to the server under way at once."""

    def __post_init__(self) -> None:
        named = (self.prm_model_name_or_path is not None) + (self.prm_url is not None)
        if self.use_prm and not named:
            raise UserError("use_prm: true needs prm_model_name_or_path or prm_url.")
        if named == 2:
            raise UserError("prm_model_name_or_path and prm_url are both set; choose one.")


@dataclass(frozen=True, kw_only=True)
class Api:
    api_url: str | None = None
    """engine=api: base URL of an OpenAI-compatible server, up to and including /v1."""
    api_model: str | None = None
    """Name of the model there."""
    api_key_env: str | None = None
    """Environment variable that holds the key; none for a server without one."""
    api_max_tokens: int | None = None
    """Hard budget in tokens, prompts included, over all runs of this output_dir."""
    api_max_cost: float | None = None
    """Hard budget in the currency of the prices; at least one of the two budgets must be set."""
    api_prompt_price: float = 0.0
    """Of a million prompt tokens."""
    api_completion_price: float = 0.0
    """Of a million generated tokens."""
    api_max_concurrent: int = 64
    """Requests under way at once."""
    api_timeout_s: float = 600.0
    """Seconds that one attempt may take."""
    api_attempts: int = 8
    """Before a request that keeps failing stops the run."""


@dataclass(frozen=True, kw_only=True)
class Filters:
    """What becomes of sampled responses (run/filters.py); may change without sampling again."""

    easy_query_threshold: float = 1.0
    """Problems of which a larger share of the responses is right are left out (ms-swift's name)."""
    hard_query_threshold: float = 0.0
    """Problems of which a smaller share is right are left out."""
    prm_threshold: float = 0.0
    """Responses with a lower process score are left out (ms-swift's name and default)."""
    scripts: list[Script] = field(default_factory=list)
    """Scripts that the prose of a response may be written in; none given: any."""
    min_script_ratio: float = 0.9
    """Share of its letters, outside formulas, that must be in these scripts."""
    min_row_tokens: int = 0
    """Rows whose response has fewer tokens than this are left out."""
    max_row_tokens: int = 8192
    """Rows whose response has more tokens than this are left out (arXiv 2502.13389: cutoff)."""
    custom_filter: str | None = None
    """module:function, called with a scored response as a dict; those it returns False on go."""
    max_similarity: float = 1.0
    """Of two responses whose word trigrams have a Jaccard index as high as this only the better one
    stays; 1 drops those made of the same phrases."""
    n_best_to_keep: int = 5
    """Responses kept per problem (ms-swift's name and default)."""
    max_pairs: int = 1
    """Pairs for DPO per problem: the best kept response with the worst wrong one, and so on."""


@dataclass(frozen=True, kw_only=True)
class Acts:
    forbidden_acts: list[Act] = field(default_factory=list)
    """Functional tokens that may not be opened, neither by the policy nor by the search: what is an
    act worth? (arXiv 2502.13389: one act masked)"""
    children_per_act: int = 1
    """Times that a tree over functional tokens may try each act below a node (arXiv 2502.13389:
    once)."""


@dataclass(frozen=True, kw_only=True)
class Beam:
    beam_width: int = 2
    """Nodes that beam keeps per level; dvts: independent subtrees (search-and-learn: N / M)."""
    beam_branching: int = 2
    """Acts explored below each of them (search-and-learn: M, its beam_width)."""
