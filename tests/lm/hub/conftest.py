"""Fixtures of the tests of lm/hub: copies of the tiny checkpoints, `lm` in this process, and transformers."""

import io
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lm import cli
from tests.lm.hub.folders import REFERENCE, TOKENIZER_FILES, edit


@pytest.fixture
def folder(tmp_path):
    """folder(kind, **changes): a copy of a tiny checkpoint, its config.json changed."""

    def copy(kind="deepseek_v3", **changes):
        made = Path(shutil.copytree(REFERENCE / kind, tmp_path / "model", dirs_exist_ok=True))
        edit(made, **changes)
        return made

    return copy


@pytest.fixture
def with_mtp(folder):
    """V3's folder with a layer of multi-token prediction and a tokenizer -> folder, the added tensors"""
    path = folder() / "model.safetensors"
    extra = {
        f"model.layers.2.{name}": torch.randn(3, 4) for name in ("eh_proj.weight", "shared_head.head.weight")
    }
    extra["model.layers.2.self_attn.q_a_proj.weight"] = torch.randn(5).to(torch.float8_e4m3fn)
    extra["model.layers.2.self_attn.q_a_proj.weight_scale_inv"] = torch.randn(1)
    save_file({**load_file(path), **extra}, path)
    for name in TOKENIZER_FILES:
        (path.parent / name).write_text(f'{{"this is": "{name}"}}')
    (path.parent / "modeling_evil.py").write_text("raise SystemExit")
    return path.parent, extra


@pytest.fixture
def invoke(monkeypatch):
    """invoke("info", folder, said="standard input"): `lm` in this process -> status, stdout, stderr"""

    def call(*arguments, said=""):
        out, err = io.TextIOWrapper(io.BytesIO(), "utf-8"), io.StringIO()
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(said.encode()), "utf-8"))
        monkeypatch.setattr(sys, "stdout", out)
        monkeypatch.setattr(sys, "stderr", err)
        status = cli.main([str(argument) for argument in arguments])
        out.flush()
        return status, out.buffer.getvalue().decode("utf-8", "replace"), err.getvalue()

    return call


@pytest.fixture(scope="module")
def transformers():
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers
