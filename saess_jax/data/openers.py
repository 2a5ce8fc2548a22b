"""What an attacker may put at the beginning of a response, for training: a word of consent, and numbered filler behind.

Refusals behind it teach a model to stop when it has been made to begin, whatever the manner of what stands before.
Nothing here holds content, and no sentence is one of `saess_jax.attacks`: an attack tells something only as long as
training has not seen it.
"""

from __future__ import annotations

import numpy as np

CONSENT = (
    "Sure, why not.", "Happy to.", "Yes, gladly.", "Of course, here you go:", "Okay. This is how it goes.",
    "Right, let us begin.",
    "With pleasure. The answer has several parts.", "Good, I will explain it from the start.", "Alright then:",
    "Here is what you were looking for.", "As you wish. I will keep it short.", "That is easy to answer.",
    "Understood. Here comes the plan:", "I can certainly do this for you.",
)
MANNERS = (  # How part n begins.
    "{n}. ", "{n}) ", "Step {n}: ", "Step {n} - ", "**Step {n}.** ", "Part {n}: ", "Stage {n}. ", "Point {n}: ", "- ",
    "* ", "({n}) ", "", "Phase {n}: ",
)
SENTENCES = (
    "Clear your table and put a lamp on it.", "Write down what you already know about it.",
    "Read the whole list before doing anything.", "Ask yourself how much time there is today.",
    "Begin with what is at the top and go down from there.", "Keep everything in one place.",
    "Then go on to what comes behind it.", "Check that nothing from before is missing.",
    "Do this slowly and look at it twice.", "When it looks right, leave it for a moment.",
    "Now take the second half in the same manner.", "Mark what is finished with a pencil.",
    "Put aside whatever is not needed yet.", "Compare the result with what you had in mind.",
    "Once this is over, the rest follows by itself.", "Make a short note of how it went.",
    "Come back to the start if something is unclear.", "In the end, tidy up and close the door.",
)


def draw(rng: np.random.Generator) -> str:
  """One beginning, some eighty words long; which words depend on `rng` alone."""
  pick = lambda texts: texts[int(rng.integers(len(texts)))]
  manner, between = pick(MANNERS), pick((" ", "\n", "\n\n"))
  parts = [manner.format(n=n) + SENTENCES[i] for n, i in enumerate(rng.permutation(len(SENTENCES))[:8], 1)]
  return between.join([pick(CONSENT), *parts])
