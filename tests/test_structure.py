"""The shape of the repository: rooms, imports, sizes, what may be committed."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
KERNELS = "dyncomp_kernels"
LIGHT = (
    *("transformers", "torch", "gin", "datasets", "pandas", "matplotlib", "sklearn"),
    *("tensorflow", "diffrax", "equinox"),
)
TOP = {
    *("pyproject.toml", "dyncomp", "kernels", "experiments", "configs", "tests", "README.md"),
    *("Makefile", "docs", ".ci", "constraints.txt", "LICENSE", "CHANGELOG.md"),
    *(".gitignore", ".gitattributes", ".pre-commit-config.yaml"),
}


def rooms() -> list[str]:
    """The rooms of docs/design.md, lowest first."""
    text = (ROOT / "docs" / "design.md").read_text()
    block = re.search(r"## Rooms.*?```\n(.*?)```", text, re.S)
    names = [line.split()[0] for line in block[1].splitlines() if line.strip()]
    return [name.removeprefix("kernels/").removeprefix("dyncomp/") for name in names]


def committed() -> list[Path]:
    """Every file that git knows."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    return [ROOT / name for name in listed.stdout.splitlines() if (ROOT / name).is_file()]


def sources(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def imports(tree: ast.AST, module: str) -> list[tuple[str, int]]:
    """Every imported module (absolute) with its line; ``from a import b`` counts as ``a.b``."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parent = ".".join(module.split(".")[: -node.level])
                base = f"{parent}.{base}".strip(".")
            found += [(f"{base}.{alias.name}", node.lineno) for alias in node.names]
    return found


def room_of(name: str) -> str | None:
    """The room a dotted module name lies in; None for others and for the package itself."""
    parts = name.split(".")
    if parts[0] == KERNELS:
        return KERNELS
    return parts[1] if parts[0] == "dyncomp" and len(parts) > 1 and parts[1] in rooms() else None


def upward(path: Path, text: str) -> list[str]:
    """Imports of ``path`` that go to a higher room."""
    order = {room: n for n, room in enumerate(rooms())}
    base = ROOT / "kernels" if KERNELS in path.parts else ROOT
    module = ".".join(path.relative_to(base).with_suffix("").parts)
    here = room_of(module)
    if here is None:
        return []
    return [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for name, line in imports(ast.parse(text), module)
        if (there := room_of(name)) is not None and order[there] > order[here]
    ]


def test_every_room_is_listed():
    listed = set(rooms())
    folders = {p.parent.name for p in (ROOT / "dyncomp").glob("*/__init__.py")}
    assert KERNELS in listed and folders <= listed, folders - listed


def test_imports_only_go_down():
    files = sources("dyncomp") + sources("kernels")
    assert len(files) > 20
    assert [found for path in files for found in upward(path, path.read_text())] == []


def test_the_import_rule_can_fail():
    path = ROOT / "dyncomp" / "core" / "x.py"
    assert upward(path, "from dyncomp import training")
    assert upward(path, "def f():\n    from ..models import block")
    assert not upward(path, "from dyncomp.core import plans\nimport jax")


def test_only_config_imports_gin():
    found = [
        str(path)
        for path in sources("dyncomp") + sources("kernels") + sources("experiments")
        if (ROOT / "dyncomp" / "config") not in path.parents
        and any(name.split(".")[0] == "gin" for name, _ in imports(ast.parse(path.read_text()), ""))
    ]
    assert found == []


def modules_defined(text: str) -> list[str]:
    """Names of classes with a base called Module."""
    bases = lambda c: [ast.unparse(b).split(".")[-1] for b in c.bases]
    classes = [n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.ClassDef)]
    return [c.name for c in classes if "Module" in bases(c)]


def test_experiments_define_no_module():
    assert [
        (p, modules_defined(p.read_text()))
        for p in sources("experiments")
        if modules_defined(p.read_text())
    ] == []
    assert modules_defined("class A(nn.Module): pass") == ["A"]


def test_no_package_called_kernels_or_experiments():
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert not (ROOT / "experiments" / "__init__.py").exists()


def run_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_kernels_is_no_package_of_ours():
    """A regular package `kernels` on the path would break transformers; a namespace does not."""
    code = """
import importlib.util, sys
spec = importlib.util.find_spec("kernels")
print(spec is None or spec.origin is None or "site-packages" in spec.origin)
"""
    assert run_python(code) == "True"


def test_import_dyncomp_is_light():
    code = (
        f"import sys, dyncomp; print([m for m in {LIGHT + ('jax', 'flax')!r} if m in sys.modules])"
    )
    assert run_python(code) == "[]"


def test_library_imports_no_peer_and_no_config_language():
    code = f"""
import sys
from dyncomp import attention, exits, experts, models, pretrained, recurrent, routers, runtime
from dyncomp import decoding, tasks, training
print([m for m in {LIGHT!r} if m in sys.modules])
"""
    assert run_python(code) == "[]"


def test_top_level_entries():
    entries = {path.relative_to(ROOT).parts[0] for path in committed()}
    assert entries <= TOP, entries - TOP


def code_lines(text: str) -> int:
    return len(text.splitlines())


def long_functions(text: str) -> list[str]:
    functions = (n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.FunctionDef))
    return [f.name for f in functions if f.end_lineno - f.lineno >= 60]


def test_sizes_of_files_and_functions():
    files = sources("dyncomp") + sources("kernels") + sources("experiments")
    assert [str(p) for p in files if code_lines(p.read_text()) >= 400] == []
    library = sources("dyncomp") + sources("experiments")  # kernel bodies may be longer
    found = [(str(p), long_functions(p.read_text())) for p in library]
    assert [f for f in found if f[1]] == []
    assert long_functions("def f():\n" + "    x = 1\n" * 60) == ["f"]


# Spelled in pieces, so that this file does not match itself.
FORBIDDEN = {
    "a machine path": re.compile(r"/(?:home|Users|root|work|mnt|tmp)/" + r"[a-z][\w.-]*/"),
    "a package index": re.compile(
        r"https?://[\w.-]*(?:pypi|simple|artifactory|nexus)" + r"[\w.-]*/|--(?:extra-)?index-url"
    ),
}


def test_nothing_about_this_machine_is_committed():
    found = []
    for path in committed():
        if path.suffix in {".png", ".npz", ".pdf", ".svg", ".gz"}:
            continue
        for line, text in enumerate(path.read_text(errors="replace").splitlines(), 1):
            found += [
                f"{path.relative_to(ROOT)}:{line}: {what}"
                for what, p in FORBIDDEN.items()
                if p.search(text)
            ]
    assert found == []
    assert FORBIDDEN["a machine path"].search("see /ho" + "me/ann/x")
    assert FORBIDDEN["a package index"].search("pip install --index" + "-url x")
