"""How an adapter is trained: batches, attention, loss, Trainer, checkpoints, callbacks, memory."""
