"""`reproduce`: all arms of an experiment over seeds, judged against claims that were committed first.

``experiments/<slug>/experiment.py`` defines ``ARMS: list[str]`` and ``run_seed(seed, quick, workdir)``, which returns
arm -> metric -> value (and, under ``_figures``, JSON data for pictures). It may define ``TITLE``, ``SEEDS``,
``METRICS`` (name -> {"text", "minimize"}), ``COMPUTE`` (the metric that is the compute axis), ``TRIALS`` (arm -> trials
tuned) and ``figures(results, outdir)``, which writes svg or png files; there ``results["workdir"]`` is the folder that
holds every seed's ``workdir`` as ``seed_N``, and each run's ``_figures`` lie under ``shown``.
"""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from dyncomp.core.environment import environment, git
from dyncomp.core.errors import DyncompError
from dyncomp.core.lock import measuring
from dyncomp.evidence import stats
from dyncomp.evidence.claims import Claim, check_arms, digest, read_claims
from dyncomp.evidence.page import write_page
from dyncomp.evidence.seed import PINNED, load_experiment

SEEDS = (0, 1, 2, 3, 4)
FIGURE_BYTES = 300_000


def reproduce(
    slug: str,
    seeds: Sequence[int] | None = None,
    quick: bool = False,
    root: Path | None = None,
    resume: bool = True,
    platform: str = "cpu",
) -> dict[str, Any]:
    """Runs the evidence of a system, or what is left of it.

    Args:
      slug: a folder of ``root``.
      seeds: default, the experiment's ``SEEDS``; ``quick`` takes the first one only.
      quick: a smoke run in a temporary folder; never evidence, writes nothing under ``root``.
      root: folder of the experiments; default ``./experiments``.
      resume: skip seeds that are finished; False runs all of them again.
      platform: of JAX, that seeds run on; the page names what is not a CPU.

    Returns:
      What ``results.json`` holds: slug, title, claims_digest, environment, arms, metrics, runs, claims.

    Raises:
      DyncompError: bad claims, claims that are not committed, results of other claims or another experiment.py,
        a seed that failed, or something else being measured on this machine.
    """
    folder = (root or Path("experiments")).resolve() / slug
    if not folder.is_dir():
        raise DyncompError(f"{folder} is missing: name a folder of {folder.parent}")
    claims = read_claims(folder / "claims.toml")
    # A smoke run measures nothing, so it need not wait for its turn.
    turn = contextlib.nullcontext() if quick else measuring(f"evidence of {slug}")
    with turn:
        module = load_experiment(folder / "experiment.py")
        compute = getattr(module, "COMPUTE", None)
        check_arms(claims, list(module.ARMS), compute, folder / "claims.toml")
        chosen = list(seeds or getattr(module, "SEEDS", SEEDS))
        if quick:
            with tempfile.TemporaryDirectory(prefix="dyncomp-quick-") as work:
                runs = _run_seeds(
                    folder, chosen[:1], Path(work), quick=True, resume=False, platform=platform
                )
                return _results(folder, module, claims, runs, quick=True)
        _check_committed(folder / "claims.toml")
        work = folder.parents[1] / "runs" / "evidence" / slug
        runs = _run_seeds(folder, chosen, work, quick=False, resume=resume, platform=platform)
        results = _results(folder, module, claims, runs, quick=False)
        _publish(folder, module, results, work)
        return _plain(results)


def _check_committed(path: Path) -> None:
    """Evidence needs claims that were committed before it, word for word."""
    committed = git(path.parent, "show", "HEAD:./claims.toml")
    if committed is None or committed != path.read_bytes():
        raise DyncompError(
            f"{path} is not committed as it stands: commit it before running evidence"
        )


def _stamp(folder: Path) -> dict[str, str]:
    """What a seed's figures stand for: the claims and the experiment's code."""
    return {name: digest(folder / name) for name in ("claims.toml", "experiment.py")}


def _run_seeds(
    folder: Path,
    seeds: Sequence[int],
    work: Path,
    *,
    quick: bool,
    resume: bool,
    platform: str,
) -> list[dict[str, Any]]:
    work.mkdir(parents=True, exist_ok=True)
    found = {seed: _finished(folder, work, seed) for seed in seeds} if resume else {}
    records = []
    for count, seed in enumerate(seeds, 1):
        record = found.get(seed)
        say = f"{folder.name}: seed {seed} ({count} of {len(seeds)})"
        if record is None:
            print(f"{say} ...", file=sys.stderr, flush=True)
            record = _run_seed(folder, seed, work, quick, platform)
            print(f"{say}: {record['seconds'] / 60:.1f} minutes", file=sys.stderr, flush=True)
        else:
            print(f"{say}: done before", file=sys.stderr, flush=True)
        records.append(record)
    return records


def _finished(folder: Path, work: Path, seed: int) -> dict[str, Any] | None:
    """A seed's record, None when it has not been finished; a record made under other files is refused."""
    path = work / f"seed_{seed}.json"
    try:
        record = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    for name, value in _stamp(folder).items():
        if record["stamp"].get(name) != value:
            raise DyncompError(
                f"{path} was made under another {name}: delete it to run seed {seed} again"
            )
    return record


def _run_seed(
    folder: Path, seed: int, work: Path, quick: bool, platform: str = "cpu"
) -> dict[str, Any]:
    """Runs a seed in a process of its own and saves its record in one step of the file system."""
    own, stamp = work / f"seed_{seed}", _stamp(folder)
    shutil.rmtree(own, ignore_errors=True)
    own.mkdir(parents=True)
    made = environment(folder, threads=1)
    command = [sys.executable, "-m", "dyncomp.evidence.seed", str(folder / "experiment.py")]
    command += [str(seed), str(own), *(["--quick"] if quick else [])]
    log = own / "log.txt"
    with log.open("w") as stream:
        env = {**os.environ, **PINNED, "JAX_PLATFORMS": platform}
        done = subprocess.run(command, env=env, stdout=stream, stderr=subprocess.STDOUT)
    if done.returncode:
        last = (log.read_text().strip().splitlines() or ["no message"])[-1]
        kept = "" if quick else f"; all of it in {log}"
        raise DyncompError(f"seed {seed} of {folder.name} failed: {last}{kept}")
    record = json.loads((own / "record.json").read_text())
    record |= {"stamp": stamp, "environment": made}
    scratch = work / f"seed_{seed}.tmp"
    scratch.write_text(json.dumps(record))
    scratch.replace(work / f"seed_{seed}.json")
    return record


def _results(
    folder: Path,
    module: ModuleType,
    claims: list[Claim],
    records: list[dict[str, Any]],
    quick: bool,
) -> dict[str, Any]:
    trials = getattr(module, "TRIALS", {})
    runs = [
        {
            "seed": record["seed"],
            "seconds": record["seconds"],
            "peak_bytes": record["peak_bytes"],
            "environment": record["environment"],
            **{name: record.get(name, "cpu") for name in ("device", "platform")},
            "arms": {
                arm: {"trials": trials.get(arm), "figures": figures}
                for arm, figures in record["figures"].items()
            },
            "shown": record.get("shown"),
        }
        for record in records
    ]
    compute = getattr(module, "COMPUTE", None)
    return {
        "slug": folder.name,
        "title": getattr(module, "TITLE", folder.name),
        "quick": quick,
        "claims_digest": digest(folder / "claims.toml"),
        "environment": environment(folder, threads=1),
        "arms": list(module.ARMS),
        "metrics": getattr(module, "METRICS", {}),
        "compute": compute,
        "runs": runs,
        "claims": [judge(claim, [r["figures"] for r in records], compute) for claim in claims],
    }


def judge(claim: Claim, figures: Sequence[stats.Figures], compute: str | None) -> dict[str, Any]:
    """A claim beside what the seeds say about it: ours (mean, interval, each seed's difference) and ``holds``."""
    each = [stats.difference(claim, one, compute) for one in figures]
    found = stats.estimate(each)
    interval = list(found.interval) if found.interval else None
    verdict = stats.holds(claim.relation, claim.margin, found, claim.seeds_needed)
    names = ("id", "text", "paper", "metric", "arm", "against", "relation", "margin", "kind")
    return {
        **{name: getattr(claim, name) for name in names},
        "ours": {"mean": found.mean, "interval": interval, "each": each, "seeds": found.n},
        "seeds_needed": claim.seeds_needed,
        "holds": verdict,
    }


def _plain(results: dict[str, Any]) -> dict[str, Any]:
    """Results without the data that is there for pictures."""
    runs = [{key: value for key, value in run.items() if key != "shown"} for run in results["runs"]]
    return {**results, "runs": runs}


def _publish(folder: Path, module: ModuleType, results: dict[str, Any], work: Path) -> None:
    """Writes results.json, figures and the page."""
    scratch = work / "results.tmp"
    scratch.write_text(json.dumps(_plain(results), indent=1) + "\n")
    pictures = work / "figures"
    shutil.rmtree(pictures, ignore_errors=True)
    pictures.mkdir()
    if hasattr(module, "figures"):
        with _deterministic_figures():
            module.figures({**results, "workdir": str(work)}, pictures)
    _check_sizes(pictures)
    out = folder / "figures"
    shutil.rmtree(out, ignore_errors=True)
    if any(pictures.iterdir()):
        shutil.copytree(pictures, out)
    shutil.copyfile(scratch, folder / "results.json")
    write_page(folder, _plain(results))


def _check_sizes(folder: Path) -> None:
    for path in folder.iterdir():
        if path.stat().st_size > FIGURE_BYTES:
            raise DyncompError(f"figure {path.name} is larger than 300 kB: lower its dpi or data")


@contextlib.contextmanager
def _deterministic_figures() -> Iterator[None]:
    """Matplotlib without a display; SVG files without dates and with stable identifiers."""
    import matplotlib

    matplotlib.use("Agg")
    before = os.environ.get("SOURCE_DATE_EPOCH")
    os.environ["SOURCE_DATE_EPOCH"] = "0"
    try:
        with matplotlib.rc_context({"svg.hashsalt": "dyncomp"}):
            yield
    finally:
        os.environ.pop("SOURCE_DATE_EPOCH")
        if before is not None:
            os.environ["SOURCE_DATE_EPOCH"] = before
