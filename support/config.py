"""config.json -> the fields of model.Config, and back; rotary scaling; the shapes of `random:NAME`.

Llama 1 to 3, Mistral, Qwen2 and Qwen3 in Hugging Face layout. What would make another computation
than model.Block's is refused by name.
"""
import math
from pathlib import Path

from support.files import blame, need, read_object

FAMILIES = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}
ORIGINAL = "original_max_position_embeddings"
LLAMA3 = "factor", "low_freq_factor", "high_freq_factor", ORIGINAL
# A model that sets one of these otherwise computes something that Block does not: attention in
# both directions (so does null there) or in chunks, blocks that differ, another file's weights.
PLAIN = {"hidden_act": "silu", "mlp_bias": False, "quantization_config": None, "is_causal": True,
         "attention_chunk_size": None, "per_layer_config": None, "transformers_weights": None}
# What a config.json may leave out, as transformers' configuration classes have it. The sizes that
# the weights take their shapes from have to be there: a default would be those of another model.
QWEN = {"max_position_embeddings": 32768, "num_key_value_heads": 32, "sliding_window": 4096,
        "max_window_layers": 28}
DEFAULTS = {
    "llama": {"max_position_embeddings": 2048, "bos_token_id": 1, "eos_token_id": 2},
    "mistral": {"max_position_embeddings": 131072, "bos_token_id": 1, "eos_token_id": 2,
                "num_key_value_heads": 8, "sliding_window": 4096},
    "qwen2": QWEN,
    "qwen3": {**QWEN, "head_dim": 128},
}
# Random weights know no longest text: prompts of 131,072 tokens and what is decoded after them.
FAR = 1 << 20
LLAMA_2 = {"dim": 4096, "n_blocks": 32, "n_heads": 32, "n_kv_heads": 32, "head_dim": 128,
           "ffn": 11008, "vocab": 32000, "max_positions": FAR, "bos": 1, "eos": (2,)}
LLAMA_3 = {**LLAMA_2, "n_kv_heads": 8, "ffn": 14336, "vocab": 128256, "rope_theta": 5e5,
           "rope_llama3": (8.0, 1.0, 4.0, 8192.0), "bos": 128000, "eos": (128001,)}
SHAPES = {
    "llama-7b": LLAMA_2,
    "mistral-7b": {**LLAMA_2, "n_kv_heads": 8, "ffn": 14336, "rope_theta": 1e6},
    "llama-3-8b": LLAMA_3,
    "llama-3-70b": {**LLAMA_3, "dim": 8192, "n_blocks": 80, "n_heads": 64, "ffn": 28672},
}


# ---------------------------------------------------------------------------------------- reading


def read_config(path):
    """config.json -> the fields of model.Config, a dict.

    Both layouts are read: transformers 4 (rope_theta, rope_scaling) and 5 (rope_parameters).
    Raises ValueError for what is not supported.
    """
    raw = read_object(path)
    with blame(path):
        family = raw.get("model_type")
        need(isinstance(family, str) and family in FAMILIES,
             f"model_type {family!r} is not supported ({', '.join(FAMILIES)})")
        raw = DEFAULTS[family] | raw
        for name, known in PLAIN.items():
            value = raw.get(name, known)
            need(value == known, f"{name} = {value!r:.60} is not supported")
        biased = family in ("llama", "qwen3") and switch(raw, "attention_bias")
        shape = read_shape(raw)
        found = {**shape, **read_rope(raw, shape["max_positions"]),
                 "tied": switch(raw, "tie_word_embeddings"),
                 "qkv_bias": biased or family == "qwen2",
                 "o_bias": biased,
                 "qk_norm": family == "qwen3",
                 "norm_eps": positive(raw, "rms_norm_eps", 1e-6),
                 "window": read_window(raw)}
    return found | read_ends(path, raw)


def read_shape(raw):
    """The sizes of the decoder."""
    dim = whole(raw, "hidden_size")
    heads = whole(raw, "num_attention_heads")
    kv_heads = whole(raw, "num_key_value_heads", heads)
    need(heads % kv_heads == 0,
         f"{heads} attention heads do not divide among {kv_heads} key/value heads")
    head_dim = whole(raw, "head_dim", dim // heads)
    need(head_dim % 2 == 0, f"head_dim {head_dim} is odd, rotary positions turn pairs")
    return {"dim": dim,
            "n_blocks": whole(raw, "num_hidden_layers", largest=1000),
            "n_heads": heads,
            "n_kv_heads": kv_heads,
            "head_dim": head_dim,
            "ffn": whole(raw, "intermediate_size"),
            "vocab": whole(raw, "vocab_size"),
            "max_positions": whole(raw, "max_position_embeddings", largest=2**31)}


def read_rope(raw, limit):
    """The base of the rotary positions, how slow turns are slowed further, the positions then."""
    rope = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    need(isinstance(rope, dict), f"the rope settings are {rope!r}, expected an object")
    kind = rope.get("rope_type", rope.get("type", "default"))
    need(kind in ("default", "linear", "llama3"),
         f"rope type {kind!r} is not supported (default, linear, llama3)")
    need(not {"full_attention", "sliding_attention"} & rope.keys(),
         "rope_parameters of their own for each kind of block are not supported")
    beside = {**raw, **rope}                    # inside the rope settings they count first
    need(beside.get("partial_rotary_factor") in (None, 1.0),
         "partial_rotary_factor other than 1 is not supported")
    found = {"rope_theta": positive(beside, "rope_theta", 10000.0)}
    if kind == "linear":
        factor = positive(rope, "factor")
        found |= {"rope_linear": factor, "max_positions": max(limit, int(factor * limit))}
    if kind == "llama3":
        if raw.get(ORIGINAL) is not None:       # beside the rope settings it counts before theirs
            rope = {**rope, ORIGINAL: raw[ORIGINAL]}
        llama3 = tuple(positive(rope, name) for name in LLAMA3)
        need(llama3[2] > llama3[1], "high_freq_factor must be above low_freq_factor")
        found["rope_llama3"] = llama3
    return found


def read_window(raw):
    """The sliding window that all blocks have; None where no block has one.

    Mistral's first version has one without saying so; a Qwen has one only where it says so, in
    the blocks from max_window_layers on. layer_types names the kind of every block instead. In a
    Llama a window would slide in transformers' cache and not in its attention: whatever would
    forget a token is refused.
    """
    window, blocks, first = raw.get("sliding_window"), raw["num_hidden_layers"], 0
    need(window is None or type(window) is int and window > 0, f"sliding_window is {window!r:.60}")
    family = raw["model_type"]
    if family in ("qwen2", "qwen3"):
        window = window if switch(raw, "use_sliding_window") else None
        first = raw["max_window_layers"]
        need(type(first) is int, f"max_window_layers is {first!r:.60}")
    full, sliding = "full_attention", "sliding_attention"
    kinds = raw.get("layer_types")
    if kinds is None:
        kinds = [sliding if window and block >= first else full for block in range(blocks)]
    need(isinstance(kinds, list)
         and len(kinds) == blocks == kinds.count(full) + kinds.count(sliding),
         f"layer_types is not a list of {blocks} times {full!r} or {sliding!r}")
    if sliding not in kinds:
        return None
    need(window and family != "llama",
         f"sliding_window = {window} is not supported in a {family} of blocks that are "
         f"{sliding!r} (null, where no window is meant)")
    need(full not in kinds, f"sliding_window in {kinds.count(sliding)} of {blocks} blocks "
                            "is not supported (in all or none)")
    return window


def read_ends(path, raw):
    """The tokens that begin and end a text.

    What generation_config.json says of the end counts before config.json: chat models that end
    their turn with a token of its own may name it there alone.
    """
    bos = raw.get("bos_token_id")
    need(bos is None or type(bos) is int, f"{path}: bos_token_id is {bos!r:.60}")
    file = Path(path).with_name("generation_config.json")
    eos = read_object(file).get("eos_token_id")
    if eos is None:
        file, eos = path, raw.get("eos_token_id")
    eos = [] if eos is None else eos if isinstance(eos, list) else [eos]
    need(all(type(token) is int for token in eos),
         f"{file}: eos_token_id must be whole numbers, not {eos!r:.60}")
    return {"bos": bos, "eos": tuple(eos)}


def switch(raw, name):
    """A field that is true or false; absent and null are false."""
    value = raw.get(name)
    need(value in (None, True, False), f"{name} is {value!r}, expected true or false")
    return bool(value)


def whole(raw, name, default=None, largest=2**24):
    """A field that is a whole number from 1 to `largest`."""
    value = raw.get(name)
    value = default if value is None else value
    need(type(value) is int and 0 < value <= largest,
         f"{name} is {value!r}, expected a whole number from 1 to {largest}")
    return value


def positive(raw, name, default=None):
    """A field that is a positive number."""
    value = raw.get(name, default)
    need(type(value) in (int, float) and 1e-30 < value < 1e30,
         f"{name} is {value!r}, expected a positive number")
    return float(value)


# ---------------------------------------------------------------------------------------- writing


def hf_config(c):
    """A model.Config in the words of transformers: what read_config reads back as the same."""
    family = family_of(c)
    scaling, positions = None, c.max_positions
    if c.rope_linear:
        positions = round(positions / c.rope_linear)            # read_rope multiplies again
        scaling = {"rope_type": "linear", "factor": c.rope_linear}
    if c.rope_llama3:
        scaling = {"rope_type": "llama3", **dict(zip(LLAMA3, c.rope_llama3))}
    raw = {"architectures": [f"{FAMILIES[family]}ForCausalLM"],
           "model_type": family,
           "hidden_act": "silu",
           "hidden_size": c.dim,
           "intermediate_size": c.ffn,
           "num_hidden_layers": c.n_blocks,
           "num_attention_heads": c.n_heads,
           "num_key_value_heads": c.n_kv_heads,
           "head_dim": c.head_dim,
           "vocab_size": c.vocab,
           "max_position_embeddings": positions,
           "rms_norm_eps": c.norm_eps,
           "rope_theta": c.rope_theta,
           "rope_scaling": scaling,
           "tie_word_embeddings": c.tied,
           "bos_token_id": c.bos,
           "eos_token_id": c.eos[0] if len(c.eos) == 1 else list(c.eos) or None}
    if family in ("llama", "qwen3"):
        raw["attention_bias"] = c.qkv_bias
    if family == "mistral":
        raw["sliding_window"] = c.window
    return raw


def family_of(c):
    """Whose decoder a model.Config is; ValueError where none of the four computes the same."""
    has = {"qwen3": c.qk_norm, "mistral": c.window, "qwen2": c.qkv_bias and not c.o_bias}
    family = next((name for name, there in has.items() if there), "llama")
    need(not c.window or not (c.qk_norm or c.qkv_bias),
         "no model of transformers has this mixture of biases, norms and a sliding window")
    return family


# ------------------------------------------------------------------------------- rotary positions


def slowed(freq, llama3=None, linear=None):
    """Radians that each pair of features turns in one position (d/2,) -> the slowed ones.

    The pairs that turn slowly have seen only a part of their circle in training; for texts longer
    than those they are slowed down, so that their angles stay known ones. linear: a factor that
    divides all. llama3: (factor, low, high, original positions). A pair that turns at least `high`
    times in the original positions stays, one of at most `low` turns is divided by factor, and
    what is between is a mix.
    """
    if linear:
        return freq / linear
    if llama3:
        factor, low, high, original = llama3
        turns = original * freq / (2 * math.pi)
        stay = ((turns - low) / (high - low)).clamp(0, 1)
        return (1 - stay) * freq / factor + stay * freq
    return freq
