"""Two processes on the CPU (gloo) against one: data parallel, FSDP2, tensor parallel.

Run by pytest it starts the real commands, some under torchrun, more with what torchrun would tell
them; started so itself it is one of two processes (`worker`).
"""
import functools
import json
import os
import socket
import sys
import tempfile
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

# first: it sets the import path of the worker too
import forked
from conftest import ROOT, command, tiny_model
from lab.scorers import norm
from model import load
from predictor import Predictor
from prune import Schedule, prefill
from saliency import saliency
from support import processes
from support.files import load_tensors
from support.rows import Example
from train import masked_pass

TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
TRAIN = ["train.py", "--steps", 3, "--accum", 2, "--limit", 3, "--report-rows", 1, "--json"]


def alone(*words, **options):
    """A command in one process -> the JSON object, which stands alone on stdout."""
    code, out, err = command(*words, **options)
    assert code == 0, err[-3000:]
    return json.loads(out)


def as_torchrun():
    """What torchrun tells each of two processes: their environments."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    return [{**shared, "RANK": str(i), "LOCAL_RANK": str(i)} for i in range(2)]


def both(*words):
    """The same as `alone` on two processes; only the first prints."""
    return alone(*words, copies=as_torchrun())


# -------------------------------------------------------------------------------------- training


@functools.cache
def single(mask):
    """The log and the predictors of one process, for a mask without or with noise."""
    with tempfile.TemporaryDirectory() as folder:
        log = alone(*TRAIN, "--mask", mask, "--out", folder)["log"]
        return log, load_tensors(Path(folder, "predictors.safetensors"))[0]


@pytest.mark.beside
def test_two_processes_train_as_one(tmp_path):
    for mask, more in (("gumbel", []), ("topk", ["--shard"])):
        words = [*TRAIN, "--mask", mask, *more, "--out", tmp_path / mask]
        log = (alone(*TORCHRUN, *words) if more else both(*words))["log"]
        want_log, want = single(mask)
        for ours, whole in zip(log, want_log, strict=True):
            heldout = whole.get("heldout", {})
            assert ours.get("heldout", {}) == pytest.approx(heldout, rel=1e-5, abs=1e-5)
            for name in whole.keys() - {"heldout"}:
                assert ours[name] == pytest.approx(whole[name], rel=1e-5, abs=1e-5), name
        assert "heldout" in log[-1]
        tensors = load_tensors(tmp_path / mask / "predictors.safetensors")[0]
        for name, tensor in want.items():
            # a tenth of one step: Adam divides by the size of gradients near 0
            assert (tensors[name] - tensor).abs().max() < 1e-4, name


@pytest.mark.beside
def test_a_stopped_run_of_two_processes_is_finished_by_one(tmp_path):
    words = [*map(str, TRAIN), "--mask", "topk", "--out", str(tmp_path)]
    said = [tmp_path / f"err{i}" for i in range(2)]
    running = [forked.start(words, ROOT, os.devnull, err, os.environ | more)
               for err, more in zip(said, as_torchrun())]
    forked.until("steps are done", said[0], running[0])     # the first step begins
    for process in running:
        process.terminate()
    for process in running:
        process.join(60)
        assert process.exitcode not in (0, None)
    err = "".join(path.read_text() for path in said)
    assert err.count("stopping after this step") == 1, "the first process alone speaks"
    assert err.count("stopped and saved after step") == 1
    log = alone(*words, "--resume")["log"]
    want = [entry["loss"] for entry in single("topk")[0]]
    assert [entry["loss"] for entry in log] == pytest.approx(want, abs=1e-5)


@pytest.mark.beside
def test_what_does_not_divide_or_belong_is_refused(tmp_path):
    train, two = ("train.py", "--out", tmp_path), as_torchrun()
    for words, message, copies in (
            ((*train, "--accum", 3), "3 rows a step do not divide among 2 processes", two),
            ((*train, "--shard", "--hold"), "leave out --hold", two),
            ((*train, "--shard"), "torchrun", [{}]),
            (("infer.py",), "--tp and torchrun", two)):
        code, _, err = command(*words, copies=copies)
        assert code != 0 and message in err


@pytest.mark.parametrize("processes_, message", [
    (3, "4 attention heads do not divide among 3"),
    (4, "2 key/value heads do not divide among 4")])
def test_heads_that_do_not_divide_are_refused(processes_, message, monkeypatch):
    monkeypatch.setattr(processes, "world_size", lambda: processes_)
    with pytest.raises(ValueError, match=message):
        processes.tensor_parallel()(tiny_model())


@pytest.mark.beside
def test_tensor_parallel_writes_the_same_text():
    words = "infer.py", "--json", "--predictors", "checkpoints/toy", "--repeats", 1
    one, two = alone(*words), both(*words, "--tp")
    for name in ("full", "sdtp"):
        assert one[name]["answers"] == two[name]["answers"]
        assert one[name]["counts"] == two[name]["counts"]
    assert one["stage_of"] == two["stage_of"]


# ---------------------------------------------------------------------- inside of two processes


@pytest.mark.beside
def test_slices_logits_saliency_and_survivors_on_two_processes(tmp_path):
    code, out, err = command(__file__, tmp_path, copies=as_torchrun())
    assert code == 0, err[-3000:]
    assert "both agree" in out


def local_size(module):
    """How many numbers this process keeps."""
    return sum(getattr(p, "to_local", lambda: p)().numel() for p in module.parameters())


def compare(path, split):
    """One checkpoint in slices against the same one whole."""
    whole = load(path, device="cpu")
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, whole.config.vocab, (1, 24), generator=generator)
    model = load(path, device="cpu", split=split())
    assert local_size(model) < local_size(whole) - 0.4 * local_size(whole.blocks)
    with torch.no_grad():
        assert (model(tokens) - whole(tokens)).abs().max() < 1e-5
    a, b = (saliency(m, tokens, 16, [1, 2]) for m in (model, whole))
    assert ((a - b).abs() / b.amax(-1, keepdim=True)).max() < 1e-5
    schedule, scorer = Schedule(1, 1, 1, 0.5), processes.agreed(norm)
    (ours, caches, trace), (theirs, full, same) = (prefill(m, tokens, schedule, scorer)
                                                   for m in (model, whole))
    assert torch.equal(trace[0].kept, same[0].kept) and (ours - theirs).abs().max() < 1e-5
    heads = 2 if split is processes.tensor_parallel else 1
    assert full[1].k.shape[1] == heads * caches[1].k.shape[1], "a process caches its own heads"


def compare_gradients(path, n):
    """What the pruning pass teaches the predictors, with blocks in pieces and whole.

    Above 512 tokens its blocks run once more in the backward pass; --shard trains on shorter rows.
    """
    models = [load(path, device="cpu", split=split) for split in (processes.sharded(), None)]
    generator = torch.Generator().manual_seed(0)
    row = Example(torch.randint(0, models[0].config.vocab, (n,), generator=generator), n - 4)
    schedule, found = Schedule(1, 1, 2, 0.5), []
    for model in models:
        torch.manual_seed(0)
        predictors = torch.nn.ModuleList(Predictor(model.config.dim) for _ in range(2))
        x, _, masks = masked_pass(model, predictors, row, schedule)
        model.logits(x[:, -4:]).square().mean().backward()
        found.append([masks[-1].detach(), *(p.grad for p in predictors.parameters())])
    for ours, whole in zip(*found, strict=True):
        assert torch.allclose(ours, whole, rtol=1e-4, atol=1e-7)
    assert all(grad.abs().max() > 0 for grad in found[0][1:])


def compare_agreement():
    """What one process says holds for both."""
    rank = processes.rank()
    assert processes.agreed(lambda x: x + rank)(torch.ones(2)).tolist() == [1, 1]
    assert processes.first_number(rank + 3) == 3
    assert processes.anyone(rank == 1) and not processes.anyone(False)
    used, unused = (torch.nn.Parameter(torch.zeros(2)) for _ in range(2))
    used.grad = torch.full((2,), rank + 1.0)
    if rank == 1:                   # a parameter may get no gradient from some rows
        unused.grad = torch.ones(2)
    sums = processes.add_up([used, unused], {"loss": rank + 0.5, "tokens": 10})
    assert sums == {"loss": 2.0, "tokens": 20}
    assert used.grad.tolist() == [3, 3] and unused.grad.tolist() == [1, 1]


def written(folder, name, **changes):
    """A checkpoint of tests/golden.py, by the first process -> its path."""
    import golden
    path = Path(folder) / name
    if processes.rank() == 0:
        golden.write_checkpoint(path, name, case={**golden.cases()[name], **changes})
    dist.barrier()
    return path


def worker(folder):
    """One of two processes."""
    processes.join("cpu")
    assert processes.world_size() == 2
    compare_agreement()
    for name in ("sharded", "qwen2", "qwen3", "bias"):
        path = written(folder, name)
        for split in (processes.tensor_parallel, processes.sharded):
            compare(path, split)
    compare_gradients(written(folder, "gqa", max_position_embeddings=1024), 520)
    print("both agree")


if __name__ == "__main__":
    worker(sys.argv[1])
