from __future__ import annotations

import numpy as np
import pytest
import torch

from lamp_compile.errors import InputError
from lamp_compile.quality.windows import spread, token_ids


def test_windows_start_evenly_spread():
    ids = torch.arange(1000)
    picked = spread(ids, context=100, count=4)
    assert picked.shape == (4, 100)
    assert picked[:, 0].tolist() == [0, 225, 450, 675]  # i * ((1000 - 100) // 4)
    assert torch.equal(picked[2], torch.arange(450, 550))


def test_one_window_of_the_whole_text():
    assert spread(torch.arange(8), context=8, count=1).tolist() == [list(range(8))]


@pytest.mark.parametrize(("length", "context", "count"), [(7, 8, 1), (10, 8, 5), (100, 1, 1), (100, 10, 0)])
def test_too_short_a_text_is_refused(length, context, count):
    with pytest.raises(InputError):
        spread(torch.arange(length), context, count)


def test_ids_are_little_endian_16_bit_without_a_header(tmp_path):
    file = tmp_path / "ids.u16"
    file.write_bytes(bytes([1, 0, 0, 1, 255, 255]))
    assert token_ids(file).tolist() == [1, 256, 65535]
    np.array([3, 70], dtype="<u2").tofile(file)
    assert token_ids(file, vocabulary=71).tolist() == [3, 70]


def test_text_goes_through_the_tokenizer(tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("häß", encoding="utf-8")
    assert token_ids(file, lambda text: [ord(c) for c in text]).tolist() == [104, 228, 223]


@pytest.mark.parametrize(
    ("name", "data", "says"),
    [
        ("missing.txt", None, "cannot read"),
        ("empty.txt", b"", "is empty"),
        ("blank.txt", b" \n\n", "no words"),
        ("latin.txt", b"\xff\xfe\xfa", "not UTF-8"),
        ("odd.u16", b"\x01\x00\x02", "no whole number"),
        ("beyond.u16", b"\x64\x00", "beyond the model's vocabulary of 100"),
    ],
)
def test_bad_files_say_what_where_and_what_to_do(tmp_path, name, data, says):
    file = tmp_path / name
    if data is not None:
        file.write_bytes(data)
    with pytest.raises(InputError, match=says) as caught:
        token_ids(file, lambda text: [ord(c) for c in text], vocabulary=100)
    assert str(file) in caught.value.where
    assert caught.value.fix


def test_text_without_a_tokenizer_is_refused(tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("text")
    with pytest.raises(InputError, match="needs a tokenizer"):
        token_ids(file)
