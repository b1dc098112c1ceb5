"""Reading of configs: types, ranges, text, files, and the one line that a mistake becomes."""

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from rftt.run.config import (
    BOUNDS,
    EvalConfig,
    RLConfig,
    SearchConfig,
    ServeConfig,
    SFTConfig,
    load_config,
    required_keys,
    specs,
)
from rftt.run.files import write_json
from rftt.tokens import ACTS
from rftt.types import UserError
from tools.audit_rows import AuditConfig
from tools.prm_train import PRMTrainConfig
from tools.self_improve import LoopConfig
from tools.tiny_world import TinyConfig

NEEDED = ["output_dir=o", "model_name_or_path=m", "train_file=t", "learning_rate=1e-6"]
SCHEMAS = (
    *(SearchConfig, SFTConfig, RLConfig, EvalConfig),
    *(ServeConfig, LoopConfig, PRMTrainConfig, TinyConfig, AuditConfig),
)


def rl(*arguments: str) -> RLConfig:
    return load_config(RLConfig, [*NEEDED, *arguments])


def refusal(schema: type, *arguments: str) -> str:
    with pytest.raises(UserError) as caught:
        load_config(schema, arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---- Ranges: every case comes from the fields themselves ----


def numbers() -> Iterator[tuple[type, str, dict[str, Any]]]:
    """Every field that is a number or a list of numbers, with the JSON schema of the number."""
    for schema in SCHEMAS:
        for key, spec in specs(schema).items():
            for option in spec.get("anyOf", [spec]):
                number = option.get("items", option)
                if number.get("type") in ("integer", "number"):
                    yield schema, key, number | {"listed": "items" in option}


def outside() -> Iterator[tuple[type, str, str, str]]:
    """(class, key, value just outside a bound, that bound)."""
    for schema, key, spec in numbers():
        step = 1 if spec["type"] == "integer" else 1e-6
        values = {
            "minimum": spec.get("minimum", 0) - step,
            "exclusiveMinimum": spec.get("exclusiveMinimum"),
            "maximum": spec.get("maximum", 0) + step,
            "exclusiveMaximum": spec.get("exclusiveMaximum"),
        }
        for name in BOUNDS.keys() & spec.keys():
            yield schema, key, repr(values[name]), f"{spec[name]:.15g}"
        if spec["type"] == "number":
            yield schema, key, "nan", "finite"
            yield schema, key, "inf", "finite"


@pytest.mark.parametrize("schema", SCHEMAS)
def test_the_value_just_outside_each_bound_is_one_line(schema: type) -> None:
    """The line names the key, the bound and the value."""
    needed = dict.fromkeys(required_keys(schema), "1")
    if schema is LoopConfig:
        needed |= dict.fromkeys(("search", "train", "evaluate"), "{}")
    tried = 0
    for owner, key, value, bound in outside():
        if owner is schema:
            shown = f"[{value}]" if specs(schema)[key].get("type") == "array" else value
            line = refusal(schema, *(f"{k}={v}" for k, v in (needed | {key: shown}).items()))
            assert f"`{key}" in line
            assert bound in line
            assert f"got {value} (on the command line)" in line
            tried += 1
    assert tried > 0


@pytest.mark.cases
def test_every_number_has_a_range() -> None:
    free = [(cls.__name__, key) for cls, key, spec in numbers() if not BOUNDS.keys() & spec.keys()]
    assert free == []


@pytest.mark.cases
@pytest.mark.parametrize(
    ("schema", "argument"),
    [
        (SFTConfig, "max_grad_norm=0"),
        (SFTConfig, "max_grad_norm=-1"),
        (SFTConfig, "eval_ratio=20"),
        (SFTConfig, "num_train_epochs=-1"),
        (SFTConfig, "warmup_ratio=100"),
        (SFTConfig, "learning_rate=nan"),
        (RLConfig, "kl_coef=-0.01"),
        (RLConfig, "gamma=99"),
        (RLConfig, "temperature=nan"),
        (RLConfig, "temperature=0"),
        (RLConfig, "temperature=inf"),
        (RLConfig, "epsilon=-1"),
        (RLConfig, "gpu_memory_utilization=90"),
        (RLConfig, "dual_clip=0.5"),
    ],
)
def test_numbers_that_cannot_be_meant(schema: type, argument: str) -> None:
    key, value = argument.split("=")
    line = refusal(schema, *NEEDED, argument)
    assert line.startswith(f"`{key}` must be ")
    assert line.endswith(f", got {value} (on the command line).")


# ---- Types and text ----


def test_overrides_come_after_the_file_and_keep_their_types(tmp_path: Path) -> None:
    file = tmp_path / "rl.yaml"
    file.write_text("learning_rate: 1e-5\ngamma: 1\nreport_to: [wandb]\nuse_prm: no\n")
    cfg = rl(str(file), "learning_rate=5e-7", "kl_target=0.1", "output_dir=7", "lam=1")
    assert cfg.learning_rate == 5e-7  # YAML itself reads 5e-7 as text
    assert (cfg.kl_target, cfg.report_to, cfg.output_dir) == (0.1, ["wandb"], "7")
    assert (cfg.gamma, cfg.lam, cfg.use_prm) == (1.0, 1.0, False)
    assert isinstance(cfg.lam, float)
    for nothing in ("null", "", "~"):
        assert rl("kl_target=0.1", f"kl_target={nothing}").kl_target is None


@pytest.mark.cases
@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("system_prompt=Solve it. # Rules: be brief", "Solve it. # Rules: be brief"),
        ("system_prompt=Line one.\nLine two.", "Line one.\nLine two."),
        ("system_prompt=Answer in this form: a number", "Answer in this form: a number"),
        ("system_prompt=[INST] be brief", "[INST] be brief"),
        ("system_prompt=[a]", "[a]"),
        ("system_prompt=yes", "yes"),
        ("system_prompt=", ""),
        ("system_prompt=null", None),
        ("prm_good_token= +", " +"),
        ("prm_bad_token=-", "-"),
        ("prm_bad_token=null", "null"),
        ("prm_step_tag=\n\n", "\n\n"),
        ("output_dir=2026-11-25", "2026-11-25"),
        ("output_dir=~/runs", str(Path.home() / "runs")),
        ("model_name_or_path=~/models/a", str(Path.home() / "models/a")),
    ],
)
def test_text_stays_text(tmp_path: Path, argument: str, value: str | None) -> None:
    key, _, text = argument.partition("=")
    assert getattr(rl(argument), key) == value
    if value is not None:  # a quoted scalar in YAML is the same text, and so is one in JSON
        (tmp_path / "a.yaml").write_text(f"{key}: {json.dumps(text)}\n")
        assert getattr(rl(str(tmp_path / "a.yaml")), key) == value


def test_plain_yaml_scalars_of_a_text_field_are_text(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("output_dir: 2026-11-25\nsystem_prompt: 1:30\nprompt_key: no")
    cfg = rl(str(tmp_path / "a.yaml"))
    assert (cfg.system_prompt, cfg.prompt_key, cfg.output_dir) == ("1:30", "no", "2026-11-25")


# ---- Mistakes ----


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        (
            "learning_rat=1",
            "unknown key 'learning_rat' (on the command line). Did you mean 'learning_rate'?",
        ),
        (
            "advantage_estimator=ppo2",
            "`advantage_estimator` must be one of ppo, reinforce++, grpo, tree, got 'ppo2' (on",
        ),
        ("max_steps=many", "`max_steps` must be an integer of at least 1, got 'many' (on the"),
        ("max_steps=1.5", "`max_steps` must be an integer of at least 1, got '1.5' (on the"),
        ("max_steps=null", "`max_steps` must be an integer of at least 1, got None (on the"),
        ("gradient_checkpointing=2", "must be true or false, got '2'"),
        ("learning_rate=fast", "must be a finite number above 0 and at most 1, got 'fast'"),
        ("seed=true", "`seed` must be an integer of at least 0 and at most 4294967295, got 'true'"),
        ("report_to=wandb", "`report_to` must be a list such as [a, b], each item text, got"),
        ("forbidden_acts=[guess]", "`forbidden_acts[0]` must be one of clarify,"),
        ("forbidden_acts=[verify,output]", "`forbidden_acts[1]` must be one of clarify,"),
        ("train_batch_size=48", "256 must be divisible by train_batch_size 48; nearest: 32, 64."),
        ("top_p=0.9", "top_p=0.9 biases the policy ratio; set top_p: 1.0"),
        ("kl_target=0.1 kl_coef=0", "kl_target needs a kl_coef above 0"),
        ("output_dir=", "`output_dir` is not set"),
        ("engine=api", "only search.py supports it. Set engine=hf."),
        (
            "nowhere.yaml",
            "nowhere.yaml does not exist; check the path, or write settings",
        ),
    ],
)
def test_bad_input_is_one_line_that_names_the_fix(argument: str, message: str) -> None:
    assert message in refusal(RLConfig, *NEEDED, *argument.split())


def test_every_act_except_output_may_be_forbidden() -> None:
    acts = list(ACTS[:-1])
    assert ACTS[-1] == "output"
    assert rl(f"forbidden_acts=[{','.join(acts)}]").forbidden_acts == acts


def test_missing_key_is_named() -> None:
    line = refusal(EvalConfig, "output_dir=o", "model_name_or_path=m")
    assert line == "`eval_file` is not set; add it to the file or as eval_file=…."


@pytest.mark.parametrize("keys", ["hard_query_threshold=0.9 easy_query_threshold=0.1"])
def test_a_filter_that_keeps_nothing_is_an_error(keys: str) -> None:
    assert "must not exceed" in refusal(SearchConfig, *NEEDED[:3], "method=sample", *keys.split())


ALIASES = "".join(
    f"{b}: &{b} [{f'*{a},' * 9}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.cases
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"- a list", "must contain `key: value` lines, got a list"),
        (b"a word", "must contain `key: value` lines, got a str"),
        (b"", "is empty; write `key: value` lines"),
        (b"# only a comment\n", "is empty"),
        (b"a: [1", "is not YAML"),
        (b"a: \x00", "is not YAML"),
        (b"? [a]\n: 1", "the key in line 1 must be a name"),
        (b"seed: 1\n\nsede: 2", "unknown key 'sede' ("),
        (b"seed: 1\n\nmax_steps: 0", "line 3)"),
        (b"seed: 1\nlam: 1\nseed: 3", "seed is set twice (line 1, line 3)"),
        (b'{"seed": 1, "seed": 2}', "seed is set twice"),
        (b'{"system_prompt": "\\ud83d"}', "`system_prompt` must be valid Unicode"),
        ("system_prompt: é".encode("latin-1"), "must be UTF-8, but byte 15 is not"),
        ("seed: 1".encode("utf-16"), "must be UTF-8"),
        (b"a: " + b"[" * 5000, "nested too deeply"),
        (b'{"a":' * 9000, "nested too deeply"),
        (b"a: &a [*a]", "nested too deeply"),
        (b"a: &a [x,x,x,x,x,x,x,x,x]\n" + ALIASES.encode(), "expands to more than 10000 values"),
        (b"a: b\n" * 99999, "at most 200000 are allowed"),
    ],
)
def test_a_bad_file_is_one_line(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "rl.yaml").write_bytes(content)
    line = refusal(RLConfig, *NEEDED, str(tmp_path / "rl.yaml"))
    assert message in line
    assert "rl.yaml" in line


@pytest.mark.cases
def test_a_file_that_the_package_wrote_is_read(tmp_path: Path) -> None:
    """write_json, with what YAML would misread, and a byte order mark in front."""
    cfg = rl("system_prompt=\u2028 \x7f 🙂\n# x", "kl_target=0.25", "report_to=[wandb]")
    write_json(tmp_path / "a.yaml", asdict(cfg))
    assert load_config(RLConfig, [str(tmp_path / "a.yaml")]) == cfg
    (tmp_path / "b.yaml").write_text("\ufeffseed: 3\n", encoding="utf-8")
    assert rl(str(tmp_path / "b.yaml")).seed == 3


def test_defaults_are_valid() -> None:
    cfg = rl()
    again = RLConfig(**asdict(cfg))
    assert again == cfg
