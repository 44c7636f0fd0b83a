"""support/caches.py: H2O against a slow specification, static decode against plain decode."""
import math
from functools import partial

import pytest
import torch

from conftest import SCHEDULE, tiny_model
from infer import generate
from lab.scorers import norm_scorer, random_scorer
from model import positions
from prune import drop, extend, prefill
from support.caches import StaticCache, compile_model, h2o

UNPRUNED = (None, None)
ARMS = [pytest.param(UNPRUNED, id="full"),
        pytest.param((SCHEDULE, norm_scorer()), id="pruned")]


def pruned():
    """A pruned arm; its scorer draws the same scores every time it is made."""
    return SCHEDULE, random_scorer(1)


# --------------------------------------------------------------------------------------------- H2O


class SlowHead:
    """One KV head as a dictionary {position: [key, value, attention received]}, in plain loops."""

    def __init__(self, heavy):
        self.heavy, self.held, self.entered = heavy, {}, 0

    def read(self, queries, k, v, position):
        """One token: remember its key, attend with each query, add what each key received."""
        self.held[position] = [k, v, 0.0]
        self.entered += 1
        return torch.stack([self.attend(q) for q in queries])

    def attend(self, q):
        """One query: q (d) -> (d)."""
        e = {}
        for p, (key, _, _) in self.held.items():
            e[p] = math.exp((q @ key).item() / math.sqrt(len(q)))
        output, total = 0, sum(e.values())
        for p, entry in self.held.items():
            entry[2] += e[p] / total
            output = output + e[p] / total * entry[1]
        return output

    def shrink(self):
        """Forget all but 40% of what has entered: the latest, and of the others the heaviest."""
        budget = math.ceil(0.4 * self.entered - 1e-9)
        order = sorted(self.held)
        if budget >= len(order):
            return
        recent = budget - int(self.heavy * budget)
        latest = order[len(order) - recent:]
        others = [p for p in order if p not in latest]
        others.sort(key=lambda p: -self.held[p][2])
        for p in others[budget - recent:]:
            del self.held[p]

    def keys(self):
        return torch.stack([self.held[p][0] for p in sorted(self.held)])


class SlowCache:
    """The heads of one block."""

    def __init__(self, heavy, heads=2):
        self.heads = [SlowHead(heavy) for _ in range(heads)]

    def attend(self, q, k, v, rope):
        """As KVCache.attend, one row, token by token; then every head shrinks."""
        q = q[0].unflatten(0, (len(self.heads), -1))                    # (G, H/G, n, d)
        tokens = []
        for t, position in enumerate(rope.pos[0].tolist()):
            outputs = []
            for g, head in enumerate(self.heads):
                outputs.append(head.read(q[g, :, t], k[0, g, t], v[0, g, t], position))
            tokens.append(torch.cat(outputs))                           # (H, d)
        for head in self.heads:
            head.shrink()
        return torch.stack(tokens, dim=1)[None]                         # (1, H, n, d)

    def keys(self):
        """What is held, in order: (G, m, d)."""
        return torch.stack([head.keys() for head in self.heads])


def slow_prefill(model, prompt, kept, heavy):
    """The prompt through slow caches -> logits, caches; kept {block: survivors' positions}."""
    pos, x = positions(prompt), model.embed(prompt)
    caches = [SlowCache(heavy) for _ in model.blocks]
    for i, block in enumerate(model.blocks, start=1):
        rope = model.rope(pos, prompt.shape[1])
        x = block(x, rope, caches[i - 1].attend)
        if i in kept:
            index = torch.searchsorted(pos.contiguous(), kept[i])
            x, pos = drop(x, pos, index)
    return model.logits(x[:, -1:])[:, 0], caches


@pytest.mark.parametrize("heavy", [0.5, 0.0])
def test_h2o_equals_a_slow_specification(tiny, tokens, heavy):
    prompt = tokens[:1, :48]
    logits, caches, trace = prefill(tiny, prompt, SCHEDULE, norm_scorer(), 12, h2o(0.4, heavy))
    kept = {stage.block: stage.kept for stage in trace}
    slow_logits, slow_caches = slow_prefill(tiny, prompt, kept, heavy)
    assert torch.allclose(slow_logits, logits, atol=1e-4)
    for i in range(48, 56):
        token = tokens[:1, i:i + 1]
        found = extend(tiny, token, i, caches)
        x = tiny.embed(token)
        rope = tiny.rope(torch.tensor([[i]]), i + 1)
        for block, slow in zip(tiny.blocks, slow_caches):
            x = block(x, rope, slow.attend)
        assert torch.allclose(tiny.logits(x), found, atol=1e-4)
        for cache, slow in zip(caches, slow_caches):
            held = cache.k[0, :, :cache.n]
            assert torch.allclose(held, slow.keys(), atol=1e-4)
    with pytest.raises(ValueError, match="one token at a time"):
        extend(tiny, tokens[:1, :2], 60, caches)


def test_h2o_weighs_a_long_prompt_in_pieces(tiny, tokens):
    cache = prefill(tiny, tokens[:1], cache=h2o(1.0))[1][0]
    q, weights = torch.randn(1, 4, 60, 12), []
    nothing = cache.weight[..., :0]
    for chunk in (256, 7):
        cache.weight = nothing
        cache.weigh(q, chunk)
        weights.append(cache.weight)
    assert torch.allclose(*weights, atol=1e-5)
    # a KV head hears 1 from each of 60 queries of each of its two query heads
    assert torch.allclose(weights[0].sum(-1), torch.tensor(120.0))


def test_h2o_that_keeps_everything_changes_nothing(tiny, tokens):
    for arm in (lambda: UNPRUNED, pruned):
        plain = generate(tiny, tokens[:1], 8, *arm())
        kept = generate(tiny, tokens[:1], 8, *arm(), cache=h2o(1.0))
        assert plain.tokens == kept.tokens
        assert plain.kv_bytes == kept.kv_bytes


def test_h2o_holds_its_share_of_what_has_entered(tiny, tokens):
    small = generate(tiny, tokens[:1], 8, *pruned(), cache=h2o(0.4))
    held = [math.ceil(0.4 * (n + 7) - 1e-9) for n in small.counts]
    assert small.kv_bytes == sum(held) * 2 * 24 * 4


def test_h2o_refuses_what_it_cannot_do(tiny, tokens):
    for shares in ((1.5,), (0.0,), (0.4, 1.1)):
        with pytest.raises(ValueError, match="have to be shares"):
            h2o(*shares)
    with pytest.raises(ValueError, match="one length"):
        prefill(tiny, tokens, lengths=[60, 20], cache=h2o(0.4))
    with pytest.raises(ValueError, match="sliding window"):
        prefill(tiny_model(window=11), tokens[:1], cache=h2o(0.4))


# ------------------------------------------------------------------------------------------ static


@pytest.mark.parametrize("window", [None, 11])
@pytest.mark.parametrize("arm", ARMS)
def test_static_decode_equals_plain_decode_on_ragged_caches(tokens, window, arm):
    model = tiny_model(window=window)
    prompt = tokens[:, :48]
    _, plain, _ = prefill(model, prompt, *arm, room=8)
    _, static, _ = prefill(model, prompt, *arm, room=8, cache=StaticCache)
    shapes = [cache.k.shape for cache in static]
    for i in range(48, 56):
        token, pos = tokens[:, i:i + 1], torch.tensor([[i]])
        a = extend(model, token, pos, plain, 56)
        b = extend(model, token, pos, static, 56)
        assert torch.allclose(a, b, atol=1e-5)
    assert [cache.k.shape for cache in static] == shapes
    for a, b in zip(plain, static):
        assert a.bytes == b.bytes
        assert torch.equal(a.pos, b.pos)
        assert torch.allclose(a.k, b.k, atol=1e-5)
    with pytest.raises(IndexError):     # a full cache does not write over what it holds
        extend(model, tokens[:, :1], 56, static)
    a = generate(model, tokens[:1], 8, *arm, eos=())
    b = generate(model, tokens[:1], 8, *arm, eos=(), cache=StaticCache)
    assert a.tokens == b.tokens
    assert a.kv_bytes == b.kv_bytes


def test_free_places_are_never_seen(tiny, tokens):
    """Whatever stands in them: decode is the same with all of them damaged."""
    found = []
    for damage in (0.0, 1e4):
        _, caches, _ = prefill(tiny, tokens[:, :48], room=4, cache=StaticCache)
        for cache in caches:
            cache.k[:, :, 48:] = damage
            cache.v[:, :, 48:] = damage
        found.append(extend(tiny, tokens[:, 48:49], 48, caches))
    assert torch.equal(*found)


# ---------------------------------------------------------------------------------------- compiled


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("arm", ARMS)
def test_a_cuda_graph_decodes_what_plain_decode_does(tokens, arm):
    model = tiny_model().cuda()
    tokens = tokens[:1].cuda()
    plain = generate(model, tokens, 12, *arm, eos=())
    graph = generate(model, tokens, 12, *arm, eos=(), **compile_model(model, extend))
    assert plain.tokens == graph.tokens
    assert plain.kv_bytes == graph.kv_bytes


# Prompts of different lengths, and how many tokens follow.
LENGTHS = [(60, 8), (48, 5), (31, 6)]


def answers(model, tokens, **options):
    """The new tokens of both arms at all LENGTHS."""
    found = []
    for arm in (UNPRUNED, (SCHEDULE, norm_scorer())):
        for n, new in LENGTHS:
            made = generate(model, tokens[:1, :n], new, *arm, eos=(), **options)
            found.append(made.tokens)
    return found


def test_compiled_blocks_generate_the_same(tiny, tokens, monkeypatch):
    plain = answers(tiny, tokens)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    options = compile_model(tiny, extend)
    assert answers(tiny, tokens, **options) == plain
