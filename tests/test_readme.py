"""README.md and docs/: true to the tree, and their Python runs."""
import os
import re
import subprocess
import sys

import pytest

from conftest import ROOT, command

README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [*(page for folder in ("", "docs", "tests") for page in (ROOT / folder).glob("*.md")),
         ROOT / "results" / "make.sh"]


@pytest.mark.parametrize("command", ["python infer.py", "python -m pytest"])
def test_the_two_commands_stand_on_a_line_of_their_own(command):
    assert f"\n```\npip install -r requirements.txt && {command}\n```\n" in README


def test_the_map_names_every_equation_figure_and_table_of_the_paper():
    rows = [line for line in README.splitlines() if line.startswith("| ")]
    assert [row[2:6] for row in rows if row.startswith("| Eq.")] == [f"Eq. {n}"[:4] for n in
                                                                     range(1, 9)]
    named = " ".join(row.split("|")[1] for row in rows)
    for kind, last in (("Figure", 5), ("Table", 6)):
        groups = re.findall(kind + r"s? ((?:\d|, | and )+)", named)
        numbers = {int(n) for group in groups for n in re.findall(r"\d", group)}
        assert numbers == set(range(1, last + 1)), kind


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_a_page_points_at_is_there(page):
    text = page.read_text(encoding="utf-8")
    prose = re.sub(r"```.*?```", "", text, flags=re.S)
    for target in re.findall(r"\]\(([^)]+)\)", prose):
        if not target.startswith("http"):
            path = target.split("#")[0]
            assert not path or (page.parent / path).exists(), target
    for script in re.findall(r"python ([\w/]+\.py)", text):
        assert (ROOT / script).is_file(), script
    for module in re.findall(r"python -m (lab\.\w+)", text):
        assert (ROOT / (module.replace(".", "/") + ".py")).is_file(), module


def test_names_beside_a_file_are_defined_in_it():
    """`prune.py`: `Schedule`, `select` in the README; `prune.select` in docs/choices.md."""
    found = []
    for cell in re.findall(r"^\|[^|]*\|([^|]*\.py[^|]*)\|$", README, re.M):
        for file, names in re.findall(r"`([\w/]+)\.py`:((?: `\w+`,?)+)", cell):
            found += [(file, name) for name in re.findall(r"`(\w+)`", names)]
    choices = (ROOT / "docs" / "choices.md").read_text(encoding="utf-8")
    for cell in re.findall(r"\|([^|]*)\|$", choices, re.M):
        for module, name in re.findall(r"`([\w.]+)\.(\w+)`", cell):
            found.append((module.replace(".", "/"), name))
    assert len(found) > 30
    for file, name in found:
        if file == "Schedule":
            file = "prune"
        code = (ROOT / f"{file}.py").read_text(encoding="utf-8")
        assert re.search(rf"(def|class) {name}\b", code), (file, name)


@pytest.mark.beside
def test_the_lines_of_python_answer_from_anywhere(tmp_path):
    """A prompt that is read once, pruned, and asked twice, as it is printed."""
    code = re.search(r"```python\n(.*?)```", README, re.S)[1]
    assert len(code.splitlines()) <= 16
    done = command("-c", code, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert done == (0, "Anna sells old maps.\nBoris sells wooden keys.\n", "")


@pytest.mark.beside
def test_every_file_of_answers_gets_its_score(tmp_path):
    """The grading loop of TEACHING.md itself, in a folder with two answers."""
    (tmp_path / "mine.py").write_text("from test_exercises import spec_flops as flops\n\n"
                                      "def select(*args):\n    raise SystemExit\n")
    (tmp_path / "worse.py").write_text("import os\nos._exit(0)\n")
    page = (ROOT / "tests" / "TEACHING.md").read_text(encoding="utf-8")
    loop = page.split("requirements.txt\n")[1].split("```")[0]
    loop = loop.replace("answers/", f"{tmp_path}/").replace("python", sys.executable)
    done = subprocess.run(["bash", "-c", loop], cwd=ROOT, capture_output=True, text=True)
    mine, worse = done.stdout.split("worse.py\n")
    for line in ("1/9\n", "7 flops: ok\n", "4 select: case 'the protected have the lowest ",
                 "8 decode: this function is missing"):
        assert line in mine, done.stdout
    assert worse == "0/9: it ended Python, or took over two minutes\n"
