import dataclasses
import math
import subprocess
import sys
import tomllib
import typing

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lm.config import FORMAT, Config, Section, preset_names
from lm.model import Transformer
from tests.helpers import ROOT, refused

PLAIN = st.characters(exclude_categories=["Cs"])  # no lone surrogates: UTF-8 cannot encode them
TOML_VALUES = st.recursive(
    st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False) | st.text(PLAIN),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(PLAIN), inner, max_size=3),
    max_leaves=4,
)


def values(section):
    """A strategy for a section's fields, built from their types and limits."""
    types = typing.get_type_hints(section)
    fields = {}
    for item in dataclasses.fields(section):
        kind, limits = types[item.name], item.metadata
        if kind is int:
            fields[item.name] = st.integers(limits["least"], min(limits["most"], 10**6))
        elif kind is float:
            fields[item.name] = st.floats(limits["least"], min(limits["most"], 1e300))
        elif kind is bool:
            fields[item.name] = st.booleans()
        elif kind is str:
            fields[item.name] = st.sampled_from(limits["choices"]) if "choices" in limits else st.text(PLAIN)
        elif dataclasses.is_dataclass(kind):
            fields[item.name] = values(kind)
        else:
            fields[item.name] = st.dictionaries(st.text(PLAIN), TOML_VALUES, max_size=3)
    return st.fixed_dictionaries(fields)


@settings(max_examples=60, deadline=None)
@given(table=values(Config), groups=st.integers(1, 8), size=st.integers(1, 8))
def test_toml_round_trip_keeps_every_value(tmp_path_factory, table, groups, size):
    table["model"]["num_dense_layers"] = min(table["model"]["num_dense_layers"], table["model"]["num_layers"])
    table["model"]["moe"] |= {
        "num_groups": groups,
        "top_groups": groups,
        "num_experts": groups * size,
        "top_k": 1,
    }
    table["model"]["moe"]["shared_gate"] &= table["model"]["moe"]["num_shared_experts"] > 0
    table["model"]["attention"]["qk_norm"] &= table["model"]["attention"]["kind"] != "mla"
    table["train"] |= {"num_devices": groups, "top_devices": min(table["train"]["top_devices"], groups)}
    if groups == 1:
        table["train"] |= {"device_loss": 0.0, "communication_loss": 0.0}
    table["train"]["answers_only"] &= table["train"]["document_mask"]
    table["data"] |= {"document_end": chr(groups), "answer_start": chr(100 + size)}
    if table["data"]["generator"]:
        table["data"] |= {"path": "", "validation": ""}
    config = Config.from_dict(table)
    path = tmp_path_factory.mktemp("config") / "config.toml"
    path.write_text(config.to_toml(), encoding="utf-8")
    assert Config.load(path) == config
    assert tomllib.loads(config.to_toml()) == {"format": FORMAT, **dataclasses.asdict(config)}


LOSSES = (
    "sequence_loss",
    "switch_loss",
    "global_batch_loss",
    "z_loss",
    "device_loss",
    "communication_loss",
)
SECTIONS = ["model", "model.attention", "model.rope", "model.moe", "train", "data"]
LIMITS = [
    (f"{path}.{item.name}", item.metadata, types[item.name])
    for path in SECTIONS
    for section in [next(s for s in Section.__subclasses__() if s.name == path)]
    for types in [typing.get_type_hints(section)]
    for item in dataclasses.fields(section)
]


def nested(path, value):
    """{"a": {"b": value}} for "a.b" """
    *sections, key = path.split(".")
    table = {key: value}
    for section in reversed(sections):
        table = {section: table}
    return table


@pytest.mark.parametrize("path, limits, kind", LIMITS, ids=[path for path, *_ in LIMITS])
def test_every_field_rejects_wrong_types_and_values_out_of_range(path, limits, kind):
    wrong = {
        int: [True, 1.0, "1", math.nan, 10**400],
        float: [True, "1", math.nan, math.inf, -math.inf, 10**400],
    }
    bad = wrong.get(kind, [1, None, [], 2.5])
    if kind in (int, float):
        bad = [*bad, limits["least"] - 1, None, [1]]
        if limits["most"] != math.inf:
            bad.append(limits["most"] + 1)
    if "choices" in limits:
        bad = [*bad, "", limits["choices"][0] + "x"]
    for value in bad:
        assert len(refused(lambda value=value: Config.from_dict(nested(path, value)), path)) < 300


@pytest.mark.parametrize(
    "path, value, said",
    [
        ("train.steps", 1000.0, "train.steps: a whole number >= 1, got 1000.0"),
        ("train.steps", 0, "train.steps: a whole number >= 1, got 0"),
        ("train.steps", 2**31, f"train.steps: a whole number 1..{2**31 - 1}, got {2**31}"),
        ("train.batch_size", 0, "train.batch_size: a whole number >= 1, got 0"),
        ("train.save_every", 0, "train.save_every: a whole number >= 1, got 0"),
        ("train.learning_rate", math.inf, "train.learning_rate: a finite number >= 0, got inf"),
        ("train.learning_rate", -0.001, "train.learning_rate: a finite number >= 0, got -0.001"),
        ("train.seed", -1, f"train.seed: a whole number 0..{2**63 - 1}, got -1"),
        ("train.seed", 2**64, f"train.seed: a whole number 0..{2**63 - 1}, got {2**64}"),
        (
            "train.dtype",
            "bfloat",
            "train.dtype: one of auto, float32, bfloat16, got 'bfloat' (did you mean 'bfloat16'?)",
        ),
        ("model.dim", "256", "model.dim: a whole number >= 1, got '256'"),
        ("model.attention.v_head_dim", 0, "model.attention.v_head_dim: a whole number >= 1, got 0"),
        (
            "model.rope.scaling",
            "yan",
            "model.rope.scaling: one of none, linear, yarn, llama3, got 'yan' (did you mean 'yarn'?)",
        ),
        ("model.rope.factor", 0.5, "model.rope.factor: a finite number >= 1, got 0.5"),
        ("model.rope.factor", math.nan, "model.rope.factor: a finite number >= 1, got nan"),
        ("model.rope.factor", math.inf, "model.rope.factor: a finite number >= 1, got inf"),
        ("model.rope.original_context", 0, "model.rope.original_context: a whole number >= 1, got 0"),
        ("model.attention.qkv_bias", "yes", "model.attention.qkv_bias: expected bool, got 'yes'"),
        ("model.tie_embeddings", 1, "model.tie_embeddings: expected bool, got 1"),
        ("model.attention", 3, "model.attention: expected a table, got 3"),
        ("model", [1], "model: expected a table, got [1]"),
    ],
)
def test_the_message_names_field_value_and_what_would_be_right(path, value, said):
    assert refused(lambda: Config.from_dict(nested(path, value))) == said


@pytest.mark.parametrize(
    "moe, said",
    [
        ({"num_experts": 6, "num_groups": 4}, "num_experts 6 is not a multiple of num_groups 4"),
        ({"num_experts": 16, "num_groups": 8, "top_groups": 9}, "top_groups 9 is more than num_groups 8"),
        (
            {"num_experts": 8, "num_groups": 4, "top_groups": 1, "top_k": 3},
            "top_k 3 is more than the 2 experts",
        ),
        ({"num_experts": 4, "top_k": 5}, "top_k 5 is more than the 4 experts"),
    ],
)
def test_inconsistent_numbers_of_experts_are_rejected(moe, said):
    with pytest.raises(ValueError, match=said):
        Config.from_dict({"model": {"moe": moe}})


@pytest.mark.parametrize(
    "section, table, said",
    [
        ("moe", {"shared_gate": True, "num_shared_experts": 0}, "there is no shared expert to gate"),
        ("attention", {"qk_norm": True}, "model.attention.qk_norm is for gqa"),
        ("attention", {"qk_norm": True, "kind": "mla"}, "model.attention.qk_norm is for gqa"),
    ],
)
def test_an_option_that_would_have_no_effect_is_rejected(section, table, said):
    with pytest.raises(ValueError, match=said) as caught:
        Config.from_dict({"model": {section: table}})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "table, said",
    [
        ({"num_devices": 3}, "model.moe.num_experts 16 is not a multiple of train.num_devices 3"),
        ({"num_devices": 4, "top_devices": 5}, "train.top_devices 5 is more than num_devices 4"),
        (
            {"device_loss": 0.05},
            "train.device_loss: one device has nothing to balance; set train.num_devices",
        ),
        (
            {"communication_loss": 0.02},
            "train.communication_loss: one device has nothing to balance; set train.num_devices",
        ),
        ({"bias_update": "center"}, "train.bias_update: one of sign, centred, proportional, got 'center'"),
    ],
)
def test_inconsistent_balance_options_are_rejected_in_one_line(table, said):
    line = refused(lambda: Config.from_dict({"train": table}))
    assert line.removesuffix(" (did you mean 'centred'?)") == said


def test_all_balance_options_work_together(tmp_path):
    train = {name: 0.5 for name in LOSSES} | {"num_devices": 4, "top_devices": 2, "bias_update": "centred"}
    config = Config.from_dict({"train": train})
    assert all(getattr(config.train, name) == value for name, value in train.items())
    defaults = dataclasses.asdict(Config().train)
    assert all(defaults[name] == 0 for name in LOSSES if name != "sequence_loss")


def test_more_dense_layers_than_layers_are_rejected():
    with pytest.raises(ValueError, match="num_dense_layers 5 is more than num_layers 4"):
        Config.from_dict({"model": {"num_layers": 4, "num_dense_layers": 5}})


@pytest.mark.parametrize(
    "table, said",
    [
        ({"modle": {}}, r"unknown key 'modle' \(did you mean 'model'\?\)"),
        (
            {"train": {"learning_rat": 1}},
            r"unknown key 'train.learning_rat' \(did you mean 'learning_rate'\?\)",
        ),
        ({"model": {"moe": {"topk": 1}}}, r"unknown key 'model.moe.topk' \(did you mean 'top_k'\?\)"),
        ({"model": {"zzz": 1}}, r"unknown key 'model.zzz'$"),
        ({"name": "x"}, "unknown key 'name'"),
        ({7: 1}, "unknown key '7'"),
    ],
)
def test_an_unknown_key_is_an_error_that_names_the_nearest(table, said):
    with pytest.raises(ValueError, match=said):
        Config.from_dict(table)


BAD_FILES = {
    "a key twice": b"[train]\nsteps = 1\nsteps = 2\n",
    "a table twice": b"[train]\n[train]\n",
    "two BOMs": b"\xef\xbb\xbf\xef\xbb\xbf[train]\nsteps = 1\n",
    "not UTF-8": b'[data]\npath = "\xff"\n',
    "20,000 brackets": b"a = " + b"[" * 20000,
    "5,000 digits": b"[train]\nsteps = " + b"9" * 5000,
    "400 digits for a float": b"[train]\nlearning_rate = " + b"9" * 400,
    "no TOML": b"steps: 3",
    "NaN": b"[train]\nlearning_rate = nan\n",
    "too large for a float": b"[train]\nlearning_rate = 1e400\n",
    "a NUL": b"[train]\x00\n",
    "unknown": b"[train]\nstep = 1\n",
    "a date": b"[train]\nsteps = 2020-01-01\n",
}


@pytest.mark.parametrize("content", BAD_FILES.values(), ids=BAD_FILES.keys())
def test_a_bad_file_is_one_line_that_names_it(tmp_path, content):
    path = tmp_path / "config.toml"
    path.write_bytes(content)
    assert refused(lambda: Config.load(path)).startswith(f"{path}: ")


def test_what_is_not_a_file_is_one_line_that_names_it(tmp_path):
    for path, reason in ((tmp_path, "directory"), (tmp_path / "absent.toml", "No such file")):
        assert refused(lambda path=path: Config.load(path), reason).startswith(f"{path}: ")


def test_a_syntax_error_names_the_line(tmp_path):
    path = tmp_path / "config.toml"
    path.write_text("[train]\nsteps = 3\nsteps = 4\n")
    with pytest.raises(ValueError, match="line 3"):
        Config.load(path)


def test_absent_keys_keep_their_defaults(tmp_path):
    path = tmp_path / "config.toml"
    path.write_text("")
    assert Config.load(path) == Config()
    assert Config.from_dict({"train": {"steps": 7}}).train == dataclasses.replace(Config().train, steps=7)


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_loads_and_its_model_can_be_built(name):
    config = Config.preset(name)
    with torch.device("meta"):
        model = Transformer(config.model)
    assert len(model.blocks) == config.model.num_layers


def test_an_unknown_preset_names_the_nearest_and_all():
    with pytest.raises(ValueError, match=r"no preset 'nan' \(did you mean 'nano'\?\); there are .*nano.*toy"):
        Config.preset("nan")
    for name in ("", "../presets/nano", "/etc/passwd"):
        with pytest.raises(ValueError, match="no preset"):
            Config.preset(name)


def test_a_path_to_a_toml_file_is_a_preset_too(tmp_path):
    (tmp_path / "mine.toml").write_text("[train]\nsteps = 7\n")
    assert Config.preset(str(tmp_path / "mine.toml")) == Config.from_dict({"train": {"steps": 7}})
    with pytest.raises(ValueError, match=r"absent.toml: not a readable TOML file: No such file"):
        Config.preset(str(tmp_path / "absent.toml"))


def test_configs_are_frozen():
    config = Config()
    for section, name in (
        (config, "model"),
        (config.model, "dim"),
        (config.model.moe, "top_k"),
        (config.train, "steps"),
    ):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(section, name, 1)


def test_integers_are_accepted_as_floats():
    assert Config.from_dict({"train": {"learning_rate": 1}}).train.learning_rate == 1.0
    assert isinstance(Config.from_dict({"train": {"learning_rate": 1}}).train.learning_rate, float)


@pytest.mark.parametrize(
    "code", ["import lm", "import lm.config", "import lm; lm.Config.preset('nano')", "import lm.cli"]
)
def test_importing_loads_no_torch(code):
    check = f"import sys; sys.path.insert(0, {str(ROOT)!r}); {code}; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", check], check=True)


def test_the_public_names_are_there_and_no_others():
    import lm

    for name in lm.__all__:
        assert getattr(lm, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        lm.nothing  # noqa: B018
