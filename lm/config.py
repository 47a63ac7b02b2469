"""Configuration of a model and its training: frozen dataclasses, validated when built, TOML on disk.

Does not import torch, so `lm --help` is fast.
"""

import dataclasses
import difflib
import math
import sys
import tomllib
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Self

import tomli_w

from .files import read_text

PRESETS = Path(__file__).parent / "presets"
LONGEST = 2**20  # bytes of a TOML file
FORMAT = 1  # of config.toml and state.json; raised when an older version could misread them


class NewerFormat(ValueError):
    """A file has a format that only a newer version of lm can read."""


def check_format(table: dict[str, Any]) -> None:
    """Remove the key "format" from a file's table; raise if the format is invalid or too new to read.

    Files without the key were written before formats were numbered.
    """
    found = table.pop("format", FORMAT)
    if type(found) is not int or found < 1:
        raise ValueError(f"format: a whole number 1..{FORMAT}, got {found!r:.80}")
    if found > FORMAT:
        said = f"format {found!r:.80} is newer than {FORMAT}, the newest that this version of lm reads"
        raise NewerFormat(f"{said}; update lm")


def number(default: Any, least: float = 0, most: float = math.inf) -> Any:
    """A field whose value must lie in least..most."""
    return field(default=default, metadata={"least": least, "most": most})


def choice(default: str, *others: str) -> Any:
    """A field whose value must be one of these strings."""
    return field(default=default, metadata={"choices": (default, *others)})


@dataclass(frozen=True)
class Section:
    """One table of the configuration; validates its fields' types and ranges when built."""

    name: ClassVar[str] = ""

    def __post_init__(self):
        types = typing.get_type_hints(type(self))
        for item in dataclasses.fields(self):
            value = getattr(self, item.name)
            value = check_value(f"{self.name}.{item.name}", value, types[item.name], item.metadata)
            object.__setattr__(self, item.name, value)


@dataclass(frozen=True)
class AttentionConfig(Section):
    """Attention: "mla" uses the ranks and the qk and v head dims, "gqa" uses num_kv_heads and head_dim."""

    name: ClassVar[str] = "model.attention"
    kind: str = "mla"  # "mla", "gqa", or your own "package.module:Class"
    num_heads: int = number(4, 1)
    q_lora_rank: int = number(0)  # 0: no query compression
    kv_lora_rank: int = number(32, 1)
    qk_nope_head_dim: int = number(16, 1)
    qk_rope_head_dim: int = number(16, 2)
    v_head_dim: int = number(16, 1)
    num_kv_heads: int = number(4, 1)
    head_dim: int = number(32, 2)
    qkv_bias: bool = False  # on the projections of x: gqa's query, key and value, mla's two down-projections
    out_bias: bool = False
    qk_norm: bool = False  # gqa: RMSNorm over each head's query and key, as in Qwen3
    arguments: dict[str, Any] = field(default_factory=dict)  # extra arguments of a custom class

    def __post_init__(self):
        super().__post_init__()
        if self.qk_norm and self.kind == "mla":
            raise ValueError("model.attention.qk_norm is for gqa: mla norms its latents instead")


@dataclass(frozen=True)
class RopeConfig(Section):
    """Rotary position embedding."""

    name: ClassVar[str] = "model.rope"
    theta: float = number(10000.0, 1e-6)
    interleaved: bool = True  # pairs (2i, 2i + 1), as in DeepSeek; false: (i, i + dim/2), as in Llama
    scaling: str = choice("none", "linear", "yarn", "llama3")  # for sequences longer than in training
    factor: float = number(1.0, 1)  # how many times longer
    original_context: int = number(4096, 1)  # context length in training, before scaling
    beta_fast: float = number(32.0, 1e-6)  # yarn: pairs with more turns than this in training stay unchanged
    beta_slow: float = number(1.0, 1e-6)  # yarn: pairs with fewer turns slow down by the full factor
    mscale: float = number(1.0)  # yarn: how much cos and sin grow with ln(factor)
    mscale_all_dim: float = number(0.0)  # yarn: the share of it that goes into mla's softmax scale
    low_freq_factor: float = number(1.0, 1e-6)  # llama3's beta_slow
    high_freq_factor: float = number(4.0, 1e-6)  # llama3's beta_fast


@dataclass(frozen=True)
class MoEConfig(Section):
    """Mixture of experts, in every layer after the dense ones."""

    name: ClassVar[str] = "model.moe"
    # sigmoid (V3), softmax (V2), noisy, switch, gshard, expert_choice, hash, mixtral, random (moe/zoo.py), or
    # your own "package.module:Class"
    router: str = "sigmoid"
    num_experts: int = number(16, 1)
    top_k: int = number(2, 1)
    hidden_dim: int = number(64, 1)  # of each expert
    num_shared_experts: int = number(1)  # used by every token
    shared_gate: bool = False  # weight the shared experts by sigmoid(gate(x)), as Qwen2-MoE, instead of 1
    num_groups: int = number(1, 1)  # 1: no group limit
    top_groups: int = number(1, 1)  # groups a token may use
    normalize: bool = True  # divide the selected weights by their sum
    routed_scaling_factor: float = number(1.0)
    capacity_factor: float = number(0.0)  # most tokens per expert in training, times its share; 0: any
    arguments: dict[str, Any] = field(default_factory=dict)  # extra arguments of the router

    def __post_init__(self):
        super().__post_init__()
        if self.num_experts % self.num_groups:
            raise ValueError(
                f"model.moe.num_experts {self.num_experts} is not a multiple of num_groups {self.num_groups}"
            )
        if self.top_groups > self.num_groups:
            raise ValueError(
                f"model.moe.top_groups {self.top_groups} is more than num_groups {self.num_groups}"
            )
        if self.shared_gate and not self.num_shared_experts:
            raise ValueError("model.moe.shared_gate: there is no shared expert to gate")
        reachable = self.num_experts // self.num_groups * self.top_groups
        if self.top_k > reachable:
            raise ValueError(
                f"model.moe.top_k {self.top_k} is more than the {reachable} experts that top_groups "
                f"{self.top_groups} leaves reachable"
            )


@dataclass(frozen=True)
class ModelConfig(Section):
    """The transformer."""

    name: ClassVar[str] = "model"
    vocab_size: int = number(256, 1)
    dim: int = number(128, 1)
    num_layers: int = number(4, 1, 1000)
    num_dense_layers: int = number(1)  # leading layers with a SwiGLU, not experts; num_layers: all dense
    hidden_dim: int = number(384, 1)  # of a dense layer's SwiGLU
    norm_eps: float = number(1e-6)
    tie_embeddings: bool = False  # the head uses the embedding's matrix
    init_std: float = number(0.02, 1e-9)  # of every weight matrix; V2 and V3: 0.006
    max_length: int = number(0)  # longest context it was trained for; 0: unknown
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    rope: RopeConfig = field(default_factory=RopeConfig)
    moe: MoEConfig = field(default_factory=MoEConfig)

    def __post_init__(self):
        super().__post_init__()
        if self.num_dense_layers > self.num_layers:
            raise ValueError(
                f"model.num_dense_layers {self.num_dense_layers} is more than num_layers {self.num_layers}"
            )

    def own_parts(self) -> dict[str, str]:
        """Custom classes by the key that names each: {"model.moe.router": "package.module:Class"}"""
        parts = {"model.attention.kind": self.attention.kind, "model.moe.router": self.moe.router}
        return {key: path for key, path in parts.items() if ":" in path}


@dataclass(frozen=True)
class TrainConfig(Section):
    """Training. A step is one update of the weights."""

    name: ClassVar[str] = "train"
    steps: int = number(1000, 1)
    batch_size: int = number(16, 1)  # sequences per forward pass
    accumulation: int = number(1, 1)  # forward passes per step
    context: int = number(128, 1)  # tokens per sequence
    learning_rate: float = number(1e-3)  # the peak
    warmup: int = number(50)  # steps of linear increase
    decay: float = number(1.0, 0, 1)  # final share of the steps with cosine decay; constant before that
    final_learning_rate: float = number(0.1, 0, 1)  # at the last step, as a share of the peak
    weight_decay: float = number(0.1)
    beta1: float = number(0.9, 0, 0.999999)
    beta2: float = number(0.95, 0, 0.999999)
    grad_clip: float = number(1.0)  # maximum gradient norm; 0: no clipping
    bias_update_rate: float = number(0.001)  # step size of the selection bias (V3's gamma); 0: off
    bias_update: str = choice("sign", "centred", "proportional")  # the sign; minus its mean; the gap
    sequence_loss: float = number(0.0001)  # weight of the sequence-wise balance loss (V3's alpha)
    switch_loss: float = number(0.0)  # weight of the balance loss over a forward pass (Switch: 0.01)
    global_batch_loss: float = number(0.0)  # same, with the load of the step's passes so far
    z_loss: float = number(0.0)  # weight of the router's z-loss (ST-MoE: 0.001)
    device_loss: float = number(0.0)  # weight of the balance loss over devices (V2: 0.05)
    communication_loss: float = number(0.0)  # weight of the loss over what each device receives (V2: 0.02)
    num_devices: int = number(1, 1)  # equal groups of experts, balanced by the two losses above
    top_devices: int = number(1, 1)  # maximum devices per token (V2's M)
    seed: int = number(0, 0, 2**63 - 1)
    log_every: int = number(10, 1)
    eval_every: int = number(100, 1)
    eval_tokens: int = number(65536, 1)  # validation tokens per evaluation; the last one uses all windows
    sample_every: int = number(250, 1)
    save_every: int = number(250, 1)
    keep: int = number(2, 1)  # newest checkpoints to keep
    dtype: str = choice("auto", "float32", "bfloat16")  # of the matrix products; auto: the faster one here
    device: str = "auto"  # "cpu", "cuda", "cuda:1", "mps"; auto: a GPU if available
    compile: bool = False  # torch.compile the blocks: slow start, then faster; needs a C++ compiler
    recompute: bool = False  # recompute each block in the backward pass: slower, less memory
    tensorboard: bool = False  # also write event files; needs the extra tensorboard
    document_mask: bool = False  # attend only within a document, which ends with data.document_end
    answers_only: bool = False  # the loss counts only tokens of a document after its data.answer_start

    def __post_init__(self):
        super().__post_init__()
        if self.top_devices > self.num_devices:
            raise ValueError(
                f"train.top_devices {self.top_devices} is more than num_devices {self.num_devices}"
            )
        if self.answers_only and not self.document_mask:
            raise ValueError("train.answers_only: where an answer ends needs train.document_mask")
        for name in ("device_loss", "communication_loss"):
            if getattr(self, name) and self.num_devices == 1:
                raise ValueError(f"train.{name}: one device has nothing to balance; set train.num_devices")


@dataclass(frozen=True)
class DataConfig(Section):
    """The training and validation text."""

    name: ClassVar[str] = "data"
    path: str = ""  # any file, read as bytes; "": the plays and poems in the package
    validation: str = ""  # held-out file; "": the package's four held-out plays, or the last tenth of path
    tokenizer: str = choice("bytes")
    generator: str = ""  # instead of path: a text written by code, such as "sums" (entry points "lm.texts")
    document_end: str = "\x03"  # the byte that ends a document, for train.document_mask and answers_only
    answer_start: str = "="  # the byte before an answer, for train.answers_only

    def __post_init__(self):
        super().__post_init__()
        for name in ("document_end", "answer_start"):
            if len(getattr(self, name).encode()) != 1:
                raise ValueError(f"data.{name} {getattr(self, name)!r:.80}: expected a single byte")
        if self.generator and (self.path or self.validation):
            said = f"data.generator {self.generator!r:.80} writes both texts"
            raise ValueError(f"{said}; leave out data.path and data.validation")


@dataclass(frozen=True)
class Config(Section):
    """The whole configuration."""

    model: ModelConfig = field(default_factory=ModelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    data: DataConfig = field(default_factory=DataConfig)

    def __post_init__(self):
        super().__post_init__()
        if self.model.moe.num_experts % self.train.num_devices:
            raise ValueError(
                f"model.moe.num_experts {self.model.moe.num_experts} is not a multiple of "
                f"train.num_devices {self.train.num_devices}"
            )

    @classmethod
    def preset(cls, name: str) -> Self:
        """A configuration in lm/presets by its name, or a TOML file by its path."""
        known = preset_names()
        if name.endswith(".toml"):
            return cls.load(name)
        if name not in known:
            raise ValueError(f"no preset {name!r}{nearest(name, known)}; there are {', '.join(known)}")
        return cls.load(PRESETS / f"{name}.toml")

    @classmethod
    def load(cls, path: Path | str) -> Self:
        """Read a TOML file.

        Raises:
            ValueError: the file is not readable TOML, or has an unknown key or an invalid value.
        """
        try:
            text = read_text(Path(path), LONGEST)
            table = tomllib.loads(text.removeprefix("\ufeff"))  # a mark that some editors write
        except (OSError, RecursionError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else str(error) or type(error).__name__
            raise ValueError(f"{path}: not a readable TOML file: {reason}") from None
        try:
            check_format(table)
            return cls.from_dict(table)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    @classmethod
    def from_dict(cls, table: dict[str, Any]) -> Self:
        """Build from nested tables; missing keys keep their defaults."""
        return build(cls, table)

    def to_toml(self) -> str:
        """The format and all values, as TOML for `load`."""
        return tomli_w.dumps({"format": FORMAT, **dataclasses.asdict(self)})


def preset_names() -> list[str]:
    """The names that `Config.preset` accepts."""
    return sorted(path.stem for path in PRESETS.glob("*.toml"))


def build(section: type[Any], table: Any) -> Any:
    """A Section of this type from a table, nested sections first."""
    if not isinstance(table, dict):
        raise ValueError(f"{section.name}: expected a table, got {table!r:.80}")
    hints = typing.get_type_hints(section)
    types = {item.name: hints[item.name] for item in dataclasses.fields(section)}
    values = {}
    for key, value in table.items():
        if key not in types:
            where = f"{section.name}.{key}".lstrip(".")
            raise ValueError(f"unknown key {where!r}{nearest(key, list(types))}")
        is_section = dataclasses.is_dataclass(types[key])
        values[key] = build(types[key], value) if is_section else value
    return section(**values)


def check_value(name: str, value: Any, kind: Any, limits: Any) -> Any:
    """The value as its field's type; raise ValueError if it is out of range."""
    name = name.lstrip(".")
    if kind in (int, float):
        least, most = limits["least"], limits["most"]
        is_number = isinstance(value, int if kind is int else int | float) and not isinstance(value, bool)
        largest = most if most < math.inf else 2**31 - 1 if kind is int else sys.float_info.max
        if not is_number or not least <= value <= largest:
            is_large = is_number and kind is int and value > largest
            span = f"{least}..{largest}" if most < math.inf or is_large else f">= {least}"
            what = f"a whole number {span}" if kind is int else f"a finite number {span}"
            raise ValueError(f"{name}: {what}, got {value!r:.80}")
        return kind(value)
    expected = typing.get_origin(kind) or kind
    if not isinstance(value, expected):
        raise ValueError(f"{name}: expected {expected.__name__}, got {value!r:.80}")
    if isinstance(value, str) and value.encode("utf-8", "replace").decode("utf-8") != value:
        raise ValueError(f"{name}: {value!r:.80} is not UTF-8, so a TOML file cannot hold it")
    choices = limits.get("choices")
    if choices and value not in choices:
        raise ValueError(f"{name}: one of {', '.join(choices)}, got {value!r:.80}{nearest(value, choices)}")
    return value


def nearest(word: str, known: typing.Sequence[str]) -> str:
    """' (did you mean ...?)' if a known word is close, else ''."""
    close = difflib.get_close_matches(str(word), known, n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""
