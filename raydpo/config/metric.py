"""Names of the metrics of held-out evaluations, and whether a lower or a higher value is better. ``training.metrics``
computes them."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["check_metric", "depends_on_scale", "held_out_metrics", "lower_is_better"]

_LOWER_IS_BETTER = {"loss": True, "chosen_fell": True, "accuracies": False, "auc": False, "margins": False}
"""Whether a lower value is better, by the last part of a metric's name. Rewards, log-probs and lengths of one side are left
out: neither a lower nor a higher value is better."""
_OF_ALL_PAIRS = (
    *("loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies"),
    *("logps/chosen", "logps/rejected", "logps/accuracies"),
    *("length/chosen", "length/rejected", "length/margin_correlation"),
)
_AGAINST_REFERENCE = ("logps/chosen_fell", "logratio/chosen_per_token", "logratio/rejected_per_token")
_OF_LABELS = ("rewards/auc",)
_OF_A_SOURCE = ("loss", "rewards/margins", "rewards/accuracies")


def lower_is_better(metric: str) -> bool:
    """Whether a lower value of a metric is better.

    The last part of the metric's name decides, so the answer is the same for all sources.

    Raises:
        ValueError: if neither a lower nor a higher value is better.
    """
    last = _last_part(metric)
    if last not in _LOWER_IS_BETTER:
        raise ValueError(f"neither a lower nor a higher {metric!r} is better")
    return _LOWER_IS_BETTER[last]


def depends_on_scale(metric: str) -> bool:
    """Whether a metric is in units of the loss or of the reward. The scale of both differs between objectives."""
    return _last_part(metric) in ("loss", "margins")


def held_out_metrics(sources: Sequence[str], *, reference: bool, labels: bool = False) -> list[str]:
    """Names of all metrics of an evaluation of held-out pairs.

    Args:
        sources: sources of the pairs. If there are several, each also has metrics of its own.
        reference: whether log-probs of the reference are known.
        labels: whether completions may be alone, with a label.
    """
    names = [*_OF_ALL_PAIRS, *(_AGAINST_REFERENCE if reference else ()), *(_OF_LABELS if reference and labels else ())]
    names += [f"{source}/{name}" for source in sources for name in _OF_A_SOURCE if len(sources) > 1]
    return [f"eval_{name}" for name in names]


def check_metric(key: str, metric: str, measured: Sequence[str]) -> None:
    """Refuse a metric that cannot be used to choose the best.

    Args:
        key: the setting that names it.
        measured: result of ``held_out_metrics``.

    Raises:
        ValueError: if it is not in ``measured``, or neither a lower nor a higher value is better.
    """
    choices = ", ".join(name for name in measured if _last_part(name) in _LOWER_IS_BETTER)
    if metric not in measured:
        raise ValueError(f"{key} is {metric!r}, which no evaluation measures; set it to one of {choices}")
    try:
        lower_is_better(metric)
    except ValueError as error:
        raise ValueError(f"{key}: {error}, so it cannot choose the best; set it to one of {choices}") from None


def _last_part(metric: str) -> str:
    return metric.removeprefix("eval_").rsplit("/", 1)[-1]
