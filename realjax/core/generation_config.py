"""How tokens are drawn: the options of generation and their checks."""

from dataclasses import dataclass, field


def _option(default, help: str):  # noqa: A002 - the field's own word
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True, kw_only=True)
class GenerationConfig:
    """Sampling options, with ReaL's names and meanings. Raises ValueError for values outside their range."""

    max_new_tokens: int = _option(256, "tokens generated at most, the end-of-text token counted")
    min_new_tokens: int = _option(0, "end-of-text cannot be drawn before so many tokens")
    greedy: bool = _option(False, "take the likeliest token; temperature, top_k and top_p are not applied")
    top_p: float = _option(0.9, "draw from the likeliest tokens whose probabilities just reach top_p; 1 is off")
    top_k: int = _option(200, "draw from the top_k likeliest tokens; the vocabulary's size or more is off")
    temperature: float = _option(1.0, "logits are divided by it; 0 means greedy")
    force_no_logits_mask: bool = _option(
        False,
        "do not record which tokens top_k, top_p and min_new_tokens left; later calls take log-probabilities over all",
    )

    def __post_init__(self) -> None:
        if self.temperature == 0.0:
            object.__setattr__(self, "greedy", True)
            object.__setattr__(self, "temperature", 1.0)
        checks = {
            "max_new_tokens": (self.max_new_tokens >= 1, "at least 1"),
            "min_new_tokens": (0 <= self.min_new_tokens <= self.max_new_tokens, "between 0 and max_new_tokens"),
            "top_p": (0 < self.top_p <= 1, "in (0, 1]"),
            "top_k": (self.top_k >= 1, "at least 1"),
            "temperature": (self.temperature > 0, "0 (greedy) or above"),
        }
        for name, (holds, needed) in checks.items():
            if not holds:
                raise ValueError(f"gen.{name}: found {getattr(self, name)}; it must be {needed}")

    def filters(self, vocab_size: int) -> bool:
        """Returns whether some tokens may be left out of the draw."""
        return not self.greedy and (self.top_p < 1 or self.top_k < vocab_size)
