"""What an installation has to bring."""

import importlib.metadata
import re
import shutil
import subprocess
import sys
from pathlib import Path

import grpc
import pytest

import protos
import ps
import trainer
from protos import zero_ps_pb2, zero_ps_pb2_grpc

ROOT = Path(__file__).parent.parent


def test_generated_code_is_importable_and_typed() -> None:
    folder = Path(protos.__file__).parent
    for name in ("zero_ps_pb2.py", "zero_ps_pb2.pyi", "zero_ps_pb2_grpc.py", "zero_ps_pb2_grpc.pyi"):
        assert (folder / name).is_file(), f"{name} is missing: run 'make protos'"
    methods = {method.name for method in zero_ps_pb2.DESCRIPTOR.services_by_name["ParameterServer"].methods}
    assert {"Status", "Pull", "Push", "Step", "Commit"} <= methods
    assert hasattr(zero_ps_pb2_grpc, "ParameterServerStub")


@pytest.mark.parametrize("package", [protos, ps, trainer], ids=lambda package: package.__name__)
def test_packages_carry_the_typed_marker(package: object) -> None:
    assert (Path(package.__file__).parent / "py.typed").is_file()  # type: ignore[attr-defined]


def test_the_lower_bound_of_grpcio_is_what_the_generated_code_asks_for() -> None:
    requirements = importlib.metadata.requires("zero-ps") or []
    bounds = dict(
        re.match(r"([\w-]+)>=([\d.]+)$", line).groups() for line in requirements if ">=" in line and ";" not in line
    )  # type: ignore[union-attr]
    assert bounds["grpcio"] == zero_ps_pb2_grpc.GRPC_GENERATED_VERSION
    generated = Path(zero_ps_pb2.__file__).read_text()
    version = re.search(r"# Protobuf Python Version: ([\d.]+)", generated)
    assert version is not None
    assert bounds["protobuf"] == version.group(1)
    assert grpc.__version__


def test_the_command_is_installed() -> None:
    (script,) = (point for point in importlib.metadata.entry_points(group="console_scripts") if point.name == "zero-ps")
    assert script.value == "ps.cli:main"
    assert not [
        point
        for point in importlib.metadata.entry_points(group="console_scripts")
        if point.name == "ps" and point.dist and point.dist.name == "zero-ps"
    ]


def test_servers_and_trainers_do_not_import_each_other() -> None:
    command = shutil.which("lint-imports", path=str(Path(sys.executable).parent))
    if command is None:
        pytest.skip("import-linter is not installed")
    result = subprocess.run([command, "--no-cache"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout
    assert "servers and trainers know nothing of each other KEPT" in result.stdout
