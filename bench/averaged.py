"""The mean of the weights of networks that began alike: what several noisy runs have in common.

    python -m bench.averaged first.safetensors second.safetensors third.safetensors --out mean.safetensors

Runs of evolution strategies from one start differ mostly by noise, of whose variance a mean of n has an n-th part.
"""

from __future__ import annotations

import argparse

import torch

import l2l_fast as l2l
from l2l_fast.networks.record import attach, record_of


@torch.no_grad()
def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("network", nargs="+", help="files of networks of one kind")
    parser.add_argument("--out", required=True, help="file that is written, with the first one's record")
    arguments = parser.parse_args()
    networks = [l2l.load(path) for path in arguments.network]
    if any(net.options() != networks[0].options() for net in networks):
        parser.error("network: expected networks of one kind")
    weights = [net.state_dict() for net in networks]
    mean = {name: torch.stack([each[name].double() for each in weights]).mean(0).float() for name in weights[0]}
    networks[0].load_state_dict(mean)
    made_of = f"the mean of the weights of {len(weights)} runs"
    attach(networks[0], {**(record_of(networks[0]) or {}), "made_of": made_of})
    networks[0].save(arguments.out)


if __name__ == "__main__":
    main()
