"""Hosts that differ in what should be the same."""

from kimi_pretrain.doctor.findings import BAD, Finding, differences


def test_the_odd_hosts_are_named_with_both_values() -> None:
    """Catches the many named as odd, and a host that lacks a value taken for one that agrees."""
    facts = {f"node-{n}": {"driver": "570", "kernel": "6.8"} for n in range(10)}
    facts["node-3"]["driver"] = "550"
    del facts["node-4"]["kernel"]
    driver, kernel = differences(facts)
    assert (driver.level, driver.what) == (BAD, "driver differs")
    assert driver.text.startswith("node-3 has 550, where node-0, node-1, node-2, node-4, ")
    assert driver.text.endswith("... (9 in all) has 570")
    assert kernel.text.startswith("node-4 has nothing, where node-0, ")


def test_hosts_that_agree_say_nothing() -> None:
    """Catches a finding for every fact."""
    assert differences({"a": {"driver": "570"}, "b": {"driver": "570"}}) == []


def test_a_line_ends_with_what_to_do() -> None:
    """Catches a finding that leaves its reader alone."""
    assert Finding(BAD, "port", "29500 is taken", "another").line() == (
        "port: 29500 is taken; try another"
    )
    assert Finding(BAD, "port", "29500 is taken").line() == "port: 29500 is taken"
