"""Reading and writing files so that nothing is lost and every fault has one clear line.

Nothing here knows the paper or the model: JSON in, safetensors in and out.
"""
import contextlib
import json
import os
import tempfile
from pathlib import Path


def need(condition, message):
    """Bad input ends in one line that names the file and the fault."""
    if not condition:
        raise ValueError(message)


@contextlib.contextmanager
def blame(path, fault):
    """Whatever goes wrong inside is the fault of the file `path`, not of torch or Python."""
    try:
        yield
    # a RecursionError is a RuntimeError
    except (ValueError, TypeError, LookupError, ArithmeticError, RuntimeError) as e:
        raise ValueError(f"{path}: {fault} ({e})") from None


def read_json(path):
    """The value that a JSON file holds."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file") from None
    except (ValueError, RecursionError) as e:  # also bytes that are not UTF-8
        raise ValueError(f"{path}: not valid JSON ({e})") from None


def load_tensors(path):
    """Read a safetensors file -> (tensors, metadata)."""
    from safetensors import SafetensorError, safe_open
    need(Path(path).is_file(), f"{path}: no such file")
    try:
        with safe_open(path, framework="pt") as f:
            return {key: f.get_tensor(key) for key in f.keys()}, f.metadata() or {}
    except (SafetensorError, OSError) as e:
        raise ValueError(f"{path}: damaged or truncated safetensors file ({e})") from None


def load_metadata(path):
    """The metadata of a safetensors file, a dict; its tensors are not read."""
    from safetensors import SafetensorError, safe_open
    try:
        with safe_open(path, framework="pt") as f:
            return f.metadata() or {}
    except (SafetensorError, OSError) as e:
        raise ValueError(f"{path}: damaged or truncated safetensors file ({e})") from None


def save_tensors(path, tensors, metadata):
    """Write a safetensors file under a temporary name, then rename it.

    A crash at any moment leaves the previous file whole. The temporary name is always the same,
    so what a kill leaves behind is written over next time.
    """
    from safetensors.torch import save
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    data = save({key: t.detach().cpu().contiguous() for key, t in tensors.items()}, metadata)
    try:
        with temporary.open("wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except OSError as e:            # a full disk, say: the reason alone would not name the file
        raise OSError(f"{path}: not written ({e})") from None
    finally:
        temporary.unlink(missing_ok=True)


def writable(path, make_folder=False):
    """That a file can be written is known before the work begins; what it holds stays."""
    path = Path(path)
    try:
        if make_folder:
            path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_file() or path.is_dir():
            path.open("ab").close()
        elif not path.exists():     # else /dev/null or the like
            tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as e:
        raise OSError(f"{path}: cannot be written ({e.strerror}); name another file, in a folder "
                      "that is there") from None


def output(path, name):
    """Where to write: `path` itself if it has the suffix of `name`, else `name` in that folder.

    The folder is made, and that it can be written to is known before the work begins.
    """
    path = Path(path)
    if path.suffix != Path(name).suffix:
        path = path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=path.parent).close()
    return path
