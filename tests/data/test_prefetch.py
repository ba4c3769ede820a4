import threading
import time

import pytest

from raydpo.data.prefetch import prefetch


def test_order_is_kept_and_preparation_runs_ahead_in_another_thread():
    prepared, threads = [], set()

    def prepare(item):
        prepared.append(item)
        threads.add(threading.current_thread())
        return item * item

    results = prefetch(range(6), prepare, ahead=2)
    assert next(results) == 0
    deadline = time.time() + 10
    while prepared != [0, 1, 2] and time.time() < deadline:  # while nobody asks for more
        time.sleep(0.01)
    assert prepared == [0, 1, 2]
    assert list(results) == [1, 4, 9, 16, 25]
    assert threading.main_thread() not in threads and len(threads) == 1


def test_an_error_comes_where_its_item_would_have_come():
    results = prefetch([4, 2, 0, 1], lambda item: 8 // item)
    assert [next(results), next(results)] == [2, 4]
    with pytest.raises(ZeroDivisionError):
        next(results)


def test_who_stops_early_leaves_no_thread_behind():
    results = prefetch(range(1000), lambda item: item)
    next(results)
    results.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("raydpo-prefetch")]
