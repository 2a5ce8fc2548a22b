"""Writings of a request: what they make of a word, and that none is an attack's."""

import base64

import numpy as np
import pytest

from saess_jax.attacks import encodings
from saess_jax.data import disguises

TEXT = "Please bake a large loaf today"


def drawn(text, count=600, seed=0):
  rng = np.random.default_rng(seed)
  return [disguises.draw(text, rng) for _ in range(count)]


def test_what_the_writings_make_of_a_word():
  made = [{write(np.random.default_rng(seed))("Bakery") for seed in range(200)} for write in disguises.WORDWISE]
  apart, _, font, shifted, mixed, misspelt, *fixed = made
  assert apart == {sign.join("Bakery") for sign in disguises.SIGNS} and "B.a.k.e.r.y" in apart
  assert len(font) == 5 and {"ｂａｋｅｒｙ", "ⓑⓐⓚⓔⓡⓨ", "𝐛𝐚𝐤𝐞𝐫𝐲"} < font
  assert len(shifted) == 12 and {"Cblfsz", "Nmwqdk"} < shifted
  assert mixed == {"bAkErY", "BaKeRy"}
  assert misspelt == {"Bkaery", "Baekry", "Bakrey"}
  assert not any(write(np.random.default_rng(0))("") for write in disguises.WORDWISE)  # Between two spaces.
  assert fixed == [{"akeryBay"}, {"yrekaB"}, {"Bkry"}, {"Bákêrý"}, {"B@k€ry"}]


def test_a_text_is_written_whole_or_in_some_of_its_words():
  texts = drawn(TEXT)
  assert {TEXT[::-1], TEXT.encode().hex(), base64.b32encode(TEXT.encode()).decode()} < set(texts)
  kept = [sum(word in text.split(" ") for word in TEXT.split(" ")) for text in texts]
  assert {0, 1, 2, 3, 4, 5} <= set(kept) and kept.count(6) < 60
  framed = [text for text in texts if any(text.startswith(f.split("{}")[0]) and text.endswith(f.split("{}")[1])
                                          for f in disguises.FRAMES)]
  assert 0.2 < len(framed) / len(texts) < 0.4


def test_what_is_drawn_depends_on_the_generator_alone():
  assert drawn(TEXT, 50) == drawn(TEXT, 50) != drawn(TEXT, 50, seed=1)
  assert all(isinstance(text, str) and text for text in drawn("a") + drawn("  ?  "))


@pytest.mark.parametrize("name", sorted(encodings.WRITINGS))
def test_no_disguise_of_training_is_one_of_the_attacks(name):
  attacked = encodings.WRITINGS[name][0](TEXT)
  assert attacked != TEXT and not [text for text in drawn(TEXT, 2000) if attacked in text]
