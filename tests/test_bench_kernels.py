"""The benchmark of the kernels: the reader of the compiler's schedules, the tuner, and the report of a first contact."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from tpu_program import run_program

from llminfer import cli
from llminfer.bench import __main__ as bench
from llminfer.bench import kernels, selfcheck
from llminfer.bench.kernel_work import CASES, MODELS, Work, draw, make
from llminfer.bench.tpu_schedule import Program, read
from llminfer.target import chip_name
from pallas_kernels import tuning

# A loop of `operand 0` turns over 3 bundles and the branch's 4; one predicated transfer a turn but the first; a matrix bundle a turn.
SCHEDULE = """
     0   :  { %s9_s0 = inlined_call_operand.<no memory space> [shape: s32[1], index: 0, kind: input, shape index: {}] /* operand 0 */ }
   0x1   :  { %s10_s1 = smov 0 /* a ;; b } */  ;;  %s11_s2 = inlined_call_operand.hbm [shape: f32[8], index: 1, kind: input] }
   0x2 LB: > { %s12_s1 = sadd.s32 1, %s10_s1  ;;  %p13_p0 = scmp.gt.s32.totalorder %s10_s1, 0 } /* Start region 4 */
   0x3   : > { %p14_p1 = scmp.lt.s32.totalorder %s12_s1, %s9_s0  ;;  %15 = vmatmul.mubr.f32.gmra.mxu0 %v1_v1 }
   0x4   : > { %16 = sbr.rel (%p14_p1) target = $region4  ;;  %17 = dma.hbm_to_vmem [thread:$0]  (%p13_p0), %s11_s2, 64, %s9_s0, [#al] }
   0x5   : > { %18 = sst [smem:[#allocation5]] %s12_s1 }
   0x6   : > { %s20_s3 = sld [smem:[#allocation5]]  ;;  %19 = sst [smem:[#allocation5 + 1]] (!%p14_p1), %s12_s1 }
   0x7   : > {}
   0x8   : > { %s30_s4 = int_to_ptr.vmem [resolvable:$true] %s29_s4  ;;  %s29_s4 = smov 7 } /* End region 4 */
   0x9   :  { %s21_s5 = spop %20 }
"""


def test_the_schedule_of_a_loop_by_hand() -> None:
    program = Program(SCHEDULE, {0: [5]})
    kernel = program.run("loop")
    assert (kernel.bundles, kernel.static_bundles, kernel.matrix_bundles) == (2 + 5 * 7 + 1, 10, 5)
    assert kernel.hbm_bytes == 4 * 64 * 32 and kernel.unknown == ["spop"]
    assert program.memory == {5 << 20: 5, (5 << 20) + 1: 5} and program.names["r"]["s3"] == 5 and program.names["r"]["s4"] == 7


def test_a_dump_is_read_by_the_names_of_kernels(tmp_path: Path) -> None:
    for name in ("12-loop.1-02-final_bundles", "12-loop.1-01-schedule-analysis_final_bundles", "12-fusion-02-final_bundles"):
        (tmp_path / f"{name}.txt").write_text(SCHEDULE)
    data = {"hlo_breakdowns": {"loop.1": {"total_size": 9, "blocks": [{"allocations": [{"tag": "SPILL", "size": 4}]}]}}}
    (tmp_path / "1-TLP-vmem_report.html").write_text(f"<script>const DATA = {json.dumps(data)};</script>")
    (kernel,) = read(tmp_path, {"loop": [{0: [5]}, {0: [2]}]})
    assert (kernel.name, kernel.bundles, kernel.vmem_bytes, kernel.spill_bytes) == ("loop.1", 6 + 7 * 7, 9, 4)


def test_scalar_operands_are_what_the_program_computes_for_the_grid() -> None:
    grid = pltpu.PrefetchScalarGridSpec(num_scalar_prefetch=2, grid=(1,), in_specs=[pl.no_block_spec], out_specs=pl.no_block_spec)
    double = lambda a, b, x_ref, o_ref: None

    def program(x, counts):
        call = pl.pallas_call(double, out_shape=x, grid_spec=grid, name="doubled")
        step = lambda state: (state[0] + 1, call(jnp.cumsum(counts), state[0].reshape(1), state[1]))
        return jax.lax.while_loop(lambda state: state[0] < 2, step, (jnp.int32(0), x))

    counts = np.array([3, 1, 2], np.int32)
    jaxpr = jax.make_jaxpr(program)(jnp.zeros((8, 128)), counts)
    first, second = kernels.scalar_operands(jaxpr, [None, counts])["doubled"]
    assert first[0].tolist() == second[0].tolist() == [3, 4, 6] and (first[1].tolist(), second[1].tolist()) == ([0], [1])


@pytest.mark.parametrize(
    ("name", "flops", "moved"),
    [
        ("paged_attention.decode", 4 * 128 * 32 * 64 * 2048, 64 * 2048 * 8 * 256 * 2),
        ("paged_attention.decode.int8", 4 * 128 * 32 * 64 * 2048, 64 * 2048 * 8 * 256),
        ("paged_attention.decode.context32768", 4 * 128 * 32 * 16 * 32768, 16 * 32768 * 8 * 256 * 2),
        ("flash_attention", 2 * 128 * 32 * 4096 * 4096, 2 * 4096 * 128 * 80),
        ("grouped_matmul", 2 * 1024 * 2048 * 1536, 2 * 64 * 2048 * 1536),
        ("quantized_matmul.int8", 2 * 8 * 4096 * 14336, 4096 * 14336),
        ("grouped_matmul.qwen_up.rows4096", 2 * 4096 * 2048 * 1536, 2 * (128 * 2048 * 1536 + 4096 * (2048 + 768))),
    ],
)
def test_work_is_counted_from_shapes(name: str, flops: float, moved: float) -> None:
    (case,) = (case for case in CASES + MODELS if case.name == name)
    work = make(case, "v6e")
    assert work.flops == pytest.approx(flops, rel=1e-3) and work.hbm_bytes == pytest.approx(moved, rel=0.02)


def test_time_is_that_of_one_call() -> None:
    shape = jax.ShapeDtypeStruct((600, 600), jnp.float32)
    product = lambda turns: lambda impl, blocks, x, y: jax.lax.fori_loop(0, turns, lambda _, z: jnp.tanh(z @ y), x)
    one, eight = (Work(product(turns), [shape, shape], 0, 0, {}) for turns in (1, 8))
    short, long = (kernels.time_once(work, "reference", None, draw(work), 0.05) for work in (one, eight))
    assert 1e-6 < short < long and 3 < long / short < 20


def test_the_tuner_keeps_the_best_and_what_is_better_than_the_heuristic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The best by bundles alone, of the least step, moves more bytes than the heuristic's.
    bundles = lambda blocks: 5000 if blocks is None else abs(blocks["block_k"] - 2048) + blocks["block_q"] - 2000 * (blocks["step"] == 128)
    monkeypatch.setattr(kernels, "compiled", lambda case, chip, blocks=None: {"bundles": bundles(blocks), "hbm_bytes": moved(blocks)})
    moved = lambda blocks: 2000 if blocks and blocks["step"] == 128 else 1000
    file = tmp_path / "tuned.toml"
    found = kernels.kernels("v5e", True, file, "flash", None)["kernels"][0]["tuned"]
    best = {"step": 256, "block_q": 512, "block_k": 2048}
    assert found["blocks"] == best == tuning.lookup("flash_attention", "v5e", file=file, head_dim=128, group=4, dtype="bfloat16", keys=9)
    file.unlink()
    none = lambda case, chip, blocks=None: {"bundles": 1, "hbm_bytes": 1} if blocks is None else {"error": "no"}
    monkeypatch.setattr(kernels, "compiled", none)
    assert kernels.kernels("v5e", True, file, "flash", None)["kernels"][0]["tuned"]["blocks"] is None and not file.exists()


def test_selfcheck_rehearsal(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "report.json"
    assert cli.main(bench.main, ["selfcheck", "--json", "--out", str(out)]) == 0
    report = json.loads(out.read_text())
    assert report == json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report["rehearsal"] and report["complete"] and report["versions"]["jax"] == jax.__version__
    assert [row["name"] for row in report["kernels"]] == [case.name for case in CASES if case.small]
    assert {row["name"].partition(".")[0] for row in report["kernels"]} == {case.op for case in CASES}
    for row in report["kernels"]:
        assert row["passed"] and 0 < row["max_error"] <= row["bound"] and row["seconds"] > 1e-6, row


def test_a_failure_or_an_interruption_leaves_the_others_in_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = {"paged_attention.decode": RuntimeError("two\nlines"), "paged_attention.mixed": KeyboardInterrupt()}

    def check(case, chip, target):
        if case.name in found:
            raise found[case.name]
        return {"passed": True}

    monkeypatch.setattr(selfcheck, "check", check)
    with pytest.raises(KeyboardInterrupt):
        selfcheck.selfcheck(tmp_path / "report.json", "", None)
    report = json.loads((tmp_path / "report.json").read_text())
    assert [(row["passed"], row.get("error")) for row in report["kernels"]] == [(False, "RuntimeError: two"), (True, None), (True, None)]
    assert not report["complete"]
    late = selfcheck.selfcheck(tmp_path / "report.json", "", None, budget=-1)["kernels"]
    assert len(late) == sum(1 for case in CASES if case.small) and all(row["error"].startswith("not run") for row in late)


def test_a_wrong_kernel_is_found() -> None:
    wrong = lambda impl, blocks, x: x * (1.05 if impl == "interpret" else 1.0)
    work = Work(wrong, [jax.ShapeDtypeStruct((4, 4), jnp.bfloat16)], 0, 0, {})
    assert selfcheck.max_error(work, "interpret", draw(work)) == pytest.approx(0.05, rel=0.1)
    assert selfcheck.max_error(work, "interpret", [jnp.full((4, 4), jnp.nan, jnp.bfloat16)]) == float("inf")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["kernels", "--target", "v9"], "error: --target='v9': must be one of v4, v5e"),
        (["kernels"], "error: --target: must be given"),
        (["kernels", "--target", "v6e", "--only", "zzz"], "error: --only='zzz': must be in one of"),
        (["selfcheck", "--out", "/none/x.json"], "error: --out='/none/x.json': must be in a folder"),
    ],
)
def test_bad_options_are_one_line(options: list[str], message: str, capsys: pytest.CaptureFixture) -> None:
    assert cli.main(bench.main, options) == 2
    error = capsys.readouterr().err
    assert error.startswith(message) and error.count("\n") == 1


@pytest.mark.parametrize(
    ("kind", "chip"),
    [
        ("TPU v5 lite", "v5e"),
        ("TPU v5", "v5p"),
        ("TPU v5p", "v5p"),
        ("TPU v6 lite", "v6e"),
        ("TPU7x", "tpu7x"),
        ("TPU v4", "v4"),
        ("cpu", ""),
    ],
)
def test_chips_by_what_devices_call_themselves(kind: str, chip: str) -> None:
    assert (chip_name(kind) or "") == chip
    assert bool(kernels.peaks(chip)) == bool(chip)


@pytest.mark.tpu_compile
def test_kernels_by_the_compilers_schedule(capsys: pytest.CaptureFixture) -> None:
    assert cli.main(bench.main, ["kernels", "--target", "v6e", "--only", "grouped", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out.splitlines()[-1])["kernels"]
    assert row["work_bytes"] <= row["hbm_bytes"] * 1.01 <= row["work_bytes"] * 1.03
    assert 50_000 < row["bundles"] < 200_000 and row["vmem_bytes"] > 1 << 20 and not row["unknown"]
    assert row["bundle_seconds"] == row["bundles"] / 1.75e9 and row["byte_seconds"] == row["hbm_bytes"] / 1638e9


COST_CASES = """
import importlib.util, sys
import jax, jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

spec = importlib.util.spec_from_file_location("given_by_path", sys.argv[1])
cases = importlib.util.module_from_spec(spec)
spec.loader.exec_module(cases)
mesh = Mesh(np.array(topologies.get_topology_desc(platform="tpu", topology_name="v6e:2x2").devices[:1]), ("x",))
A = lambda shape, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, PartitionSpec()))
for name in cases.__all__:
    sizes = dict(M=64, E=8, K=256, N=256) if name == "gmm" else {}
    case = getattr(cases, name)(A, **sizes)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        traced = jax.jit(case["fn"], donate_argnums=case["donate"]).trace(*case["args"])
    text = str(traced.jaxpr)
    assert all(kernel in text and all(np.asarray(x).size for x in given.values()) for kernel, given in case["operands"].items()), name
print(*cases.__all__)
"""


@pytest.mark.tpu_compile
def test_cost_cases_are_found_by_their_path(tmp_path: Path) -> None:
    """From any working directory, with nothing but the root to import from."""
    found = run_program(COST_CASES, Path(__file__).with_name("cost_cases.py"), cwd=tmp_path)
    assert {"decode", "prefill", "mixed", "gmm", "int8_matmul"} <= set(found.split())
