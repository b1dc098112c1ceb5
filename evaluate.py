"""How good is a model? Greedy, avg@k, pass@k, maj@k, best@k, per level, search at inference.

    python evaluate.py configs/tiny/evaluate.yaml model_name_or_path=… eval_file=… [key=value …]

Reads any of the usual benchmark files as they are. The search never sees a gold answer: its
problems carry none, and a path is worth what other paths of its tree agree on. Accuracy after k
simulations is the majority over the first k paths of one tree. Writes eval/<set>.jsonl, one line
per problem, and eval/summary.json below output_dir; started again, it does only the rest.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from rftt.cli import check_same_run, cli
from rftt.config import EvalConfig
from rftt.data import Journal, decode, load_problems, load_tokenizer, write_json
from rftt.functions import function_ids, has_function_tokens
from rftt.rewards.audit import audit
from rftt.rewards.grader import canonical, grade
from rftt.schema import Problem, Rollout
from rftt.watch.metrics import majority, mean_ci, pass_at_k


def main(cfg: EvalConfig) -> None:
    # Heavy imports wait until the config is known to be good.
    from rftt.engines import build_engine
    from rftt.search.expand import speaker
    from rftt.search.samplers import encode_question, for_each, learned_tree, sample, tree_rollouts
    from rftt.watch.log import RunLog

    out, name = Path(cfg.output_dir), Path(cfg.eval_file).stem
    if cfg.audit:
        audit_grader(cfg, out / "eval" / "audit.json")
        return
    check_same_run(out / "config.yaml", asdict(cfg))
    problems = load_problems(
        cfg.eval_file, limit=cfg.max_problems, keys=(cfg.prompt_key, cfg.answer_key)
    )
    tokenizer = load_tokenizer(cfg.model_name_or_path, trust_remote_code=cfg.trust_remote_code)
    speaks = bool(cfg.simulations) or has_function_tokens(tokenizer)
    log = RunLog(out, asdict(cfg), enabled=True)
    engine = build_engine(cfg, cfg.model_name_or_path, len(tokenizer))
    ids = function_ids(tokenizer) if speaks else None
    policy = speaker(cfg, engine, tokenizer, ids, answer_format=cfg.answer_format)
    greedy = replace(policy, temperature=0.0)

    def verdicts(problem: Problem, rollouts: Sequence[Rollout]) -> list[dict[str, Any]]:
        """The gold answer is looked at here, when every response is finished."""
        found = []
        for rollout in rollouts:
            text = decode(tokenizer, rollout.response_ids)
            gold = str(problem.answer)
            verdict = grade(text, gold, problem.question, answer_format=cfg.answer_format)
            found.append(
                {
                    "answer": rollout.answer,
                    "correct": verdict.correct,
                    "tokens": rollout.n_generated,
                    "logprob": fmean(rollout.sampling_logprobs),
                }
            )
        return found

    async def answer(problem: Problem) -> dict[str, Any]:
        hidden = replace(problem, answer=None, solution=None)
        prompt = encode_question(policy, problem, cfg.system_prompt)
        best = await sample(greedy, hidden, prompt, n=1, group=0)
        samples = await sample(policy, hidden, prompt, n=cfg.num_samples, group=0)
        row = {
            "id": problem.id,
            "level": problem.level,
            "gold": problem.answer,
            "response": decode(tokenizer, best[0].response_ids),
            "greedy": verdicts(problem, best)[0],
            "samples": verdicts(problem, samples),
        }
        if cfg.simulations:
            tree = await learned_tree(
                policy,
                hidden,
                prompt,
                simulations=max(cfg.simulations),
                exploration_weight=cfg.exploration_weight,
                in_flight=cfg.leaves_in_flight,
            )
            paths = tree_rollouts(policy, tree, hidden, prompt, group=0, mask_forced=False)
            row["search"] = verdicts(problem, paths)
        return row

    journal = Journal(out / "eval" / f"{name}.jsonl")
    done = {row["id"] for row in journal.rows}
    todo = [problem for problem in problems if problem.id not in done]

    async def run() -> None:
        with log.bar(len(todo), "problem", name) as bar:

            async def finish(problem: Problem) -> None:
                journal.append(await answer(problem))
                solved = sum(row["greedy"]["correct"] for row in journal.rows) / len(journal.rows)
                bar.advance(greedy=solved)

            await for_each(todo, finish, in_flight=cfg.problems_in_flight)

    asyncio.run(run())
    journal.close()
    engine.close()
    order = {problem.id: i for i, problem in enumerate(problems)}
    rows = sorted(journal.rows, key=lambda row: order[row["id"]])
    summary = {"set": name, **summarise(rows, cfg.num_samples, cfg.simulations, cfg.seed)}
    write_json(out / "eval" / "summary.json", summary)
    log.info(table(summary))


def audit_grader(cfg: EvalConfig, file: Path) -> None:
    """How far the rewards of a data set can be trusted, before a run is spent on it."""
    from rftt.watch.log import say

    problems = load_problems(
        cfg.eval_file, limit=cfg.max_problems, graded=False, keys=(cfg.prompt_key, cfg.answer_key)
    )
    found = audit([problem.answer or "" for problem in problems])
    write_json(file, found)
    unread, words = len(found["unusable"]), len(found["words"])
    lines = [f"{len(problems)} gold answers, {unread} unusable, {words} compared as words"]
    for kind in ("false_negatives", "false_positives"):
        lines.append(kind.replace("_", " "))
        lines += [
            f"  {change:24} {wrong:5} of {tried}" for change, (wrong, tried) in found[kind].items()
        ]
    say("\n".join(lines))


def summarise(
    rows: list[dict[str, Any]], num_samples: int, simulations: list[int], seed: int
) -> dict[str, Any]:
    """Every figure with its 95 % bootstrap interval over problems."""

    def interval(values: list[float]) -> dict[str, float]:
        return dict(zip(("mean", "low", "high"), mean_ci(values, seed=seed), strict=True))

    summary: dict[str, Any] = {
        "n": len(rows),
        "greedy": interval([float(row["greedy"]["correct"]) for row in rows]),
    }
    powers = [k for k in (1, 2, 4, 8, 16, 32, 64) if k <= num_samples]
    right = [sum(s["correct"] for s in row["samples"]) for row in rows]
    if num_samples:
        summary["sampled"] = interval([c / num_samples for c in right])
        summary["pass@k"] = {
            k: interval([pass_at_k(num_samples, c, k) for c in right]) for k in powers
        }
        summary["maj@k"] = {k: accuracy_at(rows, "samples", k, seed) for k in powers}
        summary["best@k"] = {k: accuracy_at(rows, "samples", k, seed, likeliest) for k in powers}
    levels = sorted({str(row["level"]) for row in rows})
    summary["levels"] = {
        level: {"n": len(group), "greedy": sum(r["greedy"]["correct"] for r in group) / len(group)}
        for level in levels
        if (group := [row for row in rows if str(row["level"]) == level])
    }
    summary["search"] = {k: accuracy_at(rows, "search", k, seed) for k in simulations}
    return summary


def vote(responses: list[dict[str, Any]]) -> bool:
    """Whether the most frequent answer is right."""
    winner = majority([response["answer"] for response in responses], canonical)
    return any(r["correct"] for r in responses if r["answer"] == winner and winner is not None)


def likeliest(responses: list[dict[str, Any]]) -> bool:
    """Whether best-of-n is right: without a PRM, the response of highest mean log-prob."""
    return max(responses, key=lambda response: response["logprob"])["correct"]


def accuracy_at(
    rows: list[dict[str, Any]],
    kind: str,
    k: int,
    seed: int,
    choose: Callable[[list[dict[str, Any]]], bool] = vote,
) -> dict[str, float]:
    """Accuracy of the choice among each problem's first k responses, and what they cost."""
    right = [float(choose(row[kind][:k])) for row in rows]
    accuracy, low, high = mean_ci(right, seed=seed)
    tokens = sum(r["tokens"] for row in rows for r in row[kind][:k]) / len(rows)
    return {"accuracy": accuracy, "low": low, "high": high, "tokens": tokens}


def table(summary: dict[str, Any]) -> str:
    """The summary as lines for a terminal."""

    def percent(figure: dict[str, float]) -> str:
        mean = figure.get("mean", figure.get("accuracy", 0.0))
        return f"{100 * mean:5.1f} %  [{100 * figure['low']:.1f}, {100 * figure['high']:.1f}]"

    lines = [
        f"{summary['set']}: {summary['n']} problems",
        f"greedy      {percent(summary['greedy'])}",
    ]
    if "sampled" in summary:
        lines.append(f"avg@k       {percent(summary['sampled'])}")
        lines += [f"pass@{k:<6} {percent(figure)}" for k, figure in summary["pass@k"].items()]
    for label, key in (("maj@", "maj@k"), ("best@", "best@k"), ("search ", "search")):
        lines += [
            f"{label + str(k):11} {percent(figure)}  {figure['tokens']:.0f} tokens"
            for k, figure in summary.get(key, {}).items()
        ]
    lines += [
        f"level {level:5} {100 * figure['greedy']:5.1f} %  of {figure['n']}"
        for level, figure in summary["levels"].items()
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    cli(main, EvalConfig)
