"""What each of several processes of verl finds; started by `test_verl.py` with torchrun."""

import os
import sys

import torch
from torch import distributed

from tests.integrations import test_verl

if __name__ == "__main__":
    base, output = sys.argv[1:]
    distributed.init_process_group("gloo")
    engine = test_verl.engine_for(base)
    everything = test_verl.sync(engine)
    found = test_verl.steps(engine)
    trained = test_verl.sync(engine)
    parts = {name: p.to_local().numel() for name, p in engine.module.named_parameters()}
    state = sum(s["exp_avg"].to_local().numel() for s in engine.optimizer.state.values())
    result = (found, everything, trained, parts, state)
    torch.save(result, f"{output}/{os.environ['RANK']}.pt")
    distributed.destroy_process_group()
