"""Where the Triton kernels find the patches of a view, without a copy."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

memory = pytest.importorskip("denim.kernels.memory_triton", reason="Triton is a dependency on Linux x86-64 alone")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def patch(base, first, stride, sample, index, size):
    """The patch where the kernels look for it."""
    start = base.storage_offset() + (sample * stride + first + index) * size
    return base.as_strided((size,), (1,), start)


def check(patches, *, copied):
    base, first, stride = memory.strided_samples(patches)
    flat = patches.reshape(-1, *patches.shape[-2:])
    for sample in range(len(flat)):
        for index in range(flat.shape[1]):
            found = patch(base, first, stride, sample, index, flat.shape[2])
            assert torch.equal(found, flat[sample, index])
    storage, other = base.untyped_storage().data_ptr(), patches.untyped_storage().data_ptr()
    assert (storage != other) == copied
    return base.storage_offset() * base.itemsize % 16


@given(
    leading=st.lists(st.integers(1, 3), min_size=1, max_size=3),
    length=st.integers(2, 5),
    size=st.integers(1, 40),
    skipped=st.integers(0, 3),
    dtype=st.sampled_from(DTYPES),
)
@settings(max_examples=60, deadline=None)
def test_predictions_without_their_first_tokens_are_not_copied(leading, length, size, skipped, dtype):
    memory_of_all = torch.randint(0, 256, (*leading, skipped + length, size)).to(dtype)
    # Patch 0 of the storage is always a base, so the base is a multiple of 16 bytes whatever the size of a patch.
    assert check(memory_of_all[..., skipped:, :], copied=False) == 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_patches_of_14_pixels_start_at_the_class_token(dtype):
    view = torch.zeros(2, 5, 14 * 14 * 3, dtype=dtype)[:, 1:]
    base, first, stride = memory.strided_samples(view)
    assert (first, stride) == ((0, 5) if dtype == torch.float32 else (1, 5))  # 1176 bytes of a patch are 8 off 16
    assert base.storage_offset() == (1 - first) * view.shape[-1]


@pytest.mark.parametrize(
    "patches",
    [
        torch.rand(2, 3, 8).transpose(1, 2),
        torch.rand(2, 8, 3, 4).transpose(1, 2)[..., :2],
        torch.rand(4, 3, 2, 5).transpose(0, 1),
        torch.rand(2, 3 * 4 + 1)[:, :12].unflatten(1, (3, 4)),
    ],
    ids=["elements apart", "patches apart", "leading dimensions swapped", "samples apart by no whole patch"],
)
def test_other_strides_are_copied(patches):
    assert check(patches, copied=True) == 0


def test_a_view_that_no_aligned_patch_precedes_is_taken_as_it_is():
    patches = torch.rand(1 + 2 * 3 * 4)[1:].view(2, 3, 4)
    assert check(patches, copied=False) == 4


def test_no_samples():
    assert memory.strided_samples(torch.rand(0, 3, 4))[1:] == (0, 3)
