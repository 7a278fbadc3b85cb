"""One of two processes of tests/test_sharp.py: FOLDER RANK; writes the averaged gradients to FOLDER/RANK.pt."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist

from llmkern.papers.sharp import files

folder, rank = Path(sys.argv[1]), int(sys.argv[2])
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
model = torch.nn.parallel.DistributedDataParallel(files.load(folder / "model").double())
ids = torch.load(folder / "ids.pt").chunk(2)[rank]
model(input_ids=ids, labels=ids).loss.backward()
torch.save({name[7:]: p.grad for name, p in model.named_parameters() if p.requires_grad}, folder / f"{rank}.pt")
dist.destroy_process_group()
