"""Two processes on the CPU (gloo) against one: data parallel, FSDP2, tensor parallel; and the arithmetic of a plan.

Run by pytest it starts the real commands under torchrun; started by torchrun itself it is one of two processes (`worker`).
"""
import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from conftest import ROOT, tiny_model  # first: it sets the import path for the worker too
import parallel
from model import SHAPES, Llama, load
from predictor import load_tensors
from prune import Schedule, flops, kv_bytes

TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def run(*words, two=False, fails=False):
    """A command in one process or under torchrun -> the JSON object on its last line, or what it wrote to stderr."""
    done = subprocess.run([sys.executable, *(TORCHRUN if two else []), *map(str, words)], cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert (done.returncode != 0) == fails, done.stderr[-3000:]
    return done.stderr if fails else json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    """The losses and the predictors of one process, for a mask without and with noise."""
    folder, found = tmp_path_factory.mktemp("single"), {}
    for mask in ("topk", "gumbel"):
        log = run(*TRAIN, "--mask", mask, "--out", folder / mask)["log"]
        found[mask] = log, load_tensors(folder / mask / "predictors.safetensors")[0]
    return found


TRAIN = ["train.py", "--steps", 3, "--accum", 4, "--limit", 8, "--report-rows", 1, "--json"]


@pytest.mark.parametrize("mask, more", [("gumbel", []), ("topk", ["--shard"])], ids=["data", "shard"])
def test_two_processes_train_as_one(single, mask, more, tmp_path):
    log = run(*TRAIN, "--mask", mask, *more, "--out", tmp_path, two=True)["log"]
    tensors = load_tensors(tmp_path / "predictors.safetensors")[0]
    assert len(log) == 3
    for ours, whole in zip(log, single[mask][0]):
        for name, value in whole.items():
            assert ours[name] == pytest.approx(value, rel=1e-5, abs=1e-5), name
    for name, tensor in single[mask][1].items():
        assert (tensors[name] - tensor).abs().max() < 1e-4, name     # a tenth of one step: Adam divides by the size of gradients near 0


def test_a_stopped_run_of_two_processes_is_finished_by_one(single, tmp_path):
    words = [*TRAIN, "--mask", "topk", "--out", tmp_path]
    running = subprocess.Popen([sys.executable, *TORCHRUN, *map(str, words)], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    seen = ""
    while "step 1/3" not in seen:
        seen += (more := running.stdout.read(1))
        assert more, seen
    running.send_signal(signal.SIGTERM)
    assert running.wait(60) != 0 and "stopped and saved after step" not in seen
    assert 1 <= int(load_tensors(tmp_path / "train_state.safetensors")[1]["step"]) < 3
    log = run(*words, "--resume")["log"]
    assert [entry["loss"] for entry in log] == pytest.approx([entry["loss"] for entry in single["topk"][0]], abs=1e-5)


def test_rows_that_do_not_divide_are_refused(tmp_path):
    assert "--accum 3 rows a step in batches of 1 do not divide among 2 processes" in run("train.py", "--accum", 3, "--out", tmp_path, two=True, fails=True)
    assert "leave out --hold" in run("train.py", "--shard", "--hold", "--out", tmp_path, two=True, fails=True)
    assert "torchrun" in run("train.py", "--shard", fails=True) and "torchrun" in run("infer.py", "--tp", fails=True)
    assert "leave out --tp" in run("infer.py", "--tp", "--scorer", "attention", two=True, fails=True)


def test_tensor_parallel_writes_the_same_text():
    one, two = run("infer.py", "--json"), run("infer.py", "--tp", "--json", two=True)
    for name in ("full", "sdtp"):
        assert one[name]["text"] == two[name]["text"] and one[name]["counts"] == two[name]["counts"] and one[name]["kv_bytes"] == 2 * two[name]["kv_bytes"]
    assert one["stage_of"] == two["stage_of"]


def test_tensor_parallel_measures_the_same_and_goes_on(tmp_path):
    words = ["eval.py", "--scorers", "full", "predictor", "random", "oracle:norm_gx", "predictor+h2o", "--json"]
    one = run(*words, "--limit", 3, "--rows-file", tmp_path / "one")["rows"]
    run(*words, "--limit", 1, "--rows-file", tmp_path / "two", "--tp", two=True)
    two = run(*words, "--limit", 3, "--rows-file", tmp_path / "two", "--tp", two=True)["rows"]
    for a, b in zip(one, two, strict=True):
        assert a["scorer"] == b["scorer"] and a["value"] == pytest.approx(b["value"], abs=1e-5)
    assert len((tmp_path / "two").read_text().splitlines()) == 4


def test_heads_that_do_not_divide_are_refused(monkeypatch):
    monkeypatch.setattr(parallel, "place", lambda: parallel.Place(0, 3))
    with pytest.raises(ValueError, match="4 attention heads do not divide among 3"):
        parallel.tensor_parallel()(tiny_model())
    monkeypatch.setattr(parallel, "place", lambda: parallel.Place(0, 4))
    with pytest.raises(ValueError, match="2 key/value heads do not divide among 4"):
        parallel.tensor_parallel()(tiny_model())


def test_slices_logits_saliency_and_survivors_on_two_processes(tmp_path):
    done = subprocess.run([sys.executable, *TORCHRUN, __file__, tmp_path], cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0 and "both agree" in done.stdout, done.stderr[-3000:]


def test_the_plan_of_70b_on_eight_devices_adds_up():
    config, schedule = SHAPES["llama-3-70b"], Schedule.scaled(80)
    found = parallel.plan(config, 32768, schedule, 8, 6e14, 3e12, 3.5e11)
    with torch.device("meta"):
        empty = Llama(config)
    weights = sum(p.numel() for p in empty.parameters()) * 2
    whole = 2 * 2 * config.vocab * config.dim
    assert found["weights_bytes"] == pytest.approx((weights - whole) / 8 + whole, rel=1e-6)
    counts = schedule.counts(32768, 80)
    whole_everywhere = 2 * 8192 * 128256 + flops(config, counts, schedule=schedule) - flops(config, counts)
    assert found["sdtp"]["compute_s"] == pytest.approx(((flops(config, counts) - 2 * 8192 * 128256) / 8 + whole_everywhere) / 6e14)
    assert found["sdtp"]["kv_bytes"] == kv_bytes(config, counts) / 8
    assert found["full"]["traffic_bytes"] == 80 * 2 * 32768 * 8192 * 2 * 2 * 7 / 8               # blocks, sums, tokens, D, bytes, ring
    assert found["speedup"]["traffic"] == pytest.approx(80 * 32768 / sum(counts), rel=1e-2)      # but for the latency
    assert found["speedup"]["traffic"] < found["speedup"]["prefill"] < found["speedup"]["compute"]


def worker(folder):
    """One of two processes: a tiny checkpoint of every kind, in slices, against the same one whole."""
    import torch.distributed as dist
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor.debug import CommDebugMode

    import golden
    from prune import norm_scorer, prefill
    from saliency import saliency
    parallel.join("cpu")
    rank, world = parallel.place()
    assert world == 2
    for name in ("gqa", "qwen2", "sharded"):
        path = f"{folder}/{name}"
        if rank == 0:
            golden.write_checkpoint(Path(path), name)
        dist.barrier()
        whole = load(path, device="cpu")
        tokens = torch.randint(0, whole.config.vocab, (2, 24), generator=torch.Generator().manual_seed(0))
        for split in (parallel.tensor_parallel, parallel.sharded):
            read = []

            def counting(model, split=split):
                reader = split()(model)

                class Stored:       # what is asked of the file
                    def __init__(self, stored):
                        self.stored = stored

                    def __getitem__(self, part):
                        found = self.stored[part]
                        read.append(found.numel())
                        return found
                return lambda p, stored: reader(p, Stored(stored))
            model = load(path, device="cpu", split=counting)
            in_blocks = sum(p.numel() for p in whole.blocks.parameters())
            kept = sum(p.to_local().numel() if isinstance(p, DTensor) else p.numel() for p in model.parameters())
            assert sum(read) == kept < sum(p.numel() for p in whole.parameters()) - 0.4 * in_blocks, (split, name)
            with torch.no_grad():
                assert (model(tokens) - whole(tokens)).abs().max() < 1e-5, (split, name)
            a, b = (saliency(m, tokens, 16, [1, 2]) for m in (model, whole))
            assert ((a - b).abs() / b.amax(-1, keepdim=True)).max() < 1e-5, (split, name)
            schedule = Schedule(1, 1, 1, 0.5)
            traces = [prefill(m, tokens, schedule, parallel.agreed(norm_scorer()))[2] for m in (model, whole)]
            kept = traces[0][0].kept
            everywhere = [torch.empty_like(kept) for _ in range(2)]
            dist.all_gather(everywhere, kept)
            assert torch.equal(everywhere[0], everywhere[1]) and torch.equal(kept, traces[1][0].kept)
    model = load(path, device="cpu", split=parallel.tensor_parallel())
    with torch.no_grad(), CommDebugMode() as moved:
        model(tokens)
    assert moved.get_total_counts() == 2 * len(model.blocks), moved.get_comm_counts()            # what `plan` reckons with
    print("both agree")


if __name__ == "__main__":
    worker(sys.argv[1])
