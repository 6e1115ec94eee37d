"""Configs: one file per result, a document that runs. They name models and tasks by strings."""

import difflib


def choose(preset: str, **choices: tuple[str, ...]) -> list[str]:
    """One value per choice from a preset such as "s4d,demo", in any order; the first is the default.

    >>> choose("paper", model=("s4d", "s5"), size=("demo", "paper"))
    ['s4d', 'paper']
    """
    chosen = {}
    for word in filter(None, preset.split(",")):
        name = next((name for name, values in choices.items() if word in values), None)
        allowed = [value for values in choices.values() for value in values]
        if name is None:
            nearest = difflib.get_close_matches(word, allowed, n=1, cutoff=0.5)
            hint = f"; did you mean {nearest[0]!r}?" if nearest else "."
            raise ValueError(f"unknown preset {word!r}{hint} Allowed: {', '.join(allowed)}")
        if name in chosen:
            raise ValueError(f"preset {preset!r} names two of {', '.join(choices[name])}")
        chosen[name] = word
    return [chosen.get(name, values[0]) for name, values in choices.items()]
