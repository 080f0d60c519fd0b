"""Where tensors live and how they travel: the only room that calls torch.distributed."""
