"""config.json and weights: what is read and written, and what is refused in one line.

What becomes of each field of config.json stands in test_config_fields.py.
"""
import errno
import json
import os
import re
import resource
import signal

import pytest
import torch
from safetensors.torch import load_file, save_file

import golden
from conftest import change, close, load_cpu, needs, tiny_model
from model import Config
from support.config import SHAPES, hf_config, read_config
from support.files import load_tensors, save_tensors, writable
from support.weights import EMBED, HEAD

LLAMA = golden.cases()["llama2"]


def config_of(folder, case, layout=4):
    """What is read of a config.json -> model.Config."""
    golden.write_config(folder, case, layout)
    return Config(**read_config(folder / "config.json"))


def refused(folder, file, message):
    """That a checkpoint is refused in one line that begins with the path of a file in it."""
    with pytest.raises(ValueError, match=re.escape(message)) as e:
        load_cpu(folder)
    assert str(e.value).startswith(f"{folder / file}: ")
    assert "\n" not in str(e.value)


# ------------------------------------------------------------------------------------- config.json


@pytest.mark.parametrize("eos, told, want", [
    (128001, [128001, 128009], (128001, 128009)),   # Llama-3-Instruct
    (2, [], ()),
    (2, None, (2,)),
    (None, 7, (7,)),
])
def test_the_end_that_generation_config_names_counts(eos, told, want, tmp_path):
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": told}))
    config = config_of(tmp_path, {**LLAMA, "eos_token_id": eos})
    assert (config.bos, config.eos) == (1, want)


SPARSE = {"hidden_size": 1024, "intermediate_size": 96, "vocab_size": 96, "num_hidden_layers": 28,
          "num_attention_heads": 64}
GIVEN = {       # hardly a value is a default
    "num_key_value_heads": 4, "head_dim": 24, "max_position_embeddings": 512, "rms_norm_eps": 1e-4,
    "rope_theta": 500.0, "tie_word_embeddings": True, "bos_token_id": 5, "eos_token_id": [6, 7],
    "hidden_act": "silu", "max_window_layers": 28, "attention_bias": True,
    "mlp_bias": False, "use_sliding_window": True, "rope_scaling": None,
}


@needs("transformers")
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_every_field_that_is_missing_is_as_transformers_has_it(family, tmp_path):
    """hf_config says in their words what was read."""
    from transformers import AutoConfig
    sparse, told = {"model_type": family, **SPARSE}, {"head_dim": 16, "attention_bias": False}
    given = GIVEN | {"sliding_window": None if family == "llama" else 11}
    for case in (sparse, *({**sparse, **{k: v for k, v in given.items() if k != missing}}
                           for missing in (None, *given))):
        found = config_of(tmp_path, case)
        theirs = AutoConfig.from_pretrained(tmp_path)
        theirs = {**told, **theirs.to_dict(), **theirs.rope_parameters}
        for name, value in hf_config(found).items():
            same = name in ("architectures", "model_type", "rope_scaling")
            assert same or theirs[name] == value, (name, case)


@pytest.mark.parametrize("fields", [
    {}, {"window": 11, "tied": True}, {"qkv_bias": True, "bos": 5, "eos": (6,)},
    {"qkv_bias": True, "o_bias": True, "qk_norm": True, "rope_llama3": (8.0, 1.0, 4.0, 48.0)},
    {"rope_linear": 2.5, "max_positions": 1280, "eos": (6, 7), "norm_eps": 1e-4}], ids=str)
def test_a_config_that_is_written_is_read_back(fields, tmp_path):
    config = tiny_model(**fields).config
    assert config_of(tmp_path, hf_config(config)) == config


def test_no_family_mixes_a_window_with_biases():
    with pytest.raises(ValueError, match="no model of transformers"):
        hf_config(tiny_model(window=11, qkv_bias=True).config)


# ----------------------------------------------------------------------------------- damaged JSON

NUMBER, WHOLE = "expected a positive number", "expected a whole number from 1 to"
CONFIG, GENERATION, INDEX = "config.json", "generation_config.json", "model.safetensors.index.json"
BAD = [         # a file, what is changed in it or stands there, what the message says
    *((CONFIG, text, "not valid JSON") for text in ("{", b"\xff\xfe", "[" * 100000)),
    (CONFIG, "[7]", "expected a JSON object"),
    (CONFIG, {"model_type": "gpt2"}, "model_type 'gpt2' is not supported"),
    (CONFIG, {"rope_scaling": {"type": "yarn", "factor": 4}}, "rope type 'yarn' is not supported"),
    (CONFIG, {"rope_scaling": {"type": "linear"}}, f"factor is None, {NUMBER}"),
    (CONFIG, {"rope_scaling": {"rope_type": "llama3", "factor": 8}}, f"_factor is None, {NUMBER}"),
    (CONFIG, {"rope_scaling": {**golden.SCALING, "low_freq_factor": 4.0}}, "must be above"),
    (CONFIG, {"rope_scaling": "llama3"}, "expected an object"),
    (CONFIG, {"rope_theta": float("inf")}, f"rope_theta is inf, {NUMBER}"),
    (CONFIG, {"rms_norm_eps": None}, f"rms_norm_eps is None, {NUMBER}"),
    (CONFIG, {"num_key_value_heads": 3}, "4 attention heads do not divide among 3 key/value heads"),
    (CONFIG, {"head_dim": 15}, "head_dim 15 is odd"),
    *((CONFIG, {name: None}, f"{name} is None, {WHOLE}") for name in SPARSE),
    (CONFIG, {"num_hidden_layers": 10**9}, f"num_hidden_layers is 1000000000, {WHOLE} 1000"),
    (CONFIG, {"attention_bias": 2}, "attention_bias is 2, expected true or false"),
    (CONFIG, {"eos_token_id": [2, None]}, "eos_token_id must be whole numbers, not [2, None]"),
    (CONFIG, {"bos_token_id": "<s>"}, "bos_token_id is '<s>'"),
    *((CONFIG, {"layer_types": kinds}, "layer_types is not a list of 3 times") for kinds in (
        ["chunked_attention"] * 3, ["full_attention"] * 2, "full_attention")),
    (CONFIG, {"sliding_window": 0}, "sliding_window is 0"),
    (CONFIG, {"model_type": "qwen2", "max_window_layers": "2"}, "max_window_layers is '2'"),
    (GENERATION, '{"eos_token_id": "</s>"}', "eos_token_id must be whole numbers, not ['</s>']"),
    *((INDEX, text, "no weight_map") for text in ("[]", '{"weight_map": {}}',
                                                  '{"weight_map": {"a": 1}}')),
    *((INDEX, {"weight_map": {"lm_head.weight": way}}, "is not a plain file name inside")
      for way in ("../x.safetensors", "/etc/passwd", "..", "")),
]


@pytest.mark.parametrize("file, new, message", BAD, ids=lambda part: str(part)[:40])
def test_a_damaged_or_unsupported_json_file_is_refused(file, new, message, tmp_path):
    folder = golden.write_checkpoint(tmp_path, "sharded")
    if isinstance(new, dict):
        change(folder / file, **new)
    else:
        (folder / file).write_bytes(new if isinstance(new, bytes) else new.encode())
    refused(folder, file, message)


# ----------------------------------------------------------------------------------------- weights

FIRST, SECOND = (f"model-0000{i}-of-00002.safetensors" for i in (1, 2))
STATE = golden.weights("llama2", LLAMA)
Q = "model.layers.1.self_attn.q_proj."
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"


@pytest.mark.parametrize("found, message", [    # so much of the shard, or another file
    *((size, "damaged or truncated safetensors file") for size in (100, -4)),
    (POINTER, "a Git-LFS pointer: `git lfs pull` gets"), (b"GGUF\3\0\0\0\0", "a GGUF file: python"),
    (b"<!DOCTYPE html><html>", "a web page, half a download or the like, which begins with b'<!D")])
def test_what_stands_in_place_of_a_shard_is_told(found, message, tmp_path):
    path = golden.write_checkpoint(tmp_path, "sharded") / FIRST
    path.write_bytes(found if isinstance(found, bytes) else path.read_bytes()[:found])
    refused(tmp_path, FIRST, message)


@pytest.mark.parametrize("file", [FIRST, INDEX, CONFIG])
def test_a_link_that_leads_nowhere_is_named(file, tmp_path):
    """As in the Hub's cache, where its files went away."""
    path = golden.write_checkpoint(tmp_path, "sharded") / file
    path.unlink()
    path.symlink_to("../../blobs/0123")
    with pytest.raises(ValueError, match=f"{tmp_path}: {file}: a link to a file that is not"):
        load_cpu(tmp_path)


def test_an_adapter_is_no_checkpoint(tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "owner/base"}')
    for _ in ("alone", "beside a whole model"):
        with pytest.raises(ValueError, match="holds an adapter .LoRA. for owner/base: merge it"):
            load_cpu(tmp_path)
        golden.write_checkpoint(tmp_path, "gqa")


@pytest.mark.parametrize("new, message", [      # tensors in place of the checkpoint's own
    ({Q + "weight": None}, f"1 tensors are missing: {Q}weight"),
    ({"lm_head.weight": None}, "1 tensors are missing: lm_head.weight"),
    ({Q + "bias": torch.zeros(64)}, "q_proj.bias' has no place"),
    ({Q + "weight": torch.zeros(64, 60)},
     f"{Q}weight has shape (64, 60), config.json asks for (64, 64)"),
    ({Q + "weight": torch.zeros(64, 64).to(torch.float8_e4m3fn)},
     f"{Q}weight holds F8_E4M3, expected float"),
], ids=str)
def test_tensors_that_do_not_fit_config(new, message, tmp_path):
    golden.write_checkpoint(tmp_path, "llama2")
    state = {name: tensor for name, tensor in (STATE | new).items() if tensor is not None}
    save_file(state, tmp_path / "model.safetensors")
    refused(tmp_path, "model.safetensors", message)


def test_a_tensor_in_two_shards(tmp_path):
    folder = golden.write_checkpoint(tmp_path, "sharded")
    save_file(load_file(folder / SECOND) | {EMBED: STATE[EMBED]}, folder / SECOND)
    refused(folder, SECOND, f"'{EMBED}' stands in two shards")


def test_rotary_frequencies_are_passed_over(tmp_path):
    file = golden.write_checkpoint(tmp_path, "llama2") / "model.safetensors"
    save_file(STATE | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}, file)
    got = load_cpu(tmp_path)(golden.tokens("llama2"))
    assert close(got, load_file(golden.GOLDEN)["llama2"], 1e-4)


@needs("transformers")
@pytest.mark.parametrize("stored, tied", [
    ({EMBED: 1}, True), ({HEAD: 1}, True), ({EMBED: 1, HEAD: 1}, True),
    ({EMBED: 1, HEAD: 2}, False)])
def test_a_head_is_tied_where_the_weights_say_so_too(stored, tied, tmp_path, capsys):
    """The embedding's matrix, or twice it, under one of the two names or under both."""
    from transformers import AutoModelForCausalLM
    golden.write_config(tmp_path, golden.cases()["tied"])
    state = golden.weights("tied", golden.cases()["tied"])
    matrix = state.pop(EMBED)
    golden.write_shards(tmp_path, state | {name: matrix * by for name, by in stored.items()})
    ours, tokens = load_cpu(tmp_path), golden.tokens("tied")[:1]
    assert ours.config.tied == tied != ("another matrix" in capsys.readouterr().out)
    with torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)(tokens)
    assert close(ours(tokens), theirs.logits, 1e-4)


def test_pickled_weights_are_never_read(tmp_path):
    file = golden.write_checkpoint(tmp_path, "llama2") / "model.safetensors"
    torch.save(STATE, file)                             # not even under this name
    refused(tmp_path, file.name, "pickled weights (torch.save)")
    file.unlink()
    save_file(STATE, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="only other.safetensors, neither model.safetensors nor"):
        load_cpu(tmp_path)


# ------------------------------------------------------------------------------------------- names


def test_random_weights_are_of_a_known_shape_and_reach_the_longest_prompts():
    assert all(shape["max_positions"] >= 131072 + 128 for shape in SHAPES.values())
    with pytest.raises(ValueError, match="unknown shape 'gpt-5'; there are llama-7b, mistral-7b"):
        load_cpu("random:gpt-5")


# ------------------------------------------------------------------------------------------ saving


@pytest.fixture
def saved(tmp_path):
    """A file of five ones."""
    save_tensors(tmp_path / "p.safetensors", {"a": torch.ones(5)}, {"note": "old"})
    return tmp_path / "p.safetensors"


def test_a_full_disk_leaves_the_previous_file_and_one_line(saved):
    before, limits = saved.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, limits[1]))
    try:
        with pytest.raises(OSError, match=f"{saved}: not written .*{os.strerror(errno.EFBIG)}"):
            save_tensors(saved, {"a": torch.ones(10000)}, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert saved.read_bytes() == before
    assert list(saved.parent.iterdir()) == [saved], "no temporary file is left behind"


def test_a_kill_leaves_the_previous_file_and_is_cleared_away(saved):
    child = os.fork()
    if not child:                                       # killed when all but the renaming is done
        os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
        save_tensors(saved, {"a": torch.zeros(9)}, {})
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    tensors, metadata = load_tensors(saved)
    assert tensors["a"].equal(torch.ones(5)) and metadata == {"note": "old"}
    assert len(list(saved.parent.iterdir())) == 2
    save_tensors(saved, {"a": torch.zeros(9)}, {})
    assert list(saved.parent.iterdir()) == [saved]


def test_a_place_that_cannot_be_written_is_named(saved):
    for place in (saved / "more.safetensors", saved.parent):
        for write in (writable, lambda path: save_tensors(path, {}, {})):
            with pytest.raises(OSError, match=str(saved.parent)):
                write(place)
    assert writable(saved) == saved and load_tensors(saved)[1] == {"note": "old"}
