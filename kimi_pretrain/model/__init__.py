"""The model: multi-head latent attention, mixture of experts, layers in four phases, chunks."""
