"""More than one process on PyTorch's own engine: put `torchrun --nproc-per-node N` before a command (no paper section).

Three ways to share the work. The loops over blocks in the six modules stay as they are: only what a Linear or a Block does inside
changes.

    torchrun --nproc-per-node 8 train.py --accum 8 ...     # data: every process takes its rows of a step, the gradients are added up
    torchrun --nproc-per-node 8 train.py --shard ...       # the same, and each frozen block lies in N pieces, gathered while it runs (FSDP2)
    torchrun --nproc-per-node 8 infer.py --tp ...          # tensor parallel: every process has its heads and its part of the SwiGLU
    python parallel.py --shape llama-3-70b --devices 8     # what that takes and gives: memory, traffic, times by the floors; loads nothing

Shapes: B rows, n tokens, D hidden, L blocks, W processes.
"""
import argparse
import dataclasses
import json
import os
import sys
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist

from common import at_least, cli
from model import MLP_CHUNK, SHAPES, Config, default_device, find, need
from prune import add_schedule_arguments, flops, kv_bytes, schedule_from


TP = "under torchrun: divide every block's heads and SwiGLU among the processes (tensor parallel)"


class Place(NamedTuple):
    rank: int                       # which
    world: int                      # of how many processes


def place():
    """This process among those that have joined."""
    return Place(dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else Place(0, 1)


def join(device=None):
    """Meet the processes that torchrun has started -> this one's device. Without torchrun it is alone. Only the first one prints."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return device
    device = torch.device(device or default_device())
    if device.type == "cuda":
        number = int(os.environ["LOCAL_RANK"])
        need(number < torch.cuda.device_count(), f"process {number} of this machine has no GPU: there are {torch.cuda.device_count()}")
        device = torch.device("cuda", number)
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(minutes=30))
    if place().rank > 0:
        sys.stdout = open(os.devnull, "w")
    return device


# ------------------------------------------------------------------------------------------- the backbone, in slices


def mesh():
    """All processes in a row; nccl moves between GPUs, gloo between CPUs."""
    from torch.distributed.device_mesh import init_device_mesh
    return init_device_mesh("cuda" if dist.get_backend() == "nccl" else "cpu", (place().world,))


def tensor_parallel():
    """For `model.load(split=...)`: q, k, v, gate and up are divided by columns, o and down by rows, whose partial sums are added up.

    So between two sums every process works on its own heads (its caches hold only those) and its own part of the SwiGLU, and the
    residual stream x (B, n, D), embedding, norms and head are the same everywhere. Raises ValueError where heads do not divide.
    """
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
    plan = {**{name: ColwiseParallel() for name in ("q", "k", "v", "gate", "up")}, **{name: RowwiseParallel() for name in ("o", "down")}}

    def split(model):
        c, W = model.config, place().world
        for count, what in ((c.n_heads, "attention heads"), (c.n_kv_heads, "key/value heads"), (c.ffn, "columns of the SwiGLU")):
            need(count % W == 0, f"--tp: {count} {what} do not divide among {W} processes")
        row = mesh()
        for block in model.blocks:
            parallelize_module(block, row, plan, src_data_rank=None)
            block.c = dataclasses.replace(c, n_heads=c.n_heads // W, n_kv_heads=c.n_kv_heads // W)
        return read_slice
    return split


def sharded():
    """For `model.load(split=...)`: every block's weights lie in W pieces (FSDP2); a block is gathered just before it runs and let go after.

    Embedding, last norm and head stay whole everywhere, because the loops over blocks use them on their own. Every process has to run the
    same blocks equally often, or they wait for each other for ever.
    """
    from torch.distributed.fsdp import fully_shard

    def split(model):
        row = mesh()
        for block in model.blocks:
            fully_shard(block, mesh=row, reshard_after_forward=True)
        return read_slice
    return split


def read_slice(parameter, stored):
    """Of a tensor in a safetensors file (`stored`, not yet read) this process's slice, laid out as `parameter` is."""
    from torch.distributed.tensor import DTensor, Shard
    if not isinstance(parameter, DTensor):
        return stored[:]
    layout, (rank, world) = parameter.placements[0], place()
    if isinstance(layout, Shard):   # as torch.chunk would: equal pieces, the last ones shorter or empty
        size = parameter.shape[layout.dim]
        step = -(-size // world)
        mine = slice(min(size, rank * step), min(size, (rank + 1) * step))
        local = stored[mine] if layout.dim == 0 else stored[:, mine]
    else:
        local = stored[:]
    return DTensor.from_local(local, parameter.device_mesh, parameter.placements, run_check=False, shape=parameter.shape, stride=parameter.stride())


# ------------------------------------------------------------------------------------------------------ agreement


def add_up(parameters, sums, stop):
    """Gradients, losses {name: number} and the wish to stop, of all processes together: -> losses, whether anybody wants to stop.

    One all-reduce a step; each process has weighed its rows by their share of the step, so a sum is the mean over all rows.
    """
    if place().world == 1:
        return sums, stop
    for p in parameters:
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
    grads = [p.grad for p in parameters]
    flat = torch.cat([g.flatten() for g in grads] + [grads[0].new_tensor([*sums.values(), float(stop)])])
    dist.all_reduce(flat)
    for g, total in zip(grads, flat.split([g.numel() for g in grads] + [len(sums) + 1])):
        g.copy_(total.view_as(g))
    *values, stop = flat[-len(sums) - 1:].tolist()
    return dict(zip(sums, values)), stop > 0


def same(tensor):
    """A tensor of the first process, for all of its shape."""
    if place().world > 1:
        tensor = tensor.contiguous()
        dist.broadcast(tensor, 0)
    return tensor


def agreed(scorer):
    """A scorer whose scores are the first process's, so that all drop the same tokens whatever another device's last bit says."""
    if place().world == 1:
        return scorer

    return lambda stage, x, pos: same(scorer(stage, x, pos))


def first_says(number):
    """A whole number of the first process, for all."""
    if place().world == 1:
        return number
    return same(torch.tensor([number], device="cuda" if dist.get_backend() == "nccl" else "cpu")).item()


# ---------------------------------------------------------------------------------------------------- arithmetic


def plan(config, n, schedule, devices, peak, memory, link, latency=15e-6):
    """What tensor parallel inference and sharded training of a shape take on `devices`, in bf16, by arithmetic alone.

    peak FLOP/s, memory bytes/s and link bytes/s (each way) of one device, latency seconds of one all-reduce. Predictors and head are not
    divided. Activations: a block's input, its sum with attention, the norm of that and the result, and a chunk of the SwiGLU. A ring sends 2 (W - 1) / W times the bytes that are added up, and
    (W - 1) / W times those that are gathered. -> bytes, bytes per token and seconds, for both arms.
    """
    W, L, D = devices, config.n_blocks, config.dim
    q, kv = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    block = 2 * (D * (2 * q + 2 * kv + 3 * config.ffn) + 2 * D)                                  # bytes of a block in bf16
    whole = 2 * config.vocab * D * (1 if config.tied else 2)
    sent = lambda tokens: 2 * 2 * D * tokens * 2 * (W - 1) / W       # a block adds up twice, after o and after down
    found = {"n": n, "devices": W, "weights_bytes": block * L / W + whole, "activation_bytes": 2 * D * n * 4 + 2 * min(n, MLP_CHUNK["cuda"]) * config.ffn // W * 3,
             "traffic_per_token_bytes": sent(1) * L, "train_gather_bytes": 2 * block * L * (W - 1) / W}
    for arm, counts in (("full", [n] * L), ("sdtp", schedule.counts(n, L))):
        blocks = flops(config, counts) - 2 * D * config.vocab
        whole_flops = flops(config, counts, schedule=schedule if arm == "sdtp" else None) - blocks
        compute = (blocks / W + whole_flops) / peak
        traffic = sum(map(sent, counts)) / link + 2 * L * latency * (W > 1)
        kv_held = kv_bytes(config, counts) / W
        found[arm] = {"kv_bytes": kv_held, "traffic_bytes": sum(map(sent, counts)), "compute_s": compute, "traffic_s": traffic, "prefill_s": compute + traffic,
                      "decode_s": (block * L / W + whole / (1 if config.tied else 2) + kv_held) / memory + sent(1) * L / link + 2 * L * latency * (W > 1)}
    found["speedup"] = {part: found["full"][f"{part}_s"] / found["sdtp"][f"{part}_s"] for part in ("compute", "traffic", "prefill", "decode")}
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="llama-3-70b", help=f"{', '.join(SHAPES)}, or a checkpoint directory (only its config.json is read)")
    parser.add_argument("--devices", type=at_least(1), default=8, help="W, processes with a device each")
    parser.add_argument("--lengths", type=at_least(1), nargs="+", default=[8192, 32768, 131072], help="prompt lengths")
    parser.add_argument("--peak", type=float, default=600.0, help="TFLOP/s that a large bf16 matmul reaches on one device (the default is a guess for an H100; infer.py --bench measures yours)")
    parser.add_argument("--memory", type=float, default=3000.0, help="GB/s that one device reads from its memory")
    parser.add_argument("--link", type=float, default=350.0, help="GB/s that one device sends to the next while it receives as much (NVLink 4; PCIe 5: 50)")
    parser.add_argument("--latency", type=float, default=15.0, help="microseconds of an all-reduce of next to nothing")
    parser.add_argument("--json", action="store_true", help="print the numbers as one JSON object on the last line")
    add_schedule_arguments(parser)
    args = parser.parse_args()
    need(min(args.peak, args.memory, args.link) > 0 and args.latency >= 0, "--peak, --memory and --link are positive")
    config = SHAPES[args.shape] if args.shape in SHAPES else Config.from_json(find(args.shape) / "config.json")
    need(config.n_heads % args.devices == 0 and config.n_kv_heads % args.devices == 0, f"{config.n_heads} attention and {config.n_kv_heads} key/value heads do not divide among {args.devices} devices")
    schedule = schedule_from(args, config.n_blocks)
    rows = [plan(config, n, schedule, args.devices, args.peak * 1e12, args.memory * 1e9, args.link * 1e9, args.latency * 1e-6) for n in args.lengths]
    first = rows[0]
    print(f"{args.shape} on {args.devices} devices of {args.peak:g} TFLOP/s, {args.memory:g} GB/s, {args.link:g} GB/s to the next; bf16, {len(schedule.after(config.n_blocks))} stages, keep {schedule.keep}\n"
          f"each device: weights {first['weights_bytes'] / 1e9:.1f} GB; sends {first['traffic_per_token_bytes'] / 1e6:.2f} MB a token that passes all blocks\n"
          f"training with --shard: the same {first['weights_bytes'] / 1e9:.1f} GB, and {first['train_gather_bytes'] / 1e9:.0f} GB gathered per device for a forward and its backward: {first['train_gather_bytes'] / 1e9 / args.link:.2f} s, however many rows (--batch) share it\n\n"
          "      N   arm    KV GB   activations GB   prefill s = arithmetic + traffic   decode ms   prefill speed-up (arithmetic, traffic)")
    for row in rows:
        for arm in ("full", "sdtp"):
            r, s = row[arm], row["speedup"]
            print(f"{row['n']:7d}   {arm:4} {r['kv_bytes'] / 1e9:7.2f} {row['activation_bytes'] / 1e9:16.2f} {r['prefill_s']:11.3f} = {r['compute_s']:10.3f} + {r['traffic_s']:7.3f} {1e3 * r['decode_s']:11.2f}"
                  + (f"   {s['prefill']:16.2f}x ({s['compute']:.2f}x, {s['traffic']:.2f}x); decode {s['decode']:.2f}x" if arm == "sdtp" else ""))
    if args.json:
        print(json.dumps({"command": "python " + " ".join(sys.argv), "shape": args.shape, "rows": rows}))


if __name__ == "__main__":
    cli(main)
