"""The promises that the whole tree keeps: size, one place per equation, no pickle."""
import re

import pytest

import report
from conftest import ROOT

MODULES = [ROOT / f"{name}.py" for name in ("model", "saliency", "predictor", "prune", "train", "infer")]


def test_the_six_modules_can_be_read_in_one_sitting():
    assert sum(len(m.read_text().splitlines()) for m in MODULES) < 1800


@pytest.mark.parametrize("number", range(1, 9))
def test_each_equation_is_computed_in_one_place(number):
    marks = [m.name for m in MODULES for line in m.read_text().splitlines() if re.search(rf"# Eq\. {number}$", line)]
    assert len(marks) == 1, marks


def test_nothing_is_unpickled_and_no_code_of_a_checkpoint_is_run():
    for path in [*ROOT.glob("*.py"), *ROOT.glob("checkpoints/*.py")]:
        assert not re.search(r"torch\.load|pickle|(?<![.\w])eval\(|(?<![.\w])exec\(|trust_remote_code", path.read_text()), path


def test_model_imports_none_of_ours():
    text = MODULES[0].read_text()
    assert not re.search(r"^\s*(from|import) (common|saliency|predictor|prune|train|infer|eval)\b", text, re.M)


def test_the_readmes_tables_are_those_of_the_results():
    text = (ROOT / "README.md").read_text()
    assert text.count("<!-- table ") >= 5 and report.render(text) == text, "run python report.py"


def test_the_readmes_map_names_everything_in_the_paper_and_points_at_what_is_there():
    section = (ROOT / "README.md").read_text().split("## Where is what")[1].split("\n## ")[0]
    equations, rows = (part.split("\n\n")[0].splitlines()[2:] for part in section.split("| paper |")[1:])
    assert [row.split("|")[1].strip() for row in equations if row.startswith("| Eq.")] == [f"Eq. {n}" for n in range(1, 9)]
    named = " ".join(row.split("|")[1] for row in rows)
    for kind, top in (("Figure", 5), ("Table", 6)):
        listed = {int(n) for group in re.findall(kind + r"s? ((?:\d|, | and )+)", named) for n in re.findall(r"\d", group)}
        assert listed == set(range(1, top + 1)), kind
    for row in (row.split("|")[2] for row in rows):
        files = re.findall(r"`(\w+\.py)`", row)
        text = "".join((ROOT / f).read_text() for f in files)
        assert files, row
        for name in re.findall(r"`(\w+(?:\.\w+)?)`", row):
            if not name.endswith(".py"):
                assert re.search(rf"(def|class) {name.split('.')[-1]}\b", text), (row, name)
