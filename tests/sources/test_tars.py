"""Tar reading against webdataset's own reader and against tarfile, on good tars; on damaged ones, InputError alone."""

from __future__ import annotations

import gzip
import io
import os
import random
import shutil
import subprocess
import tarfile
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
import webdataset as wds
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from webdataset.tariterators import group_by_keys, tar_file_iterator

from graphbuild.errors import InputError
from graphbuild.sources.tars import Member, TarSample, expand_shards, open_tar, tar_stem

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}
Samples = list[tuple[str, dict[str, bytes]]]
quick = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def tar_bytes(members: Iterable[tuple[str, bytes]], format_: int = tarfile.USTAR_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format_) as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def read(path: Path) -> Samples:
    """What graphbuild finds: keys, extensions and contents, in order; contents by offset and size in the plain file."""
    with open_tar(str(path)) as tar:
        samples = tar.samples()
        assert all(tar.read(member) == _at(tar.path, member) for sample in samples for member in sample.members)
        return [(s.key, {m.extension: tar.read(m) for m in s.members}) for s in samples]


def _at(path: Path, member: object) -> bytes:
    with path.open("rb") as file:
        file.seek(member.offset)  # type: ignore[attr-defined]
        return file.read(member.size)  # type: ignore[attr-defined]


def by_webdataset(path: Path) -> Samples:
    """What webdataset's own reader finds in the same tar, but for what it makes of hidden files in folders."""
    with path.open("rb") as file:
        files: Iterator[dict[str, object]] = ({**f, "__url__": str(path)} for f in tar_file_iterator(file))
        grouped = list(group_by_keys(files))
    return [
        (sample["__key__"], {name: value for name, value in sample.items() if not name.startswith("__")})
        for sample in grouped
        if not sample["__key__"].endswith("/")
    ]


def refusal(path: Path) -> InputError:
    with pytest.raises(InputError) as caught:
        read(path)
    assert str(path) in caught.value.cause
    return caught.value


SHAPES: dict[str, list[str]] = {
    "pairs": ["000.jpg", "000.txt", "000.json", "001.jpg", "001.txt", "001.json"],
    "folders": ["a/0.jpg", "a/0.txt", "b/0.jpg", "b/0.txt", "./c/0.jpg", "./c/0.txt"],
    "dots in folders": ["v1.0/0.jpg", "v1.0/0.txt", "v1.1/x.y/0.jpg", "v1.1/x.y/0.txt"],
    "dots in names": ["photo.seg.png", "photo.jpg", "photo.caption.txt", "other.tar.gz", "other."],
    "hidden files": [".DS_Store", "0.jpg", "._0.jpg", "a/.hidden.txt", "1.jpg"],
    "no extension": ["README", "0.jpg", "LICENSE", "0.txt", "1.jpg"],
    "upper case": ["0.JPG", "0.Txt", "A.jpg", "A.txt.GZ", "a.jpg"],
    "meta files": ["__meta__.json", "__index__", "0.jpg", "__init__/0.jpg", "__a__.b__", "1.jpg", "x/__y__.jpg"],
    "absolute and upwards": ["/etc/0.jpg", "../0.jpg", "../../b/0.txt", "a/../0.jpg"],
    "spaces and quotes": ["a b.jpg", "a b.txt", " .jpg", "'\".jpg", "$(x);|&.jpg"],
    "backslashes and colons": ["C:\\x\\0.jpg", "C:\\x\\0.txt", "http://h/0.jpg"],
    "one key, many members": [f"0.part{number}.npy" for number in range(50)],
    "nothing of use": ["README", "LICENSE"],
    "nothing": [],
}
LONG = {
    "long names": ["d" * 90 + "/" + "k" * 90 + ".jpg", "d" * 90 + "/" + "k" * 90 + ".txt", "0.jpg"],
    "longer names": ["/".join(["folder" * 10] * 8) + "/key.jpg", "k" * 250 + ".jpg"],
    "unicode": ["犬/été.jpg", "犬/été.txt", "🐕.jpg", "e\u0301.jpg", "\u202eabc.jpg"],
    "control characters": ["a\x1b[31m.jpg", "a\nb.jpg", "\x07.txt"],
}


@pytest.mark.parametrize("format_", FORMATS)
@pytest.mark.parametrize("shape", [*SHAPES, *LONG])
def test_samples_are_those_of_webdataset_in_its_order(tmp_path: Path, shape: str, format_: str) -> None:
    names = {**SHAPES, **LONG}[shape]
    if format_ == "ustar" and shape == "longer names":
        pytest.skip("ustar cannot name them")
    path = tmp_path / "a.tar"
    path.write_bytes(tar_bytes([(name, f"{name}\n".encode() * 40) for name in names], FORMATS[format_]))
    assert read(path) == by_webdataset(path)


def test_samples_of_many_members_and_sizes_are_those_of_webdataset(tmp_path: Path) -> None:
    sizes = [0, 1, 511, 512, 513, 1023, 1024, 9_999, 100_000]
    path = tmp_path / "a.tar"
    path.write_bytes(tar_bytes([(f"{n:03}.{e}", os.urandom(n)) for n in sizes for e in ("jpg", "txt")]))
    assert [len(sample["jpg"]) for _, sample in read(path)] == sizes
    assert read(path) == by_webdataset(path)


@pytest.mark.parametrize("format_", FORMATS)
def test_offsets_are_those_of_tarfile(tmp_path: Path, format_: str) -> None:
    path = tmp_path / "a.tar"
    names = ["d" * 90 + f"/{number}.{e}" for number in range(20) for e in ("jpg", "txt")]
    path.write_bytes(tar_bytes([(name, os.urandom(700)) for name in names], FORMATS[format_]))
    with open_tar(str(path)) as tar:
        members = [member for sample in tar.samples() for member in sample.members]
        assert not tar.compressed
    with tarfile.open(path) as archive:
        for name, member in zip(names, members, strict=True):
            extracted = archive.extractfile(name)
            assert extracted is not None
            assert _at(path, member) == extracted.read()


@pytest.mark.skipif(shutil.which("tar") is None, reason="no tar program on this machine")
@pytest.mark.parametrize("kind", ["v7", "ustar", "gnu", "posix"])
def test_tars_written_by_the_tar_program_are_read(tmp_path: Path, kind: str) -> None:
    keys = ["a", "b/" + "k" * 60] if kind == "v7" else ["a", "d" * 60 + "/" + "k" * 60]
    for key in keys:
        (tmp_path / key).parent.mkdir(exist_ok=True)
        (tmp_path / f"{key}.jpg").write_bytes(os.urandom(3_000))
        (tmp_path / f"{key}.txt").write_text(f"caption of {key}")
    path = tmp_path / f"{kind}.tar"
    names = [f"{key}.{extension}" for key in keys for extension in ("jpg", "txt")]
    subprocess.run(["tar", f"--format={kind}", "-cf", path, *names], cwd=tmp_path, check=True)
    assert [key for key, _ in read(path)] == keys
    assert read(path) == by_webdataset(path)


def test_the_tars_of_other_people_are_read_as_webdataset_reads_them(shared_data: Path) -> None:
    counts = {}
    for name in ("compressed.tar", "nemo_curator_tests_image_data_00000.tar", "sample.tgz", "testgz.tar"):
        found = read(shared_data / "tars" / name)
        counts[name] = len(found)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dataset = list(wds.WebDataset(str(shared_data / "tars" / name), shardshuffle=False))
        assert [key for key, _ in found] == [sample["__key__"] for sample in dataset]
        for (_, members), sample in zip(found, dataset, strict=True):
            assert members == {name: value for name, value in sample.items() if not name.startswith("__")}
    assert counts["sample.tgz"] == 90
    assert counts["testgz.tar"] == 1_000


def test_a_gzipped_tar_reads_like_the_plain_one_without_offsets(tmp_path: Path) -> None:
    content = tar_bytes([("0.jpg", b"x"), ("0.txt", b"y")])
    (tmp_path / "a.tar").write_bytes(content)
    for name in ("a.tgz", "a.tar.gz", "gzipped.tar"):
        (tmp_path / name).write_bytes(gzip.compress(content))
        assert read(tmp_path / name) == read(tmp_path / "a.tar")
        with open_tar(str(tmp_path / name)) as tar:
            assert tar.compressed


def test_devices_and_folders_are_no_members(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as archive:
        for name, kind in {
            "folder": tarfile.DIRTYPE,
            "folder.jpg": tarfile.DIRTYPE,
            "folder link": tarfile.SYMTYPE,
            ".hidden.jpg": tarfile.LNKTYPE,
            "0.jpg": tarfile.REGTYPE,
            "device.jpg": tarfile.CHRTYPE,
            "block.jpg": tarfile.BLKTYPE,
            "pipe.jpg": tarfile.FIFOTYPE,
            "0.txt": tarfile.REGTYPE,
        }.items():
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            archive.addfile(info)
    assert read(path) == by_webdataset(path) == [("0", {"jpg": b"", "txt": b""})]


def test_what_macos_puts_beside_is_no_sample(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(
        tar_bytes([(name, b"") for name in ("./0.jpg", "__MACOSX/./._0.jpg", "__MACOSX/x.jpg", "a/._1.jpg")])
    )
    assert read(path) == [("./0", {"jpg": b""})]


def test_a_whole_extension_of_an_image_goes_before_one_that_ends_in_it() -> None:
    def image(*extensions: str, wanted: str | None = None) -> str | None:
        found = TarSample("k", [Member(extension, 0, 0) for extension in extensions]).image(wanted)
        return found and found.extension

    assert image("txt", "jpeg", "png") == "jpeg"
    assert image("depth.png", "mask.png", "jpg", "txt") == "jpg"
    assert image("txt", "seg.png", "depth.png") == "seg.png"
    assert image("txt", "json", "jpgx") is None
    assert image("depth.png", "jpg", wanted="depth.png") == "depth.png"
    assert image("jpg", "txt", wanted="depth.png") is None
    assert image("img", "jpg", wanted="img") == "img"


# -- what webdataset would pass over in silence


@pytest.mark.parametrize(
    ("names", "word"),
    [
        (["0.jpg", "0.jpg"], "0.jpg"),
        (["0.jpg", "0.txt", "0.txt"], "0.txt"),
        (["0.jpg", "0.JPG"], "0.jpg"),
        (["0.jpg", "0.txt", "1.jpg", "0.json"], "key '0' appears twice"),
        (["a/0.jpg", *(f"{n}.jpg" for n in range(500)), "a/0.txt"], "key 'a/0' appears twice"),
    ],
)
def test_duplicate_keys_and_names_are_refused_with_their_place(tmp_path: Path, names: list[str], word: str) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(tar_bytes([(name, b"content") for name in names]))
    error = refusal(path)
    assert word in error.cause
    assert f"byte {1024 * (len(names) - 1):,}" in error.cause
    assert "write the tar again" in error.fix


@pytest.mark.skipif(shutil.which("tar") is None, reason="no tar program on this machine")
@pytest.mark.parametrize("kind", ["hard", "symbolic"])
def test_links_in_place_of_files_are_refused_and_the_options_that_are_named_mend_them(
    tmp_path: Path, kind: str
) -> None:
    for name in ("0.jpg", "0.txt"):
        (tmp_path / name).write_bytes(name.encode())
        other = tmp_path / name.replace("0", "1")
        other.hardlink_to(tmp_path / name) if kind == "hard" else other.symlink_to(name)
    path, names = tmp_path / "a.tar", ["0.jpg", "0.txt", "1.jpg", "1.txt"]
    subprocess.run(["tar", "-cf", path, *names], cwd=tmp_path, check=True)
    error = refusal(path)
    assert f"a.tar: member '1.jpg' is a {kind} link to '0.jpg'" in error.cause
    options = error.fix.split()[-2:]  # --dereference alone makes hard links of symbolic ones
    subprocess.run(["tar", *options, "-cf", path, *names], cwd=tmp_path, check=True)
    assert read(path) == [(key, {"jpg": b"0.jpg", "txt": b"0.txt"}) for key in "01"]


@pytest.mark.skipif(shutil.which("tar") is None, reason="no tar program on this machine")
@pytest.mark.parametrize("kind", ["gnu", "posix --sparse-version=0.0", "posix --sparse-version=1.0"])
def test_sparse_members_are_refused_for_their_bytes_do_not_lie_in_one_place(tmp_path: Path, kind: str) -> None:
    with (tmp_path / "0.npy").open("wb") as file:
        file.write(b"head")
        file.seek(1 << 20)
        file.write(b"tail")
    path = tmp_path / "a.tar"
    subprocess.run(["tar", *f"--format={kind}".split(), "--sparse", "-cf", path, "0.npy"], cwd=tmp_path, check=True)
    whole = path.read_bytes()
    if len(whole) > 1 << 19:
        pytest.skip("this file system has no holes")
    assert "'0.npy' is stored as a sparse file" in refusal(path).cause
    for length in range(512, 4_096, 512):  # tarfile itself never ends on a cut sparse map
        path.write_bytes(whole[:length])
        refusal(path)


def test_names_that_are_not_utf_8_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    for format_ in FORMATS.values():
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w", format=format_, encoding="latin-1") as archive:
            archive.addfile(tarfile.TarInfo("caf\u00e9.jpg"))
        path.write_bytes(buffer.getvalue())
        if format_ != tarfile.PAX_FORMAT:
            assert "not UTF-8" in refusal(path).cause
    assert [key for key, _ in read(path)] == ["caf\u00e9"]  # PAX has it in UTF-8 whatever the writer's locale


def test_tars_joined_by_cat_are_refused_for_readers_see_the_first_alone(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(tar_bytes([("0.jpg", b"x")]) + tar_bytes([("1.jpg", b"y")]))
    assert [key for key, _ in by_webdataset(path)] == ["0"]
    error = refusal(path)
    assert "behind the archive's end at byte 1,024" in error.cause
    assert "joined by cat" in error.fix


def test_any_zero_padding_behind_the_end_is_fine(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    content = tar_bytes([("0.jpg", b"x")])
    for length in (1_536, 2_048, 2_049, 10_240, 3_000_000):
        path.write_bytes(content[:1_536].ljust(length, b"\0"))
        assert read(path) == [("0", {"jpg": b"x"})]


@pytest.mark.parametrize(
    "content",
    {
        "empty": b"",
        "text": b"no tar at all\n" * 100,
        "zip": b"PK\x03\x04" + bytes(2_000),
        "html": b"<!DOCTYPE html>" + b" " * 5_000,
        "gzipped text": gzip.compress(b"no tar" * 1_000),
        "gzipped nothing": gzip.compress(b""),
        "gzip head alone": b"\x1f\x8b",
        "one zero block less": bytes(511),
    }.items(),
    ids=lambda item: item[0],
)
def test_what_is_no_tar_is_refused(tmp_path: Path, content: tuple[str, bytes]) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(content[1])
    refusal(path)


def test_headers_made_to_confuse_are_refused_and_end(tmp_path: Path) -> None:
    def header(name: str, **fields: bytes) -> bytes:
        block = bytearray(tarfile.TarInfo(name).tobuf(tarfile.USTAR_FORMAT))
        for field, value in fields.items():
            at = {"size": 124, "type": 156}[field]
            block[at : at + len(value)] = value
        block[148:156] = b" " * 8
        block[148:156] = b"%06o\0 " % sum(block)
        return bytes(block)

    negative = b"\xff" * 11 + b"\x00"  # base 256, minus 256
    huge = b"\x80" + b"\x00" * 3 + b"\x7f" + b"\xff" * 7
    first = tar_bytes([("0.jpg", b"x")])[:1_024]
    cases = [
        first + header("1.jpg", size=negative),
        first + header("1.jpg", size=b"\xff" * 10 + b"\xfc\x00"),  # back to the first header
        first + header("1.jpg", size=huge),
        first + header("x", type=b"x", size=negative),
        first + header("x", type=b"L", size=negative),
        first + header("x", type=b"V", size=b"\xff" * 10 + b"\xfc\x00"),
        first + header("x", type=b"x", size=b"00000001000\0") + b"11 size=-5\n".ljust(512, b"\0") + header("1.jpg"),
        first + header("x", type=b"L", size=b"00000001000\0") + b"9".ljust(512, b"\0"),
        first + header("x", type=b"x", size=b"00000001000\0") * 3_000,
    ]
    path = tmp_path / "a.tar"
    for content in cases:
        path.write_bytes(content + bytes(1_024))
        refusal(path)


# -- properties

name_part = st.text(
    st.characters(exclude_categories=["Cs"], exclude_characters="./\0") | st.sampled_from("ab_ -é犬"), min_size=1
)
keys = st.lists(st.lists(name_part, min_size=1, max_size=3).map("/".join), unique=True, max_size=8).filter(
    lambda found: not any(key.startswith("__") for key in found)
)
extensions = st.sampled_from(["jpg", "txt", "json", "seg.png", "txt.gz", "x"])
contents = st.binary(max_size=2_000)
members = st.dictionaries(extensions, contents, min_size=1, max_size=3)


@quick
@given(keys, st.data(), st.sampled_from(["gnu", "pax"]))
def test_random_samples_written_by_tarfile_come_back(
    tmp_path: Path, keys: list[str], data: st.DataObject, format_: str
) -> None:
    samples = [(key, data.draw(members)) for key in keys]
    names = [(f"{key}.{extension}", content) for key, sample in samples for extension, content in sample.items()]
    path = tmp_path / "a.tar"
    path.write_bytes(tar_bytes(names, FORMATS[format_]))
    assert read(path) == samples


@quick
@given(keys, st.data(), st.booleans())
def test_random_samples_written_by_webdataset_come_back(
    tmp_path: Path, keys: list[str], data: st.DataObject, compress: bool
) -> None:
    written = st.dictionaries(st.sampled_from(["bin", "seg.bin", "x.bin"]), contents, min_size=1)
    samples = [(key, data.draw(written)) for key in keys]
    path = tmp_path / ("a.tar.gz" if compress else "a.tar")
    with wds.TarWriter(str(path), compress=compress) as writer:
        for key, sample in samples:
            writer.write({"__key__": key, **sample})
    assert read(path) == [(key, dict(sorted(sample.items()))) for key, sample in samples]


ORIGINALS = {
    "ustar": tar_bytes([(f"{n}.{e}", f"{n} {e}".encode() * n * 90) for n in range(3) for e in ("jpg", "txt")]),
    "gnu": tar_bytes([("d" * 120 + f"/{n}.jpg", b"x" * n * 400) for n in range(3)], tarfile.GNU_FORMAT),
    "pax": tar_bytes([(f"犬{n}.txt", b"x" * n * 400) for n in range(3)], tarfile.PAX_FORMAT),
}


def check_damaged(path: Path, original: Samples) -> None:
    """The same samples, or InputError. Names in GNU's and PAX's extra headers are under no checksum: these may differ,
    but then as webdataset reads them."""
    try:
        found = read(path)
    except InputError:
        return
    if [(key, {e: len(c) for e, c in sample.items()}) for key, sample in found] != [
        (key, {e: len(c) for e, c in sample.items()}) for key, sample in original
    ]:
        assert path.stem != "ustar"
        assert found == by_webdataset(path)


@pytest.mark.parametrize("format_", FORMATS)
def test_a_tar_cut_anywhere_is_refused_or_read_whole(tmp_path: Path, format_: str) -> None:
    content = ORIGINALS[format_]
    path = tmp_path / f"{format_}.tar"
    path.write_bytes(content)
    original = read(path)
    end = len(content.rstrip(b"\0"))
    needed = -(-end // 512) * 512 + 512  # members, their padding, and one block of zeros
    for length in range(0, needed, 13):
        path.write_bytes(content[:length])
        refusal(path)
    for length in (needed, needed + 1, len(content)):
        path.write_bytes(content[:length])
        assert read(path) == original


@pytest.mark.parametrize("format_", FORMATS)
def test_a_tar_with_any_byte_changed_reads_the_same_samples_or_is_refused(tmp_path: Path, format_: str) -> None:
    content = ORIGINALS[format_]
    path = tmp_path / f"{format_}.tar"
    path.write_bytes(content)
    original = read(path)
    draw = random.Random(1)
    for place in draw.sample(range(len(content.rstrip(b"\0")) + 1_024), 500):
        damaged = bytearray(content)
        damaged[place] ^= draw.randrange(1, 256)
        path.write_bytes(damaged)
        check_damaged(path, original)


@quick
@given(st.data(), st.sampled_from(list(FORMATS)))
def test_a_tar_with_many_faults_reads_or_is_refused(tmp_path: Path, data: st.DataObject, format_: str) -> None:
    damaged = bytearray(ORIGINALS[format_])
    for _ in range(data.draw(st.integers(1, 8))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path / "gnu.tar"
    path.write_bytes(damaged[: data.draw(st.integers(0, len(damaged)))])
    try:
        read(path)
    except InputError:
        return


@quick
@given(st.data())
def test_a_gzipped_tar_with_a_changed_byte_or_cut_reads_the_same_or_is_refused(
    tmp_path: Path, data: st.DataObject
) -> None:
    whole = gzip.compress(ORIGINALS["ustar"], mtime=0)
    path = tmp_path / "ustar.tgz"
    path.write_bytes(whole)
    original = read(path)
    damaged = bytearray(whole)
    if data.draw(st.booleans()):
        del damaged[data.draw(st.integers(0, len(whole) - 1)) :]
    else:
        damaged[data.draw(st.integers(0, len(whole) - 1))] ^= data.draw(st.integers(1, 255))
    path.write_bytes(damaged)
    check_damaged(path, original)


# -- which tars


def test_patterns_name_tars_in_order(tmp_path: Path) -> None:
    for name in ("b.tar", "a.tar", "c.tgz", "x[1].tar"):
        (tmp_path / name).write_bytes(tar_bytes([]))

    def names(pattern: str) -> list[str]:
        return [Path(url).name for url in expand_shards(f"{tmp_path}/{pattern}")]

    assert names("*.tar") == ["a.tar", "b.tar", "x[1].tar"]
    assert names("{b,a}.tar") == ["b.tar", "a.tar"]
    assert names("?.t*") == ["a.tar", "b.tar", "c.tgz"]
    assert names("") == ["a.tar", "b.tar", "c.tgz", "x[1].tar"]
    assert names("x[1].tar") == ["x[1].tar"]
    assert expand_shards("/d/{000..002}.tar") == ["/d/000.tar", "/d/001.tar", "/d/002.tar"]


@pytest.mark.parametrize("pattern", ["*.tar", "{0..3.tar", "no/such/*", "nothing?"])
def test_a_pattern_that_names_no_tar_is_refused(tmp_path: Path, pattern: str) -> None:
    with pytest.raises(InputError, match=r"--shards|no tar matches"):
        expand_shards(f"{tmp_path}/{pattern}")
    with pytest.raises(InputError, match="--shards"):
        expand_shards(f"nosuch://{tmp_path}/{pattern}")


def test_two_tars_of_one_name_are_refused(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "0.tar").write_bytes(tar_bytes([]))
    with pytest.raises(InputError) as caught:
        expand_shards(f"{tmp_path}/*/0.tar")
    assert f"{tmp_path}/a/0.tar" in caught.value.cause
    assert f"{tmp_path}/b/0.tar" in caught.value.cause


def test_stems_name_sidecars() -> None:
    assert [tar_stem(url) for url in ("s3://b/0.tar", "/x/1.tar.gz", "2.tgz", "a.b.tar", "x.tar.tar")] == [
        "0", "1", "2", "a.b", "x.tar"
    ]  # fmt: skip
