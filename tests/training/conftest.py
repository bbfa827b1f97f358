import importlib.util
import sys
from pathlib import Path


def known(name: str) -> None:
    """Tests are imported by path (--import-mode=importlib), so a helper they share is made known here."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).parent / f"{name}.py")
    sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[name])


known("tiny")
known("several")
