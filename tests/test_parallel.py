"""Two processes on the CPU (gloo) against one: data parallel, FSDP2, tensor parallel.

Run by pytest it starts the real commands, some under torchrun, more with what torchrun would tell
them; started so itself it is one of two processes (`worker`).
"""
import json
import os
import socket
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

# first: it sets the import path of the worker too
import forked
from conftest import ROOT, batch_of, command, tiny_model
from infer import generate
from lab.scorers import norm_scorer
from model import load
from predictor import Predictor
from prune import Schedule, prefill
from saliency import saliency
from support import parallel
from support.files import load_tensors
from support.sampling import sampler
from train import masked_pass

TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
TRAIN = ["train.py", "--steps", 3, "--accum", 4, "--limit", 8, "--report-rows", 1, "--json"]


def alone(*words):
    """A command in one process -> the JSON object, which stands alone on stdout."""
    code, out, err = command(*words)
    assert code == 0, err[-3000:]
    return json.loads(out)


def as_torchrun():
    """What torchrun tells each of two processes: their environments."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    return [{**shared, "RANK": str(i), "LOCAL_RANK": str(i)} for i in range(2)]


def two(*words):
    """A command in two processes, with what torchrun tells them."""
    return command(*words, copies=as_torchrun())


def both(*words):
    """The same as `alone` on two processes; only the first prints."""
    code, out, err = two(*words)
    assert code == 0, err[-3000:]
    return json.loads(out)


def refused(code, out, err):
    """What a command says that fails."""
    assert code != 0
    return err


# -------------------------------------------------------------------------------------- training


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    """{mask: (losses, predictors)} of one process, for a mask without and with noise."""
    folder, found = tmp_path_factory.mktemp("single"), {}
    for mask in ("topk", "gumbel"):
        log = alone(*TRAIN, "--mask", mask, "--out", folder / mask)["log"]
        found[mask] = log, load_tensors(folder / mask / "predictors.safetensors")[0]
    return found


@pytest.mark.parametrize("mask, more", [("gumbel", []), ("topk", ["--shard"])],
                         ids=["data", "shard"])
def test_two_processes_train_as_one(single, mask, more, tmp_path):
    words = [*TRAIN, "--mask", mask, *more, "--out", tmp_path]
    log = (alone(*TORCHRUN, *words) if more else both(*words))["log"]
    want_log, want = single[mask]
    assert len(log) == 3
    for ours, whole in zip(log, want_log, strict=True):
        for name, value in whole.items():
            assert ours[name] == pytest.approx(value, rel=1e-5, abs=1e-5), name
    tensors = load_tensors(tmp_path / "predictors.safetensors")[0]
    for name, tensor in want.items():
        # a tenth of one step: Adam divides by the size of gradients near 0
        assert (tensors[name] - tensor).abs().max() < 1e-4, name


def test_a_stopped_run_of_two_processes_is_finished_by_one(single, tmp_path):
    words = [*map(str, TRAIN), "--mask", "topk", "--out", str(tmp_path)]
    said = [tmp_path / f"err{i}" for i in range(2)]
    running = [forked.start(words, ROOT, os.devnull, err, os.environ | more)
               for err, more in zip(said, as_torchrun())]
    forked.until("read in all", said[0], running[0])        # the first step begins
    for process in running:
        process.terminate()
    for process in running:
        process.join(60)
        assert process.exitcode not in (0, None)
    err = "".join(path.read_text() for path in said)
    assert err.count("stopping after this step") == 1, "the first process alone speaks"
    assert err.count("stopped and saved after step") == 1
    metadata = load_tensors(tmp_path / "predictors_state.safetensors")[1]
    assert 1 <= int(metadata["step"]) < 3
    log = alone(*words, "--resume")["log"]
    want = [entry["loss"] for entry in single["topk"][0]]
    assert [entry["loss"] for entry in log] == pytest.approx(want, abs=1e-5)


@pytest.mark.beside
def test_what_does_not_divide_or_belong_is_refused(tmp_path):
    uneven = refused(*two("train.py", "--accum", 3, "--out", tmp_path))
    assert "--accum 3 rows a step in batches of 1 do not divide among 2 processes" in uneven
    held = refused(*two("train.py", "--shard", "--hold", "--out", tmp_path))
    assert "leave out --hold" in held
    assert "torchrun" in refused(*command("train.py", "--shard"))
    assert "torchrun" in refused(*command("infer.py", "--tp"))
    by_attention = refused(*two("infer.py", "--tp", "--scorer", "attention"))
    assert "leave out --tp" in by_attention


# ------------------------------------------------------------------------------- tensor parallel


@pytest.mark.beside
def test_tensor_parallel_writes_the_same_text():
    words = "infer.py", "--json", "--predictors", "checkpoints/toy"
    one, two = alone(*words), both(*words, "--tp")
    for name in ("full", "sdtp"):
        assert one[name]["text"] == two[name]["text"]
        assert one[name]["counts"] == two[name]["counts"]
        assert one[name]["kv_bytes"] == 2 * two[name]["kv_bytes"]
    assert one["stage_of"] == two["stage_of"]


@pytest.mark.beside
def test_tensor_parallel_answers_a_batch_the_same():
    words = ["-m", "lab.batch", "--batch", 3, "--max-new-tokens", 6, "--json"]
    one, two = alone(*words)["batch"], both(*words, "--tp")["batch"]
    assert [told["texts"] for told in one] == [told["texts"] for told in two]


@pytest.mark.beside
def test_tensor_parallel_measures_the_same_and_goes_on(tmp_path):
    words = ["-m", "lab.quality", "--json", "--scorers", "full", "predictor", "random",
             "oracle:norm_gx", "predictor+h2o"]
    one = alone(*words, "--limit", 3, "--rows-file", tmp_path / "one")["rows"]
    both(*words, "--limit", 1, "--rows-file", tmp_path / "two", "--tp")
    two = both(*words, "--limit", 3, "--rows-file", tmp_path / "two", "--tp")["rows"]
    for a, b in zip(one, two, strict=True):
        assert a["scorer"] == b["scorer"]
        assert a["value"] == pytest.approx(b["value"], abs=1e-5)
    assert len((tmp_path / "two").read_text().splitlines()) == 4


@pytest.mark.parametrize("processes, message", [
    (3, "4 attention heads do not divide among 3"),
    (4, "2 key/value heads do not divide among 4"),
])
def test_heads_that_do_not_divide_are_refused(processes, message, monkeypatch):
    monkeypatch.setattr(parallel, "world_size", lambda: processes)
    with pytest.raises(ValueError, match=message):
        parallel.tensor_parallel()(tiny_model())


def test_one_process_agrees_with_itself(tokens):
    assert parallel.rank() == 0
    assert parallel.world_size() == 1
    assert parallel.first(tokens) is tokens
    assert parallel.agreed(lambda a, b: a + b)(2, 3) == 5
    assert parallel.first_number(7) == 7
    assert parallel.anyone(True) is True
    assert parallel.add_up([], {"loss": 1.0}) == {"loss": 1.0}


# ---------------------------------------------------------------------- inside of two processes


def test_slices_logits_saliency_and_survivors_on_two_processes(tmp_path):
    code, out, err = two(__file__, tmp_path)
    assert code == 0, err[-3000:]
    assert "both agree" in out


class Counted:
    """A stored tensor that notes how many numbers are read of it."""

    def __init__(self, stored, read):
        self.stored, self.read = stored, read

    def __getitem__(self, part):
        found = self.stored[part]
        self.read.append(found.numel())
        return found


def load_counted(path, split):
    """The model in slices, and how many numbers of its file this process has read."""
    read = []

    def counting(model):
        reader = split()(model)
        return lambda parameter, stored: reader(parameter, Counted(stored, read))
    return load(path, device="cpu", split=counting), sum(read)


def local_size(model):
    """How many numbers this process keeps."""
    from torch.distributed.tensor import DTensor
    return sum(p.to_local().numel() if isinstance(p, DTensor) else p.numel()
               for p in model.parameters())


def size(module):
    return sum(p.numel() for p in module.parameters())


def compare(path, split):
    """One checkpoint in slices against the same one whole."""
    whole = load(path, device="cpu")
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, whole.config.vocab, (2, 24), generator=generator)
    model, read = load_counted(path, split)
    assert read == local_size(model) < size(whole) - 0.4 * size(whole.blocks)
    with torch.no_grad():
        assert (model(tokens) - whole(tokens)).abs().max() < 1e-5
    a, b = (saliency(m, tokens, 16, [1, 2]) for m in (model, whole))
    assert ((a - b).abs() / b.amax(-1, keepdim=True)).max() < 1e-5
    schedule, scorer = Schedule(1, 1, 1, 0.5), parallel.agreed(norm_scorer())
    ours, theirs = (prefill(m, tokens, schedule, scorer)[2][0].kept for m in (model, whole))
    everywhere = [torch.empty_like(ours) for _ in range(2)]
    dist.all_gather(everywhere, ours)
    assert torch.equal(*everywhere)
    assert torch.equal(ours, theirs)


def compare_gradients(path, n):
    """What the pruning pass teaches the predictors, with blocks in pieces and whole.

    Above 512 tokens its blocks run once more in the backward pass.
    """
    models = [load(path, device="cpu", split=split) for split in (parallel.sharded(), None)]
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, models[0].config.vocab, (1, n), generator=generator)
    schedule, found = Schedule(1, 1, 2, 0.5), []
    for model in models:
        torch.manual_seed(0)
        predictors = torch.nn.ModuleList(Predictor(model.config.dim) for _ in range(2))
        x, _, masks = masked_pass(model, predictors, batch_of(tokens, n - 4), schedule)
        model.logits(x[:, -4:]).square().mean().backward()
        found.append([masks[-1].detach(), *(p.grad for p in predictors.parameters())])
    for ours, whole in zip(*found, strict=True):
        assert torch.allclose(ours, whole, rtol=1e-4, atol=1e-7)
    assert all(grad.abs().max() > 0 for grad in found[0][1:])


def compare_agreement():
    """What one process says holds for both."""
    rank = parallel.rank()
    assert parallel.first(torch.tensor([rank + 5])).item() == 5
    assert parallel.agreed(lambda x: x + rank)(torch.ones(2)).tolist() == [1, 1]
    assert parallel.first_number(rank + 3) == 3
    assert parallel.anyone(rank == 1) is True
    assert parallel.anyone(False) is False
    used, unused = (torch.nn.Parameter(torch.zeros(2)) for _ in range(2))
    used.grad = torch.full((2,), rank + 1.0)
    if rank == 1:                   # a parameter may get no gradient from some rows
        unused.grad = torch.ones(2)
    sums = parallel.add_up([used, unused], {"loss": rank + 0.5, "tokens": 10})
    assert sums == {"loss": 2.0, "tokens": 20}
    assert used.grad.tolist() == [3, 3]
    assert unused.grad.tolist() == [1, 1]


def compare_drawn(model):
    """All go on with the tokens that the first process draws; alone each would draw others."""
    generator = torch.Generator().manual_seed(parallel.rank())
    pick = parallel.agreed(sampler(5.0, generator))
    made = generate(model, torch.zeros(1, 24, dtype=torch.long), 8, pick=pick, eos=()).tokens
    drawn = [None, None]
    dist.all_gather_object(drawn, made)
    assert drawn[0] == drawn[1]


def worker(folder):
    """One of two processes."""
    import golden
    from torch.distributed.tensor.debug import CommDebugMode
    parallel.join("cpu")
    assert parallel.world_size() == 2
    compare_agreement()
    for name in ("gqa", "qwen2", "qwen3", "bias", "sharded"):
        path = Path(folder) / name
        if parallel.rank() == 0:
            golden.write_checkpoint(path, name)
        dist.barrier()
        for split in (parallel.tensor_parallel, parallel.sharded):
            compare(path, split)
    path = Path(folder) / "long"
    if parallel.rank() == 0:
        case = {**golden.cases()["gqa"], "max_position_embeddings": 1024}
        golden.write_checkpoint(path, "gqa", case=case)
    dist.barrier()
    for n in (24, 520):
        compare_gradients(path, n)
    model = load(path, device="cpu", split=parallel.tensor_parallel())
    with torch.no_grad(), CommDebugMode() as moved:
        model(torch.zeros(2, 24, dtype=torch.long))
    # what lab.plan reckons with
    assert moved.get_total_counts() == 2 * len(model.blocks), moved.get_comm_counts()
    compare_drawn(model)
    print("both agree")


if __name__ == "__main__":
    worker(sys.argv[1])
