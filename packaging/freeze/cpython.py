"""The static libraries and CPython itself, each a layer made by a short shell recipe."""

from __future__ import annotations

import os
import shutil
from typing import TYPE_CHECKING

from distribution import write_distribution
from layers import Layer, recipe, text_of
from sources import PACKAGES, source_layer

if TYPE_CHECKING:
    from pathlib import Path

    from layers import Cache
    from sources import Source
    from toolchain import Toolchain

LIBRARIES = tuple(name for name in PACKAGES if name != "python3.11")


def have_distribution(
    cache: Cache, tools: Toolchain, locked: dict[str, Source], packaging: Path
) -> tuple[Path, str]:
    """The CPython distribution that PyOxidizer takes: its archive, and the layer's key. Raises Failure."""
    keys = []
    libraries = []
    for name in LIBRARIES:
        script = packaging / "libraries" / f"{name}.sh"
        source = source_layer(cache, locked[name])

        def build(folder: Path, source: Layer = source, script: Path = script, name: str = name) -> None:
            for part in ("lib", "include"):
                (folder / part).mkdir()
            _run_recipe(cache, tools, name, script, source, folder)

        layer = Layer(f"library-{name}", (source.key, tools.key, *text_of(script), recipe(build)), build)
        libraries.append(layer)
        keys.append(layer.key)

    source = source_layer(cache, locked["python3.11"])
    recipes = packaging / "cpython"

    def build_cpython(folder: Path) -> None:
        deps = folder / "deps"
        for library in libraries:
            shutil.copytree(cache.have(library), deps, dirs_exist_ok=True)
        work = _run_recipe(cache, tools, "cpython", recipes / "build.sh", source, folder, DEPS=str(deps))
        hidden = str(folder)
        write_distribution(
            source=work,
            prefix=folder / "prefix/usr/local",
            libraries=deps / "lib",
            hidden=hidden,
            archive=folder / "distribution.tar.zst",
            scratch=folder / "unpacked",
            run=lambda *command: cache.run("cpython", command, env=tools.environment()),
        )
        for part in ("deps", "prefix", "unpacked"):
            shutil.rmtree(folder / part)
        shutil.rmtree(work)

    layer = Layer(
        "cpython",
        (
            source.key,
            tools.key,
            *keys,
            *text_of(recipes, packaging / "freeze" / "distribution.py"),
            recipe(build_cpython),
        ),
        build_cpython,
    )
    return cache.have(layer) / "distribution.tar.zst", layer.key


def _run_recipe(
    cache: Cache, tools: Toolchain, name: str, script: Path, source: Layer, folder: Path, **more: str
) -> Path:
    """Run a recipe in a copy of the source; returns the copy, which a library has no more use for."""
    layer = folder.parent.name
    work = folder / "work"
    shutil.copytree(cache.have(source) / "tree", work, symlinks=True)
    environment = tools.environment(
        OUT=str(folder),
        JOBS=str(os.cpu_count() or 1),
        RECIPES=str(script.parent),
        FREEZE_PREFIX_MAP=f"-ffile-prefix-map={work}=.",
        **more,
    )
    cache.run(layer, ["bash", "-euxo", "pipefail", script], cwd=work, env=environment)
    if name != "cpython":
        shutil.rmtree(work)
    return work
