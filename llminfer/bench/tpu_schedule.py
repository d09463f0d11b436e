"""What the TPU compiler's final schedule says a kernel costs, without a TPU: bundles issued and bytes moved.

The compiler writes the final bundles (VLIW instructions, one a cycle) of every kernel to a directory (`dump_flags`). A bundle count is a
lower bound on cycles: stalls are not in it. Which bundles are issued is decided by the scalar core: loop counters, lengths, page tables.
So its instructions are run here: each straight piece of the schedule becomes one Python function, and vector instructions are
only counted. What the scalar core reads from vectors is not known and taken as 0: a branch on it counts as not taken, and is named in
`unknown`. No source describes the format; what is read here was found in dumps of libtpu 0.0.42.
"""

from __future__ import annotations

import html
import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

DELAY = 4  # bundles after a branch that are still issued
GRANULE = 32  # bytes of one unit of a transfer's size
_BUNDLE = re.compile(r"^\s*(?:0x[0-9a-f]+|0)\s+(?:[A-Z]{2})?:\s*((?:>\s?)*)\s*\{(.*)$")
_MATRIX = re.compile(r"\bvmatmul|\bvmatpush|\bvmatprep|\bvlatch")
_PREDICATE = r"!?%p\d+_p\d+"


@dataclass
class Kernel:
    """Counts of one kernel. vmem_bytes and spill_bytes: -1 where the compiler's report does not have it."""

    name: str
    bundles: int
    matrix_bundles: int  # those that issue a matrix instruction
    hbm_bytes: int
    static_bundles: int
    vmem_bytes: int = -1
    spill_bytes: int = -1
    unknown: list[str] = field(default_factory=list)


def dump_flags(directory: Path) -> str:
    """The value of LIBTPU_INIT_ARGS, to be set before jax is imported, that makes the compiler write to an existing directory."""
    return f"--xla_jf_dump_to={directory} --xla_jf_dump_llo_text=true --xla_jf_dump_llo_pass_label_regex=final_bundles$|vmem_report"


def read(directory: Path, calls: Mapping[str, Sequence[Mapping[int, Any]]]) -> list[Kernel]:
    """The kernels of a dump whose names begin with a key of `calls`: for each call of it {number of an operand: the integers it holds}.
    Counts are sums over the calls."""
    found, memory = [], _vmem(directory)
    for path in sorted(directory.glob("*-final_bundles.txt")):
        name = re.sub(r"^\d+-|-\d+-final_bundles\.txt$", "", path.name)
        operands = next((each for begin, each in calls.items() if name.startswith(begin)), None)
        if operands is None or "schedule-analysis" in path.name:
            continue
        text, (vmem, spill) = path.read_text(errors="replace"), memory.get(name, (-1, -1))
        runs = [Program(text, values).run(name) for values in operands]
        total = lambda what, runs=runs: sum(getattr(run, what) for run in runs)
        unknown = sorted({x for run in runs for x in run.unknown})
        counts = (total("bundles"), total("matrix_bundles"), total("hbm_bytes"), runs[0].static_bundles)
        found.append(Kernel(name, *counts, vmem, spill, unknown))
    return found


def _vmem(directory: Path) -> dict[str, tuple[int, int]]:
    """VMEM bytes and spilled bytes of each kernel, from the compiler's report."""
    sizes = {}
    for path in directory.glob("*vmem_report.html"):
        _, _, data = path.read_text(errors="replace").partition("const DATA =")
        report, _ = json.JSONDecoder().raw_decode(html.unescape(data).lstrip()) if data else ({}, 0)
        for name, kernel in report.get("hlo_breakdowns", {}).items():
            parts = [part for block in kernel["blocks"] for part in block["allocations"]]
            sizes[name] = kernel["total_size"], sum(part["size"] for part in parts if part["tag"] == "SPILL")
    return sizes


def signed(x: int) -> int:
    """x as a 32-bit register holds it."""
    return ((x + (1 << 31)) & 0xFFFFFFFF) - (1 << 31)


class Program:
    """The schedule of one kernel, ready to run. Registers and scalar memory start as zeros."""

    def __init__(self, text: str, operands: Mapping[int, Any]) -> None:
        self.bundles: list[list[str]] = []
        self.labels: dict[str, int] = {}
        self.operands = operands
        self.unknown: Counter[str] = Counter()
        self.memory: dict[int, int] = {}
        self.bases: dict[int, int] = {}  # address of an operand -> its number
        self.hbm_bytes = 0
        self._split(text)
        self.branches = {i: m.group(1) for i, ins in enumerate(self.bundles) for x in ins if (m := re.search(r"target = \$(region\d+)", x))}
        self.names: dict[str, Any] = dict(
            r={}, m=self.memory, signed=signed, dma=self._transfer, operand=self._operand, u=lambda x: x & 0xFFFFFFFF
        )

    def _split(self, text: str) -> None:
        bodies: list[str] = []
        for line in text.splitlines():
            if match := _BUNDLE.match(line):
                bodies.append(match.group(2))
            elif bodies:
                bodies[-1] += "\n" + line
        for i, body in enumerate(bodies):
            for region in re.findall(r"Start(?:/End empty)? region (\d+)", body):
                self.labels.setdefault(f"region{region}", i)
            body = re.sub(r"/\*.*?\*/", "", body, flags=re.S)
            self.bundles.append([x.strip() for x in body[: max(body.rfind("}"), 0)].split(";;") if x.strip()])

    def run(self, name: str, most: int = 2_000_000_000) -> Kernel:
        """Issues bundles from the first to the end. Raises RuntimeError if that takes more than `most`."""
        length = len(self.bundles)
        visits, blocks, at, issued = Counter(), {}, 0, 0
        leaders = {*self.labels.values(), *(i + DELAY + 1 for i in self.branches)}
        while at < length:
            if at not in blocks:
                blocks[at] = self._translate(at, leaders)
            end, act = blocks[at]
            visits[at, end] += 1
            issued += end - at
            if issued > most:
                raise RuntimeError(f"{name}: more than {most} bundles")
            at = act()
        matrix = [any(_MATRIX.search(x) for x in bundle) for bundle in self.bundles]
        in_all = sum(times * sum(matrix[start:end]) for (start, end), times in visits.items())
        return Kernel(name, issued, in_all, self.hbm_bytes, length, unknown=sorted(self.unknown))

    def _translate(self, start: int, leaders: set[int]) -> tuple[int, Callable[[], int]]:
        """The straight piece from `start`: (its end, a function that runs it and gives the next bundle)."""
        lines, end, goto, leave = [], start, "", len(self.bundles)
        while end < len(self.bundles) and end != leave and not (end > start and end in leaders and not goto):
            before, after = [], []
            for text in self.bundles[end]:
                if end in self.branches and "sbr" in text:
                    target = self.labels.get(self.branches[end], len(self.bundles))
                    taken = re.search(rf"\(({_PREDICATE})\)", text)
                    before.append(f"taken{end} = {self._value(taken.group(1)) if taken else True}")
                    goto += f"{target} if taken{end} else "
                    leave = min(end + DELAY + 1, len(self.bundles)) if leave == len(self.bundles) else leave
                else:
                    self._statement(text, before, after)
            lines += before + after
            end += 1
        body = "\n ".join([*lines, f"return {goto}{end}"])
        exec(f"def act():\n {body}", self.names)
        return end, self.names["act"]

    def _statement(self, text: str, before: list[str], after: list[str]) -> None:
        """Adds the code of one instruction: what reads to `before`, what writes to `after`, since a bundle reads before it writes."""
        match = re.match(r"(?:%(\S+) = )?(\S+)\s*(.*)$", text, re.S)
        assert match
        target, op, rest = match.groups()
        register = re.fullmatch(r"[sp]\d+_([sp]\d+)", target or "")
        if not (register or op.startswith(("sst", "dma."))) or op == "sphi" or op.startswith("dma.done"):
            return
        if op.startswith("int_to_ptr") and register and re.search(rf"%s\d+_{register.group(1)}$", rest):
            return  # a cast in place, possibly of what this bundle writes
        number = len(before)
        condition, parts = None, _split(re.sub(r"\[(?:thread|resolvable):[^\]]*\]", "", rest.replace("\n", " ")))
        if choice := re.match(rf"\(({_PREDICATE}),\s*(.*)\)$", parts[0]):  # (predicate, value otherwise)
            condition, otherwise, parts = self._value(choice.group(1)), self._value(choice.group(2)), parts[1:]
        else:
            otherwise = f"r.get({register.group(1)!r}, 0)" if register else None
            for i, part in enumerate(parts):
                if guard := re.search(rf"\s*\(({_PREDICATE})\)\s*", part):
                    condition, parts[i] = self._value(guard.group(1)), part[: guard.start()] + " " + part[guard.end() :]
        parts = [part for x in parts if (part := re.sub(r"(?<=[\w\]])\s+\[#allocation\d+\]$", "", x.strip()))]
        try:
            if op == "sst":
                place, value = (parts[0], parts[1]) if len(parts) > 1 else re.match(r"(\[smem:.*\]\]?)\s+(\S+)$", parts[0]).groups()  # type: ignore[union-attr]
                before.append(f"a{number}, v{number}, c{number} = {self._value(place)}, {self._value(value)}, {condition or True}")
                after.append(f"if c{number}: m[a{number}] = v{number}")
            elif op.startswith("dma."):
                values = ", ".join(self._value(part) for part in parts[:3])
                before.append(f"dma({op!r}, {condition or True}, {values})")
            elif register:
                value = self._expression(op, parts, text)
                before.append(f"v{number} = {value}" if condition is None else f"v{number} = ({value}) if {condition} else {otherwise}")
                after.append(f"r[{register.group(1)!r}] = v{number}")
        except (ValueError, AttributeError, IndexError, KeyError):
            self.unknown[op] += 1
            if register:
                after.append(f"r[{register.group(1)!r}] = 0")

    def _expression(self, op: str, parts: list[str], text: str) -> str:
        if op.startswith("inlined_call_operand"):
            index = re.search(r"index: (\d+)", text)
            return f"operand({index.group(1) if index else -1}, {op.partition('.')[2]!r})"
        x = [self._value(part) for part in (parts[-1:] if op == "smov" or op.startswith("int_to_ptr") else parts)]
        base, _, kind = op.partition(".")
        if kind.endswith("f32") or ".f32" in kind:
            raise ValueError(op)
        wrap = (lambda y: f"u({y})") if "u32" in kind else (lambda y: y)
        two = {"sadd": "+", "ssub": "-", "smul": "*", "sand": "&", "sor": "|", "sxor": "^", "scalar_lea": "+"}
        if base in two:
            return f"signed({x[0]} {two[base]} {x[1]})"
        compare = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<", "eq": "==", "ne": "!="}
        if base == "scmp":
            return f"{wrap(x[0])} {compare[kind.split('.')[0]]} {wrap(x[1])}"
        if base in ("smin", "smax"):
            return f"signed({base[1:]}({wrap(x[0])}, {wrap(x[1])}))"
        simple = {
            "smov": "{0}", "pmov": "{0}", "int_to_ptr": "{0}", "sld": "m.get({0}, 0)", "sshll": "signed({0} << ({1} & 31))",
            "sshrl": "signed(u({0}) >> ({1} & 31))", "sshra": "{0} >> ({1} & 31)", "por": "({0} or {1})", "pand": "({0} and {1})",
            "pnand": "not ({0} and {1})", "pnor": "not ({0} or {1})", "pxor": "bool({0}) != bool({1})", "pneg": "not {0}",
            "sclz": "32 - u({0}).bit_length()", "sdivrem": "signed(u({0}) // max(1, u({1})))", "sdiv": "signed(u({0}) // max(1, u({1})))",
            "srem": "signed(u({0}) % max(1, u({1})))", "scalar_select": "{1} if {0} else {2}",
        }  # fmt: skip
        return simple[base].format(*x)

    def _value(self, text: str) -> str:
        """Code for an operand: a register, a number, or an address."""
        text = text.strip()
        if match := re.fullmatch(r"(!?)%[sp]\d+_([sp]\d+)", text):
            value = f"r.get({match.group(2)!r}, 0)"
            return f"(not {value})" if match.group(1) else value
        if re.fullmatch(r"-?\d+|\$?0x[0-9a-f]+", text):
            return str(signed(int(text.strip("$"), 0)))
        if text in ("true", "false"):
            return text.capitalize()
        if match := re.fullmatch(r"#allocation(\d+)(?:_spill)?", text):
            return str(int(match.group(1)) << 20)
        if match := re.fullmatch(r"\[(?:smem:)?(.*)\]", text):
            inner = match.group(1)
            parts = [inner[1:-1]] if inner.startswith("[") and inner.endswith("]") else [inner]
            return "(" + " + ".join(self._value(part) for part in parts[0].split(" + ")) + ")"
        raise ValueError(text)

    def _operand(self, number: int, space: str) -> int:
        """What the register of an operand holds: its one value, or its address, at which its values lie if it is in scalar memory."""
        values = [int(x) for x in self.operands.get(number, ())]
        if values and not space.startswith(("hbm", "smem", "vmem")):
            return values[0]
        base = (1200 + number) << 20  # beyond all allocations, four bits to the left too
        self.bases[base] = self.bases[signed(base << 4)] = number
        if space.startswith("smem"):
            self.memory.update((base + i, x) for i, x in enumerate(values))
        return base

    def _transfer(self, op: str, condition: bool, source: int, size: int, target: int) -> None:
        if condition and "hbm" in op:
            self.hbm_bytes += size * GRANULE
        if condition and op.endswith("_to_smem") and source in self.bases:
            values = self.operands.get(self.bases[source], ())
            self.memory.update((target + i, int(x)) for i, x in enumerate(values))


def _split(text: str) -> list[str]:
    """The arguments of an instruction: at commas outside brackets."""
    parts, depth = [""], 0
    for char in text:
        depth += (char in "[(") - (char in "])")
        if char == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += char
    return parts
