"""Other people's models: each is right, or refused in one line that names model, place and cure."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import re
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import decoders
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import train_sft
from rftt.engines import build_engine, slots, vocabulary_size
from rftt.engines.base import Sampling
from rftt.engines.chat import load_tokenizer, open_tokenizer, reply_ends
from rftt.engines.opened import (
    check_context,
    check_files,
    check_rows,
    check_savable,
    listed_ends,
    logit_head,
    open_model,
)
from rftt.engines.vocabulary import check_free, check_question, check_text, end_ids, turn_end
from rftt.graders.prm_local import LocalPRM, check_padding
from rftt.learner import attention, logprobs
from rftt.learner.check import check_policy
from rftt.learner.checkpoint import export_hf, try_saving
from rftt.learner.fsdp import process_group
from rftt.learner.model import Critic, load_critic, load_policy, prepare
from rftt.prompts import question_messages
from rftt.run import provenance
from rftt.run.config import RLConfig, ServeConfig, SFTConfig, load_config
from rftt.run.data import load_rows
from rftt.run.files import write_jsonl
from rftt.run.provenance import model_digest, weights_digest
from rftt.tokens import add_function_tokens
from rftt.types import UserError
from tests.conftest import ROOT, run
from tests.learners import tiny_model
from tests.small_world import make_world, settings
from tools import doctor, model_matrix
from tools.model_matrix import FAMILIES, GATED, SIZES, VOCABULARY, Family, build
from tools.tiny_world import build_tokenizer

pytestmark = pytest.mark.cases

ROWS = [
    {
        "question": f"{a}+{b}?",
        "steps": [
            {"act": "analysis", "text": f"{a} + {b}"},
            {"act": "output", "text": f"\\boxed{{{a + b}}}"},
        ],
    }
    for a in range(1, 4)
    for b in range(1, 4)
]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_world(tmp_path_factory.mktemp("world"))
    write_jsonl(folder / "rows.jsonl", ROWS)
    return folder


Fault = Callable[[Path], Any]


def edit(file: Path, **changes: Any) -> None:
    before = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(before | changes))


def renamed(folder: Path, rename: Callable[[str], str | None]) -> None:
    """Write the weights under other names, without those that become None."""
    file = folder / "model.safetensors"
    tensors = {rename(name): tensor for name, tensor in load_file(file).items()}
    save_file({k: t for k, t in tensors.items() if k}, file, {"format": "pt"})


def templated(folder: Path, change: Callable[[str], str]) -> None:
    file = folder / "chat_template.jinja"
    file.write_text(change(file.read_text()))


def copied(world: Path, out: Path, fault: Fault, source: str = "base") -> Path:
    """Return a copy of a model of the world with one fault."""
    folder = Path(shutil.copytree(world / source, out / "model"))
    fault(folder)
    return folder


def with_hole(folder: Path) -> None:
    file = folder / "tokenizer.json"
    text = json.loads(file.read_text())
    ids = [*text["model"]["vocab"].values(), *(token["id"] for token in text["added_tokens"])]
    text["model"]["vocab"]["z"] = 9 + max(ids)
    file.write_text(json.dumps(text))


def of_the_future(folder: Path) -> None:
    file = folder / "tokenizer.json"
    text = json.loads(file.read_text())
    text["model"]["type"] = "BPE9"
    file.write_text(json.dumps(text))


def cut(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def pointer(folder: Path) -> None:
    lines = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 269060552\n"
    (folder / "model.safetensors").write_text(lines)


def headed(header: bytes) -> Fault:
    """Replace the header of the weights; the rest of the file stays."""

    def fault(folder: Path) -> None:
        file = folder / "model.safetensors"
        whole = file.read_bytes()
        tensors = whole[8 + int.from_bytes(whole[:8], "little") :]
        file.write_bytes(len(header).to_bytes(8, "little") + header + tensors)

    return fault


def zeros(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(bytes(file.stat().st_size))


def no_file(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").mkdir()


def smaller_vocabulary(folder: Path) -> None:
    n = json.loads((folder / "config.json").read_text())["vocab_size"]
    edit(folder / "config.json", vocab_size=n - 16)


def bloom(folder: Path) -> None:
    n = json.loads((folder / "config.json").read_text())["vocab_size"]
    config = AutoConfig.for_model("bloom", vocab_size=n, hidden_size=24, n_layer=2, n_head=2)
    config.initializer_range = 0.3
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128}
FAULTS: dict[str, tuple[Fault, str]] = {
    "torch.compile prefix": (
        lambda f: renamed(f, lambda name: f"_orig_mod.{name}"),
        r"27 missing .* 27 unexpected .* torch.compile'd model: strip this prefix",
    ),
    "DDP prefix": (
        lambda f: renamed(f, lambda name: f"module.{name}"),
        "DistributedDataParallel: strip this prefix",
    ),
    "a weight is missing": (
        lambda f: renamed(f, lambda name: None if "layers.1.mlp.down" in name else name),
        r"1 missing \(model.layers.1.mlp.down_proj.weight\); copy or export",
    ),
    "a weight too many": (
        lambda f: renamed(f, lambda name: name.replace("lm_head", "other_head")),
        r"1 unexpected \(other_head.weight\)",
    ),
    "config of another model": (smaller_vocabulary, r"2 of another shape \(lm_head.weight, "),
    "git-lfs pointer": (pointer, "git-lfs pointer and not the weights; run `git lfs pull`"),
    "cut off": (cut, "is cut off or damaged; copy or download it again"),
    "quantised": (
        lambda f: edit(f / "config.json", quantization_config=GPTQ),
        r"quantised \(quantization_config: gptq\), which only engine=vllm can read",
    ),
    "adapter": (
        lambda f: edit(f / "adapter_config.json", peft_type="LORA", r=4),
        r"an adapter \(adapter_config.json\) that is not applied; merge it",
    ),
    "adapter without a config": (
        lambda f: save_file({"x": torch.ones(1)}, f / "adapter_model.safetensors"),
        r"an adapter \(adapter_model.safetensors\)",
    ),
    "newer tokenizer": (of_the_future, "written by another version of tokenizers"),
    "hole in the ids": (with_hole, "has a hole in its ids: the new token .* which is that of 'z'"),
    "template wants parts": (
        lambda f: templated(
            f,
            lambda _: (
                "{% for m in messages %}{% for c in m['content'] %}{{ c['text'] }}{% endfor %}"
                "{% endfor %}Answer:"
            ),
        ),
        "must write the question once, but writes it 0 times; set chat_template",
    ),
    "template repeats": (
        lambda f: templated(f, lambda text: text + text),
        "must write the question once, but writes it 2 times",
    ),
    "temperature without do_sample": (
        lambda f: edit(f / "generation_config.json", temperature=0.9, top_p=0.6),
        "refuses to save .*generation_config.json .*temperature.*; set do_sample: true",
    ),
    "top_k without do_sample": (
        lambda f: edit(f / "generation_config.json", top_k=5, do_sample=False),
        "refuses to save .*generation_config.json .*top_k",
    ),
    "short context": (
        lambda f: edit(f / "config.json", max_position_embeddings=10),
        r"longest row has \d+ tokens, .* only 10 positions .*; set max_length: 10",
    ),
    "attention of its own": (bloom, r"\(bloom\) is not supported by the trainer: its log-probs"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_the_doctor_finds_a_faulty_model_first(
    name: str, world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fault, found = FAULTS[name]
    folder = copied(world, tmp_path, fault)
    more = [f"model_name_or_path={folder}", f"train_file={world / 'rows.jsonl'}"]
    config = load_config(SFTConfig, settings("train_sft", world, tmp_path / "out", *more))
    with pytest.raises(SystemExit):
        doctor.main(config)
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("fail")]
    assert said[0].split()[1] == ("rows" if name == "short context" else "model")
    assert re.search(found, said[0])
    assert str(folder) in said[0]


@pytest.mark.parametrize("script", ["train_rl", "search", "evaluate"])
def test_the_doctor_reads_families_without_key_value_heads(
    script: str, world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = copied(world, tmp_path, bloom, "speaks")
    more = [f"model_name_or_path={folder}"]
    arguments = settings(script, world, tmp_path / "out", *more)
    with pytest.raises(SystemExit):
        doctor.main(load_config(doctor.schema_of(arguments), arguments))
    levels = {line.split()[1]: line.split()[0] for line in capsys.readouterr().out.splitlines()}
    assert (levels["model"], levels["memory"]) == ("fail", "ok")


@pytest.mark.parametrize("script", ["train_sft", "train_rl", "search", "evaluate"])
def test_each_script_ends_in_one_line(script: str, world: Path, tmp_path: Path) -> None:
    folder = copied(world, tmp_path, FAULTS["torch.compile prefix"][0], "speaks")
    more = [f"model_name_or_path={folder}"]
    more += [f"train_file={world / 'rows.jsonl'}"] if script == "train_sft" else []
    done = run(
        "python", ROOT / f"{script}.py", *settings(script, world, tmp_path / "out", *more),
        check=False,
    )  # fmt: skip
    assert done.returncode == 2
    [line] = [line for line in done.stderr.splitlines() if line.strip()]
    assert "strip this prefix from the names" in line


def engine_of(path: Path, **changes: Any) -> Any:
    settings = {
        "engine": "hf", "dtype": "float32", "device": "cpu", "max_num_seqs": 2,
        "max_model_len": 64, "trust_remote_code": False, "skip_model_check": False,
    }  # fmt: skip
    tokenizer = load_tokenizer(str(path))
    cfg: Any = SimpleNamespace(**settings | changes)
    return build_engine(cfg, str(path), vocabulary_size(tokenizer))


OPENERS: dict[str, Callable[[Path], Any]] = {
    "policy": lambda path: load_policy(str(path), torch.float32),
    "critic": lambda path: load_critic(str(path), torch.float32),
    "engine": engine_of,
    "prm": lambda path: LocalPRM(
        load_config(ServeConfig, [f"prm_model_name_or_path={path}", "device=cpu", "dtype=float32"])
    ),
}


@pytest.mark.parametrize("opener", OPENERS)
@pytest.mark.parametrize("name", ["torch.compile prefix", "a weight is missing", "adapter"])
def test_every_model_is_checked_when_it_is_opened(
    opener: str, name: str, world: Path, tmp_path: Path
) -> None:
    fault, _ = FAULTS[name]
    folder = copied(world, tmp_path, fault)
    with pytest.raises(UserError, match=r"(missing|adapter)"):
        OPENERS[opener](folder)


DAMAGED = {
    "zeros": zeros,
    "empty": lambda f: (f / "model.safetensors").write_bytes(b""),
    "seven bytes": lambda f: (f / "model.safetensors").write_bytes(b"1234567"),
    "not JSON": headed(b"{" * 9),
    "not UTF-8": headed(b"\xff" * 9),
    "too deep": headed(b"[" * 100_000),
    "a list": headed(b"[1]"),
    "a number": headed(b'{"x": 3}'),
    "no offsets": headed(b'{"x": {"dtype": "F32"}}'),
    "offsets of text": headed(b'{"x": {"data_offsets": ["a", "b"]}}'),
    "one offset": headed(b'{"x": {"data_offsets": [3]}}'),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_header_is_one_line(
    name: str, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = copied(world, tmp_path, DAMAGED[name])
    with pytest.raises(UserError, match=r"model\.safetensors is cut off or damaged; copy or"):
        check_files(str(folder))
    monkeypatch.setattr(provenance, "WHOLE", 0)
    weights_digest(str(folder))  # a journal's digest comes first, and leaves it to the check


@pytest.mark.parametrize("content", [b"{", b"\xff{}", b'{"max_new_tokens": -5}'])
def test_a_damaged_generation_config_is_one_line(world: Path, tmp_path: Path, content) -> None:
    file = tmp_path / "generation_config.json"
    file.write_bytes(content)
    for use in (check_savable, listed_ends):
        with pytest.raises(UserError, match=r"generation_config\.json cannot be used") as error:
            use(str(tmp_path))
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"num_hidden_layers": 3}, "must be equal to the number of `layer_types`"),
        ({"max_position_embeddings": "x"}, "expected int, got str"),
        ({"num_attention_heads": 0}, "division or modulo by zero"),
        ({"quantization_config": "x"}, "no attribute 'to_dict'"),
    ],
)
def test_a_config_with_values_that_do_not_fit_is_one_line(
    world: Path, tmp_path: Path, changes: dict[str, Any], reason: str
) -> None:
    """Those of another version of transformers are among them."""
    folder = copied(world, tmp_path, lambda f: edit(f / "config.json", **changes))
    with pytest.raises(UserError, match=rf"no model at .*{reason}") as error:
        load_policy(str(folder), torch.float32)
    assert "\n" not in str(error.value)
    with contextlib.suppress(UserError):  # the tokenizer's class reads config.json as well
        load_tokenizer(str(folder))


@pytest.mark.parametrize("content", ["[]", "3", "null", "[" * 100_000])
def test_a_config_that_is_not_one_is_one_line(world: Path, tmp_path: Path, content: str) -> None:
    folder = copied(world, tmp_path, lambda f: (f / "config.json").write_text(content))
    for use in (load_tokenizer, check_files):
        with pytest.raises(UserError) as error:
            use(str(folder))
        assert "\n" not in str(error.value)


def test_hidden_files_of_other_programs_are_ignored(world: Path, tmp_path: Path) -> None:
    """macOS writes a file ._name beside each file on a foreign disk or in an archive."""
    folder = copied(world, tmp_path, lambda _: None)
    before = model_digest(str(folder))
    for name in ("._model.safetensors", "._pytorch_model.bin", "._tokenizer.json"):
        (folder / name).write_bytes(b"\0\5\26\7")
    check_files(str(folder))
    assert model_digest(str(folder)) == before


def test_an_unreadable_weight_file_is_named(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = copied(world, tmp_path, no_file)
    with pytest.raises(UserError, match=r"model\.safetensors cannot be read .*its permissions"):
        check_files(str(folder))
    whole = Path.open

    def closed(path: Path, *how: Any) -> Any:  # root, who may run the tests, may read anything
        if path.suffix == ".safetensors":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return whole(path, *how)

    monkeypatch.setattr(Path, "open", closed)
    for look in (check_files, weights_digest):
        with pytest.raises(UserError, match=r"base/model\.safetensors cannot be read .*; check"):
            look(str(world / "base"))


@pytest.mark.parametrize("name", ["down_proj", "k_proj", "norm", "lm_head"])
def test_a_missing_weight_is_refused_before_vllm_opens(
    name: str, world: Path, tmp_path: Path
) -> None:
    """vLLM leaves a missing matrix at random values, or a part of a fused one."""
    fault = partial(renamed, rename=lambda key: None if name in key else key)
    folder = copied(world, tmp_path, fault)
    with pytest.raises(UserError, match=rf"do not fit its config.json: \d missing .*{name}"):
        engine_of(folder, engine="vllm")


@pytest.mark.vllm
def test_vllm_itself_reads_no_pickle(world: Path, tmp_path: Path) -> None:
    """For a name on the hub only vLLM sees the files: here our own checks are skipped.

    The process is another one, because a failed start of vLLM leaves a process group behind.
    """
    folder = Path(shutil.copytree(world / "speaks", tmp_path / "model"))
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    more = ("engine=vllm", "skip_model_check=true", f"model_name_or_path={folder}")
    done = run(
        "python", "evaluate.py", *settings("evaluate", world, tmp_path / "o", *more), check=False
    )
    assert done.returncode == 2, done.stderr
    last = done.stderr.splitlines()[-1]
    assert re.match(r"error: vLLM cannot open .*annot find any model weights", last)


def test_checks_can_be_skipped(world: Path, tmp_path: Path) -> None:
    folder = copied(world, tmp_path, FAULTS["a weight is missing"][0])
    engine_of(folder, skip_model_check=True).close()
    load_policy(str(folder), torch.float32, check=False)


def test_only_vllm_reads_quantised_weights(world: Path, tmp_path: Path) -> None:
    folder = copied(world, tmp_path, FAULTS["quantised"][0])
    check_files(str(folder), quantized=True)
    with pytest.raises(UserError, match="gptq"):
        check_files(str(folder))


# ---- Families ----


@pytest.mark.parametrize("name", FAMILIES)
def test_the_table_of_families_is_up_to_date(name: str) -> None:
    assert model_matrix.row(name) in (ROOT / "docs/models.md").read_text(encoding="utf-8")


def test_the_table_holds_no_other_lines() -> None:
    lines = (ROOT / "docs/models.md").read_text(encoding="utf-8").splitlines()
    assert len([line for line in lines if line.startswith("| ")]) == 1 + len(FAMILIES)


PLAIN = {"scale": "Granite", "bias": "Phi", "cap": "Gemma 2"}


@pytest.mark.parametrize("part", PLAIN)
def test_a_head_that_is_only_a_matrix_is_found(part: str, monkeypatch: Any) -> None:
    """The comparison fails where a part of the head is left out."""
    without = {"scale": 1.0, "bias": None, "cap": None}[part]

    def bare(model: PreTrainedModel) -> Any:
        return SimpleNamespace(**vars(logit_head(model)) | {part: without})

    monkeypatch.setattr(logprobs, "logit_head", bare)
    with pytest.raises(UserError, match="is not supported by the trainer: its log-probs are"):
        check_policy(prepare(build(FAMILIES[PLAIN[part]])), VOCABULARY)


IGNORED = {"sliding_window": "Mistral", "s_aux": "gpt-oss", "softcap": "Gemma 2"}


@pytest.mark.parametrize("argument", IGNORED)
def test_attention_that_ignores_an_argument_is_found(argument: str, monkeypatch: Any) -> None:
    """Trainer and engine: as they were before windows, sinks and caps were read."""
    family = FAMILIES[IGNORED[argument]]

    def deaf(function: Any) -> Any:
        return lambda *args, **more: function(*args, **more | {argument: None})

    packed = deaf(attention._packed_attention)
    monkeypatch.setitem(attention.AttentionInterface._global_mapping, attention.ATTENTION, packed)
    with pytest.raises(UserError, match="is not supported by the trainer"):
        check_policy(prepare(build(family)), VOCABULARY)
    monkeypatch.setattr(slots, "grouped_attention", deaf(slots.grouped_attention))
    with pytest.raises(UserError, match=r"is not supported by the transformers engine"):
        model_matrix.engine_hf(build(family))


def test_a_long_window_is_compared_in_short_sequences() -> None:
    """Mistral's 4,096 tokens are narrowed while it is compared, and come back."""
    model = build(FAMILIES["Mistral"])
    model.config.sliding_window = 4096
    check_policy(prepare(model), VOCABULARY)
    assert model.config.sliding_window == 4096


@pytest.mark.parametrize("place", model_matrix.PLACES)
def test_half_precision_is_compared_in_float32(place: str) -> None:
    """Its own noise would hide a wrong model; the weights come back bit for bit."""
    model = build(FAMILIES["Gemma 3"]).to(torch.bfloat16)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model_matrix.PLACES[place](model)
    after = model.state_dict()
    assert {tensor.dtype for tensor in after.values()} == {torch.bfloat16}
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    with pytest.raises(UserError, match="is not supported by the"):
        model_matrix.PLACES[place](build(FAMILIES["Qwen3-Next"]).to(torch.bfloat16))


def test_weights_that_are_not_numbers_are_found() -> None:
    model = build(FAMILIES["Qwen2"])
    model.get_output_embeddings().weight.data[3] = torch.nan
    with pytest.raises(UserError, match="log-probs are nan off"):
        check_policy(prepare(model), VOCABULARY)


def test_a_reward_model_that_sees_padding_is_found() -> None:
    model = build(FAMILIES["Qwen2"])
    check_padding(model)
    model.config.is_causal = False
    for layer in model.base_model.layers:
        layer.self_attn.is_causal = False
    model.base_model.forward = lambda input_ids, **_: SimpleNamespace(  # looks ahead
        last_hidden_state=model.get_input_embeddings()(input_ids).flip(1).cumsum(1).flip(1)
    )
    with pytest.raises(UserError, match="process reward model: its hidden states"):
        check_padding(model)


# ---- Dropout ----


@pytest.mark.parametrize("checkpointing", [False, True])
def test_scores_have_no_dropout(checkpointing: bool, tmp_path: Path) -> None:
    """GPT-2 has dropout of 0.1; with checkpointing, too, two scores of a batch are equal."""
    build(FAMILIES["GPT-2"]).save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).resid_pdrop == 0.1
    policy = load_policy(str(tmp_path), torch.float32, gradient_checkpointing=checkpointing)
    critic = load_critic(str(tmp_path), torch.float32, gradient_checkpointing=checkpointing)
    for model in (policy, critic.backbone):
        dropouts = [m for m in model.modules() if isinstance(m, torch.nn.Dropout)]
        assert dropouts
        assert not any(m.training for m in dropouts)
    check_policy(policy, VOCABULARY)
    assert isinstance(critic, Critic)


def test_layers_are_checkpointed_without_dropout(monkeypatch: Any) -> None:
    model = prepare(tiny_model(), gradient_checkpointing=True)
    layers = [m for m in model.modules() if getattr(m, "gradient_checkpointing", False) is True]
    assert len([m for m in layers if m.training]) == model.config.num_hidden_layers
    assert not model.training


# ---- Tokenizers and prompts ----


def test_a_tokenizer_that_loses_spaces_is_found(world: Path) -> None:
    tokenizer = load_tokenizer(str(world / "base"))
    check_text(tokenizer)
    tokenizer.backend_tokenizer.decoder = decoders.Replace("Ġ", "")
    with pytest.raises(UserError, match=r"loses text: 'What is 2\+2\? .* is 'Whatis2\+2\?"):
        check_text(tokenizer)


def test_ids_are_bounded_by_the_largest_one(world: Path, tmp_path: Path) -> None:
    folder = copied(world, tmp_path, with_hole)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert vocabulary_size(tokenizer) > len(tokenizer)
    assert vocabulary_size(tokenizer) == max(tokenizer.get_vocab().values()) + 1
    whole = AutoTokenizer.from_pretrained(world / "base")
    new = add_function_tokens(whole)
    check_free(whole, new)
    assert vocabulary_size(whole) == len(whole)


def test_a_system_prompt_does_not_hide_the_question(world: Path) -> None:
    tokenizer = load_tokenizer(str(world / "base"))
    check_question(tokenizer, lambda question: question_messages(question, "Think."))


# ---- Ends of a turn ----


def two_ends(folder: Path) -> None:
    """The tokenizer's EOS is not what the template ends a turn with; the list has both."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    end = tokenizer.eos_token
    templated(folder, lambda text: text.replace("eos_token", f"'{end}'"))
    edit(folder / "tokenizer_config.json", eos_token=tokenizer.pad_token)
    listed = [tokenizer.convert_tokens_to_ids("<|user|>"), tokenizer.pad_token_id]
    edit(folder / "generation_config.json", eos_token_id=listed)


def test_a_reply_ends_with_any_of_its_ends(world: Path, tmp_path: Path) -> None:
    end = AutoTokenizer.from_pretrained(world / "speaks").eos_token_id
    folder = copied(world, tmp_path, two_ends, "speaks")
    tokenizer = load_tokenizer(str(folder))
    user = tokenizer.convert_tokens_to_ids("<|user|>")
    assert tokenizer.eos_token_id == tokenizer.pad_token_id != end
    assert turn_end(tokenizer) == end
    assert reply_ends(tokenizer, str(folder)) == (tokenizer.pad_token_id, user, end)
    assert end_ids(tokenizer, [10**6, -1]) == (tokenizer.pad_token_id, end)


def test_generation_stops_at_each_end(world: Path, tmp_path: Path) -> None:
    folder = copied(world, tmp_path, two_ends, "speaks")
    tokenizer, engine = load_tokenizer(str(folder)), engine_of(folder)
    ends = reply_ends(tokenizer, str(folder))
    others = [i for i in range(vocabulary_size(tokenizer)) if i not in ends]
    for end in ends:
        banned = tuple(i for i in (*others, *ends) if i != end)
        sampling = Sampling(5, 1.0, stop_ids=ends, banned_ids=banned)
        completion = asyncio.run(engine.generate([3, 4, 5], sampling))
        assert (completion.token_ids, completion.finish) == ((end,), "stop")


def test_the_warm_up_learns_the_templates_end(world: Path, tmp_path: Path) -> None:
    end = AutoTokenizer.from_pretrained(world / "base").eos_token_id
    tokenizer = load_tokenizer(str(copied(world, tmp_path, two_ends)))
    add_function_tokens(tokenizer)
    limits = {"system_prompt": None, "mask_wrong": False, "functional": True, "max_length": 200}
    rows, _ = load_rows(str(world / "rows.jsonl"), tokenizer, **limits)  # type: ignore[arg-type]
    assert {response[-1] for [(_, response, _)] in rows} == {end}


def test_without_an_end_in_the_template_eos_is_learnt(world: Path) -> None:
    tokenizer = load_tokenizer(str(world / "base"))
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}\n{% endfor %}"
    assert turn_end(tokenizer) is None
    assert end_ids(tokenizer, ()) == (tokenizer.eos_token_id,)


# ---- Lengths, types, exports ----


@pytest.mark.parametrize("script", ["train_rl", "evaluate", "search"])
def test_no_model_is_longer_than_its_positions(script: str, world: Path, tmp_path: Path) -> None:
    folder = copied(
        world, tmp_path, lambda f: edit(f / "config.json", max_position_embeddings=32), "speaks"
    )
    more = [f"model_name_or_path={folder}"]
    arguments = settings(script, world, tmp_path / "out", *more)
    config = load_config(doctor.schema_of(arguments), arguments)
    with pytest.raises(UserError, match=r"max_model_len=\d+ is beyond the 32 positions"):
        doctor.model(config)


def test_positions_may_be_stretched() -> None:
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
    rope = {"rope_parameters": yarn | {"rope_theta": 10000.0}}
    config = AutoConfig.for_model("qwen2", max_position_embeddings=32, **rope)
    check_context("m", config, 128)
    with pytest.raises(UserError, match="max_model_len=129 is beyond the 128 positions of m"):
        check_context("m", config, 129)
    check_context("m", AutoConfig.for_model("bloom"), 10**6)  # ALiBi has no positions


@pytest.mark.parametrize("kind", ["longrope", "dynamic"])
def test_positions_end_where_a_longer_sequence_would_change_a_shorter_one(kind: str) -> None:
    """Phi-3's 128k models: beyond 4,096 tokens every position of the batch is another one."""
    rope = {"rope_type": kind, "factor": 4.0, "original_max_position_embeddings": 14}
    rope |= {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4} if kind == "longrope" else {}
    n_positions = {"longrope": 64, "dynamic": 14}[kind]  # as the configurations name them
    changes = {"rope_parameters": rope | {"rope_theta": 10000.0}}
    changes |= {"max_position_embeddings": n_positions, "original_max_position_embeddings": 14}
    family = Family("phi3" if kind == "longrope" else "llama", GATED | changes)
    for place in model_matrix.PLACES:  # the two sequences have 17 and 11 tokens
        assert "its log-probs are" in str(model_matrix.refusal(family, place))
    config = AutoConfig.for_model(family.kind, **SIZES | family.changes)
    check_context("m", config, 14)
    with pytest.raises(UserError, match=r"beyond the 14 positions of m .more would rescale those"):
        check_context("m", config, 15)
    check_context("m", config, 56, one_scale=True)
    check_rows("m", config, [14])
    with pytest.raises(UserError, match="has 15 tokens, m only 14 positions"):
        check_rows("m", config, [15])


def test_an_export_names_the_type_of_its_tensors(world: Path, tmp_path: Path) -> None:
    model = load_policy(str(world / "base"), torch.float32)
    tokenizer = load_tokenizer(str(world / "base"))
    with process_group("cpu") as one_rank:
        export_hf(model, tokenizer, tmp_path, one_rank, "bfloat16")
    [kind] = {tensor.dtype for tensor in load_file(tmp_path / "model.safetensors").values()}
    assert (str(kind), json.loads((tmp_path / "config.json").read_text())["dtype"]) == (
        "torch.bfloat16", "bfloat16",
    )  # fmt: skip
    opened = open_model(AutoModelForCausalLM, str(tmp_path), torch.float32)
    assert not opened.training


def test_a_good_model_passes_in_every_script(world: Path, tmp_path: Path) -> None:
    for script in ("train_rl", "evaluate", "search"):
        arguments = settings(script, world, tmp_path / "out")
        config = load_config(doctor.schema_of(arguments), arguments)
        assert doctor.model(config).level == "ok"
    config = load_config(RLConfig, settings("train_rl", world, tmp_path, "skip_model_check=true"))
    assert doctor.model(config).level == "warn"
    open_tokenizer(config)


# ---- Saving ----


def test_what_fails_at_saving_ends_a_training_before_its_first_step(
    world: Path, tmp_path: Path
) -> None:
    """Also where the checks of the model are off."""
    folder = copied(world, tmp_path, FAULTS["temperature without do_sample"][0])
    more = [f"model_name_or_path={folder}", f"train_file={world / 'rows.jsonl'}"]
    arguments = settings("train_sft", world, tmp_path / "out", *more, "skip_model_check=true")
    with pytest.raises(UserError, match=r"the model cannot be saved .*; correct"):
        train_sft.main(load_config(SFTConfig, [*arguments, "dtype=float32"]))
    assert (tmp_path / "out/metrics.jsonl").read_text() == ""
    assert not list((tmp_path / "out").glob(".try-*"))


@pytest.mark.parametrize("name", ["hf", "checkpoints", "samples"])
def test_a_file_where_a_folder_will_be_written_is_found_first(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("x")
    with pytest.raises(UserError, match=rf"{name} must be a folder, but is a file; remove it"):
        try_saving(tiny_model(), build_tokenizer(), tmp_path)


def test_trying_to_save_leaves_nothing(tmp_path: Path) -> None:
    try_saving(tiny_model(), build_tokenizer(), tmp_path)
    assert list(tmp_path.iterdir()) == []
