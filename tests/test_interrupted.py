"""What long use and sudden death leave behind: killed runs, and 200 prompts in one process."""
import argparse
import gc
import json
import os
import pty
import random
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import forked
import infer
from conftest import ROOT, command
from lab.scorers import make_scorer
from model import KVCache, Tokenizer
from support.caches import h2o
from support.data import read_rows
from support.files import load_tensors
from support.options import add_pruning_arguments
from support.saved import load_pruning

STATUS = Path("/proc/self/status")


# --------------------------------------------------------------------------------------- kill -9


def killed(words, pattern, least, after):
    """Start a command and kill it; no signal handler runs.

    The kill comes `after` seconds behind the moment when its progress, on a terminal, shows a
    number >= least in place of the group of the pattern.
    """
    terminal, inside = pty.openpty()
    running = forked.start(words, ROOT, os.devnull, os.ttyname(inside))
    seen = os.read(terminal, 1000).decode()
    os.close(inside)
    while not any(int(number) >= least for number in re.findall(pattern, seen)):
        assert running.is_alive(), seen
        seen += os.read(terminal, 1000).decode()
    time.sleep(after)
    running.kill()
    running.join()
    assert running.exitcode == -9
    os.close(terminal)


def finished(words):
    """What a command prints that runs to its end: stdout, stderr."""
    code, out, err = command(*words)
    assert code == 0, err
    return out, err


def assert_same_file(a, b):
    """That two safetensors files hold the same tensors and the same log."""
    (tensors, metadata), (others, notes) = load_tensors(a), load_tensors(b)
    assert tensors.keys() == others.keys()
    for name, tensor in tensors.items():
        assert torch.equal(tensor, others[name]), name
    assert json.loads(metadata.get("log", "0")) == json.loads(notes.get("log", "0"))


@pytest.mark.beside
def test_five_kills_change_nothing_in_training(tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    names = ("predictors.safetensors", "predictors_state.safetensors")
    words = ["train.py", "--steps", 18, "--accum", 1, "--states", "marked", "--cls", 0,
             "--report-rows", 0, "--save-every", 0, "--limit", 5, "--seed", 3]
    resumed = [*words, "--out", broken, "--resume"]
    finished([*words, "--out", whole])
    moments = random.Random(0)
    step = 0
    for _ in range(5):
        step += moments.randint(1, 3)
        killed(resumed, r"(\d+)/18 steps", step, moments.uniform(0, 0.2))
        for name in names:          # whole, whenever the kill came
            load_tensors(broken / name)
    assert "going on after step" in finished(resumed)[0]
    for name in names:
        assert_same_file(whole / name, broken / name)
    assert not list(broken.glob(".*")), "something is left lying about"


@pytest.mark.beside
def test_a_killed_evaluation_goes_on_row_by_row(tmp_path):
    words = ["-m", "lab.quality", "--scorers", "full", "predictor", "random", "--limit", 12,
             "--json"]
    broken = [*words, "--rows-file", tmp_path / "rows"]
    killed(broken, r"(\d+)/12 rows", 4, 0.05)
    with (tmp_path / "rows").open("a") as f:    # as if the kill had come in the middle of a line
        f.write('{"row": 5, "full": {"answ')
    out, err = finished(broken)
    whole, _ = finished([*words, "--rows-file", tmp_path / "again"])
    assert "rows are in" in err
    found, expected = (json.loads(text)["rows"] for text in (out, whole))
    assert found == expected


# ---------------------------------------------------------------------------------------- the soak

SOAK = """
import sys, json
sys.path.insert(0, "tests")
from test_interrupted import said, toy
print(json.dumps([said(*toy(), n) for n in map(int, sys.argv[1:])]))
"""


def toy():
    """-> the toy, its schedule, its scorer, and a long text as token ids."""
    parser = argparse.ArgumentParser()
    add_pruning_arguments(parser)
    words = ["--device", "cpu", "--predictors", "checkpoints/toy"]
    model, schedule, predictors, _ = load_pruning(parser.parse_args(words))
    scorer = make_scorer("predictor", model, schedule, predictors)
    rows = read_rows(ROOT / "checkpoints" / "toy" / "train.jsonl", "heldout")
    text = "\n".join(row["instruction"] for row in rows[:8])
    return model, schedule, scorer, Tokenizer("toy").encode(text)


def said(model, schedule, scorer, ids, number):
    """The answer to prompt `number`, of 6 to 919 tokens, what lived to the last stage, bytes."""
    draw = random.Random(number)
    n = draw.choice((6, 6, 30, 30, 100, 100, 400, 900)) + draw.randrange(20)
    start = draw.randrange(len(ids) - n)
    tokens = torch.tensor([ids[start:start + n]])
    cache = h2o(0.4) if number % 10 == 9 else KVCache
    run = infer.generate(model, tokens, 5, schedule, scorer, cache=cache, eos=())
    return [run.tokens, run.trace[-1].kept[0].tolist(), run.kv_bytes]


def resident_megabytes():
    words = STATUS.read_text().split("VmRSS:")[1].split()
    return int(words[0]) / 1024


def tensor_bytes():
    """The bytes of all tensors that are alive."""
    tensors = [thing for thing in gc.get_objects() if type(thing) is torch.Tensor]
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors)


@pytest.mark.skipif(not STATUS.is_file(), reason="memory is read from /proc")
def test_two_hundred_prompts_in_one_process():
    loaded = toy()
    resident, held, found = [], [], []
    for number in range(200):
        found.append(said(*loaded, number))
        if number % 50 == 49:
            resident.append(resident_megabytes())
            held.append(tensor_bytes())
    assert held[1] == held[2] == held[3], \
        f"bytes of the tensors alive after 50, 100, 150 and 200 prompts: {held}"
    # The caches of a hundred prompts would be 80 MB; the allocator, after hundreds of other
    # tests, moves in steps of some 20 MB.
    assert resident[3] - resident[1] < 40, f"resident megabytes: {resident}"
    assert [said(*loaded, number) for number in range(0, 200, 17)] == found[::17]
    some = (199, 0, 57, 119)
    fresh = subprocess.run([sys.executable, "-c", SOAK, *map(str, some)], cwd=ROOT,
                           capture_output=True, text=True)
    assert json.loads(fresh.stdout) == [found[number] for number in some], fresh.stderr
