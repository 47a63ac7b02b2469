"""explore.html: the scores, biases and settings that the page holds."""

import base64
import hashlib
import itertools
import json
import re
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

import lm
from lm import checkpoint, data, history
from lm.report import explore, measure
from moe import Capacity, SigmoidRouter
from tests.helpers import content, refused
from tests.lm.report.explored import Source, ids, numbers


@pytest.mark.parametrize("kind", ["run", "softmax_run"])
def test_scores_and_biases_equal_the_models_bit_for_bit(kind, request):
    run = request.getfixturevalue(kind)
    held = Source(run / "explore.html").data
    tokens = ids(held["tokens"])
    folders = history.checkpoints(run)
    assert [one["step"] for one in held["checkpoints"]] == [int(path.name[5:]) for path in folders]
    for folder, one in zip(folders, held["checkpoints"]):
        model = checkpoint.load_model(checkpoint.read_config(run, False).model, folder / "model.safetensors")
        routings = model(tokens).routings
        assert len(routings) == len(one["layers"]) == 2
        for router, routing, layer in zip(model.routers(), routings, one["layers"]):
            assert torch.equal(numbers(layer["scores"], *routing.scores.shape), routing.scores)
            if kind == "run":
                assert router.bias.any() and torch.equal(numbers(layer["bias"], 8), router.bias)
            else:
                assert layer["bias"] is None


def test_settings_are_those_of_the_run(run, softmax_run):
    held = Source(run / "explore.html").data
    found = [
        held[name] for name in ("router", "group_best", "num_experts", "top_k", "num_groups", "top_groups")
    ]
    assert found == ["sigmoid", 2, 8, 2, 4, 2]
    assert (held["normalize"], held["routed_scaling_factor"]) == (True, 2.5)
    assert (held["rate"], held["rule"]) == (0.01, "sign")
    held = Source(softmax_run / "explore.html").data
    assert (held["router"], held["group_best"]) == ("softmax", 1)
    assert (held["normalize"], held["routed_scaling_factor"]) == (False, 16)


def test_the_passage_and_colours_match_the_report(run):
    held = Source(run / "explore.html").data
    windows = data.Windows(data.load(checkpoint.read_config(run, False).data, 256)[1], 16)
    [labels, _] = measure.passage_experts(checkpoint.load(run), windows)
    assert [token["text"] for token in labels] == held["tokens"][: len(labels)]
    assert len(labels) == 384 and len(held["tokens"]) == 512
    assert held["hues"] == [measure.hue(expert) for expert in range(8)]


def test_the_passage_of_a_long_text_starts_where_the_reports_does(tiny, make_model):
    text = np.frombuffer((b"x" * 2100 + b"\n\n" + b"Macbeth" * 500), np.uint8)
    windows = data.Windows(text, 16)
    model = make_model(tiny().model, dtype=torch.float32)
    labels = [token["text"] for token in measure.passage_experts(model, windows)[0]]
    tokens = measure.passage(windows, 512)
    assert bytes(tokens.tolist()) == text[2102 : 2102 + 512].tobytes()
    assert [measure.show(token) for token in tokens[:384].tolist()] == labels


def test_a_large_model_fills_the_page_but_never_exceeds_its_size(draw_run):
    run = draw_run([3, 6, 9], model={"num_layers": 6}, moe={"num_experts": 64})
    page = explore.write(run)
    held = Source(page).data
    assert 290_000 < page.stat().st_size <= 300_000
    assert len(held["checkpoints"]) == 1 and held["checkpoints"][0]["step"] == 9  # the newest
    assert 128 < len(held["tokens"]) < 192
    scores = numbers(held["checkpoints"][0]["layers"][4]["scores"], len(held["tokens"]), 64)
    assert torch.equal(scores, checkpoint.load(run)(ids(held["tokens"])).routings[4].scores[0])


def size(layers, experts, count, checkpoints):
    """Bytes that the checkpoints take in the page."""
    scores, bias = ("x" * (4 * -(-numbers * 4 // 3)) for numbers in (count * experts, experts))
    one = {"step": 10**6, "layers": [{"scores": scores, "bias": bias}] * layers}
    return checkpoints * len(json.dumps(one))


@pytest.mark.parametrize("layers, experts", [(1, 4), (2, 8), (3, 16), (5, 32), (26, 64)])
def test_checkpoints_are_thinned_out_evenly_and_fill_the_page(layers, experts):
    room = 270_000
    for tokens, checkpoints in itertools.product([20, 200, 512], [1, 2, 5, 12, 300]):
        count, kept = explore.fit(room, layers, experts, tokens, checkpoints)
        gaps = [b - a for a, b in itertools.pairwise(kept)]
        assert kept[-1] == checkpoints - 1 and (len(kept) == 1 or kept[0] == 0)
        assert not gaps or 1 <= min(gaps) <= max(gaps) <= min(gaps) + 1
        assert 0 < count <= tokens and (len(kept) == 1 or count >= min(tokens, 192))
        assert size(layers, experts, count, len(kept)) <= room
        if count < tokens:
            assert size(layers, experts, count + 1, len(kept)) > 0.95 * room
        if len(kept) < checkpoints:
            assert size(layers, experts, min(tokens, 192), len(kept) + 1) > 0.95 * room


@pytest.mark.parametrize("kind", ["saved", "hub"])
def test_a_folder_without_checkpoints_shows_its_one_model(saved_or_hub, kind):
    folder = saved_or_hub(kind)
    before = set(content(folder))
    held = Source(explore.write(folder)).data
    assert set(content(folder)) == before | {"explore.html"}
    [one] = held["checkpoints"]
    assert one["step"] is None and held["router"] == "sigmoid" and len(held["tokens"]) == 512
    model = lm.load(folder)
    routings = model(ids(held["tokens"])).routings
    assert len(routings) == len(one["layers"]) == 2
    for router, routing, layer in zip(model.routers(), routings, one["layers"]):
        assert torch.equal(numbers(layer["scores"], *routing.scores.shape), routing.scores)
        assert torch.equal(numbers(layer["bias"], 8), router.bias)


def test_tokens_of_a_hub_folder_are_those_of_its_tokenizer(saved_or_hub):
    tokenizers = pytest.importorskip("tokenizers")
    folder = saved_or_hub("hub", vocab_size=300)
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=290, initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator(["the king and the queen of the land\n\n" * 20], trainer)
    bpe.save(str(folder / "tokenizer.json"))
    held = Source(explore.write(folder)).data
    text = "".join(held["tokens"]).replace("␣", " ").replace("↵", "\n")
    tokens = bpe.encode(text).ids
    assert len(tokens) == len(held["tokens"]) == 512 < len(text)
    assert {"␣the", "↵"} < set(held["tokens"])
    held_out = data.load(lm.Config().data, 256)[1].tobytes().decode()
    assert text in held_out
    [layer, _] = held["checkpoints"][0]["layers"]
    [routing, _] = lm.load(folder)(torch.tensor([tokens])).routings
    assert torch.equal(numbers(layer["scores"], *routing.scores.shape), routing.scores)


def test_a_damaged_checkpoint_is_skipped_with_a_warning(run, tmp_path):
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    folders = history.checkpoints(copy)
    damaged = folders[1] / "model.safetensors"
    # the last byte of a float, which only the checksum detects
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"\x01")
    with pytest.warns(UserWarning, match=re.escape(f"{damaged}: is not what was written")) as caught:
        explore.write(copy)
    steps = [one["step"] for one in Source(copy / "explore.html").data["checkpoints"]]
    assert steps == [3, 9, 12] and len(caught) == 1
    for path in folders:
        (path / "state.json").unlink()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        refused(lambda: explore.write(copy), "every checkpoint is damaged")
    shutil.rmtree(copy / "checkpoints")
    refused(lambda: explore.write(copy), "no checkpoint yet")


@pytest.mark.parametrize("at", range(8))
def test_a_checkpoint_pruned_meanwhile_is_left_out(run, tmp_path, monkeypatch, at):
    """As beside a training that saves one checkpoint and removes the oldest at the read number `at`."""
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    last, reads = history.checkpoints(copy)[-1], []
    aside = shutil.copytree(last, tmp_path / "step-000015")
    (aside / "state.json").write_text((last / "state.json").read_text().replace('"step": 12', '"step": 15'))

    def prune(original):
        def read(*arguments):
            reads.append(arguments)
            if len(reads) == at + 1:
                aside.rename(copy / "checkpoints" / aside.name)
                for path in history.checkpoints(copy)[:4]:
                    history.discard(path)
            return original(*arguments)

        return read

    for owner, name in ((history, "check_whole"), (checkpoint, "load_model"), (history, "read_state")):
        monkeypatch.setattr(owner, name, prune(getattr(owner, name)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        steps = [one["step"] for one in Source(explore.write(copy)).data["checkpoints"]]
    assert len(reads) > at and steps == sorted(set(steps))
    assert steps[-1] in (12, 15) and set(steps) <= {3, 6, 9, 12, 15}


def test_a_folder_without_a_model_is_rejected(tmp_path):
    kinds = "expected a run, a saved model or a Hugging Face folder"
    for folder in (tmp_path / "absent", tmp_path):
        refused(lambda folder=folder: explore.write(folder), folder, kinds)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "changes, told",
    [
        (
            {"moe": {"router": "mixtral", "num_groups": 1, "top_groups": 1}},
            "model.moe.router 'mixtral': the page does not support this router, only sigmoid and softmax",
        ),
        ({"model": {"num_dense_layers": 3}}, "model.num_dense_layers 3: no layer has experts"),
        (
            {"moe": {"num_experts": 4096}},
            "2 layers of 4096 experts are too many for the page: 300000 bytes hold",
        ),
    ],
)
def test_unsupported_models_are_rejected(draw_run, changes, told):
    run = draw_run(**changes)
    refused(lambda: explore.write(run), told)
    assert not (run / "explore.html").exists()


def test_a_subclass_of_a_supported_router_is_rejected(run):
    class Own(SigmoidRouter):
        """Its forward may do anything."""

    model = checkpoint.load(run)
    model.blocks[1].mlp.router = Own(16, 8, 2)
    refused(lambda: explore.read_routers(model), "the page does not support this router")


def test_a_router_with_a_capacity_is_shown_without_it(draw_run):
    run = draw_run(moe={"capacity_factor": 1.0})
    model, held = checkpoint.load(run), Source(explore.write(run)).data
    [routing, _] = model(ids(held["tokens"])).routings
    [layer, _] = held["checkpoints"][0]["layers"]
    assert type(model.routers()[0]) is Capacity and held["router"] == "sigmoid"
    assert torch.equal(numbers(layer["scores"], *routing.scores.shape), routing.scores)
    assert torch.equal(numbers(layer["bias"], 8), model.routers()[0].bias)


def test_the_policy_allows_the_pages_own_script_and_style_alone(run):
    page = (run / "explore.html").read_text(encoding="utf-8")
    [content] = re.findall('Content-Security-Policy" content="(.*?)"', page)
    policy = dict(part.split(" ", 1) for part in content.replace("&#39;", "'").split("; "))
    for tag in ("script", "style"):
        [inside] = re.findall(f"<{tag}>(.*?)</{tag}>", page, re.S)
        digest = base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()
        assert policy[f"{tag}-src"] == f"'sha256-{digest}'"
    assert policy["default-src"] == policy["base-uri"] == "'none'" and "unsafe" not in content
    html, _, rest = page.partition('<script id="data"')
    script = rest.partition("</script>")[2]
    written = r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(|import\W|fetch|https?:|//\w"
    assert not re.search(written, html + script)
    assert not re.search(r"<[^>]* (on\w+|style|src|href)=", html)
