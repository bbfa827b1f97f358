"""``dyncomp list``: the systems, and what their evidence says."""

import argparse
import json
import tomllib
from pathlib import Path
from typing import Any

from dyncomp.cli.output import command, json_flag, print_json, table
from dyncomp.core.errors import DyncompError


def add(commands: Any) -> None:
    """Adds the command."""
    about = "List the shipped systems: config, evidence, how many claims held."
    json_flag(command(commands, "list", _main, about, "dyncomp list --json"))


def systems(experiments: Path | None = None) -> list[dict[str, Any]]:
    """One object a system: slug, title, family, config, paper_config, evidence, claims_held, claims_total.

    Figures that are only reported, with no sign promised, are not counted as claims.

    Args:
      experiments: folder of the evidence; default, the repository's.

    Raises:
      DyncompError: an evidence file that is no JSON.
    """
    from dyncomp import config

    experiments = experiments or config.shipped().parent / "experiments"
    names = config.slugs()
    found = []
    for slug in names:
        if slug.endswith("_paper"):
            continue
        path = config.find(slug)
        head = config.header(path)
        paper = f"{slug}_paper"
        found.append(
            {
                "slug": slug,
                "title": head.get("title", slug),
                "family": head.get("family"),
                "config": str(path),
                "paper_config": str(config.find(paper)) if paper in names else None,
                **_evidence(experiments / slug),
            }
        )
    return found


def _evidence(folder: Path) -> dict[str, Any]:
    results, claims = folder / "results.json", folder / "claims.toml"
    stated = tomllib.loads(claims.read_text()) if claims.is_file() else {}
    total = sum(claim.get("relation") != "report" for claim in stated.get("claim", []))
    if not results.is_file():
        return {"evidence": None, "claims_held": 0, "claims_total": total}
    try:
        found = json.loads(results.read_text())["claims"]
    except (ValueError, KeyError, TypeError) as error:
        message = f"{results} is damaged: run `dyncomp reproduce {folder.name}` again"
        raise DyncompError(message) from error
    held = sum(claim["holds"] is True for claim in found)
    promised = sum(claim["holds"] is not None for claim in found)
    return {"evidence": str(results), "claims_held": held, "claims_total": promised}


def _main(args: argparse.Namespace) -> None:
    found = systems()
    if args.json:
        print_json(found)
        return
    rows = [
        (
            s["slug"],
            s["title"],
            s["family"],
            "yes" if s["paper_config"] else "",
            f"{s['claims_held']} of {s['claims_total']}" if s["evidence"] else "",
        )
        for s in found
    ]
    table("Systems", ("slug", "title", "family", "paper", "claims held"), rows)
