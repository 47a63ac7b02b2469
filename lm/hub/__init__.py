"""Published models: the configs, weights, tokenizers and chat templates of Hugging Face folders.

folder opens a model folder of any kind. hf reads and writes Hugging Face's: families has the names, translate
applies them, shards reads and writes the files. tokenizer and template turn text into tokens.
"""
