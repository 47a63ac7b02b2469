import os

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lm import data
from lm.config import DataConfig
from tests.helpers import refused

LENGTHS = st.tuples(st.integers(1, 9), st.integers(0, 120)).map(lambda pair: (pair[0], pair[0] + 1 + pair[1]))


def counting(length):
    """Tokens whose value is their position."""
    return np.arange(length, dtype=np.int64)


@given(sizes=LENGTHS)
def test_windows_in_order_cover_the_text_and_share_one_token(sizes):
    context, length = sizes
    windows = data.Windows(counting(length), context)
    assert len(windows) == (length - 1) // context
    for index in range(len(windows)):
        assert windows[index].tolist() == list(range(index * context, (index + 1) * context + 1))


@settings(max_examples=50)
@given(sizes=LENGTHS, seed=st.integers(0, 2**63 - 1), epoch=st.integers(0, 3))
def test_each_epoch_meets_every_window_once(sizes, seed, epoch):
    context, length = sizes
    windows = data.Windows(counting(length), context, seed)
    in_epoch = max(1, len(windows) - 1)
    starts = [int(windows.train(epoch * in_epoch + turn)[0]) for turn in range(in_epoch)]
    offset = min(starts)
    assert 0 <= offset < context
    assert sorted(starts) == [offset + context * index for index in range(in_epoch)]


@settings(max_examples=30)
@given(sizes=LENGTHS, seed=st.integers(0, 2**63 - 1), index=st.integers(0, 10**9))
def test_a_window_is_a_piece_of_the_text_and_depends_on_seed_and_index_alone(sizes, seed, index):
    context, length = sizes
    window = data.Windows(counting(length), context, seed).train(index)
    assert window.dtype == torch.int64
    assert window.tolist() == list(range(int(window[0]), int(window[0]) + context + 1))
    again = data.Windows(counting(length), context, seed)
    again.train(0)
    assert torch.equal(again.train(index), window)


def order(seed, count=300):
    windows = data.Windows(counting(2000), 7, seed)
    return [int(windows.train(index)[0]) for index in range(count)]


def test_the_order_repeats_with_the_seed_and_differs_between_seeds_and_epochs():
    assert order(3) == order(3)
    assert len({tuple(order(seed)) for seed in range(20)}) == 20
    windows = data.Windows(counting(2000), 7, 3)
    in_epoch = len(windows) - 1
    epochs = [[int(windows.train(e * in_epoch + turn)[0]) for turn in range(in_epoch)] for e in range(5)]
    assert len({tuple(epoch) for epoch in epochs}) == 5
    assert len({min(epoch) for epoch in epochs}) > 1  # the offset moves too


def test_windows_do_not_come_in_the_order_of_the_text():
    first = order(0)
    assert first != sorted(first)


def test_targets_are_the_inputs_one_token_on():
    windows = data.Windows(counting(500), 6, seed=1)
    inputs, targets = windows.batch(10, 4)
    assert inputs.shape == targets.shape == (4, 6)
    assert torch.equal(inputs[:, 1:], targets[:, :-1])
    assert torch.equal(targets, inputs + 1)


def test_batches_follow_one_another():
    windows = data.Windows(counting(500), 6, seed=1)
    whole = windows.batch(0, 12)[0]
    assert torch.equal(torch.cat([windows.batch(first, 4)[0] for first in (0, 4, 8)]), whole)


@pytest.mark.parametrize("length", [0, 1, 8])
def test_a_text_shorter_than_one_window_is_rejected_with_both_lengths(length):
    with pytest.raises(ValueError, match=f"the text has {length} tokens; context=8 needs at least 9"):
        data.Windows(counting(length), 8)


def test_a_text_of_exactly_one_window_is_enough():
    windows = data.Windows(counting(9), 8)
    assert windows[0].tolist() == windows.train(0).tolist() == windows.train(12345).tolist() == list(range(9))


@pytest.mark.parametrize("content", [b"\x00\x01\x00", b"\xff\xfe\x80 not UTF-8 \xc3", bytes(range(256))])
def test_any_bytes_are_the_tokens(tmp_path, content):
    path = tmp_path / "text"
    path.write_bytes(content)
    assert bytes(data.open_text(path)) == content


def test_unreadable_files_are_named_with_the_reason(tmp_path):
    (tmp_path / "empty").touch()
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for name, reason in {
        "": "cannot be read: Is a directory",
        "absent": "cannot be read: No such file or directory",
        "empty": "the file is empty",
        "loop": "cannot be read: Too many levels of symbolic links",
        "absent/x": "cannot be read: No such file or directory",
        "empty/x": "cannot be read: Not a directory",
    }.items():
        assert refused(lambda name=name: data.open_text(tmp_path / name)) == f"{tmp_path / name}: {reason}"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_permission_is_named(tmp_path):
    path = tmp_path / "secret"
    path.write_text("text")
    path.chmod(0)
    with pytest.raises(ValueError, match="secret: cannot be read: Permission denied"):
        data.open_text(path)


def test_a_pipe_is_rejected_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="pipe"):
        data.open_text(tmp_path / "pipe")


def test_a_huge_file_is_mapped_and_not_read(tmp_path):
    resource = pytest.importorskip("resource")
    path, size = tmp_path / "huge", 4 * 2**30
    with open(path, "wb") as file:
        file.truncate(size)
        file.seek(size - 3)
        file.write(b"end")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    train, validation = data.load(DataConfig(path=str(path)), 256)
    windows = data.Windows(train, 1000)
    windows.train(10**6)
    assert len(train) + len(validation) == size
    assert bytes(validation[-3:]) == b"end"
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # kB


def test_the_last_tenth_is_held_out_unless_a_file_is_named(tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    first.write_bytes(bytes(range(200)))
    second.write_bytes(b"held out")
    train, validation = data.load(DataConfig(path=str(first)), 256)
    assert (bytes(train), bytes(validation)) == (bytes(range(180)), bytes(range(180, 200)))
    train, validation = data.load(DataConfig(path=str(first), validation=str(second)), 256)
    assert (bytes(train), bytes(validation)) == (bytes(range(200)), b"held out")


def test_a_vocabulary_smaller_than_the_text_is_rejected_with_both_numbers(tmp_path):
    path, low = tmp_path / "text", tmp_path / "low"
    path.write_bytes(b"a" * 3_000_000 + b"z")
    low.write_bytes(b"aa")
    with pytest.raises(ValueError, match="the validation text holds token 122; vocab_size=100 "):
        data.load(DataConfig(path=str(path)), 100)
    with pytest.raises(ValueError, match="the training text holds token 122; vocab_size=122 "):
        data.load(DataConfig(path=str(path), validation=str(low)), 122)
    data.load(DataConfig(path=str(path)), 123)


def test_without_a_path_it_is_the_texts_of_the_package():
    if not (data.CORPUS / "train.txt").exists():
        pytest.skip("the corpus is not built")
    train, validation = data.load(DataConfig(), 256)
    assert len(train) == (data.CORPUS / "train.txt").stat().st_size
    assert len(validation) == (data.CORPUS / "validation.txt").stat().st_size
