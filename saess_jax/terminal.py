"""A model in the terminal: text coloured by P(malicious), with the verdicts where they fell."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from typing import Any, TextIO

RESET = "\x1b[0m"


def has_colours(stream: TextIO) -> bool:
  """A terminal whose user did not ask for none (https://no-color.org)."""
  return stream.isatty() and not os.environ.get("NO_COLOR")


def colour(text: str, probability: float) -> str:
  """`text` from green (0) to red (1); grey where [CLS] was not asked (NaN)."""
  if not text:
    return ""
  if math.isnan(probability):
    return f"\x1b[38;2;140;140;140m{text}{RESET}"
  red, green = round(60 + 170 * probability), round(60 + 130 * (1 - probability))
  return f"\x1b[38;2;{red};{green};80m{text}{RESET}"


def printable(text: str) -> str:
  """`text` with a mark for each control character: nothing that a model writes steers a terminal or a page."""
  return "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text)


def show(chunks: Iterable[Any], stream: TextIO, colours: bool) -> str:
  """Writes a response while it is decoded.

  Args:
    chunks: of `generate.Generator.stream`.

  Returns:
    The whole response.
  """
  said, begun, intervened = "", False, False
  for chunk in chunks:
    if not begun and not math.isnan(chunk.initial_prob):
      stream.write(f"[query: P(malicious) {chunk.initial_prob:.2f}]\n")
    begun = True
    pieces = [printable(token) for token in chunk.tokens]
    if colours:
      pieces = list(map(colour, pieces, chunk.cls_prob))
    if chunk.intervened_at >= 0 and not intervened:
      mark, at = "[intervention by the query]\n", 0
      if chunk.intervened_at > 0:  # The token that convicts has a verdict, where rollback leaves it; the refusal none.
        mark = f" [intervention after token {chunk.intervened_at}] "
        refusal = [phase == "confirmed" and math.isnan(prob) for phase, prob in zip(chunk.phase, chunk.cls_prob)]
        at = refusal.index(True) if any(refusal) else len(pieces)
      pieces.insert(at, mark)
      intervened = True
    stream.write("".join(pieces))
    stream.flush()
    said += chunk.text
  stream.write("\n")
  return said


def converse(generator: Any, requests: Iterable[str], stream: TextIO, colours: bool) -> None:
  """A chat: every request is answered with the turns before it in sight.

  Args:
    generator: a `generate.Generator`.
    requests: lines of the user; an empty one is passed over, "/new" forgets the turns so far, "/quit" ends.
  """
  messages: list[dict[str, str]] = []
  for line in requests:
    request = line.strip()
    if request == "/quit":
      return
    if request == "/new":
      messages = []
    if not request or request == "/new":
      continue
    messages.append({"role": "user", "content": request})
    try:
      said = show(generator.stream(messages), stream, colours)
    except ValueError as error:  # Too long a chat: say so and let the user start another.
      stream.write(f"{error} Begin anew with /new.\n")
      messages.pop()
      continue
    messages.append({"role": "assistant", "content": said if said.strip() else "..."})
