"""Coverage-guided fuzzing of the readers of tars and lists, for minutes or hours; no part of the test suite.

    pip install atheris
    python tests/sources/fuzz_readers.py tar -max_total_time=600      # or csv, tsv, jsonl, parquet

Any bytes are read, or refused by a GraphbuildError; what else is raised, a hang, or 2 GB of memory ends the run with
the bytes that did it.
"""

from __future__ import annotations

import contextlib
import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["graphbuild", "tarfile", "gzip", "json"]):
    from graphbuild.errors import GraphbuildError
    from graphbuild.sources.tables import TableSpec, read_chunks
    from graphbuild.sources.tars import open_tar

KIND = sys.argv.pop(1)
PATH = Path(tempfile.mkdtemp()) / f"fuzzed.{KIND}"


def read(content: bytes) -> None:
    PATH.write_bytes(content)
    with contextlib.suppress(GraphbuildError):
        if KIND == "tar":
            with open_tar(str(PATH)) as tar:
                for sample in tar.samples():
                    for member in sample.members:
                        assert len(tar.read(member)) == member.size
        else:
            spec = TableSpec(path=str(PATH), preset=None, columns={"caption": "caption"}, plural=True)
            for chunk in read_chunks(spec):
                assert len(chunk.rows["caption"].to_pylist()) == chunk.rows.num_rows


def seeds(folder: Path) -> None:
    """Inputs to begin with: whole files of that kind, small."""
    import io
    import tarfile

    import pyarrow as pa
    import pyarrow.parquet as pq

    folder.mkdir()
    if KIND == "tar":
        for number, kind in enumerate((tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)):
            with tarfile.open(folder / str(number), "w", format=kind) as archive:
                for name in ("é/0.jpg", "é/0.txt", "x" * 120 + ".json"):
                    member = tarfile.TarInfo(name)
                    member.size = 3
                    with contextlib.suppress(ValueError):  # what ustar cannot name
                        archive.addfile(member, io.BytesIO(b"abc"))
    elif KIND == "parquet":
        pq.write_table(pa.table({"caption": ["a", None, "b"], "url": ["c", "d", "e"]}), folder / "0")
        pq.write_table(pa.table({"caption": [["a", "b"], None, []]}), folder / "1")
    else:
        text = {"csv": 'caption,url\n"a ""b""",c\n', "tsv": "caption\turl\na\tb\n", "jsonl": '{"caption": "a"}\n'}[KIND]
        (folder / "0").write_text(text)


seeds(corpus := PATH.parent / "corpus")
atheris.Setup([*sys.argv, str(corpus), "-rss_limit_mb=2048", "-timeout=60"], read)
atheris.Fuzz()
