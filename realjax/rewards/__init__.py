"""Where the reward of an answer comes from: a reward model, a classifier, a function of texts, or a sum of them."""
