import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import checkpoint


def state(step: int) -> dict:
    return {
        "params": {"kernel": jnp.arange(600.0).reshape(20, 30) + step},
        "step": jnp.asarray(step, jnp.int32),
    }


LIKE = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state(0))


def saved(folder: pathlib.Path, *steps: int, keep: int = 9, protect=()) -> pathlib.Path:
    for step in steps:
        checkpoint.save(folder, step, state(step), {"seconds": step / 3}, keep=keep, protect=protect)
    return folder


def test_restores_the_newest_with_its_extra(tmp_path):
    found = checkpoint.restore_latest(saved(tmp_path / "c", 1, 10, 2), LIKE)
    assert (found.step, found.extra, found.damaged) == (10, {"seconds": 10 / 3}, [])
    np.testing.assert_array_equal(found.state["params"]["kernel"], state(10)["params"]["kernel"])


def test_none_without_checkpoints(tmp_path):
    assert checkpoint.restore_latest(tmp_path / "c", LIKE) is None


def damages(content: bytes) -> dict[str, bytes | None]:
    flipped = bytearray(content)
    flipped[len(content) // 2] ^= 1
    return {"half": content[: len(content) // 2], "empty": b"", "flipped": bytes(flipped), "gone": None}


def test_any_damage_to_any_file_falls_back(tmp_path):
    """Without digests a flipped byte of a data file restores wrong numbers, and most other damage passes."""
    folder = saved(tmp_path / "c", 1, 2)
    files = sorted(p for p in (folder / "2").rglob("*") if p.is_file())
    assert len(files) > 5
    for file in files:
        content = file.read_bytes()
        for kind, damage in damages(content).items():
            file.unlink() if damage is None else file.write_bytes(damage)
            found = checkpoint.restore_latest(folder, LIKE)
            assert found.step == 1, (file, kind)
            assert len(found.damaged) == 1 and str(folder / "2") in found.damaged[0]
            assert file.name in found.damaged[0]
            file.write_bytes(content)
    assert checkpoint.restore_latest(folder, LIKE).step == 2


def test_all_damaged_is_an_error_and_deletes_nothing(tmp_path):
    folder = saved(tmp_path / "c", 1, 2)
    for step in (1, 2):
        (folder / str(step) / "manifest.json").write_text("{}")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match="no checkpoint can be read .*c/2: manifest.json.*c/1"):
        checkpoint.restore_latest(folder, LIKE)
    assert sorted(tmp_path.rglob("*")) == before


def test_damaged_checkpoints_are_set_aside_and_kept(tmp_path):
    folder = saved(tmp_path / "c", 1, 3)
    checkpoint.set_aside(folder, newer_than=1)
    checkpoint.set_aside(saved(folder, 3), newer_than=1)
    assert sorted(p.name for p in folder.iterdir()) == ["1", "3.damaged", "3.damaged.1"]


def test_keeps_the_newest_and_the_protected(tmp_path):
    folder = saved(tmp_path / "c", 1, 2, 3, 10, 11, keep=2, protect=[2])
    assert checkpoint.steps(folder) == [2, 10, 11]


def test_a_save_cut_short_is_cleared_and_was_never_a_checkpoint(tmp_path):
    folder = saved(tmp_path / "c", 1)
    (folder / "tmp-2" / "state").mkdir(parents=True)
    (folder / "tmp-2" / "state" / "half").write_text("x")
    assert checkpoint.restore_latest(folder, LIKE).step == 1
    assert not list(saved(folder, 2).glob("tmp-*"))
    assert checkpoint.restore_latest(folder, LIKE).step == 2


@pytest.mark.parametrize(
    ("like", "message"),
    [
        (
            {"params": {"kernel": jnp.zeros((20, 31))}, "step": LIKE["step"]},
            r"kernel is float32\[20, 30\].*31\]",
        ),
        (
            {"params": {"kernel": jnp.zeros((20, 30))}, "step": jnp.zeros(())},
            r"step is int32\[\] in it and float32",
        ),
        ({"params": {"kernel": jnp.zeros((20, 30))}}, r"step is int32\[\] in it and absent here"),
    ],
)
def test_another_model_is_named_not_called_damaged(tmp_path, like, message):
    with pytest.raises(ValueError, match=message):
        checkpoint.restore_latest(saved(tmp_path / "c", 1), like)
