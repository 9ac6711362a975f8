"""Shell commands of the pages: split by bash itself, checked by the program's own parser, and run in this process.

bash runs a block with stand-ins for every program, each of which writes down what it was called with. So quotes, line
continuations, loops and comments mean what they mean to a reader, and a program without a stand-in is an error.
"""

import argparse
import os
import re
import runpy
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from unittest.mock import patch

import typer
from typer.testing import CliRunner

from flowbp.cli import commands as cli
from flowbp.config import build_method, load, parse_overrides
from flowbp.rewards.registry import find_source
from flowbp.training.sweep import planned

ROOT = Path(__file__).parents[1]
APP = typer.main.get_command(cli.app)
BASH = shutil.which("bash")
STAND_IN = f'#!{BASH}\nprintf "%s\\0" "${{0##*/}}" "$@" >> "$CALLS"; printf "\\n\\0" >> "$CALLS"\n'


class Wrong(Exception):
    """A command that would not run as the page has it."""


# -- from text to commands -----------------------------------------------------------------------------------------


def calls(script: str, folder: Path) -> list[list[str]]:
    """The commands that `script` gives to bash, each as its arguments. Raises Wrong where bash finds an error."""
    stand_ins, record = folder / "stand-ins", folder / "calls"
    if not stand_ins.exists():
        stand_ins.mkdir(parents=True)
        for program in CHECKS:
            (stand_ins / program).write_text(STAND_IN)
            (stand_ins / program).chmod(0o755)
    record.write_bytes(b"")
    environment = {"PATH": str(stand_ins), "CALLS": str(record)}
    done = subprocess.run([BASH, "-euc", script], env=environment, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        raise Wrong(f"{script}: {done.stderr.strip()}")
    arguments = record.read_text().split("\0")[:-1]
    found: list[list[str]] = [[]]
    for argument in arguments:
        if argument == "\n":
            found.append([])
        else:
            found[-1].append(argument)
    return found[:-1]


# -- what each program takes ---------------------------------------------------------------------------------------


def check(arguments: Sequence[str]) -> None:
    """Raise Wrong unless the program would take these arguments. Nothing is run."""
    program, *rest = arguments
    try:
        CHECKS[program](rest)
    except (Exception, SystemExit) as error:  # those of click stand in typer or beside it, by its version
        said = error.format_message() if hasattr(error, "format_message") else error
        raise Wrong(f"{' '.join(arguments)}: {said}") from error


def check_flowbp(arguments: list[str]) -> None:
    """The options of a subcommand, and the config that its overrides make. A run's folder is taken for the demo's."""
    name, *rest = arguments
    if name not in APP.commands:
        raise ValueError(f"no command {name!r}")
    if name == "bench":
        return check_module("flowbp_kernels.bench", rest)
    given = APP.commands[name].make_context(name, rest).params
    overrides = given.get("overrides") or ()
    if name == "plan":
        build_method({"name": given["method"]} | parse_overrides(overrides))
    elif name == "rewards" and given["name"] is not None and ":" not in given["name"]:
        find_source(given["name"])
    elif name == "sweep":
        planned(given["config"], overrides, given["out"])
    elif name == "presets" and given["name"] is not None:
        load(given["name"])
    elif "config" in given:
        load("demo" if given["config"].startswith("runs/") else given["config"], overrides)


def check_python(arguments: list[str]) -> None:
    if arguments[0] == "-c":
        compile(arguments[1], "python -c", "exec")
    elif arguments[:2] == ["-m", "flowbp"]:
        check_flowbp(arguments[2:])
    elif arguments[:2] == ["-m", "pytest"]:
        check_pytest(arguments[2:])
    elif arguments[0] == "-m":
        check_module(arguments[1], arguments[2:])
    else:
        check_script(ROOT / arguments[0], arguments[1:])


class Parsed(BaseException):
    """A script has read its arguments and would begin to work."""


@contextmanager
def stopped_after_parsing(program: str, arguments: list[str]):
    """Run a script as far as its `parse_args`; of one that has none, the arguments must be none."""
    parse, argv = argparse.ArgumentParser.parse_args, sys.argv

    def parse_and_stop(self, args=None, namespace=None):
        parse(self, args, namespace)
        raise Parsed

    argparse.ArgumentParser.parse_args, sys.argv = parse_and_stop, [program, *arguments]
    error, argparse.ArgumentParser.error = argparse.ArgumentParser.error, refuse
    try:
        yield
    except Parsed:
        pass
    finally:
        argparse.ArgumentParser.parse_args, sys.argv = parse, argv
        argparse.ArgumentParser.error = error


def refuse(parser: argparse.ArgumentParser, message: str) -> None:
    raise ValueError(message)


def check_script(path: Path, arguments: list[str]) -> None:
    if not path.is_file():
        raise FileNotFoundError(f"there is no {path}")
    if "parse_args" not in path.read_text() and path.name != "run.py":
        if arguments:
            raise ValueError(f"{path.name} takes no arguments")
        return
    # as Python does, so that a script may import another beside it
    with stopped_after_parsing(str(path), arguments), patch.object(sys, "path", [str(path.parent), *sys.path]):
        runpy.run_path(str(path), run_name="__main__")


def check_module(name: str, arguments: list[str]) -> None:
    if name == "flowbp_kernels":  # prints what runs
        if arguments:
            raise ValueError(f"{name} takes no arguments")
        return
    with stopped_after_parsing(name, arguments):
        if name == "flowbp_kernels.bench":
            __import__(name, fromlist=["main"]).main(arguments)
        else:
            runpy.run_module(name, run_name="__main__", alter_sys=True)


def check_pytest(arguments: list[str]) -> None:
    """Files exist; what -k names stands in them; -m names a marker."""
    parser = argparse.ArgumentParser()
    parser.add_argument("files", nargs="*")
    for flag in ("-k", "-m", "-n"):
        parser.add_argument(flag)
    parser.add_argument("-q", action="store_true")
    parser.error = lambda message: refuse(parser, message)
    given = parser.parse_args(arguments)
    files = [ROOT / name for name in given.files or ["tests"]]
    for path in files:
        if not path.exists():
            raise FileNotFoundError(f"there is no {path}")
    if given.k is not None and not any(given.k in path.read_text() for path in files):
        raise ValueError(f"no test has {given.k!r} in its name")
    if given.m is not None:
        markers = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]["markers"]
        if given.m not in [marker.partition(":")[0] for marker in markers]:
            raise ValueError(f"no marker {given.m!r}")


def check_torchrun(arguments: list[str]) -> None:
    from torch.distributed.run import get_args_parser

    given = get_args_parser().parse_args(arguments)
    if not given.module:
        raise ValueError("the pages start modules: torchrun ... -m flowbp ...")
    check_python(["-m", given.training_script, *given.training_script_args])


def check_accelerate(arguments: list[str]) -> None:
    from accelerate.commands.launch import launch_command_parser

    if arguments[0] != "launch":
        raise ValueError(f"accelerate {arguments[0]}")
    given = launch_command_parser().parse_args(arguments[1:])
    if not (ROOT / given.config_file).is_file():
        raise FileNotFoundError(f"there is no {given.config_file}")
    check_python(["-m", given.training_script, *given.training_script_args])


def check_make(arguments: list[str]) -> None:
    """Targets and variables stand in the Makefile."""
    makefile = (ROOT / "Makefile").read_text()
    for argument in arguments:
        name, assigns, _ = argument.partition("=")
        known = rf"^(?:[\w-]+: )?{name} *\??=|\$[({{]{name}[)}}]" if assigns else rf"^{name}(?: [\w-]+)*:"
        if not re.search(known, makefile, re.MULTILINE):
            raise ValueError(f"the Makefile has no {name}")


@cache
def check_hf(arguments: tuple[str, ...]) -> None:
    """Command and options, by the program itself: with --help it reads them all and does nothing."""
    command = [sys.executable, "-m", "huggingface_hub.cli.hf", *arguments, "--help"]
    done = subprocess.run(command, env=os.environ | {"HF_HUB_OFFLINE": "1"}, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(re.search(r"Error: (.*)", done.stderr)[1])


def check_pip(arguments: list[str]) -> None:
    """Extras of this package are extras that it has."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for argument in arguments:
        for wanted in re.findall(r"^(?:\.|flowbp)\[(.*)\]$", argument):
            if missing := set(wanted.split(",")) - extras.keys():
                raise ValueError(f"there is no extra {missing}")


CHECKS = {
    "flowbp": check_flowbp,
    "python": check_python,
    "pytest": check_pytest,
    "torchrun": check_torchrun,
    "accelerate": check_accelerate,
    "make": check_make,
    "hf": lambda arguments: check_hf(tuple(arguments)),
    "pip": check_pip,
    "sha256sum": lambda arguments: None,
}


# -- running -------------------------------------------------------------------------------------------------------


def run(arguments: Sequence[str]) -> None:
    """Run a command of flowbp, a line of Python or a script of the tests, in this process and folder. Raises Wrong
    where it fails.
    """
    program, *rest = arguments
    if program == "python" and rest[:2] == ["-m", "flowbp"]:
        program, rest = "flowbp", rest[2:]
    if program == "flowbp":
        done = CliRunner().invoke(cli.app, rest)
        if done.exit_code:
            raise Wrong(f"{' '.join(arguments)}: {done.exception or ''}\n{done.output}")
    elif program == "python" and rest[0] == "-c":
        exec(compile(rest[1], "python -c", "exec"), {})
    elif program == "python" and rest[0] == "-m":
        runpy.run_module(rest[1], run_name="__main__", alter_sys=True)
    elif program == "python" and rest[0].startswith("tests/"):
        with patch.object(sys, "argv", rest):
            runpy.run_path(str(ROOT / rest[0]), run_name="__main__")
    else:
        raise Wrong(f"{' '.join(arguments)} cannot be run by a test: mark its block, such as ```bash takes=long")


# -- commands within a line ----------------------------------------------------------------------------------------

METAVARIABLES = {
    "CONFIG": "demo",
    "METHOD": "flowbp-lagrange",
    "RUN": "runs/demo",
    "PATH": "runs/demo",
    "FILE": "file",
    "FOLDER": "folder",
    "MORE": "400",
    "N": "2",
}


def example(said: str) -> str:
    """A command of the prose as one that can be checked: `flowbp train CONFIG [key=value ...]` -> flowbp train demo."""
    said = re.sub(r"\b(?:key|field)=(?:value|a,b)\b|\boptions\b|\.\.\.", "", said)
    said = re.sub(r"^(flowbp rewards )\[?NAME\]?", r"\1clip", said)
    said = re.sub(r"^(flowbp presets )\[?NAME\]?", r"\1demo", said)
    for name, value in METAVARIABLES.items():
        said = re.sub(rf"\b{name}\b", value, said)
    return re.sub(r"(?<=\s)\[|\](?=\s|$)", "", said)


def is_command(said: str) -> bool:
    """Whether a line begins with a program that is known here, and says more than its name."""
    return re.match(rf"(?:{'|'.join(CHECKS)}) ", said) is not None


def is_name(said: str) -> bool:
    """Whether the words name a subcommand, such as `flowbp train`, and do not call it."""
    program, _, command = said.partition(" ")
    return program == "flowbp" and command in APP.commands or said == "accelerate launch"
