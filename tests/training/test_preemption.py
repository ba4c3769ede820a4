"""Notice of preemption: a checkpoint at once, more steps while there is time, a checkpoint before the end."""

from distributed import run_distributed
from kernel import Record, tiny_pairs, train_here, with_reference

from raydpo.training.checkpoint import preemption


class Spot(Record):
    """Announces at step 4 that a machine will be taken away, and at step 9 that it is about to be. It stays."""

    def preempted(self):
        import torch.distributed as dist

        done = len(self.steps)
        if done < 4:
            return None
        # The clock of another machine is wrong; rank 0's counts.
        return (3600.0 if done < 9 else 0.1) + 7200 * dist.get_rank()


def train(table, model, place):
    preemption.AFTER = 0.2
    run = train_here(table, model, place / "scratch", record=Spot(keep=place / "keep"), steps=14, preemption_every=2)
    return list(run.checkpoints), run.notes, len(run.steps)


def test_a_checkpoint_at_once_and_one_at_the_end(tiny_llama, tmp_path):
    table = with_reference(tiny_pairs(33), tiny_llama)
    for checkpoints, notes, steps in run_distributed(train, 2, tmp_path / "run", table, tiny_llama, tmp_path):
        assert checkpoints == [4, 10, 14] and steps == 14
        assert [
            ("3600 s" in note, "step 10 is stored" in note, "still there" in note)
            for note in notes
            if "machine" in note or "elsewhere" in note
        ] == [(True, False, False), (False, True, False), (False, False, True)]


def test_a_notice_without_a_time_is_acted_on_at_once(tiny_llama, tmp_path, monkeypatch):
    class Engine:
        rank, device = 0, "cpu"

        def sum_over_ranks(self, values):
            return values

    class Hooks(Record):
        def preempted(self):
            return 0.0

    hooks = Hooks()
    monkeypatch.setattr(preemption, "AFTER", 0.0)
    guard = preemption.PreemptionGuard(Engine(), hooks, every=1)
    assert guard.ask(1, 0.1, 0.1)
    guard.wait(1)
    assert not guard.ask(2, 0.1, 0.1), "it outlived its end once and is not believed again"
    assert "still there" in hooks.notes[-1]
