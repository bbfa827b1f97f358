"""Tasks: data, objective and metrics."""

from dyncomp.tasks.base import Source, Task
from dyncomp.tasks.code_lm import CodeLM, HubText, TextFiles
from dyncomp.tasks.demonstrations import PickPlaceDemonstrations, RecordedEpisodes
from dyncomp.tasks.denoising import Denoising
from dyncomp.tasks.features import FeatureTask
from dyncomp.tasks.images import Digits, FashionMNIST, HubImages
from dyncomp.tasks.library_text import LibraryText
from dyncomp.tasks.loader import Loader
from dyncomp.tasks.nested import NestedObjective
from dyncomp.tasks.objectives import ClassificationObjective, LMObjective
from dyncomp.tasks.pick_place import PickPlace, rollout
from dyncomp.tasks.recall import Recall, RecallObjective
from dyncomp.tasks.shapes import ShapeScenes
from dyncomp.tasks.stopping import StoppingObjective, exits_right
from dyncomp.tasks.tiles import TwinTiles
from dyncomp.tasks.token_classes import CLASSES, byte_classes, token_classes

__all__ = [
    "CLASSES",
    "ClassificationObjective",
    "CodeLM",
    "Denoising",
    "Digits",
    "FashionMNIST",
    "FeatureTask",
    "HubImages",
    "HubText",
    "LMObjective",
    "LibraryText",
    "Loader",
    "NestedObjective",
    "PickPlace",
    "PickPlaceDemonstrations",
    "Recall",
    "RecallObjective",
    "RecordedEpisodes",
    "ShapeScenes",
    "Source",
    "StoppingObjective",
    "Task",
    "TextFiles",
    "TwinTiles",
    "byte_classes",
    "exits_right",
    "rollout",
    "token_classes",
]
