"""Every published config.json of the list is read, and computes what transformers computes.

The fields are the published ones, in the layout of transformers 4. For logits the sizes shrink:
widths, blocks, heads (not how many share a key/value head), vocabulary and windows. Positions do
not: texts reach as far as the model does. What the tests know of a model besides is how many
parameters it is published with. Models that differ in nothing that is read, or in sizes alone,
stand here once.
"""
import json

import pytest
import torch

from conftest import close, draw, load_cpu, needs
from model import Config, Llama
from support.config import read_config

# ---------------------------------------------------------------------------- what is published

OLD = {"model_type": "llama", "hidden_act": "silu", "initializer_range": 0.02, "use_cache": True,
       "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": False}
LLAMA_1 = {**OLD, "max_position_embeddings": 2048, "max_sequence_length": 2048,
           "rms_norm_eps": 1e-6, "pad_token_id": 0, "torch_dtype": "float16"}
LLAMA_2 = {**OLD, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "pretraining_tp": 1,
           "rope_scaling": None, "torch_dtype": "float16"}
LLAMA_3 = {**LLAMA_2, "max_position_embeddings": 8192, "rope_theta": 500000.0,
           "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 128000,
           "eos_token_id": 128001, "torch_dtype": "bfloat16"}
SLOW = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192, "rope_type": "llama3"}
LLAMA_31 = {**LLAMA_3, "max_position_embeddings": 131072, "mlp_bias": False, "rope_scaling": SLOW}
SMOL = {**OLD, "bos_token_id": 0, "eos_token_id": 0, "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5, "rope_theta": 100000, "rope_scaling": None, "pretraining_tp": 1,
        "rope_interleaved": False, "is_llama_config": True, "tie_word_embeddings": True,
        "attention_bias": False, "attention_dropout": 0.0, "torch_dtype": "bfloat16"}
MISTRAL = {**OLD, "model_type": "mistral", "max_position_embeddings": 32768, "rms_norm_eps": 1e-5,
           "rope_theta": 1000000.0, "sliding_window": None, "attention_dropout": 0.0,
           "torch_dtype": "bfloat16"}
QWEN_2 = {**OLD, "model_type": "qwen2", "max_position_embeddings": 131072, "rms_norm_eps": 1e-6,
          "rope_theta": 1000000.0, "sliding_window": 131072, "use_sliding_window": False,
          "max_window_layers": 28, "attention_dropout": 0.0, "bos_token_id": 151643,
          "eos_token_id": 151643, "torch_dtype": "bfloat16"}
QWEN_3 = {**QWEN_2, "model_type": "qwen3", "max_position_embeddings": 40960, "head_dim": 128,
          "rope_theta": 1000000, "rope_scaling": None, "sliding_window": None,
          "max_window_layers": 36, "attention_bias": False, "eos_token_id": 151645}
LINEAR = {"factor": 4.0, "type": "linear"}
CODER = {"bos_token_id": 32013, "eos_token_id": 32014, "max_position_embeddings": 16384,
         "rms_norm_eps": 1e-6, "rope_theta": 100000, "rope_scaling": LINEAR}
SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
         "intermediate_size", "vocab_size")

# The common fields; the sizes; what is the model's own; its parameters.
MODELS = {
    "llama-7b": (LLAMA_1, (4096, 32, 32, None, 11008, 32000), {}, 6738415616),
    "Llama-2-7b": (LLAMA_2, (4096, 32, 32, 32, 11008, 32000), {}, 6738415616),  # and -chat
    "Llama-2-70b": (LLAMA_2, (8192, 80, 64, 8, 28672, 32000), {}, 68976648192),
    "Llama-3.1-8B-Instruct": (LLAMA_31, (4096, 32, 32, 8, 14336, 128256),
                              {"eos_token_id": [128001, 128008, 128009]}, 8030261248),
    "Llama-3.2-1B": (LLAMA_31, (2048, 16, 32, 8, 8192, 128256),
                     {"head_dim": 64, "tie_word_embeddings": True,
                      "rope_scaling": {**SLOW, "factor": 32.0}}, 1235814400),
    "CodeLlama-7b": (LLAMA_2, (4096, 32, 32, 32, 11008, 32016),
                     {"max_position_embeddings": 16384, "rope_theta": 1000000}, 6738546688),
    "SmolLM2-135M": (SMOL, (576, 30, 9, 3, 1536, 49152), {}, 134515008),
    "vicuna-7b-v1.5-16k": (LLAMA_2, (4096, 32, 32, 32, 11008, 32000),
                           {"max_sequence_length": 16384, "rope_scaling": LINEAR}, 6738415616),
    "deepseek-coder-6.7b": (LLAMA_2, (4096, 32, 32, 32, 11008, 32256), CODER, 6740512768),
    "Mistral-7B-v0.1": (MISTRAL, (4096, 32, 32, 8, 14336, 32000),
                        {"rope_theta": 10000.0, "sliding_window": 4096}, 7241732096),
    "Mistral-Nemo": (MISTRAL, (5120, 40, 32, 8, 14336, 131072),
                     {"head_dim": 128, "max_position_embeddings": 128000}, 12247782400),
    "Qwen2.5-0.5B": (QWEN_2, (896, 24, 14, 2, 4864, 151936),
                     {"tie_word_embeddings": True, "max_window_layers": 24,
                      "max_position_embeddings": 32768, "sliding_window": 32768,
                      "use_mrope": False}, 494032768),
    "R1-Distill-Qwen-1.5B": (QWEN_2, (1536, 28, 12, 2, 8960, 151936),
                             {"rope_theta": 10000, "sliding_window": 4096, "use_mrope": False,
                              "max_window_layers": 21}, 1777088000),
    "Qwen3-0.6B": (QWEN_3, (1024, 28, 16, 8, 3072, 151936),
                   {"max_window_layers": 28, "tie_word_embeddings": True}, 596049920),
    "Qwen3-8B": (QWEN_3, (4096, 36, 32, 8, 12288, 151936), {}, 8190735360),
}
# Positions of models that reach further than max_position_embeddings says.
FURTHER = {"vicuna-7b-v1.5-16k": 16384, "deepseek-coder-6.7b": 65536}
every_model = pytest.mark.parametrize("name", MODELS)


def config_of(name):
    """config.json as published."""
    common, sizes, own, _ = MODELS[name]
    return {**common, **{key: size for key, size in zip(SIZES, sizes) if size}, **own}


def shrunk(config):
    """The same with tiny sizes: heads of 16, as many to a key/value head as before."""
    D, H, F = (config[key] for key in ("hidden_size", "num_attention_heads", "intermediate_size"))
    share = H // config.get("num_key_value_heads", H)       # query heads of a key/value head
    groups = 4 if share == 1 else 2
    dim = groups * share * 16 * D // (H * config.get("head_dim", D // H))
    small = {"hidden_size": dim, "num_attention_heads": groups * share, "vocab_size": 96,
             "intermediate_size": dim * F // D, "num_hidden_layers": 2, "head_dim": 16,
             "num_key_value_heads": groups}
    kept = {key: value for key, value in small.items() if key in config}
    return {**config, **kept, **({"sliding_window": 8} if config.get("sliding_window") else {})}


# ------------------------------------------------------------------------------------- the tests


@every_model
def test_a_published_config_is_read(name, tmp_path):
    """Without transformers: nothing is refused, and the model has as many parameters."""
    told, file = config_of(name), tmp_path / "config.json"
    file.write_text(json.dumps(told))
    config = Config(**read_config(file))
    with torch.device("meta"):
        model = Llama(config)
    assert sum(p.numel() for p in model.parameters()) == MODELS[name][-1]
    eos = told["eos_token_id"]
    assert config.eos == (tuple(eos) if isinstance(eos, list) else (eos,))
    assert config.bos == told["bos_token_id"]
    assert config.max_positions == FURTHER.get(name, told["max_position_embeddings"])
    assert config.window == (4096 if name == "Mistral-7B-v0.1" else None)
    assert config.norm_eps == told["rms_norm_eps"]
    assert config.rope_theta == told.get("rope_theta", 10000)


@needs("transformers")
@every_model
def test_a_shrunk_copy_equals_transformers(name, tmp_path):
    """Random weights that transformers writes, 24 tokens up to the last position there is."""
    import transformers
    transformers.logging.disable_progress_bar()
    file = tmp_path / "config.json"
    file.write_text(json.dumps(shrunk(config_of(name))))
    before = Config(**read_config(file))
    theirs = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.from_pretrained(tmp_path), dtype=torch.float32,
        attn_implementation="eager")
    draw(theirs, torch.Generator().manual_seed(0))
    theirs.get_input_embeddings().weight.data *= 0.05   # as small as trained ones: eps matters
    theirs.save_pretrained(tmp_path, max_shard_size="60KB")
    new = json.loads(file.read_text())
    assert "rope_parameters" in new and "rope_theta" not in new
    ours = load_cpu(tmp_path)                           # the layout of transformers 5
    assert ours.config == before, "both layouts say the same"
    tokens = torch.randint(0, 96, (1, 24), generator=torch.Generator().manual_seed(7))
    pos = torch.arange(24)
    if not ours.config.window:                          # transformers counts a window in tokens
        pos[12:] = torch.linspace(12, ours.config.max_positions - 1, 12)
    with torch.no_grad():                               # with a mask gaps do not part the text
        want = theirs(tokens, position_ids=pos[None], attention_mask=torch.ones(1, 24)).logits
    rope, x = ours.rope(pos[None], int(pos[-1]) + 1), ours.embed(tokens)
    for block in ours.blocks:
        x = block(x, rope)
    size = want.abs().max().item()
    assert close(ours.logits(x), want, 2e-5 * size)
    assert ours.config.window or not close(ours(tokens), want, 1e-2 * size), "positions count"
