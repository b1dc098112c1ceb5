"""Test each filter on texts made for it, and the counts of `select` against its input."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rftt.curate import follows_grammar, repeats
from rftt.run import filters
from rftt.run.cli import load_function
from rftt.run.config import SearchConfig, load_config
from rftt.run.contract import leaks, mentions
from rftt.run.filters import FILTERS, ngrams, script_ratio, select, similarity
from rftt.types import UserError

NEEDED = {"output_dir": "o", "model_name_or_path": "m", "train_file": "t"}


def config(**changes):
    process = {"use_prm": "true", "prm_url": "http://u"} if "prm_threshold" in changes else {}
    given = NEEDED | {"method": "sample"} | process | changes
    return load_config(SearchConfig, [f"{key}={value}" for key, value in given.items()])


def row(text="So 4. \\boxed{4}", **changes):
    made = {"text": text, "steps": text.splitlines(), "tokens": len(text), "finish": "stop"}
    made |= {"control_text": False, "correct": True, "score": None, "refused": None}
    return made | changes


def reasons(rows, **changes):
    """What `select` counts, without the zeros."""
    return {name: n for name, n in select(rows, config(**changes))[1].items() if n}


def test_of_a_text():
    assert repeats(["So. So. On.", "so."]) == 3
    assert follows_grammar(["analysis", "next_step", "verify", "refine", "next_step", "output"])
    assert not follows_grammar(["direct_answer", "output"])
    assert not follows_grammar(["analysis", "output"])
    assert mentions("it is 7.", "7")
    assert mentions("(x-1)(x+1) holds", "(x-1)(x+1)")
    assert not mentions("it is 17 or 7.5", "7")
    assert leaks("so 7", "7", "we had 6")
    assert not leaks("so 7", "7", "we had 7 before")


@pytest.mark.parametrize(
    ("text", "scripts", "ratio"),
    [
        ("Two and two", ["latin"], 1.0),
        ("两个", ["latin"], 0.0),
        ("ab两个", ["latin"], 0.5),
        ("ab两个", ["latin", "cjk"], 1.0),
        ("日本の", ["cjk", "hiragana"], 1.0),
        ("Ответ: $x + y$ \\frac{1}{2}", ["cyrillic"], 1.0),  # formulas have no language
        ("<analysis>两</analysis>", ["cjk"], 1.0),  # nor have tags
        ("2 + 2 = 4", ["cjk"], 1.0),
    ],
)
def test_script_ratio_is_of_the_letters_of_the_prose(text, scripts, ratio):
    assert script_ratio(text, scripts) == ratio


@pytest.mark.oracle
def test_similarity_on_trigrams_counted_by_hand():
    assert ngrams("a b c d") == {("a", "b", "c"), ("b", "c", "d")}
    assert ngrams("四个人。") == {("四", "个", "人"), ("个", "人", "。")}
    assert similarity("a b c d", "A b  c e") == 1 / 3
    assert similarity("19*3 = 57", "19*3 = 58") == 2 / 4
    assert similarity("one", "one") == similarity("", "") == 1.0
    assert similarity("one", "two") == 0.0


@pytest.mark.parametrize(
    ("bad", "changes", "reason"),
    [
        ({"finish": "length"}, {}, "unfinished"),
        ({"control_text": True}, {}, "control_text"),
        ({"correct": False}, {}, "wrong"),
        ({"refused": "too long"}, {}, "unscored"),
        ({"score": 0.89}, {"prm_threshold": 0.9}, "low_process_score"),
        ({"text": "答案是四。"}, {"scripts": "[latin]"}, "language"),
        ({"steps": ["Again.", "Again. Again."]}, {}, "repetitive"),
        ({"tokens": 101}, {"max_row_tokens": 100}, "length"),
        ({"tokens": 1}, {"min_row_tokens": 2}, "length"),
    ],
)
def test_a_bad_response_goes_for_its_reason_and_a_good_one_stays(bad, changes, reason):
    good = row("The answer is \\boxed{4}", score=0.9)
    kept, counts = select([row(score=0.95) | bad, good], config(**changes))
    assert kept == [good]
    assert {name: n for name, n in counts.items() if n} == {reason: 1, "kept": 1}


def test_too_easy_and_too_hard_are_shares_of_all_responses():
    rows = [row(f"{i} is four", correct=i < 3) for i in range(4)]
    assert reasons(rows, easy_query_threshold=0.7) == {"too_easy": 4}
    assert reasons(rows, easy_query_threshold=0.75) == {"wrong": 1, "kept": 3}
    assert reasons(rows, hard_query_threshold=0.8) == {"too_hard": 4}
    assert reasons(rows, hard_query_threshold=0.75) == {"wrong": 1, "kept": 3}


def test_of_near_duplicates_the_best_stays():
    one, other = row("First we add 1 and 3 to get 4"), row("First we add 1 and 3 and get 4")
    assert reasons([one, other]) == {"kept": 2}
    kept, counts = select([other, one, dict(one)], config(max_similarity=0.4))
    assert kept == [one]  # the shorter
    assert counts["near_duplicate"] == 2
    kept, _ = select([one | {"score": 0.1}, other | {"score": 0.2}], config(max_similarity=0.4))
    assert kept[0]["text"] == other["text"]  # the one that the process reward prefers


def test_n_best_are_the_best_of_what_is_fit():
    rows = [row(f"{'so ' * i}{i}", score=i / 10, correct=i != 9) for i in range(10)]
    kept, counts = select(rows, config(n_best_to_keep=2))
    assert [r["score"] for r in kept] == [0.8, 0.7]
    assert (counts["wrong"], counts["beyond_n_best"]) == (1, 7)


def test_custom_filter_is_called_with_each_row(tmp_path, monkeypatch):
    (tmp_path / "mine_for_rftt.py").write_text(
        "def short(row):\n    return row['tokens'] < 5\n\n"
        "def odd(row):\n    return 'yes'\n\nN = 3\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    rows = [row("a"), row("b" * 9)]
    assert reasons(rows, custom_filter="mine_for_rftt:short") == {"custom": 1, "kept": 1}
    with pytest.raises(UserError, match="mine_for_rftt:odd must return a bool, got 'yes'"):
        select(rows, config(custom_filter="mine_for_rftt:odd"))
    for name, message in {
        "mine_for_rftt:none": r"module:function, got 'mine_for_rftt:none' \(.*no attribute 'none'",
        "no_such_module:f": r"module:function, got 'no_such_module:f' \(No module named",
        "short": r"module:function, got 'short'",
        "": "module:function, got ''",
        "mine_for_rftt:N": "must name a function, got 'mine_for_rftt:N', which is of type int",
    }.items():
        with pytest.raises(UserError, match=message):
            load_function("custom_filter", name)


@pytest.mark.cases
@pytest.mark.parametrize(
    ("verdict", "kept"),
    [
        (np.bool_(True), 1),
        (np.array(3) > 5, 0),
        (torch.tensor(0.5) > 0.4, 1),
        (torch.tensor(False), 0),
        *(
            (other, None)
            for other in (np.array([True]), torch.tensor([True]), np.int64(1), 1, None)
        ),
    ],
)
def test_a_bool_of_another_library_is_a_bool(monkeypatch, verdict, kept):
    monkeypatch.setattr(filters, "load_function", lambda key, name: lambda row: verdict)
    if kept is None:
        with pytest.raises(UserError, match="must return a bool"):
            select([row()], config(custom_filter="mine:f"))
    else:
        assert select([row()], config(custom_filter="mine:f"))[1]["kept"] == kept


@pytest.mark.invariant
@given(
    st.lists(
        st.builds(
            row,
            st.sampled_from(["a b c", "a b d", "a. a. a.", "四", "x" * 30, ""]),
            correct=st.booleans(),
            finish=st.sampled_from(["stop", "length"]),
            score=st.sampled_from([0.2, 0.9]),
        ),
        max_size=12,
    ),
    st.sampled_from([{}, {"prm_threshold": 0.5, "scripts": "[latin]", "max_row_tokens": 20}]),
    st.sampled_from([{}, {"easy_query_threshold": 0.6}, {"hard_query_threshold": 0.4}]),
)
def test_counts_add_up_to_what_came_in(rows, some, others):
    kept, counts = select(rows, config(**some, **others, n_best_to_keep=3))
    assert sum(counts.values()) == len(rows)
    assert counts["kept"] == len(kept) <= 3
    assert set(counts) == {*FILTERS, "kept"}
    again, unchanged = select(kept, config(**some, n_best_to_keep=3))
    assert (again, unchanged["kept"]) == (kept, len(kept))  # what is fit stays fit


def test_an_unknown_script_is_one_clear_line():
    with pytest.raises(UserError, match=r"`scripts\[0\]` must be one of latin, cyrillic.*'lattin'"):
        config(scripts="[lattin]")
