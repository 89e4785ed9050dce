"""Per-sequence sums of packed pairs: segments 1, 3, 5, ... of a row are better answers, 2, 4, 6, ... the worse."""

from jax import Array

from realjax.core.segments import sum_by_segment


def sum_by_pair(values_RT: Array, segment_ids: Array, num_pairs: int) -> tuple[Array, Array]:
    """Returns the sums `[R, P]` over each pair's better and over its worse sequence, P = num_pairs."""
    sums = sum_by_segment(values_RT, segment_ids, 2 * num_pairs)
    return sums[:, 0::2], sums[:, 1::2]
