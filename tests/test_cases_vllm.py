"""What vLLM computes is compared with transformers' own forward before the first step."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from rftt.engines import reference
from rftt.engines.opened import own_logits
from rftt.engines.reference import MARGIN, N_DECODED, N_WRITTEN, Scores, check_scores, own_scores
from rftt.types import UserError
from tests.conftest import ROOT, run
from tools import model_matrix
from tools.model_matrix import FAMILIES, GATED, LENGTH, VOCABULARY, Family, build

pytestmark = pytest.mark.cases


def saved(family: Family, folder: Path) -> tuple[str, Any]:
    model = build(family)
    model.save_pretrained(folder)
    return str(folder), model


def engine_of(family: Family) -> Callable[[Sequence[list[int]], int], list[Scores]]:
    """An engine in vLLM's place, whose model may be another one."""
    model = build(family)

    def score(prompts: Sequence[list[int]], n_decoded: int) -> list[Scores]:
        assert n_decoded == N_DECODED, "the comparison asks for as many as it has"
        return [reference._scores(model, ids, VOCABULARY) for ids in prompts]

    return score


def with_changes(family: Family, **changes: Any) -> Family:
    return replace(family, changes=family.changes | changes)


CHANGED = {
    "a logit scale": ("Granite", {"logits_scaling": 1.0}),
    "a soft cap": ("Gemma 2", {"final_logit_softcapping": None}),
    "a wider window": ("Mistral", {"sliding_window": 12}),
    "no window": ("Mistral", {"sliding_window": None}),
    "other positions": (
        "Llama 3",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 9.0}},
    ),
}


@pytest.mark.parametrize("name", CHANGED)
def test_an_engine_with_another_model_is_refused(name: str, tmp_path: Path) -> None:
    family = FAMILIES[CHANGED[name][0]]
    path, model = saved(family, tmp_path / "m")
    own = own_scores(path, model.config, VOCABULARY, LENGTH, "float32")
    check_scores(path, own, engine_of(family), "float32")
    with pytest.raises(UserError, match=r"m is not supported by vLLM .*at most 0.001.*engine: hf"):
        check_scores(path, own, engine_of(with_changes(family, **CHANGED[name][1])), "float32")


def test_half_precision_is_compared_beside_the_cost_of_rounding(tmp_path: Path) -> None:
    family = FAMILIES["Granite"]
    path, model = saved(family, tmp_path / "m")
    before = [parameter.clone() for parameter in model.parameters()]
    own = own_scores(path, model.config, VOCABULARY, LENGTH, "bfloat16")
    assert [len(one.prompt_ids) for one in own] == [17, 11, 2 + N_WRITTEN]
    for one in own:
        rounded = reference._logprobs(model, one.prompt_ids + one.decoded_ids, VOCABULARY)
        exact = one.prompt + one.decoded
        assert rounded == pytest.approx(exact, abs=1e-5)  # nothing of the rounding is left
        assert 0 < one.rounding < 0.2
    assert all(map(torch.equal, before, model.parameters()))
    check_scores(path, own, engine_of(family), "bfloat16")
    other = engine_of(with_changes(family, logits_scaling=1.0))
    with pytest.raises(UserError, match=r"not supported by vLLM .*on average 0\.\d+ is"):
        check_scores(path, own, other, "bfloat16")


def test_a_prompt_is_longer_than_the_window_where_that_is_cheap(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, model = saved(with_changes(FAMILIES["Mistral"], sliding_window=20), tmp_path)

    def lengths(max_model_len: int) -> list[int]:
        own = own_scores(path, model.config, VOCABULARY, max_model_len, "float32")
        return [len(one.prompt_ids) for one in own]

    assert lengths(LENGTH) == [17, 11, 20 + MARGIN]
    assert lengths(20 + MARGIN + N_DECODED) == [17, 11, 20 + MARGIN]
    assert lengths(20) == [14, 11]  # no sequence of this run comes past the window
    monkeypatch.setattr(reference, "MAX_COST", 1.0)
    assert lengths(LENGTH) == [17, 11]


def test_functional_ids_are_among_those_compared(tmp_path: Path) -> None:
    path, model = saved(FAMILIES["Qwen3"], tmp_path)
    own = own_scores(path, model.config, VOCABULARY, LENGTH, "float32")
    assert {VOCABULARY - 1, VOCABULARY - 2} < set(own[0].prompt_ids)
    table = own_logits(model, own[0].prompt_ids + own[0].decoded_ids, VOCABULARY).log_softmax(-1)
    assert own[0].decoded_ids == table[16:-1].argmax(-1).tolist()
    assert own[0].decoded == pytest.approx(table[16:-1].max(-1).values.tolist())


def test_half_precision_may_be_far_off_at_single_ids_only() -> None:
    one = Scores([1] * 11, [-3.0] * 10, [5, 6], [-1.0, -1.0])

    def check(dtype: str, **changes: Any) -> None:
        check_scores("m", [one], lambda *_: [replace(one, **changes)], dtype)

    outlier = [-3.0] * 9 + [-6.0]
    check("bfloat16", prompt=outlier)
    for dtype, changes in (
        ("float32", {"prompt": outlier}),
        ("float16", {"prompt": [-3.9] * 10}),
        ("bfloat16", {"prompt": [-3.0] * 9 + [float("nan")]}),
        ("float32", {"prompt": [float("nan")] + [-3.0] * 9}),
    ):
        with pytest.raises(UserError, match="is not supported by vLLM"):
            check(dtype, **changes)
    check("float32", decoded_ids=[7, 8], decoded=[-1.0, -9.0])  # a tie: what follows differs
    with pytest.raises(UserError, match="its log-probs are 8 off"):
        check("float32", decoded=[-1.0, -9.0])


def test_what_transformers_cannot_open_is_not_compared(tmp_path: Path) -> None:
    path, model = saved(FAMILIES["Qwen3"], tmp_path)
    model.config.quantization_config = {"quant_method": "gptq"}
    assert own_scores(path, model.config, VOCABULARY, LENGTH, "float32") == []
    rope = {"rope_type": "longrope", "factor": 4.0, "original_max_position_embeddings": 14}
    rope |= {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4, "rope_theta": 10000.0}
    changes = {"rope_parameters": rope, "original_max_position_embeddings": 14}
    path, model = saved(with_changes(Family("phi3", GATED), **changes), tmp_path / "long")
    assert own_scores(path, model.config, VOCABULARY, 15, "float32") == []  # S1 of docs/cases.md
    assert len(own_scores(path, model.config, VOCABULARY, 14, "float32")) == 2
    check_scores(path, [], lambda *_: pytest.fail("nothing to score"), "float32")


def test_a_model_that_transformers_cannot_run_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, model = saved(FAMILIES["Qwen3"], tmp_path)

    def broken(*_: Any) -> Any:
        raise ImportError("mamba_ssm is missing")

    monkeypatch.setattr(reference, "own_logits", broken)
    with pytest.raises(UserError, match=r"cannot be compared .*mamba_ssm.*; set skip_model_check"):
        own_scores(path, model.config, VOCABULARY, LENGTH, "float32")


SPOT = """
import json, sys
sys.path.insert(0, ".")
import rftt.engines.vllm
from tools import model_matrix
print(json.dumps({name: model_matrix.vllm_refusal(name) for name in sys.argv[1:]}))
"""
REFUSED = "Qwen2, use_sliding_window"


@pytest.mark.vllm
def test_vllm_says_of_two_families_what_the_table_says() -> None:
    done = run(sys.executable, "-c", SPOT, "Mistral", REFUSED)
    found = json.loads(done.stdout.splitlines()[-1])
    kept = model_matrix.kept()["refusals"]
    assert found["Mistral"] is kept["Mistral"] is None
    assert found[REFUSED] == kept[REFUSED]
    assert re.match(r"vLLM cannot open qwen2: AssertionError: Sliding window", found[REFUSED])


def test_the_table_names_the_version_of_vllm() -> None:
    kept = model_matrix.kept()
    assert set(kept["refusals"]) <= set(FAMILIES)
    assert f"vLLM {kept['vllm']}" in (ROOT / "docs/models.md").read_text(encoding="utf-8")
