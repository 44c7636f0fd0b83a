"""README.md and docs/: true to the tree, and their Python runs."""
import os
import re
import subprocess
import sys

import pytest

from conftest import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [*(page for folder in ("", "docs", "tests") for page in (ROOT / folder).glob("*.md")),
         ROOT / "results" / "make.sh"]


def test_the_map_names_every_figure_and_table_of_the_paper():
    named = " ".join(re.findall(r"^\| ([^|]*)", README, re.M))
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
    modules = re.findall(r"python -m (lab\.\w+)", text)
    for script in [*re.findall(r"python ([\w/]+\.py)", text),
                   *(module.replace(".", "/") + ".py" for module in modules)]:
        assert (ROOT / script).is_file(), script


def test_names_beside_a_file_are_defined_in_it():
    """`prune.py`: `Schedule`, `select` in the README; `prune.select` in docs/choices.md."""
    found = [(file, name) for file, names in re.findall(r"`([\w/]+)\.py`:((?: `\w+`,?)+)", README)
             for name in re.findall(r"`(\w+)`", names)]
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
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True,
                          text=True, check=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert (done.stdout, done.stderr) == ("Anna sells old maps.\nBoris sells wooden keys.\n", "")


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
