import math
import random
from functools import partial

import pytest
import torch
from torch import nn

from lm import checkpoint, count, data, loss, machine, parts, train
from lm.config import Config
from lm.model import Transformer
from lm.optim import learning_rate
from lm.run import read_metrics
from lm.train import Trainer
from moe import balance
from tests.lm.runs import DEVICES, LOSSES, equal_runs, stored

pytestmark = pytest.mark.usefixtures("short_samples")


def test_a_model_too_large_for_memory_is_rejected_before_it_is_built(tiny, tmp_path, monkeypatch):
    config = tiny()
    needed = 16 * count.total_parameters(config.model)
    monkeypatch.setattr(train.machine, "memory", lambda: needed - 1)
    with pytest.raises(ValueError, match=f"has {needed // 16:,} parameters; training them takes"):
        train.train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    for enough in (needed, 0):  # 0: unknown
        monkeypatch.setattr(train.machine, "memory", lambda enough=enough: enough)
        train.check_memory(config.model)


def test_the_same_seed_gives_the_same_bits_whatever_the_global_generator_did(tiny, trained_once, tmp_path):
    torch.manual_seed(99)
    random.seed(99)
    train.train(tiny(), tmp_path / "same")
    equal_runs(tmp_path / "same", trained_once)
    train.train(tiny(train={"seed": 1}), tmp_path / "other")
    assert stored(tmp_path / "other")[0] != stored(trained_once)[0]


def test_logging_evaluating_sampling_and_saving_change_no_weight(tiny, trained_once, tmp_path):
    often = {"log_every": 3, "eval_every": 1, "sample_every": 4, "save_every": 1, "keep": 1}
    train.train(tiny(train=often), tmp_path / "run")
    assert stored(tmp_path / "run") == stored(trained_once)


def test_training_uses_only_deterministic_algorithms(tiny, trained_once, tmp_path):
    torch.use_deterministic_algorithms(True)
    try:
        train.train(tiny(), tmp_path / "run")
    finally:
        torch.use_deterministic_algorithms(False)
    equal_runs(tmp_path / "run", trained_once)


def test_it_learns(tiny, tmp_path):
    train.train(tiny(train={"steps": 80, "batch_size": 8}), tmp_path / "run")
    rows = read_metrics(tmp_path / "run")
    assert abs(rows[0]["loss"] - math.log(256)) < 0.2  # the loss of uniform predictions
    assert (
        rows[-1]["loss"] < 2.5 and rows[-1]["val_loss"] < 2.5
    )  # at least the set of characters is learned: log(10) is 2.3


def test_the_log_holds_the_values_of_each_step(tiny, trained_once):
    config, rows = tiny(), read_metrics(trained_once)
    assert [row["step"] for row in rows] == list(range(1, 13))
    for row in rows:
        assert row["tokens"] == row["step"] * 4 * 16
        assert row["learning_rate"] == learning_rate(row["step"], config.train)
        assert row["grad_norm"] > 0 and row["loss"] > 0 and row["tokens_per_second"] > 0
        assert len(row["max_violations"]) == 2 and all(
            0 <= value <= 8 / 2 - 1 for value in row["max_violations"]
        )
        assert row["max_violation"] == pytest.approx(sum(row["max_violations"]) / 2)
        assert ("val_loss" in row) == (row["step"] in (6, 12))
    seconds = [row["seconds"] for row in rows]
    assert seconds == sorted(seconds)


def test_the_run_folder_holds_the_resolved_config_and_samples(tiny, trained_once):
    assert Config.load(trained_once / "config.toml") == tiny()
    assert (trained_once / "samples.txt").read_text().startswith("--- step 12\n")
    assert sorted(path.name for path in (trained_once / "checkpoints").iterdir()) == [
        "step-000010",
        "step-000012",
    ]


def test_log_every_and_sample_every_are_respected(tiny, tmp_path):
    train.train(tiny(train={"log_every": 5, "sample_every": 4, "eval_every": 1000}), tmp_path / "run")
    assert [row["step"] for row in read_metrics(tmp_path / "run")] == [5, 10, 12]
    lines = (tmp_path / "run" / "samples.txt").read_text().splitlines()
    assert [line for line in lines if line.startswith("--- step")] == [
        "--- step 4",
        "--- step 8",
        "--- step 12",
    ]


def by_hand(model, tokens, starts):
    """Mean loss of the last 14 of 16 targets of each window; the first 2 belong to the previous window."""
    losses = []
    with torch.no_grad():
        for start in starts:
            window = torch.from_numpy(tokens[start : start + 17].astype("int64"))
            logits = model(window[:-1].unsqueeze(0)).logits[0]
            losses.append(nn.functional.cross_entropy(logits[2:], window[3:]).item())
    return sum(losses) / len(losses)


def test_the_last_evaluation_is_of_the_whole_held_out_text(tiny, trained_once):
    model, config = checkpoint.load(trained_once), tiny()
    tokens = data.load(config.data, 256)[1]
    want = by_hand(model, tokens, range(0, len(tokens) - 16, 14))
    assert read_metrics(trained_once)[-1]["val_loss"] == pytest.approx(want, rel=1e-6)


def test_evaluations_during_training_use_windows_spread_over_the_text(tiny, make_model):
    config = tiny()
    model = make_model(config.model, torch.float32)
    tokens = data.load(config.data, 256)[1]
    windows, starts = data.Windows(tokens, 16), list(range(0, len(tokens) - 16, 14))
    count = len(starts)
    assert count > 20
    want = by_hand(model, tokens, [starts[i * count // 4] for i in range(4)])
    for batch_size in (1, 3, 100):
        got = train.evaluate(model, windows, 4 * 16 + 5, torch.float32, batch_size)
        assert got == pytest.approx(want, rel=1e-6)
    first = by_hand(model, tokens, [0])
    assert train.evaluate(model, windows, 1, torch.float32, 4) == pytest.approx(first, rel=1e-6)
    whole = by_hand(model, tokens, starts)
    assert train.evaluate(model, windows, 10**9, torch.float32, 7) == pytest.approx(whole, rel=1e-6)


def trainer_of(config, folder, dtype=torch.float32):
    folder.mkdir(exist_ok=True)
    texts = data.load(config.data, config.model.vocab_size)
    model = Transformer(config.model).to(dtype)
    model.initialize(torch.Generator().manual_seed(0))
    windows = data.Windows(texts[0], config.train.context, config.train.seed)
    return Trainer(config, folder, model, windows, data.Windows(texts[1], config.train.context))


def counts_of_the_batch(trainer, batches):
    """How often each expert of each layer is chosen, counted one by one."""
    found = []
    for inputs, _ in batches:
        for layer, routing in enumerate(trainer.model(inputs).routings):
            if layer == len(found):
                found.append([0] * 8)
            for expert in routing.experts.flatten().tolist():
                found[layer][expert] += 1
    return found


def bias_steps(loads, kind):
    """How a bias moves at rate 1, for each bias_update."""
    mean = sum(loads) / len(loads)
    signs = [(mean > load) - (mean < load) for load in loads]
    return {
        "sign": signs,
        "centred": [sign - sum(signs) / len(signs) for sign in signs],
        "proportional": [1 - load / mean for load in loads],
    }[kind]


@pytest.mark.parametrize("kind", ["sign", "centred", "proportional"])
@pytest.mark.parametrize("accumulation", [1, 3])
def test_the_bias_moves_once_per_step_from_the_counts_of_the_whole_batch(tiny, tmp_path, accumulation, kind):
    config = tiny(train={"accumulation": accumulation, "bias_update_rate": 0.25, "bias_update": kind})
    trainer = trainer_of(config, tmp_path)
    want = [[0.0] * 8, [0.0] * 8]
    for step in (1, 2, 3):
        batches = [
            trainer.windows.batch(((step - 1) * accumulation + part) * 4, 4) for part in range(accumulation)
        ]
        counts = counts_of_the_batch(trainer, batches)
        row = trainer.step(step)
        for layer, loads in enumerate(counts):
            mean = sum(loads) / 8
            assert sum(loads) == accumulation * 4 * 16 * 2
            assert row["max_violations"][layer] == pytest.approx(max(loads) / mean - 1)
            shares = [load / sum(loads) for load in loads if load]
            entropy = -sum(share * math.log(share, 8) for share in shares)
            assert row["load_entropies"][layer] == pytest.approx(entropy)
            assert row["dead_experts"][layer] == 8 - len(shares)
            for expert, move in enumerate(bias_steps(loads, kind)):
                want[layer][expert] += 0.25 * move
        for router, biases in zip(trainer.model.routers(), want):
            assert router.bias.tolist() == pytest.approx(biases, rel=1e-5, abs=1e-6)


def test_evaluation_and_samples_leave_the_bias_alone(tiny, tmp_path):
    trainer = trainer_of(tiny(train={"bias_update_rate": 0.5}), tmp_path)
    trainer.step(1)
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    trainer.evaluate(None)
    trainer.sample(1)
    assert all(torch.equal(tensor, before[name]) for name, tensor in trainer.model.state_dict().items())


def test_rate_0_leaves_the_bias_alone(tiny, tmp_path):
    train.train(tiny(train={"bias_update_rate": 0.0}), tmp_path / "run")
    assert all(not router.bias.any() for router in checkpoint.load(tmp_path / "run").routers())


def test_the_bias_update_evens_the_load(tiny, make_model, tmp_path):
    config = tiny(train={"bias_update_rate": 0.02, "learning_rate": 0.0, "batch_size": 16})
    trainer = trainer_of(config, tmp_path)
    trainer.model.load_state_dict(make_model(config.model, torch.float32).state_dict())
    violations = [trainer.step(step)["max_violation"] for step in range(1, 41)]
    print(violations)
    assert sum(violations[-5:]) / 5 < violations[0] / 3


def test_accumulated_steps_equal_one_step_of_the_whole_batch(tiny, tmp_path):
    whole = trainer_of(tiny(train={"batch_size": 8, "sequence_loss": 0.1}), tmp_path, torch.float64)
    parts = trainer_of(
        tiny(train={"batch_size": 4, "accumulation": 2, "sequence_loss": 0.1}), tmp_path, torch.float64
    )
    for step in range(1, 6):
        one, other = whole.step(step), parts.step(step)
        assert one["tokens"] == other["tokens"] and one["max_violations"] == other["max_violations"]
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-6)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-6)
    for ours, theirs in zip(whole.model.state_dict().values(), parts.model.state_dict().values()):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9)


def test_a_step_in_chunks_of_logits_is_the_same(tiny, tmp_path, monkeypatch):
    config = tiny(train={"accumulation": 2})
    whole, parts = (trainer_of(config, tmp_path, torch.float64) for _ in range(2))
    chunk, sizes, run = 4 * config.model.vocab_size * 10, [], loss.Chunked.forward
    monkeypatch.setattr(loss.Chunked, "forward", lambda *given: sizes.append(given[5]) or run(*given))
    for step in (1, 2, 3):
        rows = [whole.step(step)]
        with monkeypatch.context() as patch:
            patch.setattr(loss, "CHUNK", chunk)
            rows.append(parts.step(step))
        for key in ("loss", "grad_norm"):
            assert rows[0][key] == pytest.approx(rows[1][key], rel=1e-12)
    assert sizes == [10] * 6  # tokens per chunk: in each pass of `parts`, and never in `whole`
    monkeypatch.setattr(loss, "CHUNK", chunk)
    assert parts.evaluate(None) == pytest.approx(whole.evaluate(None), rel=1e-12)
    assert len(sizes) > 6


@pytest.mark.parametrize("name", LOSSES)
def test_a_balance_loss_is_trained_on_and_not_logged(tiny, tmp_path, name):
    rows, weights = [], []
    for factor in (0.0, 100.0):
        balances = {"sequence_loss": 0.0, **DEVICES, name: factor}
        trainer = trainer_of(tiny(train={**balances, "grad_clip": 0.0}), tmp_path)
        held_out = trainer.evaluate(None)
        rows.append({**trainer.step(1), "val_loss": held_out})
        weights.append(trainer.model.routers()[0].weight.detach().clone())
    assert rows[0]["loss"] == rows[1]["loss"] and rows[0]["val_loss"] == rows[1]["val_loss"]
    assert rows[1]["grad_norm"] > rows[0]["grad_norm"]
    assert not torch.equal(*weights)


@pytest.mark.parametrize("names", [*([name] for name in LOSSES), list(LOSSES), []], ids="+".join)
def test_a_steps_gradient_is_of_the_loss_and_the_weighted_balance_losses_of_each_layer(tiny, tmp_path, names):
    weights = {"sequence_loss": 0.0, **{name: 1 / number for number, name in enumerate(names, 3)}}
    config = tiny(train={**DEVICES, **weights, "accumulation": 3, "grad_clip": 0.0})
    trainer, twin = trainer_of(config, tmp_path, torch.float64), trainer_of(config, tmp_path, torch.float64)
    counts = [0, 0]
    for part in range(3):
        inputs, targets = twin.windows.batch(part * 4, 4)
        out = twin.model(inputs)
        objective = nn.functional.cross_entropy(out.logits.flatten(0, 1), targets.flatten())
        for layer, routing in enumerate(out.routings):
            counts[layer] = counts[layer] + balance.tokens_per_expert(routing)
            for name in names:
                objective = objective + weights[name] * LOSSES[name](routing, counts[layer])
        (objective / 3).backward()
    found = []
    trainer.optimizer.step = lambda: found.extend(p.grad.clone() for p in trainer.model.parameters())
    trainer.step(1)
    for ours, theirs in zip(found, twin.model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs.grad, rtol=1e-6, atol=1e-9)


def test_a_step_is_adamw_on_the_clipped_gradient_of_loss_and_balance(tiny, tmp_path):
    config = tiny(train={"sequence_loss": 0.3, "grad_clip": 0.05, "warmup": 0, "decay": 0.0})
    trainer, twin = (
        trainer_of(config, tmp_path, torch.float64),
        trainer_of(config, tmp_path, torch.float64).model,
    )
    inputs, targets = trainer.windows.batch(0, 4)
    out = twin(inputs)
    main = nn.functional.cross_entropy(out.logits.flatten(0, 1), targets.flatten())
    (main + 0.3 * sum(balance.sequence_loss(routing) for routing in out.routings)).backward()
    norm = math.sqrt(sum(p.grad.square().sum().item() for p in twin.parameters()))
    row = trainer.step(1)
    assert row["loss"] == pytest.approx(main.item(), rel=1e-6) and row["grad_norm"] == pytest.approx(
        norm, rel=1e-6
    )
    assert norm > 0.05
    for ours, theirs in zip(trainer.model.named_parameters(), twin.parameters()):
        gradient = theirs.grad * 0.05 / (norm + 1e-6)
        decay = 0.1 if theirs.ndim > 1 and ours[0] != "embedding.weight" else 0.0
        want = theirs * (1 - 0.01 * decay) - 0.01 * gradient / (gradient.abs() + 1e-8)
        torch.testing.assert_close(ours[1], want, rtol=0, atol=1e-9)


@pytest.mark.parametrize("router", ["TrainedBias", "NoBias", "Fixed"])
def test_a_custom_router_trains_whatever_it_calls_bias(tiny, tmp_path, router):
    config = tiny(moe={"router": f"tests.lm.own_routers:{router}"}, train={"bias_update_rate": 100.0})
    assert train.train(config, tmp_path / "run") == 0
    model = checkpoint.load(tmp_path / "run", trust_code=True)
    for name, parameter in model.named_parameters():
        assert parameter.abs().max() < 50, name


@pytest.mark.parametrize(
    "changes",
    [{"train": {"context": 1}}, {"train": {"context": 2, "batch_size": 1}}, {"model": {"vocab_size": 300}}],
)
def test_odd_sizes_train_too(tiny, tmp_path, changes):
    changes["train"] = {**changes.get("train", {}), "steps": 2}
    assert train.train(tiny(**changes), tmp_path / "run") == 0


def test_a_vocabulary_without_newline_trains_too(tiny, tmp_path):
    (tmp_path / "text").write_bytes(bytes(random.Random(0).choices(range(5), k=2000)))
    assert (
        train.train(tiny(model={"vocab_size": 5}, data={"path": str(tmp_path / "text")}), tmp_path / "run")
        == 0
    )


@pytest.mark.parametrize("raw", [b"\x00" * 500 + b"\xff\xfe" * 500, bytes(range(256)) * 10])
def test_training_works_on_any_bytes(tiny, tmp_path, raw):
    (tmp_path / "text").write_bytes(raw)
    assert train.train(tiny(data={"path": str(tmp_path / "text")}, train={"steps": 2}), tmp_path / "run") == 0


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"data": {"path": "/nowhere/text"}}, "/nowhere/text: cannot be read: No such file"),
        ({"data": {"validation": "/nowhere/text"}}, "/nowhere/text: cannot be read: No such file"),
        ({"train": {"context": 5000}}, "the text has [0-9]+ tokens; context=5000 needs at least 5001"),
        ({"train": {"context": 10**6}}, "the text has [0-9]+ tokens; context=1000000 needs at least 1000001"),
        ({"model": {"vocab_size": 100}}, "token 104; vocab_size=100"),
        ({"train": {"device": "cuda:77"}}, "device 'cuda:77' was not found"),
        ({"moe": {"router": "nocolon"}}, "model.moe.router 'nocolon'"),
        ({"attention": {"qk_rope_head_dim": 3}}, "dim=3 must be even"),
    ],
)
def test_invalid_configs_fail_before_anything_is_written(tiny, tmp_path, changes, said):
    with pytest.raises(ValueError, match=said):
        train.train(tiny(**changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_tensorboard_files_are_written_when_enabled(tiny, tmp_path):
    pytest.importorskip("tensorboard")
    train.train(tiny(train={"tensorboard": True}), tmp_path / "run")
    assert list((tmp_path / "run" / "tensorboard").glob("events*"))


def test_auto_takes_a_macs_gpu_only_if_a_step_runs_there(tiny, trained_once, tmp_path, monkeypatch):
    """There is none here, so that moving the model to it fails."""
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    with pytest.warns(UserWarning, match="using the CPU: a trial on mps fails: "):
        train.train(tiny(train={"device": "auto"}), tmp_path / "run")
    equal_runs(tmp_path / "run", trained_once)
    with pytest.raises(RuntimeError):
        train.train(tiny(train={"device": "mps"}), tmp_path / "asked")


@pytest.mark.parametrize("part", ["training_losses", "build_optimizer", "update_biases", "stream"])
def test_the_trial_runs_every_part_of_training_on_a_copy(tiny, make_model, monkeypatch, part):
    config = tiny(train={"bias_update_rate": 0.1})
    model, before = make_model(config.model, torch.float32), torch.random.get_rng_state()
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    train.trial_step(model, config.train, torch.device("cpu"))
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(torch.random.get_rng_state(), before) and next(model.parameters()).grad is None

    def fail(*args, **options):
        raise TypeError("no float64\nsecond line")

    monkeypatch.setattr(train.loss if part == "training_losses" else train, part, fail)
    trial = partial(train.trial_step, model, config.train)
    on_cpu = lambda device: trial(torch.device("cpu"))  # noqa: E731
    with pytest.warns(UserWarning, match="a trial on mps fails: no float64$"):
        assert machine.or_cpu("auto", torch.device("mps"), on_cpu) == torch.device("cpu")
    assert machine.or_cpu("mps", torch.device("mps"), on_cpu) == torch.device("mps")
    monkeypatch.undo()
    assert machine.or_cpu("auto", torch.device("mps"), on_cpu) == torch.device("mps")


def test_the_device_is_checked_first(tiny, tmp_path, monkeypatch):
    asked = []
    pick = machine.pick_device
    monkeypatch.setattr(machine, "pick_device", lambda name: (asked.append(name), pick(name))[1])
    train.train(tiny(train={"steps": 1}), tmp_path / "run")
    assert asked[0] == "cpu"


@pytest.mark.parametrize(
    "body, said",
    [
        ("return x", "ValueError: Odd returned a Tensor, not a moe.Routing"),
        ("return Routing(torch.full((*x.shape[:-1], 2), 99), x[..., :2], x, x)", ": "),
        ("raise RuntimeError('not this')", "RuntimeError: not this"),
        ("return Routing(x[..., :2].argsort(), x[..., :2], x[..., :3], x)", r"scores are \(2, 4, 3\)"),
        ("return Routing(x[..., :2].argsort(), x[..., :2], x[..., :8], None)", "logits are NoneType"),
        ("exit(3)", "SystemExit: 3"),
    ],
)
def test_a_custom_router_that_fails_leaves_nothing_behind(tiny, tmp_path, monkeypatch, body, said):
    text = f"""
import torch
from moe import Routing


class Odd(torch.nn.Module):
    def forward(self, x):
        {body}
"""
    name = f"odd_router_{abs(hash(body))}"
    (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    ungrouped = {"num_groups": 1, "top_groups": 1, "routed_scaling_factor": 1.0}
    config = tiny(moe={"router": f"{name}:Odd", **ungrouped})
    with pytest.raises(ValueError, match=rf"^{name}:Odd: a first pass fails: .*{said}") as caught:
        train.train(config, tmp_path / "run")
    assert "\n" not in str(caught.value) and not (tmp_path / "run").exists()


def test_custom_parts_are_tried_on_a_copy(tiny):
    ungrouped = {"num_groups": 1, "top_groups": 1, "routed_scaling_factor": 1.0}
    annealed = {"router": "exercises.projects.annealed:AnnealedRouter", "arguments": {"passes": 7}}
    model = Transformer(tiny(moe=ungrouped | annealed).model)
    parts.try_parts(model.train())
    assert [router.passed for router in model.routers()] == [0, 0]
