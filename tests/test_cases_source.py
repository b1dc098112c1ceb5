"""Results belong to what made them: other problems, prompts or weights are refused, not reused."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import evaluate
import search
import train_rl
from rftt.run import provenance
from rftt.run.config import EvalConfig, RLConfig, SearchConfig, load_config
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


def test_a_results_journal_from_before_the_digests_is_refused(world) -> None:
    start("evaluate", world)
    (world / "out" / "eval" / "train.made_from.json").unlink()
    with pytest.raises(UserError, match="made from other problems and prompts and weights"):
        start("evaluate", world)


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
