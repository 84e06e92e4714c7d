"""The command ``import``: networks that other programs have trained."""

from __future__ import annotations

import argparse
import os

from ..networks import interchange, trained
from .console import UserError, check_outputs, say, user_errors
from .options import Commands, add_command


def add_to(commands: Commands) -> None:
    """Add the command to the parser."""
    text = "convert a .l2l file of google-deepmind/learning-to-learn or a PyTorch state dict"
    example = "cw.l2l --preprocess log_sign --output-scale 0.1 --out mine.safetensors"
    parser = add_command(commands, "import", _run, text, example)
    parser.add_argument("file", metavar="FILE", help="FILE.l2l, or what torch.save wrote of a state dict")
    parser.add_argument("--out", required=True, metavar="FILE", help="the optimizer, a .safetensors file")
    parser.add_argument("--kind", choices=("deepmind", "torch"), help="default: by the ending")
    parser.add_argument(
        "--key", metavar="KEY", help="of a larger file: the entry that is the state dict, such as model"
    )
    # Not in the files: whoever trained the network knows them.
    parser.add_argument("--preprocess", choices=("identity", "log_sign"), required=True, help="of the gradients")
    parser.add_argument("--p", type=float, default=10.0, metavar="X", help="constant of log_sign (%(default)s)")
    parser.add_argument("--output-scale", type=float, required=True, metavar="X", help="multiplies the updates")


def _run(arguments: argparse.Namespace) -> int:
    check_outputs(out=arguments.out)
    paths = arguments.file, arguments.out
    if all(map(os.path.exists, paths)) and os.path.samefile(*paths):
        raise UserError(f"--out: {arguments.out!r} is the file to import, which would be lost; name another")
    kind = arguments.kind or ("deepmind" if arguments.file.endswith(".l2l") else "torch")
    options = arguments.file, arguments.preprocess, arguments.p, arguments.output_scale
    with user_errors():
        if kind == "deepmind":
            if arguments.key is not None:
                raise UserError("--key: expected a file of torch.save, a .l2l file has no entries to choose from")
            net = interchange.load_deepmind(*options)
        else:
            net = interchange.load_torch(*options, key=arguments.key)
        trained.save(net, arguments.out)
    say(f"{net!r}\nwritten: {arguments.out}")
    return 0
