"""One process under torchrun of tests/test_reproduce_data_selection.py: FOLDER [STEP]; leaves the towers that two train
together in FOLDER/towers.pt. Process 1 of the first life is killed after STEP.
"""

import os
import signal
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from llmkern.papers.data_selection.toy.towers import Fit, train

FIT = Fit(steps=12, batch=32, width=8, hidden=8)


def data() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    image, text = torch.randint(0, 50, (2, 200, 6), generator=generator)
    return image, text, torch.arange(200)


def main() -> None:
    folder, fatal = Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    dist.init_process_group("gloo")

    def done(steps: int) -> None:
        (folder / f"{dist.get_rank()}.steps").open("a").write(f"{steps}\n")
        if steps == fatal and dist.get_rank() == 1 and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
            os.kill(os.getpid(), signal.SIGKILL)

    pair = train(*data(), 50, FIT, 3, group=dist.group.WORLD, checkpoint=folder / "checkpoint.pt", every=4, done=done)
    if dist.get_rank() == 0:
        torch.save(pair.state_dict(), folder / "towers.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
