"""lab/speed.py: the arms of `infer.py --bench` beside the device's ceilings and transformers."""
import json

import pytest
import torch

from conftest import SCHEDULE, command, tiny_model
from infer import generate
from lab import speed
from lab.scorers import random_scorer
from lab.speed import Ceilings
from model import FEED_FORWARD_CHUNK, hf_name
from prune import UNPRUNED, flops, kv_bytes, prefill
from support import timing
from support.timing import random_prompt

MEASURED = {"prefill_s", "decode_s", "e2e_s", "before_bytes", "peak_bytes", "kv_bytes"}


@pytest.fixture
def quick(monkeypatch):
    """Ceilings that need no measuring."""
    best = Ceilings(1e12, 1e10)
    monkeypatch.setattr(speed, "ceilings", lambda device, dtype: best)
    return best


def test_both_arms_are_measured(tiny):
    rows = speed.bench(tiny, [40], SCHEDULE, random_scorer(), new=3, repeats=2)
    assert [row["n"] for row in rows] == [40]
    full, sdtp = rows[0]["full"], rows[0]["sdtp"]
    tokens = torch.zeros(1, 40, dtype=torch.long)
    for arm, told in (((None, None), full), ((SCHEDULE, random_scorer()), sdtp)):
        assert MEASURED <= set(told)
        assert told["prefill_s"] > 0
        assert told["decode_s"] > 0
        assert told["kv_bytes"] == generate(tiny, tokens, 3, *arm, eos=()).kv_bytes
    assert sdtp["kv_bytes"] < full["kv_bytes"]
    assert 1 < rows[0]["ideal"] < 3
    assert rows[0]["pruning_s"] > 0
    assert full["of_peak"] > 0


def test_what_is_reached_of_the_ceilings(tiny, quick):
    row = speed.bench(tiny, [40], SCHEDULE, random_scorer(), new=5, repeats=1)[0]
    assert (row["peak_flops"], row["read_bytes_s"]) == quick
    embed = tiny.embed.weight.numel()
    read = 4 * (sum(p.numel() for p in tiny.parameters()) - embed)     # the head is another tensor
    floors = []
    for name, counts in (("full", [40] * 6), ("sdtp", SCHEDULE.counts(40, 6))):
        arm = row[name]
        used = flops(tiny.config, counts, schedule=SCHEDULE if name == "sdtp" else None)
        moved = read + kv_bytes(tiny.config, [n + 2 for n in counts], 4)
        assert arm["flops"] == used
        assert arm["of_peak"] == pytest.approx(used / arm["prefill_s"] / 1e12)
        assert arm["of_read"] == pytest.approx(moved / arm["decode_s"] / 1e10)
        floors.append(used / 1e12 + 4 * moved / 1e10)
    assert row["speedup"]["e2e_by_floors"] == pytest.approx(floors[0] / floors[1])
    assert row["pruning_share"] == row["pruning_s"] / row["sdtp"]["prefill_s"]


def test_all_lengths_are_looked_at_before_the_ceilings(monkeypatch, leaves):
    monkeypatch.setattr(speed, "ceilings", None)
    model = tiny_model(max_positions=64)
    with pytest.raises(ValueError, match="with 62 prompt tokens and 4 new ones position 64 is"):
        speed.bench(model, [20, 62], SCHEDULE, random_scorer(), new=4, repeats=1)
    ended = leaves("lab/speed.py", "--lengths", 64, 2048, "--max-new-tokens", 2)
    assert ended.startswith("speed.py: with 2048 prompt tokens and 2 new ones position 2048 is ")


def test_a_type_that_this_cpu_emulates_is_not_measured(tiny, monkeypatch):
    monkeypatch.setattr(speed, "ceilings", None)
    monkeypatch.setattr(timing, "matmul_s", lambda dtype: 1.0 if dtype == torch.float16 else 0.02,
                        raising=False)
    with pytest.raises(ValueError, match="50 times as long as in float32, so measure with "):
        speed.bench(tiny.half(), [20], SCHEDULE, random_scorer(), new=1, repeats=1)


def test_the_usual_lengths_are_those_that_fit():
    assert speed.usual_lengths(2048, None) == [512, 1024]
    assert speed.usual_lengths(2048, 1) == [512, 1024, 2048]
    assert speed.usual_lengths(8192, None) == list(speed.LENGTHS)
    assert list(speed.usual_lengths(64, None)) == [512]


def test_what_was_measured_is_kept_where_another_length_fails(leaves, capsys, monkeypatch, quick):
    def no_room(model, n):
        if n == 33:
            raise torch.OutOfMemoryError("out of memory.\nTried to allocate 64 GB")
        return random_prompt(model, n)

    monkeypatch.setattr(speed, "random_prompt", no_room)
    ended = leaves("lab/speed.py", "--lengths", 32, 33, "--max-new-tokens", 2, "--repeats", 1,
                   "--profile", "--json")
    assert ended == "speed.py: not measured, see above: prompts of 33 tokens"
    out, err = capsys.readouterr()
    assert "     33  not measured: out of memory. Tried to allocate 64 GB" in err.splitlines()
    found = json.loads(out)
    assert [row["n"] for row in found["bench"]] == [32]
    assert set(found["profile"]) == {"full", "sdtp"} and "gate" in found["products"]


def test_without_decode_nothing_is_said_of_it(tiny, quick):
    row = speed.bench(tiny, [40], SCHEDULE, random_scorer(), new=1, repeats=1)[0]
    for name in ("full", "sdtp"):
        assert row[name]["decode_s"] == row[name]["bytes_s"] == row[name]["of_read"] == 0.0
        assert row[name]["e2e_s"] == row[name]["prefill_s"]


def test_the_stages_timed_are_those_of_a_prefill(tiny, tokens):
    """Selection and drop on their own find what prefill finds; only the states differ."""
    seen = []

    def by_place(stage, x, pos):
        seen.append(pos)
        return pos.float().sin()

    speed.pruning_seconds(tiny, tokens[:1], SCHEDULE, by_place, repeats=1)
    timed = seen[::3]               # each stage is run to warm up, to be timed, and to go on
    trace = prefill(tiny, tokens[:1], SCHEDULE, by_place)[2]
    assert len(timed) == len(trace) == 4
    for pos, stage in zip(timed, trace):
        assert torch.equal(pos, stage.seen)


def test_what_must_be_held_is_what_is_held(tiny, quick):
    row = speed.bench(tiny, [40], SCHEDULE, random_scorer(), new=3, repeats=1)[0]
    for name, schedule in (("full", UNPRUNED), ("sdtp", SCHEDULE)):
        parts = row[name]["must_hold_bytes"]
        caches = prefill(tiny, random_prompt(tiny, 40), schedule, random_scorer(), room=2)[1]
        assert parts["caches"] == sum(2 * cache.k.nbytes for cache in caches)
        assert parts["weights"] == sum(p.nbytes for p in tiny.parameters())
        assert parts["state"] == tiny.embed(random_prompt(tiny, 40)).nbytes
        assert parts["swiglu"] == 3 * 4 * 40 * tiny.config.ffn
        assert parts["weights"] + parts["libraries"] == row[name]["before_bytes"]
    piece = FEED_FORWARD_CHUNK["cpu"]
    assert speed.must_hold(tiny, 2000, UNPRUNED, 1, None)["swiglu"] == 12 * piece * tiny.config.ffn


OTHERS = {"Llama": [{"tied": True}, {"rope_llama3": (8.0, 1.0, 4.0, 48.0)},
                    {"qkv_bias": True, "o_bias": True}],
          "Mistral": [{"window": 11}, {"window": 64}],
          "Qwen2": [{"qkv_bias": True}, {"qkv_bias": True, "tied": True}],
          "Qwen3": [{"qk_norm": True}, {"qk_norm": True, "qkv_bias": True, "o_bias": True}]}


@pytest.mark.parametrize("kind, changes", [(kind, changes) for kind, each in OTHERS.items()
                                           for changes in each])
def test_transformers_runs_on_the_same_weights(kind, changes, quick):
    pytest.importorskip("transformers")
    model = tiny_model(**changes)
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            p.data.normal_(generator=torch.Generator().manual_seed(len(name)))
    assert type(speed.as_transformers(model)).__name__ == f"{kind}ForCausalLM"
    row = speed.bench(model, [40], SCHEDULE, random_scorer(), new=2, repeats=1,
                      vs="transformers")[0]
    assert row["vs"]["logits_differ_by"] < 1e-4
    assert row["vs"]["prefill"] > 0
    assert row["vs"]["decode"] > 0
    assert MEASURED <= set(row["transformers"])
    assert row["transformers"]["flops"] == row["full"]["flops"]
    theirs = dict(speed.as_transformers(model).named_parameters())
    for name, p in model.named_parameters():
        assert theirs[hf_name(name)].data_ptr() == p.data_ptr(), "shared, not copied"


@pytest.mark.parametrize("changes", [{"window": 11, "qkv_bias": True}, {"o_bias": True},
                                     {"qk_norm": True, "window": 11},
                                     {"rope_ramp": (4.0, -1.0, 0.0, 1.0)}])
def test_what_transformers_has_no_model_for_is_refused(changes):
    pytest.importorskip("transformers")
    with pytest.raises(ValueError, match="not compared"):
        speed.as_transformers(tiny_model(**changes))


def test_a_profile_names_the_operators(tiny, capsys):
    found = speed.profile(tiny, 40, SCHEDULE, random_scorer())
    assert list(found) == ["full", "sdtp"]
    for told in found.values():
        operators, shares = zip(*told)
        assert "aten::mm" in operators
        assert list(shares) == sorted(shares, reverse=True)
        assert 0 < sum(shares) <= 1
    assert "full, 40 tokens: " in capsys.readouterr().out


def test_products_are_those_of_one_token(tiny, capsys, monkeypatch):
    seen = []
    monkeypatch.setattr(speed, "clock", lambda device: seen.append(1) or 0.5 * len(seen))
    found = speed.products(tiny, repeats=2)
    assert list(found) == ["q", "k", "v", "o", "gate", "up", "down", "head"]
    # a warm-up asks the clock once, a round twice for each: half a second between
    assert found["q"]["s"] == pytest.approx(6 * 0.5) and found["head"]["s"] == 0.5
    assert found["q"]["bytes_s"] == pytest.approx(4 * 48 * 48 / 0.5)
    assert found["head"]["bytes_s"] == pytest.approx(4 * 48 * 90 / 0.5)
    assert "a token's products alone: 21500.0 ms; q 0.0 GB/s, " in capsys.readouterr().out


@pytest.mark.beside
def test_the_command_writes_what_the_tables_and_the_picture_read(tmp_path):
    pytest.importorskip("matplotlib")
    from lab.tables import speed_arms, speed_ratios, speed_short
    code, out, err = command("-m", "lab.speed", "--lengths", 64, 96, "--max-new-tokens", 2,
                             "--repeats", 1, "--png", tmp_path / "cost.png", "--json")
    assert code == 0, err
    found = json.loads(out)
    assert [row["n"] for row in found["bench"]] == [64, 96]
    assert found["command"].startswith("python -m lab.speed --lengths 64 96 ")
    for table in (speed_arms, speed_ratios, speed_short):
        head, rows = table(found)
        assert len(rows) in (2, 4)
        assert all(len(row) == len(head) for row in rows)
    assert (tmp_path / "cost.png").stat().st_size > 1000


def test_lengths_below_1_are_refused(leaves, capsys):
    assert leaves("lab/speed.py", "--lengths", 0) == 2
    assert "expected a whole number, at least 1" in capsys.readouterr().err
