"""Which layers run: keep sets, sorted sub-models, exit-and-stop decisions."""

from dyncomp.depth.early import drawn_exits, first_confident, max_probability, shuffled_exits
from dyncomp.depth.keep import (
    Layers,
    Spacing,
    bottom,
    check_layers,
    evenly,
    layer_count,
    layer_set,
    random_layers,
    spread,
    top,
)
from dyncomp.depth.paths import path_similarity
from dyncomp.depth.sorted_loss import (
    SortedMode,
    check_depths,
    exit_logits,
    sorted_loss,
    sub_model_weights,
)
from dyncomp.depth.stopping import (
    CONTINUE,
    EXIT,
    STOP,
    Walk,
    controller_loss,
    correct_at,
    decision,
    decision_labels,
    mean_layers,
    walk,
)

__all__ = [
    "CONTINUE",
    "EXIT",
    "Layers",
    "STOP",
    "SortedMode",
    "Spacing",
    "Walk",
    "bottom",
    "check_depths",
    "check_layers",
    "controller_loss",
    "correct_at",
    "decision",
    "decision_labels",
    "drawn_exits",
    "evenly",
    "exit_logits",
    "first_confident",
    "layer_count",
    "layer_set",
    "max_probability",
    "mean_layers",
    "path_similarity",
    "random_layers",
    "shuffled_exits",
    "sorted_loss",
    "spread",
    "sub_model_weights",
    "top",
    "walk",
]
