"""`python -m bench.exactness`: many random queries of nearest_code against float64.

A float64 GEMM scores every code. Where its best two scores are further apart than its rounding and
that of the pinned score together, the best is the only right index; elsewhere the float64
reference, in the pinned order, decides. Saves bench/results/exactness-<host kind>-<date>.json and
draws docs/ops/nearest_code_exactness.png; a run of fewer than a million queries is named "-quick"
and leaves the page's picture alone.
"""

import argparse
import json
import time
from datetime import date, datetime, timezone
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor

from bench import harness
from bench.plot import Axis, Panel
from titok_fast import nearest_code
from titok_fast._files import replacing
from titok_fast.cli.drawing import FAINT, INK, font
from titok_fast.ops.nearest_code import rescored_codes

# K, D, metric of bench_nearest_code.py and the share of the queries: as many as two CPUs check.
SHAPES = (
    (262144, 256, "l2", 0.002),
    (8192, 64, "l2", 0.05),
    (4096, 12, "l2", 0.474),
    (4096, 12, "cosine", 0.474),
)
BATCH = 2**28  # scores of one call
CHUNK = 2**18  # float64 scores of one step of the check: they stay in the cache
ENOUGH = 10**6  # queries, below which a run is only a trial
GAP_EDGES = [10.0 ** (i / 4) for i in range(-48, 5)]  # 1e-12 to 10
FIGURE = harness.ROOT / "docs" / "ops" / "nearest_code_exactness.png"


def check(
    z: Tensor,  # [N, D]
    codebook: Tensor,  # [K, D]
    metric: str,
    indices: Tensor,  # [N]
) -> tuple[Tensor, Tensor, Tensor]:
    """Which indices are wrong, which rows the GEMM left open [N], and the relative gaps [N].

    A gap is the difference of the best two scores over ||z|| times the largest ||e||, the scores
    being z.e - ||e||^2/2 (l2), z.e/||e|| (cosine) or z.e (dot).
    """
    codes = codebook.double()
    if metric == "cosine":
        codes = F.normalize(codes, dim=1)
    norms = codes.norm(dim=1)
    bias = -norms.square() / 2 if metric == "l2" else torch.zeros_like(norms)
    size = max(32, CHUNK // len(codes))
    wrong, open_rows, gaps = [], [], []
    for rows, chosen in zip(z.split(size), indices[:, None].split(size), strict=True):
        rows64 = rows.double()
        scores = torch.addmm(bias, rows64, codes.T)  # [n, K]
        score = scores.gather(1, chosen)[:, 0]
        gap = score - scores.scatter_(1, chosen, -torch.inf).amax(1)  # negative where wrong
        length = rows64.norm(dim=1)
        rounding = (codes.shape[1] + 16) * 2.0**-52 * (length + norms.max()) ** 2
        bad, undecided = gap < 0, ~(gap.abs() > 2 * rounding)
        for row in undecided.nonzero()[:, 0].tolist():
            best = nearest_code(rows[row], codebook, metric=metric, backend="reference")
            bad[row] = best != chosen[row, 0]
        wrong.append(bad)
        open_rows.append(undecided)
        gaps.append(gap.abs() / (length * norms.max()))
    return torch.cat(wrong), torch.cat(open_rows), torch.cat(gaps)


def run(
    k: int, d: int, metric: str, queries: int, *, seed: int, backend: str, device: str
) -> dict[str, Any]:
    """Counts and histograms of `queries` normal rows against one normal codebook."""
    generator = torch.Generator().manual_seed(seed)
    codebook = torch.randn(k, d, generator=generator).to(device)
    edges = torch.tensor(GAP_EDGES, dtype=torch.float64, device=device)
    rescored = torch.zeros(k + 1, dtype=torch.int64)
    gap_counts = torch.zeros(len(GAP_EDGES) + 1, dtype=torch.int64)
    wrong = undecided = 0
    start = time.perf_counter()
    for first in range(0, queries, max(1, BATCH // k)):
        n = min(queries - first, max(1, BATCH // k))
        z = torch.randn(n, d, generator=generator).to(device)
        indices = nearest_code(z, codebook, metric=metric, backend=backend)
        counts = rescored_codes(z, codebook, metric=metric, backend=backend)
        bad, open_rows, gaps = check(z, codebook, metric, indices)
        wrong += int(bad.sum())
        undecided += int(open_rows.sum())
        rescored += counts.bincount(minlength=k + 1).cpu()
        gap_counts += torch.bucketize(gaps, edges).bincount(minlength=len(gap_counts)).cpu()
    codes = rescored.nonzero()[:, 0]
    return {
        "K": k,
        "D": d,
        "metric": metric,
        "dtype": "float32",
        "device": device,
        "queries": queries,
        "wrong": wrong,
        "decided_by_the_reference": undecided,
        "rescored_mean": float((codes * rescored[codes]).sum() / queries),
        "rescored_max": int(codes.max()),
        "rescored_rows": {int(c): int(rescored[c]) for c in codes},
        "gap_rows": gap_counts.tolist(),
        "seconds": time.perf_counter() - start,
    }


def draw(shapes: list[dict[str, Any]]) -> Image.Image:
    """Per shape the codes rescored per row, and below it the gap of the best two codes."""
    width, height, margin = 330, 290, 24
    size = (2 * margin + width * len(shapes), 2 * margin + 2 * height + 64)
    canvas = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(canvas)
    queries, wrong = (sum(s[key] for s in shapes) for key in ("queries", "wrong"))
    title = f"nearest_code: {queries:,} random float32 queries, {wrong} wrong against float64"
    pen.text((margin, margin - 6), title, INK, font(20))
    below = "Above: codes that were scored in float64 per row. Below: how far the second code is "
    below += "from the best, relative to the largest possible dot product."
    pen.text((margin, margin + 22), below, FAINT, font(14))
    most = 2.0 * max(s["queries"] for s in shapes)
    for i, shape in enumerate(shapes):
        left, top = margin + i * width, margin + 64
        rescored = {int(codes): rows for codes, rows in shape["rescored_rows"].items()}
        widest = 1.05 * max(16, shape["rescored_max"])
        edges = [widest * j / 60 for j in range(61)]
        heights = [0] * 60
        for codes, rows in rescored.items():
            heights[int(60 * codes / widest)] += rows
        Panel(
            pen,
            (left, top, left + width - 20, top + height - 16),
            Axis(0, widest),
            Axis(0.5, most, log=True),
            title=f"K = {shape['K']:,}, D = {shape['D']}, {shape['metric']}",
            x_label=f"codes rescored, mean {shape['rescored_mean']:.1f}",
            y_label="rows",
        ).bars(edges, heights)
        top += height
        gap = Panel(
            pen,
            (left, top, left + width - 20, top + height - 16),
            Axis(GAP_EDGES[0], GAP_EDGES[-1], log=True),
            Axis(0.5, most, log=True),
            title=f"{shape['queries']:,} queries, {shape['wrong']} wrong",
            x_label="gap of the best two codes",
            y_label="rows",
        )
        gap.bars(GAP_EDGES, shape["gap_rows"][1:-1])
        gap.mark(2.0**-24, "2^-24: float32")
    return canvas


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.exactness", description=__doc__)
    parser.add_argument("--queries", type=int, default=10**7, help="over all shapes together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--backend", default="auto")
    args = parser.parse_args()

    quick = args.queries < ENOUGH
    machine = {**harness.machine(), "quick": quick}
    device = "cpu" if args.backend == "cpu" else harness.devices()[-1]
    shapes = []
    print(f"{'K':>7} {'D':>4} {'metric':7} {'queries':>10} {'wrong':>5} {'rescored':>9} {'max':>6}")
    for k, d, metric, share in SHAPES:
        queries = max(1, round(args.queries * share))
        found = run(k, d, metric, queries, seed=args.seed, backend=args.backend, device=device)
        shapes.append(found)
        print(
            f"{k:7} {d:4} {metric:7} {queries:10,} {found['wrong']:5} "
            f"{found['rescored_mean']:9.1f} {found['rescored_max']:6} {found['seconds']:6.0f} s",
            flush=True,
        )
    wrong = sum(shape["wrong"] for shape in shapes)
    result = {
        "op": "nearest_code",
        "datetime": datetime.now(timezone.utc).isoformat(),
        "machine_info": machine,
        "seed": args.seed,
        "backend": args.backend,
        "gap_edges": GAP_EDGES,
        "exactness": shapes,
    }
    name = f"exactness-{harness.host_kind()}-{date.today()}{'-quick' if quick else ''}.json"
    target = harness.ROOT / "bench" / "results" / name
    figure = target.with_suffix(".png") if quick else FIGURE
    with replacing(figure) as part:
        draw(shapes).save(part, "PNG")
    with replacing(target) as part:
        part.write_text(json.dumps(result, indent=1))
    print(f"{wrong} wrong; saved {target.relative_to(harness.ROOT)}, {figure.name}")
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
