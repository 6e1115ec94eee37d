"""The rates of generation: what is timed is what the model writes, and every record follows from what was timed."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import generation_speed as configs
from experiments import commandline, generation_costs, generation_speed
from experiments.generation_speed import FULL, build, fitting, memory, read, rising, weights, write
from ssm import generation

CONFIG = "--config=configs/generation_speed.py:smoke"


@pytest.fixture
def run(monkeypatch):
    monkeypatch.setattr(generation_speed, "copy_bandwidth", lambda: 1e6)
    return lambda *arguments: commandline.run(generation_speed.main, ["generation_speed", CONFIG, *arguments])


def test_records_follow_from_what_was_timed(run, tmp_path, capsys, monkeypatch):
    """Two rows are read one after another; Mamba-2's state is 2 layers of 3 x 24 inputs and 16 x 4 states."""
    file = tmp_path / "out.jsonl"
    times = iter([dict(read=2.0, step=0.5), dict(read=3.0, step=0.5), dict(read=1.0, step=0.25), None])
    monkeypatch.setattr(generation_speed, "fitting", lambda _, measurement: measurement() and next(times))
    overrides = ["--config.largest_batch=2", "--config.prompts_at_once=1"]
    assert run(*overrides, "--only", "transformer", "--json", str(file)) == 0
    transformer = [json.loads(line) for line in file.read_text().splitlines()]
    assert [r["op"] for r in transformer] == ["state_memory", "generation", "generation"]
    assert run(*overrides, "--only", "mamba2", "--json", str(file)) == 0
    memory, one = [json.loads(line) for line in file.read_text().splitlines()[3:]]
    assert memory["tokens"] == [16, 64] and len(set(memory["bytes"])) == 1
    row = 2 * 4 * (3 * 24 + 16 * 4)
    assert one["state_bytes"] == memory["bytes"][0] == row
    assert (one["milliseconds"], one["baseline_milliseconds"]) == (250.0, None)
    assert (one["written_per_second"], one["read_per_second"], one["together_per_second"]) == (4, 8, 2)
    matrices = 2 * (8 * (2 * 16 + 8 + 4) + 16 * 8) + 16 * 8
    small = one["parameters"] - matrices
    assert one["share_of_copy_bandwidth"] == pytest.approx((2 * matrices + 4 * small + 2 * row) / 0.25 / 1e6, abs=5e-4)
    assert transformer[2]["baseline_milliseconds"] == 500.0
    assert "B2     does not fit in memory" in capsys.readouterr().out


def models():
    for name in ("transformer", "mamba2"):
        yield name, build(configs.get_config("smoke").comparisons["generation"][name].to_dict())


def test_what_is_timed_is_what_the_model_writes():
    """The tokens of `generate`, by prompts read together; and the state of all prompts at once, row by row."""
    prompts = np.random.default_rng(0).integers(0, 16, (4, 8))
    for name, model in models():
        variables = weights(model, 0)
        logits, state, seconds = read(model, variables, prompts, at_once=2)
        assert seconds > 0
        expected = generation.prefill(model, variables, prompts)
        for out, ref in zip(jax.tree.leaves((logits, state)), jax.tree.leaves(expected), strict=True):
            assert out.dtype == ref.dtype
            out, ref = (np.asarray(x, np.float32) for x in (out, ref))
            np.testing.assert_allclose(out, ref, atol=1e-2, err_msg=name)
        (_, end), tokens = write(model, variables, logits, state, 3)
        written = generation.generate(model, variables, prompts, max_tokens=3)
        np.testing.assert_array_equal(tokens.T, written.tokens_bl, err_msg=name)
        assert jax.tree.map(jnp.shape, end) == jax.tree.map(jnp.shape, written.state)


def test_weights_differ_from_layer_to_layer_and_are_kept_as_they_are_used():
    for _, model in models():
        params = weights(model, 1)["params"]
        shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 1), int))["params"]
        assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, shapes)
        kernels = [params[f"block_{i}"]["mixer"]["in_proj"]["kernel"] for i in range(2)]
        assert kernels[0].dtype == jnp.bfloat16 and jnp.any(kernels[0] != kernels[1])
        assert params["norm"]["scale"].dtype == jnp.float32


def test_models_of_one_size():
    counts = {}
    for name, fields in configs.get_config().comparisons["generation"].items():
        model = build(fields.to_dict() | {"scan_layers": True})
        shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 1), int))
        counts[name] = sum(leaf.size for leaf in jax.tree.leaves(shapes))
    assert max(counts.values()) < 1.03 * min(counts.values()), counts
    assert counts["mamba2"] == pytest.approx(1.34e9, rel=0.01)


def test_a_cache_grows_and_a_state_does_not():
    """24 layers of keys and values in 2,048 channels of bfloat16, and two numbers a row; 48 layers of states."""
    sizes = {
        name: memory(fields.to_dict(), [1024, 2**20])
        for name, fields in configs.get_config().comparisons["generation"].items()
    }
    assert sizes["transformer"] == [24 * (2 * 2048 * 2 * length + 8) for length in (1024, 2**20)]
    assert sizes["mamba2"] == [48 * 4 * (3 * 4352 + 4096 * 128)] * 2
    assert sizes["mamba"] == [48 * 4 * (3 * 4096 + 4096 * 16)] * 2


@pytest.mark.parametrize(
    ("fits", "tried"),
    [(15, [1, 4, 16, 8]), (40, [1, 4, 16, 64, 32]), (20, [1, 4, 16, 64, 32]), (999, [1, 4, 16, 64, 100]), (0, [1])],
)
def test_batches_grow_until_one_does_not_fit(fits, tried):
    config, batches = configs.get_config(), []
    config.growth, config.largest_batch = 4, 100
    rising(config, lambda batch: batches.append(batch) or batch <= fits)
    assert batches == tried


def test_memory_that_runs_out_is_no_error_and_any_other_is(monkeypatch):
    def fail(message):
        raise jax.errors.JaxRuntimeError(message)

    assert fitting(0, lambda: fail(f"{FULL}: Out of memory while trying to allocate 3 bytes")) is None
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        fitting(0, lambda: fail("INTERNAL: something else"))
    monkeypatch.setattr(generation_speed, "limit", lambda devices: 10)
    assert fitting(11, lambda: fail("INTERNAL: tried")) is None
    assert fitting(10, dict) == {}


def test_one_decode_step_of_each_form(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(generation_speed, "copy_bandwidth", lambda: 1e9)
    file = tmp_path / "steps.jsonl"
    config = "--config=configs/generation_speed.py:step,smoke"
    arguments = ["generation_speed", config, "--config.largest_batch=1", "--json", str(file)]
    assert commandline.run(generation_speed.main, arguments) == 0
    records = [json.loads(line) for line in file.read_text().splitlines()]
    named = [(r["comparison"], r["implementation"]) for r in records]
    assert named == [(model, form) for model in ("mamba", "mamba2", "mamba3") for form in ("chunked", "auto")]
    assert all(r["op"] == "decode_step" and r["baseline_milliseconds"] > 0 for r in records)
    assert records[2]["milliseconds"] == records[3]["baseline_milliseconds"]
    assert "together" not in capsys.readouterr().out
    lines = generation_costs.steps(records).splitlines()[2:]
    assert len(lines) == 3 and lines[1].startswith("| B1 P0 N4 2 x mamba2 of width 8, bfloat16 | ")


def test_wrong_input_is_one_line(run, capsys):
    assert run("--only", "mamba4") == 2
    assert "unknown --only 'mamba4'; did you mean 'mamba" in capsys.readouterr().err
    assert run("--only", "mamba2", "--config.comparisons.generation.mamba2.mixers.mamba2.state_size=0") == 2
    assert "state_size is 0" in capsys.readouterr().err


def record(name, batch, written, together, **fields):
    about = dict(op="generation", device="GPU", comparison="generation", implementation=name, batch=batch)
    about |= dict(baseline="transformer")
    rates = dict(read_per_second=9000, written_per_second=written, together_per_second=together)
    return about | rates | dict(parameters=1_340_000_000, state_bytes=2.5e9, share_of_copy_bandwidth=0.5) | fields


def test_the_table_and_the_figure_are_their_records(tmp_path):
    records = [
        record("mamba2", 8, 600, 300),
        record("transformer", 8, 200, 100),
        record("transformer", 16, 240, 200, state_bytes=1e6),
        record("transformer", 16, 9e9, 9e9, device="another"),
    ]
    assert generation_costs.table(records).splitlines()[2:5] == [
        "| transformer, 1.34 B | 8 | 2.5 GB | 9,000 | 200 | 50 % | 100 |  |  |",
        "| transformer, 1.34 B | 16 | 1.0 MB | 9,000 | 240 | 50 % | 200 |  |  |",
        "| mamba2, 1.34 B | 8 | 2.5 GB | 9,000 | 600 | 50 % | 300 | 2.5 x / 1.5 x | 3.0 x / 3.0 x |",
    ]
    states = [record(name, 1, 1, 1, op="state_memory", tokens=[4, 8], bytes=[1e6, 2e6]) for name in ("mamba2",)]
    panels = generation_costs.panels(records[:3] + states)
    assert panels[0][2] == {"transformer": [(8, 200), (16, 240)], "mamba2": [(8, 600)]}
    assert panels[2][2] == {"mamba2": [(4, 1.0), (8, 2.0)]}
    generation_costs.plots.compare(tmp_path / "generation.svg", panels)
    assert "tokens read" in (tmp_path / "generation.svg").read_text()
