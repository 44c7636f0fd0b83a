"""model.py against transformers' logits; its caches and masks against recomputation."""
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

import golden
from conftest import ENGLISH, SMOLLM2, close, load_cpu, needs, real_weights, tiny_model
from model import KVCache, Rope, Tokenizer, masked_attention, visible


@pytest.fixture(scope="module")
def golden_model(tmp_path_factory):
    """golden_model(name, layout) -> the loaded model of a golden case."""
    folder = tmp_path_factory.mktemp("golden")
    return lambda name, layout=4: load_cpu(
        golden.write_checkpoint(folder / f"{name}{layout}", name, layout))


def row(name):
    """One row of a golden case's tokens, (1, 28)."""
    return golden.tokens(name)[:1]


# ------------------------------------------------------------------------------------------ logits


@pytest.mark.parametrize("layout", [4, 5])
@pytest.mark.parametrize("name", golden.cases())
def test_logits_equal_transformers(golden_model, name, layout):
    model = golden_model(name, layout)
    got = torch.cat([model(tokens[None]) for tokens in golden.tokens(name)])
    assert got.dtype == torch.float32
    assert close(got, load_file(golden.GOLDEN)[name], 1e-4)
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    assert (model.head is None) == (name == "tied")


@needs("transformers")
@pytest.mark.parametrize("name", golden.cases())
def test_golden_values_are_what_transformers_computes_today(name):
    assert close(golden.reference(name)[0], load_file(golden.GOLDEN)[name], 1e-4)


def test_long_prompts_go_through_the_feed_forward_in_pieces(tiny, monkeypatch):
    block, pieces = tiny.blocks[0], []
    x, swiglu = torch.randn(1, 2100, 48), block.swiglu
    whole = x + swiglu(x)
    monkeypatch.setattr(block, "swiglu", lambda h: pieces.append(h.shape[1]) or swiglu(h))
    assert close(block.feed_forward(x), whole, 1e-5)
    assert pieces == [1024, 1024, 52]


# ------------------------------------------------------------------------------------------ caches


def feed(model, tokens, chunks, pos, caches):
    """Logits of all tokens at pos, both (1, N), fed in chunks through blocks with these caches."""
    logits = []
    for part, part_pos in zip(tokens.split(chunks, 1), pos.split(chunks, 1)):
        rope, x = model.rope(part_pos, int(part_pos.max()) + 1), model.embed(part)
        for block, cache in zip(model.blocks, caches):
            x = block(x, rope, cache.attend)
        logits.append(model.logits(x))
    return torch.cat(logits, 1)


@pytest.mark.parametrize("chunks", [[1] * 28, [10] + [1] * 18, [9, 7, 1, 1, 6, 4], [28]], ids=str)
@pytest.mark.parametrize("name", ["llama2", "gqa", "llama3", "mistral", "bias", "qwen3"])
def test_feeding_a_cache_equals_the_full_forward(golden_model, name, chunks):
    """One token at a time is decode: there the heads of a group are read as queries."""
    model, tokens = golden_model(name), row(name)
    caches = [KVCache(model.config, 28, model.embed.weight) for _ in model.blocks]
    got, want = feed(model, tokens, chunks, torch.arange(28)[None], caches), model(tokens)
    assert close(got, want, 1e-5)
    assert len(chunks) > 1 or got.equal(want), "an empty cache changes no bit"


@pytest.mark.parametrize("name", ["gqa", "mistral", "linear", "qwen3"])
def test_ragged_caches_equal_a_mask_in_each_block(golden_model, name):
    """Survivors keep their positions; what a block never cached, its mask hides from all tokens."""
    model, tokens, pos = golden_model(name), row(name), torch.arange(28)[None]
    x, masked, caches = model.embed(tokens[:, :20]), model.embed(tokens), []
    for block, gone in zip(model.blocks, ([], [3, 4, 11], [3, 4, 5, 11, 12, 18])):
        left = [i for i in range(20) if i not in gone]
        caches.append(KVCache(model.config, len(left) + 8, x))
        x[:, left] = block(x[:, left], model.rope(pos[:, left], 20), caches[-1].attend)
        mask = torch.ones(1, 28).index_fill(1, torch.tensor(gone).long(), 0)
        masked = block(masked, model.rope(pos, 28), partial(masked_attention, mask=mask))
    assert close(x[:, left], masked[:, left], 1e-5), "masking is dropping"
    after = feed(model, tokens[:, 20:], [5, 1, 1, 1], pos[:, 20:], caches)
    assert close(after, model.logits(masked[:, 20:]), 1e-5)
    assert [cache.n for cache in caches] == [28, 25, 22]
    assert not close(after, model(tokens)[:, 20:], 0.1), "what was dropped counts"


def test_a_cache_refuses_more_than_its_capacity(tiny):
    cache = KVCache(tiny.config, 5, tiny.embed.weight)
    part, pos = torch.ones(1, 2, 4, 12), torch.arange(4)[None]
    k, v, held = cache.append(part, 2 * part, pos)
    assert k.equal(part) and v.equal(2 * part) and held.equal(pos)
    with pytest.raises(ValueError, match="KV cache is full: 8 tokens for a capacity of 5"):
        cache.append(part, part, pos)
    assert cache.n == 4


def test_a_window_that_reaches_everything_is_left_out(tokens):
    """The rope says so once for a pass, and attention needs no mask."""
    wide, narrow, full = (tiny_model(window=w)(tokens) for w in (60, 59, None))
    assert wide.equal(full) and not narrow.equal(full)
    assert tiny_model(window=60).rope(torch.arange(60)[None], 60).window is None


# -------------------------------------------------------------------------------- masked attention

POS = torch.arange(20)[None]
ITSELF = torch.eye(20).bool()
KEPT = [0, 3, 4, 7, 8, 12, 15, 16, 19]
window_or_none = pytest.mark.parametrize("window", [None, 6])


def qkv():
    """Random q (1, 4, 20, 8), k and v (1, 2, 20, 8)."""
    draw = torch.Generator().manual_seed(0)
    return [size * torch.randn(1, heads, 20, 8, generator=draw)
            for heads, size in ((4, 1.5), (2, 1.5), (2, 0.5))]


def mask_of(kept):
    return torch.zeros(1, 20).index_fill(1, torch.tensor(kept), 1.0)


def attention(q, k, v, mask, window):
    """masked_attention; the angles are in q and k already."""
    return masked_attention(q, k, v, Rope(POS, None, None, window), mask)


@window_or_none
@pytest.mark.parametrize("kept", [KEPT, list(range(20))], ids=["some", "all"])
def test_every_query_sees_the_kept_keys_before_it_and_itself(window, kept):
    q, k, v = qkv()
    got = attention(q, k, v, mask_of(kept), window)
    see = visible(POS, POS, window) & (mask_of(kept).bool() | ITSELF)
    want = F.scaled_dot_product_attention(q, k, v, attn_mask=see, enable_gqa=True)
    assert close(got, want, 1e-6)
    some = [t[:, :, kept] for t in (q, k, v)]
    want = F.scaled_dot_product_attention(
        *some, attn_mask=visible(POS[:, kept], POS[:, kept], window), enable_gqa=True)
    assert close(got[:, :, kept], want, 1e-6), "masking is dropping"


@window_or_none
@pytest.mark.parametrize("above", [0, 5, 67, 1000])
def test_the_gradient_of_the_mask(window, above):
    """A dropped token's: the sigmoid rule by hand, which is what showing that token would change.

    A kept token's is the slope.
    """
    q, k, v = qkv()
    q[..., 0] = 1           # every query looks at token 5 `above` higher than it would
    k[:, :, 5, 0] += above * 8 ** 0.5
    target = torch.randn(q.shape, generator=torch.Generator().manual_seed(3))
    mask, see = mask_of(KEPT).requires_grad_(), visible(POS, POS, window)

    def output(mask):
        return (attention(q, k, v, mask, window) * target).double().sum()

    output(mask).backward()
    grad, mask = mask.grad[0], mask.detach()
    keys, values = (t.repeat_interleave(2, 1) for t in (k, v))
    logit = q @ keys.mT / 8 ** 0.5
    hidden = ~(see & (mask.bool() | ITSELF))
    total = logit.masked_fill(hidden, -torch.inf).logsumexp(-1, keepdim=True)
    out = attention(q, k, v, mask, window)
    change = target @ values.mT - (target * out).sum(-1, keepdim=True)      # (1, H, query, key)
    by_hand = ((logit - total).sigmoid() * change * (see & ~ITSELF)).sum((0, 1, 2))
    dropped = (mask[0] == 0).nonzero()[:, 0]
    assert close(grad[dropped], by_hand[dropped], 1e-4)
    for j in dropped:
        shown = output(mask.index_fill(1, j, 1)) - output(mask)
        assert abs(shown) > 1e-3 and abs(grad[j] - shown) < 1e-4 + 1e-3 * abs(shown)
    step = 1e-2 * mask_of([7])
    slope = (output(mask + step) - output(mask - step)) / 2e-2
    assert abs(grad[7] - slope) < 1e-3 * max(1, abs(slope))


# ------------------------------------------------------------------ a real model, where it is there


@pytest.mark.real
@real_weights
@needs("tokenizers")
@needs("transformers")
def test_smollm2_equals_transformers():
    import transformers
    model, tokens = load_cpu("smollm2"), torch.tensor([Tokenizer("smollm2").encode(ENGLISH)])
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        SMOLLM2, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        want, got = theirs(tokens).logits, model(tokens)
    assert close(got, want, 1e-3)
    # it knows English: chance would be ln(49152) = 10.8
    assert F.cross_entropy(got[0, :-1], tokens[0, 1:]) < 3.6
