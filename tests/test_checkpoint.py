"""support/checkpoint.py: what of config.json and weights is read, and what refused."""
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import golden
from conftest import ROOT, close, load_cpu, tiny_model
from lab.plan import SHAPES
from model import Config, Llama
from support import checkpoint, places
from support.files import load_tensors
from support.parsers import LONG_PROMPTS
from support.rope import scaled
from support.saved import fingerprint


def change(path, **new):
    """Set entries of a JSON file."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **new}))


def reads_golden(path, name):
    """Whether a checkpoint gives the stored logits of a golden case."""
    want = load_file(golden.GOLDEN)[name]
    got = load_cpu(path)(golden.tokens(name))
    return close(got, want, 1e-4)


# ------------------------------------------------------------------------------------- config.json


@pytest.mark.parametrize("given, want", [
    (2, (2,)),
    ([128001, 128008, 128009], (128001, 128008, 128009)),
    (None, ()),
    (0, (0,)),
])
def test_eos_is_a_number_or_a_list(given, want, tmp_path):
    golden.write_config(tmp_path, {**golden.cases()["llama2"], "eos_token_id": given})
    assert Config.from_json(tmp_path / "config.json").eos == want


@pytest.mark.parametrize("eos, told, want", [
    (128001, [128001, 128009], (128001, 128009)),   # Llama-3-Instruct
    (2, 7, (7,)),                                   # Yi-Chat
    (2, [], ()),
    (2, None, (2,)),
    (None, 7, (7,)),
    ([1, 2], "absent", (1, 2)),
])
def test_the_end_that_generation_config_names_counts(eos, told, want, tmp_path):
    golden.write_config(tmp_path, {**golden.cases()["llama2"], "eos_token_id": eos})
    named = {} if told == "absent" else {"eos_token_id": told}
    (tmp_path / "generation_config.json").write_text(json.dumps({"do_sample": True, **named}))
    config = Config.from_json(tmp_path / "config.json")
    assert config.eos == want
    assert config.bos == 1


@pytest.mark.parametrize("text, message", [
    ("{", "not valid JSON"),
    ("[7]", "expected a JSON object"),
    ('{"eos_token_id": "</s>"}', "eos_token_id must be whole numbers, not "),
    ('{"eos_token_id": [2, null]}', "eos_token_id must be whole numbers, not "),
    ('{"eos_token_id": 1e3}', "eos_token_id must be whole numbers, not "),
])
def test_a_damaged_generation_config_is_named(text, message, tmp_path):
    folder = golden.write_checkpoint(tmp_path, "llama2")
    (folder / "generation_config.json").write_text(text)
    with pytest.raises(ValueError, match=message) as e:
        load_cpu(folder)
    assert str(e.value).startswith(f"{folder / 'generation_config.json'}: ")
    assert "\n" not in str(e.value)


SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
         "vocab_size")
SPARSE = {  # what a config.json with nothing but the sizes means, as transformers 5.23 has it
    "llama": dict(n_kv_heads=64, max_positions=2048, bos=1, eos=(2,), window=None, qkv_bias=False,
                  head_dim=16, qk_norm=False),
    "mistral": dict(n_kv_heads=8, max_positions=131072, bos=1, eos=(2,), window=4096,
                    qkv_bias=False, head_dim=16, qk_norm=False),
    "qwen2": dict(n_kv_heads=32, max_positions=32768, bos=None, eos=(), window=None, qkv_bias=True,
                  head_dim=16, qk_norm=False),
    "qwen3": dict(n_kv_heads=32, max_positions=32768, bos=None, eos=(), window=None, qkv_bias=False,
                  head_dim=128, qk_norm=True),
}


def bare(family):
    return {"model_type": family, "hidden_size": 1024, "intermediate_size": 96, "vocab_size": 96,
            "num_hidden_layers": 30, "num_attention_heads": 64}


@pytest.mark.parametrize("family", SPARSE)
def test_sparse_config_takes_the_familys_defaults(family, tmp_path):
    golden.write_config(tmp_path, bare(family))
    found = checkpoint.read_config(tmp_path / "config.json")
    assert found == {**SPARSE[family], "dim": 1024, "n_blocks": 30, "n_heads": 64,
                     "ffn": 96, "vocab": 96, "rope_theta": 10000.0, "rope_llama3": None,
                     "rope_ramp": None, "o_bias": False, "tied": False, "norm_eps": 1e-6}
    nulls = {"bos_token_id": None, "eos_token_id": None, "tie_word_embeddings": None,
             "num_key_value_heads": None, "sliding_window": None}
    change(tmp_path / "config.json", **nulls)
    found = checkpoint.read_config(tmp_path / "config.json")
    assert (found["bos"], found["eos"], found["tied"]) == (None, (), False)
    assert (found["n_kv_heads"], found["window"]) == (64, None)


@pytest.mark.parametrize("name", SIZES)
def test_a_size_that_is_missing_has_no_default(name, tmp_path):
    config = bare("mistral")
    del config[name]
    golden.write_config(tmp_path, config)
    with pytest.raises(ValueError, match=f"config.json: {name} is None, expected a whole number"):
        checkpoint.read_config(tmp_path / "config.json")


FULL = {    # hardly a value is a default
    "num_key_value_heads": 4, "head_dim": 24, "max_position_embeddings": 512, "rms_norm_eps": 1e-4,
    "rope_theta": 500.0, "tie_word_embeddings": True, "bos_token_id": 5, "eos_token_id": [6, 7],
    "sliding_window": 11, "hidden_act": "silu", "max_window_layers": 30, "attention_bias": True,
    "mlp_bias": False, "use_sliding_window": True, "rope_scaling": None,
}


@pytest.mark.parametrize("family", SPARSE)
def test_every_field_that_is_missing_is_as_transformers_has_it(family, tmp_path):
    AutoConfig = pytest.importorskip("transformers").AutoConfig
    for missing in (None, *FULL):
        config = {**bare(family), **FULL}
        config.pop(missing, None)
        if missing == "max_window_layers":      # 28 by default
            config["num_hidden_layers"] = 28
        golden.write_config(tmp_path, config)
        theirs = AutoConfig.from_pretrained(tmp_path)
        found = checkpoint.read_config(tmp_path / "config.json")
        assert found == translated(theirs), missing


def translated(theirs):
    """A configuration of transformers -> the fields of model.Config."""
    eos, family = theirs.eos_token_id, theirs.model_type
    biased = family in ("llama", "qwen3") and theirs.attention_bias
    kinds = {"llama": [], "mistral": ["sliding_attention"]}.get(family)
    kinds = theirs.layer_types if kinds is None else kinds
    head_dim = getattr(theirs, "head_dim", None)
    return {"dim": theirs.hidden_size,
            "n_blocks": theirs.num_hidden_layers,
            "n_heads": theirs.num_attention_heads,
            "n_kv_heads": theirs.num_key_value_heads,
            "head_dim": head_dim or theirs.hidden_size // theirs.num_attention_heads,
            "ffn": theirs.intermediate_size,
            "vocab": theirs.vocab_size,
            "max_positions": theirs.max_position_embeddings,
            "rope_theta": theirs.rope_parameters["rope_theta"],
            "rope_llama3": None,
            "rope_ramp": None,
            "bos": theirs.bos_token_id,
            "eos": tuple(eos if isinstance(eos, list) else [] if eos is None else [eos]),
            "tied": theirs.tie_word_embeddings,
            "qkv_bias": biased or family == "qwen2",
            "o_bias": biased,
            "qk_norm": family == "qwen3",
            "norm_eps": theirs.rms_norm_eps,
            "window": theirs.sliding_window if "sliding_attention" in kinds else None}


FULL_3, SLIDING_3 = ["full_attention"] * 3, ["sliding_attention"] * 3
WINDOWS = [     # a family, what its config.json says of windows, the window of all three blocks
    ("qwen2", {"use_sliding_window": True, "max_window_layers": 3}, None),
    ("qwen2", {"use_sliding_window": True, "max_window_layers": 28}, None),
    ("qwen2", {"use_sliding_window": True}, None),
    ("qwen2", {"use_sliding_window": True, "sliding_window": None, "max_window_layers": 1}, None),
    ("qwen2", {"use_sliding_window": True, "layer_types": FULL_3, "max_window_layers": 1}, None),
    ("qwen2", {"use_sliding_window": False, "sliding_window": 7, "max_window_layers": 0}, None),
    ("qwen2", {"use_sliding_window": None, "max_window_layers": 0}, None),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 0}, 7),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 7, "layer_types": SLIDING_3}, 7),
    ("qwen3", {"use_sliding_window": False, "sliding_window": None, "max_window_layers": 3}, None),
    ("qwen3", {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 3}, None),
    ("qwen3", {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 0}, 7),
    ("qwen3", {"use_sliding_window": True, "sliding_window": 7, "layer_types": SLIDING_3}, 7),
    ("mistral", {"sliding_window": 7}, 7),
    ("mistral", {"sliding_window": 7, "layer_types": None}, 7),
    ("mistral", {"sliding_window": 7, "layer_types": SLIDING_3}, 7),
    ("mistral", {"sliding_window": 7, "layer_types": FULL_3}, None),
    ("mistral", {"sliding_window": None, "layer_types": FULL_3}, None),
    ("llama", {"sliding_window": 7, "use_sliding_window": True, "layer_types": SLIDING_3}, None),
]


def with_window(folder, family, said):
    golden.write_config(folder, {**golden.cases()["llama2"], "model_type": family, **said})
    return checkpoint.read_config(folder / "config.json")["window"]


@pytest.mark.parametrize("family, said, want", WINDOWS)
def test_the_window_that_all_blocks_have(family, said, want, tmp_path):
    assert with_window(tmp_path, family, said) == want


@pytest.mark.parametrize("family, said, message", [
    ("qwen2", {"use_sliding_window": True, "max_window_layers": 2},
     "a sliding window in 1 of 3 blocks is not supported"),
    ("qwen3", {"use_sliding_window": True, "max_window_layers": 1},
     "a sliding window in 2 of 3 blocks is not supported"),
    ("mistral", {"layer_types": [*FULL_3[:2], "sliding_attention"]},
     "a sliding window in 1 of 3 blocks is not supported"),
    ("mistral", {"layer_types": ["chunked_attention"] * 3}, "layer_types is not a list of 3 times"),
    ("mistral", {"layer_types": FULL_3[:2]}, "layer_types is not a list of 3 times"),
    ("mistral", {"layer_types": "full_attention"}, "layer_types is not a list of 3 times"),
    ("mistral", {"layer_types": [{}, [], None]}, "layer_types is not a list of 3 times"),
    ("mistral", {"sliding_window": 0}, "sliding_window is 0"),
    ("qwen2", {"use_sliding_window": "yes"}, "use_sliding_window is 'yes', expected true or false"),
    ("qwen2", {"max_window_layers": "2"}, "max_window_layers is '2'"),
])
def test_a_window_that_is_not_supported(family, said, message, tmp_path):
    with pytest.raises(ValueError, match=f"config.json: {message}"):
        with_window(tmp_path, family, said)


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_a_qwen_whose_blocks_all_slide_gives_transformers_logits(family, tmp_path):
    transformers = pytest.importorskip("transformers")
    folder = golden.write_checkpoint(tmp_path, family)
    tokens = golden.tokens(family)
    plain = load_cpu(folder)(tokens)
    change(folder / "config.json", use_sliding_window=True, sliding_window=9, max_window_layers=0)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        want = theirs(tokens).logits
    assert close(load_cpu(folder)(tokens), want, 1e-4)
    assert not close(plain, want, 0.1)


def test_biases_that_a_family_does_not_read(tmp_path):
    case = {**golden.cases()["qwen2"], "attention_bias": True, "mlp_bias": True}
    golden.write_config(tmp_path, case)     # its three biases are always there, others never
    found = checkpoint.read_config(tmp_path / "config.json")
    assert (found["qkv_bias"], found["o_bias"]) == (True, False)
    golden.write_config(tmp_path, {**case, "model_type": "mistral"})
    found = checkpoint.read_config(tmp_path / "config.json")
    assert (found["qkv_bias"], found["o_bias"]) == (False, False)


def test_rope_scaling_counts_before_rope_parameters(tmp_path):
    new = {"rope_type": "default", "rope_theta": 500.0}
    case = {**golden.cases()["llama2"], "rope_scaling": dict(golden.SCALING)}
    golden.write_config(tmp_path, {**case, "rope_parameters": new})
    found = checkpoint.read_config(tmp_path / "config.json")
    assert (found["rope_theta"], found["rope_llama3"]) == (10000.0, (8.0, 1.0, 4.0, 48.0))
    AutoConfig = pytest.importorskip("transformers").AutoConfig
    theirs = AutoConfig.from_pretrained(tmp_path).rope_parameters
    assert (theirs["rope_theta"], theirs["rope_type"]) == (10000.0, "llama3")


LINEAR = {"rope_scaling": {"type": "linear", "factor": 4.0}}


def yarn(**said):
    return {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, **said}}


AT = "original_max_position_embeddings"
MSCALES = {"mscale": 0.707, "mscale_all_dim": 0.3}
ROPES = {       # what config.json says, beside 4096 positions and a base of 10000
    "linear": {"rope_scaling": {"type": "linear", "factor": 2.5}},
    "llama3": {"rope_scaling": {**golden.SCALING, AT: 1024}},
    "plain yarn": yarn(),
    "original": yarn(**{AT: 1024}),
    "original outside": {AT: 512, **yarn(**{AT: 1024})},
    "llama3, original outside": {AT: 512, "rope_scaling": dict(golden.SCALING)},
    "turns": yarn(beta_fast=50, beta_slow=0.3),
    "turns of 0": yarn(beta_fast=0, beta_slow=None),
    "turns the wrong way": yarn(beta_fast=1.0, beta_slow=9.0),
    "not truncated": yarn(truncate=False),
    "truncate null": yarn(truncate=None),
    "size": yarn(attention_factor=1.5, **MSCALES),
    "mscales": yarn(**MSCALES),
    "one mscale": yarn(mscale=0.707),
    "mscale of 0": yarn(mscale=0.707, mscale_all_dim=0),
    "shrinking": yarn(factor=0.5, **MSCALES),
    "factor null": yarn(factor=None, **{AT: 512}),
    "no room for a ramp": yarn(**{AT: 2}),
    "a step": yarn(**{AT: 6}),
    "a small base": {"rope_theta": 3.0, **yarn()},
    "wide heads": {"head_dim": 256, **yarn()},
}


@pytest.mark.parametrize("layout", [4, 5])
@pytest.mark.parametrize("name", ROPES)
def test_rope_types_turn_as_transformers_has_them(name, layout, tmp_path):
    pytest.importorskip("transformers")
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
    case = {**golden.cases()["llama2"], "head_dim": 128, "max_position_embeddings": 4096}
    golden.write_config(tmp_path, {**case, **ROPES[name]}, layout)
    theirs = LlamaRotaryEmbedding(LlamaConfig.from_pretrained(tmp_path))
    c = Config.from_json(tmp_path / "config.json")
    freq = 1.0 / c.rope_theta ** (torch.arange(0, c.head_dim, 2) / c.head_dim)
    slowed, size = scaled(freq, c.rope_llama3, c.rope_ramp)
    assert torch.allclose(slowed, theirs.inv_freq, rtol=1e-6, atol=0)
    assert size == pytest.approx(theirs.attention_scaling, rel=1e-12)
    assert not torch.allclose(slowed, freq, rtol=1e-3, atol=0) or name == "no room for a ramp"


@pytest.mark.parametrize("limit, rope, want", [
    (4096, LINEAR, 16384),                              # vicuna-7b-v1.5-16k
    (32768, yarn(**{AT: 32768}), 131072),
    (131072, yarn(**{AT: 32768}), 131072),
    (163840, yarn(**{AT: 4096}), 163840),
    (4096, yarn(factor=1e20), 2**31),
    (4096, {"rope_scaling": dict(golden.SCALING)}, 4096),   # llama3 says the new number
])
def test_a_longer_text_is_not_refused(limit, rope, want, tmp_path):
    case = {**golden.cases()["llama2"], "max_position_embeddings": limit}
    golden.write_config(tmp_path, {**case, **rope})
    assert Config.from_json(tmp_path / "config.json").max_positions == want


LONG = {"rope_type": "longrope", "factor": 4.0}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4}
SHORT_LLAMA3 = {"rope_type": "llama3", "factor": 8.0}
MANY_HEADS = {"num_attention_heads": 2**20, "num_key_value_heads": 2**20, "head_dim": 2**20}
BAD_CONFIG = [  # what is changed in config.json, what the message says
    ({"model_type": "gpt2"}, "model_type 'gpt2' is not supported"),
    ({"model_type": None}, "model_type None is not supported"),
    ({"rope_scaling": LONG}, "rope type 'longrope' is not supported"),
    ({"rope_parameters": DYNAMIC}, "rope type 'dynamic' is not supported"),
    ({"rope_scaling": {"type": "linear"}}, "factor is None, expected a positive number"),
    ({"rope_scaling": {"type": "yarn"}}, "factor is None, expected a positive number"),
    (yarn(factor="4"), "factor is '4', expected a positive number"),
    (yarn(original_max_position_embeddings=0),
     "original_max_position_embeddings is 0, expected a whole number"),
    (yarn(attention_factor=0), "attention_factor is 0, expected a positive number"),
    (yarn(mscale=-1, mscale_all_dim=1), "mscale is -1, expected a positive number"),
    (yarn(beta_fast="32"), "beta_fast is '32', expected a positive number"),
    (yarn(beta_slow=5e-324), "beta_slow is 5e-324, expected a positive number"),
    (yarn(truncate="no"), "truncate is 'no', expected true or false"),
    ({"rope_theta": 1, **yarn()}, "rope_theta is 1.0, yarn needs more than 1"),
    ({"rope_scaling": SHORT_LLAMA3}, "low_freq_factor is None, expected a positive number"),
    ({"rope_scaling": "llama3"}, "expected an object"),
    ({"rope_theta": -1}, "rope_theta is -1, expected a positive number"),
    ({"num_attention_heads": 5, "num_key_value_heads": 2},
     "5 attention heads do not divide among 2 key/value heads"),
    ({"num_key_value_heads": 3}, "4 attention heads do not divide among 3 key/value heads"),
    ({"head_dim": 15}, "head_dim 15 is odd"),
    ({"hidden_size": None}, "hidden_size is None, expected a whole number"),
    ({"hidden_size": 64.0}, "hidden_size is 64.0, expected a whole number"),
    ({"vocab_size": "96"}, "vocab_size is '96', expected a whole number"),
    ({"num_hidden_layers": 0}, "num_hidden_layers is 0, expected a whole number"),
    ({"hidden_act": "gelu"}, "hidden_act = 'gelu' is not supported"),
    ({"mlp_bias": True}, "mlp_bias = True is not supported"),
    ({"attention_bias": 1}, "attention_bias is 1, expected true or false"),
    ({"quantization_config": {"bits": 4}}, "quantization_config = .* is not supported"),
    ({"tie_word_embeddings": "yes"}, "tie_word_embeddings is 'yes', expected true or false"),
    ({"eos_token_id": "</s>"}, "eos_token_id must be whole numbers"),
    ({"eos_token_id": [2, 2**70]}, "eos_token_id must be whole numbers"),
    ({"bos_token_id": "<s>"}, "bos_token_id must be a whole number, not '<s>'"),
    ({"max_position_embeddings": None}, "max_position_embeddings is None, expected a whole"),
    ({"rms_norm_eps": None}, "rms_norm_eps is None, expected a positive number"),
    ({"hidden_size": 10**9},
     "hidden_size is 1000000000, expected a whole number from 1 to 16777216"),
    ({"num_hidden_layers": 10**9},
     "num_hidden_layers is 1000000000, expected a whole number from 1 to 1000"),
    (MANY_HEADS, "head_dim is 1048576, expected a whole number from 1 to 16"),
    ({"rope_theta": float("inf")}, "rope_theta is inf, expected a positive number"),
]


@pytest.mark.parametrize("new, message", BAD_CONFIG, ids=[str(new)[1:40] for new, _ in BAD_CONFIG])
def test_unsupported_config_is_refused(new, message, tmp_path):
    folder = golden.write_checkpoint(tmp_path, "llama2")
    change(folder / "config.json", **new)
    with pytest.raises(ValueError, match=message) as e:
        load_cpu(folder)
    assert "config.json" in str(e.value)
    assert "\n" not in str(e.value)


NO_JSON = {
    "empty": "",
    "open": "{",
    "words": "not json",
    "extra": '{"a": 1}}',
    "deep": "[" * 100000,
}


@pytest.mark.parametrize("text", NO_JSON)
def test_config_that_is_not_json(text, tmp_path):
    (tmp_path / "config.json").write_text(NO_JSON[text])
    with pytest.raises(ValueError, match="config.json: not valid JSON"):
        load_cpu(tmp_path)


def test_config_that_is_not_an_object_or_not_text(tmp_path):
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(ValueError, match="expected a JSON object"):
        load_cpu(tmp_path)
    (tmp_path / "config.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="not valid JSON"):
        load_cpu(tmp_path)


def test_fields_that_older_predictors_do_not_know_leave_their_fingerprint():
    for config, known in (({}, "b1ff53c0e8803a53"),
                          ({"rope_llama3": (8.0, 1.0, 4.0, 48.0), "qkv_bias": True},
                           "fe098737597d35d8")):
        assert fingerprint(Config(48, 6, 4, 2, 12, 96, 90, **config)) == known
    toy = ROOT / "checkpoints" / "toy"
    _, metadata = load_tensors(toy / "predictors.safetensors")
    assert metadata["fingerprint"] == fingerprint(Config.from_json(toy / "config.json"))
    new = ({}, {"qk_norm": True}, {"o_bias": True}, {"rope_ramp": (4.0, 1.0, 5.0, 1.1)},
           {"rope_ramp": (4.0, 1.0, 5.0, 1.2)})
    assert len({fingerprint(tiny_model(**changes).config) for changes in new}) == len(new)


# ----------------------------------------------------------------------------------------- weights


def test_a_bare_name_is_looked_for_under_checkpoints(tmp_path, monkeypatch):
    golden.write_checkpoint(tmp_path / "checkpoints" / "tiny", "llama2")
    golden.write_checkpoint(tmp_path / "elsewhere" / "tiny", "tied")
    monkeypatch.chdir(tmp_path / "elsewhere")
    monkeypatch.setattr(places, "CHECKPOINTS", tmp_path / "checkpoints")
    assert reads_golden("tiny", "llama2")
    assert load_cpu("./tiny").config.tied       # a path is one
    shutil.rmtree(tmp_path / "checkpoints")
    assert load_cpu("tiny").config.tied
    message = "no checkpoint 'huge': expected a directory with config.json"
    with pytest.raises(FileNotFoundError, match=message):
        load_cpu("huge")


@pytest.mark.parametrize("script", ["train.py", "saliency.py", "lab/batch.py"])
def test_random_weights_are_refused_before_anything_is_built(script, leaves, monkeypatch):
    monkeypatch.setitem(checkpoint.PUBLISHED, "tiny", {})       # no shape: building it would fail
    ended = leaves(script, "--ckpt", "random:tiny")
    assert ended.split(": ", 1)[1] == ("random:tiny: random weights are for timings (infer.py "
                                       "--bench, lab.speed) and have no tokenizer: name a "
                                       "checkpoint directory here")


def test_random_weights_reach_past_the_longest_timing():
    with torch.device("meta"):
        model = Llama(SHAPES["mistral-7b"])
    model.check_positions(max(LONG_PROMPTS) + 128)      # --bench decodes so many tokens more
    for config in SHAPES.values():
        assert config.max_positions == 1 << 20


def test_a_shape_may_be_named_as_its_weights_are():
    assert checkpoint.shape_of("random:llama-7b") == checkpoint.shape_of("llama-7b")
    with pytest.raises(ValueError, match="random:x: random weights are for timings"):
        checkpoint.shape_of("random:x")


def test_missing_shard(tmp_path):
    folder = golden.write_checkpoint(tmp_path, "sharded")
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ValueError, match="2 shards 1 are missing: model-00002-of-00002.safet"):
        load_cpu(folder)


@pytest.mark.parametrize("size", [0, 4, 100, -4, -10000])
def test_truncated_shard(size, tmp_path):
    folder = golden.write_checkpoint(tmp_path, "sharded")
    shard = folder / "model-00001-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:size])
    message = "model-00001-of-00002.safetensors: damaged or truncated"
    with pytest.raises(ValueError, match=message):
        load_cpu(folder)


Q = "model.layers.1.self_attn.q_proj.weight"
Q_BIAS = "model.layers.1.self_attn.q_proj.bias"
FOURTH = "model.layers.3.mlp.up_proj.weight"
INV_FREQ = "model.layers.0.self_attn.rotary_emb.inv_freq"


WEIGHTS = golden.weights("llama2", golden.cases()["llama2"])


def rewrite(folder, new):
    """Put new tensors in place of the old ones; None takes one away."""
    state = {name: tensor for name, tensor in (WEIGHTS | new).items() if tensor is not None}
    save_file(state, folder / "model.safetensors")


BAD_TENSORS = {     # tensors in place of the checkpoint's own, what the message says
    "missing": ({Q: None}, f"1 tensors are missing, the first is {Q}"),
    "no head": ({"lm_head.weight": None}, "1 tensors are missing, the first is lm_head.weight"),
    "fourth block": ({FOURTH: torch.zeros(112, 64)}, f"'{FOURTH}' has no place"),
    "bias": ({Q_BIAS: torch.zeros(64)}, "q_proj.bias' has no place"),
    "shape": ({Q: WEIGHTS[Q][:, :60].contiguous()},
              r"q_proj.weight has shape \(64, 60\), config.json asks for \(64, 64\)"),
    "flat": ({Q: WEIGHTS[Q].flatten()},
             r"has shape \(4096,\), config.json asks for \(64, 64\)"),
    "whole numbers": ({Q: torch.zeros(64, 64, dtype=torch.int8)},
                      "q_proj.weight holds I8, expected floating point"),
    # useless without its scales
    "eight bits": ({Q: torch.zeros(64, 64).to(torch.float8_e4m3fn)},
                   "q_proj.weight holds F8_E4M3, expected floating point"),
}


@pytest.mark.parametrize("fault", BAD_TENSORS)
def test_tensors_that_do_not_fit_config(fault, tmp_path):
    folder = golden.write_checkpoint(tmp_path, "llama2")
    new, message = BAD_TENSORS[fault]
    rewrite(folder, new)
    with pytest.raises(ValueError, match=message) as e:
        load_cpu(folder)
    assert str(e.value).startswith(f"{folder / 'model.safetensors'}: ")


def test_derived_tensors_of_old_files_are_passed_over(tmp_path):
    folder = golden.write_checkpoint(tmp_path, "llama2")
    rewrite(folder, {INV_FREQ: torch.ones(8)})
    assert reads_golden(folder, "llama2")


def test_a_tensor_in_two_shards(tmp_path):
    folder = golden.write_checkpoint(tmp_path, "sharded")
    first, second = (folder / f"model-0000{i}-of-00002.safetensors" for i in (1, 2))
    embedding = "model.embed_tokens.weight"
    save_file({**load_file(second), embedding: load_file(first)[embedding]}, second)
    with pytest.raises(ValueError, match=f"'{embedding}' stands in two shards"):
        load_cpu(folder)


@pytest.mark.parametrize("way", ["../x.safetensors", "ABSOLUTE", "sub/x.safetensors", "..", ""])
def test_a_shard_path_must_not_leave_the_directory(way, tmp_path):
    folder = golden.write_checkpoint(tmp_path / "sharded", "sharded")
    outside = tmp_path / "x.safetensors"        # a good file: only the path can be the reason
    outside.write_bytes((folder / "model-00001-of-00002.safetensors").read_bytes())
    way = str(outside) if way == "ABSOLUTE" else way
    index = folder / "model.safetensors.index.json"
    places = json.loads(index.read_text())["weight_map"]
    places = {name: way if "00001" in file else file for name, file in places.items()}
    change(index, weight_map=places)
    with pytest.raises(ValueError, match="is not a plain file name inside"):
        load_cpu(folder)


@pytest.mark.parametrize("text, message", [
    ("{", "not valid JSON"),
    ("[]", "no weight_map"),
    ('{"weight_map": {}}', "no weight_map"),
    ('{"weight_map": {"a": 1}}', "no weight_map"),
])
def test_bad_index(text, message, tmp_path):
    folder = golden.write_checkpoint(tmp_path, "sharded")
    (folder / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        load_cpu(folder)


def test_pickle_files_are_never_read(tmp_path):
    folder = golden.write_checkpoint(tmp_path, "llama2")
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(state, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="holds no safetensors but"):
        load_cpu(folder)
    torch.save(state, folder / "model.safetensors")     # nor under another name
    with pytest.raises(ValueError, match="damaged or truncated safetensors"):
        load_cpu(folder)
