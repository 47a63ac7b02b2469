"""Compiled and recomputed blocks, and compiled engines, against plain ones."""

import random
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from torch._dynamo.testing import CompileCounterWithBackend

from lm import cli, machine, terminal, train
from lm.inference.engine import Engine
from lm.model import Block
from lm.serve import answers
from lm.train import Trainer, run_block
from moe import Capacity, SoftmaxRouter

compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
KINDS = [(kind, router) for kind in ("mla", "gqa") for router in ("sigmoid", "softmax")]


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def without_code(monkeypatch):
    """torch.compile up to the graph, without generating C++; counts the compiled frames."""
    counter, compile = CompileCounterWithBackend("aot_eager"), torch.compile

    def plain(run, dynamic=None, options=None):
        kept = {key: value for key, value in (options or {}).items() if key == "guard_filter_fn"}
        return compile(run, backend=counter, fullgraph=True, dynamic=dynamic, options=kept)

    monkeypatch.setattr(torch, "compile", plain)
    return counter


def tokens(seed, vocab_size):
    return torch.randint(vocab_size, (4, 24), generator=torch.Generator().manual_seed(seed))


def passes(model, run, inputs, dtype=torch.float32):
    """Run the trunk -> hidden, routings and all gradients"""
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        hidden, routings = model.trunk(inputs, run=run)
    hidden.float().square().sum().backward()
    return hidden, routings, [p.grad.clone() for p in model.parameters() if p.grad is not None]


LONG = pytest.mark.long


@pytest.mark.long
@pytest.mark.parametrize(
    "kind, router, dtype, recompute",
    [
        ("mla", "sigmoid", torch.float64, False),
        ("gqa", "softmax", torch.float32, True),
        ("mla", "softmax", torch.bfloat16, False),
        ("gqa", "sigmoid", torch.bfloat16, False),
        pytest.param("mla", "softmax", torch.float64, True, marks=LONG),
        pytest.param("mla", "softmax", torch.float32, True, marks=LONG),
        pytest.param("gqa", "sigmoid", torch.float64, False, marks=LONG),
        pytest.param("gqa", "sigmoid", torch.float32, False, marks=LONG),
    ],
)
def test_compiled_blocks_are_one_graph_each_and_equal_plain_ones(
    tiny, make_model, without_code, kind, router, dtype, recompute
):
    config = tiny(model={"num_layers": 4}, attention={"kind": kind}, moe={"router": router})
    model = make_model(config.model, torch.float64 if dtype == torch.float64 else torch.float32)
    run = run_block(replace(config.train, compile=True, recompute=recompute))
    loads = set()
    for seed in range(4):
        inputs = tokens(seed, config.model.vocab_size)
        plain, compiled = (passes(model, r, inputs, dtype) for r in (Block.__call__, run))
        close = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2}[dtype]
        for mine, theirs in zip((compiled[0], *compiled[2]), (plain[0], *plain[2])):
            assert (mine - theirs).norm() <= close * theirs.norm()
        for mine, theirs in zip(compiled[1], plain[1]):
            assert torch.equal(mine.experts.sort().values, theirs.experts.sort().values)
            loads.add(tuple(mine.experts.flatten().bincount(minlength=8).tolist()))
    assert len(loads) == 12  # the expert loads differ in every step and layer, yet:
    assert without_code.frame_count == 2  # one dense block, one with experts


@pytest.mark.long
@pytest.mark.parametrize("kind, router", [("mla", "sigmoid"), ("gqa", "softmax")])
def test_the_whole_model_is_one_graph_for_every_expert_load(tiny, make_model, without_code, kind, router):
    config = tiny(attention={"kind": kind}, moe={"router": router}).model
    model = make_model(config)
    compiled = torch.compile(model)
    for seed in range(3):
        inputs = tokens(seed, config.vocab_size)
        torch.testing.assert_close(compiled(inputs).logits, model(inputs).logits, rtol=1e-11, atol=1e-12)
    assert without_code.frame_count == 1


def test_a_pass_of_two_tokens_compiles_too(tiny, make_model, without_code):
    model = make_model(tiny().model)
    inputs = tokens(0, 256)[:1, :2]
    torch.testing.assert_close(
        torch.compile(model)(inputs).logits, model(inputs).logits, rtol=1e-11, atol=1e-12
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind, router", KINDS)
def test_recomputing_changes_no_bit_and_saves_fewer_activations(tiny, make_model, kind, router, dtype):
    config = tiny(attention={"kind": kind}, moe={"router": router})
    model = make_model(config.model, torch.float32)
    inputs, kept, found = tokens(0, config.model.vocab_size), [], []
    for recompute in (False, True):
        sizes = {}

        def pack(tensor, sizes=sizes):
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        run = run_block(replace(config.train, recompute=recompute))
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            found.append(passes(model, run, inputs, dtype))
        kept.append(sum(sizes.values()))
    (plain, routings, gradients), (again, routings_again, gradients_again) = found
    assert torch.equal(plain, again) and kept[1] < kept[0] / 4
    for mine, theirs in zip(routings_again, routings):
        assert all(map(torch.equal, mine[:4], theirs[:4]))
    assert len(gradients) == len(gradients_again) and all(map(torch.equal, gradients_again, gradients))


def test_a_run_with_recompute_ends_with_the_same_weights(tiny, trained_once, tmp_path):
    changes = {"recompute": True}
    assert train.train(tiny(train=changes), tmp_path / "run") == 0
    assert weights(tmp_path / "run") == weights(
        trained_once
    )  # including selection biases, which come from counts


def weights(run):
    """Every tensor of the last checkpoint, as bytes."""
    folder = sorted((run / "checkpoints").iterdir())[-1]
    tensors = {**load_file(folder / "model.safetensors"), **load_file(folder / "optimizer.safetensors")}
    return {name: tensor.flatten().view(torch.uint8).numpy().tobytes() for name, tensor in tensors.items()}


@pytest.mark.long
@compiler
@pytest.mark.parametrize("changes", [{}, {"recompute": True, "dtype": "bfloat16"}], ids=["plain", "all"])
def test_a_compiled_run_repeats_and_resumes_bit_for_bit(tiny, tmp_path, monkeypatch, changes):
    config = tiny(train={"compile": True, **changes})
    for name in ("one", "two"):
        assert train.train(config, tmp_path / name) == 0
    assert weights(tmp_path / "one") == weights(tmp_path / "two")

    def stopped(trainer, step, whole=Trainer.step):
        row = whole(trainer, step)
        trainer.run.signal = 2 * (step == 5)
        return row

    monkeypatch.setattr(Trainer, "step", stopped)
    assert train.train(config, tmp_path / "three") == 130
    monkeypatch.undo()
    assert train.train(config, tmp_path / "three", resume=True) == 0
    assert weights(tmp_path / "three") == weights(tmp_path / "one")


def test_a_missing_cxx_compiler_is_an_error_before_anything_is_written(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ValueError, match=r"^train.compile: .* 'no-such-compiler' was not found; install"):
        train.train(tiny(train={"compile": True}), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    machine.check_compiler(torch.device("cuda"), "compile")  # Triton brings its own


def completions_of(engine, seed):
    """Completions of batches of one to twelve requests, short and long, that start and end at any step."""
    draw, requests = random.Random(seed), []
    for together in (1, 3, 1, 12, 2, 5, 3):
        for _ in range(together):
            prompt = draw.choices(range(256), k=draw.choice([1, 2, 30, 64, 65, 150]))
            requests.append(engine.submit(prompt, draw.randint(1, 40), draw.choice([0, 1.0]), seed=together))
        for _ in range(draw.randint(5, 45)):
            engine.step()
    engine.run()
    assert engine.nbytes == 0
    return [request.tokens for request in requests]


def test_a_compiled_engine_generates_the_same_with_three_graphs_for_all_mixes(tiny, make_model, without_code):
    model = make_model(tiny(model={"num_layers": 2}).model)
    plain, compiled = Engine(model, 16), Engine(model, 16, compile=True)
    assert completions_of(compiled, 0) == completions_of(plain, 0)
    torch.nn.init.normal_(model.head.weight, std=0.3)
    assert completions_of(compiled, 1) == completions_of(plain, 1)
    assert without_code.frame_count == 3  # one row; two, whose experts are copied; more


@LONG
def test_compiled_engines_of_several_models_are_kept_apart(tiny, make_model, without_code):
    kinds = [{"num_heads": 2}, {"num_heads": 4}, {"kind": "gqa"}]
    models = [make_model(tiny(attention=kind, moe={"router": "softmax"}).model) for kind in kinds]
    engines = [(Engine(model, 16), Engine(model, 16, compile=True)) for model in models]
    for seed in range(3):
        for plain, compiled in engines:
            assert completions_of(compiled, seed) == completions_of(plain, seed)
    assert without_code.frame_count == 9


@compiler
@pytest.mark.long
@pytest.mark.parametrize("kind", ["mla", "gqa"])
def test_compiled_code_generates_the_same(tiny, make_model, kind):
    model = make_model(tiny(attention={"kind": kind}).model)
    plain, compiled = Engine(model, 16), Engine(model, 16, compile=True)
    assert completions_of(compiled, 0) == completions_of(plain, 0)
    torch.nn.init.normal_(model.blocks[1].mlp.experts.down, std=0.3)
    assert completions_of(compiled, 1) == completions_of(plain, 1)


def test_a_model_that_cannot_be_compiled_is_an_error_at_once(tiny, make_model, monkeypatch):
    own = make_model(tiny(attention={"kind": "torch.nn:Identity"}).model)
    with pytest.raises(ValueError, match=r"^compile: the model.s attention has no step over pages"):
        Engine(own, compile=True)
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ValueError, match=r"^compile: .* 'no-such-compiler' was not found"):
        Engine(make_model(tiny().model), compile=True)


@pytest.mark.parametrize("command", ["generate", "chat", "serve"])
def test_the_commands_pass_compile_to_the_engine(trained_once, monkeypatch, command):
    asked = []

    def engine(*arguments, compile=False):
        asked.append(compile)
        raise ValueError("made")

    monkeypatch.setattr(terminal, "Engine", engine)
    monkeypatch.setattr(answers, "Engine", engine)
    for flags in ([], ["--compile"]):
        ending = ["--port", "0"] if command == "serve" else []
        assert cli.main([command, str(trained_once), *ending, *flags]) == 2
    assert asked == [False, True]


@compiler
def test_a_compiled_router_drops_the_same_tokens():
    router = Capacity(SoftmaxRouter(16, 8, 2), 0.5)
    x = torch.randn(2, 32, 16)
    plain, compiled = router(x), torch.compile(router)(x)
    assert int((plain.experts < 0).sum()) > 40
    assert torch.equal(compiled.experts, plain.experts) and torch.equal(compiled.asked, plain.asked)
