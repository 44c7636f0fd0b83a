"""Golden values: tiny models of every supported kind, and transformers' logits for them.

    python tests/golden.py      # needs `pip install transformers`; writes golden.safetensors again

The tests read golden.safetensors and need no transformers. Weights and tokens are drawn from a
fixed numpy seed, so only the logits are stored. The weights are large enough that attention is far
from uniform, and each case's feature moves the logits: a test on them can fail. The stored file
also holds a case "yarn" that nothing reads: such rotary positions are refused now.
"""
import json
import tempfile
import zlib
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

GOLDEN = Path(__file__).resolve().parent / "golden.safetensors"
VOCAB, TOKENS = 96, 28

# config.json in the layout of transformers 4
BASE = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": VOCAB,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "attention_bias": False,
    "mlp_bias": False,
    "torch_dtype": "float32",
}
GROUPED = {**BASE, "num_key_value_heads": 2}
# Of the 8 frequencies one turns 7.6 times in 48 positions and stays as it is, one turns 2.4 times
# and is blended, six turn less than once and are slowed down.
SCALING = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
           "original_max_position_embeddings": 48}


def cases():
    """-> {name: config.json}, new dicts that a caller may change."""
    return {
        "llama2": {**BASE},
        "gqa": {**GROUPED, "rope_theta": 100.0},
        # D/H would be 16
        "head_dim": {**BASE, "head_dim": 24, "num_key_value_heads": 1, "rope_theta": 500.0},
        "llama3": {**GROUPED, "rope_scaling": {**SCALING}},
        "tied": {**BASE, "tie_word_embeddings": True, "rms_norm_eps": 0.01},
        "sharded": {**GROUPED},
        "mistral": {**GROUPED, "architectures": ["MistralForCausalLM"], "model_type": "mistral",
                    "sliding_window": 11},
        "qwen2": {**GROUPED, "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2",
                  "use_sliding_window": False},
        "bias": {**GROUPED, "attention_bias": True},
        "linear": {**GROUPED, "rope_scaling": {"type": "linear", "factor": 4.0}},
        "qwen3": {**GROUPED, "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3",
                  "head_dim": 24, "rms_norm_eps": 0.1, "use_sliding_window": False},
    }


def tokens(name):
    """Two rows of fixed tokens (2, TOKENS)."""
    draw = np.random.RandomState(zlib.crc32(name.encode()) ^ 1)
    return torch.from_numpy(draw.randint(0, VOCAB, (2, TOKENS)).astype(np.int64))


def weights(name, case):
    """Every tensor of the case under its Hugging Face name, fp32.

    They are scaled so that q . k is of the order of 2 and the logits of 1. What is drawn, and in
    which order, must not change: the stored logits belong to these numbers.
    """
    draw = np.random.RandomState(zlib.crc32(name.encode()))
    D, F = case["hidden_size"], case["intermediate_size"]
    H, G = case["num_attention_heads"], case["num_key_value_heads"]
    d = case.get("head_dim", D // H)
    family, tied = case["model_type"], case["tie_word_embeddings"]
    biased = case["attention_bias"] and family in ("llama", "qwen3")
    state = {}

    def put(key, *shape, size, centre=0):
        numbers = centre + size * draw.standard_normal(shape)
        state[key] = torch.from_numpy(numbers.astype(np.float32))

    def norm(key, n=D, centre=1):
        put(f"{key}.weight", n, size=0.2, centre=centre)

    put("model.embed_tokens.weight", case["vocab_size"], D, size=0.125 if tied else 1.0)
    for i in range(case["num_hidden_layers"]):
        at = f"model.layers.{i}."
        norm(at + "input_layernorm")
        for part, heads, size in (("q", H, 1.5), ("k", G, 1.5), ("v", G, 1.0)):
            put(f"{at}self_attn.{part}_proj.weight", heads * d, D, size=size * D**-0.5)
            if biased or family == "qwen2":
                put(f"{at}self_attn.{part}_proj.bias", heads * d, size=0.5)
        put(at + "self_attn.o_proj.weight", D, H * d, size=(H * d)**-0.5)
        if biased:
            put(at + "self_attn.o_proj.bias", D, size=0.5)
        if family == "qwen3":
            norm(at + "self_attn.q_norm", d, 1.6)
            norm(at + "self_attn.k_norm", d, 1.6)
        norm(at + "post_attention_layernorm")
        put(at + "mlp.gate_proj.weight", F, D, size=D**-0.5)
        put(at + "mlp.up_proj.weight", F, D, size=D**-0.5)
        put(at + "mlp.down_proj.weight", D, F, size=F**-0.5)
    norm("model.norm")
    if not tied:
        put("lm_head.weight", case["vocab_size"], D, size=D**-0.5)
    return state


# --------------------------------------------------------------------------------------- the files


def write_config(folder, case, layout=4):
    """config.json as transformers 4 writes it; with layout 5 it has rope_parameters and dtype."""
    case = dict(case)
    if layout == 5:
        scaling = case.pop("rope_scaling", None) or {"rope_type": "default"}
        case["rope_parameters"] = {"rope_theta": case.pop("rope_theta"), **scaling}
        case["dtype"] = case.pop("torch_dtype")
    (Path(folder) / "config.json").write_text(json.dumps(case, indent=1))


def write_checkpoint(folder, name, layout=4, case=None):
    """Write case `name` as a checkpoint directory; "sharded" is two files with an index.

    case: another config.json; the weights are drawn for it.
    """
    folder, case = Path(folder), case or cases()[name]
    folder.mkdir(parents=True, exist_ok=True)
    write_config(folder, case, layout)
    state = weights(name, case)
    if name == "sharded":
        write_shards(folder, state)
    else:
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def write_shards(folder, state):
    """The first half of the tensors in one file, the rest in another, and the index of both."""
    place = {key: f"model-0000{1 + i * 2 // len(state)}-of-00002.safetensors"
             for i, key in enumerate(state)}
    for file in set(place.values()):
        part = {key: w for key, w in state.items() if place[key] == file}
        save_file(part, folder / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": place}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


# ----------------------------------------------------------------------------------- the reference


def reference(name):
    """The logits that transformers computes."""
    from transformers import AutoModelForCausalLM
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(folder, name)
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        return model(tokens(name)).logits


def main():
    """Compute all logits with transformers and write golden.safetensors."""
    import transformers
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    made_with = f"transformers {transformers.__version__}, torch {torch.__version__}"
    golden = {name: reference(name) for name in cases()}
    save_file(golden, GOLDEN, metadata={"made_with": made_with})


if __name__ == "__main__":
    main()
