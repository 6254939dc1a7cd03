"""What the ops and models are to reach on which machine, and whether a results file shows it.

A `Goal` is a machine, a case, a quantity of its rows and a threshold; the value comes from one
results file alone, baselines and peaks included. "Linear" growth is at most `LINEAR` times the
time per code or row of the next smaller size.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from itertools import pairwise
from typing import Any, Protocol

from bench.rows import Result, Row, decimals

LINEAR = 1.2
MB = 1e6

Case = Mapping[str, Any]
EVERY: tuple[Case, ...] = ({},)


@dataclass(frozen=True)
class Machine:
    """The machine that a goal was set for."""

    name: str
    device: str
    matches: Callable[[Mapping[str, Any]], bool]  # of a file's machine_info


CPU = Machine(
    "two cores with AVX-512 BF16",
    "cpu",
    lambda info: info.get("isa") in ("avx512bf16", "amx") and info.get("threads") == 2,
)
H200 = Machine("H200", "cuda", lambda info: "H200" in (info.get("gpu_name") or ""))


class Rows:
    """Looks up one file's rows of a goal's op and case, and keeps what it found."""

    def __init__(self, result: Result, goal: "Goal") -> None:
        self.result, self.goal = result, goal
        self.found: list[Row] = []

    def __call__(self, provider: str, change: Case) -> Row | None:
        """The row of the provider; of those that a pattern names, the fastest."""
        rows = [
            row
            for row in self.result.rows
            if row.op == self.goal.op
            and fnmatchcase(row.provider, provider.replace("[", "[[]"))
            and holds({**self.goal.fields, **change}, row.info)
        ]
        best = min(rows, key=lambda row: row.seconds, default=None)
        self.found += [best] if best else []
        return best

    def each(self, provider: str, changes: Iterable[Case]) -> list[Row] | None:
        """A row for each change of the case, or None where one is missing."""
        rows = [self(provider, change) for change in changes]
        return [row for row in rows if row] if all(rows) else None


class Quantity(Protocol):
    """What a goal measures.

    Attributes:
        unit: "x", "ms", "%", "MiB", "images/s", "wrong" or, of a pure number, "".
        providers: whose rows it takes, as patterns.
        each: the changes of the goal's case that it takes them at.
    """

    @property
    def name(self) -> str: ...
    @property
    def unit(self) -> str: ...
    @property
    def providers(self) -> tuple[str, ...]: ...
    @property
    def each(self) -> tuple[Case, ...]: ...
    def value(self, rows: Rows) -> float | None: ...


@dataclass(frozen=True)
class OfOne:
    """A number of one provider's rows, which `of` takes from them; None where they lack it."""

    ours: str
    name: str
    unit: str
    of: Callable[[list[Row]], float | None]
    each: tuple[Case, ...] = EVERY

    @property
    def providers(self) -> tuple[str, ...]:
        return (self.ours,)

    def value(self, rows: Rows) -> float | None:
        found = rows.each(self.ours, self.each)
        return None if found is None else self.of(found)


def milliseconds(ours: str) -> OfOne:
    return OfOne(ours, "time", "ms", lambda rows: 1e3 * sum(row.seconds for row in rows))


def host_milliseconds(ours: str) -> OfOne:
    name = "time with launch and synchronisation"
    return OfOne(ours, name, "ms", lambda rows: 1e3 * sum(row.host_seconds for row in rows))


def images_per_second(ours: str) -> OfOne:
    def rate(rows: list[Row]) -> float:
        return sum(row.info["B"] for row in rows) / sum(row.seconds for row in rows)

    return OfOne(ours, "images/s", "images/s", rate)


def largest(rows: list[Row], number: Callable[[Row], float | None]) -> float | None:
    numbers = [number(row) for row in rows]
    return None if None in numbers else max(numbers)


def extra_memory(ours: str) -> OfOne:
    def extra(row: Row) -> float | None:
        return None if row.extra is None else row.extra / 2**20

    return OfOne(ours, "extra memory", "MiB", lambda rows: largest(rows, extra))


def all_memory(ours: str) -> OfOne:
    def total(row: Row) -> float | None:
        own = 1e9 * row.info["gbytes_per_s"] * row.seconds
        return None if row.extra is None else (row.extra + own) / 2**20

    name = "memory, inputs and gradients included"
    return OfOne(ours, name, "MiB", lambda rows: largest(rows, total))


def share_of_gemm(ours: str) -> OfOne:
    """In the dtype that the provider multiplies in."""
    key = "share_of_gemm_peak"
    return OfOne(
        ours, "share of the GEMM rate", "%", lambda rows: min(row.info[key] for row in rows)
    )


def share_of_copy(ours: str) -> OfOne:
    key = "share_of_copy_peak"
    return OfOne(
        ours, "share of the copy bandwidth", "%", lambda rows: min(row.info[key] for row in rows)
    )


def wrong(ours: str, each: tuple[Case, ...] = EVERY) -> OfOne:
    def count(rows: list[Row]) -> float:
        return float(sum(row.info["wrong_indices"] for row in rows))

    return OfOne(ours, "wrong against float64", "wrong", count, each)


def figure(ours: str, key: str, name: str, unit: str = "") -> OfOne:
    """A further number that the benchmark records."""
    return OfOne(ours, name, unit, lambda rows: largest(rows, lambda row: row.info.get(key)))


@dataclass(frozen=True)
class Growth:
    """How much faster than the size the time grows at the worst step to the next larger size."""

    ours: str
    size: str = "K"
    sizes: tuple[int, ...] = ()
    unit: str = "x"

    @property
    def name(self) -> str:
        span = f"{self.sizes[0]:,} to {self.sizes[-1]:,}"
        return f"growth of time with {self.size} from {span}, over linear"

    @property
    def providers(self) -> tuple[str, ...]:
        return (self.ours,)

    @property
    def each(self) -> tuple[Case, ...]:
        return tuple({self.size: size} for size in self.sizes)

    def value(self, rows: Rows) -> float | None:
        found = rows.each(self.ours, self.each)
        if found is None:
            return None
        costs = [row.seconds / size for row, size in zip(found, self.sizes, strict=True)]
        return max(after / before for before, after in pairwise(costs))


@dataclass(frozen=True)
class Over:
    """A baseline's number over ours, the sums of both where there are several rows.

    Attributes:
        over: the baseline; of those that a pattern names, the fastest.
        instead: what its case has in place of ours.
        of: the number of a row; None where it was not measured.
        what: the ratio's name, before the baseline's.
    """

    ours: str
    over: str = "official"
    each: tuple[Case, ...] = EVERY
    instead: Case = field(default_factory=dict)
    of: Callable[[Row], float | None] = lambda row: row.seconds
    what: str = "speed-up over"
    unit: str = "x"

    @property
    def name(self) -> str:
        over = self.over.replace("*", ", the fastest")
        return " in ".join([f"{self.what} {over}", *map(str, self.instead.values())])

    @property
    def providers(self) -> tuple[str, ...]:
        return (self.ours, self.over)

    def value(self, rows: Rows) -> float | None:
        ours = rows.each(self.ours, self.each)
        theirs = rows.each(self.over, [{**change, **self.instead} for change in self.each])
        numbers = [[self.of(row) for row in found or []] for found in (theirs, ours)]
        if not all(numbers) or any(number is None for part in numbers for number in part):
            return None
        numerator, denominator = (sum(part) for part in numbers)
        return numerator / denominator if denominator else float("inf")


@dataclass(frozen=True)
class Counted:
    """Wrong indices that bench.exactness counted among at least `queries`."""

    queries: int
    unit: str = "wrong"
    providers: tuple[str, ...] = ()
    each: tuple[Case, ...] = EVERY

    @property
    def name(self) -> str:
        return f"wrong indices of {self.queries:,} queries"

    def value(self, rows: Rows) -> float | None:
        data = rows.result.data
        if data.get("op") != rows.goal.op:
            return None
        shapes = data.get("exactness", [])
        enough = sum(shape["queries"] for shape in shapes) >= self.queries
        return float(sum(shape["wrong"] for shape in shapes)) if enough else None


@dataclass(frozen=True)
class Goal:
    """A threshold for a quantity of an op or model on a case.

    Attributes:
        machine: None where any does.
        case: fields of the rows' extra_info.
        about: the case in words, where the fields do not say it.
    """

    op: str
    machine: Machine | None
    case: Case
    quantity: Quantity
    at_least: float | None = None
    at_most: float | None = None
    about: str = ""

    @property
    def fields(self) -> Case:
        return {**self.case, **({"device": self.machine.device} if self.machine else {})}

    @property
    def shape(self) -> str:
        sizes = [f"{k} = {v:,}" for k, v in self.case.items() if isinstance(v, int)]
        words = [str(v) for v in self.case.values() if isinstance(v, str)]
        return self.about or ", ".join([*sizes, *words])

    @property
    def threshold(self) -> str:
        sign, limit = ("≥", self.at_least) if self.at_most is None else ("≤", self.at_most)
        return f"{sign} {shown(limit, self.quantity.unit)}"


@dataclass(frozen=True)
class Outcome:
    """What the results say about a goal; `value` is None where they have not measured it."""

    goal: Goal
    value: float | None = None
    contended: bool = False
    result: Result | None = None

    @property
    def verdict(self) -> str:
        if self.value is None:
            return "not measured"
        least, most = self.goal.at_least, self.goal.at_most
        met = self.value >= least if least is not None else self.value <= most
        return "met" if met else "missed"

    @property
    def measured(self) -> str:
        if self.value is None:
            return ""
        return shown(self.value, self.goal.quantity.unit) + ("†" if self.contended else "")


def holds(case: Case, info: Mapping[str, Any]) -> bool:
    return all(info.get(key) == value for key, value in case.items())


def shown(value: float, unit: str) -> str:
    if unit == "%":
        return f"{value:.1%}"
    if unit == "":
        return f"{value:.1e}"
    if unit == "wrong":
        return f"{value:,.0f}"
    number = f"{value:,.{decimals(value, 3 if unit == 'ms' else 2)}f}"
    return f"{number}x" if unit == "x" else f"{number} {unit}"


def outcome(goal: Goal, results: Iterable[Result]) -> Outcome:
    """From the newest file of the goal's machine that has what the goal needs."""
    for result in sorted(results, key=lambda r: str(r.data.get("datetime")), reverse=True):
        if goal.machine is not None and not goal.machine.matches(result.machine):
            continue
        rows = Rows(result, goal)
        value = goal.quantity.value(rows)
        if value is not None:
            return Outcome(goal, value, any(row.contended for row in rows.found), result)
    return Outcome(goal)


def asks_for(info: Mapping[str, Any], provider: str) -> bool:
    """Whether a goal takes the row of this case and provider."""
    return any(
        goal.op == info["op"]
        and any(fnmatchcase(provider, name.replace("[", "[[]")) for name in goal.quantity.providers)
        and any(holds({**goal.fields, **change}, info) for change in goal.quantity.each)
        for goal in GOALS
    )


def nearest_code_goals() -> Iterable[Goal]:
    ours, gpu = "titok_fast-cpu", "titok_fast-triton"

    def shape(n: int, k: int, d: int, metric: str, dtype: str = "float32") -> Case:
        return {"N": n, "K": k, "D": d, "metric": metric, "dtype": dtype}

    large = shape(1024, 262144, 256, "l2")
    many = shape(8192, 4096, 12, "cosine")
    middle = shape(2048, 8192, 64, "l2")
    image = [shape(32, 4096, 12, metric) for metric in ("l2", "cosine")]
    for case, over_formula, over_faiss in ((large, 12, 3), (many, 50, 15), (middle, 20, 3)):
        yield Goal("nearest_code", CPU, case, Over(ours), at_least=over_formula)
        yield Goal("nearest_code", CPU, case, Over(ours, "faiss"), at_least=over_faiss)
    for case in image:
        yield Goal("nearest_code", CPU, case, Over(ours), at_least=3)
    for case in (large, many, middle):
        yield Goal("nearest_code", CPU, case, Over(f"{ours}[avx512]", "faiss"), at_least=1)
        yield Goal("nearest_code", CPU, case, Over(f"{ours}[avx2]"), at_least=2)
    for case in (large, many, middle, image[0]):
        table = min(4 * case["N"] * case["K"] / 128, 256 * MB)
        yield Goal("nearest_code", CPU, case, extra_memory(ours), at_most=(table + 16 * MB) / 2**20)
    sizes = (1024, 4096, 16384, 65536, 262144, 1048576)
    growing = {key: value for key, value in large.items() if key != "K"}
    yield Goal("nearest_code", CPU, growing, Growth(ours, sizes=sizes), at_most=LINEAR)
    about = "random rows, four shapes"
    yield Goal("nearest_code", None, {}, Counted(10**7), at_most=0, about=about)

    half = {**large, "dtype": "bfloat16"}
    yield Goal("nearest_code", H200, half, share_of_gemm(gpu), at_least=0.65)
    yield Goal("nearest_code", H200, half, milliseconds(gpu), at_most=0.27)
    yield Goal("nearest_code", H200, large, milliseconds(gpu), at_most=0.42)
    for dtype in ("float32", "bfloat16"):
        case = shape(65536, 4096, 12, "cosine", dtype)
        yield Goal("nearest_code", H200, case, milliseconds(gpu), at_most=0.05)
    yield Goal("nearest_code", H200, image[1], host_milliseconds(gpu), at_most=0.025)
    for k, d in ((8192, 64), (16384, 256)):
        case = shape(65536, k, d, "l2", "bfloat16")
        yield Goal("nearest_code", H200, case, Over(gpu, "flash-kmeans"), at_least=1.5)
    every = tuple(
        {**case, "dtype": dtype}
        for case in (large, many, middle, *image)
        for dtype in ("float32", "bfloat16")
    )
    about = "five shapes, float32 and bfloat16"
    yield Goal("nearest_code", H200, {}, wrong(gpu, every), at_most=0, about=about)


def index_propagation_goals() -> Iterable[Goal]:
    op, ours, gpu = "index_propagation", "titok_fast-cpu", "titok_fast-triton"

    def shape(n: int, k: int, dtype: str = "float32") -> Case:
        return {"N": n, "K": k, "D": 256, "dtype": dtype}

    main, half = shape(1024, 65536), shape(1024, 65536, "bfloat16")
    large, large_half = shape(1024, 262144), shape(1024, 262144, "bfloat16")
    yield Goal(op, CPU, main, Over(ours), at_least=3)
    yield Goal(op, CPU, half, Over(ours, instead={"dtype": "float32"}), at_least=10)
    memory = Over(ours, what="less extra memory than", of=lambda row: row.extra)
    yield Goal(op, CPU, main, memory, at_least=20)
    yield Goal(op, CPU, large, all_memory(ours), at_most=4e9 / 2**20)
    sizes = (1024, 4096, 16384, 65536, 262144, 1048576)
    over_codes, over_rows = Growth(ours, sizes=sizes), Growth(ours, "N", (64, 256, 1024, 4096))
    for others, growth in (({"N": 1024}, over_codes), ({"K": 16384}, over_rows)):
        case = {**others, "D": 256, "dtype": "float32"}
        yield Goal(op, CPU, case, growth, at_most=LINEAR)
    for machine, name in ((CPU, ours), (H200, gpu)):
        error = figure(name, "relative_error", "gradient's relative error")
        yield Goal(op, machine, main if machine is CPU else large, error, at_most=1e-4)
        smaller = Over(
            name,
            what="smaller gradient error than",
            of=lambda row: row.info.get("relative_error"),
        )
        yield Goal(op, machine, half if machine is CPU else large_half, smaller, at_least=1)

    yield Goal(op, H200, large_half, milliseconds(gpu), at_most=2.8)
    yield Goal(op, H200, large, milliseconds(gpu), at_most=12)
    yield Goal(op, H200, shape(16384, 262144, "bfloat16"), milliseconds(gpu), at_most=16 * 2.8)
    yield Goal(op, H200, large_half, extra_memory(gpu), at_most=200 * MB / 2**20)
    yield Goal(op, H200, large_half, Over(gpu), at_least=6)


def attention_goals() -> Iterable[Goal]:
    ours, lengths = "titok_fast-triton", (33, 65, 129, 289, 577, 1089)
    forward = dict(zip(lengths, (2, 1.5, 1.3, 1.15, 1, 1), strict=True))
    backward = dict.fromkeys(lengths[:4], 1.3)
    for direction, table in (("forward", forward), ("backward", backward)):
        for length, factor in table.items():
            case = {"B": 64, "L": length, "D": 64, "direction": direction, "dtype": "bfloat16"}
            yield Goal("attention", H200, case, Over(ours, "sdpa*"), at_least=factor)


def model_goals() -> Iterable[Goal]:
    half, single = "titok_fast-bfloat16", "titok_fast-float32"

    def tokenizer(batch: int, task: str) -> Case:
        return {"B": batch, "model": "titok-l-32", "task": task}

    for batch, factor in ((8, 3.5), (1, 3)):
        for task in ("encode", "decode"):
            yield Goal("titok", CPU, tokenizer(batch, task), Over(half), at_least=factor)
            yield Goal("titok", CPU, tokenizer(batch, task), Over(single), at_least=1.1)
    equal = figure(half, "tokens_equal", "tokens equal to float32's", "%")
    digits = {"model": "titok-digits", "task": "encode"}
    yield Goal("titok", CPU, digits, equal, at_least=0.95)
    for task in ("encode", "decode"):
        yield Goal("titok", H200, tokenizer(64, task), share_of_gemm(half), at_least=0.6)
        yield Goal("titok", H200, tokenizer(64, task), Over(half, "official-bfloat16"), at_least=3)

    step = {"B": 32, "L": 32, "V": 4096, "dtype": "float32"}
    yield Goal("maskgit_step", CPU, step, Over("titok_fast-cpu"), at_least=15)
    for dtype in ("float32", "bfloat16"):
        step = {"B": 1024, "L": 32, "V": 4096, "dtype": dtype}
        yield Goal("maskgit_step", H200, step, share_of_copy("titok_fast-cuda"), at_least=0.8)
    for batch in (8, 1):
        case = {"B": batch, "model": "maskgit-vit-l-32"}
        yield Goal("maskgit", CPU, case, Over(half), at_least=4)
    for model, rate in (("titok-l-32", 600), ("titok-l-64-512", 170), ("titok-s-128", 45)):
        case = {"B": 64, "model": model}
        yield Goal("generate", H200, case, images_per_second(half), at_least=rate)
        yield Goal("generate", H200, case, Over(half, "official-bfloat16"), at_least=5)
    case = {"B": 1, "model": "titok-l-32"}
    yield Goal("generate", H200, case, milliseconds(half), at_most=25)

    both = ({"task": "encode"}, {"task": "decode"})
    case = {"B": 1, "SIZE": 256, "model": "ibq-262144"}
    yield Goal("ibq", CPU, case, Over(half, each=both), at_least=2.5)
    for machine, batch, base in ((CPU, 4, "official"), (H200, 64, "official-bfloat16")):
        case = {"B": batch, "model": "ibq-ar-b", "task": "generate"}
        yield Goal("autoregressive", machine, case, Over(half, base), at_least=5)
    case = {"B": 1, "model": "ibq-ar-b", "task": "step"}
    yield Goal("autoregressive", H200, case, milliseconds(half), at_most=0.35)
    case = {"B": 1, "model": "ibq-ar-xxl", "task": "step"}
    yield Goal("autoregressive", H200, case, share_of_copy(half), at_least=0.7)
    for batch in (1, 4):
        case = {"B": batch, "V": 262144, "filter": "top-p 0.9", "guidance": "no guidance"}
        case["dtype"] = "float32"
        yield Goal("sample_token", CPU, case, Over("titok_fast-cpu"), at_least=10)


GOALS: tuple[Goal, ...] = (
    *nearest_code_goals(),
    *index_propagation_goals(),
    *attention_goals(),
    *model_goals(),
)
