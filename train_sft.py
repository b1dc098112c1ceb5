"""Warm-up: offline training on curated rows until the policy speaks functional tokens (PAPER §1).

    python train_sft.py configs/tiny/sft.yaml [key=value …]
    torchrun --nproc_per_node 8 train_sft.py configs/qwen2.5-7b/sft.yaml

Only the response counts in the loss. Rows are packed without padding; one optimizer step is
`train_batch_size` rows over all ranks, whatever the microbatches. The model goes to output_dir/hf.
"""

from __future__ import annotations

import math
from dataclasses import asdict
from itertools import islice
from pathlib import Path

from rftt.cli import STOPPED, cli, stop_on_sigterm
from rftt.config import SFTConfig
from rftt.data import SFTExample, load_rows, load_tokenizer, shuffled_epochs
from rftt.functions import add_function_tokens


def main(cfg: SFTConfig) -> None:
    # Heavy imports wait until the config is known to be good.
    from rftt.learn.distributed import close_world, open_world

    world = open_world(cfg.device)
    train(cfg, world)
    close_world(world)


def train(cfg: SFTConfig, world) -> None:
    import torch

    from rftt.learn.batch import Batch, collate_rows
    from rftt.learn.checkpoint import export_hf, restore, save
    from rftt.learn.distributed import shard
    from rftt.learn.model import add_function_rows, load_policy, token_logprobs
    from rftt.learn.rl import sft_loss
    from rftt.learn.setup import checkpoint_to_resume, optimizer_for, rate_at
    from rftt.learn.step import Totals, count_skipped, per_token, update
    from rftt.watch.log import RunLog

    out = Path(cfg.output_dir)
    checkpoint = checkpoint_to_resume(cfg, world)
    tokenizer = load_tokenizer(cfg.model_name_or_path, trust_remote_code=cfg.trust_remote_code)
    new_tokens = add_function_tokens(tokenizer) if cfg.functional_tokens else []
    train_rows, eval_rows, too_long = read_rows(cfg, tokenizer)
    log = RunLog(out, asdict(cfg), enabled=world.is_main, report_to=cfg.report_to)

    model = load_policy(
        cfg.model_name_or_path,
        torch.float32,
        gradient_checkpointing=cfg.gradient_checkpointing,
        trust_remote_code=cfg.trust_remote_code,
    )
    add_function_rows(model, tokenizer, new_tokens)
    shard(model, world, param_dtype=getattr(torch, cfg.dtype), cpu_offload=cfg.fsdp_cpu_offload)
    optimizer = optimizer_for(cfg, model, cfg.learning_rate)
    first_step = 0
    if checkpoint:
        first_step = restore(checkpoint, {"policy": model}, {"policy": optimizer}, world)["step"]
    log.rewind(first_step)

    n_rows = round(len(train_rows) * cfg.num_train_epochs)
    total_steps = math.ceil(n_rows / cfg.train_batch_size)
    order = list(islice(shuffled_epochs(len(train_rows), cfg.seed), n_rows))
    log.info(
        f"{len(train_rows)} rows ({too_long} too long), {len(eval_rows)} held out, "
        f"{total_steps} steps from {first_step}"
    )

    def logprobs(batch: Batch):
        return token_logprobs(model, batch, 1.0, len(tokenizer))[0]

    def my_share(rows: list[SFTExample]) -> Batch:
        by_length = sorted(rows, key=lambda row: -len(row[0]) - len(row[1]))
        return collate_rows(by_length[world.rank :: world.size]).to(world.device)

    def evaluation_loss() -> float:
        batch = my_share(eval_rows)
        token_losses = per_token(logprobs, batch, cfg.max_tokens_per_microbatch, world)
        loss = world.sum(float(sft_loss(token_losses, batch.action_mask)))
        return loss / world.sum(float(batch.n_actions))

    skipped, stop = 0, stop_on_sigterm()
    for step in range(first_step, total_steps):
        picked = order[step * cfg.train_batch_size : (step + 1) * cfg.train_batch_size]
        batch = my_share([train_rows[i] for i in picked])
        n_tokens = world.sum(float(batch.n_actions))  # over all ranks and microbatches
        totals = Totals()

        def loss_of(micro: Batch, totals: Totals = totals):
            loss = sft_loss(logprobs(micro), micro.action_mask)
            totals.add({"loss": loss})
            return loss

        rates = {"policy": rate_at(cfg, cfg.learning_rate, step, total_steps)}
        norms = update({"policy": model}, {"policy": optimizer}, rates, batch, loss_of, cfg, world)
        skipped = count_skipped(norms, skipped, step)
        metrics = totals.reduce(world, per=n_tokens)
        metrics |= {
            "grad_norm": norms["policy"],
            "learning_rate": rates["policy"],
            "tokens": n_tokens,
        }
        done = step + 1
        if eval_rows and (done == total_steps or (cfg.eval_steps and done % cfg.eval_steps == 0)):
            metrics["eval_loss"] = evaluation_loss()
        log.step(step, metrics, ["loss", "eval_loss", "grad_norm"], total=total_steps)
        stopped = world.max(float(stop.is_set())) > 0
        if stopped or done == total_steps or (cfg.save_steps and done % cfg.save_steps == 0):
            modules, optimizers = {"policy": model}, {"policy": optimizer}
            save(
                out,
                done,
                modules=modules,
                optimizers=optimizers,
                extra={},
                world=world,
                tokenizer=tokenizer,
                keep=cfg.save_total_limit,
                dtype=cfg.dtype,
            )
        if stopped:
            raise SystemExit(STOPPED)
    export_hf(model, tokenizer, out / "hf", world, cfg.dtype)
    log.info(f"model in {out / 'hf'}")


def read_rows(cfg: SFTConfig, tokenizer) -> tuple[list[SFTExample], list[SFTExample], int]:
    """Training rows, rows for the evaluation loss, and how many were too long."""

    def read(path: str) -> tuple[list[SFTExample], int]:
        return load_rows(
            path,
            tokenizer,
            system_prompt=cfg.system_prompt,
            mask_wrong=cfg.mask_wrong,
            functional=cfg.functional_tokens,
            max_length=cfg.max_length,
            prompt_key=cfg.prompt_key,
        )

    rows, too_long = read(cfg.train_file)
    if cfg.eval_file:
        return rows, read(cfg.eval_file)[0], too_long
    held_out = set(
        islice(shuffled_epochs(len(rows), cfg.seed + 1), int(len(rows) * cfg.eval_ratio))
    )
    kept = [row for i, row in enumerate(rows) if i not in held_out]
    return kept, [rows[i] for i in sorted(held_out)], too_long


if __name__ == "__main__":
    cli(main, SFTConfig)
