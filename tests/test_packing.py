"""A packed row is its samples, one beside the other: same loss, same gradient, nothing leaks."""

import pytest
import torch

from mmpeft.attention import ATTENTION, attention, serve_packed_rows
from mmpeft.data import Collator, ConversationDataset
from mmpeft.gate import GATES
from mmpeft.packing import Block, PackedRow, share_prefix
from mmpeft.speed import SpeedConfig, choose_logits

from .conftest import assistant, user
from .test_data import InMemory, row

SYSTEM = {"role": "system", "content": "You answer briefly."}


def samples_of(processor, images):
    """Three chats on one picture, two on another with other words, two of text alone."""
    chats = [[SYSTEM, user(images[0], q), assistant(a)] for q, a in
             (("red?", "yes"), ("how many?", "three"), ("x", "no"))]  # fmt: skip
    chats += [[SYSTEM, user("first ", images[1], "word"), assistant("a longer answer")]]
    chats += [[SYSTEM, user(f"only text {i}"), assistant("fine " * i)] for i in (1, 3)]
    keys = ["a"] * 3 + [None] * 3
    return list(ConversationDataset(InMemory(chats=chats, keys=keys), "train", processor, 3))


def gradients(model, batches, checkpointing=False):
    """Loss and gradients of what trains, summed over the batches."""
    model.train()
    if checkpointing:
        model.activation_checkpointing_enable()
    model.zero_grad()
    losses = []
    for batch in batches:
        loss = model(**batch, num_items_in_batch=10).loss
        if loss.requires_grad:
            loss.backward()
        losses.append(loss.detach())
    named = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return sum(losses), {name: grad.clone() for name, grad in named.items()}


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_loss_and_gradient_are_those_of_each_sample_alone(make_bridge, images, gate, checkpointing):
    model, processor = make_bridge(gate)
    samples = samples_of(processor, images)
    expected, alone = gradients(model, [Collator(0)([s]) for s in samples])
    assert serve_packed_rows(model) is None
    batch = Collator(0, packing=True, pad_to_multiple_of=32)(samples)
    assert batch["input_ids"].shape[0] == 1 and batch["input_ids"].shape[1] % 32 == 0
    loss, packed = gradients(model, [batch], checkpointing)
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)
    assert packed.keys() == alone.keys()
    torch.testing.assert_close(packed, alone, atol=1e-4, rtol=1e-3)


def test_a_samples_loss_does_not_change_with_its_neighbours(tiny, images):
    model, processor = tiny
    samples = samples_of(processor, images)
    serve_packed_rows(model)
    collate = Collator(0, packing=True)
    model.eval()

    def logits(samples):  # at the learned positions of the last sample, which all others precede
        batch = collate(samples)
        learned = sum(label != -100 for label in samples[-1]["labels"])
        out = model(**{k: v for k, v in batch.items() if k != "labels"}).logits[0]
        return out[batch["labels"][0] != -100][-learned:]

    shared, seeing, text, other = samples
    for sample, neighbours in ((seeing, [shared]), (shared, [seeing]), (other, [text, seeing])):
        beside = logits([*neighbours, sample])
        torch.testing.assert_close(beside, logits([sample]), atol=1e-4, rtol=1e-4)


def test_what_all_samples_begin_with_is_there_once(tiny, images):
    samples = samples_of(tiny[1], images)
    batch = Collator(0, packing=True)(samples)
    text = tiny[1].tokenizer.decode(batch["input_ids"][0])
    assert text.count("You answer briefly.") == 2  # with pictures, and without
    assert batch["packed"].trees[0] + batch["packed"].trees[1] == batch["input_ids"].shape[1]


def test_packing_by_hand():
    samples = [
        share_prefix([row([1, 2, 3, 4], [-100] * 3 + [4]), row([1, 2, 5, 6], [-100] * 3 + [6])]),
        share_prefix([row([1, 2, 7], [-100, -100, 7])]),
    ]
    batch = Collator(9, packing=True, pad_to_multiple_of=5)(samples)
    # the second sample predicts 7 from its 2, which therefore stays in its own branch
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4, 5, 6, 2, 7, 9, 9]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 2, 3, 1, 2, 0, 0]]
    assert batch["labels"].tolist() == [[-100, -100, -100, 4, -100, 6, -100, 7, -100, -100]]
    root, first, second = batch["packed"].blocks
    assert (root.start, root.length, root.mask) == (0, 1, None)
    assert (first.start, first.length, first.root) == (1, 5, (0, 1))
    assert first.mask.int().tolist()[4] == [1, 1, 0, 0, 1, 1]
    assert (second.start, second.length, second.root) == (6, 4, (0, 1))
    assert second.mask.int().tolist() == [
        [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [0, 0, 0, 1, 0], [0, 0, 0, 0, 1],
    ]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_by_blocks_is_attention_with_the_whole_mask(dtype):
    torch.manual_seed(0)
    lengths, (heads, kv_heads, size) = (3, 5, 2), (4, 2, 8)
    branch = torch.tensor([0, 0, 1, 1, 1])
    own = (branch[:, None] == branch) & torch.ones(5, 5).tril().bool()
    mask = torch.cat([torch.ones(5, 3, dtype=torch.bool), own], 1)
    packed = PackedRow([Block(0, 3), Block(3, 5, (0, 3), mask), Block(8, 2)], [8, 2])
    query = torch.randn(1, heads, sum(lengths), size, dtype=dtype, requires_grad=True)
    key, value = torch.randn(2, 1, kv_heads, sum(lengths), size, dtype=dtype)
    whole = torch.zeros(10, 10, dtype=torch.bool)
    whole[:3, :3], whole[3:8, :8] = torch.ones(3, 3).tril().bool(), mask
    whole[8:, 8:] = torch.ones(2, 2).tril().bool()
    ours, _ = attention(None, query, key, value, None, packed=packed, scaling=0.3)
    expected = torch.nn.functional.scaled_dot_product_attention(
        query.float(), key.float(), value.float(), attn_mask=whole, scale=0.3, enable_gqa=True
    ).transpose(1, 2)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(ours.float(), expected, atol=tolerance, rtol=tolerance)
    weights = torch.randn_like(expected)
    (mine,) = torch.autograd.grad((ours.float() * weights).sum(), query)
    (theirs,) = torch.autograd.grad((expected * weights).sum(), query)
    torch.testing.assert_close(mine.float(), theirs.float(), atol=2 * tolerance, rtol=2 * tolerance)


@pytest.mark.parametrize("autocast", [False, True])
def test_large_scores_in_bfloat16_are_as_exact_as_with_torchs_kernel(autocast):
    """Scores rounded to bfloat16 made losses of whole runs drift."""
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 1, 4, 64, 32)
    query, key, value = (4 * query).bfloat16(), (4 * key + 4).bfloat16(), value.bfloat16()
    parts = [x.requires_grad_() for x in (query, key, value)]
    exact = [x.detach().double().requires_grad_() for x in parts]

    def off(attend):
        attended = attend(*parts)
        expected = sdpa(*exact, is_causal=True)
        pairs = [(attended, expected)]
        pairs += zip(torch.autograd.grad(attended.sum(), parts, retain_graph=True),
                     torch.autograd.grad(expected.sum(), exact), strict=True)  # fmt: skip
        return [((a.double() - e).norm() / e.norm()).item() for a, e in pairs]

    sdpa = torch.nn.functional.scaled_dot_product_attention
    row = PackedRow([Block(0, 64)], [64])
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        ours = off(lambda *x: attention(None, *x, None, packed=row)[0].transpose(1, 2))
    theirs = off(lambda *x: sdpa(*x, is_causal=True))
    assert ours[0] < 1.5 * theirs[0] + 1e-3
    assert all(mine < 0.03 for mine in ours[1:])


def test_other_calls_of_a_prepared_llm_are_as_before(tiny, images):
    model, processor = tiny
    batch = Collator(0)(samples_of(processor, images))
    before = model(**batch)
    assert serve_packed_rows(model) is None
    assert model.language_model.config._attn_implementation == ATTENTION
    after = model(**batch)
    assert torch.equal(before.logits, after.logits) and torch.equal(before.loss, after.loss)


def test_an_llm_that_does_not_keep_samples_apart_is_left_as_it_was(tiny, monkeypatch):
    """One that drops what a call brings fails on the empty mask; it is never silently wrong."""
    model, _ = tiny
    base = model.language_model.get_base_model()
    forward = base.model.forward
    monkeypatch.setattr(
        base.model, "forward", lambda *args, packed=None, **kwargs: forward(*args, **kwargs)
    )
    assert "do not keep samples of one row apart" in serve_packed_rows(model)
    assert base.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("lever", ["supervised_logits", "logits_chunk"])
def test_the_loss_is_the_same_whichever_logits_are_made(tiny, images, lever):
    model, processor = tiny
    batches = [Collator(0)(samples_of(processor, images))]
    expected = gradients(model, batches)
    setattr(model, lever, {"supervised_logits": False, "logits_chunk": 3}[lever])
    loss, found = gradients(model, batches)
    torch.testing.assert_close(loss, expected[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found, expected[1], atol=1e-5, rtol=1e-4)


def test_a_first_token_is_learned_from_nothing_before_it():
    """Alone it has no token that could predict it, so beside another sample it must not either."""
    samples = [share_prefix([row([1, 2], [1, 2])]), share_prefix([row([3, 4], [3, 4])])]
    batch = Collator(0, packing=True)(samples)
    assert batch["labels"].tolist() == [[-100, 2, -100, 4]]


def test_a_packed_row_moves_with_its_batch():
    from accelerate.utils import send_to_device

    samples = [share_prefix([row([1, 2, 3], [-100, -100, 3]), row([1, 2, 4], [-100, -100, 4])])]
    batch = send_to_device(Collator(0, packing=True)(samples), "meta")
    assert batch["packed"].blocks[0].mask.device.type == "meta"
    assert batch["input_ids"].device.type == "meta"


def test_chunks_bound_how_many_logits_exist(tiny, images, monkeypatch):
    model, processor = tiny
    model.logits_chunk, seen = 3, []
    batch = Collator(0)(samples_of(processor, images))
    model(**batch)  # eval mode: all logits are wanted
    head = model.get_output_embeddings()
    head.register_forward_hook(lambda module, args, output: seen.append(output.shape[-2]))
    model.train()
    model(**batch).loss.backward()
    assert max(seen) == 3


def test_logits_that_are_scaled_after_the_projection_are_never_chunked(tiny, capsys):
    model, _ = tiny
    choose_logits(model, SpeedConfig(logits_chunk=3))
    assert model.logits_chunk == 3
    base = model.language_model.get_base_model()
    forward = base.forward

    def scaled(*args, **kwargs):
        outputs = forward(*args, **kwargs)
        outputs.logits = outputs.logits * 0.5
        return outputs

    base.forward = scaled
    choose_logits(model, SpeedConfig(logits_chunk=3))
    assert model.logits_chunk is None
    assert "logits_chunk off" in capsys.readouterr().err
