import importlib.util
import sys
from pathlib import Path

# Tests are imported by path (--import-mode=importlib), so the helper they share is made known here.
spec = importlib.util.spec_from_file_location("tiny", Path(__file__).parent / "tiny.py")
tiny = importlib.util.module_from_spec(spec)
sys.modules["tiny"] = tiny
spec.loader.exec_module(tiny)
