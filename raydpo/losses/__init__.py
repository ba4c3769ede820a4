"""The objectives as pure functions of log-probs, by the names of ``train.loss`` (see ``config.LOSSES``).

Everything is one value per pair; nothing here averages over the batch, but objectives that speak of the whole step.
"""

from raydpo.losses.objective import FUNCTIONS, Memory, Objective, implicit_rewards, own_sources, preference_loss
from raydpo.losses.pairs import PairLogps, PreferenceLoss

__all__ = ["FUNCTIONS", "Memory", "Objective", "PairLogps", "PreferenceLoss", "implicit_rewards",
           "own_sources", "preference_loss"]
