from math import prod

import numpy as np
import pytest

from realjax.hf.dims import fit_dims, parse_dims
from tests.given.checkpoints import random_index

SIZES = {"D": 5, "N": 6, "K": 2, "G": 3, "H": 4, "F": 7, "E": 3}


def heads(x, *numbers):
    """Returns `[D, heads, H]` of the rows of those numbers."""
    return x.reshape(-1, SIZES["H"], SIZES["D"])[list(numbers)].transpose(2, 0, 1)


# For each form the shape of our leaf, and the leaf by plain numpy from all of the tensor.
FORMS = {
    "V D -> V D": ((9, 5), lambda x: x),
    "F D -> D F": ((5, 7), lambda x: x.T),
    "(N H) D -> D N H": ((5, 6, 4), lambda x: heads(x, *range(6))),
    "D (N H) -> N H D": ((6, 4, 5), lambda x: x.T.reshape(6, 4, 5)),
    "1 D -> D 1": ((5, 1), lambda x: x.T),
    "E D F -> E F D": ((3, 7, 5), lambda x: x.transpose(0, 2, 1)),
    # phi-3, gpt-2
    "(([N] + K + K) H) D -> D N H": ((5, 6, 4), lambda x: heads(x, *range(6))),
    "((N + [K] + K) H) D -> D K H": ((5, 2, 4), lambda x: heads(x, 6, 7)),
    "((N + K + [K]) H) D -> D K H": ((5, 2, 4), lambda x: heads(x, 8, 9)),
    "(F + [F]) D -> D F": ((5, 7), lambda x: x[7:].T),
    "D ((N + [N] + N) H) -> D N H": ((5, 6, 4), lambda x: x[:, 24:48].reshape(5, 6, 4)),
    # gpt-neox, falcon: by head
    "(N (1 + [1] + 1) H) D -> D N H": ((5, 6, 4), lambda x: heads(x, 1, 4, 7, 10, 13, 16)),
    "(K ([G] + 1 + 1) H) D -> D (K G) H": ((5, 6, 4), lambda x: heads(x, 0, 1, 2, 5, 6, 7)),
    "(K (G + 1 + [1]) H) D -> D K H": ((5, 2, 4), lambda x: heads(x, 4, 9)),
    "(N ([1] + 1 + 1) H) -> N H": ((6, 4), lambda x: x.reshape(6, 3, 4)[:, 0]),
    # gpt-oss: number by number
    "E D (F (1 + [1])) -> E D F": ((3, 5, 7), lambda x: x[..., 1::2]),
    # experts in one tensor, gate and up one after the other
    "E ([F] + F) D -> E D F": ((3, 5, 7), lambda x: x[:, :7].transpose(0, 2, 1)),
}
# The same for a leaf that is made of several tensors: what of the leaf the tensor is.
PARTS_OF_LEAVES = {
    "F D -> D ([F] + F)": ((5, 14), lambda leaf: leaf[:, :7].T),
    "F D -> D (1 + [1]) F": ((5, 2, 7), lambda leaf: leaf[:, 1].T),
    "(K H) D -> D (N + [K] + K) H": ((5, 10, 4), lambda leaf: leaf[:, 6:8].transpose(1, 2, 0).reshape(8, 5)),
    "(N H) D -> D (([N] + K + K) H)": ((5, 40), lambda leaf: leaf[:, :24].T),
}


def make_tensor(text):
    dims = fit_dims(text, FORMS[text][0], SIZES)
    x = np.random.default_rng(0).standard_normal(dims.tensor_shape)
    return dims, x, FORMS[text][1](x)


def read(dims, x, index):
    """Returns the leaf's slice with nan where the tensor has nothing of it, and the sizes of what was read."""
    sizes, out = [], np.full([s.stop - s.start for s in index], np.nan)

    def read_fn(window):
        sizes.append(x[window].size)
        return x[window]

    dims.read(read_fn, index, out)
    return out, sizes


@pytest.mark.parametrize("text", FORMS)
def test_a_leaf_is_what_plain_numpy_takes_of_the_tensor(text):
    dims, x, leaf = make_tensor(text)
    out, sizes = read(dims, x, tuple(slice(0, n) for n in leaf.shape))
    np.testing.assert_array_equal(out, leaf)
    # One read, or one for each head, of no more than the leaf: number by number its neighbours come along.
    assert sum(sizes) == leaf.size * (2 if "(F (1" in text else 1)
    assert len(sizes) == next((SIZES[head] for head in "NK" if f"({head} (" in text), 1)


@pytest.mark.parametrize("text", FORMS)
def test_the_way_back_fills_the_leafs_part_of_the_tensor_and_nothing_else(text):
    dims, x, leaf = make_tensor(text)
    out = np.full(x.shape, np.nan)
    dims.write(leaf, out)
    assert np.isfinite(out).sum() == leaf.size == dims.num_common
    np.testing.assert_array_equal(np.where(np.isnan(out), x, out), x)


@pytest.mark.parametrize("text", FORMS)
def test_a_slice_of_a_leaf_is_the_slice_of_the_whole_and_whole_heads_at_most_are_read_for_it(text):
    dims, x, leaf = make_tensor(text)
    rng = np.random.default_rng(1)
    for _ in range(30):
        index = random_index(rng, leaf.shape)
        out, sizes = read(dims, x, index)
        np.testing.assert_array_equal(out, leaf[index])
        ours = parse_dims(text)[1]
        merged = {letter for dim in parse_dims(text)[0] for letter in dim[1:]} | {"(K G)"}
        blocks = [n if dim[-1] in merged else s.stop - s.start for dim, n, s in zip(ours, leaf.shape, index)]
        if "(K G)" in text:  # all queries of a key
            blocks[1] = 3 * (-(-index[1].stop // 3) - index[1].start // 3)
        assert sum(sizes) <= prod(blocks) * (2 if "(F (1" in text else 1)


@pytest.mark.parametrize("text", PARTS_OF_LEAVES)
def test_a_tensor_can_be_a_part_of_a_leaf(text):
    shape, take = PARTS_OF_LEAVES[text]
    dims, rng = fit_dims(text, shape, SIZES), np.random.default_rng(0)
    leaf = rng.standard_normal(shape)
    tensor = np.empty(dims.tensor_shape)
    dims.write(leaf, tensor)
    np.testing.assert_array_equal(tensor, take(leaf))
    whole, _ = read(dims, tensor, tuple(slice(0, n) for n in shape))
    inside = np.isfinite(whole)
    assert inside.sum() == tensor.size
    np.testing.assert_array_equal(whole[inside], leaf[inside])
    for index in (random_index(rng, shape) for _ in range(30)):
        out, sizes = read(dims, tensor, index)
        np.testing.assert_array_equal(out, whole[index])
        assert inside[index].any() == bool(sizes)  # nothing is read of a tensor that has no part in it


def test_a_scale_that_is_used_as_one_plus_w_is_stored_as_w():
    """Why no rule adds: the way back of the sum would lose bits, in any precision."""
    import ml_dtypes

    rng = np.random.default_rng(0)
    for dtype in (np.float32, ml_dtypes.bfloat16):
        w = (rng.standard_normal(100) * 0.1).astype(dtype)
        one = np.ones((), dtype)
        assert ((one + w) - one).tobytes() != w.tobytes()
        dims, out = fit_dims("D -> D", w.shape, {}), np.empty_like(w)
        dims.write(w, out)
        assert out.tobytes() == w.tobytes()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("V D", "does not have the same letters once on both sides of one arrow"),
        ("V D -> D", "the same letters"),
        ("D D -> D D", "the same letters"),
        ("F + F D -> D F", "the same letters"),
        ("(N + N) D -> D N", "the same letters"),  # no part is marked
        ("(N H) D -> D (H ([N] + N))", "only the outer factor can be a sum"),
    ],
)
def test_a_text_that_says_nothing_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        parse_dims(text)


@pytest.mark.parametrize(
    ("text", "shape", "message"),
    [
        ("V D -> V D", (3,), r"gives the leaf 2 dims, and it has shape \[3\]"),
        ("(K ([G] + 1 + 1) H) D -> D (K G) H", (5, 7, 4), r"gives the leaf shape \[5, 6, 4\], and it has \[5, 7, 4\]"),
        ("(([N] + X) H) D -> D N H", (5, 6, 4), "nothing gives the size of 'X'"),
    ],
)
def test_a_leaf_of_another_shape_is_refused(text, shape, message):
    with pytest.raises(ValueError, match=message):
        fit_dims(text, shape, SIZES)
