"""A bundle answers for a CSV or a folder of pictures, row by row, or says which row does not fit."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper
from PIL import Image

from fedkit.deploy import runtime
from fedkit.deploy.passport import TensorFacts
from fedkit.deploy.predict import predict
from fedkit.deploy.rows import Pictures, Table
from fedkit.deploy.verify import Verified, verify_bundle
from fedkit.errors import ConfigError, ExportError, FedkitError, StorageError

ROWS = np.random.default_rng(1).normal(size=(700, 13)).astype(np.float32)
HEADS = [f"f{i}" for i in range(13)]


@pytest.fixture(scope="module")
def verified(made: Path) -> Verified:
    return verify_bundle(made)


def lines(*rows: Any) -> str:
    return "".join(",".join(map(str, row)) + "\n" for row in rows)


def read(path: Path) -> list[list[str]]:
    with open(path, newline="") as file:
        return list(csv.reader(file))


def other(verified: Verified, nodes: list[Any], inputs: list[TensorFacts], outputs: list[TensorFacts]) -> Verified:
    """The bundle with another network in place of its own, as if it had been verified."""
    kinds = {"float32": TensorProto.FLOAT, "int64": TensorProto.INT64, "uint8": TensorProto.UINT8}
    values = [
        [helper.make_tensor_value_info(one.name, kinds[one.dtype], one.shape) for one in x] for x in (inputs, outputs)
    ]
    graph = helper.make_graph(nodes, "g", *values)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    task = verified.passport.task.replace(inputs=inputs, outputs=outputs)
    models = dict.fromkeys(verified.models, model.SerializeToString())
    return dataclasses.replace(verified, passport=verified.passport.replace(task=task), models=models)


def tensor(name: str, dtype: str, *dims: int | None) -> TensorFacts:
    return TensorFacts(name=name, dtype=dtype, shape=[None, *dims])


def test_each_row_has_the_answer_of_the_shipped_network(verified: Verified, tmp_path: Path) -> None:
    (tmp_path / "in.csv").write_text(lines(HEADS, *ROWS.tolist()))
    seen: list[tuple[int, int]] = []
    found = predict(
        verified, tmp_path / "in.csv", tmp_path / "out.csv", watch=lambda done, total: seen.append((done, total))
    )
    head, *rows = read(tmp_path / "out.csv")
    assert (head, found.rows, found.columns) == (["risk"], 700, ("risk",))
    wanted = [
        runtime.run(runtime.session(verified.shipped), {"features": part})["risk"]
        for part in np.split(ROWS, [256, 512])
    ]
    assert np.array_equal(np.array(rows, dtype=np.float32), np.concatenate(wanted))
    size = (tmp_path / "in.csv").stat().st_size
    assert [total for _, total in seen] == [size] * 3
    assert seen[-1][0] == size
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.csv", "out.csv"]


def test_columns_are_found_by_name_or_position_and_an_id_is_kept(verified: Verified, tmp_path: Path) -> None:
    shuffled = [*reversed(HEADS)]
    table = [[f"p{i}", *reversed(row)] for i, row in enumerate(ROWS[:5].tolist())]
    (tmp_path / "in.csv").write_text("\ufeff" + lines(["who", *shuffled], *table), encoding="utf-8")
    (tmp_path / "bare.csv").write_text(lines(*table))
    (tmp_path / "plain.csv").write_text(lines(*ROWS[:5].tolist()))
    ways = {
        "in.csv": Table(columns=HEADS, label="who"),
        "bare.csv": Table(columns=[str(i) for i in range(14, 1, -1)], label="1"),
        "plain.csv": Table(),
    }
    answers = {}
    for name, way in ways.items():
        predict(verified, tmp_path / name, tmp_path / "out.csv", table=way, use_fp32=True)
        answers[name] = read(tmp_path / "out.csv")
    assert answers["in.csv"][0] == ["who", "risk"]
    assert [row[0] for row in answers["in.csv"][1:]] == ["p0", "p1", "p2", "p3", "p4"]
    assert answers["bare.csv"][1:] == answers["in.csv"][1:]
    assert answers["plain.csv"] == [row[1:] for row in answers["in.csv"]]
    wanted = runtime.run(runtime.session(verified.models["model.onnx"]), {"features": ROWS[:5]})["risk"]
    assert np.array_equal(np.array(answers["plain.csv"][1:], dtype=np.float32), wanted)


GOOD = lines(HEADS, *ROWS[:3].tolist())


@pytest.mark.parametrize(
    ("text", "way", "match"),
    [
        ("", {}, "has no rows"),
        ("\n\n", {}, "has no rows"),
        (lines(HEADS), {}, "a header and no rows"),
        (GOOD + lines(["?"] * 13), {}, r"line 5: column f0 is '\?', and not a finite number"),
        (GOOD + "\n" + lines(["", *ROWS[0][1:]]), {}, "line 6: column f0 is '', and not a finite number"),
        (GOOD + lines(["nan", *ROWS[0][1:]]), {}, "line 5: column f0 is 'nan'"),
        (GOOD + lines(["1_0", *ROWS[0][1:]]), {}, "line 5: column f0 is '1_0'"),
        (GOOD + lines(["1e39", *ROWS[0][1:]]), {}, "line 5: a number is too large for float32"),
        (GOOD + lines([1, 2]), {}, "line 5: 2 cells, and not 13"),
        (lines(["1"] * 12 + ["x"]), {}, "line 1 is half numbers"),
        (lines(HEADS[:12], ROWS[0][:12]), {}, "the model takes 13 numbers a row, and 12 columns are given"),
        (GOOD, {"label": "f0"}, "takes 13 numbers a row, and 12"),
        (GOOD, {"columns": [*HEADS[:12], "age"]}, "has no column 'age'; line 1 is f0, f1"),
        (GOOD, {"columns": [*HEADS[:12], "14"]}, "has no column '14'"),
        (GOOD, {"label": "id"}, "has no column 'id'"),
        (lines([*HEADS, "f0"], [*ROWS[0], 1]), {"columns": HEADS}, "has 2 columns 'f0'"),
        (GOOD, {"has_header": False}, "line 1: column 1 is 'f0'"),
        (GOOD, {"has_header": False, "columns": HEADS}, "a column is given by its name, which needs a header"),
        ('"' + GOOD, {}, "is not a CSV in UTF-8"),
        (GOOD + "x" * 200_000, {}, "is not a CSV in UTF-8"),
    ],
)
def test_a_table_that_does_not_fit_is_refused_with_the_line(
    text: str, way: dict, match: str, verified: Verified, tmp_path: Path
) -> None:
    (tmp_path / "in.csv").write_text(text)
    with pytest.raises(ConfigError, match=match):
        predict(verified, tmp_path / "in.csv", tmp_path / "out.csv", table=Table(batch=2, **way))
    assert [path.name for path in tmp_path.iterdir()] == ["in.csv"]


@given(st.binary(max_size=300) | st.text("0123456789.,-e\n\"'\r x", max_size=300).map(str.encode))
def test_any_bytes_are_answered_or_refused(verified, tmp_path_factory, content):
    folder = tmp_path_factory.getbasetemp()
    (folder / "any.csv").write_bytes(content)
    with contextlib.suppress(FedkitError):
        found = predict(verified, folder / "any.csv", folder / "any.out", table=Table(columns=["1"] * 13))
        assert found.rows == len(read(folder / "any.out")) - 1 > 0


def test_numbers_as_names_of_columns_need_to_be_called_a_header(verified: Verified, tmp_path: Path) -> None:
    (tmp_path / "in.csv").write_text(lines(range(13), ROWS[0]))
    assert predict(verified, tmp_path / "in.csv", tmp_path / "out.csv").rows == 2
    assert predict(verified, tmp_path / "in.csv", tmp_path / "out.csv", table=Table(has_header=True)).rows == 1


def test_nothing_is_written_over_the_input_or_into_the_bundle(verified: Verified, tmp_path: Path) -> None:
    (tmp_path / "in.csv").write_text(GOOD)
    for out, match in (
        (tmp_path / "in.csv", "is the input"),
        (tmp_path, "or a folder"),
        (verified.folder / "out.csv", "lies in the bundle"),
        (tmp_path / ".." / verified.folder.parent.name / "bundle" / "x" / "out.csv", "lies in the bundle"),
    ):
        with pytest.raises(ConfigError, match=match):
            predict(verified, tmp_path / "in.csv", out)
    with pytest.raises(StorageError, match="it must be possible to write there"):
        predict(verified, tmp_path / "in.csv", tmp_path / "in.csv" / "out.csv")
    with pytest.raises(ConfigError, match=r"missing\.csv: No such file"):
        predict(verified, tmp_path / "missing.csv", tmp_path / "out.csv")
    assert verify_bundle(verified.folder)


def test_an_output_of_several_columns_also_says_which_is_the_largest(verified: Verified, tmp_path: Path) -> None:
    nodes = [helper.make_node("Neg", ["x"], ["y"]), helper.make_node("Cast", ["x"], ["z"], to=TensorProto.INT64)]
    outputs = [tensor("y", "float32", 3), tensor("z", "int64", 3)]
    bundle = other(verified, nodes, [tensor("x", "float32", 3)], outputs)
    (tmp_path / "in.csv").write_text("1.5,2,0.25\n0,-7,9\n")
    predict(bundle, tmp_path / "in.csv", tmp_path / "out.csv")
    assert read(tmp_path / "out.csv") == [
        ["y_0", "y_1", "y_2", "y_argmax", "z_0", "z_1", "z_2", "z_argmax"],
        ["-1.5", "-2.0", "-0.25", "2", "1", "2", "0", "1"],
        ["-0.0", "7.0", "-9.0", "1", "0", "-7", "9", "2"],
    ]


def test_whole_numbers_are_whole_and_rows_may_have_any_fixed_shape(verified: Verified, tmp_path: Path) -> None:
    nodes = [helper.make_node("Add", ["x", "x"], ["y"])]
    bundle = other(verified, nodes, [tensor("x", "int64", 2, 2)], [tensor("y", "int64", 2, 2)])
    (tmp_path / "in.csv").write_text("1,2,3,9007199254740993\n")
    predict(bundle, tmp_path / "in.csv", tmp_path / "out.csv")
    assert read(tmp_path / "out.csv") == [["y_0_0", "y_0_1", "y_1_0", "y_1_1"], ["2", "4", "6", "18014398509481986"]]
    for cell in ("1.5", str(1 << 63)):
        (tmp_path / "in.csv").write_text(f"a,b,c,d\n1,2,3,{cell}\n")
        with pytest.raises(ConfigError, match=r"line 2: column d is .*, and not a whole number of int64"):
            predict(bundle, tmp_path / "in.csv", tmp_path / "out.csv")


def test_models_that_take_no_table_say_so(verified: Verified, tmp_path: Path) -> None:
    (tmp_path / "in.csv").write_text("1,2\n")
    add = [helper.make_node("Add", ["x", "w"], ["y"])]
    two = other(verified, add, [tensor("x", "float32", 2), tensor("w", "float32", 2)], [tensor("y", "float32", 2)])
    with pytest.raises(ConfigError, match="the model takes 2 inputs"):
        predict(two, tmp_path / "in.csv", tmp_path / "out.csv")
    double = [helper.make_node("Add", ["x", "x"], ["y"])]
    free = other(verified, double, [tensor("x", "float32", None)], [tensor("y", "float32", None)])
    with pytest.raises(ConfigError, match="x has dimensions that vary"):
        predict(free, tmp_path / "in.csv", tmp_path / "out.csv")
    total = [helper.make_node("ReduceSum", ["x"], ["y"], keepdims=0)]
    summed = other(verified, total, [tensor("x", "float32", 2)], [TensorFacts(name="y", dtype="float32", shape=[])])
    with pytest.raises(ExportError, match=r"y has shape \(\) for 1 rows"):
        predict(summed, tmp_path / "in.csv", tmp_path / "out.csv")


def test_a_network_that_fails_while_it_runs_leaves_nothing(verified: Verified, tmp_path: Path) -> None:
    table = onnx.numpy_helper.from_array(np.zeros((2, 1), np.float32), "t")
    nodes = [helper.make_node("Constant", [], ["t"], value=table), helper.make_node("Gather", ["t", "x"], ["y"])]
    bundle = other(verified, nodes, [tensor("x", "int64", 1)], [tensor("y", "float32", 1, 1)])
    (tmp_path / "in.csv").write_text("0\n1\n5\n")
    with pytest.raises(ExportError, match="ONNX Runtime does not run the file"):
        predict(bundle, tmp_path / "in.csv", tmp_path / "out.csv", table=Table(batch=2))
    assert [path.name for path in tmp_path.iterdir()] == ["in.csv"]


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i, name in enumerate(("b.png", "a.PNG", "c.jpg")):
        Image.new("RGB", (3, 2), (0, 51 * i, 255)).save(folder / name)
    (folder / "notes.txt").write_text("not a picture")
    return folder


def test_pictures_are_answered_in_the_order_of_their_names(verified: Verified, pictures: Path, tmp_path: Path) -> None:
    nodes = [helper.make_node("Identity", ["x"], ["y"])]
    bundle = other(verified, nodes, [tensor("x", "float32", 3, 2, 3)], [tensor("y", "float32", 3, 2, 3)])
    found = predict(bundle, pictures, tmp_path / "out.csv", pictures=Pictures(batch=2))
    head, *rows = read(tmp_path / "out.csv")
    assert (found.rows, head[0], head[1], len(head)) == (3, "file", "y_0_0_0", 19)
    assert [row[0] for row in rows] == ["a.PNG", "b.png", "c.jpg"]
    assert [float(rows[0][place]) for place in (1, 7, 13)] == [0.0, pytest.approx(0.2), 1.0]
    predict(bundle, pictures, tmp_path / "out.csv", pictures=Pictures(values="byte"))
    assert [float(read(tmp_path / "out.csv")[1][place]) for place in (1, 7, 13)] == [0.0, 51.0, 255.0]
    grey = other(verified, nodes, [tensor("x", "uint8", 1, 2, 3)], [tensor("y", "uint8", 1, 2, 3)])
    predict(grey, pictures, tmp_path / "out.csv")
    assert read(tmp_path / "out.csv")[1][1] == "59"  # ITU-R 601: 0.587 x 51 + 0.114 x 255


def test_pictures_that_do_not_fit_are_named(verified: Verified, pictures: Path, tmp_path: Path) -> None:
    nodes = [helper.make_node("Identity", ["x"], ["y"])]
    bundle = other(verified, nodes, [tensor("x", "float32", 3, 4, 4)], [tensor("y", "float32", 3, 4, 4)])
    with pytest.raises(ConfigError, match=r"a\.PNG is 3 x 2 pixels, and the model takes 4 x 4"):
        predict(bundle, pictures, tmp_path / "out.csv")
    with pytest.raises(ConfigError, match=r"features takes rows of shape \[13\]"):
        predict(verified, pictures, tmp_path / "out.csv")
    whole = (pictures / "b.png").read_bytes()
    for content in (b"", b"GIF89a", whole[:40], whole[: len(whole) // 2 + 8]):
        (pictures / "a.PNG").write_bytes(content)
        small = other(verified, nodes, [tensor("x", "float32", 3, 2, 3)], [tensor("y", "float32", 3, 2, 3)])
        with pytest.raises(ConfigError, match=r"a\.PNG cannot be read as a picture"):
            predict(small, pictures, tmp_path / "out.csv")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="holds no picture"):
        predict(bundle, tmp_path / "empty", tmp_path / "out.csv")
    assert not (tmp_path / "out.csv").exists()
