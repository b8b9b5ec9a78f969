"""A training loop of your own that lives through every change of membership, on real handwritten digits.

    stretto run --nnodes=1:4 --nproc-per-node=2 examples/plain_loop.py

No worker is restarted when others come, go or die: the block under `with` ends, and the next generation goes on.
"""

import stretto
import torch
from sklearn.datasets import load_digits

digits = load_digits()
images = torch.tensor(digits.data / 16, dtype=torch.float32)
labels = torch.tensor(digits.target)

TARGET_TAU, BATCH_SIZE = 400, 16
model = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.ReLU(), torch.nn.Linear(32, 10))
optimizer = stretto.AdaScale(torch.optim.SGD(model.parameters(), lr=0.1), model, base_batch_size=BATCH_SIZE)
sampler = stretto.ElasticSampler(len(images), seed=0)
state = {"model": model, "optimizer": optimizer, "sampler": sampler}

session = stretto.live.join(base_batch_size=BATCH_SIZE, batch_size=BATCH_SIZE, target_tau=TARGET_TAU)
while optimizer.tau < TARGET_TAU:
    with session.enter() as generation:
        generation.synchronise(state)  # everyone goes on with the most advanced worker's state
        wrapped = generation.wrap(model, optimizer)
        while optimizer.tau < TARGET_TAU and not generation.leaving:
            batch = sampler.next_batch(BATCH_SIZE * generation.world_size)
            mine = sampler.for_rank(batch, generation.rank, generation.world_size)
            chosen = mine or batch[:1]  # the last batch of an epoch can be too short for all ranks
            with generation.guarded():
                optimizer.set_num_samples(len(mine), total=len(batch))
                loss = torch.nn.functional.cross_entropy(wrapped(images[chosen]), labels[chosen])
                loss.backward()  # type: ignore[no-untyped-call]
            generation.step(optimizer, loss=loss.item(), samples=len(mine))
            sampler.advance(len(batch))
        if optimizer.tau >= TARGET_TAU:
            generation.finish(optimizer.tau)
        else:
            generation.leave()
session.close()
if generation.rank == 0:
    print(f"accuracy {(model(images).argmax(dim=1) == labels).float().mean():.3f} at tau {optimizer.tau:.0f}")
