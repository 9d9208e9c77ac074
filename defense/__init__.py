"""The De^3 defense: the module, attacks on it, evaluation and report."""

from denim.defense.attacks import Attack
from denim.defense.de3 import De3
from denim.defense.evaluation import Evaluation, EvaluationSettings, HealthWarning, evaluate
from denim.defense.report import print_table, write_report
from denim.defense.scores import Interval, Scores, paired_difference, score

__all__ = [
    "Attack",
    "De3",
    "Evaluation",
    "EvaluationSettings",
    "HealthWarning",
    "Interval",
    "Scores",
    "evaluate",
    "paired_difference",
    "print_table",
    "score",
    "write_report",
]
