"""The objectives as pure functions of log-probs, named as in ``train.loss`` (see ``config.LOSSES``).

All results have one value per pair and are never averaged over the batch. Some objectives depend on the whole step.
"""

from raydpo.losses.objective import FUNCTIONS, Objective, ObjectiveState, implicit_rewards, own_sources, preference_loss
from raydpo.losses.pairs import PairLogps, PreferenceLoss

__all__ = [
    "FUNCTIONS",
    "Objective",
    "ObjectiveState",
    "PairLogps",
    "PreferenceLoss",
    "implicit_rewards",
    "own_sources",
    "preference_loss",
]
