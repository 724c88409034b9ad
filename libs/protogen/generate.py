"""Generates the stubs and the descriptor set from `protos/` into `libs/protogen`.

    python libs/protogen/generate.py            writes
    python libs/protogen/generate.py --check    fails where writing would change something

What is generated is committed, so that nobody needs a compiler to run the services.
"""

from __future__ import annotations

import argparse
import filecmp
import shutil
import sys
import tempfile
from pathlib import Path

import grpc_tools
from google.api import annotations_pb2
from google.protobuf import descriptor_pb2, duration_pb2, field_mask_pb2, timestamp_pb2
from grpc_tools import protoc
from protovalidate._gen.buf.validate import validate_pb

ROOT = Path(__file__).resolve().parents[2]
PROTOS = ROOT / "protos"
OUTPUT = ROOT / "libs" / "protogen"
DESCRIPTOR_SET = Path("usameter") / "usameter.binpb"
PLUGINS = ("protoc-gen-mypy", "protoc-gen-mypy_grpc")


def main() -> int:
    """Generate, or with --check compare; the exit code says whether all is well."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing, fail where something would change")
    check = parser.parse_args().check
    with tempfile.TemporaryDirectory() as scratch:
        fresh = Path(scratch) / "out"
        fresh.mkdir()
        generate(fresh, scratch=Path(scratch))
        stale = differing(fresh, OUTPUT)
        if check:
            for path in stale:
                print(f"out of date: libs/protogen/{path} (run `make proto`)", file=sys.stderr)
            return 1 if stale else 0
        for package in ("usameter", "buf"):
            shutil.rmtree(OUTPUT / package, ignore_errors=True)
            shutil.copytree(fresh / package, OUTPUT / package)
    return 0


def generate(output: Path, *, scratch: Path) -> None:
    """Write the stubs of every file of `protos/`, and the descriptor set, under `output`."""
    rules = scratch / "rules.binpb"
    rules.write_bytes(validation_rules().SerializeToString())
    annotations = Path(annotations_pb2.__file__).parents[2]
    builtin = Path(grpc_tools.__file__).parent / "_proto"
    sources = sorted(str(path.relative_to(PROTOS)) for path in PROTOS.rglob("*.proto"))
    # Scripts of the environment that runs this; it need not be on the PATH.
    plugins = [f"--plugin={name}={Path(sys.executable).with_name(name)}" for name in PLUGINS]
    inputs = ["protoc", *plugins, f"-I{PROTOS}", f"-I{annotations}", f"-I{builtin}", f"--descriptor_set_in={rules}"]
    python = [f"--python_out={output}", f"--mypy_out=readable_stubs,quiet:{output}"]
    services = [f"--grpc_python_out={output}", f"--mypy_grpc_out=readable_stubs,only_async,quiet:{output}"]
    run([*inputs, *python, *services, *sources])
    # The rules travel in the options of our messages, so their own descriptor must be importable.
    run([*inputs, *python, "buf/validate/validate.proto"])
    run(
        [
            *inputs,
            "--include_imports",
            "--include_source_info",
            f"--descriptor_set_out={output / DESCRIPTOR_SET}",
            *sources,
        ]
    )
    for folder in [path for path in output.rglob("*") if path.is_dir()] + [
        output / "usameter",
        output / "buf",
    ]:
        (folder / "__init__.py").touch()


def validation_rules() -> descriptor_pb2.FileDescriptorSet:
    """The descriptor of buf/validate/validate.proto, out of the library that enforces the rules.

    Its source is in no wheel; the descriptor is, and the compiler takes it just as well.
    """
    rules = descriptor_pb2.FileDescriptorProto()
    rules.ParseFromString(validate_pb.desc().proto.to_binary())
    dependencies = [module.DESCRIPTOR for module in (descriptor_pb2, duration_pb2, field_mask_pb2, timestamp_pb2)]
    files = [descriptor_pb2.FileDescriptorProto.FromString(each.serialized_pb) for each in dependencies]
    return descriptor_pb2.FileDescriptorSet(file=[*files, rules])


def run(arguments: list[str]) -> None:
    """Run the compiler; it prints what is wrong itself."""
    if protoc.main(arguments) != 0:
        raise SystemExit("the protobuf compiler refused; see above")


def differing(fresh: Path, current: Path) -> list[Path]:
    """The generated files that are missing, changed or left over in `current`."""
    names = {path.relative_to(fresh) for path in fresh.rglob("*") if path.is_file()}
    standing = {
        path.relative_to(current)
        for package in ("usameter", "buf")
        for path in (current / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    common = names & standing
    changed = {name for name in common if not filecmp.cmp(fresh / name, current / name, shallow=False)}
    return sorted((names ^ standing) | changed)


if __name__ == "__main__":
    sys.exit(main())
