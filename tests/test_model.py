"""model.py against golden logits of transformers; its caches and masks against recomputation."""
from dataclasses import asdict
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch.utils.flop_counter import FlopCounterMode

import golden
import model as model_module
from conftest import ENGLISH, SMOLLM2, close, load_cpu, needs, real_weights, tiny_model
from model import (Config, KVCache, Rope, Tokenizer, causal_attention, load, masked_attention,
                   positions, visible)
from support import checkpoint

CASES = list(golden.cases())


@pytest.fixture(scope="module")
def golden_model(tmp_path_factory):
    """golden_model(name) -> the loaded model of a golden case."""
    folder = tmp_path_factory.mktemp("golden")
    return lambda name: load_cpu(golden.write_checkpoint(folder / name, name))


# ------------------------------------------------------------------------------------------ logits


@pytest.mark.parametrize("layout", [4, 5])
@pytest.mark.parametrize("name", CASES)
def test_logits_equal_transformers(name, layout, tmp_path):
    want = load_file(golden.GOLDEN)[name]
    model = load_cpu(golden.write_checkpoint(tmp_path / name, name, layout))
    got = model(golden.tokens(name))
    assert got.dtype == torch.float32
    assert close(got, want, 1e-4)


def test_the_backbone_is_frozen_and_a_tied_head_is_one_tensor(golden_model):
    for name in ("llama2", "tied"):
        model = golden_model(name)
        assert not model.training
        assert not any(p.requires_grad for p in model.parameters())
        assert (model.head.weight is model.embed.weight) == (name == "tied")


def test_long_prompts_go_through_the_feed_forward_in_pieces(tiny, tokens, monkeypatch):
    whole = tiny(tokens)
    monkeypatch.setitem(model_module.FEED_FORWARD_CHUNK, "cpu", 16)
    first, pieces = tiny.blocks[0], []
    swiglu = first.swiglu

    def noting(h):
        pieces.append(h.shape[1])
        return swiglu(h)

    monkeypatch.setattr(first, "swiglu", noting)
    assert close(tiny(tokens), whole, 1e-5)
    assert pieces == [16, 16, 16, 12]


def test_a_norm_of_each_head_adds_no_matrix_product(tokens):
    found = []
    for changes in ({}, {"qk_norm": True, "o_bias": True}):
        with FlopCounterMode(display=False) as counter:
            tiny_model(**changes)(tokens)
        found.append(counter.get_total_flops())
    assert found[0] == found[1] > 0


def test_prompt_beyond_the_positions(golden_model):
    model = golden_model("llama2")
    longest = torch.zeros(1, 512, dtype=torch.long)
    assert model(longest).shape == (1, 512, golden.VOCAB)
    with pytest.raises(ValueError, match="position 512 is beyond this model's 512 positions"):
        model(torch.zeros(1, 513, dtype=torch.long))


def test_random_shapes(monkeypatch):
    with pytest.raises(ValueError, match="unknown shape 'gpt-5'; there are llama-7b, mistral-7b"):
        load("random:gpt-5")
    monkeypatch.setitem(checkpoint.PUBLISHED, "tiny", asdict(tiny_model().config))
    model = load_cpu("random:tiny")
    assert model(torch.zeros(1, 5, dtype=torch.long)).isfinite().all()
    assert not any(p.requires_grad for p in model.parameters())


# ------------------------------------------------------------------------------------------ caches


def feed(model, tokens, chunks, pos=None):
    """Logits of all tokens (B, N), fed in chunks through blocks that each keep a cache."""
    B, N = tokens.shape
    assert sum(chunks) == N
    pos = positions(tokens) if pos is None else pos
    caches = [KVCache(model.config, B, N, "cpu", torch.float32) for _ in model.blocks]
    logits = []
    for part, part_pos in zip(tokens.split(chunks, 1), pos.split(chunks, 1)):
        rope = model.rope(part_pos, int(part_pos.max()) + 1)
        x = model.embed(part)
        for block, cache in zip(model.blocks, caches):
            x = block(x, rope, cache.attend)
        logits.append(model.logits(x))
    assert all(cache.n == N for cache in caches)
    return torch.cat(logits, 1)


CHUNKS = {
    "ones": [1] * 28,
    "prefill": [10] + [1] * 18,
    "several": [9, 7, 1, 1, 6, 4],
    "whole": [28],
}


@pytest.mark.parametrize("chunks", CHUNKS)
@pytest.mark.parametrize("name", ["llama2", "gqa", "llama3", "mistral", "bias", "yarn", "qwen3"])
def test_feeding_a_cache_equals_the_full_forward(golden_model, name, chunks):
    model, tokens = golden_model(name), golden.tokens(name)
    got = feed(model, tokens, CHUNKS[chunks])
    assert close(got, model(tokens), 1e-5)


KEPT = torch.tensor([[0, 1, 2, 5, 9, 10, 13, 14, 20, 21, 25, 27],
                     [0, 3, 4, 6, 7, 8, 11, 12, 16, 24, 26, 27]])


@pytest.mark.parametrize("name", ["gqa", "mistral", "linear", "yarn", "qwen3"])
def test_dropped_tokens_leave_gaps_in_the_positions(golden_model, name):
    """Survivors at their own positions: in one pass, through a cache, and as a mask, all alike."""
    model, tokens = golden_model(name), golden.tokens(name)
    some = tokens.gather(1, KEPT)
    rope, x = model.rope(KEPT, 28), model.embed(some)
    mask = torch.zeros(tokens.shape).scatter(1, KEPT, 1.0)
    hide = partial(masked_attention, mask=mask)
    whole_rope, masked = model.rope(positions(tokens), 28), model.embed(tokens)
    for block in model.blocks:
        x = block(x, rope)
        masked = block(masked, whole_rope, hide)
    want = model.logits(x)
    cached = feed(model, some, [5, 3, 1, 1, 1, 1], pos=KEPT)
    assert close(cached, want, 1e-5)
    rows = torch.arange(2)[:, None]
    assert close(model.logits(masked)[rows, KEPT], want, 1e-5)
    assert not close(model(some), want, 0.1), "positions counted anew give something else"


def test_a_cache_counts_its_bytes_and_refuses_more_than_its_capacity():
    config = Config(8, 1, 4, 2, 6, 8, 8)
    cache = KVCache(config, 3, 5, "cpu", torch.float32)
    part = torch.ones(3, 2, 4, 6)
    pos = torch.arange(4).expand(3, 4)
    k, v, held = cache.append(part, 2 * part, pos)
    assert torch.equal(k, part)
    assert torch.equal(v, 2 * part)
    assert torch.equal(held, pos)
    assert cache.bytes == 2 * 3 * 2 * 4 * 6 * 4
    with pytest.raises(ValueError, match="KV cache is full: 8 tokens for a capacity of 5"):
        cache.append(part, part, pos)
    assert cache.n == 4


# -------------------------------------------------------------------------------- masked attention


def qkv(n=20, heads=4, groups=2, d=8, rows=2):
    draw = torch.Generator().manual_seed(0)
    q = torch.randn(rows, heads, n, d, generator=draw) * 1.5
    k = torch.randn(rows, groups, n, d, generator=draw) * 1.5
    v = torch.randn(rows, groups, n, d, generator=draw) * 0.5
    return q, k, v


def rope_of(n, window=None, rows=2):
    """What attention reads of a Rope; the angles are in q and k already."""
    pos = torch.arange(n).expand(rows, n)
    return Rope(pos, None, None, window)


def at(x, index):
    """The tokens of x (B, heads, n, d) at index (B, k)."""
    rows = [one[:, some] for one, some in zip(x, index)]
    return torch.stack(rows)


def random_mask(n=20, k=9, rows=2):
    """-> which k tokens of each row are kept, and their mask (B, n)."""
    kept = []
    for row in range(rows):
        order = torch.randperm(n, generator=torch.Generator().manual_seed(row))
        kept.append(order[:k].sort().values)
    kept = torch.stack(kept)
    return kept, torch.zeros(rows, n).scatter(1, kept, 1.0)


def plain_attention(q, k, v, **mask):
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=True, **mask)


def test_masked_attention_that_keeps_all_is_plain_attention():
    q, k, v = qkv()
    want = plain_attention(q, k, v, is_causal=True)
    got = masked_attention(q, k, v, rope_of(20), torch.ones(2, 20))
    assert close(got, want, 1e-6)


@pytest.mark.parametrize("window", [None, 6])
def test_masked_attention_equals_attention_over_the_kept(window):
    q, k, v = qkv()
    kept, mask = random_mask()
    got = masked_attention(q, k, v, rope_of(20, window), mask)
    see = visible(kept, kept, window)
    want = plain_attention(at(q, kept), at(k, kept), at(v, kept), attn_mask=see)
    assert close(at(got, kept), want, 1e-6)


@pytest.mark.parametrize("window", [None, 6])
def test_a_hidden_query_sees_the_kept_keys_before_it_and_itself(window):
    q, k, v = qkv()
    kept, mask = random_mask()
    got = masked_attention(q, k, v, rope_of(20, window), mask)
    hidden = (mask[0] == 0).nonzero()[-1].item()
    first = 0 if window is None else hidden - window + 1
    seen = [j for j in kept[0].tolist() if first <= j < hidden]
    seen = [*seen, hidden]
    want = plain_attention(q[:1, :, [hidden]], k[:1, :, seen], v[:1, :, seen])
    assert close(got[:1, :, [hidden]], want, 1e-6)


@pytest.mark.parametrize("above", [0, 5, 67])
@pytest.mark.parametrize("window", [None, 6])
def test_a_hidden_keys_gradient_is_what_seeing_it_would_change(window, above):
    """A finite difference for every dropped token, also where its key is far above all kept."""
    q, k, v = qkv()
    rope = rope_of(20, window)
    _, mask = random_mask()
    hidden = (mask[0] == 0).nonzero().flatten().tolist()[:5]
    # every query looks at the first hidden key `above` higher than it would
    direction = torch.zeros(q.shape[-1])
    direction[0] = q.shape[-1] ** 0.5
    q[..., 0] = 1
    k[:, :, hidden[0]] += above * direction
    target = torch.randn(q.shape, generator=torch.Generator().manual_seed(3))

    def output(mask):
        return (masked_attention(q, k, v, rope, mask) * target).sum()

    mask.requires_grad_()
    output(mask).backward()
    now = mask.detach()
    for j in hidden:
        seen = now.clone()
        seen[0, j] = 1
        difference = output(seen) - output(now)
        assert abs(difference) > 1e-3
        assert mask.grad[0, j] == pytest.approx(difference.item(), rel=1e-3, abs=1e-4)


def two_hidden():
    """Six tokens in two rows, of which 1 and 3 are hidden; it takes a gradient."""
    mask = torch.ones(2, 6)
    mask[:, [1, 3]] = 0
    return mask.requires_grad_()


def test_a_hidden_key_far_above_every_kept_one_does_not_overflow():
    q, k, v = qkv(n=6)
    k[:, :, 1] *= 1000
    mask = two_hidden()
    out = masked_attention(q, k, v, rope_of(6), mask)
    out.pow(2).sum().backward()
    assert out.isfinite().all()
    assert mask.grad.isfinite().all()


def test_the_masks_gradient_is_that_of_letting_a_token_in_a_little():
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, heads, 9, 12, generator=generator) for heads in (4, 2, 2))
    rope = rope_of(9, rows=1)

    def loss(mask):
        return masked_attention(q, k, v, rope, mask).square().sum()

    mask = torch.ones(1, 9)
    mask[0, 3] = 0
    mask.requires_grad_()
    loss(mask).backward()
    step = torch.zeros(1, 9)
    step[0, 5] = 1e-3
    now = mask.detach()
    slope = (loss(now + step) - loss(now - step)) / 2e-3
    assert abs(slope - mask.grad[0, 5]) < 2e-2 * max(1, abs(slope))
    assert mask.grad[0, 3] != 0


def test_a_window_that_reaches_everything_is_left_out(tokens):
    """The rope says so once for a pass, and attention needs no mask."""
    wide, narrow = tiny_model(window=60), tiny_model(window=59)
    pos, full = positions(tokens), tiny_model()(tokens)
    assert wide.rope(pos, 60).window is None
    assert narrow.rope(pos, 60).window == 59
    assert torch.equal(wide(tokens), full)
    assert not torch.equal(narrow(tokens), full)


def test_a_pass_through_an_empty_cache_is_the_plain_pass_bit_for_bit(tiny, tokens):
    assert torch.equal(feed(tiny, tokens, [60]), tiny(tokens))
    q, k, v = qkv(d=12)
    rope = rope_of(20)
    cache = KVCache(tiny.config, 2, 20, "cpu", torch.float32)
    got = cache.attend(q, k, v, rope)
    assert torch.equal(got, causal_attention(q, k, v, rope))


# ------------------------------------------------------------------ a real model, where it is there


@pytest.mark.real
@real_weights
@needs("tokenizers")
@needs("transformers")
def test_smollm2_logits_equal_transformers():
    import transformers
    transformers.logging.disable_progress_bar()
    tokens = torch.tensor([Tokenizer("smollm2").encode(ENGLISH)])
    other = transformers.AutoModelForCausalLM.from_pretrained(SMOLLM2, dtype=torch.float32,
                                                              attn_implementation="eager")
    model = load_cpu("smollm2")
    with torch.no_grad():
        want, got = other.eval()(tokens).logits, model(tokens)
    assert tokens.shape[1] > 150
    assert close(got, want, 1e-3)
    # it knows English: chance would be ln(49152) = 10.8
    assert F.cross_entropy(got[0, :-1], tokens[0, 1:]) < 3.6


@pytest.mark.real
@real_weights
@needs("tokenizers")
def test_smollm2_answers():
    model, tokenizer = load_cpu("smollm2"), Tokenizer("smollm2")
    tokens = tokenizer.encode("<|im_start|>user\nWhat is the capital of France?<|im_end|>\n"
                              "<|im_start|>assistant\n")
    start = len(tokens)
    while tokens[-1] not in model.config.eos or len(tokens) == start:
        assert len(tokens) < start + 20, tokenizer.decode(tokens[start:])
        logits = model(torch.tensor([tokens]))
        tokens.append(logits[0, -1].argmax().item())
    assert tokenizer.decode(tokens[start:]) == "The capital of France is Paris."
