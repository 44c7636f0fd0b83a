"""Make a checkpoint from a GGUF file (of llama.cpp) of a Llama, a Mistral, a Qwen2 or a Qwen3.

    pip install gguf tokenizers                             # the two optional packages
    python checkpoints/gguf.py FILE.gguf --out checkpoints/NAME
    python infer.py --ckpt NAME --prompt "..."

The script turns the file's numbers back into ordinary ones, undoes what llama.cpp changed, rebuilds
the tokenizer from the lists in the file, and writes all in Hugging Face layout. What it cannot
carry over exactly it refuses by name. Where the original checkpoint can be had, take that: what a
quantised file has lost stays lost.

Numbers that are quantised become fp16. That is enough: a value of 4 bits is a scale times 0..15
plus an offset, and rounding it to fp16 moves it by at most 1/2048 of itself, far less than the 4
bits had already moved it. On 236 tokens of English SmolLM2's loss is 3.3140 with fp16 and 3.3141
with fp32, logits of up to 38 differ by 0.03 at most, and the file is half as large. What is too
large for fp16 becomes fp32. Numbers that are not quantised keep their precision; norms and biases,
which a GGUF holds in fp32, take that of the matrices where it holds them exactly.
"""
import json
import math
import os
import struct
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if __name__ == "__main__":
    # This folder stood here, and in it this file hides the package gguf.
    sys.path[0] = str(ROOT)

import numpy as np  # noqa: E402
import torch  # noqa: E402

from checkpoints.gguf_reader import Gguf  # noqa: E402
from checkpoints.gguf_tokenizer import (  # noqa: E402
    WORDS, plan_tokenizer, token_id, vocabulary)
from model import Config, Llama, hf_name  # noqa: E402
from support.checkpoint import DTYPES  # noqa: E402
from support.files import need  # noqa: E402
from support.options import cli, command_parser  # noqa: E402
from support.progress import Progress  # noqa: E402

ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM",
                 "qwen3": "Qwen3ForCausalLM"}
NAMES = {  # llama.cpp's names of tensors -> those of model.py
    "token_embd": "embed", "output_norm": "norm", "output": "head", "attn_norm": "attn_norm",
    "attn_q": "q", "attn_k": "k", "attn_v": "v", "attn_output": "o", "ffn_norm": "mlp_norm",
    "attn_q_norm": "q_norm", "attn_k_norm": "k_norm",
    "ffn_gate": "gate", "ffn_up": "up", "ffn_down": "down",
}
# The metadata of a model that are read here, without the architecture in front.
KNOWN = {
    "context_length", "embedding_length", "block_count", "feed_forward_length", "vocab_size",
    "attention.head_count", "attention.head_count_kv", "attention.key_length",
    "attention.value_length", "attention.layer_norm_rms_epsilon", "rope.dimension_count",
    "rope.freq_base", "rope.scaling.type", "rope.scaling.factor",
    "rope.scaling.original_context_length", "rope.scaling.finetuned",
}
# Others may be there if they change nothing.
NEUTRAL = {"expert_count": 0, "expert_used_count": 0, "attention.causal": True,
           "attention.clamp_kqv": 0.0, "rope.scale_linear": 1.0, "rope.scaling.attn_factor": 1.0,
           "use_parallel_residual": False, "tensor_data_layout": "Meta AI original pth"}
WHOLE = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
WORDS_OF = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}     # safetensors'
SHARD = 4 * 10**9                   # bytes of a file of weights
CHUNK = 1 << 24                     # numbers that are in memory at once


# ------------------------------------------------------------------------------------- config.json


def make_config(gguf):
    """config.json of an open file, in the words of transformers, but for torch_dtype."""
    family = gguf.field("general.architecture")
    need(family in ARCHITECTURES, f"{gguf.path}: the architecture {family!r:.60} is not supported "
                                  f"({', '.join(ARCHITECTURES)})")
    check_metadata(gguf, family)

    def field(name, default=None, kind=int):
        value = gguf.get(f"{family}.{name}", default)
        need(type(value) is kind and value > 0,
             f"{gguf.path}: {family}.{name} is {value!r:.60}, expected a positive number")
        return value

    names = {t.name for t in gguf.tensors}
    heads, dim = field("attention.head_count"), field("embedding_length")
    config = {
        "architectures": [ARCHITECTURES[family]],
        "model_type": family,
        "hidden_act": "silu",
        "torch_dtype": None,        # known when the tensors are planned
        "hidden_size": dim,
        "num_hidden_layers": field("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": field("attention.head_count_kv", heads),
        "intermediate_size": field("feed_forward_length"),
        "vocab_size": len(vocabulary(gguf)),
        "max_position_embeddings": field("context_length"),
        "rope_theta": field("rope.freq_base", 10000.0, float),
        "rms_norm_eps": decimal(field("attention.layer_norm_rms_epsilon", kind=float)),
        "bos_token_id": token_id(gguf, "bos"),
        "eos_token_id": token_id(gguf, "eos"),
        "tie_word_embeddings": "output.weight" not in names,
    }
    size = field("attention.key_length", field("rope.dimension_count", dim // heads))
    if size * heads != dim or family == "qwen3":    # a Qwen3 that does not say so has heads of 128
        config["head_dim"] = size
    if family == "llama":
        config["attention_bias"] = "blk.0.attn_q.bias" in names
        config["mlp_bias"] = "blk.0.ffn_up.bias" in names
    return config | rope_scaling(gguf, family, size)


def decimal(value):
    """A number that is held in fp32 as it was written: 9.99999975e-06 is 1e-05."""
    return float(f"{value:.6g}")


def check_metadata(gguf, family):
    """Refuse metadata of the model that are not known: they may change what it computes."""
    get = gguf.get
    for name, value in gguf.fields.items():
        if not name.startswith(f"{family}."):
            continue
        short = name.removeprefix(f"{family}.")
        known = short in KNOWN or short in NEUTRAL and value == NEUTRAL[short]
        if short == "attention.sliding_window":     # of no effect where it reaches everything
            known = type(value) is int and not 0 < value < get(f"{family}.context_length", 0)
        need(known, f"{gguf.path}: {name} = {value!r:.60} is not supported")
    size = get(f"{family}.attention.key_length")
    for name in ("attention.value_length", "rope.dimension_count"):
        other = get(f"{family}.{name}")
        need(None in (size, other) or size == other,
             f"{gguf.path}: {family}.{name} = {other!r:.60} is not supported, the heads are of "
             f"size {size!r:.60}")


def rope_scaling(gguf, family, head_dim):
    """{"rope_scaling": ...} where slow turns are slowed further, else {}."""
    def field(name, default=None):
        return gguf.get(f"{family}.rope.scaling.{name}", default)

    factors = [t for t in gguf.tensors if t.name == "rope_freqs.weight"]
    kind = field("type", "none")
    need(kind in ("none", "linear", "yarn"),
         f"{gguf.path}: {family}.rope.scaling.type = {kind!r:.60} is not supported")
    if factors:
        need(kind == "none",
             f"{gguf.path}: rope_freqs.weight beside rope.scaling.type {kind} is not supported")
        return llama3_scaling(gguf, family, factors[0], head_dim)
    if kind == "none":
        return {}
    scaling = {"rope_type": kind, "factor": gguf.field(f"{family}.rope.scaling.factor")}
    if kind == "yarn":
        name = f"{family}.rope.scaling.original_context_length"
        scaling["original_max_position_embeddings"] = gguf.field(name)
    return {"rope_scaling": scaling}


def llama3_scaling(gguf, family, stored, head_dim):
    """What Llama 3.1's rule is called in config.json; rope_freqs.weight has to follow from it.

    The tensor holds what the angle of each pair of a head is divided by: 1 for pairs that turn
    often within the 8,192 positions of the first training, `factor` for those that turn less than
    once, and what is between for the others.
    """
    given = dequantise(stored)
    factor = float(given.max())
    theta = gguf.get(f"{family}.rope.freq_base", 10000.0)
    turns = [8192 / (2 * math.pi * theta ** (2 * i / head_dim)) for i in range(head_dim // 2)]
    blend = [min(max((turn - 1) / (4 - 1), 0), 1) for turn in turns]
    rule = [1 / ((1 - part) / factor + part) for part in blend]
    follows = given.shape == (len(rule),) and np.allclose(given, rule, rtol=1e-4, atol=0)
    need(follows, f"{gguf.path}: rope_freqs.weight is not what Llama 3.1's rule gives (8192 "
                  "positions, 1 and 4 turns), and no other is supported")
    if factor == 1:
        return {}
    return {"rope_scaling": {"rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0,
                             "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}}


# ----------------------------------------------------------------------------------------- weights


def our_name(name):
    """'blk.3.attn_q.weight' -> 'blocks.3.q.weight'; a name that no model has for unknown ones."""
    *block, part, kind = name.split(".")
    place = "blocks." + ".".join(block[1:]) + "." if block else ""
    return f"{place}{NAMES.get(part, '?')}.{kind}"


def plan_tensors(gguf, config, dtype=None):
    """-> [(Hugging Face name, Stored, dtype, size of a head whose rows llama.cpp permuted or None)]

    All tensors of the model in its order, and no other. dtype: for all, instead of their own.
    """
    with torch.device("meta"):      # shapes without memory
        model = Llama(config)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    stored = {}
    for t in gguf.tensors:
        name = our_name(t.name)
        need("_exps." not in t.name and "ffn_gate_inp" not in t.name,
             f"{gguf.path}: {t.name} is a tensor of a mixture of experts, which is not supported")
        if t.name == "rope_freqs.weight":
            continue
        need(name in shapes, f"{gguf.path}: tensor {t.name:.60} has no place in this model")
        need(t.shape == shapes[name], f"{gguf.path}: {t.name} has shape {t.shape}, the metadata "
                                      f"ask for {shapes[name]}")
        need(t.kind.name in WHOLE or can_dequantise(t),
             f"{gguf.path}: {t.name} is of the type {t.kind.name}, which the package gguf cannot "
             "read")
        stored[name] = t
    missing = [name for name in shapes if name not in stored]
    need(not missing, f"{gguf.path}: {len(missing)} tensors are missing, the first is that of "
                      f"{missing[:1]}")
    permuted = config.head_dim if gguf.field("general.architecture") == "llama" else None
    return [(hf_name(name), stored[name], dtype or WHOLE.get(stored[name].kind.name, torch.float16),
             permuted if name.split(".")[-2] in ("q", "k") else None) for name in shapes]


def can_dequantise(stored):
    """Whether the package gguf knows this type."""
    from gguf import quants
    try:
        quants.dequantize(stored.data.reshape(-1, stored.data.shape[-1])[:1], stored.kind)
    except NotImplementedError:
        return False
    return True


def dequantise(stored, rows=slice(None)):
    """Some rows of a tensor, or all, as fp32."""
    from gguf import quants
    data = np.ascontiguousarray(stored.data[rows])
    return np.array(quants.dequantize(data, stored.kind), np.float32)


def unpermute(w, head_dim):
    """Rows of q or k (heads*d, ...) from llama.cpp's rotary layout to Hugging Face's.

    llama.cpp turns the neighbours (2i, 2i + 1) of a head, Hugging Face (and model.py) turns the
    pair (i, i + d/2). So the rows of each head, read as d/2 pairs of two, become two halves of d/2.
    """
    pairs = w.reshape(-1, head_dim // 2, 2, *w.shape[1:])
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(w.shape)


def main_dtype(plan):
    """The precision of most of the matrices' numbers."""
    sizes = Counter()
    for _, stored, dtype, _ in plan:
        if len(stored.shape) > 1:
            sizes[dtype] += math.prod(stored.shape)
    return sizes.most_common(1)[0][0]


def chunks(stored, head_dim):
    """Slices of rows, whole heads at a time, that are small in memory."""
    if len(stored.shape) < 2:
        return [slice(None)]
    unit = head_dim or 1
    step = max(CHUNK // stored.shape[1] // unit, 1) * unit
    return [slice(i, i + step) for i in range(0, stored.shape[0], step)]


def write_tensor(f, stored, dtype, head_dim, main):
    """Write the numbers of a tensor -> the dtype that was used.

    It is `dtype`; `main` for a vector that it holds exactly; fp32 for what fp16 cannot hold.
    """
    begin = f.tell()
    for rows in chunks(stored, head_dim):
        w = dequantise(stored, rows)
        need(np.isfinite(w).all(), f"{stored.name}: holds what is no number; is the file damaged?")
        if head_dim:
            w = unpermute(w, head_dim)
        w = torch.from_numpy(w)
        if w.dim() == 1 and torch.equal(w.to(main).float(), w):
            dtype = main
        narrow = w.to(dtype)
        if not narrow.isfinite().all():
            f.seek(begin)           # twice as long, it covers what was written
            return write_tensor(f, stored, torch.float32, head_dim, main)
        f.write(narrow.view(torch.uint8).numpy())
    return dtype


def write_shard(path, plan, main, progress):
    """A safetensors file, one tensor after the other in memory -> its number of bytes of weights.

    The header goes first and says how each tensor was stored, so it is written last.
    """
    widest = {name: {"dtype": "BF16", "shape": stored.shape, "data_offsets": [10**15, 10**15]}
              for name, stored, *_ in plan}
    room = len(json.dumps(widest)) + 100
    room += -room % 8
    table = {"__metadata__": {"format": "pt"}}
    with open(path, "wb") as f:
        f.seek(8 + room)
        for name, stored, dtype, head_dim in plan:
            begin = f.tell() - 8 - room
            used = write_tensor(f, stored, dtype, head_dim, main)
            end = f.tell() - 8 - room
            table[name] = {"dtype": WORDS_OF[used], "shape": stored.shape,
                           "data_offsets": [begin, end]}
            progress.add(end - begin)
        f.seek(0)
        f.write(struct.pack("<Q", room))
        f.write(json.dumps(table).encode().ljust(room))
        f.flush()
        os.fsync(f.fileno())
    return end


def into_shards(plan, largest):
    """Cut the plan into runs of at most so many bytes, a larger tensor alone -> a list of plans."""
    shards, size = [[]], 0
    for entry in plan:
        _, stored, dtype, _ = entry
        grows = math.prod(stored.shape) * dtype.itemsize
        if shards[-1] and size + grows > largest:
            shards.append([])
            size = 0
        shards[-1].append(entry)
        size += grows
    return shards


# ------------------------------------------------------------------------------------------- files


class Written(Progress):
    """How many of the bytes of weights are written."""

    def __init__(self, plan):
        super().__init__(sum(math.prod(stored.shape) * dtype.itemsize
                             for _, stored, dtype, _ in plan))

    def add(self, size):
        self.count += size
        self.note(f"{self.count / 1e9:.2f} of {self.total / 1e9:.2f} GB")


class Folder:
    """Files that are written under temporary names and take their own all together at the end."""

    def __init__(self, root):
        self.root, self.names = Path(root), []
        self.root.mkdir(parents=True, exist_ok=True)

    def new(self, name):
        """The temporary name of a file."""
        self.names.append(name)
        return self.root / f".{name}.tmp"

    def write_json(self, name, value):
        text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
        self.new(name).write_text(text, encoding="utf-8")

    def __enter__(self):
        return self

    def __exit__(self, error, *_):
        if error:
            for name in self.names:
                (self.root / f".{name}.tmp").unlink(missing_ok=True)
            return
        self.remove_old()
        for name in self.names:
            path = self.root / name
            os.replace(self.root / f".{name}.tmp", path)
            print(f"  {path}  {path.stat().st_size / 1e6:.1f} MB")

    def remove_old(self):
        """Remove what stood here under other names: it would be read beside the new files."""
        forms = ("model*.safetensors", "model.safetensors.index.json", "tokenizer.json",
                 "tokenizer.model", "special_tokens_map.json", "added_tokens.json",
                 "generation_config.json")
        for path in [path for form in forms for path in self.root.glob(form)]:
            if path.name not in self.names:
                path.unlink()


def checked(gguf, config):
    """config.json -> model.Config; what the model cannot do is refused in the file's name."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.json"
        path.write_text(json.dumps(config), encoding="utf-8")
        try:
            return Config.from_json(path)
        except ValueError as e:
            raise ValueError(str(e).replace(str(path), str(gguf.path))) from None


def complete(root):
    """Whether a checkpoint is there: config.json is the last file that a conversion writes."""
    files = {path.name for path in Path(root).glob("*")}
    weights = {"model.safetensors", "model.safetensors.index.json"}
    words = {"tokenizer.json", "tokenizer.model"}
    return "config.json" in files and bool(files & weights) and bool(files & words)


def convert(path, out, pre=None, dtype=None, ends=()):
    """A GGUF file -> a checkpoint directory; returns the number of weights.

    pre: see gguf_tokenizer.plan_tokenizer. dtype: of all weights, instead of their own. ends: token
    ids that end a text beside the file's own.
    """
    start, gguf = time.monotonic(), Gguf(path)
    config = make_config(gguf)
    plan = plan_tensors(gguf, checked(gguf, config), dtype)
    tokenizer, write_tokenizer, settings = plan_tokenizer(gguf, pre)
    main = main_dtype(plan)
    config["torch_dtype"] = next(name for name, value in DTYPES.items() if value == main)
    shards = into_shards(plan, SHARD)
    print(f"converting {len(plan)} tensors of {path}", flush=True)
    with Folder(out) as folder, Written(plan) as progress:
        write_weights(folder, shards, main, progress)
        write_tokenizer(folder.new(tokenizer))
        folder.write_json("tokenizer_config.json", settings)
        ends = all_ends(gguf, ends)
        if set(ends) - {config["eos_token_id"]}:
            folder.write_json("generation_config.json", {"eos_token_id": ends})
        folder.write_json("config.json", config)
    count = sum(math.prod(stored.shape) for _, stored, *_ in plan)
    print(f"{count / 1e6:.1f}M weights in {out}, {time.monotonic() - start:.0f} s")
    return count


def all_ends(gguf, more):
    """The ids of all tokens that end a text or a turn, the file's own first."""
    own = [token_id(gguf, role) for role in ("eos", "eot", "eom")]
    return list(dict.fromkeys(i for i in (*own, *more) if i is not None))


def write_weights(folder, shards, main, progress):
    """model.safetensors, or several files and their index."""
    names = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    names = names if len(names) > 1 else ["model.safetensors"]
    size, places = 0, {}
    for name, plan in zip(names, shards):
        size += write_shard(folder.new(name), plan, main, progress)
        places |= {key: name for key, *_ in plan}
    if len(names) > 1:
        index = {"metadata": {"total_size": size}, "weight_map": places}
        folder.write_json("model.safetensors.index.json", index)


def check_packages():
    """Before any work, not after it."""
    for package in ("gguf", "tokenizers"):
        try:
            __import__(package)
        except ImportError:
            raise ImportError(f"the optional package {package} is needed here: "
                              f"`pip install {package}`") from None


def main():
    parser = command_parser(__doc__)
    parser.add_argument("file", type=Path, help="the GGUF file")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR",
                        help="the checkpoint directory to write, checkpoints/NAME")
    parser.add_argument("--force", action="store_true",
                        help="write the files again (trained predictors beside them stay)")
    parser.add_argument("--dtype", choices=sorted(DTYPES),
                        help="the precision of all weights (default: see above)")
    parser.add_argument("--pre", choices=sorted(WORDS),
                        help="how texts are cut into words, where the file does not say")
    args = parser.parse_args()
    need(args.force or not complete(args.out),
         f"{args.out} holds a checkpoint already; --force writes it again")
    check_packages()
    convert(args.file, args.out, args.pre, DTYPES.get(args.dtype))


if __name__ == "__main__":
    cli(main)
