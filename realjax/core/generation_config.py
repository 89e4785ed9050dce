"""How tokens are drawn: the options of generation and their checks."""

from dataclasses import dataclass

from realjax.core.option import check_conditions, check_ranges, option


@dataclass(frozen=True, kw_only=True)
class GenerationConfig:
    """Sampling options, with ReaL's names and meanings. Raises ValueError for values outside their range."""

    max_new_tokens: int = option(256, "tokens generated at most, the end-of-text token counted", at_least=1)
    min_new_tokens: int = option(0, "end-of-text cannot be drawn before so many tokens")
    greedy: bool = option(False, "take the likeliest token; temperature, top_k and top_p are not applied")
    top_p: float = option(
        0.9, "draw from the likeliest tokens whose probabilities just reach top_p; 1 is off", above=0, at_most=1
    )
    top_k: int = option(200, "draw from the top_k likeliest tokens; the vocabulary's size or more is off", at_least=1)
    temperature: float = option(1.0, "logits are divided by it; 0 means greedy")
    # A chunk, see `engine.slot_arrays.CHUNK_LEN`, has no room for more.
    prompt_lookup_num_tokens: int | None = option(
        None,
        "tokens proposed at once, as they followed the same ones earlier in the row, and kept where they are what is "
        "drawn; null or 0 is off",
        at_least=0,
        at_most=31,
    )
    max_matching_ngram_size: int = option(
        2, "how many of a row's last tokens are looked up for that, at most", at_least=1, at_most=16
    )
    force_no_logits_mask: bool = option(
        False,
        "do not record which tokens top_k, top_p and min_new_tokens left; later calls take log-probabilities over all",
    )

    def __post_init__(self) -> None:
        if self.temperature == 0.0:
            object.__setattr__(self, "greedy", True)
            object.__setattr__(self, "temperature", 1.0)
        check_ranges(self)
        check_conditions(
            self,
            min_new_tokens=(0 <= self.min_new_tokens <= self.max_new_tokens, "between 0 and max_new_tokens"),
            temperature=(self.temperature > 0, "0 (greedy) or above"),
        )

    def filters(self, vocab_size: int) -> bool:
        """Returns whether some tokens may be left out of the draw."""
        return not self.greedy and (self.top_p < 1 or self.top_k < vocab_size)
