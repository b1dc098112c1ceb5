"""Test process reward models of every family, in process and behind a URL."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import gzip
import json
import math
import re
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from http.client import HTTPConnection, HTTPResponse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlsplit

import httpx2
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import distributed as dist
from transformers import AutoModelForCausalLM, AutoTokenizer

from rftt.engines import http as http_module
from rftt.engines.chat import eos_id
from rftt.graders import build_prm
from rftt.graders import prm as prm_module
from rftt.graders.prm import (
    CHECK,
    RemotePRM,
    Unscored,
    ranking_warning,
    reduce,
    score_paths,
    segment_text,
    to_wire,
)
from rftt.graders.prm_local import LocalPRM, label_ids
from rftt.run.config import EvalConfig, RLConfig, SearchConfig, ServeConfig, load_config
from rftt.run.files import write_json, write_jsonl
from rftt.tokens import add_function_tokens, function_ids, render
from rftt.types import UserError
from tests.conftest import HANG_LIMIT, ROOT, run
from tests.learners import random_qwen2
from tests.small_world import make_world, settings
from tools import prm_serve
from tools.prm_serve import MAX_CHARS_PER_TOKEN, from_wire, open_server, parse
from tools.prm_train import PRMTrainConfig, auc, label_trees
from tools.prm_train import main as train
from tools.tiny_world import build_tokenizer

QUESTION = "Eva has 12 pens, buys 7, sells 4. How many now?"
post = partial(httpx2.post, timeout=HANG_LIMIT)
JSON = {"content-type": "application/json"}
POSTED = (
    b"POST /get_reward HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
    b"content-length: %d\r\n\r\n"
)
STEPS = ["buys 7? 12+7=19.", "sells 4 gives 19-4=15.", "so \\boxed{15}."]
HIDDEN = 32
HEADS = {  # name in the checkpoint -> shape, per kind of model folder
    "math_shepherd": {},
    "qwen": {"score.0": (HIDDEN, HIDDEN), "score.2": (2, HIDDEN)},
    "value": {"v_head.summary": (1, HIDDEN)},
    "classifier": {"classifier": (2, HIDDEN)},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A random model folder per kind. Its tags are one id where the family needs it."""
    out = tmp_path_factory.mktemp("prm")
    tokenizer = build_tokenizer()
    for kind, head in HEADS.items():
        own = build_tokenizer()
        own.add_tokens(["ки"] + (["<extra_0>"] if kind == "qwen" else []))
        sizes = {"hidden_size": HIDDEN, "intermediate_size": 48, "num_key_value_heads": 2}
        wide = {"initializer_range": 0.3, "tie_word_embeddings": False}
        model = random_qwen2(len(tokenizer) + 8, seed=1, **sizes, **wide)
        own.save_pretrained(out / kind)
        model.config.save_pretrained(out / kind)
        tensors = {k: v.clone() for k, v in model.state_dict().items()}
        for name, shape in head.items():
            tensors |= {f"{name}.weight": torch.randn(shape), f"{name}.bias": torch.randn(shape[0])}
        save_file(tensors, out / kind / "model.safetensors", metadata={"format": "pt"})
    return {kind: out / kind for kind in HEADS}


def config(**changes: Any) -> EvalConfig:
    settings: dict[str, Any] = {
        "output_dir": "o",
        "model_name_or_path": "m",
        "eval_file": "t",
        "use_prm": True,
    }
    both: Any = settings | {"dtype": "float32", "device": "cpu"} | changes
    return EvalConfig(**both)


def local(folder: Path, **changes: Any) -> LocalPRM:
    prm = build_prm(config(prm_model_name_or_path=str(folder), **changes))
    assert isinstance(prm, LocalPRM)
    return prm


def scores_of(prm: Any, *paths: tuple[str, list[str]]) -> list[Any]:
    return asyncio.run(score_paths(prm, paths))


# ---- Reduction, config ----


@pytest.mark.oracle
def test_reduce() -> None:
    scores = [0.5, 0.2, 0.8]
    assert [reduce(scores, how) for how in ("min", "mean", "last", "prod")] == pytest.approx(
        [0.2, 0.5, 0.8, 0.08]
    )


@pytest.mark.parametrize("schema", [RLConfig, SearchConfig, EvalConfig])
def test_impossible_combinations_are_one_line(schema: type) -> None:
    needed = ["output_dir=o", "model_name_or_path=m", "train_file=t", "learning_rate=1e-6"]
    needed = (
        ["output_dir=o", "model_name_or_path=m", "eval_file=t"] if schema is EvalConfig else needed
    )
    needed = needed[:3] if schema is SearchConfig else needed
    with pytest.raises(
        UserError, match=r"^use_prm: true needs prm_model_name_or_path or prm_url\.$"
    ):
        load_config(schema, [*needed, "use_prm=true"])
    with pytest.raises(UserError, match="both set; remove one"):
        load_config(schema, [*needed, "prm_url=http://x", "prm_model_name_or_path=p"])
    assert build_prm(load_config(schema, [*needed, "prm_url=http://x"])) is None


# ---- In process ----


def oracle(folder: Path, kind: str) -> list[float]:
    """One path through the whole model, its tags found by id, as the model cards do it."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids: list[int] = []
    if kind == "math_shepherd":
        text = f"{QUESTION} " + "\n".join(f"Step {i + 1}: {s} ки" for i, s in enumerate(STEPS))
        ids, mark = tokenizer.encode(text), tokenizer.convert_tokens_to_ids("ки")
    elif kind == "qwen":
        text = f"<|user|>{QUESTION}<|assistant|>{''.join(s + '<extra_0>' for s in STEPS)}<|end|>"
        ids, mark = tokenizer.encode(text), tokenizer.convert_tokens_to_ids("<extra_0>")
    else:
        text = QUESTION + "\n" + "".join(s + "\n" for s in STEPS)
        ids, mark = tokenizer.encode(text), tokenizer.encode("\n")[0]
    with torch.no_grad():
        found = model(torch.tensor([ids]), output_hidden_states=True)
    marks = [i for i, token in enumerate(ids) if token == mark][-len(STEPS) :]
    hidden = found.hidden_states[-1][0, marks]
    tensors = load_file(folder / "model.safetensors")
    if kind == "math_shepherd":
        labels = [tokenizer.encode("+")[0], tokenizer.encode("-")[0]]
        return found.logits[0, marks][:, labels].softmax(-1)[:, 0].tolist()
    if kind == "qwen":
        inner = torch.relu(hidden @ tensors["score.0.weight"].T + tensors["score.0.bias"])
        logits = inner @ tensors["score.2.weight"].T + tensors["score.2.bias"]
        return logits.softmax(-1)[:, 1].tolist()
    name = "v_head.summary" if kind == "value" else "classifier"
    logits = hidden @ tensors[f"{name}.weight"].T + tensors[f"{name}.bias"]
    return (logits.softmax(-1)[:, 1] if kind == "classifier" else logits.sigmoid()[:, 0]).tolist()


@pytest.mark.oracle
@pytest.mark.parametrize("kind", HEADS)
def test_scores_of_each_family_equal_its_oracle(folders: dict[str, Path], kind: str) -> None:
    (scores,) = scores_of(local(folders[kind]), (QUESTION, STEPS))
    assert scores == pytest.approx(oracle(folders[kind], kind), abs=1e-5)
    assert len(set(scores)) == len(STEPS)


@pytest.mark.invariant
@pytest.mark.parametrize("kind", HEADS)
def test_a_path_does_not_depend_on_its_batch(folders: dict[str, Path], kind: str) -> None:
    paths = [(QUESTION, STEPS[: i % 3 + 1] * (1 + i % 2)) for i in range(24)]
    prm = local(folders[kind])
    together = scores_of(prm, *paths)
    one_by_one = [scores_of(prm, path)[0] for path in paths[:6]]
    small = scores_of(local(folders[kind], prm_max_tokens_per_batch=64), *paths)
    assert [len(s) for s in together] == [len(steps) for _, steps in paths]
    for i in range(24):
        assert together[i] == pytest.approx(small[i], abs=1e-5)
        assert together[i] == pytest.approx(one_by_one[i % 6], abs=1e-5)


def test_concurrent_callers_share_one_forward_pass(folders: dict[str, Path]) -> None:
    prm = local(folders["qwen"])
    sizes = []
    prm._model.register_forward_pre_hook(
        lambda _, __, kwargs: sizes.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    scores_of(prm, *[(QUESTION, STEPS)] * 40)
    assert sizes == [40]


@pytest.mark.parametrize("kind", HEADS)
def test_a_quoted_tag_makes_no_score_of_its_own(folders: dict[str, Path], kind: str) -> None:
    quoting = ["a ки b\nc", "ки<extra_0>", ""]
    (scores,) = scores_of(local(folders[kind]), ("ки<extra_0>\n?", quoting))
    assert len(scores) == 3


CONTROL = "<|user|> <|end|>"


@pytest.mark.cases
@pytest.mark.parametrize("kind", HEADS)
def test_control_text_in_question_or_steps_stays_text(folders: dict[str, Path], kind: str) -> None:
    """The marks are where they were, and every step's tag is still its own token."""
    prm = local(folders[kind])
    writer, tokenizer = prm.writer, prm.writer.tokenizer
    plain, _ = writer.encode(QUESTION, STEPS)
    steps = [STEPS[0], f"{CONTROL} {STEPS[1]}", STEPS[2]]
    question = f"{QUESTION} {CONTROL}"
    ids, marks = writer.encode(question, steps)
    special = set(tokenizer.all_special_ids)
    assert [i for i in ids if i in special] == [i for i in plain if i in special]
    assert len(marks) == 3
    ends = [tokenizer.decode(ids[: mark + 1]) for mark in marks]
    for end, step in zip(ends, steps, strict=True):
        assert step in end[-len(step) - 20 :]
        assert tokenizer.decode([ids[marks[0]]]).endswith(writer.tag)
    assert len(asyncio.run(prm.score(question, steps))) == 3
    one = writer.encode("x", ["y"])[0]  # special tokens around a cut text are those of a whole one
    two = writer.encode("x", [f"y{CONTROL}"])[0]
    assert (one[0], one[0] in special) == (two[0], two[0] in special)


@pytest.mark.cases
def test_the_template_of_a_prm_is_checked_and_its_date_frozen(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(folders["qwen"], tmp_path / "qwen")
    file = folder / "chat_template.jinja"
    template = file.read_text()
    file.write_text("{{ strftime_now('%Y') }}" + template)
    prm = local(folder, template_date="1999-12-31")
    assert prm.writer.write(QUESTION, STEPS)[0].startswith("1999")
    file.write_text("{{ strftime_now(form) }}" + template)
    with pytest.raises(UserError, match="the format of the date in the chat template"):
        local(folder)
    file.write_text("{{ messages[-1].content }}")
    with pytest.raises(UserError, match="writes it 0 times; use a PRM with another template"):
        local(folder)
    local(folder, skip_model_check=True)


def test_steps_end_at_the_last_byte_of_their_tag(folders: dict[str, Path]) -> None:
    """Without an entry of its own ки is four byte tokens: the last one is the mark."""
    prm = local(folders["math_shepherd"], prm_step_tag="жя")
    ids, marks = prm.writer.encode(QUESTION, STEPS)
    assert [prm.writer.tokenizer.decode(ids[: mark + 1])[-2:] for mark in marks] == ["жя"] * 3


def test_too_long_is_refused_with_its_length_and_the_others_are_scored(
    folders: dict[str, Path],
) -> None:
    found = scores_of(local(folders["value"]), (QUESTION, STEPS), (QUESTION, STEPS * 12))
    assert len(found[0]) == 3
    assert isinstance(found[1], Unscored)
    assert "tokens; the process reward model accepts 256" in str(found[1])


def test_a_broken_model_is_an_error_and_no_number(folders: dict[str, Path]) -> None:
    prm = local(folders["value"])
    prm._readout = lambda hidden: hidden[:, 0] * math.nan
    with pytest.raises(UserError, match=r"nan is not a score.*; 2 of 2 paths unscored"):
        scores_of(prm, (QUESTION, STEPS), (QUESTION, STEPS))


def test_labels_are_two_ids_of_one_kind() -> None:
    """Byte-level BPE knows " -" as well, and would read "+ -" as "+" and " -"."""
    tokenizer = build_tokenizer()
    tokenizer.add_tokens([" +", " -"])
    ids = tokenizer.get_vocab()
    assert label_ids(tokenizer, "+", "-") == [ids["+"], ids["-"]]
    assert label_ids(tokenizer, " +", " -") == [ids[" +"], ids[" -"]]


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("math_shepherd", {"prm_family": "qwen"}, "needs a score, v_head or classifier head"),
        ("math_shepherd", {"prm_good_token": "good"}, "must be one id each"),
    ],
)
def test_a_model_that_does_not_fit_is_refused(
    folders: dict[str, Path], kind: str, changes: dict[str, str], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        local(folders[kind], **changes)


def test_a_step_is_read_without_its_delimiters() -> None:
    tokenizer = build_tokenizer()
    add_function_tokens(tokenizer)
    ids = function_ids(tokenizer)
    rendered = render([("analysis", STEPS[0])], tokenizer, ids)
    assert segment_text(tokenizer, [*rendered, eos_id(tokenizer)], ids) == STEPS[0]
    plain = cast(list[int], tokenizer.encode("plain"))
    assert segment_text(tokenizer, plain, None) == "plain"


# ---- The check at the start ----


class Fixed:
    """ProcessModel that answers what it is told."""

    def __init__(self, scores: dict[str, float]) -> None:
        self.scores = scores

    async def score(self, question: str, steps: Any) -> list[float]:
        return [self.scores.get(step, 0.5) for step in steps]

    def close(self) -> None: ...


def test_a_model_that_ranks_backwards_is_warned_about(tmp_path: Path) -> None:
    good, bad = (dict.fromkeys(CHECK[kind], value) for kind, value in (("good", 0.9), ("bad", 0.1)))
    assert asyncio.run(ranking_warning(Fixed(good | bad), None)) is None
    warning = asyncio.run(ranking_warning(Fixed({}), None))
    assert warning is not None
    assert warning.startswith("PRM ranks a wrong step above a right one on the built-in check;")
    assert "0.500, 0.500" in warning
    own = tmp_path / "check.json"
    own.write_text(json.dumps({"question": "1+1?", "good": ["2"], "bad": ["3"]}))
    assert asyncio.run(ranking_warning(Fixed({"2": 0.7, "3": 0.6}), str(own))) is None
    assert f"a right one on {own};" in str(asyncio.run(ranking_warning(Fixed({}), str(own))))
    own.write_text('{"question": "1+1?"}')
    with pytest.raises(UserError, match="must contain question"):
        asyncio.run(ranking_warning(Fixed({}), str(own)))


# ---- Server ----


@contextlib.contextmanager
def serving(prm: Any, cfg: ServeConfig, max_tokens: int) -> Iterator[str]:
    """The URL of a server in this process."""
    loop = asyncio.new_event_loop()
    server, listener = open_server(prm, loop, cfg, max_tokens)
    threads = [
        threading.Thread(target=loop.run_forever, daemon=True),
        threading.Thread(target=server.run, args=([listener],), daemon=True),
    ]
    for thread in threads:
        thread.start()
    yield f"http://127.0.0.1:{listener.getsockname()[1]}/get_reward"
    server.should_exit = server.force_exit = True
    loop.call_soon_threadsafe(loop.stop)
    for thread in threads:
        thread.join()


@pytest.fixture(scope="module")
def served(folders: dict[str, Path]) -> Iterator[str]:
    prm = LocalPRM(config(prm_model_name_or_path=str(folders["qwen"])))
    with serving(prm, ServeConfig(port=0, max_body_bytes=20_000), prm.max_length) as url:
        yield url


def address_of(url: str) -> tuple[str, int]:
    """Host and port of `url`."""
    parts = urlsplit(url)
    return str(parts.hostname), int(parts.port or 0)


def body_of(steps: list[str] = STEPS) -> dict[str, str]:
    return {"input": to_wire(QUESTION, steps)}


@pytest.mark.oracle
def test_the_wire_is_the_official_text_and_comes_back() -> None:
    assert to_wire("Q?", [" a ", "b"]) == "Q? Step 1: a ки\nStep 2: b ки"
    assert from_wire(to_wire(QUESTION, STEPS)) == (QUESTION, STEPS)
    assert from_wire("Q?\nStep 1: a\nb ки Step 2: c ки\n") == ("Q?", ["a\nb", "c"])
    with pytest.raises(Unscored, match="contains the step tag"):
        to_wire(QUESTION, ["a ки"])


def test_the_server_scores_as_the_model_does(folders: dict[str, Path], served: str) -> None:
    (expected,) = scores_of(local(folders["qwen"]), (QUESTION, STEPS))
    reply = post(served, json=body_of())
    assert (reply.status_code, reply.json()["score"]) == (200, pytest.approx(expected, abs=1e-5))


@pytest.mark.cases
@pytest.mark.parametrize(
    ("body", "status", "reason"),
    [
        (b"{", 422, "not JSON"),
        (b"\xff", 422, "not JSON"),
        (b"[" * 5000, 422, "not JSON"),
        (b"[]", 422, 'must be {"input"'),
        (b"{}", 422, 'must be {"input"'),
        (b'{"input": 3}', 422, 'must be {"input"'),
        (b'{"input": "no tag"}', 422, "at the end of each step"),
        (b'{"input": "\\ud800"}', 422, "surrogate"),
        ('{"input": "Q Step 1: a ки and more"}'.encode(), 422, "at the end of each step"),
        (json.dumps(body_of(STEPS * 12)).encode(), 422, "model accepts 256"),
        (json.dumps({"input": "ки" * 300 + "Step 1:" + "ки" * 300}).encode(), 422, "each step"),
        (json.dumps({"input": "Q Step 1:" + "ки" * 300}).encode(), 422, "300 steps"),
        (json.dumps({"input": " " * 9_000}).encode(), 422, "9000 characters; the limit is 2048"),
        (b" " * 20_001, 413, "20000 bytes"),
    ],
)
def test_bad_requests_get_a_reason(served: str, body: bytes, status: int, reason: str) -> None:
    reply = post(served, content=body, headers=JSON)
    assert (reply.status_code, reason in reply.json()["detail"]) == (status, True), reply.text
    assert post(served, json=body_of()).status_code == 200


def test_other_paths_and_methods_are_refused(served: str) -> None:
    assert post(served + "s", content=b"{}").json() == {"detail": "Not Found"}
    assert httpx2.get(served, timeout=HANG_LIMIT).status_code == 405


@pytest.mark.cases
@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"content-type": "text/plain"}, 415),
        ({}, 415),
        (JSON | {"origin": "https://example.org"}, 403),
        (JSON | {"content-type": "application/json; charset=utf-8"}, 200),
    ],
)
def test_web_pages_are_refused(served: str, headers: dict[str, str], status: int) -> None:
    reply = post(served, content=json.dumps(body_of()), headers=headers)
    assert reply.status_code == status
    assert reply.headers["content-type"] == "application/json"


@pytest.mark.parametrize("size", [100, 1 << 20])
def test_a_body_of_unknown_length_is_bounded_while_it_is_read(served: str, size: int) -> None:
    """An endless body is refused after `max_body_bytes`, and the connection is closed."""
    connection = HTTPConnection(*address_of(served), timeout=HANG_LIMIT)
    connection.putrequest("POST", "/get_reward")
    connection.putheader("content-type", "application/json")
    connection.putheader("transfer-encoding", "chunked")
    connection.endheaders()
    chunk = b"%x\r\n%s\r\n" % (size, b" " * size)
    with contextlib.suppress(ConnectionError):  # until the server hangs up
        for _ in range(20_000 // size + 1):
            connection.send(chunk)
    with contextlib.suppress(ConnectionError):  # a reset may overtake the reply
        assert connection.getresponse().status == 413
    assert post(served, json=body_of()).status_code == 200


@pytest.mark.cases
@pytest.mark.faults
def test_a_client_that_never_ends_its_request_is_let_go(
    served: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prm_serve, "IDLE_S", 0.05)
    with socket.create_connection(address_of(served), timeout=HANG_LIMIT) as client:
        head = "POST /get_reward HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
        client.sendall(f"{head}content-length: 99\r\n\r\n{{".encode())
        assert client.recv(1000).startswith(b"HTTP/1.1 408")
        while client.recv(1000):
            pass  # the server closes the connection


@pytest.mark.cases
@pytest.mark.invariant
@pytest.mark.parametrize(
    "pad", ["Q{} Step 1: a ки", "Q Step 1:{}a ки", "Q Step 1: a ки{}Step 2: b ки", "Q Step 1: ки{}"]
)
def test_parsing_is_linear(pad: str) -> None:
    """A pattern with `.*?` and a run of spaces used to hold the interpreter for minutes."""
    size = 1 << 20
    body = json.dumps({"input": pad.format(" " * size)}).encode()
    question, steps = parse(body, size // MAX_CHARS_PER_TOKEN * 2)
    assert question == "Q"
    assert steps in (["a"], ["a", "b"], [""])


def test_200_concurrent_requests_are_all_answered_beside_rude_clients(
    served: str, capfd: pytest.CaptureFixture[str]
) -> None:
    rude = []
    for text in (
        b"",
        b"\x00\x01\x02\r\n\r\n",
        POSTED % 99 + b"{",
    ):
        rude.append(socket.create_connection(address_of(served)))
        rude[-1].sendall(text)
    hasty = socket.create_connection(address_of(served))
    body = json.dumps(body_of()).encode()
    hasty.sendall(POSTED % len(body) + body)
    hasty.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
    hasty.close()  # a reset, not a goodbye

    async def ask() -> list[int]:
        limits = httpx2.Limits(max_connections=200)
        async with httpx2.AsyncClient(limits=limits, timeout=HANG_LIMIT) as client:
            bodies = [body_of(STEPS[: i % 3 + 1]) for i in range(200)]
            replies = await asyncio.gather(*(client.post(served, json=b) for b in bodies))
            return [len(reply.json()["score"]) for reply in replies]

    assert asyncio.run(ask()) == [i % 3 + 1 for i in range(200)]
    for client in rude:
        client.close()
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.cases
def test_a_long_forward_pass_delays_no_other_connection() -> None:
    """The model computes in a thread of its own: a refusal needs no turn."""
    asked, go_on = threading.Event(), threading.Event()

    class Slow(Fixed):
        async def score(self, question: str, steps: Any) -> list[float]:
            asked.set()
            assert go_on.wait(HANG_LIMIT)  # holds the loop as a forward pass does
            return [0.5] * len(steps)

    with serving(Slow({}), ServeConfig(port=0), 100) as url:
        replies: list[httpx2.Response] = []
        client = threading.Thread(target=lambda: replies.append(post(url, json=body_of())))
        client.start()
        assert asked.wait(HANG_LIMIT)
        assert post(url, json={"input": "no tag"}).status_code == 422
        assert replies == []
        go_on.set()
        client.join()
    assert replies[0].json() == {"score": [0.5] * 3}


@pytest.mark.cases
@pytest.mark.faults
def test_twenty_long_requests_at_once_are_refused_beside_a_good_one() -> None:
    """All bodies are in the server before one of them ends; none of them reaches the model."""
    asked: list[str] = []

    class Noting(Fixed):
        async def score(self, question: str, steps: Any) -> list[float]:
            asked.append(question)
            return [0.5] * len(steps)

    cfg = ServeConfig(port=0)
    room = cfg.max_body_bytes - len(json.dumps({"input": "Q Step 1: ки"}))
    body = json.dumps({"input": f"Q Step 1: {'a + b ' * (room // 6)}ки"}).encode()
    assert 1_000_000 < len(body) <= cfg.max_body_bytes
    with serving(Noting({}), cfg, 4096) as url, contextlib.ExitStack() as stack:
        connections = [
            stack.enter_context(socket.create_connection(address_of(url), timeout=HANG_LIMIT))
            for _ in range(20)
        ]
        for connection in connections:
            connection.sendall(POSTED % len(body) + body[:-1])
        assert post(url, json=body_of()).json() == {"score": [0.5] * 3}
        for connection in connections:
            connection.sendall(body[-1:])
        for connection in connections:
            response = HTTPResponse(connection)
            response.begin()
            detail = json.loads(response.read())["detail"]
            assert (response.status, "; the limit is 32768" in detail) == (422, True)
        assert post(url, json=body_of()).status_code == 200
    assert asked == [QUESTION] * 2


def test_a_missing_server_package_is_one_line() -> None:
    code = "import sys; sys.modules['uvicorn'] = None; import tools.prm_serve"
    done = run(sys.executable, "-c", code, check=False)
    message = "error: uvicorn is missing; pip install -r requirements-serve.txt\n"
    assert (done.returncode, done.stderr) == (2, message)


def test_serve_binds_to_loopback_unless_told_otherwise() -> None:
    assert ServeConfig().host == "127.0.0.1"


def test_the_command_serves_and_ends_on_a_signal(folders: dict[str, Path], tmp_path: Path) -> None:
    command = [sys.executable, "tools/prm_serve.py", "--model", str(folders["value"])]
    more = ["--port=0", "--dtype", "float32", "--device", "cpu"]
    check = tmp_path / "check.json"  # which no model can rank: the warning does not hang on weights
    check.write_text(json.dumps({"question": "1+1?", "good": ["2"], "bad": ["2"]}))
    more += ["--prm_check_file", str(check)]
    with subprocess.Popen([*command, *more], cwd=ROOT, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        lines = [server.stdout.readline() for _ in range(2)]
        url = lines[-1].split()[-1]
        reply = post(url, json=body_of())
        server.terminate()
        assert server.wait(HANG_LIMIT) == 0
        assert (reply.status_code, len(reply.json()["score"])) == (200, 3)
    assert lines[0].startswith("warning: PRM ranks a wrong step")


def test_serve_without_a_model_is_one_line() -> None:
    done = run(sys.executable, "tools/prm_serve.py", "--port", "1", check=False)
    assert (done.returncode, done.stderr) == (
        2,
        "error: prm_serve.py needs a model; add --model FOLDER.\n",
    )


# ---- Remote ----


class Script:
    """A PRM server that answers request i with script[i], then the last entry for ever.

    An entry is a status, a body (bytes, or chunks of unknown length) and headers. It does not
    answer before `meet` requests have been in flight at once.
    """

    delay_s = 0.0

    def __init__(self) -> None:
        self.script: list[Any] = []
        self.seen: list[dict[str, str]] = []
        self.meet = 0
        self.now = self.most = 0
        self.changed = threading.Condition()
        self.url = ""

    def next(self, body: bytes) -> Any:
        with self.changed:
            self.seen.append(json.loads(body))
            self.now += 1
            self.most = max(self.most, self.now)
            found = self.script.pop(0) if len(self.script) > 1 else self.script[0]
            self.changed.notify_all()
            self.changed.wait_for(lambda: self.most >= self.meet, HANG_LIMIT)
        time.sleep(self.delay_s)  # requests that should not be here have time to arrive
        with self.changed:
            self.now -= 1
        return found(body) if callable(found) else found


def release(behaviour: Script) -> None:
    """Let every waiting request go."""
    with behaviour.changed:
        behaviour.meet = 0
        behaviour.changed.notify_all()


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Iterator[Script]:
    behaviour = Script()
    monkeypatch.setattr(prm_module, "FIRST_DELAY_S", 0.01)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            found = behaviour.next(self.rfile.read(int(self.headers["content-length"])))
            if found is not None:
                status, content, *headers = found
                with suppress(ConnectionError):  # the client may have given up
                    self.send_response(status)
                    for name, value in headers:
                        self.send_header(name, value)
                    if isinstance(content, bytes):
                        self.send_header("content-length", str(len(content)))
                        content = [content]
                    self.end_headers()
                    for chunk in content:  # without a length the body ends with the connection
                        self.wfile.write(chunk)

        def log_message(self, format: str, *args: object) -> None: ...

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=http.serve_forever, args=(0.02,), daemon=True).start()
    behaviour.url = f"http://127.0.0.1:{http.server_port}/get_reward"
    yield behaviour
    release(behaviour)
    http.shutdown()
    http.server_close()


@pytest.fixture
def remote(script: Script) -> Iterator[RemotePRM]:
    prm = build_prm(config(prm_url=script.url, prm_timeout_s=HANG_LIMIT, prm_max_concurrency=8))
    assert isinstance(prm, RemotePRM)
    yield prm
    prm.close()


GOOD: tuple[int, bytes] | None = (200, b'{"score": [0.9, 0.8, 0.1]}')


def test_a_path_goes_out_in_the_official_words(script: Script, remote: RemotePRM) -> None:
    script.script = [GOOD]
    for _ in range(2):  # each step of RL has an event loop of its own
        assert scores_of(remote, (QUESTION, STEPS)) == [[0.9, 0.8, 0.1]]
    expected = f"{QUESTION} Step 1: {STEPS[0]} ки\nStep 2: {STEPS[1]} ки\nStep 3: {STEPS[2]} ки"
    assert script.seen == [{"input": expected}] * 2


@pytest.mark.faults
@pytest.mark.parametrize(
    "fault",
    [
        None,
        (500, b"oops"),
        (503, b""),
        (200, b"<html>"),
        (200, b"[]"),
        (200, b'{"score": [0.1]}'),
        (200, b'{"score": [0.1, 0.2, NaN]}'),
        (200, b'{"score": [0.1, 0.2, 1.5]}'),
        (200, b'{"score": [0.1, 0.2, true]}'),
    ],
)
def test_faults_are_retried_and_never_become_numbers(
    script: Script, remote: RemotePRM, fault: tuple[int, bytes] | None
) -> None:
    script.script = [fault, fault, GOOD]
    assert scores_of(remote, (QUESTION, STEPS)) == [[0.9, 0.8, 0.1]]
    script.script = [fault]
    with pytest.raises(UserError, match=r"not reachable after 3 tries .*; 1 of 1 paths unscored"):
        scores_of(remote, (QUESTION, STEPS))
    assert len(script.seen) == 6


SPACES = b" " * (1 << 20)


@pytest.mark.cases
@pytest.mark.faults
@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ((200, SPACES[:10_001]), "reply over 10000 bytes"),
        ((503, SPACES[:10_001]), "reply over 10000 bytes"),
        ((422, [SPACES] * 64), "reply over 10000 bytes"),
        ((200, gzip.compress(SPACES), ("content-encoding", "gzip")), "the reply is compressed"),
        ((422, gzip.compress(SPACES), ("content-encoding", "gzip")), "the reply is compressed"),
    ],
)
def test_an_endless_or_compressed_reply_is_cut_off(
    script: Script, remote: RemotePRM, monkeypatch: pytest.MonkeyPatch, fault: Any, message: str
) -> None:
    """No status excuses such a body: it is refused before anyone reads it."""
    monkeypatch.setattr(http_module, "MAX_REPLY_BYTES", 10_000)
    script.script = [fault, fault, GOOD]
    assert scores_of(remote, (QUESTION, STEPS)) == [[0.9, 0.8, 0.1]]
    script.script = [fault]
    with pytest.raises(UserError, match=rf"after 3 tries .*{message}.*; 1 of 1 paths unscored"):
        scores_of(remote, (QUESTION, STEPS))


@pytest.mark.faults
def test_a_server_that_hangs_is_given_up(script: Script) -> None:
    script.script, script.meet = [GOOD], 99
    prm = RemotePRM(config(prm_url=script.url, prm_timeout_s=1.0))
    with pytest.raises(UserError, match=r"after 3 tries .*Timeout.*; 4 of 4 paths unscored"):
        scores_of(prm, *[(QUESTION, STEPS)] * 4)
    prm.close()


@pytest.mark.faults
def test_a_server_that_is_not_there_is_named(script: Script) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/get_reward"
    prm = RemotePRM(config(prm_url=url, prm_tries=2))
    with pytest.raises(UserError, match=rf"^prm_url {url} not reachable after 2 tries"):
        scores_of(prm, (QUESTION, STEPS))
    prm.close()


@pytest.mark.parametrize(("status", "kind"), [(413, Unscored), (422, Unscored), (404, UserError)])
def test_a_refusal_concerns_the_path_and_a_wrong_url_the_run(
    script: Script, remote: RemotePRM, status: int, kind: type[Exception]
) -> None:
    script.script = [(status, b"too long")]
    with pytest.raises(kind, match="too long"):
        asyncio.run(remote.score(QUESTION, STEPS))
    assert len(script.seen) == 1


def test_many_paths_are_under_way_at_once_but_no_more_than_allowed(
    script: Script, remote: RemotePRM
) -> None:
    script.script, script.meet, script.delay_s = [GOOD], 8, 0.05
    assert scores_of(remote, *[(QUESTION, STEPS)] * 32) == [[0.9, 0.8, 0.1]] * 32
    assert script.most == 8


def test_remote_and_local_agree(folders: dict[str, Path], served: str) -> None:
    prm = RemotePRM(config(prm_url=served))
    paths = [(QUESTION, STEPS[: i % 3 + 1]) for i in range(20)] + [(QUESTION, STEPS * 12)]
    *near, long_near = scores_of(prm, *paths)
    *far, long_far = scores_of(local(folders["qwen"]), *paths)
    prm.close()
    for a, b in zip(near, far, strict=True):
        assert a == pytest.approx(b, abs=1e-5)
    assert isinstance(long_near, Unscored)
    assert isinstance(long_far, Unscored)


# ---- Made from search trees ----

SEARCHED: dict[str, Any] = {
    "problem": {"id": "p/1", "question": "1+2?"},
    "nodes": [
        {"id": 0, "parent": None, "text": "", "q": 0.5, "terminal": False, "answer": None},
        {"id": 1, "parent": 0, "text": "1+2=3.", "q": 0.5, "terminal": False, "answer": None},
        {"id": 2, "parent": 1, "text": "so 3.", "q": 1.0, "terminal": True, "answer": "3"},
        {"id": 3, "parent": 1, "text": "hm", "q": 0.0, "terminal": True, "answer": None},
    ],
}
MERGED: dict[str, Any] = {
    "id": "p/1",
    "kind": "merged",
    "question": "1+2?",
    "steps": [{"text": "hm", "node": 3, "wrong": True}, {"text": "check"}],
}


def search_dir(path: Path, n: int = 1) -> Path:
    for i in range(n):
        problem = SEARCHED["problem"] | {"id": f"p/{i + 1}"}
        write_json(path / f"trees/p%2F{i + 1}.json", SEARCHED | {"problem": problem})
    write_jsonl(path / "data/raw.jsonl", [{"id": f"p/{i + 1}"} for i in reversed(range(n))])
    write_jsonl(path / "data/sft.jsonl", [MERGED, MERGED | {"kind": "plain"}])
    return path


@pytest.mark.oracle
def test_labels_are_the_share_of_right_answers_below_and_count_once(tmp_path: Path) -> None:
    (rows,) = label_trees(search_dir(tmp_path))
    output = "The final answer is \\boxed{3}."
    assert rows == [
        ("1+2?", ["1+2=3.", "so 3.", output], [0.5, 1.0, 1.0]),
        ("1+2?", ["1+2=3.", "hm"], [None, 0.0]),
        ("1+2?", ["hm", "check"], [0.0, 1.0]),
    ]
    with pytest.raises(UserError, match=r"has no trees; run search\.py"):
        label_trees(tmp_path / "elsewhere")


@pytest.mark.cases
def test_only_the_trees_of_the_search_itself_are_trained_on(tmp_path: Path) -> None:
    """Others are of a search that was overwritten, were not finished, or are another program's."""
    found = search_dir(tmp_path, 2)
    rows = label_trees(found)
    stale = SEARCHED | {"problem": {"id": "stale", "question": "Other?"}}
    write_json(found / "trees/stale.json", stale)
    (found / "trees/._p%2F1.json").write_bytes(b"\0\5\26\7")
    assert label_trees(found) == rows
    (found / "trees/p%2F1.json").write_text("{")
    with pytest.raises(UserError, match=r"p%2F1.json is not JSON"):
        label_trees(found)
    (found / "trees/p%2F1.json").unlink()
    with pytest.raises(UserError, match=r"p%2F1.json is missing, .* overwrite_output_dir: true"):
        label_trees(found)


@pytest.mark.oracle
def test_auc_is_the_share_of_pairs_in_order() -> None:
    scores, right = [0.1, 0.4, 0.4, 0.8, 0.9], [False, True, False, True, False]
    pairs = [(a, b) for a, r in zip(scores, right, strict=True) if r
             for b, w in zip(scores, right, strict=True) if not w]  # fmt: skip
    expected = sum((a > b) + 0.5 * (a == b) for a, b in pairs) / len(pairs)
    assert auc(scores, right) == pytest.approx(expected)
    with pytest.raises(UserError, match="must include right and wrong ones"):
        auc([0.1], [True])


def test_a_trained_model_ranks_what_it_saw_and_opens_like_any_other(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    base, out = str(folders["math_shepherd"]), tmp_path / "prm"
    found = search_dir(tmp_path, n=20)
    train(
        PRMTrainConfig(
            search_dir=str(found),
            model_name_or_path=base,
            output_dir=str(out),
            num_train_epochs=30,
            learning_rate=3e-3,
        )
    )
    assert json.loads((out / "heldout.json").read_text())["auc"] > 0.9
    right, wrong = scores_of(local(out), ("1+2?", ["1+2=3.", "so 3."]), ("1+2?", ["1+2=3.", "hm"]))
    assert right[1] > 0.8 > 0.2 > wrong[1]
    assert abs(right[0] - 0.5) < 0.2  # half of what follows is right


# ---- In reinforcement learning ----


def halves(body: bytes) -> tuple[int, bytes]:
    """Scores that depend on the path, as any PRM's do."""
    steps = json.loads(body)["input"].split("ки")[:-1]
    return 200, json.dumps({"score": [len(step) % 7 / 7 for step in steps]}).encode()


@pytest.mark.invariant
def test_rl_goes_on_where_the_prm_went_down_and_learns_the_same(
    script: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    world = make_world(tmp_path)
    handler = signal.getsignal(signal.SIGTERM)

    def learn(name: str, answers: list[Any]) -> int | str | None:
        script.script = answers
        prm = ["use_prm=true", f"prm_url={script.url}", "prm_tries=1", "dtype=float32"]
        words = settings(
            "train_rl", world, tmp_path / name, *prm, "max_steps=3", "device=cpu", "save_steps=1"
        )
        monkeypatch.setattr(sys, "argv", ["train_rl.py", *words])
        try:
            runpy.run_path(str(ROOT / "train_rl.py"), run_name="__main__")
        except SystemExit as stopped:
            code = stopped.code
        else:
            code = 0
        finally:
            signal.signal(signal.SIGTERM, handler)
            if dist.is_initialized():
                dist.destroy_process_group()
        gc.collect()  # a run that failed lets go of its output_dir
        return code

    def rows(name: str) -> list[dict[str, float]]:
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        return [
            {k: v for k, v in json.loads(line).items() if not k.endswith("seconds")}
            for line in lines
        ]

    assert learn("whole", [halves]) == 0
    assert learn("broken", [*[halves] * 7, (500, b"")]) == 2  # 2 at the start, 4 in step 0
    assert re.search(
        r"error: prm_url .* not reachable after 1 tries .*; \d of 4 paths unscored\n",
        capfd.readouterr().err,
    )
    assert len(rows("broken")) == 1
    assert learn("broken", [halves]) == 0
    assert rows("broken") == rows("whole")
    assert 0 < rows("whole")[0]["process_reward"] < 1
