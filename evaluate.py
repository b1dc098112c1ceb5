"""Evaluate a model: greedy, avg@k, pass@k, maj@k, best@k, per level, search at inference.

    python evaluate.py configs/tiny/evaluate.yaml model_name_or_path=… eval_file=… [key=value …]
    python evaluate.py … audit=true    (count the gold answers that can be graded; opens no model)
    torchrun --nproc_per_node N evaluate.py …        (each rank takes its share of the problems)

Common benchmark files are read in their own format. The search never sees a gold answer, because
its problems do not contain one. The value of a path is its agreement with other paths of the tree,
or the score of a process reward model (use_prm). Accuracy after k simulations is that of the
majority answer over the first k paths of one tree.

Output is eval/<set>.jsonl, with one line per problem, and eval/summary.json in output_dir. With
lm_eval_samples it is also eval/samples_<set>.jsonl. If the script is started again, it evaluates
only the remaining problems.
"""

from __future__ import annotations

from rftt.run.config import EvalConfig
from rftt.run.front import front

if __name__ == "__main__":  # answers --help and config errors before torch is imported
    front("evaluate", EvalConfig)  # runs main() and exits

import asyncio
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

from rftt.beam import explorer
from rftt.engines import build_engine, vocabulary_size
from rftt.engines.base import for_each
from rftt.engines.chat import decode, open_tokenizer
from rftt.engines.sampler import Sampler, functional_ids, pose, sampler_of
from rftt.graders import open_prm
from rftt.graders.math import canonical
from rftt.graders.prm import ProcessModel, Unscored, reduce, segment_text
from rftt.learner.fsdp import World, process_group
from rftt.mcts import Value
from rftt.rewards import solves
from rftt.rollout import learned_tree, sample, tree_rollouts
from rftt.run.audit import audit_gold
from rftt.run.checks import check_prompts
from rftt.run.cli import check_same_run
from rftt.run.data import load_problems
from rftt.run.files import Row, gather_parts, open_part, write_json, write_jsonl
from rftt.run.harness import Judge, agreement, lm_eval_rows, open_judge
from rftt.run.log import RunLog
from rftt.run.provenance import made_from
from rftt.run.stats import majority, mean_ci, paired_bootstrap, pass_at_k
from rftt.run.tables import name_of
from rftt.tokens import ACTS
from rftt.types import Problem, Rollout, Step


def main(cfg: EvalConfig) -> None:
    """Evaluate a model or, with `audit`, only the gold answers."""
    if cfg.audit:
        audit_gold(cfg)
        return
    with process_group(cfg.device) as world:
        evaluate(cfg, world)


def evaluate(cfg: EvalConfig, world: World) -> None:
    """Evaluate this rank's share of the problems. Rank 0 writes the summary. Collective."""
    out, name = Path(cfg.output_dir), name_of(cfg.eval_file)
    if not cfg.overwrite_output_dir:
        check_same_run(out / "config.yaml", asdict(cfg))
    problems = load_problems(
        cfg.eval_file,
        limit=cfg.max_problems,
        keys=(cfg.prompt_key, cfg.answer_key),
        system_prompt=cfg.system_prompt,
    )
    tokenizer = open_tokenizer(cfg)
    check_prompts(tokenizer, problems, cfg.system_prompt, cfg.max_model_len)
    ids = functional_ids(tokenizer, required=bool(cfg.simulations or cfg.forbidden_acts))
    log = RunLog(out, asdict(cfg), enabled=world.is_main)
    file = out / "eval" / f"{name}.jsonl"
    source = made_from(cfg, tokenizer, problems)
    journal, done = open_part(file, world, source, anew=cfg.overwrite_output_dir)
    todo = [problem for problem in problems if problem.id not in done][world.rank :: world.size]
    engine = build_engine(cfg, cfg.model_name_or_path, vocabulary_size(tokenizer))
    prm = asyncio.run(open_prm(cfg, log.info))
    policy = sampler_of(cfg, engine, tokenizer, ids, answer_format=cfg.answer_format)
    mark = partial(verdict, cfg, policy, open_judge(cfg))

    async def run() -> None:
        with log.bar(len(todo), "problem", name) as bar:

            async def finish(problem: Problem) -> None:
                row = await answer(cfg, policy, prm, problem, mark)
                journal.append(row)
                bar.advance(greedy=row["greedy"]["correct"])

            await for_each(todo, finish, in_flight=cfg.problems_in_flight)

    asyncio.run(run())
    journal.close()
    world.barrier()  # before an in-process vLLM closes, which ends the process group
    engine.close()
    if prm:
        prm.close()
    if world.is_main:
        by_id = {row["id"]: row for row in gather_parts(file).rows}
        rows = [by_id[problem.id] for problem in problems]
        summary = {"set": name, **summarise(rows, cfg.num_samples, cfg.simulations, cfg.seed)}
        write_json(out / "eval" / "summary.json", summary)
        if cfg.lm_eval_samples:
            samples = lm_eval_rows(cfg, tokenizer, problems, rows)
            write_jsonl(out / "eval" / f"samples_{name}.jsonl", samples)
        log.info(summary_table(summary))


async def answer(
    cfg: EvalConfig,
    policy: Sampler,
    prm: ProcessModel | None,
    problem: Problem,
    mark: Callable[..., Row],
) -> Row:
    """Return a line of eval/<set>.jsonl: greedy, samples and search, without the gold answer.

    `mark` is `verdict` with its first arguments.
    """
    hidden = replace(problem, answer=None, solution=None)
    task = pose(policy, hidden, cfg.system_prompt)
    greedy = replace(task, sampler=replace(policy, temperature=0.0))
    value = processed(policy, prm, hidden, cfg.prm_reduce) if prm else None
    best = await sample(greedy, n=1)
    samples = await sample(task, n=cfg.num_samples)
    scores = [None] * len(samples)
    if value:
        scores = await asyncio.gather(*(value(steps_of(rollout)) for rollout in samples))
    row = {
        "id": problem.id,
        "level": problem.level,
        "gold": problem.answer,
        "response": decode(policy.tokenizer, best[0].response_ids),
        "greedy": mark(problem, best[0]),
        "acts": list(best[0].acts),  # of the greedy response; "" is text outside any segment
        "samples": [mark(problem, *one) for one in zip(samples, scores, strict=True)],
    }
    if cfg.simulations:
        tree = await learned_tree(
            task,
            simulations=max(cfg.simulations),
            exploration_weight=cfg.exploration_weight,
            in_flight=cfg.leaves_in_flight,
            explore=explorer(cfg.search_method, cfg),
            value=value,
            in_order=True,
        )
        paths = tree_rollouts(task, tree, mask_forced=False)
        row["search"] = [
            mark(problem, rollout, leaf.q if prm else None)
            for rollout, leaf in zip(paths, tree.leaves(), strict=True)
        ]
    return row


def processed(
    ctx: Sampler, prm: ProcessModel, problem: Problem, how: Literal["min", "mean", "last", "prod"]
) -> Value:
    """Return the value of a path: its process score, or 0 without an answer or a score."""

    async def value(steps: Sequence[Step]) -> float:
        if steps[-1].answer is None:
            return 0.0
        texts = [segment_text(ctx.tokenizer, step.token_ids, ctx.ids) for step in steps]
        try:
            return reduce(await prm.score(problem.question, texts), how)
        except Unscored:
            return 0.0

    return value


def steps_of(rollout: Rollout) -> list[Step]:
    """Return the steps of a response. The last one contains the answer."""
    steps = [Step("", "", token_ids) for token_ids in rollout.step_ids()]
    return [*steps[:-1], replace(steps[-1], answer=rollout.answer)]


def verdict(
    cfg: EvalConfig,
    policy: Sampler,
    judge: Judge | None,
    problem: Problem,
    rollout: Rollout,
    score: float | None = None,
) -> Row:
    """Grade a finished response. Only this function uses the gold answer."""
    text = decode(policy.tokenizer, rollout.response_ids)
    row = {
        "answer": rollout.answer,
        "correct": solves(problem, text, rollout.finish, cfg.answer_format),
        "tokens": rollout.n_generated,
        "logprob": fmean(rollout.sampling_logprobs),
        "score": score,
    }
    if judge:
        row["math_verify"] = rollout.finish != "length" and judge(text, str(problem.answer))
    if cfg.lm_eval_samples:
        row["text"] = text
    return row


def summarise(
    rows: list[Row], num_samples: int, simulations: list[int], seed: int
) -> dict[str, Any]:
    """Return every figure with its 95 % interval over problems."""

    def interval(values: list[float]) -> dict[str, float]:
        return dict(zip(("mean", "low", "high"), mean_ci(values, seed=seed), strict=True))

    summary: dict[str, Any] = {
        "n": len(rows),
        "greedy": interval([float(row["greedy"]["correct"]) for row in rows]),
    }
    if compared := agreement(rows):
        summary["math_verify"] = compared
    acts = [row["acts"] for row in rows]
    if any(any(written) for written in acts):  # the model writes functional segments
        whole = [float("" not in written and written[-1] == "output") for written in acts]
        summary["whole_segments"] = interval(whole)
        counts = Counter(act for written in acts for act in written)
        summary["acts"] = {act: counts[act] / len(rows) for act in ACTS}
    powers = [k for k in (1, 2, 4, 8, 16, 32, 64) if k <= num_samples]
    right = [sum(s["correct"] for s in row["samples"]) for row in rows]
    if num_samples:
        summary["sampled"] = interval([c / num_samples for c in right])
        summary["pass@k"] = {
            k: interval([pass_at_k(num_samples, c, k) for c in right]) for k in powers
        }
        summary["maj@k"] = {k: accuracy_at(rows, "samples", k, seed) for k in powers}
        summary["best@k"] = {k: accuracy_at(rows, "samples", k, seed, best_of_n) for k in powers}
    levels = sorted({str(row["level"]) for row in rows})
    summary["levels"] = {
        level: {"n": len(group), "greedy": sum(r["greedy"]["correct"] for r in group) / len(group)}
        for level in levels
        if (group := [row for row in rows if str(row["level"]) == level])
    }
    summary["search"] = {k: accuracy_at(rows, "search", k, seed) for k in simulations}
    if num_samples:
        summary["equal_tokens"] = {
            k: at_equal_tokens(rows, k, num_samples, found["tokens"], seed)
            for k, found in summary["search"].items()
        }
    return summary


def at_equal_tokens(rows: list[Row], k: int, n_max: int, tokens: float, seed: int) -> Row:
    """Return maj@n and best@n at the cost of k simulations, and the gain of search over them.

    n is the largest number of samples that costs no more. The gain is paired by problem.
    """
    cost = [accuracy_at(rows, "samples", n, seed)["tokens"] for n in range(1, n_max + 1)]
    n = max(1, sum(spent <= tokens for spent in cost))
    searched = [float(vote(row["search"][:k])) for row in rows]
    found: Row = {"n": n, "tokens": cost[n - 1]}
    for name, choose in (("maj", vote), ("best", best_of_n)):
        plain = [float(choose(row["samples"][:n])) for row in rows]
        gain = paired_bootstrap(searched, plain, seed=seed)
        found[name] = fmean(plain)
        found[f"search - {name}"] = dict(zip(("mean", "low", "high"), gain, strict=True))
    return found


def vote(responses: list[Row]) -> bool:
    """Return whether the most frequent answer is right."""
    winner = majority([response["answer"] for response in responses], canonical)
    return any(r["correct"] for r in responses if r["answer"] == winner and winner is not None)


def best_of_n(responses: list[Row]) -> bool:
    """Return whether best-of-n is right, by the PRM's score or, without one, the mean log-prob."""
    by = "logprob" if responses[0].get("score") is None else "score"
    return max(responses, key=lambda response: response[by])["correct"]


def accuracy_at(
    rows: list[Row], kind: str, k: int, seed: int, choose: Callable[[list[Row]], bool] = vote
) -> dict[str, float]:
    """Return the accuracy of `choose` on each problem's first k responses, and their tokens."""
    right = [float(choose(row[kind][:k])) for row in rows]
    accuracy, low, high = mean_ci(right, seed=seed)
    tokens = sum(r["tokens"] for row in rows for r in row[kind][:k]) / len(rows)
    return {"accuracy": accuracy, "low": low, "high": high, "tokens": tokens}


def summary_table(summary: dict[str, Any]) -> str:
    """Format the summary as lines for a terminal."""

    def percent(figure: dict[str, float]) -> str:
        mean = figure.get("mean", figure.get("accuracy", 0.0))
        return f"{100 * mean:5.1f} %  [{100 * figure['low']:.1f}, {100 * figure['high']:.1f}]"

    lines = [
        f"{summary['set']}: {summary['n']} problems",
        f"greedy      {percent(summary['greedy'])}",
    ]
    if "math_verify" in summary:
        found = summary["math_verify"]
        lines.append(
            f"Math-Verify {100 * found['greedy']:5.1f} %  greedy; the same verdict on "
            f"{100 * found['agreement']:.1f} % of {found['responses']} responses"
        )
    if "whole_segments" in summary:
        lines.append(f"segments    {percent(summary['whole_segments'])}  responses of whole ones")
        written = ", ".join(f"{act} {n:.2f}" for act, n in summary["acts"].items())
        lines.append(f"acts        {written}  per response")
    if "sampled" in summary:
        lines.append(f"avg@k       {percent(summary['sampled'])}")
        lines += [f"pass@{k:<6} {percent(figure)}" for k, figure in summary["pass@k"].items()]
    for label, key in (("maj@", "maj@k"), ("best@", "best@k"), ("search ", "search")):
        lines += [
            f"{label + str(k):11} {percent(figure)}  {figure['tokens']:.0f} tokens"
            for k, figure in summary.get(key, {}).items()
        ]
    for k, found in summary.get("equal_tokens", {}).items():
        n, cost = found["n"], f"{found['tokens']:.0f} tokens"
        lines += [
            f"search {k} - {name}@{n}: {percent(found[f'search - {name}'])}  over "
            f"{100 * found[name]:.1f} % for {cost}"
            for name in ("maj", "best")
        ]
    lines += [
        f"level {level:5} {100 * figure['greedy']:5.1f} %  of {figure['n']}"
        for level, figure in summary["levels"].items()
    ]
    return "\n".join(lines)
