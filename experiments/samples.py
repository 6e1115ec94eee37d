"""What a language model writes while it is trained."""

import jax
import numpy as np

from experiments.steps import TrainState
from experiments.tasks.text import TextTask
from ssm import generation
from ssm.language_model import LanguageModel

PROMPT = 32  # bytes of the validation split
TEMPERATURE = 0.8


def sample(model: LanguageModel, task: TextTask, state: TrainState, tokens: int) -> str:
    """The opening of the validation text and `tokens` bytes that the model goes on with; the same at every call."""
    prompt = task.data["validation"][:PROMPT].astype(np.int32)
    written = generation.generate(
        model, {"params": state.params}, [prompt], max_tokens=tokens, temperature=TEMPERATURE, key=jax.random.key(0)
    )
    return bytes([*prompt, *written.tokens_bl[0]]).decode("utf-8", "replace")
