"""Test the self-improvement loop: expressions, the kept model, and real runs that are killed."""

import json
import shutil
import signal
import subprocess
from pathlib import Path
from random import Random

import pytest
from conftest import ENV, ROOT, run, wait_until
from hypothesis import given, settings
from hypothesis import strategies as st

from rftt.run.config import SFTConfig, load_config
from rftt.run.files import Journal, read_jsonl, write_jsonl
from rftt.types import UserError
from tools.self_improve import (
    MAX_VALUE,
    LoopConfig,
    arguments,
    best_of,
    check_steps,
    is_done,
    iterate,
    made_from,
    rounds_table,
    value_at,
)

# ---- Expressions ----


@pytest.mark.oracle
@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("min(0.7 + 0.1*iter, 0.9)", [0.7, 0.8, 0.9, 0.9]),
        ("0.7 + 0.1*iter", [0.7, 0.8, 0.9, 1.0]),
        ("max(8 // 2**iter, 3)", [8, 4, 3, 3]),
        ("-(iter - 3) % 2", [1, 0, 1, 0]),
        ("1e-4", [1e-4] * 4),
        (" 5e-7 / (iter + 1)", [5e-7, 2.5e-7, 5e-7 / 3, 1.25e-7]),
    ],
)
def test_loop_expressions(text: str, values: list[float]) -> None:
    found = [value_at("search.temperature", text, i) for i in range(4)]
    assert found == pytest.approx(values)
    assert [type(x) for x in found] == [type(x) for x in values]  # counts stay whole numbers


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("__import__('os').system('true')", "is not supported"),
        ("().__class__", "is not supported"),
        ("iter.real", "is not supported"),
        ("abs(iter)", "is not supported"),
        ("min()", "is not supported"),
        ("max(1, key=iter)", "is not supported"),
        ("max(*(1, 2))", "is not supported"),
        ("[x for x in iter]", "is not supported"),
        ("1 if iter else 2", "is not supported"),
        ("lambda: 1", "is not supported"),
        ("True", "is not supported"),
        ("1j", "is not supported"),
        ("'a' * 9", "is not supported"),
        ("~iter", "is not supported"),
        ("1 << 9", "is not supported"),
        ("iteration", "is not supported"),
        ("x := 1", "does not parse"),
        ("1 +", "does not parse"),
        ("", "does not parse"),
        ("(" * 90 + ")" * 90, "longer than 100 characters"),
        ("9**9**9", "9 ** 387420489 is out of bounds"),
        ("(0 - 8)**0.5", "out of bounds"),
        ("10**60", "out of bounds"),
        ("1e999", "out of bounds"),
        ("1e999 - 1e999", "out of bounds"),
        ("1 / iter", "division by zero"),
        ("0 ** (iter - 1)", "negative power"),
    ],
)
def test_loop_expressions_that_are_none_name_their_key(text: str, reason: str) -> None:
    with pytest.raises(UserError, match=r"^search\.simulations: ") as caught:
        value_at("search.simulations", text, 0)
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


WORDS = """iter 1 7 0.1 1e9 9e9 + - * / // % ** ( ) , min( max( min(1, . [ ] { } : = == ' " # x os
lambda __import__ exec eval yield await 1j True None not and if else for in f'{1}' 'a' := ; ~ @ ->
é ² 10**9 0x1f 1_0 *iter"""
PIECES = [*WORDS.split(), " ", "\n", "\0", "\\", "\ud800"]


@pytest.mark.invariant
@pytest.mark.filterwarnings("ignore::SyntaxWarning")
@settings(max_examples=400, deadline=None)
@given(st.one_of(st.lists(st.sampled_from(PIECES), max_size=14).map("".join), st.text()))
def test_loop_expressions_are_a_bounded_number_or_one_clear_error(text: str) -> None:
    message, value = "key: ", 0
    try:
        value = value_at("key", text, 3)
    except UserError as error:
        message = str(error)
    assert message.startswith("key: ")
    assert "\n" not in message
    assert type(value) in (int, float)
    assert abs(value) <= MAX_VALUE


# ---- Settings of a step ----

YAML = "configs/tiny/self_improve.yaml"


def config(*arguments: str) -> LoopConfig:
    return load_config(LoopConfig, [str(ROOT / YAML), *arguments])


def test_loop_settings_follow_the_iteration_and_keep_the_rest() -> None:
    cfg = config("search.temperature=0.5*iter", "search.max_problems=10*(iter + 1)", "seed=7")
    for n in (1, 3):
        given = arguments(cfg, "search", n, {"output_dir": "a b: c"})
        assert given[0] == "configs/tiny/search.yaml"
        assert f"temperature={0.5 * (n - 1)}" in given
        assert f"max_problems={10 * n}" in given
        assert f"seed={7 + n}" in given
        assert "method=sample" in given
        assert "output_dir=a b: c" in given
    assert "seed=7" in arguments(cfg, "evaluate", 3, {})  # the same draws for every model
    assert "seed=5" in arguments(config("search.seed=5"), "search", 2, {})


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        (
            "search.temperatur3=1",
            r"search, iteration 1: .*'temperatur3'.* Did you mean 'temperature'",
        ),
        ("search.simulations=8/3", r"`simulations` must be an integer.*, got '2.66"),
        (
            "search.simulations=2 - iter",
            r"search, iteration 3: `simulations` must .* 1, got 0",
        ),
        (
            "train.learning_rate=fast",
            r"train\.learning_rate: 'fast' must be a number or an",
        ),
        ("train.loss_of=1", r"train, iteration 1: .*unknown key 'loss_of'"),
        ("seed.x=1", r"`seed` must be an integer"),
        ("iterate_from=best", r"must be one of base, last, last_full_state, got 'best'"),
        ("search=8", r"`search` must be a mapping, got '8'"),
        ("guard_files=[a/test.jsonl]", r"must have distinct names"),
        ("search.output_dir=mine", r"search\.output_dir must not be set, because the loop"),
        (
            "train.initial_state=mine",
            r"train\.initial_state must not be set, because the loop",
        ),
        (
            "evaluate.eval_file=mine",
            r"evaluate\.eval_file must not be set, because the loop",
        ),
        ("evaluate.num_samples=0; metric=sampled", r"num_samples of at least 1"),
    ],
)
def test_loop_refuses_a_bad_setting_before_anything_runs(argument: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        check_steps(config(*argument.split("; ")))
    assert "\n" not in str(caught.value)


# ---- What is kept, with steps that only write what they would find ----


def imagined(tmp_path: Path, accuracy: list[tuple[float, float]], asked: list[dict]):
    """A `Run` whose models answer these shares of ten target and ten guard problems."""

    def run(n: int, step: str, name: str, chosen: dict) -> Path:
        folder = tmp_path / f"iteration_{n}" / name
        asked.append({"n": n, "step": step} | chosen)
        if step == "search":
            write_jsonl(folder / "data" / "sft.jsonl", [{"id": "a"}] * n)
        elif step == "train":
            (folder / "checkpoints" / "step_000002").mkdir(parents=True)
            (folder / "checkpoints" / "step_000002" / "COMPLETE").touch()
        else:
            share = accuracy[n][chosen["eval_file"].endswith("guard.jsonl")]
            rows = [
                {"id": f"p{i}", "greedy": {"correct": i < 10 * share}, "samples": []}
                for i in reversed(range(10))
            ]
            write_jsonl(folder / "eval" / f"{name.removeprefix('eval-')}.jsonl", rows)
        return folder

    return run


def play(tmp_path: Path, accuracy: list[tuple[float, float]], *arguments: str):
    cfg, asked = config(f"output_dir={tmp_path}", "guard_max_drop=0.15", *arguments), []
    run, rounds = imagined(tmp_path, accuracy, asked), []
    for n in range(len(accuracy)):
        rounds.append(iterate(cfg, run, n, rounds))
    return cfg, rounds, {(row["n"], row["step"]): row for row in asked}


@pytest.mark.oracle
@pytest.mark.parametrize(
    ("accuracy", "best"),
    [
        ([(0.5, 0.9), (0.6, 0.9), (0.7, 0.8)], 2),
        ([(0.5, 0.9), (0.6, 0.9), (0.9, 0.7)], 1),  # it has forgotten too much
        ([(0.5, 0.9), (0.4, 0.9), (0.4, 0.1)], 0),
        ([(0.5, 0.9), (0.6, 0.9), (0.6, 1.0)], 1),  # the first of equals
    ],
)
def test_loop_keeps_the_best_target_whose_guard_stands(tmp_path, accuracy, best) -> None:
    cfg, rounds, _ = play(tmp_path, accuracy)
    assert best_of(cfg, rounds).iteration == best
    lines = rounds_table(cfg, rounds).splitlines()[2:]
    assert [line.endswith("| best |") for line in lines] == [i == best for i in range(len(lines))]
    gone = [i for i, (_, guard) in enumerate(accuracy) if guard < 0.9 - 0.15]
    assert [i for i, line in enumerate(lines) if "guard fell" in line] == gone


@pytest.mark.oracle
def test_loop_table_shows_paired_changes(tmp_path: Path) -> None:
    cfg, rounds, _ = play(tmp_path, [(0.5, 0.9), (0.8, 0.9)])
    last = rounds_table(cfg, rounds).splitlines()[-1]
    assert last.startswith("| 1 | 1 | 80.0 [49.0, 94.3] | +30.0 [+0.0, +60.0] | 90.0 ")
    assert "| +0.0 [+0.0, +0.0] | best |" in last  # the same nine right: no change, for certain


def test_loop_forgives_a_guard_that_falls_by_just_as_much_as_it_may(tmp_path: Path) -> None:
    """0.9 - 0.6 is 0.30000000000000004 to a computer."""
    cfg, rounds, _ = play(tmp_path, [(0.5, 0.9), (0.6, 0.6)], "guard_max_drop=0.3")
    assert best_of(cfg, rounds).iteration == 1


def test_loop_reads_a_step_with_its_file(tmp_path: Path) -> None:
    """What a step's own config file says counts like a key of the loop's."""
    (tmp_path / "dpo.yaml").write_text("loss: dpo\nlearning_rate: 1e-3\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"search/data/dpo\.jsonl does not exist"):
        play(tmp_path, [(0.5, 0.9), (0.6, 0.9)], f"train={{config: {tmp_path}/dpo.yaml}}")
    (tmp_path / "greedy.yaml").write_text("num_samples: 0\n", encoding="utf-8")
    with pytest.raises(UserError, match="num_samples of at least 1"):
        check_steps(config("metric=sampled", f"evaluate={{config: {tmp_path}/greedy.yaml}}"))


def test_loop_goes_on_from_what_it_was_told(tmp_path: Path) -> None:
    fell = [(0.5, 0.9), (0.6, 0.9), (0.9, 0.1), (0.7, 0.9)]
    base, one, two = "outputs/tiny/base", *(
        str(tmp_path / f"iteration_{n}" / "train" / "hf") for n in (1, 2)
    )  # fmt: skip
    for option, source in (("warn", two), ("roll_back", one)):
        for start in ("base", "last", "last_full_state"):
            shutil.rmtree(tmp_path, ignore_errors=True)
            chosen = f"on_guard_drop={option}", f"iterate_from={start}"
            _, _, asked = play(tmp_path, fell, *chosen)
            assert asked[3, "search"]["model_name_or_path"] == source
            train = asked[3, "train"]
            assert train["model_name_or_path"] == (base if start == "base" else source)
            state = str(Path(source).parent / "checkpoints" / "step_000002")
            assert train.get("initial_state") == (state if start == "last_full_state" else None)
            assert asked[1, "train"]["model_name_or_path"] == base


# ---- Real models ----


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that is often right about which of two digits is larger, and problems for it."""
    import torch

    from rftt.prompts import question_messages
    from tools.tiny_world import Pair, TinyConfig, build_tokenizer, train_model

    out, rng = tmp_path_factory.mktemp("loop"), Random(0)

    def problem() -> dict[str, str]:
        a, b = rng.sample(range(1, 10), 2)
        word, answer = rng.choice([("larger", max(a, b)), ("smaller", min(a, b))])
        return {"problem": f"Which is {word}, {a} or {b}?", "answer": str(answer)}

    def pair() -> Pair:
        row = problem()
        return Pair(question_messages(row["problem"]), f"So \\boxed{{{row['answer']}}}.")

    for name in ("train", "test", "guard"):
        write_jsonl(out / f"{name}.jsonl", [problem() | {"id": f"{name}-{i}"} for i in range(24)])
    tokenizer = build_tokenizer()
    tiny = TinyConfig(output_dir=str(out), train_steps=30)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # many threads on small matrices wait for each other
    model = train_model(tiny, tokenizer, iter(pair, None))
    torch.set_num_threads(threads)
    for part in (model, tokenizer):
        part.save_pretrained(out / "base")
    return out


def loop_command(world: Path, name: str, *arguments: str) -> list[str]:
    return [
        "python", "tools/self_improve.py", YAML, f"model_name_or_path={world / 'base'}",
        f"output_dir={world / name}", f"target_file={world / 'test.jsonl'}",
        f"guard_files=[{world / 'guard.jsonl'}]", "iterations=2", "evaluate.num_samples=1",
        "guard_max_drop=1",
        f"search.train_file={world / 'train.jsonl'}", "search.problems_in_flight=2",
        "search.simulations=2", "train.train_batch_size=8", *arguments,
    ]  # fmt: skip


@pytest.mark.slow
def test_loop_killed_in_iteration_2_ends_in_the_same_table(world: Path) -> None:
    unbroken, killed = world / "unbroken", world / "killed"
    done = run(*loop_command(world, "unbroken"))
    text = (unbroken / "table.md").read_text()
    assert text in done.stdout
    assert text.count("\n") == 5
    best = json.loads((unbroken / "best.json").read_text())
    assert (Path(best["model"]) / "config.json").is_file()
    steps = [f"{row['iteration']} {row['step']}" for _, row in read_jsonl(unbroken / "steps.jsonl")]
    per_iteration = ["search", "train", "eval-test", "eval-guard"]
    assert steps == [
        "0 eval-test",
        "0 eval-guard",
        *(f"{n} {s}" for n in (1, 2) for s in per_iteration),
    ]

    shutil.copytree(unbroken, killed)
    shutil.rmtree(killed / "iteration_2")
    write_jsonl(killed / "steps.jsonl", [row for _, row in read_jsonl(killed / "steps.jsonl")][:6])
    command = loop_command(world, "killed")
    process = subprocess.Popen(command, cwd=ROOT, env=ENV, stderr=subprocess.DEVNULL)
    journal = killed / "iteration_2" / "search" / "data" / "raw.jsonl"
    wait_until(journal.exists, process)
    process.send_signal(signal.SIGKILL)  # its search.py lives on
    assert process.wait() == -signal.SIGKILL
    again = run(*command)
    assert "== iteration 1" not in again.stdout  # nothing twice
    assert (killed / "table.md").read_text() == text
    assert len(read_jsonl(killed / "iteration_2" / "search" / "data" / "raw.jsonl")) == 24


@pytest.mark.slow
def test_loop_names_the_step_that_failed(world: Path) -> None:
    done = run(*loop_command(world, "failed", "target_file=nowhere.jsonl"), check=False)
    assert done.returncode == 2
    line = "error: iteration 0: eval-nowhere: nowhere.jsonl does not exist; check the path.\n"
    assert done.stderr.endswith(line)
    write_jsonl(world / "ungraded.jsonl", [{"problem": "Which is larger, 3 or 8?"}])
    ungraded = f"target_file={world / 'ungraded.jsonl'}"
    done = run(*loop_command(world, "ungraded", ungraded), check=False)
    assert done.returncode == 2
    assert "ungraded.jsonl:1" in done.stderr
    line = "error: iteration 0: eval-ungraded ended with code 2; correct the error above and "
    assert done.stderr.endswith(f"{line}start the loop again.\n")


@pytest.mark.cases
def test_loop_skips_no_step_that_was_made_from_something_else(world: Path, tmp_path: Path) -> None:
    """Weights, tokenizer, data and the step's own config file count; moving the folder does not."""
    path = shutil.copytree(world, tmp_path / "world", ignore=shutil.ignore_patterns("*killed*"))
    yaml = tmp_path / "evaluate.yaml"
    yaml.write_text((ROOT / "configs/tiny/evaluate.yaml").read_text(), encoding="utf-8")
    cfg = config(
        f"model_name_or_path={path / 'base'}", f"output_dir={tmp_path}", f"evaluate.config={yaml}"
    )
    chosen = {"model_name_or_path": str(path / "base"), "eval_file": str(path / "test.jsonl")}
    row = {"iteration": 0, "step": "eval-test"}
    journal = Journal(tmp_path / "steps.jsonl")
    before = made_from(cfg, "evaluate", 0, chosen)
    assert not is_done(row | {"made_from": before}, journal)
    journal.append(row | {"made_from": before})
    assert is_done(row | {"made_from": made_from(cfg, "evaluate", 0, chosen)}, journal)
    moved = shutil.copytree(path, tmp_path / "moved")
    elsewhere = {key: value.replace(str(path), str(moved)) for key, value in chosen.items()}
    assert is_done(row | {"made_from": made_from(cfg, "evaluate", 0, elsewhere)}, journal)
    files = {
        "data": path / "test.jsonl",
        "weights": path / "base" / "model.safetensors",
        "settings": yaml,
    }
    texts = {"data": b"\n", "weights": b"\0", "settings": b"max_problems: 3\n"}
    for name, file in [*files.items(), ("weights", path / "base" / "tokenizer.json")]:
        whole = file.read_bytes()
        file.write_bytes(whole + texts[name])
        with pytest.raises(UserError, match=f"eval-test of iteration 0 .* other {name} than these"):
            is_done(row | {"made_from": made_from(cfg, "evaluate", 0, chosen)}, journal)
        file.write_bytes(whole)
    old = Journal(tmp_path / "old.jsonl")
    old.append(row)  # from before the digests
    with pytest.raises(UserError, match="other settings and data and weights"):
        is_done(row | {"made_from": before}, old)


@pytest.mark.cases
def test_a_finished_loop_is_not_reported_for_another_base(world: Path, tmp_path: Path) -> None:
    path = shutil.copytree(world, tmp_path / "world")
    done = run(*loop_command(path, "other", "iterations=1", "guard_files=[]"))
    assert "best: iteration" in done.stdout
    with (path / "base" / "model.safetensors").open("r+b") as file:
        file.seek(-4, 2)
        file.write(b"\0\0\0\x3f")  # one weight, as a training into the same folder changes many
    done = run(*loop_command(path, "other", "iterations=1", "guard_files=[]"), check=False)
    assert done.returncode == 2
    assert "eval-test of iteration 0 was made from other weights than these" in done.stderr


@pytest.mark.invariant
def test_loop_full_state_two_trainings_equal_one(world: Path) -> None:
    """Weights and Adam's moments go over: 2 + 2 steps are 4, bit for bit; without them, not."""
    from safetensors.torch import load_file

    import train_sft

    row = {"question": "Which is larger, 3 or 8?", "response": "So \\boxed{8}."}
    write_jsonl(world / "one.jsonl", [row])

    def train(name: str, model: Path, epochs: int, state: Path | None = None) -> Path:
        cfg = SFTConfig(
            model_name_or_path=str(model),
            output_dir=str(world / name),
            train_file=str(world / "one.jsonl"),
            initial_state=str(state) if state else None,
            functional_tokens=False,
            dtype="float32",
            device="cpu",
            learning_rate=1e-3,
            train_batch_size=1,
            num_train_epochs=epochs,
            eval_ratio=0.0,
        )
        train_sft.main(cfg)
        return world / name

    whole = train("whole", world / "base", 4)
    half = train("half", world / "base", 2)
    state = half / "checkpoints" / "step_000002"
    both = train("both", half / "hf", 2, state)
    fresh = train("fresh", half / "hf", 2)
    weights = [load_file(path / "hf" / "model.safetensors") for path in (whole, both, fresh)]
    assert all(bool((weights[0][k] == weights[1][k]).all()) for k in weights[0])
    assert any(bool((weights[0][k] != weights[2][k]).any()) for k in weights[0])
