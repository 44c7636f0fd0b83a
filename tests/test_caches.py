"""lab/caches.py: H2O behind a pruned prompt, its share, what it refuses.

What it holds and reads, by a loop over its heads: tests/test_independent.py.
"""
import math

import pytest

from conftest import SCHEDULE, TOKENS, tiny_model
from infer import generate
from lab.caches import h2o
from lab.scorers import norm
from model import KVCache
from prune import UNPRUNED, extend, prefill

MODEL = tiny_model()


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
    for model, new, message in ((MODEL, 2, "one token at a time"),
                                (tiny_model(window=60), 1, "sliding window")):
        _, caches, _ = prefill(model, TOKENS, cache=h2o(0.4))
        with pytest.raises(ValueError, match=message):
            extend(model, TOKENS[:, :new], 60, caches)
