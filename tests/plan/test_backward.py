"""What is planned to lie on the device while a backward goes through its operations."""

from kimi_pretrain.config.activation import Policy
from kimi_pretrain.plan.backward import Backward, Bytes, Step, backward_of
from kimi_pretrain.plan.operations import BF16, FP8, Operation, Stored

POLICIES = {
    "again": Policy(recompute=True),
    "expert_up_in": Policy(fp8=True),
    "swiglu_in": Policy(fp8=True),
}


def followed(
    *segments: list[Operation], only: str | None = None, ahead: bool = False, split: bool = False
) -> Backward:
    def policy(stored: Stored) -> Policy:
        return POLICIES.get(stored.tag, Policy())

    return backward_of(segments, policy, only=only, ahead=ahead, split=split)


def test_a_chain_is_there_until_its_last_reader() -> None:
    """Catches a chain whose links are all there at once, or never together."""
    x = Stored("kept", 1.0)
    first = Stored("again", 10.0, (x,))
    second = Stored("again", 100.0, (first,))
    operations = [Operation((x,)), Operation((first,)), Operation((second,))]
    steps = followed(operations).steps
    assert steps == (Step(Bytes(110.0), Bytes(-1.0)),)  # first is read again after second has gone
    steps = followed(operations[:1], operations[2:]).steps  # nobody reads first but the chain
    assert steps == (Step(Bytes(110.0), Bytes()), Step(Bytes(), Bytes(-1.0)))
    steps = followed(operations, ahead=True).steps
    assert steps == (Step(Bytes(), Bytes(-111.0)),)


def test_codes_lie_beside_what_is_widened_from_them() -> None:
    """Catches FP8 planned without the tensor that a product reads."""
    up = Stored("expert_up_in", 32.0)
    codes = 32.0 * FP8 / BF16
    assert followed([Operation((up,))]).steps == (Step(Bytes(32.0), Bytes(-codes)),)
    read_as_it_lies = Stored("swiglu_in", 32.0)
    assert followed([Operation((read_as_it_lies,))]).steps == (Step(Bytes(), Bytes(-codes)),)


def test_inputs_and_gradients_of_products_wait_for_w() -> None:
    """Catches what waits freed at once, counted twice while a tag still has it, or never freed."""
    x = Stored("kept", 5.0)
    early, late = [Operation((x,))], [Operation((x,), owes=3.0)]
    split = followed(early, late, split=True)
    assert split.steps == (
        Step(Bytes(0.0, 3.0), Bytes(0.0, 3.0)),
        Step(Bytes(), Bytes()),
    )
    assert split.waits == Bytes(5.0, 3.0)
    whole = followed(early, late)
    assert whole.steps == (Step(Bytes(0.0, 3.0), Bytes()), Step(Bytes(), Bytes(-5.0)))
    assert whole.waits == Bytes()
    assert followed(late).waits == Bytes(5.0, 3.0)
    assert followed(early, late, only="kept", split=True).waits == Bytes()
