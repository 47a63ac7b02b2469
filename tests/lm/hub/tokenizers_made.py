"""Small tokenizers of each kind, built with the `tokenizers` library."""

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

TEXT = ["Go home, to be or not to be: that isn't the question. é 日本 🙂\n" * 20]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
SPECIAL = ["<s>", "</s>", "<unk>"]


def byte_level():
    """As in DeepSeek, Llama 3 and Qwen."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    options = {"initial_alphabet": alphabet, "show_progress": False}
    made.train_from_iterator(TEXT, trainers.BpeTrainer(vocab_size=300, special_tokens=SPECIAL, **options))
    return made


def fallback_bpe():
    """SentencePiece's BPE with byte fallback, as in Llama 2 and Mixtral."""
    words = ["▁", "▁to", "▁be", "▁home", "Go", "▁Go", "."]
    letters = sorted(set("".join(words)) - {"▁", "."})
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *BYTES, *letters, *words, "ho", "me", "▁ho"])}
    pairs = ["t o", "▁ to", "b e", "▁ be", "h o", "m e", "▁ ho", "▁ho me", "G o", "▁ Go"]
    vocabulary |= {token: len(vocabulary) + i for i, token in enumerate(["to", "be"])}
    merges = [tuple(pair.split()) for pair in pairs]
    made = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    made.add_special_tokens(SPECIAL)
    return made


def fallback_unigram():
    """SentencePiece's Unigram with byte fallback, as in T5 and Gemma."""
    words = ["▁", "▁to", "▁be", "Go", "▁home", "o", "e", "s", "a", "."]
    pieces = [(token, -1.0) for token in SPECIAL] + [(token, -2.0) for token in BYTES + words]
    made = Tokenizer(models.Unigram(pieces, unk_id=2, byte_fallback=True))
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    made.add_special_tokens(SPECIAL)
    return made


def word_piece():
    """As in BERT."""
    made = Tokenizer(models.WordPiece(unk_token="<unk>"))
    made.normalizer = normalizers.BertNormalizer()
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece()
    made.train_from_iterator(
        TEXT, trainers.WordPieceTrainer(vocab_size=80, special_tokens=SPECIAL, show_progress=False)
    )
    return made


def word_level():
    """Whole words; without a decoder, they are joined by spaces."""
    words = ["to", "be", "or", "not", ".", "é", "�", "home"]
    made = Tokenizer(models.WordLevel({token: i for i, token in enumerate(SPECIAL + words)}, "<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.add_special_tokens(SPECIAL)
    return made


KINDS = {
    "byte-level BPE": byte_level,
    "BPE with byte fallback": fallback_bpe,
    "Unigram with byte fallback": fallback_unigram,
    "WordPiece": word_piece,
    "WordLevel": word_level,
}
