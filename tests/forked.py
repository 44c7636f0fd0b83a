"""Commands as copies of a process that has imported torch: most end sooner than an import takes.

A copy is a process of its own: it has its own standard streams, folder, environment and exit code,
and none of our modules is imported in it yet.
"""
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
import time
from pathlib import Path

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["torch", "torch.distributed.tensor", "safetensors.torch", "forked"])


def run(words, cwd, timeout=300, env=os.environ, copies=({},)):
    """Run `python WORDS` in a folder -> exit code, stdout, stderr.

    copies: what the environment of each process has besides. stdout is that of the first; the exit
    code is not 0 where any is not; stderr is that of all. Raises TimeoutExpired.
    """
    with tempfile.TemporaryDirectory() as folder:
        said = [(Path(folder, f"out{i}"), Path(folder, f"err{i}")) for i in range(len(copies))]
        running = [start(words, cwd, out, err, {**env, **more})
                   for (out, err), more in zip(said, copies)]
        deadline = time.monotonic() + timeout
        for process in running:
            process.join(max(0, deadline - time.monotonic()))
        if any(process.exitcode is None for process in running):
            for process in running:
                process.kill()
            raise subprocess.TimeoutExpired(words, timeout)
        code = next((process.exitcode for process in running if process.exitcode), 0)
        errors = "".join(err.read_text(encoding="utf-8") for _, err in said)
        return code, said[0][0].read_text(encoding="utf-8"), errors


def start(words, cwd, out, err, env=os.environ):
    """Start `python WORDS` in a folder -> the process; out, err: files, or names of terminals."""
    words = [str(word) for word in words]
    told = words, str(cwd), dict(env), str(out), str(err)
    process = FORKS.Process(target=become, args=told)
    process.start()
    return process


def until(text, path, process, seconds=120):
    """Wait until a running process has written a text to a file."""
    deadline = time.monotonic() + seconds
    while text not in (said := path.read_text(encoding="utf-8") if path.exists() else ""):
        assert process.is_alive() and time.monotonic() < deadline, said
        time.sleep(0.01)


def become(words, cwd, env, out, err):
    """Inside of a copy: be `python WORDS`."""
    for number, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    tests = Path(__file__).resolve().parent
    ours = {"", *map(str, (tests.parent, tests, tests.parent / "checkpoints"))}
    sys.path[:] = [path for path in sys.path if path not in ours]
    if words[0] == "-m":
        sys.path[:0] = [cwd, *filter(None, env.get("PYTHONPATH", "").split(os.pathsep))]
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.path.insert(0, str(Path(cwd, words[0]).resolve().parent))
        sys.argv = words
        runpy.run_path(str(Path(cwd, words[0])), run_name="__main__")
