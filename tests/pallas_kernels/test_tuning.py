"""tuned.toml: the most specific entry wins, what is written is found, and a malformed entry is one clear line."""

from __future__ import annotations

from pathlib import Path

import pytest

from pallas_kernels import tuning


def test_the_most_specific_entry_wins(tmp_path: Path) -> None:
    file = tmp_path / "t.toml"
    file.write_text(
        '# head\n[[mm]]\nchip = "v6e"\nn = 4\nkind = "int8"\nblocks = { bm = 3 }\n[[mm]]\nchip = "v6e"\nblocks = { bm = 1, bk = 9 }\n'
        '[[mm]]\nchip = "v6e"\nn = 4\nblocks = { bm = 2 }\n[[mm]]\nchip = "v6e"\nm = 7\nblocks = { bm = 5 }\n'
    )
    find = lambda chip="v6e", op="mm", **shape: tuning.lookup(op, chip, file=file, **shape)
    assert find(n=8) == {"bm": 1, "bk": 9} and find() == {"bm": 1, "bk": 9}
    assert find(n=4) == {"bm": 2} and find(n=4, kind="int8", m=1) == {"bm": 3} and find(n=4, m=7) == {"bm": 5}
    assert find("v5e") is None and find(op="other") is None


def test_what_is_saved_is_found_and_replaces_its_elder(tmp_path: Path) -> None:
    file = tmp_path / "t.toml"
    tuning.save("a", "v5e", {"n": 1, "kind": "x"}, {"b": 2}, file)
    tuning.save("b", "v5e", {}, {"b": 7}, file)
    tuning.save("a", "v5e", {"n": 1, "kind": "x"}, {"b": 4}, file)
    assert tuning.lookup("a", "v5e", file=file, n=1, kind="x") == {"b": 4} and tuning.lookup("b", "v5e", file=file) == {"b": 7}
    assert [len(rows) for rows in tuning.entries(file).values()] == [1, 1]
    assert file.read_text().splitlines()[0] == tuning.FILE.read_text().splitlines()[0] == "# python -m llminfer.bench kernels --tune"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a = 3", "a=3: must be an array"),
        ('[[a]]\nchip = "v4"', "entry 1 of a: blocks=None: must be"),
        ('[[a]]\nchip = "v4"\nblocks = { x = 0 }', "entry 1 of a: blocks={'x': 0}: must be"),
        ("[[a]]\nblocks = { x = 1 }", "chip=None: must be"),
        ('[[a]]\nchip = "v4"\nn = 1.5\nblocks = { x = 1 }', "n=1.5: must be"),
        ("[[a", "t.toml: "),
    ],
)
def test_a_malformed_entry_is_one_line(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "t.toml").write_text(text)
    with pytest.raises(ValueError) as error:
        tuning.lookup("a", "v4", file=tmp_path / "t.toml")
    assert message in str(error.value) and "\n" not in str(error.value)


def test_the_file_of_the_package_is_well_formed() -> None:
    assert isinstance(tuning.entries(tuning.FILE), dict)
