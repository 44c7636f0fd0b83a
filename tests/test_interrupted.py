"""What long use and sudden death leave behind: runs killed at random moments, and two hundred prompts in one process."""
import gc
import json
import random
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import infer
from common import read_rows
from conftest import ROOT
from model import Tokenizer
from predictor import load_tensors


def killed(words, pattern, least, after):
    """Start a command, kill it (no signal handler runs) `after` seconds behind the moment when it prints the pattern with a number >= least."""
    running = subprocess.Popen([sys.executable, *map(str, words)], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    seen = ""
    while not any(int(number) >= least for number in re.findall(pattern, seen)):
        seen += (more := running.stdout.read(1))
        assert more, seen
    time.sleep(after)
    running.kill()
    assert running.wait() == -9


def finished(words):
    done = subprocess.run([sys.executable, *map(str, words)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_five_kills_change_nothing_in_training(tmp_path):
    words = ["train.py", "--steps", 18, "--accum", 1, "--states", "marked", "--cls", 0, "--report-rows", 0, "--save-every", 0, "--limit", 5, "--seed", 3]
    finished([*words, "--out", tmp_path / "whole"])
    moments, step = random.Random(0), 0
    for _ in range(5):
        step += moments.randint(1, 3)
        killed([*words, "--out", tmp_path / "broken", "--resume"], r"step (\d+)/18", step, moments.uniform(0, 0.2))
        load_tensors(tmp_path / "broken" / "predictors.safetensors")                             # whole, whenever the kill came
        load_tensors(tmp_path / "broken" / "train_state.safetensors")
    assert "going on after step" in finished([*words, "--out", tmp_path / "broken", "--resume"])
    for name in ("predictors", "train_state"):
        (a, x), (b, y) = (load_tensors(tmp_path / run / f"{name}.safetensors") for run in ("whole", "broken"))
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
        assert json.loads(x.get("log", "0")) == json.loads(y.get("log", "0"))
    assert not list((tmp_path / "broken").glob(".*"))                # nor is anything left lying about


def test_a_killed_evaluation_goes_on_row_by_row(tmp_path):
    words = ["eval.py", "--scorers", "full", "predictor", "random", "--limit", 12, "--json"]
    killed([*words, "--rows-file", tmp_path / "rows"], r"(\d+)/12 rows", 4, 0.05)
    with (tmp_path / "rows").open("a") as f:
        f.write('{"row": 5, "full": {"answ')                         # as if the kill had come in the middle of a line
    out = finished([*words, "--rows-file", tmp_path / "rows"])
    assert "rows are in" in out and json.loads(out.splitlines()[-1])["rows"] == json.loads(finished([*words, "--rows-file", tmp_path / "again"]).splitlines()[-1])["rows"]


SOAK = """
import sys, json
sys.path.insert(0, "tests")
from test_interrupted import said, toy
print(json.dumps([said(*toy(), n) for n in map(int, sys.argv[1:])]))
"""


def toy():
    args = infer.argparse.Namespace(**dict.fromkeys(("tp", "predictors", "dtype", "first", "step", "stages", "keep", "sink", "local")), ckpt="toy", device="cpu")
    model, schedule, predictors, _ = infer.load_pruning(args)
    text = "\n".join(row["instruction"] for row in read_rows(ROOT / "checkpoints" / "toy" / "train.jsonl", "heldout")[:8])
    return model, schedule, infer.make_scorer("predictor", model, schedule, predictors), Tokenizer("toy").encode(text)


def said(model, schedule, scorer, ids, number):
    """The answer to prompt `number`, whose length lies between 6 and 900 tokens, and what lived to the last stage."""
    draw = random.Random(number)
    n = draw.choice((6, 30, 100, 400, 900)) + draw.randrange(20)
    at = draw.randrange(len(ids) - n)
    run = infer.generate(model, torch.tensor([ids[at:at + n]]), 5, schedule, scorer, h2o=0.4 if number % 10 == 9 else None, eos=())
    return [run.tokens, run.trace[-1].kept[0].tolist(), run.kv_bytes]


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="memory is read from /proc")
def test_two_hundred_prompts_in_one_process():
    loaded, resident, held, found = toy(), [], [], []
    for number in range(200):
        found.append(said(*loaded, number))
        if number % 50 == 49:
            resident.append(int(Path("/proc/self/status").read_text().split("VmRSS:")[1].split()[0]) / 1024)
            held.append(sum(o.untyped_storage().nbytes() for o in gc.get_objects() if type(o) is torch.Tensor))
    assert held[1] == held[2] == held[3], f"bytes of the tensors alive after 50, 100, 150 and 200 prompts: {held}"
    # the caches of a hundred prompts would be 120 MB; the allocator, after hundreds of other tests, moves in steps of some 20 MB
    assert resident[3] - resident[1] < 40, f"resident megabytes: {resident}"
    assert [said(*loaded, number) for number in range(0, 200, 17)] == found[::17]
    some = (199, 0, 57, 119)
    fresh = subprocess.run([sys.executable, "-c", SOAK, *map(str, some)], cwd=ROOT, capture_output=True, text=True)
    assert json.loads(fresh.stdout) == [found[number] for number in some], fresh.stderr
