"""train.py: what each loss reaches, the masks, resuming after any stop, what must not go on."""
import json
import math
import os
import re
import signal
import sys
from collections import Counter

import pytest
import torch

import forked
import train as T
from conftest import (ROOT, SCHEDULE, batch_of, command, fresh_predictors, random_rows,
                      tiny_model)
from lab import heldout
from model import positions
from prune import Schedule, candidates
from saliency import mark
from support import recompute
from support.data import Example, pad
from support.files import load_tensors, save_tensors
from support.running import micro_batches, remembering
from support.saved import load_predictors
from train import Loss, Recipe, fit, marking, masked_pass, prepare, pruning, rate, train

TERMS = ("cls", "mse", "rank", "distill")


def both_passes(model, predictors, batch, recipe):
    """Marking and pruning of a Batch -> loss, terms, share kept."""
    marks = marking(model, batch, SCHEDULE, recipe)
    return pruning(model, predictors, batch, marks, SCHEDULE, recipe)


def gradients(predictors):
    return [p.grad.clone() for p in predictors.parameters()]


# ------------------------------------------------------------------------------------------ losses


@pytest.mark.parametrize("only", TERMS)
@pytest.mark.parametrize("mask", ["gumbel", "topk"])
def test_each_loss_alone_reaches_every_stage_and_never_the_backbone(tiny, tokens, only, mask):
    alone = Loss(**{name: float(name == only) for name in TERMS})
    predictors = fresh_predictors()
    recipe = Recipe(alone, mask=mask)
    loss, terms, kept = both_passes(tiny, predictors, batch_of(tokens[:1], 48), recipe)
    assert terms == {only: loss.item()}
    loss.backward()
    for stage, p in enumerate(predictors):
        for name, w in p.named_parameters():
            assert torch.isfinite(w.grad).all(), (stage, name)
            # A constant added to all scores changes no ranking, so the ranking loss leaves the
            # last bias alone but for rounding.
            if (only, name) != ("rank", "down.bias"):
                assert (w.grad != 0).any(), (stage, name)
    assert all(p.grad is None for p in tiny.parameters())
    if mask == "topk":
        assert kept == pytest.approx(SCHEDULE.kept(48, 4) / 48)
    else:
        assert 0 < kept < 1


def test_the_loss_is_the_weighted_sum_of_its_terms(tiny, tokens):
    weights = Loss(cls=0.5, mse=2.0, rank=3.0, distill=0.25)
    batch, predictors = batch_of(tokens, 48), fresh_predictors()
    loss, terms, _ = both_passes(tiny, predictors, batch, Recipe(weights))
    assert tuple(terms) == TERMS
    total = sum(getattr(weights, name) * value for name, value in terms.items())
    assert loss.item() == pytest.approx(total, rel=1e-6)


def test_regression_on_marked_states_skips_the_pruning_pass(tiny, tokens, monkeypatch):
    monkeypatch.setattr(T, "masked_pass", None)
    recipe = Recipe(Loss(cls=0.0), states="marked")
    batch = batch_of(tokens, 48)
    _, terms, kept = both_passes(tiny, fresh_predictors(), batch, recipe)
    assert set(terms) == {"mse", "rank"}
    assert kept is None


# ------------------------------------------------------------------------------------------- masks


@pytest.mark.parametrize("mask", ["gumbel", "topk"])
def test_masks_are_hard_cumulative_and_spare_the_protected(tiny, tokens, mask):
    torch.manual_seed(1)
    batch = batch_of(tokens, 48)
    _, _, masks = masked_pass(tiny, fresh_predictors(), batch, SCHEDULE, mask)
    spared = ~candidates(positions(tokens), [48, 48], SCHEDULE)
    assert spared[0].nonzero()[:, 0].tolist() == [0, 1, 2, 3, *range(43, 60)]
    assert len(masks) == 5
    for before, after in zip(masks, masks[1:]):
        assert set(after.unique().tolist()) == {0.0, 1.0}
        assert (after <= before).all()
        assert (after[spared] == 1).all()
    if mask == "topk":
        assert [int(m[0, :48].sum()) for m in masks] == SCHEDULE.counts(48, 6)[:5]


def test_a_dropped_token_gets_no_gradient_through_later_masks(tiny, tokens):
    batch, predictors = batch_of(tokens, 48), fresh_predictors()
    _, pis, masks = masked_pass(tiny, predictors, batch, SCHEDULE)
    droppable = candidates(positions(tokens), [48, 48], SCHEDULE)
    for stage, pi in enumerate(pis):
        gradient, = torch.autograd.grad(masks[stage + 1].sum(), pi, retain_graph=True)
        reached = gradient.abs().sum(-1) > 0
        assert torch.equal(reached, droppable & (masks[stage] == 1))


def test_long_rows_recompute_their_attention_with_the_same_gradients(monkeypatch):
    model, predictors = tiny_model(max_positions=1024), fresh_predictors()
    generator = torch.Generator().manual_seed(1)
    batch = batch_of(torch.randint(0, 90, (1, 520), generator=generator), 500)

    def found():
        predictors.zero_grad()
        x, _, _ = masked_pass(model, predictors, batch, SCHEDULE)
        x[:, 500:].square().sum().backward()
        return gradients(predictors)

    recomputed, calls = found(), []

    def plain(function, *args, use_reentrant):
        calls.append(function)
        return function(*args)

    monkeypatch.setattr(recompute, "checkpoint", plain)
    assert all(torch.equal(a, b) for a, b in zip(recomputed, found()))
    assert len(calls) == len(model.blocks)


# ----------------------------------------------------------------------------------------- batches

UNEQUAL = ((0, 0, 40, 30), (1, 0, 57, 41), (0, 20, 43, 9))      # row, start, end, prompt_len


@pytest.fixture
def unequal(tokens):
    """Three Examples of different length."""
    return [Example(tokens[row, start:end], n) for row, start, end, n in UNEQUAL]


def without_noise(logits, tau, previous):
    """gumbel_mask without its noise, which another batch would draw otherwise."""
    hard = (logits[..., 0] > logits[..., 1]).float()
    return T.straight_through(hard, torch.softmax(logits, -1)[..., 0], previous)


@pytest.mark.parametrize("mask", ["gumbel", "topk"])
@pytest.mark.parametrize("states", ["pruned", "marked"])
@pytest.mark.parametrize("near", [False, True])
def test_a_batch_of_rows_of_different_length_is_the_mean_of_its_rows(tiny, unequal, mask, states,
                                                                     near, monkeypatch):
    """Losses, kept shares and gradients: padding is in none of them."""
    monkeypatch.setattr(T, "gumbel_mask", without_noise)
    recipe = Recipe(Loss(distill=1.0), mask=mask, states=states, pairs="saliency")
    predictors = fresh_predictors(near=near)

    def run(examples):
        predictors.zero_grad()
        batch = pad(examples, "cpu")
        loss, terms, kept = both_passes(tiny, predictors, batch, recipe)
        loss.backward()
        return {**terms, "kept": kept}, gradients(predictors)

    together, gradient = run(unequal)
    alone = [run([e]) for e in unequal]
    for name in (*TERMS, "kept"):
        mean = sum(terms[name] for terms, _ in alone) / 3
        assert together[name] == pytest.approx(mean, rel=1e-4)
    for i, g in enumerate(gradient):
        mean = sum(grads[i] for _, grads in alone) / 3
        assert torch.allclose(g, mean, atol=1e-5)


def test_padding_takes_no_part_in_the_marking(tiny, unequal):
    tokens, prompt_len, lengths = pad(unequal, "cpu")
    _, (together,), _ = mark(tiny, tokens, prompt_len, [2], lengths)
    for b, e in enumerate(unequal):
        n = len(e.tokens)
        _, (alone,), _ = mark(tiny, e.tokens[None], e.prompt_len, [2])
        assert torch.allclose(together[b, :n], alone[0], atol=1e-5)
        assert (together[b, n:] == 0).all()


def test_the_batch_size_does_not_change_the_training(tiny, tmp_path):
    rows, logs = [], []
    for shorter, e in zip(range(0, 18, 3), random_rows(6)):
        rows.append(Example(e.tokens[:40 - shorter], 30 - shorter))
    for batch in (1, 2):
        recipe = Recipe(accum=5, batch=batch, steps=3)
        run = fit(tiny, rows, SCHEDULE, recipe, tmp_path / f"{batch}.safetensors")
        logs.append(run.log)
    for a, b in zip(*logs, strict=True):
        assert a == pytest.approx(b, rel=1e-3)


# --------------------------------------------------------------------------------------- the steps


def short_run(folder, steps=8, weights=Loss(), schedule=SCHEDULE, save_every=120, resume=False,
              **fields):
    """Train for a few steps of two rows -> a finished Run."""
    recipe = Recipe(weights, steps=steps, accum=2, **fields)
    return fit(tiny_model(), random_rows(6), schedule, recipe, folder / "predictors.safetensors",
               save_every=save_every, resume=resume)


def losses_of(run):
    return [entry["loss"] for entry in run.log]


def same_predictors(a, b):
    a, b = (load_tensors(folder / "predictors.safetensors")[0] for folder in (a, b))
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The Run of eight unbroken steps."""
    return short_run(tmp_path_factory.mktemp("whole"))


def test_training_lowers_the_ranking_loss_and_writes_loadable_predictors(tmp_path, tiny):
    run = short_run(tmp_path, 60, Loss(cls=0.0, mse=0.0), states="marked", lr=3e-3)
    losses = losses_of(run)
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])
    predictors, metadata = load_predictors(run.out, tiny, SCHEDULE)
    assert len(predictors) == 4
    assert metadata["reduce"] == "norm_gx"
    assert metadata["steps"] == "60"


@pytest.mark.parametrize("done", [1, 3, 4])
def test_a_training_stops_after_any_step_and_goes_on_with_done(done):
    """train is a generator: nothing happens between two steps, and nothing before the first."""
    model, rows = tiny_model(), random_rows(6)
    recipe = Recipe(steps=5, accum=2, mask="gumbel")
    unbroken, optimizer = prepare(model, SCHEDULE, recipe)
    want = list(train(model, unbroken, optimizer, rows, SCHEDULE, recipe))
    assert [step.number for step in want] == [1, 2, 3, 4, 5]
    predictors, optimizer = prepare(model, SCHEDULE, recipe)
    first = train(model, predictors, optimizer, rows, SCHEDULE, recipe)
    found = [next(first) for _ in range(done)]
    first.close()
    torch.manual_seed(12345)        # what happens in between is no matter
    found += train(model, predictors, optimizer, rows, SCHEDULE, recipe, done=done)
    assert found == want
    for a, b in zip(predictors.parameters(), unbroken.parameters()):
        assert torch.equal(a, b)


def test_a_step_tells_losses_tokens_and_what_is_kept():
    model, recipe = tiny_model(), Recipe(steps=1, accum=2)
    predictors, optimizer = prepare(model, SCHEDULE, recipe)
    step, = train(model, predictors, optimizer, random_rows(6), SCHEDULE, recipe)
    assert step.number == 1
    assert set(step.losses) == {"cls", "mse", "rank", "loss"}
    assert step.tokens == 2 * 40
    assert step.kept == pytest.approx(SCHEDULE.kept(30, 4) / 30)


def test_marks_that_are_remembered_train_the_same(whole, tmp_path, monkeypatch):
    marked = []

    def noting(model, tokens, *args):
        marked.append(tuple(tokens[0].tolist()))
        return mark(model, tokens, *args)

    monkeypatch.setattr(T, "mark", noting)
    recipe = Recipe(steps=8, accum=2)
    run = fit(tiny_model(), random_rows(6), SCHEDULE, recipe, tmp_path / "predictors.safetensors",
              remembering(marking))
    assert losses_of(run) == losses_of(whole)
    assert same_predictors(tmp_path, whole.out.parent)
    assert len(marked) == len(set(marked)) == 6


def test_only_what_is_read_is_remembered(tiny, tokens, monkeypatch):
    """The pruning pass has states of its own; a recipe that reads the marked ones marks again."""
    made = []

    def noting(*args):
        made.append(args)
        return marking(*args)

    marker, batch = remembering(noting), batch_of(tokens[:1], 48)
    pruned, marked = Recipe(), Recipe(states="marked")
    for recipe, times in ((pruned, 1), (pruned, 1), (marked, 2), (marked, 2), (pruned, 2)):
        found = marker(tiny, batch, SCHEDULE, recipe)
        want = marking(tiny, batch, SCHEDULE, recipe)
        assert len(made) == times
        assert (found.states is None) == (times == 1)
        assert all(map(torch.equal, found.saliency, want.saliency))
    assert all(map(torch.equal, found.states, want.states))


def test_remembered_marks_know_where_the_prompt_ends(tiny, tokens):
    """The same text may be divided otherwise into prompt and response."""
    marker, recipe = remembering(marking), Recipe()
    for prompt_len in (48, 20):
        batch = batch_of(tokens[:1], prompt_len)
        found = marker(tiny, batch, SCHEDULE, recipe)
        want = marking(tiny, batch, SCHEDULE, recipe)
        assert torch.equal(found.saliency[0], want.saliency[0])


def test_reports_come_when_they_are_due_and_stand_in_the_log(tmp_path):
    recipe = Recipe(steps=5, accum=2)
    run = fit(tiny_model(), random_rows(6), SCHEDULE, recipe, tmp_path / "predictors.safetensors",
              report=lambda predictors: {"stages": len(predictors)}, report_every=2)
    reports = {entry["step"]: entry["heldout"] for entry in run.log if "heldout" in entry}
    assert reports == dict.fromkeys((2, 4, 5), {"stages": 4})


@pytest.mark.parametrize("steps, said", [
    (6, "read in all: 6 rows 2 times"),
    (5, "read in all: 4 rows 2 times, 2 rows 1 time"),
    (2, "read in all: 4 rows 1 time, 2 rows 0 times"),
])
def test_how_often_each_row_is_read_is_said(tmp_path, capsys, steps, said):
    """Steps of two of six rows."""
    run = short_run(tmp_path, steps, Loss(cls=0.0, mse=0.0), states="marked")
    assert said in capsys.readouterr().out.splitlines()
    reads = Counter()
    for step in range(steps):
        for _, group in micro_batches(step, 6, run.recipe):
            reads.update(group)
    rows = Counter(reads[i] for i in range(6))
    told = re.findall(r"(\d+) rows (\d+) time", said)
    assert rows == {int(times): int(count) for count, times in told}


def test_stages_past_the_last_block_get_no_predictors(tmp_path):
    run = short_run(tmp_path, 1, schedule=Schedule(4, 1, 9, 0.8))
    assert len(run.predictors) == 2
    assert run.schedule == Schedule(4, 1, 2, 0.8)
    with pytest.raises(ValueError, match="no stage of .* stands before the last"):
        short_run(tmp_path, 1, schedule=Schedule(6, 1, 1, 0.8))


@pytest.mark.parametrize("warmup", [0.0, 0.05, 0.1, 0.3, 0.99])
@pytest.mark.parametrize("steps", [1, 2, 3, 10, 25, 60, 90, 100, 1241])
def test_the_learning_rate_rises_to_its_peak_and_falls_to_a_tenth(steps, warmup):
    values = [rate(step, steps, warmup) for step in range(steps)]
    rising = round(warmup * steps)
    up, down = values[:rising], values[rising:]
    assert max(values) == 1.0                       # never above the peak, which is reached
    assert up == pytest.approx([(i + 1) / rising for i in range(rising)])
    middle = [0.55 + 0.45 * math.cos(math.pi * i / len(down)) for i in range(len(down))]
    assert down == pytest.approx(middle)
    assert all(value > 0.1 for value in down)
    if len(down) > 50:
        assert down[-1] < 0.103


# ------------------------------------------------------------------------------------------ resume


class Killed(Exception):
    pass


def test_resume_after_a_kill_gives_the_losses_of_an_unbroken_run(whole, tmp_path, monkeypatch):
    calls, losses = [], T.losses

    def dies(*args):
        calls.append(1)
        if len(calls) == 11:        # in the middle of step 6: steps 1 to 5 are saved
            raise Killed
        return losses(*args)

    monkeypatch.setattr(T, "losses", dies)
    with pytest.raises(Killed):
        short_run(tmp_path, save_every=-1)
    resumed = short_run(tmp_path, resume=True)
    assert resumed.done == 5
    assert losses_of(resumed) == losses_of(whole)
    assert same_predictors(tmp_path, whole.out.parent)


def kill_at(module, name, call):
    """Let this process be killed at the given call of a function."""
    original, calls = getattr(module, name), []

    def dies(*args, **options):
        calls.append(1)
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **options)
    setattr(module, name, dies)


KILLED = """
import os, sys
from pathlib import Path
sys.path[:0] = [".", "tests"]
import train
from test_train import kill_at, short_run
kill_at({where})
short_run(Path(sys.argv[1]), save_every=-1)
"""
MOMENTS = {"in a step": "train, 'losses', 11", "in a save": "os, 'replace', 11",
           "between two files": "os, 'replace', 12"}


@pytest.mark.parametrize("moment", MOMENTS)
def test_resume_after_a_process_was_killed(whole, tmp_path, moment):
    """Whatever moment a kill -9 chooses, in step 6 or while its predictors or state are written."""
    code, _, err = command("-c", KILLED.format(where=MOMENTS[moment]), tmp_path)
    assert code == -signal.SIGKILL, err
    assert load_tensors(tmp_path / "predictors_state.safetensors")[1]["step"] == "5"
    resumed = short_run(tmp_path, resume=True)
    assert losses_of(resumed) == losses_of(whole)
    assert same_predictors(tmp_path, whole.out.parent)


def test_a_run_that_is_asked_to_stop_saves_and_goes_on(whole, tmp_path):
    recipe = Recipe(steps=8, accum=2)
    out = tmp_path / "predictors.safetensors"
    with pytest.raises(KeyboardInterrupt, match="stopped and saved after step 1 of 8"):
        fit(tiny_model(), random_rows(6), SCHEDULE, recipe, out, stop=[signal.SIGTERM])
    resumed = short_run(tmp_path, resume=True)
    assert resumed.done == 1
    assert losses_of(resumed) == losses_of(whole)
    assert same_predictors(tmp_path, whole.out.parent)


@pytest.mark.parametrize("lost", ["missing", "damaged", "of an earlier step"])
def test_a_finished_run_that_is_resumed_writes_lost_predictors_again(whole, tmp_path, lost):
    run = short_run(tmp_path, resume=True)
    if lost == "missing":
        run.out.unlink()
    elif lost == "damaged":
        run.out.write_bytes(run.out.read_bytes()[:1000])
    else:
        short_run(tmp_path / "earlier", 1)
        (tmp_path / "earlier" / run.out.name).rename(run.out)
    resumed = short_run(tmp_path, resume=True)
    assert resumed.done == 8
    assert same_predictors(tmp_path, whole.out.parent)
    assert load_tensors(run.out)[1]["steps"] == "8"


def test_a_finished_run_that_is_resumed_leaves_its_predictors_alone(tmp_path):
    run = short_run(tmp_path, 1)
    run.save(1, prior=0.5)
    before = run.out.read_bytes()
    short_run(tmp_path, 1, resume=True)
    assert run.out.read_bytes() == before


def test_two_runs_that_write_into_one_folder_leave_each_other_alone(tmp_path):
    """Each goes on with its own state."""
    def run(name, seed, steps, **around):
        recipe = Recipe(Loss(cls=0.0, mse=0.0), states="marked", accum=2, seed=seed, steps=3)
        return fit(tiny_model(), random_rows(6), SCHEDULE, recipe,
                   tmp_path / f"{name}.safetensors", **around)

    whole = {name: losses_of(run(name, seed, 3)) for seed, name in enumerate("cd")}
    for seed, name in enumerate("ab"):
        with pytest.raises(KeyboardInterrupt, match="stopped and saved after step 1"):
            run(name, seed, 3, stop=[signal.SIGTERM])
    for seed, name in enumerate("ab"):
        resumed = run(name, seed, 3, resume=True)
        assert resumed.done == 1 and losses_of(resumed) == whole["cd"[seed]]


def test_resuming_from_nothing_is_said(tmp_path, capsys):
    short_run(tmp_path, 1, resume=True)
    state = tmp_path / "predictors_state.safetensors"
    assert f"from the start, there is no {state}" in capsys.readouterr().out


def test_the_state_of_an_earlier_version_is_not_passed_over(tmp_path):
    old = tmp_path / "train_state.safetensors"
    old.touch()
    with pytest.raises(ValueError, match="train_state.safetensors is the state of an earlier"):
        short_run(tmp_path, 1, resume=True)
    assert list(tmp_path.iterdir()) == [old]


def test_resuming_another_run_is_refused(tmp_path):
    short_run(tmp_path, 1)
    for other in ({"steps": 2}, {"steps": 1, "lr": 0.1},
                  {"steps": 1, "schedule": Schedule(1, 1, 2, 0.8)}):
        with pytest.raises(ValueError, match="other settings"):
            short_run(tmp_path, resume=True, **other)


def test_a_damaged_state_stops_the_resume(tmp_path):
    run = short_run(tmp_path, 1)
    tensors, metadata = load_tensors(run.state)
    del tensors["o.3.exp_avg"]
    save_tensors(run.state, tensors, metadata)
    with pytest.raises(ValueError, match="predictors_state.safetensors: damaged training state"):
        short_run(tmp_path, 1, resume=True)


# ------------------------------------------------------------------------------ what must not go on


@pytest.fixture
def two_steps(tmp_path):
    """-> the folder of a run of two steps, and the bytes of its predictors."""
    short_run(tmp_path, 2)
    return tmp_path, (tmp_path / "predictors.safetensors").read_bytes()


def test_a_loss_that_is_not_finite_stops_and_names_the_step(two_steps, monkeypatch):
    folder, saved = two_steps
    monkeypatch.setattr(T, "reduce_saliency", lambda g, x, reduce: g.norm(dim=-1) * float("nan"))
    with pytest.raises(ValueError, match="step 1: stage 1: saliency or score is not finite"):
        short_run(folder, 4)
    assert (folder / "predictors.safetensors").read_bytes() == saved


def test_a_gradient_that_is_not_finite_stops_before_it_reaches_the_predictors(two_steps,
                                                                              monkeypatch):
    folder, saved = two_steps
    # 0, and its gradient is 0 times infinity
    monkeypatch.setattr(T, "ranking_loss", lambda scores, *_, pairs: (0 * scores).sqrt().sum())
    with pytest.raises(ValueError, match="step 1: the gradient is not finite"):
        short_run(folder, 1)
    assert (folder / "predictors.safetensors").read_bytes() == saved
    model, recipe = tiny_model(), Recipe()
    predictors, optimizer = prepare(model, SCHEDULE, recipe)
    before = [p.clone() for p in predictors.parameters()]
    with pytest.raises(ValueError, match="step 1: the gradient is not finite"):
        next(train(model, predictors, optimizer, random_rows(6), SCHEDULE, recipe))
    assert all(torch.equal(p, q) for p, q in zip(predictors.parameters(), before))


@pytest.mark.parametrize("words", [
    ("--lr", "nan"), ("--lr", "0"), ("--tau", "0"), ("--warmup", "2"), ("--rank", "-1"),
    ("--mse", "inf")])
def test_settings_that_can_only_do_harm_are_refused(words, leaves):
    assert "--lr and --tau are positive" in leaves("train.py", *words)


@pytest.mark.parametrize("words, message", [
    (("--data", "none.jsonl"), "no such data file"),
    (("--cls", 0, "--mse", 0, "--rank", 0), "all loss weights are 0"),
    (("--steps", 3, "--epochs", 2), "--steps and --epochs each say how long to train"),
])
def test_bad_input_ends_in_one_line(words, message, leaves):
    ended = leaves("train.py", *words)
    assert ended.startswith("train.py: ")
    assert message in ended
    assert len(ended.splitlines()) == 1


def test_no_rows_in_a_step_are_refused(leaves, capsys):
    assert leaves("train.py", "--accum", 0) == 2
    assert "expected a whole number, at least" in capsys.readouterr().err


# ------------------------------------------------------------------------------------- the command


COMMAND = ("train.py", "--steps", 4, "--accum", 1, "--report-rows", 1, "--calibrate", 1,
           "--save-every", 1000000, "--max-prompt", 420, "--limit", 4, "--json", "--out")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """-> the folder that the command wrote to, and the object that it printed."""
    folder = tmp_path_factory.mktemp("trained")
    code, out, err = command(*COMMAND, folder)
    assert code == 0, err
    return folder, out


def test_the_command_writes_predictors_that_infer_uses(trained):
    folder, out = trained
    log = json.loads(out)["log"]
    assert [entry["step"] for entry in log] == [1, 2, 3, 4]
    assert "nll_sdtp" in log[-1]["heldout"]
    metadata = load_tensors(folder / "predictors.safetensors")[1]
    assert metadata["steps"] == "4"
    assert "prior" in metadata
    code, _, err = command("infer.py", "--predictors", folder / "predictors.safetensors",
                           "--max-new-tokens", 2)
    assert code == 0, err


@pytest.fixture
def signals():
    """Puts back what the command does with signals."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_a_command_stops_while_it_calibrates(signals, leaves, monkeypatch, tmp_path, capsys):
    asked = []

    def nll(*args):
        if not asked:
            os.kill(os.getpid(), signal.SIGTERM)
        asked.append(1)
        return torch.zeros(1, 3)

    monkeypatch.setattr(heldout, "nll", nll)
    ended = leaves("train.py", "--steps", 1, "--accum", 1, "--limit", 3, "--report-rows", 0,
                   "--calibrate", 2, "--states", "marked", "--cls", 0, "--out", tmp_path)
    assert ended == 130
    assert capsys.readouterr().err.splitlines()[-1].startswith("stopped while calibrating")
    assert len(asked) == 1
    assert load_tensors(tmp_path / "predictors.safetensors")[1]["steps"] == "1"


def test_a_stopped_command_saves_and_goes_on_as_if_it_had_not(trained, tmp_path):
    said = tmp_path.with_suffix(".err")
    running = forked.start([*COMMAND, tmp_path], ROOT, os.devnull, said)
    forked.until("read in all", said, running)              # the first step begins
    running.terminate()
    running.join(60)
    assert running.exitcode == 130
    lines = said.read_text().splitlines()
    assert lines.count("stopping after this step; Ctrl-C again: at once") == 1
    assert lines[-1].startswith("stopped and saved after step")
    code, out, err = command(*COMMAND, tmp_path, "--resume")
    assert code == 0, err
    assert "going on after step" in err
    assert json.loads(out)["log"] == json.loads(trained[1])["log"]
    assert same_predictors(tmp_path, trained[0])
