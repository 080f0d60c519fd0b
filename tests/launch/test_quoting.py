"""User values in rendered scripts: they arrive byte by byte, or are refused in one line."""

import shlex
import subprocess
import unicodedata
from collections.abc import Callable
from copy import deepcopy
from functools import cache
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st

from kimi_pretrain.config import compose
from kimi_pretrain.config.errors import ConfigError
from kimi_pretrain.config.launcher import (
    SSH,
    ContainerConfig,
    LauncherConfig,
    validate_launcher,
)
from kimi_pretrain.config.schema import Config
from kimi_pretrain.launch.hostfile import commands_of
from kimi_pretrain.launch.quoting import shell_word
from kimi_pretrain.launch.slurm import SlurmJob, job_of, render
from tests.distributed.slurm import free_ports

# What stands in for srun, scontrol and a host's python: its words, each ended by a zero byte.
_DUMP = """\
#!/bin/sh
for word in "$@"; do printf '%s\\0' "$word"; done >> "$DUMP"
[ -z "$ENVIRONMENT" ] || printf '%s\\0' "$FUZZED" > "$ENVIRONMENT"
"""
_SCONTROL = "#!/bin/sh\necho node-a\necho node-b\n"

(PORT,) = free_ports(1)  # the script ends where somebody listens at its port

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


# What a value of a script's place looks like there, and one that nobody objects to.
SLURM_PLACES = {
    **{
        key: (f"--{key}={{}}", "plain")
        for key in ("partition", "account", "qos", "reservation", "constraint")
    },
    "time": ("--time={}", "30"),
    "option": ("--{}=1", "plain"),
    "option's value": ("--switches={}", "plain"),
    "variable": ("{}=1", "PLAIN"),
    "address": ("--address={}", "plain"),
    "python": ("{}", "plain"),
    "image": ("--container-image={}", "plain"),
    "mount": ("--container-mounts={}", "/plain:/plain"),
}
HOST_PLACES = {
    "address": ("--address={}", "plain"),
    "python": ("{}", "plain"),
    "variable": ("{}=1", "PLAIN"),
    "ssh": ("{}", "plain"),
    "hostfile": ("{}", "plain"),
}
# Evil values are refused nearly always; these are not.
LIKELY = st.one_of(
    st.text("gpu1,:[]-&|()*@._/+", max_size=12),
    st.from_regex(r"/[a-z .$'\"]*:/[a-z #`;]*", fullmatch=True),
    READABLE,
)


def _set(launcher: LauncherConfig, place: str, value: str) -> None:
    match place:
        case "option":
            launcher.options = {value: "1"}
        case "option's value":
            launcher.options = {"switches": value}
        case "variable":
            launcher.environment = {value: "1"}
        case "image":
            launcher.container = ContainerConfig(value)
        case "mount":
            launcher.container = ContainerConfig("image", mounts=[value])
        case "ssh":
            launcher.ssh = ["ssh", value]
        case _:
            setattr(launcher, place, value)


def _job(**changes: object) -> SlurmJob:
    job = job_of(
        compose(["experiment=smoke", "launcher=slurm", "cluster=h800", "run_dir=runs/a"]),
        ["experiment=smoke"],
        Path("/work"),
    )
    return SlurmJob(**{**vars(job), "port": PORT, **changes})


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


# --- every other text that a user can give ----------------------------------------------------


@cache
def _composed(launcher: str) -> Config:
    words = ["experiment=smoke", "cluster=h800", "run_dir=runs/a", "launcher.python=python3"]
    return compose([*words, f"launcher={launcher}"])


def _job_of(place: str, value: str, stubs: Path) -> tuple[list[str], list[str]]:
    """The words of a script's directives and exports, and those that srun gets."""
    config = deepcopy(_composed("slurm"))
    config.launcher.stop_seconds, config.launcher.port = 1, PORT
    _set(config.launcher, place, value)
    validate_launcher(config.launcher)
    script = render(job_of(config, ["experiment=smoke"], Path("/work")))
    marked = [line for line in script.splitlines() if line.startswith(("#SBATCH ", "export "))]
    read = [word for line in marked for word in shlex.split(line[1:], comments=True)]
    return read, _run(script, stubs)[0]


def _host_of(place: str, value: str, stubs: Path) -> tuple[list[str], list[str]]:
    """The words of ssh before the remote command, and the words that this is to the host."""
    config = deepcopy(_composed("hostfile"))
    hosts = stubs / "hosts"
    hosts.write_text(value if place == "hostfile" else "host", errors="surrogatepass")
    _set(config.launcher, place, value)
    config.launcher.hostfile, config.launcher.ranks_per_node = str(hosts), 8
    validate_launcher(config.launcher)
    (command,) = commands_of(config, ["experiment=smoke"], stubs, "1")
    shown = command[-1].replace("exec env ", "printf '%s\\0' ", 1)
    done = subprocess.run(["sh", "-c", shown], capture_output=True, check=True)
    return command[:-1], done.stdout.decode().split("\0")[:-1]


@pytest.mark.parametrize(
    ("outcome", "place", "looks", "plain"),
    [
        *((_job_of, place, *of) for place, of in SLURM_PLACES.items()),
        *((_host_of, place, *of) for place, of in HOST_PLACES.items()),
    ],
)
@EXECUTED
@given(data=st.data())
def test_a_launchers_value_is_refused_or_arrives(
    stubs: Path,
    outcome: Callable[[str, str, Path], tuple[list[str], list[str]]],
    place: str,
    looks: str,
    plain: str,
    data: st.DataObject,
) -> None:
    """Catches a value of any key that adds an option, a word or a command, or changes another;
    and a refusal of more than a line."""
    usual = outcome(place, plain, stubs)
    for value in data.draw(st.lists(st.one_of(EVIL, LIKELY), min_size=10, max_size=10)):
        refused = ""
        try:
            got = outcome(place, value, stubs)
        except ConfigError as error:
            refused = str(error)
        if refused:
            assert len(refused.splitlines()) == 1
            continue
        there = {looks.format(plain): looks.format(value) if value else looks[:-3]}
        if place == "hostfile":
            host = value.partition("#")[0].split()[0]  # a line is more than its host
            there = {"plain": host}
            for option in ("--address", "--name"):
                there[f"{option}=plain"] = f"{option}={host.rpartition('@')[2]}"
        assert got == tuple([there.get(word, word) for word in words] for words in usual)
