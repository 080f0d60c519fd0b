"""A preflight on one process or on every rank of a job: gathered, compared, judged."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

from kimi_pretrain.config.schema import Config
from kimi_pretrain.doctor.findings import BAD, NOTE, OK, Finding, differences, named
from kimi_pretrain.doctor.host import look_at_host
from kimi_pretrain.doctor.outliers import Outlier, outliers
from kimi_pretrain.doctor.probes import Probe, probe
from kimi_pretrain.parallel.clocks import wall_clocks
from kimi_pretrain.parallel.world import World

# Logs of hosts cannot be read side by side, and leases and certificates expire early or late.
_CLOCK_SECONDS = 0.1
# Times the median: less than this is what other processes on a CPU's cores can do to a rank.
_SURE_ON_CPU = 1.5
_SLOW_DISK = 2.0  # times the median: file systems that many hosts use at once vary by far
_SHOWN = 16  # ranks that one line names


@dataclass(frozen=True)
class Examination:
    """All that was found, the same on every rank."""

    hosts: list[str]  # [ranks]
    looks: dict[str, dict[str, Any]]  # host -> as look_at_host gives it
    probes: list[Probe]
    clocks: list[float]  # [ranks] seconds ahead of the median
    slow: list[Outlier]
    findings: list[Finding]

    @property
    def fit(self) -> bool:
        """Whether nothing was found that would spoil a run."""
        return all(finding.level != BAD for finding in self.findings)

    def data(self) -> dict[str, Any]:
        """Everything as plain data."""
        return {
            "fit": self.fit,
            "findings": [asdict(finding) for finding in self.findings],
            "slow": [asdict(each) for each in self.slow],
            "ranks": len(self.hosts),
            "hosts": self.hosts,
            "clocks": self.clocks,
            "probes": [asdict(each) for each in self.probes],
            "looks": self.looks,
        }


def examine(config: Config, world: World, host: str) -> Examination:
    """Look at every host, probe every rank. Collective.

    Args:
        config: the run that is to be started.
        world: all ranks of the job, or one process.
        host: this rank's.

    Raises:
        PeerError: a rank failed or did not answer.
    """
    hosts = world.everyone.gather_texts(host)
    speaks = hosts.index(host) == world.rank  # the first rank of its host
    mine = json.dumps(look_at_host(config, world.device)) if speaks else ""
    looks = {
        hosts[rank]: json.loads(text)
        for rank, text in enumerate(world.everyone.gather_texts(mine))
        if text
    }
    clocks = wall_clocks(world.everyone)
    probes = probe(world, hosts)
    slow = [each for one in probes for each in outliers(one.name, one.seconds, hosts)]
    sure = _SURE_ON_CPU if world.device.type == "cpu" else 1.0
    findings = [
        *_of_hosts(looks),
        *_of_disks(looks),
        *differences({one: look["same"] for one, look in looks.items()}),
        *_of_clocks(clocks, hosts),
        *(
            _of_probe(one, [each for each in slow if each.probe == one.name], sure)
            for one in probes
        ),
    ]
    return Examination(hosts, looks, probes, clocks, slow, findings)


def rate(probe: Probe) -> str:
    """The median rank's rate, and the slowest's."""
    known = [seconds for seconds in probe.seconds if seconds is not None]
    usual, worst = (probe.amount / seconds for seconds in (median(known), max(known)))
    scale, unit = (1e12, "TFLOP/s") if probe.unit == "FLOP" else (1e9, "GB/s")
    ranks = f", {worst / scale:.3g} the slowest of {len(known)} ranks" if len(known) > 1 else ""
    return f"{usual / scale:.3g} {unit}{ranks}"


def _of_hosts(looks: dict[str, dict[str, Any]]) -> list[Finding]:
    """What hosts say of themselves, what several say alike once with their names.

    What is as it should be is said once, in the words of the first host.
    """
    hosts: dict[Finding, list[str]] = {}
    for host, look in looks.items():
        for parts in look["findings"]:
            hosts.setdefault(Finding(*parts), []).append(host)
    found, well = [], set()
    for each, named_hosts in hosts.items():
        if each.level == OK and each.what in well:
            continue
        if each.level == OK:
            well.add(each.what)
        everywhere = len(named_hosts) == len(looks)
        text = each.text if everywhere else f"{named(named_hosts)}: {each.text}"
        found.append(Finding(each.level, each.what, text, each.fix))
    return found


def _of_disks(looks: dict[str, dict[str, Any]]) -> list[Finding]:
    """Hosts that read or write the run directory at half the others' speed or less."""
    disks = {host: disk for host, look in looks.items() if (disk := look["facts"]["disk"])}
    found = []
    for way in ("write", "read"):
        seconds = [1.0 / disk[way] for disk in disks.values()]
        slow = outliers(way, seconds, list(disks), _SLOW_DISK)
        if slow:
            told = ", ".join(f"{each.host} {each.ratio:.1f} x" for each in slow[:_SHOWN])
            text = f"slower to {way} than the median host: {told}"
            found.append(Finding(NOTE, "disk", text, "its mount and network"))
    return found


def _of_clocks(clocks: Sequence[float], hosts: Sequence[str]) -> list[Finding]:
    if len(clocks) == 1:
        return []
    apart = max(clocks) - min(clocks)
    off = {hosts[rank]: ahead for rank, ahead in enumerate(clocks) if abs(ahead) > _CLOCK_SECONDS}
    if not off:
        return [Finding(OK, "clocks", f"agree to {apart * 1e3:.1f} ms")]
    told = ", ".join(f"{host} by {ahead:+.1f} s" for host, ahead in list(off.items())[:_SHOWN])
    return [Finding(NOTE, "clocks", f"differ from the median: {told}", "chronyc makestep")]


def _of_probe(probe: Probe, slow: Sequence[Outlier], sure: float) -> Finding:
    """Who is slow; bad where somebody needs ``sure`` times the median."""
    if not slow:
        return Finding(OK, probe.name, rate(probe))
    told = ", ".join(f"rank {o.rank} on {o.host} {o.ratio:.2f} x" for o in slow[:_SHOWN])
    more = f" and {len(slow) - _SHOWN} more" if len(slow) > _SHOWN else ""
    text = f"{rate(probe)}; slower than the median: {told}{more}"
    if slow[0].ratio < sure:
        return Finding(NOTE, probe.name, text, "again once nothing else runs on these cores")
    return Finding(BAD, probe.name, text, "the run without these hosts")
