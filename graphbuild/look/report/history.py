"""The builds of one store, as its reports met them: a line of JSON each, in a file beside the page.

It is no file of the store's steps: a store that was built again is byte for byte one that was built once.
"""

from __future__ import annotations

import json
from datetime import UTC, datetime

from graphbuild.errors import ConfigError
from graphbuild.recipe import resolve
from graphbuild.store.store import Json, Store

HISTORY = "history.jsonl"


def builds(store: Store, folder: Store) -> list[Json]:
    """Every graph that reports in a folder have shown, the newest last: reported (UTC), what it was made of and with,
    its certificate, and what has changed since the one before. The graph that is there now gets a line if it is new.

    Raises:
        ConfigError: the file cannot be read.
    """
    manifest, path = store.manifest(), folder.display(HISTORY)
    lines = folder.read_bytes(HISTORY).decode(errors="replace").splitlines() if folder.exists(HISTORY) else []
    try:
        past: list[Json] = [json.loads(line) for line in lines]
    except ValueError as error:
        raise ConfigError(f"{path} is damaged ({error})", "remove it: the next report begins a new one") from error
    parts = {"graph": ("k", "engine", "fingerprint"), "embeddings": ("encoder", "d", "fingerprint")}
    now = {part: {name: manifest[part][name] for name in names} for part, names in parts.items()}
    now |= {"nodes": manifest["stages"]["search"]["counts"]["nodes"], "certificate": manifest["recall"]}
    now |= {"settings": resolve(store, "index", {}).index.model_dump(exclude={"memory", "device"})}
    if not past or past[-1] != {**now, "reported": past[-1].get("reported")}:
        past.append({"reported": datetime.now(UTC).strftime("%Y-%m-%d %H:%M"), **now})
        folder.write_bytes(HISTORY, "".join(f"{json.dumps(one)}\n" for one in past).encode())
    told = [{**one["settings"], "nodes": one["nodes"], **one["embeddings"]} for one in past]
    return [
        {
            **one,
            "changed": [
                f"{name}: {before.get(name)} to {after[name]}"
                for name in after
                if name != "fingerprint" and before.get(name) != after[name]
            ],
        }
        for one, before, after in zip(past, [told[0], *told], told, strict=False)
    ]
