"""Makes the schemas beside it out of what their projects publish; README.md says where from.

``python make.py jobset CRD.yaml NAME`` reads a Kubernetes resource definition; ``python make.py skypilot NAME`` asks
the SkyPilot that is installed.
"""

import gzip
import json
import sys
from pathlib import Path
from typing import Any

import yaml

KEPT = ("x-kubernetes-preserve-unknown-fields",)


def strict(schema: Any) -> Any:
    """Without prose; where fields are listed, others are refused, as ``kubectl --validate=strict`` does."""
    if isinstance(schema, list):
        return [strict(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    prose = lambda key, value: key == "description" and isinstance(value, str)
    found = {key: strict(value) for key, value in schema.items() if not prose(key, value)}
    found = {k: v for k, v in found.items() if not k.startswith("x-kubernetes-") or k in KEPT}
    listed = isinstance(found.get("properties"), dict) and found.get("type") == "object"
    if listed and not any(k in found for k in (*KEPT, "additionalProperties")):
        found["additionalProperties"] = False
    return found


def resource(path: str) -> dict[str, Any]:
    """The schema of a resource definition, without what only its controller writes."""
    (version,) = yaml.safe_load(Path(path).read_text())["spec"]["versions"]
    schema = version["schema"]["openAPIV3Schema"]
    del schema["properties"]["status"]
    return strict(schema)


def write(name: str, schema: dict[str, Any]) -> None:
    """One file; the same bytes for the same schema."""
    text = json.dumps(schema, separators=(",", ":"), sort_keys=True).encode()
    (Path(__file__).parent / f"{name}.json.gz").write_bytes(gzip.compress(text, mtime=0))


def main(kind: str, *rest: str) -> None:
    """Writes what the command line asks for."""
    if kind == "jobset":
        path, name = rest
        write(name, resource(path))
        return
    from sky.utils import schemas

    (name,) = rest
    write(f"{name}-task", strict(schemas.get_task_schema()))
    write(f"{name}-resources", strict(schemas.get_resources_schema()))


if __name__ == "__main__":
    main(*sys.argv[1:])
