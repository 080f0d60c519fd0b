"""User values in rendered scripts: they arrive byte by byte, or are refused in one line."""

import subprocess
import unicodedata
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st

from kimi_pretrain.config import compose
from kimi_pretrain.config.errors import ConfigError
from kimi_pretrain.config.launcher import SSH
from kimi_pretrain.launch.hostfile import commands_of
from kimi_pretrain.launch.quoting import shell_word
from kimi_pretrain.launch.slurm import SlurmJob, job_of, render

# What stands in for srun, scontrol and a host's python: its words, each ended by a zero byte.
_DUMP = """\
#!/bin/sh
for word in "$@"; do printf '%s\\0' "$word"; done >> "$DUMP"
[ -z "$ENVIRONMENT" ] || printf '%s\\0' "$FUZZED" > "$ENVIRONMENT"
"""
_SCONTROL = "#!/bin/sh\necho node-a\necho node-b\n"

PIECES = (
    *("$(touch /tmp/owned)", "`id`", "'", '"', "\\", "\n", "\r", "#SBATCH --wrap=id", " ", "%j"),
    *("${HOME}", "$IFS", ";", "&&", "|", "<(id)", "*", "~", "!", "\t", "\0", "\u00e9", "\u2028"),
    *("-", "--", "=", ",", "a", "EOF", "\x1b[31m", "\ud800", "\u00a0", "\u202e"),
)
EVIL = st.one_of(st.text(max_size=40), st.lists(st.sampled_from(PIECES), max_size=8).map("".join))
# Values that nobody has a reason to refuse; a hundred of them are tried in one script.
READABLE = EVIL.map(lambda text: "".join(char for char in text if not _has_control(char)))
MANY = st.lists(READABLE, min_size=20, max_size=100)
# To Slurm or to a shell; a run directory may have none of them.
SPECIAL = set("\"'\\#%$`!*?;&|<>()[]{}~")
EXECUTED = settings(
    max_examples=6,
    deadline=None,
    phases=(Phase.explicit, Phase.generate),  # to shrink a failure would run it for minutes
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def _has_control(text: str) -> bool:
    """Whether a character is a control, a surrogate or a separator of lines, by Unicode."""
    return any(unicodedata.category(char) in ("Cc", "Cs", "Zl", "Zp") for char in text)


def _job(**changes: object) -> SlurmJob:
    job = job_of(
        compose(["experiment=smoke", "launcher=slurm", "cluster=h800", "run_dir=runs/a"]),
        ["experiment=smoke"],
        Path("/work"),
    )
    return SlurmJob(**{**vars(job), **changes})


@pytest.fixture
def stubs(tmp_path: Path) -> Path:
    for name, text in {"srun": _DUMP, "scontrol": _SCONTROL, "python3": _DUMP}.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    return tmp_path


def _run(script: str, stubs: Path) -> tuple[list[str], str]:
    """The words that srun or python got, and the exported variable FUZZED."""
    words, variable = stubs / "words", stubs / "variable"
    words.unlink(missing_ok=True)
    variables = {
        "PATH": f"{stubs}:/usr/bin:/bin",
        "DUMP": str(words),
        "ENVIRONMENT": str(variable),
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST": "node-[a-b]",
    }
    text = script.encode(errors="surrogateescape")
    checked = subprocess.run(["bash", "-n"], input=text, capture_output=True, check=False)
    assert checked.returncode == 0, checked.stderr
    done = subprocess.run(["bash"], input=text, env=variables, capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, b""), (done, script)
    return _words(words), "".join(_words(variable))


def _words(file: Path) -> list[str]:
    return file.read_bytes().decode(errors="surrogateescape").split("\0")[:-1]


@given(EVIL)
@example("a\n#SBATCH --wrap=id")
def test_a_value_is_one_line_or_refused(value: str) -> None:
    """Catches a line's end in a script, however it is spelt, and a refusal without need."""
    if not _has_control(value):
        assert len(shell_word("key", value).splitlines()) <= 1
        return
    with pytest.raises(ConfigError) as error:
        shell_word("key", value)
    assert len(str(error.value).splitlines()) == 1


@EXECUTED
@given(MANY, READABLE)
@example(["$(id) `id` '\"\\", "it's", "", "#SBATCH --wrap=id"], "$(id) `id` '\"\\ #SBATCH")
def test_words_and_variables_of_a_job_arrive_as_they_were(
    stubs: Path, words: list[str], value: str
) -> None:
    """Catches a value that the shell expands, splits or runs, and one that Slurm takes for an
    option of its own."""
    script = render(_job(arguments=tuple(words), environment={"FUZZED": value}))
    got, variable = _run(script, stubs)
    assert got[got.index("--") + 1 :] == words
    assert variable == value
    assert _directives(script) == _directives(render(_job()))


def _directives(script: str) -> list[str]:
    return [line for line in script.splitlines() if line.lstrip().startswith("#SBATCH")]


@EXECUTED
@given(EVIL)
@example("a run")
@example("50%j")
@example("x\n#SBATCH --wrap=id")
@example("\u00e9")
def test_a_run_directory_of_a_job_means_itself(stubs: Path, name: str) -> None:
    """Catches a path that Slurm or the shell reads as a pattern, a comment or a command."""
    job = _job(run_dir=f"/work/{name}")
    if _has_control(name) or set(name) & SPECIAL:
        with pytest.raises(ConfigError) as error:
            render(job)
        assert len(str(error.value).splitlines()) == 1
        return
    script = render(job)
    got, _ = _run(script, stubs)
    assert f"--logs=/work/{name}/logs/7.0" in got
    assert len(_directives(script)) == len(_directives(render(_job())))


@EXECUTED
@given(MANY, READABLE)
def test_words_of_a_host_arrive_as_they_were(stubs: Path, words: list[str], value: str) -> None:
    """Catches a remote command that the host's shell reads again."""
    hostfile = stubs / "hosts"
    hostfile.write_text("node-a slots=8\n")
    config = compose(
        [
            *("experiment=smoke", "cluster=h800", "run_dir=runs/a", "launcher=hostfile"),
            *(f"launcher.hostfile={hostfile}", "launcher.python=python3"),
        ]
    )
    config.launcher.environment["FUZZED"] = value
    (command,) = commands_of(config, words, stubs, "1")
    assert command[:-1] == [*SSH, "node-a"]
    got, variable = _run(command[-1], stubs)
    assert got[got.index("--") + 1 :] == words
    assert variable == value
