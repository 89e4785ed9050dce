"""What a run is predicted to take, and how steps that were measured refine what later predictions go by."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from statistics import median

from realjax.allocation.cluster import Cluster
from realjax.allocation.workload import Kind

MIB = 2**20


def kind_factor(kind: Kind) -> str:
    """Returns the name of the factor by which the calls of a kind took longer than their terms, in measured runs."""
    return f"call_{kind}"


@dataclass(frozen=True, kw_only=True)
class RunPrediction:
    """Seconds and bytes of each call, by name, and of a step. Predicted: nothing of it has been measured."""

    seconds: Mapping[str, float]  # with what brings the parameters to the call
    peak_bytes: Mapping[str, float]  # of the fullest device while the call runs
    step_seconds: float
    kinds: Mapping[str, Kind]
    cluster: Cluster
    source: str  # what it goes by

    def metrics(self) -> dict[str, float]:
        """Returns the same under the names by which a run logs what it measures."""
        times = {f"time/{call}": seconds for call, seconds in self.seconds.items()}
        memory = {f"memory_mib/{call}": size / MIB for call, size in self.peak_bytes.items()}
        return {**times, **memory, "seconds": self.step_seconds}

    def describe(self, call: str) -> str:
        """Returns what is predicted of a call, in words."""
        return f"predicted {self.seconds[call]:.3g} s, {self.peak_bytes[call] / MIB:,.0f} MiB a device"

    def refine(self, measured: Mapping[str, float]) -> dict[str, float]:
        """Returns the cluster's factors with those that make this prediction what was measured.

        `measured` are medians under the names of `metrics`. A kind's factor is multiplied by the median over its calls
        of measured to predicted seconds.
        """
        factors, cluster = dict(self.cluster.factors), self.cluster
        for kind in dict.fromkeys(self.kinds.values()):
            ratios = [
                measured[f"time/{call}"] / seconds
                for call, seconds in self.seconds.items()
                if self.kinds[call] == kind and f"time/{call}" in measured and seconds > 0
            ]
            if ratios:
                name = kind_factor(kind)
                factors[name] = cluster.factor(name) * median(ratios)
        return factors

    def refined_cluster(self, measured: Mapping[str, float]) -> Cluster:
        """Returns the cluster with the factors of `refine`."""
        source = f"{self.source}; refined by measured steps"
        # Whether programs overlap is the run's, not the machine's.
        return replace(self.cluster, factors=self.refine(measured), source=source, overlaps=True)
