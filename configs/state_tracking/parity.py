"""x"""

from ml_collections import ConfigDict

from configs import choose, state_tracking

SIZES = ("demo", "paper", "smoke")
PUBLISHED = {"mamba3": 100.0, "mamba3_fixed": 1.56, "mamba3_none": 2.27, "mamba2": 0.90}


def get_config(preset: str = "") -> ConfigDict:
    model, size = choose(preset, model=state_tracking.MODELS, size=SIZES)
    task = {
        "name": "parity",
        "metric": "scaled_accuracy",
        "min_length": 3,
        "lengths": (40, 80, 120, 160),
        "stage_steps": 10000,
        "test_length": 256,
        "test_examples": 8192,
        "eval_lengths": (512, 1024, 2048),
        "eval_examples": 1024,
        "scored": "last",
    }
    source = "Lahoti et al. 2026"
    config = state_tracking.base(model, size, task, depth=1, published=PUBLISHED, source=source)
    {"demo": _demo, "paper": lambda config: None, "smoke": state_tracking.smoke}[size](config)
    return config


def _demo(config: ConfigDict) -> None:
    state_tracking.demo(config)
    config.task.update({"scored": "every", "eval_lengths": (128, 256, 512)})
