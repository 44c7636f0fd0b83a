"""lab/caches.py: H2O behind a pruned prompt, its share, what it refuses.

The loop over its heads, for every share: tests/test_independent.py.
"""
import math
from fractions import Fraction

import pytest
import torch

from conftest import SCHEDULE, TOKENS, close, tiny_model
from infer import generate
from lab.caches import H2OCache, h2o
from lab.scorers import norm
from model import KVCache
from prune import UNPRUNED, extend, prefill
from test_independent import one_head

MODEL = tiny_model()


@pytest.mark.parametrize("heavy", [0.5, 0.0])
def test_h2o_in_a_pruned_model_equals_a_loop_over_its_heads(heavy, monkeypatch):
    """Every block's cache, on the queries, keys and values that it gets, ragged after stages."""
    heard, attend = {}, H2OCache.attend

    def listening(cache, q, k, v, rope):
        out = attend(cache, q, k, v, rope)
        heard.setdefault(cache, []).append((q, k, v, out))
        return out
    monkeypatch.setattr(H2OCache, "attend", listening)
    _, caches, _ = prefill(MODEL, TOKENS[:, :48], SCHEDULE, norm, 12, h2o(0.4, heavy))
    for i in range(48, 56):
        extend(MODEL, TOKENS[:, i:i + 1], i, caches)
    for cache, n in zip(caches, SCHEDULE.counts(48, 6)):
        q, k, v, out = (torch.cat(parts, 2)[0] for parts in zip(*heard[cache]))
        q, out = (each.unflatten(0, (2, -1)).transpose(1, 2) for each in (q, out))
        for g in range(2):
            want, held = one_head(q[g], k[g], v[g], n, Fraction(2, 5), Fraction(heavy))
            assert close(out[g], want, 1e-5)
            assert torch.equal(cache.k[0, g, :cache.n], k[g, held])
    with pytest.raises(ValueError, match="one token at a time"):
        extend(MODEL, TOKENS[:, :2], 60, caches)


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
