"""Test LoRA: what is trained, what is frozen, and that the merged weights are the trained model."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

import train_rl
import train_sft
from rftt.engines.opened import open_model
from rftt.learner.fsdp import full_weights, own_tensors, whole
from rftt.learner.logprobs import token_logprobs
from rftt.learner.lora import Reference, adapter, attach, save_adapter, trained_share, why_not_alone
from rftt.learner.model import prepare
from rftt.run.config import RLConfig, SFTConfig, Training, load_config
from rftt.run.files import read_jsonl, write_jsonl
from rftt.types import UserError
from tests.learners import VOCABULARY, random_batch, tiny_model
from tests.small_world import make_world, settings
from tools.memory import adapter_size

pytestmark = pytest.mark.lora
IDS = tuple(range(VOCABULARY - 19, VOCABULARY - 3))  # sixteen, before three other rows
SETTINGS = Training(learning_rate=1.0, use_peft=True, lora_r=4, lora_alpha=6.0)
BATCH = random_batch([9, 14, 6])


def adapted(family: str = "qwen2", *, tied: bool = True, ids: Any = IDS, **keys: Any) -> Any:
    """A prepared model with an adapter whose B is not zero and whose rows have moved."""
    model = fresh(family, tied=tied, ids=ids, **keys)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name or "function_rows" in name:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def fresh(family: str = "qwen2", *, tied: bool = True, ids: Any = IDS, **keys: Any) -> Any:
    model = prepare(tiny_model(family, tied=tied))
    attach(replace(SETTINGS, **keys), model, ids, seed=0)
    return model


def logprobs(model: Any, batch: Any = BATCH) -> torch.Tensor:
    return token_logprobs(model, batch, 0.9, VOCABULARY - 2)[0]


def merged_model(model: Any, family: str, *, tied: bool) -> Any:
    plain = prepare(tiny_model(family, tied=tied, seed=9))
    own = dict(plain.named_parameters())
    for name, tensor in full_weights(model):
        own.pop(name).data.copy_(tensor)
    assert not own, "every weight was sent"
    return plain


FAMILIES = [("qwen2", True), ("qwen2", False), ("llama", False), ("gemma", True)]


@pytest.mark.parametrize(("family", "tied"), FAMILIES)
def test_a_fresh_adapter_changes_nothing(family: str, tied: bool) -> None:
    before = logprobs(prepare(tiny_model(family, tied=tied)))
    torch.testing.assert_close(logprobs(fresh(family, tied=tied)), before, rtol=0, atol=1e-6)


@pytest.mark.oracle
@pytest.mark.parametrize("packs_prefixes", [False, True])
@pytest.mark.parametrize(("family", "tied"), FAMILIES)
def test_merged_weights_are_the_adapted_model(
    family: str, tied: bool, packs_prefixes: bool
) -> None:
    model, batch = adapted(family, tied=tied), BATCH.replace(packs_prefixes=packs_prefixes)
    ours, plain = logprobs(model, batch), logprobs(merged_model(model, family, tied=tied), batch)
    torch.testing.assert_close(ours, plain, rtol=0, atol=2e-5)
    assert (ours - logprobs(prepare(tiny_model(family, tied=tied)))).abs().max() > 0.01


@pytest.mark.oracle
@pytest.mark.parametrize("chunk", [None, 5])
@pytest.mark.parametrize(("family", "tied"), FAMILIES)
def test_gradients_are_those_of_the_merged_weights(
    family: str, tied: bool, chunk: int | None
) -> None:
    """By the chain rule ∂A = s Bᵀ ∂W and ∂B = s ∂W Aᵀ; a row's gradient is that of its matrix."""
    model = adapted(family, tied=tied)
    plain = merged_model(model, family, tied=tied)
    for one in (model, plain):
        found, entropy = token_logprobs(one, BATCH, 0.9, VOCABULARY, chunk=chunk, with_entropy=True)
        assert entropy is not None
        assert BATCH.advantages is not None
        (found * BATCH.advantages + 0.1 * entropy).sum().backward()
    own = dict(model.named_parameters())
    grads = {name: parameter.grad for name, parameter in plain.named_parameters()}
    compared = 0
    for name, a in own.items():
        if name.endswith("lora_A.default.weight"):
            b = own[name.replace("lora_A", "lora_B")]
            full = grads[name.replace(".lora_A.default", "")]
            torch.testing.assert_close(a.grad, 1.5 * b.T @ full, rtol=1e-3, atol=1e-4)
            torch.testing.assert_close(b.grad, 1.5 * full @ a.T, rtol=1e-3, atol=1e-4)
            compared += 1
    assert compared == 14
    rows, index = model.function_rows, list(IDS)
    embedding = grads["model.embed_tokens.weight"][index]
    torch.testing.assert_close(rows.input.grad, embedding, rtol=1e-3, atol=1e-4)
    if not tied:
        head = grads["lm_head.weight"][index]
        torch.testing.assert_close(rows.head.grad, head, rtol=1e-3, atol=1e-4)


@pytest.mark.invariant
@pytest.mark.parametrize("tied", [True, False])
def test_only_adapter_and_rows_change(tied: bool) -> None:
    model = adapted(tied=tied)
    start = prepare(tiny_model(tied=tied))
    before = {name: tensor.clone() for name, tensor in start.state_dict().items()}
    trained = [p for p in model.parameters() if p.requires_grad]
    logprobs(model).sum().backward()
    torch.optim.SGD(trained, lr=0.1).step()
    others = [i for i in range(VOCABULARY) if i not in IDS]
    for name, tensor in full_weights(model):
        if "embed_tokens" in name or name == "lm_head.weight":
            assert torch.equal(tensor[others], before[name][others])
            assert not torch.equal(tensor[list(IDS)], before[name][list(IDS)])
        else:
            assert torch.equal(tensor, before[name]) == ("proj" not in name or "bias" in name)
    assert all(p.dtype == torch.float32 for p in trained)
    assert "parameters are trained" in trained_share(model)


@pytest.mark.invariant
def test_the_reference_is_the_model_before_training() -> None:
    model = adapted(tied=False)
    start, now = logprobs(prepare(tiny_model(tied=False))), logprobs(model)
    assert torch.equal(logprobs(Reference(model)), start)
    assert torch.equal(logprobs(model), now)  # switched on again


@pytest.mark.invariant
def test_merging_does_not_drift_in_bfloat16() -> None:
    """An adapter that returns to zero gives back the very weights, however often it was merged."""
    model = fresh().bfloat16()
    before = {name: tensor.clone() for name, tensor in full_weights(model)}
    layers = [module for module in model.modules() if hasattr(module, "lora_B")]
    for value in (0.3, -0.2, 0.0):
        for layer in layers:
            nn.init.constant_(layer.lora_B["default"].weight, value)
        last = {name: tensor.clone() for name, tensor in full_weights(model)}
    assert all(torch.equal(last[name], before[name]) for name in before)
    assert all(tensor.dtype == torch.bfloat16 for tensor in last.values())


@pytest.mark.invariant
def test_gradient_checkpointing_changes_no_gradient() -> None:
    found = []
    for on in (False, True):
        model = prepare(tiny_model(), gradient_checkpointing=on)
        attach(SETTINGS, model, IDS, seed=0)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                nn.init.constant_(parameter, 0.1)
        logprobs(model).sum().backward()
        found.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    for name, grad in found[0].items():
        torch.testing.assert_close(found[1][name], grad, rtol=1e-5, atol=1e-6)


@pytest.mark.oracle
@pytest.mark.parametrize(("family", "tied"), FAMILIES[:3])
def test_peft_loads_the_adapter_folder(family: str, tied: bool, tmp_path: Any) -> None:
    """peft on the base model has the logits of the merged model, rows included."""
    from peft import PeftModel

    model = adapted(family, tied=tied)
    tensors, settings = adapter(model, own_tensors(model), whole)
    base = tiny_model(family, tied=tied)
    base.save_pretrained(tmp_path / "base")
    save_adapter(model, tensors, settings, str(tmp_path / "base"), tmp_path / "adapter")
    theirs = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    plain = tiny_model(family, tied=tied, seed=9)
    missing = plain.load_state_dict(dict(full_weights(model)), strict=False)
    assert not missing.unexpected_keys
    ids = BATCH.input_ids[None, :9]
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids).logits, plain.eval()(ids).logits, rtol=0, atol=2e-5)


@pytest.mark.invariant
def test_runs_begin_at_their_reference_and_leave_two_folders(tmp_path: Path) -> None:
    """Warm-up and RL as a user starts them; a run without an adapter removes an old folder."""
    from peft import PeftModel

    world = make_world(tmp_path)
    rows = [{"question": f"Tom has {i} pens.", "response": "So \\boxed{4}."} for i in range(4)]
    write_jsonl(world / "rows.jsonl", rows)
    speaks = str(world / "speaks")
    lora = ["dtype=float32", "use_peft=true", "lora_r=2", "learning_rate=0.01"]
    own = [f"model_name_or_path={speaks}", f"train_file={world / 'rows.jsonl'}", "eval_ratio=0"]
    keys = settings("train_sft", world, world / "sft", *own, "num_train_epochs=1", *lora)
    train_sft.main(load_config(SFTConfig, keys))
    base, trained = (
        open_model(AutoModelForCausalLM, str(path), torch.float32)
        for path in (speaks, world / "sft" / "hf")
    )
    ids = torch.arange(20)[None]
    with torch.no_grad():
        before, ours = base(ids).logits, trained(ids).logits
        theirs = PeftModel.from_pretrained(base, world / "sft" / "adapter").eval()(ids).logits
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-5)
    assert (before - ours).abs().max() > 1e-3
    assert "parameters are trained" in (world / "sft" / "log.txt").read_text()

    more = [f"model_name_or_path={world / 'sft' / 'hf'}", "max_steps=1", "kl_coef=0.1"]
    keys = settings("train_rl", world, world / "rl", *more, "packing=tree")
    train_rl.main(load_config(RLConfig, [*keys, *lora]))
    ((_, row),) = read_jsonl(world / "rl" / "metrics.jsonl")
    assert row["kl"] == 0.0
    assert (world / "rl" / "adapter").is_dir()
    train_rl.main(load_config(RLConfig, [*keys, "dtype=float32", "overwrite_output_dir=true"]))
    assert not (world / "rl" / "adapter").exists()


def test_modules_that_cannot_be_adapted_are_one_line() -> None:
    absent = ["q_proj", "no_such_proj"]  # peft alone would adapt q_proj and say nothing
    for names in (["no_such_proj"], absent, ["lm_head"], ["embed_tokens"]):
        with pytest.raises(UserError, match="lora_target_modules"):
            fresh(tied=False, lora_target_modules=names)


def test_an_adapter_for_ppo_is_one_line() -> None:
    with pytest.raises(UserError, match="use_peft trains no critic"):
        RLConfig(
            model_name_or_path="m", output_dir="o", train_file="t", learning_rate=1.0,
            advantage_estimator="ppo", use_peft=True,
        )  # fmt: skip


NEEDED: Any = {
    "model_name_or_path": "m", "output_dir": "o", "train_file": "t", "learning_rate": 1.0,
}  # fmt: skip


def test_settings_that_would_have_no_effect_are_one_line() -> None:
    with pytest.raises(UserError, match="lora_r, lora_target_modules: no adapter is trained"):
        SFTConfig(**NEEDED, lora_r=8, lora_target_modules=["q_proj"])
    with pytest.raises(UserError, match="use_peft cannot go on from initial_state"):
        SFTConfig(**NEEDED, use_peft=True, initial_state="o/checkpoints/step_000001")


def test_a_missing_peft_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UserError, match=r"pip install -r requirements-lora\.txt"):
        fresh()


def test_a_base_without_rows_gets_no_adapter_folder() -> None:
    model = fresh()
    assert why_not_alone(model) is None
    grown = prepare(tiny_model())
    attach(SETTINGS, grown, IDS, seed=0, frozen=[])
    assert why_not_alone(grown) == "the base model has no rows for the functional tokens"
    assert "scales its embeddings" in str(why_not_alone(fresh("gemma")))


@pytest.mark.oracle
@pytest.mark.parametrize("names", [["all-linear"], ["q_proj", "v_proj", "down_proj"]])
@pytest.mark.parametrize("tied", [True, False])
def test_the_estimate_counts_what_is_trained(tied: bool, names: list[str]) -> None:
    model = fresh(tied=tied, lora_target_modules=names)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    cfg = SFTConfig(
        model_name_or_path="m", output_dir="o", train_file="t", learning_rate=1.0, use_peft=True,
        lora_r=4, lora_target_modules=names,
    )  # fmt: skip
    assert adapter_size(model.config, cfg) == trained
