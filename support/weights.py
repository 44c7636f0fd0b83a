"""Where checkpoints lie on this disk, their safetensors files, and what makes decode quick.

A checkpoint is a directory in Hugging Face layout. What is missing, damaged or unsafe is refused
in one line that says what to do. Nothing is downloaded, nothing is unpickled, no code is run.
"""
import difflib
import math
import os
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from support.config import SHAPES, read_config
from support.files import need, open_tensors, read_json, read_object

ROOT = Path(__file__).resolve().parent.parent
CHECKPOINTS = ROOT / "checkpoints"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Short names that README.md speaks of, and what brings them here.
CONVERT = "python checkpoints/convert.py"
GET = {
    "smollm2": f"{CONVERT} smollm2",
    "qwen2.5-coder-0.5b": f"{CONVERT} qwen2.5-coder-0.5b",
    "qwen2.5-coder-1.5b": f"{CONVERT} qwen2.5-coder-1.5b",
    "llama-7b": "hf download meta-llama/Llama-2-7b-hf --local-dir checkpoints/llama-7b",
    "mistral-7b": "hf download mistralai/Mistral-7B-v0.1 --local-dir checkpoints/mistral-7b",
    "llama-3-8b": "hf download meta-llama/Meta-Llama-3-8B --local-dir checkpoints/llama-3-8b",
}


def choose_device(device=None):
    """The device of that name; without one cuda if there is any, else the cpu."""
    try:
        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError):
        raise ValueError(f"device {str(device)!r} is not available here") from None
    return device


def shape_of(name):
    """The fields of model.Config: of a shape in SHAPES, or of a checkpoint directory."""
    return SHAPES.get(str(name).removeprefix("random:")) or describe(name)[1]


# --------------------------------------------------------------------------------- where they lie


def describe(path):
    """-> the checkpoint's directory and the fields of its model.Config; None for random:NAME."""
    name = str(path)
    if not name.startswith("random:"):
        root = find(path)
        return root, read_config(root / "config.json")
    name = name.removeprefix("random:")
    need(name in SHAPES, f"unknown shape {name!r}; there are {', '.join(SHAPES)}")
    return None, SHAPES[name]


def find(path):
    """A checkpoint's directory: a bare name under checkpoints/ first, a path, or a Hub id.

    Raises FileNotFoundError or ValueError that says what to do.
    """
    text = str(path)
    need(not text.startswith("random:"), f"{text}: random weights are for timings and have no "
                                         "tokenizer: name a checkpoint directory here")
    for place in places(text):
        if (place / "config.json").is_file():
            return place
    raise FileNotFoundError(absent(text))


def places(text):
    """Where a checkpoint of this name may lie, the first that counts first."""
    here, ours = Path(text), CHECKPOINTS / text
    bare = here.name == text and text not in ("", "..")
    return ([ours, here] if bare else [here, ours]) + snapshots("models", text)


def snapshots(kind, text):
    """The revision of a Hub repository OWNER/NAME that its cache holds as main, [Path] or []."""
    if len(Path(text).parts) != 2 or text.startswith((".", "~", "/")):
        return []
    home = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
    cache = Path(os.environ.get("HF_HUB_CACHE") or home / "hub")
    repository = cache / f"{kind}--{text.replace('/', '--')}"
    file = repository / "refs" / "main"
    return [repository / "snapshots" / file.read_text().strip()] if file.is_file() else []


def absent(text):
    """Why there is no checkpoint here, and what to do, as one line."""
    path = Path(text)
    if text.endswith(".gguf"):
        name = path.stem.lower()
        return (f"{text} is a GGUF file: `{CONVERT} {text} --out checkpoints/{name}` converts it, "
                f"then --ckpt {name}")
    if path.is_file():
        return (f"{text} is a file: a checkpoint is the directory that holds it, with config.json "
                f"(--ckpt {path.parent})")
    if path.name in GET and not path.is_absolute():
        return f"no checkpoint {text!r} here yet: get it with `{GET[path.name]}`"
    for place in places(text):
        if place.is_dir():
            check_safe(place)
            return (f"{place} has no config.json: a checkpoint is a directory in Hugging Face "
                    "layout (config.json, safetensors, tokenizer)")
    names = [place.parent.name for place in CHECKPOINTS.glob("*/config.json")]
    near = difflib.get_close_matches(path.name.lower(), names, 1, cutoff=0.8)
    if near:
        return f"no checkpoint {text!r}: do you mean --ckpt {near[0]}?"
    return (f"no checkpoint {text!r} on this disk: expected a directory with config.json, under "
            "checkpoints/ or as given; `hf download OWNER/NAME --local-dir checkpoints/NAME` (pip "
            "install huggingface_hub) gets one from the Hub")


def check_safe(root):
    """Refuse links that lead nowhere, an adapter, and pickled weights alone.

    The Hub's cache holds links, whose files may have gone away. An adapter (LoRA) is a change of
    another model's weights; transformers would apply it. Pickled weights may run any code.
    """
    lost = [file.name for kind in ("*.json", "*.safetensors") for file in root.glob(kind)
            if not file.exists()]
    need(not lost, f"{root}: {listed(lost)}: a link to a file that is not there (any more): get "
                   "the checkpoint again, or copy it with what its links lead to (cp -L)")
    adapter = read_object(root / "adapter_config.json")
    need(not adapter, f"{root} holds an adapter (LoRA) for {adapter.get('base_model_name_or_path')}"
                      ": merge it into that model first (PEFT's merge_and_unload, then "
                      "save_pretrained to another directory)")
    pickled = [file.name for kind in ("*.bin", "*.pt*") for file in root.glob(kind)]
    need(not pickled or any(root.glob("*.safetensors")),
         f"{root} holds {listed(pickled)} and no safetensors: pickled weights may run any code "
         "when they are read, so get them as safetensors")


# --------------------------------------------------------------------------------------- weights


def shards(root):
    """The safetensors files of a checkpoint -> (files, the file that messages about all name)."""
    single, index = root / "model.safetensors", root / "model.safetensors.index.json"
    check_safe(root)
    if single.is_file():
        return [single], single
    if not index.is_file():
        some = sorted(file.name for file in root.glob("*.safetensors"))
        raise ValueError(f"{root}: {'only ' + listed(some) if some else 'no weights'}, neither "
                         f"{single.name} nor {index.name}: get the whole checkpoint")
    raw = read_json(index)
    placed = raw.get("weight_map") if isinstance(raw, dict) else None
    need(isinstance(placed, dict) and placed and all(type(p) is str for p in placed.values()),
         f"{index}: no weight_map of tensor names to files")
    names = sorted(set(placed.values()))
    for name in names:              # a path could lead anywhere on this disk
        need(Path(name).name == name and name not in ("", ".."),
             f"{index}: shard {name!r} is not a plain file name inside {root}")
    missing = [name for name in names if not (root / name).is_file()]
    need(not missing, f"{index}: of {len(names)} shards {len(missing)} are missing: "
                      f"{listed(missing)}")
    return [root / name for name in names], index


def listed(names, most=3):
    """Names as text, the first few of many."""
    return ", ".join(names[:most]) + (" ..." if len(names) > most else "")


EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def describe_weights(path):
    """As describe, but `tied` is what the weights are, as transformers decides.

    A head that is stored beside the embedding and differs from it is kept, whatever config.json
    says, and one line says so. The two are read only where both are there.
    """
    root, fields = describe(path)
    found = []
    for path in shards(root)[0] if root and fields["tied"] else []:
        with open_tensors(path) as file:
            found += [file.get_slice(name) for name in file.keys() if name in (EMBED, HEAD)]
    if len(found) == 2 and not torch.equal(*(stored[:].float() for stored in found)):
        print(f"{root}: config.json ties the output head to the embedding, and {HEAD} is another "
              "matrix: it is used as the head", flush=True)
        fields = {**fields, "tied": False}
    return root, fields


def tensors(root, parameters, tied=False, device="cpu"):
    """All tensors of a checkpoint, one at a time, checked; model.load puts them in place.

    parameters: {our name: of the shape that it has to have}. Yields (our name, stored); stored[:]
    reads the whole tensor, stored[a:b] only these rows. Where the head is tied, one of it and the
    embedding is enough; both may be there if they are equal. Rotary frequencies may be there and
    are not read. Raises ValueError for what is missing, unknown, twice there, damaged or
    misshapen.
    """
    files, source = shards(root)
    ours, seen = {hf_name(name): name for name in parameters}, {}
    if tied:
        ours[HEAD] = ours[EMBED]
    for path in files:
        with open_tensors(path, device) as file:
            for name in (name for name in file.keys() if not name.endswith("rotary_emb.inv_freq")):
                need(name in ours,
                     f"{path}: tensor {name!r} has no place in a model of this config.json")
                need(name not in seen, f"{path}: tensor {name!r} stands in two shards")
                stored = file.get_slice(name)
                check_tensor(f"{path}: {name}", stored, parameters[ours[name]].shape)
                seen[name] = ours[name]
                yield ours[name], stored
    missing = [name for name in ours if ours[name] not in seen.values()]
    need(not missing, f"{source}: {len(missing)} tensors are missing: {listed(missing)}")


def check_tensor(where, stored, shape):
    """That a stored tensor has this shape, and holds numbers that are weights."""
    found, expected = tuple(stored.get_shape()), tuple(shape)
    need(found == expected, f"{where} has shape {found}, config.json asks for {expected}")
    # eight bits are useless without their scales
    need(stored.get_dtype() in ("F64", "F32", "F16", "BF16"),
         f"{where} holds {stored.get_dtype()}, expected floating point weights")


HF_NAMES = {
    "embed": "model.embed_tokens", "norm": "model.norm", "head": "lm_head",
    "attn_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm",
    "q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj",
    "q_norm": "self_attn.q_norm", "k_norm": "self_attn.k_norm",
    "o": "self_attn.o_proj", "gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj",
}


def hf_name(name):
    """Our parameter's name -> its name in a Hugging Face Llama file."""
    *block, part, kind = name.split(".")        # blocks.3.q.weight, embed.weight
    layer = f"model.layers.{block[1]}." if block else ""
    return f"{layer}{HF_NAMES[part]}.{kind}"


def read_whole(parameter, stored):
    """The whole of a stored tensor, whatever parameter it is for."""
    return stored[:]


def fill_randomly(model, device):
    """An empty model with random weights, which need no files: good for timing alone."""
    model = model.to_empty(device=device)
    for p in model.parameters():
        here = p.data.to_local() if hasattr(p.data, "to_local") else p.data
        if p.dim() > 1:
            here.normal_(0, 0.02)
        else:
            here.fill_(1)
    return model.eval().requires_grad_(False)


# --------------------------------------------------------------------------------------- speed

FEW = 32            # with fewer tokens, reading the weights costs more than the arithmetic
LARGE = 1 << 16     # a matrix of so many weights is worth more than one thread


class Linear(nn.Linear):
    """nn.Linear, which on a CPU multiplies few fp32 tokens on one core alone: here on all."""

    def forward(self, x):
        return linear(x, self.weight, self.bias)


def linear(x, weight, bias=None):
    """F.linear; where it is bound by reading a frozen weight (out, in), each of T threads reads
    its share of the rows.
    """
    whole = not hasattr(weight, "to_local")                 # not divided among processes already
    frozen = x.device.type == "cpu" and x.dtype == torch.float32 and not weight.requires_grad
    # sizes last: torch.compile makes a graph for each side of a question about them
    if not (frozen and whole and weight.numel() >= LARGE and 0 < x.numel() < FEW * x.shape[-1]):
        return F.linear(x, weight, bias)
    T = math.gcd(torch.get_num_threads(), weight.shape[0])
    rows = weight.unflatten(0, (T, -1))                     # (T, out / T, in)
    tokens = x.reshape(-1, x.shape[-1]).expand(T, -1, -1)   # (T, n, in)
    y = torch.bmm(tokens, rows.mT)                          # (T, n, out / T)
    y = y.transpose(0, 1).reshape(*x.shape[:-1], -1)
    return y if bias is None else y + bias


def compile_blocks(blocks):
    """torch.compile model.Blocks, attention apart: each size of a cache would compile anew."""
    for block in blocks:
        block.qkv = torch.compile(block.qkv, dynamic=True)
        block.feed_forward = torch.compile(block.feed_forward, dynamic=True)
