"""Golden values: tiny models of every supported kind, and transformers' logits for them.

    python tests/golden.py      # needs `pip install transformers`; writes golden.safetensors again

The tests read golden.safetensors and need no transformers. Weights and tokens are drawn from a
fixed numpy seed, so only the logits are stored. The weights are large enough that attention is far
from uniform. For each case the script also turns the case's feature off in config.json. The logits
must move then, so that a test on them can fail.
"""
import json
import os
import sys
import tempfile
import zlib
from functools import partial
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

GOLDEN = Path(__file__).resolve().parent / "golden.safetensors"
VOCAB, TOKENS = 96, 28

# What to change in config.json so that the case's feature is gone. Each change must move the
# logits. The short words stand for entries of rope_scaling.
OFF = {
    "gqa": [{"rope_theta": 10000.0}],
    "head_dim": [{"rope_theta": 10000.0}],
    "llama3": [{"rope_scaling": None}, {"low": 0.3}, {"high": 10.5}, {"high": 1.5},
               {"factor": 4.0}, {"original": 24}],
    "tied": [{"rms_norm_eps": 1e-5}],
    "mistral": [{"sliding_window": None}, {"sliding_window": 10}, {"sliding_window": 12}],
    "linear": [{"rope_scaling": None}, {"factor": 2.0}],
    "yarn": [{"rope_scaling": None}, {"factor": 2.0}, {"original": 48}, {"fast": 1.0},
             {"slow": 1.0}, {"truncate": False}, {"size": 1.0}, {"mscale": 1.0}],
    "qwen3": [{"rms_norm_eps": 1e-5}],
}
# The weights without which the case's feature is gone: how their names end, what they are then.
WITHOUT = {
    "qwen2": [(".bias", 0)],
    "bias": [(".bias", 0), ("o_proj.bias", 0)],
    "qwen3": [("q_norm.weight", 1), ("k_norm.weight", 1)],
}
SCALING_WORDS = {"low": "low_freq_factor", "high": "high_freq_factor", "factor": "factor",
                 "original": "original_max_position_embeddings", "fast": "beta_fast",
                 "slow": "beta_slow", "truncate": "truncate", "size": "attention_factor",
                 "mscale": "mscale"}

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
# Two pairs stay, the last four are slowed by 4, the ramp lies between; cos and sin grow by 1.17.
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32,
        "beta_fast": 2.0, "beta_slow": 0.25, "mscale": 1.6, "mscale_all_dim": 0.3}


def cases():
    """-> {name: config.json}, new dicts that a test may change."""
    return {
        "llama2": dict(BASE),
        "gqa": {**GROUPED, "rope_theta": 100.0},
        # D/H would be 16
        "head_dim": {**BASE, "head_dim": 24, "num_key_value_heads": 1, "rope_theta": 500.0},
        "llama3": {**GROUPED, "rope_scaling": dict(SCALING)},
        "tied": {**BASE, "tie_word_embeddings": True, "rms_norm_eps": 0.01},
        "sharded": dict(GROUPED),
        "mistral": {**GROUPED, "architectures": ["MistralForCausalLM"], "model_type": "mistral",
                    "sliding_window": 11},
        "qwen2": {**GROUPED, "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2",
                  "use_sliding_window": False},
        "bias": {**GROUPED, "attention_bias": True},
        "linear": {**GROUPED, "rope_scaling": {"type": "linear", "factor": 4.0}},
        "yarn": {**GROUPED, "rope_theta": 500.0, "rope_scaling": dict(YARN)},
        "qwen3": {**GROUPED, "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3",
                  "head_dim": 24, "rms_norm_eps": 0.1, "use_sliding_window": False},
    }


def seed(name):
    return zlib.crc32(name.encode())


def tokens(name):
    """Two rows of fixed tokens (2, TOKENS)."""
    draw = np.random.RandomState(seed(name) ^ 1)
    return torch.from_numpy(draw.randint(0, VOCAB, (2, TOKENS)).astype(np.int64))


def weights(name, case):
    """Every tensor of the case under its Hugging Face name, fp32.

    They are scaled so that q . k is of the order of 2 and the logits of 1. What is drawn, and in
    which order, must not change: the stored logits belong to these numbers.
    """
    draw = np.random.RandomState(seed(name))
    D, F = case["hidden_size"], case["intermediate_size"]
    H, G = case["num_attention_heads"], case["num_key_value_heads"]
    d = case.get("head_dim", D // H)
    biased = case["attention_bias"]
    state = {}

    def matrix(key, rows, columns, size):
        state[key + ".weight"] = draw.standard_normal((rows, columns)) * size

    def norm(key, size=D, centre=1):
        state[key + ".weight"] = centre + 0.2 * draw.standard_normal(size)

    def bias(key, size):
        state[key + ".bias"] = 0.5 * draw.standard_normal(size)

    matrix("model.embed_tokens", VOCAB, D, 0.125 if case["tie_word_embeddings"] else 1.0)
    for i in range(case["num_hidden_layers"]):
        at = f"model.layers.{i}."
        norm(at + "input_layernorm")
        for part, heads, size in (("q", H, 1.5), ("k", G, 1.5), ("v", G, 1.0)):
            matrix(f"{at}self_attn.{part}_proj", heads * d, D, size * D**-0.5)
            if biased or case["model_type"] == "qwen2":
                bias(f"{at}self_attn.{part}_proj", heads * d)
        matrix(at + "self_attn.o_proj", D, H * d, (H * d)**-0.5)
        if biased:
            bias(at + "self_attn.o_proj", D)
        if case["model_type"] == "qwen3":
            norm(at + "self_attn.q_norm", d, 1.6)
            norm(at + "self_attn.k_norm", d, 1.6)
        norm(at + "post_attention_layernorm")
        matrix(at + "mlp.gate_proj", F, D, D**-0.5)
        matrix(at + "mlp.up_proj", F, D, D**-0.5)
        matrix(at + "mlp.down_proj", D, F, F**-0.5)
    norm("model.norm")
    if not case["tie_word_embeddings"]:
        matrix("lm_head", VOCAB, D, D**-0.5)
    return {key: torch.from_numpy(w.astype(np.float32)) for key, w in state.items()}


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

    case: another config.json for the same weights.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state = weights(name, cases()[name])
    write_config(folder, case or cases()[name], layout)
    if name == "sharded":
        write_shards(folder, state)
    else:
        write_tensors(folder / "model.safetensors", state)
    return folder


def write_tensors(path, tensors):
    save_file(tensors, path, metadata={"format": "pt"})


def write_shards(folder, state):
    """The first half of the tensors in one file, the rest in another, and the index of both."""
    place = {}
    for i, key in enumerate(state):
        place[key] = f"model-0000{1 + i * 2 // len(state)}-of-00002.safetensors"
    for file in set(place.values()):
        write_tensors(folder / file, {key: w for key, w in state.items() if place[key] == file})
    size = sum(w.numel() * 4 for w in state.values())
    index = {"metadata": {"total_size": size}, "weight_map": place}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


# ----------------------------------------------------------------------------------- the reference


def turned_off(case, change):
    """The case with one change from OFF."""
    case, scaling = dict(case), {}
    for key, value in change.items():
        if key in SCALING_WORDS:
            scaling[SCALING_WORDS[key]] = value
        else:
            case[key] = value
    if scaling:
        case["rope_scaling"] = {**case["rope_scaling"], **scaling}
    return case


def reference(name, layout=4, case=None, attention="eager", edit=None):
    """What transformers computes -> the logits, and each layer's attention if it is "eager".

    edit(model) may change the weights first.
    """
    from transformers import AutoModelForCausalLM
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(folder, name, layout, case)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32,
                                                     attn_implementation=attention)
    model.eval()
    if edit:
        edit(model)
    with torch.no_grad():
        out = model(tokens(name), output_attentions=attention == "eager")
    return out.logits, out.attentions


def filled(model, ending, value):
    """Set all parameters whose names end so."""
    for key, p in model.named_parameters():
        if key.endswith(ending):
            p.data.fill_(value)


def attention_peak(attention):
    """The largest weight of a query, averaged over the queries of the second half."""
    return torch.stack(attention).amax(-1)[..., TOKENS // 2:].mean()


def golden_logits(name, case):
    """The logits of a case, once it is sure that they are worth testing against."""
    logits, attention = reference(name)

    def distance(**changes):
        return (logits - reference(name, **changes)[0]).abs().max()

    peak = attention_peak(attention)
    same = max(distance(layout=layout, attention=kind)
               for layout, kind in ((4, "eager"), (4, "sdpa"), (5, "eager"), (5, "sdpa")))
    moved = [(change, distance(case=turned_off(case, change))) for change in OFF.get(name, [])]
    for ending, value in WITHOUT.get(name, []):
        edit = partial(filled, ending=ending, value=value)
        moved.append((f"{ending} of {value}", distance(edit=edit)))
    changes = ", ".join(f"{change} {by:.2f}" for change, by in moved)
    print(f"{name:9} logits of size {logits.std():.2f}, attention peaks at {peak:.2f}, "
          f"eager/sdpa and layouts 4/5 differ by {same:.1e}; turned off: {changes}")
    # uniform attention over 14 to 28 tokens would peak below 0.07
    worth = same < 2e-5 and peak > 0.2 and all(by > 0.02 for _, by in moved)
    assert worth, f"{name}: not worth testing against"
    return logits


def regenerate():
    """Compute all logits with transformers and write golden.safetensors."""
    import transformers
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.manual_seed(0)
    golden = {name: golden_logits(name, case) for name, case in cases().items()}
    made_with = f"transformers {transformers.__version__}, torch {torch.__version__}"
    temporary = GOLDEN.with_name(GOLDEN.name + ".tmp")
    save_file(golden, temporary, metadata={"made_with": made_with})
    os.replace(temporary, GOLDEN)
    print(f"wrote {GOLDEN}, {GOLDEN.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        sys.exit(__doc__)
    try:
        regenerate()
    except ImportError as e:
        sys.exit(f"{e}: `pip install transformers` to make the golden values again")
