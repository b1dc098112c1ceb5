"""Offline training: warm-up on curated rows (arXiv 2502.13389), rejection sampling, DPO on pairs.

    python train_sft.py configs/tiny/sft.yaml [loss=sft|dpo] [key=value …]
    torchrun --nproc_per_node 8 train_sft.py configs/qwen2.5-7b/sft.yaml

Only the response counts in the loss. Rows are packed without padding; one optimizer step is
`train_batch_size` rows (DPO: pairs) over all ranks, whatever the microbatches. The reference of DPO
is the model that training starts from. The model goes to output_dir/hf.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from itertools import islice
from pathlib import Path

from rftt.engines.chat import load_tokenizer
from rftt.run.cli import STOPPED, cli, stop_on_sigterm
from rftt.run.config import SFTConfig
from rftt.run.data import read_rows, shuffled_epochs
from rftt.tokens import add_function_tokens


def main(cfg: SFTConfig) -> None:
    # Heavy imports wait until the config is known to be good.
    from rftt.learner.fsdp import joined

    with joined(cfg.device, wait=True) as world:
        train(cfg, world)


def train(cfg: SFTConfig, world) -> None:
    import torch

    from rftt.batch import Batch
    from rftt.learner.checkpoint import export_hf, restore
    from rftt.learner.fsdp import Totals, per_token, shard
    from rftt.learner.guard import Guard
    from rftt.learner.logprobs import token_logprobs
    from rftt.learner.model import add_function_rows, load_policy
    from rftt.learner.offline import Sums, collate_examples, offline_loss, reference_logprobs
    from rftt.learner.optim import build_optimizer, lr_at
    from rftt.learner.setup import checkpoint_to_resume, checkpoints_of, same_data
    from rftt.run.log import RunLog
    from rftt.update import update

    out = Path(cfg.output_dir)
    checkpoint = checkpoint_to_resume(cfg, world)
    tokenizer = load_tokenizer(cfg.model_name_or_path, trust_remote_code=cfg.trust_remote_code)
    new_tokens = add_function_tokens(tokenizer) if cfg.functional_tokens else []
    train_rows, eval_rows, too_long = read_rows(cfg, tokenizer)
    rows = train_rows + eval_rows
    log = RunLog(out, asdict(cfg), enabled=world.is_main, report_to=cfg.report_to)

    model = load_policy(
        cfg.model_name_or_path,
        torch.float32,
        gradient_checkpointing=cfg.gradient_checkpointing,
        trust_remote_code=cfg.trust_remote_code,
    )
    add_function_rows(model, tokenizer, new_tokens)
    shard(model, world, param_dtype=getattr(torch, cfg.dtype), cpu_offload=cfg.fsdp_cpu_offload)
    optimizer = build_optimizer(cfg, model, cfg.learning_rate)
    if cfg.initial_state:  # weights and moments of another run; steps and schedule are this one's
        restore(Path(cfg.initial_state), {"policy": model}, {"policy": optimizer})

    def logprobs(batch: Batch):
        return token_logprobs(model, batch, 1.0, len(tokenizer))[0]

    reference: list[Sums] = [(0.0,)] * len(rows)
    if cfg.loss == "dpo":  # before a checkpoint is read: the model is still the one it starts from
        cache = out / "data" / "reference.jsonl"
        reference = reference_logprobs(cache, rows, logprobs, cfg, world, model)
    modules, optimizers = {"policy": model}, {"policy": optimizer}
    past = restore(checkpoint, modules, optimizers) if checkpoint else {}
    extra = {"data": same_data(rows, past.get("data"), out)}
    checkpoints, first_step = checkpoints_of(cfg, world, tokenizer, past), past.get("step", 0)
    log.rewind(first_step)

    n_rows = round(len(train_rows) * cfg.num_train_epochs)
    total_steps = math.ceil(n_rows / cfg.train_batch_size)
    order = list(islice(shuffled_epochs(len(train_rows), cfg.seed), n_rows))
    log.info(
        f"{len(train_rows)} rows ({too_long} too long), {len(eval_rows)} held out, "
        f"{total_steps} steps from {first_step}"
    )

    def my_share(picked: Sequence[int]) -> tuple[Batch, list[str]]:
        size = {i: sum(len(p) + len(response) for p, response, _ in rows[i]) for i in picked}
        mine = sorted(picked, key=lambda i: -size[i])[world.rank :: world.size]
        examples, sums = [rows[i] for i in mine], [reference[i] for i in mine]
        names = [f"example {i}" for i in mine for _ in rows[0]]
        return collate_examples(examples, sums, each=len(rows[0])).to(world.device), names

    def learn(totals: Totals, micro: Batch) -> torch.Tensor:
        loss, metrics = offline_loss(logprobs(micro), micro, cfg)
        totals.add({"loss": loss} | metrics)
        return loss

    def evaluation() -> dict[str, float]:
        (batch, _), totals = my_share(range(len(train_rows), len(rows))), Totals()
        values = per_token(logprobs, batch, cfg.max_tokens_per_microbatch, world)
        loss, metrics = offline_loss(values, batch, cfg)
        totals.add({"eval_loss": loss} | {f"eval_{key}": metrics[key] for key in metrics})
        return totals.reduce(world, per=world.sum(float(batch.n_terms)))

    guard, stop = Guard(out / "debug", modules, world, log.info), stop_on_sigterm()
    for step in range(first_step, total_steps):
        picked = order[step * cfg.train_batch_size : (step + 1) * cfg.train_batch_size]
        batch, names = my_share(picked)
        n_terms = world.sum(float(batch.n_terms))  # over all ranks and microbatches
        guard.skipped, totals = 0, Totals()
        rates = {"policy": lr_at(cfg, cfg.learning_rate, step, total_steps)}
        norms = update(modules, optimizers, rates, batch, partial(learn, totals), cfg, world)
        guard.check(norms, step, batch, names, partial(learn, Totals()))
        metrics = totals.reduce(world, per=n_terms)
        metrics |= {
            "grad_norm": norms["policy"],
            "updates_skipped": float(guard.skipped),
            "learning_rate": rates["policy"],
            "tokens": world.sum(float(batch.n_actions)),
        }
        done = step + 1
        saving = done == total_steps or bool(cfg.save_steps and done % cfg.save_steps == 0)
        if eval_rows and (saving or (cfg.eval_steps and done % cfg.eval_steps == 0)):
            metrics |= evaluation()
        shown = ["loss", "dpo_accuracy", "eval_loss", "grad_norm"]
        log.step(step, metrics, shown, total=total_steps)
        if saving and eval_rows:
            checkpoints.rate(done, -metrics["eval_loss"])
        stopped = world.max(float(stop.is_set())) > 0
        if stopped or saving:
            checkpoints.save(done, modules, optimizers, extra)
        if stopped:
            checkpoints.close()
            raise SystemExit(STOPPED)
    checkpoints.close()
    export_hf(model, tokenizer, out / "hf", world, cfg.dtype)
    log.info(f"model in {out / 'hf'}")


if __name__ == "__main__":
    cli(main, SFTConfig)
