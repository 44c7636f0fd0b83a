"""The promises that the whole tree keeps: size and shape, imports, one place for each equation.

    python tests/test_project.py        # prints the numbers behind the bounds
"""
import ast
import io
import re
import statistics
import subprocess
import sys
import tokenize
from itertools import chain
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NAMES = ("model", "saliency", "predictor", "prune", "train", "infer")
SIX = [ROOT / f"{name}.py" for name in NAMES]
# named one by one: a virtual environment may stand beside them, under any name
FOLDERS = ("checkpoints", "lab", "support", "tests")
TREE = sorted([*ROOT.glob("*.py"), *chain(*(ROOT.glob(f"{name}/*.py") for name in FOLDERS))])
TOP = {".ci", ".gitignore", "LICENSE", "README.md", "checkpoints", "docs", "lab",
       "pytest.ini", "requirements-extra.txt", "requirements.txt", "results", "support", "tests",
       *(f"{name}.py" for name in NAMES)}
LAYOUT = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT,
          tokenize.ENCODING, tokenize.ENDMARKER}
BLOCKS = (ast.If, ast.For, ast.While, ast.With, ast.Try)
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef)
FUNCTIONS = (ast.FunctionDef, ast.Lambda, ast.ClassDef)


# ------------------------------------------------------------------------------------ the measures


def docstring_lines(tree):
    """The numbers of all lines that belong to docstrings."""
    lines = set()
    for node in ast.walk(tree):
        if isinstance(node, DOCUMENTED) and ast.get_docstring(node):
            text = node.body[0]
            lines.update(range(text.lineno, text.end_lineno + 1))
    return lines


def tokens_by_line(text):
    """How many Python tokens each code line has; docstrings and comments apart."""
    skipped, found = docstring_lines(ast.parse(text)), {}
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        line = token.start[0]
        if token.type not in LAYOUT and line not in skipped:
            found[line] = found.get(line, 0) + 1
    return found


def nesting(node, depth=0):
    """How deep blocks stand in one another inside a function; an elif is not deeper than its if."""
    deepest = depth
    for name, value in ast.iter_fields(node):
        for child in value if isinstance(value, list) else [value]:
            if not isinstance(child, ast.AST) or isinstance(child, FUNCTIONS):
                continue
            same = name == "orelse" and isinstance(node, ast.If) and isinstance(child, ast.If)
            inner = depth + (isinstance(child, BLOCKS) and not same)
            deepest = max(deepest, nesting(child, inner))
    return deepest


def functions(text):
    """[(lines, nesting, name)] of every function, nested ones too."""
    return [(node.end_lineno - node.lineno + 1, nesting(node), node.name)
            for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef)]


def measure(paths):
    """The row of numbers that compares code bases."""
    texts = [path.read_text(encoding="utf-8") for path in paths]
    widths, counts, found = [], [], []
    for text in texts:
        tokens, lines = tokens_by_line(text), text.splitlines()
        counts += tokens.values()
        widths += [len(lines[number - 1]) for number in tokens]
        found += functions(text)
    lines = [line for text in texts for line in text.splitlines()]
    longest, deepest = max(found), max(found, key=lambda f: f[1])
    return {"lines": len(lines), "code lines": len(counts),
            "characters a code line, median": statistics.median(widths),
            "characters a code line, 95%": statistics.quantiles(widths, n=20)[-1],
            "characters a code line, longest": max(widths),
            "tokens a code line": round(sum(counts) / len(counts), 2),
            "lines over 100": sum(len(line) > 100 for line in lines),
            "longest function": f"{longest[2]}, {longest[0]} lines",
            "deepest function": f"{deepest[2]}, {deepest[1]}"}


def imports(path):
    """The modules of ours that a file imports, those inside functions too: {name: at the top?}."""
    tree, found = ast.parse(path.read_text(encoding="utf-8")), {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        else:
            continue
        for name in names:
            if name in MODULES and name != module_name(path):
                found[name] = found.get(name, False) or node in tree.body
    return found


def module_name(path):
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


MODULES = {module_name(path): path for path in TREE if path.parent.name in ("support", "lab")
           or path.parent == ROOT}
# Who may be imported by each of the six; support and, inside main, lab come on top.
BELOW = {"model": (), "saliency": ("model",), "predictor": ("model",),
         "prune": ("model", "predictor"), "train": ("model", "saliency", "predictor", "prune"),
         "infer": ("model", "saliency", "predictor", "prune")}


# ------------------------------------------------------------------------------------- the bounds


def test_the_six_modules_can_be_read_in_one_sitting():
    """Bounds that widening cannot meet."""
    found = measure(SIX)
    assert found["lines"] <= 1450 and found["tokens a code line"] <= 10
    for path in SIX:
        for length, depth, name in functions(path.read_text(encoding="utf-8")):
            assert length <= 50 and depth <= 4, (path.name, name, length, depth)


@pytest.mark.parametrize("path", TREE, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_line_is_wider_than_100_columns(path):
    lines = path.read_text(encoding="utf-8").splitlines()
    assert [n for n, line in enumerate(lines, start=1) if len(line) > 100] == []


def test_nothing_else_stands_at_the_top():
    """Of what is committed: a reader's own files are no concern of a test."""
    words = ["git", "ls-tree", "--name-only", "HEAD"]
    listed = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    assert set(listed.stdout.split()) == TOP


@pytest.mark.parametrize("name", NAMES)
def test_imports_of_the_six_go_one_way(name):
    for other, at_top in imports(MODULES[name]).items():
        if other.startswith("lab."):
            assert not at_top and only_in_main(MODULES[name], other), (name, other)
        elif not other.startswith("support."):
            assert other in BELOW[name], (name, other)


def only_in_main(path, other):
    """Whether a file imports `other` inside main alone."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    main = next(n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == "main")
    mentions = re.findall(rf"from {other} |import {other}\b|from lab import ", ast.unparse(tree))
    return mentions == re.findall(rf"from {other} |import {other}\b|from lab import ",
                                  ast.unparse(main))


def test_nobody_but_lab_imports_lab_at_the_top():
    for name, path in MODULES.items():
        if not name.startswith("lab."):
            assert not [o for o, top in imports(path).items() if top and o.startswith("lab.")], name
        if name.startswith("support."):
            assert not [o for o in imports(path) if o.startswith("lab.")], name


def test_no_circle_of_imports_hidden_in_functions_or_not():
    graph = {name: set(imports(path)) for name, path in MODULES.items()}
    while graph:
        free = [name for name, others in graph.items() if not others & set(graph)]
        assert free, f"a circle among {sorted(graph)}"
        for name in free:
            del graph[name]


@pytest.mark.parametrize("number", range(1, 9))
def test_each_equation_is_computed_in_one_place(number):
    marks = [path.name for path in SIX for line in path.read_text().splitlines()
             if re.search(rf"# Eq\. {number}$", line)]
    assert len(marks) == 1, marks


def test_nothing_is_unpickled_and_no_code_of_a_checkpoint_is_run():
    forbidden = r"torch\.load|pickle|(?<![.\w])eval\(|(?<![.\w])exec\(|trust_remote_code"
    for path in TREE:
        if path.parent.name != "tests":
            code = ast.unparse(without_docstrings(ast.parse(path.read_text(encoding="utf-8"))))
            assert not re.search(forbidden, code), path


def without_docstrings(tree):
    for node in ast.walk(tree):
        if isinstance(node, DOCUMENTED) and ast.get_docstring(node):
            node.body[0] = ast.Pass()
    return tree


if __name__ == "__main__":
    root = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT
    for title, paths in (("the six modules", [root / f"{name}.py" for name in NAMES]),
                         ("every module of the tree", [p for p in TREE if root == ROOT])):
        if paths:
            print(title)
            for name, value in measure(paths).items():
                print(f"  {name:32} {value}")
