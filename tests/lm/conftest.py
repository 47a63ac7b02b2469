"""Fixtures for the tests of lm: a text, a tiny model that trains in a second, and `lm` as a process."""

import importlib.util
import itertools
import os
import random
import shutil
import signal
import socket
import threading
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from lm.config import Config
from tests.helpers import ROOT
from tests.lm.command import Command

MODEL = {
    "dim": 16,
    "num_layers": 3,
    "num_dense_layers": 1,
    "hidden_dim": 24,
    "attention": {
        "num_heads": 2,
        "q_lora_rank": 8,
        "kv_lora_rank": 8,
        "qk_nope_head_dim": 6,
        "qk_rope_head_dim": 4,
        "v_head_dim": 6,
        "num_kv_heads": 1,
        "head_dim": 8,
    },
    "moe": {"num_experts": 8, "top_k": 2, "hidden_dim": 8, "num_groups": 4, "top_groups": 2},
}
TRAIN = {
    "steps": 12,
    "batch_size": 4,
    "context": 16,
    "learning_rate": 0.01,
    "warmup": 3,
    "log_every": 1,
    "eval_every": 6,
    "eval_tokens": 64,
    "sample_every": 1000,
    "save_every": 5,
    "bias_update_rate": 0.01,
    "dtype": "float32",
    "device": "cpu",
}


@pytest.fixture(scope="session")
def text_file(tmp_path_factory):
    """8 kB of repeating words, the same in every session."""
    draw = random.Random(0)
    words = ["".join(draw.choice("abcdefgh") for _ in range(draw.randint(2, 7))) for _ in range(60)]
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(draw.choice(words) + draw.choice("     \n") for _ in range(1500)))
    return path


@pytest.fixture(scope="session")
def tiny(text_file):
    """tiny(moe={"top_k": 1}, train={"steps": 3}): the Config of a tiny model, with changes by section."""

    def make(model=None, attention=None, moe=None, rope=None, train=None, data=None):
        sections = {
            **MODEL,
            **(model or {}),
            "attention": {**MODEL["attention"], **(attention or {})},
            "moe": {**MODEL["moe"], **(moe or {})},
            "rope": rope or {},
        }
        return Config.from_dict(
            {
                "model": sections,
                "train": {**TRAIN, **(train or {})},
                "data": {"path": str(text_file), **(data or {})},
            }
        )

    return make


@pytest.fixture(scope="session")
def make_model():
    """make_model(config): a Transformer with random weights, by default in float64."""
    from lm.model import Transformer
    from moe.router import described

    def make(config, dtype=torch.float64, seed=0, std=0.3):
        model = Transformer(config)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    parameter.normal_(0.0, std, generator=generator)
                elif parameter.ndim == 1:
                    parameter.uniform_(0.5, 1.5, generator=generator)
            for router in model.routers():
                if described(router).bias is not None:
                    router.bias.normal_(0.0, 0.1, generator=generator)
        return model.to(dtype)

    return make


@pytest.fixture(scope="session")
def peers():
    """benchmarks/peers.py, imported from its path."""
    spec = importlib.util.spec_from_file_location("peers", ROOT / "benchmarks" / "peers.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def trained_once(tiny, tmp_path_factory):
    """A finished run with its report, to be read and not changed."""
    from lm import train
    from lm.report import run as report

    run = tmp_path_factory.mktemp("trained") / "run"
    assert train.train(tiny(), run) == 0
    report.write(run)
    return run


@pytest.fixture
def trained(trained_once, tmp_path):
    """A copy of the finished run, which a test may change."""
    return Path(shutil.copytree(trained_once, tmp_path / "run"))


@pytest.fixture
def run(tmp_path, tiny):
    """A run folder with a config and no checkpoint yet."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.toml").write_text(tiny().to_toml())
    return tmp_path / "run"


@pytest.fixture
def short_samples(monkeypatch):
    """Samples of ten tokens: two hundred take longer than training does."""
    from lm import train
    from lm.inference.generate import stream

    monkeypatch.setattr(train, "stream", lambda *a, **k: itertools.islice(stream(*a, **k), 10))


@pytest.fixture(scope="session")
def options(tiny):
    """A Config as options of `lm train`, starting from the preset nano."""

    def flat(table, path=""):
        for key, value in table.items():
            name = f"{path}{key}"
            if isinstance(value, dict):
                yield from flat(value, f"{name}.") if key != "arguments" else ()
            elif isinstance(value, bool):
                yield (
                    f"--{name}"
                    if value
                    else "--" + ".".join([*name.split(".")[:-1], f"no-{name.split('.')[-1]}"])
                )
            else:
                yield from (f"--{name}", str(value))

    def make(config):
        return ["--preset", "nano", *flat(asdict(config))]

    return make


@pytest.fixture(scope="session")
def command(tmp_path_factory):
    made = Command(tmp_path_factory.mktemp("command"))
    yield made
    if made.pid is not None:
        os.kill(made.pid, signal.SIGKILL)
    made.nursery.stdin.close()
    made.nursery.wait(timeout=60)


@dataclass
class Running:
    """A server running in a thread of this process."""

    served: object
    server: object
    port: int

    @property
    def url(self):
        return f"http://127.0.0.1:{self.port}"


@pytest.fixture(scope="session")
def serving():
    """with serving(served, host=...) as running: a server on a free port, stopped at the end."""
    from lm.serve import app as serve

    @contextmanager
    def run(served, host="127.0.0.1", send_buffer=None):
        server, listener = serve.Server(served, host), serve.listen("127.0.0.1", 0)
        if send_buffer is not None:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        port = listener.getsockname()[1]
        thread.start()
        try:
            yield Running(served, server, port)
        finally:
            server.should_exit = True
            thread.join(timeout=60)
            assert not thread.is_alive()

    return run


@pytest.fixture(scope="session")
def served_folder(tiny, make_model, tmp_path_factory):
    """A folder that lm.save wrote: a model with random weights and a context of 96 bytes."""
    import lm

    folder = tmp_path_factory.mktemp("served") / "drawn"
    lm.save(make_model(tiny(model={"max_length": 96}).model, dtype=torch.float32), folder)
    return folder


@pytest.fixture(scope="session")
def make_served(served_folder):
    """make_served(max_queue=2): what a server serves, with these limits."""
    from lm.hub import folder
    from lm.serve import answers
    from lm.tokenizer import ByteTokenizer

    model, config, _ = folder.open_folder(served_folder, False, "cpu")

    def make(**limits):
        return answers.Served(model, config, ByteTokenizer(), served_folder.name, answers.Limits(**limits))

    return make


class Scripted:
    """An engine that answers every prompt with `text`, one byte per step, and counts its steps.

    permits: a semaphore that each step acquires; room: the most requests at once, if below max_batch;
    stride: bytes per step; later: the answer to a prompt of i tokens starts at byte i - 1.
    """

    text, permits, room, stride, later = b"", None, None, 1, False

    def __init__(self, model, max_batch=64, max_tokens=None, compile=False):
        self.max_batch, self.requests, self.steps = max_batch, [], 0

    @property
    def busy(self):
        return any(request.finished is None for request in self.requests)

    def submit(self, prompt, max_new_tokens, **_):
        request = SimpleNamespace(prompt=prompt, tokens=[], finished=None, limit=max_new_tokens)
        request.cancel = lambda: setattr(request, "finished", "cancelled")
        self.requests.append(request)
        return request

    def step(self):
        if self.permits is not None:
            self.permits.acquire()
        self.steps += 1
        unfinished = [request for request in self.requests if request.finished is None]
        active = unfinished[: self.room or self.max_batch]
        for request in active:
            text = self.text[len(request.prompt) - 1 :] if self.later else self.text
            made = len(request.tokens)
            request.tokens += text[made : min(made + self.stride, request.limit)]
            if len(request.tokens) == len(text):
                request.finished = "stop"
            elif len(request.tokens) == request.limit:
                request.finished = "length"
        return active


@pytest.fixture(scope="session")
def scripted_with():
    """scripted_with(monkeypatch, text, permits): servers created later answer with this text."""
    from lm.serve import answers

    def make(monkeypatch, text, permits=None):
        kind = type("Scripted", (Scripted,), {"text": text.encode(), "permits": permits})
        monkeypatch.setattr(answers, "Engine", kind)

    return make


@pytest.fixture
def scripted(scripted_with, monkeypatch):
    """scripted(text, permits), for one test."""
    return lambda *given: scripted_with(monkeypatch, *given)
