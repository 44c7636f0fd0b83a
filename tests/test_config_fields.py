"""Every field of config.json that transformers reads for the four families: what becomes of it.

TABLE gives each field a value other than a tiny model's, and says what follows in a Llama, a
Mistral, a Qwen2 and a Qwen3: used, refused by its name, or without effect. Whatever is not refused
computes what transformers computes. A field that is new in transformers' classes has to come in.
"""
import dataclasses

import pytest
import torch

import golden
from conftest import close, load_cpu, needs

FAMILIES = "llama", "mistral", "qwen2", "qwen3"
FULL, SLIDING = ["full_attention"] * 3, ["sliding_attention"] * 3
WINDOW = {"sliding_window": 9, "use_sliding_window": True, "max_window_layers": 0}
USED = {
    "hidden_size": 32, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 4, "head_dim": 8, "vocab_size": 100, "max_position_embeddings": 300,
    "rms_norm_eps": 0.5, "rope_theta": 50.0, "tie_word_embeddings": True, "bos_token_id": 7,
    "eos_token_id": [7, 8], "rope_scaling": {"type": "linear", "factor": 3.0},
    "rope_parameters": golden.SCALING}
# Each computes something else in transformers, or is refused there, too.
REFUSED = {
    "is_causal": False, "hidden_act": None, "mlp_bias": True, "attention_chunk_size": 9,
    "quantization_config": {}, "per_layer_config": {"1": {"rms_norm_eps": 0.5}},
    "transformers_weights": "other.safetensors", "partial_rotary_factor": 0.5}
WITHOUT_EFFECT = {
    "transformers_version": "4.0", "architectures": ["LlamaModel"], "auto_map": {"AutoModel": "a"},
    "output_hidden_states": True, "return_dict": True, "dtype": "float16",
    "chunk_size_feed_forward": 3, "is_encoder_decoder": True, "id2label": {"0": "a"},
    "label2id": {"a": 0}, "problem_type": "regression", "initializer_range": 0.5,
    "use_cache": False, "pad_token_id": 3, "pretraining_tp": 2, "attention_dropout": 0.5,
    "output_attentions": True, "attn_implementation": "eager"}
TABLE = [       # u: used, r: refused, -: without effect, a letter for each family
    *(({name: value}, "uuuu") for name, value in USED.items()),
    *(({name: value}, "rrrr") for name, value in REFUSED.items()),
    (WITHOUT_EFFECT, "----"),
    ({"eos_token_id": None}, "uuuu"),
    ({"attention_bias": True}, "u--u"),
    ({"original_max_position_embeddings": 24, "rope_scaling": golden.SCALING}, "uuuu"),
    ({"rope_scaling": golden.SCALING, "rope_parameters": {"rope_theta": 500.0}}, "uuuu"),
    ({"rope_parameters": {"full_attention": {"rope_theta": 50.0}}}, "rrrr"),
    (WINDOW, "ruuu"),
    (WINDOW | {"sliding_window": None}, "-u--"),
    (WINDOW | {"use_sliding_window": False}, "ru--"),
    (WINDOW | {"max_window_layers": 3}, "ru--"),
    (WINDOW | {"max_window_layers": 1}, "rurr"),
    (WINDOW | {"layer_types": FULL}, "-u--"),
    (WINDOW | {"max_window_layers": 3, "layer_types": SLIDING}, "ruuu"),
    (WINDOW | {"sliding_window": None, "layer_types": SLIDING}, "rrrr")]


@needs("transformers")
@pytest.mark.parametrize("said, effects", TABLE, ids=str)
def test_a_field_is_used_refused_or_without_effect(said, effects, tmp_path):
    from transformers import AutoModelForCausalLM
    for family, effect in zip(FAMILIES, effects):
        name = "gqa" if family == "llama" else family
        plain = golden.cases()[name] | {"head_dim": 16}
        before, folder = (golden.write_checkpoint(tmp_path / family / kind, name, case=case)
                          for kind, case in (("plain", plain), ("changed", plain | said)))
        if effect == "r":
            with pytest.raises(ValueError, match=f"config.json: .*{next(iter(said))}"):
                load_cpu(folder)
            continue
        ours, tokens = load_cpu(folder), golden.tokens(name)[:1]
        assert (ours.config != load_cpu(before).config) == (effect == "u"), family
        theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        with torch.no_grad():
            assert close(ours(tokens), theirs(tokens).logits, 1e-4), family


@needs("transformers")
@pytest.mark.parametrize("family", FAMILIES)
def test_the_table_has_every_field_of_transformers_classes(family):
    from transformers import AutoConfig
    fields = {field.name for field in dataclasses.fields(AutoConfig.for_model(family))}
    assert fields <= {name for said, _ in TABLE for name in said}
