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

if __name__ == "__main__":  # answers --help and config errors before torch is imported
    front("train_sft", SFTConfig)  # runs main() and exits

import math
from itertools import islice

from torch import Tensor

from rftt.batch import Batch
from rftt.engines.chat import open_tokenizer
from rftt.learner.checkpoint import whole_checkpoint
from rftt.learner.fsdp import World, per_token, process_group
from rftt.learner.logprobs import token_logprobs
from rftt.learner.offline import Sums, eval_metrics, offline_loss, reference_logprobs
from rftt.learner.setup import load_trainee
from rftt.learner.share import pack_own_rows
from rftt.rl import Metrics
from rftt.run.data import read_rows, shuffled_epochs
from rftt.run.training import Run
from rftt.tokens import add_function_tokens
from rftt.update import Learner

PRINTED = ("loss", "dpo_accuracy", "eval_loss", "grad_norm")
"""Metrics in the printed line of a step."""


def main(cfg: SFTConfig) -> None:
    with process_group(cfg.device, wait=True, hsdp=cfg.hsdp) as world:
        train(cfg, world)


def train(cfg: SFTConfig, world: World) -> None:
    tokenizer = open_tokenizer(cfg)
    new_tokens = add_function_tokens(tokenizer) if cfg.functional_tokens else []
    train_rows, eval_rows, left_out = read_rows(cfg, tokenizer)
    rows = train_rows + eval_rows
    held_out = range(len(train_rows), len(rows))
    n_rows = round(len(train_rows) * cfg.num_train_epochs)  # seen in all
    total_steps = math.ceil(n_rows / cfg.train_batch_size)
    order = list(islice(shuffled_epochs(len(train_rows), cfg.seed), n_rows))

    run = Run(cfg, world, tokenizer, PRINTED)
    model, n_tokens = load_trainee(cfg, world, tokenizer, new_tokens, rows)
    learner = Learner(cfg, {"policy": model}, total_steps, world, run.folder / "debug", run.info)
    if cfg.initial_state:  # weights and moments of another run; steps and schedule are this one's
        learner.load(whole_checkpoint(cfg.initial_state, world))

    def logprobs(batch: Batch) -> Tensor:
        return token_logprobs(model, batch, 1.0, n_tokens)[0]  # (T,)

    def loss_of(micro: Batch) -> tuple[Tensor, Metrics]:
        return offline_loss(logprobs(micro), micro, cfg)  # a sum over tokens, or over pairs

    reference: list[Sums] = [(0.0,)] * len(rows)  # only DPO compares with a reference
    if cfg.loss == "dpo":  # before a checkpoint is loaded: these are still the first weights
        cache = run.folder / "data" / "reference.jsonl"
        reference = reference_logprobs(cache, rows, logprobs, cfg, world, model)
    run.resume(learner)
    run.require_same_rows(rows)
    run.info(
        f"{len(train_rows)} rows ({left_out}), {len(eval_rows)} held out, "
        f"{total_steps} steps from {run.first_step}"
    )

    for step in run.steps(total_steps):
        # 1. Learn: one optimizer step on the next rows.
        picked = order[step * cfg.train_batch_size : (step + 1) * cfg.train_batch_size]
        batch = pack_own_rows(rows, reference, picked, world)
        learner.begin(step)
        learner.step(batch, loss_of)
        metrics = learner.metrics() | {"tokens": world.sum(float(batch.n_actions))}

        # 2. Look: the loss on held-out rows, a place to resume from.
        saves = run.is_due(step) or run.is_last(step)
        if eval_rows and (saves or (cfg.eval_steps and (step + 1) % cfg.eval_steps == 0)):
            unseen = pack_own_rows(rows, reference, held_out, world)
            values = per_token(logprobs, unseen, cfg.max_tokens_per_microbatch, world)
            metrics |= eval_metrics(values, unseen, cfg, world)
        run.log(step, metrics)
        if saves and eval_rows:  # the best checkpoint has the lowest loss
            run.rate(step + 1, -metrics["eval_loss"])
        run.save_if_due(step)
    run.finish()
