"""The De^3 defense: the module, attacks on it, evaluation and report."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

# A name is imported with its module when it is first used (PEP 562): importing this package loads nothing.
_MODULES = {
    "Attack": "attacks",
    "AttackedImages": "attacked",
    "Bpda": "bpda",
    "Certification": "certificates",
    "CertificationSettings": "certificates",
    "LevelCertificates": "certificates",
    "certify": "certification",
    "print_certification": "certification_report",
    "write_certification": "certification_report",
    "Comparison": "comparison",
    "De3": "de3",
    "Evaluation": "evaluation",
    "EvaluationSettings": "rows",
    "HealthWarning": "evaluation",
    "Jpeg": "bpda",
    "check_health": "health",
    "compare": "comparison",
    "ModuleTarget": "targets",
    "evaluate": "evaluation",
    "load_attacked": "attacked",
    "Randomness": "probe",
    "probe_randomness": "probe",
    "print_table": "report",
    "write_report": "report",
    "Interval": "scores",
    "Scores": "scores",
    "paired_difference": "scores",
    "resubmission_curve": "scores",
    "score": "scores",
}
__all__ = [
    "Attack",
    "AttackedImages",
    "Bpda",
    "Certification",
    "CertificationSettings",
    "Comparison",
    "De3",
    "Evaluation",
    "EvaluationSettings",
    "HealthWarning",
    "Interval",
    "Jpeg",
    "LevelCertificates",
    "ModuleTarget",
    "Randomness",
    "Scores",
    "certify",
    "check_health",
    "compare",
    "evaluate",
    "load_attacked",
    "paired_difference",
    "print_certification",
    "print_table",
    "probe_randomness",
    "resubmission_curve",
    "score",
    "write_certification",
    "write_report",
]

if TYPE_CHECKING:
    from denim.defense.attacked import AttackedImages, load_attacked
    from denim.defense.attacks import Attack
    from denim.defense.bpda import Bpda, Jpeg
    from denim.defense.certificates import Certification, CertificationSettings, LevelCertificates
    from denim.defense.certification import certify
    from denim.defense.certification_report import print_certification, write_certification
    from denim.defense.comparison import Comparison, compare
    from denim.defense.de3 import De3
    from denim.defense.evaluation import Evaluation, HealthWarning, evaluate
    from denim.defense.health import check_health
    from denim.defense.probe import Randomness, probe_randomness
    from denim.defense.report import print_table, write_report
    from denim.defense.rows import EvaluationSettings
    from denim.defense.scores import Interval, Scores, paired_difference, resubmission_curve, score
    from denim.defense.targets import ModuleTarget

else:

    def __getattr__(name: str) -> Any:
        if name not in _MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        globals()[name] = value = getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
