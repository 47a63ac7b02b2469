"""report.html: its numbers, its figures, and that hostile text stays text."""

import base64
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure

from lm import checkpoint, count, data, history, train
from lm.report import figures, info, measure
from lm.report import run as report
from lm.run import read_metrics
from mla import GroupedQueryAttention
from moe import balance
from tests.helpers import refused

HOSTILE = "</script><img src=x onerror=alert(1)><!--<script>\u2028 &amp; {{ 7 * 7 }} \"'</pre><h1>"


class Page(HTMLParser):
    """The page's tags with their attributes, and its texts with the tags around them."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.texts, self.open = [], [], []
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, text):
        self.texts.append((tuple(self.open), text))

    def handle_comment(self, text):
        raise AssertionError(f"a comment: {text}")

    def text_in(self, tag):
        return "".join(text for around, text in self.texts if tag in around)

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture
def plain_pictures(monkeypatch):
    """Leave out the drawing in tests of the text."""
    monkeypatch.setattr(
        Figure, "savefig", lambda self, path, **options: path.write_bytes(b"\x89PNG\r\n\x1a\n")
    )


@pytest.fixture(scope="module")
def page(trained_once):
    return Page(trained_once / "report.html")


def run_of(config, folder):
    assert train.train(config, folder) == 0
    report.write(folder)
    return Page(folder / "report.html")


@pytest.fixture(scope="module")
def dense(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("dense") / "run"
    config = tiny(
        model={"num_dense_layers": 3},
        attention={"kind": "gqa", "num_heads": 4, "num_kv_heads": 2},
        train={"steps": 2},
    )
    return folder, run_of(config, folder)


TAGS = "html head meta title style body h1 h2 h3 p strong code img div span small br table tr th td pre"


def test_the_page_is_well_formed(page, dense):
    assert page.open == dense[1].open == []
    for one in (page, dense[1]):
        assert {tag for tag, _ in one.tags} <= set(TAGS.split())


def test_the_page_loads_nothing_and_runs_nothing(page, dense):
    for one in (page, dense[1]):
        assert all(image["src"].startswith("data:image/png;base64,") for image in one.all("img"))
        for _, attributes in one.tags:
            assert not {"href", "srcset", "action", "data", "background"} & set(attributes)
            assert not any(name.startswith("on") for name in attributes)
        written = re.sub(r'src="data:image/png;base64,[A-Za-z0-9+/=]+"', "", one.source).replace(
            one.text_in("pre"), ""
        )
        assert not re.search(r"https?:|//|url\(|@import|javascript:", written)
        policy = [
            meta["content"] for meta in one.all("meta") if meta.get("http-equiv") == "Content-Security-Policy"
        ]
        assert policy == ["default-src 'none'; style-src 'unsafe-inline'; img-src data:"]
        assert {"charset": "utf-8"} in one.all("meta")


def test_every_figure_has_a_description_and_is_the_file_beside_the_page(trained_once, page):
    pictures = {path.read_bytes() for path in trained_once.glob("*.png")}
    assert {path.name for path in trained_once.glob("*.png")} == {
        "loss.png",
        "cache.png",
        "balance.png",
        "load.png",
        "experts.png",
    }
    for image in page.all("img"):
        content = base64.b64decode(image["src"].partition(",")[2])
        assert content.startswith(b"\x89PNG\r\n\x1a\n") and content in pictures
        assert len(image["alt"]) > 10
    assert len(page.all("img")) == 4  # the passage is text in the page


def test_parameters_and_losses_equal_the_models(trained_once, page):
    model = checkpoint.load(trained_once)
    total = sum(tensor.numel() for tensor in (*model.parameters(), *model.buffers()))
    active = count.active_parameters(model.config)
    said = " ".join(page.text_in("p").split())
    share = 100 * active / total
    assert f"{total:,} parameters, of which {active:,} ({share:.0f} %) are active per token." in said
    last = read_metrics(trained_once)[-1]
    assert f"Held-out loss: {last['val_loss']:.3f} nats per token" in said
    assert f"12 steps, {12 * 4 * 16:,} tokens" in said and "torch.float32 on 1 thread (" in said


def rows_of(page):
    """The cache table: kind -> (bytes, relative to MHA)."""
    cells = iter([text for around, text in page.texts if "td" in around])
    rows = [(kind, (int(size.replace(",", "")), share)) for kind, size, share in zip(cells, cells, cells)]
    return dict(rows[: [kind for kind, _ in rows].index("MLA")])


def v3_rows_of(page):
    """The second table: kind -> bytes per layer with DeepSeek-V3's heads."""
    cells = [text for around, text in page.texts if "td" in around]
    return {
        kind: int(size.replace(",", "")) for kind, size, _ in zip(*[iter(cells[cells.index("MLA") :])] * 3)
    }


def test_cache_sizes_equal_those_of_real_caches(trained_once, page):
    model = checkpoint.load(trained_once)
    found = rows_of(page)
    caches = model.new_caches(1, 50, torch.bfloat16)
    ours = sum(cache.entries.nbytes for cache in caches) // 50
    assert ours == 3 * (8 + 4) * 2  # layers x (latent + rope) x bytes of bf16
    assert found["this model (mla)"][0] == ours
    for kind, heads in (("MHA", 2), ("MQA", 1)):  # two heads of value width 6
        rival = GroupedQueryAttention(16, 2, heads, 6).new_cache(1, 50, torch.bfloat16)
        assert found[kind][0] == 3 * rival.entries.nbytes // 50 == 3 * 2 * heads * 6 * 2
    assert found["MHA"][1] == "100.0 %"
    assert found["this model (mla)"][1] == f"{100 * ours / found['MHA'][0]:.1f} %"


def test_the_report_and_lm_info_print_the_same_numbers(trained_once, page, capsys):
    facts = info.summary(info.find_config(str(trained_once)), 10)
    model = checkpoint.load(trained_once)
    assert count.built_parameters(model) == facts["parameters"]["total"]
    assert f"{facts['parameters']['total']:,} parameters" in " ".join(page.text_in("p").split())
    found = {kind.partition(" (")[0]: size for kind, (size, _) in rows_of(page).items()}
    at_v3_size = facts["v3_cache_bytes_per_token_and_layer"]
    caches = facts["cache_bytes_per_token"]
    del caches["llama-3.1-405b"]
    assert found == caches
    assert v3_rows_of(page) == at_v3_size
    assert "in bf16" in page.text_in("p")


def test_a_dense_run_has_a_page_without_experts(dense):
    folder, one = dense
    assert {path.name for path in folder.glob("*.png")} == {"loss.png", "cache.png"}
    assert len(one.all("img")) == 2 and not one.all("small") and "expert" not in one.text_in("h2")
    model = checkpoint.load(folder)
    total = sum(parameter.numel() for parameter in model.parameters())
    said = " ".join(one.text_in("p").split())
    assert f"{total:,} parameters, of which {total:,} (100 %) are active per token." in said
    found = rows_of(one)
    sizes = {kind: size for kind, (size, _) in found.items()}
    a_head = 3 * 2 * 8 * 2  # layers x key and value x width x bytes of bf16
    assert sizes == {"this model (gqa)": 2 * a_head, "MHA": 4 * a_head, "MQA": a_head}


def test_the_passage_shows_each_token_with_the_number_of_its_strongest_expert(trained_once, page):
    model, config = checkpoint.load(trained_once), checkpoint.read_config(trained_once, False)
    held_out = data.load(config.data, 256)[1]
    passage = held_out[:384] if len(held_out) <= 2000 else held_out[2000:2384]
    tokens = torch.tensor(passage.tolist()).unsqueeze(0)
    want = []
    for routing in model(tokens).routings:
        for token, experts, weights in zip(
            passage.tolist(), routing.experts[0].tolist(), routing.weights[0].tolist()
        ):
            best = max(zip(weights, experts))[1]
            want.append(({32: "␣", 10: "↵"}.get(token, chr(token)), str(best)))
    shown = [text for around, text in page.texts if "span" in around and "small" not in around]
    numbers = [text for around, text in page.texts if "small" in around]
    assert list(zip(shown, numbers)) == want
    assert len(page.all("span")) == 2 * len(passage)
    colours = {number: span["style"] for number, span in zip(numbers, page.all("span"))}
    assert len(set(colours.values())) == len(colours)  # one colour per expert


def test_the_load_is_measured_on_the_held_out_text(trained_once):
    model, config = checkpoint.load(trained_once), checkpoint.read_config(trained_once, False)
    windows = data.Windows(data.load(config.data, 256)[1], 16)
    got = measure.expert_load(model, windows)
    assert got.shape == (2, 8)
    counts = torch.zeros(2, 8)
    for index in range(len(windows)):
        for layer, routing in enumerate(model(windows[index][:-1].unsqueeze(0)).routings):
            counts[layer] += balance.tokens_per_expert(routing)
    torch.testing.assert_close(got, counts / counts.sum(1, keepdim=True), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "token, shown",
    [
        (32, "␣"),
        (10, "↵"),
        (3, "∎"),
        (65, "A"),
        (126, "~"),
        (0, "00"),
        (127, "7f"),
        (195, "c3"),
        (255, "ff"),
        (60, "<"),
    ],
)
def test_every_byte_is_visible(token, shown):
    assert measure.show(token) == shown


@pytest.mark.usefixtures("plain_pictures")
def test_hostile_text_stays_text(trained, tmp_path):
    (trained / "samples.txt").write_text(f"--- step 12\n{HOSTILE}\n", encoding="utf-8")
    hostile = tmp_path / HOSTILE.replace("/", "∕")
    trained.rename(hostile)
    report.write(hostile)
    one = Page(hostile / "report.html")
    assert one.text_in("pre") == f"--- step 12\n{HOSTILE}\n"
    assert one.text_in("h1") == hostile.name
    assert one.text_in("title").startswith(hostile.name)
    assert not one.all("script") and len(one.all("img")) == 4 and len(one.all("h1")) == 1
    assert not any(name.startswith("on") for _, attributes in one.tags for name in attributes)


@pytest.mark.usefixtures("plain_pictures")
def test_hostile_bytes_in_the_held_out_text_stay_text(tiny, tmp_path):
    (tmp_path / "text").write_bytes(b'<img src=x onerror=alert(1)>&$\\"\x00\xff' * 200)
    one = run_of(tiny(data={"path": str(tmp_path / "text")}, train={"steps": 2}), tmp_path / "run")
    shown = "".join(text for around, text in one.texts if "span" in around and "small" not in around)
    assert '<img␣src=x␣onerror=alert(1)>&$\\"00ff' in shown
    assert len(one.all("img")) == 4 and not one.all("script")


@pytest.mark.usefixtures("plain_pictures")
def test_control_bytes_in_samples_and_names_are_escaped(trained, tmp_path):
    (trained / "samples.txt").write_bytes(bytes(range(128)) + "\x9b\u202e".encode())
    trained.rename(tmp_path / "a\x1b[2J\x07")
    report.write(tmp_path / "a\x1b[2J\x07")
    one = Page(tmp_path / "a\x1b[2J\x07" / "report.html")
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]", one.source)
    assert one.text_in("h1") == r"a\x1b[2J\x07"
    assert r"\x00" in one.text_in("pre") and r"\x7f\x9b\u202e" in one.text_in("pre")


@pytest.mark.usefixtures("plain_pictures")
def test_samples_that_end_within_a_character_are_shown(trained):
    (trained / "samples.txt").write_bytes("--- step 12\né".encode()[:-1])
    report.write(trained)
    assert Page(trained / "report.html").text_in("pre") == "--- step 12\n\ufffd"


@pytest.mark.usefixtures("plain_pictures")
def test_a_run_without_samples_has_a_page(trained):
    (trained / "samples.txt").unlink()
    report.write(trained)
    assert Page(trained / "report.html").text_in("pre") == ""


@pytest.mark.usefixtures("plain_pictures")
def test_a_damaged_newest_checkpoint_gives_one_warning_and_the_previous_one_is_shown(trained):
    (trained / "checkpoints" / "step-000012" / "model.safetensors").write_bytes(b"")
    with pytest.warns(UserWarning, match="step-000012") as caught:
        report.write(trained)
    assert len(caught) == 1
    assert "10 steps" in Page(trained / "report.html").text_in("p")


def test_an_incomplete_run_is_rejected(trained, tmp_path):
    (trained / "metrics.jsonl").unlink()
    refused(lambda: report.write(trained), trained / "metrics.jsonl", "has no rows yet")
    shutil.rmtree(trained / "checkpoints")
    refused(lambda: report.write(trained), "no checkpoint yet")
    refused(lambda: report.write(tmp_path / "absent"), "is not a folder")


@pytest.mark.usefixtures("plain_pictures")
def test_the_best_ngram_is_shown_only_for_the_bundled_text(tiny, trained, page, monkeypatch, tmp_path):
    assert "n-gram" not in page.source
    monkeypatch.setattr(data, "CORPUS", tmp_path)
    baseline = {"best": 1.2345, "best_order": 6}
    (tmp_path / "baselines.json").write_text(json.dumps(baseline))
    shutil.copy(Path(tiny().data.path), tmp_path / "train.txt")
    shutil.copy(Path(tiny().data.path), tmp_path / "validation.txt")
    (trained / "config.toml").write_text(tiny(data={"path": ""}).to_toml())
    report.write(trained)
    assert "The best n-gram model reaches 1.234" in " ".join(
        Page(trained / "report.html").text_in("p").split()
    )
    for axis in figures.draw_loss(read_metrics(trained), baseline).axes:  # a line in the figure, too
        assert [1.2345, 1.2345] in [list(line.get_ydata()) for line in axis.lines]


@pytest.mark.usefixtures("plain_pictures")
def test_a_run_of_one_step_and_one_window_has_a_page(tiny, tmp_path):
    (tmp_path / "text").write_bytes(bytes(range(97, 114)))
    config = tiny(
        data={"path": str(tmp_path / "text"), "validation": str(tmp_path / "text")}, train={"steps": 1}
    )
    assert len(run_of(config, tmp_path / "run").all("span")) == 2 * 17


@pytest.mark.usefixtures("plain_pictures")
def test_the_tied_weights_of_a_bf16_run_count_once(tiny, tmp_path):
    config = tiny(model={"tie_embeddings": True}, train={"steps": 1, "dtype": "bfloat16"})
    one = run_of(config, tmp_path / "run")
    assert f"{count.total_parameters(config.model):,} parameters" in " ".join(one.text_in("p").split())
    assert "torch.bfloat16" in one.text_in("p")


def test_a_checkpoint_pruned_while_the_report_reads_it_is_replaced_by_the_newer_one(trained, monkeypatch):
    """As beside a training: the newest checkpoint goes away after its state was read."""
    found = history.checkpoints(trained)
    original, pruned = checkpoint.load_model, []

    def prune_first(config, weights):
        if not pruned:
            pruned.append(shutil.rmtree(weights.parent))
        return original(config, weights)

    monkeypatch.setattr(checkpoint, "load_model", prune_first)
    page = report.write(trained).read_text()
    assert len(found) > 1 and f"{history.read_state(found[-2])['step']} steps" in page
