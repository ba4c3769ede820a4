"""The policy inside DeepSpeed, with all of DeepSpeed's configuration.

Works on a GPU or CPU machine with torch and deepspeed, without Ray. Ranks find each other through torch.distributed's usual
environment variables or an existing process group.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from raydpo.config import TrainConfig
from raydpo.config.train import REDUCE_BUCKET
from raydpo.errors import ModelError, reason
from raydpo.model.adapter import fuse_adapters
from raydpo.model.budget import MOST_TRAINED, Budget, Needs, find_budget, probe_groups
from raydpo.model.fused import fuse_layers
from raydpo.model.layout import Layout, PromptGroup
from raydpo.model.leaves import set_leaf_modules
from raydpo.model.limits import longest_sequence
from raydpo.model.load import add_lora, freeze_matching, load_causal_lm
from raydpo.model.logps import LogpModel
from raydpo.model.memory.anatomy import Anatomy
from raydpo.model.memory.needs import needs_of
from raydpo.model.partition import float32_names
from raydpo.model.recall import Recall
from raydpo.model.selfcheck import check_training_mode, choose_layout, share_positions
from raydpo.model.targets import told_adapters
from raydpo.model.ulysses import SequenceGroup
from raydpo.model.weights import ADAPTER_NAME
from raydpo.terminal.phases import Seldom
from raydpo.training.policy.engine import PolicySpec
from raydpo.training.policy.host_memory import HostPeak
from raydpo.training.policy.offload import disk_folder
from raydpo.training.policy.optimizer import make_optimizer, no_steps
from raydpo.training.policy.ranks import RankGroup, group_timeout
from raydpo.training.policy.state import TrainedState

__all__ = ["PolicyEngine"]


def _described(spec: PolicySpec, train: TrainConfig) -> list[Any] | None:
    """What decides how the policy computes, and how much memory it takes; None without an identity."""
    if spec.identity is None:
        return None
    lora = None if spec.lora is None else spec.lora.model_dump(mode="json")
    settings = {"zero", "sequence_parallel", "gradient_checkpointing", "offload_activations"}
    chosen = train.model_dump(mode="json", include=settings)
    routed = ["router loss"] if train.router_aux_loss_coef else []
    return [spec.identity, lora, list(spec.freeze), spec.fused, chosen, dist.get_world_size(), *routed]


class PolicyEngine(RankGroup):
    """An ``engine.Engine`` that uses DeepSpeed.

    Args:
        check_rows: a few pairs of the data, for the self-check of the layout.
        note: called with lines for the user, from any thread: how far the loading of a large model is.

    Attributes:
        trainable: the parameters that train.
        engine: DeepSpeed's engine.

    Raises:
        ModelError: if the model cannot be loaded, or cannot be computed exactly in the requested layout.
    """

    def __init__(
        self,
        spec: PolicySpec,
        train: TrainConfig,
        device: torch.device,
        check_rows: Sequence[PromptGroup] = (),
        note: Callable[[str], None] = lambda line: None,
    ) -> None:
        import deepspeed
        from transformers.integrations import HfDeepSpeedConfig

        if train.deterministic:
            _repeat_to_the_bit()
        self.device, self.zero, self.adapts = device, train.zero, spec.adapts
        self.sequence_parallel = train.sequence_parallel
        self.replicas, self.replica = (number // train.sequence_parallel for number in (self.world_size, self.rank))
        self.is_leader = self.rank % train.sequence_parallel == 0
        self._given = spec, train
        settings = _deepspeed_config(train, spec.dtype)
        # Kept alive while the model is loaded: transformers looks it up and partitions weights as it reads them.
        self._partitioned_loading = HfDeepSpeedConfig(settings) if train.zero == 3 else None
        with HostPeak() as loading:
            model = self._load(spec, note)
        most = torch.tensor([loading.seconds, loading.bytes], dtype=torch.float64, device=device)
        dist.all_reduce(most, op=dist.ReduceOp.MAX)
        self.load_seconds, self.load_bytes = most.tolist()
        if spec.lora is not None:
            model = add_lora(model, spec.lora, train.seed)
        elif spec.adapter is not None:
            model = fuse_adapters(model)
        self.adapters_line = told_adapters(model) if spec.adapts else None
        freeze_matching(model, spec.freeze)
        module = LogpModel(model)
        if train.gradient_checkpointing:
            module.recompute_layers()
        trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
        optimizer = make_optimizer(trainable, train, device)
        exact = _float32_parameters(module, spec.dtype, train.zero)
        if train.zero == 3 and set_leaf_modules(module):
            # DeepSpeed sums gradients of a leaf module when its input has one (stage3.py, reduce_leaf_module_grads). Below
            # the first adapters no input has, and torch would call this before there are gradients to sum.
            module.causal_lm.enable_input_require_grads()
        timeout = timedelta(seconds=train.collective_timeout)
        with no_steps(optimizer), group_timeout(timeout):
            self.engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=settings)
        for parameter, value in exact:
            parameter.data = value
        self.module = module
        self.trainable = trainable
        # Checked inside DeepSpeed, as it will run. Under ZeRO-3 all ranks must check the same rows.
        self._recall = Recall(_described(spec, train), device, self._all_ranks)
        with self.evaluating():
            self.layout_line = choose_layout(module, device, spec.layout, check_rows, self._recall).line
            if spec.fused:
                self.layout_line += f"; {fuse_layers(module, device, self._recall)}"
            group = SequenceGroup.of_world(train.sequence_parallel, timeout)
            if group is not None:
                self.layout_line += f"; {share_positions(module, device, group, check_rows)}"
            check_training_mode(module, device, self._recall)

    def _load(self, spec: PolicySpec, note: Callable[[str], None]) -> nn.Module:
        return load_causal_lm(
            spec.path,
            spec.dtype,
            adapter=spec.adapter,
            train_adapter=True,
            quantization=spec.quantization,
            rope_length=spec.rope_length,
            trust_remote_code=spec.trust_remote_code,
            device="cpu" if self.zero == 3 else self.device,
            progress=Seldom(
                lambda done, total: note(f"loading the policy: {done / 1e9:,.0f} of {total / 1e9:,.0f} GB read")
            ),
            note=note,
        )

    def _all_ranks(self, value: bool) -> bool:
        flag = torch.tensor(int(value), device=self.device)
        dist.all_reduce(flag, op=dist.ReduceOp.MIN)
        return bool(flag)

    def lay_out(self, groups: Sequence[PromptGroup]) -> Layout:
        layout = self.module.lay_out(groups)
        return layout.pin() if self.device.type == "cuda" else layout

    def logps(self, layout: Layout, *, log_sum_sq: bool = False, router_loss: bool = False) -> Tensor | tuple[Tensor, ...]:
        wishes = {"log_sum_sq": log_sum_sq, "router_loss": router_loss}
        asked = {name: True for name, wish in wishes.items() if wish}
        with self._computing():
            return self.engine(layout.to(self.device), **asked)

    def _computing(self) -> AbstractContextManager[object]:
        """Where a forward pass keeps what its backward pass needs: on the host, if that is configured."""
        if self._given[1].offload_activations and torch.is_grad_enabled():
            return torch.autograd.graph.save_on_cpu(pin_memory=self.device.type == "cuda")
        return contextlib.nullcontext()

    def find_budget(self, share: float = 1.0) -> Budget:
        # A forward pass keeps what training keeps; a backward pass here would leave gradients in DeepSpeed.
        def run(tokens: int) -> Any:
            longest = longest_sequence(self.module.causal_lm)
            groups = probe_groups(tokens * self.sequence_parallel, self.module.vocabulary, longest)
            asked = {"router_loss": True} if self._given[1].router_aux_loss_coef else {}
            with self._computing():
                return self.module(self.lay_out(groups).to(self.device), **asked)

        known = self._recall.known("training")
        room = {"most": MOST_TRAINED, "share": share, "needs": self._needs()}
        budget = find_budget(run, self.device, **room, known=known, agree=self._all_ranks)
        self._recall.keep("training", budget.bytes_per_token)
        smallest = torch.tensor(budget.tokens, device=self.device)
        dist.all_reduce(smallest, op=dist.ReduceOp.MIN)
        return dataclasses.replace(budget, tokens=int(smallest))

    def _needs(self) -> Needs:
        """What a step takes by the ledger of ``raydpo plan``."""
        spec, train = self._given
        where = {"workers": self.world_size, "dtype": spec.dtype, "device": self.device.type}
        try:
            return needs_of(Anatomy.of_loaded(self.module.causal_lm), spec, train, **where)
        except Exception as error:  # a model's own code may do anything, and the policy is loaded all the same
            moments = 8.0 * sum(parameter.numel() for parameter in self.trainable)
            return Needs(step=lambda _: moments, probe=lambda _: 0.0, doubt=reason(error))

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        self.engine.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            self.engine.train()

    def backward(self, loss: Tensor, *, last: bool) -> None:
        # DeepSpeed averages gradients over ranks. Multiplied by the number of ranks, the average is the sum of the shares.
        self.engine.set_gradient_accumulation_boundary(last)
        self.engine.backward(loss * self.world_size, scale_wrt_gas=False)

    def step(self, learning_rate: float) -> float:
        # If the norm is not finite, DeepSpeed leaves weights and moments unchanged, but only under ZeRO 1 to 3.
        norm = self._plain_norm() if self.zero == 0 else None
        if norm is not None and not math.isfinite(norm):
            for parameter in self.trainable:
                parameter.grad = None
            return norm
        for group in self.engine.optimizer.param_groups:
            group["lr"] = learning_rate
        self.engine.step()
        return float(self.engine.get_global_grad_norm()) if norm is None else norm

    @property
    def state(self) -> TrainedState:
        named = {name: each for name, each in self.module.named_parameters() if each.requires_grad}
        return TrainedState(self.engine, named, self.zero)

    def load_whole_models(self) -> None:
        self._partitioned_loading = None

    def gather(self) -> dict[str, Tensor]:
        """See ``engine.Engine``; with an adapter, the adapter's weights alone. Under ZeRO-3 they are gathered one by one, so
        that no GPU holds all of them."""
        import deepspeed

        gathered: dict[str, Tensor] = {}
        # PEFT also stores adapter weights that do not train, and shared ones under each of their names.
        for name, parameter in self.module.policy.named_parameters(remove_duplicate=not self.adapts):
            if self.adapts and not parameter.requires_grad and ADAPTER_NAME not in name.split("."):
                continue
            with deepspeed.zero.GatheredParameters([parameter], enabled=self.zero == 3):
                if self.rank == 0:
                    gathered[name] = parameter.detach().to("cpu", copy=True)
        return gathered

    def _plain_norm(self) -> float:
        """The gradient norm, which DeepSpeed does not report without ZeRO. Every rank has all gradients."""
        gradients = [parameter.grad for parameter in self.trainable if parameter.grad is not None]
        return float(torch.nn.utils.get_total_norm(gradients)) if gradients else 0.0


def _repeat_to_the_bit() -> None:
    """Use only deterministic kernels in this process, which must not have used cuBLAS before: that reads its variable once.

    Operations without such a kernel raise an error. With ``warn_only`` the backward pass of torch's flash attention would
    stay nondeterministic (``ATen/native/transformers/cuda/attention_backward.cu``).
    """
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # finds faults in programs, and takes time


def _deepspeed_config(train: TrainConfig, dtype: str) -> dict[str, Any]:
    overlaps = train.overlap_communication or train.zero == 3  # DeepSpeed's default for ZeRO-3
    return {
        # raydpo makes the micro-batches, and their number varies. With a global batch size here, DeepSpeed's consistency
        # check fails while transformers loads under ZeRO-3.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        # Without clipping, a bound that is never reached: DeepSpeed then still computes the norm.
        "gradient_clipping": train.clip if train.clip is not None else 1e30,
        "zero_optimization": {"stage": train.zero, "reduce_bucket_size": REDUCE_BUCKET, "overlap_comm": overlaps}
        | _offload(train),
        # Otherwise DeepSpeed demands its own Adam, which must be compiled.
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,
        # Gradients add up in bfloat16 too (no grad_accum_dtype): the products they come from are coarser by far, and sums in
        # float32 take more memory, of all gradients with ZeRO 1. DeepSpeed has none without ZeRO.
        "bf16": {"enabled": dtype == "bfloat16"},
        "steps_per_print": 1_000_000_000,
        "wall_clock_breakdown": False,
    }


def _offload(train: TrainConfig) -> dict[str, Any]:
    wishes = {
        "offload_optimizer": ("train.offload_optimizer", train.offload_optimizer),
        "offload_param": ("train.offload_params", train.offload_params),
    }
    return {
        key: {"device": "cpu", "pin_memory": torch.cuda.is_available()}
        if where == "cpu"
        else {"device": "nvme", "nvme_path": disk_folder(field, where)}
        for key, (field, where) in wishes.items()
        if where is not None
    }


def _float32_parameters(module: LogpModel, dtype: str, zero: int) -> list[tuple[nn.Parameter, Tensor]]:
    """Parameters of a bfloat16 model that transformers keeps in float32 (routers of some mixtures of experts), with their
    values. DeepSpeed rounds them; the caller restores them, so that policy and reference are the same function.

    Raises:
        ModelError: if they cannot be restored: if they train, or under ZeRO-3, which rounds while loading.
    """
    if dtype == "float32":
        return []
    rounded = float32_names(module.causal_lm) if zero == 3 else ()
    # New adapters start in float32. Rounding them changes nothing, since their output is zero.
    found = {
        name: parameter
        for name, parameter in module.causal_lm.named_parameters()
        if ".lora_" not in name and (parameter.dtype == torch.float32 or name.replace("base_layer.", "") in rounded)
    }
    trained = [name for name, parameter in found.items() if parameter.requires_grad]
    if not trained and (not found or zero < 3):
        return [(parameter, parameter.data) for parameter in found.values()]
    fixes = ["train.zero=2"] if zero == 3 else []
    if trained:
        leaves = sorted({re.sub(r".*\.\d+\.", "", name) for name in trained})
        fixes.append(f"model.freeze=[{', '.join(leaves)}] or model.lora")
    raise ModelError(
        f"{type(module.causal_lm).__name__} keeps parameters in float32 ({', '.join(list(found)[:2])}"
        f"{', ...' if len(found) > 2 else ''}), but DeepSpeed trains in bfloat16 and would round them: the "
        "policy would not be what the reference was scored with. "
        f"Set {' and '.join(fixes)}, or model.dtype=float32"
    )
