"""The wheel holds the library, the kernels and the configs, and works from another folder."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A freshly built wheel."""
    out = tmp_path_factory.mktemp("dist")
    command = [
        sys.executable,
        "-m",
        "build",
        "--no-isolation",
        "--wheel",
        "--outdir",
        str(out),
        str(ROOT),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (found,) = out.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """A function that runs ``python -m dyncomp`` as installed from the wheel, from a folder of its own.

    The other packages are those of this environment; the editable install of the repository is hidden: `-S` skips
    its path file, and the folder of installed packages is added by hand.
    """
    target, elsewhere = tmp_path_factory.mktemp("target"), tmp_path_factory.mktemp("elsewhere")
    install = [
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--no-index",
        "--target",
        str(target),
        str(wheel),
    ]
    subprocess.run([sys.executable, *install], check=True, capture_output=True)
    packages = [p for p in sys.path if p.endswith("site-packages")]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(target), *packages])}

    def run(*arguments: str) -> subprocess.CompletedProcess:
        command = [sys.executable, "-S", *arguments]
        return subprocess.run(command, cwd=elsewhere, env=env, capture_output=True, text=True)

    return run, target, elsewhere


def test_contents(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert "dyncomp/__init__.py" in names
    assert any(n.startswith("dyncomp_kernels/") for n in names)
    shipped = {
        p.relative_to(ROOT / "configs").as_posix() for p in (ROOT / "configs").rglob("*.gin")
    }
    assert shipped and {f"dyncomp/_configs/{name}" for name in shipped} <= set(names)
    tops = {n.split("/")[0] for n in names if ".dist-info" not in n}
    assert tops == {"dyncomp", "dyncomp_kernels"}
    assert not [n for n in names if "/test_" in n or n.endswith("conftest.py")]


def test_runs_from_another_folder(installed):
    run, target, elsewhere = installed
    where = run(
        "-c",
        "import dyncomp, dyncomp_kernels; print(dyncomp.__file__, dyncomp_kernels.__path__[0])",
    )
    assert where.returncode == 0, where.stderr
    assert all(path.startswith(str(target)) for path in where.stdout.split())
    listed = run("-m", "dyncomp", "list", "--json")
    assert listed.returncode == 0 and '"quickstart"' in listed.stdout, listed.stderr
    checked = run("-m", "dyncomp", "config", "check", "quickstart")
    assert checked.returncode == 0 and "quickstart: ok" in checked.stdout, checked.stderr
    one = "--gin.training.Suite.select='dense'"
    ran = run("-m", "dyncomp", "run", "quickstart", "--quick", "--no-progress", one)
    assert ran.returncode == 0, ran.stderr
    assert list(elsewhere.glob("runs/**/summary.json")), ran.stdout
