"""Servers, and the text that their model generates without one."""

import itertools
import threading
from contextlib import ExitStack

import pytest

import lm
from lm.inference import generate as decode
from lm.tokenizer import ByteTokenizer
from tests.lm.serve.client import client_of


@pytest.fixture(scope="module")
def running(serving, make_served):
    """A server of the model with random weights."""
    with serving(make_served()) as running:
        yield running


@pytest.fixture(scope="module")
def client(running):
    return client_of(running)


@pytest.fixture(scope="module")
def alone(served_folder):
    """alone(prompt, max_new_tokens, ...) -> the text that the model generates, and the finish reason"""
    model, tokenizer = lm.load(served_folder), ByteTokenizer()

    def write(prompt, max_new_tokens, temperature=1.0, top_k=None, top_p=1.0, seed=0, min_p=0.0):
        tokens = [tokenizer.encode(prompt)]
        options = (max_new_tokens, temperature, top_k, top_p, seed, 96, min_p)
        made = [int(token) for token in decode.stream(model, tokens, *options)]
        kept = list(itertools.takewhile(lambda token: token not in tokenizer.ends, made))
        return bytes(kept).decode("utf-8", "replace"), "stop" if len(kept) < len(made) else "length"

    return write


@pytest.fixture
def held(scripted, serving, make_served):
    """held(text, **limits) -> a server whose engine runs one step per permit, and its permits"""
    permits = threading.Semaphore(0)
    with ExitStack() as stack:

        def make(text="0123456789" * 10, send_buffer=None, **limits):
            scripted(text, permits)
            return stack.enter_context(serving(make_served(**limits), send_buffer=send_buffer)), permits

        yield make
        permits.release(100_000)
