"""A Llama decoder in plain PyTorch, read straight from safetensors: the frozen backbone.

The decoder is the ordinary one: RMSNorm, rotary positions, grouped-query attention, SwiGLU. Three
things serve token dropping. Rotary angles come from explicit positions, so a token that survives a
drop keeps its own position. Each block has a KVCache of its own, so caches may be ragged: of
different length from block to block. And Llama.forward is only the plain loop over blocks:
saliency.py, train.py and prune.py each write their own, with what they do between two blocks.

This file does not know which tokens are dropped, or why. It reads one prompt at a time.

Shapes: n tokens now in the pass, m keys, D hidden, H query heads, G key/value heads, d head size,
V vocabulary. The first dimension, 1, is the row.
"""
import math
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, Optional

import torch
import torch.nn.functional as F
from torch import nn

from support.config import slowed
from support.files import need
from support.tokenizer import Tokenizer  # noqa: F401
from support.weights import (Linear, choose_device, describe_weights, fill_randomly, linear,
                             read_whole, tensors)


@dataclass(frozen=True)
class Config:
    """The shape of a decoder."""
    dim: int                                # D
    n_blocks: int                           # L
    n_heads: int                            # H
    n_kv_heads: int                         # G
    head_dim: int                           # d
    ffn: int                                # inner width of the SwiGLU
    vocab: int                              # V
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_llama3: Optional[tuple] = None     # see support.config.slowed
    rope_linear: Optional[float] = None
    max_positions: int = 131072
    window: Optional[int] = None            # a query sees itself and window - 1 positions before
    tied: bool = False                      # the output head is the embedding
    qkv_bias: bool = False
    o_bias: bool = False
    qk_norm: bool = False                   # q and k are normalised, each head by itself
    bos: Optional[int] = None
    eos: tuple = ()


class Rope(NamedTuple):
    """Where the tokens of a pass stand: made by `Llama.rope`, used by all blocks up to a drop."""
    pos: torch.Tensor               # (1, n) original positions, increasing
    cos: torch.Tensor               # (1, 1, n, d/2)
    sin: torch.Tensor               # (1, 1, n, d/2)
    window: Optional[int]           # None where the sliding window reaches everything


def rotate(x, cos, sin):
    """Turn each pair of features (i, i + d/2) of x (1, heads, n, d) by its token's angle."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


def visible(pos_q, pos_k, window=None):
    """Which keys a query may see: positions (1, n) and (1, m) -> (1, 1, n, m) bool."""
    back = pos_q[:, None, :, None] - pos_k[:, None, None, :]
    if window is None:
        return back >= 0
    return (back >= 0) & (back < window)


# Attention: q is (1, H, n, d), k and v are (1, G, n, d), the result is (1, H, n, d).


def causal_attention(q, k, v, rope):
    """Attention of the tokens of a pass to themselves."""
    gqa = q.shape[1] != k.shape[1]
    if rope.window is None:         # survivors stay in order: causal by index is causal by position
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=gqa)
    see = visible(rope.pos, rope.pos, rope.window)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=see, enable_gqa=gqa)


def masked_attention(q, k, v, rope, mask):
    """Attention in which only kept keys are seen: pruning while training (Section 3.3).

    mask (1, n) holds 1 for kept and 0 for dropped tokens; each query still sees itself. As in
    DynamicViT the exponentials are multiplied by the mask before they are normalised, so a kept
    token's output is that of attention over the kept tokens alone: masking equals dropping.

    A dropped token's gradient is the change that showing its key would make. It stays bounded; the
    true derivative at 0 does not.
    """
    group = q.shape[1] // k.shape[1]
    k, v = (t.repeat_interleave(group, 1) for t in (k, v))
    logit = q.float() @ k.float().mT / math.sqrt(q.shape[-1])       # (1, H, n, n)
    see = visible(rope.pos, rope.pos, rope.window)                  # (1, 1, n, n)
    itself = torch.eye(q.shape[2], dtype=torch.bool, device=q.device)
    m = torch.where(itself, 1.0, mask.float()[:, None, None, :])
    kept = see & (m > 0)
    total = logit.detach().masked_fill(~kept, -math.inf).logsumexp(-1, keepdim=True)
    # A kept key's share of the attention is exp(logit - total). A dropped one's, if it were shown
    # beside the kept ones, would be sigmoid(logit - total). As logarithms neither overflows.
    log_share = logit - total
    log_share = torch.where(kept, log_share, F.logsigmoid(log_share))
    share = log_share.exp() * see * m
    share = share / share.sum(-1, keepdim=True)
    return share.to(v.dtype) @ v


class KVCache:
    """Keys and values of the tokens that entered one block; after a drop fewer: ragged."""

    def __init__(self, config, capacity, like):
        """Room for `capacity` tokens, on the device and in the type of the tensor `like`."""
        G, d = config.n_kv_heads, config.head_dim
        self.k = like.new_empty(1, G, capacity, d)
        self.v = like.new_empty(1, G, capacity, d)
        self.pos = torch.empty(1, capacity, device=like.device, dtype=torch.long)
        self.n = 0                  # tokens held; setting it back forgets the newest

    def append(self, k, v, pos):
        """Add n tokens, pos (1, n) -> keys, values and positions of all that are held."""
        start, end = self.n, self.n + k.shape[2]
        capacity = self.k.shape[2]
        need(end <= capacity, f"KV cache is full: {end} tokens for a capacity of {capacity}")
        self.k[:, :, start:end] = k
        self.v[:, :, start:end] = v
        self.pos[:, start:end] = pos
        self.n = end
        return self.k[:, :, :end], self.v[:, :, :end], self.pos[:, :end]

    def attend(self, q, k, v, rope):
        """Attention of new tokens to themselves and to all that are held."""
        k, v, pos = self.append(k, v, rope.pos)
        n, m = q.shape[2], k.shape[2]
        if n == m:                  # the prompt: nothing was held before
            return causal_attention(q, k, v, rope)
        if n > 1:                   # several more tokens, a second question say
            see = visible(rope.pos, pos, rope.window)
            gqa = q.shape[1] != k.shape[1]
            return F.scaled_dot_product_attention(q, k, v, attn_mask=see, enable_gqa=gqa)
        # Decode: one token comes last, so it sees all that a window reaches. The heads of a group
        # are the queries of their key head, which is read once.
        see = visible(rope.pos, pos, rope.window) if rope.window else None
        grouped = q.view(1, k.shape[1], -1, q.shape[3])             # (1, G, H/G, d)
        y = F.scaled_dot_product_attention(grouped, k, v, attn_mask=see)
        return y.view(q.shape)


class Block(nn.Module):
    """One decoder block: x + attention(norm(x)), then x + SwiGLU(norm(x))."""

    def __init__(self, c):
        super().__init__()
        self.c = c
        q_dim = c.n_heads * c.head_dim
        kv_dim = c.n_kv_heads * c.head_dim
        norm = partial(nn.RMSNorm, eps=c.norm_eps)                  # x / rms(x) * weight
        self.attn_norm = norm(c.dim)
        self.mlp_norm = norm(c.dim)
        self.q = Linear(c.dim, q_dim, bias=c.qkv_bias)
        self.k = Linear(c.dim, kv_dim, bias=c.qkv_bias)
        self.v = Linear(c.dim, kv_dim, bias=c.qkv_bias)
        self.q_norm = norm(c.head_dim) if c.qk_norm else nn.Identity()
        self.k_norm = norm(c.head_dim) if c.qk_norm else nn.Identity()
        self.o = Linear(q_dim, c.dim, bias=c.o_bias)
        self.gate = Linear(c.dim, c.ffn, bias=False)
        self.up = Linear(c.dim, c.ffn, bias=False)
        self.down = Linear(c.ffn, c.dim, bias=False)

    def forward(self, x, rope, attend=causal_attention):
        """x (1, n, D) -> (1, n, D). attend(q, k, v, rope) -> (1, H, n, d) says who sees whom."""
        y = attend(*self.qkv(x, rope), rope)                        # (1, H, n, d)
        x = x + self.o(y.transpose(1, 2).flatten(2))                # (1, n, H*d) -> (1, n, D)
        return self.feed_forward(x)

    def qkv(self, x, rope):
        """x (1, n, D) -> q, k, v, with q and k turned to their tokens' positions."""
        h = self.attn_norm(x)
        heads = (-1, self.c.head_dim)
        q = self.q(h).unflatten(-1, heads).transpose(1, 2)          # (1, H, n, d)
        k = self.k(h).unflatten(-1, heads).transpose(1, 2)          # (1, G, n, d)
        v = self.v(h).unflatten(-1, heads).transpose(1, 2)
        q = rotate(self.q_norm(q), rope.cos, rope.sin)
        k = rotate(self.k_norm(k), rope.cos, rope.sin)
        return q, k, v

    def feed_forward(self, x):
        """x (1, n, D) -> x + SwiGLU(norm(x)), in pieces: they bound the memory of a long row."""
        piece = 1024 if x.device.type == "cpu" else 16384           # tokens
        return torch.cat([part + self.swiglu(part) for part in x.split(piece, dim=1)], dim=1)

    def swiglu(self, x):
        h = self.mlp_norm(x)
        return self.down(F.silu(self.gate(h)) * self.up(h))


class Llama(nn.Module):
    """The frozen backbone; callers that prune write the loop over `blocks` themselves."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab, config.dim)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_blocks))
        self.norm = nn.RMSNorm(config.dim, config.norm_eps)
        self.head = None if config.tied else Linear(config.dim, config.vocab, bias=False)

    @property
    def device(self):
        return self.embed.weight.device

    @property
    def dtype(self):
        return self.embed.weight.dtype

    def check_positions(self, end):
        """Refuse positions that the model does not have; end is one past the last."""
        limit = self.config.max_positions
        need(end <= limit, f"position {end - 1} is past this model's {limit} positions; use a "
                           "shorter prompt or fewer new tokens")

    def rope(self, pos, end):
        """The Rope of tokens at pos (1, n).

        end: one past the last position; it spares a wait for the GPU.
        """
        c = self.config
        self.check_positions(end)
        pair = torch.arange(0, c.head_dim, 2, device=pos.device).float()
        freq = 1.0 / c.rope_theta ** (pair / c.head_dim)
        freq = slowed(freq, c.rope_llama3, c.rope_linear)
        angle = pos[:, None, :, None].float() * freq                # (1, 1, n, d/2)
        window = c.window if c.window and end > c.window else None
        return Rope(pos, angle.cos().to(self.dtype), angle.sin().to(self.dtype), window)

    def forward(self, tokens):
        """tokens (1, N) int64 -> logits (1, N, V) fp32: the whole unpruned pass."""
        N = tokens.shape[1]
        pos = torch.arange(N, device=tokens.device)[None]
        rope = self.rope(pos, N)
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x, rope)
        return self.logits(x)

    def logits(self, x):
        """x (..., D) leaving the last block -> (..., V) fp32; pass only what you need."""
        head = self.embed if self.config.tied else self.head
        return linear(self.norm(x), head.weight).float()


def load(path, dtype=None, device=None, split=None):
    """Read a checkpoint directory in Hugging Face layout, or build `random:NAME` -> frozen Llama.

    dtype: default bfloat16 on cuda, else float32. device: default cuda if there, else cpu. split:
    lays the empty model out over several processes (support/processes.py). Raises
    FileNotFoundError or ValueError for a missing or damaged file, or one of another model.
    """
    device = choose_device(device)
    if dtype is None:
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    root, fields = describe_weights(path)
    with torch.device("meta"):      # shapes without memory: each tensor is put in place when read
        model = Llama(Config(**fields))
    read = split(model) if split else read_whole    # split divides the model, returns its reader
    if root is None:
        return fill_randomly(model.to(dtype), device)
    parameters = dict(model.named_parameters())
    state = {name: read(parameters[name], stored).to(dtype)
             for name, stored in tensors(root, parameters, model.config.tied, device)}
    model.load_state_dict(state, assign=True)
    return model.eval().requires_grad_(False)
