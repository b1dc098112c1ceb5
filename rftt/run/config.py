"""Define all settings and read them: `script.py config.yaml key=value …` -> a checked dataclass.

Each script has one dataclass. The docstring under each field gives its meaning, unit and source:
the paper (arXiv 2502.13389) or the library that introduced the name. pydantic checks types and
ranges. An error is one line with the key, the allowed values, what was found and where. Groups of
fields are base classes, so that no field is written twice.
"""

import ast
import difflib
import inspect
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import MISSING, asdict, field, fields
from datetime import date
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar, dataclass_transform
from urllib.parse import urlsplit

import pydantic.dataclasses
from pydantic import (
    AfterValidator,
    BeforeValidator,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    WithJsonSchema,
    model_validator,
)

from rftt.run.files import one_line
from rftt.tokens import ACTS
from rftt.types import UserError

C = TypeVar("C")
T = TypeVar("T")

# ---- Types of fields: ranges are checked here and not in the code that uses a number ----

Runtime = Annotated[T, Field(json_schema_extra={"runtime": True})]
"""A key that a continued run may change: place, budget, speed and display, but no result."""
Count = Annotated[int, Field(ge=1)]
Whole = Annotated[int, Field(ge=0)]
Seed = Annotated[int, Field(ge=0, le=2**32 - 1)]
Share = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Rate = Annotated[float, Field(gt=0, le=1)]
Coefficient = Annotated[float, Field(ge=0, le=1000)]
Group = Annotated[int, Field(ge=1, le=2**16)]
Temperature = Annotated[float, Field(ge=0, le=10)]
Reward = Annotated[float, Field(ge=-100, le=100)]
LocalPath = Annotated[str, AfterValidator(os.path.expanduser)]
"""A path in which `~` means the home folder. Names on the Hugging Face hub stay unchanged."""


def _checked_url(url: str) -> str:
    """Return a URL without a password. Raises UserError for what no client can call."""
    try:
        parts = urlsplit(url)
        whole = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is not a number, half of an IPv6 address
        raise UserError(f"a URL must have a host and a port, got {url!r}; correct it.") from None
    if not whole or not url.isprintable() or " " in url:
        raise UserError(f"a URL must start with http:// or https:// and a host, got {url!r}.")
    if parts.username or parts.password:
        raise UserError(f"the URL of {parts.hostname} must not contain a password; remove it.")
    return url


Url = Annotated[str, AfterValidator(_checked_url)]
"""The address of a server. It is stored in config.yaml and shown in errors."""
Script = Literal[
    "latin", "cyrillic", "greek", "cjk", "hiragana", "katakana", "hangul", "arabic", "thai"
]
"""Each is the first word of the Unicode names of a script's letters."""

FORBIDDABLE = [act for act in ACTS if act != "output"]
"""Acts that a response does not require."""


def _forbiddable(act: str) -> str:
    if act not in FORBIDDABLE:
        raise ValueError("a response requires this act, or it is not one")
    return act


ForbiddenAct = Annotated[str, AfterValidator(_forbiddable), WithJsonSchema({"enum": FORBIDDABLE})]

RUNTIME_KEYS: set[str] = set()
"""Names of all fields marked `Runtime`; `config_class` adds them."""


@dataclass_transform(kw_only_default=True, frozen_default=True, field_specifiers=(field,))
def config_class(cls: type[C]) -> type[C]:
    """Make `cls` a frozen dataclass whose fields pydantic checks; unknown keys are errors."""
    settings = ConfigDict(
        extra="forbid",
        coerce_numbers_to_str=True,
        allow_inf_nan=False,
        defer_build=True,
    )
    made: Any = pydantic.dataclasses.dataclass(frozen=True, kw_only=True, config=settings)(cls)
    for name, info in made.__pydantic_fields__.items():
        if info.json_schema_extra == {"runtime": True}:
            RUNTIME_KEYS.add(name)
    return made


def _typed(value: Any) -> Any:
    """Return a mapping with its texts converted as JSON, so that `false` in a file is a bool."""
    if isinstance(value, dict):
        return {key: _typed(inside) for key, inside in value.items()}
    if isinstance(value, list):
        return [_typed(inside) for inside in value]
    try:
        return json.loads(value) if isinstance(value, str) else value
    except ValueError:
        return value


def _listed(value: Any) -> Any:
    """Return a list where a single text may stand for one."""
    return [value] if isinstance(value, str) else value


Names = Annotated[list[str], BeforeValidator(_listed), Field(min_length=1)]


def _default(own: Any) -> Any:
    """Return the default of a dataclass's field that has one."""
    return own.default if own.default_factory is MISSING else own.default_factory()


# ---- The settings ----


@config_class
class Common:
    """Settings that every script has."""

    output_dir: Runtime[LocalPath]
    """Run directory. The script writes only below it."""
    overwrite_output_dir: Runtime[bool] = False
    """Delete the checkpoints and journals in output_dir at every start of the script. Otherwise a
    journal made from other problems, prompts or weights is an error."""
    model_name_or_path: LocalPath
    """Hugging Face folder or hub name of the model to start from."""
    seed: Seed = 0
    """Seed; every random choice derives from it, the problem's id and the step."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Precision of weights in engines and of compute in training (arXiv 2502.13389: bf16). auto is
    bfloat16 where the device computes in it (GPUs, CPUs with AMX or AVX512-BF16), else float32."""
    device: Runtime[Literal["auto", "cpu", "cuda"]] = "auto"
    """Device of the models; auto is a GPU if one is available."""
    system_prompt: str | None = None
    """System turn before every question in SFT, RL, evaluation and plain sampling, and of a qwen
    PRM in this process. Phase 1's tree search uses its own instructions."""
    chat_template: LocalPath | None = None
    """Jinja file instead of the model's own chat template."""
    chat_template_kwargs: Annotated[dict[str, Any], AfterValidator(_typed)] = field(
        default_factory=dict
    )
    """Settings of the chat template, such as {enable_thinking: false}. They are written into the
    template of the exported model."""
    template_date: str | None = None
    """Date in the chat template, as YYYY-MM-DD. None uses the day on which output_dir was created.
    An exported model keeps this date."""
    trust_remote_code: bool = False
    """Permission to run Python code that comes with a model folder."""
    skip_model_check: Runtime[bool] = False
    """Open models without the checks of docs/models.md: weights, tokenizer, log-probs."""
    prompt_key: str | None = None
    """Column of the question if it has none of the usual names. Dots name a value inside a column
    (prompt.0.content), and braces make a template ({Body} {Question})."""

    @model_validator(mode="after")
    def _date_is_one(self) -> Self:
        try:
            date.fromisoformat(self.template_date or "2026-01-01")
        except ValueError as error:
            raise UserError(
                f"`template_date` must be YYYY-MM-DD, got {self.template_date!r}."
            ) from error
        return self


@config_class
class Graded:
    """Settings of scripts that grade answers."""

    answer_key: str | None = None
    """Column of the gold answer if it has none of the usual names. Dots and braces work as in
    prompt_key (reward_model.ground_truth)."""


@config_class
class EngineKeys:
    """Settings of scripts that sample from a model."""

    engine: Literal["hf", "vllm", "api"] = "hf"
    """Sampler: hf is transformers, vllm is faster, api is another model's URL (search.py only)."""
    max_model_len: Count = 8192
    """Prompt plus response, in tokens (arXiv 2502.13389: cutoff 8192)."""
    max_num_seqs: Runtime[Count] = 256
    """Maximum number of sequences decoded together."""
    gpu_memory_utilization: Runtime[Annotated[float, Field(gt=0, le=1)]] = 0.4
    """Share of a GPU that vLLM may take beside the learner."""
    engine_args: Annotated[dict[str, Any], AfterValidator(_typed)] = field(default_factory=dict)
    """vllm: further arguments of vllm.LLM, such as {max_num_batched_tokens: 8192}."""

    @model_validator(mode="after")
    def _arguments_reach_an_engine(self) -> Self:
        if self.engine_args and self.engine != "vllm":
            raise UserError(
                f"engine_args has no effect with engine={self.engine}; set engine: vllm or remove "
                "it."
            )
        return self


@config_class
class Training:
    """Settings of scripts that train a model."""

    learning_rate: Rate
    """Peak learning rate."""
    lr_scheduler_type: Literal["constant", "cosine", "linear"] = "constant"
    """Shape of the learning rate after the warm-up."""
    warmup_ratio: Share = 0.0
    """Share of all steps (SFT: optimizer steps, RL: rounds) over which the rate rises from 0."""
    min_lr_ratio: Share = 0.0
    """Share of the peak at which the schedule ends."""
    adam_beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Decay of the first moment (arXiv 2502.13389)."""
    adam_beta2: Annotated[float, Field(ge=0, lt=1)] = 0.95
    """Decay of the second moment (arXiv 2502.13389)."""
    weight_decay: Share = 0.0
    """AdamW, decoupled."""
    use_peft: bool = False
    """Train a low-rank adapter and the functional tokens' rows, and freeze all other weights (LoRA,
    arXiv 2106.09685). Needs peft."""
    lora_r: Count = 16
    """LoRA: rank of the adapter."""
    lora_alpha: Positive = 32.0
    """LoRA: scale of the adapter times its rank: a layer adds lora_alpha / lora_r · B A x."""
    lora_target_modules: Names = field(default_factory=lambda: ["all-linear"])
    """LoRA: ends of the names of the adapted layers, such as [q_proj, v_proj]. all-linear is every
    linear layer but the head."""
    optim: Literal["adamw", "adamw_8bit"] = "adamw"
    """Optimizer. adamw_8bit is torchao's, with moments of 2 instead of 8 bytes per parameter."""
    max_grad_norm: Positive = 1.0
    """Global norm to which gradients are clipped (arXiv 2502.13389)."""
    max_tokens_per_microbatch: Runtime[Count] = 16384
    """Packed tokens of one forward pass on one rank: the knob for memory."""
    gradient_checkpointing: Runtime[bool] = False
    """Recomputation of activations in the backward pass: less memory, about 30 % more compute."""
    fsdp_cpu_offload: Runtime[bool] = False
    """Storage of sharded weights and optimizer state in host memory between uses."""
    hsdp: Runtime[bool] = False
    """On several nodes: models are sharded within a node and replicated across nodes, so that only
    gradients cross the network. A node must have the memory for all of them."""
    save_steps: Runtime[Whole] = 50
    """Steps between two checkpoints; 0 saves only at the end."""
    save_total_limit: Runtime[Whole] = 2
    """Number of newest checkpoints kept beside the best one."""
    report_to: Runtime[list[str]] = field(default_factory=list)
    """Any of tensorboard, wandb and trackio. metrics.jsonl is always written."""

    @model_validator(mode="after")
    def _adapter_is_wanted(self) -> Self:
        own = [f for f in fields(Training) if f.name.startswith("lora_")]
        idle = [f.name for f in own if getattr(self, f.name) != _default(f)]
        if idle and not self.use_peft:
            raise UserError(
                f"{', '.join(idle)}: no adapter is trained without use_peft: true; set it, or "
                "remove them."
            )
        return self


@config_class
class StepModel:
    """A process reward model that runs in this process."""

    prm_model_name_or_path: LocalPath | None = None
    """Hugging Face folder or hub name of the process reward model."""
    prm_family: Literal["auto", "math_shepherd", "qwen", "value"] = "auto"
    """Kind of model: a good/bad token after a step tag (math_shepherd), a head at <extra_0> (qwen)
    or a head at line ends (value). auto detects it from the weights and the tokenizer."""
    prm_step_tag: str | None = None
    """Mark of the end of a step. None uses the family's mark: ки, <extra_0> or a line break."""
    prm_good_token: str = "+"
    """math_shepherd: token of a good step. The score is its share of good + bad (Math-Shepherd). A
    model with byte-level BPE may use " +" and " -", with the spaces."""
    prm_bad_token: str = "-"
    """math_shepherd: token of a bad step."""
    prm_max_tokens_per_batch: Runtime[Count] = 16384
    """Padded tokens of one forward pass of the process reward model. Less needs less memory."""
    prm_check_file: LocalPath | None = None
    """JSON {question, good, bad} with a right and a wrong list of steps. The model ranks them at
    startup, and a wrong order is a warning. None uses a built-in example."""


@config_class
class ServeConfig(StepModel):
    """tools/prm_serve.py: a process reward model behind a URL."""

    host: str = "127.0.0.1"
    """Address to bind. Other machines can reach every address except loopback."""
    port: Annotated[int, Field(ge=0, le=65535)] = 8008
    """Port to bind, by default that of the official server. 0 chooses a free one."""
    max_body_bytes: Count = 1 << 20
    """Size limit of a request body, in bytes."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Precision of the weights; auto is bfloat16 where the device computes in it, else float32."""
    device: Runtime[Literal["auto", "cpu", "cuda"]] = "auto"
    """Device of the models; auto is a GPU if one is available."""
    system_prompt: str | None = None
    """qwen: system prompt instead of the chat template's default."""
    trust_remote_code: bool = False
    """Permission to run Python code that comes with a model folder."""
    skip_model_check: Runtime[bool] = False
    """Open models without the checks of docs/models.md: weights, tokenizer, log-probs."""


@config_class
class Process(StepModel):
    """Process rewards (arXiv 2502.13389), from a model in this process or behind a URL."""

    use_prm: bool = False
    """Score every step with a process reward model."""
    prm_url: Runtime[Url | None] = None
    """URL of a server (official name: remote_rm_url): POST {"input": …} -> {"score": […]}."""
    prm_reduce: Literal["min", "mean", "last", "prod"] = "mean"
    """Reduction of step scores to a path's score (arXiv 2502.13389 chooses pairs by the mean)."""
    prm_timeout_s: Runtime[Positive] = 60.0
    """Timeout per request, in seconds."""
    prm_tries: Runtime[Count] = 3
    """Attempts, with growing pauses, after which a request has failed and the run stops."""
    prm_max_concurrency: Runtime[Count] = 64
    """Concurrent requests to the server."""

    @model_validator(mode="after")
    def _one_source_of_scores(self) -> Self:
        named = [name for name in (self.prm_model_name_or_path, self.prm_url) if name is not None]
        if self.use_prm and not named:
            raise UserError("use_prm: true needs prm_model_name_or_path or prm_url.")
        if len(named) == 2:
            raise UserError("prm_model_name_or_path and prm_url are both set; remove one.")
        return self


@config_class
class Api:
    """Settings of an OpenAI-compatible server, for engine=api."""

    api_url: Url | None = None
    """engine=api: base URL of an OpenAI-compatible server, up to and including /v1."""
    api_model: str | None = None
    """Name of the model on that server."""
    api_key_env: Runtime[str | None] = None
    """Environment variable that contains the API key. None means a server without a key."""
    api_max_tokens: Runtime[Count | None] = None
    """Hard budget in tokens, prompts included, over all runs of this output_dir."""
    api_max_cost: Runtime[Positive | None] = None
    """Hard budget in the currency of the prices; at least one of the two budgets must be set."""
    api_prompt_price: Runtime[NotNegative] = 0.0
    """Price of a million prompt tokens."""
    api_completion_price: Runtime[NotNegative] = 0.0
    """Price of a million generated tokens."""
    api_max_concurrent: Runtime[Count] = 64
    """Concurrent requests."""
    api_timeout_s: Runtime[Positive] = 600.0
    """Timeout per request, in seconds."""
    api_attempts: Runtime[Count] = 8
    """Attempts per request before its failure stops the run."""
    api_seed: Runtime[bool] = True
    """Whether requests carry a seed of 31 bits. Use false if the server rejects the field."""
    api_max_tokens_key: Runtime[Literal["max_tokens", "max_completion_tokens"]] = "max_tokens"
    """Name of the field that limits a reply. Newer models require max_completion_tokens."""


@config_class
class Filters:
    """Filters of sampled responses (run/filters.py). They may change without sampling again."""

    easy_query_threshold: Share = 1.0
    """Largest share of right responses with which a problem is kept (ms-swift's name)."""
    hard_query_threshold: Share = 0.0
    """Smallest share of right responses with which a problem is kept."""
    prm_threshold: Share = 0.0
    """Lowest process score of a response that is kept (ms-swift's name and default)."""
    scripts: list[Script] = field(default_factory=list)
    """Scripts that the prose of a response may be written in; an empty list allows any."""
    min_script_ratio: Share = 0.9
    """Share of its letters, outside formulas, that must be in these scripts."""
    min_row_tokens: Whole = 0
    """Minimum tokens of a row's response."""
    max_row_tokens: Count = 8192
    """Maximum tokens of a row's response (arXiv 2502.13389: cutoff)."""
    custom_filter: str | None = None
    """module:function, called with a scored response as a dict. False drops the response."""
    max_similarity: Share = 1.0
    """Jaccard index of word trigrams from which on the worse of two responses is dropped. 1 drops
    only responses made of the same phrases."""
    n_best_to_keep: Count = 5
    """Responses kept per problem (ms-swift's name and default)."""
    max_pairs: Count = 1
    """Preference pairs for DPO per problem: the best kept response with the worst wrong one, the
    second best with the second worst, and so on."""

    @model_validator(mode="after")
    def _intervals_are_not_empty(self) -> Self:
        for low, high in (
            ("hard_query_threshold", "easy_query_threshold"),
            ("min_row_tokens", "max_row_tokens"),
        ):
            least, most = getattr(self, low), getattr(self, high)
            if least > most:
                raise UserError(f"{low}={least} must not exceed {high}={most}; lower {low}.")
        return self


@config_class
class Acts:
    """Settings of a search over functional tokens."""

    forbidden_acts: list[ForbiddenAct] = field(default_factory=list)
    """Functional tokens that neither the policy nor the search may use, to measure the value of an
    act (arXiv 2502.13389 masks one act)."""
    children_per_act: Count = 1
    """Number of texts that a tree over functional tokens may try per act below a node (arXiv
    2502.13389: one)."""


@config_class
class Beam:
    """Settings of beam search and DVTS."""

    beam_width: Count = 2
    """beam: nodes kept per level. dvts: independent subtrees (search-and-learn: N / M)."""
    beam_branching: Count = 2
    """Acts explored below each kept node (search-and-learn: M, its beam_width)."""


@config_class
class SearchConfig(Common, Graded, EngineKeys, Api, Filters, Beam, Process):
    """search.py: problems -> trees or samples -> curated training rows (phase 1)."""

    train_file: LocalPath
    """Problems with gold answers: .jsonl, .json, .csv or .parquet, also .gz, or a data set on the
    Hugging Face hub (hf:owner/name[:config][@split])."""
    max_problems: Count | None = None
    """Number of problems read, from the start of the file; None reads all."""
    method: Literal["mcts", "beam", "dvts", "sample", "score"] = "mcts"
    """mcts, beam, dvts: search over prompted acts. sample: sample answers to the bare question,
    cache, score and filter them. score: score and filter the cache raw_file without a model."""
    raw_file: LocalPath | None = None
    """method=score: data/raw.jsonl of another run, which is read instead of train_file."""
    simulations: Count = 16
    """Passes of a tree search (arXiv 2502.13389); beam, dvts: lookaheads; sample: answers."""
    search_depth: Count = 15
    """Maximum number of steps on a path (arXiv 2502.13389)."""
    exploration_weight: Coefficient = 2.0
    """c of UCT (arXiv 2502.13389)."""
    leaves_in_flight: Count = 4
    """Concurrent simulations of one tree, spread by virtual loss. 1 is textbook MCTS."""
    problems_in_flight: Runtime[Count] = 64
    """Concurrent trees. Together with leaves_in_flight they fill the engine's batch."""
    temperature: Temperature = 0.95
    """Sampling temperature of every prompted reply (arXiv 2502.13389)."""
    max_direct_sentences: Whole = 4
    """Longest direct answer that a simulation chooses, in sentences (arXiv 2502.13389)."""
    max_completion_length: Count = 4096
    """Maximum tokens of one reply; an act's own limit may be lower."""
    prompts_file: LocalPath | None = None
    """YAML that replaces any part of rftt/prompts.yaml: other examples, language or domain."""
    contract_tries: Count = 3
    """Replies asked for until one keeps its act's contract; then another act is tried."""
    verify_draws: Count = 8
    """Checks drawn for a merged row; the one that names most of the mistake is taken."""
    merge_tries: Count = 3
    """Pairs of a right and a wrong path tried per problem, until a check names the mistake."""
    max_plain_paths: Whole = 2
    """Disjoint correct paths kept per problem beside the merged one (arXiv 2502.13389)."""
    min_shared_steps: Whole = 0
    """Steps that the right and the wrong path of a pair must share."""
    tree_pairs: bool = False
    """Also write a pair for DPO per tree: best right and worst wrong path, widest shared prefix."""
    max_repeats: Count = 2
    """Occurrences of one sentence above which a path or response is left out."""

    @model_validator(mode="after")
    def _method_and_its_keys(self) -> Self:
        if self.method == "score" and not self.raw_file:
            raise UserError("method=score needs raw_file, the data/raw.jsonl of another run.")
        if self.method != "score" and self.raw_file is not None:
            raise UserError(
                f"raw_file needs method=score, got method={self.method}; remove raw_file."
            )
        if self.prm_threshold and not self.use_prm:
            raise UserError(
                f"prm_threshold={self.prm_threshold} needs process scores; set use_prm: true."
            )
        default, own = asdict(Filters()), asdict(self)
        idle = [key for key in default if own[key] != default[key] and key != "max_row_tokens"]
        if idle and self.method not in ("sample", "score"):
            raise UserError(
                f"{', '.join(idle)}: only method=sample and method=score use these filters, got "
                f"method={self.method}; remove them."
            )
        return self

    @model_validator(mode="after")
    def _api_has_a_budget(self) -> Self:
        if self.engine != "api":
            return self
        if self.chat_template or self.chat_template_kwargs:
            raise UserError(
                "chat_template and chat_template_kwargs have no effect with engine=api; remove "
                "them and configure the server."
            )
        if not (self.api_url and self.api_model):
            raise UserError("engine=api needs api_url and api_model; set both.")
        prices = self.api_prompt_price + self.api_completion_price
        bounded = prices > 0 if self.api_max_cost is not None else self.api_max_tokens is not None
        if not bounded:
            raise UserError(
                "engine=api needs a budget; set api_max_tokens, or api_max_cost with prices."
            )
        return self


@config_class
class SFTConfig(Common, Training):
    """train_sft.py: offline training on curated rows (warm-up) or on pairs of them (DPO)."""

    train_file: LocalPath
    """Rows in any supported format: question with steps or response (sft), or with chosen and
    rejected (dpo)."""
    response_key: str | None = None
    """sft: column of the response if it has none of the usual names, written as in prompt_key."""
    loss: Literal["sft", "dpo"] = "sft"
    """sft: cross-entropy; dpo: the chosen response against the rejected one (Rafailov 2023)."""
    dpo_beta: Positive = 0.3
    """dpo: scale of a response's gain over the reference, which is the model before training."""
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    """dpo: assumed share of pairs with swapped labels (cDPO)."""
    mix_file: LocalPath | None = None
    """More rows of the same kind, such as the original data, mixed in against forgetting."""
    mix_ratio: Coefficient = 0.5
    """Rows of mix_file per row of train_file; those of a small file come more than once."""
    eval_file: LocalPath | None = None
    """Rows for the evaluation loss; otherwise eval_ratio of the training rows."""
    eval_ratio: Annotated[float, Field(ge=0, lt=1)] = 0.05
    """Share of the training rows held out for the evaluation loss."""
    num_train_epochs: Annotated[float, Field(gt=0, le=10000)] = 10
    """Passes over the rows (arXiv 2502.13389: up to 10)."""
    train_batch_size: Count = 128
    """Rows per optimizer step over all ranks (arXiv 2502.13389)."""
    max_length: Count = 8192
    """Maximum tokens of a row; longer ones are left out and counted (arXiv 2502.13389: cutoff)."""
    functional_tokens: bool = True
    """Add the functional tokens to the vocabulary; false for plain chain of thought."""
    mask_wrong: bool = True
    """Keep the wrong branch of a merged row out of the loss."""
    eval_steps: Runtime[Whole] = 50
    """Optimizer steps between two evaluation losses; every checkpoint has one."""
    initial_state: LocalPath | None = None
    """Checkpoint folder of another run, whose weights and optimizer moments are the start."""

    @model_validator(mode="after")
    def _adapter_has_one_base(self) -> Self:
        if self.use_peft and self.initial_state:
            raise UserError(
                "use_peft cannot go on from initial_state, whose adapter may belong to another "
                "base; set model_name_or_path to the hf folder of that run and remove it."
            )
        return self


@config_class
class RLConfig(Common, Graded, EngineKeys, Training, Process, Acts):
    """train_rl.py: online RL whose explorer is a tree search over functional tokens (phase 2)."""

    train_file: LocalPath
    """Problems with gold answers: .jsonl, .json, .csv or .parquet, also .gz, or a data set on the
    Hugging Face hub (hf:owner/name[:config][@split])."""
    eval_file: LocalPath | None = None
    """Problems for the greedy accuracy logged every eval_steps."""
    max_eval_problems: Runtime[Count] = 500
    """Number of problems read, from the start of eval_file."""
    eval_steps: Runtime[Whole] = 0
    """Steps between two greedy evaluations. Each checkpoint is evaluated as well. 0 is never."""
    max_steps: Count = 250
    """Exploration-and-learning rounds (arXiv 2502.13389)."""
    max_generated_tokens: Runtime[Count | None] = None
    """Sampled tokens after which the run ends with its round, to compare at equal budgets."""
    # -- explore
    sampling_method: Literal["mcts", "fork", "normal"] = "mcts"
    """mcts: tree over functional tokens; normal: independent responses (the official name); fork:
    independent responses, then more from segment ends of some (after arXiv 2602.14169)."""
    tree_acts: Literal["forced", "drawn"] = "forced"
    """mcts: the tree forces each act in turn (arXiv 2502.13389), or the policy draws its own."""
    tree_width: Count = 2
    """tree_acts=drawn: continuations that a tree draws from each node."""
    selection: Literal["uct", "puct"] = "uct"
    """mcts: untried acts first, then UCT (arXiv 2502.13389); or PUCT, which weighs by the prior."""
    fork_roots: Count = 8
    """fork: responses per problem that begin at the question; num_generations is the total. With
    fork_roots equal to num_generations it is plain sampling."""
    fork_branches: Count = 4
    """fork: continuations from each chosen segment end."""
    fork_rule: Literal["failed", "uncertain", "random"] = "failed"
    """fork: ends are taken at random from wrong responses, where the next act is least certain, or
    at random from all responses."""
    rollout_batch_size: Group = 16
    """Problems per step over all ranks (arXiv 2502.13389)."""
    num_generations: Group = 16
    """Rollouts per problem (arXiv 2502.13389)."""
    search_depth: Count = 18
    """Depth at which the tree still chooses (arXiv 2502.13389); free rollouts may run deeper."""
    exploration_weight: Coefficient = 2.0
    """c of UCT (arXiv 2502.13389)."""
    leaves_in_flight: Count = 4
    """Concurrent simulations of one tree. 1 is textbook MCTS."""
    rollout_mode: Literal["free", "stepwise"] = "free"
    """free: one request per rollout; stepwise: greedy acts, one request per act (the paper's)."""
    temperature: Annotated[float, Field(gt=0, le=10)] = 0.95
    """Sampling temperature of the rollouts (arXiv 2502.13389)."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Nucleus of sampling. Must be 1: otherwise sampling and training log-probs differ."""
    max_completion_length: Count = 4096
    """Maximum tokens of a response."""
    # -- score
    correct_reward: Reward = 1.0
    """Reward of a finished path with the right answer (arXiv 2502.13389)."""
    wrong_reward: Reward = 0.1
    """Reward of a wrong answer (arXiv 2502.13389)."""
    no_answer_reward: Reward = 0.0
    """Reward without an answer (arXiv 2502.13389). With a PRM the last step earns its score."""
    reward_functions: list[str] = field(default_factory=list)
    """module:function of each part of the reward of the last step, which replace the three rewards
    above (TRL: reward_funcs). Each is called with the Problem and the decoded response or, if its
    second parameter is named responses, once with all responses to a problem."""
    reward_weights: list[Reward] = field(default_factory=list)
    """Weight of each function in the sum. An empty list weighs all of them with 1 (TRL's name)."""
    reward_scheme: Literal["paper", "blend", "gain", "min", "prof"] = "paper"
    """paper: a step earns its process score, 0 without a PRM (arXiv 2502.13389). blend: as paper,
    but the last step earns 0.6 x correct + 0.4 x score, as in the official code. gain: a step earns
    the increase of the score, and all steps together earn the outcome reward (Ng 1999). Longer
    responses then earn nothing extra. min: the finish and about the weakest step's score together
    (arXiv 2504.15275). prof: scores are not paid; they choose the rollouts to learn from
    (arXiv 2509.03403)."""
    prof_share: Rate = 0.5
    """prof: share of each problem's rollouts that are learned from."""
    score_truncated: bool = False
    """Truncated responses earn their process scores, as in the official code."""
    malformed_penalty: Coefficient = 0.0
    """Amount subtracted from the reward of a response with text outside whole segments."""
    mask_truncated_completions: bool = False
    """Exclusion of truncated responses from the loss (TRL's name)."""
    # -- learn
    advantage_estimator: Literal["ppo", "reinforce++", "grpo", "tree"] = "reinforce++"
    """ppo: critic, GAE; reinforce++: whitened returns (the paper's runs); grpo: group-relative;
    tree: from the values of the nodes that rollouts of mcts and fork share."""
    tree_advantage: Literal["treerl", "spo", "treepo"] = "treerl"
    """tree: the formula of arXiv 2506.11902, 2505.23564 or 2508.17445 (docs/method.md)."""
    kl_coef: Coefficient = 0.01
    """Weight of the KL to the warm-up model (arXiv 2502.13389: β)."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    """Estimator of the KL in the loss (grpo); the token reward uses k1 (arXiv 2502.13389)."""
    kl_target: Positive | None = None
    """KL per token towards which kl_coef adapts; None keeps it fixed."""
    kl_horizon: Count = 10000
    """Rollouts over which a KL 20 % off its target moves the coefficient by 20 %."""
    gamma: Share = 1.0
    """Discount (arXiv 2502.13389)."""
    lam: Share = 0.95
    """GAE's λ (arXiv 2502.13389)."""
    epsilon: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """Clip range of the ratio (arXiv 2502.13389)."""
    epsilon_high: Positive | None = None
    """Upper clip range when it differs (clip-higher)."""
    dual_clip: Annotated[float, Field(gt=1)] | None = None
    """Bound on the loss of negative advantages, as a multiple; None is off."""
    value_clip: Positive = 0.2
    """Clip range of the critic's step."""
    critic_learning_rate: Rate = 9e-6
    """Peak rate of the critic (OpenRLHF)."""
    whiten_rewards: bool = False
    """ppo, reinforce++: divide token rewards by their standard deviation over the batch (TRL)."""
    resample_rounds: Whole = 0
    """Rounds per step that replace problems whose rollouts all earned the same reward (DAPO's
    dynamic sampling). Problems that are still equal afterwards are dropped. 0 is off."""
    loss_normalization: Literal["token", "sequence"] = "token"
    """token: every action token counts the same (DAPO); sequence: every rollout does (GRPO)."""
    scale_rewards: bool = True
    """grpo: divide by the group's standard deviation."""
    entropy_coef: Coefficient = 0.0
    """Weight of the entropy bonus."""
    importance_cap: Annotated[float, Field(ge=1)] | None = 2.0
    """Upper bound on π_trainer/π_engine, which weights the loss; None is off."""
    forced_actions: Literal["keep", "weigh", "mask"] = "keep"
    """Openers that the tree chose count as actions (keep), as actions with the weight that gives
    the policy gradient (weigh: docs/method.md), or not as actions (mask)."""
    malformed_responses: Literal["grade", "mask", "reject"] = "grade"
    """Responses with text outside whole segments are graded normally; mask: likewise, but this text
    is not trained; reject: they count as no answer."""
    num_ppo_epochs: Count = 1
    """Passes over the rollouts (arXiv 2502.13389)."""
    train_batch_size: Count = 16
    """Rollouts per optimizer step over all ranks (arXiv 2502.13389: 16 steps of 16)."""
    packing: Literal["flat", "tree"] = "flat"
    """tree: the models compute prefixes that a problem's rollouts share only once. The update is
    the same. It is faster if prefixes are long and a minibatch has several rollouts per problem."""
    resume_from_checkpoint: Runtime[Literal["auto", "never"]] = "auto"
    """auto continues from the newest whole checkpoint in output_dir."""
    allow_cold_start: bool = False
    """mcts: start even if the model does not open its responses with functional tokens."""

    @model_validator(mode="after")
    def _learnable(self) -> Self:
        size, estimator = self.train_batch_size, self.advantage_estimator
        relative = estimator in ("grpo", "tree")  # compare the rollouts of a problem
        rollouts = self.rollout_batch_size * self.num_generations
        if rollouts % size:
            raise UserError(
                f"rollout_batch_size {self.rollout_batch_size} x num_generations "
                f"{self.num_generations} = {rollouts} must be divisible by train_batch_size "
                f"{size}; nearest: {', '.join(map(str, _nearest_divisors(rollouts, size)))}."
            )
        if relative and self.num_generations == 1:
            raise UserError(
                f"num_generations=1 gives zero advantages with {estimator}; use at least 2."
            )
        if relative and self.whiten_rewards:
            raise UserError(
                f"whiten_rewards does nothing with {estimator}, which compares the rollouts of a "
                "problem; use scale_rewards with grpo."
            )
        if relative and self.reward_scheme == "gain":
            raise UserError(
                f"reward_scheme=gain rewards single steps, but {estimator} sums the rewards of a "
                "response; use reinforce++ or ppo."
            )
        if self.reward_scheme in ("min", "prof") and not self.use_prm:
            raise UserError(
                f"reward_scheme={self.reward_scheme} needs process scores; set use_prm: true."
            )
        if self.reward_scheme == "gain" and self.gamma != 1:
            raise UserError(
                f"reward_scheme=gain needs gamma=1, got {self.gamma}: with a discount the gains no "
                "longer cancel and length is paid; set gamma: 1.0."
            )
        n_functions, n_weights = len(self.reward_functions), len(self.reward_weights)
        if n_weights not in (0, n_functions):
            raise UserError(
                f"reward_weights must have one weight for each of {n_functions} reward_functions, "
                f"got {n_weights}; correct the list."
            )
        if len(set(self.reward_functions)) < n_functions:
            raise UserError("reward_functions must not name a function twice; use reward_weights.")
        self._check_explorer()
        if self.kl_target is not None and self.kl_coef <= 0:
            raise UserError("kl_target needs a kl_coef above 0, got 0; set kl_coef.")
        if self.top_p != 1:
            raise UserError(f"top_p={self.top_p} biases the policy ratio; set top_p: 1.0.")
        _require_ids(self)
        return self

    @model_validator(mode="after")
    def _adapter_has_no_critic(self) -> Self:
        if self.use_peft and self.advantage_estimator == "ppo":
            raise UserError(
                "use_peft trains no critic, which advantage_estimator=ppo needs; use grpo, tree or "
                "reinforce++, or set use_peft: false."
            )
        return self

    def _check_explorer(self) -> None:
        """Raise UserError for settings of the explorer that contradict each other."""
        method, n, roots = self.sampling_method, self.num_generations, self.fork_roots
        if method == "fork" and (roots > n or (n - roots) % self.fork_branches):
            raise UserError(
                f"num_generations {n} - fork_roots {roots} must be a multiple of fork_branches "
                f"{self.fork_branches} and not negative; change one of them."
            )
        drawn = method == "fork" or (method == "mcts" and self.tree_acts == "drawn")
        if drawn and self.rollout_mode == "stepwise":
            raise UserError(
                "rollout_mode=stepwise forces every act, but here the policy draws them; "
                "set rollout_mode: free."
            )
        if drawn and self.selection == "puct":
            raise UserError(
                "selection=puct weighs acts by their priors, but here the policy draws them; "
                "set selection: uct."
            )
        if method == "normal" and self.advantage_estimator == "tree":
            raise UserError(
                "advantage_estimator=tree needs rollouts that share steps; set sampling_method to "
                "mcts or fork, or use grpo."
            )


@config_class
class EvalConfig(Common, Graded, EngineKeys, Beam, Process, Acts):
    """evaluate.py: greedy, pass@k, maj@k, per level, and search at inference."""

    eval_file: LocalPath
    """Problems with gold answers: .jsonl, .json, .csv or .parquet, also .gz, or a data set on the
    Hugging Face hub (hf:owner/name[:config][@split])."""
    max_problems: Count | None = None
    """Number of problems read, from the start of the file; None reads all."""
    num_samples: Whole = 8
    """Sampled responses per problem for avg@k, pass@k and maj@k; 0 is greedy only."""
    temperature: Temperature = 1.0
    """Sampling temperature of the samples and of the search."""
    max_completion_length: Count = 4096
    """Maximum tokens of a response."""
    simulations: list[Count] = field(default_factory=list)
    """Accuracy of search at inference after each of these numbers of simulations."""
    search_method: Literal["mcts", "beam", "dvts"] = "mcts"
    """Kind of that search. Without a PRM the value of a path is its agreement with others."""
    search_depth: Count = 18
    """Depth at which the tree still chooses (arXiv 2502.13389); free rollouts may run deeper."""
    exploration_weight: Coefficient = 2.0
    """c of UCT (arXiv 2502.13389)."""
    leaves_in_flight: Count = 4
    """Concurrent simulations of one tree."""
    problems_in_flight: Runtime[Count] = 256
    """Problems evaluated concurrently."""
    answer_format: Literal["boxed", "gsm8k", "auto"] = "boxed"
    """How responses state their answer."""
    math_verify: bool = False
    """Also judge every response with Math-Verify, an optional package. Its verdict stands beside
    ours in eval/<set>.jsonl and in the summary."""
    lm_eval_samples: bool = False
    """Also write eval/samples_<set>.jsonl, the samples in the format of lm-evaluation-harness."""
    audit: bool = False
    """Only audit the gold answers, without opening a model: how many parse, which respelled
    answers the grader rejects, and which near misses it accepts."""

    @model_validator(mode="after")
    def _engine_returns_ids(self) -> Self:
        _require_ids(self)
        return self


def _require_ids(cfg: EngineKeys) -> None:
    if cfg.engine == "api":
        raise UserError(
            "engine=api returns text, not token ids; only search.py supports it. Set engine=hf."
        )


def _nearest_divisors(n: int, wanted: int) -> list[int]:
    divisors = [d for d in range(1, n + 1) if n % d == 0]
    return sorted(sorted(divisors, key=lambda d: abs(d - wanted))[:2])


# ---- Reading ----

MAX_BYTES, MAX_VALUES = 200_000, 10_000
"""Bounds on a config file and on the values that its aliases expand to: reading stays fast."""
COMMAND_LINE = "on the command line"
Given = dict[str, tuple[Any, str]]
"""key -> (value, where it was set). Scalars are still text, which pydantic converts later."""


def load_config(schema: type[C], argv: Sequence[str]) -> C:
    """Return `[file.yaml] key=value …` as a checked `schema`. Raises UserError with one line."""
    values, known = given(argv, schema), specs(schema)
    for key, (value, where) in values.items():
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1, cutoff=0)
            raise UserError(f"unknown key {key!r} ({where}). Did you mean {near[0]!r}?")
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise UserError(f"`{key}` must be valid Unicode, got {value!a} ({where}).") from error
    for key in required_keys(schema):
        if values.get(key, (None, ""))[0] in (None, ""):
            raise UserError(f"`{key}` is not set; add it to the file or as {key}=….")
    try:
        return schema(**{key: value for key, (value, _) in values.items()})
    except ValidationError as error:
        found = error.errors(include_url=False)[0]
        key, *inside = map(str, found["loc"])
        spec, where = known[key], values[key][1]
        name = f"{key}[{inside[0]}]" if inside else key
        expected = allowed(spec["items"] if inside else spec)
        got = str(found["input"]).strip() if found["type"] in NOT_IN_RANGE else repr(found["input"])
        raise UserError(f"`{name}` must be {expected}, got {got[:80]} ({where}).") from None


NOT_IN_RANGE = (
    *("greater_than", "greater_than_equal", "less_than", "less_than_equal"),
    "finite_number",
)
"""pydantic's names for a number outside its bounds."""


def given(argv: Sequence[str], schema: type | None = None) -> Given:
    """Return the settings of a file and of the overrides after it. Later ones win.

    `key=null` unsets an optional key. Text is taken literally: it needs no quotes, and `#` and `:`
    have no meaning in it.
    """
    known = specs(schema) if schema else {}
    values: Given = {}
    for argument in argv:
        key, equals, text = argument.partition("=")
        group, dot, name = key.partition(".")
        inside, _ = values.get(group, ({}, ""))
        if not equals:
            values |= _read_file(argument)
        elif dot and isinstance(inside, dict):  # train.learning_rate=1e-3
            values[group] = (inside | {name: _override(text, {})}, COMMAND_LINE)
        else:
            values[key] = (_override(text, known.get(key, {})), COMMAND_LINE)
    return values


def _override(text: str, spec: dict[str, Any]) -> Any:
    kinds = [option.get("type") for option in spec.get("anyOf", [spec])]
    if text == "null" and kinds != ["string"]:
        return None
    if "string" in kinds:
        return text
    if text in ("", "~") and "null" in kinds:
        return None
    if text.startswith(("[", "{")):
        try:
            return structure(text)[0]
        except ValueError:
            return text  # `search.system_prompt=[INST] be brief` is text and not a list
    return text


def _read_file(path: str) -> Given:
    if not Path(path).is_file():
        raise UserError(
            f"config file {path} does not exist; check the path, or write settings as key=value."
        )
    try:
        data = Path(path).read_bytes()
        if len(data) > MAX_BYTES:
            raise ValueError(f"it has {len(data)} bytes, at most {MAX_BYTES} are allowed")
        text = data.decode("utf-8-sig")
        values, lines = structure(text)
    except UnicodeDecodeError as error:
        raise UserError(
            f"config file {path} must be UTF-8, but byte {error.start} is not; convert it."
        ) from error
    except (ValueError, OSError) as error:
        raise UserError(f"config file {path} cannot be read: {error}.") from error
    if values is None:
        raise UserError(f"config file {path} is empty; write `key: value` lines.")
    if not isinstance(values, dict):
        raise UserError(
            f"config file {path} must contain `key: value` lines, got a {type(values).__name__}; "
            "write one setting per line."
        )
    places = {key: f"{path} line {lines[key]}" if key in lines else path for key in values}
    return {key: (value, places[key]) for key, value in values.items()}


def structure(text: str) -> tuple[Any, dict[str, int]]:
    """Return YAML or JSON as mappings, lists, None and text, and the line of each outermost key.

    Raises ValueError. JSON has its own reader, as YAML misreads its surrogate pairs.
    """
    import yaml

    try:
        if text.lstrip().startswith(("{", "[")):
            try:
                return json.loads(text, object_pairs_hook=_unrepeated), {}
            except json.JSONDecodeError:
                pass  # a flow mapping such as {config: x.yaml}
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        value = None if node is None else _plain(node, [MAX_VALUES])
        pairs = node.value if isinstance(node, yaml.MappingNode) else []
        return value, {key.value: key.start_mark.line + 1 for key, _ in pairs}
    except yaml.YAMLError as error:
        raise ValueError(f"it is not YAML ({one_line(error)})") from error
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def typed_yaml(text: str) -> Any:
    """Return the value of YAML with its types, which a config's fields would convert themselves.

    Raises ValueError, also if reading would take long.
    """
    import yaml

    if len(text) > MAX_BYTES:
        raise ValueError(f"it has {len(text)} characters, at most {MAX_BYTES} are allowed")
    structure(text)  # bounds what aliases and depth can cost, and finds keys that are set twice
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"it is not YAML ({one_line(error)})") from error


def _plain(node: Any, budget: list[int]) -> Any:
    """Return a composed YAML node with scalars as text. An alias counts each time it is used."""
    import yaml

    budget[0] -= 1
    if budget[0] < 0:
        raise ValueError(f"it expands to more than {MAX_VALUES} values")
    if isinstance(node, yaml.SequenceNode):
        return [_plain(item, budget) for item in node.value]
    if not isinstance(node, yaml.MappingNode):
        return None if node.tag == "tag:yaml.org,2002:null" else node.value
    lines: dict[str, int] = {}
    for key, _ in node.value:
        line = key.start_mark.line + 1
        if not isinstance(key, yaml.ScalarNode):
            raise ValueError(f"the key in line {line} must be a name")
        if key.value in lines:
            raise ValueError(f"{key.value} is set twice (line {lines[key.value]}, line {line})")
        lines[key.value] = line
    return {key.value: _plain(value, budget) for key, value in node.value}


def _unrepeated(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object as a dict. Raises ValueError where it has a key twice."""
    names = [name for name, _ in pairs]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"{name} is set twice")
    return dict(pairs)


# ---- Descriptions of a schema, for errors and --help ----

BOUNDS = {
    "minimum": "of at least",
    "exclusiveMinimum": "above",
    "maximum": "at most",
    "exclusiveMaximum": "below",
}
"""Key of a JSON schema -> words for that bound."""
WORDS = {"string": "text", "boolean": "true or false", "object": "a mapping", "null": "null"}
"""Type of a JSON schema -> words for that type."""


@cache
def specs(schema: type) -> dict[str, dict[str, Any]]:
    """Return key -> JSON schema of each field of `schema`."""
    return TypeAdapter(schema).json_schema()["properties"]


def required_keys(schema: type) -> list[str]:
    """Return the names of the fields without a default."""
    return [f.name for f in fields(schema) if f.default is MISSING and f.default_factory is MISSING]


def allowed(spec: dict[str, Any]) -> str:
    """Return the allowed values of a JSON schema in words, such as `an integer of at least 1`."""
    match spec:
        case {"anyOf": options}:
            return ", or ".join(allowed(option) for option in options)
        case {"enum": choices}:
            return f"one of {', '.join(choices)}"
        case {"type": "array", "items": items}:
            return f"a list such as [a, b], each item {allowed(items)}"
        case {"type": "integer" | "number" as kind}:
            noun = "an integer" if kind == "integer" else "a finite number"
            bounds = [f"{words} {spec[key]:.15g}" for key, words in BOUNDS.items() if key in spec]
            return f"{noun} {' and '.join(bounds)}".strip()
        case _:
            return WORDS[spec["type"]]


def field_docs(schema: type) -> dict[str, str]:
    """Return name -> docstring of each field, those of the base classes first.

    Only `--help` needs the docstrings. pydantic's `use_attribute_docstrings` would read the source
    at every start, which takes 40 ms, and does not find it under pytest.
    """
    docs: dict[str, str] = {}
    for base in reversed(schema.__mro__[:-1]):
        for statement, following in pairwise(_class_bodies(base.__module__)[base.__name__]):
            match statement, following:
                case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=x)):
                    docs[name] = inspect.cleandoc(str(x))
    return docs


@cache
def _class_bodies(module: str) -> dict[str, list[ast.stmt]]:
    tree = ast.parse(inspect.getsource(sys.modules[module]))
    return {node.name: node.body for node in tree.body if isinstance(node, ast.ClassDef)}


def describe(schema: type) -> str:
    """Return the help text: every field with its allowed values, default and docstring."""
    known, docs = specs(schema), field_docs(schema)
    lines = [
        f"{schema.__doc__}\n",
        "usage: python SCRIPT.py config.yaml [key=value …]",
        "Text is taken literally. key=null unsets an optional key. (runtime): a continued run may",
        "change this key.\n",
    ]
    for f in fields(schema):
        default = f.default if f.default_factory is MISSING else f.default_factory()
        shown = "required" if default is MISSING else repr(default)
        mark = " (runtime)" if "runtime" in known[f.name] else ""
        lines.append(f"{f.name}: {allowed(known[f.name])} = {shown}{mark}")
        lines += [f"    {line}" for line in docs.get(f.name, "").splitlines()]
    return "\n".join(lines) + "\n"
