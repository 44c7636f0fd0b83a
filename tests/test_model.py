"""model.py against golden logits of transformers, its caches and masks against plain recomputation, and bad input."""
import importlib.util
import io
import json
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import golden  # noqa: E402
import model as model_module  # noqa: E402
from model import Config, KVCache, Tokenizer, load, masked_attention, positions, visible  # noqa: E402

CASES = list(golden.cases())
SMOLLM2 = ROOT / "checkpoints" / "smollm2"


def cpu(path):
    return load(path, device="cpu", dtype=torch.float32)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """tiny(name) -> the loaded model of a golden case."""
    folder = tmp_path_factory.mktemp("tiny")
    return lambda name: cpu(golden.write_checkpoint(folder / name, name))


def change(path, **new):
    """Set entries of a JSON file."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **new}))


# ------------------------------------------------------------------------------------------------------- logits


@pytest.mark.parametrize("layout", [4, 5])
@pytest.mark.parametrize("name", CASES)
def test_logits_equal_transformers(name, layout, tmp_path):
    want = load_file(golden.GOLDEN)[name]
    got = cpu(golden.write_checkpoint(tmp_path / name, name, layout))(golden.tokens(name))
    assert got.dtype == torch.float32 and got.shape == want.shape
    assert (got - want).abs().max() < 1e-4


def test_the_backbone_is_frozen_and_a_tied_head_is_one_tensor(tiny):
    for name in ("llama2", "tied"):
        m = tiny(name)
        assert not m.training and not any(p.requires_grad for p in m.parameters())
        assert (m.head.weight is m.embed.weight) == (name == "tied")


# ------------------------------------------------------------------------------------------------------- caches


def feed(m, tokens, chunks, pos=None, end=None):
    """Logits of all tokens (B, N), fed in chunks through blocks that each keep a cache."""
    pos = positions(tokens) if pos is None else pos
    caches = [KVCache(m.config, tokens.shape[0], tokens.shape[1], "cpu", torch.float32) for _ in m.blocks]
    out, start = [], 0
    for n in chunks:
        part = slice(start, start + n)
        rope = m.rope(pos[:, part], int(pos[:, part].max()) + 1)
        x = m.embed(tokens[:, part])
        for block, cache in zip(m.blocks, caches):
            x = block(x, rope, cache)
        out.append(m.logits(x))
        start += n
    assert start == tokens.shape[1] and all(cache.n == start for cache in caches)
    return torch.cat(out, 1)


@pytest.mark.parametrize("chunks", [[1] * 28, [10] + [1] * 18, [9, 7, 1, 1, 6, 4], [28]], ids=["ones", "prefill", "several", "whole"])
@pytest.mark.parametrize("name", ["llama2", "gqa", "llama3", "mistral"])
def test_feeding_a_cache_equals_the_full_forward(tiny, name, chunks):
    m, tokens = tiny(name), golden.tokens(name)
    torch.testing.assert_close(feed(m, tokens, chunks), m(tokens), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["gqa", "mistral"])
def test_dropped_tokens_leave_gaps_in_the_positions(tiny, name):
    """Survivors at their own positions: in one pass, through a cache, and as a mask over the whole sequence, all the same."""
    m, tokens = tiny(name), golden.tokens(name)
    kept = torch.tensor([[0, 1, 2, 5, 9, 10, 13, 14, 20, 21, 25, 27], [0, 3, 4, 6, 7, 8, 11, 12, 16, 24, 26, 27]])
    some = tokens.gather(1, kept)
    cached = feed(m, some, [5, 3, 1, 1, 1, 1], pos=kept)
    rope, x = m.rope(kept, 28), m.embed(some)
    keep = torch.zeros(tokens.shape).scatter(1, kept, 1.0)
    masked_rope, masked = m.rope(positions(tokens), 28), m.embed(tokens)
    for block in m.blocks:
        x, masked = block(x, rope), block(masked, masked_rope, keep=keep)
    torch.testing.assert_close(cached, m.logits(x), atol=1e-5, rtol=0)
    torch.testing.assert_close(m.logits(masked).gather(1, kept[..., None].expand(-1, -1, golden.VOCAB)), m.logits(x), atol=1e-5, rtol=0)
    assert (m.logits(x) - m(some)).abs().max() > 0.1                 # positions counted anew would give something else


def test_cache_counts_its_bytes_and_refuses_more_than_its_capacity():
    c = Config(8, 1, 4, 2, 6, 8, 8)
    cache = KVCache(c, 3, 5, "cpu", torch.float32)
    part = torch.ones(3, 2, 4, 6)
    k, v, pos = cache.append(part, 2 * part, torch.arange(4).expand(3, 4))
    assert k.shape == v.shape == (3, 2, 4, 6) and pos.tolist() == [[0, 1, 2, 3]] * 3
    assert cache.bytes == 2 * 3 * 2 * 4 * 6 * 4
    with pytest.raises(ValueError, match="KV cache is full: 8 tokens for a capacity of 5"):
        cache.append(part, part, torch.arange(4).expand(3, 4))
    assert cache.n == 4


# ------------------------------------------------------------------------------------------------ masked attention


def qkv(n=20, heads=4, groups=2, d=8, rows=2):
    draw = torch.Generator().manual_seed(0)
    return [torch.randn(rows, h, n, d, generator=draw) * size for h, size in ((heads, 1.5), (groups, 1.5), (groups, 0.5))]


def test_masked_attention_that_keeps_all_is_plain_attention():
    q, k, v = qkv()
    pos = torch.arange(20).expand(2, 20)
    want = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(masked_attention(q, k, v, visible(pos, pos), torch.ones(2, 20)), want, atol=1e-6, rtol=0)


@pytest.mark.parametrize("window", [None, 6])
def test_masked_attention_equals_attention_over_the_kept(window):
    q, k, v = qkv()
    pos = torch.arange(20).expand(2, 20)
    kept = torch.stack([torch.randperm(20, generator=torch.Generator().manual_seed(row))[:9].sort().values for row in range(2)])
    got = masked_attention(q, k, v, visible(pos, pos, window), torch.zeros(2, 20).scatter(1, kept, 1.0))
    pick = lambda x: x.gather(2, kept[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))  # noqa: E731
    want = F.scaled_dot_product_attention(pick(q), pick(k), pick(v), attn_mask=visible(kept, kept, window), enable_gqa=True)
    torch.testing.assert_close(pick(got), want, atol=1e-6, rtol=0)
    # a hidden query sees the kept keys before it and itself
    row, i = 0, next(i for i in range(19, 0, -1) if i not in kept[0])
    seen = [j for j in range(i + 1) if (j in kept[row] or j == i) and (window is None or i - j < window)]
    want = F.scaled_dot_product_attention(q[row, :, [i]], k[row, :, seen], v[row, :, seen], enable_gqa=True)
    torch.testing.assert_close(got[row, :, [i]], want, atol=1e-6, rtol=0)


def test_masked_attention_tells_a_hidden_key_what_seeing_it_would_change():
    q, k, v = qkv(n=6)
    pos = torch.arange(6).expand(2, 6)
    keep = torch.tensor([[1.0, 0, 1, 0, 1, 1]] * 2, requires_grad=True)
    out = masked_attention(q, k, v, visible(pos, pos), keep)
    out.pow(2).sum().backward()
    assert keep.grad.isfinite().all() and (keep.grad[:, [1, 3]] != 0).all()
    huge = k.clone()
    huge[:, :, 1] *= 1000                                            # a hidden key far above every kept one must not overflow
    keep.grad = None
    out = masked_attention(q, huge, v, visible(pos, pos), keep)
    out.pow(2).sum().backward()
    assert out.isfinite().all() and keep.grad.isfinite().all()


# -------------------------------------------------------------------------------------------------------- config


@pytest.mark.parametrize("given, want", [(2, (2,)), ([128001, 128008, 128009], (128001, 128008, 128009)), (None, ()), (0, (0,))])
def test_eos_is_a_number_or_a_list(given, want, tmp_path):
    golden.write_config(tmp_path, {**golden.cases()["llama2"], "eos_token_id": given})
    assert Config.from_json(tmp_path / "config.json").eos == want


def test_sparse_config_takes_the_usual_defaults(tmp_path):
    case = golden.cases()["llama2"]
    for name in ("num_key_value_heads", "rope_theta", "rope_scaling", "tie_word_embeddings", "bos_token_id", "attention_bias", "mlp_bias"):
        del case[name]
    golden.write_config(tmp_path, case)
    c = Config.from_json(tmp_path / "config.json")
    assert (c.n_kv_heads, c.head_dim, c.rope_theta, c.rope_llama3, c.tied, c.bos) == (4, 16, 10000.0, None, False, None)


BAD_CONFIG = [  # what is changed in config.json, what the message says
    ({"model_type": "gpt2"}, "model_type 'gpt2' is not supported"),
    ({"model_type": None}, "model_type None is not supported"),
    ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope type 'yarn' is not supported"),
    ({"rope_scaling": {"type": "linear", "factor": 4.0}}, "rope type 'linear' is not supported"),
    ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4}}, "rope type 'dynamic' is not supported"),
    ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor is None, expected a positive number"),
    ({"rope_scaling": "llama3"}, "expected an object"),
    ({"rope_theta": -1}, "rope_theta is -1, expected a positive number"),
    ({"num_attention_heads": 5, "num_key_value_heads": 2}, "5 attention heads do not divide among 2 key/value heads"),
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
    ({"hidden_size": 10**9}, "hidden_size is 1000000000, expected a whole number from 1 to 16777216"),
    ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000, expected a whole number from 1 to 1000"),
    ({"num_attention_heads": 2**20, "num_key_value_heads": 2**20, "head_dim": 2**20}, "head_dim is 1048576, expected a whole number from 1 to 16"),
    ({"rope_theta": float("inf")}, "rope_theta is inf, expected a positive number"),
]


@pytest.mark.parametrize("new, message", BAD_CONFIG, ids=[str(new)[1:40] for new, _ in BAD_CONFIG])
def test_unsupported_config_is_refused(new, message, tmp_path):
    folder = golden.write_checkpoint(tmp_path, "llama2")
    change(folder / "config.json", **new)
    with pytest.raises(ValueError, match=message) as e:
        cpu(folder)
    assert "config.json" in str(e.value) and "\n" not in str(e.value)


@pytest.mark.parametrize("text", ["", "{", "not json", '{"a": 1}}', "[" * 100000], ids=["empty", "open", "words", "extra", "deep"])
def test_config_that_is_not_json(text, tmp_path):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match="config.json: not valid JSON"):
        cpu(tmp_path)


def test_config_that_is_not_an_object_or_not_text(tmp_path):
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(ValueError, match="expected a JSON object"):
        cpu(tmp_path)
    (tmp_path / "config.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="not valid JSON"):
        cpu(tmp_path)


# ------------------------------------------------------------------------------------------------------- weights


def test_a_bare_name_is_looked_for_under_checkpoints(tmp_path, monkeypatch):
    golden.write_checkpoint(tmp_path / "home" / "checkpoints" / "tiny", "llama2")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    monkeypatch.setattr(model_module, "__file__", str(tmp_path / "home" / "model.py"))
    here = cpu("tiny")(golden.tokens("llama2"))
    assert (here - load_file(golden.GOLDEN)["llama2"]).abs().max() < 1e-4
    golden.write_checkpoint(tmp_path / "elsewhere" / "tiny", "tied")  # as given comes first
    assert cpu("tiny").config.tied
    with pytest.raises(FileNotFoundError, match="no checkpoint 'huge': expected a directory with config.json"):
        cpu("huge")


def test_missing_shard(tmp_path):
    folder = golden.write_checkpoint(tmp_path, "sharded")
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ValueError, match="model-00002-of-00002.safetensors: this shard is missing"):
        cpu(folder)


@pytest.mark.parametrize("size", [0, 4, 100, -4, -10000])
def test_truncated_shard(size, tmp_path):
    folder = golden.write_checkpoint(tmp_path, "sharded")
    shard = folder / "model-00001-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:size])
    with pytest.raises(ValueError, match="model-00001-of-00002.safetensors: damaged or truncated"):
        cpu(folder)


def rewrite(folder, edit):
    """Change the tensors of a checkpoint in one file."""
    state = golden.weights("llama2", golden.cases()["llama2"])
    edit(state)
    save_file(state, folder / "model.safetensors")


Q = "model.layers.1.self_attn.q_proj.weight"


@pytest.mark.parametrize("edit, message", [
    (lambda s: s.pop(Q), f"1 tensors are missing, the first is {Q}"),
    (lambda s: s.pop("lm_head.weight"), "1 tensors are missing, the first is lm_head.weight"),
    (lambda s: s.update({"model.layers.3.mlp.up_proj.weight": torch.zeros(112, 64)}), "'model.layers.3.mlp.up_proj.weight' has no place"),
    (lambda s: s.update({Q.replace("weight", "bias"): torch.zeros(64)}), "q_proj.bias' has no place"),
    (lambda s: s.update({Q: s[Q][:, :60].contiguous()}), r"q_proj.weight has shape \(64, 60\), config.json asks for \(64, 64\)"),
    (lambda s: s.update({Q: s[Q].flatten()}), r"has shape \(4096,\), config.json asks for \(64, 64\)"),
    (lambda s: s.update({Q: torch.zeros(64, 64, dtype=torch.int8)}), "q_proj.weight holds torch.int8, expected floating point"),
    (lambda s: s.update({Q: torch.zeros(64, 64).to(torch.float8_e4m3fn)}), "q_proj.weight holds torch.float8_e4m3fn, expected floating point"),  # useless without its scales
], ids=["missing", "no head", "fourth block", "bias", "shape", "flat", "whole numbers", "eight bits"])
def test_tensors_that_do_not_fit_config(edit, message, tmp_path):
    folder = golden.write_checkpoint(tmp_path, "llama2")
    rewrite(folder, edit)
    with pytest.raises(ValueError, match=message) as e:
        cpu(folder)
    assert str(e.value).startswith(f"{folder / 'model.safetensors'}: ")


def test_derived_tensors_of_old_files_are_passed_over(tmp_path):
    folder = golden.write_checkpoint(tmp_path, "llama2")
    rewrite(folder, lambda s: s.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}))
    assert (cpu(folder)(golden.tokens("llama2")) - load_file(golden.GOLDEN)["llama2"]).abs().max() < 1e-4


def test_a_tensor_in_two_shards(tmp_path):
    folder = golden.write_checkpoint(tmp_path, "sharded")
    first, second = (folder / f"model-0000{i}-of-00002.safetensors" for i in (1, 2))
    state = load_file(second)
    state["model.embed_tokens.weight"] = load_file(first)["model.embed_tokens.weight"]
    save_file(state, second)
    with pytest.raises(ValueError, match="'model.embed_tokens.weight' stands in two shards"):
        cpu(folder)


@pytest.mark.parametrize("way", ["../x.safetensors", "ABSOLUTE", "sub/x.safetensors", "..", ""])
def test_a_shard_path_must_not_leave_the_directory(way, tmp_path):
    folder = golden.write_checkpoint(tmp_path / "sharded", "sharded")
    outside = tmp_path / "x.safetensors"                             # a good file, so that only the path can be the reason
    outside.write_bytes((folder / "model-00001-of-00002.safetensors").read_bytes())
    index = folder / "model.safetensors.index.json"
    places = json.loads(index.read_text())["weight_map"]
    way = str(outside) if way == "ABSOLUTE" else way
    change(index, weight_map={key: way if "00001" in file else file for key, file in places.items()})
    with pytest.raises(ValueError, match="is not a plain file name inside"):
        cpu(folder)


@pytest.mark.parametrize("text, message", [("{", "not valid JSON"), ("[]", "no weight_map"), ('{"weight_map": {}}', "no weight_map"),
                                           ('{"weight_map": {"a": 1}}', "no weight_map")])
def test_bad_index(text, message, tmp_path):
    folder = golden.write_checkpoint(tmp_path, "sharded")
    (folder / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        cpu(folder)


def test_pickle_files_are_never_read(tmp_path):
    folder = golden.write_checkpoint(tmp_path, "llama2")
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(state, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="neither model.safetensors nor model.safetensors.index.json"):
        cpu(folder)
    torch.save(state, folder / "model.safetensors")                  # nor under another name
    with pytest.raises(ValueError, match="damaged or truncated safetensors"):
        cpu(folder)


def test_prompt_beyond_the_positions(tiny):
    m = tiny("llama2")
    assert m(torch.zeros(1, 512, dtype=torch.long)).shape == (1, 512, golden.VOCAB)
    with pytest.raises(ValueError, match="position 512 is beyond this model's 512 positions"):
        m(torch.zeros(1, 513, dtype=torch.long))


def test_random_shapes(monkeypatch):
    with pytest.raises(ValueError, match="unknown shape 'gpt-5'; there are llama-7b, mistral-7b"):
        load("random:gpt-5")
    monkeypatch.setitem(model_module.SHAPES, "tiny", Config(64, 2, 4, 2, 16, 96, 50))
    m = cpu("random:tiny")
    assert m(torch.zeros(1, 5, dtype=torch.long)).isfinite().all() and not any(p.requires_grad for p in m.parameters())


# ----------------------------------------------------------------------------------------------------- tokenizer


def config_only(folder):
    golden.write_config(folder, golden.cases()["llama2"])
    return folder


def test_no_tokenizer(tmp_path):
    with pytest.raises(FileNotFoundError, match="no tokenizer.model and no tokenizer.json"):
        Tokenizer(config_only(tmp_path))
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        Tokenizer(tmp_path / "nowhere")


def test_damaged_tokenizer_files(tmp_path):
    config_only(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    if importlib.util.find_spec("tokenizers"):
        with pytest.raises(ValueError, match="tokenizer.json: not a tokenizer file"):
            Tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"no model")
    with pytest.raises(ValueError, match="tokenizer.model: not a sentencepiece model"):
        Tokenizer(tmp_path)


def test_tokenizer_json_without_the_package_says_what_to_install(tmp_path, monkeypatch):
    config_only(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ImportError, match="pip install tokenizers"):
        Tokenizer(tmp_path)


def test_sentencepiece_tokenizer(tmp_path):
    import sentencepiece
    text = "the quick brown fox jumps over the lazy dog and runs 1234567890 miles"
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter([text] * 20), model_writer=out, vocab_size=300, model_type="bpe",
                                             byte_fallback=True, hard_vocab_limit=False, normalization_rule_name="identity",
                                             remove_extra_whitespaces=False, minloglevel=2)
    golden.write_config(tmp_path, {**golden.cases()["llama2"], "vocab_size": 400})
    (tmp_path / "tokenizer.model").write_bytes(out.getvalue())
    tok = Tokenizer(tmp_path)
    ids = tok.encode(text)
    assert ids[0] == 1 and tok.encode(text, bos=False) == ids[1:] and tok.decode(ids) == text
    assert tok.decode(tok.encode("naïve\n東京 🙂")) == "naïve\n東京 🙂"  # unknown characters go through as bytes
    assert "".join(tok.piece(t) for t in ids[1:]).strip() == text
    (tmp_path / "tokenizer_config.json").write_text('{"add_bos_token": false}')
    tok = Tokenizer(tmp_path)
    assert tok.encode(text) == ids[1:]
    assert tok.decode([350, *ids, 399]) == text and tok.piece(399) == ""  # a vocabulary padded beyond the tokenizer's
    change(tmp_path / "config.json", vocab_size=5)
    with pytest.raises(ValueError, match=f"{tmp_path}: the tokenizer gives id {max(ids)}, by config.json the model knows 5 tokens"):
        Tokenizer(tmp_path).encode(text)


# --------------------------------------------------------------------------------- a real model, where it is there

real_weights = pytest.mark.skipif(not (SMOLLM2 / "model.safetensors").is_file(),
                                  reason="no checkpoints/smollm2/model.safetensors: run python checkpoints/smollm2.py")
needs = lambda package: pytest.mark.skipif(not importlib.util.find_spec(package), reason=f"pip install {package}")  # noqa: E731

ENGLISH = """The lighthouse keeper had lived on the rock for thirty-one years before the company wrote to say that the lamp would be
made automatic. He read the letter twice, folded it, and put it in the tin where he kept his wife's photographs. On the 14th of March,
1987, a boat came with two engineers and a crate. They were polite young men. They drank his tea, asked about the weather, and in four
hours they had replaced everything that he had done each night with a grey box the size of a loaf of bread.

"What happens when it breaks?" he asked.

"Then it calls us," said the older of the two, "and we come out." The keeper looked at the sea, which was rising, and at the small
boat, and said nothing. That winter the light failed three times. Each time it called, and each time nobody could come."""


@pytest.mark.real
@real_weights
@needs("tokenizers")
@needs("transformers")
def test_smollm2_logits_equal_transformers():
    import transformers
    transformers.logging.disable_progress_bar()
    tokens = torch.tensor([Tokenizer("smollm2").encode(ENGLISH)])
    other = transformers.AutoModelForCausalLM.from_pretrained(SMOLLM2, dtype=torch.float32, attn_implementation="eager").eval()
    m = cpu("smollm2")
    with torch.no_grad():
        want, got = other(tokens).logits, m(tokens)
    assert tokens.shape[1] > 150 and (got - want).abs().max() < 1e-3
    assert F.cross_entropy(got[0, :-1], tokens[0, 1:]) < 3.6          # it knows English: chance would be ln(49152) = 10.8


@pytest.mark.real
@real_weights
@needs("tokenizers")
def test_smollm2_tokenizer():
    tok = Tokenizer("smollm2")
    for text in (ENGLISH, "x = 12345 + 6.75\n\n\n\tfoo()\r\n", "  naïve café, 東京 🙂🏽, １２３ ½ ²  ", ""):
        assert tok.decode(tok.encode(text)) == text
    assert [tok.piece(t) for t in tok.encode("In 2045 days")] == ["In", " ", "2", "0", "4", "5", " days"]
    specials = [t.content for t in tok.hf.get_added_tokens_decoder().values()]
    assert len(specials) == 17 and [tok.encode(t) for t in specials] == [[i] for i in range(17)]
    ids = tok.encode("<|im_start|>user\nHi<|im_end|>")
    assert (len(ids), ids[0], ids[-1]) == (5, 1, 2)


@pytest.mark.real
@real_weights
@needs("tokenizers")
def test_smollm2_answers():
    m, tok = cpu("smollm2"), Tokenizer("smollm2")
    tokens = tok.encode("<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n")
    start = len(tokens)
    while tokens[-1] not in m.config.eos or len(tokens) == start:
        assert len(tokens) < start + 20, tok.decode(tokens[start:])
        tokens.append(int(m(torch.tensor([tokens]))[0, -1].argmax()))
    assert tok.decode(tokens[start:]) == "The capital of France is Paris."
