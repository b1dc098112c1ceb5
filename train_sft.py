"""Offline training: warm-up on curated rows (arXiv 2502.13389), rejection sampling, DPO on pairs.

    python train_sft.py configs/tiny/sft.yaml [loss=sft|dpo] [key=value …]
    torchrun --nproc_per_node 8 train_sft.py configs/qwen2.5-7b/sft.yaml

Only the response counts in the loss. Rows are packed without padding. One optimizer step takes
`train_batch_size` rows (DPO: pairs) over all ranks, however they are divided into microbatches. The
reference of DPO is the model that training starts from. The trained model is in output_dir/hf.
"""

from __future__ import annotations

from rftt.run.config import SFTConfig
from rftt.run.front import front

if __name__ == "__main__":
    front("train_sft", SFTConfig)

import math
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from rftt.batch import Batch
from rftt.engines.chat import open_tokenizer
from rftt.learner.fsdp import World, joined, per_token, shard
from rftt.learner.logprobs import token_logprobs
from rftt.learner.model import add_function_rows, load_policy
from rftt.learner.offline import (
    Sums,
    collate_examples,
    eval_metrics,
    offline_loss,
    reference_logprobs,
)
from rftt.rl import Metrics
from rftt.run.data import read_rows, shuffled_epochs
from rftt.run.training import Run
from rftt.tokens import add_function_tokens
from rftt.update import Learner

LINE = ("loss", "dpo_accuracy", "eval_loss", "grad_norm")
"""Metrics in the printed line of a step."""


def main(cfg: SFTConfig) -> None:
    with joined(cfg.device, wait=True) as world:
        train(cfg, world)


def train(cfg: SFTConfig, world: World) -> None:
    tokenizer = open_tokenizer(cfg)
    new_tokens = add_function_tokens(tokenizer) if cfg.functional_tokens else []
    train_rows, eval_rows, left_out = read_rows(cfg, tokenizer)
    rows = train_rows + eval_rows
    n_rows = round(len(train_rows) * cfg.num_train_epochs)
    total_steps = math.ceil(n_rows / cfg.train_batch_size)
    order = list(islice(shuffled_epochs(len(train_rows), cfg.seed), n_rows))

    run = Run(cfg, world, tokenizer, LINE)
    model = load_policy(
        cfg.model_name_or_path,
        torch.float32,
        gradient_checkpointing=cfg.gradient_checkpointing,
        trust_remote_code=cfg.trust_remote_code,
    )
    add_function_rows(model, tokenizer, new_tokens)
    shard(model, world, param_dtype=getattr(torch, cfg.dtype), cpu_offload=cfg.fsdp_cpu_offload)
    learner = Learner(cfg, {"policy": model}, total_steps, world, run.folder / "debug", run.info)
    if cfg.initial_state:  # weights and moments of another run; steps and schedule are this one's
        learner.load(Path(cfg.initial_state))

    def logprobs(batch: Batch) -> Tensor:
        return token_logprobs(model, batch, 1.0, len(tokenizer))[0]  # (T,)

    def loss_of(micro: Batch) -> tuple[Tensor, Metrics]:
        return offline_loss(logprobs(micro), micro, cfg)

    reference: list[Sums] = [(0.0,)] * len(rows)
    if cfg.loss == "dpo":  # before a checkpoint is loaded: these are still the first weights
        cache = run.folder / "data" / "reference.jsonl"
        reference = reference_logprobs(cache, rows, logprobs, cfg, world, model)
    run.resume(learner)
    run.require_same_rows(rows)

    def own_share(picked: Sequence[int]) -> Batch:
        """Pack this rank's share of the rows; long and short ones are dealt out evenly."""
        size = {i: sum(len(p) + len(response) for p, response, _ in rows[i]) for i in picked}
        own = sorted(picked, key=lambda i: -size[i])[world.rank :: world.size]
        names = [f"example {i}" for i in own]
        examples, sums = [rows[i] for i in own], [reference[i] for i in own]
        return collate_examples(examples, sums, names, each=len(rows[0])).to(world.device)

    run.info(
        f"{len(train_rows)} rows ({left_out}), {len(eval_rows)} held out, "
        f"{total_steps} steps from {run.first_step}"
    )
    for step in run.steps(total_steps):
        batch = own_share(order[step * cfg.train_batch_size : (step + 1) * cfg.train_batch_size])
        learner.begin(step)
        learner.step(batch, loss_of)
        metrics = learner.metrics() | {"tokens": world.sum(float(batch.n_actions))}
        saves = run.is_due(step) or run.is_last(step)
        if eval_rows and (saves or (cfg.eval_steps and (step + 1) % cfg.eval_steps == 0)):
            held_out = own_share(range(len(train_rows), len(rows)))
            values = per_token(logprobs, held_out, cfg.max_tokens_per_microbatch, world)
            metrics |= eval_metrics(values, held_out, cfg, world)
        run.log(step, metrics)
        if saves and eval_rows:
            run.rate(step + 1, -metrics["eval_loss"])
        run.save_if_due(step)
    run.finish()
