"""What a call costs: seconds by term, from its work, a choice of layout and a cluster. Predicted, never measured."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from realjax.allocation.choice import Choice
from realjax.allocation.cluster import Cluster
from realjax.allocation.run_prediction import kind_factor
from realjax.allocation.terms.decode_cost import generate_terms
from realjax.allocation.terms.move_cost import fetch_terms, move_terms
from realjax.allocation.terms.pass_cost import inference_terms, train_terms
from realjax.allocation.workload import CallWork, RoleWork


@dataclass(frozen=True)
class Cost:
    """Seconds by term. Terms follow one another: what hides behind something else is left out."""

    terms: Mapping[str, float]

    @cached_property
    def seconds(self) -> float:
        """The sum of all terms."""
        return sum(self.terms.values())


def call_cost(work: CallWork, choice: Choice, cluster: Cluster) -> Cost:
    """Returns what a call takes in a step, all its updates together. Raises ValueError for a dtype without a rate.

    Measured runs refine the cluster by a factor for each kind of call.
    """
    factor = cluster.factor(kind_factor(work.kind)) * work.draws
    return Cost({name: factor * seconds for name, seconds in TERMS[work.kind](work, choice, cluster).items()})


TERMS = {"train": train_terms, "inference": inference_terms, "generate": generate_terms}


def move_cost(role: RoleWork, source: Choice, destination: Choice, cluster: Cluster) -> Cost:
    """Returns what it takes to give a call a copy of a role's parameters that lie in another choice's layout."""
    return Cost(move_terms(role, source, destination, cluster))


def fetch_cost(role: RoleWork, destination: Choice, cluster: Cluster) -> Cost:
    """Returns what it takes to fetch a role's parameters from host memory to the devices of a call."""
    return Cost(fetch_terms(role, destination, cluster))
