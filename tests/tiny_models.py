"""Random models of a few thousand weights, and a word tokenizer, for tests of generation."""

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

WORDS = 96
EOS, PAD = 2, 0


def llama(seed, vocabulary=WORDS, context=64):
    """Weights are large, so that no two tokens come near a tie and models differ in their choice."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=context,
        initializer_range=0.3,
        bos_token_id=1,
        eos_token_id=EOS,
        pad_token_id=PAD,
    )
    return LlamaForCausalLM(config).eval()


def gpt2(seed):
    """Positions are learned and absolute, so that a shift of them shows."""
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=WORDS,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=64,
        initializer_range=0.3,
        bos_token_id=1,
        eos_token_id=EOS,
        pad_token_id=PAD,
    )
    return GPT2LMHeadModel(config).eval()


def word_tokenizer(words=WORDS, swap=False, extra=0):
    vocabulary = {"<pad>": PAD, "<s>": 1, "</s>": EOS, "<unk>": 3}
    vocabulary |= {f"w{i}": i for i in range(4, words)}
    if swap:
        vocabulary["w10"], vocabulary["w11"] = 11, 10
    vocabulary |= {f"extra{i}": words + i for i in range(extra)}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )


def save(folder, seed, tokenizer=None, **options):
    model = llama(seed, **options)
    model.save_pretrained(folder)
    (tokenizer or word_tokenizer()).save_pretrained(folder)
    return folder
