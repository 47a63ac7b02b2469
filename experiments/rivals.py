"""How do Llama's, Mixtral's and Qwen's architectures compare with DeepSeek's?

lm experiment rivals [--quick]  ->  experiments/results/rivals.json and .png

Claim: at equal active parameters DeepSeek's architecture, MLA and many experts of which one is shared, has
the lowest loss and the smallest cache (DeepSeek-V2, arXiv 2405.04434 section 2; DeepSeekMoE, arXiv
2401.06066). Prediction: the MoEs have a lower loss than the dense Llama, and DeepSeek's the lowest of the
MoEs.

The presets toy, toy-llama, toy-mixtral and toy-qwen have the same training settings; each uses its model's
balancing method. 600 steps are a quarter of the toy's training. Times are those of the fastest step, with the
models measured in turns.
"""

import dataclasses

from lm import count
from lm.config import Config

from . import command, common

PRESETS = {"DeepSeek": "toy", "Llama": "toy-llama", "Mixtral": "toy-mixtral", "Qwen": "toy-qwen"}


def main(arguments: list[str] | None = None) -> None:
    """Train the four presets."""
    given = command.options("rivals", __doc__, 600, arguments)
    text = common.base(given).data
    configs = {
        f"{style} style": dataclasses.replace(
            common.changed(Config.preset(preset), train={"dtype": "float32"}), data=text
        )
        for style, preset in PRESETS.items()
    }
    print(f"step times of {len(configs)} models", flush=True)
    seconds = common.step_seconds(configs, 2 if given.quick else 10)
    rows = common.train_all(configs, given)
    losses = common.last(rows)
    first, second, *others = sorted(losses, key=lambda name: common.mean(losses[name]))
    ahead = common.shown(common.paired(rows, second, first), 4)
    answer = [
        f"From the lowest loss to the highest: {', '.join((first, second, *others))}; the first leads by "
        f"{ahead}."
    ]
    table = [["", "parameters", "active", "numbers cached a token", "ms a step", "held-out loss"]]
    for name, config in configs.items():
        cached, step = f"{count.cache_elements_per_token(config.model)}", f"{1e3 * seconds[name]:.0f}"
        table.append([name, *common.size_cells(config), cached, step, common.shown(losses[name])])
    dense, ours = "Llama style", "DeepSeek style"
    moes = [name for name in configs if name != dense]
    ahead_of_dense = [common.paired(rows, dense, name) for name in moes]
    ahead_of_moes = [common.paired(rows, name, ours) for name in moes if name != ours]
    claimed = common.as_claimed(*ahead_of_dense, *ahead_of_moes)
    common.write("rivals", given, claimed, answer, table, rows, configs, step_seconds=seconds)
    common.draw_losses("rivals", given, losses)


if __name__ == "__main__":
    main()
