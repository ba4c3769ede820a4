"""The claims of the derivation, checked with the functions that draw its pictures."""

import re

import numpy as np
import pytest

from raydpo.cli.entry import main
from raydpo.reports.explain import WORLD, closed_form, trained_policy

BETAS = (0.1, 0.5, 3.0)


@pytest.mark.parametrize("beta", BETAS)
def test_the_loss_on_preferences_ends_at_the_closed_form(beta):
    """Z cancels: neither it nor the rewards enter the loss."""
    assert trained_policy(WORLD, beta) == pytest.approx(closed_form(WORLD, beta), abs=1e-6)


@pytest.mark.parametrize("beta", BETAS)
def test_the_closed_form_earns_most(beta):
    def worth(policy):
        return policy @ WORLD.rewards - beta * np.sum(policy * np.log(policy / WORLD.reference))

    best = closed_form(WORLD, beta)
    assert best.sum() == pytest.approx(1.0)
    assert worth(best) == pytest.approx(beta * np.log(WORLD.reference @ np.exp(WORLD.rewards / beta)))  # beta log Z
    random = np.random.default_rng(0)
    for size in (0.01, 0.3):
        other = best * np.exp(random.normal(0, size, (200, len(best))))
        assert all(worth(each) < worth(best) for each in other / other.sum(1, keepdims=True))


def test_the_command(tmp_path, capsys):
    assert main(["explain", "--out", str(tmp_path / "page.html")]) == 0
    page = (tmp_path / "page.html").read_text()
    assert len(page) < 250_000 and page.count("<math") > 15 and "They agree to" in page
    assert float(re.search(r"They agree to ([\de-]+)\.", page)[1]) < 1e-6
