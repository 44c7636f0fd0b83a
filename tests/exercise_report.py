"""The options of tests/test_exercises.py, and the report at the end: conftest.py takes both.

It does not know the exercises: a test records its line as "exercise" or "puzzle".
"""
from itertools import chain


def pytest_addoption(parser):
    group = parser.getgroup("exercises")
    group.addoption("--impl", default="reference",
                    help="whose answers tests/test_exercises.py checks: reference (default), "
                         "student (tests/exercises.py), or a file")
    group.addoption("--seed", type=int, default=0,
                    help="draws the cases of tests/test_exercises.py; another number, other cases")
    group.addoption("--puzzles", action="store_true",
                    help="score the open puzzles of tests/exercises.py too")


def pytest_terminal_summary(terminalreporter, config):
    """A student's result: a line for each exercise, how many are right, the puzzles' scores."""
    exercises = recorded(terminalreporter, "exercise")
    if exercises and config.getoption("--impl") != "reference":
        terminalreporter.section("exercises")
        told = ""
        for line, _ in sorted(exercises):
            name, _, result = " ".join(line.split()).partition(": ")
            again = result == told and "cannot be imported" in told
            terminalreporter.line(f"{name}: the same" if again else line)
            told = result
        right = sum(passed for _, passed in exercises)
        terminalreporter.line(f"{right}/{len(exercises)}")
    for line, _ in recorded(terminalreporter, "puzzle"):
        terminalreporter.line(line)


def recorded(terminalreporter, name):
    """What tests recorded under a name: [(value, whether the test passed)]."""
    found = []
    for report in chain(*terminalreporter.stats.values()):
        properties = dict(getattr(report, "user_properties", ()))
        if name in properties and report.when == "call":
            found.append((properties[name], report.passed))
    return found
