"""Which layers a pipeline stage holds."""

from kimi_pretrain.config.errors import ConfigError


def stage_layers(layers: int, stages: int) -> list[range]:
    """Consecutive layers of each stage, as even as whole layers allow, the larger ones first.

    Every stage but the last ones holds ``ceil(layers / stages)``, and what is missing to that
    is missing at the end, where the head is: K2's 61 on 16 stages are 15 x 4 and 1. Where
    that would leave a stage empty, the last ones hold one layer each.

    Args:
        layers: of the model.
        stages: of the pipeline.

    Returns:
        [stages] ranges that follow each other from 0 to ``layers``.

    Raises:
        ConfigError: more stages than layers.
    """
    if stages > layers:
        raise ConfigError(
            "parallel.pp",
            stages,
            f"a stage holds at least one of the model's {layers} layers",
            f"parallel.pp={layers}",
        )
    ranges, start, size = [], 0, -(-layers // stages)
    for stage in range(stages):
        later = stages - stage - 1  # each needs a layer
        stop = min(start + size, layers - later)
        ranges.append(range(start, stop))
        start = stop
    return ranges
