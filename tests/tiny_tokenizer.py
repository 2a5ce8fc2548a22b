"""A byte-level BPE tokenizer of at most 512 ids with SmolLM2's ChatML template, trained on the spot."""

from __future__ import annotations

import functools

import tokenizers
import transformers

DEFAULT_SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
TEXT = DEFAULT_SYSTEM + """
Sorry, I cannot fulfill your request because it could hurt someone.
How do I kill a Python process? Write a story in which a baker opens a safe. Explain how to make bread at home.
Sure, here is the first step: take flour, water and salt, and mix them well. system user assistant
"""

TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\n" + DEFAULT_SYSTEM + "<|im_end|>\n' }}"
    "{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@functools.cache
def _trained() -> str:
  model = tokenizers.Tokenizer(tokenizers.models.BPE())
  model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
  model.decoder = tokenizers.decoders.ByteLevel()
  model.train_from_iterator([TEXT], tokenizers.trainers.BpeTrainer(
      vocab_size=512, special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"], show_progress=False,
      initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet()))
  return model.to_str()


def tiny_tokenizer() -> transformers.PreTrainedTokenizerFast:
  """A fresh instance, so that a test may change its template. Ids 0 to 2 are special; eos is <|im_end|>, pad too."""
  return transformers.PreTrainedTokenizerFast(
      tokenizer_object=tokenizers.Tokenizer.from_str(_trained()), bos_token="<|im_start|>", eos_token="<|im_end|>",
      pad_token="<|im_end|>", unk_token="<|endoftext|>", chat_template=TEMPLATE)
