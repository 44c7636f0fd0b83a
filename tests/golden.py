"""Golden values: tiny models of every supported kind, and the logits that transformers computes for them.

    python tests/golden.py          # needs `pip install transformers`; writes tests/golden.safetensors again

The tests read golden.safetensors and need no transformers. Weights and tokens are drawn from a fixed numpy seed, so
only the logits are stored. The weights are large enough that attention is far from uniform: for each case the script
also turns the feature off in config.json and insists that the logits move, so that a test on them can fail.
"""
import json
import os
import sys
import tempfile
import zlib
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

GOLDEN = Path(__file__).resolve().parent / "golden.safetensors"
VOCAB, TOKENS = 96, 28

# What to change in config.json so that the case's feature is gone; each change must move the logits.
OFF = {
    "gqa": [{"rope_theta": 10000.0}],
    "head_dim": [{"rope_theta": 10000.0}],
    "llama3": [{"rope_scaling": None}, {"low": 0.3}, {"high": 10.5}, {"high": 1.5}, {"factor": 4.0}, {"original": 24}],
    "tied": [{"rms_norm_eps": 1e-5}],
    "mistral": [{"sliding_window": None}, {"sliding_window": 10}, {"sliding_window": 12}],
}


def cases():
    """-> {name: config.json in the layout of transformers 4}."""
    base = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "hidden_size": 64, "intermediate_size": 112,
            "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": VOCAB, "max_position_embeddings": 512,
            "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "rope_scaling": None, "tie_word_embeddings": False, "bos_token_id": 1,
            "eos_token_id": 2, "attention_bias": False, "mlp_bias": False, "torch_dtype": "float32"}
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 48}
    mistral = {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "num_key_value_heads": 2, "sliding_window": 11}
    qwen = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "num_key_value_heads": 2, "use_sliding_window": False}
    return {
        "llama2": base,
        "gqa": {**base, "num_key_value_heads": 2, "rope_theta": 100.0},
        "head_dim": {**base, "head_dim": 24, "num_key_value_heads": 1, "rope_theta": 500.0},    # D/H would be 16
        # of 8 frequencies one turns 7.6 times in 48 positions and stays, one 2.4 times and blends, six turn less than once and slow down
        "llama3": {**base, "num_key_value_heads": 2, "rope_scaling": scaling},
        "tied": {**base, "tie_word_embeddings": True, "rms_norm_eps": 0.01},
        "sharded": {**base, "num_key_value_heads": 2},
        "mistral": {**base, **mistral},
        "qwen2": {**base, **qwen},
    }


def seed(name):
    return zlib.crc32(name.encode())


def tokens(name):
    """Two rows of fixed tokens (2, TOKENS)."""
    return torch.from_numpy(np.random.RandomState(seed(name) ^ 1).randint(0, VOCAB, (2, TOKENS)).astype(np.int64))


def weights(name, case):
    """Every tensor of the case under its Hugging Face name, fp32, scaled so that q·k is of the order of 2 and logits of 1."""
    draw = np.random.RandomState(seed(name))
    D, F, H, G = case["hidden_size"], case["intermediate_size"], case["num_attention_heads"], case["num_key_value_heads"]
    d = case.get("head_dim", D // H)
    state = {}

    def put(key, *shape, size):
        state[key + ".weight"] = draw.standard_normal(shape) * size

    def norm(key):
        state[key + ".weight"] = 1 + 0.2 * draw.standard_normal(D)

    put("model.embed_tokens", VOCAB, D, size=0.125 if case["tie_word_embeddings"] else 1.0)
    for i in range(case["num_hidden_layers"]):
        at = f"model.layers.{i}."
        norm(at + "input_layernorm")
        for part, heads, size in (("q", H, 1.5), ("k", G, 1.5), ("v", G, 1.0)):
            put(f"{at}self_attn.{part}_proj", heads * d, D, size=size * D**-0.5)
            if case["model_type"] == "qwen2":
                state[f"{at}self_attn.{part}_proj.bias"] = 0.5 * draw.standard_normal(heads * d)
        put(at + "self_attn.o_proj", D, H * d, size=(H * d)**-0.5)
        norm(at + "post_attention_layernorm")
        put(at + "mlp.gate_proj", F, D, size=D**-0.5)
        put(at + "mlp.up_proj", F, D, size=D**-0.5)
        put(at + "mlp.down_proj", D, F, size=F**-0.5)
    norm("model.norm")
    if not case["tie_word_embeddings"]:
        put("lm_head", VOCAB, D, size=D**-0.5)
    return {key: torch.from_numpy(w.astype(np.float32)) for key, w in state.items()}


def write_config(folder, case, layout=4):
    """config.json as transformers 4 writes it, or (layout 5) with rope_parameters and dtype."""
    case = dict(case)
    if layout == 5:
        scaling = case.pop("rope_scaling", None) or {"rope_type": "default"}
        case["rope_parameters"] = {"rope_theta": case.pop("rope_theta"), **scaling}
        case["dtype"] = case.pop("torch_dtype")
    (Path(folder) / "config.json").write_text(json.dumps(case, indent=1))


def write_checkpoint(folder, name, layout=4, case=None):
    """Write case `name` as a checkpoint directory; the case "sharded" in two files with an index. `case` changes its config.json only."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state = weights(name, cases()[name])
    write_config(folder, case or cases()[name], layout)
    if name != "sharded":
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    place = {key: f"model-0000{1 + i * 2 // len(state)}-of-00002.safetensors" for i, key in enumerate(state)}
    for file in set(place.values()):
        save_file({key: w for key, w in state.items() if place[key] == file}, folder / file, metadata={"format": "pt"})
    size = sum(w.numel() * 4 for w in state.values())
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {"total_size": size}, "weight_map": place}))
    return folder


def turned_off(case, change):
    """The case with one change from OFF; the short words stand for the entries of rope_scaling."""
    words = {"low": "low_freq_factor", "high": "high_freq_factor", "factor": "factor", "original": "original_max_position_embeddings"}
    inner = {words[key]: value for key, value in change.items() if key in words}
    case = {**case, **{key: value for key, value in change.items() if key not in words}}
    return {**case, "rope_scaling": {**case["rope_scaling"], **inner}} if inner else case


def regenerate():
    """Compute all logits with transformers, check that they are worth testing against, write golden.safetensors."""
    import transformers
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.manual_seed(0)

    def reference(name, layout=4, case=None, attention="eager", edit=None):
        with tempfile.TemporaryDirectory() as folder:
            write_checkpoint(folder, name, layout, case)
            model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation=attention).eval()
            if edit:
                edit(model)
            with torch.no_grad():
                out = model(tokens(name), output_attentions=attention == "eager")
        return out.logits, out.attentions

    def drop_bias(model):
        for key, p in model.named_parameters():
            if key.endswith(".bias"):
                p.data.zero_()

    golden = {}
    for name, case in cases().items():
        golden[name], attention = reference(name)
        peak = torch.stack(attention).amax(-1)[..., TOKENS // 2:].mean()  # uniform attention over 14-28 tokens would peak below 0.07
        same = max((golden[name] - reference(name, layout, attention=how)[0]).abs().max() for layout in (4, 5) for how in ("eager", "sdpa"))
        moved = [(change, (golden[name] - reference(name, case=turned_off(case, change))[0]).abs().max()) for change in OFF.get(name, [])]
        if name == "qwen2":
            moved.append(("no bias", (golden[name] - reference(name, edit=drop_bias)[0]).abs().max()))
        print(f"{name:9} logits of size {golden[name].std():.2f}, attention peaks at {peak:.2f}, eager/sdpa and layouts 4/5 "
              f"differ by {same:.1e}; turned off: {', '.join(f'{change} {m:.2f}' for change, m in moved)}")
        assert same < 2e-5 and peak > 0.2 and all(m > 0.02 for _, m in moved), f"{name}: not worth testing against"
    temporary = GOLDEN.with_name(GOLDEN.name + ".tmp")
    save_file(golden, temporary, metadata={"made_with": f"transformers {transformers.__version__}, torch {torch.__version__}"})
    os.replace(temporary, GOLDEN)
    print(f"wrote {GOLDEN}, {GOLDEN.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        sys.exit(__doc__)
    try:
        regenerate()
    except ImportError as e:
        sys.exit(f"{e}: `pip install transformers` to make the golden values again")
