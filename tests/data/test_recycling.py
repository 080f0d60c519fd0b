"""Memory may come back only when nobody can see it any more."""

import gc
import threading

import numpy as np
import torch

from kimi_pretrain.data.recycling import KEPT, KINDS, BlockPool


def address(array: np.ndarray) -> int:
    return array.__array_interface__["data"][0]


def test_memory_comes_back_after_the_last_view() -> None:
    pool = BlockPool()
    array = pool.empty((4, 8), np.int64)
    where = address(array)
    row = array[1:][0].reshape(2, 4)
    del array
    other = pool.empty((4, 8), np.int64)
    assert address(other) != where  # `row` still looks there
    row[:] = 7
    other[:] = 1
    assert (row == 7).all()
    del row
    gc.collect()
    assert address(pool.empty((4, 8), np.int64)) == where


def test_a_tensor_is_a_view() -> None:
    """Catches a batch overwritten while the model still trains on it."""
    pool = BlockPool()
    tensor = torch.from_numpy(pool.empty((2, 3), np.int64))[1]
    where = tensor.data_ptr()
    assert not where - 64 < address(pool.empty((2, 3), np.int64)) <= where
    del tensor
    gc.collect()


def test_sizes_may_change() -> None:
    pool = BlockPool()
    for shape in ((2, 3), (5, 7), (2, 3), (0, 3)):
        array = pool.empty(shape, np.int64)
        array[:] = 1
        assert array.shape == shape
        assert array.dtype == np.int64
        assert array.flags.c_contiguous
        del array


def test_keeps_a_few_blocks_only() -> None:
    pool = BlockPool()
    arrays = [pool.empty((10,), np.int64) for _ in range(20)]
    del arrays
    gc.collect()
    assert [len(blocks) for blocks in pool._blocks.values()] == [KEPT]
    for size in range(50):
        pool.empty((size,), np.int64)
    assert len(pool._blocks) <= KINDS


def test_threads_never_share_a_block() -> None:
    pool, wrong = BlockPool(), []

    def work(mark: int) -> None:
        for _ in range(300):
            array = pool.empty((64,), np.int64)
            array[:] = mark
            if not (array == mark).all():
                wrong.append(mark)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
