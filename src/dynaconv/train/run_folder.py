"""The files of a run, and who may write them."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dynaconv import _checks
from dynaconv._files import atomic_write_text
from dynaconv.train.loading import load_recipe, recipe_to_yaml
from dynaconv.train.recipe import Recipe

# What a resumed run may change without becoming another run.
FREE_KEYS = ("data.num_workers", "trainer.accelerator")
OWN_FILES = ("config.yaml", "metrics.csv", "results.json", "report.html", "gallery.npz", "masks.npz")
OWN_FOLDERS = ("checkpoints", "tensorboard", "model", "figures")
# A disk that takes no more, and a path where nothing can be written.
_DISK = (errno.ENOSPC, errno.EROFS, errno.EDQUOT)
_PATH = (errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST)


class RunFolder:
    """Where a run keeps its files."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config = self.path / "config.yaml"
        self.metrics = self.path / "metrics.csv"
        self.checkpoints = self.path / "checkpoints"
        self.last, self.best = self.checkpoints / "last.ckpt", self.checkpoints / "best.ckpt"
        self.model = self.path / "model"

    def holds_run(self) -> bool:
        """Whether a run was started here."""
        return self.config.exists() or self.checkpoints.exists() or self.model.exists()

    def check(self, recipe: Recipe, *, resume: bool, overwrite: bool) -> None:
        """Refuse what would spoil another run; writes nothing.

        Raises:
            FileExistsError: a run is here, and neither resume nor overwrite was asked for.
            FileNotFoundError: nothing to resume; ValueError: resumed with another recipe; OSError: not a folder.
        """
        if self.path.exists() and not self.path.is_dir():
            raise _checks.train_not_a_folder(self.path)
        if not resume:
            if self.holds_run() and not overwrite:
                raise _checks.train_run_exists(self.path)
        elif not self.config.is_file():
            raise _checks.train_no_checkpoint(self.last)
        else:
            self._same_recipe(recipe)

    def create(self, recipe: Recipe, *, overwrite: bool) -> None:
        """Make the folder and write config.yaml; with `overwrite` the files of an earlier run go first."""
        if overwrite:
            for name in OWN_FILES:
                (self.path / name).unlink(missing_ok=True)
            for name in OWN_FOLDERS:
                shutil.rmtree(self.path / name, ignore_errors=True)
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        atomic_write_text(self.config, recipe_to_yaml(recipe))

    def _same_recipe(self, recipe: Recipe) -> None:
        there, here = (_flat(r.to_dict()) for r in (load_recipe(self.config), recipe))
        for key in sorted(there.keys() | here.keys()):
            if key not in FREE_KEYS and there.get(key) != here.get(key):
                raise _checks.train_other_recipe(self.path, key, there.get(key), here.get(key))


@contextmanager
def clear_disk_errors(path: Path) -> Iterator[None]:
    """Turn a full or read-only disk into one sentence."""
    try:
        yield
    except OSError as error:
        ours = error.filename is not None and str(error.filename).startswith(str(path))
        if error.strerror is None or not (error.errno in _DISK or (error.errno in _PATH and ours)):
            raise
        raise _checks.train_cannot_write(path, error) from None


def _flat(sections: dict) -> dict[str, object]:
    flat: dict[str, object] = {}
    for name, value in sections.items():
        flat.update(
            {f"{name}.{k}": v for k, v in value.items()} if isinstance(value, dict) else {name: value}
        )
    return flat
