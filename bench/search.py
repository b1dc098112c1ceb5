"""Compare tree search with flat sampling on the same engine and model, in turns.

    python bench/search.py --engine vllm --problems 16 --simulations 8 [--in-flight 4] [--rounds 3]
    python bench/search.py --engine vllm --model PATH --dtype bfloat16        (on a GPU)

flat           independent responses, all at once: the engine's upper limit
serial         textbook MCTS: one problem, one node, one call at a time (on few problems)
mcts           functional tree search, one request per rollout
mcts_stepwise  the same with one request per act, as in the paper
mcts_prompted  phase 1: one prompt per act
beam, dvts     functional beam search and its diverse form: width and subtrees 2, branching 2

Rates are per CPU second on a CPU, and per second of wall time on a GPU (`clock` in the last line).
Every measurement starts with an empty prefix cache. Without --model the script makes a Qwen2 with
2.4M parameters, whose layers compute but do not change the output. Its tokens follow a Markov chain
with the allowed transitions of functional tokens, in segments of about ten tokens. Every
measurement is printed on stderr at once. The last line is one JSON object. `--dtype bfloat16` is
skipped if the CPU emulates bfloat16.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from rftt.types import Problem

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase, Qwen2ForCausalLM

    from rftt.engines.base import Engine

SEGMENT = 10
"""Mean tokens of a segment of the Markov model."""
DEPTH, MAX_TOKENS, MAX_MODEL_LEN, MAX_NUM_SEQS = 8, 256, 1024, 256
Weights = Callable[[str], Iterator[tuple[str, "Tensor"]]]
"""Phase -> argument of `load_weights`."""
Work = Callable[[list[Problem], int], Awaitable[int]]
"""(problems, seed) -> rollouts finished."""


# ---- A model whose responses have the right shape ----


def make_model(folder: Path) -> Weights:
    """Write the Markov model and its tokenizer. Return its weights, whose head depends on phase."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from rftt.tokens import add_function_tokens
    from tools.tiny_world import build_tokenizer

    tokenizer = build_tokenizer()
    add_function_tokens(tokenizer)
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=len(tokenizer),
            hidden_size=256,
            intermediate_size=512,
            num_hidden_layers=4,
            num_attention_heads=8,
            num_key_value_heads=2,
            max_position_embeddings=MAX_MODEL_LEN,
            tie_word_embeddings=False,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    states, heads = markov_chain(tokenizer)
    width = model.config.hidden_size
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight.zero_()[range(len(states)), states] = 1.0
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)

    def weights(phase: str) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in model.named_parameters():
            if name == "lm_head.weight":  # the final norm makes a one-hot √width high
                chain = heads[phase] / width**0.5
                yield name, torch.nn.functional.pad(chain, (0, width - chain.shape[1]))
            else:
                yield name, parameter.detach()

    return weights


def markov_chain(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], dict[str, Tensor]]:
    """Return the state of every token and, per phase, the (V, states) log-probs of the next one.

    States are 0-7 inside an act, 8-15 after it, and 16 otherwise. Each act has its own words, so
    the last token determines the open segment.
    """
    import torch

    from rftt.tokens import ACTS, function_ids, successors

    ids, n_acts = function_ids(tokenizer), len(ACTS)
    special = {*ids.openers, *ids.closers, *tokenizer.all_special_ids}
    words = [i for i in range(len(tokenizer)) if i not in special and _plain(tokenizer.decode([i]))]
    text = [words[a::n_acts] for a in range(n_acts)]
    states = [2 * n_acts] * len(tokenizer)
    for a in range(n_acts):
        states[ids.openers[a]], states[ids.closers[a]] = a, n_acts + a
        for token in text[a]:
            states[token] = a

    def head(rows: dict[int, dict[int, float]]) -> Tensor:
        table = torch.full((len(tokenizer), 2 * n_acts + 1), -40.0)
        for state, row in rows.items():
            table[list(row), state] = torch.tensor(list(row.values())).log()
        return table

    def uniform(tokens: list[int], mass: float = 1.0) -> dict[int, float]:
        return dict.fromkeys(tokens, mass / len(tokens))

    stay, eos = 1 - 1 / SEGMENT, int(tokenizer.eos_token_id)
    learned = {2 * n_acts: uniform([ids.open[act] for act in successors(None, "learned")])}
    prompted = {2 * n_acts: uniform(words)}
    for a, act in enumerate(ACTS):
        learned[a] = uniform(text[a], stay) | {ids.closers[a]: 1 - stay}
        after = [ids.open[act] for act in successors(act, "learned")]
        learned[n_acts + a] = uniform(after or [eos])
        prompted[a] = uniform(text[a], stay) | {eos: 1 - stay}
    return states, {"learned": head(learned), "prompted": head(prompted)}


def _plain(text: str) -> bool:
    """Return whether a token survives decoding and encoding, and ends no sentence or line."""
    return len(text) == 1 and text.isascii() and text.isalpha()


# ---- What is compared ----


def samplers(
    engine: Engine, tokenizer: PreTrainedTokenizerBase, simulations: int, in_flight: int
) -> dict[str, tuple[str, Work]]:
    """Return name -> (phase, work)."""
    from rftt.beam import beam_search
    from rftt.engines.base import for_each
    from rftt.engines.chat import engine_chat
    from rftt.engines.sampler import Sampler, pose
    from rftt.engines.templates import holds_control_text
    from rftt.mcts import Explore, grow
    from rftt.prompted import Prompted, prompted_tree
    from rftt.rollout import learned_tree, sample
    from rftt.tokens import function_ids
    from tools.tiny_world import PROMPTS

    ids = function_ids(tokenizer)
    policy = Sampler(engine, tokenizer, ids, 1.0, MAX_TOKENS, DEPTH, 0)
    chat = partial(engine_chat, engine, tokenizer)
    control = partial(holds_control_text, tokenizer, functional=True)
    instruct = Prompted(chat, 1.0, MAX_TOKENS, DEPTH, 4, 0, PROMPTS, 1, control)
    beam = partial(beam_search, branching=2)
    how: dict[str, Any] = {"simulations": simulations, "exploration_weight": 2.0}

    async def flat(problems: list[Problem], seed: int) -> int:
        ctx = replace(policy, seed=seed)

        async def one(problem: Problem) -> int:
            return len(await sample(pose(ctx, problem), n=simulations))

        return sum(await for_each(problems, one, in_flight=len(problems)))

    def functional(stepwise: bool, trees: int | None, leaves: int, explore: Explore = grow) -> Work:
        async def work(problems: list[Problem], seed: int) -> int:
            ctx = replace(policy, seed=seed, stepwise=stepwise)

            async def one(problem: Problem) -> int:
                task = pose(ctx, problem)
                tree = await learned_tree(task, **how, in_flight=leaves, explore=explore)
                return len(tree.leaves())

            return sum(await for_each(problems, one, in_flight=trees or len(problems)))

        return work

    async def prompted(problems: list[Problem], seed: int) -> int:
        ctx = replace(instruct, seed=seed)

        async def one(problem: Problem) -> int:
            return len((await prompted_tree(ctx, problem, **how, in_flight=in_flight)).leaves())

        return sum(await for_each(problems, one, in_flight=len(problems)))

    return {
        "flat": ("learned", flat),
        "serial": ("learned", functional(True, 1, 1)),
        "mcts": ("learned", functional(False, None, in_flight)),
        "mcts_stepwise": ("learned", functional(True, None, in_flight)),
        "mcts_prompted": ("prompted", prompted),
        "beam": ("learned", functional(False, None, in_flight, partial(beam, width=2))),
        "dvts": ("learned", functional(False, None, in_flight, partial(beam, width=1, subtrees=2))),
    }


def measure(engine: Engine, work: Work, problems: list[Problem], seed: int) -> dict[str, float]:
    """Return the totals of one run."""
    before, cpu, wall = vars(engine.counters).copy(), time.process_time(), time.perf_counter()
    rollouts = asyncio.run(work(problems, seed))
    spent = {name: value - before[name] for name, value in vars(engine.counters).items()}
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    return {**spent, "rollouts": rollouts, "cpu_s": cpu, "wall_s": wall}


def summarise(totals: dict[str, dict[str, float]], clock: str) -> dict[str, dict[str, float]]:
    """Return rates by the seconds of a clock, and each rate relative to flat and to serial."""
    summary = {}
    for name, t in totals.items():
        fresh = t["prompt_tokens"] - t["cached_tokens"]
        summary[name] = {
            "tokens_per_s": t["generated_tokens"] / t[f"{clock}_s"],
            "rollouts_per_s": t["rollouts"] / t[f"{clock}_s"],
            "mean_batch": t["generated_tokens"] / t["steps"],
            "prefix_hit_rate": t["cached_tokens"] / t["prompt_tokens"],
            "prefilled_per_generated": fresh / t["generated_tokens"],
            "tokens_per_rollout": t["generated_tokens"] / t["rollouts"],
            "cpu_s": t["cpu_s"],
            "wall_s": t["wall_s"],
        }
    for row in summary.values():
        flat, serial = summary["flat"], summary["serial"]
        row["fraction_of_flat"] = row["tokens_per_s"] / flat["tokens_per_s"]
        row["rollouts_vs_serial"] = row["rollouts_per_s"] / serial["rollouts_per_s"]
    return {name: {k: round(v, 4) for k, v in row.items()} for name, row in summary.items()}


def main() -> None:
    """Measure all methods in turns and print their rates."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--engine", choices=["hf", "vllm"], default="hf")
    parser.add_argument("--model", help="Hugging Face folder with functional tokens")
    parser.add_argument("--problems", type=int, default=16)
    parser.add_argument("--simulations", type=int, default=8)
    parser.add_argument("--in-flight", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    args = parser.parse_args()

    import torch

    from rftt.engines import build_engine
    from rftt.engines.chat import load_tokenizer
    from rftt.run.config import SearchConfig
    from rftt.run.precision import computes_in_bfloat16
    from tools.tiny_world import make_tale

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.dtype == "bfloat16" and not computes_in_bfloat16(device):
        print(json.dumps({"skipped": {"bfloat16": f"emulated on this {device}; use float32"}}))
        return
    with tempfile.TemporaryDirectory() as made:
        folder = args.model or made
        weights = make_model(Path(made)) if args.model is None else stored_weights(folder)
        tokenizer = load_tokenizer(folder)
        cfg = SearchConfig(
            output_dir=made,
            model_name_or_path=folder,
            train_file="",
            engine=args.engine,
            dtype=args.dtype,
            max_model_len=MAX_MODEL_LEN,
            max_num_seqs=MAX_NUM_SEQS,
        )
        engine = build_engine(cfg, folder, len(tokenizer))
    random, seen = Random(0), set[str]()
    problems = [
        Problem(str(i), make_tale(random, seen).question, answer="7") for i in range(args.problems)
    ]
    works = samplers(engine, tokenizer, args.simulations, args.in_flight)
    few = problems[: max(1, args.problems // 8)]  # serial search is slow
    totals: dict[str, dict[str, float]] = {}
    for round_ in range(args.rounds + 1):  # the first round warms up
        for name, (phase, work) in works.items():
            engine.load_weights(weights(phase))
            got = measure(engine, work, few if name == "serial" else problems, round_)
            shown = "  ".join(f"{key} {value:.4g}" for key, value in got.items())
            print(f"round {round_}  {name:14} {shown}", file=sys.stderr)
            if round_:
                known = totals.setdefault(name, dict.fromkeys(got, 0.0))
                totals[name] = {key: known[key] + value for key, value in got.items()}
    engine.close()
    clock = "wall" if device == "cuda" else "cpu"
    summary = summarise(totals, clock)
    for name, row in summary.items():
        print(f"{name:14}", *(f"{key}={value:<9g}" for key, value in row.items()))
    print(json.dumps(summary | {"clock": clock}))


def stored_weights(folder: str) -> Weights:
    """Return the weights of a given model, which are the same for both phases."""
    import torch
    from transformers import AutoModelForCausalLM

    model: Qwen2ForCausalLM = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return lambda _: ((name, p.detach()) for name, p in model.named_parameters())


if __name__ == "__main__":
    main()
