"""H2O, which compresses the caches that pruning leaves (Section 4.4, Table 6).

prefill and generate take a kind of cache and never know which one they hold:

    generate(model, tokens, 48, schedule, scorer, cache=h2o(0.4))

Shapes: n new tokens, m tokens held, H query heads, G key/value heads, d head size.
"""
import math
from functools import partial

import torch
import torch.nn.functional as F

from model import KVCache
from prune import local_tokens
from support.files import need


def h2o(share=0.4, heavy=0.5):
    """The kind of cache that keeps `share` of its tokens; heavy=0 keeps the latest alone."""
    need(0 < share <= 1 and 0 <= heavy <= 1, f"H2O: {share} and {heavy} have to be shares")
    return partial(H2OCache, share=share, heavy=heavy)


class H2OCache(KVCache):
    """Heavy-Hitter Oracle (arXiv 2306.14048): each KV head keeps the tokens it looks at most.

    A key's weight is the attention that it has received, summed over all queries so far and over
    the query heads of its KV head. After the prompt and after every decoded token `share` of all
    tokens that have entered stay: of these the part `heavy` by weight, the rest are the latest.
    The prompt is read whole, so the first new token is that of the uncompressed model; its n * n
    weights for each head are in memory at once. The positions, one list for all heads, are not true
    any more; decode does not ask for them.
    """

    def __init__(self, config, capacity, like, share=0.4, heavy=0.5):
        super().__init__(config, capacity, like)
        self.share, self.heavy = share, heavy
        self.entered = 0                                    # tokens that came in, evicted ones too
        self.weight = self.k[..., :0, 0].float()            # (1, G, m)

    def attend(self, q, k, v, rope):
        """As KVCache, then evict. Behind the prompt one token at a time: each may evict another."""
        need(self.n == 0 or q.shape[2] < 2, "H2O decodes one token at a time")
        need(rope.window is None, "H2O does not know the positions of what it kept, so a sliding "
             "window cannot be applied: use a shorter prompt, or leave H2O out")
        out = super().attend(q, k, v, rope)
        self.entered += q.shape[2]
        self.weigh(q)
        self.evict()
        return out

    def weigh(self, q):
        """Add the attention of the newest n queries q (1, H, n, d)."""
        n, m = q.shape[2], self.n
        q = q.unflatten(1, (self.k.shape[1], -1))                           # (1, G, H/G, n, d)
        logit = (q @ self.k[:, :, None, :m].mT).float() / math.sqrt(q.shape[-1])
        later = torch.ones(n, m, device=q.device).triu(1 + m - n) > 0       # behind the query's own
        share = logit.masked_fill(later, -math.inf).softmax(-1)             # (1, G, H/G, n, m)
        self.weight = F.pad(self.weight, (0, n)) + share.sum((2, 3))

    def evict(self):
        """Keep the heaviest and the latest, another choice for each KV head."""
        budget = min(self.n, local_tokens(self.entered, self.share))
        latest = budget - int(self.heavy * budget)
        weight = self.weight.clone()
        weight[..., self.n - latest:] = math.inf
        index = weight.topk(budget).indices.sort(-1).values                 # (1, G, budget)
        self.weight = self.weight.take_along_dim(index, 2)
        # and a free place for the next token
        self.k, self.v = (F.pad(held.take_along_dim(index[..., None], 2), (0, 0, 0, 1))
                          for held in (self.k, self.v))
        self.n = budget
