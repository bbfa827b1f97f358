"""The architectures that load, and how one is found for a config.json or for a backbone."""

from typing import Any

from dyncomp.core.errors import DyncompError
from dyncomp.pretrained import dense, sparse
from dyncomp.pretrained.fields import Fields
from dyncomp.pretrained.spec import Spec
from dyncomp.pretrained.tables import Architecture

ARCHITECTURES = (*dense.ARCHITECTURES, *sparse.ARCHITECTURES)


def find(fields: Fields) -> Architecture:
    """The architecture of a config.

    Raises:
      DyncompError: unknown; lists the known ones.
    """
    wanted = fields.get("model_type", str)
    for known in ARCHITECTURES:
        if known.model_type == wanted:
            return known
    names = ", ".join(known.model_type for known in ARCHITECTURES)
    raise DyncompError(f"{fields.where}: architecture {wanted!r} is not supported; known: {names}")


def find_for(spec: Spec) -> tuple[Architecture, dict[str, Any]]:
    """The first architecture whose config says exactly ``spec``, and that config.

    Raises:
      DyncompError: none does.
    """
    for known in ARCHITECTURES:
        config = known.write(spec)
        try:
            same = known.read(Fields(config)) == spec
        except DyncompError:
            continue
        if same:
            return known, {"architectures": [known.cls], "model_type": known.model_type, **config}
    names = ", ".join(known.model_type for known in ARCHITECTURES)
    raise DyncompError(f"cannot export this model: none of {names} can express it")
