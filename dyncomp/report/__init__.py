"""Reports: curves, Pareto plots, pictures of decisions, one self-contained HTML page."""
