"""How fast language models write: weights are random, and what is written says nothing.

    python -m experiments.generation_speed --config=configs/generation_speed.py:1.4b --json=FILE
    python -m experiments.generation_costs             # the table and the figures, of what the first command recorded

Presets are WHAT,SIZE in any order; 1.4b,full where nothing is said.
    WHAT  1.4b   Mamba-2 (arXiv:2405.21060) and Mamba (arXiv:2312.00752) of the published shapes, 48 layers of width
                 2048, and a Transformer of as many parameters, to 3 %: 24 layers of width 2048, 16 heads of rotary
                 attention, gated MLPs of 5,632. Prompts of 2,048 tokens, 128 more each, as in Mamba's figure 8
          step   one decode step of 24 layers of width 2048 at batch 128 (the shape of Mamba-3's table 7,
                 arXiv:2603.15569), of Mamba, Mamba-2 and Mamba-3: the kernels beside XLA
    SIZE  full   bfloat16 weights, activations and caches; the state space models' states are float32
          smoke  the same, tiny
`comparisons` names what is compared with `baseline`, each with a model's fields. Batches grow from first_batch by
`growth` until memory ends or at largest_batch; every power of two is --config.growth=2, and takes twice as long, which
is mostly compilation. state_lengths: tokens after which a row's state is counted.
"""

from ml_collections import ConfigDict

from configs import choose

WHAT = ("1.4b", "step")
SIZES = ("full", "smoke")
MIXERS = {
    "mamba": {"state_size": 16, "form": "auto"},
    "mamba2": {"state_size": 128, "head_size": 64, "form": "auto"},
    "mamba3": {"state_size": 128, "head_size": 64, "form": "auto"},
    "attention": {"heads": 16, "window": 2176, "cache_dtype": "bfloat16"},
}


def get_config(preset: str = "") -> ConfigDict:
    what, size = choose(preset, what=WHAT, size=SIZES)
    config = ConfigDict()
    config.preset = f"{what},{size}"
    config.seed = 0
    config.prompt, config.new_tokens = 2048, 128
    config.prompts_at_once = 8
    config.tokens_at_once = 32  # in one compiled program
    config.first_batch, config.growth, config.largest_batch = 1, 8, 1024
    config.state_lengths = tuple(2**k for k in range(10, 21, 2))
    if what == "1.4b":
        config.op, config.baseline = "generation", "transformer"
        models = {name: _model(name, depth=48) for name in ("mamba", "mamba2")}
        config.comparisons = {"generation": {"transformer": _model("attention", depth=24, mlp_size=5632), **models}}
    else:
        config.op, config.baseline = "decode_step", "chunked"
        config.prompt, config.state_lengths = 0, ()
        config.first_batch = config.largest_batch = 128
        config.comparisons = {
            name: {form: _model(name, depth=24, form=form) for form in ("auto", "chunked")}
            for name in ("mamba", "mamba2", "mamba3")
        }
    if size == "smoke":
        _smoke(config)
    return config


def _model(mixer: str, depth: int, mlp_size: int = 0, **options: str) -> dict:
    return {
        "pattern": mixer,
        "mixers": {mixer: MIXERS[mixer] | options},
        "vocabulary": 50288,
        "width": 2048,
        "depth": depth,
        "mlp_size": mlp_size,
        "dtype": "bfloat16",
    }


def _smoke(config: ConfigDict) -> None:
    config.prompt, config.new_tokens = min(config.prompt, 8), 4
    config.prompts_at_once, config.tokens_at_once = 2, 2
    config.first_batch, config.growth, config.largest_batch = 1, 2, 4
    if config.state_lengths:
        config.state_lengths = (16, 64)
    for models in config.comparisons.values():
        for model in models.values():
            model.update({"vocabulary": 16, "width": 8, "depth": 2, "mlp_size": min(model.mlp_size, 16)})
            for options in model.mixers.values():
                for field, value in {"state_size": 4, "head_size": 4, "heads": 2, "window": 12}.items():
                    if field in options:
                        options[field] = value
