"""Test tiny Qwen2-, Llama- and Gemma-style models: packing, chunks and new rows are exact."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from rftt import rl
from rftt.batch import Batch
from rftt.learner.fsdp import empty_like, flat_microbatches
from rftt.learner.logprobs import _ChunkedLogprobs, token_logprobs, token_values
from rftt.learner.model import Critic, load_critic, load_policy, prepare
from rftt.learner.offline import collate_rows
from rftt.learner.prefix_tree import forest_of, n_saved, tree_microbatches
from rftt.learner.rows import add_function_rows
from rftt.tokens import CLOSERS, OPENERS, add_function_tokens, description_of
from rftt.types import UserError
from tests.learners import VOCABULARY, random_batch, tiny_model, word_tokenizer

FAMILIES = ["qwen2", "llama", "gemma"]
LENGTHS = [9, 3, 17, 2, 12]


def unpacked_logprobs(
    model: PreTrainedModel, batch: Batch, temperature: float, n_tokens: int
) -> tuple[Tensor, Tensor]:
    """One document at a time through the model's own attention and a full softmax."""
    logprobs, entropies = [], []
    documents = zip(
        batch.input_ids.split(batch.lengths), batch.action_mask.split(batch.lengths), strict=True
    )
    for ids, mask in documents:
        logits = model(ids[None]).logits[0, :, :n_tokens].float() / temperature
        logp = logits.log_softmax(-1)[:-1]
        picked = logp.gather(-1, ids[1:, None].clamp(max=n_tokens - 1))[:, 0]
        entropy = -(logp.exp() * logp).sum(-1)
        logprobs.append(torch.cat([torch.zeros(1), picked]) * mask)
        entropies.append(torch.cat([torch.zeros(1), entropy]) * mask)
    return torch.cat(logprobs), torch.cat(entropies)


def branching_batch() -> Batch:
    """Two problems of a few paths each: shared prompts, shared beginnings, one path twice."""
    generator = torch.Generator().manual_seed(5)

    def tokens(n: int) -> list[int]:
        return torch.randint(0, VOCABULARY, (n,), generator=generator).tolist()

    rows = []
    for _ in range(2):
        prompt, stem, branch = tokens(4), tokens(5), tokens(3)
        for response in (
            stem + tokens(3),
            stem + branch + tokens(6),
            stem + branch,
            stem[:2],
            stem,
        ):
            rows.append((prompt, response, [True] * len(response)))
        rows.append(rows[-2])
    batch = collate_rows(rows)
    noise = torch.randn(len(batch.input_ids), generator=generator)
    return batch.replace(advantages=noise)


@pytest.mark.oracle
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [True, False])
def test_packed_logprobs_and_gradients_equal_unpacked(family: str, tied: bool) -> None:
    batch = random_batch(LENGTHS)
    batch = batch.replace(input_ids=batch.input_ids.clamp(max=60))
    ours, theirs = tiny_model(family, tied=tied), tiny_model(family, tied=tied)
    prepare(ours)
    weight = torch.randn(2, len(batch.input_ids))
    packed = token_logprobs(ours, batch, 0.7, 61, chunk=5, with_entropy=True)
    unpacked = unpacked_logprobs(theirs, batch, 0.7, 61)
    for got, expected, w in zip(packed, unpacked, weight, strict=True):
        torch.testing.assert_close(got, expected, atol=2e-5, rtol=1e-5)
        (got * w).sum().backward(retain_graph=True)
        (expected * w).sum().backward(retain_graph=True)
    for (name, mine), (_, other) in zip(
        ours.named_parameters(), theirs.named_parameters(), strict=True
    ):
        assert mine.grad is not None, name
        scale = other.grad.abs().max().item()
        torch.testing.assert_close(mine.grad, other.grad, atol=2e-5 * max(scale, 1), rtol=1e-4)


@pytest.mark.invariant
@pytest.mark.parametrize("chunk", [1, 4, 1000])
def test_chunks_change_nothing(chunk: int) -> None:
    batch, model = random_batch(LENGTHS), prepare(tiny_model())
    whole, _ = token_logprobs(model, batch, 1.0, VOCABULARY)
    chunked, _ = token_logprobs(model, batch, 1.0, VOCABULARY, chunk=chunk)
    torch.testing.assert_close(chunked, whole, atol=1e-6, rtol=1e-6)


@pytest.mark.oracle
@pytest.mark.parametrize("cap", [None, 1.5])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(("chunk", "n_kept"), [(3, 0), (3, 2), (20, 1), (7, 9)])
def test_the_heads_backward_is_the_derivative_of_its_forward(
    chunk: int, n_kept: int, biased: bool, cap: float | None
) -> None:
    """Float64 finite differences; ids beyond 13 are not the tokenizer's."""
    generator = torch.Generator().manual_seed(2)
    hidden, weight = (
        torch.randn(n, 4, dtype=torch.float64, generator=generator, requires_grad=True)
        for n in (6, 15)
    )
    bias = torch.randn(15, dtype=torch.float64, generator=generator, requires_grad=True)
    own = (hidden, weight, bias if biased else None)
    targets = torch.tensor([0, 3, 12, 5, 6, 12])
    starts = range(0, 13, chunk)

    def head(hidden: Tensor, weight: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
        weights = (hidden, weight, bias, None, ())
        return _ChunkedLogprobs.apply(*weights, cap, targets, 0.7, starts, n_kept, True)

    assert torch.autograd.gradcheck(head, own[: 2 + biased])
    logits = hidden @ weight[:13].T + (bias[:13] if biased else 0.0)
    logits = cap * torch.tanh(logits / cap) if cap else logits
    logp = (logits / 0.7).log_softmax(-1)
    logprobs, entropy = head(*own)
    torch.testing.assert_close(logprobs, logp.gather(-1, targets[:, None])[:, 0])
    torch.testing.assert_close(entropy, -(logp.exp() * logp).sum(-1))


@pytest.mark.lora
@pytest.mark.oracle
@pytest.mark.parametrize(("chunk", "n_kept"), [(3, 0), (3, 2), (20, 1)])
def test_rows_of_a_frozen_head_have_the_derivative_of_its_forward(chunk: int, n_kept: int) -> None:
    """Float64 finite differences; the ids are in different chunks, one beyond the tokenizer's."""
    generator = torch.Generator().manual_seed(3)
    hidden, own = (
        torch.randn(n, 4, dtype=torch.float64, generator=generator, requires_grad=True)
        for n in (6, 4)
    )
    weight = torch.randn(15, 4, dtype=torch.float64, generator=generator)
    targets, ids, starts = torch.tensor([0, 3, 12, 5, 6, 12]), (5, 12, 3, 14), range(0, 13, chunk)

    def head(hidden: Tensor, own: Tensor) -> tuple[Tensor, Tensor]:
        weights = (hidden, weight, None, own, ids)
        return _ChunkedLogprobs.apply(*weights, None, targets, 0.7, starts, n_kept, True)

    assert torch.autograd.gradcheck(head, (hidden, own))
    replaced = weight.index_copy(0, torch.tensor(ids), own)
    logp = (hidden @ replaced[:13].T / 0.7).log_softmax(-1)
    logprobs, entropy = head(hidden, own)
    torch.testing.assert_close(logprobs, logp.gather(-1, targets[:, None])[:, 0])
    torch.testing.assert_close(entropy, -(logp.exp() * logp).sum(-1))


@pytest.mark.parametrize("family", FAMILIES)
def test_gated_mlps_keep_no_product_for_the_backward(family: str) -> None:
    """Gate and up, not what they become: four tensors of this width in an MLP left alone."""
    batch, widths = random_batch(LENGTHS), []

    def keep(saved: Tensor) -> Tensor:
        widths.append(saved.shape[-1] if saved.shape[-2:-1] == batch.input_ids.shape else 0)
        return saved

    model = prepare(tiny_model(family))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda saved: saved):
        token_logprobs(model, batch, 1.0, VOCABULARY)
    assert widths.count(model.config.intermediate_size) == 2 * model.config.num_hidden_layers


@pytest.mark.invariant
def test_first_pass_ratio_is_exactly_one() -> None:
    batch, model = random_batch(LENGTHS), prepare(tiny_model())
    with torch.no_grad():
        old, _ = token_logprobs(model, batch, 0.9, VOCABULARY)
    new, _ = token_logprobs(model, batch, 0.9, VOCABULARY)
    assert torch.equal(new, old)
    _, metrics = rl.policy_loss(new, old, batch.advantages, batch.action_mask, epsilon=0.2)
    assert metrics["ratio_max"].item() == 1.0
    assert metrics["clip_share"].item() == 0


@pytest.mark.invariant
def test_a_document_does_not_see_its_neighbours() -> None:
    batch, model = random_batch(LENGTHS), prepare(tiny_model())
    alone, _ = token_logprobs(model, batch.select([2]), 1.0, VOCABULARY)
    among, _ = token_logprobs(model, batch, 1.0, VOCABULARY)
    torch.testing.assert_close(among.split(batch.lengths)[2], alone, atol=1e-5, rtol=1e-5)


@pytest.mark.invariant
def test_one_microbatch_or_many_give_the_same_gradient() -> None:
    batch = random_batch(LENGTHS)
    gradients = []
    for groups in ([list(range(5))], [[i] for i in range(5)]):
        model = prepare(tiny_model())
        for group in groups:
            part = batch.select(group)
            logprobs, _ = token_logprobs(model, part, 1.0, VOCABULARY)
            loss, _ = rl.policy_loss(
                logprobs, part.old_logprobs, part.advantages, part.action_mask, epsilon=0.2
            )
            (loss / batch.n_actions).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    torch.testing.assert_close(gradients[0], gradients[1], atol=1e-6, rtol=1e-4)


@pytest.mark.invariant
@pytest.mark.parametrize("family", FAMILIES)
def test_tree_packing_equals_flat_packing(family: str) -> None:
    """Log-probs, entropy, values and all gradients; a path still counts where it is shared."""
    flat = branching_batch()
    assert n_saved(flat.replace(packs_prefixes=True)) > 0.4 * len(flat.input_ids)
    results = []
    for batch in (flat, flat.replace(packs_prefixes=True)):
        model, critic = prepare(tiny_model(family)), Critic(prepare(tiny_model(family)).model)
        torch.nn.init.ones_(critic.head.weight)
        logprobs, entropy = token_logprobs(model, batch, 0.8, VOCABULARY, with_entropy=True)
        values = token_values(critic, batch)
        weights = batch.advantages * batch.action_mask
        ((logprobs + 0.3 * entropy) * weights).sum().backward()
        (values * weights).sum().backward()
        gradients = [p.grad for m in (model, critic) for p in m.parameters() if p.grad is not None]
        results.append([logprobs.detach(), entropy.detach(), values.detach(), *gradients])
    for one, other in zip(*results, strict=True):
        scale = max(1.0, one.abs().max().item())
        torch.testing.assert_close(one, other, atol=1e-5 * scale, rtol=1e-5)


@pytest.mark.invariant
def test_tree_microbatches_give_the_same_gradient() -> None:
    batch, gradients = branching_batch(), []
    for tree in (False, True):
        model, whole = prepare(tiny_model()), batch.replace(packs_prefixes=tree)
        groups = tree_microbatches(whole, 30) if tree else flat_microbatches(whole, 30)
        assert sorted(i for group in groups for i in group) == list(range(len(batch.lengths)))
        assert len(groups) > 1
        for group in groups:
            part = whole.select(group)
            logprobs, _ = token_logprobs(model, part, 1.0, VOCABULARY)
            (logprobs * part.advantages).sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    torch.testing.assert_close(gradients[0], gradients[1], atol=1e-5, rtol=1e-4)


@pytest.mark.oracle
def test_a_forest_holds_each_prefix_once() -> None:
    batch = branching_batch()
    documents = [tuple(ids.tolist()) for ids in batch.input_ids.split(batch.lengths)]
    prefixes = {ids[: n + 1] for ids in documents for n in range(len(ids))}
    forest = forest_of(batch.input_ids, batch.lengths, batch.starts)
    assert len(forest.token) == sum(forest.new) == len(prefixes)
    flat = [ids[: n + 1] for ids in documents for n in range(len(ids))]
    for token, node in enumerate(forest.node.tolist()):
        assert flat[token] == flat[int(forest.token[node])]


def test_ids_beyond_the_tokenizer_get_no_probability() -> None:
    batch, model = random_batch(LENGTHS), prepare(tiny_model(tied=False))
    batch = batch.replace(input_ids=batch.input_ids.clamp(max=49))
    full, _ = token_logprobs(model, batch, 1.0, VOCABULARY)
    cut, _ = token_logprobs(model, batch, 1.0, 50)
    assert (cut >= full).all()
    assert (cut > full)[batch.action_mask].all()
    cut.sum().backward()
    assert not model.lm_head.weight.grad[50:].any()


@pytest.mark.invariant
def test_gradient_checkpointing_changes_nothing() -> None:
    batch, gradients = random_batch(LENGTHS), []
    for checkpointing in (False, True):
        model = prepare(tiny_model(), gradient_checkpointing=checkpointing)
        token_logprobs(model, batch, 1.0, VOCABULARY)[0].sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    torch.testing.assert_close(gradients[0], gradients[1])


def test_a_batch_without_actions_still_runs_and_adds_nothing() -> None:
    model = prepare(tiny_model())
    logprobs, _ = token_logprobs(model, empty_like(random_batch(LENGTHS)), 1.0, VOCABULARY)
    logprobs.sum().backward()
    assert not any(p.grad.any() for p in model.parameters())


# ---- Critic ----


def test_a_new_critic_values_everything_at_zero_and_learns() -> None:
    batch = random_batch(LENGTHS)
    critic = Critic(prepare(tiny_model()).model)
    values = token_values(critic, batch)
    assert values.shape == batch.input_ids.shape
    assert not values.any()
    loss, _ = rl.value_loss(values, values.detach(), batch.advantages, batch.action_mask, 0.2)
    loss.backward()
    assert critic.head.weight.grad.any()


@pytest.mark.oracle
def test_values_speak_of_the_state_before_their_token() -> None:
    batch, model = random_batch([6]), tiny_model()
    reference = tiny_model()
    critic = Critic(prepare(model).model)
    torch.nn.init.ones_(critic.head.weight)
    values = token_values(critic, batch)
    hidden = reference.model(batch.input_ids[None]).last_hidden_state[0].sum(-1)
    expected = torch.cat([torch.zeros(1), hidden[:-1]]) * batch.action_mask
    torch.testing.assert_close(values, expected, atol=1e-5, rtol=1e-5)


# ---- Folders and vocabulary ----


@pytest.mark.oracle
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("n_words", [VOCABULARY, VOCABULARY - 20])
def test_new_rows_are_the_mean_of_their_description(
    tmp_path: Path, tied: bool, n_words: int
) -> None:
    """With a vocabulary to grow (67 + 16) and with one whose spare rows suffice (47 + 16)."""
    tokenizer, model = word_tokenizer(n_words), tiny_model(tied=tied)
    before = [model.model.embed_tokens.weight.clone(), model.lm_head.weight.clone()]
    new = add_function_tokens(tokenizer)
    add_function_rows(model, tokenizer, new)
    assert model.config.vocab_size == max(VOCABULARY, n_words + 16)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    after = [loaded.model.embed_tokens.weight, loaded.lm_head.weight]
    assert (after[0] is after[1]) == tied
    for old, weight in zip(before, after, strict=True):
        torch.testing.assert_close(weight[:n_words], old[:n_words])
        for token in OPENERS + CLOSERS:
            described = [tokenizer.convert_tokens_to_ids(w) for w in description_of(token).split()]
            row = weight[tokenizer.convert_tokens_to_ids(token)]
            torch.testing.assert_close(row, old[described].mean(0))


def test_a_model_that_does_not_fit_its_tokenizer_is_refused() -> None:
    tokenizer = word_tokenizer(VOCABULARY + 5)
    with pytest.raises(UserError, match="do not belong together"):
        add_function_rows(tiny_model(), tokenizer, add_function_tokens(tokenizer))


def test_load_policy_and_critic_from_a_folder_round_trip(tmp_path: Path) -> None:
    batch, model = random_batch(LENGTHS), tiny_model()
    model.save_pretrained(tmp_path)
    policy = load_policy(str(tmp_path), torch.float32, gradient_checkpointing=True)
    expected, _ = token_logprobs(prepare(model), batch, 1.0, VOCABULARY)
    got, _ = token_logprobs(policy, batch, 1.0, VOCABULARY)
    torch.testing.assert_close(got, expected)
    critic = load_critic(str(tmp_path), torch.float32)
    for mine, other in zip(critic.backbone.parameters(), model.model.parameters(), strict=True):
        assert torch.equal(mine, other)


def test_a_missing_model_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no model at") as error:
        load_policy(str(tmp_path / "nothing"), torch.float32)
    assert "\n" not in str(error.value)


def test_no_new_tokens_change_nothing() -> None:
    model = tiny_model()
    before = model.get_input_embeddings().weight.clone()
    add_function_rows(model, word_tokenizer(VOCABULARY), [])
    assert torch.equal(model.get_input_embeddings().weight, before)
