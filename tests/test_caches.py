"""lab/caches.py: H2O against a slow specification."""
import math

import pytest
import torch

from conftest import SCHEDULE, close, tiny_model
from infer import generate
from lab.caches import h2o
from lab.scorers import norm
from model import KVCache
from prune import UNPRUNED, extend, prefill

MODEL = tiny_model()
TOKENS = torch.randint(0, 90, (1, 60), generator=torch.Generator().manual_seed(1))


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
        e = {p: math.exp((q @ key).item() / math.sqrt(len(q)))
             for p, (key, _, _) in self.held.items()}
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
        others = order[:len(order) - recent]
        others.sort(key=lambda p: -self.held[p][2])
        for p in others[budget - recent:]:
            del self.held[p]


class SlowCache:
    """The two KV heads of one block."""

    def __init__(self, heavy):
        self.heads = [SlowHead(heavy), SlowHead(heavy)]

    def attend(self, q, k, v, rope):
        """As KVCache.attend, token by token; then every head shrinks."""
        q = q[0].unflatten(0, (2, -1))                                  # (G, H/G, n, d)
        tokens = []
        for t, position in enumerate(rope.pos[0].tolist()):
            tokens.append(torch.cat([head.read(q[g, :, t], k[0, g, t], v[0, g, t], position)
                                     for g, head in enumerate(self.heads)]))        # (H, d)
        for head in self.heads:
            head.shrink()
        return torch.stack(tokens, dim=1)[None]                         # (1, H, n, d)

    def keys(self):
        """What is held, in order: (G, m, d)."""
        return torch.stack([torch.stack([head.held[p][0] for p in sorted(head.held)])
                            for head in self.heads])


def slow_prefill(prompt, kept, heavy):
    """The prompt through slow caches -> logits, caches; kept {block: survivors' positions}."""
    pos, x = torch.arange(prompt.shape[1])[None], MODEL.embed(prompt)
    caches = [SlowCache(heavy) for _ in MODEL.blocks]
    for b, block in enumerate(MODEL.blocks, start=1):
        x = block(x, MODEL.rope(pos, prompt.shape[1]), caches[b - 1].attend)
        if b in kept:
            stay = torch.isin(pos[0], kept[b])
            x, pos = x[:, stay], pos[:, stay]
    return MODEL.logits(x[:, -1]), caches


@pytest.mark.parametrize("heavy", [0.5, 0.0])
def test_h2o_equals_a_slow_specification(heavy):
    logits, caches, trace = prefill(MODEL, TOKENS[:, :48], SCHEDULE, norm, 12, h2o(0.4, heavy))
    kept = {stage.block: stage.kept for stage in trace}
    slow_logits, slow_caches = slow_prefill(TOKENS[:, :48], kept, heavy)
    assert close(slow_logits, logits, 1e-4)
    for i in range(48, 56):
        token = TOKENS[:, i:i + 1]
        found = extend(MODEL, token, i, caches)
        x, rope = MODEL.embed(token), MODEL.rope(torch.tensor([[i]]), i + 1)
        for block, slow in zip(MODEL.blocks, slow_caches):
            x = block(x, rope, slow.attend)
        assert close(MODEL.logits(x), found, 1e-4)
        for cache, slow in zip(caches, slow_caches):
            assert close(cache.k[0, :, :cache.n], slow.keys(), 1e-4)
    with pytest.raises(ValueError, match="one token at a time"):
        extend(MODEL, TOKENS[:, :2], 60, caches)


def test_a_kv_head_hears_all_of_its_queries():
    """1 from each of 60 queries of each of two query heads."""
    for cache in prefill(MODEL, TOKENS, cache=h2o(1.0))[1]:
        assert close(cache.weight.sum(-1), torch.full((1, 2), 120.0), 1e-3)


def test_h2o_holds_its_share_and_all_changes_nothing():
    for arm in ((UNPRUNED, None), (SCHEDULE, norm)):
        whole, kept, small = (generate(MODEL, TOKENS, 8, *arm, cache=kind)
                              for kind in (KVCache, h2o(1.0), h2o(0.4)))
        assert whole.tokens == kept.tokens != small.tokens
        assert [cache.n for cache in whole.caches] == [cache.n for cache in kept.caches]
        # a share of the prompt's tokens that entered a block, and of the seven behind them
        shares = [math.ceil(0.4 * (n + 7) - 1e-9) for n in small.counts]
        assert [cache.n for cache in small.caches] == shares


def test_h2o_refuses_what_it_cannot_do():
    for shares in ((1.5,), (0.0,), (0.4, 1.1)):
        with pytest.raises(ValueError, match="have to be shares"):
            h2o(*shares)
    with pytest.raises(ValueError, match="sliding window"):
        prefill(tiny_model(window=11), TOKENS, cache=h2o(0.4))
    # a window that reaches the prompt, but not the first new token's
    model = tiny_model(window=60)
    _, caches, _ = prefill(model, TOKENS, cache=h2o(0.4))
    with pytest.raises(ValueError, match="sliding window"):
        extend(model, TOKENS[:, :1], 60, caches)
