"""Steps of a start that may fail on one rank, and then must fail on all of them."""

import json
from collections.abc import Callable
from typing import TypeVar

from kimi_pretrain.config.errors import ConfigError
from kimi_pretrain.parallel.errors import SharedConfigError, parts
from kimi_pretrain.parallel.world import World

T = TypeVar("T")


def together(world: World, action: Callable[[], T]) -> T:
    """Run ``action`` on every rank; all go on, or all raise what the first that failed raised.

    A rank that gave up by itself would leave the others waiting for it until their deadline.

    Raises:
        SharedConfigError: ``action`` raised ConfigError on some rank.
    """
    told, result = "", []
    try:
        result.append(action())
    except ConfigError as error:
        told = json.dumps(parts(error))
    failures = [text for text in world.everyone.gather_texts(told) if text]
    if failures:
        raise SharedConfigError(*json.loads(failures[0]))
    return result[0]
