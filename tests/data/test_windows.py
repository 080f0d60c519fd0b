"""Windows must tile the tokens, keep document borders, and come once an epoch."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kimi_pretrain.data.indexed import IndexedReader, IndexedWriter, bin_path
from kimi_pretrain.data.windows import Windows, in_epochs


def windows_of(prefix: Path, lengths: list[int], length: int) -> Windows:
    """Tokens 0, 1, 2, ... cut into documents of these lengths."""
    with IndexedWriter(prefix, 10_000_000) as writer:
        writer.add_documents(np.arange(sum(lengths)), np.array(lengths))
    return Windows(IndexedReader(prefix), length)


def read(windows: Windows, chosen: list[int]) -> tuple[np.ndarray, np.ndarray]:
    rows = np.empty((len(chosen), windows.length + 1), windows.dtype)
    for row, window in zip(rows, chosen, strict=True):
        windows.read_into(window, row.data.cast("B"))
    return rows[:, :-1], rows[:, 1:]


def test_every_token_but_the_first_is_a_label_once(tmp_path: Path) -> None:
    """Catches a stride of length + 1, and a last window that reads past the end."""
    windows = windows_of(tmp_path / "a", [5, 16], 4)
    assert windows.count == 5
    tokens, labels = read(windows, [0, 1, 2, 3, 4])
    assert tokens.ravel().tolist() == list(range(20))
    assert labels.ravel().tolist() == list(range(1, 21))


@pytest.mark.parametrize(("total", "count"), [(0, 0), (1, 0), (4, 0), (5, 1), (8, 1), (9, 2)])
def test_count_of_windows(tmp_path: Path, total: int, count: int) -> None:
    assert windows_of(tmp_path / "a", [total], 4).count == count


@settings(deadline=None, max_examples=50)
@given(lengths=st.lists(st.integers(0, 9), min_size=1, max_size=40), length=st.integers(1, 7))
def test_boundaries_equal_a_look_at_every_token(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], length: int
) -> None:
    """Empty documents, borders at a window's first and last token, several in one window."""
    windows = windows_of(tmp_path_factory.mktemp("w") / "a", lengths, length)
    if not windows.count:
        return
    owner = np.repeat(np.arange(len(lengths)), lengths)
    chosen = np.arange(windows.count)[::-1]
    which, offset = windows.boundaries(chosen)
    assert np.array_equal(np.lexsort((offset, which)), np.arange(len(which)))
    found = set(zip(which.tolist(), offset.tolist(), strict=True))
    expected = {
        (row, k)
        for row, window in enumerate(chosen.tolist())
        for k in range(1, length + 1)
        if owner[window * length + k] != owner[window * length + k - 1]
    }
    assert found == expected


@settings(deadline=None)
@given(count=st.integers(1, 60), epochs=st.integers(1, 4), seed=st.integers(0, 99))
def test_no_epoch_repeats_a_window(count: int, epochs: int, seed: int) -> None:
    order = in_epochs(np.arange(count * epochs), count, seed, "a").reshape(epochs, count)
    assert np.array_equal(np.sort(order, axis=1), np.tile(np.arange(count), (epochs, 1)))


def test_memory_does_not_grow_with_what_was_read(tmp_path: Path) -> None:
    """Catches a memory map: its pages count as the process's own until the kernel wants them."""
    status = Path("/proc/self/status")

    def resident() -> int:
        return int(status.read_text().split("VmRSS:")[1].split()[0]) * 1024

    windows = windows_of(tmp_path / "a", [1_000_000 - 1] * 8, 4096)  # 32 MB
    read(windows, [0])
    before = resident()
    for window in range(windows.count):
        tokens, _ = read(windows, [window])
        assert tokens[0, 0] == window * 4096
    assert resident() - before < 1 << 22


def test_epochs_and_domains_differ() -> None:
    order = in_epochs(np.arange(3000), 1000, 0, "a").reshape(3, 1000)
    other = in_epochs(np.arange(1000), 1000, 0, "b")
    for left, right in ((order[0], order[1]), (order[1], order[2]), (order[0], other)):
        assert (left == right).sum() < 12


def test_a_file_cut_while_open_is_an_error(tmp_path: Path) -> None:
    """Catches training on what the buffer held before."""
    windows = windows_of(tmp_path / "a", [21], 4)
    with bin_path(tmp_path / "a").open("r+b") as file:
        file.truncate(16)
    with pytest.raises(OSError, match="ends inside window 4"):
        read(windows, [4])
