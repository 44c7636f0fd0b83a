"""model.py against transformers' logits; its caches and masks against recomputation."""
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

import golden
from conftest import ENGLISH, SMOLLM2, close, load_cpu, needs, real_weights, tiny_model
from model import KVCache, Rope, Tokenizer, masked_attention, visible
from prune import extend


@pytest.fixture(scope="module")
def golden_model(tmp_path_factory):
    """golden_model(name, layout) -> the loaded model of a golden case."""
    folder = tmp_path_factory.mktemp("golden")
    return lambda name, layout=4: load_cpu(
        golden.write_checkpoint(folder / f"{name}{layout}", name, layout))


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
    assert close(golden.reference(name), load_file(golden.GOLDEN)[name], 1e-4)


def test_long_prompts_go_through_the_feed_forward_in_pieces(tiny, monkeypatch):
    block, pieces = tiny.blocks[0], []
    x, swiglu = torch.randn(1, 2100, 48), block.swiglu
    whole = x + swiglu(x)
    monkeypatch.setattr(block, "swiglu", lambda h: pieces.append(h.shape[1]) or swiglu(h))
    assert close(block.feed_forward(x), whole, 1e-5)
    assert pieces == [1024, 1024, 52]


# ------------------------------------------------------------------------------------------ caches


@pytest.mark.parametrize("chunks", [[1] * 28, [10] + [1] * 18, [9, 7, 1, 1, 6, 4], [28]], ids=str)
@pytest.mark.parametrize("name", ["llama2", "gqa", "llama3", "mistral", "bias", "qwen3"])
def test_feeding_a_cache_equals_the_full_forward(golden_model, name, chunks):
    """One token at a time is decode: there the heads of a group are read as queries."""
    model, tokens = golden_model(name), golden.tokens(name)[:1]
    caches = [KVCache(model.config, 28, model.embed.weight) for _ in model.blocks]
    parts = [extend(model, part, caches[0].n, caches) for part in tokens.split(chunks, 1)]
    got, want = torch.cat(parts, 1), model(tokens)
    assert close(got, want, 1e-5)
    assert len(chunks) > 1 or got.equal(want), "an empty cache changes no bit"


def test_a_cache_refuses_more_than_its_capacity(tiny):
    cache = KVCache(tiny.config, 5, tiny.embed.weight)
    part, pos = torch.ones(1, 2, 4, 12), torch.arange(4)[None]
    cache.append(part, part, pos)
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


@window_or_none
@pytest.mark.parametrize("above", [0, 5, 67, 1000])
def test_the_gradient_of_the_mask(window, above):
    """A dropped token's is what showing that token would change; a kept token's is the slope.

    The sigmoid rule itself, one query at a time: masked_attention in tests/test_exercises.py.
    """
    q, k, v = qkv()
    q[..., 0] = 1           # every query looks at token 5 `above` higher than it would
    k[:, :, 5, 0] += above * 8 ** 0.5
    target = torch.randn(q.shape, generator=torch.Generator().manual_seed(3))
    mask = mask_of(KEPT).requires_grad_()

    def output(mask):
        return (attention(q, k, v, mask, window) * target).double().sum()

    output(mask).backward()
    grad, mask = mask.grad[0], mask.detach()
    dropped = (mask[0] == 0).nonzero()[:, 0]
    shown = torch.stack([output(mask.index_fill(1, j, 1)) - output(mask) for j in dropped])
    assert close(grad[dropped].double(), shown, 1e-5) and shown.abs().min() > 0.1
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
