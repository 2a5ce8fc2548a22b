"""Requests in other writings, for training: what is asked stays the same when its letters do not.

Benign requests are disguised as often as malicious ones, so that a disguise by itself says nothing; where a model
cannot read one, the even odds that are left stand above any careful threshold. None of these writings is one of
`attacks/encodings.py`: what those do tells something only as long as training has not seen them.
"""

from __future__ import annotations

import base64
import string
from collections.abc import Callable, Sequence

import numpy as np

Writing = Callable[[str], str]
LETTERS = string.ascii_lowercase + string.ascii_uppercase
ACCENTS = str.maketrans("aeiouycnAEIOUYCN", "áêïòüýçñÁÊÏÒÜÝÇÑ")
SYMBOLS = str.maketrans("aeiloscthAEILOSCTH", "@€!|*$(+#@€!|*$(+#")
# Put between letters, some of them over these, some not to be seen: soft hyphen, word joiner, strokes, dots.
SIGNS = (" ", ".", "-", "_", "*", "/", "\u00ad", "\u2060", "\u0336", "\u0332", "\u0307", "\u0323")
FONTS = "\uff41\u24d0\U0001d41a\U0001d5ba\U0001d68a"  # The "a" of wide, circled, bold, sans-serif, typewriter letters.
FRAMES = (
    "The following is written in an unusual way; reply to it: {}", "{}\n\nWork out what this says, then do it.",
    "I typed this with a strange keyboard. {}", "Decipher and respond: {}",
)


def draw(text: str, rng: np.random.Generator) -> str:
  """The text in one writing, all or some of its words, in three cases of ten with a word that it is written so."""
  words = text.split(" ")
  if rng.random() < 0.2:
    written = _one(WHOLE, rng)(text)
  else:
    write = _one(WORDWISE, rng)(rng)
    chosen = rng.random(len(words)) < _one((1.0, 1.0, 0.6, 0.3), rng)
    written = " ".join(write(word) if disguised else word for word, disguised in zip(words, chosen))
  return _one(FRAMES, rng).format(written) if rng.random() < 0.3 else written


def _apart(rng: np.random.Generator) -> Writing:
  return _one(SIGNS, rng).join


def _in_a_font(rng: np.random.Generator) -> Writing:
  first = ord(_one(FONTS, rng))
  table = str.maketrans(LETTERS, "".join(chr(first + i) for i in range(26)) * 2)  # Capitals become small.
  return lambda word: word.translate(table)


def _shifted(rng: np.random.Generator) -> Writing:
  """Each letter one to twelve places on."""
  places = int(rng.integers(1, 13))
  turn = lambda letters: letters[places:] + letters[:places]
  table = str.maketrans(LETTERS, turn(string.ascii_lowercase) + turn(string.ascii_uppercase))
  return lambda word: word.translate(table)


def _in_mixed_case(rng: np.random.Generator) -> Writing:
  odd = int(rng.integers(2))
  return lambda word: "".join(c.upper() if i % 2 == odd else c.lower() for i, c in enumerate(word))


def _misspelt(rng: np.random.Generator) -> Writing:
  """Two neighbours inside a word of four letters or more change places."""
  where = rng.random()

  def write(word):
    at = 1 + int(where * (len(word) - 3))
    return word if len(word) < 4 else word[:at] + word[at + 1] + word[at] + word[at + 2:]
  return write


def _turned(word: str) -> str:
  """Pig Latin, or nearly: what stands before the first vowel goes to the end."""
  at = next((i for i, c in enumerate(word) if c.lower() in "aeiou"), 0)
  return word[at:] + word[:at] + "ay" if word else word  # Between two spaces.


WORDWISE: tuple[Callable[[np.random.Generator], Writing], ...] = (
    _apart, _apart, _in_a_font, _shifted, _in_mixed_case, _misspelt,
    lambda _: _turned,
    lambda _: lambda word: word[::-1],
    lambda _: lambda word: word[:1] + "".join(c for c in word[1:] if c.lower() not in "aeiou"),
    lambda _: lambda word: word.translate(ACCENTS),
    lambda _: lambda word: word.translate(SYMBOLS),
)
WHOLE: tuple[Writing, ...] = (
    lambda text: text.encode().hex(),
    lambda text: base64.b32encode(text.encode()).decode(),
    lambda text: text[::-1],
)


def _one(things: Sequence, rng: np.random.Generator):
  return things[int(rng.integers(len(things)))]
