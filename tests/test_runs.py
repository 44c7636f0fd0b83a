"""support/runs.py and options.cli: progress, saved files, sudden death, and how commands end."""
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch

import forked
from conftest import ROOT, SCHEDULE, TOY, command, random_rows
from golden import write_shards
from prune import load_predictors
from support import runs
from support.files import load_metadata, load_tensors, save_tensors
from support.options import cli
from train import Recipe, fit

RANKING = Recipe(cls=0, mse=0, states="marked", steps=3, accum=1)


# ---------------------------------------------------------------------------------------- progress


def test_a_pipe_gets_a_plain_line_every_five_seconds(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(runs, "time", SimpleNamespace(monotonic=lambda: now[0]))
    shown = runs.Progress(100, "rows", first=79)
    shown.step()                        # known from an earlier run: its pace does not count
    for _ in range(12):
        now[0] += 1
        shown.step("loss 0.5")
    assert capsys.readouterr().err.splitlines() == [
        f"{80 + n}/100 rows, {20 - n} s left  loss 0.5" for n in (5, 10)]


def test_quiet_and_all_processes_but_the_first_say_nothing(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    list(runs.counted("ab", "rows"))
    assert "2/2 rows" in capsys.readouterr().err
    list(runs.counted("ab", "rows", quiet=True))
    monkeypatch.setenv("RANK", "1")
    list(runs.counted("ab", "rows"))
    assert capsys.readouterr().err == ""


def test_arms_take_turns_there_and_back_and_the_first_round_does_not_count():
    order = []

    def arm(name):
        def run():
            order.append(name)
            return SimpleNamespace(prefill_s=len(order), decode_s=0)
        return run
    times = runs.take_turns({"a": arm("a"), "b": arm("b")}, 3, runs.Progress(quiet=True))
    assert "".join(order) == "baabbaab"
    assert times == {"a": [(3, 0), (6, 0), (7, 0)], "b": [(4, 0), (5, 0), (8, 0)]}


# ----------------------------------------------------------------------------------- what was saved


def changed(path, **metadata):
    """The same file with other metadata."""
    tensors, old = load_tensors(path)
    save_tensors(path, tensors, {**old, **metadata})


@pytest.fixture
def trained(tiny, tmp_path):
    """Predictors and state of a finished training of three steps."""
    out = tmp_path / "predictors.safetensors"
    fit(tiny, random_rows(3), SCHEDULE, RANKING, out, quiet=True)
    return out


BAD = [{"schedule": "[]"}, {"schedule": "{"},
       {"schedule": json.dumps({"first": 1, "step": 1, "stages": 0, "keep": 0.9, "sink": 4,
                                "local": 0.1})}, {"fingerprint": "0123"}]


@pytest.mark.parametrize("metadata", BAD, ids=str)
def test_damaged_metadata_of_predictors_names_its_file(trained, tiny, metadata):
    changed(trained, **metadata)
    with pytest.raises(ValueError, match=str(trained)):
        load_predictors(trained, tiny)


@pytest.mark.parametrize("name, damage", [
    ("0.up.weight", lambda t: t[:-1]), ("0.down.bias", lambda t: t / 0),
    ("1.norm.weight", lambda t: t[None]), ("2.up.bias", None)])
def test_damaged_tensors_of_predictors_name_their_file(trained, tiny, name, damage):
    tensors, metadata = load_tensors(trained)
    tensor = tensors.pop(name)
    save_tensors(trained, tensors | ({name: damage(tensor)} if damage else {}), metadata)
    with pytest.raises(ValueError, match=f"{trained}: damaged predictors"):
        load_predictors(trained, tiny)


@pytest.mark.parametrize("change, what", [
    ({"recipe": Recipe(cls=0, mse=0, states="marked", steps=4, accum=1)}, "recipe"),
    ({"rows": random_rows(2)}, "rows"), ({"notes": {"weights": "others"}}, "model")])
def test_a_run_goes_on_with_its_own_state_alone(trained, tiny, change, what):
    given = {"rows": random_rows(3), "recipe": RANKING, "notes": None, **change}
    with pytest.raises(ValueError, match=f"it belongs to a run with another {what}"):
        fit(tiny, given["rows"], SCHEDULE, given["recipe"], trained, resume=True, quiet=True,
            notes=given["notes"])


@pytest.mark.parametrize("metadata", [{"log": "[]"}, {"step": "x"}, {"settings": "{"}], ids=str)
def test_a_damaged_state_is_refused(trained, tiny, metadata):
    changed(runs.state_file(trained), **metadata)
    with pytest.raises(ValueError, match="damaged training state, --restart begins anew"):
        fit(tiny, random_rows(3), SCHEDULE, RANKING, trained, resume=True, quiet=True)


def test_a_run_that_is_there_is_not_overwritten(trained):
    args = SimpleNamespace(out=str(trained), ckpt="toy", resume=False, restart=False)
    with pytest.raises(ValueError, match="3 of 3 steps done is here: --resume .* --restart"):
        runs.check_free(args)
    for given in ({"resume": True}, {"restart": True}, {"out": str(trained.parent / "other")}):
        assert runs.check_free(SimpleNamespace(**{**vars(args), **given}))


def test_a_finished_run_whose_predictors_are_gone_writes_them_again(trained, tiny):
    before = load_tensors(trained)[0]
    trained.unlink()
    fit(tiny, random_rows(3), SCHEDULE, RANKING, trained, resume=True, quiet=True)
    after = load_tensors(trained)[0]
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.fixture
def copied(tmp_path, monkeypatch):
    """A copy of the toy in a/hf, without predictors -> its folder."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(TOY, "a/hf", ignore=shutil.ignore_patterns("predictors*"))
    return tmp_path / "a" / "hf"


def test_predictors_of_any_name_are_found_where_they_lie(copied):
    """In the checkpoint, where those trained here do not lie, unless others are asked for."""
    args = SimpleNamespace(ckpt="a/hf", predictors=None)
    assert runs.find_predictors(args) == (None, {})
    shutil.copy(TOY / "predictors.safetensors", copied / "passages.safetensors")
    file, metadata = runs.find_predictors(args)
    assert file.name == "passages.safetensors" and metadata["why"] == ""
    shutil.copy(file, copied / "other.safetensors")
    with pytest.raises(ValueError, match="several .* --predictors: other.saf.*, passages.saf"):
        runs.find_predictors(args)
    shutil.copytree(TOY, "out/hf", ignore=shutil.ignore_patterns("[!p]*"))
    shutil.copy(file, copied / "predictors.safetensors")
    file, metadata = runs.find_predictors(args)
    assert str(file) == "out/hf/predictors.safetensors"
    assert metadata["why"] == "trained here; not those of a/hf"
    for asked, found in (("a/hf", "predictors"), ("a/hf/other.safetensors", "other")):
        args.predictors = asked
        file, metadata = runs.find_predictors(args)
        assert (file.parent.name, file.stem, metadata["why"]) == ("hf", found, "asked for")
    args.predictors = "none.safetensors"
    with pytest.raises(ValueError, match="none.safetensors"):
        runs.find_predictors(args)


def test_predictors_say_when_the_weights_are_others(copied, capsys):
    """In a folder of the same name, or replaced in place: a single number of the last block."""
    def told():
        runs.tell_other_weights("p", {"weights": key}, "a/hf")
        return capsys.readouterr().out

    key = runs.weights_key(TOY)
    assert key == runs.load_metadata(TOY / "predictors.safetensors")["weights"]
    assert not told()
    state, _ = load_tensors(copied / "model.safetensors")
    (copied / "model.safetensors").unlink()
    write_shards(copied, state)
    assert not told(), "the same tensors in two files"
    state["model.layers.11.mlp.down_proj.weight"][5, 5] += 1
    write_shards(copied, state)
    assert told().startswith("p were trained for other weights than a/hf holds")


def test_what_was_measured_is_kept_and_belongs_to_one_command(tmp_path):
    path = tmp_path / "rows.jsonl"
    kept = runs.Measured(path, {"command": 1})
    assert kept.get("a", lambda: [1.5]) == [1.5]
    with path.open("a") as file:            # a kill in the middle of a line
        file.write('["abc", {"x"')
    again = runs.Measured(path, {"command": 1})
    assert again.get("a", pytest.fail) == [1.5] and again.get("b", lambda: 2) == 2
    assert runs.Measured(path, {"command": 1}).get("b", pytest.fail) == 2
    with pytest.raises(ValueError, match="belongs to another command"):
        runs.Measured(path, {"command": 2})


# --------------------------------------------------------------------------------------- kill -9


@pytest.mark.beside
def test_five_kills_change_nothing_in_training(tmp_path):
    """Each comes a little after so many steps were saved; the files are whole whenever it does."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    names = ("predictors.safetensors", "predictors_state.safetensors")
    words = ["train.py", "--steps", 18, "--accum", 1, "--states", "marked", "--cls", 0,
             "--report-rows", 0, "--save-every", 0, "--limit", 5, "--seed", 3]
    resumed = [*words, "--out", broken, "--resume"]
    code, _, err = command(*words, "--out", whole)
    assert code == 0, err
    moments, state = random.Random(0), broken / names[1]
    for step in (1, 4, 7, 10, 13):
        running = forked.start(resumed, ROOT, os.devnull, tmp_path / "err")
        while not state.is_file() or int(load_metadata(state)["step"]) < step:
            assert running.is_alive(), (tmp_path / "err").read_text()
            time.sleep(0.01)
        running.join(moments.uniform(0, 0.5))
        running.kill()
        running.join()
        for name in names:
            load_tensors(broken / name)
    code, out, err = command(*resumed)
    assert code == 0 and "0 steps are done" not in out, err
    for name in names:
        (tensors, told), (others, notes) = load_tensors(whole / name), load_tensors(broken / name)
        assert all(torch.equal(tensors[key], others[key]) for key in tensors)
        assert told.get("log") == notes.get("log")
    assert not list(broken.glob(".*")), "something is left lying about"


# ------------------------------------------------------------------------------------ how it ends

START = """
import signal, sys, time
sys.path[:0] = ["."]
from support.options import cli
from support.runs import stop_on_signals

# tests that a script runs in the background would pass on to it that Ctrl-C is ignored
signal.signal(signal.SIGINT, signal.default_int_handler)

def work():
    print("ready", flush=True)
    time.sleep(30)

def train():
    stop_on_signals()
    work()
"""


def interrupted(call, times):
    """Start cli(call) and send SIGINT after each of its next `times` lines -> code, stderr."""
    running = subprocess.Popen([sys.executable, "-c", f"{START}\ncli({call})"], cwd=ROOT,
                               text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert running.stdout.readline() == "ready\n", running.stderr.read()
    seen = ""
    for number in range(times):
        if number:
            seen += running.stderr.readline() + running.stderr.readline()
        running.send_signal(signal.SIGINT)
    _, err = running.communicate(timeout=20)
    return running.returncode, seen + err


@pytest.mark.beside
def test_ctrl_c_is_one_line_and_a_second_one_ends_at_once():
    assert interrupted("work", 1) == (130, "stopped\n")
    asked = "\nstopping after this step; once more: at once\n"
    assert interrupted("train", 2) == (-signal.SIGINT, asked)


@pytest.mark.beside
def test_nobody_reads_on():
    running = subprocess.Popen([sys.executable, "prune.py"], cwd=ROOT, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    running.stdout.close()
    assert running.stderr.read() == "" and running.wait() == 141


def test_no_memory_is_one_line_and_another_fault_stays_a_traceback():
    with pytest.raises(SystemExit, match="not enough memory: take shorter|not enough memory, take"):
        cli(lambda: torch.empty(2**50))
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        cli(lambda: torch.ones(2, 3) @ torch.ones(2, 3))
