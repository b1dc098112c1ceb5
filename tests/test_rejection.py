"""Test search.py's methods sample and score: sample once, score and filter repeatedly."""

import asyncio
import gc
import json
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from conftest import TORCHRUN, run

import search
from rftt.engines.base import Reply
from rftt.engines.chat import load_tokenizer
from rftt.prompted import Prompted
from rftt.run.config import SearchConfig, load_config
from rftt.run.data import load_rows
from rftt.run.files import write_jsonl
from rftt.run.precision import settle_dtype
from rftt.run.prompts_file import load_prompts
from rftt.run.rejection import curate_responses, step_texts
from rftt.tokens import add_function_tokens
from rftt.types import Problem, UserError
from tools.tiny_world import build_tokenizer


def answer(process, i, *, right=True):
    """A response whose steps the server below scores as `process` says."""
    lines = [f"Step with score {s}, variant {i}." for s in process]
    return "\n".join([*lines, f"So \\boxed{{{4 if right else 5}}}. Score 1.0."])


def response(text, finish="stop", **more):
    found = {"text": text, "tokens": len(text.split()), "finish": finish, "logprob": -1.5}
    return found | {"control_text": False} | more


CACHE = [
    {
        "id": f"p{n}",
        "question": f"What is 2 + 2, number {n}?",
        "answer": "4",
        "responses": [
            response(answer([0.95, 0.9], 0)),
            response(answer([0.5], 1)),
            response(answer([0.2], 2, right=n == 3)),
            response(answer([0.1, 0.3], 3, right=n == 3)),
            response("It goes on and on", finish="length"),
            response("<next_step>Score 0.9.</next_step><output>\\boxed{4}</output>"),
        ][: 6 if n else 5],
    }
    for n in range(4)
]
N_RESPONSES = 23


def serve(handler):
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server, f"http://127.0.0.1:{server.server_address[1]}"


def reply(request, status, data):
    content = json.dumps(data).encode()
    request.send_response(status)
    request.send_header("content-length", str(len(content)))
    request.end_headers()
    request.wfile.write(content)


@pytest.fixture
def prm():
    """(url, inputs seen) of a server with the official protocol that obeys the texts."""
    seen = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self):
            text = json.loads(self.rfile.read(int(self.headers["content-length"])))["input"]
            seen.append(text)
            steps = [step for step in text.split("ки") if "Step" in step]
            words = [step.lower().partition("score ")[2].strip(".\n ") for step in steps]
            numbers = [float(word.split(",")[0]) if word else 1.0 for word in words]
            reply(self, 200, {"score": numbers})

        def log_message(self, *_):
            pass

    server, url = serve(Handler)
    yield url, seen
    server.shutdown()
    server.server_close()


@pytest.fixture
def cache(tmp_path):
    write_jsonl(tmp_path / "raw.jsonl", CACHE)
    return tmp_path / "raw.jsonl"


def scoring(tmp_path, cache, **changes):
    """The config of a scoring, whose model does not exist."""
    given = {
        "output_dir": tmp_path / "out", "model_name_or_path": "no/such/model", "method": "score",
        "train_file": "no-such-file", "raw_file": cache, "max_repeats": 3,
    } | changes  # fmt: skip
    return settle_dtype(load_config(SearchConfig, [f"{k}={v}" for k, v in given.items()]))


def score(tmp_path, cache, **changes):
    """search.py method=score, with a model that does not exist; its stats.json."""
    search.main(scoring(tmp_path, cache, **changes))
    gc.collect()  # the log, and with it the lock on the folder
    return json.loads((tmp_path / "out" / "stats.json").read_text())


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def nonzero(counts):
    return {name: n for name, n in counts.items() if n}


def test_score_opens_no_model_and_its_counts_add_up(tmp_path, cache, capsys):
    stats = score(tmp_path, cache)
    assert "no model is opened, nothing is sampled" in capsys.readouterr().out
    assert not (tmp_path / "out" / "data" / "raw.jsonl").exists()
    assert stats["responses"] == sum(stats["counts"].values()) == N_RESPONSES
    assert nonzero(stats["counts"]) == {"unfinished": 4, "wrong": 6, "kept": 13}
    assert stats["solved"] == pytest.approx((2 / 5 + 3 / 6 + 3 / 6 + 5 / 6) / 4)
    written = rows(tmp_path / "out" / "data" / "sft.jsonl")
    assert Counter(row["id"] for row in written) == {"p0": 2, "p1": 3, "p2": 3, "p3": 5}
    assert [row["id"] for row in written] == sorted(row["id"] for row in written)
    for row in written:  # every row says where it comes from
        said = row.get("response") or "".join(
            f"<{s['act']}>{s['text']}</{s['act']}>" for s in row["steps"]
        )
        assert said == CACHE[int(row["id"][1])]["responses"][row["sample"]]["text"]


def test_score_with_a_prm_then_other_thresholds_without_asking_it_again(tmp_path, cache, prm):
    url, seen = prm
    keys = {"use_prm": "true", "prm_url": url}
    assert score(tmp_path, cache, **keys)["counts"]["kept"] == 13
    assert len(seen) == N_RESPONSES - 4 + 2  # what is finished, and the check of its ranking
    for changes, kept in (
        ({"prm_threshold": 0.9}, 7),  # in the mean: one in four problems, and three of segments
        ({"prm_threshold": 0.9, "n_best_to_keep": 1}, 4),
        ({"prm_threshold": 0.5, "prm_reduce": "min"}, 11),
        ({"easy_query_threshold": 0.6}, 8),
        ({}, 13),
    ):
        stats = score(tmp_path, cache, **keys, **changes)
        assert sum(stats["counts"].values()) == N_RESPONSES
        assert (changes, stats["counts"]["kept"]) == (changes, kept)
        assert stats["rows"] == kept
    assert len(seen) == N_RESPONSES - 4 + 2
    scored = rows(tmp_path / "out" / "data" / "scored.jsonl")
    assert scored[0]["responses"][0]["process"] == [0.95, 0.9, 1.0]
    assert scored[0]["responses"][4]["process"] is None
    with pytest.raises(UserError, match="was begun with use_prm"):
        score(tmp_path, cache)


def test_score_of_the_first_problems_alone(tmp_path, cache):
    assert score(tmp_path, cache, max_problems=1)["problems"] == 1


def test_scores_of_a_cache_that_was_sampled_again_are_not_taken_for_its_own(tmp_path, cache):
    score(tmp_path, cache)
    again = [response(answer([0.5], 7)), *CACHE[2]["responses"][1:]]
    write_jsonl(cache, [CACHE[0], CACHE[1], CACHE[2] | {"responses": again}, CACHE[3]])
    with pytest.raises(UserError, match=r"scores of other responses .* first of p2; use a new"):
        score(tmp_path, cache)


def test_score_killed_asks_only_for_the_rest_and_ends_the_same(tmp_path, cache, prm):
    url, seen = prm
    keys = {"use_prm": "true", "prm_url": url, "prm_threshold": 0.5}
    stats = score(tmp_path, cache, **keys)
    files = {name: tmp_path / "out" / "data" / f"{name}.jsonl" for name in ("scored", "sft", "dpo")}
    before = {name: rows(path) for name, path in files.items()}
    whole = files["scored"].read_text().splitlines(keepends=True)
    files["scored"].write_text(whole[0] + whole[1] + whole[2][:50])
    lost = [CACHE[int(json.loads(line)["id"][1])] for line in whole[2:]]
    seen.clear()
    assert score(tmp_path, cache, **keys) == stats
    n_lost = sum(r["finish"] == "stop" for row in lost for r in row["responses"])
    assert len(seen) == n_lost + 2
    after = {name: rows(path) for name, path in files.items()}
    by_id = {row["id"]: row for row in after.pop("scored")}
    assert by_id == {row["id"]: row for row in before.pop("scored")}
    assert after == before


def test_a_tree_keeps_the_process_scores_of_its_steps(tmp_path):
    class Half:
        async def score(self, question, steps):
            return [0.5] * len(steps)

        def close(self): ...

    async def chat(messages, sampling):
        return Reply("So it is \\boxed{4}.", True, 1, 1)

    given = {"output_dir": tmp_path, "model_name_or_path": "m", "train_file": "t", "simulations": 2}
    cfg = load_config(SearchConfig, [f"{k}={v}" for k, v in given.items()])
    how = {"prompts": load_prompts(), "contract_tries": 3, "control": lambda _: False}
    ctx = Prompted(chat, 1.0, 9, 5, 4, seed=0, **how)
    found = asyncio.run(search.grow_and_curate(Half(), cfg, ctx, Problem("p", "2 + 2?", "4")))
    (tree,) = (tmp_path / "trees").glob("*.json")
    assert {node["score"] for node in json.loads(tree.read_text())["nodes"][1:]} == {0.5}
    assert "path_unscored" not in found["counts"]


@pytest.mark.dist
def test_ranks_share_the_cache_and_no_remainder_is_lost(tmp_path, cache):
    """Four problems on three ranks, one of which was scored by a run before."""
    one = score(tmp_path, cache)
    files = {name: tmp_path / "out" / "data" / f"{name}.jsonl" for name in ("scored", "sft", "dpo")}
    before = {name: rows(path) for name, path in files.items()}
    files["scored"].write_text(files["scored"].read_text().splitlines(keepends=True)[0])
    run(
        *TORCHRUN, "--nproc_per_node=3", "search.py", f"output_dir={tmp_path / 'out'}",
        "model_name_or_path=no/such/model", "method=score", "train_file=no-such-file",
        f"raw_file={cache}", "max_repeats=3", "device=cpu",
    )  # fmt: skip
    assert json.loads((tmp_path / "out" / "stats.json").read_text()) == one
    after = {name: rows(path) for name, path in files.items()}
    assert sorted(row["id"] for row in after["scored"]) == ["p0", "p1", "p2", "p3"]
    assert (after["sft"], after["dpo"]) == (before["sft"], before["dpo"])
    assert {path.name for path in files["scored"].parent.iterdir()} == {
        p.name for p in files.values()
    }


def test_pairs_are_best_right_and_worst_wrong(tmp_path, cache, prm):
    stats = score(tmp_path, cache, use_prm="true", prm_url=prm[0], max_pairs=2)
    pairs = rows(tmp_path / "out" / "data" / "dpo.jsonl")
    assert stats["pairs"] == len(pairs) == 6  # two each, and none where all are right
    by_problem = {}
    for pair in pairs:
        by_problem.setdefault(pair["id"], []).append(pair["samples"])
    assert by_problem["p0"] == [[0, 3], [1, 2]]
    assert by_problem["p1"] == by_problem["p2"] == [[0, 3], [5, 2]]
    tokenizer = build_tokenizer()
    add_function_tokens(tokenizer)
    examples, _ = load_rows(
        str(tmp_path / "out" / "data" / "dpo.jsonl"), tokenizer, pairs=True,
        system_prompt=None, mask_wrong=True, functional=True, max_length=999,
    )  # fmt: skip
    assert len(examples) == 6


def test_steps_are_segments_or_lines():
    assert step_texts("<next_step>a\nb</next_step><output>c</output>") == ["a\nb", "c"]
    assert step_texts("<next_step>a</next_step> and <output>c</output>") == [
        "<next_step>a</next_step> and <output>c</output>"
    ]
    assert step_texts("a\n\n b \n") == ["a", " b "]


@pytest.mark.cases
def test_responses_with_control_text_become_no_rows(tmp_path):
    """Neither as the chosen nor as the rejected side: those of the template, and functional ones.

    A cache that does not mark them needs the tokenizer. The tags of whole segments are allowed.
    """
    build_tokenizer().save_pretrained(tmp_path / "model")
    texts = [
        "So \\boxed{4}.",
        "So \\boxed{4}. <|user|>",
        "<next_step>So \\boxed{4}.",
        "<next_step>2 + 2 = 4 <|user|></next_step><output>\\boxed{4}</output>",
        "<next_step>2 + 2 = 4</next_step><output>\\boxed{4}</output>",
        "So \\boxed{5}. <|user|>",
        "So \\boxed{5}.",
    ]
    responses = [
        response(text, control_text="<|" in text or i == 2) for i, text in enumerate(texts)
    ]
    write_jsonl(tmp_path / "marked.jsonl", [CACHE[0] | {"responses": responses}])
    for said in responses:
        del said["control_text"]
    write_jsonl(tmp_path / "raw.jsonl", [CACHE[0] | {"responses": responses}])
    with pytest.raises(UserError, match=r"raw\.jsonl does not mark .* set it \("):
        score(tmp_path, tmp_path / "raw.jsonl", output_dir=tmp_path / "refused")
    gc.collect()
    opened = {"model_name_or_path": tmp_path / "model", "output_dir": tmp_path / "opened"}
    score(tmp_path, tmp_path / "marked.jsonl", max_pairs=9)
    search.main(scoring(tmp_path, tmp_path / "raw.jsonl", max_pairs=9, **opened))
    for folder in ("out", "opened"):
        stats = json.loads((tmp_path / folder / "stats.json").read_text())
        assert nonzero(stats["counts"]) == {"control_text": 4, "wrong": 1, "kept": 2}
        written = (tmp_path / folder / "data" / "sft.jsonl").read_text()
        written += (tmp_path / folder / "data" / "dpo.jsonl").read_text()
        assert "<|user|>" not in written
        assert written.count("boxed{5}") == 1


def test_a_refused_response_is_counted_not_guessed():
    cfg = load_config(SearchConfig, ["output_dir=o", "model_name_or_path=m", "train_file=t"])
    told = {"correct": True, "process": None, "refused": "of 9000 tokens"}
    problem = CACHE[0] | {"responses": [r | told for r in CACHE[0]["responses"][:2]]}
    made = curate_responses(problem, cfg)
    assert (made["rows"], nonzero(made["counts"])) == ([], {"unscored": 2})


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"id": "a", "rows": []}, r"raw.jsonl:1 lacks answer, question, responses; search"),
        (CACHE[0] | {"responses": [{"text": "a"}]}, r":1 lacks finish, tokens; search"),
        (CACHE[0] | {"responses": []}, r":1 lacks any response; search"),
        (CACHE[0] | {"responses": "So 4."}, r":1: 'responses' must be a list of objects, got"),
        (CACHE[0] | {"answer": {"value": 4}}, r":1: 'answer' must be text, got \{'value': 4\}"),
        (
            CACHE[0] | {"responses": [{"text": ["4"], "tokens": 1, "finish": "stop"}]},
            r":1: 'text' must be text, got \['4'\]",
        ),
        (CACHE[1], r"raw.jsonl:2 repeats the problem 'p1'"),
    ],
)
def test_what_is_no_cache_is_named(tmp_path, row, message):
    write_jsonl(tmp_path / "raw.jsonl", [row, CACHE[1]])
    with pytest.raises(UserError, match=message):
        score(tmp_path, tmp_path / "raw.jsonl")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"raw_file": "null"}, "method=score needs raw_file"),
        ({"method": "sample"}, "raw_file needs method=score, got method=sample"),
        ({"prm_threshold": 0.9}, r"prm_threshold=0.9 needs process scores; set use_prm: true"),
        ({"custom_filter": "nowhere:f"}, "module:function, got 'nowhere:f'"),
    ],
)
def test_impossible_wishes_end_in_one_line(tmp_path, cache, changes, message):
    with pytest.raises(UserError, match=message):
        score(tmp_path, cache, **changes)


# ---- Distilling: a URL feeds the same path ----


@pytest.fixture
def teacher():
    """(url, requests seen) of a chat server that is right for even seeds."""
    seen = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self):
            asked = json.loads(self.rfile.read(int(self.headers["content-length"])))
            seen.append(asked)
            text = answer([0.9], asked["seed"] % 1000, right=asked["seed"] % 2 == 0)
            text = "<|user|>\n" * (asked["seed"] % 3 == 0) + text
            choice = {"message": {"content": text}, "finish_reason": "stop"}
            usage = {"prompt_tokens": 20, "completion_tokens": 12}
            reply(self, 200, {"choices": [choice], "usage": usage})

        def log_message(self, *_):
            pass

    server, url = serve(Handler)
    yield f"{url}/v1", seen
    server.shutdown()
    server.server_close()


def test_distilling_goes_from_a_url_to_rows_that_train(tmp_path, teacher, prm):
    url, seen = teacher
    build_tokenizer().save_pretrained(tmp_path / "student")
    problems = [{"id": f"q{i}", "question": f"{i} pens. 2 + 2?", "answer": "4"} for i in range(5)]
    write_jsonl(tmp_path / "problems.jsonl", problems)
    given = {
        "output_dir": tmp_path / "teacher", "model_name_or_path": tmp_path / "student",
        "train_file": tmp_path / "problems.jsonl", "method": "sample", "simulations": 6,
        "engine": "api", "api_url": url, "api_model": "big", "api_max_tokens": 100_000,
    }  # fmt: skip
    arguments = [f"{key}={value}" for key, value in given.items()]
    search.main(load_config(SearchConfig, arguments))
    gc.collect()
    assert len(seen) == 30
    raw = rows(tmp_path / "teacher" / "data" / "raw.jsonl")
    stats = json.loads((tmp_path / "teacher" / "stats.json").read_text())
    n_right = sum(r["correct"] for row in raw for r in row["responses"])
    assert sum(len(row["responses"]) for row in raw) == stats["responses"] == 30
    assert sum(asked["seed"] % 2 == 0 for asked in seen) == n_right > 0
    assert stats["generated_tokens"] == 12 * 30
    assert {r["logprob"] for row in raw for r in row["responses"]} == {None}
    n_control = sum(asked["seed"] % 3 == 0 for asked in seen)
    assert stats["counts"]["control_text"] == n_control > 0
    assert "<|user|>" not in (tmp_path / "teacher" / "data" / "sft.jsonl").read_text()

    search.main(load_config(SearchConfig, [*arguments, "n_best_to_keep=1"]))  # nothing is paid
    assert len(seen) == 30
    assert json.loads((tmp_path / "teacher" / "stats.json").read_text())["counts"]["kept"] <= 5

    scored = score(
        tmp_path, tmp_path / "teacher/data/raw.jsonl", use_prm="true", prm_url=prm[0],
        prm_threshold=0.9,
    )  # fmt: skip
    assert len(seen) == 30
    assert sum(scored["counts"].values()) == 30
    assert scored["rows"] > 0
    examples, too_long = load_rows(
        str(tmp_path / "out" / "data" / "sft.jsonl"),
        load_tokenizer(str(tmp_path / "student")), system_prompt=None, mask_wrong=True,
        functional=False, max_length=999,
    )  # fmt: skip
    assert (len(examples), too_long) == (scored["rows"], {})
    assert len(rows(tmp_path / "out/data/dpo.jsonl")) == scored["pairs"] > 0
