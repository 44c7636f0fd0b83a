"""lab/plan.py: the arithmetic of several devices, against counts made another way."""
import json
from dataclasses import replace

import pytest
import torch

from conftest import command
from lab.plan import SHAPES, plan
from model import Llama
from prune import Schedule, flops, kv_bytes

CONFIG = SHAPES["llama-3-70b"]
SCHEDULE = Schedule.scaled(80)
HEAD_FLOPS = 2 * CONFIG.dim * CONFIG.vocab


@pytest.fixture
def found():
    return plan(CONFIG, 32768, SCHEDULE, 8, 6e14, 3e12, 3.5e11)


def test_every_weight_lies_somewhere(found):
    with torch.device("meta"):
        empty = Llama(CONFIG)
    weights = 2 * sum(p.numel() for p in empty.parameters())
    blocks = 2 * sum(p.numel() for p in empty.blocks.parameters())
    whole = 2 * 2 * CONFIG.vocab * CONFIG.dim
    assert found["weights_bytes"] == pytest.approx((weights - whole) / 8 + whole, rel=1e-6)
    assert found["train_gather_bytes"] == pytest.approx(2 * blocks * 7 / 8, rel=1e-6)


def test_what_is_not_divided_is_done_everywhere(found):
    counts = SCHEDULE.counts(32768, 80)
    predictors = flops(CONFIG, counts, schedule=SCHEDULE) - flops(CONFIG, counts)
    blocks = flops(CONFIG, counts) - HEAD_FLOPS
    seconds = (blocks / 8 + HEAD_FLOPS + predictors) / 6e14
    assert found["sdtp"]["compute_s"] == pytest.approx(seconds)
    assert found["sdtp"]["kv_bytes"] == kv_bytes(CONFIG, counts) / 8


def test_traffic_is_two_sums_a_block_in_a_ring(found):
    full, sdtp = found["full"], found["sdtp"]
    blocks, sums, bytes_each, ring = 80, 2, 2, 2 * 7 / 8
    traffic = blocks * sums * 32768 * CONFIG.dim * bytes_each * ring
    assert full["traffic_bytes"] == traffic
    assert full["traffic_s"] == pytest.approx(traffic / 3.5e11 + 160 * 15e-6)
    assert full["prefill_s"] == pytest.approx(full["compute_s"] + full["traffic_s"])
    gain = found["speedup"]
    share = sum(SCHEDULE.counts(32768, 80)) / (80 * 32768)
    assert sdtp["traffic_bytes"] == pytest.approx(share * traffic)
    assert gain["traffic"] == pytest.approx(1 / share, rel=1e-2)        # but for the latency
    assert gain["traffic"] < gain["prefill"] < gain["compute"]


def test_a_tied_head_is_held_once():
    small = Schedule.scaled(32)
    config = SHAPES["mistral-7b"]
    tied = replace(config, tied=True)
    one, two = (plan(c, 4096, small, 4, 6e14, 3e12, 3.5e11) for c in (tied, config))
    head = 2 * config.vocab * config.dim
    assert two["weights_bytes"] - one["weights_bytes"] == head
    assert two["full"]["decode_s"] == one["full"]["decode_s"]           # read once either way


def test_the_command_prints_the_plan(found):
    code, out, err = command("-m", "lab.plan", "--lengths", 32768, "--json")
    assert code == 0, err
    told = json.loads(out)
    assert told["command"] == "python -m lab.plan --lengths 32768 --json"
    assert told["rows"] == [found]
    assert "weights 21.3 GB; sends 4.59 MB a token" in err
    assert "1.62x (1.65x, 1.55x); decode 1.02x" in err


@pytest.mark.parametrize("words, message", [
    (("--devices", 3), "64 attention and 8 key/value heads do not divide among 3 devices"),
    (("--link", 0), "--peak, --memory and --link are positive"),
    (("--shape", "llama-1"), "no checkpoint 'llama-1'"),
])
def test_what_cannot_be_is_refused_in_one_line(words, message, leaves):
    ended = leaves("lab/plan.py", *words)
    assert message in ended
    assert len(ended.splitlines()) == 1


def test_one_device_has_no_plan(leaves, capsys):
    assert leaves("lab/plan.py", "--devices", 1) == 2
    assert "at least 2" in capsys.readouterr().err
