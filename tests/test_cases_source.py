"""Results belong to what made them: other problems, prompts or weights are refused, not reused."""

from __future__ import annotations

import json
import shutil
import zlib
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

import evaluate
import search
import train_rl
import train_sft
from rftt.graders import prm_local
from rftt.run import provenance
from rftt.run.config import EvalConfig, RLConfig, SearchConfig, SFTConfig, load_config
from rftt.run.files import read_jsonl, write_jsonl
from rftt.run.provenance import digest, weights_digest
from rftt.types import UserError
from tests.small_world import make_world, settings

pytestmark = pytest.mark.cases
SCRIPTS = {
    "search": (search.main, SearchConfig),
    "evaluate": (evaluate.main, EvalConfig),
    "train_rl": (train_rl.main, RLConfig),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture
def world(made: Path, tmp_path: Path) -> Path:
    """A copy of the random world that a test may change."""
    return shutil.copytree(made, tmp_path / "world")


def start(script: str, world: Path, *more: str) -> None:
    main, schema = SCRIPTS[script]
    small = ["dtype=float32", "max_problems=2"] if script != "train_rl" else ["dtype=float32"]
    small += ["max_steps=1", "save_steps=1"] if script == "train_rl" else []
    main(load_config(schema, settings(script, world, world / "out", *small, *more)))


def nudge_weights(world: Path) -> None:
    """Change one weight of each model, as a training into the same folder does."""
    for path in world.glob("*/model.safetensors"):
        tensors = load_file(path)
        next(iter(tensors.values())).view(-1)[7] += 1
        save_file(tensors, path, metadata={"format": "pt"})


def change_gold(world: Path) -> None:
    rows = [row for _, row in read_jsonl(world / "train.jsonl")]
    write_jsonl(world / "train.jsonl", [rows[0] | {"answer": "77"}, *rows[1:]])


def change_template(world: Path) -> None:
    for path in world.glob("*/chat_template.jinja"):
        path.write_text(path.read_text() + "{# other #}Well,", encoding="utf-8")


CHANGES = {
    "weights": nudge_weights,
    "problems": change_gold,
    "prompts": change_template,
}


@pytest.mark.parametrize("script", SCRIPTS)
def test_what_is_changed_at_the_same_path_is_refused_or_begun_anew(script, world) -> None:
    start(script, world)
    for name, change in CHANGES.items():
        before = shutil.copytree(world, world.parent / name)
        change(world)
        with pytest.raises(UserError, match=f"other {name}.* overwrite_output_dir: true"):
            start(script, world)
        shutil.rmtree(world)
        shutil.move(before, world)
    change_gold(world)
    start(script, world, "overwrite_output_dir=true")
    start(script, world)  # and from then on it is the run of the new gold answers


def start_warm_up(world: Path, *more: str) -> None:
    small = ["dtype=float32", "num_train_epochs=1", "eval_ratio=0"]
    rows = f"train_file={world / 'rows.jsonl'}"
    train_sft.main(
        load_config(SFTConfig, settings("train_sft", world, world / "sft", *small, rows, *more))
    )


@pytest.fixture
def warm_world(world: Path) -> Path:
    rows = [{"question": f"Tom has {i} pens.", "response": "So \\boxed{4}."} for i in range(4)]
    write_jsonl(world / "rows.jsonl", rows)
    return world


@pytest.mark.parametrize("loss", ["sft", "dpo"])
def test_a_finished_warm_up_is_not_exported_for_other_weights(loss, warm_world) -> None:
    world, more = warm_world, [f"loss={loss}"]
    if loss == "dpo":
        rows = [{"question": f"Tom has {i} pens.", "chosen": "4", "rejected": "5"} for i in "1234"]
        write_jsonl(world / "rows.jsonl", rows)
    start_warm_up(world, *more)
    first = (world / "sft" / "hf" / "model.safetensors").read_bytes()
    start_warm_up(world, *more)  # a finished run may be started again
    assert (world / "sft" / "hf" / "model.safetensors").read_bytes() == first
    nudge_weights(world)
    with pytest.raises(UserError, match="other weights"):
        start_warm_up(world, *more)
    start_warm_up(world, *more, "overwrite_output_dir=true")
    assert (world / "sft" / "hf" / "model.safetensors").read_bytes() != first
    start_warm_up(world, *more)


def test_a_finished_warm_up_is_not_exported_for_another_initial_state(warm_world) -> None:
    world = warm_world
    start_warm_up(world)
    state = next(world.glob("sft/checkpoints/step_*"))
    more = [f"output_dir={world / 'second'}", f"initial_state={state}"]
    start_warm_up(world, *more)
    for path in state.glob("state/*.safetensors"):
        tensors = load_file(path)
        next(t for t in tensors.values() if t.is_floating_point() and t.numel()).view(-1)[0] += 1
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
        save_file(tensors, path, metadata=metadata)
    with pytest.raises(UserError, match="is damaged; use another checkpoint"):
        start_warm_up(world, *more)
    files = sorted(json.loads((state / "COMPLETE").read_text()))  # as another training writes it
    checksums = {name: zlib.crc32((state / name).read_bytes()) for name in files}
    (state / "COMPLETE").write_text(json.dumps(checksums))
    with pytest.raises(UserError, match="other weights"):
        start_warm_up(world, *more)


def test_an_initial_state_that_is_not_one_is_one_line(warm_world) -> None:
    world = warm_world
    start_warm_up(world)
    state = next(world.glob("sft/checkpoints/step_*"))
    foreign = shutil.copytree(state, world / "foreign")
    (foreign / "COMPLETE").write_text("done")
    half = shutil.copytree(state, world / "half")
    next(half.glob("state/*.safetensors")).write_bytes(b"\0")
    for path, message in {
        world / "nowhere": "must be a checkpoint, which contains a file COMPLETE",
        world / "base": "must be a checkpoint",
        world / "rows.jsonl": "must be a checkpoint",
        state.parent: "must be a checkpoint",
        foreign: "is damaged; use another checkpoint",
        half: "is damaged; use another checkpoint",
    }.items():
        with pytest.raises(UserError, match=f"initial_state {path} {message}") as error:
            start_warm_up(world, f"output_dir={world / 'second'}", f"initial_state={path}")
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("model", ["wider", "deeper"])
def test_an_initial_state_of_another_model_is_one_line(model, warm_world) -> None:
    world = warm_world
    start_warm_up(world)
    config = AutoConfig.from_pretrained(world / "base")
    config.hidden_size, config.num_hidden_layers = (48, 2) if model == "wider" else (24, 3)
    config.layer_types = ["full_attention"] * config.num_hidden_layers
    AutoModelForCausalLM.from_config(config).save_pretrained(world / "base")
    state = next(world.glob("sft/checkpoints/step_*"))
    more = [f"output_dir={world / 'second'}", f"initial_state={state}"]
    with pytest.raises(UserError, match=r"must have the tensors of this model and of its opt") as e:
        start_warm_up(world, *more)
    found = {"wider": "Size mismatch between", "deeper": "Missing key in checkpoint"}[model]
    assert found in str(e.value)
    assert "\n" not in str(e.value)


class EqualScores:
    """A PRM without a model."""

    async def score(self, question: str, steps: list[str]) -> list[float]:
        return [0.5] * len(steps)

    def close(self) -> None:
        pass


@pytest.mark.parametrize("script", SCRIPTS)
def test_another_prm_at_the_same_path_is_refused(script, world, monkeypatch) -> None:
    """The reference of train_rl.py needs no digest: it is the initial model."""
    monkeypatch.setattr(prm_local, "LocalPRM", lambda cfg: EqualScores())
    shutil.copytree(world / "base", world / "prm" / "model")  # not among the models of `start`
    more = ["use_prm=true", f"prm_model_name_or_path={world / 'prm' / 'model'}"]
    start(script, world, *more)
    start(script, world, *more)
    nudge_weights(world / "prm")
    with pytest.raises(UserError, match="other weights"):
        start(script, world, *more)


def test_a_results_journal_from_before_the_digests_is_refused(world) -> None:
    start("evaluate", world)
    (world / "out" / "eval" / "train.made_from.json").unlink()
    with pytest.raises(UserError, match="made from other problems and prompts and weights"):
        start("evaluate", world)


def test_an_overwritten_search_keeps_no_trees_of_the_old_one(world) -> None:
    start("search", world)
    trees = world / "out" / "trees"
    assert len(list(trees.iterdir())) == 2
    (trees / "train-1.html").touch()  # tools/page.py writes one beside each tree
    (trees / "notes.txt").touch()
    start("search", world, "overwrite_output_dir=true", "max_problems=1")
    assert sorted(path.name for path in trees.iterdir()) == ["notes.txt", "train-1.json"]


def test_an_overwritten_training_keeps_no_samples_of_the_old_one(world) -> None:
    """tools/report.py shows those of the last step."""
    old = world / "out" / "samples" / "step_000009.jsonl"
    start("train_rl", world)
    old.write_text("{}\n")
    start("train_rl", world, "overwrite_output_dir=true")
    assert [path.name for path in old.parent.iterdir()] == ["step_000000.jsonl"]


# ---- The digest of weights ----


def test_any_weight_of_a_small_model_and_its_configuration_count(world) -> None:
    model = world / "base"
    before = weights_digest(str(model))
    (model / ".DS_Store").write_text("x")
    (model / "notes.md").write_text("x")
    assert weights_digest(str(model)) == before
    nudge_weights(world)
    after = weights_digest(str(model))
    assert after != before
    config = model / "config.json"
    config.write_text(config.read_text().replace("}", " }", 1), encoding="utf-8")
    assert weights_digest(str(model)) != after


def test_of_a_large_file_the_header_and_a_sample_of_each_tensor_count(
    tmp_path, monkeypatch
) -> None:
    monkeypatch.setattr(provenance, "WHOLE", 0)
    tensors = {"a": torch.zeros(20_000), "b": torch.zeros(20_000), "empty": torch.zeros(0)}

    def found(**changed: torch.Tensor) -> str:
        save_file(tensors | changed, tmp_path / "model.safetensors")
        return weights_digest(str(tmp_path))

    before = found()
    assert found() == before
    for i in (0, 10_000, 19_999):
        assert found(b=torch.zeros(20_000).index_fill(0, torch.tensor(i), 1.0)) != before
    assert found(b=torch.zeros(20_000, 1)) != before
    for damaged in (b"\xff" * 9, b"", b"version https://git-lfs.github.com/spec/v1"):
        (tmp_path / "model.safetensors").write_bytes(damaged)
        assert weights_digest(str(tmp_path)) != before


def test_a_digest_depends_on_where_texts_end() -> None:
    assert digest(["ab", "c"]) != digest(["a", "bc"])
    assert digest(["a"]) != digest(["a", ""])
    assert digest(["\ud83d"]) == digest(["\ud83d"])
