"""Frames of training: whole requests inside, and none that an attack sends."""

import importlib
import inspect
import pkgutil
import re

import numpy as np
import pytest

from saess_jax import attacks
from saess_jax.data import frames

TEXT = "Bake {two} \"large\" loaves?"


@pytest.mark.parametrize("frame", frames.FRAMES)
def test_a_frame_holds_the_request_as_it_stands(frame):
  assert frame.format(TEXT).count(TEXT) == 1 and len(frame.format("")) > 10


def test_each_is_drawn_and_what_is_drawn_depends_on_the_generator_alone():
  drawn = lambda seed: [frames.draw(TEXT, rng) for rng in [np.random.default_rng(seed)] for _ in range(600)]
  assert set(drawn(0)) == {frame.format(TEXT) for frame in frames.FRAMES} and len(set(drawn(0))) == len(frames.FRAMES)
  assert drawn(0) == drawn(0) != drawn(1)


def test_no_frame_of_training_is_an_attack_s():
  """Nor are five words of one that follow each other anywhere in the attacks' sources."""
  words = lambda text: re.findall(r"[a-z]+", re.sub(r"\"\s*\n\s*\"", "", text).lower())
  runs = lambda text, n=5: {tuple(words(text)[i:i + n]) for i in range(len(words(text)) - n + 1)}
  modules = [importlib.import_module(f"{attacks.__name__}.{m.name}") for m in pkgutil.iter_modules(attacks.__path__)]
  sent = set().union(*(runs(inspect.getsource(module)) for module in modules))
  assert ("answers", "whatever", "a", "visitor", "asks") in sent
  assert not set().union(*map(runs, frames.FRAMES)) & sent
