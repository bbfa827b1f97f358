"""What the environment records, and what it does not start."""

import subprocess
import sys

from dyncomp.core.environment import differences, environment, revision, run_environment


def git(folder, *words):
    name = ["-c", "user.name=t", "-c", "user.email=t@t"]
    done = subprocess.run(["git", *name, *words], cwd=folder, capture_output=True, check=True)
    return done.stdout.decode().strip()


def test_revision_follows_the_folder(tmp_path):
    (tmp_path / "outside").mkdir()
    assert revision(tmp_path / "outside") == (None, False)
    repository = tmp_path / "repository"
    repository.mkdir()
    git(repository, "init", "-q")
    (repository / "a").write_text("1")
    git(repository, "add", "a")
    git(repository, "commit", "-q", "-m", "a")
    head = git(repository, "rev-parse", "HEAD")
    assert revision(repository) == (head, False)
    (repository / "b").write_text("an untracked file changes nothing")
    assert revision(repository) == (head, False)
    (repository / "a").write_text("2")
    assert revision(repository) == (head, True)
    assert environment(repository, threads=1)["revision"] == head


def test_environment_starts_no_accelerator():
    code = "import sys; from dyncomp.core.environment import environment as e; e(); print('jax' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_differences_name_what_can_change_numbers():
    now = run_environment()
    assert differences(now, now) == []
    packages = {**now["packages"], "jax": "0.0.1"}
    before = {**now, "cpu_threads": 99, "packages": packages, "cpu": "another", "python": "2"}
    assert differences(before, now) == [
        f"cpu_threads: 99 then, {now['cpu_threads']} now",
        f"jax: 0.0.1 then, {now['packages']['jax']} now",
    ]
    assert differences({**now, "packages": {}}, now) == []
