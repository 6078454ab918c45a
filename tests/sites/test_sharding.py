"""Parts of axes, against axes whose entries are numbered."""

import pytest
import torch
from torch.distributed.tensor import DTensor

from fastentropy.sites.sharding import UNKNOWN, AxisShard, Sharding, first_reshaped_axis, joined, shown_local_tensors


class Mesh:
    """A mesh of ranks as a rank of it sees it."""

    def __init__(self, shape, coordinate):
        self._shape, self._coordinate = shape, coordinate

    def get_local_rank(self, axis):
        return self._coordinate[axis]

    def size(self, axis):
        return self._shape[axis]


@pytest.mark.parametrize(("total", "start", "size"), [(12, 4, 4), (10, 8, 2), (6, 0, 6), (12, 6, 3)])
@pytest.mark.parametrize("factor", [2, 3])
def test_a_part_of_an_axis_that_is_merged_with_one_behind_it(total, start, size, factor):
    merged = torch.arange(total * factor).view(total, factor)[start : start + size].flatten()
    expected = AxisShard(int(merged[0]), len(merged), total * factor)
    assert AxisShard(start, size, total).resized(size * factor) == expected


@pytest.mark.parametrize(("total", "start", "size"), [(12, 4, 4), (12, 6, 6), (8, 0, 4)])
def test_a_part_of_an_axis_that_is_split_into_rows(total, start, size):
    rows = torch.arange(total).view(-1, 2)
    mine = [row for row, entries in enumerate(rows.tolist()) if start <= entries[0] < start + size]
    assert AxisShard(start, size, total).resized(size // 2) == AxisShard(mine[0], len(mine), len(rows))


@pytest.mark.parametrize(("part", "size"), [(AxisShard(3, 3, 9), 2), (AxisShard(1, 2, 4), 1), (AxisShard(0, 0, 2), 3)])
def test_a_part_that_is_no_part_of_the_new_axis(part, size):
    assert part.resized(size) is None


@pytest.mark.parametrize(
    ("shape", "axis", "new_shape", "expected"),
    [
        ((2, 3, 8), 2, (2, 3, 4, 2), 2),
        ((2, 3, 4, 2), 2, (2, 3, 8), 2),
        ((2, 3, 8), 2, (6, 8), 1),
        ((2, 3, 8), 1, (6, 8), 0),
        ((6, 1), 1, (2, 3, 1), 2),
        ((6, 0), 1, (2, 3, 0), 2),
        ((2, 3, 8), 0, (6, 8), 0),
        ((2, 8), 1, (2, 1, 8), 2),
    ],
)
def test_where_a_divided_axis_goes_in_a_reshape(shape, axis, new_shape, expected):
    assert first_reshaped_axis(shape, axis, new_shape) == expected


@pytest.mark.parametrize("coordinate", range(4))
@pytest.mark.parametrize("tokens", [8, 7, 2])
def test_a_padding_mask_is_cut_as_tokens_are(coordinate, tokens):
    is_token = torch.randn(3, tokens) > 0
    chunks = [*is_token.chunk(4, 1), *[is_token[:, :0]] * 4]
    sharding = Sharding(Mesh((4,), [coordinate]), (1,), {1: AxisShard(0, 1, 4)})
    assert torch.equal(sharding.tokens(is_token, (*chunks[coordinate].shape, 5)), chunks[coordinate])


def test_a_padding_mask_of_this_ranks_tokens_is_left_as_it_is():
    is_token = torch.randn(3, 2) > 0
    assert torch.equal(Sharding(Mesh((4,), [1]), (1,), {1: AxisShard(2, 2, 8)}).tokens(is_token, (3, 2, 5)), is_token)


def test_tokens_of_divided_and_flattened_sequences_are_unknown():
    sharding = Sharding(Mesh((2,), [0]), (1,), {1: AxisShard(0, 4, 8)})
    assert sharding.reshaped((3, 4, 5), (12, 5)).tokens(torch.ones(3, 8) > 0, (12, 5)) is None


@pytest.mark.parametrize("coordinate", [[0, 0], [0, 1], [1, 0]])
def test_one_rank_of_those_that_have_the_same_counts(coordinate):
    share = Sharding(Mesh((2, 2), coordinate), (None, 1), {1: AxisShard(3 * coordinate[1], 3, 6)}).share(1, 3)
    assert share == (3 * coordinate[1], 6, coordinate[0] == 0, coordinate[1] == 0, True, "")


def test_a_tensor_that_is_made_of_a_lost_one_is_lost():
    mesh = Mesh((2,), [0])
    divided, lost = Sharding(mesh, (1,), {1: AxisShard(0, 2, 4)}), Sharding(mesh, (UNKNOWN,), {})
    assert joined([divided, lost]).share(1, 2).trouble
    assert joined([Sharding(mesh, (None,), {}), divided]) == divided


def test_neurons_that_are_mixed_with_tokens_are_unknown():
    sharding = Sharding(Mesh((2,), [0]), (2,), {2: AxisShard(0, 5, 10)})
    assert sharding.reshaped((3, 4, 5), (3, 20)).share(1, 20).trouble
    assert not sharding.reshaped((3, 4, 5), (12, 5)).share(1, 5).trouble


def test_to_local_is_put_back_when_the_last_one_leaves():
    original = DTensor.to_local
    first, second = shown_local_tensors(print), shown_local_tensors(print)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert DTensor.to_local is not original
    second.__exit__(None, None, None)
    assert DTensor.to_local is original
