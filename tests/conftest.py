"""Fixtures that several test files share, also between the processes that run them side by side (pytest-xdist)."""

from __future__ import annotations

import fcntl
import functools
import gc
import json
import os
import shutil
import signal
import tempfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import typer.main
import typer.testing

import graphbuild.store.store

gc.disable()  # until all is imported
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")  # they say what CPUs do, also on a machine with a GPU
if "PYTEST_XDIST_WORKER" in os.environ:  # other tests need the other cores, and who waits for such a core waits long
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is loaded
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that wait must not spin on cores that others need
signal.signal(signal.SIGINT, signal.default_int_handler)  # `make test &` has it ignored, for its children too

# Written to the disk at once or later: that shows when a machine stops, which none does here.
graphbuild.store.store._flush = lambda path: None

# Typer makes the command line's parser anew for each call, which costs more than most calls.
typer.main.get_command = typer.testing._get_command = functools.cache(typer.main.get_command)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The files with the longest tests first: processes side by side then end at the same time. Else files are mixed:
    where one process has tests that wait, the other has some that compute."""
    long = ("e2e", "training", "pages", "torch")
    items.sort(key=lambda item: (item.path.parent.name not in long, zlib.crc32(item.path.name.encode())))  # stable


def pytest_collection_finish() -> None:
    """What tests import stays: garbage collection, which trainers and tests ask for, need not look through it."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000)
    gc.enable()


MakeOnce = Callable[[str, Callable[[Path], object]], Path]


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data beside the project's root (its README says what is in it)."""
    folder = Path(__file__).parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"no real data at {folder}")
    return folder


@pytest.fixture(scope="session", autouse=True)
def own_temporary_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Copies of remote files, and what else commands put into the temporary folder, are of this process alone.

    Its path is short: sockets lie below it.
    """
    tmp_path_factory.getbasetemp()  # stays where it is, after the run too
    with (
        tempfile.TemporaryDirectory(prefix="gb", ignore_cleanup_errors=True) as folder,
        pytest.MonkeyPatch.context() as patches,
    ):
        patches.setenv("TMPDIR", folder)
        patches.setattr(tempfile, "tempdir", folder)
        yield


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """One thread for torch: small networks' threads would wait for each other most of the time."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def make_once(tmp_path_factory: pytest.TempPathFactory) -> MakeOnce:
    """`make_once(name, fill)`: a folder that the first process of the run to ask for it has filled; only to be read."""
    base = tmp_path_factory.getbasetemp()
    run = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base

    def folder_of(name: str, fill: Callable[[Path], object]) -> Path:
        folder, done = run / name, run / f"{name}.done"
        with (run / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not done.exists():
                shutil.rmtree(folder, ignore_errors=True)  # of one that failed
                folder.mkdir()
                fill(folder)
                done.touch()
        return folder

    return folder_of


@pytest.fixture(scope="session")
def letters(make_once: MakeOnce) -> str:
    """A static encoder of the letters a to z; "q" has NaN, "x" infinities, and all else, digits too, no vector."""

    def fill(folder: Path) -> None:
        import torch
        from tokenizers import Tokenizer, models, pre_tokenizers

        alphabet = "abcdefghijklmnopqrstuvwxyz"
        tokenizer = Tokenizer(models.BPE({letter: number for number, letter in enumerate(alphabet)}, []))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        odd = {alphabet.index("q"): torch.nan, alphabet.index("x"): torch.inf}
        _save_static(folder, tokenizer, 16, odd)

    return str(make_once("letters", fill))


@pytest.fixture(scope="session")
def words(make_once: MakeOnce) -> str:
    """A static encoder of the default encoder's word pieces, for tests that need texts' vectors but not its own: in no
    time captions with common words are similar."""

    def fill(folder: Path) -> None:
        from tokenizers import Tokenizer

        from graphbuild.nodes.encoder import DEFAULT_ENCODER, find_encoder

        tokenizer = Tokenizer.from_file(str(find_encoder(DEFAULT_ENCODER).folder / "tokenizer.json"))
        tokenizer.no_padding()
        _save_static(folder, tokenizer, 64, {})

    return str(make_once("words", fill))


@pytest.fixture(scope="session")
def shallow(make_once: MakeOnce) -> str:
    """The default encoder's first layer alone, which has a vector for every text in a fifth of the time."""

    def fill(folder: Path) -> None:
        from graphbuild.nodes.encoder import DEFAULT_ENCODER, find_encoder

        whole = find_encoder(DEFAULT_ENCODER).folder
        shutil.copytree(whole, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.safetensors"))
        (folder / "model.safetensors").symlink_to(whole / "model.safetensors")
        config = json.loads((whole / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 1}))

    return str(make_once("shallow", fill))


def _save_static(folder: Path, tokenizer: Any, width: int, values: Mapping[int, float]) -> None:
    """An encoder with random vectors of its tokens; `values` stand in all places of their tokens' own."""
    import torch
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.models import StaticEmbedding

    torch.manual_seed(0)
    static = StaticEmbedding(tokenizer, embedding_dim=width)
    with torch.no_grad():
        for token, value in values.items():
            static.embedding.weight[token] = value
    SentenceTransformer(modules=[static], device="cpu").save(str(folder))
