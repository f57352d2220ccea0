"""The libraries that graphbuild is measured against: each one's all-points k-NN graph, at settings along its curve.

Each takes unit vectors float32 [n, d] and k, and returns ids [n, >= k] of any integer type, nearest first; whether a
node's own id is among them is the library's choice. Settings were tuned on the captions set at k = 32.

    pip install pynndescent hnswlib usearch pipnn
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

THREADS = 2
SETTINGS: dict[str, list[dict[str, Any]]] = {
    "faiss.knn": [{}],
    "faiss HNSW": [{"M": 16, "efc": 40, "ef": 40}, {"M": 16, "efc": 80, "ef": 128}],
    "faiss IVF": [{"nprobe": 12}, {"nprobe": 48}],
    "faiss NNDescent": [{"K": 48}],
    "pynndescent": [
        {"n_trees": 8, "n_iters": 3, "max_candidates": 22},
        {"n_trees": 8, "n_iters": 4, "max_candidates": 24},
        {},
        {"extra": 12},
    ],
    "hnswlib": [{"M": 16, "efc": 60, "ef": 48}, {"M": 16, "efc": 100, "ef": 128}],
    "usearch": [{"M": 16, "efc": 64, "ef": 48}, {"M": 16, "efc": 100, "ef": 128}],
    "pipnn": [{"runs": 1}, {"runs": 2}],
}
Lists = np.ndarray


def faiss_module() -> Any:
    from graphbuild.knn.faiss_index import import_faiss

    faiss = import_faiss()
    faiss.omp_set_num_threads(THREADS)
    return faiss


def faiss_knn(x: np.ndarray, k: int) -> Lists:
    faiss = faiss_module()
    return faiss.knn(x, x, k + 1, metric=faiss.METRIC_INNER_PRODUCT)[1]


def faiss_hnsw(x: np.ndarray, k: int, M: int, ef: int, efc: int) -> Lists:
    faiss = faiss_module()
    index = faiss.IndexHNSWFlat(x.shape[1], M, faiss.METRIC_INNER_PRODUCT)
    index.hnsw.efConstruction, index.hnsw.efSearch = efc, ef
    index.add(x)
    return index.search(x, k + 1)[1]


def faiss_ivf(x: np.ndarray, k: int, nprobe: int) -> Lists:
    faiss = faiss_module()
    index = faiss.index_factory(x.shape[1], f"IVF{int(len(x) ** 0.5)},Flat", faiss.METRIC_INNER_PRODUCT)
    index.train(x[np.random.default_rng(0).choice(len(x), min(len(x), 65_536), replace=False)])
    index.add(x)
    index.nprobe = nprobe
    return index.search(x, k + 1)[1]


def faiss_nndescent(x: np.ndarray, k: int, K: int) -> Lists:
    faiss = faiss_module()
    index = faiss.IndexNNDescentFlat(x.shape[1], K, faiss.METRIC_INNER_PRODUCT)
    index.add(x)
    return faiss.vector_to_array(index.nndescent.final_graph).reshape(len(x), K)


def pynndescent_(x: np.ndarray, k: int, extra: int = 0, **settings: Any) -> Lists:
    import pynndescent

    index = pynndescent.NNDescent(x, metric="dot", n_neighbors=k + 1 + extra, n_jobs=THREADS, **settings)
    return index.neighbor_graph[0]


def hnswlib_(x: np.ndarray, k: int, M: int, efc: int, ef: int) -> Lists:
    import hnswlib

    index = hnswlib.Index("ip", x.shape[1])
    index.init_index(len(x), ef_construction=efc, M=M)
    index.set_num_threads(THREADS)
    index.add_items(x)
    index.set_ef(ef)
    return index.knn_query(x, k + 1)[0]


def usearch_(x: np.ndarray, k: int, M: int, efc: int, ef: int) -> Lists:
    from usearch.index import Index

    index = Index(ndim=x.shape[1], metric="ip", dtype="f16", connectivity=M, expansion_add=efc, expansion_search=ef)
    index.add(np.arange(len(x)), x, threads=THREADS)
    return index.search(x, k + 1, threads=THREADS).keys


def pipnn_(x: np.ndarray, k: int, **settings: Any) -> Lists:
    import pipnn

    return pipnn.self_knn_graph(x, k, metric="cosine", n_jobs=THREADS, **settings)[0]


PEERS: dict[str, Callable[..., Lists]] = {
    "faiss.knn": faiss_knn,
    "faiss HNSW": faiss_hnsw,
    "faiss IVF": faiss_ivf,
    "faiss NNDescent": faiss_nndescent,
    "pynndescent": pynndescent_,
    "hnswlib": hnswlib_,
    "usearch": usearch_,
    "pipnn": pipnn_,
}
