"""Which of several exit codes says why a run ended."""

from kimi_pretrain.launch.verdict import verdict, worst


def test_causes_come_before_what_they_cause() -> None:
    """Catches a defect reported as a lost peer, and a signal to stop reported as a kill."""
    assert verdict({0: 4, 3: 1}) == (1, "")
    assert verdict({0: 4, 3: 75}) == (4, "")
    assert verdict({0: -9, 2: -15, 3: 3}) == (3, "")
    assert verdict({2: 2}) == (2, "")
    assert verdict({0: -15, 1: -15}) == (143, "")
    assert verdict({0: 4, 1: -11})[0] == 4
    assert verdict({0: -9, 1: -9})[1].startswith("rank 0 was killed by SIGKILL")
    assert verdict({1: 9}) == (9, "")


def test_of_several_nodes_the_cause_speaks() -> None:
    """Catches a refusal on one node that hides behind the loss of a peer on the others."""
    assert worst([0, 0]) == 0
    assert worst([4, 2, 4]) == 2
    assert worst([75, 4]) == 4
    assert worst([75, 75]) == 75
    assert worst([143, 0]) == 143
