"""A few hundred cases of tests/fuzz_gguf.py; how to run more of them is said there."""

from fuzz_gguf import fuzz


def test_damaged_files_end_well(tmp_path):
    found = fuzz(400, 1, tmp_path)
    assert not found.failures, found.failures[:5]
    assert min(found.ends["read"], found.ends["refused"]) > 20
