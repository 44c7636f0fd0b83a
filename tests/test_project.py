"""The promises that the whole tree keeps: budgets, one direction of imports, one place for each
equation.

    python tests/test_project.py        # prints the numbers behind the bounds
"""
import ast
import functools
import io
import re
import sys
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NAMES = ("model", "saliency", "predictor", "prune", "train", "infer")
SIX = [ROOT / f"{name}.py" for name in NAMES]
SUPPORT, LAB, CHECKPOINTS, TESTS = (sorted((ROOT / name).glob("*.py"))
                                    for name in ("support", "lab", "checkpoints", "tests"))
OURS = [*SIX, *SUPPORT, *LAB, *CHECKPOINTS]
DOCS = sorted((ROOT / "docs").glob("*.md"))
LAYOUT = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT,
          tokenize.ENCODING, tokenize.ENDMARKER}
BLOCKS = (ast.If, ast.For, ast.While, ast.With, ast.Try)
INNER = (ast.FunctionDef, ast.Lambda, ast.ClassDef)
# Who may be imported by each of the six, support aside.
BELOW = {"model": (), "saliency": ("model",), "predictor": (),
         "prune": ("model", "predictor"), "train": ("model", "saliency", "predictor", "prune"),
         "infer": ("model", "prune")}
# What only padded batches needed; one row is read at a time.
BATCHES = re.compile(r"\b(PAD|lengths|beyond|per_row|padded)\b")


# ------------------------------------------------------------------------------------ the measures


def parsed(path):
    return ast.parse(path.read_text(encoding="utf-8"))


def code_tokens(path):
    """[the line of every Python token] without comments, docstrings and layout."""
    starts = set()
    for node in ast.walk(parsed(path)):
        documented = isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))
        if documented and ast.get_docstring(node):
            starts.add((node.body[0].lineno, node.body[0].col_offset))
    with io.StringIO(path.read_text(encoding="utf-8")) as text:
        return [token.start[0] for token in tokenize.generate_tokens(text.readline)
                if token.type not in LAYOUT and token.start not in starts]


def count(paths):
    return sum(len(code_tokens(path)) for path in paths)


def lines(paths):
    return [line for path in paths for line in path.read_text(encoding="utf-8").splitlines()]


def words(paths):
    return sum(len(path.read_text(encoding="utf-8").split()) for path in paths)


def nesting(node, depth=0):
    """How deep blocks stand in one another inside a function; an elif is not deeper than its if."""
    deepest = depth
    for name, value in ast.iter_fields(node):
        for child in value if isinstance(value, list) else [value]:
            if not isinstance(child, ast.AST) or isinstance(child, INNER):
                continue
            same = name == "orelse" and isinstance(node, ast.If) and isinstance(child, ast.If)
            deepest = max(deepest, nesting(child, depth + (isinstance(child, BLOCKS) and not same)))
    return deepest


def functions(paths):
    """[(lines, nesting, name)] of every function, nested ones too."""
    return [(node.end_lineno - node.lineno + 1, nesting(node), f"{path.name}: {node.name}")
            for path in paths for node in ast.walk(parsed(path))
            if isinstance(node, ast.FunctionDef)]


def imports(path):
    """The modules of ours that a file imports, those inside functions too, and names of support."""
    modules, names = set(), []
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.ImportFrom):
            modules.add(node.module)
            modules |= {f"{node.module}.{alias.name}" for alias in node.names}
            if node.module.split(".")[0] == "support":
                names += [alias.name for alias in node.names]
        elif isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
    known = {module_name(each) for each in OURS}
    return (modules & known) - {module_name(path)}, names


def module_name(path):
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


@functools.cache
def measures():
    """{what: (value, bound)}."""
    per_line = count(SIX) / len({(p, n) for p in SIX for n in code_tokens(p)})
    inside = [*SUPPORT, *LAB, *CHECKPOINTS]
    return {
        "six modules, code tokens": (count(SIX), 9850),
        "six modules, lines": (len(lines(SIX)), 1315),
        "six modules, tokens a code line": (round(per_line, 1), 12),
        "six modules, names imported from support": (sum(len(imports(p)[1]) for p in SIX), 45),
        "six modules, lines that speak of batches": (
            sum(bool(BATCHES.search(line)) for line in lines(SIX)), 0),
        "longest function of all modules": (max(functions(OURS))[0], 45),
        "deepest nesting of all modules": (max(f[1] for f in functions(OURS)), 3),
        "longest line": (max(map(len, lines([*OURS, *TESTS]))), 100),
        "support, files": (len(SUPPORT), 10),
        "lab, files": (len(LAB), 8),
        "checkpoints, files": (len(CHECKPOINTS), 3),
        "support, lab, checkpoints, code tokens": (count(inside), 39240),
        "tests, code tokens": (count(TESTS), 69000),
        "README.md, words": (words([ROOT / "README.md"]), 1300),
        "docs, words": (words(DOCS), 6500),
        "docs, files": (len(DOCS), 3),
    }


# ------------------------------------------------------------------------------------- the bounds


@pytest.mark.parametrize("what", measures())
def test_budgets_hold_so_that_code_does_not_flow_back(what):
    value, bound = measures()[what]
    assert value <= bound


@pytest.mark.parametrize("path", OURS, ids=module_name)
def test_imports_go_one_way(path):
    """support <- model <- saliency, predictor <- prune <- train, infer <- lab, checkpoints."""
    name, (modules, _) = module_name(path), imports(path)
    for other in modules:
        place = other.split(".")[0]
        if name.startswith("support."):
            assert place == "support", other
        elif name in NAMES:
            assert place == "support" or other in BELOW[name], other
        elif name.startswith("lab."):
            assert place != "checkpoints", other


def test_no_circle_of_imports_hidden_in_functions_or_not():
    graph = {module_name(path): imports(path)[0] for path in OURS}
    while graph:
        free = [name for name, others in graph.items() if not others & set(graph)]
        assert free, f"a circle among {sorted(graph)}"
        for name in free:
            del graph[name]


@pytest.mark.parametrize("number", range(1, 9))
def test_each_equation_is_computed_in_one_place(number):
    marks = [path.name for path in SIX for line in lines([path])
             if re.search(rf"# Eq\. {number}$", line)]
    assert len(marks) == 1, marks


def test_nothing_is_unpickled_and_no_code_of_a_checkpoint_is_run():
    forbidden = r"torch\.load\(|\bpickle\b|(?<![.\w])eval\(|(?<![.\w])exec\(|trust_remote_code"
    for path in OURS:
        tree = parsed(path)
        for node in ast.walk(tree):         # what a docstring says is not run
            if hasattr(node, "body") and isinstance(node.body, list) and node.body:
                if isinstance(node.body[0], ast.Expr):
                    node.body[0] = ast.Pass()
        assert not re.search(forbidden, ast.unparse(tree)), path


if __name__ == "__main__":
    over = 0
    for what, (value, bound) in measures().items():
        over += value > bound
        print(f"{what:45} {value:8}  of at most {bound}{'   OVER' if value > bound else ''}")
    sys.exit(bool(over))
