"""The whole truth about a GPU in one command: `python -m benchmarks.gpu_suite [--part ...] [--models ...]`.

kernels: every Triton operation against its torch law at the dimensions of real models, and its speed as a share of this
card's own bandwidth and matrix rate, both measured at the start. equality: nothing that speculation or CUDA graphs do
shows in a token. decode: whole decode steps at real dimensions with dummy weights and forced acceptance, against the
roofline floor. rollback: replay against snapshots of the delta-net state. trace: a timeline of three decode steps.

Every job is a process with a share of --seconds; what time does not allow is named. Prints tables, and as the last line
one JSON object, which also goes to --out; the trace lies beside it. Exit code 1 if any check is red or a job crashed.
"""

import argparse
import importlib.util
import json
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

if importlib.util.find_spec("triton") is None:
    sys.exit("the GPU suite needs Triton, which is not installed: pip install '.[cuda]'")

from benchmarks.gpu_suite.jobs import MODELS, PARTS, plan, run_job
from benchmarks.gpu_suite.log import Log
from benchmarks.gpu_suite.processes import run_stages
from benchmarks.gpu_suite.summary import is_red, print_results


def parse_args(argv: list[str]) -> argparse.Namespace:
    """The command line; what follows --seconds is for the suite's own processes."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_suite", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--part", nargs="+", default=list(PARTS), choices=PARTS, help="what to do")
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS, help="dimensions to do it at")
    parser.add_argument("--out", type=Path, default=Path("gpu_suite.json"), help="where the JSON object goes")
    parser.add_argument("--seconds", type=float, default=470.0, help="time for all of it")
    for flag in ("--job", "--rows", "--known"):
        parser.add_argument(flag, help=argparse.SUPPRESS)
    parser.add_argument("--deadline", type=float, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    """Run everything, or as a process of the suite one job; the exit code."""
    args = parse_args(argv)
    if not torch.cuda.is_available():
        print("the GPU suite needs a CUDA device, torch sees none here")
        return 1
    trace_path = args.out.with_suffix(".trace.json")
    if args.job:
        known = json.loads(Path(args.known).read_text(encoding="utf-8"))
        run_job(args.job, known, Log(Path(args.rows), args.deadline - time.time()), trace_path)
        return 0
    stages = plan(tuple(args.part), tuple(args.models))
    with TemporaryDirectory(prefix="tandem-suite-") as folder:
        command = [sys.executable, "-m", "benchmarks.gpu_suite", "--out", str(args.out.absolute())]
        rows = run_stages(command, stages, Path(folder), args.seconds)
    config = {"parts": args.part, "models": args.models, "seconds": args.seconds}
    args.out.write_text(print_results(rows, config), encoding="utf-8")
    return 1 if is_red(rows) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
