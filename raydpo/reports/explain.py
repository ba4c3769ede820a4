"""A page for newcomers that derives the loss, with pictures computed by the project's own loss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from raydpo.losses import PairLogps, preference_loss
from raydpo.pages.page import render
from raydpo.pages.plot import BAD, GOOD, INK, PALE, Picture, figure, svg, variable
from raydpo.storage.files import Storage
from raydpo.version import __version__

__all__ = ["World", "closed_form", "explanation_page", "trained_policy", "write_explanation"]

BETAS = np.geomspace(0.1, 10.0, 21)
SHOWN = 10
"""Index of the beta that the page shows first, which is 1."""
MARGINS = np.sinh(np.linspace(-3.2, 3.2, 81))
"""Margins to draw: from about -12 to 12 nats, densest around 0, where the loss of a large beta bends within one nat."""
LETTERS = "ABCDEF"
_FLOAT = torch.float64


@dataclass(frozen=True)
class World:
    """All possible answers to one prompt: their texts, their probabilities under the reference, their rewards."""

    answers: tuple[str, ...]
    reference: np.ndarray
    rewards: np.ndarray


WORLD = World(
    (
        "The capital of France is Paris.",
        "Paris.",
        "Paris! A city of light and of a thousand stories, in which ...",
        "I would have to look that up.",
        "It is Lyon.",
        "Capital capital capital",
    ),
    np.array([0.16, 0.24, 0.30, 0.12, 0.13, 0.05]),
    np.array([2.0, 1.5, 0.6, -0.3, -1.5, -3.0]),
)


def closed_form(world: World, beta: float) -> np.ndarray:
    """Compute the policy of highest reward - beta * KL: ``ref * exp(r / beta) / Z`` (arXiv 2305.18290, eq. 4), [answers]."""
    logits = np.log(world.reference) + world.rewards / beta
    weights = np.exp(logits - logits.max())
    return weights / weights.sum()


def trained_policy(world: World, beta: float) -> np.ndarray:
    """Train a policy with the project's ``sigmoid`` loss and return its probabilities, [answers].

    It sees all pairs of answers; how often an answer is chosen follows from the rewards by Bradley and Terry. Neither
    rewards nor Z enter the loss.
    """
    count = len(world.answers)
    chosen, rejected = (torch.from_numpy(side) for side in np.nonzero(~np.eye(count, dtype=bool)))
    rewards, reference = torch.from_numpy(world.rewards), torch.from_numpy(world.reference).log()
    often = torch.sigmoid(rewards[chosen] - rewards[rejected])
    tokens = torch.ones(len(chosen), dtype=_FLOAT)
    # In units of 1 / beta the loss surface is equally steep for every beta.
    moved = torch.zeros(count, dtype=_FLOAT, requires_grad=True)
    exact = {"max_iter": 500, "tolerance_grad": 1e-12, "tolerance_change": 1e-16}
    optimizer = torch.optim.LBFGS([moved], line_search_fn="strong_wolfe", **exact)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        policy = torch.log_softmax(reference + moved / beta, 0)
        logps = PairLogps(policy[chosen], policy[rejected], reference[chosen], reference[rejected], tokens, tokens)
        loss = (often * preference_loss("sigmoid", logps, beta=beta).losses).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return torch.softmax(reference + moved.detach() / beta, 0).numpy()


def explanation_page() -> str:
    """Render the page."""
    policies = np.stack([closed_form(WORLD, beta) for beta in BETAS])
    trained = np.stack([trained_policy(WORLD, beta) for beta in BETAS])
    rewards = policies @ WORLD.rewards
    with np.errstate(divide="ignore", invalid="ignore"):
        drifts = np.nansum(policies * np.log(policies / WORLD.reference), 1)
    frames = []
    for beta, policy, reward, drift in zip(BETAS, policies, rewards, drifts, strict=True):
        figures = {"reward": round(float(reward), 3), "drift": round(float(drift), 3)}
        frames.append({"beta": float(f"{beta:.3g}"), "policy": [round(float(value), 4) for value in policy]} | figures)
    told = [f"{reward:+.1f}" for reward in WORLD.rewards], [f"{probability:.2f}" for probability in WORLD.reference]
    return render(
        "reports/explain.html",
        scripts=("reports/explain.js",),
        version=__version__,
        frames=frames,
        shown=SHOWN,
        world=list(zip(LETTERS, WORLD.answers, *told, strict=True)),
        gap=f"{np.abs(policies - trained).max():.0e}",
        pictures=[_policies(policies, trained), _trade(rewards, drifts), _loss(), _pull()],
    )


def write_explanation(out: Path) -> None:
    """Write the page to ``out``."""
    Storage(str(out.absolute().parent)).write(out.name, explanation_page().encode())


def _policies(policies: np.ndarray, trained: np.ndarray) -> Picture:
    title = "What the policy answers"
    caption = (
        "Bars: the closed form at this beta. Crosses: the result of training with raydpo's loss on preferences "
        "alone. Outlined: the reference."
    )
    count = policies.shape[1]
    edges = np.concatenate([[index - 0.36, index + 0.36] for index in range(count)])
    with figure(aligned=True) as (made, axes):
        for number, (policy, found) in enumerate(zip(policies, trained, strict=True)):
            axes.stairs(_with_gaps(policy), edges, fill=True, color=GOOD, alpha=0.75, gid=f"frame-{number}")
            axes.plot(range(count), found, "x", color=INK, markersize=6, gid=f"frame-{number}-trained")
        axes.stairs(_with_gaps(policies[0] * 0 + WORLD.reference), edges, color=BAD, linewidth=1.2)
        axes.set(ylim=(0, 1), ylabel="probability", xlabel="answer")
        axes.set_xticks(range(count), LETTERS[:count])
        axes.grid(False, axis="x")
        drawn = svg(made, title, caption, frame=SHOWN)
    return Picture(title, drawn, caption, (("policy", variable(GOOD), False), ("reference", variable(BAD), False)))


def _with_gaps(values: np.ndarray) -> np.ndarray:
    """Interleave zeros, so that there are gaps between the bars."""
    return np.stack([values, np.zeros_like(values)], 1).ravel()[:-1]


def _trade(rewards: np.ndarray, drifts: np.ndarray) -> Picture:
    title = "What beta trades"
    caption = (
        "Each beta is a point on this line: more reward costs more drift. The page of a sweep shows the same "
        "picture, measured."
    )
    with figure(aligned=True) as (made, axes):
        axes.plot(drifts, rewards, color=PALE, linewidth=1.6)
        for number, place in enumerate(zip(drifts, rewards, strict=True)):
            axes.plot(*([each] for each in place), "o", color=GOOD, markersize=8, gid=f"frame-{number}")
        axes.set(xlabel="drift: KL to the reference, nats", ylabel="expected reward")
        return Picture(title, svg(made, title, caption, frame=SHOWN), caption)


def _losses(margin: np.ndarray, beta: float) -> tuple[np.ndarray, np.ndarray]:
    """Compute the project's loss and its slope at margins in nats."""
    chosen = torch.from_numpy(margin).requires_grad_()
    zero, one = torch.zeros_like(chosen), torch.ones_like(chosen)
    losses = preference_loss("sigmoid", PairLogps(chosen, zero, zero, zero, one, one), beta=beta).losses
    (slope,) = torch.autograd.grad(losses.sum(), chosen)
    return losses.detach().numpy(), slope.numpy()


def _loss() -> Picture:
    caption = (
        "At margin 0, where training begins, the loss is ln 2 for every beta (dotted). Pale: the smallest and the "
        "largest beta."
    )
    return _of_margin("The loss", caption, "loss", lambda beta: _losses(MARGINS, beta)[0], (0.0, 4.0), np.log(2.0))


def _pull() -> Picture:
    caption = (
        "The slope of the loss: how strongly a pair is pulled apart. With a large beta the pull ends early, once "
        "beta times the margin is a few units. With a small one it lasts, so the policy moves far."
    )
    return _of_margin(
        "The pull on a pair", caption, "pull / beta", lambda beta: -_losses(MARGINS, beta)[1] / beta, (0.0, 1.05), 0.5
    )


def _of_margin(
    title: str, caption: str, ylabel: str, values: Callable[[float], np.ndarray], ylim: tuple[float, float], level: float
) -> Picture:
    with figure(aligned=True) as (made, axes):
        for beta in (BETAS[0], BETAS[-1]):
            axes.plot(MARGINS, values(beta), color=PALE, linewidth=1.0)
        for number, beta in enumerate(BETAS):
            axes.plot(MARGINS, values(beta), color=GOOD, linewidth=2.0, gid=f"frame-{number}")
        axes.axhline(level, color=INK, linewidth=0.7, linestyle=":")
        axes.axvline(0, color=INK, linewidth=0.7, linestyle=":")
        axes.set(xlabel="margin, nats", ylabel=ylabel, ylim=ylim)
        return Picture(title, svg(made, title, caption, frame=SHOWN), caption)
