from __future__ import annotations

import pytest

from denim.defense.rows import EvaluationSettings


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"score_draws": 0}, "score_draws must be at least 1, got 0"),
        ({"score_draws": "some"}, "score_draws must be a number or \"auto\", got 'some'"),
        ({"max_batch": 0}, "max_batch must be at least 1, got 0"),
        ({"examples": -1}, "examples must not be negative, got -1"),
        ({"health_images": -1}, "health_images must not be negative, got -1"),
        ({"seed": -(2**63) - 1}, "seed must be an int64"),
        ({"attacks": ("cw:4/255",)}, "unknown attack 'cw'; choose one of fgsm, pgd, mpgd"),
        ({"attacks": ("pgd",)}, "is not of the form"),
        ({"attacks": ("pgd:4/255", "pgd:4/255,steps=20")}, "attacks must differ"),
    ],
)
def test_bad_settings_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        EvaluationSettings(**{"attacks": ("fgsm:4/255",)} | options)
