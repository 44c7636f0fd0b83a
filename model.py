"""A Llama decoder in plain PyTorch, read straight from safetensors files (no paper section: this is the frozen backbone).

The decoder is the ordinary one: RMSNorm, rotary positions, grouped-query attention, SwiGLU. Three things are laid out
for token dropping. Rotary angles are computed from explicit positions, so a token that survives a drop keeps its own
position. Every block has its own KVCache, so blocks may hold different numbers of tokens. And the loop over blocks is
not hidden in here: saliency.py, train.py and prune.py each write their own, with what they do between two blocks.

Shapes: B rows, n tokens now in the pass, D hidden, H query heads, G key/value heads, d head size, V vocabulary.
"""
import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Optional

import torch
import torch.nn.functional as F
from torch import nn

PAD = 1 << 30     # the position of padding and of free places in a static cache: after every query, so none sees it
# Tokens of a row that go through the SwiGLU at once, whose inner width is several times D: on a GPU that bounds the memory of
# long prompts, on a CPU the inner values stay in the cache.
MLP_CHUNK = {"cpu": 1024, "cuda": 16384}

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Config:
    """The shape of a decoder; `from_json` reads it from a Hugging Face config.json and refuses what is not supported."""
    dim: int                        # D
    n_blocks: int                   # L
    n_heads: int                    # H
    n_kv_heads: int                 # G
    head_dim: int                   # d
    ffn: int                        # width of the SwiGLU
    vocab: int                      # V
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_llama3: Optional[tuple] = None  # (factor, low_freq_factor, high_freq_factor, original positions)
    max_positions: int = 131072
    window: Optional[int] = None    # sliding-window attention: a query sees itself and the window - 1 positions before it
    tied: bool = False              # the output head is the embedding
    qkv_bias: bool = False
    bos: Optional[int] = None
    eos: tuple = ()

    @staticmethod
    def from_json(path):
        """Read config.json in the layout of transformers 4 (rope_theta, rope_scaling) or 5 (rope_parameters)."""
        raw = read_json(path)
        need(isinstance(raw, dict), f"{path}: expected a JSON object")
        kind = raw.get("model_type")
        need(kind in ("llama", "mistral", "qwen2"), f"{path}: model_type {kind!r} is not supported (llama, mistral, qwen2)")

        def integer(name, default=None, top=2**24):
            value = raw.get(name, default)
            value = default if value is None else value
            need(isinstance(value, int) and not isinstance(value, bool) and 0 < value <= top,
                 f"{path}: {name} is {value!r}, expected a whole number from 1 to {top}")
            return value

        def real(name, source, default=None):
            value = source.get(name, default)
            need(isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < 1e30,
                 f"{path}: {name} is {value!r}, expected a positive number")
            return float(value)

        for name, plain in (("hidden_act", "silu"), ("mlp_bias", False), ("attention_bias", False), ("use_sliding_window", False),
                            ("quantization_config", None), ("partial_rotary_factor", 1.0)):
            value = raw.get(name)
            need(value is None or value == plain, f"{path}: {name} = {value!r} is not supported")
        tied = raw.get("tie_word_embeddings", False)
        need(isinstance(tied, bool), f"{path}: tie_word_embeddings is {tied!r}, expected true or false")
        rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
        need(isinstance(rope, dict), f"{path}: the rope settings are {rope!r}, expected an object")
        rope_type = rope.get("rope_type", rope.get("type", "default"))
        need(rope_type in ("default", "llama3"), f"{path}: rope type {rope_type!r} is not supported (default, llama3)")
        need(rope.get("partial_rotary_factor", 1.0) == 1.0, f"{path}: partial_rotary_factor is not supported")
        llama3 = None
        if rope_type == "llama3":
            names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
            llama3 = tuple(real(name, rope) for name in names)
            need(llama3[2] > llama3[1], f"{path}: high_freq_factor must be above low_freq_factor")
        window = raw.get("sliding_window", 4096) if kind == "mistral" else None
        need(window is None or (type(window) is int and window > 0), f"{path}: sliding_window is {window!r}")
        eos = raw.get("eos_token_id")
        eos = tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,)
        bos = raw.get("bos_token_id")
        need(all(type(t) is int and abs(t) < PAD for t in eos + (() if bos is None else (bos,))), f"{path}: bos_token_id and eos_token_id must be whole numbers")
        dim, heads = integer("hidden_size"), integer("num_attention_heads")
        kv_heads = integer("num_key_value_heads", heads)
        need(heads % kv_heads == 0, f"{path}: {heads} attention heads do not divide among {kv_heads} key/value heads")
        head_dim = integer("head_dim", dim // heads, 2**24 // heads)
        need(head_dim % 2 == 0, f"{path}: head_dim {head_dim} is odd, rotary positions turn pairs")
        theta = real("rope_theta", rope if "rope_theta" in rope else raw, 10000.0)
        return Config(dim=dim, n_blocks=integer("num_hidden_layers", top=1000), n_heads=heads, n_kv_heads=kv_heads, head_dim=head_dim,
                      ffn=integer("intermediate_size"), vocab=integer("vocab_size"), norm_eps=real("rms_norm_eps", raw, 1e-6),
                      rope_theta=theta, rope_llama3=llama3, max_positions=integer("max_position_embeddings", 2048, 2**31),
                      window=window, tied=tied, qkv_bias=kind == "qwen2", bos=bos, eos=eos)


SHAPES = {  # for `random:NAME`; the position limit is lifted to 131,072 so that long prompts can be timed
    "llama-7b": Config(4096, 32, 32, 32, 128, 11008, 32000, bos=1, eos=(2,)),
    "mistral-7b": Config(4096, 32, 32, 8, 128, 14336, 32000, rope_theta=1e6, bos=1, eos=(2,)),
    "llama-3-8b": Config(4096, 32, 32, 8, 128, 14336, 128256, rope_theta=5e5, rope_llama3=(8.0, 1.0, 4.0, 8192.0), bos=128000, eos=(128001,)),
    "llama-3-70b": Config(8192, 80, 64, 8, 128, 28672, 128256, rope_theta=5e5, rope_llama3=(8.0, 1.0, 4.0, 8192.0), bos=128000, eos=(128001,)),
}


class Rope(NamedTuple):
    """Where the tokens of a pass stand: made once per stage by `Llama.rope`, used by every block of that stage."""
    pos: torch.Tensor               # (B, n) original positions, increasing
    cos: torch.Tensor               # (B, 1, n, d)
    sin: torch.Tensor               # (B, 1, n, d)
    window: Optional[int]           # None when no two positions are further apart than the sliding window


class KVCache:
    """Keys, values and positions of the tokens that entered one block, in memory of a size fixed beforehand."""

    def __init__(self, config, batch, capacity, device, dtype):
        self.k = torch.empty(batch, config.n_kv_heads, capacity, config.head_dim, device=device, dtype=dtype)
        self.v = torch.empty_like(self.k)
        self.pos = torch.empty(batch, capacity, device=device, dtype=torch.long)
        self.n = 0                  # tokens held; setting it back forgets the newest
        self.entered = 0            # tokens that came in, evicted ones too, and the attention that each key held has
        self.weight = None          # received, (B, G, n): kept by H2O alone (prune.evict)
        self.padded = False         # some places hold no token of their row: only positions tell what may be seen
        self.slot = None            # (1,) on the device: the place of the next token, once the cache is static

    def append(self, k, v, pos):
        """Add k, v (B, G, n, d) and pos (B, n); return all that is held: (B, G, self.n, d) twice and (B, self.n)."""
        if self.slot is not None:
            self.k.index_copy_(2, self.slot, k), self.v.index_copy_(2, self.slot, v), self.pos.index_copy_(1, self.slot, pos)
            return self.k, self.v, self.pos
        end = self.n + k.shape[2]
        if end > self.k.shape[2]:
            raise ValueError(f"KV cache is full: {end} tokens for a capacity of {self.k.shape[2]}")
        self.k[:, :, self.n:end], self.v[:, :, self.n:end], self.pos[:, self.n:end] = k, v, pos
        self.n = end
        return self.k[:, :, :end], self.v[:, :, :end], self.pos[:, :end]

    def static(self):
        """From now on the whole memory is attended to and the shapes never change, as CUDA graphs need it: free places stand at
        PAD. One token at a time; the caller moves `slot` on."""
        self.pos[:, self.n:] = PAD
        self.k[:, :, self.n:] = self.v[:, :, self.n:] = 0            # not seen, but 0 times what memory happened to hold may be nan
        self.padded, self.slot = True, torch.tensor([self.n], device=self.k.device)

    def keep(self, index):
        """Keep the places at index (B, G, k), increasing, another choice per head; one more is free after them. The
        positions, the same for all heads, are no longer true then: from now on only one token at a time may come."""
        more = index[..., None].expand(-1, -1, -1, self.k.shape[3])
        for name in ("k", "v"):
            old = getattr(self, name)
            new = old.new_empty(*index.shape[:2], index.shape[2] + 1, old.shape[3])
            new[:, :, :-1] = old.gather(2, more)
            setattr(self, name, new)
        self.n = index.shape[2]

    @property
    def bytes(self):
        """Bytes of the keys and values held (the spare capacity is not counted)."""
        return 2 * self.k[:, :, :self.n].numel() * self.k.element_size()


class RMSNorm(nn.Module):
    def __init__(self, dim, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(dim)), eps

    def forward(self, x):           # x / rms(x) * weight; half types are squared and summed in fp32
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


def rotate(x, cos, sin):
    """Turn each pair (i, i + d/2) of x (B, heads, n, d) by its token's angle."""
    y, h = x * cos, x.shape[-1] // 2
    y[..., :h].addcmul_(x[..., h:], sin[..., :h], value=-1)          # in place, without the copy that joining (-b, a) would make
    y[..., h:].addcmul_(x[..., :h], sin[..., h:])
    return y


class Block(nn.Module):
    """One decoder block: x + attention(norm(x)), then x + SwiGLU(norm(x))."""

    def __init__(self, c):
        super().__init__()
        self.c = c
        self.attn_norm, self.mlp_norm = RMSNorm(c.dim, c.norm_eps), RMSNorm(c.dim, c.norm_eps)
        self.q = nn.Linear(c.dim, c.n_heads * c.head_dim, bias=c.qkv_bias)
        self.k = nn.Linear(c.dim, c.n_kv_heads * c.head_dim, bias=c.qkv_bias)
        self.v = nn.Linear(c.dim, c.n_kv_heads * c.head_dim, bias=c.qkv_bias)
        self.o = nn.Linear(c.n_heads * c.head_dim, c.dim, bias=False)
        self.gate, self.up = nn.Linear(c.dim, c.ffn, bias=False), nn.Linear(c.dim, c.ffn, bias=False)
        self.down = nn.Linear(c.ffn, c.dim, bias=False)

    def qkv(self, x, rope):
        """x (B, n, D) -> q (B, H, n, d), k and v (B, G, n, d), with q and k turned to their positions."""
        B, n, _ = x.shape
        h = self.attn_norm(x)
        q = self.q(h).view(B, n, self.c.n_heads, self.c.head_dim).transpose(1, 2)
        k = self.k(h).view(B, n, self.c.n_kv_heads, self.c.head_dim).transpose(1, 2)
        v = self.v(h).view(B, n, self.c.n_kv_heads, self.c.head_dim).transpose(1, 2)
        return rotate(q, rope.cos, rope.sin), rotate(k, rope.cos, rope.sin), v

    def forward(self, x, rope, cache=None, keep=None):
        """x (B, n, D) -> (B, n, D). `cache` adds what it holds as earlier keys; `keep` (B, n) hides keys (see `masked_attention`)."""
        n = x.shape[1]
        q, k, v = self.qkv(x, rope)
        pos = rope.pos
        if cache is not None:
            k, v, pos = cache.append(k, v, pos)
        if keep is not None:
            y = masked_attention(q, k, v, visible(rope.pos, pos, rope.window), keep)
        elif n == 1 and k.shape[2] > 1:  # a group of query heads are its KV head's queries: every key is read once
            see = visible(rope.pos, pos, rope.window) if rope.window or cache.padded else None
            y = F.scaled_dot_product_attention(q.reshape(len(q), k.shape[1], -1, q.shape[-1]), k, v, attn_mask=see).view(q.shape)
        elif rope.window is None and n == k.shape[2]:
            # survivors stay in order, so causal by index is causal by position
            y = F.scaled_dot_product_attention(q, k, v, is_causal=n > 1, enable_gqa=k.shape[1] != q.shape[1])
        else:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=visible(rope.pos, pos, rope.window), enable_gqa=k.shape[1] != q.shape[1])
        return self.mix(x, y)

    def mix(self, x, y):
        """What follows attention: x (B, n, D), heads' outputs y (B, H, n, d) -> (B, n, D)."""
        x = x + self.o(y.transpose(1, 2).flatten(2))                 # (B, H, n, d) -> (B, n, H*d)
        h = self.mlp_norm(x)
        chunk = MLP_CHUNK.get(x.device.type, 16384)
        if x.shape[1] <= chunk:
            return x + self.down(F.silu(self.gate(h)) * self.up(h))
        out = torch.empty_like(x)
        for i in range(0, x.shape[1], chunk):
            part = h[:, i:i + chunk]
            out[:, i:i + chunk] = x[:, i:i + chunk] + self.down(F.silu(self.gate(part)) * self.up(part))
        return out


def visible(pos_q, pos_k, window=None):
    """Which keys a query may see, from positions (B, n) and (B, m): (B, 1, n, m), causal and inside the sliding window."""
    back = pos_q[:, None, :, None] - pos_k[:, None, None, :]
    return back >= 0 if window is None else (back >= 0) & (back < window)


def masked_attention(q, k, v, see, keep):
    """Attention in which only kept keys are seen, differentiable in the 0/1 mask `keep` (B, n); each query still sees itself.

    This is DynamicViT's attention mask for training: the exponentials are multiplied by the mask before they are
    normalised. A kept token's output equals attention over the kept tokens alone, so masking equals dropping, and a
    dropped key still gets a gradient that says what seeing it would have changed. q (B, H, n, d), k and v (B, G, n, d).
    """
    n, group = q.shape[2], q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    eye = torch.eye(n, device=q.device, dtype=torch.bool)
    m = torch.where(eye, 1.0, keep.float()[:, None, None, :])        # (B, 1, n, n): the diagonal is kept
    a = (q.float() @ k.float().transpose(-1, -2)) / math.sqrt(q.shape[-1])  # (B, H, n, n)
    top = a.detach().masked_fill(~see | (m == 0), -math.inf).amax(-1, keepdim=True)
    # clamping touches hidden keys only (a kept one is never above its row's top): their exponentials cannot overflow
    e = torch.exp((a - top).clamp(max=0)) * see * m
    return ((e / e.sum(-1, keepdim=True)).to(v.dtype)) @ v


class Llama(nn.Module):
    """The frozen backbone. Callers that prune write the loop over `blocks` themselves; `forward` is the unpruned pass."""

    def __init__(self, config):
        super().__init__()
        self.config, self.source = config, "random weights"          # where the weights come from, for messages
        self.embed = nn.Embedding(config.vocab, config.dim)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_blocks))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.head = nn.Linear(config.dim, config.vocab, bias=False)
        if config.tied:
            self.head.weight = self.embed.weight

    @property
    def device(self):
        return self.embed.weight.device

    @property
    def dtype(self):
        return self.embed.weight.dtype

    def rope(self, pos, end):
        """Rotary angles for positions pos (B, n), all below `end` (a plain int, so that no device value is waited for)."""
        c = self.config
        if end > c.max_positions:
            raise ValueError(f"position {end - 1} is beyond this model's {c.max_positions} positions; use a shorter prompt or fewer new tokens")
        freq = 1.0 / c.rope_theta ** (torch.arange(0, c.head_dim, 2, device=pos.device, dtype=torch.float32) / c.head_dim)
        if c.rope_llama3:           # Llama 3.1: slow turns are slowed further by `factor`, fast ones stay, in between they blend
            factor, low, high, original = c.rope_llama3
            turns = original * freq / (2 * math.pi)
            blend = ((turns - low) / (high - low)).clamp(0, 1)
            freq = (1 - blend) * freq / factor + blend * freq
        angle = pos[:, None, :, None].float() * freq                 # (B, 1, n, d/2)
        angle = torch.cat((angle, angle), dim=-1)
        window = c.window if c.window and end > c.window else None
        return Rope(pos, angle.cos().to(self.dtype), angle.sin().to(self.dtype), window)

    def forward(self, tokens):
        """tokens (B, N) int64 -> logits (B, N, V) fp32, the whole unpruned pass."""
        rope = self.rope(positions(tokens), tokens.shape[1])
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x, rope)
        return self.logits(x)

    def logits(self, x):
        """x (B, n, D) leaving the last block -> (B, n, V) fp32. Pass only the positions you need: V is large."""
        return self.head(self.norm(x)).float()


def positions(tokens):
    """0 .. N-1 for every row of tokens (B, N)."""
    return torch.arange(tokens.shape[1], device=tokens.device).expand(tokens.shape)


# ---------------------------------------------------------------------------------------------------------- files


def need(condition, message):
    """Bad input ends in one line that names the file and the fault."""
    if not condition:
        raise ValueError(message)


def read_json(path):
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file") from None
    except (ValueError, RecursionError) as e:  # also what is not UTF-8, and numbers of thousands of digits
        raise ValueError(f"{path}: not valid JSON ({e})") from None


def find(path):
    """A checkpoint directory, looked for as given and under checkpoints/."""
    for place in (Path(path), Path(__file__).resolve().parent / "checkpoints" / path):
        if (place / "config.json").is_file():
            return place
    raise FileNotFoundError(f"no checkpoint {str(path)!r}: expected a directory with config.json, as given or under checkpoints/ "
                            f"(README.md says how to get one; random:{', random:'.join(SHAPES)} need no files)")


def default_device():
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def hf_name(name):
    """Our parameter name -> its name in a Hugging Face Llama file."""
    if not name.startswith("blocks."):
        return {"embed.weight": "model.embed_tokens.weight", "norm.weight": "model.norm.weight", "head.weight": "lm_head.weight"}[name]
    _, i, part, kind = name.split(".")
    part = {"attn_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm", "q": "self_attn.q_proj", "k": "self_attn.k_proj",
            "v": "self_attn.v_proj", "o": "self_attn.o_proj", "gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj"}[part]
    return f"model.layers.{i}.{part}.{kind}"


def load(path, dtype=None, device=None, split=None):
    """Read a checkpoint directory in Hugging Face layout, or build `random:NAME`; returns a frozen Llama in eval mode.

    dtype: default bfloat16 on cuda, float32 elsewhere. device: default cuda if there, else cpu. split: lays the still empty model out
    over several processes and returns a reader for this one's slice of a tensor in a file (parallel.py makes them); random weights are
    then drawn by each process on its own, good for timing alone.
    Raises FileNotFoundError or ValueError with one line when a file is missing, damaged, or holds another model.
    """
    from safetensors import SafetensorError, safe_open
    try:
        device = torch.device(device) if device else default_device()
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError):
        raise ValueError(f"device {str(device)!r} is not available here") from None
    dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
    if str(path).startswith("random:"):
        name = str(path).removeprefix("random:")
        need(name in SHAPES, f"unknown shape {name!r}; there are {', '.join(SHAPES)}")
        with torch.device("meta"):
            model = Llama(SHAPES[name]).to(dtype)
        if split:
            split(model)
        model = model.to_empty(device=device)
        for p in model.parameters():
            here = p.data.to_local() if split and hasattr(p, "to_local") else p.data
            here.normal_(0, 0.02) if p.dim() > 1 else here.fill_(1)
        return model.eval().requires_grad_(False)

    root = find(path)
    config = Config.from_json(root / "config.json")
    index = root / "model.safetensors.index.json"
    if (root / "model.safetensors").is_file():
        shards = [root / "model.safetensors"]
    else:
        need(index.is_file(), f"{root}: neither model.safetensors nor model.safetensors.index.json is there")
        places = read_json(index)
        places = places.get("weight_map") if isinstance(places, dict) else None
        need(isinstance(places, dict) and places and all(isinstance(p, str) for p in places.values()), f"{index}: no weight_map of tensor names to files")
        for file in places.values():
            need(os.path.basename(file) == file and file not in ("", ".", ".."), f"{index}: shard {file!r} is not a plain file name inside {root}")
        shards = [root / file for file in sorted(set(places.values()))]
    with torch.device("meta"):      # shapes without memory: each tensor is put in place as it is read
        model = Llama(config)
    read = split(model) if split else None
    wanted = {hf_name(name): (name, p) for name, p in model.named_parameters()}
    state = {}
    for shard in shards:
        need(shard.is_file(), f"{shard}: this shard is missing")
        try:
            with safe_open(shard, framework="pt", device=str(device)) as f:
                for key in f.keys():
                    if key.endswith("rotary_emb.inv_freq") or (key == "lm_head.weight" and config.tied):
                        continue    # derived values that some files carry along
                    need(key in wanted, f"{shard}: tensor {key!r} has no place in a model of this config.json")
                    name, p = wanted[key]
                    found = tuple(f.get_slice(key).get_shape())
                    need(found == tuple(p.shape), f"{shard}: {key} has shape {found}, config.json asks for {tuple(p.shape)}")
                    need(name not in state, f"{shard}: tensor {key!r} stands in two shards")
                    tensor = read(p, f.get_slice(key)) if split else f.get_tensor(key)
                    need(tensor.dtype in (*DTYPES.values(), torch.float64), f"{shard}: {key} holds {tensor.dtype}, expected floating point weights")
                    state[name] = tensor.to(dtype)
        except (SafetensorError, OSError) as e:
            raise ValueError(f"{shard}: damaged or truncated safetensors file ({e})") from None
    missing = [key for key, (name, _) in wanted.items() if name not in state]
    model.source = str(shards[0] if len(shards) == 1 else index)
    need(not missing, f"{model.source}: {len(missing)} tensors are missing, the first is {missing[0] if missing else ''}")
    if config.tied:
        state["head.weight"] = state["embed.weight"]
    model.load_state_dict(state, assign=True)
    if config.tied:
        model.head.weight = model.embed.weight
    return model.eval().requires_grad_(False)


class Tokenizer:
    """Text <-> token ids: `tokenizer.model` through sentencepiece, else `tokenizer.json` through the optional package tokenizers."""

    def __init__(self, path):
        root = find(path)
        self.path, self.vocab, self.sp, self.hf = root, Config.from_json(root / "config.json").vocab, None, None
        if (root / "tokenizer.model").is_file():
            import sentencepiece
            try:
                self.sp = sentencepiece.SentencePieceProcessor(model_file=str(root / "tokenizer.model"))
                self.sp.id_to_piece(list(range(self.sp.vocab_size())))           # a piece that is no UTF-8 is known here, not once it is met
            except (RuntimeError, OSError, ValueError) as e:
                raise ValueError(f"{root / 'tokenizer.model'}: not a sentencepiece model ({e})") from None
            settings = read_json(file) if (file := root / "tokenizer_config.json").is_file() else {}
            need(isinstance(settings, dict), f"{file}: expected a JSON object")
            self.add_bos = settings.get("add_bos_token", True) is not False
        elif (root / "tokenizer.json").is_file():
            try:
                import tokenizers
            except ImportError:
                raise ImportError(f"{root} has only a tokenizer.json: `pip install tokenizers` to read it") from None
            try:
                self.hf = tokenizers.Tokenizer.from_file(str(root / "tokenizer.json"))
            except Exception as e:  # the package raises bare Exception
                raise ValueError(f"{root / 'tokenizer.json'}: not a tokenizer file ({e})") from None
        else:
            raise FileNotFoundError(f"{root}: no tokenizer.model and no tokenizer.json")

    def encode(self, text, bos=True):
        """Token ids of text. `bos` puts the begin-of-text token first where the tokenizer has one; pass False to continue a text."""
        ids = self.hf.encode(text, add_special_tokens=bos).ids if self.hf else self.sp.encode(text)
        if self.sp and bos and self.add_bos and self.sp.bos_id() >= 0:
            ids.insert(0, self.sp.bos_id())
        need(max(ids, default=0) < self.vocab, f"{self.path}: the tokenizer gives id {max(ids, default=0)}, by config.json the model knows {self.vocab} tokens")
        return ids

    def decode(self, ids):
        return self.hf.decode(ids, skip_special_tokens=True) if self.hf else self.sp.decode([i for i in ids if i < self.sp.vocab_size()])

    def piece(self, token):
        """One token as readable text, for pictures."""
        if self.hf:
            return self.hf.decode([token], skip_special_tokens=False)
        return self.sp.id_to_piece(token).replace("\u2581", " ") if token < self.sp.vocab_size() else ""  # a padded vocabulary has more
