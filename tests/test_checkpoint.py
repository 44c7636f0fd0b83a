"""support/checkpoint.py: what of config.json, weights and tokenizers is read, and what refused."""
import importlib.util
import io
import json
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

import golden
from conftest import ENGLISH, close, load_cpu, needs, real_weights
from model import Config, Tokenizer
from support import checkpoint


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


def test_sparse_config_takes_the_usual_defaults(tmp_path):
    case = golden.cases()["llama2"]
    for name in ("num_key_value_heads", "rope_theta", "rope_scaling", "tie_word_embeddings",
                 "bos_token_id", "attention_bias", "mlp_bias"):
        del case[name]
    golden.write_config(tmp_path, case)
    config = Config.from_json(tmp_path / "config.json")
    assert config.n_kv_heads == 4
    assert config.head_dim == 16
    assert config.rope_theta == 10000.0
    assert config.rope_llama3 is None
    assert config.tied is False
    assert config.bos is None


YARN = {"rope_type": "yarn", "factor": 4.0}
LINEAR = {"type": "linear", "factor": 4.0}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4}
SHORT_LLAMA3 = {"rope_type": "llama3", "factor": 8.0}
MANY_HEADS = {"num_attention_heads": 2**20, "num_key_value_heads": 2**20, "head_dim": 2**20}
BAD_CONFIG = [  # what is changed in config.json, what the message says
    ({"model_type": "gpt2"}, "model_type 'gpt2' is not supported"),
    ({"model_type": None}, "model_type None is not supported"),
    ({"rope_scaling": YARN}, "rope type 'yarn' is not supported"),
    ({"rope_scaling": LINEAR}, "rope type 'linear' is not supported"),
    ({"rope_parameters": DYNAMIC}, "rope type 'dynamic' is not supported"),
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
    ({"attention_bias": True}, "attention_bias = True is not supported"),
    ({"quantization_config": {"bits": 4}}, "quantization_config = .* is not supported"),
    ({"tie_word_embeddings": "yes"}, "tie_word_embeddings is 'yes', expected true or false"),
    ({"eos_token_id": "</s>"}, "eos_token_id must be whole numbers"),
    ({"eos_token_id": [2, 2**70]}, "eos_token_id must be whole numbers"),
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


# ----------------------------------------------------------------------------------------- weights


def test_a_bare_name_is_looked_for_under_checkpoints(tmp_path, monkeypatch):
    golden.write_checkpoint(tmp_path / "home" / "checkpoints" / "tiny", "llama2")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    monkeypatch.setattr(checkpoint, "ROOT", tmp_path / "home")
    assert reads_golden("tiny", "llama2")
    golden.write_checkpoint(tmp_path / "elsewhere" / "tiny", "tied")     # as given comes first
    assert load_cpu("tiny").config.tied
    message = "no checkpoint 'huge': expected a directory with config.json"
    with pytest.raises(FileNotFoundError, match=message):
        load_cpu("huge")


def test_missing_shard(tmp_path):
    folder = golden.write_checkpoint(tmp_path, "sharded")
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ValueError, match="model-00002-of-00002.safetensors: this shard is missing"):
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
    message = "neither model.safetensors nor model.safetensors.index.json"
    with pytest.raises(ValueError, match=message):
        load_cpu(folder)
    torch.save(state, folder / "model.safetensors")     # nor under another name
    with pytest.raises(ValueError, match="damaged or truncated safetensors"):
        load_cpu(folder)


# --------------------------------------------------------------------------------------- tokenizer


@pytest.fixture
def config_only(tmp_path):
    """A directory with a config.json alone, for 400 tokens."""
    golden.write_config(tmp_path, {**golden.cases()["llama2"], "vocab_size": 400})
    return tmp_path


def test_no_tokenizer(config_only):
    with pytest.raises(FileNotFoundError, match="no tokenizer.model and no tokenizer.json"):
        Tokenizer(config_only)
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        Tokenizer(config_only / "nowhere")


def test_damaged_tokenizer_files(config_only):
    (config_only / "tokenizer.json").write_text("{}")
    if importlib.util.find_spec("tokenizers"):
        with pytest.raises(ValueError, match="tokenizer.json: not a tokenizer file"):
            Tokenizer(config_only)
    (config_only / "tokenizer.model").write_bytes(b"no model")
    with pytest.raises(ValueError, match="tokenizer.model: not a sentencepiece model"):
        Tokenizer(config_only)


def test_tokenizer_json_without_the_package_says_what_to_install(config_only, monkeypatch):
    (config_only / "tokenizer.json").write_text("{}")
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ImportError, match="pip install tokenizers"):
        Tokenizer(config_only)


TEXT = "the quick brown fox jumps over the lazy dog and runs 1234567890 miles"


@pytest.fixture(scope="module")
def sentencepiece_model():
    """A small tokenizer.model, bytes."""
    import sentencepiece
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([TEXT] * 20), model_writer=out, vocab_size=300, model_type="bpe",
        byte_fallback=True, hard_vocab_limit=False, normalization_rule_name="identity",
        remove_extra_whitespaces=False, minloglevel=2)
    return out.getvalue()


@pytest.fixture
def with_tokenizer(config_only, sentencepiece_model):
    (config_only / "tokenizer.model").write_bytes(sentencepiece_model)
    return config_only


def test_sentencepiece_tokenizer(with_tokenizer):
    tokenizer = Tokenizer(with_tokenizer)
    ids = tokenizer.encode(TEXT)
    assert ids[0] == 1
    assert tokenizer.encode(TEXT, bos=False) == ids[1:]
    assert tokenizer.decode(ids) == TEXT
    assert "".join(tokenizer.piece(t) for t in ids[1:]).strip() == TEXT
    unknown = "naïve\n東京 🙂"          # its characters go through as bytes
    assert tokenizer.decode(tokenizer.encode(unknown)) == unknown


def test_tokenizer_config_may_leave_out_the_begin_of_text(with_tokenizer):
    ids = Tokenizer(with_tokenizer).encode(TEXT)
    (with_tokenizer / "tokenizer_config.json").write_text('{"add_bos_token": false}')
    assert Tokenizer(with_tokenizer).encode(TEXT) == ids[1:]


def test_a_vocabulary_may_be_padded_beyond_the_tokenizers_but_not_smaller(with_tokenizer):
    tokenizer = Tokenizer(with_tokenizer)
    ids = tokenizer.encode(TEXT)
    assert tokenizer.decode([350, *ids, 399]) == TEXT
    assert tokenizer.piece(399) == ""
    change(with_tokenizer / "config.json", vocab_size=5)
    message = (f"{with_tokenizer}: the tokenizer gives id {max(ids)}, "
               "by config.json the model knows 5 tokens")
    with pytest.raises(ValueError, match=message):
        Tokenizer(with_tokenizer).encode(TEXT)


@pytest.mark.real
@real_weights
@needs("tokenizers")
@pytest.mark.parametrize("text", [
    ENGLISH,
    "x = 12345 + 6.75\n\n\n\tfoo()\r\n",
    "  naïve café, 東京 🙂🏽, １２３ ½ ²  ",
    "",
], ids=["English", "code", "Unicode", "empty"])
def test_smollm2_tokenizer_gives_back_any_text(text):
    tokenizer = Tokenizer("smollm2")
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.real
@real_weights
@needs("tokenizers")
def test_smollm2_tokenizer():
    tokenizer = Tokenizer("smollm2")
    pieces = [tokenizer.piece(t) for t in tokenizer.encode("In 2045 days")]
    assert pieces == ["In", " ", "2", "0", "4", "5", " days"]
    specials = [t.content for t in tokenizer.hf.get_added_tokens_decoder().values()]
    assert len(specials) == 17
    assert [tokenizer.encode(t) for t in specials] == [[i] for i in range(17)]
    ids = tokenizer.encode("<|im_start|>user\nHi<|im_end|>")
    assert (len(ids), ids[0], ids[-1]) == (5, 1, 2)
