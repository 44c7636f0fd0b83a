"""Eq. 1, 2, 4, 5, 6: the module, the mask, the losses against plain loops, and the predictors file."""
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from conftest import ROOT, tiny_model
from predictor import (Predictor, gumbel_mask, load_predictors, load_tensors, mse_loss, mse_target, ranking_loss, save_predictors,
                       save_tensors, score)
from prune import Schedule


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_module_shape_and_score():
    logits = Predictor(48)(rand(2, 7, 48))
    assert logits.shape == (2, 7, 2) and logits.dtype == torch.float32
    assert torch.equal(score(logits), logits[..., 0] - logits[..., 1])


def ranking_by_loops(s, t, m):
    total = pairs = 0
    for row in range(len(s)):
        for i in range(len(s[0])):
            for j in range(i + 1, len(s[0])):
                if m[row][i] and m[row][j]:
                    sign = (t[row][i] > t[row][j]) - (t[row][i] < t[row][j])
                    total += math.log(1 + math.exp(-(s[row][i] - s[row][j]) * sign))
                    pairs += 1
    return total / pairs


@pytest.mark.parametrize("chunk", [1024, 5, 1])
def test_ranking_loss_equals_a_double_loop(chunk):
    s, t = rand(2, 13).double().requires_grad_(), rand(2, 13, seed=1).abs().double()
    t[0, 3] = t[0, 4]               # a tie
    m = torch.rand(2, 13, generator=torch.Generator().manual_seed(2)) > 0.3
    loss = ranking_loss(s, t, m, chunk=chunk)
    assert abs(loss.item() - ranking_by_loops(s.tolist(), t.tolist(), m.tolist())) < 1e-9
    loss.backward()
    eps = 1e-6
    for i in (0, 7):
        up, down = s.detach().clone(), s.detach().clone()
        up[0, i] += eps
        down[0, i] -= eps
        slope = (ranking_loss(up, t, m) - ranking_loss(down, t, m)) / (2 * eps)
        assert abs(slope - s.grad[0, i]) < 1e-7
    assert (s.grad[~m] == 0).all()


@pytest.mark.parametrize("chunk", [1024, 5])
def test_weighted_pairs_count_by_their_difference(chunk):
    s, t = rand(1, 13).double(), rand(1, 13, seed=1).abs().double()
    mean, total, weight = t.mean().item(), 0.0, 0.0
    for i in range(13):
        for j in range(i + 1, 13):
            w = abs(t[0, i] - t[0, j]).item() / mean
            total += w * math.log(1 + math.exp(-(s[0, i] - s[0, j]).item() * (1 if t[0, i] > t[0, j] else -1)))
            weight += w
    assert abs(ranking_loss(s, t, pairs="saliency", chunk=chunk).item() - total / weight) < 1e-9
    assert abs(ranking_loss(s, 1000 * t, pairs="saliency", chunk=chunk).item() - total / weight) < 1e-9


def test_weighted_pairs_order_by_the_mean_and_equal_pairs_by_the_majority():
    """Two tokens, three rows: the second is slightly ahead twice, the first far ahead once."""
    t = torch.tensor([[1.0, 1.1], [1.0, 1.1], [9.0, 1.0]])
    for pairs, first_wins in (("saliency", True), ("equal", False)):
        s = torch.zeros(1, 2, requires_grad=True)
        ranking_loss(s.expand(3, 2), t, pairs=pairs).backward()
        assert (s.grad[0, 0] < 0) == first_wins                     # descent raises the first token's score


def test_ranking_loss_prefers_the_right_order():
    t = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    assert ranking_loss(t, t) < math.log(2) < ranking_loss(-t, t)
    assert ranking_loss(t[:, :1], t[:, :1]) == 0, "one token has no pair"


def test_mse_target_is_standardised_over_the_masked_tokens():
    s, m = rand(3, 200).exp(), torch.rand(3, 200) > 0.2
    for row in range(3):
        z = mse_target(s, m)[row, m[row]]
        assert abs(z.mean()) < 0.02 and abs(z.std() - 1) < 0.05
    assert torch.allclose(mse_target(s, m), mse_target(1000 * s, m), atol=1e-4), "the scale of a prompt's saliency does not matter"
    assert mse_loss(mse_target(s, m), s, m) == 0
    assert torch.isfinite(mse_target(torch.zeros(1, 5))).all()


def test_gumbel_mask_is_hard_and_its_gradient_soft():
    torch.manual_seed(0)
    logits = rand(4, 5000, 2).requires_grad_()
    mask = gumbel_mask(logits, tau=0.7)
    assert set(mask.detach().unique().tolist()) == {0.0, 1.0}
    kept, p = mask.detach().mean(), torch.softmax(logits, -1)[..., 0].mean()
    assert abs(kept - p) < 0.01, "a token is kept with its softmax probability (Gumbel-max)"
    mask.sum().backward()
    assert torch.isfinite(logits.grad).all() and (logits.grad[..., 0] > 0).float().mean() > 0.99


def test_a_dropped_token_stays_dropped():
    previous = (torch.rand(2, 50) > 0.5).float()
    for seed in range(5):
        torch.manual_seed(seed)
        assert (gumbel_mask(rand(2, 50, 2), previous=previous) * (1 - previous)).sum() == 0


def saved(tmp_path, model, schedule, **notes):
    predictors = nn.ModuleList(Predictor(model.config.dim) for _ in range(schedule.stages))
    path = tmp_path / "predictors.safetensors"
    save_predictors(path, predictors, model.config, schedule, **notes)
    return path, predictors


def test_predictors_file_round_trip(tmp_path, tiny):
    schedule = Schedule(1, 2, 3, 0.7)
    path, predictors = saved(tmp_path, tiny, schedule, reduce="norm_g", prior=0.5)
    again, metadata = load_predictors(path, tiny)
    x = rand(1, 9, 48)
    assert all(torch.equal(a(x), b(x)) for a, b in zip(predictors, again))
    assert metadata["reduce"] == "norm_g" and metadata["prior"] == 0.5 and Schedule(**metadata["schedule"]) == schedule
    assert list(tmp_path.iterdir()) == [path], "no temporary file is left behind"


def test_predictors_of_another_model_or_other_stages_are_refused(tmp_path, tiny):
    path, _ = saved(tmp_path, tiny, Schedule(1, 2, 3, 0.7))
    with pytest.raises(ValueError, match="another model"):
        load_predictors(path, tiny_model(n_heads=2, n_kv_heads=2, head_dim=24))
    for other in (Schedule(2, 2, 3, 0.7), Schedule(1, 1, 3, 0.7), Schedule(1, 2, 2, 0.7)):
        with pytest.raises(ValueError, match=r"after blocks \[1, 3, 5\]"):
            load_predictors(path, tiny, other)
    load_predictors(path, tiny, Schedule(1, 2, 3, 0.5))              # another keep ratio is fine


def test_damaged_predictors_file_is_refused(tmp_path, tiny):
    path, _ = saved(tmp_path, tiny, Schedule(1, 2, 3, 0.7))
    whole = path.read_bytes()
    path.write_bytes(whole[:len(whole) // 2])
    with pytest.raises(ValueError, match="damaged or truncated"):
        load_predictors(path, tiny)
    with pytest.raises(ValueError, match="no such file"):
        load_predictors(tmp_path / "none.safetensors", tiny)


@pytest.mark.parametrize("name, change", [("0.up.weight", lambda t: torch.zeros(2**40, 0)), ("0.up.weight", lambda t: t.to(torch.float8_e4m3fn)),
                                          ("1.up.weight", lambda t: t[:-1].clone()), ("2.down.bias", lambda t: t * math.nan), ("2.norm.bias", lambda t: t.int())])
def test_tensors_that_are_no_predictors_are_refused(tmp_path, tiny, name, change):
    path, _ = saved(tmp_path, tiny, Schedule(1, 2, 3, 0.7))
    tensors, metadata = load_tensors(path)
    save_tensors(path, {**tensors, name: change(tensors[name])}, metadata)
    with pytest.raises(ValueError, match="predictors.safetensors: its tensors are not those of 3 predictors") as e:
        load_predictors(path, tiny)
    save_tensors(path, {k: v for k, v in tensors.items() if k != name}, metadata)
    with pytest.raises(ValueError, match=name):
        load_predictors(path, tiny)
    assert str(tmp_path) in str(e.value)


@pytest.mark.parametrize("new", [{"first": -1}, {"stages": 10**9}, {"stages": 0}, {"keep": math.nan}, {"sink": 2**70}, {"shares": 5}, {"colour": "red"}, {"step": "x"}])
def test_a_damaged_schedule_names_its_file(tmp_path, tiny, new):
    path, _ = saved(tmp_path, tiny, Schedule(1, 2, 3, 0.7))
    tensors, metadata = load_tensors(path)
    save_tensors(path, tensors, {**metadata, "schedule": json.dumps({**json.loads(metadata["schedule"]), **new})})
    with pytest.raises(ValueError, match="predictors.safetensors: the schedule in its metadata is damaged"):
        load_predictors(path, tiny)
    save_tensors(path, tensors, {**metadata, "prior": "nan"})
    with pytest.raises(ValueError, match="predictors.safetensors: the schedule in its metadata is damaged"):
        load_predictors(path, tiny)


def test_a_full_disk_leaves_the_previous_file_and_one_line(tmp_path):
    """A limit on the size of files stands for the disk."""
    path = tmp_path / "p.safetensors"
    save_tensors(path, {"a": torch.ones(5)}, {})
    before = path.read_bytes()
    code = ("import resource, sys, torch\nfrom common import cli\nfrom predictor import save_tensors\n"
            "resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))\ncli(lambda: save_tensors(sys.argv[1], {'a': torch.ones(10000)}, {}))")
    done = subprocess.run([sys.executable, "-c", code, path], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1 and f"{path}: not written" in done.stderr, done.stderr
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path], "no temporary file is left behind"


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (Path("/proc/self/p.safetensors"), tmp_path / "file" / "p.safetensors", tmp_path):
        with pytest.raises(OSError, match=str(path.parent)):
            save_tensors(path, {"a": torch.ones(5)}, {})
    assert [p.name for p in tmp_path.iterdir()] == ["file"] and not list(tmp_path.parent.glob(f".{tmp_path.name}.*"))
