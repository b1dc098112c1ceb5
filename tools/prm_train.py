"""Train a process reward model on the trees of search.py, like Math-Shepherd (arXiv 2312.08935).

    python tools/prm_train.py search_dir=outputs/tiny/search \\
        model_name_or_path=outputs/tiny/base output_dir=outputs/tiny/prm

Labels need no annotator: a node's label is the share of right answers below it. Rows are the paths
of the trees, where each node counts once. The merged rows of data/sft.jsonl are added, because only
they contain checks. The model is the instruct model with a two-class head at `<extra_0>`, saved in
the layout of Qwen2.5-Math-PRM.

Two points differ from Math-Shepherd. Labels are soft, and a path's answer is repeated as an output
step, which prompted trees lack. Training is one process in float32.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from random import Random
from statistics import fmean
from typing import Annotated, Any

from pydantic import Field

sys.path.insert(0, str(Path(__file__).parents[1]))
from rftt.run.cli import cli
from rftt.run.config import Count, LocalPath, Positive, Seed, ServeConfig, config_class
from rftt.run.files import file_name, read_jsonl, write_json
from rftt.types import UserError
from tools.run_folder import read_json

Labelled = tuple[str, list[str], list[float | None]]
"""(question, steps, share of right answers below each step). None: the step counts elsewhere."""


@config_class
class PRMTrainConfig:
    """tools/prm_train.py: train a process reward model on the trees of search.py."""

    search_dir: LocalPath
    """Run directory of search.py."""
    model_name_or_path: LocalPath
    """Hugging Face folder to start from: the model that searched."""
    output_dir: LocalPath
    """Folder that receives the model."""
    seed: Seed = 0
    """Seed of the head's initial weights and of the order of the rows."""
    num_train_epochs: Count = 3
    """Passes over the rows."""
    learning_rate: Positive = 1e-3
    """Peak learning rate, which falls to 0 along a cosine."""
    train_batch_size: Count = 32
    """Paths per optimizer step."""
    eval_ratio: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Share of the problems held out for the AUC."""


def label_trees(search_dir: Path) -> list[list[Labelled]]:
    """Return the rows of each problem, in the order of the trees' names.

    Only the problems in data/raw.jsonl belong to the search. trees/ may contain other files, such
    as the trees of a search that was overwritten.
    """
    if not (search_dir / "trees").is_dir():
        raise UserError(f"search_dir {search_dir} has no trees; run search.py with a tree method.")
    finished = read_jsonl(search_dir / "data" / "raw.jsonl")
    rows: dict[str, list[Labelled]] = {}
    shares: dict[str, dict[int, float]] = {}
    for name in sorted(f"{file_name(row['id'])}.json" for _, row in finished):
        tree = read_json(search_dir / "trees" / name)
        if not tree:
            raise UserError(
                f"{search_dir / 'trees' / name} is missing, but data/raw.jsonl lists its problem; "
                "run search.py again with overwrite_output_dir: true."
            )
        shares[tree["problem"]["id"]] = {node["id"]: node["q"] for node in tree["nodes"]}
        rows[tree["problem"]["id"]] = list(_paths(tree))
    for _, row in read_jsonl(search_dir / "data" / "sft.jsonl"):
        if row.get("kind") == "merged":
            q, steps = shares[row["id"]], row["steps"]
            labels = [q[step["node"]] if "node" in step else 1.0 for step in steps]
            rows[row["id"]].append((row["question"], [step["text"] for step in steps], [*labels]))
    return list(rows.values())


def _paths(tree: dict[str, Any]) -> Iterator[Labelled]:
    nodes, seen = {node["id"]: node for node in tree["nodes"]}, set[int]()
    for leaf in tree["nodes"]:
        if not leaf["terminal"]:
            continue
        path, node = [], leaf
        while node["parent"] is not None:
            path, node = [node, *path], nodes[node["parent"]]
        labels = [None if node["id"] in seen else node["q"] for node in path]
        seen |= {node["id"] for node in path}
        texts = [node["text"] for node in path]
        if leaf["answer"] is not None:
            texts.append(f"The final answer is \\boxed{{{leaf['answer']}}}.")
            labels.append(leaf["q"])
        yield tree["problem"]["question"], texts, labels


def auc(scores: Sequence[float], right: Sequence[bool]) -> float:
    """Return the AUC: the share of (right, wrong) pairs in which the right step scores higher.

    A tie counts half. Raises UserError if the steps are all right or all wrong.
    """
    ranked = sorted(zip(scores, right, strict=True))
    place, total = 0, 0.0
    while place < len(ranked):
        stop = place
        while stop < len(ranked) and ranked[stop][0] == ranked[place][0]:
            stop += 1
        total += sum(good for _, good in ranked[place:stop]) * (place + 1 + stop) / 2
        place = stop
    n_right = sum(right)
    n_wrong = len(ranked) - n_right
    if not n_right or not n_wrong:
        raise UserError(
            f"the held-out steps must include right and wrong ones, got {n_right} right and "
            f"{n_wrong} wrong; raise eval_ratio."
        )
    return (total - n_right * (n_right + 1) / 2) / (n_right * n_wrong)


def main(cfg: PRMTrainConfig) -> None:
    """Train the model, write it to output_dir, and write its held-out AUC to heldout.json."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModel

    from rftt.engines import vocabulary_size
    from rftt.engines.chat import load_tokenizer
    from rftt.engines.opened import HEADS, open_model
    from rftt.graders.prm_local import FORMATS, Writer

    torch.manual_seed(cfg.seed)
    problems = label_trees(Path(cfg.search_dir))
    Random(cfg.seed).shuffle(problems)
    n_held = max(1, round(cfg.eval_ratio * len(problems)))
    held, rows = [row for rows in problems[:n_held] for row in rows], chain(*problems[n_held:])
    tokenizer = load_tokenizer(cfg.model_name_or_path)
    form = FORMATS["qwen"]
    tokenizer.add_tokens([form.tag], special_tokens=True)
    model = open_model(AutoModel, cfg.model_name_or_path, torch.float32, extra=HEADS)
    model.resize_token_embeddings(max(vocabulary_size(tokenizer), model.config.vocab_size))
    size = model.config.hidden_size
    head = torch.nn.Sequential(
        torch.nn.Linear(size, size), torch.nn.ReLU(), torch.nn.Linear(size, 2)
    )
    writer = Writer(tokenizer, form, form.tag)
    examples = [(*writer.encode(question, steps), labels) for question, steps, labels in rows]
    _train(cfg, model, head, examples)
    out = Path(cfg.output_dir)
    tensors = {f"{model.base_model_prefix}.{k}": v for k, v in model.state_dict().items()}
    tensors |= {f"score.{k}": v for k, v in head.state_dict().items()}
    model.config.architectures, model.config.num_labels = ["Qwen2ForProcessRewardModel"], 2
    for part in (model.config, tokenizer):
        part.save_pretrained(out)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    write_json(out / "heldout.json", _judge(out, held) | {"rows": len(examples)})


def _train(cfg: PRMTrainConfig, model: Any, head: Any, examples: list[Any]) -> None:
    """Minimise the cross-entropy against the share of right answers at labelled marks."""
    import torch
    from torch.nn.functional import binary_cross_entropy_with_logits
    from torch.nn.utils.rnn import pad_sequence
    from transformers import get_cosine_schedule_with_warmup

    parameters = [*model.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=cfg.learning_rate, weight_decay=0.0)
    examples.sort(key=lambda example: len(example[0]))  # batches of paths of similar length
    size = cfg.train_batch_size
    batches = [examples[i : i + size] for i in range(0, len(examples), size)]
    n = cfg.num_train_epochs * len(batches)
    schedule = get_cosine_schedule_with_warmup(optimizer, n // 20, n)
    for epoch in range(cfg.num_train_epochs):
        Random(f"{cfg.seed}-{epoch}").shuffle(batches)
        for step, batch in enumerate(batches, epoch * len(batches)):
            ids = pad_sequence([torch.tensor(ids) for ids, _, _ in batch], batch_first=True)
            at = [
                (row, mark, label)
                for row, (_, marks, labels) in enumerate(batch)
                for mark, label in zip(marks, labels, strict=True)
                if label is not None
            ]
            lines, marks, labels = zip(*at, strict=True)
            states = model(input_ids=ids, use_cache=False).last_hidden_state[lines, marks]
            wrong, right = head(states).unbind(-1)
            loss = binary_cross_entropy_with_logits(right - wrong, torch.tensor(labels))
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            if step % 100 == 99:
                sys.stderr.write(f"prm: step {step + 1}/{n} loss {loss:.3f}\n")


def _judge(folder: Path, rows: list[Labelled]) -> dict[str, float]:
    """Return the AUC of the steps of held-out problems, scored by LocalPRM as in a run."""
    from rftt.graders.prm import score_paths
    from rftt.graders.prm_local import LocalPRM

    cfg = ServeConfig(prm_model_name_or_path=str(folder), dtype="float32", device="cpu")
    found = asyncio.run(score_paths(LocalPRM(cfg), [(q, steps) for q, steps, _ in rows]))
    steps = [
        (score, label > 0.5)
        for scores, (_, _, labels) in zip(found, rows, strict=True)
        if isinstance(scores, list)
        for score, label in zip(scores, labels, strict=True)
        if label is not None
    ]
    scores, right = zip(*steps, strict=True)
    return {"auc": auc(scores, right), "steps": len(steps), "right_share": fmean(right)}


if __name__ == "__main__":
    cli(main, PRMTrainConfig)
