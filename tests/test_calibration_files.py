"""Risk: transforms are fitted on numbers that are none, or a file of another kind is met with advice to unpickle it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from pi05_small import observations

from qlibero.errors import UserError
from qlibero.policies.base import Observation
from qlibero.quant.observations import read_demonstrations, write_demonstrations


def with_state(index: int, place: int, value: float, count: int = 4) -> list[Observation]:
    made = observations(count)
    state = made[index].state.astype(np.float64)
    state[place] = value
    made[index] = Observation(made[index].image, made[index].wrist_image, state, made[index].prompt)
    return made


@pytest.mark.parametrize(("value", "said"), [(np.nan, "NaN"), (np.inf, "infinity"), (-np.inf, "infinity")])
@pytest.mark.parametrize(("index", "place"), [(0, 0), (2, 6), (3, 7)])
def test_a_number_that_is_none_is_named_with_its_observation_and_key(tmp_path, value, said, index, place):
    path = write_demonstrations(tmp_path / "c.npz", with_state(index, place, value), "made up")
    with pytest.raises(
        UserError, match=rf"state of observation {index} holds \w* ?{said} \(value {place}\)(.|\n)*states"
    ):
        read_demonstrations(path)


def arrays(directory: Path, **changes) -> dict[str, np.ndarray]:
    """The arrays of a good file of two observations, some of them exchanged (None: left out)."""
    with np.load(write_demonstrations(directory / "good.npz", observations(2), "made up")) as file:
        found = dict(file)
    return {key: value for key, value in {**found, **changes}.items() if value is not None}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"jpeg": None}, "no array jpeg"),
        ({"jpeg": None, "source": None}, "no array jpeg, source"),
        ({"states": np.zeros((2, 7), np.float32)}, r"states is float32 \(2, 7\)"),
        ({"states": np.zeros(16, np.float32)}, r"states is float32 \(16,\)"),
        ({"states": np.zeros((2, 8), np.complex64)}, "states is complex64"),
        ({"states": np.full((2, 8), 1e300)}, "state of observation 0 holds an infinity"),
        ({"states": np.array([[{}] * 8] * 2, dtype=object)}, "states holds Python objects"),
        ({"states": np.zeros((3, 8), np.float32)}, "4 images, 3 states and 2 prompts"),
        ({"states": np.zeros((0, 8), np.float32)}, "4 images, 0 states"),
        ({"prompts": np.array([b"x", b"y"])}, "prompts is"),
        ({"prompts": np.array("one")}, "prompts is"),
        ({"offsets": np.array([0, 5, 9, 12, 10**9])}, r"image 3 \(observation 1, wrist\): offsets 12 to 1000000000"),
        ({"offsets": np.array([0, 9, 5, 12, 14])}, "image 1 .*: offsets 9 to 5"),
        ({"offsets": np.array([0.0, 1, 2, 3, 4])}, "offsets is float64"),
        ({"jpeg": np.zeros(10**6, np.uint8)}, r"image 0 \(observation 0, agentview\): its bytes are no image"),
    ],
    ids=str,
)
def test_what_is_wrong_in_an_npz_is_named(tmp_path, changes, said):
    np.savez(tmp_path / "c.npz", **arrays(tmp_path, **changes))
    with pytest.raises(UserError, match=said) as refused:
        read_demonstrations(tmp_path / "c.npz")
    assert "allow_pickle" not in str(refused.value) and len(str(refused.value)) < 800


def test_files_of_other_kinds_are_named_with_the_way_to_the_right_one(tmp_path):
    (tmp_path / "data.hdf5").write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(64))
    (tmp_path / "data.parquet").write_bytes(b"PAR1" + bytes(64))
    np.save(tmp_path / "array.npy", np.zeros(3))
    np.save(tmp_path / "objects.npy", np.array([{}], dtype=object), allow_pickle=True)
    np.savez(tmp_path / "lerobot.npz", **{"observation.state": np.zeros((4, 8)), "action": np.zeros((4, 7))})
    (tmp_path / "pickle.npz").write_bytes(b"\x80\x04\x95")
    (tmp_path / "empty.npz").write_bytes(b"")
    (tmp_path / "cut.npz").write_bytes(b"PK\x03\x04" + bytes(100))
    (tmp_path / "dataset").mkdir()
    said = {
        "data.hdf5": "an HDF5 file",
        "data.parquet": "a Parquet file",
        "array.npy": "a single NumPy array",
        "objects.npy": "a single NumPy array",
        "lerobot.npz": r"no array jpeg, offsets, states, prompts, source \(it holds observation.state, action\)",
        "pickle.npz": "no .npz file",
        "empty.npz": "no .npz file",
        "cut.npz": "damaged",
        "dataset": "a directory",
        "missing.npz": "No such file",
    }
    for name, words in said.items():
        with pytest.raises(UserError, match=words) as refused:
            read_demonstrations(tmp_path / name)
        message = str(refused.value)
        assert "write_demonstrations" in message and "pickle=" not in message and "allow_pickle" not in message
