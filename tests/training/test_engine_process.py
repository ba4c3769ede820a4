"""What an engine sets in its process: the device, deterministic kernels, timeouts."""

import os
from datetime import timedelta

import torch
import torch.distributed as dist
from distributed import run_distributed
from kernel import engine_here

from raydpo.model.partition import join_process_group


def set_in_a_process(model):
    """The device that DeepSpeed takes where Ray gave another than the number of the rank, and what torch is told."""
    given, timeouts, make = 1 - int(os.environ["RANK"]), [], dist.new_group

    def new_group(*args, **settings):
        timeouts.append(settings.get("timeout"))
        return make(*args, **settings)

    join_process_group(torch.device("cpu", given))
    dist.new_group = new_group
    found = []
    for deterministic in (False, True):
        *_, engine = engine_here(model, workers=2, sequence_parallel=2, collective_timeout=77, deterministic=deterministic)
        strict = torch.are_deterministic_algorithms_enabled() and not torch.is_deterministic_algorithms_warn_only_enabled()
        found.append((strict, os.environ.get("CUBLAS_WORKSPACE_CONFIG")))
    return given == engine.engine.local_rank, found, timeouts


def test_deepspeed_takes_the_device_that_ray_gave_and_torch_what_the_configuration_says(tiny_llama, tmp_path):
    for device, found, timeouts in run_distributed(set_in_a_process, 2, tmp_path, tiny_llama):
        assert device
        assert found == [(False, None), (True, ":4096:8")]
        assert timeouts and set(timeouts) == {timedelta(seconds=77)}
