"""What is printed and drawn: the page of survivors, Figure 1, Table 2, colours."""
import json
import re
from types import SimpleNamespace

import pytest
import torch

from conftest import SCHEDULE
from prune import Stage, local_tokens, prefill, protected
from support import show

HOSTILE = ["</script><script>document.title='broken out'</script>", "<!--", "]]>",
           "\u2028\"'\\", "&amp;", "\n\n", " word", "<s>"]
READ = {"full": {"answers": [{"question": "<!--", "text": "</script>", "expected": HOSTILE[0]}]}}
FIXED = protected(torch.arange(60), 60, SCHEDULE).tolist()


@pytest.fixture
def page(tiny, tokens, tmp_path):
    """-> the page's text, its trace and stage_of: 60 tokens, four stages, hostile ones first."""
    generator = torch.Generator().manual_seed(1)
    _, _, trace = prefill(tiny, tokens, SCHEDULE,
                          lambda s, x, pos: torch.rand(pos.shape, generator=generator))
    stage_of = show.dropped_at(trace, 60)
    pieces = HOSTILE + [f" w{i}" for i in range(60 - len(HOSTILE))]
    show.survivors_page(tmp_path / "page.html", pieces, stage_of, trace, FIXED, READ)
    return (tmp_path / "page.html").read_text(encoding="utf-8"), trace, stage_of


def data_of(text):
    return json.loads(re.search(r"^const data = (.*);$", text, re.M)[1])


def test_the_page_loads_nothing_and_no_prompt_breaks_out(page):
    text, _, stage_of = page
    assert text.count("</script>") == text.count("<script>") == 1
    assert "<!--" not in text.split("<script>")[1]
    assert "default-src 'none'" in text
    loads = r"://|\b(src|href|srcset)\s*=|\burl\(|@import|\bfetch\(|innerHTML|document\.write"
    assert not re.search(loads, text)
    data = data_of(text)
    assert [t["piece"] for t in data["tokens"]][:len(HOSTILE)] == HOSTILE
    assert [t["stage"] for t in data["tokens"]] == stage_of
    assert data["answers"] == [{"arm": "full", **READ["full"]["answers"][0]}]
    counts = SCHEDULE.counts(60, 6)
    wanted = [(b + 1, counts[b], counts[b + 1]) for b in range(4)]
    assert [(s["block"], s["seen"], s["kept"]) for s in data["stages"]] == wanted


def test_ranks_say_who_is_kept(page):
    """Among the tokens that compete, exactly the first ranks survive a stage."""
    text, trace, _ = page
    tokens = data_of(text)["tokens"]
    fixed = {i for i, t in enumerate(tokens) if t["fixed"]}
    assert fixed == {*range(4), *range(60 - local_tokens(60, 0.1), 60)}
    for s, stage in enumerate(trace):
        ranks = {i: t["ranks"][s] for i, t in enumerate(tokens) if s < len(t["ranks"])}
        assert sorted(ranks.values()) == list(range(1, stage.seen.shape[1] - len(fixed) + 1))
        slots = stage.kept.shape[1] - len(fixed)
        best = {i for i, rank in ranks.items() if rank <= slots}
        assert best == set(stage.kept[0].tolist()) - fixed
    for t in tokens:
        assert len(t["scores"]) == (t["stage"] or 4)
        assert len(t["ranks"]) == (0 if t["fixed"] else len(t["scores"]))


def test_scores_without_a_number_do_not_break_the_page(tmp_path):
    seen, scores = torch.arange(20)[None], torch.full((1, 20), float("nan"))
    trace = [Stage(1, seen, scores, seen[:, :16])]
    path = tmp_path / "page.html"
    show.survivors_page(path, ["x"] * 20, show.dropped_at(trace, 20), trace, [False] * 20, {})
    assert "NaN" not in path.read_text()


def test_a_dropped_token_is_a_dot_and_the_legend_counts():
    text = show.survivors_text(["a", " b", " c", " d"], [0, 1, 2, 0], 2)
    said = "kept to the end: 2 of 4; dropped by stage 1: 1, stage 2: 1"
    assert text == f"a\u00b7\u00b7 d\n\na dot is a dropped token; {said}"
    text = show.survivors_text(["a", " b", " c", " d"], [0, 1, 2, 0], 2, most=2)
    assert text.startswith("a [... 2 tokens ...]  d\n\n")


@pytest.mark.parametrize("text, expected, verdict", [
    ("Anna sells 3 maps.", "anna sells 3 maps", " (right)"),
    ("maps, of Anna", "maps of", " (right)"),
    ("mapsy", "maps", " (wrong, expected 'maps')"), ("maps", None, "")])
def test_an_answer_is_written_as_it_grows(text, expected, verdict, capsys):
    letters = SimpleNamespace(decode=lambda tokens: bytes(tokens).decode(errors="replace"))
    question = SimpleNamespace(text="who?", expected=expected)
    writer, ids = show.Writer("full", question, letters), list((text + "\u00e9").encode())
    assert not any(writer(ids[:i]) for i in range(1, len(ids) + 1))
    assert capsys.readouterr().out == f"full  who? {text}\u00e9"
    told = writer.end(SimpleNamespace(tokens=[*ids[:-2], 0], ended=True))
    assert (told["text"], told.get("right")) == (text, "right" in verdict if verdict else None)
    assert capsys.readouterr().out == f"{verdict}\n"


@pytest.mark.parametrize("full, sdtp, share, said", [       # the slowest passes, the ideal's share
    (1.1, 1.1, 1.05, False), (1.3, 1.1, 0.9, True), (1.1, 1.3, 0.9, True), (1.1, 1.1, 1.2, True)])
def test_a_busy_machine_is_told(full, sdtp, share, said):
    row = {"full": {"prefill_spread_s": [1, full]}, "sdtp": {"prefill_spread_s": [1, sdtp]},
           "share_of_ideal": share, "repeats": 5}
    assert ("was busy" in show.noise(row)) == said
    assert "timed once" in show.noise(row | {"repeats": 1})


def test_no_color_is_respected(monkeypatch):
    def painted():
        return show.survivors_text(["a", "b"], [0, 1], 1).count("\x1b")

    monkeypatch.setattr(show, "sys", SimpleNamespace(stdout=SimpleNamespace(isatty=lambda: True)))
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert painted()
    monkeypatch.setenv("NO_COLOR", "1")
    assert not painted()


@pytest.mark.parametrize("n", [5, 200])
def test_figure_1_is_legible(n, tmp_path):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    labels = [("$\\frac$", "word", " ", "a-very-long-word")[i % 4] for i in range(n)]
    show.heat_map(torch.rand(12, n), labels, tmp_path / "x.png")
    height, width, _ = pyplot.imread(tmp_path / "x.png").shape
    assert 500 < width < 1500 and 150 < height < 1000
