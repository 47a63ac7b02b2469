"""Other people's model folders: Hugging Face's configs, weights, tokenizers and chat templates.

folder opens any folder; hf reads and writes one of theirs, translate and families say what is called how
there, shards holds the tensors, tokenizer and template the text.
"""
