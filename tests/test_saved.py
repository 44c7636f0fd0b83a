"""support/saved.py and support/files.py: predictors and training states, written and read."""
import json
import math
import resource
from dataclasses import asdict
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

from conftest import command, fresh_predictors, tiny_model
from lab.scorers import SCORERS
from predictor import Predictor
from prune import Schedule, predictor_scorer, prefill
from support.files import load_tensors, output, save_tensors
from support.parsers import infer_parser
from support.saved import load_predictors, load_pruning, load_state, save_predictors, save_state

THREE = Schedule(1, 2, 3, 0.7)


# -------------------------------------------------------------------------------------- predictors


@pytest.fixture
def saved(tmp_path, tiny):
    """-> the path of a predictors file of the tiny model, and what is in it."""
    predictors = nn.ModuleList(Predictor(48) for _ in range(3))
    path = tmp_path / "predictors.safetensors"
    save_predictors(path, predictors, tiny.config, THREE, reduce="norm_g", prior=0.5)
    return path, predictors


def test_predictors_file_round_trip(saved, tiny):
    path, predictors = saved
    again, metadata = load_predictors(path, tiny)
    x = torch.randn(1, 9, 48, generator=torch.Generator().manual_seed(0))
    assert len(again) == 3
    assert all(torch.equal(a(x), b(x)) for a, b in zip(predictors, again))
    assert not any(p.requires_grad for p in again.parameters())
    assert metadata["reduce"] == "norm_g"
    assert metadata["prior"] == 0.5
    assert metadata["schedule"] == asdict(THREE)
    assert list(path.parent.iterdir()) == [path], "no temporary file is left behind"


def test_predictors_of_another_model_are_refused(saved):
    path, _ = saved
    with pytest.raises(ValueError, match="another model"):
        load_predictors(path, tiny_model(n_heads=2, n_kv_heads=2, head_dim=24))


@pytest.mark.parametrize("first, step, stages", [(2, 2, 3), (1, 1, 3), (2, 2, 2), (1, 1, 2),
                                                  (1, 2, 4), (1, 2, 0)])
def test_predictors_of_other_stages_are_refused(saved, tiny, first, step, stages):
    path, _ = saved
    with pytest.raises(ValueError, match=r"after blocks \[1, 3, 5\]"):
        load_predictors(path, tiny, Schedule(first, step, stages, 0.7))


def test_another_keep_ratio_is_fine(saved, tiny):
    path, _ = saved
    load_predictors(path, tiny, Schedule(1, 2, 3, 0.5))


def test_fewer_stages_are_fine(saved, tiny):
    """The paper's SDTP-low: the first predictors score, the others have nothing to do."""
    path, _ = saved
    for stages in (1, 2):
        schedule = Schedule(1, 2, stages, 0.7)
        predictors, _ = load_predictors(path, tiny, schedule)
        prompt = torch.arange(30)[None]
        _, _, trace = prefill(tiny, prompt, schedule, predictor_scorer(predictors))
        assert [stage.block for stage in trace] == [1, 3][:stages]
    for words in (["--stages", "5"], ["--stages", "5", "--scorer", "random"]):
        words += ["--device", "cpu", "--predictors", "checkpoints/toy"]
        args = infer_parser("", SCORERS).parse_args(words)
        model, schedule, _, _ = load_pruning(args)
        assert schedule.after(len(model.blocks)) == [2, 3, 4, 5, 6]


def test_damaged_predictors_file_is_refused(saved, tiny):
    path, _ = saved
    whole = path.read_bytes()
    path.write_bytes(whole[:len(whole) // 2])
    with pytest.raises(ValueError, match="damaged or truncated"):
        load_predictors(path, tiny)
    with pytest.raises(ValueError, match="no such file"):
        load_predictors(path.with_name("none.safetensors"), tiny)


NO_PREDICTORS = [       # a tensor's name, what becomes of it
    ("0.up.weight", lambda t: torch.zeros(2**40, 0)),
    ("0.up.weight", lambda t: t.to(torch.float8_e4m3fn)),
    ("1.up.weight", lambda t: t[:-1].clone()),
    ("2.down.bias", lambda t: t * math.nan),
    ("2.norm.bias", lambda t: t.int()),
]


@pytest.mark.parametrize("name, damaged", NO_PREDICTORS)
def test_tensors_that_are_no_predictors_are_refused(saved, tiny, name, damaged):
    path, _ = saved
    tensors, metadata = load_tensors(path)
    save_tensors(path, {**tensors, name: damaged(tensors[name])}, metadata)
    with pytest.raises(ValueError, match="its tensors are not those of 3 predictors") as e:
        load_predictors(path, tiny)
    assert str(e.value).startswith(f"{path}: ")


@pytest.mark.parametrize("name", ["0.up.weight", "1.up.weight", "2.down.bias", "2.norm.bias"])
def test_a_missing_tensor_is_named(saved, tiny, name):
    path, _ = saved
    tensors, metadata = load_tensors(path)
    del tensors[name]
    save_tensors(path, tensors, metadata)
    with pytest.raises(ValueError, match=name) as e:
        load_predictors(path, tiny)
    assert str(e.value).startswith(f"{path}: ")


DAMAGED_SCHEDULE = "predictors.safetensors: the schedule in its metadata is damaged"


@pytest.mark.parametrize("new", [
    {"first": -1}, {"stages": 10**9}, {"stages": 0}, {"keep": math.nan}, {"sink": 2**70},
    {"shares": 5}, {"colour": "red"}, {"step": "x"}, {"first": 1.5}, {"keep": True}])
def test_a_damaged_schedule_names_its_file(saved, tiny, new):
    path, _ = saved
    tensors, metadata = load_tensors(path)
    schedule = json.dumps({**json.loads(metadata["schedule"]), **new})
    save_tensors(path, tensors, {**metadata, "schedule": schedule})
    with pytest.raises(ValueError, match=DAMAGED_SCHEDULE):
        load_predictors(path, tiny)


@pytest.mark.parametrize("name, value", [
    *(("schedule", value) for value in ("-1", "null", '"x"', "[]", "[1, 2]", "{", "")),
    *(("prior", value) for value in ("nan", "1e7", "x"))])
def test_metadata_of_another_kind_names_its_file(saved, tiny, name, value):
    path, _ = saved
    tensors, metadata = load_tensors(path)
    save_tensors(path, tensors, {**metadata, name: value})
    with pytest.raises(ValueError, match=DAMAGED_SCHEDULE):
        load_predictors(path, tiny)


# ------------------------------------------------------------------------------- a training's state


def one_step(seed=0):
    """Predictors and their optimiser after one step."""
    predictors = fresh_predictors(seed)
    optimizer = torch.optim.AdamW(predictors.parameters())
    x = torch.randn(1, 9, 48, generator=torch.Generator().manual_seed(0))
    sum(p(x).square().sum() for p in predictors).backward()
    optimizer.step()
    return predictors, optimizer


@pytest.fixture
def state(tmp_path):
    """The path of a training state after one step of the run "this run"."""
    path = tmp_path / "predictors_state.safetensors"
    save_state(path, *one_step(), 1, [{"step": 1, "loss": 2.5}], "this run")
    return path


def test_a_training_state_round_trip(state):
    predictors, optimizer = one_step()
    again = fresh_predictors(seed=1)
    new = torch.optim.AdamW(again.parameters())
    assert load_state(state, again, new, "this run") == (1, [{"step": 1, "loss": 2.5}])
    for p, q in zip(predictors.parameters(), again.parameters()):
        assert torch.equal(p, q)
        assert optimizer.state[p].keys() == new.state[q].keys()
        assert all(torch.equal(t, new.state[q][name]) for name, t in optimizer.state[p].items())


def test_the_state_of_another_run_is_refused(state):
    with pytest.raises(ValueError, match="it belongs to a run with other settings"):
        load_state(state, *one_step(), "another run")


def test_a_predictors_file_is_no_training_state(saved):
    path, _ = saved
    with pytest.raises(ValueError, match="predictors.safetensors: not a training state"):
        load_state(path, *one_step(), "this run")


DAMAGED_TENSORS = [     # a tensor's name, what stands in its place; None takes it away
    ("p.0.up.bias", None),
    ("o.3.exp_avg", None),
    ("p.1.up.bias", torch.zeros(3)),
    ("o.0.exp_avg_sq", -torch.ones(48)),
    ("o.2.step", torch.tensor(-1.0)),
    ("o.1.exp_avg", torch.full((48,), math.nan)),
    ("p.2.norm.bias", torch.full((48,), 3e38)),
]
DAMAGED_NOTES = [("step", "-1"), ("step", "x"), ("log", "[" * 100000), ("log", "{}")]


def refused(state):
    with pytest.raises(ValueError, match="predictors_state.safetensors: damaged training state"):
        load_state(state, *one_step(seed=1), "this run")


@pytest.mark.parametrize("name, new", DAMAGED_TENSORS)
def test_a_damaged_tensor_of_a_training_state_is_refused(state, name, new):
    tensors, metadata = load_tensors(state)
    assert name in tensors
    tensors[name] = new
    kept = {key: tensor for key, tensor in tensors.items() if tensor is not None}
    save_tensors(state, kept, metadata)
    refused(state)


@pytest.mark.parametrize("name, new", DAMAGED_NOTES, ids=["below 0", "letter", "deep", "object"])
def test_a_damaged_note_of_a_training_state_is_refused(state, name, new):
    tensors, metadata = load_tensors(state)
    save_tensors(state, tensors, {**metadata, name: new})
    refused(state)


# ---------------------------------------------------------------------------------- the disk itself


def limited(size):
    """For a child process: no file may grow beyond this. It stands for a full disk."""
    return partial(resource.setrlimit, resource.RLIMIT_FSIZE, (size, size))


SAVE = """
import sys, torch
from support.files import save_tensors
from support.options import cli
def main():
    save_tensors(sys.argv[1], {"a": torch.ones(10000)}, {})
cli(main)
"""


def test_a_full_disk_leaves_the_previous_file_and_one_line(tmp_path):
    path = tmp_path / "p.safetensors"
    save_tensors(path, {"a": torch.ones(5)}, {})
    before = path.read_bytes()
    code, _, err = command("-c", SAVE, path, preexec_fn=limited(5000))
    assert code == 1
    assert len(err.splitlines()) == 1, err
    assert f"{path}: not written" in err
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path], "no temporary file is left behind"


def test_a_disk_that_is_full_at_the_end_of_a_training(tmp_path):
    path = tmp_path / "predictors.safetensors"
    path.write_bytes(b"the previous one")
    code, _, err = command("train.py", "--steps", 1, "--accum", 1, "--report-rows", 0,
                           "--limit", 4, "--quiet", "--out", tmp_path,
                           preexec_fn=limited(50000))
    assert code == 1
    assert len(err.splitlines()) == 1, err
    assert err.startswith(f"train.py: {path}: not written")
    assert path.read_bytes() == b"the previous one"
    assert list(tmp_path.iterdir()) == [path]


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (Path("/proc/self/p.safetensors"), tmp_path / "file" / "p.safetensors", tmp_path):
        with pytest.raises(OSError, match=str(path.parent)):
            save_tensors(path, {"a": torch.ones(5)}, {})
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    assert not list(tmp_path.parent.glob(f".{tmp_path.name}.*"))


def test_an_unwritable_place_is_known_before_the_work(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (Path("/proc/self/p.safetensors"), tmp_path / "file" / "more"):
        with pytest.raises(OSError, match=str(path.parent)):
            output(path, "predictors.safetensors")


def test_a_folder_or_a_file_to_write_to(tmp_path):
    folder = tmp_path / "new"
    assert output(folder, "predictors.safetensors") == folder / "predictors.safetensors"
    assert folder.is_dir()
    file = tmp_path / "x.safetensors"
    assert output(file, "predictors.safetensors") == file
