"""More than one process on PyTorch's own engine: torchrun --nproc-per-node N before a command.

Three ways to share the work. The loops over blocks stay as they are; only what a Linear or a Block
does inside changes. Without torchrun every function here is that of a single process.

    torchrun --nproc-per-node 8 train.py --accum 8 ...   # data: each process takes rows of a step
    torchrun --nproc-per-node 8 train.py --shard ...     # and frozen blocks lie in N pieces (FSDP2)
    torchrun --nproc-per-node 8 infer.py --tp ...        # tensor parallel: heads are divided
"""
import dataclasses
import os
import sys
from datetime import timedelta

import torch
import torch.distributed as dist

from support.files import need
from support.weights import choose_device


def alone():
    """Whether torchrun has started no other process."""
    return int(os.environ.get("WORLD_SIZE", 1)) == 1


def rank():
    """The number of this process among those that torchrun has started, from 0."""
    return int(os.environ.get("RANK", 0))


def world_size():
    """How many processes have joined."""
    return dist.get_world_size() if dist.is_initialized() else 1


def join(device=None):
    """Meet the processes that torchrun has started -> this one's device; only the first prints.

    Joining a second time changes nothing.
    """
    device = choose_device(device)
    if alone() or dist.is_initialized():
        return device
    if device.type == "cuda":
        number = int(os.environ["LOCAL_RANK"])
        need(number < torch.cuda.device_count(), f"process {number} of this machine has no GPU: "
                                                 f"there are {torch.cuda.device_count()}")
        device = torch.device("cuda", number)
        torch.cuda.set_device(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=timedelta(minutes=30))
    if rank() > 0:
        sys.stdout = open(os.devnull, "w")
    return device


# -------------------------------------------------------------------------- the backbone, in slices


def mesh():
    """All processes in a row; nccl moves between GPUs, gloo between CPUs."""
    from torch.distributed.device_mesh import init_device_mesh
    return init_device_mesh(where(), (world_size(),))


def where():
    """The kind of device that the processes exchange tensors of."""
    return "cuda" if dist.get_backend() == "nccl" else "cpu"


def tensor_parallel():
    """For model.load(split=...): q, k, v, gate, up divided by columns, o and down by rows.

    The partial sums of o and down are added up. Between two such sums every process works on its
    own heads (its caches hold only those) and its own part of the SwiGLU; the residual stream x
    (B, n, D), embedding, norms and head are the same everywhere. Raises ValueError where heads do
    not divide.
    """
    from torch.distributed.tensor.parallel import (ColwiseParallel, RowwiseParallel,
                                                   parallelize_module)
    plan = {name: ColwiseParallel() for name in ("q", "k", "v", "gate", "up")}
    plan |= {name: RowwiseParallel() for name in ("o", "down")}

    def split(model):
        c, W = model.config, world_size()
        for count, what in ((c.n_heads, "attention heads"), (c.n_kv_heads, "key/value heads"),
                            (c.ffn, "columns of the SwiGLU")):
            need(count % W == 0, f"--tp: {count} {what} do not divide among {W} processes")
        row, heads = mesh(), (c.n_heads // W, c.n_kv_heads // W)
        for block in model.blocks:
            parallelize_module(block, row, plan, src_data_rank=None)
            block.c = dataclasses.replace(c, n_heads=heads[0], n_kv_heads=heads[1])
        return read_slice
    return split


def sharded():
    """For model.load(split=...): every block lies in W pieces (FSDP2), gathered while it runs.

    Embedding, last norm and head stay whole everywhere, because the loops over blocks use them on
    their own. All processes have to run the same blocks equally often, or they wait for ever.
    """
    from torch.distributed.fsdp import fully_shard

    def split(model):
        row = mesh()
        for block in model.blocks:
            fully_shard(block, mesh=row, reshard_after_forward=True)
        return read_slice
    return split


def read_slice(parameter, stored):
    """This process's slice of a stored tensor, laid out as `parameter` is."""
    from torch.distributed.tensor import DTensor, Shard
    if not isinstance(parameter, DTensor):
        return stored[:]
    layout = parameter.placements[0]
    if isinstance(layout, Shard):   # as torch.chunk: equal pieces, the last ones shorter or empty
        size = parameter.shape[layout.dim]
        step = -(-size // world_size())
        mine = slice(min(size, rank() * step), min(size, (rank() + 1) * step))
        local = stored[mine] if layout.dim == 0 else stored[:, mine]
    else:
        local = stored[:]
    return DTensor.from_local(local, parameter.device_mesh, parameter.placements, run_check=False,
                              shape=parameter.shape, stride=parameter.stride())


# --------------------------------------------------------------------------------------- agreement


def first(tensor):
    """The first process's tensor, for all of its shape."""
    if world_size() > 1:
        tensor = tensor.contiguous()
        dist.broadcast(tensor, 0)
    return tensor


def agreed(function):
    """A function whose result is the first process's: a scorer, or the choice of a token.

    So all drop and say the same, whatever another device's last bit says.
    """
    return lambda *args: first(function(*args))


def first_number(number):
    """A whole number of the first process, for all."""
    if world_size() == 1:
        return number
    return first(torch.tensor([number], device=where())).item()


def add_up(parameters, numbers):
    """Gradients and named numbers, summed over all processes; one all-reduce.

    Each process has weighed its rows by their share of the step, so sums are means over all rows.
    """
    if world_size() == 1:
        return numbers
    parameters = list(parameters)
    for p in parameters:
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
    values = parameters[0].new_tensor(list(numbers.values()))
    flat = torch.cat([p.grad.flatten() for p in parameters] + [values])
    dist.all_reduce(flat)
    *grads, values = flat.split([p.numel() for p in parameters] + [len(values)])
    for p, grad in zip(parameters, grads):
        p.grad.copy_(grad.view_as(p))
    return dict(zip(numbers, values.tolist()))


def anyone(wish):
    """Whether any process has this wish."""
    if world_size() == 1:
        return wish
    votes = torch.tensor([float(wish)], device=where())
    dist.all_reduce(votes)
    return votes.item() > 0


def mine(groups):
    """This process's part of what all divide among themselves."""
    return groups[rank()::world_size()]
