"""What can be set: one dataclass per script, a docstring with unit and source per field.

Sources are the paper (arXiv 2502.13389), or the library that set the name; cli.py reads the files.
Field groups are dataclass bases, the one use of inheritance beside nn.Module: no field is written
twice.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Literal

from rftt.run.fields import Acts, Api, Beam, Filters, Process
from rftt.types import UserError


@dataclass(frozen=True, kw_only=True)
class Common:
    output_dir: str
    """Run directory; everything the script writes is below it."""
    model_name_or_path: str
    """Hugging Face folder or hub name of the model to start from."""
    seed: int = 0
    """Every random choice derives from it, the problem's id and the step."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Precision of weights in engines and of compute in training (arXiv 2502.13389: bf16). auto is
    bfloat16 where the device computes in it (GPUs, CPUs with AMX or AVX512-BF16), else float32."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes a GPU when there is one."""
    system_prompt: str | None = None
    """Goes before every question in SFT, RL, evaluation and plain sampling, and before those of a
    qwen PRM in this process; phase 1's tree search asks with instructions of its own."""
    trust_remote_code: bool = False
    """Run Python code that comes with a model folder."""
    prompt_key: str | None = None
    """Field of the data that holds the question, where it has none of the usual names."""


@dataclass(frozen=True, kw_only=True)
class Graded:
    answer_key: str | None = None
    """Field of the data that holds the gold answer, where it has none of the usual names."""


@dataclass(frozen=True, kw_only=True)
class EngineKeys:
    engine: Literal["hf", "vllm", "api"] = "hf"
    """What samples: transformers, always there; vLLM, the fast one; api, another model's URL, for
    search.py only."""
    max_model_len: int = 8192
    """Prompt plus response, in tokens (arXiv 2502.13389: cutoff 8192)."""
    max_num_seqs: int = 256
    """Sequences decoded together at most."""
    gpu_memory_utilization: float = 0.4
    """Share of a GPU that vLLM may take beside the learner."""


@dataclass(frozen=True, kw_only=True)
class Training:
    learning_rate: float
    """Peak learning rate."""
    lr_scheduler_type: Literal["constant", "cosine", "linear"] = "constant"
    """Shape after the warm-up."""
    warmup_ratio: float = 0.0
    """Share of all steps (SFT: optimizer steps, RL: rounds) over which the rate rises from 0."""
    min_lr_ratio: float = 0.0
    """The schedule ends at this share of the peak."""
    adam_beta1: float = 0.9
    """arXiv 2502.13389."""
    adam_beta2: float = 0.95
    """arXiv 2502.13389."""
    weight_decay: float = 0.0
    """AdamW, decoupled."""
    optim: Literal["adamw", "adamw_8bit"] = "adamw"
    """adamw_8bit needs bitsandbytes and a GPU; we have not run it, under FSDP2 or without."""
    max_grad_norm: float = 1.0
    """Gradients are clipped to this global norm (arXiv 2502.13389)."""
    max_tokens_per_microbatch: int = 16384
    """Packed tokens of one forward pass on one rank: the knob for memory."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about 30 % more compute."""
    fsdp_cpu_offload: bool = False
    """Keep sharded weights and optimizer state in host memory between uses."""
    save_steps: int = 50
    """A checkpoint every so many steps, and at the end; 0 keeps only the end."""
    save_total_limit: int = 2
    """Newest checkpoints kept, beside the best one."""
    overwrite_output_dir: bool = False
    """Forget the checkpoints in output_dir and start over, each time the script is started."""
    report_to: list[str] = field(default_factory=list)
    """Any of tensorboard, wandb; metrics.jsonl is always written."""


@dataclass(frozen=True, kw_only=True)
class SearchConfig(Common, Graded, EngineKeys, Api, Filters, Beam, Process):
    """search.py: problems -> trees or samples -> curated training rows (phase 1)."""

    train_file: str
    """JSONL of problems with gold answers."""
    max_problems: int | None = None
    """Only the first so many."""
    method: Literal["mcts", "beam", "dvts", "sample", "score"] = "mcts"
    """mcts, beam, dvts: search over prompted acts. sample: answers to the bare question, cached,
    then scored and filtered. score: only that, with the cache in raw_file; no model is opened."""
    raw_file: str | None = None
    """method=score: data/raw.jsonl of another run; train_file is not read then."""
    simulations: int = 16
    """Passes of a tree search (arXiv 2502.13389); beam, dvts: lookaheads; sample: answers."""
    search_depth: int = 15
    """Steps on a path at most (arXiv 2502.13389)."""
    exploration_weight: float = 2.0
    """c of UCT (arXiv 2502.13389)."""
    leaves_in_flight: int = 4
    """Simulations of one tree that run at once, kept apart by virtual loss; 1 is textbook MCTS."""
    problems_in_flight: int = 64
    """Trees grown at once; with leaves_in_flight it fills the engine's batch."""
    temperature: float = 0.95
    """Of every prompted reply (arXiv 2502.13389)."""
    max_direct_sentences: int = 4
    """A simulation does not choose direct answers longer than this (arXiv 2502.13389)."""
    max_completion_length: int = 4096
    """Tokens of one reply at most; an act's own limit may be lower."""
    max_plain_paths: int = 2
    """Disjoint correct paths kept per problem beside the merged one (arXiv 2502.13389)."""
    min_shared_steps: int = 0
    """Steps that the right and the wrong path of a pair must share."""
    tree_pairs: bool = False
    """Also write a pair for DPO per tree: best right and worst wrong path, widest shared prefix."""
    max_repeats: int = 2
    """A path or response with a sentence occurring more often than this is left out."""

    def __post_init__(self) -> None:
        Process.__post_init__(self)
        scores, responses = self.method == "score", self.method in ("sample", "score")
        if scores and not self.raw_file:
            raise UserError("method=score needs a raw_file.")
        if self.raw_file is not None and not scores:
            raise UserError("raw_file is for method=score only.")
        if (threshold := self.prm_threshold) and not self.use_prm:
            raise UserError(f"prm_threshold={threshold} needs process scores; set use_prm: true.")
        default, own = asdict(Filters()), asdict(self)
        idle = [key for key in default if own[key] != default[key] and key != "max_row_tokens"]
        if idle and not responses:
            raise UserError(
                f"{', '.join(idle)}: only method=sample and score filter by it; {self.method} "
                "curates trees."
            )
        if self.engine == "api":
            if not (self.api_url and self.api_model):
                raise UserError("engine=api needs api_url, api_model.")
            prices, cost = self.api_prompt_price + self.api_completion_price, self.api_max_cost
            if not (prices > 0 if cost is not None else self.api_max_tokens is not None):
                raise UserError(
                    "engine=api needs a budget: api_max_tokens, or api_max_cost with prices."
                )


@dataclass(frozen=True, kw_only=True)
class SFTConfig(Common, Training):
    """train_sft.py: offline training on curated rows (warm-up) or on pairs of them (DPO)."""

    train_file: str
    """JSONL of rows: question with steps or response (sft), or with chosen and rejected (dpo)."""
    loss: Literal["sft", "dpo"] = "sft"
    """sft: cross-entropy; dpo: the chosen response against the rejected one (Rafailov 2023)."""
    dpo_beta: float = 0.3
    """Scale of a response's gain on the reference, the model that training started from."""
    label_smoothing: float = 0.0
    """dpo: the share of pairs that may be the wrong way round (cDPO)."""
    mix_file: str | None = None
    """More rows of the same kind, such as the original data, mixed in against forgetting."""
    mix_ratio: float = 0.5
    """Rows of mix_file per row of train_file; those of a small file come more than once."""
    eval_file: str | None = None
    """Rows for the evaluation loss; otherwise eval_ratio of the training rows."""
    eval_ratio: float = 0.05
    """Share of the training rows held out for the evaluation loss."""
    num_train_epochs: float = 10
    """arXiv 2502.13389: up to 10."""
    train_batch_size: int = 128
    """Rows per optimizer step over all ranks (arXiv 2502.13389)."""
    max_length: int = 8192
    """Longer rows are left out and counted (arXiv 2502.13389: cutoff)."""
    functional_tokens: bool = True
    """Add the functional tokens to the vocabulary; false for plain chain of thought."""
    mask_wrong: bool = True
    """Keep the wrong branch of a merged row out of the loss."""
    eval_steps: int = 50
    """Optimizer steps between two evaluation losses; every checkpoint has one."""
    initial_state: str | None = None
    """Checkpoint folder of another run: start with its weights and its optimizer's moments."""

    def __post_init__(self) -> None:
        if not 0 <= (smoothing := self.label_smoothing) < 0.5:
            raise UserError(f"label_smoothing={smoothing} is not from 0 to below 0.5.")


@dataclass(frozen=True, kw_only=True)
class RLConfig(Common, Graded, EngineKeys, Training, Process, Acts):
    """train_rl.py: online RL whose explorer is a tree search over functional tokens (phase 2)."""

    train_file: str
    """JSONL of problems with gold answers."""
    eval_file: str | None = None
    """Problems for the greedy accuracy logged every eval_steps."""
    max_eval_problems: int = 500
    """Only the first so many."""
    eval_steps: int = 0
    """Steps between two greedy evaluations, and one for each checkpoint; 0 never."""
    max_steps: int = 250
    """Exploration-and-learning rounds (arXiv 2502.13389)."""
    max_generated_tokens: int | None = None
    """End after the round in which so many tokens have been sampled: equal budgets to compare."""
    # -- explore
    sampling_method: Literal["mcts", "normal"] = "mcts"
    """mcts: tree over functional tokens; normal: independent responses (the official name)."""
    rollout_batch_size: int = 16
    """Problems per step over all ranks (arXiv 2502.13389)."""
    num_generations: int = 16
    """Rollouts per problem (arXiv 2502.13389)."""
    search_depth: int = 18
    """Depth at which the tree still chooses (arXiv 2502.13389); free rollouts may run deeper."""
    exploration_weight: float = 2.0
    """c of UCT (arXiv 2502.13389)."""
    leaves_in_flight: int = 4
    """Simulations of one tree that run at once; 1 is textbook MCTS."""
    rollout_mode: Literal["free", "stepwise"] = "free"
    """free: one request per rollout; stepwise: greedy acts, one request per act (the paper's)."""
    temperature: float = 0.95
    """arXiv 2502.13389."""
    top_p: float = 1.0
    """Must be 1: anything less makes sampling and training log-probs differ."""
    max_completion_length: int = 4096
    """Response tokens at most."""
    # -- score
    correct_reward: float = 1.0
    """A finished path with the right answer (arXiv 2502.13389)."""
    wrong_reward: float = 0.1
    """An answer that is wrong (arXiv 2502.13389)."""
    no_answer_reward: float = 0.0
    """No answer at all (arXiv 2502.13389); with a PRM the last step earns its own score instead."""
    reward_function: str | None = None
    """module:function called with the Problem and the decoded response: what the last step earns,
    instead of the three above."""
    reward_scheme: Literal["paper", "blend", "gain"] = "paper"
    """paper: a step earns its process score, 0 without a PRM (arXiv 2502.13389). blend: so it does,
    but the last one 0.6 x correct + 0.4 x score, as in the official code. gain: a step earns by how
    much it raises the score, and the sum is that of the outcome alone (Ng 1999): length is not paid
    for."""
    mask_truncated_completions: bool = False
    """Leave responses that ran out of tokens out of the loss (TRL's name)."""
    # -- learn
    advantage_estimator: Literal["ppo", "reinforce++", "grpo"] = "reinforce++"
    """ppo: critic, GAE; reinforce++: whitened returns (the paper's runs); grpo: group-relative."""
    kl_coef: float = 0.01
    """Weight of the KL to the warm-up model (arXiv 2502.13389: β)."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    """Of the KL in the loss (grpo); in the token reward it is always k1 (arXiv 2502.13389)."""
    kl_target: float | None = None
    """Adapt kl_coef towards this KL per token; None keeps it fixed."""
    kl_horizon: int = 10000
    """Rollouts over which a KL 20 % off its target moves the coefficient by 20 %."""
    gamma: float = 1.0
    """Discount (arXiv 2502.13389)."""
    lam: float = 0.95
    """GAE's λ (arXiv 2502.13389)."""
    epsilon: float = 0.2
    """Clip range of the ratio (arXiv 2502.13389)."""
    epsilon_high: float | None = None
    """Upper clip range when it differs (clip-higher)."""
    dual_clip: float | None = None
    """Bound on the loss of negative advantages, as a multiple; None is off."""
    value_clip: float = 0.2
    """Clip range of the critic's step."""
    critic_learning_rate: float = 9e-6
    """Peak rate of the critic (OpenRLHF)."""
    whiten_rewards: bool = False
    """ppo, reinforce++: divide token rewards by their standard deviation over the batch (TRL)."""
    resample_rounds: int = 0
    """Times that problems whose rollouts all earned the same give way to new ones in a step (DAPO's
    dynamic sampling); what differs by then is learned from. 0 is off."""
    loss_normalization: Literal["token", "sequence"] = "token"
    """token: every action token counts the same (DAPO); sequence: every rollout does (GRPO)."""
    scale_rewards: bool = True
    """grpo: divide by the group's standard deviation."""
    entropy_coef: float = 0.0
    """Weight of the entropy bonus."""
    importance_cap: float | None = 2.0
    """Truncate π_trainer/π_engine here and weight the loss with it; None is off."""
    forced_actions: Literal["keep", "weigh", "mask"] = "keep"
    """Openers that the tree chose: the policy's actions, weighted by π(opener), or no actions."""
    malformed_responses: Literal["grade", "reject"] = "grade"
    """Text outside whole segments: graded like any other, or as no answer at all."""
    num_ppo_epochs: int = 1
    """Passes over the rollouts (arXiv 2502.13389)."""
    train_batch_size: int = 16
    """Rollouts per optimizer step over all ranks (arXiv 2502.13389: 16 steps of 16)."""
    packing: Literal["flat", "tree"] = "flat"
    """tree: tokens that a problem's rollouts share go through the models once; what is learnt is
    the same. Pays where they share much and a minibatch holds several of a problem."""
    resume_from_checkpoint: Literal["auto", "never"] = "auto"
    """auto continues from the newest whole checkpoint in output_dir."""
    allow_cold_start: bool = False
    """mcts: start although the model does not open its responses with functional tokens."""

    def __post_init__(self) -> None:
        Process.__post_init__(self)
        size, grpo = self.train_batch_size, self.advantage_estimator == "grpo"
        rollouts = self.rollout_batch_size * self.num_generations
        if rollouts % size:
            raise UserError(
                f"rollout_batch_size {self.rollout_batch_size} x num_generations "
                f"{self.num_generations} = {rollouts} is not divisible by train_batch_size {size}; "
                f"nearest: {', '.join(map(str, _nearest_divisors(rollouts, size)))}."
            )
        if grpo and self.num_generations == 1:
            raise UserError("num_generations=1 gives zero advantages with grpo; use at least 2.")
        if grpo and self.whiten_rewards:
            raise UserError(
                "whiten_rewards does nothing with grpo, which scales by group; use scale_rewards."
            )
        if grpo and self.reward_scheme == "gain":
            raise UserError(
                "reward_scheme=gain tells steps apart and grpo adds them up; use reinforce++ or "
                "ppo."
            )
        if self.kl_target is not None and self.kl_coef <= 0:
            raise UserError("kl_target needs a kl_coef above 0 to adapt.")
        if self.top_p != 1:
            raise UserError(f"top_p={self.top_p} biases the policy ratio; set top_p: 1.0.")
        if self.temperature <= 0:
            raise UserError("temperature=0 explores nothing; use a positive one.")
        _require_ids(self)


@dataclass(frozen=True, kw_only=True)
class EvalConfig(Common, Graded, EngineKeys, Beam, Process, Acts):
    """evaluate.py: greedy, pass@k, maj@k, per level, and search at inference."""

    eval_file: str
    """JSONL of problems with gold answers."""
    max_problems: int | None = None
    """Only the first so many."""
    num_samples: int = 8
    """Sampled responses per problem for avg@k, pass@k and maj@k; 0 is greedy only."""
    temperature: float = 1.0
    """Of the samples and of the search."""
    max_completion_length: int = 4096
    """Response tokens at most."""
    simulations: list[int] = field(default_factory=list)
    """Accuracy of search at inference after each of these numbers of simulations."""
    search_method: Literal["mcts", "beam", "dvts"] = "mcts"
    """How that search explores; without a PRM, paths are worth their agreement with others."""
    search_depth: int = 18
    """Depth at which the tree still chooses (arXiv 2502.13389); free rollouts may run deeper."""
    exploration_weight: float = 2.0
    """c of UCT (arXiv 2502.13389)."""
    leaves_in_flight: int = 4
    """Simulations of one tree that run at once."""
    problems_in_flight: int = 256
    """Problems evaluated at once."""
    answer_format: Literal["boxed", "gsm8k", "auto"] = "boxed"
    """How responses state their answer."""

    def __post_init__(self) -> None:
        Process.__post_init__(self)
        _require_ids(self)


def _require_ids(cfg: EngineKeys) -> None:
    if cfg.engine == "api":
        raise UserError("engine=api speaks text, not token ids: only search.py can use it.")


def _nearest_divisors(n: int, wanted: int) -> list[int]:
    divisors = [d for d in range(1, n + 1) if n % d == 0]
    return sorted(sorted(divisors, key=lambda d: abs(d - wanted))[:2])
