"""Test tokens.py and prompts.py on small tokenizers of three families: ids, round trips."""

import json
import re
import unicodedata
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers.processors import ByteLevel, Sequence, TemplateProcessing
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from rftt.engines.chat import encode_chat
from rftt.prompts import question_messages
from rftt.tokens import (
    ACTS,
    ALIASES,
    CLOSERS,
    FUNCTIONS,
    OPENERS,
    FunctionIds,
    add_function_tokens,
    description_of,
    function_ids,
    parse_response,
    render,
    successors,
)
from rftt.types import UserError

# ---- The families: what their released tokenizer.json say, on a vocabulary of a few hundred ----

TEXTS = [
    "What is given and what is asked? So 12 + 7 = 19.",
    "The answer is \\boxed{19}.\n\nx^2 é 数",
]
CASES = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
TURNS = (
    "{% for m in messages %}OPEN{{ m['role'] }}MID{{ m['content'] | trim }}CLOSE{% endfor %}"
    "{% if add_generation_prompt %}OPENassistantMID{% endif %}"
)


def turns(start: str, middle: str, end: str) -> str:
    return TURNS.replace("OPEN", start).replace("MID", middle).replace("CLOSE", end)


def byte_level(digits: str, special: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(CASES + digits + REST), "isolated")
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, as_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        TEXTS, trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet, show_progress=False)
    )
    tokenizer.add_special_tokens(special)
    return tokenizer


def qwen2() -> PreTrainedTokenizerBase:
    tokenizer = byte_level(r"\p{N}", ["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    tokenizer.normalizer = normalizers.NFC()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=turns("<|im_start|>", "\n", "<|im_end|>\n"),
    )


def llama3() -> PreTrainedTokenizerBase:
    """Its post-processor puts a BOS before every text, and its chat template writes one too."""
    headers = ["<|start_header_id|>", "<|end_header_id|>"]
    bos = "<|begin_of_text|>"
    tokenizer = byte_level(r"\p{N}{1,3}", [bos, "<|eot_id|>", *headers])
    with_bos = TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
    )
    tokenizer.post_processor = Sequence([ByteLevel(trim_offsets=False), with_bos])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=bos,
        eos_token="<|eot_id|>",
        chat_template="{{ bos_token }}" + turns(headers[0], headers[1] + "\n\n", "<|eot_id|>"),
    )


def gemma() -> PreTrainedTokenizerBase:
    """Spaces are written ▁, and what the vocabulary lacks falls back to bytes."""
    raw = Tokenizer(models.BPE())
    raw.train_from_iterator(
        [text.replace(" ", "▁") for text in TEXTS],
        trainers.BpeTrainer(vocab_size=100, show_progress=False),
    )
    model = json.loads(raw.to_str())["model"]
    names = ["<pad>", "<eos>", "<bos>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    vocab = {token: i for i, token in enumerate([*names, *model["vocab"]])}
    merges = [tuple(pair) for pair in model["merges"]]
    tokenizer = Tokenizer(
        models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokenizer.add_special_tokens(["<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"])
    tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", tokenizer.token_to_id("<bos>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        chat_template="{{ bos_token }}" + turns("<start_of_turn>", "\n", "<end_of_turn>\n"),
    )


FAMILIES: dict[str, Callable[[], PreTrainedTokenizerBase]] = {
    "qwen2": qwen2,
    "llama3": llama3,
    "gemma": gemma,
}
families = pytest.mark.parametrize("family", FAMILIES)


@cache
def extended(family: str) -> tuple[PreTrainedTokenizerBase, FunctionIds]:
    tokenizer = FAMILIES[family]()
    add_function_tokens(tokenizer)
    return tokenizer, function_ids(tokenizer)


# ---- Vocabulary ----


@families
def test_each_delimiter_is_one_new_id_at_the_end_of_the_vocabulary(family: str) -> None:
    tokenizer = FAMILIES[family]()
    before = len(tokenizer)
    with pytest.raises(UserError, match=r"'<clarify>' encodes to \d+ ids .* train_sft.py first"):
        function_ids(tokenizer)
    assert add_function_tokens(tokenizer) == [*OPENERS, *CLOSERS]
    ids = function_ids(tokenizer)
    assert sorted([*ids.openers, *ids.closers]) == list(range(before, before + 16))
    assert len(tokenizer) == before + 16
    assert ids.end == tokenizer.convert_tokens_to_ids("</output>")
    assert add_function_tokens(tokenizer) == []
    assert function_ids(tokenizer) == ids


@families
def test_delimiters_survive_saving_loading_and_decoding(family: str, tmp_path: Path) -> None:
    tokenizer, ids = extended(family)
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert function_ids(loaded) == ids
    response = render([("next_step", "12 + 7 = 19"), ("output", "\\boxed{19}")], loaded, ids)
    text = "<next_step>12 + 7 = 19</next_step><output>\\boxed{19}</output>"
    assert loaded.decode(response, skip_special_tokens=True) == text
    assert not {*OPENERS, *CLOSERS} & set(loaded.all_special_tokens)


@families
def test_delimiters_are_cut_out_of_running_text(family: str) -> None:
    tokenizer, ids = extended(family)
    around = tokenizer.encode("so<verify> is it 19", add_special_tokens=False)
    before = tokenizer.encode("so", add_special_tokens=False)
    after = tokenizer.encode(" is it 19", add_special_tokens=False)
    assert around == [*before, ids.open["verify"], *after]


def test_descriptions_of_all_sixteen_delimiters_differ() -> None:
    assert len({description_of(token) for token in OPENERS + CLOSERS}) == 16


# ---- Render and parse ----

sound = st.text(st.characters(codec="utf-8", exclude_characters="▁", exclude_categories=["Cs"]))
bodies = sound.map(lambda text: unicodedata.normalize("NFC", text)).filter(
    lambda text: not any(token in text for token in OPENERS + CLOSERS)
)
paths = st.lists(st.tuples(st.sampled_from(ACTS[:-1]), bodies), max_size=6)
quick = settings(max_examples=60, deadline=None, derandomize=True, database=None)


@pytest.mark.invariant
@families
@quick
@given(steps=paths, last=bodies)
def test_render_parse_round_trip(family: str, steps: list[tuple[str, str]], last: str) -> None:
    tokenizer, ids = extended(family)
    written = [*steps, ("output", last)]
    response = render(written, tokenizer, ids)
    spans, covered = parse_response(response, ids)
    texts = [tokenizer.decode(response[span.start + 1 : span.stop - 1]) for span in spans]
    assert covered == len(response)
    assert list(zip([span.act for span in spans], texts, strict=True)) == written
    # The text of a response gives its ids back: nothing is lost on disk.
    assert tokenizer.encode(tokenizer.decode(response), add_special_tokens=False) == response


FAKE = FunctionIds(
    {act: 10 + i for i, act in enumerate(ACTS)}, {act: 20 + i for i, act in enumerate(ACTS)}
)
SYMBOLS = {10 + i: "ABCDEFGH"[i] for i in range(8)} | {20 + i: "abcdefgh"[i] for i in range(8)}
WHOLE = re.compile("(?:" + "|".join(rf"{c}\.*{c.lower()}" for c in "ABCDEFG") + r")*(?:H\.*h)?")
ids_of_a_response = st.lists(st.sampled_from([1, 2, 3, *SYMBOLS, 10, 20, 17, 27]), max_size=24)


@pytest.mark.oracle
@settings(quick, max_examples=400)
@given(response=ids_of_a_response)
def test_parse_is_a_regular_expression(response: list[int]) -> None:
    spans, covered = parse_response(response, FAKE)
    letters = "".join(SYMBOLS.get(token, ".") for token in response)
    match = WHOLE.match(letters)
    assert match is not None
    assert covered == match.end()
    assert [0, *(span.stop for span in spans)] == [*(span.start for span in spans), covered]
    for span in spans:
        assert response[span.start] == FAKE.open[span.act]
        assert response[span.stop - 1] == FAKE.close[span.act]


@pytest.mark.parametrize(
    ("response", "acts", "covered"),
    [
        ([], [], 0),
        ([1, 10, 20], [], 0),  # text before the first segment
        ([10, 1, 20, 1, 11, 21], ["clarify"], 3),  # text between two segments
        ([10, 1, 20, 11, 1], ["clarify"], 3),  # never closed: cut off by the token budget
        ([10, 1, 21], [], 0),  # closed by another act's closer
        ([10, 11, 21, 20], [], 0),  # nested
        ([20, 10, 20], [], 0),  # begins with a closer
        ([10, 20, 17, 27, 10, 20], ["clarify", "output"], 4),  # goes on after </output>
        ([10, 20], ["clarify"], 2),  # an empty segment is a segment
    ],
)
def test_parse_of_malformed_responses(response: list[int], acts: list[str], covered: int) -> None:
    spans, end = parse_response(response, FAKE)
    assert [span.act for span in spans] == acts
    assert end == covered


# ---- Grammar, limits and prompts ----


@pytest.mark.oracle
def test_grammars_equal_the_lists_of_the_paper() -> None:
    prompted = {
        "clarify": "analysis next_step direct_answer subquestion",
        "analysis": "direct_answer next_step subquestion",
        "next_step": "next_step direct_answer subquestion",
        "subquestion": "direct_answer next_step",
        "direct_answer": "",
        "verify": "",  # written by cross verification and branch merging, not by the search
        "refine": "",
        "output": "",
    }
    learned = {
        "clarify": "analysis subquestion next_step direct_answer",
        "analysis": "subquestion next_step direct_answer",
        "next_step": "next_step direct_answer subquestion verify output",
        "subquestion": "next_step direct_answer",
        "direct_answer": "output verify",
        "verify": "next_step refine direct_answer subquestion verify output",
        "refine": "next_step direct_answer output subquestion verify",
        "output": "",
    }
    twice = ["clarify", "analysis", "subquestion", "next_step"] * 2
    assert sorted(successors(None, "prompted")) == sorted([*twice, "direct_answer"])
    assert sorted(successors(None, "learned")) == sorted(twice[:4])
    assert successors("", "learned") == ()  # text outside any segment leads nowhere
    for act in ACTS:
        assert sorted(successors(act, "prompted")) == sorted(prompted[act].split())
        assert sorted(successors(act, "learned")) == sorted(learned[act].split())
        assert all(following in FUNCTIONS for following in successors(act, "learned"))


def test_limits_equal_the_paper_and_the_alias_names_an_act() -> None:
    limits = {act: (f.max_tokens, f.max_sentences, f.one_line) for act, f in FUNCTIONS.items()}
    assert limits["clarify"] == (512, 3, False)
    assert limits["analysis"] == (512, None, False)
    assert limits["next_step"] == (512, 3, False)
    assert limits["subquestion"] == (256, None, True)
    assert limits["direct_answer"] == (4096, None, False)
    assert ALIASES == {"analyze": "analysis"}
    assert tuple(FUNCTIONS) == ACTS
    assert len(ACTS) == 8


# ---- Chat prompts ----


@families
@pytest.mark.parametrize("system", [None, "Be exact."])
def test_encode_chat_never_doubles_the_bos(family: str, system: str | None) -> None:
    tokenizer, _ = extended(family)
    ids = encode_chat(tokenizer, question_messages("What is 12 + 7?", system))
    text = tokenizer.decode(ids)
    bos = tokenizer.bos_token_id
    assert ids.count(bos) == (0 if bos is None else 1)
    assert bos is None or ids[0] == bos
    assert "What is 12 + 7?" in text
    assert ("Be exact." in text) == bool(system)
    assert text.rstrip("\n").endswith(("assistant", "assistant<|end_header_id|>"))


@families
def test_a_reply_can_be_begun(family: str) -> None:
    tokenizer, _ = extended(family)
    messages = question_messages("What is 12 + 7?")
    begun = {"role": "assistant", "content": "12 + 7\n"}
    ids = encode_chat(tokenizer, [*messages, begun])
    assert ids[: len(encode_chat(tokenizer, messages))] == encode_chat(tokenizer, messages)
    assert tokenizer.decode(ids).endswith("12 + 7\n")


def test_encode_chat_refuses_a_template_that_doubles_the_bos() -> None:
    tokenizer = llama3()
    tokenizer.chat_template = "{{ bos_token }}" + str(tokenizer.chat_template)
    with pytest.raises(UserError, match="two BOS tokens"):
        encode_chat(tokenizer, question_messages("What is 12 + 7?"))
