"""Losses computed by hand. One pair: policy -10 and -20 nats, reference -12 and -18, so the log-ratios are +2 and -2 and the
margin is 4; 5 and 10 completion tokens."""

import dataclasses
import math

import pytest
import torch

from raydpo.config import LOSSES, ObjectiveConfig
from raydpo.errors import ConfigError
from raydpo.losses import FUNCTIONS, Objective, ObjectiveState, PairLogps, preference_loss

LN2 = math.log(2)


def pair(chosen=-10.0, rejected=-20.0, ref_chosen=-12.0, ref_rejected=-18.0, chosen_tokens=5.0, rejected_tokens=10.0):
    values = (chosen, rejected, ref_chosen, ref_rejected, chosen_tokens, rejected_tokens)
    return PairLogps(*(torch.tensor([value], dtype=torch.float64, requires_grad=False) for value in values))


def log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x))


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


@pytest.mark.parametrize(
    ("name", "beta", "settings", "expected"),
    [
        ("sigmoid", 0.1, {}, -log_sigmoid(0.4)),
        ("sigmoid", 0.5, {}, -log_sigmoid(2.0)),
        ("sigmoid", 0.1, {"label_smoothing": 0.3}, -0.7 * log_sigmoid(0.4) - 0.3 * log_sigmoid(-0.4)),
        ("hinge", 0.1, {}, 0.6),
        ("hinge", 0.5, {}, 0.0),
        # per token: 2/5 + 2/10 = 0.6, target 1/(2*0.1) = 5
        ("ipo", 0.1, {}, (0.6 - 5.0) ** 2),
        ("ipo_sum", 0.1, {}, (4.0 - 5.0) ** 2),
        ("sigmoid_norm", 2.0, {}, -log_sigmoid(1.2)),
        ("sigmoid_norm", 2.0, {"label_smoothing": 0.1}, -0.9 * log_sigmoid(1.2) - 0.1 * log_sigmoid(-1.2)),
        ("robust", 0.1, {"label_smoothing": 0.1}, (-0.9 * log_sigmoid(0.4) + 0.1 * log_sigmoid(-0.4)) / 0.8),
        ("nca_pair", 0.1, {}, -log_sigmoid(0.2) - 0.5 * log_sigmoid(-0.2) - 0.5 * log_sigmoid(0.2)),
        ("bco_pair", 0.1, {}, -2 * log_sigmoid(0.2)),
        ("sppo_hard", 0.1, {}, 9.0 + 9.0),  # log-ratios of 2 and -2, drawn to 5 and -5
        ("apo_zero", 0.1, {}, 2 * sigmoid(-0.2)),
        ("apo_down", 0.1, {}, sigmoid(0.2) + sigmoid(-0.4)),
        # g = sigmoid(0.4 / 0.05) = sigmoid(8)
        ("discopop", 0.1, {}, -log_sigmoid(0.4) * sigmoid(-8) + math.exp(-0.4) * sigmoid(8)),
        # The mean log-ratio is 0: no drift.
        ("kto", 0.1, {"undesirable_weight": 3.0}, (sigmoid(-0.2) + 3 * sigmoid(-0.2)) / 2),
        # R-DPO: the chosen one is 5 tokens shorter.
        ("sigmoid", 0.1, {"length_penalty": 0.01}, -log_sigmoid(0.4 - 0.05)),
        # Mean log-probs are -2 and -2: nothing but gamma is left.
        ("simpo", 2.5, {"simpo_gamma": 1.5}, -log_sigmoid(-1.5)),
        ("cpo", 0.1, {"cpo_alpha": 0.5}, -log_sigmoid(1.0) + 0.5 * 2.0),
        ("orpo", 0.1, {}, 2.0 + 0.1 * LN2),  # equal odds
        ("sft", 0.1, {}, 2.0),
        ([{"sigmoid": 0.5}, {"sft": 2.0}], 0.1, {}, -0.5 * log_sigmoid(0.4) + 4.0),
        ("sigmoid", 0.1, {"f_divergence_type": "forward_kl"}, -log_sigmoid(0.1 * (math.exp(2) - math.exp(-2)))),
    ],
)
def test_value(name, beta, settings, expected):
    loss = preference_loss(name, pair(), beta=beta, **settings)
    assert loss.losses.item() == pytest.approx(expected, abs=1e-12)


def test_dpop_charges_for_a_chosen_completion_that_falls():
    risen = preference_loss("dpop", pair(), beta=0.1, dpop_lambda=5.0)
    assert risen.losses.item() == pytest.approx(-log_sigmoid(0.4))
    fallen = preference_loss("dpop", pair(chosen=-13.0, rejected=-23.0), beta=0.1, dpop_lambda=5.0)  # ratios -1, -5
    assert fallen.losses.item() == pytest.approx(-log_sigmoid(0.1 * (4 - 5.0)))


def test_tails_weigh_less():
    """Five of the rejected completion's ten tokens lie beyond the chosen one's length: 6 nats under the policy, 5 under the
    reference."""
    tails = [torch.tensor([value], dtype=torch.float64) for value in (0.0, -6.0, 0.0, -5.0)]
    logps = dataclasses.replace(
        pair(), chosen_tail=tails[0], rejected_tail=tails[1], ref_chosen_tail=tails[2], ref_rejected_tail=tails[3]
    )
    # rejected: -20 + 0.75 * 6 = -15.5, reference -18 + 0.75 * 5 = -14.25: ratio -1.25
    loss = preference_loss("sigmoid", logps, beta=0.1, ld_alpha=0.25)
    assert loss.losses.item() == pytest.approx(-log_sigmoid(0.1 * 3.25))
    assert loss.rejected_rewards.item() == pytest.approx(-0.125)


def test_weights_and_margins_of_the_data():
    one = torch.ones(1, dtype=torch.float64)
    logps = dataclasses.replace(pair(), weights=3 * one, margins=0.5 * one)
    for name, beta, expected in (
        ("sigmoid", 0.1, -log_sigmoid(0.4 - 0.5)),
        ("hinge", 0.1, 1.1),
        ("ipo_sum", 0.1, (4 - 5 - 5) ** 2),
        ("simpo", 2.5, -log_sigmoid(-0.5 - 0.5)),
        ("cpo", 0.1, -log_sigmoid(0.5) + 2.0),
    ):
        assert preference_loss(name, logps, beta=beta).losses.item() == pytest.approx(3 * expected), name


def test_aot_compares_quantiles():
    """Two pairs. log pi(y_w) - log pi(y_l): 1 and 5; of the reference: 4 and 3. Quantiles: 1 to 3 and 5 to 4."""

    def tensor(*values):
        return torch.tensor(values, dtype=torch.float64)

    logps = PairLogps(tensor(-9, -5), tensor(-10, -10), tensor(-6, -7), tensor(-10, -10), *[tensor(1, 1)] * 2)
    assert preference_loss("aot", logps, beta=0.1).losses.tolist() == pytest.approx([-log_sigmoid(-0.2), -log_sigmoid(0.1)])
    # Log-ratios -3 and 2 of the chosen, 0 and 0 of the rejected; the losses stay with their pairs in any order.
    assert preference_loss("aot_unpaired", logps, beta=0.1).losses.tolist() == pytest.approx(
        [-log_sigmoid(-0.3), -log_sigmoid(0.2)]
    )


def test_bco_is_shifted_by_the_mean_reward_of_all_steps():
    objective = Objective(ObjectiveConfig(loss="bco", beta=0.1))
    beta, memory = objective.remember(pair(chosen=-6.0), 0.1, ObjectiveState())  # rewards 0.6, -0.2
    assert (beta, memory.rewards, memory.reward_mean) == (0.1, 2, pytest.approx(0.2))
    _, memory = objective.remember(pair(chosen=-8.0), 0.1, memory)  # rewards 0.4, -0.2
    assert (memory.rewards, memory.reward_mean) == (4, pytest.approx(0.15))
    loss = objective(pair(), 0.1, memory).losses.item()
    assert loss == pytest.approx(-log_sigmoid(0.2 - 0.15) - log_sigmoid(0.2 + 0.15))


def test_dynamic_beta_follows_the_margin():
    objective = Objective(ObjectiveConfig(beta=0.1, dynamic_beta=0.6))
    assert objective.whole_step
    beta, memory = objective.remember(pair(), 0.1, ObjectiveState())  # a margin of 0.4, where 0 was usual
    assert (beta, memory.margin_mean) == (pytest.approx(0.1 * (1 + 0.6 * 0.4)), pytest.approx(0.04))
    beta, _ = objective.remember(pair(), 0.1, ObjectiveState(margin_mean=0.4))
    assert beta == pytest.approx(0.1)
    beta, _ = objective.remember(pair(), 0.1, ObjectiveState(margin_mean=100.0))  # the formula says -5.9
    assert beta == pytest.approx(0.001)


def test_kto_counts_drift_from_the_reference():
    """Log-ratios 4 and -2: the policy has drifted by 1 nat."""
    loss = preference_loss("kto", pair(chosen=-8.0), beta=0.1).losses.item()
    assert loss == pytest.approx((sigmoid(-0.3) + sigmoid(-0.3)) / 2)


def test_rewards_are_those_of_the_loss():
    def rewards(*args, **settings):
        loss = preference_loss(*args, pair(), **settings)
        return loss.chosen_rewards.item(), loss.rejected_rewards.item()

    assert rewards("sigmoid", beta=0.1) == pytest.approx((0.2, -0.2))
    assert rewards("sigmoid_norm", beta=0.1) == pytest.approx((0.04, -0.02))
    assert rewards("ipo_sum", beta=0.1) == pytest.approx((0.2, -0.2))
    assert rewards("simpo", beta=0.1) == pytest.approx((-0.2, -0.2))
    assert rewards("orpo", beta=0.1) == pytest.approx((-0.2, -0.2))
    assert rewards("sigmoid", beta=0.1, f_divergence_type="forward_kl") == pytest.approx(
        (0.1 * (1 - math.exp(-2)), 0.1 * (1 - math.exp(2)))
    )
    # A mixture has TRL's: beta times the log-ratios.
    assert rewards([{"sigmoid_norm": 1.0}, {"sft": 0.1}], beta=0.1) == pytest.approx((0.2, -0.2))


COMPARED = {
    # What else is needed so that a loss falls with what it compares, and with nothing else.
    "discopop": {"beta": 1.0},
    "dpop": {"dpop_lambda": 1e-9},
    "cpo": {"cpo_alpha": 0.0},
    "orpo": {"beta": 1e6},
    "exo_pair": {"label_smoothing": 1e-3},
    "simpo": {"beta": 2.0},
    "sigmoid_norm": {"beta": 2.0},
    "kto": {"beta": 0.01},
}


def of_each_loss():
    """Every loss that compares two completions, alone and with each setting that changes the comparison, if the loss uses
    it."""
    for name, traits in LOSSES.items():
        if name == "sft":  # it looks at the chosen one alone
            continue
        yield name, {}
        if "f_divergence_type" in traits.heeds:
            yield from ((name, {"f_divergence_type": kind}) for kind in ("forward_kl", "js_divergence", "alpha_divergence"))
        if "ld_alpha" in traits.heeds:
            yield name, {"ld_alpha": 0.3}


@pytest.mark.parametrize(("name", "more"), of_each_loss())
def test_rewards_prefer_what_the_loss_prefers(name, more):
    """The rewards rank a pair right if its loss grows when its two completions are swapped. Lengths differ by up to ten
    times, so that sums and means often disagree."""
    random = torch.Generator().manual_seed(2)
    settings = {"beta": 0.1} | COMPARED.get(name, {}) | more
    objective, outcomes, sums = Objective(ObjectiveConfig(loss=name, **settings)), set(), set()
    for _ in range(60):
        tokens = torch.randint(4, 40, (2,), generator=random).double()
        policy, reference = -tokens * (0.5 + 0.1 * torch.rand(2, 2, generator=random, dtype=torch.float64))
        tails = (tokens - tokens.min()).clamp(min=0) / tokens
        one, other = (
            [side[[index]] for side in (policy, reference, tokens, policy * tails, reference * tails)] for index in (0, 1)
        )

        def of(chosen, rejected):
            return objective(
                PairLogps(
                    chosen[0],
                    rejected[0],
                    chosen[1],
                    rejected[1],
                    chosen[2],
                    rejected[2],
                    chosen[3],
                    rejected[3],
                    chosen[4],
                    rejected[4],
                ),
                settings["beta"],
                ObjectiveState(),
            )

        loss, swapped = of(one, other), of(other, one)
        prefers = (loss.losses < swapped.losses).item()
        if name == "discopop" and (loss.chosen_rewards - loss.rejected_rewards).abs() < 0.3:
            continue  # where it is not monotone
        assert (loss.chosen_rewards > loss.rejected_rewards).item() == prefers
        outcomes.add(prefers)
        by_sum = (
            policy[0] > policy[1] if not LOSSES[name].reference else policy[0] - reference[0] > policy[1] - reference[1]
        ).item()
        sums.add(by_sum == prefers)
    assert outcomes == {True, False}
    assert (False in sums) >= LOSSES[name].per_token, "sums would have told the same"


@pytest.mark.parametrize("certain", ["chosen", "rejected"])
def test_orpo_of_a_completion_of_probability_1_is_finite(certain):
    """Rounding in float32 may leave a mean log-prob of exactly 0."""
    sides = {"chosen": torch.tensor([-3.0]), "rejected": torch.tensor([-3.0])} | {certain: torch.tensor([0.0])}
    for side in sides.values():
        side.requires_grad_()
    zero, tokens = torch.zeros(1), torch.full((1,), 3.0)
    loss = preference_loss("orpo", PairLogps(*sides.values(), zero, zero, tokens, tokens), beta=0.1).losses
    assert loss.item() == pytest.approx(
        (0.0 if certain == "chosen" else 1.0)
        + 0.1 * (0.0 if certain == "chosen" else math.log(1e7) - math.log(1 / (1 - math.exp(-1)) - 1)),
        abs=1e-3,
    )
    assert all(torch.isfinite(gradient).all() for gradient in torch.autograd.grad(loss.sum(), list(sides.values())))


def test_sigmoid_of_the_reference_itself_is_ln_2():
    same = pair(chosen=-12.0, rejected=-18.0)
    for beta in (0.01, 0.1, 5.0):
        assert preference_loss("sigmoid", same, beta=beta).losses.item() == pytest.approx(LN2, abs=1e-15)


def settings_of(name):
    return {"label_smoothing": 1e-3} if name == "exo_pair" else {}


@pytest.mark.parametrize("name", LOSSES)
def test_gradient_raises_chosen_and_lowers_rejected(name):
    chosen = torch.tensor([-12.0], requires_grad=True)
    rejected = torch.tensor([-18.0], requires_grad=True)
    one = torch.ones(1)
    logps = PairLogps(chosen, rejected, chosen.detach(), rejected.detach(), one, one)
    loss = preference_loss(name, logps, beta=0.1, **settings_of(name))
    wanted = torch.autograd.grad(loss.losses.sum(), (chosen, rejected), allow_unused=True)
    if name == "sft":
        assert wanted[0] < 0 and wanted[1] is None
    elif name == "apo_down":  # it lowers both, the rejected one more; at the reference itself the chosen one is at rest
        assert wanted[0] == 0 and wanted[1] > 0
    elif name == "discopop":  # not monotone: around 0 it rises with the margin, by beta * ((1 - ln 2) / (4 tau) - 3/4)
        assert wanted[0].item() == pytest.approx(0.1 * ((1 - LN2) / 0.2 - 0.75), rel=1e-5)
    else:
        assert wanted[0] < 0 < wanted[1]
    assert not loss.chosen_rewards.requires_grad


@pytest.mark.parametrize("name", LOSSES)
def test_traits_tell_the_truth(name):
    """Whether a loss uses the reference or other pairs is found by changing them."""
    random = torch.Generator().manual_seed(1)
    fields = [-30 * torch.rand(6, generator=random, dtype=torch.float64) - 5 for _ in range(4)]
    tokens = torch.tensor([4.0, 9, 3, 7, 5, 6], dtype=torch.float64)
    logps = PairLogps(*fields, tokens, tokens.flip(0), mean_chosen_tokens=6.0)
    objective = Objective(ObjectiveConfig(loss=name, **settings_of(name)))

    def losses(pairs):
        _, memory = objective.remember(pairs, 0.1, ObjectiveState())
        return objective(pairs, 0.1, memory).losses

    whole = losses(logps)
    moved = losses(dataclasses.replace(logps, ref_chosen=logps.ref_chosen - 3, ref_rejected=logps.ref_rejected + 1))
    assert LOSSES[name].reference != torch.equal(whole, moved)
    first = PairLogps(*(getattr(logps, field.name)[:3] for field in dataclasses.fields(logps)[:6]), mean_chosen_tokens=6.0)
    assert LOSSES[name].whole_step != torch.equal(whole[:3], losses(first))
    assert set(FUNCTIONS) == set(LOSSES)


def test_gradient_of_sigmoid_at_the_reference_is_half_beta():
    """d/dmargin of -log sigmoid(beta * margin) at margin 0 is -beta/2."""
    chosen = torch.zeros(1, requires_grad=True)
    zero, one = torch.zeros(1), torch.ones(1)
    preference_loss("sigmoid", PairLogps(chosen, zero, zero, zero, one, one), beta=0.3).losses.sum().backward()
    assert chosen.grad.item() == pytest.approx(-0.15)


def own(tmp_path, monkeypatch, body, name):
    (tmp_path / f"{name}.py").write_text(f"import torch\n\n\ndef my_loss(logps, settings, beta):\n    {body}\n")
    monkeypatch.chdir(tmp_path)
    return Objective(ObjectiveConfig(loss=f"{name}:my_loss"))


def test_a_loss_of_ones_own(tmp_path, monkeypatch):
    body = "return (logps.chosen_logratio - logps.rejected_logratio - 1 / beta) ** 2"
    objective = own(tmp_path, monkeypatch, body, "squared")
    assert objective(pair(), 0.1).losses.item() == pytest.approx(36.0) and not objective.whole_step
    centred = own(tmp_path, monkeypatch, "return logps.chosen_logratio - logps.rejected_logratio.mean()", "centred")
    assert centred.whole_step  # found out, not told
    with pytest.raises(ConfigError, match="one finite number for each"):
        own(tmp_path, monkeypatch, "return logps.chosen.mean()", "scalar")
    with pytest.raises(ConfigError, match="AttributeError"):
        own(tmp_path, monkeypatch, "return logps.chosen_logp", "wrong")
    with pytest.raises(ConfigError, match=r"nowhere cannot be imported.*nowhere\.py"):
        Objective(ObjectiveConfig(loss="nowhere:my_loss"))
    with pytest.raises(ConfigError, match="has no function 'other'"):
        Objective(ObjectiveConfig(loss="squared:other"))
