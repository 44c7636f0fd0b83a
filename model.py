"""A Llama decoder in plain PyTorch, read straight from safetensors: the frozen backbone.

The decoder is the ordinary one: RMSNorm, rotary positions, grouped-query attention, SwiGLU. Three
things serve token dropping. Rotary angles come from explicit positions, so a token that survives a
drop keeps its own position. Each block's KVCache is its own, so caches may be ragged: of different
length from block to block. And Llama.forward is only the plain loop over blocks: saliency.py,
train.py and prune.py each write their own, with what they do between two blocks.

Shapes: B rows, n tokens now in the pass, m keys, D hidden, H query heads, G key/value heads,
d head size, V vocabulary.
"""
import math
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, Optional

import torch
import torch.nn.functional as F
from torch import nn

from support.checkpoint import (choose_device, describe, fill_randomly, read_config, read_whole,
                                shards, tensors)
from support.files import need
from support.linear import Linear
from support.memory import check_memory
from support.rope import scaled
from support.tokenizer import Tokenizer  # noqa: F401

# The position of padding: after every real query, so none sees it.
PAD = 1 << 30
# Tokens of a row that go through the SwiGLU at once: bounds the memory of its inner values.
FEED_FORWARD_CHUNK = {"cpu": 1024, "cuda": 16384}


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
    rope_llama3: Optional[tuple] = None     # slow turns are slowed further: support/rope.py
    rope_ramp: Optional[tuple] = None       # types linear and yarn: support/rope.py
    max_positions: int = 131072
    window: Optional[int] = None            # a query sees itself and window - 1 positions before
    tied: bool = False                      # the output head is the embedding
    qkv_bias: bool = False
    o_bias: bool = False
    qk_norm: bool = False                   # q and k are normalised, each head by itself
    bos: Optional[int] = None
    eos: tuple = ()

    @staticmethod
    def from_json(path):
        """Read a Hugging Face config.json; what is not supported raises ValueError."""
        return Config(**read_config(path))


class Rope(NamedTuple):
    """Where the tokens of a pass are: made by `Llama.rope`, used by all blocks up to a drop."""
    pos: torch.Tensor               # (B, n) original positions, increasing
    cos: torch.Tensor               # (B, 1, n, d)
    sin: torch.Tensor               # (B, 1, n, d)
    window: Optional[int]           # None where the sliding window reaches everything


def positions(tokens, lengths=None):
    """0 .. N-1 for every row of tokens (B, N); PAD past each row's length, where given."""
    B, N = tokens.shape
    pos = torch.arange(N, device=tokens.device)
    pos = pos.expand(B, N)
    if lengths is None:
        return pos
    ends = torch.tensor(lengths, device=tokens.device)
    return pos.masked_fill(pos >= ends[:, None], PAD)


def beyond(lengths, device):
    """Which places of a right-padded batch are padding: B lengths -> (B, longest) bool."""
    places = torch.arange(max(lengths), device=device)
    lengths = torch.tensor(lengths, device=device)
    return places >= lengths[:, None]


def per_row(value, rows):
    """An int, or a list with one for each row -> a list of `rows` ints."""
    if isinstance(value, int):
        return [value] * rows
    return list(value)


def rotate(x, cos, sin):
    """Turn each pair (i, i + d/2) of x (B, heads, n, d) by its token's angle."""
    half = x.shape[-1] // 2
    a, b = x[..., :half], x[..., half:]
    sin_a, sin_b = sin[..., :half], sin[..., half:]
    y = x * cos
    # in place, without the copy that joining (-b, a) would make
    y[..., :half].addcmul_(b, sin_a, value=-1)
    y[..., half:].addcmul_(a, sin_b)
    return y


def visible(pos_q, pos_k, window=None):
    """Which keys a query may see: positions (B, n) and (B, m) -> (B, 1, n, m) bool."""
    pos_q = pos_q[:, None, :, None]
    pos_k = pos_k[:, None, None, :]
    back = pos_q - pos_k
    if window is None:
        return back >= 0
    return (back >= 0) & (back < window)


# Attention: q is (B, H, n, d), k and v are (B, G, n, d), the result is (B, H, n, d).


def causal_attention(q, k, v, rope):
    """Attention of a pass to itself."""
    gqa = q.shape[1] != k.shape[1]
    if rope.window is None:         # survivors stay in order: causal by index is causal by position
        causal = q.shape[2] > 1
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=gqa)
    see = visible(rope.pos, rope.pos, rope.window)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=see, enable_gqa=gqa)


def masked_attention(q, k, v, rope, mask):
    """Attention in which only kept keys are seen: pruning while training (Section 3.3).

    mask (B, n) holds 1 for kept and 0 for dropped tokens; each query still sees itself. The
    exponentials are multiplied by the mask before they are normalised, as in DynamicViT, so a kept
    token's output is that of attention over the kept tokens alone: masking equals dropping. It is
    differentiable in the mask. For a dropped token the gradient is what seeing its key, too, would
    change, and so bounded: the derivative at 0 is e^60 times as much where that key is 60 above.
    """
    group = q.shape[1] // k.shape[1]
    k = k.repeat_interleave(group, 1)
    v = v.repeat_interleave(group, 1)
    a = q.float() @ k.float().mT                                    # (B, H, n, n)
    a = a / math.sqrt(q.shape[-1])
    see = visible(rope.pos, rope.pos, rope.window)                  # (B, 1, n, n)
    n = q.shape[2]
    diagonal = torch.eye(n, device=q.device, dtype=torch.bool)
    m = mask.float()[:, None, None, :]
    m = torch.where(diagonal, 1.0, m)                               # (B, 1, n, n)
    hidden = ~see | (m == 0)
    kept = a.detach().masked_fill(hidden, -math.inf)
    a = a - kept.logsumexp(-1, keepdim=True)    # exp(a) is now a kept key's share of attention
    a = torch.where(hidden, F.logsigmoid(a), a)     # or a hidden one's, were it seen as well
    e = torch.exp(a) * see * m
    p = e / e.sum(-1, keepdim=True)
    return p.to(v.dtype) @ v


class KVCache:
    """The tokens that entered one block; after a drop fewer: ragged. Others: support/caches.py."""

    def __init__(self, config, batch, capacity, device, dtype, padded=False):
        G, d = config.n_kv_heads, config.head_dim
        self.k = torch.empty(batch, G, capacity, d, device=device, dtype=dtype)
        self.v = torch.empty_like(self.k)
        self.pos = torch.empty(batch, capacity, device=device, dtype=torch.long)
        self.n = 0                  # tokens held; setting it back forgets the newest
        self.padded = padded        # some places hold no token: positions tell what may be seen

    def append(self, k, v, pos):
        """Add n tokens, pos (B, n) -> keys, values and positions of all that are held."""
        start = self.n
        end = start + k.shape[2]
        capacity = self.k.shape[2]
        need(end <= capacity, f"KV cache is full: {end} tokens for a capacity of {capacity}")
        self.k[:, :, start:end] = k
        self.v[:, :, start:end] = v
        self.pos[:, start:end] = pos
        self.n = end
        keys = self.k[:, :, :end]
        values = self.v[:, :, :end]
        return keys, values, self.pos[:, :end]

    def attend(self, q, k, v, rope):
        """Attention of new tokens to themselves and to all that are held."""
        k, v, pos = self.append(k, v, rope.pos)
        n, m = q.shape[2], k.shape[2]
        if n == m:
            return causal_attention(q, k, v, rope)
        see = None
        if n > 1 or rope.window or self.padded:
            see = visible(rope.pos, pos, rope.window)
        if n > 1:
            gqa = q.shape[1] != k.shape[1]
            return F.scaled_dot_product_attention(q, k, v, attn_mask=see, enable_gqa=gqa)
        # Decode: the heads of a group are the queries of their key head, which is read once.
        B, G, _, d = k.shape
        grouped = q.reshape(B, G, -1, d)                            # (B, G, H/G, d)
        y = F.scaled_dot_product_attention(grouped, k, v, attn_mask=see)
        return y.view(q.shape)

    @property
    def bytes(self):
        """Bytes of the keys and values held; spare capacity is not counted."""
        B, G, _, d = self.k.shape
        values = 2 * B * G * self.n * d
        return values * self.k.element_size()


class RMSNorm(nn.Module):
    """x / rms(x) * weight; half types are squared and summed in fp32."""

    def __init__(self, dim, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x):
        shape = self.weight.shape
        return F.rms_norm(x, shape, self.weight, self.eps)


class Block(nn.Module):
    """One decoder block: x + attention(norm(x)), then x + SwiGLU(norm(x))."""

    def __init__(self, c):
        super().__init__()
        self.c = c
        q_dim = c.n_heads * c.head_dim
        kv_dim = c.n_kv_heads * c.head_dim
        biased = partial(Linear, bias=c.qkv_bias)
        plain = partial(Linear, bias=False)
        norm = nn.Identity
        if c.qk_norm:
            norm = partial(RMSNorm, c.head_dim, c.norm_eps)
        self.attn_norm = RMSNorm(c.dim, c.norm_eps)
        self.mlp_norm = RMSNorm(c.dim, c.norm_eps)
        self.q = biased(c.dim, q_dim)
        self.k = biased(c.dim, kv_dim)
        self.v = biased(c.dim, kv_dim)
        self.q_norm = norm()
        self.k_norm = norm()
        self.o = Linear(q_dim, c.dim, bias=c.o_bias)
        self.gate = plain(c.dim, c.ffn)
        self.up = plain(c.dim, c.ffn)
        self.down = plain(c.ffn, c.dim)

    def forward(self, x, rope, attend=causal_attention):
        """x (B, n, D) -> (B, n, D). attend(q, k, v, rope) -> (B, H, n, d) says who sees whom."""
        y = attend(*self.qkv(x, rope), rope)                        # (B, H, n, d)
        y = x + self.o(y.transpose(1, 2).flatten(2))                # (B, n, H*d) -> (B, n, D)
        return self.feed_forward(y)

    def qkv(self, x, rope):
        """x (B, n, D) -> q, k, v, with q and k turned to their tokens' positions."""
        h = self.attn_norm(x)
        heads = (-1, self.c.head_dim)
        q = self.q(h).unflatten(-1, heads)                          # (B, n, H, d)
        k = self.k(h).unflatten(-1, heads)                          # (B, n, G, d)
        v = self.v(h).unflatten(-1, heads)
        q, k, v = (each.transpose(1, 2) for each in (q, k, v))      # (B, H or G, n, d)
        q = rotate(self.q_norm(q), rope.cos, rope.sin)
        k = rotate(self.k_norm(k), rope.cos, rope.sin)
        return q, k, v

    def feed_forward(self, x):
        """x (B, n, D) -> x + SwiGLU(norm(x)), a long row in pieces."""
        n = x.shape[1]
        chunk = FEED_FORWARD_CHUNK.get(x.device.type, 16384)
        if n <= chunk:
            return x + self.swiglu(x)
        out = torch.empty_like(x)
        for i in range(0, n, chunk):
            piece = x[:, i:i + chunk]
            out[:, i:i + chunk] = piece + self.swiglu(piece)
        return out

    def swiglu(self, x):
        h = self.mlp_norm(x)
        # in one expression: a name would hold a wide intermediate in memory for longer
        return self.down(F.silu(self.gate(h)) * self.up(h))


class Llama(nn.Module):
    """The frozen backbone; callers that prune write the loop over `blocks` themselves."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.source = "random weights"          # where the weights come from, for messages
        self.embed = nn.Embedding(config.vocab, config.dim)
        blocks = [Block(config) for _ in range(config.n_blocks)]
        self.blocks = nn.ModuleList(blocks)
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.head = Linear(config.dim, config.vocab, bias=False)
        if config.tied:
            self.head.weight = self.embed.weight

    @property
    def device(self):
        return self.embed.weight.device

    @property
    def dtype(self):
        return self.embed.weight.dtype

    def check_positions(self, end):
        """Refuse positions beyond the model's; `end` is one past the last."""
        limit = self.config.max_positions
        need(end <= limit, f"position {end - 1} is beyond this model's {limit} positions; "
                           "use a shorter prompt or fewer new tokens")

    def rope(self, pos, end):
        """Rotary angles at pos (B, n). `end`, an int past all but PAD, spares waiting for pos."""
        c = self.config
        self.check_positions(end)
        pair = torch.arange(0, c.head_dim, 2, device=pos.device)
        freq = 1.0 / c.rope_theta ** (pair.float() / c.head_dim)
        freq, size = scaled(freq, c.rope_llama3, c.rope_ramp)
        place = pos[:, None, :, None].float()
        angle = place * freq                                        # (B, 1, n, d/2)
        angle = torch.cat((angle, angle), dim=-1)
        cos = size * angle.cos()
        sin = size * angle.sin()
        cos = cos.to(self.dtype)
        sin = sin.to(self.dtype)
        window = c.window if c.window and end > c.window else None
        return Rope(pos, cos, sin, window)

    def forward(self, tokens):
        """tokens (B, N) int64 -> logits (B, N, V) fp32: the whole unpruned pass."""
        pos = positions(tokens)
        rope = self.rope(pos, tokens.shape[1])
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x, rope)
        return self.logits(x)

    def logits(self, x):
        """x (..., D) leaving the last block -> (..., V) fp32; pass only what you need."""
        return self.head(self.norm(x)).float()


HF_NAMES = {
    "embed": "model.embed_tokens", "norm": "model.norm", "head": "lm_head",
    "attn_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm",
    "q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj",
    "q_norm": "self_attn.q_norm", "k_norm": "self_attn.k_norm",
    "o": "self_attn.o_proj", "gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj",
}


def hf_name(name):
    """Our parameter's name -> its name in a Hugging Face Llama file."""
    *block, part, kind = name.split(".")        # blocks.3.q.weight, embed.weight
    layer = f"model.layers.{block[1]}." if block else ""
    return f"{layer}{HF_NAMES[part]}.{kind}"


def load(path, dtype=None, device=None, split=None):
    """Read a checkpoint directory in Hugging Face layout, or build `random:NAME` -> frozen Llama.

    dtype: default bfloat16 on cuda, else float32. device: default cuda if there, else cpu. split:
    lays the still empty model out over several processes (support/parallel.py). Raises
    FileNotFoundError or ValueError where a file is missing, damaged, or of another model.
    """
    device = choose_device(device)
    if dtype is None:
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    root, fields = describe(path)
    config = Config(**fields)
    with torch.device("meta"):      # shapes without memory: each tensor is put in place when read
        model = Llama(config)
    if split is None:
        check_memory(model, dtype, device, path)
    read = split(model) if split else read_whole    # split divides the model, returns its reader
    if root is None:
        return fill_randomly(model.to(dtype), device)
    ours, shapes, state = {}, {}, {}
    for name, parameter in model.named_parameters():
        theirs = hf_name(name)
        ours[theirs] = name, parameter
        shapes[theirs] = tuple(parameter.shape)
    for theirs, stored in tensors(root, shapes, config.tied, device):
        name, parameter = ours[theirs]
        tensor = read(parameter, stored)
        state[name] = tensor.to(dtype)
    if config.tied:
        state["head.weight"] = state["embed.weight"]
    model.load_state_dict(state, assign=True)
    if config.tied:                 # assigning made two parameters of one
        model.head.weight = model.embed.weight
    model.source = str(shards(root)[1])
    return model.eval().requires_grad_(False)
