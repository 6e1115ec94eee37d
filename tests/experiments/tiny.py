"""A small model with batch statistics and dropout in place of SequenceClassifier, and a config of it.

As a program it is `python -m experiments.train` with that model.
"""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))

import flax.linen as nn
import jax
import jax.numpy as jnp

from configs import smnist
from experiments import commandline, setup, train
from ssm import naming


class Tiny(nn.Module):
    width: int
    pattern: str
    encoder: str
    input_size: int
    classes: int
    dropout: float = 0.1
    poison_step: int = -1  # after this many steps the next one is NaN

    @nn.compact
    def __call__(self, inputs, lengths=None, *, train: bool = False):
        x = inputs.reshape(inputs.shape[0], -1).astype(jnp.float32) / 255
        x = nn.Dense(self.width, name="encoder")(x)
        x = nn.BatchNorm(use_running_average=not train, momentum=0.9)(x)
        x = nn.Dropout(self.dropout, deterministic=not train)(nn.gelu(x))
        count = self.variable("batch_stats", "count", lambda: jnp.zeros((), jnp.int32))
        x = nn.Dense(self.classes, name="decoder")(x)
        if train:
            x *= jnp.where(count.value == self.poison_step, jnp.nan, 1.0)
            count.value += 1
        return x


def build_model(options, task):
    ends = {"encoder": task.encoder, "input_size": task.input_size, "classes": task.classes}
    return naming.build("model", Tiny, options, **ends)


def get_config(preset=""):
    config = smnist.get_config("smoke")
    config.task.source = "idx"
    config.model = {"width": 4, "pattern": "tiny", "dropout": 0.1, "poison_step": -1}
    config.optimizer.groups = {"ssm": {"match": "encoder", "learning_rate": 1e-3, "weight_decay": 0.0}}
    config.batch_size = config.eval_batch_size = 8
    config.replicas, config.start_from = {}, ""
    return config


if __name__ == "__main__":
    setup.build_model = build_model
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    sys.exit(commandline.run(train.main))
