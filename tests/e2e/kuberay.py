"""The schemas of KubeRay's resources, and what Kubernetes says of a manifest by them.

kuberay.json holds them, from the CRDs of KubeRay 1.7.0 (Apache License 2.0), without descriptions and status, and with
equal parts written once: 40 kB in place of 2.3 MB. To take them from a newer release's ray-operator/config/crd/bases:

    python tests/e2e/kuberay.py VERSION ray.io_rayclusters.yaml ray.io_rayjobs.yaml > tests/e2e/kuberay.json
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import yaml

SCHEMAS = Path(__file__).with_name("kuberay.json")
LEFT_OUT = ("description", "x-kubernetes-list-type", "x-kubernetes-list-map-keys", "x-kubernetes-map-type")
SHORT = 150  # characters of a part that is not worth a name


def faults(manifest: dict[str, Any]) -> list[str]:
    """What is wrong with a resource of ray.io/v1; a field that the schema does not know, too, which a server drops."""
    schemas = json.loads(SCHEMAS.read_text())
    strict = _strict({"$defs": schemas["$defs"], **schemas[manifest["kind"]]})
    return [
        f"{error.json_path}: {error.message}" for error in jsonschema.Draft202012Validator(strict).iter_errors(manifest)
    ]


def _strict(schema: Any, *, is_schema: bool = True) -> Any:
    """With no fields but those that are named, where any are."""
    if isinstance(schema, list):
        return [_strict(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    found = {name: _strict(part, is_schema=name not in ("properties", "$defs")) for name, part in schema.items()}
    is_open = {"additionalProperties", "x-kubernetes-preserve-unknown-fields"} & schema.keys()
    return {**found, "additionalProperties": False} if is_schema and "properties" in schema and not is_open else found


def schemas_of(version: str, crds: list[Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for crd in crds:
        schema = next(one["schema"]["openAPIV3Schema"] for one in crd["spec"]["versions"] if one["name"] == "v1")
        del schema["properties"]["status"]
        found[crd["spec"]["names"]["kind"]] = _without_words(schema)
    times, named = Counter(_text(part) for part in _parts(found)), dict[str, Any]()

    def shared(part: Any, *, top: bool = False) -> Any:
        if isinstance(part, list):
            return [shared(one) for one in part]
        if not isinstance(part, dict):
            return part
        text = _text(part)
        if top or len(text) <= SHORT or times[text] == 1 or not isinstance(part.get("type"), str):
            return {name: shared(one) for name, one in part.items()}
        name = hashlib.sha256(text.encode()).hexdigest()[:7]
        if name not in named:
            named[name] = shared(part, top=True)
        return {"$ref": f"#/$defs/{name}"}

    origin = (
        f"RayCluster and RayJob of KubeRay {version}, github.com/ray-project/kuberay, Apache License 2.0; shortened"
    )
    return {"$comment": origin, **{kind: shared(schema) for kind, schema in found.items()}, "$defs": named}


def _without_words(part: Any, *, names: bool = False) -> Any:
    """A schema without what does not decide; names: a part whose keys are fields, which may be called as they like."""
    if isinstance(part, list):
        return [_without_words(one) for one in part]
    if not isinstance(part, dict):
        return part
    kept = {name: one for name, one in part.items() if names or name not in LEFT_OUT}
    return {name: _without_words(one, names=name == "properties" and not names) for name, one in kept.items()}


def _parts(schema: Any) -> Iterator[Any]:
    if isinstance(schema, dict):
        yield schema
    for part in schema.values() if isinstance(schema, dict) else schema if isinstance(schema, list) else ():
        yield from _parts(part)


def _text(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


if __name__ == "__main__":
    made = schemas_of(sys.argv[1], [yaml.safe_load(Path(path).read_text()) for path in sys.argv[2:]])
    lines = [f'"{name}": {_text(made[name])}' for name in ("$comment", "RayCluster", "RayJob")]
    defs = ",\n".join(f'"{name}": {_text(part)}' for name, part in sorted(made["$defs"].items()))
    sys.stdout.write("{" + ",\n".join([*lines, f'"$defs": {{\n{defs}\n}}']) + "}\n")
