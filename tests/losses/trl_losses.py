"""TRL's own loss code, run on given log-probs instead of a model's."""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace

import torch
from torch import Tensor

CHOSEN_TOKENS, REJECTED_TOKENS = (4, 9, 1, 6, 3), (7, 2, 5, 6, 8)
PROMPT = 2


def token_logps(seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """Policy and reference log-probs and mask of the tokens of five pairs, each [2 * 5, positions], the chosen first."""
    random = torch.Generator().manual_seed(seed)
    lengths = torch.tensor(CHOSEN_TOKENS + REJECTED_TOKENS)
    mask = torch.arange(int(lengths.max())) < lengths[:, None]
    policy, reference = (
        -3 * torch.rand(mask.shape, generator=random, dtype=torch.float64).to(dtype) * mask for _ in range(2)
    )
    return policy, reference, mask


def _accelerator() -> SimpleNamespace:
    return SimpleNamespace(device=torch.device("cpu"), gather=lambda value: value, gather_for_metrics=lambda value: value)


def _outputs(policy: Tensor, log_sum_sq: Tensor | None) -> SimpleNamespace:
    nothing = torch.zeros_like(policy)
    return SimpleNamespace(
        log_probs=policy, log_sum_sq_probs=log_sum_sq, entropy=nothing, mean_logits=nothing, is_top1=nothing.bool()
    )


def dpo_loss(
    policy: Tensor,
    reference: Tensor,
    mask: Tensor,
    loss_type: list[str],
    *,
    log_sum_sq: Tensor | None = None,
    **settings: object,
) -> Tensor:
    """``DPOTrainer``'s loss of the batch."""
    from trl import DPOTrainer

    options = (
        dict(
            beta=0.1,
            loss_weights=[1.0] * len(loss_type),
            ld_alpha=None,
            f_divergence_type="reverse_kl",
            f_alpha_divergence_coef=0.5,
            label_smoothing=0.0,
            use_weighting=False,
        )
        | settings
    )
    alpha = options["ld_alpha"]
    trainer = SimpleNamespace(
        **options,
        loss_types=loss_type,
        model=torch.nn.Module(),
        accelerator=_accelerator(),
        args=SimpleNamespace(discopop_tau=settings.get("discopop_tau", 0.05)),
        precompute_ref_logps=alpha is None,
        ref_model=lambda **_: _outputs(reference, None),
        aux_loss_enabled=False,
        _total_train_tokens=0,
        _tp_size=1,
        _metrics=defaultdict(lambda: defaultdict(list)),
    )
    trainer.args.gradient_checkpointing_kwargs = None
    trainer.model.is_gradient_checkpointing = False
    completion_mask = torch.nn.functional.pad(mask.long(), (1, 0))  # the position before the first completion token
    ref_chosen, ref_rejected = reference.sum(1).chunk(2)
    inputs = {
        "input_ids": torch.zeros_like(completion_mask),
        "attention_mask": torch.ones_like(completion_mask),
        "completion_mask": completion_mask,
        "ref_chosen_logps": ref_chosen,
        "ref_rejected_logps": ref_rejected,
    }
    return DPOTrainer._compute_loss(trainer, lambda **_: _outputs(policy, log_sum_sq), inputs, False)


def kto_loss(
    policy: Tensor,
    reference: Tensor,
    mask: Tensor,
    drift: Tensor,
    *,
    beta: float,
    desirable_weight: float,
    undesirable_weight: float,
) -> Tensor:
    """``KTOTrainer``'s loss with a given KL estimate."""
    from trl import KTOTrainer

    half = len(policy) // 2
    trainer = SimpleNamespace(
        beta=beta,
        desirable_weight=desirable_weight,
        undesirable_weight=undesirable_weight,
        loss_type="kto",
        model=SimpleNamespace(training=True),
        accelerator=_accelerator(),
        precompute_ref_logps=True,
        calculate_KL=True,
        aux_loss_enabled=False,
        _metrics=defaultdict(lambda: defaultdict(list)),
        _total_train_tokens=0,
        _tp_size=1,
        _compute_kl_logps=lambda model, batch: drift.expand(2 * half),
    )
    completion_mask = torch.nn.functional.pad(mask.long(), (1, 0))
    inputs = {
        "input_ids": torch.zeros_like(completion_mask),
        "attention_mask": torch.ones_like(completion_mask),
        "completion_mask": completion_mask,
        "label": torch.arange(2 * half) < half,
        "ref_logps": reference.sum(1),
        "ref_KL_logps": torch.zeros(2 * half, dtype=policy.dtype),
    }
    return KTOTrainer._compute_loss(trainer, lambda **_: _outputs(policy, None), inputs, False)


def cpo_loss(
    policy: Tensor,
    mask: Tensor,
    *,
    loss_type: str,
    beta: float,
    cpo_alpha: float,
    simpo_gamma: float = 0.5,
    label_smoothing: float = 0.0,
) -> Tensor:
    """``CPOTrainer``'s loss of the batch."""
    from trl.experimental.cpo import CPOTrainer

    half = len(policy) // 2
    sums, likelihood = policy.sum(1), -policy[:half].sum() / mask[:half].sum()
    if loss_type in ("ipo", "simpo"):
        sums = sums / mask.sum(1)
    trainer = SimpleNamespace(
        beta=beta,
        cpo_alpha=cpo_alpha,
        simpo_gamma=simpo_gamma,
        label_smoothing=label_smoothing,
        alpha=0.0,
        loss_type=loss_type,
        accelerator=_accelerator(),
        aux_loss_enabled=False,
    )
    trainer.cpo_loss = lambda *logps: CPOTrainer.cpo_loss(trainer, *logps)
    trainer.concatenated_forward = lambda model, batch: (*sums.chunk(2), torch.zeros(1), torch.zeros(1), likelihood)
    return CPOTrainer.get_batch_loss_metrics(trainer, None, {})[0]


def orpo_loss(policy: Tensor, mask: Tensor, *, beta: float) -> Tensor:
    """``ORPOTrainer``'s loss of the batch, with the likelihood of completions only."""
    return orpo_loss_and_metrics(policy, mask, beta=beta)[0]


def orpo_loss_and_metrics(policy: Tensor, mask: Tensor, *, beta: float) -> tuple[Tensor, dict[str, float]]:
    """``orpo_loss``, and the metrics that ``ORPOTrainer`` logs."""
    from trl.experimental.orpo import ORPOTrainer

    half = len(policy) // 2
    means, likelihood = policy.sum(1) / mask.sum(1), -policy[:half].sum() / mask[:half].sum()
    trainer = SimpleNamespace(beta=beta, accelerator=_accelerator(), aux_loss_enabled=False)
    trainer.odds_ratio_loss = lambda *logps: ORPOTrainer.odds_ratio_loss(trainer, *logps)
    trainer.concatenated_forward = lambda model, batch: (*means.chunk(2), torch.zeros(1), torch.zeros(1), likelihood)
    return ORPOTrainer.get_batch_loss_metrics(trainer, None, {})
