"""The schedule of a run: made for its shape, or read from a file that must fit it."""

from pathlib import Path

import pytest

from kimi_pretrain.config import compose
from kimi_pretrain.config.errors import ConfigError
from kimi_pretrain.config.schema import Config
from kimi_pretrain.pipeline.passes import insert_offload, insert_recompute
from kimi_pretrain.pipeline.schedules import interleaved_1f1b, k2
from kimi_pretrain.train.schedule import stages_of, training_schedule


def _config(*overrides: str) -> Config:
    return compose(["experiment=smoke", "run_dir=x", "schedule.micro_batch_size=1", *overrides])


def test_one_stage_takes_its_microbatches_one_by_one() -> None:
    """Catches a single process that keeps the activations of all microbatches."""
    assert training_schedule(_config()).to_text() == ["0F0,0B0,0F1,0B1,0F2,0B2,0F3,0B3"]


def test_a_file_is_a_schedule_like_any_other(tmp_path: Path) -> None:
    """Catches a file whose messages are put in twice, or not at all."""
    overrides = ["parallel.pp=2", "parallel.vpp=2"]
    made = training_schedule(_config(*overrides, "parallel.schedule=k2"))
    for name, rows in (("plain", k2(2, 2, 4).to_text()), ("messages", made.to_text())):
        file = tmp_path / name
        file.write_text("\n".join(rows) + "\n")
        read = training_schedule(_config(*overrides, f"parallel.schedule_file={file}"))
        assert read == made
        assert read.digest() == made.digest()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: [rows[0].replace("0F1", "0F0"), rows[1]], "rank 0, position 1:"),
        (lambda rows: [rows[0], rows[1].replace("1F0,", "")], "1F0"),
        (lambda rows: ["nonsense", rows[1]], "nonsense"),
        (lambda rows: interleaved_1f1b(2, 2, 2).to_text(), "microbatches"),
        (lambda rows: insert_offload(interleaved_1f1b(2, 2, 4)).to_text(), "activation.policy=k2"),
        (lambda rows: insert_recompute(interleaved_1f1b(2, 2, 4)).to_text(), "computed again"),
    ],
    ids=["twice", "missing", "unreadable", "another shape", "nothing leaves", "nothing is remade"],
)
def test_a_file_that_cannot_run_is_one_line(tmp_path: Path, change: object, message: str) -> None:
    """Catches a hang, hours later, of a schedule that was never checked."""
    file = tmp_path / "rows"
    file.write_text("\n".join(change(interleaved_1f1b(2, 2, 4).to_text())))  # type: ignore[operator]
    overrides = ["parallel.pp=2", "parallel.vpp=2", f"parallel.schedule_file={file}"]
    with pytest.raises(ConfigError) as error:
        training_schedule(_config(*overrides))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_an_absent_file_and_too_many_stages_are_refused() -> None:
    """Catches a traceback, and stages without layers."""
    two = ["parallel.pp=2", "parallel.vpp=2"]
    with pytest.raises(ConfigError, match="schedule_file"):
        training_schedule(_config(*two, "parallel.schedule_file=/nowhere"))
    many = _config("parallel.pp=4", "parallel.vpp=2", "parallel.schedule=k2")
    with pytest.raises(ConfigError, match=r"parallel.vpp: got 8; .*layers; try parallel.vpp=1$"):
        training_schedule(many)


def test_stages_follow_the_split() -> None:
    config = _config("parallel.pp=2", "parallel.vpp=2", "parallel.schedule=k2")
    assert stages_of(config) == [range(1), range(1, 2), range(2, 3), range(3, 4)]


def test_a_policy_that_offloads_puts_the_copies_in(tmp_path: Path) -> None:
    """Catches a run that keeps on the device what its plan moves, or moves it twice."""
    overrides = ["parallel.pp=2", "parallel.vpp=2", "activation=k2"]
    made = training_schedule(_config(*overrides, "parallel.schedule=k2"))
    text = "\n".join(made.to_text())
    assert "OFFLOAD" in text
    assert "PREFETCH" in text
    assert "OFFLOAD" not in "".join(
        training_schedule(_config(*overrides[:2], "parallel.schedule=k2")).to_text()
    )
    ahead = training_schedule(_config(*overrides, "parallel.schedule=k2", "activation.ahead=true"))
    assert "RECOMPUTE" in "\n".join(ahead.to_text())
    file = tmp_path / "rows"
    file.write_text(text)
    again = training_schedule(_config(*overrides, f"parallel.schedule_file={file}"))
    assert again.digest() == made.digest()
