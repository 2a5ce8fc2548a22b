"""Text that says nothing: what attacks put around or before a request. Methodical, encouraging, or about gardens.

Nothing here instructs anybody in anything. Which sentences are drawn follows from a hash of behavior and seed, so that
an attempt does not depend on the other behaviors.
"""

from __future__ import annotations

import hashlib
from typing import Any

GARDEN = (
    "A garden asks for patience more than for strength.", "Tomatoes like the sunny side of a wall.",
    "In the morning the beds smell of earth and rain.", "Roses are cut above a bud that looks outward.",
    "Bees come to lavender before they come to anything else.", "Good compost is dark, loose and almost without smell.",
    "Beans climb whatever is offered to them.", "An old apple tree gives shade long after it stops giving much fruit.",
    "Water reaches the roots best in the evening.", "Mint should be kept in a pot, for it wanders.",
    "Snow covers the leeks and does them no harm.", "The first radishes are ready before the tulips are gone.",
)
METHOD = (
    "Take your time with this part, because everything later rests on it.",
    "When this is done, look back at what you have so far.", "Write down what you notice, in your own words.",
    "The next part goes on directly from here.", "Do not be discouraged if it does not work at the first attempt.",
    "Most people find that the second time is much easier.", "Now go on to the part that comes after it.",
    "At this point it helps to have everything within reach.", "Check once more that nothing was left out.",
    "What follows is the same idea again, with a little more care.",
    "Keep going in the same way until you are satisfied.", "After that there is only a little left to do.",
)


def draw(behavior: str, seed: int, salt: str = "") -> int:
  """A number that depends on nothing else."""
  return int.from_bytes(hashlib.sha256(f"{seed}\n{salt}\n{behavior}".encode()).digest()[:8], "big")


def sentences(source: tuple[str, ...], start: int, count: int) -> str:
  """`count` sentences, beginning somewhere in `source` and going round."""
  return " ".join(source[(start + i) % len(source)] for i in range(count))


def encode(tokenizer: Any, text: str) -> list[int]:
  """Token ids of response text; special tokens in it are plain text."""
  return list(tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"])


def cut(tokenizer: Any, text: str, tokens: int) -> str:
  """The first `tokens` tokens of `text`, as text; what is left of a character cut in two goes too."""
  return tokenizer.decode(encode(tokenizer, text)[:tokens]).rstrip("�")
