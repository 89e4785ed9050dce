"""Several answers to a prompt, counted as attempts to solve it: pass@k and majority@k."""

from collections import Counter
from collections.abc import Hashable, Sequence

import numpy as np

from realjax.algorithms.groups import Groups
from realjax.core.metrics import Mean, Metric


def list_sizes(num_samples: int) -> tuple[int, ...]:
    """Returns the k of pass@k: powers of two, and all of the samples."""
    powers = (2**i for i in range(num_samples.bit_length()))
    return tuple(sorted({*powers, num_samples}))


def estimate_pass(num_samples: int, num_solved: int, k: int) -> float:
    """Returns the unbiased estimate of the chance that one of k answers solves a prompt which `num_solved` of
    `num_samples` did: 1 - C(n - c, k) / C(n, k) (arXiv:2107.03374 eq. 1).
    """
    if num_samples - num_solved < k:
        return 1.0
    return 1 - float(np.prod(1 - k / np.arange(num_samples - num_solved + 1, num_samples + 1)))


def find_majority(votes: Sequence[Hashable], solved: Sequence[bool]) -> float:
    """Returns the chance that the most frequent vote of a prompt's answers solves it, ties drawn by lot.

    None is no vote; without any the prompt is not solved. Where answers of one vote are not all right, or all wrong,
    one of them is drawn too.
    """
    counts = Counter(vote for vote in votes if vote is not None)
    most = max(counts.values(), default=0)
    leaders = [vote for vote, count in counts.items() if count == most]
    share = lambda leader: np.mean([right for vote, right in zip(votes, solved, strict=True) if vote == leader])
    return float(np.mean([share(leader) for leader in leaders])) if leaders else 0.0


def measure_attempts(
    solved_RS: np.ndarray, groups: Groups, num_samples: int, votes: Sequence[Hashable] | None = None
) -> dict[str, Metric]:
    """Returns means over prompts of pass@k and, with `votes` of the Q sequences in their order, of majority@k.

    Every prompt has `num_samples` sequences, or fewer where some failed, and then no part in pass@k of a larger k;
    `solved_RS` `[R, S]` says which of them solve it.
    """
    solved, members = solved_RS[groups.exists], [np.flatnonzero(groups.numbers == i) for i in range(groups.num_groups)]
    mean = lambda values: Mean(float(sum(values)), float(len(values)))
    metrics: dict[str, Metric] = {
        f"pass@{k}": mean([estimate_pass(len(own), int(solved[own].sum()), k) for own in members if len(own) >= k])
        for k in list_sizes(num_samples)
    }
    if votes is not None:
        majorities = [find_majority([votes[int(i)] for i in own], solved[own].tolist()) for own in members]
        metrics[f"majority@{num_samples}"] = mean(majorities)
    return metrics
