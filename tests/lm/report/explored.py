"""Reading explore.html in the tests."""

import base64
import json
from html.parser import HTMLParser

import numpy as np
import torch


class Source(HTMLParser):
    """A page's source: its tags, the text in each, and the data that its script reads."""

    def __init__(self, path):
        super().__init__()
        self.text = path.read_text(encoding="utf-8")
        self.tags, self.inside, self.open = [], {}, None
        self.feed(self.text)
        self.data = json.loads(self.inside["data"])

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.open = dict(attributes).get("id", tag)

    def handle_data(self, text):
        self.inside[self.open] = self.inside.get(self.open, "") + text


def numbers(text, *shape):
    """base64 -> float32"""
    return torch.from_numpy(np.frombuffer(base64.b64decode(text), "<f4").copy()).reshape(shape)


def ids(labels):
    """The token ids of printable text displayed by measure.show."""
    return torch.tensor([[{"↵": 10, "␣": 32}.get(label) or ord(label) for label in labels]])
