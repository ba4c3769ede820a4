"""Options with which a command could only do nothing, or something else than was meant."""

import pytest

from raydpo.cli.entry import main


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("show config.yaml -n 0", "-n/--count: '0' is given; a whole number of at least 1 is expected"),
        ("show config.yaml -n 1.5", "'1.5' is given; a whole number"),
        ("cache verify runs/cache --config config.yaml --sample 0", "--sample: '0' is given; a whole number of at least 1"),
        ("cache verify runs/cache --config config.yaml --tolerance 0", "'0' is given; a number of at least 1e-09"),
        ("cache verify runs/cache --config config.yaml --tolerance nan", "'nan' is given"),
        ("cache compact runs/cache --target-mb 0", "--target-mb: '0' is given; a number of at least 1"),
        ("submit benchmark --gpus -1", "--gpus: '-1' is given; a whole number of at least 0"),
    ],
)
def test_a_number_out_of_range_is_exit_status_2(words, said, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(words.split())
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--sample 9", "--sample has no effect without --config"),
        ("--all", "--all has no effect without --config"),
        ("--tolerance 0.1", "--tolerance has no effect without --config"),
        ("--config config.yaml --all --sample 9", "--all and --sample 9 contradict each other; keep one"),
    ],
)
def test_verify_refuses_options_that_it_would_ignore(words, said, capsys):
    assert main(["cache", "verify", "runs/cache", *words.split()]) == 2
    assert said in capsys.readouterr().err
