"""What a finished verb says: counts in and out, why they differ, and what to do next."""

from __future__ import annotations

import re

from graphbuild.graph.tasks import living_nodes
from graphbuild.job.steps import STEPS
from graphbuild.machine.terminal import counted
from graphbuild.recipe import resolve
from graphbuild.sources.fetched import OPT_OUT, REFUSED, fetch_failed, fetch_refused, refused
from graphbuild.store.shards import node_count, present_shards
from graphbuild.store.store import Json, Store

NEXT = {"download": "embed", "pack": "embed", "embed": "index", "index": "export", "export": "verify", "run": "verify"}
NOT_OF_AGE = rf"{REFUSED}|{OPT_OUT}|Connection refused|HTTP Error (429|5\d\d)"  # neither an old list nor DNS
EXPORTED = {
    "export": ("sidecar", "shards/"),
    "inline": ("tar", "inline/"),
    "columns": ("parquet file", "columns/"),
    "cluster": ("tar", "clustered/"),
}


def summary(verb: str, manifest: Json, store: Store) -> str:
    """The closing lines of a verb, from the manifest alone."""
    parts = {"download": _download, "pack": _pack, "embed": _embed, "index": _index, "export": _export}
    ran = {step.verb for step in STEPS if step.name in manifest["stages"]}
    verbs = [name for name in parts if name in ran] if verb in ("run", "demo") else [verb]
    lines = []
    for name in verbs:
        lines += parts[name](manifest)
        left = refused(manifest["download"]["failures"]) if name == "download" else 0
        lines += [refused_line(left, store)] if left else []
    if verb == "download" and not manifest["stages"]["download"]["counts"]["images"]:
        command = fetch_failed(store, manifest["download"]["failures"])
        lines += [f"next      {command}"] if command else []
    elif verb in NEXT:
        lines.append(f"next      graphbuild {NEXT[verb]} {store.url}")
    if NEXT.get(verb) == "verify":
        lines += _training(manifest, store)
    return "\n".join(lines)


def _training(manifest: Json, store: Store) -> list[str]:
    """How a loader gets at the exported tars, a line each; none where the samples came from no tars."""
    lines = []
    urls = present_shards(store, manifest).table["tar_url"].drop_null()
    if "export" in manifest["stages"] and len(urls):
        elsewhere = resolve(store, "export", {}).embed.shards
        sidecars = f'"{store.url}/shards"'
        lines.append(sidecars if elsewhere is None else f'"{elsewhere}", sidecars={sidecars}')
    if "cluster" in manifest["stages"]:
        lines.append(f'"{store.url}/clustered"')
    return [f"train     graphbuild.torch.graph_webdataset({each}, batch_size=...)" for each in lines]


def refused_line(count: int, store: Store) -> str:
    """Where the URLs that were refused can be had, a line."""
    return f"          {count:,} refused: `{fetch_refused(store)}` if the list may name them"


def _download(manifest: Json) -> list[str]:
    listed, fetched = manifest["stages"]["urls"]["counts"], manifest["stages"]["download"]["counts"]
    urls, failures = fetched["urls"], manifest["download"]["failures"]
    share = fetched["images"] / urls
    lines = [
        f"download  {listed['urls'] + listed['rejected']:,} rows -> {urls:,} URLs "
        f"-> {fetched['images']:,} images ({share:.1%})"
    ]
    if listed["rejected"]:
        lines.append(f"          {listed['rejected']:,} rows rejected, see rejected/urls/")
    lines += [f"          {count:6,} {reason}" for reason, count in list(failures.items())[:10]]
    worst = [(name, host) for name, host in manifest["download"]["hosts"].items() if host["failed"] >= 10]
    lines += [f"          {host['failed']:6,} of {host['urls']:,} URLs at {name}" for name, host in worst[:3]]
    placeholders = manifest["download"]["placeholders"]
    if placeholders["images"]:
        lines.append(
            f"          {placeholders['urls']:6,} URLs gave {placeholders['images']} image(s) byte for byte the same: "
            "placeholders? (kept)"
        )
    if ignored := manifest["download"].get("opt_out_ignored"):
        lines.append(f"          {ignored:6,} URLs were fetched with --ignore-opt-out")
    if share < 0.5:
        aged = sum(count for reason, count in failures.items() if not re.search(NOT_OF_AGE, reason))
        why = "; an old list, or DNS overloaded (fewer --threads)?" if aged > sum(failures.values()) / 2 else ""
        lines.append(f"          WARNING: more than half of the URLs failed{why}")
    return lines


def _pack(manifest: Json) -> list[str]:
    entry = manifest["stages"]["pack"]
    counts, tars = entry["counts"], counted(entry["tasks"], "tar")
    lines = [f"pack      {counts['rows']:,} rows -> {counts['samples']:,} samples in {tars}, in shards/"]
    reasons = list(manifest["pack"]["rejected"].items())
    lines += [f"          {count:6,} rejected: {reason}" for reason, count in reasons[:10]]
    return lines + (["          see rejected/pack/"] if counts["rejected"] else [])


def _embed(manifest: Json) -> list[str]:
    embeddings = manifest["embeddings"]
    if "vectors" in manifest["stages"]:
        return [f"embed     {manifest['stages']['vectors']['counts']['nodes']:,} ready vectors, d = {embeddings['d']}"]
    scanned = manifest["stages"]["scan"]["counts"]
    if "joined" in embeddings:
        lines = [
            f"embed     {node_count(manifest):,} of {scanned['samples']:,} samples have a vector, joined "
            f"{embeddings['joined']}, d = {embeddings['d']}"
        ]
        unused = manifest["stages"]["number"]["counts"].get("vectors_without_sample", 0)
        lines += [f"          {unused:6,} vectors without a sample, see rejected/number/"] if unused else []
        lines += [f"          {count:6,} samples without: {reason}" for reason, count in manifest["rejected"].items()]
        return lines + _without_image(manifest)
    lines = [
        f"embed     {scanned['captions']:,} captions -> {living_nodes(manifest):,} nodes (distinct texts), "
        f"d = {embeddings['d']}, {embeddings['encoder']}"
    ]
    gone = node_count(manifest) - living_nodes(manifest)
    lines += [f"          {gone:6,} nodes of tars that are gone keep their numbers"] if gone else []
    if embeddings.get("truncated"):
        lines.append(f"          {embeddings['truncated']:6,} cut at {embeddings['max_tokens']} tokens")
    if embeddings.get("static"):
        lines.append("          a static encoder: vectors without context, for a quick look")
    fidelity = manifest.get("fidelity", {})
    if fidelity.get("mean_cosine") is not None:  # older versions stored NaN
        lines.append(
            f"          {fidelity['texts']} texts encoded again in float32, to check: cosine to the stored vectors "
            f"{fidelity['mean_cosine']:.6f} on average, {fidelity['min_cosine']:.6f} at worst"
        )
    lines += [f"          {count:6,} rejected: {reason}" for reason, count in manifest["rejected"].items()]
    return lines + _without_image(manifest)


def _index(manifest: Json) -> list[str]:
    edges, recall = manifest["stages"]["search"]["counts"]["edges"], manifest["recall"]
    return [
        f"index     {edges:,} edges, k = {recall['k']}; recall@{recall['k']} {recall['recall']:.6f} "
        f"on {recall['sampled_nodes']:,} nodes (95%: {recall['recall_95_low']:.4f} to {recall['recall_95_high']:.4f})"
    ]


def _export(manifest: Json) -> list[str]:
    lines = []
    for stage, (file, folder) in EXPORTED.items():
        if stage in manifest["stages"]:
            tasks, counts = (manifest["stages"][stage][name] for name in ("tasks", "counts"))
            lines.append(f"export    {counted(counts['samples'], 'sample')} in {counted(tasks, file)}, in {folder}")
    if counts["without_node"]:
        what = "vector" if "joined" in manifest["embeddings"] else "usable caption"
        lines.append(f"          {counts['without_node']:6,} samples without a {what}: loaders leave them out")
    if left_out := counts.get("not_selected"):
        lines.append(f"          {left_out:6,} samples are not selected: in their sidecars they have no node")
    return lines + _without_image(manifest)


def _without_image(manifest: Json) -> list[str]:
    """A line of the tars' samples whose members are no images (`graphbuild.sources.tars.image_extension`)."""
    count = manifest["stages"].get("scan", {}).get("counts", {}).get("without_image", 0)
    said = "samples without an image (--image-member names another member): loaders leave them out"
    return [f"          {count:6,} {said}"] if count else []
