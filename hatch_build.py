"""Build hook: generates the gRPC code of `protos/zero_ps.proto` into the package.

It runs for wheels (from the tree or from an sdist) and for editable installs, so nobody needs protoc and
the generated files are never committed. The generators come from `build-system.requires`.
"""

import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

PROTO = "protos/zero_ps.proto"


class ProtocolBuildHook(BuildHookInterface):
    """Called by hatchling before it collects the files of a wheel."""

    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        generate(Path(self.root))


def generate(root: Path) -> None:
    """Writes messages (`_pb2.py`, `.pyi`) and services (`_pb2_grpc.py`, `.pyi`) beside the .proto file.

    A file whose content would not change is left alone, and one that does is replaced in one step: a
    process that imports it meanwhile never sees half a file.
    """
    from grpc_tools import protoc

    include = Path(protoc.__file__).with_name("_proto")
    with tempfile.TemporaryDirectory(prefix=".protoc-", dir=root) as out:
        status = protoc.main(
            [
                "protoc",
                f"--proto_path={root}",
                f"--proto_path={include}",
                f"--python_out={out}",
                f"--pyi_out={out}",
                f"--grpc_python_out={out}",
                f"--plugin=protoc-gen-mypy_grpc={_find_plugin('protoc-gen-mypy_grpc')}",
                f"--mypy_grpc_out=quiet,only_sync:{out}",
                str(root / PROTO),
            ]
        )
        if status != 0:
            raise RuntimeError(f"protoc ended with status {status} for {PROTO}; its errors are above")
        for new in sorted((Path(out) / "protos").iterdir()):
            target = root / "protos" / new.name
            if not target.exists() or target.read_bytes() != new.read_bytes():
                new.replace(target)


def _find_plugin(name: str) -> str:
    # pip puts the scripts of its isolated build environment on PATH; without isolation they are beside
    # the interpreter.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    plugin = shutil.which(name, path=path)
    if plugin is None:
        raise RuntimeError(f"{name} is not on PATH; it comes with mypy-protobuf (see build-system.requires)")
    return plugin
