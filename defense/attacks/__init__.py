"""Attacks on defenses."""

from denim.defense.attacks.attack import Attack, Attacked, radius_text

__all__ = ["Attack", "Attacked", "radius_text"]
