"""gguf.py's tokenizers: of one small vocabulary, ids as transformers' own tokenizer of each family gives them."""

from __future__ import annotations

import functools
import json
import tempfile

import numpy as np
import pytest
import tokenizers
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from test_gguf import SPACE, Vocabulary, write_gguf
from transformers.tokenization_utils_base import generate_merges

from saess_jax import gguf

AWKWARD = [
    "", " ", "Hello, world!", "  two  and   three spaces ", "tabs\tand\n\nlines\r\n\r\nof\n \n all kinds\n",
    "in 1995, 3.14159 and 1,000,000", "a  12\n\n1. 12345678", "x1y22z333", "I'm we'll they've DON'T it's 'TIS isn'TIS",
    "naïve café, Ångström, e\u0301", "日本語のテキスト, 한국어, עברית, العربية", "emoji 👩‍👩‍👧‍👦 🇪🇺 ❤️",
    "def f(x):\n    return {**x, 'a': [i for i in x if i != 0]}  # why?\n", "https://a.b/c?d=e&f=%20#g",
    "\u00a0non-breaking\u200bzero-width\ufeff", "<|im_start|>user\nHi<|im_end|> there", "[CLS] <s> </s> [INST]",
    "$∑_{i≤n}$, x², 1½ ٣٤", "zebra zebras", "\x00\x7f",
]
CUTS = {  # Of the family's own tokenizer.json.
    "smollm": {"type": "Sequence", "pretokenizers": [
        {"type": "Digits", "individual_digits": True},
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}]},
    "llama-bpe": {"type": "Sequence", "pretokenizers": [
        {"type": "Split", "behavior": "Isolated", "invert": False, "pattern": {"Regex": (
            "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}{1,3}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*"
            "|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+")}},
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}]},
}
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


@functools.cache
def byte_level_vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
  """Trained without any cut, so that merges cross all borders that a family draws, and ids tell where it draws them."""
  backend = tokenizers.Tokenizer(tokenizers.models.BPE())
  backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
  backend.train_from_iterator(AWKWARD * 3, tokenizers.trainers.BpeTrainer(
      vocab_size=900, special_tokens=SPECIAL, show_progress=False,
      initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet()))
  model = json.loads(backend.to_str())["model"]
  vocab = model["vocab"]
  vocab[SPACE + "zebras"] = len(vocab)  # No merge ends in it.
  return vocab, [tuple(merge) for merge in model["merges"]]


@functools.cache
def of_family(cut: str) -> tuple:
  """(the GGUF's tokenizer, transformers' own) of one vocabulary."""
  vocab, merges = byte_level_vocabulary()
  tokens = sorted(vocab, key=vocab.get)
  with tempfile.TemporaryDirectory() as folder:
    ours = gguf.read_tokenizer(write_gguf(
        f"{folder}/tiny.gguf", cut=cut, vocabulary=Vocabulary(
            tokens, [3] * 3 + [1] * (len(tokens) - 3), [" ".join(merge) for merge in merges]),
        tokenizer__ggml__add_bos_token=False))
  added = [tokenizers.AddedToken(token, special=True, normalized=False) for token in SPECIAL]
  if cut == "qwen2":
    theirs = transformers.Qwen2Tokenizer(vocab=vocab, merges=merges)
  elif cut in CUTS:
    plain = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, merges, ignore_merges=cut == "llama-bpe"))
    plain.decoder = tokenizers.decoders.ByteLevel()
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer.from_str(json.dumps(json.loads(plain.to_str()) | {
            "pre_tokenizer": CUTS[cut]})))
  else:
    theirs = transformers.GPT2Tokenizer(vocab=vocab, merges=merges)
  theirs.add_tokens(added)
  return ours, theirs


FAMILIES = ["smollm", "llama-bpe", "qwen2", "gpt-2", "default", ""]


def assert_same_ids(cut, text):
  ours, theirs = of_family(cut)
  for split in (False, True):
    assert ours(text, split_special_tokens=split).input_ids == theirs(text, split_special_tokens=split).input_ids


@pytest.mark.parametrize("text", AWKWARD)
@pytest.mark.parametrize("cut", FAMILIES)
def test_ids_are_those_of_the_family_s_own_tokenizer(cut, text):
  assert_same_ids(cut, text)
  ours, theirs = of_family(cut)
  ids = ours(text).input_ids
  assert ours.decode(ids) == theirs.decode(ids)


@pytest.mark.parametrize("cut", FAMILIES)
def test_ids_of_any_text(cut):
  @settings(max_examples=100)
  @given(st.text(max_size=30) | st.text("a1  \n\t\r'ls.e\u0301½漢<|>", max_size=30))
  def holds(text):
    assert_same_ids(cut, text)
  holds()


def test_families_cut_differently():
  """Else equality above would prove little."""
  pieces = {cut: [ours.decode([i]) for i in ours(" 12345\n\n x DON'T they've zebras").input_ids]
            for cut in FAMILIES[:4] for ours in [of_family(cut)[0]]}
  assert pieces["smollm"][:6] == [" ", "1", "2", "3", "4", "5"]
  assert pieces["qwen2"][:6] == [" ", "1", "2", "3", "4", "5"] and pieces["qwen2"] != pieces["smollm"]
  assert pieces["llama-bpe"][:4] == [" ", "12", "3", "45"] and pieces["llama-bpe"][-1] == " zebras"
  assert pieces["gpt-2"][-1] != " zebras" and len({tuple(value) for value in pieces.values()}) == 4


def test_a_file_that_names_no_family_says_so(tmp_path, caplog):
  gguf.read_tokenizer(write_gguf(tmp_path / "tiny.gguf", cut=""))
  assert "tiny.gguf does not name its pre-tokenizer" in caplog.text


SPM_TEXT = (
    "The quick brown fox, the lazy dog. Explain how to make bread at home; take flour, water and salt, and mix them. "
    "How do I kill a Python process? 1995 2024 3.14  two  spaces\nlines [INST] [/INST] <s> </s> <<SYS>> aaa aaaa é ")


@functools.cache
def spm_pieces() -> dict[str, float]:
  """Pieces of a small SentencePiece BPE model with their scores: merged ones in order of training, then characters."""
  backend = tokenizers.Tokenizer(tokenizers.models.BPE())
  backend.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme="first")
  backend.train_from_iterator([SPM_TEXT] * 2, tokenizers.trainers.BpeTrainer(
      vocab_size=250, min_frequency=2, show_progress=False))
  model = json.loads(backend.to_str())["model"]
  merged = ["".join(merge) for merge in model["merges"]] + ["▁" * 2, "▁" * 3, "▁" * 4]
  characters = [token for token in model["vocab"] if len(token) == 1]
  return {piece: -float(i) for i, piece in enumerate(dict.fromkeys([*merged, *characters]))}


def spm_tokens() -> tuple[list[str], list[int], list[float]]:
  pieces = spm_pieces()
  tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *pieces]
  return tokens, [2, 3, 3] + [6] * 256 + [1] * len(pieces), [0.0] * 259 + list(pieces.values())


def spm_ids(text: str) -> list[int]:
  """SentencePiece's own procedure: join the neighbours whose piece has the best score; bytes for what is unknown."""
  tokens, _, _ = spm_tokens()
  pieces, symbols = spm_pieces(), list("▁" + text.replace(" ", "▁")) if text else []
  while True:
    found = [(pieces.get(a + b, -np.inf), -i) for i, (a, b) in enumerate(zip(symbols, symbols[1:]))]
    if not found or max(found)[0] == -np.inf:
      break
    at = -max(found)[1]
    symbols[at:at + 2] = [symbols[at] + symbols[at + 1]]
  ids = []
  for symbol in symbols:
    known = symbol in pieces
    ids += [tokens.index(symbol)] if known else [3 + byte for byte in symbol.encode()]
  return ids


@functools.cache
def spm_tokenizers() -> tuple:
  """(the GGUF's tokenizer, transformers' own)."""
  tokens, types, scores = spm_tokens()
  with tempfile.TemporaryDirectory() as folder:
    ours = gguf.read_tokenizer(write_gguf(
        f"{folder}/tiny.gguf", tokenizer="llama", cut="default", vocabulary=Vocabulary(tokens, types, None, scores),
        tokenizer__ggml__bos_token_id=1, tokenizer__ggml__eos_token_id=2, tokenizer__ggml__unknown_token_id=0))
  vocab = {token: i for i, token in enumerate(tokens)}
  theirs = transformers.LlamaTokenizer(
      vocab=vocab, merges=generate_merges(vocab, spm_pieces()), legacy=True, add_bos_token=True)
  return ours, theirs


@pytest.mark.parametrize("text", [*AWKWARD, "  aaaa aaaaa", "mix them</s>", "<0x0A>", "▁"])
def test_sentencepiece_ids_are_those_of_its_own_procedure(text):
  ours, _ = spm_tokenizers()
  assert ours(text, add_special_tokens=False, split_special_tokens=True).input_ids == spm_ids(text)


@pytest.mark.parametrize("text", ["the<s> lazy</s>dog", "Explain how</s>", "<s>[INST] take [/INST]"])
def test_sentencepiece_marks_the_start_behind_each_special_token(text):
  ours, _ = spm_tokenizers()
  expected = []
  for part in text.replace("<s>", "|<s>|").replace("</s>", "|</s>|").split("|"):
    expected += {"<s>": [1], "</s>": [2]}.get(part) or spm_ids(part)
  assert ours(text, add_special_tokens=False).input_ids == expected


def test_sentencepiece_ids_are_those_of_transformers():
  ours, theirs = spm_tokenizers()

  # At a text's start, and behind a special token, transformers 5 marks no space that is there already, as SentencePiece
  # and its own converter do.
  def same(text):
    text = "x" + text.replace("</s>", "").replace("<s>", "").replace("<unk>", "")
    assert ours(text).input_ids == theirs(text).input_ids
    assert ours.decode(ours(text).input_ids) == theirs.decode(theirs(text).input_ids)

  settings(max_examples=200)(given(st.text(max_size=30) | st.text(SPM_TEXT, max_size=30))(same))()
  for text in AWKWARD:
    same(text)


def test_sentencepiece_special_tokens():
  ours, _ = spm_tokenizers()
  assert (ours.bos_token_id, ours.eos_token_id, ours.unk_token_id) == (1, 2, 0)
  assert ours("the").input_ids[0] == 1 and ours("x</s>").input_ids[-1] == 2
  assert not {1, 2} & set(ours("<s> </s>", add_special_tokens=False, split_special_tokens=True).input_ids)
  assert ours.decode(ours("the lazy dog\né 漢", add_special_tokens=False).input_ids) == "the lazy dog\né 漢"


def test_a_prefix_that_the_file_switches_off(tmp_path):
  tokens, types, scores = spm_tokens()
  ours = gguf.read_tokenizer(write_gguf(
      tmp_path / "tiny.gguf", tokenizer="llama", vocabulary=Vocabulary(tokens, types, None, scores),
      tokenizer__ggml__add_space_prefix=False, tokenizer__ggml__add_bos_token=False))
  ids = ours("a b").input_ids
  assert ours.convert_ids_to_tokens(ids)[0] == "a" and ours.decode(ids) == "a b"
