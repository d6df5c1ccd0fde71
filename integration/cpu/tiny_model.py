"""A Qwen2-shaped character model, small enough to train on two CPU cores; untrained here."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2ForSequenceClassification,
    Qwen2ForTokenClassification,
)

PAD = "<pad>"
END = "<|im_end|>"
PRINTABLE = [chr(code) for code in range(32, 127)]


def character_tokenizer() -> PreTrainedTokenizerFast:
    """One token a character, among them ``\\n`` and ``<|im_end|>``, which verl's Qwen prompt builder looks up."""
    vocabulary = {token: index for index, token in enumerate([PAD, END, *PRINTABLE])}
    characters = Tokenizer(models.WordLevel(vocabulary, unk_token=PAD))
    characters.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    characters.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=characters, pad_token=PAD, eos_token=END)
    tokenizer.add_tokens(["\n"])
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    return tokenizer


def character_model(
    tokenizer: PreTrainedTokenizerFast, *, hidden_size: int = 256, layers: int = 4, seed: int = 0
) -> Qwen2ForCausalLM:
    """An untrained model; at Qwen's usual std of 0.02 its log-probs would be too flat to tell dtypes apart."""
    torch.manual_seed(seed)
    config = Qwen2Config(
        # verl compares the two; a padded vocabulary would let the sampler emit tokens that cannot be decoded.
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=True,
    )
    model = Qwen2ForCausalLM(config).to(torch.float32)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.05)
    return model


def make_random_model(out: Path, *, hidden_size: int = 256, layers: int = 4, seed: int = 0) -> Path:
    """Write an untrained model with its tokenizer to ``out``, in seconds, the same for the same seed."""
    tokenizer = character_tokenizer()
    character_model(tokenizer, hidden_size=hidden_size, layers=layers, seed=seed).save_pretrained(out)
    tokenizer.save_pretrained(out)
    return out


def make_random_reward_model(out: Path, policy: Path, *, seed: int = 1) -> Path:
    """Write an untrained model of the policy's shape and tokenizer that scores a sequence with one number."""
    torch.manual_seed(seed)
    config = Qwen2Config.from_pretrained(policy, num_labels=1)
    Qwen2ForSequenceClassification(config).to(torch.float32).save_pretrained(out)
    PreTrainedTokenizerFast.from_pretrained(policy).save_pretrained(out)
    return out


def make_random_value_model(out: Path, policy: Path, *, seed: int = 2) -> Path:
    """Write the policy with an untrained head that gives each token one number."""
    torch.manual_seed(seed)
    Qwen2ForTokenClassification.from_pretrained(policy, num_labels=1, dtype=torch.float32).save_pretrained(out)
    PreTrainedTokenizerFast.from_pretrained(policy).save_pretrained(out)
    return out
