"""A checkpoint directory of a published shape with random weights: to try out size and speed.

It looks as one from the Hub does, bfloat16 in shards with their index, and says nonsense. The
tokenizer is the toy's, whose ids every shape knows.

    python checkpoints/random_weights.py llama-7b --out checkpoints/llama-7b-random     # 13.5 GB
    python train.py --ckpt llama-7b-random --dtype bfloat16 ...
"""
import json
import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

HERE = Path(__file__).resolve().parent
if __name__ == "__main__":
    # This folder stood here, and in it gguf.py hides the package gguf.
    sys.path[0] = str(HERE.parent)

from lab.plan import SHAPES  # noqa: E402
from model import Llama, hf_name  # noqa: E402
from support.files import need  # noqa: E402
from support.options import (add_quiet_argument, at_least, cli,  # noqa: E402
                             command_parser)
from support.progress import Progress  # noqa: E402


def make_config(c):
    """config.json in the words of transformers."""
    llama3 = None
    if c.rope_llama3:
        names = ("factor", "low_freq_factor", "high_freq_factor",
                 "original_max_position_embeddings")
        llama3 = {"rope_type": "llama3", **dict(zip(names, c.rope_llama3))}
    return {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
            "torch_dtype": "bfloat16", "hidden_size": c.dim, "num_hidden_layers": c.n_blocks,
            "num_attention_heads": c.n_heads, "num_key_value_heads": c.n_kv_heads,
            "head_dim": c.head_dim, "intermediate_size": c.ffn, "vocab_size": c.vocab,
            "max_position_embeddings": 4096, "rms_norm_eps": c.norm_eps,
            "rope_theta": c.rope_theta, "rope_scaling": llama3, "bos_token_id": 1,
            "eos_token_id": 2, "tie_word_embeddings": c.tied}


def write(config, out, most, progress):
    """All files of the checkpoint."""
    with torch.device("meta"):
        shapes = {hf_name(name): p.shape for name, p in Llama(config).named_parameters()}
    total, shard_of = 0, {}
    for name, shape in shapes.items():
        shard_of[name] = total // most + 1
        total += 2 * shape.numel()              # bytes
    shards = max(shard_of.values())
    files = {i: f"model-{i:05}-of-{shards:05}.safetensors" for i in range(1, shards + 1)}
    places = {name: files[i] for name, i in shard_of.items()}
    torch.manual_seed(0)
    for file in files.values():
        state = {}
        for name in [name for name in shapes if places[name] == file]:
            w = torch.ones(shapes[name], dtype=torch.bfloat16)
            state[name] = w.normal_(0, 0.02) if w.dim() > 1 else w
        save_file(state, out / file, metadata={"format": "pt"})
        progress.note(f"wrote {file}")
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (out / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
    shutil.copy(HERE / "toy" / "tokenizer.model", out)
    (out / "config.json").write_text(json.dumps(make_config(config), indent=1))
    return total


def main():
    parser = command_parser(__doc__)
    parser.add_argument("shape", choices=sorted(SHAPES))
    parser.add_argument("--out", type=Path, required=True, help="the directory to write")
    parser.add_argument("--shard-gb", type=at_least(1), default=5, help="size of a file, about")
    add_quiet_argument(parser)
    args = parser.parse_args()
    need(not (args.out / "config.json").exists(), f"{args.out} is there already")
    args.out.mkdir(parents=True, exist_ok=True)
    config, most = SHAPES[args.shape], args.shard_gb * 10**9
    with Progress(quiet=args.quiet) as progress:
        total = write(config, args.out, most, progress)
    print(f"wrote {args.out}: {total / 1e9:.1f} GB of random weights")


if __name__ == "__main__":
    cli(main)
