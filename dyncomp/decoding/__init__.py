"""The decode loop and what plugs into it."""

from dyncomp.decoding.branches import read_branches
from dyncomp.decoding.drafters import FirstLayers, OtherModel, SkipLayers
from dyncomp.decoding.drafting import Drafter
from dyncomp.decoding.entropy import entropy_bits
from dyncomp.decoding.exit_maps import ExitMaps
from dyncomp.decoding.exit_scores import ExitScores, score_exits
from dyncomp.decoding.exit_training import ExitStates, distill, least_squares, read_states
from dyncomp.decoding.exiting import ExitEarly
from dyncomp.decoding.fused import FusedGenerator, FusedTick
from dyncomp.decoding.fusion import (
    FusionPlan,
    alpha_grid,
    choose_fusion,
    displacement,
    fuse,
    fused_logits,
    fused_text_logits,
    kl_divergence,
    logit_shifts,
    mismatch,
)
from dyncomp.decoding.generated import Generated, Tick
from dyncomp.decoding.generator import Generator
from dyncomp.decoding.guess_training import (
    Learner,
    guessers_loss,
    guessers_ranks,
    head_guesses,
    prompt_guesses,
    train_guessers,
)
from dyncomp.decoding.pending import ExitAndCatchUp
from dyncomp.decoding.policies import FullDepth, KeepLayers, Policy, Step
from dyncomp.decoding.prompt_training import (
    chain_logits,
    greedy_labels,
    guess_accuracy,
    guessing_loss,
    read_text,
)
from dyncomp.decoding.reading import Reading, read, unread
from dyncomp.decoding.rules import Confident, Controlled, MappedHead, OwnHeads, SharedHead
from dyncomp.decoding.sampling import Sampler, row_keys
from dyncomp.decoding.session import Account, Session
from dyncomp.decoding.speculation import (
    Acceptance,
    accept_greedy,
    accept_sampled,
    next_window,
    residual,
)
from dyncomp.decoding.speculative import Speculated, SpeculativeGenerator
from dyncomp.decoding.switched import Switch, Switched, SwitchingGenerator, choose_on_text
from dyncomp.decoding.switching import (
    LARGE,
    SMALL,
    EntropySwitch,
    PeriodicSwitch,
    RandomSwitch,
    SwitchState,
)
from dyncomp.decoding.trace import (
    parameter_share,
    run_lengths,
    shuffled_runs,
    switches,
    tokens_read,
)
from dyncomp.decoding.tree import CandidateTree, candidate_tree, random_tree, spread_prompts
from dyncomp.decoding.tree_accept import (
    TreeAcceptance,
    greedy_matches,
    longest_path,
    typical_matches,
)
from dyncomp.decoding.tree_decoding import TreeGenerator, TreeWritten
from dyncomp.decoding.tree_replay import Replay, guess_ranks, rank_accuracy, replay
from dyncomp.decoding.tree_states import (
    TreeFamily,
    best_budget,
    best_family,
    random_family,
    static_family,
    tree_family,
)
from dyncomp.decoding.tree_tables import TreeTables, stack_tables, tree_tables
from dyncomp.decoding.written import Written

__all__ = [
    "LARGE",
    "SMALL",
    "Acceptance",
    "Account",
    "CandidateTree",
    "Confident",
    "Controlled",
    "Drafter",
    "EntropySwitch",
    "ExitAndCatchUp",
    "ExitEarly",
    "ExitMaps",
    "ExitScores",
    "ExitStates",
    "FirstLayers",
    "FullDepth",
    "FusedGenerator",
    "FusedTick",
    "FusionPlan",
    "Generated",
    "Generator",
    "KeepLayers",
    "Learner",
    "MappedHead",
    "OtherModel",
    "OwnHeads",
    "PeriodicSwitch",
    "Policy",
    "RandomSwitch",
    "Reading",
    "Replay",
    "Sampler",
    "Session",
    "SharedHead",
    "SkipLayers",
    "Speculated",
    "SpeculativeGenerator",
    "Step",
    "Switch",
    "SwitchState",
    "Switched",
    "SwitchingGenerator",
    "Tick",
    "TreeAcceptance",
    "TreeFamily",
    "TreeGenerator",
    "TreeTables",
    "TreeWritten",
    "Written",
    "accept_greedy",
    "accept_sampled",
    "alpha_grid",
    "best_budget",
    "best_family",
    "candidate_tree",
    "chain_logits",
    "choose_fusion",
    "choose_on_text",
    "displacement",
    "distill",
    "entropy_bits",
    "fuse",
    "fused_logits",
    "fused_text_logits",
    "greedy_labels",
    "greedy_matches",
    "guess_accuracy",
    "guess_ranks",
    "guessers_loss",
    "guessers_ranks",
    "guessing_loss",
    "head_guesses",
    "kl_divergence",
    "least_squares",
    "logit_shifts",
    "longest_path",
    "mismatch",
    "next_window",
    "parameter_share",
    "prompt_guesses",
    "random_family",
    "random_tree",
    "rank_accuracy",
    "read",
    "read_branches",
    "read_states",
    "read_text",
    "replay",
    "residual",
    "row_keys",
    "run_lengths",
    "score_exits",
    "shuffled_runs",
    "spread_prompts",
    "stack_tables",
    "static_family",
    "switches",
    "tokens_read",
    "train_guessers",
    "tree_family",
    "tree_tables",
    "typical_matches",
    "unread",
]
