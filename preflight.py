"""What would stop an installation, told before anything is fetched; any Python 3 runs it, with nothing installed.

make calls it before and after pip:

python3 preflight.py          # exit code 1 where nothing can be installed; each time with the next step
python3 preflight.py failed   # what to look at after pip has failed
"""

import importlib.util
import shutil
import sys
import tempfile

OLDEST, NEWEST = (3, 11), (3, 13)
GIB = 1 << 30
LEAST, LARGEST = 4, 8  # GiB, of the packages with torch for CPUs, and with CUDA
AFTER = """\
graphbuild: pip could not install the packages; its own words stand above
  -> behind a proxy:      export HTTPS_PROXY=http://USER:PASSWORD@HOST:PORT, and the same command again
  -> own package index:   export PIP_INDEX_URL=https://HOST/simple, and PIP_CERT=FILE for a certificate of your own
  -> without a network:   fetch the wheels elsewhere, then export PIP_NO_INDEX=1 PIP_FIND_LINKS=FOLDER
  -> no space left:       make room here and in the temporary folder, or name another one by TMPDIR
  -> more of each:        docs/how-to/install.md, "When something stops you"
"""


def findings():
    """(Whether it stops the installation, what is wrong, the next step), one after the other."""
    version = "{}.{}".format(*sys.version_info)
    if not OLDEST <= sys.version_info[:2] <= NEWEST:
        yield (
            True,
            f"this is Python {version} ({sys.executable}); graphbuild runs with 3.11, 3.12 and 3.13",
            "install one of them beside it (apt install python3.11 python3.11-venv, pyenv install 3.11, or"
            " uv python install 3.11), and name it: make demo PYTHON=python3.11",
        )
    if not all(importlib.util.find_spec(module) for module in ("venv", "ensurepip")):
        yield (
            True,
            f"{sys.executable} cannot make a virtual environment: its module venv or ensurepip is missing",
            f"apt install python{version}-venv (Debian, Ubuntu), or name another Python: make demo PYTHON=python3.12",
        )
    if sys.platform != "linux":
        yield True, f"this is {sys.platform}; graphbuild runs on Linux", "use a Linux machine, a container or WSL"
    free = shutil.disk_usage(".").free / GIB
    if free < LARGEST:
        cause = f"{free:.1f} GiB are free here; the packages take {LEAST} with torch for CPUs, {LARGEST} with CUDA"
        yield free < LEAST, cause, "make room, or clone to another disk"
    if shutil.disk_usage(tempfile.gettempdir()).free < 2 * GIB:
        cause = f"pip's downloads go through {tempfile.gettempdir()}, which has less than 2 GiB free"
        yield False, cause, "name another folder: export TMPDIR=FOLDER"


def main():
    if sys.argv[1:] == ["failed"]:
        sys.stderr.write(AFTER)
        sys.exit(1)
    found = list(findings())
    for stops, cause, fix in found:
        sys.stderr.write(f"graphbuild: {'' if stops else 'WARNING: '}{cause}\n  -> {fix}\n")
    sys.exit(any(stops for stops, _, _ in found))


if __name__ == "__main__":
    main()
