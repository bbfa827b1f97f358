"""Points, options and the reading of schemas, shared by the tests of the engines."""

import gzip
import json
from pathlib import Path

import pytest

SCHEMAS = Path(__file__).parent / "schemas"
POINTS = [
    ["run", "quickstart", "--workdir", "/data/a", "--gin.experts.MoE.dispatch='mask'"],
    ["run", "quickstart", "--workdir", "/data/b c", "--gin.STEPS=2", "--gin.X=$HOME"],
]
"""Two points, with what shells treat specially."""
GIVEN = {
    "slurm": {"partition": "long", "sbatch": {"account": "me"}},
    "submitit": {"partition": "long", "sbatch": {"account": "me"}},
    "jobset": {"image": "registry/me/dyncomp:1", "storage": "checkpoints:/data", "queue": "mine"},
    "xpk": {"image": "registry/me/dyncomp:1", "storage": "fuse:/data", "cluster": "c"},
    "sky": {"image": "me/dyncomp:1", "storage": "gs://bucket:/data"},
}
"""What each engine needs."""


def problems(name: str, document) -> list[str]:
    """What a published schema, which refuses unknown fields, says against a document."""
    jsonschema = pytest.importorskip("jsonschema")
    schema = json.loads(gzip.decompress((SCHEMAS / f"{name}.json.gz").read_bytes()))
    found = jsonschema.Draft7Validator(schema).iter_errors(document)
    return [f"{error.json_path}: {error.message}" for error in found]
