"""Goes on with a prompt and prints each piece of text as soon as it is drawn; the speed goes to stderr.

    python -m experiments.generate --checkpoint DIR --prompt "Once upon a time"

DIR is the folder of a published checkpoint, or ORG/NAME on the Hugging Face hub (see `ssm.pretrained`), read and
written by any tokenizer.json; or the folder of a run, or of its record, of a language model of bytes: it needs none.
"""

import argparse
import codecs
import pathlib
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax

from experiments import commandline, trained
from experiments.workdir import Workdir
from ssm import generation, pretrained
from ssm.language_model import LanguageModel
from ssm.pretrained import files


class Bytes:
    """Text as its bytes in UTF-8."""

    def encode(self, text: str) -> list[int]:
        return list(text.encode("utf-8", "surrogateescape"))

    def decoder(self, prompt: Sequence[int]) -> Callable[[int], str]:
        """Token -> the text that is complete with it: of a character, all bytes or none."""
        decode = codecs.getincrementaldecoder("utf-8")("replace").decode
        return lambda token: decode(bytes([token]))

    def token(self, text: str) -> int:
        """The token that `text` is. Raises ValueError where it is not one."""
        if len(tokens := self.encode(text)) != 1:
            raise ValueError(f"--stop {text!r} is {len(tokens)} bytes; it must be one")
        return tokens[0]


class Tokenizer:
    """Text by a tokenizer.json."""

    def __init__(self, file: pathlib.Path):
        try:
            import tokenizers
        except ImportError as error:
            raise ValueError(f"{file} needs a package: pip install tokenizers") from error
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the package raises no other type
            raise ValueError(f"{file} is no tokenizer: {error}; name one by --tokenizer FILE") from error

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text).ids

    def decoder(self, prompt: Sequence[int]) -> Callable[[int], str]:
        """As that of `Bytes`."""
        from tokenizers.decoders import DecodeStream

        stream = DecodeStream(ids=list(prompt), skip_special_tokens=True)
        return lambda token: stream.step(self._tokenizer, token) or ""

    def token(self, text: str) -> int:
        """As that of `Bytes`; a special token is written as in tokenizer.json."""
        token = self._tokenizer.token_to_id(text)
        tokens = self._tokenizer.encode(text, add_special_tokens=False).ids if token is None else [token]
        if len(tokens) != 1:
            raise ValueError(f"--stop {text!r} is {len(tokens)} tokens; it must be one")
        return tokens[0]


class Loaded(NamedTuple):
    """What goes on with a text. stop: the tokens that end it."""

    model: LanguageModel
    variables: Mapping[str, Any]
    text: Bytes | Tokenizer
    stop: tuple[int, ...]


def load(name: str, tokenizer: pathlib.Path | None = None) -> Loaded:
    """A published checkpoint, or that of a run or record, by its folder. Raises ValueError for anything else."""
    folder = pretrained.locate(name)
    if "task" in files.read_json(folder / "config.json"):
        return _of_run(folder, tokenizer)
    model, variables, config, _ = pretrained.load(folder)
    stop = config.get("eos_token_id")
    stop = tuple(stop if isinstance(stop, list) else [] if stop is None else [stop])
    return Loaded(model, variables, Tokenizer(tokenizer or folder / "tokenizer.json"), stop)


def _of_run(folder: pathlib.Path, tokenizer: pathlib.Path | None) -> Loaded:
    run = Workdir.opened(folder)
    if tokenizer is not None:
        raise ValueError(f"{folder} is a run on bytes, which need no tokenizer; leave --tokenizer out")
    if run.config["task"]["name"] != "language_model":
        raise ValueError(f"{folder} is a run of task {run.config['task']['name']}, whose model writes no text")
    return Loaded(*trained.load(folder), Bytes(), ())


def stream(loaded: Loaded, prompt: Sequence[int], **options: Any) -> Iterator[tuple[int, str]]:
    """Each token after `prompt` and the text that is complete with it; options: see `ssm.generation.stream`."""
    decode = loaded.text.decoder(prompt)
    rows = generation.stream(loaded.model, loaded.variables, [prompt], stop=loaded.stop, **options)
    tokens = (int(token) for (token,) in rows)
    return ((token, "" if token in loaded.stop else decode(token)) for token in tokens)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python -m experiments.generate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--checkpoint", required=True, metavar="DIR", help="folder, or ORG/NAME")
    add("--prompt", required=True, help="printed too")
    add("--tokenizer", type=pathlib.Path, metavar="FILE", help="default: DIR/tokenizer.json")
    add("--max-tokens", type=int, default=100)
    add("--temperature", type=float, default=0.7, help="0: the likeliest token")
    add("--top-k", type=int, default=0, help="draw from the k likeliest tokens; 0: from all")
    add("--top-p", type=float, default=1.0, help="draw from the likeliest tokens of this probability in all")
    add("--seed", type=int, default=0)
    add("--stop", action="append", default=[], metavar="TEXT", help="one token that ends the text; may be repeated")
    return parser.parse_args(argv[1:])


def main(argv: Sequence[str]) -> int:
    arguments = parse(argv)
    loaded = load(arguments.checkpoint, arguments.tokenizer)
    loaded = loaded._replace(stop=loaded.stop + tuple(loaded.text.token(text) for text in arguments.stop))
    prompt = loaded.text.encode(arguments.prompt)
    options = {name: getattr(arguments, name) for name in ("max_tokens", "temperature", "top_k", "top_p")}
    begun, times = time.perf_counter(), []
    pieces = stream(loaded, prompt, key=jax.random.key(arguments.seed), **options)
    print(arguments.prompt, end="", flush=True)
    for _, text in pieces:
        times.append(time.perf_counter())
        print(text, end="", flush=True)
    print()
    print(speed(len(prompt), [begun, *times]), file=sys.stderr)
    return 0


def speed(prompt: int, times: Sequence[float]) -> str:
    """A line; times: of the start and of each token. The rate leaves out two tokens, for which functions compile."""
    begun, *times = times
    line = f"prompt: {prompt} tokens, {times[0] - begun:.2f} s to the first new one; new: {len(times)} tokens"
    if len(times) > 2:
        line += f", {(len(times) - 2) / (times[-1] - times[1]):.1f} tokens/s"
    return line


if __name__ == "__main__":
    sys.exit(commandline.run(main))
