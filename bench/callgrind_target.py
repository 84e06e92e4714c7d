"""What valgrind watches: steps and a segment backward of the paper's network on 640 coordinates; see README.md."""

import torch

from l2l_fast import CoordinatewiseLSTM
from l2l_fast.kernels import operators as ops

TILES, STEPS, REPEATS = 10, 20, 10

torch.set_num_threads(1)
n = TILES * 64
net = CoordinatewiseLSTM()
state, phi = net.init_state(n).data, net.phi().detach()
param, records = torch.zeros(n), list(torch.randn(STEPS + 1, n))
for t in range(REPEATS):
    ops.step_([param], [records[t]], [state], phi, net.config, 1.0, 0.0, False)
ones = [1.0] * STEPS
ops.segment_backward([state], [n], [0], records, [], ones, ones, ones, phi, net.config)
print(f"{REPEATS} steps and a segment backward of {STEPS} steps on {n} coordinates: instruction counts per")
print(f"coordinate (and step) are the counts of 'step' / {n * REPEATS} and of 'backward' / {n * STEPS}")
