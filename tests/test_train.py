"""Eq. 7 and 8: what each loss reaches, the masks, resume after a kill, and a run that stops on NaN."""
import math
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import train as T
from common import Example, output
from conftest import ROOT, tiny_model
from model import masked_attention, positions, visible
from predictor import Predictor, load_predictors, load_tensors, save_tensors
from prune import Schedule

SCHEDULE = Schedule(1, 1, 4, 0.8)


def arguments(*words):
    return T.arguments().parse_args([str(w) for w in words])


def rows(n, length=40, prompt_len=30):
    generator = torch.Generator().manual_seed(4)
    return [Example(torch.randint(0, 90, (length,), generator=generator), prompt_len) for _ in range(n)]


def fresh_predictors(seed=0):
    torch.manual_seed(seed)
    return nn.ModuleList(Predictor(48) for _ in range(4))


@pytest.mark.parametrize("loss", ["cls", "mse", "rank", "distill"])
@pytest.mark.parametrize("mask", ["gumbel", "topk"])
def test_each_loss_alone_reaches_every_stage_and_never_the_backbone(tiny, tokens, loss, mask):
    weights = [w for name in ("cls", "mse", "rank", "distill") for w in (f"--{name}", float(name == loss))]
    predictors = fresh_predictors()
    found, kept = T.losses(tiny, predictors, tokens[:1], 48, SCHEDULE, arguments(*weights, "--mask", mask))
    assert list(found) == [loss] and len(kept) == 4
    found[loss].backward()
    for stage, p in enumerate(predictors):
        for name, w in p.named_parameters():
            # a constant added to all scores changes no ranking, so the ranking loss leaves the last bias alone but for rounding
            assert torch.isfinite(w.grad).all() and ((w.grad != 0).any() or (loss, name) == ("rank", "down.bias")), (stage, name)
    assert all(p.grad is None for p in tiny.parameters())


def test_regression_on_marked_states_skips_the_pruning_pass(tiny, tokens):
    found, kept = T.losses(tiny, fresh_predictors(), tokens, 48, SCHEDULE, arguments("--cls", 0, "--states", "marked"))
    assert set(found) == {"mse", "rank"} and kept == []


@pytest.mark.parametrize("mask", ["gumbel", "topk"])
def test_masks_are_hard_cumulative_and_spare_the_protected(tiny, tokens, mask):
    torch.manual_seed(1)
    _, _, masks = T.masked_pass(tiny, fresh_predictors(), tokens, 48, SCHEDULE, mask)
    spared = ~T.candidates(positions(tokens), [48, 48], SCHEDULE)
    assert spared[0].nonzero()[:, 0].tolist() == [0, 1, 2, 3] + list(range(43, 60))
    for before, after in zip(masks, masks[1:]):
        assert set(after.unique().tolist()) == {0.0, 1.0}
        assert (after <= before).all() and (after[spared] == 1).all()
    if mask == "topk":
        assert [int(m[0, :48].sum()) for m in masks] == SCHEDULE.counts(48, 6)[:5]


@pytest.mark.parametrize("mask", ["gumbel", "topk"])
@pytest.mark.parametrize("states", ["pruned", "marked"])
def test_a_batch_of_rows_of_different_length_is_the_mean_of_its_rows(tiny, tokens, mask, states, monkeypatch):
    """Losses, gradients and saliency: padding is in none of them."""
    keep_probability = lambda logits, tau, previous: T.straight_through((logits[..., 0] > logits[..., 1]).float(), torch.softmax(logits, -1)[..., 0], previous)
    monkeypatch.setattr(T, "gumbel_mask", keep_probability)          # without its noise, which another batch would draw otherwise
    some = [Example(tokens[0, :40], 30), Example(tokens[1, :57], 41), Example(tokens[0, 20:43], 9)]
    args, predictors = arguments("--distill", 1, "--mask", mask, "--states", states, "--pairs", "saliency"), fresh_predictors()

    def run(examples):
        predictors.zero_grad()
        batch, prompt_len, lengths = T.padded(examples, "cpu")
        found, _ = T.losses(tiny, predictors, batch, prompt_len, SCHEDULE, args, lengths=lengths)
        sum(found.values()).backward()
        return {k: v.item() for k, v in found.items()}, [p.grad.clone() for p in predictors.parameters()]

    together, gradient = run(some)
    alone = [run([e]) for e in some]
    for name in ("cls", "mse", "rank", "distill"):
        assert together[name] == pytest.approx(sum(found[name] for found, _ in alone) / 3, rel=1e-4)
    for i, g in enumerate(gradient):
        assert torch.allclose(g, sum(gs[i] for _, gs in alone) / 3, atol=1e-5)
    batch, prompt_len, lengths = T.padded(some, "cpu")
    states, grads, _ = T.mark(tiny, batch, prompt_len, [2], lengths)
    for b, e in enumerate(some):
        _, own, _ = T.mark(tiny, e.tokens[None], e.prompt_len, [2])
        assert torch.allclose(grads[0][b, :len(e.tokens)], own[0][0], atol=1e-5) and (grads[0][b, len(e.tokens):] == 0).all()


def test_the_batch_size_does_not_change_the_training(tiny, tmp_path):
    some = [Example(e.tokens[:40 - 3 * i], 30 - 3 * i) for i, e in enumerate(rows(6))]
    logs = [T.train(tiny, some, [], SCHEDULE, arguments("--accum", 5, "--batch", b, "--steps", 3), tmp_path / f"{b}.safetensors") for b in (1, 2)]
    for a, b in zip(*logs):
        assert a == pytest.approx(b, rel=1e-3)


def test_long_rows_recompute_their_attention_with_the_same_gradients(monkeypatch):
    model, predictors = tiny_model(max_positions=1024), fresh_predictors()
    tokens = torch.randint(0, 90, (1, 520), generator=torch.Generator().manual_seed(1))

    def gradients():
        predictors.zero_grad()
        T.masked_pass(model, predictors, tokens, 500, SCHEDULE)[0][:, 500:].square().sum().backward()
        return [p.grad.clone() for p in predictors.parameters()]
    recomputed, calls = gradients(), []
    monkeypatch.setattr(T, "checkpoint", lambda f, *a, use_reentrant: calls.append(1) or f(*a))
    assert all(torch.equal(a, b) for a, b in zip(recomputed, gradients())) and len(calls) == 5


def test_the_masks_gradient_is_that_of_letting_a_token_in_a_little():
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, h, 9, 12, generator=generator) for h in (4, 2, 2))
    see, keep = visible(torch.arange(9)[None], torch.arange(9)[None]), torch.ones(1, 9)
    keep[0, 3] = 0
    keep.requires_grad_()
    masked_attention(q, k, v, see, keep).square().sum().backward()
    eps = 1e-3
    up = keep.detach().clone()
    up[0, 5] += eps
    down = keep.detach().clone()
    down[0, 5] -= eps
    slope = (masked_attention(q, k, v, see, up).square().sum() - masked_attention(q, k, v, see, down).square().sum()) / (2 * eps)
    assert abs(slope - keep.grad[0, 5]) < 2e-2 * max(1, abs(slope)) and keep.grad[0, 3] != 0


def run(tmp_path, name, *words):
    args = arguments("--accum", 2, "--report-every", 100, "--cls", 1, *words)
    out = tmp_path / name / "predictors.safetensors"
    log = T.train(tiny_model(), rows(6), [], SCHEDULE, args, out)
    return out, [entry["loss"] for entry in log]


def test_training_lowers_the_ranking_loss_and_writes_loadable_predictors(tmp_path, tiny):
    out, losses = run(tmp_path, "a", "--steps", 60, "--cls", 0, "--mse", 0, "--states", "marked", "--lr", 3e-3)
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])
    predictors, metadata = load_predictors(out, tiny, SCHEDULE)
    assert len(predictors) == 4 and metadata["reduce"] == "norm_gx" and metadata["steps"] == "60"


class Killed(Exception):
    pass


def test_resume_after_a_kill_gives_the_losses_of_an_unbroken_run(tmp_path, monkeypatch):
    out, whole = run(tmp_path, "whole", "--steps", 8)
    calls = 0
    original = T.losses

    def dies(*a):
        nonlocal calls
        calls += 1
        if calls == 11:             # in the middle of step 6: steps 1 to 5 are saved
            raise Killed
        return original(*a)
    monkeypatch.setattr(T, "losses", dies)
    with pytest.raises(Killed):
        run(tmp_path, "broken", "--steps", 8, "--save-every", 0)
    again, resumed = run(tmp_path, "broken", "--steps", 8, "--resume")
    assert resumed == whole
    a, b = load_tensors(out)[0], load_tensors(again)[0]
    assert all(torch.equal(a[k], b[k]) for k in a)


def kill_at(module, name, call):
    """Let this process be killed at the given call of a function."""
    original, calls = getattr(module, name), []

    def dies(*a, **more):
        calls.append(1)
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*a, **more)
    setattr(module, name, dies)


@pytest.mark.parametrize("where", ["T, 'losses', 11", "os, 'replace', 11", "os, 'replace', 12"], ids=["in a step", "in a save", "between two files"])
def test_resume_after_a_process_was_killed(tmp_path, where):
    """Whatever moment a kill -9 chooses, in step 6 or while its predictors or its state are written."""
    code = f"""import sys; sys.path[:0] = ['.', 'tests']
from test_train import *
kill_at({where})
run(Path({str(tmp_path)!r}), 'broken', '--steps', 8, '--save-every', -1)"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert load_tensors(tmp_path / "broken" / "train_state.safetensors")[1]["step"] == "5"
    out, whole = run(tmp_path, "whole", "--steps", 8)
    again, resumed = run(tmp_path, "broken", "--steps", 8, "--resume")
    assert resumed == whole
    a, b = load_tensors(out)[0], load_tensors(again)[0]
    assert all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("damage", [
    lambda t, m: t.pop("p.0.up.bias"), lambda t, m: t.pop("o.3.exp_avg"), lambda t, m: t.update({"p.1.up.bias": torch.zeros(3)}),
    lambda t, m: t.update({"o.0.exp_avg_sq": -torch.ones(48)}), lambda t, m: t.update({"o.2.step": torch.tensor(-1.0)}),
    lambda t, m: t.update({"o.1.exp_avg": torch.full((48,), math.nan)}), lambda t, m: t.update({"p.2.norm.bias": torch.full((48,), 3e38)}),
    lambda t, m: m.update(step="-1"), lambda t, m: m.update(step="x"), lambda t, m: m.update(log="[" * 100000), lambda t, m: m.update(log="{}")])
def test_a_damaged_training_state_is_refused(tmp_path, damage):
    out, _ = run(tmp_path, "a", "--steps", 1)
    state = out.with_name("train_state.safetensors")
    tensors, metadata = load_tensors(state)
    damage(tensors, metadata)
    save_tensors(state, tensors, metadata)
    with pytest.raises(ValueError, match="train_state.safetensors: damaged training state"):
        run(tmp_path, "a", "--steps", 1, "--resume")


def test_an_unwritable_place_is_known_before_the_training(tmp_path):
    (tmp_path / "file").write_text("")
    for path in ("/proc/self/p.safetensors", tmp_path / "file" / "more"):
        with pytest.raises(OSError, match=str(Path(path).parent)):
            output(path, "predictors.safetensors")
    assert output(tmp_path / "new", "predictors.safetensors") == tmp_path / "new" / "predictors.safetensors"
    assert output(tmp_path / "x.safetensors", "predictors.safetensors").name == "x.safetensors" and (tmp_path / "new").is_dir()


def test_a_disk_that_is_full_at_the_end_of_a_training(tmp_path):
    (tmp_path / "predictors.safetensors").write_bytes(b"the previous one")
    words = [sys.executable, "train.py", "--steps", "1", "--accum", "1", "--report-rows", "0", "--limit", "4", "--out", tmp_path]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (50000, 50000)))
    assert done.returncode == 1 and done.stderr.startswith(f"train.py: {tmp_path}/predictors.safetensors: not written") and len(done.stderr.splitlines()) == 1
    assert (tmp_path / "predictors.safetensors").read_bytes() == b"the previous one" and len(list(tmp_path.iterdir())) == 1


def test_a_stopped_command_saves_and_goes_on_as_if_it_had_not(tmp_path):
    words = [sys.executable, "train.py", "--steps", "4", "--accum", "1", "--report-rows", "0", "--save-every", "1000000", "--max-prompt", "420", "--limit", "4"]
    running = subprocess.Popen([*words, "--out", tmp_path / "broken"], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    seen = ""
    while "step 1/4" not in seen:
        seen += (more := running.stdout.read(1))
        assert more, running.stderr.read()
    running.send_signal(signal.SIGTERM)
    assert running.wait(60) == 1 and "stopped and saved after step" in running.stderr.read()
    for name, more in (("broken", ["--resume"]), ("whole", [])):
        subprocess.run([*words, "--out", tmp_path / name, *more], cwd=ROOT, check=True, capture_output=True)
    a, b = (load_tensors(tmp_path / name / "predictors.safetensors")[0] for name in ("broken", "whole"))
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_a_loss_that_is_not_finite_stops_and_names_the_step(tmp_path, monkeypatch):
    run(tmp_path, "nan", "--steps", 2)
    saved = (tmp_path / "nan" / "predictors.safetensors").read_bytes()
    monkeypatch.setattr(T, "reduce_saliency", lambda g, x, reduce: g.norm(dim=-1) * float("nan"))
    with pytest.raises(ValueError, match="step 1: stage 1: saliency or score is not finite"):
        run(tmp_path, "nan", "--steps", 4)
    assert (tmp_path / "nan" / "predictors.safetensors").read_bytes() == saved


def test_a_gradient_that_is_not_finite_stops_before_it_reaches_the_predictors(tmp_path, monkeypatch):
    run(tmp_path, "nan", "--steps", 2)
    saved = (tmp_path / "nan" / "predictors.safetensors").read_bytes()
    monkeypatch.setattr(T, "ranking_loss", lambda score, *a: (0 * score).sqrt().sum())               # 0, and its gradient is 0 times infinity
    with pytest.raises(ValueError, match="step 1: the gradient is not finite"):
        run(tmp_path, "nan", "--steps", 1)
    assert (tmp_path / "nan" / "predictors.safetensors").read_bytes() == saved


def test_resuming_another_run_is_refused(tmp_path):
    out, _ = run(tmp_path, "a", "--steps", 1)
    args = arguments("--steps", 2, "--resume")
    with pytest.raises(ValueError, match="other settings"):
        T.train(tiny_model(), rows(2), [], Schedule(1, 1, 2, 0.8), args, out)


def test_the_learning_rate_rises_and_falls():
    values = [T.rate(step, 100, 0.1) for step in range(100)]
    assert max(values) == 1.0 and values[0] == 0.1 and values[-1] < 0.11 and values[9:] == sorted(values[9:], reverse=True)


@pytest.mark.parametrize("words", [("--lr", "nan"), ("--lr", "0"), ("--tau", "0"), ("--warmup", "2"), ("--rank", "-1"), ("--mse", "inf")])
def test_settings_that_can_only_do_harm_are_refused(words, monkeypatch):
    monkeypatch.setattr("sys.argv", ["train.py", *words])
    with pytest.raises(ValueError, match="--lr and --tau are positive"):
        T.main()
