"""Every published config.json of the list is read, and computes what transformers computes.

The fields are the published ones, in the layout of transformers 4. For logits the sizes shrink:
widths, blocks, heads (not how many share a key/value head), vocabulary and windows. Positions do
not: texts reach as far as the model does. What the tests know of a model besides is how many
parameters it is published with.
"""
import json

import pytest
import torch

from conftest import close, draw, load_cpu
from model import Config, Llama
from support.checkpoint import read_config

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
LLAMA_32 = {**LLAMA_31, "head_dim": 128, "tie_word_embeddings": True,
            "rope_scaling": {**SLOW, "factor": 32.0}}
INSTRUCT = {"eos_token_id": [128001, 128008, 128009]}
YI = {**LLAMA_2, "rope_theta": 5000000.0, "pad_token_id": 0, "torch_dtype": "bfloat16"}
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
SMALL_QWEN = {"tie_word_embeddings": True, "max_window_layers": 24}
INSTRUCT_QWEN = {"max_position_embeddings": 32768, "eos_token_id": 151645}
R1_QWEN = {"rope_theta": 10000, "sliding_window": 4096, "use_mrope": False}
QWEN_3 = {**QWEN_2, "model_type": "qwen3", "max_position_embeddings": 40960, "head_dim": 128,
          "rope_theta": 1000000, "rope_scaling": None, "sliding_window": None,
          "max_window_layers": 36, "attention_bias": False, "eos_token_id": 151645}
LONG = {"factor": 4.0, "original_max_position_embeddings": 32768, "type": "yarn"}
LONG_3 = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
LINEAR = {"factor": 4.0, "type": "linear"}
CODER = {"bos_token_id": 32013, "eos_token_id": 32014, "max_position_embeddings": 16384,
         "rms_norm_eps": 1e-6, "rope_theta": 100000, "rope_scaling": LINEAR}

# The common fields; hidden size, blocks, heads, key/value heads, inner width, vocabulary; what is
# the model's own; its parameters.
MODELS = {
    "llama-7b": (LLAMA_1, (4096, 32, 32, None, 11008, 32000), {}, 6738415616),
    "Llama-2-7b": (LLAMA_2, (4096, 32, 32, 32, 11008, 32000), {}, 6738415616),  # and -chat
    "Llama-2-13b": (LLAMA_2, (5120, 40, 40, 40, 13824, 32000), {}, 13015864320),
    "Llama-2-70b": (LLAMA_2, (8192, 80, 64, 8, 28672, 32000), {}, 68976648192),
    "Llama-3-8B": (LLAMA_3, (4096, 32, 32, 8, 14336, 128256), {}, 8030261248),
    "Llama-3.1-8B": (LLAMA_31, (4096, 32, 32, 8, 14336, 128256), {}, 8030261248),
    "Llama-3.1-8B-Instruct": (LLAMA_31, (4096, 32, 32, 8, 14336, 128256), INSTRUCT, 8030261248),
    "Llama-3.2-1B": (LLAMA_32, (2048, 16, 32, 8, 8192, 128256), {"head_dim": 64}, 1235814400),
    "Llama-3.2-3B": (LLAMA_32, (3072, 28, 24, 8, 8192, 128256), {}, 3212749824),
    "CodeLlama-7b": (LLAMA_2, (4096, 32, 32, 32, 11008, 32016),
                     {"max_position_embeddings": 16384, "rope_theta": 1000000}, 6738546688),
    "Yi-6B": (YI, (4096, 32, 32, 4, 11008, 64000), {}, 6061035520),
    "Yi-34B": (YI, (7168, 60, 56, 8, 20480, 64000), {}, 34388917248),
    "TinyLlama-1.1B": (LLAMA_2, (2048, 22, 32, 4, 5632, 32000),
                       {"max_position_embeddings": 2048, "attention_bias": False}, 1100048384),
    "SmolLM2-135M": (SMOL, (576, 30, 9, 3, 1536, 49152), {}, 134515008),
    "SmolLM2-360M": (SMOL, (960, 32, 15, 5, 2560, 49152), {}, 361821120),
    "SmolLM2-1.7B": (SMOL, (2048, 24, 32, 32, 8192, 49152), {"rope_theta": 130000}, 1711376384),
    "R1-Distill-Llama-8B": (LLAMA_31, (4096, 32, 32, 8, 14336, 128256), {}, 8030261248),
    "vicuna-7b-v1.5-16k": (LLAMA_2, (4096, 32, 32, 32, 11008, 32000),
                           {"max_sequence_length": 16384, "rope_scaling": LINEAR}, 6738415616),
    "deepseek-coder-6.7b": (LLAMA_2, (4096, 32, 32, 32, 11008, 32256), CODER, 6740512768),
    "Mistral-7B-v0.1": (MISTRAL, (4096, 32, 32, 8, 14336, 32000),
                        {"rope_theta": 10000.0, "sliding_window": 4096}, 7241732096),
    "Mistral-7B-v0.2": (MISTRAL, (4096, 32, 32, 8, 14336, 32000), {}, 7241732096),
    "Mistral-7B-v0.3": (MISTRAL, (4096, 32, 32, 8, 14336, 32768), {}, 7248023552),
    "Mistral-Nemo": (MISTRAL, (5120, 40, 32, 8, 14336, 131072),
                     {"head_dim": 128, "max_position_embeddings": 128000}, 12247782400),
    "Qwen2-0.5B": (QWEN_2, (896, 24, 14, 2, 4864, 151936), SMALL_QWEN, 494032768),
    "Qwen2-7B": (QWEN_2, (3584, 28, 28, 4, 18944, 152064), {}, 7615616512),
    "Qwen2.5-0.5B": (QWEN_2, (896, 24, 14, 2, 4864, 151936),
                     {**SMALL_QWEN, "max_position_embeddings": 32768, "sliding_window": 32768,
                      "use_mrope": False}, 494032768),
    "Qwen2.5-7B": (QWEN_2, (3584, 28, 28, 4, 18944, 152064), {"use_mrope": False}, 7615616512),
    "Qwen2.5-7B-Instruct, 128k": (QWEN_2, (3584, 28, 28, 4, 18944, 152064),
                                  {**INSTRUCT_QWEN, "rope_scaling": LONG}, 7615616512),
    "Qwen2.5-Coder-7B-Instruct": (QWEN_2, (3584, 28, 28, 4, 18944, 152064), INSTRUCT_QWEN,
                                  7615616512),
    "R1-Distill-Qwen-1.5B": (QWEN_2, (1536, 28, 12, 2, 8960, 151936),
                             {**R1_QWEN, "max_window_layers": 21}, 1777088000),
    "R1-Distill-Qwen-7B": (QWEN_2, (3584, 28, 28, 4, 18944, 152064), R1_QWEN, 7615616512),
    "Qwen3-0.6B": (QWEN_3, (1024, 28, 16, 8, 3072, 151936),
                   {"max_window_layers": 28, "tie_word_embeddings": True}, 596049920),
    "Qwen3-8B": (QWEN_3, (4096, 36, 32, 8, 12288, 151936), {}, 8190735360),
    "Qwen3-8B, 128k": (QWEN_3, (4096, 36, 32, 8, 12288, 151936), {"rope_scaling": LONG_3},
                       8190735360),
}
SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
         "intermediate_size", "vocab_size")
# Positions of models that reach further than max_position_embeddings says.
FURTHER = {"Qwen2.5-7B-Instruct, 128k": 131072, "Qwen3-8B, 128k": 131072,
           "vicuna-7b-v1.5-16k": 16384, "deepseek-coder-6.7b": 65536}


def config_of(name):
    """config.json as published."""
    common, sizes, own, _ = MODELS[name]
    sizes = {key: size for key, size in zip(SIZES, sizes) if size is not None}
    return {**common, **sizes, **own}


def shrunk(config, blocks=2):
    """The same with tiny sizes: heads of 16, as many to a key/value head as before."""
    D, H, F = (config[key] for key in ("hidden_size", "num_attention_heads", "intermediate_size"))
    G = config.get("num_key_value_heads")
    share = H // (G or H)                   # query heads of a key/value head
    groups = 4 if share == 1 else 2
    dim = groups * share * 16 * D // (H * config.get("head_dim", D // H))
    small = {"hidden_size": dim, "num_attention_heads": groups * share, "vocab_size": 96,
             "intermediate_size": dim * F // D, "num_hidden_layers": blocks}
    if G:
        small["num_key_value_heads"] = groups
    if "head_dim" in config:
        small["head_dim"] = 16
    if config.get("sliding_window"):
        small["sliding_window"] = 8
    return {**config, **small}


def published(folder, name, **changes):
    """transformers' random model of a shrunk config.json, its weights and config written."""
    transformers = pytest.importorskip("transformers")
    transformers.logging.disable_progress_bar()
    (folder / "config.json").write_text(json.dumps({**shrunk(config_of(name)), **changes}))
    config = transformers.AutoConfig.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32,
                                                          attn_implementation="eager")
    draw(model, torch.Generator().manual_seed(0))
    model.get_input_embeddings().weight.data *= 0.05    # as small as trained ones: eps matters
    model.save_pretrained(folder, max_shard_size="60KB")
    return model


# ------------------------------------------------------------------------------------- the tests


@pytest.mark.parametrize("name", MODELS)
def test_a_published_config_is_read(name, tmp_path):
    """Without transformers: nothing is refused, and the model has as many parameters."""
    told = config_of(name)
    (tmp_path / "config.json").write_text(json.dumps(told))
    config = Config.from_json(tmp_path / "config.json")
    with torch.device("meta"):
        model = Llama(config)
    assert sum(p.numel() for p in model.parameters()) == MODELS[name][-1]
    eos, end = told["eos_token_id"], told["max_position_embeddings"]
    assert config.eos == tuple(eos if isinstance(eos, list) else [eos])
    assert config.bos == told["bos_token_id"]
    assert config.max_positions == FURTHER.get(name, end)
    assert config.window == (4096 if name == "Mistral-7B-v0.1" else None)
    assert (config.norm_eps, config.rope_theta) == (told["rms_norm_eps"],
                                                    told.get("rope_theta", 10000))


def reach(config):
    """Positions of 24 tokens: 12 at the start, the others up to the last position there is."""
    if config.window:                       # transformers counts a window in tokens
        return torch.arange(24)[None]
    far = torch.linspace(12, config.max_positions - 1, 12).long()
    return torch.cat((torch.arange(12), far))[None]


def logits_at(model, tokens, pos):
    rope, x = model.rope(pos, int(pos.max()) + 1), model.embed(tokens)
    for block in model.blocks:
        x = block(x, rope)
    return model.logits(x)


@pytest.mark.parametrize("name", MODELS)
def test_a_shrunk_copy_equals_transformers(name, tmp_path):
    theirs = published(tmp_path, name)
    ours = load_cpu(tmp_path)                           # the layout of transformers 5
    tokens = torch.randint(0, 96, (1, 24), generator=torch.Generator().manual_seed(7))
    pos = reach(ours.config)
    with torch.no_grad():                               # with a mask gaps do not part the text
        want = theirs(tokens, position_ids=pos, attention_mask=torch.ones_like(tokens)).logits
    got = logits_at(ours, tokens, pos)
    size = want.abs().max().item()
    assert close(got, want, 2e-5 * size)
    if not ours.config.window:
        assert not close(ours(tokens), want, 1e-2 * size), "positions count"
    new = json.loads((tmp_path / "config.json").read_text())
    assert "rope_parameters" in new and "rope_theta" not in new
    (tmp_path / "config.json").write_text(json.dumps(shrunk(config_of(name))))
    assert read_config(tmp_path / "config.json") == vars(ours.config), "both layouts say the same"
