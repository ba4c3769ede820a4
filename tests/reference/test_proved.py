"""The files of a model are proved where it is loaded, by one process a node."""

import dataclasses
import multiprocessing
import time

import pytest
from tiny import make_model

from raydpo.errors import ModelError
from raydpo.reference import identity as module
from raydpo.reference.identity import identify, proved_here
from raydpo.reference.score import ReferenceSpec


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("proved") / "model")


@pytest.fixture
def hashed(tmp_path, monkeypatch):
    """A node without memory, and the folder with a file for each time that a file of weights was hashed."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    (tmp_path / "hashed").mkdir()
    plain = module._hash_tensors

    def hash_tensors(file):
        (tmp_path / "hashed" / f"{file.name} {time.monotonic_ns()}").touch()
        time.sleep(0.2)
        return plain(file)

    monkeypatch.setattr(module, "_hash_tensors", hash_tensors)
    return tmp_path / "hashed"


def spec_of(model):
    return ReferenceSpec(path=str(model), adapter=None, identity=identify(model, "float32"))


def prove(spec, loaded):
    with proved_here(spec):
        loaded.touch()


def test_processes_that_load_at_once_hash_once(model, tmp_path, hashed, monkeypatch):
    spec = spec_of(model)
    assert len(list(hashed.iterdir())) == 1
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "another node"))
    workers = [
        multiprocessing.get_context("fork").Process(target=prove, args=(spec, tmp_path / f"loaded-{n}")) for n in range(4)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(30)
    assert [worker.exitcode for worker in workers] == [0] * 4
    assert len(list(hashed.iterdir())) == 2 and len(list(tmp_path.glob("loaded-*"))) == 4


def test_another_model_is_refused_by_who_proves_it(model, hashed):
    other = dataclasses.replace(spec_of(model), identity=identify(model, "bfloat16"))
    other = dataclasses.replace(other, identity=dataclasses.replace(other.identity, weights="0" * 64))
    told = r"is another model than where the run was started: weights: .*; give all machines the same files"
    with pytest.raises(ModelError, match=told), proved_here(other):
        pass
    before = len(list(hashed.iterdir()))
    with proved_here(dataclasses.replace(other, path="/nowhere"), prove=False):
        pass
    assert len(list(hashed.iterdir())) == before
