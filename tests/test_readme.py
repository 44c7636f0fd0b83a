"""README.md and docs/: short enough, true to the tree, and their Python runs."""
import contextlib
import io
import re

import pytest

from conftest import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def table_rows(section):
    """The rows of the tables of a section, lists of cells, without heads."""
    text = README.split(f"## {section}\n")[1].split("\n## ")[0]
    lines = [line for line in text.splitlines() if line.startswith("|")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [row for row in rows if row[0] != "paper" and not row[0].startswith("--")]


def test_the_readme_can_be_read():
    assert len(README.split()) <= 1800


@pytest.mark.parametrize("command", ["python infer.py", "python -m pytest"])
def test_the_two_commands_stand_on_a_line_of_their_own(command):
    assert f"\n```\npip install -r requirements.txt && {command}\n```\n" in README


def test_the_map_names_every_equation_figure_and_table_of_the_paper():
    rows = table_rows("Where is what")
    equations = [row for row in rows if row[0].startswith("Eq.")]
    assert [row[0].split(",")[0] for row in equations] == [f"Eq. {n}" for n in range(1, 9)]
    named = " ".join(row[0] for row in rows if row not in equations)
    for kind, last in (("Figure", 5), ("Table", 6)):
        groups = re.findall(kind + r"s? ((?:\d|, | and )+)", named)
        numbers = {int(n) for group in groups for n in re.findall(r"\d", group)}
        assert numbers == set(range(1, last + 1)), kind


def test_the_map_points_at_what_is_there():
    rows = [row[1] for row in table_rows("Where is what") if not row[0].startswith("Eq.")]
    for row in rows:
        files = re.findall(r"`([\w/]+\.py)`", row)
        assert files, row
        text = "".join((ROOT / file).read_text(encoding="utf-8") for file in files)
        for name in re.findall(r"`(\w+)`", row):
            assert re.search(rf"(def|class) {name}\b", text), (row, name)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)]+)\)", text):
        if not target.startswith("http"):
            path = target.split("#")[0]
            assert not path or (page.parent / path).exists(), target


def test_commands_name_files_that_are_there():
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for script in re.findall(r"python ([\w/]+\.py)", text):
            assert (ROOT / script).is_file(), (page, script)
        for module in re.findall(r"python -m (lab\.\w+)", text):
            assert (ROOT / (module.replace(".", "/") + ".py")).is_file(), (page, module)


def test_the_choices_name_what_is_there():
    text = (ROOT / "docs" / "choices.md").read_text(encoding="utf-8")
    for module, name in re.findall(r"`(\w+)\.(\w+)` \|$", text, re.M):
        if (ROOT / f"{module}.py").is_file():
            code = (ROOT / f"{module}.py").read_text(encoding="utf-8")
            assert re.search(rf"(def|class) {name}\b", code), (module, name)


def test_the_lines_of_python_answer(monkeypatch):
    """Ten lines from a prompt to a pruned answer, as they are printed."""
    monkeypatch.chdir(ROOT)
    code = re.search(r"```python\n(.*?)```", README, re.S)[1]
    assert len(code.splitlines()) <= 15
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        exec(compile(code, "README.md", "exec"), {})
    answer, counts = said.getvalue().split("[")
    assert answer.startswith("Anna sells old maps.")
    counts = [int(n) for n in counts.strip("]\n").split(",")]
    assert len(counts) == 12 and counts[-1] < 0.36 * counts[0]
