"""A tiny random Llama for every test file, and the import path."""
import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")                        # before torch, and for commands: on tensors this small a second thread only waits

import pytest  # noqa: E402
import torch  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "checkpoints")]

from model import Config, Llama  # noqa: E402


def pytest_addoption(parser):
    group = parser.getgroup("exercises")
    group.addoption("--impl", default="reference", help="whose answers tests/test_exercises.py checks: reference (default), student (tests/exercises.py), or a file")
    group.addoption("--seed", type=int, default=0, help="draws the cases of tests/test_exercises.py; another number, other cases")
    group.addoption("--puzzles", action="store_true", help="score the open puzzles of tests/exercises.py too")


def pytest_terminal_summary(terminalreporter, config):
    """The student's result: n/8, a line for each exercise, and the puzzles' scores."""
    done = [(key, value, r.passed) for reports in terminalreporter.stats.values() for r in reports if getattr(r, "when", "") == "call"
            for key, value in r.user_properties]
    exercises = [passed for key, _, passed in done if key == "exercise"]
    if exercises and config.getoption("--impl") != "reference":
        terminalreporter.section("exercises")
        for line in sorted(value for key, value, _ in done if key == "exercise"):
            terminalreporter.line(line)
        terminalreporter.line(f"{sum(exercises)}/{len(exercises)}")
    for key, value, _ in done:
        if key == "puzzle":
            terminalreporter.line(value)


def tiny_model(seed=0, **changes):
    """Six blocks, grouped-query, weights large enough that attention is far from uniform."""
    shape = dict(dim=48, n_blocks=6, n_heads=4, n_kv_heads=2, head_dim=12, ffn=96, vocab=90, max_positions=512)
    model = Llama(Config(**{**shape, **changes}))
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        if p.dim() > 1:
            p.data.normal_(0, 0.2, generator=generator)
    return model.eval().requires_grad_(False)


@pytest.fixture
def tiny():
    return tiny_model()


@pytest.fixture
def tokens():
    """Two rows of 60 tokens; tests take the first 48 as the prompt."""
    return torch.randint(0, 90, (2, 60), generator=torch.Generator().manual_seed(1))
