"""The pictures of the page: quality against experts, experts over training, by kind of token, and on real text."""

from pathlib import Path
from typing import Any

from dyncomp.evidence import drawing

LABELS = {
    "top_1": "top-1", "top_2": "top-2", "random_k": "random, top-p's counts",
    "top_p": "top-p (β = 1e-4)", "top_p_beta_0": "top-p (β = 0)",
    "top_p_beta_1e-3": "top-p (β = 1e-3)", "top_p_beta_1e-2": "top-p (β = 1e-2)",
}  # fmt: skip


def draw(results: dict[str, Any], outdir: Path) -> None:
    """Four files."""
    shown = [run["shown"] for run in results["runs"] if run.get("shown")]
    drawing.plane(
        results,
        LABELS,
        outdir / "1_quality_against_experts.svg",
        x=("experts", "mean active experts per token and layer"),
        y=("nats", "validation nats per byte"),
        line=("top_1", "top_2"),
    )
    drawing.curves(shown, LABELS, outdir / "2_experts_over_training.svg", y="active experts")
    drawing.classes_and_layers(
        shown, outdir / "3_experts_by_kind_of_token.svg", y="mean active experts"
    )
    drawing.shaded_text(
        shown[0]["text"],
        shown[0]["experts"],
        outdir / "4_experts_on_text.png",
        what="active experts of each byte",
    )
