"""lab/report.py: the pages say what results/ says; cells, lines, equations and curves."""
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
    stand = {page: re.findall(r"<!-- table (\w+) -->", text) for page, text in TEXTS.items()}
    assert stand["README.md"] == ["equations", "quality", "speed_short"]
    there = {name for name, table in report.TABLES.items() if "columns" in table}
    assert there | {"equations"} == set(sum(stand.values(), []))


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


# -------------------------------------------------------------------------------- cells and lines


@pytest.mark.parametrize("formats, row, cell", [
    ("{a[b][1]:.1f/1e-3} ms", {"a": {"b": [0, 0.0837]}}, "83.7 ms"),
    ("{a}|none, {b:.0f/1e6}", {"b": 28286976}, "none, 28"),
    ("share", {"value": 2.0, "share_of_gap": -0.084, "share_stderr": 0.061}, "-8%±6%"),
    ("share", {"value": 2.0}, "NLL 2.00"),
])
def test_cells(formats, row, cell):
    assert report.cell(formats, row) == cell


def row(scorer, value, **more):
    return {"scorer": scorer, "value": value, "n": 7, **more}


FILES = {
    "one": {"commit": "abc", "hardware": "a CPU", "dtype": "float32", "rows": [
        row("|x|", 2.0, k=1), row("full", 1.0, k=1), row("full", 9.0, k=2)]},
    "two": {"commit": "def", "hardware": "a CPU", "dtype": "float32", "bench": [
        row("norm@cut", 3.0), row("full", 4.0)]},
}
COLUMNS = [["one", "a ({n})", "{value:.0f}", {"k": 1}], ["two", "b", "{value:.0f}"]]
HEAD, X, FULL = ["kept by", "a (7)", "b"], ["|x|", "2", ""], ["full model", "1", "4"]
CUT = ["largest hidden state, one early cut", "", "3"]
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


@pytest.fixture
def files(monkeypatch):
    """FILES in place of results/, and a table of them."""
    monkeypatch.setattr(report, "result", FILES.get)
    monkeypatch.setitem(report.TABLES, "t", {"columns": COLUMNS})


@pytest.mark.parametrize("options, cells", [
    ({"ordered": True}, [FULL, X, CUT]),
    ({"only": ["full", "norm@cut"]}, [FULL, CUT]),
])
def test_lines(files, options, cells):
    assert report.lines(COLUMNS, **options) == [HEAD, *cells]


@pytest.mark.parametrize("old", [PAGE, "a\n<!-- table t -->\nb", PAGE.replace("1 | 4", "2 | 3")])
def test_a_page_keeps_its_text_and_gets_its_table(files, old):
    assert report.render(old, "docs/x.md") == PAGE


def test_a_drift_is_refused_and_mended(files, monkeypatch, tmp_path):
    page = tmp_path / "docs" / "x.md"
    page.parent.mkdir()
    page.write_text(PAGE.replace("1 | 4", "2 | 3"))
    monkeypatch.setattr(report, "ROOT", tmp_path)
    monkeypatch.setattr(report, "PAGES", ("docs/x.md",))
    monkeypatch.setattr("sys.argv", ["report.py", "--check"])
    with pytest.raises(ValueError, match="docs/x.md: a table is not what results/ says"):
        report.main()
    monkeypatch.setattr("sys.argv", ["report.py"])
    report.main()
    assert page.read_text() == PAGE


# ----------------------------------------------------------------------- means, equations, curves


def test_means_are_those_of_the_multiple_choice_tasks():
    tasks = [("copa", "acc", 0.5, 0.03), ("piqa", "acc", 0.7, 0.04),
             ("lambada_openai", "acc", 0.0, 9.0), ("piqa", "acc_norm", 0.0, 9.0)]
    mean, = report.mean_rows([row("full", value, task=task, metric=metric, stderr=error)
                              for task, metric, value, error in tasks])
    assert mean == {"scorer": "full", "metric": "acc", "task": "mean",
                    "value": pytest.approx(0.6), "stderr": pytest.approx(0.025)}


def test_the_equations_point_at_their_lines():
    _, *rows = report.equations()
    assert [row[2] == "yes" for row in rows] == [n != 2 for n in range(1, 9)]
    for number, (title, where, _) in enumerate(rows, start=1):
        file, line, name = re.fullmatch(r"\[(\S+), line (\d+)\]\(\1#L\2\), `([\w.]+)`",
                                        where).groups()
        lines = (ROOT / file).read_text(encoding="utf-8").splitlines()[:int(line)]
        assert title.startswith(f"Eq. {number},") and lines[-1].endswith(f"  # Eq. {number}")
        assert re.search(rf"(def|class) {name.split('.')[-1]}\b", "\n".join(lines))


def test_the_curves_are_drawn(monkeypatch, tmp_path):
    pytest.importorskip("matplotlib")
    found = {name: report.result(name) for name in ("smollm2_tradeoff", "qwen05_speed_cpu")}
    cells = [{"scorer": arm, "length": 1024, "depth": 0, "probability": 0.5}
             for arm in ("full", "predictor", "lookahead:32", "middle")]
    for place in ("first", "last", "both"):
        found[f"qwen05_needle_{place}"] = {"cells": cells}
        (tmp_path / f"qwen05_needle_{place}.json").touch()
    monkeypatch.setattr(report, "result", found.get)
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    report.figures()
    assert len(list(tmp_path.glob("*.png"))) == 3
