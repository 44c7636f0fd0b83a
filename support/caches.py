"""Two special caches, H2O (Table 6) and static; the ordinary, ragged ones are model.KVCache.

prefill and generate take a kind of cache and never know which one they hold:

    generate(model, tokens, 48, schedule, scorer, cache=h2o(0.4))

Shapes: B rows, n new tokens, m tokens held, H query heads, G key/value heads, d head size.
"""
import math
from functools import partial

import torch

from model import PAD, KVCache
from support.files import need

# Evicted tokens leave no gap, and each KV head has others: no one list of positions is true.
NO_WINDOW = ("H2O does not know the positions of what it has kept, so a sliding window shorter "
             "than prompt and new tokens cannot be applied: use a shorter prompt, or leave H2O out")


def h2o(share=0.4, heavy=0.5):
    """The kind of cache that keeps `share` of its tokens; heavy=0 keeps the latest alone."""
    need(0 < share <= 1 and 0 <= heavy <= 1, f"H2O: {share} and {heavy} have to be shares")
    return partial(H2OCache, share=share, heavy=heavy)


class H2OCache(KVCache):
    """Heavy-Hitter Oracle (arXiv 2306.14048): each KV head keeps the tokens it looks at most.

    A key's weight is the attention that it has received, summed over all queries so far and over
    the query heads of its KV head. After the prompt and after every decoded token `share` of all
    tokens that have entered stay: of these the part `heavy` by weight, the rest are the latest.
    The prompt is read whole, so the first new token is that of the uncompressed model.
    """

    def __init__(self, config, batch, capacity, device, dtype, padded=False, share=0.4, heavy=0.5):
        need(not padded, "H2O reads rows of one length only")
        # The first block's cache has room for all positions, and is made before the prompt is read.
        need(share == 1 or not config.window or capacity <= config.window, NO_WINDOW)
        super().__init__(config, batch, capacity, device, dtype)
        self.share, self.heavy = share, heavy
        self.entered = 0                                    # tokens that came in, evicted ones too
        self.weight = self.k.new_zeros(batch, config.n_kv_heads, 0, dtype=torch.float32)

    def attend(self, q, k, v, rope):
        """As KVCache, then evict. Behind the prompt one token at a time: each may evict another."""
        need(self.n == 0 or q.shape[2] == 1, "H2O decodes one token at a time")
        need(self.share == 1 or rope.window is None, NO_WINDOW)
        out = super().attend(q, k, v, rope)
        if self.share < 1:
            self.entered += q.shape[2]
            self.weigh(q)
            self.evict()
        return out

    def weigh(self, q, chunk=256):
        """Add the attention of the newest n queries q (B, H, n, d), `chunk` of them at a time."""
        n, m = q.shape[2], self.n
        weight = self.weight.new_zeros(*self.weight.shape[:2], m)           # (B, G, m)
        weight[..., :m - n] = self.weight
        q = q.unflatten(1, (self.k.shape[1], -1))                           # (B, G, H/G, n, d)
        keys = self.k[:, :, None, :m].transpose(-1, -2)                     # (B, G, 1, d, m)
        place = torch.arange(m, device=q.device)
        for i in range(0, n, chunk):
            a = (q[..., i:i + chunk, :] @ keys).float() / math.sqrt(q.shape[-1])
            last = place[m - n:][i:i + chunk, None]                         # each query's own key
            weight += a.masked_fill(place > last, -math.inf).softmax(-1).sum((2, 3))
        self.weight = weight

    def evict(self):
        """Keep the heaviest and the latest, another choice for each KV head.

        The positions, one list for all heads, are not true any more; decode does not ask for them.
        """
        m = self.n
        budget = min(m, max(1, math.ceil(self.share * self.entered - 1e-9)))
        latest = torch.arange(m, device=self.k.device) >= m - (budget - int(self.heavy * budget))
        index = self.weight.masked_fill(latest, math.inf).topk(budget).indices.sort(-1).values
        self.weight = self.weight.gather(2, index)                          # (B, G, budget)
        self.k, self.v = pick(self.k, index), pick(self.v, index)
        self.n = budget


def pick(memory, index):
    """The places at index (B, G, k) of memory (B, G, m, d), and a free one for the next token."""
    B, G, _, d = memory.shape
    k = index.shape[2]
    kept = memory.new_empty(B, G, k + 1, d)
    kept[:, :, :k] = memory.gather(2, index[..., None].expand(-1, -1, -1, d))
    return kept


def held_bytes(caches):
    """Bytes of the keys and values that all these hold."""
    return sum(cache.bytes for cache in caches)


class StaticCache(KVCache):
    """Decode in shapes that never change, as a CUDA graph needs them.

    The whole memory is attended to; free places stand at PAD, where no query looks. The place of
    the next token is a number on the device. The prompt goes in first and in one piece.
    """

    def __init__(self, config, batch, capacity, device, dtype, padded=False):
        super().__init__(config, batch, capacity, device, dtype, padded=True)
        self.pos.fill_(PAD)
        self.k.zero_()              # not seen, but 0 times what memory happened to hold may be nan
        self.v.zero_()
        self.slot = torch.zeros(1, device=device, dtype=torch.long)
        self.warm, self.graph = False, None         # of the first block's cache, see `recorded`

    def append(self, k, v, pos):
        """Add k, v (B, G, n, d), pos (B, n) -> the prompt as KVCache, then the whole memory."""
        n, capacity = k.shape[2], self.k.shape[2]
        if self.n == 0:
            self.slot += n
            return super().append(k, v, pos)
        end = self.n + n            # a recorded step is counted once: `recorded` looks at the rest
        need(end <= capacity, f"KV cache is full: {end} tokens for a capacity of {capacity}")
        self.n = end
        place = self.slot + torch.arange(n, device=k.device)
        self.k.index_copy_(2, place, k)
        self.v.index_copy_(2, place, v)
        self.pos.index_copy_(1, place, pos)
        self.slot += n
        return self.k, self.v, self.pos

    @property
    def bytes(self):
        """Bytes of the keys and values held; waits for the device."""
        B, G, _, d = self.k.shape
        return 2 * B * G * int(self.slot) * d * self.k.element_size()


def compile_model(model, extend):
    """torch.compile the blocks, attention apart -> options of `generate` for a compiled decode.

    Attention stays as it is because of the cache, whose lengths would each be compiled anew. The
    step, prune.extend, decodes in static shapes; on cuda it is recorded as a CUDA graph.
    """
    torch._dynamo.config.recompile_limit = 32       # a graph for each number of pieces
    for block in model.blocks:
        block.qkv = torch.compile(block.qkv, dynamic=True)
        block.feed_forward = torch.compile(block.feed_forward, dynamic=True)
    step = partial(recorded, extend) if model.device.type == "cuda" else extend
    return {"step": step, "cache": StaticCache}


def recorded(extend, model, token, pos, caches, end):
    """extend(model, token, pos, caches, end) as a CUDA graph, one for each list of StaticCaches.

    The first step runs as it is: what may not be recorded is done then. The second is recorded,
    and from then on replayed. The logits are the same memory every time.
    """
    first = caches[0]               # the graph lives as long as the memory that it works on
    capacity = first.k.shape[2]     # nothing was dropped before block 1: it holds every position
    need(end <= capacity, f"KV cache is full: {end} tokens for a capacity of {capacity}")
    if not first.warm:
        first.warm = True
        return extend(model, token, pos, caches, end)
    if first.graph is None:
        first.graph = record(extend, model, token, pos, caches, end)
    graph, logits, *places = first.graph
    for place, value in zip(places, (token, pos)):
        place.copy_(value)
    graph.replay()
    return logits


def record(extend, model, token, pos, caches, end):
    """-> a CUDA graph of one step, the logits it writes, and the token and position it reads."""
    token, pos = token.clone(), pos.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):   # nothing runs in here
        logits = extend(model, token, pos, caches, end)
    return graph, logits, token, pos
