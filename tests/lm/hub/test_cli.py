"""`lm` on Hugging Face folders: import, export, generate, chat, eval, info, serve."""

import json
import warnings
from dataclasses import replace

import httpx
import pytest
import torch

import lm
from lm import machine
from lm.hub import folder
from lm.hub.tokenizer import FileTokenizer
from lm.inference import engine
from lm.serve import answers
from tests.helpers import content

TEMPLATE = "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A folder like published ones: V3's architecture in bf16, with a tokenizer and a chat template."""
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
    bpe.post_processor = around  # the template writes <b> too; it must not come twice
    bpe.save(str(folder / "tokenizer.json"))
    settings = {"bos_token": "<b>", "eos_token": "<e>", "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def test_a_published_folder_generates_and_imports_and_exports(published, invoke, tmp_path):
    options = ("--prompt", "to be é", "--max-new-tokens", "12", "--seed", "1")
    status, text, _ = invoke("generate", published, *options)
    assert status == 0 and text.startswith("to be é") and len(text) > len("to be é\n")
    status, out, _ = invoke("import", published, tmp_path / "ours")
    assert status == 0 and out.startswith(f"{tmp_path / 'ours'}: written")
    assert {path.name for path in (tmp_path / "ours").iterdir()} == {
        *("config.toml", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
    }
    assert invoke("generate", tmp_path / "ours", *options)[1] == text
    assert invoke("export", tmp_path / "ours", tmp_path / "theirs")[0] == 0
    for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "theirs" / name).read_bytes() == (published / name).read_bytes()


def sample(monkeypatch, *tokens):
    """Every model samples these tokens in turn."""
    drawn = iter(tokens)

    def choose(logits):
        return torch.tensor([next(drawn)]), torch.zeros(1)

    monkeypatch.setattr(engine, "sampler", lambda *_: choose)


@pytest.fixture
def submitted(monkeypatch):
    """The arguments of every request to an engine: prompt, max_new_tokens, ..., window, min_p."""
    seen, submit = [], engine.Engine.submit
    monkeypatch.setattr(engine.Engine, "submit", lambda *given: seen.append(given[1:]) or submit(*given))
    return seen


def test_chat_uses_the_chat_template(published, invoke, monkeypatch, submitted):
    tokenizer = FileTokenizer(published, 300)
    answer = tokenizer.encode("well said", special=False)
    sample(monkeypatch, *answer, 1, *answer, 1)
    status, out, _ = invoke("chat", published, said="to be\nor not\n")
    prompts = [tokenizer.tokenizer.decode(prompt, skip_special_tokens=False) for prompt, *_ in submitted]
    first = "<b><user>to be<assistant>"
    assert prompts == [first, f"{first}well said<user>or not<assistant>"]
    assert status == 0 and out.count("well said") == 2


def test_generation_stops_at_an_end_of_text_token(published, invoke, monkeypatch):
    sample(monkeypatch, 70, 71, 1, 72)
    status, text, _ = invoke("generate", published, "--prompt", "x")
    assert status == 0 and text == f"x{FileTokenizer(published, 300).decode([70, 71])}\n"


def test_the_window_is_the_models_maximum_length(published, invoke, tmp_path, submitted):
    options = ("--prompt", "x", "--max-new-tokens", "1")
    assert invoke("generate", published, *options)[0] == 0
    lm.save(lm.Transformer(lm.Config.preset("nano").model), tmp_path / "no-maximum")
    assert invoke("generate", tmp_path / "no-maximum", *options)[0] == 0
    assert [window for *_, window, _ in submitted] == [200, lm.Config().train.context]


@pytest.mark.parametrize("fast", [torch.float32, torch.bfloat16])
def test_a_bf16_model_becomes_fp32_where_the_machine_emulates_bf16(published, monkeypatch, fast):
    monkeypatch.setattr(machine, "pick_dtype", lambda *_: fast)
    model, _, _ = folder.open_folder(published, trust_code=False, device="cpu")
    assert {parameter.dtype for parameter in model.parameters()} == {fast}


def test_eval_reports_loss_per_token_and_per_byte(published, invoke, tmp_path):
    text = "to be or not to be, that is the question " * 60
    (tmp_path / "text").write_text(text)
    status, out, _ = invoke("eval", published, "--data", tmp_path / "text")
    assert status == 0
    words = out.replace(",", "").split()
    per_token, tokens, per_byte, size = float(words[1]), int(words[5]), float(words[8]), len(text)
    assert tokens < size / 2 and per_byte == pytest.approx(per_token * tokens / size, abs=1e-3)
    assert per_token == pytest.approx(5.7, abs=0.5)  # ln 300: untrained


def test_info_of_a_published_folder(published, invoke):
    status, out, _ = invoke("info", published, "--json")
    facts = json.loads(out)
    with torch.device("meta"):
        model = lm.Transformer(lm.from_hf(published).config)
    total = sum(p.numel() for p in model.parameters()) + sum(r.bias.numel() for r in model.routers())
    assert status == 0 and facts["parameters"]["total"] == total


@pytest.mark.parametrize("command", ["generate", "chat", "eval", "info", "import"])
def test_an_unsupported_folder_is_a_one_line_error(published, invoke, tmp_path, command):
    (tmp_path / "bad").mkdir()
    config = json.loads((published / "config.json").read_text())
    (tmp_path / "bad" / "config.json").write_text(json.dumps({**config, "hidden_act": "gelu"}))
    more = [tmp_path / "out"] if command == "import" else []
    status, out, err = invoke(command, tmp_path / "bad", *more)
    assert status == 2 and out == "" and err.count("\n") == 1
    assert err == f"lm {command}: {tmp_path}/bad/config.json: hidden_act 'gelu' is not supported; 'silu' is\n"
    assert not (tmp_path / "out").exists()


def test_import_and_export_keep_existing_files(published, invoke, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("kept")
    assert invoke("import", published, tmp_path / "ours")[0] == 0
    for command, source in (("import", published), ("export", tmp_path / "ours")):
        status, _, err = invoke(command, source, tmp_path / "full")
        assert status == 2 and "is not an empty folder" in err
    assert content(tmp_path / "full") == {"mine": b"kept"}


def test_serve_answers_as_chat_does(published, invoke, serving):
    served = answers.Served(*folder.open_folder(published, False, "cpu"), "published", answers.Limits())
    request = {"messages": [{"role": "user", "content": "to be é"}], "max_tokens": 20, "seed": 1}
    with serving(served) as running:
        url = f"{running.url}/v1/chat/completions"
        answer = httpx.post(url, json=request, timeout=60).json()
        pieces = httpx.post(url, json={**request, "stream": True}, timeout=60).text.split("\n\n")[:-2]
    text = answer["choices"][0]["message"]["content"]
    options = ["--max-new-tokens", "20", "--seed", "1", "--temperature", "1"]
    _, out, _ = invoke("chat", published, *options, said="to be é\n")
    assert text and out.partition("> ")[2] == f"{text}\n> "
    choices = [json.loads(piece.removeprefix("data: "))["choices"][0] for piece in pieces]
    assert "".join(choice["delta"]["content"] for choice in choices) == text
    prompt = served.tokenizer.encode("<b><user>to be é<assistant>", special=False)
    assert prompt[0] == 0 and answer["usage"]["prompt_tokens"] == len(prompt)


def test_every_command_that_reads_text_warns_once_of_a_folder_without_a_tokenizer(
    invoke, tiny, tmp_path, monkeypatch
):
    folder, out = tmp_path / "model", tmp_path / "out"
    lm.to_hf(lm.Transformer(tiny(model={"vocab_size": 300}).model), folder)
    monkeypatch.setattr("lm.serve.app.Server.run", lambda *_, **__: None)
    monkeypatch.setattr("signal.signal", lambda *_: None)
    (tmp_path / "text").write_bytes(b"to be or not " * 20)
    options = {
        "generate": ["--max-new-tokens", "2", "--num-samples", "3"],
        "eval": ["--data", tmp_path / "text"],
    }
    said = f"lm: warning: {folder}: holds no tokenizer.json; text is read as bytes\n"
    for command in ("generate", "chat", "eval", "explore", "serve"):
        port = ["--port", "0"] if command == "serve" else []
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            _, _, errors = invoke(command, folder, *options.get(command, []), *port, said="to\nbe\n")
        assert errors.count(said) == 1, (command, errors)
    (folder / "vocab.json").touch()
    assert f"{folder}: holds no tokenizer.json but vocab.json; save it with" in invoke("generate", folder)[2]
    status, _, errors = invoke("import", folder, out)
    assert (status, errors) == (0, f"lm: warning: {folder}: holds no tokenizer.json, so {out} has none\n")
    assert invoke("generate", out, "--max-new-tokens", "2")[2] == ""
