"""`python -m models.conversion hf2mcore | mcore2hf`: weights between Hugging Face's format and Megatron's.

Both print what was read, mapped and set aside. A tensor without a rule and a missing one are errors, after which
nothing has been written. Megatron need not be installed.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from models.conversion.from_megatron import FromMegatron, convert_from_megatron
from models.conversion.names import BLOCKS
from models.conversion.report import Report
from models.conversion.to_megatron import ToMegatron, convert_to_megatron
from models.errors import CheckpointError

NORMS_HELP = "the centre of Megatron's norm weights: zero (--apply-layernorm-1p) or one"


def main(arguments: Sequence[str] | None = None) -> int:
    """Convert as the command line says. Returns the exit status: 1 after an error, which is told on stderr."""
    settings = vars(make_parser().parse_args(arguments))
    command, report_file = settings.pop("command"), settings.pop("report")
    try:
        report = _run(command, settings)
        if report_file is not None:
            report.save(report_file)
    except (CheckpointError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(report)
    return 0


def _run(command: str, settings: dict[str, object]) -> Report:
    if command == "hf2mcore":
        return convert_to_megatron(ToMegatron(**settings, show_progress=True))  # type: ignore[arg-type]
    settings.pop("in_place")
    return convert_from_megatron(FromMegatron(**settings, show_progress=True))  # type: ignore[arg-type]


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m models.conversion", description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    _add_to_megatron(commands.add_parser("hf2mcore", help="Hugging Face directory -> Megatron checkpoint"))
    _add_from_megatron(commands.add_parser("mcore2hf", help="Megatron checkpoint -> Hugging Face directory"))
    return parser


def _add_to_megatron(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--source", type=Path, required=True, help="Hugging Face directory")
    parser.add_argument("--out", type=Path, required=True, help="directory to write; must not be there yet")
    parser.add_argument(
        "--format",
        choices=("torch_dist", "mp_rank", "safetensors"),
        default="torch_dist",
        help="torch_dist: any parallel size reads it; mp_rank: --ckpt-format torch; safetensors: one flat file",
    )
    parser.add_argument("--tensor-parallel", type=int, default=1, help="ranks of --format mp_rank")
    parser.add_argument(
        "--layer-spec",
        choices=("te", "local"),
        default="te",
        help="names of TransformerEngine's modules or of local ones",
    )
    parser.add_argument("--block", choices=BLOCKS, default=BLOCKS[0], help="what Megatron calls the head's layer")
    parser.add_argument(
        "--prefix", choices=("lm", "vl"), help="vl: names start with language_model.; else as config.json"
    )
    parser.add_argument("--padded-vocab-size", type=int, help="rows of the embedding in Megatron; new ones are zero")
    _add_common(parser)


def _add_from_megatron(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--source", type=Path, required=True, help="torch_dist directory, mp_rank_* directory, or safetensors file"
    )
    parser.add_argument(
        "--base",
        type=Path,
        required=True,
        help="Hugging Face directory with config.json; what is not converted is kept",
    )
    target = parser.add_mutually_exclusive_group(required=True)
    target.add_argument("--out", type=Path, help="directory to write; must not be there yet")
    target.add_argument("--in-place", action="store_true", help="renew --base itself")
    parser.add_argument(
        "--experts", choices=("as_base", "packed", "per_expert"), default="as_base", help="form of the experts written"
    )
    _add_common(parser)


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--mtp-only", action="store_true", help="only the MTP head")
    parser.add_argument("--norms", choices=("zero_centred", "ones"), default="zero_centred", help=NORMS_HELP)
    parser.add_argument("--report", type=Path, help="also write the report, with every name, as JSON")


if __name__ == "__main__":
    sys.exit(main())
