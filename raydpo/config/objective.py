"""The objective, a part of section ``train``: the loss and its settings. ``raydpo.losses`` computes it."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag, model_validator

from raydpo.config.section import Float, Section

__all__ = ["LOSSES", "SCALE_KEYS", "BetaSchedule", "LossTraits", "ObjectiveConfig"]

PER_PAIR = frozenset({"beta", "ld_alpha", "use_weighting", "dynamic_beta", "weight_column"})
MARGIN = PER_PAIR | {"f_divergence_type", "f_alpha_divergence_coef", "margin_column"}
LENGTHS = frozenset({"length_penalty"})
SMOOTH = frozenset({"label_smoothing"})
BY_LABEL = frozenset({"desirable_weight", "undesirable_weight"})
OF_EVERY_TERM = ("f_divergence_type", "f_alpha_divergence_coef", "ld_alpha", "use_weighting", "weight_column")
"""Settings that every term of a mixture must use, since its terms share divergence and weights. The first three do not
apply to terms without a reference."""


@dataclass(frozen=True)
class LossTraits:
    """Properties of a loss.

    Attributes:
        heeds: settings that change its value. Other settings of the objective are refused.
        reference: whether it needs log-probs of the reference.
        whole_step: whether the loss of a pair depends on the other pairs of the step.
        per_token: whether it compares means over tokens instead of sums.
        unpaired: whether it takes a completion with a label, without another to compare it with.
        lists: whether it takes ranked lists of completions (``data.ranked: lists``) in place of pairs.
    """

    heeds: frozenset[str]
    reference: bool = True
    whole_step: bool = False
    per_token: bool = False
    unpaired: bool = False
    lists: bool = False


LOSSES: dict[str, LossTraits] = {
    "sigmoid": LossTraits(MARGIN | SMOOTH | LENGTHS),
    "robust": LossTraits(MARGIN | SMOOTH | LENGTHS),
    "hinge": LossTraits(MARGIN | LENGTHS),
    "ipo": LossTraits(MARGIN, per_token=True),
    "ipo_sum": LossTraits(MARGIN | LENGTHS),
    "sigmoid_norm": LossTraits(MARGIN | SMOOTH, per_token=True),
    "exo_pair": LossTraits(MARGIN | SMOOTH | LENGTHS),
    "discopop": LossTraits(MARGIN | LENGTHS | {"discopop_tau"}),
    "dpop": LossTraits(PER_PAIR | LENGTHS | {"margin_column", "dpop_lambda"}),
    "nca_pair": LossTraits(PER_PAIR),
    "bco_pair": LossTraits(PER_PAIR | BY_LABEL, unpaired=True),
    "bco": LossTraits(PER_PAIR | BY_LABEL, whole_step=True, unpaired=True),
    "sppo_hard": LossTraits(PER_PAIR),
    "apo_zero": LossTraits(PER_PAIR | BY_LABEL, unpaired=True),
    "apo_down": LossTraits(PER_PAIR),
    "kto": LossTraits(PER_PAIR | BY_LABEL, whole_step=True, unpaired=True),
    "aot": LossTraits(SMOOTH | {"beta", "ld_alpha"}, whole_step=True),
    "aot_unpaired": LossTraits(SMOOTH | {"beta", "ld_alpha"}, whole_step=True),
    "simpo": LossTraits(
        SMOOTH | {"beta", "use_weighting", "weight_column", "margin_column", "simpo_gamma"}, reference=False, per_token=True
    ),
    "cpo": LossTraits(SMOOTH | {"beta", "use_weighting", "weight_column", "margin_column", "cpo_alpha"}, reference=False),
    "orpo": LossTraits(frozenset({"beta", "use_weighting", "weight_column"}), reference=False, per_token=True),
    "sft": LossTraits(frozenset({"use_weighting", "weight_column"}), reference=False, unpaired=True),
    "plackett_luce": LossTraits(frozenset({"beta", "weight_column"}), lists=True),
}
"""Properties of each loss, by its name in ``train.loss``."""
SETTINGS = (
    "beta",
    "label_smoothing",
    "f_divergence_type",
    "f_alpha_divergence_coef",
    "length_penalty",
    "ld_alpha",
    "use_weighting",
    "dynamic_beta",
    "discopop_tau",
    "dpop_lambda",
    "simpo_gamma",
    "cpo_alpha",
    "desirable_weight",
    "undesirable_weight",
)
_OWN = LossTraits(frozenset({*SETTINGS, "weight_column", "margin_column"}))
"""Properties of a loss by import path: it receives every setting and may use any."""
_IMPORT_PATH = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


class BetaSchedule(Section):
    """A beta that changes over the steps of the run."""

    start: Float = Field(gt=0)
    """Beta of the first step."""
    end: Float = Field(gt=0)
    """Beta of the last step."""
    schedule: Literal["linear", "cosine"] = "linear"
    """Shape of the change."""

    def at(self, step: int, total_steps: int) -> float:
        """Return the beta of the step with number ``step``, counted from 0."""
        done = min(1.0, step / max(1, total_steps - 1))
        return self.end + (self.start - self.end) * (
            1 - done if self.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))
        )


def _known_name(name: Any) -> str:
    if not isinstance(name, str):
        raise ValueError(
            f"{name!r} is not the name of a loss; expected one of {', '.join(LOSSES)}, the import path "
            "module:function of your own, or a mixture such as [{sigmoid: 0.8}, {sft: 0.2}]"
        )
    if name in LOSSES or _IMPORT_PATH.fullmatch(name):
        return name
    near = difflib.get_close_matches(name, LOSSES, n=1, cutoff=0.5)
    raise ValueError(
        f"there is no loss {name!r}"
        + (
            f"; did you mean {near[0]!r}?"
            if near
            else f"; expected one of {', '.join(LOSSES)}, or the import path module:function of your own"
        )
    )


def _as_loss(value: Any) -> str | tuple[dict[str, float], ...]:
    """Check a loss: a name, or a mixture, which becomes a tuple of {name: weight}."""
    if not isinstance(value, (list, tuple)):
        return _known_name(value)
    if not value:
        raise ValueError("the mixture is empty; give it terms, such as [{sigmoid: 0.8}, {sft: 0.2}]")
    weights: dict[str, float] = {}
    for term in value:
        if not isinstance(term, Mapping) or len(term) != 1:
            raise ValueError(f"{term!r} is not a term of a mixture; write {{name: weight}}, such as {{sigmoid: 0.8}}")
        ((key, weight),) = term.items()
        name = _known_name(key)
        if name in weights:
            raise ValueError(f"{name!r} is in the mixture twice; give the sum of its weights")
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 < weight < math.inf:
            raise ValueError(f"the weight of {name!r} is {weight!r}; expected a number above 0")
        weights[name] = float(weight)
    return tuple({name: weight} for name, weight in weights.items())


def _kind_of_beta(value: Any) -> str:
    return "tagged-schedule" if isinstance(value, (Mapping, BetaSchedule)) else "tagged-number"


class ObjectiveConfig(Section):
    """The loss and its settings."""

    loss: Annotated[str | tuple[dict[str, float], ...], BeforeValidator(_as_loss)] = "sigmoid"
    """The loss, see raydpo.losses: a name, a mixture such as [{sigmoid: 0.8}, {bco_pair: 0.2}, {sft: 1.0}], or the import
    path of your own function, my_module:my_loss."""
    beta: Annotated[
        Annotated[Annotated[Float, Field(gt=0)], Tag("tagged-number")] | Annotated[BetaSchedule, Tag("tagged-schedule")],
        Discriminator(_kind_of_beta),
    ] = 0.1
    """Strength of the pull towards the reference: the smaller, the further the policy may drift. A schedule such as
    {start: 0.2, end: 0.05, schedule: cosine} changes it from the first step to the last."""
    dynamic_beta: Float | None = Field(default=None, gt=0)
    """Alpha of beta-DPO (arXiv 2407.08639, which uses 0.6): beta of a step is multiplied by 1 + alpha * (mean margin of the
    step - moving average of earlier steps). The paper's filter of pairs is not included."""
    dynamic_beta_momentum: Float = Field(default=0.9, ge=0, lt=1)
    """Momentum of dynamic_beta's moving average: the share that it keeps at each step."""
    label_smoothing: Float = Field(default=0.0, ge=0, lt=0.5)
    """Assumed share of swapped preferences. With sigmoid it gives conservative DPO, with robust Robust DPO. With exo_pair it
    is EXO's epsilon, 1e-3 in its paper."""
    f_divergence_type: Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"] = "reverse_kl"
    """Divergence that keeps the policy close to the reference (f-DPO, arXiv 2309.16240). reverse_kl is DPO."""
    f_alpha_divergence_coef: Float = 0.5
    """Alpha of alpha_divergence."""
    length_penalty: Float = Field(default=0.0, ge=0)
    """Alpha of R-DPO (arXiv 2403.19159): reward subtracted for each token, against preferring long completions."""
    ld_alpha: Float | None = Field(default=None, ge=0, lt=1)
    """LD-DPO (arXiv 2409.06411): weight of the tokens beyond the length of the shorter completion; null = 1."""
    use_weighting: bool = False
    """WPO (arXiv 2406.11827): give more weight to pairs whose completions the policy is likely to write itself."""
    discopop_tau: Float = Field(default=0.05, gt=0)
    """Temperature of discopop."""
    dpop_lambda: Float = Field(default=50.0, gt=0)
    """Weight of dpop's penalty if the chosen completion becomes less likely than under the reference."""
    simpo_gamma: Float = Field(default=0.5, ge=0)
    """Margin between rewards that simpo requires."""
    cpo_alpha: Float = Field(default=1.0, ge=0)
    """Weight of cpo's negative log-likelihood."""
    desirable_weight: Float = Field(default=1.0, gt=0)
    """Weight of desirable completions, alone or the chosen one of a pair, in kto, bco, bco_pair and apo_zero."""
    undesirable_weight: Float = Field(default=1.0, gt=0)
    """Weight of undesirable completions, alone or the rejected one of a pair, in the same losses."""
    router_aux_loss_coef: Float | None = Field(default=None, ge=0)
    """Weight of the load-balancing loss of a mixture of experts (metric aux_loss), which is added to the loss so that the
    routers use all experts; null = router_aux_loss_coef of the model's config.json; 0 = without it."""

    @property
    def terms(self) -> dict[str, float]:
        """Weights of the losses that are added up, by name."""
        if isinstance(self.loss, str):
            return {self.loss: 1.0}
        return {name: weight for term in self.loss for name, weight in term.items()}

    @property
    def traits(self) -> dict[str, LossTraits]:
        """Properties of the losses that are added up, by name."""
        return {name: LOSSES.get(name, _OWN) for name in self.terms}

    @property
    def needs_reference(self) -> bool:
        """Whether any term needs log-probs of the reference. If not, nothing is scored."""
        return any(traits.reference for traits in self.traits.values())

    @property
    def estimates_drift(self) -> bool:
        """Whether the loss depends on an estimate of the policy's drift from the reference, as kto does."""
        return "kto" in self.terms

    @property
    def needs_whole_step(self) -> bool:
        """Whether the loss of a pair depends on the others of its step. False for losses by import path:
        ``losses.Objective`` finds it out by a trial."""
        return self.dynamic_beta is not None or any(traits.whole_step for traits in self.traits.values())

    @property
    def beta_moves(self) -> bool:
        """Whether beta changes from step to step."""
        return self.dynamic_beta is not None or isinstance(self.beta, BetaSchedule)

    @property
    def loss_name(self) -> str:
        """Short name of the loss, valid in file names."""
        return "+".join(name.rsplit(":", 1)[-1] for name in self.terms)

    @property
    def loss_text(self) -> str:
        """Names of the losses with their weights, such as ``0.8 sigmoid + 0.2 sft``. A single weight of 1 is left out."""
        (name, weight), *others = self.terms.items()
        return (
            name if not others and weight == 1 else " + ".join(f"{weight:g} {name}" for name, weight in self.terms.items())
        )

    @property
    def beta_text(self) -> str:
        """Beta as text, valid in file names."""
        return f"{self.beta.start:g}-{self.beta.end:g}" if isinstance(self.beta, BetaSchedule) else f"{self.beta:g}"

    @property
    def per_token(self) -> bool:
        """Whether the loss compares means over tokens, so that beta multiplies nats a token. False for a mixture."""
        traits, *others = self.traits.values()
        return not others and traits.per_token

    def beta_per_token(self, tokens: float) -> str:
        """Return beta times ``tokens``, rounded to two digits, as YAML. In a loss per token it has the effect that the
        present beta has on sums over so many tokens."""

        def times(beta: Any) -> str:
            return beta if isinstance(beta, str) else f"{float(f'{beta * tokens:.2g}'):g}"  # 100, not 1e+02

        if not isinstance(self.beta, BetaSchedule):
            return times(self.beta)
        given = self.beta.model_dump(exclude_unset=True)
        return "{" + ", ".join(f"{key}: {times(value)}" for key, value in given.items()) + "}"

    def beta_at(self, step: int, total_steps: int) -> float:
        """Return the beta of the step with number ``step``, counted from 0, before ``dynamic_beta``."""
        return self.beta.at(step, total_steps) if isinstance(self.beta, BetaSchedule) else self.beta

    def shaped(self) -> dict[str, Any]:
        """Return the settings that differ from their defaults, without loss, beta and label_smoothing, as plain data."""
        return self.model_dump(
            mode="json",
            exclude_defaults=True,
            include=set(ObjectiveConfig.model_fields) - {"loss", "beta", "label_smoothing"},
        )

    def check_heeded(self, setting: str, value: Any, fix: str) -> None:
        """Refuse a setting that has no effect on this loss.

        Raises:
            ValueError: with setting, value, loss and the fix.
        """
        heeding = [name for name, traits in self.traits.items() if setting in traits.heeds]
        concerned = [name for name, traits in self.traits.items() if traits.reference or setting not in OF_EVERY_TERM[:3]]
        ignoring = [name for name in concerned if name not in heeding]
        if heeding and not (setting in OF_EVERY_TERM and ignoring):
            return
        known = [name for name, traits in LOSSES.items() if setting in traits.heeds]
        raise ValueError(
            f"{setting} {value} has no effect on loss {' and '.join(map(repr, ignoring or self.terms))}; "
            f"{fix}, or loss to one that uses it ({', '.join(known)})"
        )

    @model_validator(mode="after")
    def _check_objective(self) -> ObjectiveConfig:
        for setting in SETTINGS:
            value, default = getattr(self, setting), ObjectiveConfig.model_fields[setting].default
            if value != default:
                told = self.beta_text if setting == "beta" else value
                self.check_heeded(setting, told, f"set it to {'null' if default is None else str(default).lower()}")
        if (
            self.f_alpha_divergence_coef != ObjectiveConfig.model_fields["f_alpha_divergence_coef"].default
            and self.f_divergence_type != "alpha_divergence"
        ):
            raise ValueError(
                f"f_alpha_divergence_coef {self.f_alpha_divergence_coef} has no effect on f_divergence_type "
                f"{self.f_divergence_type}; set that to alpha_divergence"
            )
        if (
            self.dynamic_beta_momentum != ObjectiveConfig.model_fields["dynamic_beta_momentum"].default
            and self.dynamic_beta is None
        ):
            raise ValueError(
                f"dynamic_beta_momentum {self.dynamic_beta_momentum} has no effect without dynamic_beta; set "
                "that, for example to 0.6"
            )
        if "exo_pair" in self.terms and not self.label_smoothing:
            raise ValueError("exo_pair divides by label_smoothing, which is 0; set it to 0.001, as its paper does")
        if isinstance(self.beta, BetaSchedule) and self.beta.start == self.beta.end:
            raise ValueError(f"beta changes from {self.beta.start:g} to {self.beta.end:g}; write beta: {self.beta.start:g}")
        return self


SCALE_KEYS = (
    *(f"train.{name}" for name in ObjectiveConfig.model_fields if name != "router_aux_loss_coef"),
    *("data.weight_column", "data.margin_column"),
)
"""Keys that set the scale of losses and reward margins, of which the router loss is no part. Trials that differ in one of
these keys cannot be compared by losses or reward margins."""
