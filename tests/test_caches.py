"""support/caches.py: H2O against a slow specification, static decode against plain decode."""
import gc
import math
import weakref
from functools import partial

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from conftest import SCHEDULE, tiny_model
from infer import generate, side_by_side
from lab import quality
from lab.scorers import norm_scorer, random_scorer
from lab.tasks import Answer, Item
from model import positions
from prune import drop, extend, prefill
from support.caches import StaticCache, compile_model, h2o, recorded

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


@pytest.mark.parametrize("window, new, fits", [(11, 1, False), (60, 1, True), (60, 2, False),
                                               (63, 4, True), (63, 5, False)])
def test_h2o_and_a_sliding_window_are_refused_before_the_prompt_is_read(tokens, window, new, fits):
    """Also a window that only the new tokens outgrow."""
    model, read = tiny_model(window=window), []
    model.blocks[0].attn_norm.register_forward_hook(lambda *args: read.append(1))
    for arm in (UNPRUNED, pruned()):
        if fits:
            assert len(generate(model, tokens[:1], new, *arm, eos=(), cache=h2o(0.4)).tokens) == new
            continue
        with pytest.raises(ValueError, match="sliding window"):
            generate(model, tokens[:1], new, *arm, eos=(), cache=h2o(0.4))
    assert bool(read) == fits


def test_h2o_goes_on_for_no_longer_than_a_window(tokens):
    _, caches, _ = prefill(tiny_model(window=60), tokens[:1], cache=h2o(0.4))
    with pytest.raises(ValueError, match="sliding window"):
        extend(tiny_model(window=60), tokens[:1, :1], 60, caches)


@pytest.mark.parametrize("share", [1, 1.0])
def test_h2o_that_keeps_everything_may_have_a_window(tokens, share):
    """Nothing is evicted, so positions stay true."""
    model = tiny_model(window=11)
    plain = generate(model, tokens[:1], 8, *pruned(), eos=())
    kept = generate(model, tokens[:1], 8, *pruned(), eos=(), cache=h2o(share))
    assert plain.tokens == kept.tokens
    assert plain.kv_bytes == kept.kv_bytes


def test_rows_that_a_window_would_stop_are_named_before_any_is_read(tokens):
    items = [Item(list(range(n)), [Answer([5, 6, 7], 0)]) for n in (28, 29)]
    setup = quality.Setup(tiny_model(window=30), SCHEDULE)
    quality.check_window(setup, items[:1], ["full", "random+h2o"])
    quality.check_window(setup, items, ["full", "random"])
    for arm in ("random+h2o", "full+local"):
        with pytest.raises(ValueError, match="^row 2: H2O does not know the positions"):
            quality.check_window(setup, items, ["full", arm])
    with pytest.raises(ValueError, match="^row 1, full.h2o: H2O does not know"):
        quality.measure(setup, items[1], ["full+h2o"], 0)


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
    with pytest.raises(ValueError, match="KV cache is full: 57 tokens"):
        extend(model, tokens[:, :1], 56, static)
    a = generate(model, tokens[:1], 8, *arm, eos=())
    b = generate(model, tokens[:1], 8, *arm, eos=(), cache=StaticCache)
    assert a.tokens == b.tokens
    assert a.kv_bytes == b.kv_bytes


@pytest.mark.parametrize("arm", ARMS)
@pytest.mark.parametrize("n, new", [(60, 5), (63, 2), (64, 1), (50, 15)])
def test_static_decode_reaches_the_last_position_and_no_further(n, new, arm):
    """Its memory ends with the model's positions; the timed runs stay within them too."""
    model, prompt, sizes = tiny_model(max_positions=64), torch.arange(n)[None], []

    def step(model, token, pos, caches, end):
        sizes.append(caches[0].k.shape[2])
        return extend(model, token, pos, caches, end)

    plain = generate(model, prompt, new, *arm, eos=())
    static = generate(model, prompt, new, *arm, eos=(), cache=StaticCache, step=step)
    assert plain.tokens == static.tokens
    assert plain.kv_bytes == static.kv_bytes
    assert sizes == [64] * (new - 1)
    with pytest.raises(ValueError, match="position 64 is beyond this model's 64 positions"):
        generate(model, prompt, new + 1, *arm, cache=StaticCache)
    few = min(new, 5)
    runs = side_by_side(model, prompt, {"one": arm}, few, cache=StaticCache, eos=())
    assert runs["one"].tokens == plain.tokens[:few]


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


class Tape(TorchDispatchMode):
    """Stands in for torch.cuda.CUDAGraph on a CPU.

    As there, what is called while it records changes nothing, and a replay calls it again on the
    same memory, whatever Python would do by then.
    """

    made = []

    def __init__(self):
        super().__init__()
        self.calls, self.before = [], []
        Tape.made.append(weakref.ref(self))

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function._schema.is_mutable:
            tensors = [a for a in args if isinstance(a, torch.Tensor)]
            self.before += [(t, t.clone()) for t in tensors]
        out = function(*args, **(kwargs or {}))
        self.calls.append((function, args, kwargs or {}, out))
        return out

    def __exit__(self, *error):
        super().__exit__(*error)
        for tensor, value in reversed(self.before):
            tensor.copy_(value)
        self.before = None

    def replay(self):
        for function, args, kwargs, out in self.calls:
            again = tree_leaves(function(*args, **kwargs))
            for place, value in zip(tree_leaves(out), again, strict=True):
                if isinstance(place, torch.Tensor) and place.data_ptr() != value.data_ptr():
                    place.copy_(value)


@pytest.fixture
def tapes(monkeypatch):
    """Record on tapes -> weak references to all that are made."""
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Tape)
    monkeypatch.setattr(torch.cuda, "graph", lambda tape: tape)
    monkeypatch.setattr(Tape, "made", [])
    return Tape.made


@pytest.mark.parametrize("window", [None, 11])
@pytest.mark.parametrize("arm", ARMS)
def test_a_recorded_step_replays_what_plain_decode_does(tokens, tapes, window, arm):
    model = tiny_model(window=window)
    step, prompt = partial(recorded, extend), tokens[:1, :48]
    _, plain, _ = prefill(model, prompt, *arm, room=8)
    _, static, _ = prefill(model, prompt, *arm, room=8, cache=StaticCache)
    for i in range(48, 56):
        token, pos = tokens[:1, i:i + 1], torch.tensor([[i]])
        a = extend(model, token, pos, plain, 56)
        b = step(model, token, pos, static, 56)
        assert torch.allclose(a, b, atol=1e-5), i
    assert len(tapes) == 1
    assert [cache.bytes for cache in plain] == [cache.bytes for cache in static]
    a = generate(model, tokens[:1], 12, *arm, eos=())
    b = generate(model, tokens[:1], 12, *arm, eos=(), cache=StaticCache, step=step)
    assert a.tokens == b.tokens
    assert a.kv_bytes == b.kv_bytes


def test_a_recorded_step_does_not_write_over_what_is_held(tiny, tokens, tapes):
    """A replay does not run append, so the end is looked at before it."""
    step = partial(recorded, extend)
    _, caches, _ = prefill(tiny, tokens[:1, :48], room=3, cache=StaticCache)
    for i in range(48, 51):
        step(tiny, tokens[:1, i:i + 1], torch.tensor([[i]]), caches, i + 1)
    with pytest.raises(ValueError, match="KV cache is full: 52 tokens for a capacity of 51"):
        step(tiny, tokens[:1, 51:52], torch.tensor([[51]]), caches, 52)


def test_a_recording_goes_with_its_caches(tiny, tokens, tapes):
    """No circle of references keeps a long prompt's memory until some later collection."""
    step = partial(recorded, extend)
    gc.collect()
    gc.disable()
    try:
        for _ in range(2):
            generate(tiny, tokens[:1], 5, eos=(), cache=StaticCache, step=step)
        assert [tape() for tape in tapes] == [None, None]
    finally:
        gc.enable()


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


def test_compiling_makes_few_graphs_for_all_lengths(tiny, tokens, monkeypatch):
    """Not one more for a block, an arm, a prompt's length or a number of new tokens."""
    plain = answers(tiny, tokens)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    options = compile_model(tiny, extend)
    assert answers(tiny, tokens, **options) == plain
    assert counters["stats"]["unique_graphs"] <= 4      # qkv and feed_forward, one token and more
