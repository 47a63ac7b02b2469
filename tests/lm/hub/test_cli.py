"""`lm` on Hugging Face folders: import, export, generate, chat, eval, info."""

import io
import json
import sys
from dataclasses import replace

import httpx
import pytest
import torch

import lm
from lm import cli, machine
from lm import terminal as talk
from lm.hub import folder
from lm.inference import engine
from lm.serve import answers

TEMPLATE = "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A folder as they are published: V3's architecture, bf16, a tokenizer and a chat template."""
    tokenizers = pytest.importorskip("tokenizers")
    folder = tmp_path_factory.mktemp("published") / "model"
    model = lm.Transformer(replace(lm.Config.preset("nano").model, vocab_size=300, max_length=200))
    model.initialize(torch.Generator().manual_seed(0))
    lm.to_hf(model.bfloat16(), folder)
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=290, special_tokens=["<b>", "<e>"], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(["to be or not to be, that is the question " * 20], trainer)
    around = tokenizers.processors.TemplateProcessing(single="<b> $A", special_tokens=[("<b>", 0)])
    bpe.post_processor = around  # a template writes <b> itself: then it must not come twice
    bpe.save(str(folder / "tokenizer.json"))
    settings = {"bos_token": "<b>", "eos_token": "<e>", "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder



@pytest.fixture
def run(monkeypatch):
    """`lm` in this process -> its status, standard output, standard error"""

    def call(*arguments, said=""):
        out, err = io.TextIOWrapper(io.BytesIO(), "utf-8"), io.StringIO()
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(said.encode()), "utf-8"))
        monkeypatch.setattr(sys, "stdout", out)
        monkeypatch.setattr(sys, "stderr", err)
        status = cli.main([str(argument) for argument in arguments])
        out.flush()
        return status, out.buffer.getvalue().decode("utf-8", "replace"), err.getvalue()

    return call


def test_a_published_folder_is_written_on_from_as_it_is_and_imported(published, run, tmp_path):
    asked = ("--prompt", "to be é", "--max-new-tokens", "12", "--seed", "1")
    status, text, _ = run("generate", published, *asked)
    assert status == 0 and text.startswith("to be é") and len(text) > len("to be é\n")
    status, told, _ = run("import", published, tmp_path / "ours")
    assert status == 0 and told.startswith(f"{tmp_path / 'ours'}: written")
    assert {path.name for path in (tmp_path / "ours").iterdir()} == {
        *("config.toml", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
    }
    assert run("generate", tmp_path / "ours", *asked)[1] == text
    assert run("export", tmp_path / "ours", tmp_path / "theirs")[0] == 0
    for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "theirs" / name).read_bytes() == (published / name).read_bytes()


def test_chat_speaks_through_the_folders_template(published, run, monkeypatch):
    seen = []
    real = talk.say_on

    def listen(engine, request, tokenizer):
        seen.append(tokenizer.tokenizer.decode(request.prompt, skip_special_tokens=False))
        real(engine, request, tokenizer)
        return tokenizer.encode("well said", special=False)

    monkeypatch.setattr(talk, "say_on", listen)
    status, _, _ = run("chat", published, "--max-new-tokens", "3", "--seed", "0", said="to be\nor not\n")
    assert status == 0
    assert seen == ["<b><user>to be<assistant>", "<b><user>to be<assistant>well said<user>or not<assistant>"]


def test_the_text_ends_where_the_model_says_so(published, run, tmp_path, monkeypatch):
    drawn = iter([70, 71, 1, 72])
    monkeypatch.setattr(engine, "sampler", lambda *_: lambda logits: torch.tensor([next(drawn)]))
    status, text, _ = run("generate", published, "--prompt", "x")
    folder = published / "tokenizer.json"
    expected = lm.tokenizer.FileTokenizer(folder.parent, 300).decode([70, 71])
    assert status == 0 and text == f"x{expected}\n"


def test_a_text_may_be_as_long_as_the_model_was_made_for(published, run, tmp_path, monkeypatch):
    windows = []
    submit = engine.Engine.submit
    monkeypatch.setattr(
        engine.Engine, "submit", lambda *given: windows.append(given[-1]) or submit(*given)
    )
    assert run("generate", published, "--prompt", "x")[0] == 0
    lm.save(lm.Transformer(lm.Config.preset("nano").model), tmp_path / "unsaid")
    assert run("generate", tmp_path / "unsaid", "--prompt", "x")[0] == 0
    assert windows == [200, lm.Config().train.context]


@pytest.mark.parametrize("quick", [torch.float32, torch.bfloat16])
def test_a_half_precision_model_is_widened_where_the_machine_would_emulate_it(published, monkeypatch, quick):
    monkeypatch.setattr(machine, "pick_dtype", lambda *_: quick)
    model, _, _ = folder.open_folder(published, trust_code=False, device="cpu")
    assert {parameter.dtype for parameter in model.parameters()} == {quick}


def test_eval_counts_tokens_and_bytes(published, run, tmp_path):
    text = "to be or not to be, that is the question " * 60
    (tmp_path / "text").write_text(text)
    status, told, _ = run("eval", published, "--data", tmp_path / "text")
    assert status == 0
    words = told.replace(",", "").split()
    of_token, tokens, of_byte, size = float(words[1]), int(words[5]), float(words[8]), len(text)
    assert tokens < size / 2 and of_byte == pytest.approx(of_token * tokens / size, abs=1e-3)
    assert of_token == pytest.approx(5.7, abs=0.5)  # ln 300: it has learnt nothing


def test_info_of_a_published_folder(published, run):
    status, told, _ = run("info", published, "--json")
    facts = json.loads(told)
    with torch.device("meta"):
        model = lm.Transformer(lm.from_hf(published).config)
    total = sum(p.numel() for p in model.parameters()) + sum(r.bias.numel() for r in model.routers())
    assert status == 0 and facts["parameters"]["total"] == total


@pytest.mark.parametrize("command", ["generate", "chat", "eval", "info", "import"])
def test_a_folder_that_is_damaged_is_one_line(published, run, tmp_path, command):
    (tmp_path / "bad").mkdir()
    config = json.loads((published / "config.json").read_text())
    (tmp_path / "bad" / "config.json").write_text(json.dumps({**config, "hidden_act": "gelu"}))
    more = [tmp_path / "out"] if command == "import" else []
    status, out, err = run(command, tmp_path / "bad", *more)
    assert status == 2 and out == "" and err.count("\n") == 1
    assert err == f"lm {command}: {tmp_path}/bad/config.json: hidden_act 'gelu' is not supported; 'silu' is\n"
    assert not (tmp_path / "out").exists()


def test_import_and_export_leave_what_is_there(published, run, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("kept")
    assert run("import", published, tmp_path / "ours")[0] == 0
    for command, source in (("import", published), ("export", tmp_path / "ours")):
        status, _, err = run(command, source, tmp_path / "full")
        assert status == 2 and "is not an empty folder" in err
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["mine"]


def test_a_published_folder_is_served_as_chat_speaks_to_it(published, run, serving):
    served = answers.Served(*folder.open_folder(published, False, "cpu"), "published", answers.Limits())
    asked = {"messages": [{"role": "user", "content": "to be é"}], "max_tokens": 20, "seed": 1}
    with serving(served) as running:
        url = f"{running.url}/v1/chat/completions"
        answer = httpx.post(url, json=asked, timeout=60).json()
        pieces = httpx.post(url, json={**asked, "stream": True}, timeout=60).text.split("\n\n")[:-2]
    text = answer["choices"][0]["message"]["content"]
    options = ["--max-new-tokens", "20", "--seed", "1", "--temperature", "1"]
    said = run("chat", published, *options, said="to be é\n")
    assert text and said[1].partition("> ")[2] == f"{text}\n> "
    choices = [json.loads(piece.removeprefix("data: "))["choices"][0] for piece in pieces]
    assert "".join(choice["delta"]["content"] for choice in choices) == text
    prompt = served.tokenizer.encode("<b><user>to be é<assistant>", special=False)
    assert prompt[0] == 0 and answer["usage"]["prompt_tokens"] == len(prompt)
