"""A checkpoint directory in Hugging Face layout, read and checked: config.json and weights.

model.load says how the tensors become a model. What is damaged, unknown or unsafe is refused here,
in one line that names the file. Weights are safetensors; nothing is unpickled, no code is run.
"""
from pathlib import Path

import torch

from support.files import need, read_json
from support.places import ROOT, find, only_unsafe, unsafe  # noqa: F401
from support.rope import EVERY_PAIR, yarn_ends, yarn_size

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
ROPE_TYPES = ("default", "linear", "llama3", "yarn")
ORIGINAL = "original_max_position_embeddings"
# A model that sets one of these otherwise computes something that Block does not.
PLAIN = {"hidden_act": "silu", "quantization_config": None, "partial_rotary_factor": 1.0}
OF_LLAMA = {"mlp_bias": False}      # the others do not read it
# What a config.json may leave out, as transformers' configuration classes have it. The sizes that
# the weights take their shapes from have to be there: a default would be those of another model.
DEFAULTS = {
    "llama": {"max_position_embeddings": 2048, "bos_token_id": 1, "eos_token_id": 2},
    "mistral": {"max_position_embeddings": 131072, "bos_token_id": 1, "eos_token_id": 2,
                "num_key_value_heads": 8, "sliding_window": 4096},
    "qwen2": {"max_position_embeddings": 32768, "num_key_value_heads": 32,
              "sliding_window": 4096, "max_window_layers": 28},
    "qwen3": {"max_position_embeddings": 32768, "num_key_value_heads": 32, "head_dim": 128,
              "sliding_window": 4096, "max_window_layers": 28},
}


LLAMA3 = (8.0, 1.0, 4.0, 8192.0)
# The shapes of `random:NAME`, which needs no files. Random weights know no longest text, so their
# limit is far beyond the models': prompts of 131,072 tokens and what is decoded after them.
FAR = 1 << 20
PUBLISHED = {
    "llama-7b": {"dim": 4096, "n_blocks": 32, "n_heads": 32, "n_kv_heads": 32, "head_dim": 128,
                 "ffn": 11008, "vocab": 32000, "max_positions": FAR, "bos": 1, "eos": (2,)},
    "mistral-7b": {"dim": 4096, "n_blocks": 32, "n_heads": 32, "n_kv_heads": 8, "head_dim": 128,
                   "ffn": 14336, "vocab": 32000, "rope_theta": 1e6, "max_positions": FAR, "bos": 1,
                   "eos": (2,)},
    "llama-3-8b": {"dim": 4096, "n_blocks": 32, "n_heads": 32, "n_kv_heads": 8, "head_dim": 128,
                   "ffn": 14336, "vocab": 128256, "rope_theta": 5e5, "rope_llama3": LLAMA3,
                   "max_positions": FAR, "bos": 128000, "eos": (128001,)},
    "llama-3-70b": {"dim": 8192, "n_blocks": 80, "n_heads": 64, "n_kv_heads": 8, "head_dim": 128,
                    "ffn": 28672, "vocab": 128256, "rope_theta": 5e5, "rope_llama3": LLAMA3,
                    "max_positions": FAR, "bos": 128000, "eos": (128001,)},
}


def describe(path):
    """-> the checkpoint's directory and the fields of its model.Config; None for random:NAME."""
    name = str(path)
    if not name.startswith("random:"):
        root = find(path)
        fields = read_config(root / "config.json")
        shards(root)                # all are there
        return root, fields
    name = name.removeprefix("random:")
    need(name in PUBLISHED, f"unknown shape {name!r}; there are {', '.join(PUBLISHED)}")
    return None, PUBLISHED[name]


def shape_of(name):
    """The fields of model.Config: of a published shape, or of a checkpoint directory."""
    name = str(name)
    return PUBLISHED.get(name.removeprefix("random:")) or read_config(find(name) / "config.json")


def choose_device(device=None):
    """The device of that name; without one cuda if there is any, else the cpu."""
    try:
        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError):
        raise ValueError(f"device {str(device)!r} is not available here") from None
    return device


# ----------------------------------------------------------------------------------- config.json


def read_config(path):
    """config.json -> the fields of model.Config, a dict.

    Both layouts are read: transformers 4 (rope_theta, rope_scaling) and 5 (rope_parameters).
    """
    raw = read_json(path)
    need(isinstance(raw, dict), f"{path}: expected a JSON object")
    family = raw.get("model_type")
    need(family in FAMILIES,
         f"{path}: model_type {family!r} is not supported ({', '.join(FAMILIES)})")
    raw = DEFAULTS[family] | raw
    plain = PLAIN | (OF_LLAMA if family == "llama" else {})
    for name, known in plain.items():
        value = raw.get(name)
        need(value is None or value == known, f"{path}: {name} = {value!r} is not supported")
    shape = read_shape(path, raw)
    biased = family in ("llama", "qwen3") and switch(path, raw, "attention_bias")
    return {**shape, **read_rope(path, raw, shape), **read_ends(path, raw),
            "tied": switch(path, raw, "tie_word_embeddings"),
            "qkv_bias": biased or family == "qwen2",
            "o_bias": biased,
            "qk_norm": family == "qwen3",
            "norm_eps": positive(path, raw, "rms_norm_eps", 1e-6),
            "window": None if family == "llama" else read_window(path, raw)}


def read_shape(path, raw):
    """The sizes of the decoder."""
    dim = whole(path, raw, "hidden_size")
    heads = whole(path, raw, "num_attention_heads")
    kv_heads = whole(path, raw, "num_key_value_heads", heads)
    need(heads % kv_heads == 0,
         f"{path}: {heads} attention heads do not divide among {kv_heads} key/value heads")
    head_dim = whole(path, raw, "head_dim", dim // heads, 2**24 // heads)
    need(head_dim % 2 == 0, f"{path}: head_dim {head_dim} is odd, rotary positions turn pairs")
    return {"dim": dim,
            "n_blocks": whole(path, raw, "num_hidden_layers", largest=1000),
            "n_heads": heads,
            "n_kv_heads": kv_heads,
            "head_dim": head_dim,
            "ffn": whole(path, raw, "intermediate_size"),
            "vocab": whole(path, raw, "vocab_size"),
            "max_positions": whole(path, raw, "max_position_embeddings", largest=2**31)}


def read_rope(path, raw, shape):
    """The base of the rotary positions, how slow turns are slowed further, the positions then."""
    rope = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    need(isinstance(rope, dict), f"{path}: the rope settings are {rope!r}, expected an object")
    kind = rope.get("rope_type", rope.get("type", "default"))
    need(kind in ROPE_TYPES,
         f"{path}: rope type {kind!r} is not supported ({', '.join(ROPE_TYPES)})")
    need(rope.get("partial_rotary_factor", 1.0) == 1.0,
         f"{path}: partial_rotary_factor is not supported")
    theta = positive(path, rope if "rope_theta" in rope else raw, "rope_theta", 10000.0)
    if raw.get(ORIGINAL) is not None:           # beside the rope settings it counts before theirs
        rope = {**rope, ORIGINAL: raw[ORIGINAL]}
    found = {"rope_theta": theta, "rope_llama3": None, "rope_ramp": None}
    if kind == "llama3":
        found["rope_llama3"] = read_llama3(path, rope)
    limit = original = shape["max_positions"]
    if kind == "linear":
        found["rope_ramp"] = (positive(path, rope, "factor"), *EVERY_PAIR, 1.0)
    if kind == "yarn":
        original = whole(path, rope, ORIGINAL, limit, largest=2**31)
        found["rope_ramp"] = read_yarn(path, rope, shape, theta, original)
    if found["rope_ramp"]:          # max_position_embeddings is the old limit, or the new one
        reach = found["rope_ramp"][0] * original
        found["max_positions"] = max(limit, int(min(reach, 2**31)))
    return found


def read_llama3(path, rope):
    """The fields of Llama 3.1's rotary positions."""
    names = ("factor", "low_freq_factor", "high_freq_factor", ORIGINAL)
    llama3 = tuple(positive(path, rope, name) for name in names)
    need(llama3[2] > llama3[1], f"{path}: high_freq_factor must be above low_freq_factor")
    return llama3


def read_yarn(path, rope, shape, theta, original):
    """YaRN's ramp. A factor that is given counts, whatever max_position_embeddings says."""
    need(theta > 1, f"{path}: rope_theta is {theta}, yarn needs more than 1")
    factor, size = rope.get("factor", 0), rope.get("attention_factor")
    factor = shape["max_positions"] / original if factor is None else positive(path, rope, "factor")
    weights = []
    if rope.get("mscale") and rope.get("mscale_all_dim"):
        weights = [positive(path, rope, name) for name in ("mscale", "mscale_all_dim")]
    size = yarn_size(factor, *weights) if size is None else positive(path, rope, "attention_factor")
    fast, slow = (positive(path, {name: rope.get(name) or turns}, name)
                  for name, turns in (("beta_fast", 32.0), ("beta_slow", 1.0)))
    truncate = switch(path, {"truncate": True, **rope}, "truncate")
    ends = yarn_ends(shape["head_dim"], theta, original, fast, slow, truncate)
    return factor, *ends, size


def read_window(path, raw):
    """The sliding window that all blocks of a Mistral or Qwen have; None where no block has one.

    Mistral's first version has one without saying so; a Qwen has one only where it says so, in
    the blocks from max_window_layers on. layer_types names the kind of every block instead.
    """
    window, blocks, first = raw.get("sliding_window"), raw["num_hidden_layers"], 0
    need(window is None or type(window) is int and window > 0,
         f"{path}: sliding_window is {window!r}")
    if raw["model_type"] in ("qwen2", "qwen3"):
        window = window if switch(path, raw, "use_sliding_window") else None
        first = raw["max_window_layers"]
        need(type(first) is int, f"{path}: max_window_layers is {first!r}")
    full, sliding = "full_attention", "sliding_attention"
    kinds = raw.get("layer_types")
    if kinds is None:
        kinds = [full if block < first else sliding for block in range(blocks)]
    need(isinstance(kinds, list) and len(kinds) == blocks
         and all(kind in (full, sliding) for kind in kinds),
         f"{path}: layer_types is not a list of {blocks} times {full!r} or {sliding!r}")
    if window is None or sliding not in kinds:
        return None
    need(full not in kinds, f"{path}: a sliding window in {kinds.count(sliding)} of {blocks} "
                            "blocks is not supported (in all or none)")
    return window


def read_ends(path, raw):
    """The tokens that begin and end a text.

    What generation_config.json says of the end counts before config.json: chat models that end
    their turn with a token of its own may name it there alone.
    """
    bos, eos = raw.get("bos_token_id"), read_eos(path, raw)
    need(bos is None or is_id(bos), f"{path}: bos_token_id must be a whole number, not {bos!r:.60}")
    other = Path(path).with_name("generation_config.json")
    if other.is_file():
        told = read_json(other)
        need(isinstance(told, dict), f"{other}: expected a JSON object")
        if told.get("eos_token_id") is not None:
            eos = read_eos(other, told)
    return {"bos": bos, "eos": eos}


def read_eos(path, raw):
    """eos_token_id is a number, a list of them, or null -> a tuple."""
    eos = raw.get("eos_token_id")
    eos = [] if eos is None else eos
    eos = eos if isinstance(eos, list) else [eos]
    need(all(map(is_id, eos)), f"{path}: eos_token_id must be whole numbers, not {eos!r:.60}")
    return tuple(eos)


def is_id(token):
    return type(token) is int and abs(token) < 2**30


def switch(path, raw, name):
    """A field that is true or false; absent and null are false."""
    value = raw.get(name)
    need(value is None or isinstance(value, bool),
         f"{path}: {name} is {value!r}, expected true or false")
    return bool(value)


def whole(path, raw, name, default=None, largest=2**24):
    """A field that is a whole number from 1 to `largest`."""
    value = raw.get(name)
    value = default if value is None else value
    need(type(value) is int and 0 < value <= largest,
         f"{path}: {name} is {value!r}, expected a whole number from 1 to {largest}")
    return value


def positive(path, raw, name, default=None):
    """A field that is a positive number."""
    value = raw.get(name, default)
    need(type(value) in (int, float) and 1e-30 < value < 1e30,
         f"{path}: {name} is {value!r}, expected a positive number")
    return float(value)


# --------------------------------------------------------------------------------------- weights


def shards(root):
    """The safetensors files of a checkpoint -> (files, the file that messages about all name)."""
    single, index = root / "model.safetensors", root / "model.safetensors.index.json"
    if single.is_file():
        return [single], single
    if not index.is_file():
        need(not only_unsafe(root), unsafe(root))
        some = sorted(file.name for file in root.glob("*.safetensors"))
        found = f"only {listed(some)}" if some else "no weights"
        raise ValueError(f"{root}: {found}, neither model.safetensors nor "
                         "model.safetensors.index.json: get the whole checkpoint")
    raw = read_json(index)
    places = raw.get("weight_map") if isinstance(raw, dict) else None
    need(isinstance(places, dict) and places and all(type(p) is str for p in places.values()),
         f"{index}: no weight_map of tensor names to files")
    names = sorted(set(places.values()))
    for name in names:              # a path could lead anywhere on this disk
        need(Path(name).name == name and name not in ("", ".", ".."),
             f"{index}: shard {name!r} is not a plain file name inside {root}")
    missing = [name for name in names if not (root / name).is_file()]
    need(not missing, f"{index}: of {len(names)} shards {len(missing)} are missing: "
                      f"{listed(missing)}")
    return [root / name for name in names], index


def listed(names, most=3):
    """Names as text, the first few of many."""
    return ", ".join(names[:most]) + (" ..." if len(names) > most else "")


def read_whole(parameter, stored):
    """The whole of a stored tensor, whatever parameter it is for."""
    return stored[:]


def fill_randomly(model, device):
    """An empty model with random weights, which need no files: good for timing alone."""
    model = model.to_empty(device=device)
    for p in model.parameters():
        here = p.data.to_local() if hasattr(p.data, "to_local") else p.data
        if p.dim() > 1:
            here.normal_(0, 0.02)
        else:
            here.fill_(1)
    return model.eval().requires_grad_(False)


def tensors(root, shapes, tied=False, device="cpu"):
    """All tensors of a checkpoint, one at a time, checked; model.load puts them in place.

    shapes: {name: the shape it has to have}. Yields (name, stored); stored[:] reads the whole
    tensor, stored[a:b] only these rows. A tied head, and rotary frequencies, may be there and are
    not read. Raises ValueError for what is missing, unknown, twice there, damaged or misshapen.
    """
    files, source = shards(root)
    derived = ("rotary_emb.inv_freq", "lm_head.weight") if tied else "rotary_emb.inv_freq"
    seen = set()
    for file in files:
        for name, stored in open_shard(file, device):
            if not name.endswith(derived):
                check_tensor(file, name, stored, shapes, seen)
                seen.add(name)
                yield name, stored
    missing = [name for name in shapes if name not in seen]
    if missing:
        raise ValueError(f"{source}: {len(missing)} tensors are missing, the first is {missing[0]}")


def open_shard(file, device):
    """Yields (name, stored) for every tensor of a safetensors file."""
    from safetensors import SafetensorError, safe_open
    try:
        with safe_open(file, framework="pt", device=str(device)) as f:
            for name in f.keys():
                yield name, f.get_slice(name)
    except (SafetensorError, OSError) as e:
        raise ValueError(f"{file}: damaged or truncated safetensors file ({e})") from None


def check_tensor(file, name, stored, shapes, seen):
    """That a tensor has a place, its shape, and numbers that are weights."""
    need(name in shapes, f"{file}: tensor {name!r} has no place in a model of this config.json")
    shape = tuple(stored.get_shape())
    need(shape == shapes[name],
         f"{file}: {name} has shape {shape}, config.json asks for {shapes[name]}")
    need(name not in seen, f"{file}: tensor {name!r} stands in two shards")
    # eight bits are useless without their scales
    need(stored.get_dtype() in ("F64", "F32", "F16", "BF16"),
         f"{file}: {name} holds {stored.get_dtype()}, expected floating point weights")
