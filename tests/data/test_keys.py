import numpy as np
import pytest

from raydpo.data.keys import completion_key


def test_key_is_pinned():
    # b2sum of <QQ lengths and <u4 ids: caches written earlier must still hit
    assert completion_key([1, 2, 3], [70000, 5]).hex() == "dea93dd5aa77b17d3722e5a5d1932538"


@pytest.mark.parametrize("dtype", [np.int32, np.int64, np.uint32, ">i4"])
def test_key_is_of_values_not_of_their_layout(dtype):
    prompt, completion = np.array([1, 2, 3], dtype), np.array([70000, 9, 5, 9], dtype)[::2]
    assert completion_key(prompt, completion) == completion_key([1, 2, 3], [70000, 5])


def test_no_two_splits_collide():
    ids = list(range(20))
    keys = {completion_key(ids[:cut], ids[cut:end]) for end in range(21) for cut in range(end + 1)}
    assert len(keys) == 21 * 22 // 2
    assert all(len(key) == 16 for key in keys)
