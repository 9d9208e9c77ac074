"""Attacks on defenses.

`attack` says what an attack is, `search` runs one rule and one loss on many images, `rules` and `square` say how an
attack moves, `losses` what it raises, and `balls` where it may go. `foreign` runs the attacks of other libraries.
"""

from denim.defense.attacks.attack import (
    ATTACKS,
    Attack,
    Attacked,
    AttackMethod,
    parse_attack,
    radius_text,
    register_attack,
)
from denim.defense.attacks.foreign import ForeignAttack

__all__ = [
    "ATTACKS",
    "Attack",
    "AttackMethod",
    "Attacked",
    "ForeignAttack",
    "parse_attack",
    "radius_text",
    "register_attack",
]
