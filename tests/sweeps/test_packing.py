"""How many trainings a cluster holds at once."""

import pytest

from raydpo.sweeps.packing import FreeNode, places

EIGHT = FreeNode(cpus=32, gpus=8)


@pytest.mark.parametrize(
    ("nodes", "workers", "gpus", "held"),
    [
        ([EIGHT], 1, 1, 8),
        ([EIGHT], 2, 1, 4),
        ([EIGHT], 3, 1, 2),
        ([EIGHT, EIGHT], 3, 1, 5),  # one of them on both machines
        ([EIGHT], 16, 1, 0),
        ([EIGHT], 1, 0.25, 32),
        ([EIGHT], 1, 0.1, 32),  # 80 by GPUs; each takes a CPU
        ([FreeNode(100, 8)], 1, 0.1, 80),
        ([FreeNode(100, 8)], 1, 0.3, 24),  # three on each GPU, not 26 on all
        ([FreeNode(100, 8)], 1, 0.6, 8),
        ([FreeNode(100, 3), FreeNode(100, 3)], 1, 2, 2),  # no worker has a GPU of each machine
        ([FreeNode(4, 8)], 1, 1, 4),
        ([FreeNode(0, 0), FreeNode(8, 0), FreeNode(3, 0)], 2, 0, 5),
        ([FreeNode(2.9, 0)], 1, 0, 2),
        ([FreeNode(32, 0)], 1, 1, 0),
    ],
)
def test_places(nodes, workers, gpus, held):
    assert places(nodes, workers, gpus) == held
