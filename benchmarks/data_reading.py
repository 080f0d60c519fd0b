"""Reading speed, start-up time and memory against torchdata and mosaicml-streaming.

    pip install torchdata mosaicml-streaming
    python -m benchmarks.data_reading [--part speed|start-up] [--rounds 7] [--largest 1000000000]

Speed: the same random tokens (K2's vocabulary, 4 bytes each) as Megatron files for us and for
torchdata, as MDS shards for mosaicml-streaming, in the page cache. Each reader has a process
of its own and waits there while another takes its turn; the one that begins changes each
round. Printed are the median of the rounds, their range, and the median of the ratios to
torchdata in the same round.

Start-up and memory: each reader opens a corpus of n windows in a fresh process and gives its
first batch; time and memory are what that adds after the imports. No terabytes are written:
our token file and torchdata's is sparse (holes read as zeros) beside a real index with a
document every million tokens; mosaicml-streaming gets a true index of all its shards, where
every entry names one and the same file. A peer that would not fit into the memory of this
machine is not run; its figure is then marked ~ and scaled from the largest that was.
"""

import argparse
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import numpy as np

from benchmarks.reading_peers import LENGTH, READERS, TOKEN
from benchmarks.report_lines import print_header, spread
from kimi_pretrain.data.indexed import IndexedWriter, index_bytes

VOCABULARY = 163_840
DOCUMENT = 1_000_000  # tokens a document of the sparse corpora
PACKAGES = ["torch", "numpy", "torchdata", "mosaicml-streaming"]
SIZES = [10**6, 10**7, 10**8, 10**9]
MEASURE_SECONDS = 300


def write_corpus(root: Path, samples: int) -> None:
    """The same random tokens in Megatron's and Mosaic's layouts."""
    from streaming import MDSWriter

    rng = np.random.default_rng(0)
    tokens = rng.integers(0, VOCABULARY, samples * LENGTH + 1, dtype=TOKEN)
    cuts = np.flatnonzero(rng.random(len(tokens) - 1) < 1 / 800) + 1  # about 800 a document
    with IndexedWriter(root / "tokens", VOCABULARY) as writer:
        writer.add_documents(tokens, np.diff(np.concatenate(([0], cuts, [len(tokens)]))))
    columns = {"tokens": f"ndarray:int32:{LENGTH + 1}"}
    with MDSWriter(out=str(root / "mds"), columns=columns) as mds:
        for sample in range(samples):
            mds.write({"tokens": tokens[sample * LENGTH : (sample + 1) * LENGTH + 1]})


def write_sparse_corpus(root: Path, samples: int) -> None:
    """A corpus of any size in the space of its indices; see the module's text."""
    from streaming import MDSWriter

    total = samples * LENGTH + 1
    lengths = [DOCUMENT] * (total // DOCUMENT) + [total % DOCUMENT]
    with (root / "tokens.idx").open("wb") as file:
        file.writelines(index_bytes(lengths, TOKEN))
    with (root / "tokens.bin").open("wb") as file:
        file.truncate(total * TOKEN.itemsize)
    with MDSWriter(out=str(root / "mds"), columns={"tokens": f"ndarray:int32:{LENGTH + 1}"}) as mds:
        for _ in range(4000):
            mds.write({"tokens": np.zeros(LENGTH + 1, dtype=np.int32)})
    index = json.loads((root / "mds" / "index.json").read_text())
    (shard,) = index["shards"]
    index["shards"] = [shard] * (samples // shard["samples"])
    (root / "mds" / "index.json").write_text(json.dumps(index))


def take_turns(name: str, root: Path, samples: int, batch: int, count: int) -> None:
    """A reader's process: at each line of input read `count` batches, tell the seconds."""
    batches = READERS[name](root, samples, batch)
    for _ in sys.stdin:
        start = time.perf_counter()
        for _ in range(count):
            tokens = next(batches)
        print(time.perf_counter() - start, flush=True)
        assert tokens.dtype.itemsize == 8


def speeds(root: Path, samples: int, batch: int, rounds: int) -> dict[str, list[float]]:
    """Million tokens a second of each reader in each round; one epoch, nothing read twice."""
    count = samples // batch // (rounds + 1)
    names = list(READERS)
    readers = {
        name: subprocess.Popen(
            command("--take-turns", name, root, samples, batch, count),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for name in names
    }
    for path in root.rglob("*.*"):  # into the page cache, whatever was evicted meanwhile
        if path.is_file():
            path.read_bytes()
    results: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds + 1):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            asked, told = readers[name].stdin, readers[name].stdout
            assert asked is not None
            assert told is not None
            print(file=asked, flush=True)
            seconds = float(told.readline())
            if turn:  # the first round warms up
                results[name].append(count * batch * LENGTH / seconds / 1e6)
    for reader in readers.values():
        reader.communicate()
    return results


def memory() -> dict[str, float]:
    """MB of this process: its own, shared, pages of mapped files, and the peak of all."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    keys = {"own": "RssAnon", "shared": "RssShmem", "file": "RssFile", "peak": "VmHWM"}
    return {name: int(fields[key].split()[0]) / 1024 for name, key in keys.items()}


def start_up(name: str, root: Path, samples: int) -> dict[str, float]:
    """Seconds to the first batch and MB added by then and after 200 batches."""
    for package in ("torchdata.stateful_dataloader", "streaming", "kimi_pretrain.data.batches"):
        __import__(package)
    before = memory()
    start = time.perf_counter()
    batches = READERS[name](root, samples, 8)
    next(batches)
    seconds = time.perf_counter() - start
    for _ in range(200):
        next(batches)
    added = {key: value - before[key] for key, value in memory().items()}
    return {"seconds": seconds, **added}


def command(*arguments: object) -> list[str]:
    """Command line of another process of this benchmark; the peers' warnings stay out."""
    quiet = [sys.executable, "-W", "ignore", "-m", "benchmarks.data_reading"]
    return [*quiet, *map(str, arguments)]


def child(*arguments: object) -> dict[str, float] | None:
    """Run this module's other half in a fresh process; None if it failed or took too long."""
    try:
        done = subprocess.run(
            command(*arguments),
            capture_output=True,
            text=True,
            timeout=MEASURE_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return None
    if done.returncode:
        print(done.stderr.strip().splitlines()[-1:], file=sys.stderr)
        return None
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def available() -> float:
    """MB of memory this machine could still give."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable"):
            return int(line.split()[1]) / 1024
    return math.inf


def print_speeds(samples: int, rounds: int) -> None:
    with tempfile.TemporaryDirectory() as directory:
        write_corpus(Path(directory), samples)
        for batch in (8, 64):
            results = speeds(Path(directory), samples, batch, rounds)
            print(f"\nbatches of {batch} x {LENGTH + 1} tokens: million tokens a second")
            for name, values in results.items():
                pairs = zip(values, results["torchdata"], strict=True)
                ratio = statistics.median(ours / theirs for ours, theirs in pairs)
                print(f"  {name:32} {spread(values):28} {ratio:6.2f} x torchdata", flush=True)


def print_start_up(largest: int) -> None:
    print("\nfirst batch and memory by the number of windows (MB added after the imports)")
    print(f"  {'reader':32} {'windows':>13} {'seconds':>9} {'own':>8} {'shared':>8} {'peak':>8}")
    last: dict[str, tuple[int, dict[str, float]]] = {}
    for samples in [n for n in SIZES if n <= largest]:
        with tempfile.TemporaryDirectory() as directory:
            samples = samples // 4000 * 4000
            write_sparse_corpus(Path(directory), samples)
            for name in READERS:
                known = last.get(name)
                scale = samples / known[0] if known else 1.0
                fits = known is None or known[1]["peak"] * scale < 0.6 * available()
                result = child("--start-up", name, directory, samples) if fits else None
                mark = " "
                if result is not None:
                    last[name] = samples, result
                elif known is not None:
                    mark, result = "~", {k: v * scale for k, v in known[1].items()}
                else:
                    print(f"  {name:32} {samples:13,} failed")
                    continue
                print(
                    f"  {name:32} {samples:13,} {mark}{result['seconds']:8.3f} "
                    f"{mark}{result['own']:7.0f} {mark}{result['shared']:7.0f} "
                    f"{mark}{result['peak']:7.0f}",
                    flush=True,
                )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--part", choices=["speed", "start-up"], help="default: both")
    parser.add_argument("--samples", type=int, default=32_768)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--largest", type=int, default=10**9)
    parser.add_argument("--take-turns", nargs=5, metavar=("READER", "DIRECTORY", "N", "B", "C"))
    parser.add_argument("--start-up", nargs=3, metavar=("READER", "DIRECTORY", "WINDOWS"))
    arguments = parser.parse_args()
    if arguments.take_turns:
        name, directory, *numbers = arguments.take_turns
        take_turns(name, Path(directory), *map(int, numbers))
        return
    if arguments.start_up:
        name, directory, samples = arguments.start_up
        print(json.dumps(start_up(name, Path(directory), int(samples))))
        return
    try:
        print_header("data reading", PACKAGES)
    except PackageNotFoundError as missing:
        sys.exit(f"{missing.name} is not installed: pip install torchdata mosaicml-streaming")
    if arguments.part != "start-up":
        print_speeds(arguments.samples, arguments.rounds)
    if arguments.part != "speed":
        print_start_up(arguments.largest)


if __name__ == "__main__":
    main()
