"""What tests share: a tiny random Llama, predictors and rows for it, and ways to run a command."""
import importlib
import importlib.util
import json
import os
import signal
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

# Before torch, and for commands: on tensors this small a second thread only waits.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest  # noqa: E402
import torch  # noqa: E402
from torch import nn  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import forked  # noqa: E402
from exercise_report import pytest_addoption, pytest_terminal_summary  # noqa: E402, F401
from model import Config, Llama, load  # noqa: E402
from predictor import NearPredictor, Predictor  # noqa: E402
from prune import Schedule  # noqa: E402
from support.options import cli  # noqa: E402
from support.rows import Example  # noqa: E402

TOY = ROOT / "checkpoints" / "toy"
SMOLLM2 = ROOT / "checkpoints" / "smollm2"
SCHEDULE = Schedule(1, 1, 4, 0.8)   # a stage after each of the tiny model's first four blocks


# --------------------------------------------------------------------------------- the tiny model


def tiny_model(seed=0, **changes):
    """Six blocks, grouped-query, weights large enough that attention is far from uniform."""
    shape = dict(dim=48, n_blocks=6, n_heads=4, n_kv_heads=2, head_dim=12, ffn=96, vocab=90,
                 max_positions=512)
    model = Llama(Config(**{**shape, **changes}))
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        if p.dim() > 1:
            p.data.normal_(0, 0.2, generator=generator)
    return model.eval().requires_grad_(False)


def draw(module, generator):
    """Every parameter by chance, biases and norms too; attention is far from uniform."""
    for name, p in module.named_parameters():
        noise = torch.randn(p.shape, generator=generator).to(p.dtype)
        centre = 1.0 if "norm.weight" in name else 0.0
        p.data = centre + (0.2 if p.dim() > 1 else 0.3) * noise
    return module.eval().requires_grad_(False)


@pytest.fixture
def tiny():
    return tiny_model()


# A row of 60 tokens; tests take the first 48 as the prompt.
TOKENS = torch.randint(0, 90, (1, 60), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def tokens():
    return TOKENS.clone()


def fresh_predictors(seed=0, near=False, dim=48):
    """Predictors of the tiny model to train, one for each stage of SCHEDULE."""
    torch.manual_seed(seed)
    kind = NearPredictor if near else Predictor
    return nn.ModuleList(kind(dim) for _ in range(SCHEDULE.stages))


def frozen_predictors(seed=3, **given):
    """The same to prune by."""
    return fresh_predictors(seed, **given).requires_grad_(False)


def random_rows(n, length=40, prompt_len=30):
    """n Examples of the tiny model's tokens."""
    generator = torch.Generator().manual_seed(4)
    return [Example(torch.randint(0, 90, (length,), generator=generator), prompt_len)
            for _ in range(n)]


def close(a, b, atol):
    """Whether two tensors of one shape differ nowhere by more than atol."""
    return a.shape == b.shape and torch.allclose(a, b, rtol=0, atol=atol)


def load_cpu(path):
    return load(path, device="cpu", dtype=torch.float32)


def jsonl(path, rows):
    """Write rows as lines of JSON -> the path."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def change(path, **new):
    """Set entries of a JSON file, which need not be there."""
    old = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**old, **new}))


# ------------------------------------------------------------------ a real model, where it is there


def needs(package):
    missing = not importlib.util.find_spec(package)
    return pytest.mark.skipif(missing, reason=f"pip install {package}")


real_weights = pytest.mark.skipif(
    not (SMOLLM2 / "model.safetensors").is_file(),
    reason="no checkpoints/smollm2/model.safetensors: run python checkpoints/convert.py smollm2")

ENGLISH = """\
The lighthouse keeper had lived on the rock for thirty-one years before the company wrote to say \
that the lamp would be
made automatic. He read the letter twice, folded it, and put it in the tin where he kept his \
wife's photographs. On the 14th of March,
1987, a boat came with two engineers and a crate. They were polite young men. They drank his tea, \
asked about the weather, and in four
hours they had replaced everything that he had done each night with a grey box the size of a loaf \
of bread.

"What happens when it breaks?" he asked.

"Then it calls us," said the older of the two, "and we come out." The keeper looked at the sea, \
which was rising, and at the small
boat, and said nothing. That winter the light failed three times. Each time it called, and each \
time nobody could come."""


# ---------------------------------------------------------------------------------- our commands


def command(*words, cwd=ROOT, **options):
    """Run one of our commands as a user would -> exit code, stdout, stderr; see forked.run."""
    return forked.run(words, cwd, **options)


@pytest.fixture
def leaves(monkeypatch):
    """leaves(script, *words) -> the one line that a command ends with, run in this process."""
    def run(script, *words):
        monkeypatch.setattr(sys, "argv", [script, *map(str, words)])
        module = importlib.import_module(script.removesuffix(".py").replace("/", "."))
        with pytest.raises(SystemExit) as ended:
            cli(module.main)
        line = ended.value.code
        assert line.startswith(f"{Path(script).name}: ") and "\n" not in line
        return line

    kept = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield run
    for number, handler in kept.items():        # cli gave them back to the system
        signal.signal(number, handler)


# --------------------------------------------------------------------------- tests that only wait


def pytest_collection_modifyitems(items):
    """Tests marked `beside` come last, so that the others run while their commands do."""
    items.sort(key=lambda item: item.get_closest_marker("beside") is not None)


def pytest_collection_finish(session):
    """Start the `beside` tests, one after the other in a thread: a core of two would be idle."""
    if session.config.option.collectonly:
        return
    session.beside = ThreadPoolExecutor(1)
    session.folder = tempfile.TemporaryDirectory(prefix="beside")   # deleted with the session
    for item in session.items:
        if item.get_closest_marker("beside"):
            names = item._fixtureinfo.argnames                      # tmp_path, or nothing
            folders = [Path(tempfile.mkdtemp(dir=session.folder.name)) for _ in names]
            item.begun = session.beside.submit(item.obj, *folders)


def pytest_sessionfinish(session):
    """Do not begin what nobody waits for any more, after Ctrl-C or with -x."""
    if hasattr(session, "beside"):
        session.beside.shutdown(wait=False, cancel_futures=True)


def pytest_pyfunc_call(pyfuncitem):
    """A test that was begun beside the others only has to be waited for."""
    begun = getattr(pyfuncitem, "begun", None)
    if begun is None:
        return None
    begun.result()
    return True
