"""How old the parameters are that drew a step's answers, where generation runs ahead of training."""

import numpy as np

from realjax.algorithms.responses import Responses
from realjax.core.host_call import Arrays, HostResult, State
from realjax.core.metrics import Most, measure_mean

AGE_INPUTS = ("loss_mask", "has_eos", "token_age")


def measure_ages(arrays: Arrays, state: State) -> HostResult:
    """Returns the ages of responses' tokens in steps of training: mean and largest, and the share of responses whose
    tokens are of several ages: that were interrupted.
    """
    responses = Responses.of(arrays)
    ages = responses.select(arrays["token_age"]).astype(np.float64)
    lens = np.maximum(responses.lens, 1)
    # Of ages that are all the same, each is the mean.
    is_mixed = responses.sum(np.square(ages - responses.spread(responses.sum(ages) / lens))) > 1e-6
    metrics = {
        "token_age": measure_mean(ages, responses.mask),
        "max_token_age": Most(float(ages[responses.mask].max(initial=0))),
        "interrupted_share": measure_mean(is_mixed, responses.exists),
    }
    return HostResult(arrays={}, metrics=metrics)
