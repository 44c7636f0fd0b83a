"""lab/report.py: the pages say what results/ says; tables and curves."""
import re

import pytest

from conftest import ROOT
from lab import report

TEXTS = {page: (ROOT / page).read_text(encoding="utf-8") for page in report.PAGES}
# -------------------------------------------------------------------------------- what is there


@pytest.mark.parametrize("page", report.PAGES)
def test_the_pages_say_what_results_says(page):
    assert report.render(TEXTS[page], page) == TEXTS[page], "run python -m lab.report"


def test_every_table_stands_on_a_page():
    stand = re.findall(r"<!-- table (\w+) -->", "".join(TEXTS.values()))
    there = {name for name, table in report.TABLES.items() if "columns" in table}
    assert there | {"equations"} == set(stand)


def test_every_file_in_results_is_shown():
    for path in ROOT.glob("results/*.[jp]*"):                       # JSON and PNG
        assert f"results/{path.name})" in "".join(TEXTS.values()), path


def test_sentences_say_what_was_measured():
    text = " ".join(TEXTS["docs/results.md"].split())
    said = report.Cells().format(
        "SmolLM2 at {n:,} tokens beside llama.cpp (F32, AVX2): prefill {full[prefill_s]:.1f} s, "
        "with SDTP {sdtp[prefill_s]:.1f}, there {llamacpp_F32[prefill_s]:.1f}; decode "
        "{full[decode_s]:.0f/1e-3}, {sdtp[decode_s]:.0f/1e-3} and "
        "{llamacpp_F32[decode_s]:.0f/1e-3} ms", **report.result("smollm2_engines")["bench"][-1])
    assert said in " ".join(TEXTS["README.md"].split())
    spreads = []
    for row in report.result("qwen05_speed_cpu")["bench"]:
        for arm in (row["full"], row["sdtp"]):
            low, high = arm["prefill_spread_s"]
            spreads.append((high - low) / arm["prefill_s"])
    assert f"differ by up to {max(spreads):.1%} of their median" in text


# ------------------------------------------------------------------------------------------ tables


def row(scorer, value, **more):
    return {"scorer": scorer, "value": value, "n": 7, **more}


FILES = {
    "one": {"commit": "abc", "hardware": "a CPU", "dtype": "float32", "rows": [
        row("|x|", 2.0, k=1), row("full", 1.0, k=1), row("full", 9.0, k=2)]},
    "two": {"commit": "def", "hardware": "a CPU", "dtype": "float32", "bench": [
        row("norm@cut", 3.0), row("full", 4.0)]},
}
COLUMNS = [["one", "a ({n})", "{value:.0f}", {"k": 1}], ["two", "b", "{value:.0f}"]]
PAGE = r"""a
<!-- table t -->
| kept by | a (7) | b |
|---|---|---|
| \|x\| | 2 |  |
| full model | 1 | 4 |
| largest hidden state, one early cut |  | 3 |

[one.json](../results/one.json), [two.json](../results/two.json); a CPU, float32; commit abc, def
<!-- end -->
b"""


@pytest.mark.parametrize("old", ["a\n<!-- table t -->\nb", PAGE.replace("1 | 4", "2 | 3")])
def test_a_drift_is_refused_and_mended(old, monkeypatch, tmp_path):
    """The page keeps its text and gets its table; a marker alone gets one, too."""
    page = tmp_path / "docs" / "x.md"
    page.parent.mkdir()
    page.write_text(old)
    monkeypatch.setattr(report, "result", FILES.get)
    monkeypatch.setitem(report.TABLES, "t", {"columns": COLUMNS})
    monkeypatch.setattr(report, "ROOT", tmp_path)
    monkeypatch.setattr(report, "PAGES", ("docs/x.md",))
    monkeypatch.setattr("sys.argv", ["report.py", "--check"])
    with pytest.raises(ValueError, match="docs/x.md: a table is not what results/ says"):
        report.main()
    monkeypatch.setattr("sys.argv", ["report.py"])
    report.main()
    assert page.read_text() == PAGE


# ---------------------------------------------------------------------------------- means, curves


def test_means_are_those_of_the_multiple_choice_tasks():
    tasks = [("copa", "acc", 0.5, 0.03), ("piqa", "acc", 0.7, 0.04),
             ("lambada_openai", "acc", 0.0, 9.0), ("piqa", "acc_norm", 0.0, 9.0)]
    mean, = report.mean_rows([row("full", value, task=task, metric=metric, stderr=error)
                              for task, metric, value, error in tasks])
    assert mean == {"scorer": "full", "metric": "acc", "task": "mean",
                    "value": pytest.approx(0.6), "stderr": pytest.approx(0.025)}


def test_the_curves_are_drawn(monkeypatch):
    pytest.importorskip("matplotlib")
    drawn = []
    monkeypatch.setattr(report.show, "save", lambda figure, path: drawn.append(path))
    report.figures()
    assert len(drawn) == 3 and all(path.is_file() for path in drawn)
