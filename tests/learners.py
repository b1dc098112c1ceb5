"""Build tiny random models of three families, batches and rollouts for rftt/learner."""

from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from rftt.batch import Batch
from rftt.learner.offline import collate_rows
from rftt.tokens import CLOSERS, OPENERS, description_of

VOCABULARY = 67
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
GEMMA = {"head_dim": 8, "sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]}


def tiny_model(family: str = "qwen2", *, tied: bool = True, seed: int = 0) -> PreTrainedModel:
    """A float32 model of about 10,000 parameters with weights far from zero."""
    sizes = SIZES | {"tie_word_embeddings": tied, "initializer_range": 0.2}
    torch.manual_seed(seed)
    match family:
        case "qwen2":
            return Qwen2ForCausalLM(Qwen2Config(**sizes))
        case "llama":
            return LlamaForCausalLM(LlamaConfig(**sizes))
        case "gemma":
            return Gemma3ForCausalLM(Gemma3TextConfig(**sizes, **GEMMA))
    raise ValueError(family)


def random_qwen2(vocab_size: int, *, seed: int = 0, **changes: Any) -> Qwen2ForCausalLM:
    """Grouped queries, heads of a width that vLLM takes, weights so wide that context matters."""
    sizes: dict[str, Any] = {
        "vocab_size": vocab_size,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 256,
        "tie_word_embeddings": True,
        "initializer_range": 0.12,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    torch.manual_seed(seed)
    return Qwen2ForCausalLM(Qwen2Config(**sizes | changes)).eval()


def rows(lengths: list[int], seed: int = 0) -> list[tuple[list[int], list[int], list[bool]]]:
    """(prompt, response, mask) of random ids; about one response token in five is masked."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for length in lengths:
        ids = torch.randint(0, VOCABULARY, (length,), generator=generator).tolist()
        cut = max(1, length // 3)
        mask = (torch.rand(length - cut, generator=generator) < 0.8).tolist()
        made.append((ids[:cut], ids[cut:], mask))
    return made


def random_batch(lengths: list[int], seed: int = 0) -> Batch:
    """A batch with every optional tensor filled with noise."""
    generator = torch.Generator().manual_seed(seed + 1)
    batch = collate_rows(rows(lengths, seed))
    names = ("rewards", "sampling_logprobs", "old_logprobs", "ref_logprobs", "values", "advantages")
    noise = torch.randn(len(names), sum(lengths), generator=generator)
    return batch.replace(**dict(zip(names, noise, strict=True)))


def word_tokenizer(n_words: int) -> PreTrainedTokenizerFast:
    """Whole words, those of the descriptions first."""
    words = {word for t in OPENERS + CLOSERS for word in description_of(t).split()}
    vocabulary = {word: i for i, word in enumerate(["<unk>", *sorted(words)])}
    vocabulary |= {f"w{i}": i for i in range(len(vocabulary), n_words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")
