from __future__ import annotations

import gzip
import json
import os
import re
import runpy
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
FASHION_FILES = {
    "train": ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"),
    "test": ("t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"),
}
BYTE = 0x08


def run(name: str, cwd: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The example as a user runs it, from a folder of their own."""
    environment = {key: value for key, value in os.environ.items() if key != "FEDKIT_DATA"}
    command = [sys.executable, str(EXAMPLES / name / "main.py"), *arguments]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=120)


def run_here(name: str, monkeypatch: pytest.MonkeyPatch, *arguments: str, program: str = "main.py") -> None:
    """The example as `python main.py` runs it, but in this process, which has loaded torch already."""
    monkeypatch.delenv("FEDKIT_DATA", raising=False)
    monkeypatch.setattr(sys, "argv", [program, *arguments])
    monkeypatch.syspath_prepend(EXAMPLES / name)
    runpy.run_path(str(EXAMPLES / name / program), run_name="__main__")


def is_as_in_readme(text: str, name: str, block: int = 0) -> bool:
    """Whether these are the lines that the example's README shows, with any numbers."""
    blocks = re.findall(r"^```\n(.*?)^```$", (EXAMPLES / name / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    shown = blocks[block]
    return re.sub(r" *[\d.]+", "0", text) == re.sub(r" *[\d.]+", "0", shown)


def number(pattern: str, text: str) -> float:
    found = re.search(pattern, text)
    assert found, f"{pattern!r} is not in:\n{text}"
    return float(found[1])


def write_idx(path: Path, shape: tuple[int, ...], values: bytes, *, zeros: int = 0, dtype: int = BYTE) -> None:
    header = struct.pack(f">HBB{len(shape)}I", zeros, dtype, len(shape), *shape)
    path.write_bytes(gzip.compress(header + values, compresslevel=1))


@pytest.fixture
def garments(tmp_path: Path) -> Path:
    """The four files of a tiny Fashion-MNIST whose class is where the bright band lies."""
    for (images_file, labels_file), count in zip(FASHION_FILES.values(), (400, 100), strict=True):
        rng = np.random.default_rng(count)
        labels = rng.permutation(np.arange(count) % 10).astype(np.uint8)
        images = rng.integers(0, 60, size=(count, 28, 28), dtype=np.uint8)
        for image, label in zip(images, labels, strict=True):
            image[2 * label : 2 * label + 6] += 180
        write_idx(tmp_path / images_file, images.shape, images.tobytes())
        write_idx(tmp_path / labels_file, labels.shape, labels.tobytes())
    return tmp_path


@pytest.mark.parametrize("folder", sorted(path.parent.name for path in EXAMPLES.glob("*/main.py")))
def test_every_example_says_what_it_shows_and_how_it_is_run(folder):
    readme = (EXAMPLES / folder / "README.md").read_text()
    assert f"python examples/{folder}/main.py" in readme


def test_digits_learns_with_both_strategies_from_skewed_clients(monkeypatch, capsys):
    run_here("digits", monkeypatch, "--rounds", "2", "--seeds", "3")
    text = capsys.readouterr().out
    assert is_as_in_readme(text, "digits")
    assert number(r"\nmean +(\d\.\d+) ", text) > 0.15
    assert number(r"\nmean +\d\.\d+ +(\d\.\d+)", text) > 0.15


def test_digits_names_an_argument_that_makes_no_sense(monkeypatch):
    with pytest.raises(SystemExit, match="error: alpha must be a number from 1e-06"):
        run_here("digits", monkeypatch, "--alpha", "0")


def test_custom_strategy_beats_fedavg_and_survives_an_interruption(monkeypatch, capsys):
    run_here("custom_strategy", monkeypatch, "--rounds", "4")
    text = capsys.readouterr().out
    assert number(r"FedNesterov +test accuracy (\S+)", text) > number(r"FedAvg +test accuracy (\S+)", text) > 0.3
    assert "\nstopped after round 2\ntaken up again: 4 rounds, the same model and state, bit for bit\n" in text
    assert is_as_in_readme(text, "custom_strategy")


@pytest.mark.parametrize("split", ["iid", "shards"])
def test_fashion_learns_from_idx_files_split_into_equal_parts(garments, monkeypatch, capsys, split):
    arguments = ["--split", split, "--clients", "4", "--rounds", "3"]
    run_here("fashion", monkeypatch, "--data", str(garments), *arguments)
    text = capsys.readouterr().out
    assert len(re.findall(r"^client-\d\d +100 images", text, re.MULTILINE)) == 4
    assert number(r"test accuracy (\S+)", text) > 0.5


def test_fashion_splits_with_label_skew_unless_told_otherwise(garments, monkeypatch, capsys):
    run_here("fashion", monkeypatch, "--data", str(garments), "--rounds", "1")
    assert is_as_in_readme(capsys.readouterr().out, "fashion")


def test_private_fashion_learns_within_its_epsilon(garments, monkeypatch, capsys):
    arguments = ["--clients", "2", "--rounds", "20", "--epsilon", "8"]
    run_here("fashion", monkeypatch, "--data", str(garments), *arguments, program="private.py")
    text = capsys.readouterr().out
    assert is_as_in_readme(text, "fashion", 1)
    assert number(r"test accuracy (\S+)", text) > 0.5
    assert 7.0 < number(r"at epsilon (\d\.\d+)", text) <= 8.0


def test_private_fashion_learns_with_one_noise_for_all_clients(garments, monkeypatch, capsys):
    arguments = ["--clients", "4", "--rounds", "20", "--epsilon", "8", "--shared"]
    run_here("fashion", monkeypatch, "--data", str(garments), *arguments, program="private.py")
    text = capsys.readouterr().out
    assert number(r"test accuracy (\S+)", text) > 0.5
    assert 7.0 < number(r"at epsilon (\d\.\d+)", text) <= 8.0


def names_of(text: str) -> list[str]:
    return re.findall(r"^(float32|int8.*?) +\d+\.\d+%", text, re.MULTILINE)


@pytest.mark.unmeasured
def test_quantized_fashion_compares_what_is_deployed_in_8_bits(garments, tmp_path, monkeypatch, capsys):
    arguments = ["--blocks", "1", "--clients", "2", "--rows", "100", "--rounds", "1", "--out", str(tmp_path / "models")]
    run_here("fashion", monkeypatch, "--data", str(garments), *arguments, program="quantized.py")
    text = capsys.readouterr().out
    assert names_of(text) == names_of((EXAMPLES / "fashion" / "README.md").read_text())
    sizes = [int(size.replace(",", "")) for size in re.findall(r" (\d+,\d[\d,]+) ", text)]
    assert len(sizes) == 3
    assert max(sizes[1:]) < 0.4 * sizes[0]
    for name in ("after", "during"):
        assert (tmp_path / "models" / name / "model.int8.onnx").is_file()


@pytest.mark.parametrize(
    ("shape", "values", "header", "complaint"),
    [
        ((400,), bytes(400), {"zeros": 7}, "does not begin with two zero bytes"),
        ((400,), bytes(1600), {"dtype": 0x0D}, "the dtype code is 0x0d, expected 0x08"),
        ((400, 28, 28), bytes(400 * 784), {}, "3 dimensions, expected 1: are images and labels swapped?"),
        ((0,), b"", {}, "the shape is 0, expected (1 to 100,000)"),
        ((2**32 - 1,), bytes(400), {}, "the shape is 4294967295, expected (1 to 100,000)"),
        ((400,), bytes(399), {}, "the values of shape 400 need 400 bytes, the file holds only 399 more"),
        ((400,), bytes(401), {}, "there is more than the values of shape 400"),
        ((399,), bytes(399), {}, "400 train images but 399 labels"),
        ((400,), bytes([10] * 400), {}, "there is a train label 10, expected 0 to 9"),
    ],
)
def test_fashion_names_what_is_wrong_with_an_idx_file(garments, monkeypatch, shape, values, header, complaint):
    write_idx(garments / FASHION_FILES["train"][1], shape, values, **header)
    assert complaint in fashion_error(garments, monkeypatch)


@pytest.mark.parametrize("cut", [0, 1, 12, 30])
def test_fashion_names_a_file_that_was_cut_short(garments, monkeypatch, cut):
    path = garments / FASHION_FILES["train"][0]
    path.write_bytes(path.read_bytes()[:cut])
    error = fashion_error(garments, monkeypatch)
    assert path.name in error
    assert "fetch the file again" in error


def test_fashion_names_images_of_another_size(garments, monkeypatch):
    write_idx(garments / FASHION_FILES["test"][0], (100, 32, 32), bytes(100 * 1024))
    assert "the shape is 100 x 32 x 32, expected (1 to 100,000) x 28 x 28" in fashion_error(garments, monkeypatch)


def test_fashion_names_the_files_that_are_missing(garments, monkeypatch):
    (garments / FASHION_FILES["test"][1]).unlink()
    assert "there is no t10k-labels-idx1-ubyte.gz: give --data" in fashion_error(garments, monkeypatch)


def fashion_error(folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """What the example ends with."""
    with pytest.raises(SystemExit) as ended:
        run_here("fashion", monkeypatch, "--data", str(folder))
    message = str(ended.value.code)
    assert message.startswith("error: ")
    return message


def test_shakespeare_learns_from_the_passages_that_come_with_it(monkeypatch, capsys):
    run_here("shakespeare", monkeypatch, "--roles", "2", "--rounds", "3")
    text = capsys.readouterr().out
    assert number(r"2 roles together: test accuracy (\S+)", text) > number(r"commonest character: (\S+)", text)
    assert "the model writes: 'My lord" in text


def test_shakespeare_learns_from_a_folder_and_leaves_out_roles_that_say_too_little(tmp_path, monkeypatch, capsys):
    roles = {"FIRST": "to be, or not to be. " * 40, "SECOND": "not to be, or to be: " * 30, "THIRD": "Ay."}
    (tmp_path / "roles.json.gz").write_bytes(gzip.compress(json.dumps(roles).encode()))
    run_here("shakespeare", monkeypatch, "--data", str(tmp_path), "--rounds", "3", "--steps", "6")
    text = capsys.readouterr().out
    assert number(r"2 roles together: test accuracy (\S+)", text) > number(r"commonest character: (\S+)", text)
    assert "THIRD" not in text


def test_tabular_scores_each_client_and_all_together_above_chance(monkeypatch, capsys):
    run_here("tabular", monkeypatch, "--rounds", "4")
    text = capsys.readouterr().out
    lines = dict(re.findall(r"^(\w+) +(\d\.\d+) +\d\.\d+$", text, re.MULTILINE))
    assert set(lines) == {"all", "harbour", "hills", "market", "station"}
    assert float(lines["all"]) > 0.7
    assert is_as_in_readme(text, "tabular")


def test_tabular_names_file_row_column_and_what_is_allowed_for_an_unknown_category(tmp_path):
    shutil.copytree(EXAMPLES / "tabular" / "data", tmp_path / "data")
    path = tmp_path / "data" / "hills.csv"
    lines = path.read_text().splitlines()
    lines[4] = "42,48025,0.377,castle,unemployed,1"
    path.write_text("\n".join(lines))
    done = run("tabular", tmp_path, "--data", "data")
    assert done.returncode != 0
    assert done.stdout == ""
    assert done.stderr == (
        "error: data/hills.csv, row 5, column 'housing': unknown category 'castle', allowed are own, rent, mortgage\n"
    )
