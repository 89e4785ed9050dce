"""Messages of a few bytes, which on CPUs take as long as large ones.

Between processes with a core each a collective wakes threads on all sides, which takes milliseconds however few its
bytes. By itself, a kind that sends once finds them awake; in a program, where they slept while others computed, all
kinds take as long as the slowest: of `measured.collectives` with few bytes. Accelerators take microseconds, which are
left out. The counts are of operations in programs compiled for two CPU devices (`XLA_FLAGS=--xla_dump_to=FOLDER`),
where the arrays that one operation sums together add little, and operations that do not wait for each other count once.
"""

from typing import get_args

from realjax.allocation.cluster import Cluster
from realjax.allocation.measured import Collective
from realjax.allocation.terms.collectives import Group, collective_seconds
from realjax.allocation.workload import ModelShape

FEW_BYTES = 4
NORM_SUMS = 1  # an update's, of arrays of which devices have parts
HEAD_SUMS = 2  # over parts of the vocabulary: the maximum, and the normaliser with the target's logit
LOOP_SUMS = 1  # in each round of decoding: how many rows run, and whether all have room
DRAWN = 3  # of a tick's rows over parts of the vocabulary: tokens, log-probabilities, and what they were drawn from
READS = 1  # of what the host looks at after prompts were admitted, and after a chunk of rounds


def small_seconds(num: float, group: Group, cluster: Cluster) -> float:
    """Returns seconds of `num` collectives of a few bytes over a group, one after another; none but on CPUs."""
    if not num or cluster.platform != "cpu":
        return 0.0
    return num * max(collective_seconds(kind, FEW_BYTES, group, cluster) for kind in get_args(Collective))


def woken_seconds(kind: Collective, num_bytes: float, group: Group, cluster: Cluster) -> float:
    """Returns seconds of a collective in a loop of small ones: no less than any takes of a few bytes."""
    return max(collective_seconds(kind, num_bytes, group, cluster), small_seconds(1, group, cluster))


def count_kernels(model: ModelShape) -> int:
    """Returns the matrices of a decoder whose layers are stacked: attention's, the feed-forward's, table and head."""
    has_head = not (model.is_tied or model.is_critic)
    return count_layer_kernels(model) + 1 + has_head


def count_layer_kernels(model: ModelShape) -> int:
    """Returns the matrices of a layer: attention's and the feed-forward's."""
    return 4 + (3 if model.is_gated else 2)
