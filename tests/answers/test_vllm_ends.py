"""The process of vLLM is gone when its answers are there: the training that follows needs its memory."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_vllm import STAND_IN
from tiny import make_model

from raydpo.answers.answering import Answering
from raydpo.answers.draws import answer_rows
from raydpo.cluster.resources import Resources
from raydpo.cluster.work import do_work
from raydpo.reference.identity import identify
from raydpo.reference.score import ReferenceSpec
from raydpo.storage.files import Storage


def make_python(folder, vllm):
    """Python of an environment with a module ``vllm`` of that source; None = without."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    if vllm is not None:
        packages = next((folder / "lib").glob("python*")) / "site-packages"
        (packages / "vllm" / "lora").mkdir(parents=True)
        (packages / "vllm" / "__init__.py").write_text(vllm)
        (packages / "vllm" / "lora" / "__init__.py").write_text("")
        (packages / "vllm" / "lora" / "request.py").write_text("LoRARequest = dict")
    return str(folder / "bin" / "python")


class Lingering:
    """Work that ends slowly, as a process with much memory does."""

    def __init__(self, mark):
        self.mark, self.identity = str(mark), {"lingering": 1}

    def open(self, device):
        return _Act(self.mark)


class _Act:
    def __init__(self, mark):
        self.mark = mark

    def __call__(self, rows):
        return rows

    def __del__(self):
        time.sleep(2)
        Path(self.mark).touch()


@pytest.mark.slow
def test_no_process_of_vllm_outlives_the_work(tmp_path, on_cluster, monkeypatch):
    import ray

    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    model = make_model(tmp_path / "model")
    work = Answering(
        spec=ReferenceSpec(path=str(model), adapter=None, identity=identify(model, "float32")),
        max_tokens=4,
        stop=(2,),
        batch=1,
        engine="vllm",
        python=make_python(tmp_path / "vllm", STAND_IN.format(notes=str(tmp_path / "notes"))),
        positions=9,
    )
    ray.init(address=os.environ["RAY_ADDRESS"], log_to_driver=False)
    try:
        storage, resources = Storage(str(tmp_path / "cache")), Resources(workers=1, gpus_per_worker=0, threads=1)
        how = {"block": 2, "progress": lambda *at: None, "doing": "answering", "warn": print}
        (found,) = do_work(work, [answer_rows([[3, 4], [5], [6], [7, 8]], samples=2)], storage, resources, **how)
        begun = [json.loads(line) for line in (tmp_path / "notes").read_text().splitlines()]
        processes = [note["pid"] for note in begun if "pid" in note]
        alive = [pid for pid in processes if Path(f"/proc/{pid}").exists()]
        ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
        do_work(Lingering(tmp_path / "mark"), [answer_rows([[3, 4]])], storage, resources, **how)
        waited = (tmp_path / "mark").exists()
    finally:
        ray.shutdown()
    assert len(processes) == 1 and alive == []
    assert waited, "an actor that takes its time"
    assert found["answer_ids"].to_pylist()[:2] == [[4, 3], [4, 3]]
    assert {note["environment"]["VLLM_BATCH_INVARIANT"] for note in begun if "pid" in note} == {"1"}
