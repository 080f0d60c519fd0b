"""Containers as words of the command that starts a node's ranks inside an image."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Container:
    """An image, what of the node is visible in it, and who runs it: pyxis or apptainer."""

    image: str
    runtime: str
    mounts: tuple[str, ...]
    folder: str  # the working directory, the same path inside
    gpus: bool

    def step_options(self, environment: Mapping[str, str]) -> list[str]:
        """Options of srun."""
        if self.runtime != "pyxis":
            return []
        return [
            f"--container-image={self.image}",
            *([f"--container-mounts={','.join(self.mounts)}"] if self.mounts else []),
            f"--container-workdir={self.folder}",
            *([f"--container-env={','.join(environment)}"] if environment else []),
        ]

    def exports(self, environment: Mapping[str, str]) -> dict[str, str]:
        """Variables to export. An image's own win over the node's, not over apptainer's."""
        if self.runtime != "apptainer":
            return dict(environment)
        inside = {f"APPTAINERENV_{name}": value for name, value in environment.items()}
        return {**environment, **inside}

    def command(self) -> list[str]:
        """Words before the ranks' own."""
        if self.runtime != "apptainer":
            return []
        return [
            *("apptainer", "exec"),
            *(["--nv"] if self.gpus else []),
            *(f"--bind={mount}" for mount in self.mounts),
            f"--pwd={self.folder}",
            self.image,
        ]
